"""The contract, on every backend: out, LSE and every gradient against the float64 oracle, within the error budget.

The same calls run on the einsum path, on the kernels in Triton's interpreter (`-m interpreter`), and on a GPU on every
backend (`-m gpu`).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backends import (
    BACKENDS,
    CHOOSY,
    EFFICIENT,
    FUSED,
    TRITON_CUDA,
    Backend,
    call_for,
    skip_unless_interpretable,
    skip_unless_quick,
)
from flash_attend import flash_attention, reference
from flash_attend.backends import LARGEST_ACCURATE_HEAD_DIM
from flash_attend.testing.calls import Case, assert_same_bits, budget_of, check, make_call, run, truth_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

PLAIN = (
    Case("no_mask"),
    Case("causal", causal=True, queries=43),
    Case("causal_more_keys", causal=True, queries=19, keys=70),
    Case("causal_more_queries", causal=True, queries=70, keys=19),  # the first 51 rows are dead
    Case("causal_one_query", causal=True, queries=1, keys=45),
    Case("causal_one_key", causal=True, queries=21, keys=1),
    Case("one_by_one", queries=1, keys=1, d=3, dv=2),
    Case("one_query", queries=1, keys=67),
    Case("one_key", queries=33, keys=1),
    Case("tile_sized", queries=64, keys=64),
    Case("one_past_a_tile", queries=65, keys=65, causal=True),
    Case("several_tiles", batch=1, heads=1, queries=150, keys=170, causal=True),
    Case("one_head", heads=1, batch=3),
)

MASKED = (
    *(Case(name, mask=name) for name in ("pad_right", "pad_left", "holes", "dead_batch", "all_hidden", "all_visible")),
    *(Case(name, mask=name) for name in ("b11j", "1h1j", "bh1j", "111j", "1111", "b111", "bhi1")),
    *(Case(name, mask=name) for name in ("11ij", "b1ij", "1hij", "bhij", "band", "staircase")),
    *(Case(name, mask=name) for name in ("strided", "key_expanded", "key_strided", "dense_expanded", "rows_expanded")),
    Case("pad_right_many_tiles", mask="pad_right", batch=3, heads=1, queries=40, keys=200),
    Case("pad_left_many_tiles", mask="pad_left", batch=3, heads=1, queries=40, keys=200),
    Case("holes_many_tiles", mask="holes", heads=1, queries=40, keys=200),
    Case("band_many_tiles", mask="band", batch=1, heads=1, queries=130, keys=150),
    Case("staircase_many_tiles", mask="staircase", batch=1, heads=1, queries=130, keys=150),
    Case("one_query_pad_left", mask="pad_left", queries=1, keys=77),
)

KEY_MASKS = ("pad_right", "pad_left", "holes", "dead_batch")
DENSE_MASKS = ("11ij", "bhij", "bhi1", "staircase", "strided")
MASKED_CAUSAL = (
    *(
        Case(f"{name}_causal", mask=name, causal=True, queries=50, keys=50)
        for name in (*KEY_MASKS, "b11j", "bh1j", *DENSE_MASKS)
    ),
    Case("pad_left_causal_more_keys", mask="pad_left", causal=True, queries=20, keys=90),
    Case("pad_right_causal_more_queries", mask="pad_right", causal=True, queries=90, keys=40),
    Case("holes_causal_many_tiles", mask="holes", causal=True, heads=1, queries=130, keys=140),
    Case("band_causal_more_queries", mask="band", causal=True, queries=75, keys=45),
)

GROUPED = (
    Case("gqa", heads=4, kv_heads=2),
    Case("gqa_causal", heads=6, kv_heads=2, causal=True, batch=1),
    Case("gqa_pad_left_causal", heads=4, kv_heads=2, mask="pad_left", causal=True, keys=60),
    Case("gqa_bh1j", heads=4, kv_heads=2, mask="bh1j"),
    Case("gqa_1h1j_causal", heads=4, kv_heads=2, mask="1h1j", causal=True),
    Case("gqa_bhij", heads=4, kv_heads=2, mask="bhij"),
    Case("mqa", heads=3, kv_heads=1),
    Case("mqa_3d", heads=3, kv_heads=0),
    Case("mqa_3d_holes_causal", heads=3, kv_heads=0, mask="holes", causal=True),
    Case("mqa_3d_bh1j", heads=4, kv_heads=0, mask="bh1j", d=8, dv=24),
    Case("gqa_strided", heads=4, kv_heads=2, layout="heads_inside"),
)

POWERS_AND_OTHERS = (1, 2, 3, 8, 16, 24, 32, 40, 64, 80, 96, 128, 160, 192, 200, 256)
HEAD_DIMS = (
    *(Case(f"d{d}", d=d, causal=True, batch=1) for d in POWERS_AND_OTHERS),
    *(Case(f"d{d}_dv{2 * d}", d=d, dv=2 * d, batch=1, mask="holes") for d in (1, 8, 24, 40, 64, 128)),
    Case("d64_dv16", d=64, dv=16, batch=1, causal=True),
    Case("d40_dv96", d=40, dv=96, batch=1, causal=True),
    Case("d192_dv128", d=192, dv=128, batch=1, causal=True),
    Case("d7_dv129", d=7, dv=129, batch=1),
    Case("d1_dv1", d=1, dv=1),
    Case("d256_dv1", d=256, dv=1, batch=1),
)

EMPTY = (
    Case("no_batch", batch=0),
    Case("no_heads", heads=0, kv_heads=None),
    Case("no_queries", queries=0),
    Case("no_keys", keys=0),
    Case("no_keys_causal", keys=0, causal=True),
    Case("no_keys_causal_one_query", queries=1, keys=0, causal=True),
    Case("no_queries_causal", queries=0, causal=True),
    Case("no_queries_no_keys", queries=0, keys=0),
    Case("no_keys_padding", keys=0, mask="b11j"),
    Case("no_keys_dense", keys=0, mask="bhij"),
    Case("no_queries_dense", queries=0, mask="bhij"),
    Case("no_queries_dense_causal", queries=0, mask="bhij", causal=True),
    Case("no_batch_gqa", batch=0, heads=4, kv_heads=2, mask="b11j"),
)

STRIDED = ("heads_inside", "sliced", "interleaved", "transposed")
BROADCAST = ("broadcast_heads", "broadcast_length", "broadcast_last")
LAID_OUT = (
    *(Case(f"layout_{name}", layout=name, causal=True) for name in (*STRIDED, "batch_inside")),
    *(Case(f"layout_{name}", layout=name, mask="holes") for name in (*BROADCAST, "broadcast_batch")),
    *(Case(f"grad_{name}", grad_layout=name, mask="pad_right") for name in (*STRIDED, *BROADCAST)),
    Case("interleaved_3d", layout="interleaved", kv_heads=0, d=8, dv=16, mask="pad_left"),
)

SCALED = (
    Case("scale_zero", scale=0.0, causal=True),
    Case("scale_negative", scale=-0.3, causal=True),
    Case("scale_negative_masked", scale=-1.0, mask="holes", causal=True),
    Case("scale_one", scale=1.0),
    Case("scale_large", scale=8.0, mask="pad_right"),
    Case("scale_tiny", scale=1e-6, mask="holes"),
    Case("scale_zero_dead_rows", scale=0.0, mask="bhij"),
)

DROPPED = (
    Case("dropout", dropout_p=0.2),
    Case("dropout_causal_padded", dropout_p=0.5, causal=True, mask="pad_left", keys=60),
    Case("dropout_gqa_dense", dropout_p=0.3, heads=4, kv_heads=2, mask="bhij"),
    Case("dropout_high", dropout_p=0.95),
    Case("dropout_tiny", dropout_p=1e-3, dv=8, queries=70),
    Case("dropout_mqa_3d", dropout_p=0.25, kv_heads=0, heads=3, mask="holes", causal=True, d=24),
)

PARTIAL_LOSS = (
    Case("only_out", grads="out", mask="bhij", causal=True),
    Case("only_lse", grads="lse", mask="bhij", causal=True),
    Case("only_lse_gqa", grads="lse", heads=4, kv_heads=2, causal=True, queries=60, keys=30),
    Case("only_lse_dropout", grads="lse", dropout_p=0.4),
    Case("only_out_no_mask", grads="out"),
)

CASES = (
    *(*PLAIN, *MASKED, *MASKED_CAUSAL, *GROUPED, *HEAD_DIMS),
    *(*EMPTY, *LAID_OUT, *SCALED, *DROPPED, *PARTIAL_LOSS),
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)

# What differs between dtypes in the kernels is the product and the rounding, not who sees whom: a selection will do.
EVERY_DTYPE = (
    *(*PLAIN[:6], *MASKED_CAUSAL[:5], *GROUPED[:3], *HEAD_DIMS[6:9], *HEAD_DIMS[-5:-2]),
    *(*SCALED[:3], *DROPPED[:3]),
)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CALLS = [
    pytest.param(case, dtype, id=f"{case}-{_name(dtype)}")
    for dtype in DTYPES
    for case in (CASES if dtype == torch.float32 else EVERY_DTYPE)
]


@pytest.mark.parametrize("backend", (*BACKENDS, *CHOOSY, *EFFICIENT))
@pytest.mark.parametrize(("case", "dtype"), CALLS)
def test_every_result_is_within_the_error_budget(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    skip_unless_interpretable(backend, dtype)
    accurate = dtype in (torch.float32, torch.float64)
    if backend == TRITON_CUDA and accurate and max(case.d, case.dv or 0) > LARGEST_ACCURATE_HEAD_DIM:
        pytest.skip("refused on a GPU, see REFUSALS in test_dispatch.py")
    call = call_for(backend, case, dtype)
    check(run(call, backend.name), call)


# Through every way of the fused backward to hide keys, to leave dead rows alone and to add to the gradient of q.
FUSED_CASES = (
    Case("fused_ragged", batch=1),
    Case("fused_causal_dead_rows", batch=1, causal=True, queries=50, keys=19),
    Case("fused_causal", batch=1, heads=1, causal=True, queries=64, keys=64),
    Case("fused_pad_left_causal", mask="pad_left", causal=True, heads=1, queries=40, keys=50),
    Case("fused_per_head_grouped", batch=1, heads=4, kv_heads=2, mask="bh1j", causal=True, keys=37),
    Case("fused_dense_grouped", batch=1, kv_heads=1, mask="bhij", d=8, dv=24),
    Case("fused_staircase", batch=1, heads=1, queries=50, keys=43, mask="staircase", scale=-0.7),
    Case("fused_dropout", batch=1, heads=2, kv_heads=0, dropout_p=0.4, mask="holes", scale=-0.4),
    Case("fused_dropout_dense", batch=1, heads=1, dropout_p=0.3, mask="11ij"),
    Case("fused_two_parts", batch=1, heads=1, d=40, dv=80, mask="holes", causal=True, layout="heads_inside"),
    Case("fused_zero_scale", batch=1, heads=1, scale=0.0, mask="bhi1", layout="sliced", grad_layout="interleaved"),
    Case("fused_only_lse", batch=1, heads=1, grads="lse", causal=True, queries=30, keys=20),
    Case("fused_no_keys", keys=0),
    Case("fused_no_queries", queries=0),
)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_the_fused_backward(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    skip_unless_quick(backend, dtype)
    call = make_call(case, dtype, backend.device)
    check(run(call, backend.name), call)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("needs", ("q", "qk", "qv", "kv"))
def test_the_fused_backward_of_the_needed_gradients(backend: Backend, needs: str) -> None:
    """It serves those of q and of k or v together. Of others, no one promises the same bits."""
    case = Case("needs", batch=1, kv_heads=1, mask="pad_left", causal=True, queries=20, keys=40)
    call = make_call(case, torch.float32, backend.device)
    everything, some = run(call, backend.name), run(call, backend.name, needs=needs)
    gradients = {name: getattr(some, name) for name in ("dq", "dk", "dv")}
    assert [name[1] for name, gradient in gradients.items() if gradient is not None] == list(needs)
    check(replace(everything, **{name: found for name, found in gradients.items() if found is not None}), call)


@pytest.mark.parametrize("backend", (*BACKENDS, *CHOOSY, *EFFICIENT))
@pytest.mark.parametrize("case", (*MASKED, *EMPTY, *PARTIAL_LOSS), ids=str)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=_name)
def test_masks_in_half_precision(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    skip_unless_quick(backend, dtype)
    call = call_for(backend, case, dtype)
    check(run(call, backend.name), call)


ORDINARY = (
    Case("ordinary_d64", batch=1, queries=96, keys=96, d=64),
    Case("ordinary_d64_causal", batch=1, queries=96, keys=96, d=64, causal=True),
    Case("ordinary_d40_padded_causal", queries=90, keys=90, d=40, mask="pad_right", causal=True),
    Case("ordinary_d128_gqa", batch=1, heads=4, kv_heads=2, queries=64, keys=80, d=128, mask="holes"),
    Case("ordinary_d32_dv64_dense", batch=1, queries=80, keys=80, d=32, dv=64, mask="bhij"),
)


@pytest.mark.parametrize("backend", (*BACKENDS, *CHOOSY, *EFFICIENT))
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=_name)
@pytest.mark.parametrize("case", ORDINARY, ids=str)
def test_ordinary_calls_need_no_floor(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """Twice the eager path's root-mean-square error and nothing on top, where the tensors are large enough for one."""
    skip_unless_interpretable(backend, dtype)
    call = call_for(backend, case, dtype)
    check(run(call, backend.name), call, strict=True)


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@each_backend
@pytest.mark.parametrize("case", (*PLAIN[:4], *MASKED_CAUSAL[:4], *GROUPED[:2], *HEAD_DIMS[6:9]), ids=str)
def test_float32_with_high_matmul_precision(backend: Backend, case: Case, tf32: None) -> None:
    call = make_call(case, torch.float32, backend.device)
    # The einsum path computes products as torch does, which has no TF32 on a CPU.
    budget_of(call, tf32=backend.name != "math").check(run(call, backend.name))


@pytest.mark.parametrize("backend", (*BACKENDS, *CHOOSY[:2], *EFFICIENT))
@pytest.mark.parametrize("needs", ("q", "k", "v", "qk", "qv", "kv"))
@pytest.mark.parametrize(
    "case", (Case("gqa", heads=4, kv_heads=2, mask="pad_left", causal=True), Case("lse", grads="lse")), ids=str
)
def test_only_the_needed_gradients(backend: Backend, needs: str, case: Case) -> None:
    call = call_for(backend, case, backend.dtype)
    everything, some = run(call, backend.name), run(call, backend.name, needs=needs)
    for name in "qkv":
        gradient = getattr(some, f"d{name}")
        if name in needs:
            assert torch.equal(gradient, getattr(everything, f"d{name}"))
        else:
            assert gradient is None
    assert torch.equal(some.out, everything.out)


@each_backend
def test_no_gradient_is_needed(backend: Backend) -> None:
    call = make_call(Case("causal", causal=True, mask="pad_right"), torch.float32, backend.device)
    out, lse = flash_attention(call.q, call.k, call.v, **call.options, return_lse=True, backend=backend.name)
    assert not out.requires_grad
    assert not lse.requires_grad
    truth = truth_of(call)
    torch.testing.assert_close(out.double(), truth.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), truth.lse, rtol=1e-5, atol=1e-6)


@each_backend
def test_without_lse_the_output_alone_comes_back(backend: Backend) -> None:
    call = make_call(Case("causal", causal=True, mask="holes", grads="out"), torch.float32, backend.device)
    leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
    out = flash_attention(*leaves, **call.options, backend=backend.name)
    grads = torch.autograd.grad(out, leaves, call.grad_out)
    answer = run(call, backend.name)
    assert torch.equal(out, answer.out)
    assert all(torch.equal(x, y) for x, y in zip(grads, (answer.dq, answer.dk, answer.dv), strict=True))


@each_backend
def test_a_loss_through_the_sum_and_backward(backend: Backend) -> None:
    """The way users call it: `.backward()` of a scalar, into `.grad` of leaves that have other uses as well."""
    call = make_call(Case("causal", causal=True), torch.float32, backend.device)
    leaves = [x.detach().clone().requires_grad_() for x in (call.q, call.k, call.v)]
    out = flash_attention(*leaves, **call.options, backend=backend.name)
    (out.sum() + sum(leaf.sum() for leaf in leaves)).backward()
    call = call.with_(grad_out=torch.ones_like(out), grad_lse=None)
    answer = run(call, backend.name)
    for leaf, gradient in zip(leaves, (answer.dq, answer.dk, answer.dv), strict=True):
        torch.testing.assert_close(leaf.grad, gradient + 1)


@pytest.mark.parametrize("backend", (*BACKENDS, *CHOOSY[:2], *EFFICIENT))
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_repeats_bit_for_bit(backend: Backend, dropout_p: float) -> None:
    call = call_for(
        backend, Case("repeat", heads=4, kv_heads=2, mask="holes", causal=True, dropout_p=dropout_p), backend.dtype
    )
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first = run(call, backend.name)
        for _ in range(1 if backend.interpreted else 3):  # the interpreter has no races
            assert_same_bits(run(call, backend.name), first)
    finally:
        torch.use_deterministic_algorithms(previous)


@each_backend
def test_dropout_follows_torch_manual_seed(backend: Backend) -> None:
    call = make_call(Case("dropout", dropout_p=0.5), torch.float32, backend.device)
    first, again, other = (run(call.with_(torch_seed=seed), backend.name) for seed in (7, 7, 8))
    assert_same_bits(first, again)
    assert not torch.equal(first.out, other.out)
    assert torch.equal(first.lse, other.lse)  # dropout acts on normalised weights


@each_backend
def test_calls_in_a_row_draw_different_dropout(backend: Backend) -> None:
    call = make_call(Case("dropout", dropout_p=0.5), torch.float32, backend.device)
    torch.manual_seed(3)
    first, second = (flash_attention(call.q, call.k, call.v, dropout_p=0.5, backend=backend.name) for _ in range(2))
    assert not torch.equal(first, second)


@each_backend
def test_without_dropout_the_generator_is_left_alone(backend: Backend) -> None:
    call = make_call(Case("plain"), torch.float32, backend.device)
    state = torch.get_rng_state() if backend.device == "cpu" else torch.cuda.get_rng_state()
    flash_attention(call.q, call.k, call.v, backend=backend.name)
    after = torch.get_rng_state() if backend.device == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(state, after)


@each_backend
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=_name)
def test_huge_scores_stay_finite(backend: Backend, dtype: torch.dtype) -> None:
    """Scores of some ten thousand, far past where exp overflows: weights are one-hot and everything stays finite."""
    call = make_call(Case("huge", mask="holes", causal=True, d=32), dtype, backend.device)
    call = call.with_(q=call.q * 60, k=call.k * 60, scale=1.0)
    answer, truth = run(call, backend.name), truth_of(call)
    alive = truth.lse > -torch.inf
    for name in ("out", "dq", "dk", "dv"):
        assert getattr(answer, name).isfinite().all(), name
    torch.testing.assert_close(answer.lse[alive].double(), truth.lse[alive], rtol=1e-5, atol=0)
    torch.testing.assert_close(answer.out.double(), truth.out, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("backend", (*BACKENDS, *FUSED))
@pytest.mark.parametrize("mask", ("none", "pad_right", "bh1j"))
def test_scores_far_below_zero(backend: Backend, mask: str) -> None:
    """A key that is hidden, or not there, and taken as zeros has a score far above all others: its weight overflows."""
    call = make_call(Case("far_below", batch=2, kv_heads=1, mask=mask), torch.float32, backend.device)
    call = call.with_(q=call.q.abs() + 1, k=-10 * (call.k.abs() + 1), scale=1.0)
    check(run(call, backend.name), call)


@each_backend
@pytest.mark.parametrize("kv", ((), (1,), (2,), (0,)), ids=("3d", "one_head", "two_heads", "no_heads"))
def test_queries_without_heads(backend: Backend, kv: tuple[int, ...]) -> None:
    """Any number divides none, and nobody reads k and v: their gradients are 0."""
    shapes = {"q": (2, 0, 5, 8), "k": (2, *kv, 7, 8), "v": (2, *kv, 7, 6)}
    leaves = {name: torch.randn(shape, device=backend.device, requires_grad=True) for name, shape in shapes.items()}
    out, lse = flash_attention(**leaves, causal=True, return_lse=True, backend=backend.name)
    assert (out.shape, lse.shape) == ((2, 0, 5, 6), (2, 0, 5))
    for name, gradient in zip("qkv", torch.autograd.grad((out.sum(), lse.sum()), leaves.values()), strict=True):
        assert gradient.shape == shapes[name]
        assert not gradient.any()


@pytest.mark.parametrize("held", (0, 2**60), ids=("recomputed", "kept"))
@pytest.mark.parametrize(
    "case",
    (
        *PLAIN[:4],
        *MASKED_CAUSAL[:5],
        *GROUPED[2:6],
        *DROPPED[:3],
        *PARTIAL_LOSS,
        Case("mqa_3d_dense_causal", heads=3, kv_heads=0, queries=70, mask="bhij", causal=True),
    ),
    ids=str,
)
def test_the_einsum_path_in_chunks(case: Case, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long calls go by chunks of queries, and the longest ones compute them again in the backward: here, eight each."""
    monkeypatch.setattr(reference, "HELD_SCORES", held)
    monkeypatch.setattr(reference, "CACHED_SCORES", 0)
    monkeypatch.setattr(reference, "FEWEST_QUERIES", 8)
    call = make_call(case, torch.float32)
    check(run(call, "math"), call)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if not b.values[0].interpreted])
@pytest.mark.parametrize(
    "case",
    (
        Case("many_batches", batch=70_000, heads=1, queries=2, keys=3, d=8, mask="pad_right"),
        Case("many_heads", batch=1, heads=66_000, queries=2, keys=3, d=8, causal=True),
        Case("many_of_both", batch=300, heads=220, kv_heads=110, queries=3, keys=2, d=4, mask="bh1j"),
    ),
    ids=str,
)
def test_more_heads_than_a_grid_dimension_holds(backend: Backend, case: Case) -> None:
    call = make_call(case, torch.float32, backend.device)
    check(run(call, backend.name), call)
