"""Every kernel launch goes through here, so that one place knows how, and the ahead-of-time check can watch instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.knobs import runtime
from triton.runtime import driver

__all__ = ["ALIGNMENT", "COMPILER_OPTIONS", "Launch", "Prepared", "begin_aligned", "launch", "recorded_launches"]

COMPILER_OPTIONS = dict(enable_fp_fusion=True)  # asked for by name: Triton 3.10 turns it off by default
ALL_REGISTERS = 255  # that a thread can have: with fewer the assembler may spill to fit a second block beside the first
ALIGNMENT = 16  # bytes: what Triton makes a variant of a kernel for


@dataclass(frozen=True)
class Prepared:
    """A launch with everything but its tensors: made once, for all calls that differ in nothing else.

    Its tensors have the same dtypes each time, and None stands at the same places. The grid is one-dimensional: its
    other dimensions end at 65535.
    """

    kernel: Any
    programs: int
    numbers: tuple[int | float, ...]  # the run-time arguments, after the tensors
    choices: dict[str, Any]  # the compile-time arguments
    num_warps: int
    num_stages: int = 1
    registers: int = ALL_REGISTERS  # of a thread
    hand_over: Callable[[tuple], tuple] = tuple  # what the kernel is given for the tensors
    # By the device's index, -1 for the CPU: what runs a compiled kernel, its function and its metadata, and the
    # arguments that follow the tensors.
    compiled: dict[int, tuple[Callable[..., None], Any, Any, tuple]] = field(default_factory=dict, compare=False)

    @property
    def options(self) -> dict[str, Any]:
        """All that Triton is told beside the arguments."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=self.registers, **COMPILER_OPTIONS)


@dataclass(frozen=True)
class Launch:
    """A launch as it was asked for. Tensors may be on the meta device."""

    prepared: Prepared
    tensors: tuple[Tensor | None, ...]


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


def launch(prepared: Prepared, *tensors: Tensor | None, aligned: bool | None = None) -> None:
    """Runs a kernel on the device of its first tensor; not at all if there are no programs.

    Triton finds a compiled kernel anew at each launch, from all of its arguments. Here it is kept, for tensors whose
    addresses are aligned; others go Triton's way, and so does everything while somebody watches launches by its hooks.
    `aligned` says whether all addresses are, where that is known.
    """
    if prepared.programs == 0:
        return
    if _record is not None:
        _record.append(Launch(prepared, tensors))
        return
    if aligned is None:
        aligned = begin_aligned(*tensors)
    device = tensors[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(prepared, tensors, device, aligned)
    else:
        _run(prepared, tensors, device, aligned)


def begin_aligned(*tensors: Tensor | None) -> bool:
    """Whether all of these tensors begin at an address that is aligned, as those do that torch allocates."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return addresses % ALIGNMENT == 0


def _run(prepared: Prepared, tensors: tuple[Tensor | None, ...], device: int, aligned: bool) -> None:
    kept = prepared.compiled.get(device) if aligned else None
    watched = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls  # by a profiler
    if kept is not None and not watched:
        run, function, metadata, rest = kept
        stream = driver.active.get_current_stream(device)
        # As Triton does it, without what it makes for hooks.
        run(prepared.programs, 1, 1, stream, function, metadata, None, None, None, *prepared.hand_over(tensors), *rest)
        return
    kernel, numbers, choices = prepared.kernel, prepared.numbers, prepared.choices
    compiled = kernel[(prepared.programs,)](*prepared.hand_over(tensors), *numbers, **choices, **prepared.options)
    if aligned and compiled is not None:  # the interpreter compiles nothing
        in_order = (choices[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
        prepared.compiled[device] = compiled.run, compiled.function, compiled.packed_metadata, (*numbers, *in_order)
