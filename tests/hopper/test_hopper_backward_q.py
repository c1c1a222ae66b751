"""The gradient of q for Hopper, emulated: what its partitions compute together, and that their mistakes would be
found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from flash_attend.checks import normalise_inputs
from flash_attend.kernels.configs import Tile, select_tiles
from flash_attend.kernels.hopper.backward_q import K_RING, V_RING, query_gradient
from flash_attend.kernels.key_schedule import build_schedule
from flash_attend.kernels.launch import Launch, recorded_launches
from flash_attend.kernels.operands import empty_like_heads, readable
from flash_attend.testing.calls import Call, Case, bits_equal, check, make_call, truth_of
from flash_attend.testing.oracle import Answer
from gluon_emulator import EmulationError, emulate
from hopper_calls import CASES, H100, RING_MISTAKES, await_all_but, clear_nothing, fill_schedule, prepared_rows


def recorded(call: Call, truth: Answer, tile: Tile | None = None) -> tuple[Tensor, Launch]:
    """The gradient of q, NaN for now, and the launch that writes it."""
    (q, k, v, mask, _), spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    q, k, v, grad_out = readable(q), readable(k), readable(v), readable(call.grad_out)
    tiles = select_tiles(spec, H100, "hopper")
    if tile is not None:
        tiles = tiles._replace(backward_q=tile)
    grad_q = empty_like_heads(q, spec.heads, spec.head_dim).fill_(torch.nan)
    with recorded_launches() as launches:
        schedule = build_schedule(mask, spec, tiles)
        query_gradient(q, k, v, grad_out, grad_q, *prepared_rows(call, truth), schedule, spec, tiles)
    fill_schedule(schedule, mask, spec, tiles)
    return grad_q, launches[-1]


def run(call: Call, truth: Answer, *, tile: Tile | None = None, **options) -> Answer:
    grad_q, launch = recorded(call, truth, tile)
    emulate(launch, **options)
    return Answer(None, None, grad_q, None, None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right(case: Case) -> None:
    call = make_call(case, torch.bfloat16)
    truth = truth_of(call)
    check(run(call, truth, late=True), call, truth)


@pytest.mark.parametrize("d", (64, 128, 256))
def test_float16_and_products_that_read_early(d: int) -> None:
    call = make_call(Case("causal", 1, 2, queries=140, keys=300, d=d, causal=True, mask="holes"), torch.float16)
    truth = truth_of(call)
    check(run(call, truth, late=False), call, truth)


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize(("d", "causal"), ((64, True), (128, False), (256, True)))
def test_what_hidden_keys_and_dead_rows_hold_changes_no_bit(d: int, causal: bool, late: bool) -> None:
    case = Case("garbage", 2, 2, 1, queries=140, keys=200, d=d, mask="pad_left", causal=causal)
    call = make_call(case, torch.bfloat16)
    truth = truth_of(call)
    hidden, dead = ~call.mask[:, None, :, None], (truth.lse == -torch.inf)[..., None]
    assert dead.any() == causal
    poisoned = call.with_(
        q=call.q.masked_fill(dead, torch.nan),
        k=call.k.masked_fill(hidden, torch.nan),
        v=call.v.masked_fill(hidden, torch.inf),
        grad_out=call.grad_out.masked_fill(dead, torch.nan),
    )
    clean, other = run(call, truth, late=late), run(poisoned, truth, late=late)
    assert bits_equal(clean.dq, other.dq)


def test_blocks_smaller_than_the_schedules() -> None:
    call = make_call(Case("ratio", 1, 2, queries=140, keys=500, d=64, mask="holes", causal=True), torch.bfloat16)
    truth = truth_of(call)
    check(run(call, truth, tile=Tile(128, 32, 4, 2)), call, truth)


def test_every_schedule_gives_the_same_bits() -> None:
    call = make_call(Case("seeds", 1, 2, queries=130, keys=500, d=64, mask="holes", causal=True), torch.bfloat16)
    truth = truth_of(call)
    first = run(call, truth)
    for seed in range(1, 6):
        other = run(call, truth, seed=100 * seed, late=seed % 2 == 1)
        assert bits_equal(first.dq, other.dq)


MISTAKES = RING_MISTAKES | {
    "k is not awaited": dict(await_full=await_all_but(K_RING.value)),
    "v is not awaited": dict(await_full=await_all_but(V_RING.value)),
    "hidden rows of k are left": dict(clear_hidden=clear_nothing),
    "the program ends before its copy": dict(tma=SimpleNamespace(store_wait=lambda pending: None)),
}


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name: str, late: bool) -> None:
    call = make_call(Case("mistakes", 2, 2, queries=140, keys=700, d=64, mask="pad_left"), torch.bfloat16)
    call = call.with_(k=call.k.masked_fill(~call.mask[:, None, :, None], torch.nan))
    truth = truth_of(call)
    right = run(call, truth, late=late)
    for seed in range(3):
        try:
            wrong = run(call, truth, seed=seed, late=late, instead=MISTAKES[name])
        except EmulationError:
            continue
        assert not bits_equal(wrong.dq, right.dq), f"not found with seed {seed}"
