"""The kernels for Hopper, emulated: what their partitions compute together, and that their mistakes would be found."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from flash_attend import BackendUnavailable
from flash_attend.backends import BackwardName
from flash_attend.dispatch import choose
from flash_attend.kernels import operands, programs
from flash_attend.kernels.configs import Tile, Tiles, override
from flash_attend.kernels.hopper import forward
from flash_attend.kernels.hopper.forward import attention_forward
from flash_attend.kernels.launch import recorded_launches
from flash_attend.ops import FORWARD, options_of
from flash_attend.testing.calls import Call, Case, assert_same_bits, bits_equal, check, make_call, run
from gluon_emulator import EmulationError, Mistake, bound
from hopper_calls import (
    H100,
    RING_MISTAKES,
    assert_found,
    early,
    not_waiting_for_copies,
    on_h100,
    poisoned,
    run_backward,
    run_forward,
    same_bits,
    skipping,
    tiles_of,
    without,
)

# What a run of each kernel is: those for keys make the gradients of k and v, and that of q too if they are fused.
RUNS = dict(
    forward=run_forward,
    q=partial(run_backward, backward="separate", needed="q"),
    keys=partial(run_backward, backward="separate", needed="kv"),
    fused=partial(run_backward, backward="fused", needed="qkv"),
)
BACKWARDS: tuple[BackwardName, ...] = ("fused", "separate")
# For the kernels that go over keys, and for those that go over queries.
CASES = (
    Case("plain", 1, 2, queries=256, keys=384, d=128),
    Case("ragged", 2, 2, queries=130, keys=200, d=128),
    Case("one_block", 1, 2, queries=5, keys=7, d=64),
    Case("one_query", 1, 2, queries=1, keys=300, d=128, causal=True),
    Case("causal", 2, 2, queries=300, keys=300, d=64, causal=True),
    Case("causal_more_keys", 1, 3, queries=200, keys=450, d=128, causal=True),
    Case("causal_dead_rows", 1, 2, queries=450, keys=200, d=64, causal=True),
    Case("grouped", 2, 6, 2, queries=140, keys=260, d=64),
    Case("one_kv_head", 2, 3, 0, queries=140, keys=260, d=128, causal=True),
    Case("pad_right", 3, 2, queries=200, keys=700, d=64, mask="pad_right"),
    Case("pad_left", 3, 2, 1, queries=300, keys=500, d=128, mask="pad_left", causal=True),
    Case("pad_right_causal", 2, 2, queries=420, keys=420, d=64, mask="pad_right", causal=True),
    Case("holes", 2, 2, queries=140, keys=500, d=128, mask="holes"),
    Case("holes_causal", 2, 2, queries=300, keys=200, d=64, mask="holes", causal=True),
    Case("dead_batch", 2, 2, queries=140, keys=300, d=64, mask="dead_batch"),
    Case("all_hidden", 1, 2, queries=40, keys=300, d=64, mask="all_hidden", causal=True),
    Case("all_visible", 1, 2, queries=140, keys=300, d=64, mask="all_visible"),
    Case("mask_per_head", 2, 2, queries=140, keys=300, d=64, mask="bh1j"),
    Case("mask_of_heads", 2, 2, queries=140, keys=300, d=64, mask="1h1j", causal=True),
    Case("wide", 1, 2, queries=200, keys=200, d=256),
    Case("wide_causal_holes", 2, 2, queries=200, keys=300, d=256, mask="holes", causal=True),
    Case("negative_scale", 1, 2, queries=140, keys=300, d=64, scale=-0.2, causal=True),
    Case("scale_0", 1, 2, queries=140, keys=300, d=64, scale=0.0, causal=True),
    Case("heads_inside", 2, 2, queries=140, keys=300, d=64, layout="heads_inside"),
    Case("odd_strides", 2, 2, queries=140, keys=300, d=64, layout="sliced"),
    Case("broadcast_heads", 2, 2, queries=140, keys=300, d=64, layout="broadcast_heads"),
    Case("strided_last_dimension", 1, 2, queries=140, keys=300, d=64, layout="interleaved"),
)
KEY_CASES = (
    Case("plain", 1, 2, queries=256, keys=256, d=128),
    Case("ragged", 2, 1, queries=130, keys=200, d=128),
    Case("ragged_64", 1, 2, queries=200, keys=130, d=64),
    Case("one_block", 1, 2, queries=5, keys=7, d=64),
    Case("one_query", 1, 2, queries=1, keys=300, d=128, causal=True),
    Case("causal", 1, 2, queries=300, keys=300, d=64, causal=True),
    Case("causal_more_keys", 1, 2, queries=200, keys=350, d=128, causal=True),
    Case("causal_dead_rows", 1, 1, queries=450, keys=200, d=64, causal=True),
    Case("causal_dead_blocks", 1, 1, queries=330, keys=100, d=128, causal=True),
    Case("grouped", 2, 6, 2, queries=140, keys=140, d=64),
    Case("grouped_causal", 1, 4, 2, queries=200, keys=140, d=128, causal=True),
    Case("one_kv_head", 1, 3, 0, queries=140, keys=260, d=128, causal=True),
    Case("pad_right", 2, 1, queries=200, keys=500, d=64, mask="pad_right"),
    Case("pad_left", 2, 2, 1, queries=200, keys=300, d=128, mask="pad_left", causal=True),
    Case("pad_right_causal", 2, 1, queries=320, keys=320, d=64, mask="pad_right", causal=True),
    Case("pad_left_more_queries", 2, 1, queries=250, keys=200, d=64, mask="pad_left", causal=True),
    Case("holes", 2, 1, queries=140, keys=400, d=128, mask="holes"),
    Case("holes_causal", 2, 1, queries=300, keys=200, d=64, mask="holes", causal=True),
    Case("dead_batch", 2, 2, queries=140, keys=200, d=64, mask="dead_batch"),
    Case("all_hidden", 1, 2, queries=40, keys=300, d=64, mask="all_hidden", causal=True),
    Case("all_visible", 1, 2, queries=140, keys=200, d=64, mask="all_visible"),
    Case("mask_per_head", 2, 2, queries=140, keys=200, d=64, mask="bh1j"),
    Case("mask_of_heads", 2, 2, queries=140, keys=200, d=64, mask="1h1j", causal=True),
    Case("negative_scale", 1, 2, queries=140, keys=200, d=64, scale=-0.2, causal=True),
    Case("negative_scale_ragged", 1, 1, queries=140, keys=200, d=128, scale=-2.0),
    Case("scale_0", 1, 2, queries=140, keys=200, d=64, scale=0.0, causal=True),
    Case("scale_large", 1, 1, queries=140, keys=200, d=64, scale=4.0, mask="pad_right"),
    Case("only_out", 1, 1, queries=140, keys=140, d=64, grads="out"),
    Case("only_lse", 1, 1, queries=140, keys=140, d=64, grads="lse"),
    Case("heads_inside", 2, 2, queries=140, keys=140, d=64, layout="heads_inside"),
    Case("odd_strides", 1, 2, queries=140, keys=140, d=64, layout="sliced", grad_layout="interleaved"),
    Case("broadcast_heads", 1, 2, queries=140, keys=140, d=64, layout="broadcast_heads", grad_layout="broadcast_last"),
    Case("wide", 1, 1, queries=100, keys=70, d=256),
    Case("wide_causal_grouped", 1, 4, 2, queries=140, keys=150, d=256, causal=True),
    Case("wide_more_queries", 1, 1, queries=200, keys=70, d=256, causal=True),
    Case("wide_pad_left_causal", 2, 1, queries=100, keys=200, d=256, mask="pad_left", causal=True),
    Case("wide_holes_grouped", 2, 2, 1, queries=100, keys=150, d=256, mask="holes"),
    Case("wide_dead_batch", 2, 1, queries=70, keys=100, d=256, mask="dead_batch"),
    Case("wide_mask_per_head", 2, 2, queries=70, keys=100, d=256, mask="bh1j"),
    Case("wide_negative_scale", 1, 1, queries=140, keys=100, d=256, scale=-0.2, causal=True),
    Case("wide_scale_0", 1, 1, queries=100, keys=70, d=256, scale=0.0, causal=True),
)
RIGHT = [
    pytest.param(kernel, case, late, id=f"{kernel}-{case}-{'late' if late else 'eager'}")
    for kernel in RUNS
    for case in (CASES if kernel in ("forward", "q") else KEY_CASES)
    for late in ((True,) if kernel in ("q", "keys") else (False, True))
]
each_kernel = pytest.mark.parametrize("kernel", RUNS)
early_or_late = pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))


@pytest.mark.parametrize(("kernel", "case", "late"), RIGHT)
def test_right(kernel: str, case: Case, late: bool) -> None:
    call = make_call(case, torch.bfloat16)
    check(RUNS[kernel](call, late=late), call)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", (*CASES, *KEY_CASES), ids=str)
def test_right_on_a_gpu(case: Case, dtype: torch.dtype, backward: BackwardName) -> None:
    call = make_call(case, dtype, "cuda")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("reason: the kernels are for sm_90, and the GPU is another one")
    check(run(call, "hopper", backward=backward), call)


@pytest.mark.parametrize("d", (64, 128, 256))
@each_kernel
def test_float16(kernel: str, d: int) -> None:
    call = make_call(Case("float16", 1, 2, queries=140, keys=300, d=d, causal=True, mask="holes"), torch.float16)
    check(RUNS[kernel](call), call)


@early_or_late
@each_kernel
@pytest.mark.parametrize(
    "case",
    (
        Case("padded", 2, 2, 1, queries=200, keys=200, d=64, mask="pad_right"),
        Case("padded_causal", 2, 1, queries=200, keys=300, d=128, mask="pad_left", causal=True),
        Case("holes", 2, 1, queries=200, keys=200, d=64, mask="holes"),
        Case("holes_more_queries", 2, 1, queries=300, keys=200, d=128, mask="holes", causal=True),
        Case("more_queries", 1, 2, queries=300, keys=170, d=64, causal=True),
        Case("wide_padded", 2, 2, 1, queries=70, keys=150, d=256, mask="pad_right"),
        Case("wide_holes_more_queries", 2, 1, queries=200, keys=100, d=256, mask="holes", causal=True),
    ),
    ids=str,
)
def test_what_hidden_keys_and_dead_rows_hold_changes_no_bit(case: Case, kernel: str, late: bool) -> None:
    call = make_call(case, torch.bfloat16)
    assert_same_bits(RUNS[kernel](call, late=late), RUNS[kernel](poisoned(call), late=late))


@pytest.mark.parametrize("kernel", ("forward", "q"))
def test_blocks_smaller_than_the_schedules(kernel: str) -> None:
    call = make_call(Case("ratio", 2, 2, queries=200, keys=500, d=64, mask="holes", causal=True), torch.bfloat16)
    *_, tiles = tiles_of(call)
    small = Tile(128, 32, 4, 2)
    with override(tiles._replace(forward=small, backward_q=small)):
        check(RUNS[kernel](call), call)


@each_kernel
def test_every_schedule_gives_the_same_bits(kernel: str) -> None:
    """On a GPU the sum that is the gradient of q depends on the programs' order, which here is always the same."""
    call = make_call(Case("seeds", 1, 2, 1, queries=200, keys=500, d=64, mask="holes", causal=True), torch.bfloat16)
    first = RUNS[kernel](call)
    for seed in range(1, 6):
        assert same_bits(first, RUNS[kernel](call, seed=100 * seed, late=seed % 2 == 1))


@pytest.mark.parametrize("needed", ("q", "k", "v", "kv", "qk"))
@pytest.mark.parametrize("backward", BACKWARDS)
def test_only_the_needed_gradients(backward: BackwardName, needed: str) -> None:
    call = make_call(Case("needed", 1, 2, queries=140, keys=140, d=64, causal=True), torch.bfloat16)
    everything, some = run_backward(call, backward), run_backward(call, backward, needed)
    for name in "qkv":
        grad = getattr(some, f"d{name}")
        assert (grad is None) == (name not in needed)
        # By itself the gradient of q comes from a kernel that sums in another order.
        if name in needed and (backward, needed) != ("fused", "q"):
            assert bits_equal(grad, getattr(everything, f"d{name}"))


# The forward's turns


def in_turns(case: Case) -> tuple[Call, Tiles]:
    """A call, and its usual tiles but for the consumers' turns."""
    call = make_call(case, torch.bfloat16)
    *_, usual = tiles_of(call)
    return call, usual._replace(forward=usual.forward._replace(ping_pong=True))


@early_or_late
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("plain", "one_block", "causal", "holes_causal", "wide")], ids=str
)
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


# Launches


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


def launched(call: Call, backward: BackwardName, needs: str = "qkv") -> list[str]:
    with on_h100(), recorded_launches() as launches:
        run(call, "hopper", needs, backward=backward)
    return [launch.prepared.kernel.__name__.removesuffix("_kernel") for launch in launches]


def test_which_kernels_a_public_call_runs() -> None:
    call = make_call(Case("public", 1, 2, queries=140, keys=300, d=64, mask="pad_right", causal=True), torch.float16)
    wide = make_call(Case("public", 1, 2, queries=140, keys=300, d=256), torch.float16)
    before = ["hopper_forward", "delta"]
    assert launched(call, "fused") == ["key_schedule", *before, "hopper_backward"]
    assert launched(call, "separate") == ["key_schedule", *before, "hopper_backward", "hopper_backward_q"]
    assert launched(wide, "fused") == [*before, "hopper_backward_wide"]
    assert launched(wide, "separate") == [*before, "hopper_backward_wide", "hopper_backward_q"]
    for backward in BACKWARDS:
        assert launched(wide, backward, "q") == [*before, "hopper_backward_q"]
        assert launched(wide, backward, "k") == [*before, "hopper_backward_wide"]
        assert launched(call, backward, "kv")[-1] == "hopper_backward"


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("sizes", ((0, 2, 5), (2, 0, 5), (2, 2, 0)))
def test_nothing_is_launched_for_nothing(sizes: tuple[int, int, int], backward: BackwardName) -> None:
    batch, heads, queries = sizes
    call = make_call(Case("empty", batch, heads, queries=queries, keys=7, d=64), torch.bfloat16)
    with on_h100(), recorded_launches() as launches:
        answer = run(call, "hopper", backward=backward)
    assert not launches
    assert answer.out.shape == answer.dq.shape == call.q.shape
    assert not answer.dk.any()
    assert not answer.dv.any()


def test_as_an_operator_it_is_the_same_launch() -> None:
    call = make_call(Case("operator", 1, 2, queries=140, keys=300, d=64, mask="pad_right"), torch.float16)
    tensors, spec, tiles = tiles_of(call)
    with on_h100(), recorded_launches() as launches:
        numbers, options = options_of(tensors, spec, choose(spec, H100, "hopper"), return_lse=True)
        FORWARD([x for x in tensors if x is not None], numbers, options)
        attention_forward(tensors, spec, tiles)
    as_operator, directly = (launch.prepared for launch in launches if "forward" in launch.prepared.kernel.__name__)
    assert as_operator is directly


def test_a_call_that_it_cannot_serve_is_refused_with_the_reason() -> None:
    call = make_call(Case("refused", 1, 2, queries=14, keys=30, d=80), torch.float16)
    with on_h100(), pytest.raises(BackendUnavailable, match="d = 80 and dv = 80 are not the same one of 64, 128, 256"):
        run(call, "hopper")


# Mistakes. Each must be found under every schedule that is tried.

FORWARD_MISTAKES = RING_MISTAKES | {
    "v is not awaited": skipping("await_full", "v"),
    "hidden rows of v are left": without("clear_hidden"),
    "out is stored before its copy is through": not_waiting_for_copies("_consume"),
}
Q_MISTAKES = RING_MISTAKES | {
    "k is not awaited": skipping("await_full", "k"),
    "v is not awaited": skipping("await_full", "v"),
    "hidden rows of k are left": without("clear_hidden"),
    "the program ends before its copy": not_waiting_for_copies("_consume"),
}
MISTAKES = RING_MISTAKES | {
    "q is not awaited": skipping("await_full", "q"),
    "the gradient of out is not awaited": skipping("await_full", "grad"),
    "the gradient of out is given back early": early("grad", "Meeting.meet"),
    "q is given back early": early("q", "Slot.publish"),
    "q is not given back": skipping("release", "q"),
    "the gradient of the scores has one buffer": {
        "Exchange.part": lambda right: lambda exchange, step, consumer: right(exchange, 0, consumer)
    },
    "consumers do not meet": without("Meeting.await_both"),
    "consumers meet in the wrong phase": {"Meeting.await_both": lambda right: lambda self, turn: right(self, turn + 1)},
    "the gradient of q is overwritten before it is reduced": skipping("await_empty", "grad_q"),
    "the reducer waits for nobody": skipping("await_full", "grad_q"),
    "the reducer does not wait for its copies": not_waiting_for_copies("_reduce"),
    "a gradient is stored over one that is still copied": not_waiting_for_copies("_consume"),
    "hidden rows of k and v are left": without("clear_hidden_rows"),
    "numbers are copied from where no copy may begin": {"SHIFTS": lambda right: 1},
    "dead rows are read": {"first_live_query": lambda right: lambda mask: 0},
}
WIDE_MISTAKES = {
    "the wrong phase is awaited": RING_MISTAKES["the wrong phase is awaited"],
    "q is given back early": early("q", "warpgroup_mma_wait", "_consume_for_v"),
    "the gradient of out is given back early": early("grad", "warpgroup_mma_wait", "_consume_for_k"),
    "blocks are not given back": skipping("release", "grad"),
    "the gradient of out is not awaited": skipping("await_full", "grad", "_consume_for_v"),
    "the gradients of the scores are not awaited": skipping("await_full", "grad_scores"),
    "the gradients of the scores are overwritten": skipping("await_empty", "grad_scores"),
    "consumers do not meet": without("Meeting.meet"),
    "stores are not fenced": without("fence_async_shared"),
    "hidden rows of k and v are left": without("clear_hidden_rows"),
    "dead rows are read": MISTAKES["dead rows are read"],
}
OF_KEYS = Case("mistakes", 1, 2, 1, queries=320, keys=250, d=128, mask="holes", causal=True)
WIDE = Case("mistakes", 1, 4, 2, queries=250, keys=150, d=256, mask="holes", causal=True)
PLANTED = [
    pytest.param(kernel, case, mistake, id=f"{kernel}{case.d}-{name}")
    for kernel, case, mistakes in (
        ("forward", Case("mistakes", 1, 2, queries=400, keys=700, d=64, mask="holes"), FORWARD_MISTAKES),
        ("q", Case("mistakes", 2, 2, queries=140, keys=700, d=64, mask="pad_left"), Q_MISTAKES),
        ("fused", OF_KEYS, MISTAKES),
        ("fused", WIDE, WIDE_MISTAKES),
        # With the gradient of q in the same pass, the consumers keep step, and nothing would come of it.
        ("keys", WIDE, {"a gradient is staged where q is read": skipping("await_empty", "q", "_consume_for_v")}),
    )
    for name, mistake in mistakes.items()
]


@early_or_late
@pytest.mark.parametrize(("kernel", "case", "mistake"), PLANTED)
def test_mistakes_are_found(kernel: str, case: Case, mistake: Mistake, late: bool) -> None:
    assert_found(mistake, partial(RUNS[kernel], poisoned(make_call(case, torch.bfloat16)), late=late))


def test_gradients_of_hidden_keys_that_are_not_cleared_are_found() -> None:
    """Without the gradient of q, what hidden keys hold goes as far as their own gradients."""
    mistake = {"clear_hidden_gradients": lambda right: lambda grad, mask: grad}
    call = poisoned(make_call(OF_KEYS, torch.bfloat16))
    assert not run_backward(call, "hopper", "kv").dk.isnan().any()
    assert run_backward(call, "hopper", "kv", mistake=mistake).dk.isnan().any()


@pytest.mark.parametrize("d", (64, 256))
@pytest.mark.parametrize("mask", ("none", "pad_left"))
def test_hidden_keys_have_no_weight_however_small_the_lse_is(mask: str, d: int) -> None:
    """Where all scores are far below 0, the weight of a key that is all zeros would be infinite."""
    call = make_call(Case("low", 2, 1, queries=70, keys=70, d=d, scale=8.0, mask=mask), torch.bfloat16)
    call = call.with_(q=call.q.abs(), k=-call.k.abs())
    check(run_backward(call), call)
    mistake = {"Mask.hide": lambda right: lambda mask, x, *pairs: x}
    assert run_backward(call, mistake=mistake).dq.isnan().any()
