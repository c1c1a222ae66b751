"""Every kernel launch goes through here, so that one place knows how, and the ahead-of-time check can watch instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["COMPILER_OPTIONS", "Launch", "launch", "recorded_launches"]

COMPILER_OPTIONS = dict(
    enable_fp_fusion=True,  # asked for by name: Triton 3.10 turns it off by default
    maxnreg=255,  # all that a thread can have: else the assembler may spill to fit a second block beside the first
)


@dataclass(frozen=True)
class Launch:
    """A launch as it was asked for. Tensors may be on the meta device."""

    kernel: Any
    programs: int
    arguments: tuple
    choices: dict[str, Any]  # compile-time arguments
    num_warps: int
    num_stages: int


_record: list[Launch] | None = None


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within this context nothing runs: launches are collected. For compiling and counting without a GPU."""
    global _record
    outer, _record = _record, []
    try:
        yield _record
    finally:
        _record = outer


def launch(
    kernel: Any, programs: int, arguments: tuple, choices: dict[str, Any], *, num_warps: int, num_stages: int = 1
) -> None:
    """Runs `programs` programs of a kernel on its first tensor's device; none if that is 0.

    The grid is one-dimensional: its other dimensions end at 65535.
    """
    if programs == 0:
        return
    if _record is not None:
        _record.append(Launch(kernel, programs, arguments, choices, num_warps, num_stages))
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **choices, num_warps=num_warps, num_stages=num_stages, **COMPILER_OPTIONS)
