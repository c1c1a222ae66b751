"""A part for tests without a GPU: tensors of the CPU count as if they lay on it, and what serves as `triton` there is
the einsum path, with whatever fault is planted."""

from __future__ import annotations

import operator
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from flash_attend import backends, check, functional
from flash_attend.backends import BACKENDS, Functions
from flash_attend.evidence import Store, _store, read_anew
from flash_attend.generation import renew
from flash_attend.target import DeviceTarget
from flash_attend.tracing import constant_when_compiled
from flash_attend.variant import ALL, Kind, Variant

__all__ = [
    "CPU",
    "FAULTS",
    "PART",
    "VARIANT",
    "answer",
    "forget",
    "leave_out_torchs",
    "serve_as_triton",
    "store",
    "with_fault",
]

CPU = torch.device("cpu")
PART = DeviceTarget("cuda", "a part", (8, 0), 166912, 108, "3.7.1", device=CPU)
VARIANT = Variant("triton", "separate", Kind("float32", "tf32x3", 8, 8, "none", *[False] * 3), *[False] * 3, ALL)


def _raise(*results: Any) -> Any:
    raise RuntimeError("out of resource: shared memory")


def _lack_memory(*results: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


FAULTS: dict[str, Callable[..., Any]] = {
    "none": lambda *results: results,
    "wrong": lambda first, *rest: (first * 1.001, *rest),
    "nan": lambda first, *rest: (first * torch.nan, *rest),
    "raises": _raise,
    "no memory": _lack_memory,
    "killed": lambda *results: os.kill(os.getpid(), signal.SIGKILL),
    "hung": lambda *results: time.sleep(1000),
}


def with_fault(fault: str, where: str = "forward") -> Functions:
    """The einsum path with a fault in its forward or its backward."""
    right, plant = BACKENDS["math"].load(), FAULTS[fault]
    spoil = lambda function: lambda *given: plant(*function(*given))  # noqa: E731
    return right._replace(**{where: spoil(getattr(right, where))})


def serve_as_triton(functions: Functions, setattr: Callable = setattr, setitem: Callable = operator.setitem) -> None:
    """From now on these are what serves as `triton` on the part, where everything lies, beside the einsum path."""
    setitem(BACKENDS, "triton", replace(BACKENDS["triton"], load=lambda: functions))
    leave_out_torchs(setitem)
    setattr(backends, "_try_import", lambda name: "")
    setattr(DeviceTarget, "of", staticmethod(constant_when_compiled(lambda device: PART)))


def leave_out_torchs(setitem: Callable = operator.setitem) -> None:
    """From now on what our kernels do not serve on the part is the einsum path's."""
    setitem(BACKENDS, "efficient", replace(BACKENDS["efficient"], refuse=lambda spec, target: "it is not here"))


def forget() -> None:
    """What only this process knows."""
    _store.cache_clear()
    read_anew()
    renew()
    functional._warn.cache_clear()


def store() -> Store:
    """That of the part."""
    return Store.of(CPU)


def answer(request: list) -> list:
    """`check.answer` in a process of its own, where a variant's fault follows from its head dimension."""
    faults = dict(zip((8, 16, 24, 32), ("none", "wrong", "killed", "hung"), strict=True))
    serve_as_triton(with_fault(faults[request[1][2][2]]))
    return check.answer(request)
