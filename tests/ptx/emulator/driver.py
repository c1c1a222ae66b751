"""The package's launches, executed by the machine: compiled for a part that is not there, on tensors of the CPU.

`executed(...)` puts `Runner.run` in the place of `flash_attend.kernels.launch._run`. Only the PTX is needed: the
assembler, which takes most of the time, is left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton import knobs

from emulator import memory as global_memory
from emulator import shared as shared_memory
from emulator.bulk import SWIZZLES, TensorMap
from emulator.machine import Machine, Options
from emulator.memory import GlobalMemory, Region
from emulator.syntax import Kernel, parse
from emulator.translate import Program
from flash_attend.kernels import aot
from flash_attend.kernels import launch as launching
from flash_attend.target import DeviceTarget

__all__ = ["Launched", "Runner", "compile_for", "execute", "executed", "program_of"]

PARAMETERS = 0x20_0000_0000  # addresses of parameters: tensor maps are among them
MAP_BYTES = 128
FORMATS = {"i1": "<?", "i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d"}


@dataclass(frozen=True)
class Launched:
    """What came of one launch."""

    kernel: str
    programs: int
    instructions: int  # executed, by warps
    compiling: float  # seconds
    translating: float
    running: float  # seconds of CPU time
    lines: set[int]  # of the PTX, that were executed
    text: str


@dataclass
class Runner:
    """Compiles for a part and executes."""

    arch: str = "sm_80"
    options: Options = field(default_factory=Options)
    edit: Callable[[str, str], str] = lambda kernel, text: text  # what is made of a kernel's PTX
    launches: list[Launched] = field(default_factory=list)

    def run(self, prepared: launching.Prepared, tensors: tuple[Tensor | None, ...], device: int, aligned: bool) -> None:
        start = time.perf_counter()
        launch = launching.Launch(prepared, tensors)
        compiled = compile_for(self.arch, launch)
        compiled_at = time.perf_counter()
        text = self.edit(prepared.kernel.__name__, compiled.asm["ptx"])
        program = program_of(text)
        translated_at, cpu = time.perf_counter(), time.process_time()
        machines = execute(compiled, launch, program, self.options)
        self.launches.append(
            Launched(
                aot.kernel_name(launch),
                prepared.programs,
                sum(machine.instructions for machine in machines),
                compiled_at - start,
                translated_at - compiled_at,
                time.process_time() - cpu,
                {item.line for machine in machines for n in machine.executed for item in program.blocks[n].code},
                text,
            )
        )


def compile_for(arch: str, launch: launching.Launch) -> Any:
    """Triton's compiled kernel, as far as the PTX."""
    with aot.compiled_for(arch), mock.patch.object(knobs.runtime, "add_stages_inspection_hook", without_assembler):
        return aot.compile_launch(launch)


def execute(compiled: Any, launch: launching.Launch, program: Program, options: Options) -> list[Machine]:
    """Executes a launch, and gives the machines that did."""
    return _Arguments(compiled, launch, program.kernel).execute(program, options)


@lru_cache(maxsize=32)
def program_of(text: str) -> Program:
    """The program of a text, translated once."""
    kernel = parse(text)
    symbols = {name: _address(kernel, name) for name, _ in kernel.parameters}
    return Program(kernel, {"global_smem": shared_memory.BASE, **symbols})


def _address(kernel: Kernel, parameter: str) -> int:
    return PARAMETERS + 256 * [name for name, _ in kernel.parameters].index(parameter)


class _Arguments:
    """A launch's arguments: its tensors in memory, its parameters as bytes."""

    def __init__(self, compiled: Any, launch: launching.Launch, kernel: Kernel) -> None:
        prepared = launch.prepared
        self.compiled, self.programs, self.kernel = compiled, prepared.programs, kernel
        names = prepared.kernel.arg_names
        given = (*prepared.hand_over(launch.tensors), *prepared.numbers)
        self.values = dict(zip(names, given, strict=False)) | prepared.choices
        self.memory = GlobalMemory()
        self.regions: dict[str, tuple[Tensor, Region]] = {}
        for name, value in self.values.items():
            tensor = getattr(value, "base", value)  # that of a descriptor
            if isinstance(tensor, Tensor):
                self.regions[name] = tensor, self.memory.place(name, span_of(tensor), tensor.data_ptr())
        self.memory.build()
        for tensor, region in self.regions.values():
            self.memory.fill(region, bytes_of(tensor), elements_of(tensor), tensor.element_size())
        self.maps: dict[int, TensorMap] = {}
        self.parameters = self._parameters(prepared.kernel)

    def _parameters(self, function: Any) -> dict[str, bytes]:
        """By name. What Triton adds to the signature at its end is scratch memory that nobody uses."""
        metas = iter(getattr(self.compiled.metadata, "tensordesc_meta", None) or [])
        packed: list[bytes] = []
        for key, kind in self.compiled.src.signature.items():
            name = key if isinstance(key, str) else function.arg_names[key]
            if kind.startswith("tensordesc"):
                packed += self._descriptor(name, next(metas), len(packed))
            elif kind != "constexpr":
                packed.append(self._scalar(name, kind))
        sizes = [size for _, size in self.kernel.parameters]
        packed += [bytes(size) for size in sizes[len(packed) :]]
        assert [len(piece) for piece in packed] == sizes, "the parameters are not those of the signature"
        return dict(zip((name for name, _ in self.kernel.parameters), packed, strict=True))

    def _scalar(self, name: str, kind: str) -> bytes:
        if name in self.regions:
            return struct.pack("<Q", global_memory.BASE + self.regions[name][1].start)
        return struct.pack(FORMATS[kind], self.values[name])

    def _descriptor(self, name: str, meta: dict, index: int) -> list[bytes]:
        """A tensor map, the shape and the strides."""
        value, size = self.values[name], meta["elem_size"]
        parameter, _ = self.kernel.parameters[index]
        self.maps[_address(self.kernel, parameter)] = TensorMap(
            name,
            self.regions[name][1].start,
            tuple(value.shape),
            tuple(stride * size for stride in value.strides),
            tuple(meta["block_size"]),
            size,
            SWIZZLES[meta["swizzle"]],
            value.round_f32_to_tf32,
        )
        shape, strides = (
            [struct.pack(form, x) for x in xs] for form, xs in (("<i", value.shape), ("<q", value.strides))
        )
        return [bytes(MAP_BYTES), *shape, *strides]

    def execute(self, program: Program, options: Options) -> list[Machine]:
        step = max(1, options.threads // program.kernel.threads)
        machines = []
        for first in range(0, self.programs, step):
            programs = np.arange(first, min(first + step, self.programs), dtype=np.int64)
            machine = Machine(
                program, self.memory, self.parameters, self.compiled.metadata.shared, self.programs, programs,
                maps=self.maps, options=options,
            )  # fmt: skip
            machine.run()
            machines.append(machine)
        for tensor, region in self.regions.values():
            bytes_of(tensor)[:] = self.memory.bytes[region.start : region.start + region.size]
        return machines


# ---------------------------------------------------------------------------------------------------------------------
# Tensors as bytes
# ---------------------------------------------------------------------------------------------------------------------


def span_of(tensor: Tensor) -> int:
    """Bytes from its first element to its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def bytes_of(tensor: Tensor) -> np.ndarray:
    """A tensor's own memory, with what lies between its elements."""
    span = span_of(tensor)
    if not span:
        return np.empty(0, np.uint8)
    return np.frombuffer((ctypes.c_uint8 * span).from_address(tensor.data_ptr()), np.uint8)


def elements_of(tensor: Tensor) -> np.ndarray:
    """Offsets of its elements, in bytes."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = np.arange(size if stride else min(size, 1), dtype=np.int64)
        offsets = (offsets[:, None] + steps * stride).ravel()
    return offsets * tensor.element_size()


# ---------------------------------------------------------------------------------------------------------------------
# In place of the launch
# ---------------------------------------------------------------------------------------------------------------------


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What `torch.empty` and the like give, full of NaN."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.device.type == "cpu":
            bytes_of(tensor)[:] = 0xFF
        return tensor

    return made


def without_assembler(backend: Any = None, stages: dict | None = None, *_: Any) -> tuple[str, str] | None:
    """Triton's hook for its stages. Without arguments it is asked for what keeps such kernels apart from others."""
    if stages is None:
        return "without assembler", "1"
    stages["cubin"] = lambda source, metadata: b""
    return None


@contextlib.contextmanager
def executed(runner: Runner, multiprocessors: int | None = None) -> Iterator[Runner]:
    """Within this context launches are executed, new tensors are NaN, and the CPU passes for the runner's part."""
    part = aot.PARTS[runner.arch]
    part = replace(part, multiprocessors=multiprocessors or part.multiprocessors)
    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (launching, "_run", runner.run),
            (DeviceTarget, "of", staticmethod(lambda device: part)),
            *((torch, name, _poisoned(getattr(torch, name))) for name in ("empty", "empty_like")),
            (Tensor, "new_empty", _poisoned(Tensor.new_empty)),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        yield runner
