"""What the dispatcher needs to know about a device. Constructible by hand, so that every rule is tested without a
GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from flash_attend.tracing import constant_when_compiled

__all__ = ["DeviceTarget", "driver_version", "interpreting", "release", "triton_version"]

DRIVER = Path("/proc/driver/nvidia/version")


@cache
def triton_version() -> str | None:
    """Triton's version as its metadata has it, "unknown" without any, None where there is no Triton.

    Triton itself is not imported: whether it can be is what `Backend.fault` finds out, where a call needs it.
    """
    try:
        if importlib.util.find_spec("triton") is None:
            return None
    except ValueError:  # a module that something else put in its place
        return "unknown"
    for distribution in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def driver_version() -> str:
    """The NVIDIA driver's version, as it says itself. torch knows only which CUDA version the driver serves."""
    try:
        if found := re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", DRIVER.read_text()):
            return found[1]
    except OSError:  # not on every system; asking the tool takes longer
        pass
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown (no nvidia-smi)"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} from nvidia-smi)"
    return answer[0] if answer else "unknown (nvidia-smi names none)"


def release(version: str) -> tuple[int, int] | None:
    """ "3.7.1" as (3, 7); None for what is no version."""
    try:
        major, minor = version.split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return None


@cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter. Triton reads this when it is imported, so it is fixed for a
    process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@dataclass(frozen=True)
class DeviceTarget:
    """A device, as far as kernels care: its kind, its compute capability and its limits."""

    device_type: str  # "cpu", "cuda", "mps", ...
    name: str = ""
    capability: tuple[int, int] | None = None  # CUDA compute capability; None elsewhere (ROCm too)
    shared_memory: int = 0  # bytes that one block may use
    multiprocessors: int = 0  # 0 where lengths do not count: tiles are those of long calls
    triton: str | None = None  # Triton's version, None where it is not installed
    interpreted: bool = False
    absent: bool = False  # a CUDA device that this machine lacks: of tensors without data, while a program is traced
    device: torch.device | None = field(default=None, compare=False, repr=False)  # one of them, if it is at hand
    # "sm_90" and the like; None where there is no CUDA compute capability. No property: a compiler that traces a call
    # takes only a field for a constant.
    arch: str | None = field(init=False, compare=False)

    def __post_init__(self) -> None:
        arch = None if self.capability is None else f"sm_{self.capability[0]}{self.capability[1]}"
        object.__setattr__(self, "arch", arch)

    @staticmethod
    @constant_when_compiled
    def of(device: torch.device) -> DeviceTarget:
        """Describes a device of this process (cached: the properties of a device do not change)."""
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        return _describe(device)

    @staticmethod
    @constant_when_compiled
    def of_any_length(device: torch.device) -> DeviceTarget:
        """The same for calls whose lengths may be symbols: without the number that lengths are compared with."""
        return replace(DeviceTarget.of(device), multiprocessors=0)


@cache
def _describe(device: torch.device) -> DeviceTarget:
    here = DeviceTarget(device.type, triton=triton_version(), interpreted=interpreting(), device=device)
    if device.type != "cuda":
        return here
    if (device.index or 0) >= torch.cuda.device_count():
        return replace(here, absent=True)
    properties = torch.cuda.get_device_properties(device)
    return replace(
        here,
        name=properties.name,
        capability=(properties.major, properties.minor) if torch.version.hip is None else None,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", 0),
        multiprocessors=properties.multi_processor_count,
    )
