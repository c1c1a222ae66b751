"""What a call costs the host: the benchmark runs, and the work of a call stays as small as it is.

Work is counted, not timed: calls of functions and of torch's operators are the same on every machine.
"""

from __future__ import annotations

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
from flash_attend import BackendUnavailable, flash_attention, plans
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
    for function in prepare:
        function.cache_clear()
    yield
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
    ("plain", "forward"): 60,
    ("causal", "forward"): 60,
    ("key mask", "forward"): 96,
    ("dropout", "forward"): 64,
    ("plain", "without gradients"): 74,
    ("plain", "with gradients"): 219,
    ("key mask", "with gradients"): 268,
}


@pytest.mark.parametrize(("mode", "stage"), MOST_CALLS)
def test_few_functions_are_called(warm: Callable, mode: str, stage: str) -> None:
    assert counted(warm(mode, stage)) <= MOST_CALLS[mode, stage]


def test_the_count_sees_work_that_is_done_again(warm: Callable) -> None:
    """Without what is kept of earlier calls the same call is several times the work."""
    call = warm("plain", "forward")
    kept = counted(call)
    plans._work_out.cache_clear()
    forward._prepare.cache_clear()
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
