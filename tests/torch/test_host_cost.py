"""What a call costs the host: the benchmark runs, and the work of a call stays as small as it is.

Work is counted, not timed: calls of functions and of torch's operators are the same on every machine.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType

import pytest
import torch
from triton.compiler.compiler import LazyDict
from triton.knobs import HookChain
from triton.runtime.jit import JITFunction

import host_cost
from flash_attend import BackendUnavailable, derived, flash_attention, packed, plans
from flash_attend.generation import renew
from flash_attend.kernels import backward, forward, schedule, statistics
from flash_attend.kernels.configs import Tile, Tiles, override
from flash_attend.kernels.launch import recorded_launches


@pytest.fixture(scope="module")
def warm() -> Callable[[str, str], Callable[[], object]]:
    """A stage of a mode after its first calls, which compile, and fill what is looked up later."""
    made = {}

    def stage_of(mode: str, stage: str) -> Callable[[], object]:
        if mode not in made:
            made[mode] = host_cost.stages(mode)
        for _ in range(2):
            made[mode][stage]()
        return made[mode][stage]

    with host_cost.on_the_part():
        yield stage_of


def counted(call: Callable[[], object]) -> int:
    """How many functions a call calls, Python's and C's."""
    found = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def operators(call: Callable[[], object]) -> Counter[str]:
    """The operators of torch that a call runs."""
    with torch.profiler.profile() as profile:
        call()
    return Counter(event.name for event in profile.events() if event.name.startswith("aten::"))


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------------------------------


def test_every_stage_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # the tests after this one keep theirs
    rows = host_cost.measure(["plain", "cpu key mask"], 2).to_dict("records")
    assert [(row["mode"], row["stage"]) for row in rows] == [
        (mode, stage) for mode in ("plain", "cpu key mask") for stage in host_cost.STAGES
    ]
    assert all(row["median_us"] > 0 and row["iqr_us"] >= 0 for row in rows)
    cost = {row["stage"]: row["median_us"] for row in rows if row["mode"] == "plain"}
    assert max(cost, key=cost.get) in ("with gradients", "sdpa with gradients")
    host_cost.main(["--modes", "cpu causal", "cpu plain", "--rounds", "2"])
    _, heading, _, *lines = capsys.readouterr().out.splitlines()
    assert heading.index("cpu causal") < heading.index("cpu plain")
    assert all(line.startswith(stage) for line, stage in zip(lines, host_cost.STAGES, strict=True))


def test_nothing_is_left_behind() -> None:
    """Outside of the benchmark's contexts, the kernels cannot serve CPU tensors."""
    q = torch.zeros(host_cost.SHAPE, dtype=torch.float16)
    with host_cost.on_the_part():
        flash_attention(q, q, q, backend="triton")
    with pytest.raises(BackendUnavailable, match="need a CUDA device"):
        flash_attention(q, q, q, backend="triton")


@pytest.mark.parametrize("arguments", (["--rounds", "1"], ["--modes", "dense"], ["--rounds", "many"]))
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        host_cost.main(arguments)
    assert stopped.value.code == 2


# ---------------------------------------------------------------------------------------------------------------------
# What is launched
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_prepared() -> Iterator[None]:
    """Every launch is prepared anew, by this test and by the next."""
    prepare = (
        plans._work_out,
        forward._prepare,
        backward._prepare,
        statistics._prepare_delta,
        backward._prepare_kv,
        backward._prepare_q,
        schedule.plan_schedule,
    )
    renew()
    for function in prepare:
        function.cache_clear()
    yield
    renew()
    for function in prepare:
        function.cache_clear()


@pytest.mark.parametrize("mode", ("plain", "key mask", "dropout"))
def test_a_kept_kernel_is_given_what_triton_gives_it(
    monkeypatch: pytest.MonkeyPatch, nothing_prepared: None, mode: str
) -> None:
    """The first launch of a kernel goes Triton's way, the next ones do not: the launcher sees no difference."""
    given = []

    class Noting(host_cost.Deviceless):
        def get_current_device(self) -> int:
            return id(given)  # where no kernel has a launcher yet

        @staticmethod
        def launcher_cls(source: object, metadata: tuple) -> Callable:
            return lambda *arguments: given.append((metadata.name, [*map(described, arguments)]))

    monkeypatch.setattr(host_cost, "Deviceless", Noting)
    with host_cost.on_the_part():
        call = host_cost.stages(mode)["with gradients"]
        call()
        first, given[:] = [*given], []
        with monkeypatch.context() as patch:
            patch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("Triton was asked again"))
            call()
    assert [name for name, _ in first].count("forward_kernel") == 1
    assert len(first) == 5 if mode == "key mask" else 4
    assert given == first


def test_launches_that_write_other_dtypes_are_prepared_apart(nothing_prepared: None) -> None:
    """How a mask's schedule is written follows from q's dtype, and a kept kernel is for one dtype."""
    mask, one = torch.ones(2, 64, dtype=torch.bool), Tile(32, 32, 4, 1)
    of_masks = []
    for dtype in (torch.float16, torch.float64):
        q = torch.zeros(host_cost.SHAPE, dtype=dtype)
        with host_cost.on_the_part(), override(Tiles(one, one, one)), recorded_launches() as found:
            flash_attention(q, q, q, mask=mask, backend="triton")
        of_masks.append(found[0])
    half, double = of_masks
    assert [launch.tensors[1].dtype for launch in of_masks] == [torch.int32, torch.int64]
    assert half.prepared is not double.prepared


def described(argument: object) -> object:
    """An argument of a launch; what is in it, if it is made anew each time."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape, argument.stride()
    # What is made for hooks, of which there are none.
    return None if isinstance(argument, (LazyDict, HookChain)) else argument


# ---------------------------------------------------------------------------------------------------------------------
# Counting work
# ---------------------------------------------------------------------------------------------------------------------

# Function calls of a call whose like came before, with a tenth to spare: Python's versions differ a little.
MOST_CALLS = {
    ("plain", "forward"): 40,
    ("causal", "forward"): 40,
    ("key mask", "forward"): 67,
    ("dropout", "forward"): 47,
    ("plain", "without gradients"): 52,
    ("plain", "with gradients"): 197,
    ("key mask", "with gradients"): 230,
}


@pytest.mark.parametrize(("mode", "stage"), MOST_CALLS)
def test_few_functions_are_called(warm: Callable, mode: str, stage: str) -> None:
    assert counted(warm(mode, stage)) <= MOST_CALLS[mode, stage]


def test_the_count_sees_work_that_is_done_again(warm: Callable) -> None:
    """Without what is kept of earlier calls the same call is several times the work."""
    call = warm("plain", "forward")
    kept = counted(call)
    renew()
    for function in (plans._work_out, forward._prepare):
        function.cache_clear()
    assert counted(call) > 2 * kept
    assert counted(call) < 1.1 * kept


@pytest.mark.parametrize("mode", ("plain", "causal", "key mask", "dropout"))
def test_a_forward_allocates_and_no_more(warm: Callable, mode: str) -> None:
    """Beside its outputs, what its backward reads, its seed and its schedule, a call asks nothing of torch: no copy, no
    arithmetic."""
    found = operators(warm(mode, "forward"))
    allocations = {"plain": 3, "causal": 3, "key mask": 5, "dropout": 4}[mode]
    assert found["aten::empty"] + found["aten::empty_strided"] == allocations
    random = {"aten::randint", "aten::random_"} if mode == "dropout" else set()
    ways = {"aten::empty", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
    assert set(found) <= {*ways, "aten::view", "aten::detach", *random}


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on a CPU are taken for ones that a device has, whose values are not looked at."""
    monkeypatch.setattr(derived, "_stream", lambda tensor: 0)
    monkeypatch.setattr(packed, "values_are_checked", lambda tensor: False)


def test_tables_of_packed_sequences_are_made_once(on_a_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that follow each other, and their backwards, find what the first one made of the same lengths; lengths
    that have changed are looked at again."""
    for module in (forward, backward, statistics):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    tensors = [torch.zeros(100, 4, 64, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    places = [torch.tensor([0, 40, 40, 90], dtype=torch.int32)]

    def layer() -> torch.Tensor:
        options = dict(causal=True, backend="triton")
        return packed.flash_attention_packed(*tensors, *places, *places, 50, 50, **options)

    def both() -> None:
        torch.autograd.grad(layer(), tensors, tensors[0].detach())

    of_tables = {"aten::searchsorted", "aten::cumsum", "aten::sort", "aten::cummax", "aten::cat"}
    views = {"aten::transpose", "aten::unsqueeze", "aten::select", "aten::as_strided", "aten::view", "aten::detach"}
    allocations = {"aten::empty", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
    with host_cost.on_the_part():
        assert of_tables <= set(operators(both))
        assert set(operators(layer)) <= {*views, *allocations}
        assert not of_tables & set(operators(both))
        places[0][1] = 39
        assert of_tables <= set(operators(layer))
        q, mask = torch.zeros(2, 4, 64, 64, dtype=torch.float16), torch.ones(2, 64, dtype=torch.bool)
        for _ in range(2):
            found = operators(lambda: flash_attention(q, q, q, mask=mask, query_mask=mask, backend="triton"))
        assert found["aten::index_select"] == 4 and not {*of_tables, "aten::scatter"} & set(found)
    gc.collect()
    count = len(derived._made)
    places.clear()
    gc.collect()
    assert len(derived._made) < count, "tables are there as long as the lengths"


def test_what_is_derived_follows_its_tensors(on_a_device: None) -> None:
    made: list[int] = []

    def derive(*tensors: torch.Tensor, key: object = None) -> int:
        return derived.derived(lambda: made.append(0) or len(made), key, *tensors)

    a, b, c = (torch.zeros(3) for _ in range(3))
    assert [derive(a, b), derive(a, b), derive(a, c), derive(a, b), derive(b, a), derive(a, b, key=1)] == [
        1,
        1,
        2,
        1,
        3,
        4,
    ]
    b.add_(1)
    assert [derive(a, b), derive(a, c), derive(a, b)] == [5, 2, 5]
    del b
    assert [derive(a, torch.zeros(3)), derive(a, torch.zeros(3))] == [6, 7], "another one may have its id"
    with torch.inference_mode():
        assert [derive(a, c), derive(a, c), derive(torch.zeros(3), c)] == [8, 8, 9]
    for _ in range(2 * derived.MOST):
        derive(a, key=object())
    assert len(derived._made[a]) <= derived.MOST
