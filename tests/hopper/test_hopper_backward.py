"""The backward for Hopper, emulated: what its partitions compute together, and that their mistakes would be found."""

from __future__ import annotations

import inspect
import textwrap
from types import FunctionType
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from flash_attend.kernels.backward import LONGEST_TILE
from flash_attend.kernels.configs import select_hopper_tiles
from flash_attend.kernels.hopper import backward, backward_wide, producer, products, ring
from flash_attend.kernels.hopper.backward import attention_backward
from flash_attend.kernels.key_schedule import Schedule
from flash_attend.kernels.launch import Launch, recorded_launches
from flash_attend.kernels.softmax import LOG2E
from flash_attend.operands import Operands
from flash_attend.spec import AttentionSpec, MaskKind, normalise_inputs
from flash_attend.target import DeviceTarget
from flash_attend.testing.calls import Call, Case, bits_equal, check, make_call, truth_of
from flash_attend.testing.calls import run as run_publicly
from flash_attend.testing.oracle import Answer
from gluon_emulator import EmulationError, emulate
from plain_schedule import block_states, lines_of

H100 = DeviceTarget("cuda", "NVIDIA H100", (9, 0), shared_memory=232448, multiprocessors=3, triton="3.7.1")
BACKWARDS = ("fused", "separate")


def on_h100():
    """Within this context every tensor is on that part, as far as the package asks."""
    return mock.patch.object(DeviceTarget, "of", staticmethod(lambda device: H100))


def rows_of(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, spec: AttentionSpec, tiles: object
) -> tuple[Tensor, Tensor]:
    """What `prepare_rows` gives, which a kernel makes that is no Gluon."""
    dead = lse == -torch.inf
    delta = (out.float() * grad_out.float()).sum(3)
    if grad_lse is not None:
        delta = delta - grad_lse
    missing = -spec.queries % LONGEST_TILE.value
    rows = ((delta.masked_fill(dead, 0.0), 0.0), ((lse * LOG2E.value).masked_fill(dead, torch.inf), torch.inf))
    return tuple(torch.nn.functional.pad(row, (0, missing), value=beyond).contiguous() for row, beyond in rows)


def schedule_of(mask: Tensor | None, spec: AttentionSpec, block: int) -> Schedule:
    if spec.mask == MaskKind.NONE:
        return Schedule(None, None, None)
    rows = mask.reshape(-1, spec.keys)
    visible = torch.nn.functional.pad(rows.int(), (0, -spec.keys % block))
    return Schedule(visible, lines_of(block_states(rows[:, None], 1, block)[:, 0]), None)


def run(call: Call, kind: str = "fused", needed: str = "qkv", **options) -> Answer:
    """The gradients of a call, but for that of q where another kernel makes it; out and lse are the oracle's."""
    truth = truth_of(call)
    q, k, v, mask, spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    tiles = select_hopper_tiles(spec, H100, kind)
    out, lse = truth.out.to(q.dtype), truth.lse.float()

    def launch(prepared, *tensors):
        for grad in tensors[6:8]:
            grad.fill_(torch.nan)
        emulate(Launch(prepared, tensors), **options)

    with mock.patch.multiple(backward, launch=launch, prepare_rows=rows_of), recorded_launches() as launches:
        dq, dk, dv = attention_backward(
            call.grad_out, call.grad_lse, Operands(q, k, v, mask), out, lse,
            schedule_of(mask, spec, tiles.schedule_block[1]), spec, tiles, [name in needed for name in "qkv"],
        )  # fmt: skip
    return Answer(
        None,
        None,
        None if launches else dq,
        None if dk is None else dk.view(call.k.shape),
        None if dv is None else dv.view(call.v.shape),
    )


def same_bits(a: Answer, b: Answer, names: tuple[str, ...] = ("dq", "dk", "dv")) -> bool:
    return all(bits_equal(getattr(a, name), getattr(b, name)) for name in names)


CASES = (
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


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right(case: Case, late: bool) -> None:
    call = make_call(case, torch.bfloat16)
    check(run(call, late=late), call)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_without_the_gradient_of_q(case: Case) -> None:
    call = make_call(case, torch.bfloat16)
    answer = run(call, "separate", late=True)
    assert answer.dq is None
    check(answer, call)


@pytest.mark.parametrize("kind", BACKWARDS)
def test_float16(kind: str) -> None:
    call = make_call(Case("float16", 1, 2, queries=140, keys=200, d=128, causal=True, mask="holes"), torch.float16)
    check(run(call, kind), call)


def poisoned(call: Call) -> Call:
    """The same call with NaN and infinity wherever they must not matter: in hidden keys and in dead rows."""
    batch, _, queries, _ = call.q.shape
    keys = call.k.shape[-2]
    shown = torch.ones(batch, 1, 1, keys, dtype=torch.bool) if call.mask is None else call.mask.view(batch, 1, 1, keys)
    pairs = shown.expand(-1, -1, queries, -1)
    if call.causal:
        pairs = pairs & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    dead = ~pairs.any(3)
    hidden = ~shown.view(batch, 1, keys, 1)
    return call.with_(
        q=call.q.masked_fill(dead.unsqueeze(3), torch.nan),
        k=call.k.masked_fill(hidden, torch.nan),
        v=call.v.masked_fill(hidden, torch.inf),
        grad_out=call.grad_out.masked_fill(dead.unsqueeze(3), torch.nan),
        grad_lse=call.grad_lse.masked_fill(dead, torch.nan),
    )


@pytest.mark.parametrize("kind", BACKWARDS)
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
def test_what_hidden_keys_and_dead_rows_hold_changes_no_bit(case: Case, kind: str) -> None:
    call = make_call(case, torch.bfloat16)
    clean, other = run(call, kind), run(poisoned(call), kind)
    assert same_bits(clean, other, ("dk", "dv"))
    if kind == "fused":
        assert bits_equal(clean.dq, other.dq)


@pytest.mark.parametrize("needed", ("q", "k", "v", "kv", "qk"))
def test_only_the_needed_gradients(needed: str) -> None:
    call = make_call(Case("needed", 1, 2, queries=140, keys=140, d=64, causal=True), torch.bfloat16)
    everything, some = run(call), run(call, needed=needed)
    assert (some.dq is None) == (needed != "qk"), "q alone is another kernel's"
    for name in needed:
        if name != "q" or needed == "qk":
            assert bits_equal(getattr(some, f"d{name}"), getattr(everything, f"d{name}"))
    for name in set("kv") - set(needed):
        assert getattr(some, f"d{name}") is None


@pytest.mark.parametrize("kind", BACKWARDS)
def test_every_schedule_gives_the_same_bits(kind: str) -> None:
    """On a GPU the sum that is the gradient of q depends on the programs' order, which here is always the same."""
    call = make_call(Case("seeds", 1, 2, 1, queries=200, keys=300, d=64, mask="holes", causal=True), torch.bfloat16)
    names = ("dq", "dk", "dv") if kind == "fused" else ("dk", "dv")
    first = run(call, kind)
    for seed in range(1, 6):
        assert same_bits(first, run(call, kind, seed=100 * seed, late=seed % 2 == 1), names)


def launched(call: Call, kind: str, needs: str = "qkv") -> list[str]:
    with on_h100(), recorded_launches() as launches:
        run_publicly(call, "hopper", needs, backward=kind)
    names = [launch.prepared.kernel.__name__.removesuffix("_kernel") for launch in launches]
    return [name for name in names if name not in ("key_schedule", "hopper_forward", "delta")]


def test_which_kernels_a_public_call_runs() -> None:
    call = make_call(Case("public", 1, 2, queries=140, keys=300, d=64, mask="pad_right", causal=True), torch.float16)
    assert launched(call, "fused") == ["hopper_backward"]
    assert launched(call, "separate") == ["hopper_backward", "hopper_backward_q"]
    for kind in BACKWARDS:
        assert launched(call, kind, "q") == ["hopper_backward_q"]
        assert launched(call, kind, "k") == ["hopper_backward"]
        assert launched(call, kind, "kv") == ["hopper_backward"]
    wide = make_call(Case("public", 1, 2, queries=140, keys=300, d=256), torch.float16)
    assert launched(wide, "fused") == ["hopper_backward_wide"]
    assert launched(wide, "separate") == ["hopper_backward_wide", "hopper_backward_q"]


def test_nothing_is_launched_for_nothing() -> None:
    for batch, heads, queries in ((0, 2, 5), (2, 0, 5), (2, 2, 0)):
        call = make_call(Case("empty", batch, heads, queries=queries, keys=7, d=64), torch.bfloat16)
        for kind in BACKWARDS:
            assert not launched(call, kind)
            with on_h100(), recorded_launches():
                answer = run_publicly(call, "hopper", backward=kind)
            assert not answer.dk.any()
            assert not answer.dv.any()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BACKWARDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_on_a_gpu(case: Case, dtype: torch.dtype, kind: str) -> None:
    call = make_call(case, dtype, "cuda")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("reason: the kernels are for sm_90, and the GPU is another one")
    check(run_publicly(call, "hopper", backward=kind), call)


# Mistakes. Each is a change of one function's text, or of two, and must be found under every schedule that is tried.


def changed(function: object, *changes: tuple[str, str]) -> FunctionType:
    """A jitted function with other words in the place of some of its own."""
    lines = textwrap.dedent(inspect.getsource(function.fn)).splitlines()
    text = "\n".join(lines[next(n for n, line in enumerate(lines) if line.startswith("def ")) :])
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    namespace = dict(function.fn.__globals__)
    exec(compile(text, "a mistake", "exec"), namespace)
    return namespace[function.fn.__name__]


def step(*changes: tuple[str, str]) -> dict[str, object]:
    return dict(_step=changed(backward._step, *changes))


GIVE_GRAD_BACK, GIVE_Q_BACK = (f"    release(barriers, {ring}_RING, slot)\n" for ring in ("GRAD", "Q"))
MISTAKES = {
    "a slot is filled before it is empty": dict(
        fill_both=changed(ring.fill_both, ("    await_empty(barriers, ring, slot, turn)\n", ""))
    ),
    "more bytes are copied than expected": dict(
        fill_both=changed(ring.fill_both, (" + row_descriptor.block_type.nbytes", ""))
    ),
    "the wrong phase is awaited": dict(await_full=changed(ring.await_full, ("turn & 1", "turn & 1 ^ 1"))),
    "q is not awaited": step(("    await_full(barriers, Q_RING, slot, turn)\n", "")),
    "the gradient of out is not awaited": step(("    await_full(barriers, GRAD_RING, slot, turn)\n", "")),
    "the gradient of out is given back early": step(
        ("        release(barriers, GRAD_RING, slot)\n        grad_q_buffers", "        grad_q_buffers"),
        ("    if FUSED:\n        # In turn", f"{GIVE_GRAD_BACK}    if FUSED:\n        # In turn"),
    ),
    "q is given back early": step(
        (GIVE_Q_BACK, ""),
        ("    # A product that still", f"{GIVE_Q_BACK}    # A product that still"),
    ),
    "q is not given back": step((GIVE_Q_BACK, "")),
    "the gradient of the scores has one buffer": dict(
        **step(("slot * CONSUMERS + CONSUMER", "CONSUMER")),
        _issue_query_gradient=changed(backward._issue_query_gradient, ("slot * CONSUMERS + half", "half")),
    ),
    "consumers do not meet": step(("        meet(barriers, EXCHANGED, step)\n", "        fence_async_shared()\n")),
    "consumers meet in the wrong phase": step(("EXCHANGED, step)", "EXCHANGED, step + 1)")),
    "stores are not fenced": dict(fence_async_shared=lambda: None),
    "the gradient of q is overwritten before it is reduced": step(
        ("        await_empty(barriers, GRAD_Q_RING, CONSUMER, step)\n", "")
    ),
    "the reducer waits for nobody": dict(
        _reduce=changed(backward._reduce, ("await_full(barriers, GRAD_Q_RING, consumer, step)", "pass"))
    ),
    "the reducer does not wait for its copies": dict(
        _reduce=changed(backward._reduce, ("tma.store_wait(CONSUMERS - 1 - consumer)", "pass"))
    ),
    "a gradient is stored over one that is still copied": dict(
        store_gradient=changed(backward.store_gradient, ("    tma.store_wait(0)", "    pass"))
    ),
    "hidden rows of k and v are left": dict(clear_hidden_rows=lambda rows, visible: None),
    "numbers are copied from where no copy may begin": dict(
        fill_queries=changed(producer.fill_queries, ("row % SHIFTS", "0"))
    ),
    "dead rows are read": dict(first_live_query=lambda *_: 0),
}


def for_v(*changes: tuple[str, str]) -> dict[str, object]:
    return dict(_consume_for_v=changed(backward_wide._consume_for_v, *changes))


def for_k(*changes: tuple[str, str]) -> dict[str, object]:
    return dict(_consume_for_k=changed(backward_wide._consume_for_k, *changes))


WIDE_MISTAKES = {
    "the wrong phase is awaited": dict(await_full=changed(ring.await_full, ("turn & 1", "turn & 1 ^ 1"))),
    "q is given back early": for_v(
        ("        release(barriers, Q_RING, slot)\n", ""),
        ("        scores = warp", "        release(barriers, Q_RING, slot)\n        scores = warp"),
    ),
    "the gradient of out is given back early": for_k(
        ("        release(barriers, GRAD_RING, slot)\n", ""),
        ("        scores = warp", "        release(barriers, GRAD_RING, slot)\n        scores = warp"),
    ),
    "blocks are not given back": dict(
        add_product=changed(products.add_product, ("    release(barriers, ring, slot)\n", ""))
    ),
    "the gradient of out is not awaited": for_v(("        await_full(barriers, GRAD_RING, slot, turn)\n", "")),
    "the gradients of the scores are not awaited": dict(
        _add_to_query_gradient=changed(
            backward_wide._add_to_query_gradient, ("    await_full(barriers, SCORES_RING, slot, turn)\n", "")
        )
    ),
    "the gradients of the scores are overwritten": for_k(
        ("            await_empty(barriers, SCORES_RING, slot, turn)\n", "")
    ),
    "consumers do not meet": dict(meet=lambda barriers, barrier, turn: None),
    "stores are not fenced": dict(fence_async_shared=lambda: None),
    "hidden rows of k and v are left": dict(clear_hidden_rows=lambda rows, visible: None),
    "dead rows are read": dict(first_live_query=lambda *_: 0),
}


@pytest.fixture(scope="module")
def wide_call_with_garbage() -> Call:
    case = Case("mistakes", 1, 4, 2, queries=250, keys=150, d=256, mask="holes", causal=True)
    return poisoned(make_call(case, torch.bfloat16))


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize("name", WIDE_MISTAKES)
def test_mistakes_at_256_are_found(name: str, late: bool, wide_call_with_garbage: Call) -> None:
    right = run(wide_call_with_garbage, late=late)
    for seed in range(3):
        try:
            wrong = run(wide_call_with_garbage, seed=seed, late=late, instead=WIDE_MISTAKES[name])
        except EmulationError:
            continue
        assert not same_bits(wrong, right), f"not found with seed {seed}"


def test_a_gradient_at_256_that_is_staged_where_q_is_still_read_is_found(wide_call_with_garbage: Call) -> None:
    """With the gradient of q in the same pass, the consumers keep step, and nothing would come of it."""
    mistake = for_v(("    await_empty(barriers, Q_RING, slot, turn)\n", ""))
    right = run(wide_call_with_garbage, "hopper")
    for seed in range(3):
        try:
            wrong = run(wide_call_with_garbage, "hopper", seed=seed, instead=mistake)
        except EmulationError:
            continue
        assert not same_bits(wrong, right, ("dk", "dv")), f"not found with seed {seed}"


@pytest.fixture(scope="module")
def call_with_garbage() -> Call:
    case = Case("mistakes", 1, 2, 1, queries=320, keys=250, d=128, mask="holes", causal=True)
    return poisoned(make_call(case, torch.bfloat16))


@pytest.mark.parametrize("late", (False, True), ids=("eager", "late"))
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name: str, late: bool, call_with_garbage: Call) -> None:
    right = run(call_with_garbage, late=late)
    for seed in range(3):
        try:
            wrong = run(call_with_garbage, seed=seed, late=late, instead=MISTAKES[name])
        except EmulationError:
            continue
        assert not same_bits(wrong, right), f"not found with seed {seed}"


def test_gradients_of_hidden_keys_that_are_not_cleared_are_found(call_with_garbage: Call) -> None:
    """Without the gradient of q, what hidden keys hold goes as far as their own gradients."""
    mistake = changed(backward.store_gradient, ("if MASK == KEY:", "if False:"))
    assert not run(call_with_garbage, "hopper").dk.isnan().any()
    assert run(call_with_garbage, "hopper", instead=dict(store_gradient=mistake)).dk.isnan().any()


@pytest.mark.parametrize("d", (64, 256))
@pytest.mark.parametrize("mask", ("none", "pad_left"))
def test_hidden_keys_have_no_weight_however_small_the_lse_is(mask: str, d: int) -> None:
    """Where all scores are far below 0, the weight of a key that is all zeros would be infinite."""
    case = Case("low", 2, 1, queries=70, keys=70, d=d, scale=8.0, mask=mask)
    call = make_call(case, torch.bfloat16)
    call = call.with_(q=call.q.abs(), k=-call.k.abs())
    check(run(call), call)
    show = "HIDE_KEYS: gl.constexpr = FUSED and", "HIDE_KEYS: gl.constexpr = False and"
    mistakes = step(show) | dict(_weights=changed(backward_wide._weights, show))
    assert run(call, instead=mistakes).dq.isnan().any()
