"""The one place where kernels are launched: its grid, its record, and nothing to do where there is nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from triton.knobs import runtime

from flash_attend.checks import normalise_inputs
from flash_attend.kernels import launch as launching
from flash_attend.kernels.backward import attention_backward
from flash_attend.kernels.configs import Tile, Tiles
from flash_attend.kernels.forward import attention_forward
from flash_attend.kernels.launch import Launch, Prepared, launch, recorded_launches
from flash_attend.operands import Operands
from flash_attend.spec import AttentionSpec
from flash_attend.testing.calls import Case, check, make_call, run

X = torch.zeros(1)
SMALL = Tile(16, 16, 4, 1)
TILES = Tiles(SMALL, SMALL, SMALL)


@dataclass
class FakeKernel:
    """Notes how it is called; compiled, if it says so, on its first call, as Triton's are."""

    compiles: bool = False
    arg_names: tuple[str, ...] = ("X", "n", "BLOCK", "EVEN")
    calls: list[tuple] = field(default_factory=list)
    compiled_calls: list[tuple] = field(default_factory=list)

    def __getitem__(self, grid: tuple):
        def run(*arguments, **options):
            self.calls.append((grid, arguments, options))
            return FakeCompiled(self.compiled_calls) if self.compiles else None

        return run


@dataclass
class FakeCompiled:
    calls: list[tuple]
    function: str = "function"
    packed_metadata: str = "metadata"

    def run(self, *arguments: object) -> None:
        self.calls.append((arguments[:9], arguments[9:]))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of one as launching takes."""
    active = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))


def prepared(kernel: FakeKernel, programs: int = 1, **options) -> Prepared:
    return Prepared(kernel, programs, (3,), dict(EVEN=True, BLOCK=16), num_warps=4, **options)


def test_a_launch_says_all_of_its_options() -> None:
    kernel = FakeKernel()
    launch(Prepared(kernel, 7, (3, 0.5), dict(BLOCK=16), num_warps=8, num_stages=3), X, None)
    launch(Prepared(kernel, 1, (), {}, num_warps=4), X)
    fixed = dict(enable_fp_fusion=True, maxnreg=255)  # of the first, a later Triton thinks otherwise where nobody asks
    assert kernel.calls == [
        ((7,), (X, None, 3, 0.5), dict(BLOCK=16, num_warps=8, num_stages=3, **fixed)),
        ((1,), (X,), dict(num_warps=4, num_stages=1, **fixed)),
    ]


def test_a_compiled_kernel_is_kept(driver: None) -> None:
    kernel = FakeKernel(compiles=True)
    ready, other = prepared(kernel, 7), torch.zeros(1)
    for tensor in (X, other, X):
        launch(ready, tensor)
    assert len(kernel.calls) == 1
    # Every argument in the kernel's order, the compile-time ones too; None of its options.
    launched = 7, 1, 1, "stream of -1", "function", "metadata", None, None, None
    assert kernel.compiled_calls == [(launched, (tensor, 3, 16, True)) for tensor in (other, X)]
    launch(prepared(kernel, 7), X)
    assert len(kernel.calls) == 2, "what is prepared anew asks Triton anew"


def test_who_watches_launches_sees_them_all(driver: None) -> None:
    """A profiler asks Triton to be told, and Triton tells of what goes its way."""
    kernel, ready = (found := FakeKernel(compiles=True)), prepared(found)
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        launch(ready, X)
        launch(ready, X)
        seen = len(kernel.calls)
        hook.add(print)
        try:
            launch(ready, X)
        finally:
            hook.remove(print)
        assert len(kernel.calls) == seen + 1
    assert len(kernel.compiled_calls) == 3


def test_what_is_not_aligned_goes_by_triton(driver: None) -> None:
    """An address that is no multiple of 16 is a variant of its own: Triton's to choose, and not to be kept."""
    kernel = FakeKernel(compiles=True)
    ready = prepared(kernel)
    shifted = torch.zeros(2)[1:]
    assert X.data_ptr() % 16 == 0 != shifted.data_ptr() % 16
    launch(ready, X, shifted)
    launch(ready, X, shifted)
    assert (len(kernel.calls), len(kernel.compiled_calls)) == (2, 0)
    launch(ready, X, None)
    launch(ready, X, None)
    launch(ready, X, shifted)
    assert (len(kernel.calls), len(kernel.compiled_calls)) == (4, 1)


def test_nothing_is_kept_of_what_is_not_compiled() -> None:
    """The interpreter returns nothing."""
    kernel = FakeKernel()
    ready = prepared(kernel)
    launch(ready, X)
    launch(ready, X)
    assert len(kernel.calls) == 2
    assert not ready.compiled


def test_no_programs_no_launch() -> None:
    kernel = FakeKernel()
    launch(prepared(kernel, 0), X)
    with recorded_launches() as launches:
        launch(prepared(kernel, 0), X)
    assert kernel.calls == launches == []


def test_recorded_launches_do_not_run() -> None:
    kernel = FakeKernel()
    ready = prepared(kernel, 7)
    with recorded_launches() as launches:
        launch(ready, X, None)
        assert launches == [Launch(ready, (X, None))]
    assert not kernel.calls
    launch(ready, X)
    assert len(kernel.calls) == 1
    assert len(launches) == 1


def test_records_nest() -> None:
    kernel = FakeKernel()
    with recorded_launches() as outer:
        launch(prepared(kernel, 1), X)
        with recorded_launches() as inner:
            launch(prepared(kernel, 2), X)
        launch(prepared(kernel, 3), X)
    assert [one.prepared.programs for one in outer] == [1, 3]
    assert [one.prepared.programs for one in inner] == [2]


def test_a_record_ends_with_an_exception() -> None:
    kernel = FakeKernel()
    with pytest.raises(RuntimeError, match="inside"), recorded_launches():
        raise RuntimeError("inside")
    launch(prepared(kernel), X)
    assert len(kernel.calls) == 1


def launches_of(b: int, h: int, i: int, j: int, mask_rows: int | None = None) -> tuple[list[Launch], AttentionSpec]:
    """What a call and its backward launch, on the meta device. `mask_rows`: 1 for a key mask, i for a dense one."""
    q, k = (torch.empty(b, h, n, 16, device="meta", dtype=torch.float16) for n in (i, j))
    mask = None if mask_rows is None else torch.empty(b, h, mask_rows, j, device="meta", dtype=torch.bool)
    (q, k, v, mask, *_), spec = normalise_inputs(q, k, k, mask=mask)
    with recorded_launches() as launches:
        operands = Operands(q, k, v, mask)
        out, lse, schedule = attention_forward(operands, spec, TILES)
        attention_backward(out, None, operands, out, lse, schedule, spec, TILES, (True, True, True))
    return launches, spec


def programs(launches: list[Launch]) -> list[tuple[str, int]]:
    return [(one.prepared.kernel.__name__.removesuffix("_kernel"), one.prepared.programs) for one in launches]


def test_one_program_for_each_tile() -> None:
    launches, _ = launches_of(2, 3, 33, 50)
    assert programs(launches) == [("forward", 18), ("delta", 48), ("backward_kv", 24), ("backward_q", 18)]


@pytest.mark.parametrize(("b", "h"), ((70_000, 1), (1, 70_000), (300, 300)))
@pytest.mark.parametrize("mask_rows", (None, 1, 20), ids=("unmasked", "key", "dense"))
def test_the_grid_has_one_dimension_however_many_heads(b: int, h: int, mask_rows: int | None) -> None:
    """A grid's second and third dimensions end at 65535."""
    launches, _ = launches_of(b, h, 20, 16, mask_rows)
    counts = dict(programs(launches))
    assert counts["forward"] == counts["backward_q"] == 2 * b * h
    assert counts["backward_kv"] == b * h
    if mask_rows == 1:
        assert counts["key_schedule"] == b * h
    if mask_rows == 20:
        assert counts["dense_schedule"] == 2 * b * h
    kernel = FakeKernel()
    for one in launches:
        launch(replace(one.prepared, kernel=kernel), X)
    assert [grid for grid, *_ in kernel.calls] == [(one.prepared.programs,) for one in launches]


@pytest.mark.parametrize(("b", "h", "i", "j"), ((0, 2, 8, 8), (2, 0, 8, 8), (2, 2, 0, 0)))
@pytest.mark.parametrize("dense", (False, True, None), ids=("key", "dense", "unmasked"))
def test_an_empty_call_launches_next_to_nothing(b: int, h: int, i: int, j: int, dense: bool | None) -> None:
    """Only what an empty row of a mask still takes: the line that says that nothing is in it."""
    launches, _ = launches_of(b, h, i, j, None if dense is None else i if dense else 1)
    assert {name for name, _ in programs(launches)} <= {"key_schedule"}


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ("none", "holes"))
def test_more_heads_than_a_grid_is_high(mask: str) -> None:
    case = Case("many_heads", batch=3, heads=22_000, queries=17, keys=20, d=16, mask=mask, causal=True)
    call = make_call(case, torch.float32, "cuda")
    check(run(call, "triton"), call)
