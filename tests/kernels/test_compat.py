"""What kernels are made of: aggregates, and kernels that know which of their arguments are run-time numbers."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl

from flash_attend.kernels.compat import aggregate, constexpr_function, kernel

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
MODULES = (
    "backward",
    "dropout",
    "forward",
    "mask",
    "programs",
    "rows",
    "schedule",
    "scores",
    "softmax",
    "statistics",
    "tiles",
)
MOST_ARGUMENTS = 14


@constexpr_function
def next_power(n):
    return 1 << (n - 1).bit_length()


@aggregate
class Line:
    slope: tl.tensor
    start: object  # a tensor or None
    SIZE: tl.constexpr

    @triton.jit
    def at(self, x, SHIFT: tl.constexpr = 0):
        y = self.slope * (x + SHIFT)
        if self.start is not None:
            y += self.start
        return y

    @triton.jit
    def steeper(self):
        return Line(self.slope + 1.0, self.start, self.SIZE)


@aggregate
class Pair:
    first: object
    second: object

    @triton.jit
    def turned(self):
        return Pair(self.second, second=self.first)


@kernel
def lines_kernel(OUT, START, turns: tl.int32, SIZE: tl.constexpr):
    """OUT (2, SIZE): two lines, one without a start, each made steeper and in turns exchanged."""
    x = tl.arange(0, next_power(SIZE))
    pair = Pair(Line(1.0 + tl.program_id(0).to(tl.float32), None, SIZE), (tl.load(START), 2))
    for _ in tl.range(0, turns):
        pair = Pair(pair.first.steeper(), pair.second)
    turned = pair.turned()
    line = Line(turned.second.slope, turned.first[0], SIZE=turned.second.SIZE)
    tl.store(OUT + x, pair.first.at(x), mask=x < pair.first.SIZE)
    tl.store(OUT + line.SIZE + x, line.at(x, SHIFT=turned.first[1]), mask=x < line.SIZE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("turns", (0, 1, 3))
def test_aggregates_carry_values_through_kernels(device: str, turns: int) -> None:
    """Through loops, out of functions, within one another; with None, numbers and tuples for fields."""
    out = torch.empty(2, 6, device=device)
    lines_kernel[(1,)](out, torch.tensor([7.0], device=device), turns, SIZE=6)
    x = torch.arange(6.0)
    assert torch.equal(out.cpu(), torch.stack([(turns + 1) * x, (turns + 1) * (x + 2) + 7]))


def test_an_aggregate_takes_its_fields_and_no_others() -> None:
    one = tl.constexpr(1)
    for values, named in (
        ((one,), {}),
        ((one, one, one), {}),
        ((one,), dict(third=one)),
        ((one, one), dict(first=one)),
    ):
        with pytest.raises(TypeError, match="Pair has the fields first, second"):
            Pair(*values, **named)


def described(module: ModuleType) -> dict:
    """The kernels and device functions of a module, by name; those of its aggregates too."""
    found = {}
    for owner in (module, *(member for member in vars(module).values() if inspect.isclass(member))):
        for name, member in vars(owner).items():
            function = getattr(member, "fn", None)
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                found[f"{getattr(owner, '__name__', '')}.{name}"] = member
    return found


@pytest.mark.parametrize("name", MODULES)
def test_run_time_numbers_make_no_variants(name: str) -> None:
    """Of a kernel, every argument that has a type, and none else; a device function is part of its kernel."""
    for where, function in described(import_module(f"flash_attend.kernels.{name}")).items():
        hints = inspect.get_annotations(function.fn, eval_str=True)
        typed = [name for name, kind in hints.items() if isinstance(kind, tl.dtype)]
        said = getattr(function, "kwargs", vars(function)).get("do_not_specialize") or []
        assert list(said) == typed, where
        assert bool(typed) == where.endswith("_kernel"), where


@pytest.mark.parametrize("name", MODULES)
def test_device_functions_are_handed_objects(name: str) -> None:
    functions = described(import_module(f"flash_attend.kernels.{name}"))
    assert functions
    for where, function in functions.items():
        if not where.endswith("_kernel"):
            assert len(inspect.signature(function.fn).parameters) <= MOST_ARGUMENTS, where


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
def test_aggregates_compile() -> None:
    from flash_attend.kernels import aot

    with aot.compiled_for("sm_80"):
        compiled = lines_kernel.warmup(torch.float32, torch.float32, 3, SIZE=6, grid=(1,))
    assert compiled.asm["cubin"]
