"""The forward for Hopper, emulated: what its partitions compute together, and that their mistakes would be found."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_attend import BackendUnavailable
from flash_attend.dispatch import choose
from flash_attend.kernels import operands
from flash_attend.kernels.configs import Tile, Tiles, override, select_hopper_tiles
from flash_attend.kernels.hopper import forward, walk
from flash_attend.kernels.hopper.forward import V_RING, attention_forward
from flash_attend.kernels.launch import Launch, recorded_launches
from flash_attend.operands import Operands
from flash_attend.ops import FORWARD, options_of
from flash_attend.spec import normalise_inputs
from flash_attend.target import DeviceTarget
from flash_attend.testing.calls import Call, Case, bits_equal, check, make_call
from flash_attend.testing.calls import run as run_publicly
from flash_attend.testing.oracle import Answer
from gluon_emulator import EmulationError, bound, emulate
from hopper_calls import CASES, H100, RING_MISTAKES, await_all_but, clear_nothing, fill_schedule, on


def recorded(call: Call, part: DeviceTarget = H100) -> tuple[Tensor, Tensor, Launch]:
    """Out and lse of a call, NaN for now, and the launch that writes them."""
    q, k, v, mask, spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    tiles = select_hopper_tiles(spec, part)
    with on(part), recorded_launches() as launches:
        out, lse, schedule = attention_forward(Operands(q, k, v, mask), spec, tiles)
    out.fill_(torch.nan)
    lse.fill_(torch.nan)
    fill_schedule(schedule, mask, spec, tiles)
    return out, lse, launches[-1]


def run(call: Call, **options) -> Answer:
    out, lse, launch = recorded(call)
    emulate(launch, **options)
    return Answer(out, lse, None, None, None)


IN_TURNS = ("plain", "one_block", "causal", "holes_causal", "wide")


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right(case: Case, late: bool) -> None:
    call = make_call(case, torch.bfloat16)
    check(run(call, late=late), call)


def test_float16() -> None:
    call = make_call(Case("causal", 1, 2, queries=140, keys=300, d=128, causal=True, mask="holes"), torch.float16)
    check(run(call), call)


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("d", (64, 256))
def test_what_hidden_keys_hold_changes_no_bit(d: int, causal: bool, late: bool) -> None:
    case = Case("garbage", 3, 2, 1, queries=200, keys=300, d=d, mask="pad_right", causal=causal)
    call = make_call(case, torch.bfloat16)
    hidden = ~call.mask[:, None, :, None]
    poisoned = call.with_(k=call.k.masked_fill(hidden, torch.nan), v=call.v.masked_fill(hidden, torch.inf))
    clean, other = run(call, late=late), run(poisoned, late=late)
    assert bits_equal(clean.out, other.out)
    assert bits_equal(clean.lse, other.lse)


def test_blocks_smaller_than_the_schedules() -> None:
    call = make_call(Case("ratio", 2, 2, queries=200, keys=500, d=64, mask="holes", causal=True), torch.bfloat16)
    *_, spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    with override(select_hopper_tiles(spec, H100)._replace(forward=Tile(128, 32, 4, 2))):
        answer = run(call)
    check(answer, call)


def in_turns(case: Case) -> tuple[Call, Tiles]:
    """A call, and its usual tiles but for the consumers' turns."""
    call = make_call(case, torch.bfloat16)
    *_, spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    usual = select_hopper_tiles(spec, H100)
    return call, usual._replace(forward=usual.forward._replace(ping_pong=True))


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize("case", [case for case in CASES if case.name in IN_TURNS], ids=str)
def test_turns_change_no_bit(case: Case, late: bool) -> None:
    call, tiles = in_turns(case)
    with override(tiles):
        answer = run(call, late=late)
    check(answer, call)
    usual = run(call, late=late)
    assert bits_equal(answer.out, usual.out)
    assert bits_equal(answer.lse, usual.lse)


turns: list[int] = []  # the consumers that have passed theirs on: the emulator binds functions to globals alone


def pass_and_tell(barriers, TURNS, CONSUMER):
    turns.append(CONSUMER)
    mbarrier.arrive(barriers.index(TURNS + 1 - CONSUMER), count=1)


def test_consumers_issue_their_products_in_turns() -> None:
    call, tiles = in_turns(Case("turns", 1, 2, queries=300, keys=300, d=64, causal=True))

    def issued(seed: int, **instead) -> list[int]:
        turns.clear()
        with override(tiles):
            *_, launch = recorded(call, replace(H100, multiprocessors=1))
        emulate(launch, seed=seed, instead=dict(pass_turn=pass_and_tell, **instead))
        return turns.copy()

    for seed in range(3):
        order = issued(seed)
        assert order == [0, 1] * (len(order) // 2)
    without = [issued(seed, take_turn=lambda barriers, TURNS, step, CONSUMER: None) for seed in range(3)]
    assert all(len(other) == len(order) and other != order for other in without), "nothing else keeps them in order"


def test_a_turn_that_is_not_passed_on_is_found() -> None:
    call, tiles = in_turns(Case("turns", 1, 2, queries=300, keys=300, d=64, causal=True))
    with override(tiles), pytest.raises(EmulationError, match="deadlock"):
        run(call, instead=dict(pass_turn=lambda barriers, TURNS, CONSUMER: None))


def test_every_schedule_gives_the_same_bits() -> None:
    call = make_call(Case("seeds", 1, 2, queries=200, keys=500, d=64, mask="holes", causal=True), torch.bfloat16)
    first = run(call)
    for seed in range(1, 6):
        other = run(call, seed=100 * seed, late=seed % 2 == 1)
        assert bits_equal(first.out, other.out)
        assert bits_equal(first.lse, other.lse)


@pytest.mark.parametrize("programs", (1, 3, 132))
@pytest.mark.parametrize("heads_in_cache", (1, 3, 100))
def test_any_number_of_programs_and_sections_covers_every_tile(
    heads_in_cache: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make_call(Case("tiles", 2, 4, 2, queries=300, keys=140, d=64, causal=True), torch.bfloat16)
    monkeypatch.setattr(operands, "CACHED_BYTES", heads_in_cache * 2 * 140 * 64 * 2)
    forward._prepare.cache_clear()
    out, lse, launch = recorded(call, replace(H100, multiprocessors=programs))
    forward._prepare.cache_clear()
    assert launch.prepared.programs == min(programs, 2 * 4 * 3)
    emulate(launch)
    check(Answer(out, lse, None, None, None), call)


def test_the_longest_tiles_of_a_section_come_first_and_heads_are_neighbours() -> None:
    tile_at, queries, heads, total = bound(walk.tile_at), *map(torch.tensor, (300, 2, 5))
    tiles = [
        tuple(map(int, tile_at(torch.tensor(index), queries, heads, total, section=3, SIZE=128))) for index in range(15)
    ]
    first_section, second_section = tiles[:9], tiles[9:]
    assert first_section == [(row, head // 2, head % 2) for row in (256, 128, 0) for head in (0, 1, 2)]
    assert second_section == [(row, head // 2, head % 2) for row in (256, 128, 0) for head in (3, 4)]


def test_nothing_is_launched_for_nothing() -> None:
    for shape in ((0, 2, 5), (2, 0, 5), (2, 2, 0)):
        q, k = torch.empty(*shape, 64, dtype=torch.bfloat16), torch.empty(*shape[:2], 7, 64, dtype=torch.bfloat16)
        q, k, _, _, spec = normalise_inputs(q, k, k)
        with on(H100), recorded_launches() as launches:
            out, _, _ = attention_forward(Operands(q, k, k), spec, select_hopper_tiles(spec, H100))
        assert out.shape == q.shape
        assert not launches


@pytest.mark.parametrize("mask", ("none", "pad_right"))
def test_the_public_call_runs_it(mask: str) -> None:
    call = make_call(Case("public", 1, 2, queries=140, keys=300, d=64, mask=mask, causal=True), torch.float16)
    schedule = [] if mask == "none" else ["key_schedule_kernel"]
    with on(H100), recorded_launches() as launches:
        answer = run_publicly(call, "hopper")
    names = [launch.prepared.kernel.__name__ for launch in launches]
    assert names[: len(schedule) + 1] == [*schedule, "hopper_forward_kernel"]
    assert answer.dq.shape == call.q.shape


def test_as_an_operator_it_is_the_same_launch() -> None:
    call = make_call(Case("operator", 1, 2, queries=140, keys=300, d=64, mask="pad_right"), torch.float16)
    q, k, v, mask, spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    with on(H100), recorded_launches() as launches:
        operands = Operands(q, k, v, mask)
        numbers, options = options_of(operands, spec, choose(spec, H100, "hopper"), return_lse=True)
        FORWARD([q, k, v, mask], numbers, options)
    *_, expected = recorded(call, H100)
    assert launches[-1].prepared is expected.prepared


def test_a_call_that_it_cannot_serve_is_refused_with_the_reason() -> None:
    call = make_call(Case("refused", 1, 2, queries=14, keys=30, d=80), torch.float16)
    with on(H100), pytest.raises(BackendUnavailable, match="d = 80 and dv = 80 are not the same one of 64, 128, 256"):
        run_publicly(call, "hopper")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    call = make_call(case, dtype, "cuda")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("reason: the kernels are for sm_90, and the GPU is another one")
    check(run_publicly(call, "hopper"), call)


MISTAKES = RING_MISTAKES | {
    "v is not awaited": dict(await_full=await_all_but(V_RING.value)),
    "hidden rows of v are left": dict(clear_hidden=clear_nothing),
    "out is stored before its copy is through": dict(tma=SimpleNamespace(store_wait=lambda pending: None)),
}


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name: str, late: bool) -> None:
    call = make_call(Case("mistakes", 1, 2, queries=400, keys=700, d=64, mask="holes"), torch.bfloat16)
    call = call.with_(v=call.v.masked_fill(~call.mask[:, None, :, None], torch.nan))
    right = run(call, late=late)
    for seed in range(3):
        try:
            wrong = run(call, seed=seed, late=late, instead=MISTAKES[name])
        except EmulationError:
            continue
        assert not bits_equal(wrong.out, right.out), f"not found with seed {seed}"
