"""The forward for Hopper, emulated: what its partitions compute together, and that their mistakes would be found."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from flash_attend import BackendUnavailable, operators
from flash_attend.kernels import operands, programs
from flash_attend.kernels.configs import Tile, Tiles, override
from flash_attend.kernels.hopper import forward
from flash_attend.kernels.hopper.forward import attention_forward
from flash_attend.kernels.launch import recorded_launches
from flash_attend.testing.calls import Call, Case, assert_same_bits, check, make_call, run
from gluon_emulator import EmulationError, bound
from hopper_calls import (
    CASES,
    H100,
    RING_MISTAKES,
    assert_found,
    assert_no_schedule_matters,
    not_waiting_for_copies,
    on_h100,
    poisoned,
    run_forward,
    skipping,
    tiles_of,
    without,
)

IN_TURNS = ("plain", "one_block", "causal", "holes_causal", "wide")


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right(case: Case, late: bool) -> None:
    call = make_call(case, torch.bfloat16)
    check(run_forward(call, late=late), call)


def test_float16() -> None:
    call = make_call(Case("causal", 1, 2, queries=140, keys=300, d=128, causal=True, mask="holes"), torch.float16)
    check(run_forward(call), call)


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("d", (64, 256))
def test_what_hidden_keys_and_dead_rows_hold_changes_no_bit(d: int, causal: bool, late: bool) -> None:
    case = Case("garbage", 3, 2, 1, queries=200, keys=300, d=d, mask="pad_right", causal=causal)
    call = make_call(case, torch.bfloat16)
    assert_same_bits(run_forward(call, late=late), run_forward(poisoned(call), late=late))


def test_blocks_smaller_than_the_schedules() -> None:
    call = make_call(Case("ratio", 2, 2, queries=200, keys=500, d=64, mask="holes", causal=True), torch.bfloat16)
    *_, tiles = tiles_of(call)
    with override(tiles._replace(forward=Tile(128, 32, 4, 2))):
        check(run_forward(call), call)


def in_turns(case: Case) -> tuple[Call, Tiles]:
    """A call, and its usual tiles but for the consumers' turns."""
    call = make_call(case, torch.bfloat16)
    *_, usual = tiles_of(call)
    return call, usual._replace(forward=usual.forward._replace(ping_pong=True))


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize("case", [case for case in CASES if case.name in IN_TURNS], ids=str)
def test_turns_change_no_bit(case: Case, late: bool) -> None:
    call, tiles = in_turns(case)
    with override(tiles):
        answer = run_forward(call, late=late)
    check(answer, call)
    assert_same_bits(answer, run_forward(call, late=late))


def test_consumers_issue_their_products_in_turns() -> None:
    call, tiles = in_turns(Case("turns", 1, 2, queries=300, keys=300, d=64, causal=True))

    def issued(seed: int, **mistake) -> list[int]:
        order = []
        hand_on = {
            "Turns.hand_on": lambda right: lambda turns, consumer: (order.append(consumer), right(turns, consumer))
        }
        with override(tiles):
            run_forward(call, seed=seed, mistake=hand_on | mistake, part=replace(H100, multiprocessors=1))
        return order

    for seed in range(3):
        order = issued(seed)
        assert order == [0, 1] * (len(order) // 2)
    others = [issued(seed, **without("Turns.take")) for seed in range(3)]
    assert all(len(other) == len(order) and other != order for other in others), "nothing else keeps them in order"


def test_a_turn_that_is_not_passed_on_is_found() -> None:
    call, tiles = in_turns(Case("turns", 1, 2, queries=300, keys=300, d=64, causal=True))
    with override(tiles), pytest.raises(EmulationError, match="deadlock"):
        run_forward(call, mistake=without("Turns.hand_on"))


def test_every_schedule_gives_the_same_bits() -> None:
    call = make_call(Case("seeds", 1, 2, queries=200, keys=500, d=64, mask="holes", causal=True), torch.bfloat16)
    assert_no_schedule_matters(partial(run_forward, call))


@pytest.mark.parametrize("programs", (1, 3, 132))
@pytest.mark.parametrize("heads_in_cache", (1, 3, 100))
def test_any_number_of_programs_and_sections_covers_every_tile(
    heads_in_cache: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make_call(Case("tiles", 2, 4, 2, queries=300, keys=140, d=64, causal=True), torch.bfloat16)
    part = replace(H100, multiprocessors=programs)
    monkeypatch.setattr(operands, "CACHED_BYTES", heads_in_cache * 2 * 140 * 64 * 2)
    forward._prepare.cache_clear()
    with on_h100(part), recorded_launches() as launches:
        attention_forward(*tiles_of(call))
    answer = run_forward(call, part=part)
    forward._prepare.cache_clear()
    assert launches[-1].prepared.programs == min(programs, 2 * 4 * 3)
    check(answer, call)


def test_the_longest_tiles_of_a_section_come_first_and_heads_are_neighbours() -> None:
    tile_at, queries, heads, total = bound(programs.tile_at), *map(torch.tensor, (300, 2, 5))
    tiles = [
        tuple(map(int, tile_at(torch.tensor(index), queries, heads, total, section=3, SIZE=128))) for index in range(15)
    ]
    first_section, second_section = tiles[:9], tiles[9:]
    assert first_section == [(row, head // 2, head % 2) for row in (256, 128, 0) for head in (0, 1, 2)]
    assert second_section == [(row, head // 2, head % 2) for row in (256, 128, 0) for head in (3, 4)]


@pytest.mark.parametrize("sizes", ((0, 2, 5), (2, 0, 5), (2, 2, 0)))
def test_nothing_is_launched_for_nothing(sizes: tuple[int, int, int]) -> None:
    batch, heads, queries = sizes
    call = make_call(Case("empty", batch, heads, queries=queries, keys=7, d=64), torch.bfloat16)
    with on_h100(), recorded_launches() as launches:
        out, _, _ = attention_forward(*tiles_of(call))
    assert out.shape == call.q.shape
    assert not launches


@pytest.mark.parametrize("mask", ("none", "pad_right"))
def test_the_public_call_runs_it(mask: str) -> None:
    call = make_call(Case("public", 1, 2, queries=140, keys=300, d=64, mask=mask, causal=True), torch.float16)
    schedule = [] if mask == "none" else ["key_schedule_kernel"]
    with on_h100(), recorded_launches() as launches:
        answer = run(call, "hopper")
    names = [launch.prepared.kernel.__name__ for launch in launches]
    assert names[: len(schedule) + 1] == [*schedule, "hopper_forward_kernel"]
    assert answer.dq.shape == call.q.shape


def test_as_an_operator_it_is_the_same_launch() -> None:
    call = make_call(Case("operator", 1, 2, queries=140, keys=300, d=64, mask="pad_right"), torch.float16)
    tensors, spec, tiles = tiles_of(call)
    with on_h100(), recorded_launches() as launches:
        operators.attend(*tensors, spec, "hopper")
        attention_forward(tensors, spec, tiles)
    as_operator, directly = (launch.prepared for launch in launches if "forward" in launch.prepared.kernel.__name__)
    assert as_operator is directly


def test_a_call_that_it_cannot_serve_is_refused_with_the_reason() -> None:
    call = make_call(Case("refused", 1, 2, queries=14, keys=30, d=80), torch.float16)
    with on_h100(), pytest.raises(BackendUnavailable, match="d = 80 and dv = 80 are not the same one of 64, 128, 256"):
        run(call, "hopper")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    call = make_call(case, dtype, "cuda")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("reason: the kernels are for sm_90, and the GPU is another one")
    check(run(call, "hopper"), call)


MISTAKES = RING_MISTAKES | {
    "v is not awaited": skipping("await_full", "v"),
    "hidden rows of v are left": without("clear_hidden"),
    "out is stored before its copy is through": not_waiting_for_copies("_consume"),
}


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name: str, late: bool) -> None:
    call = make_call(Case("mistakes", 1, 2, queries=400, keys=700, d=64, mask="holes"), torch.bfloat16)
    call = call.with_(v=call.v.masked_fill(~call.mask[:, None, :, None], torch.nan))
    assert_found(MISTAKES[name], partial(run_forward, call, late=late))
