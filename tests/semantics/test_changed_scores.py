"""Biases, ALiBi, softcaps, windows and sinks: each alone, with everything else, and with each other, on every backend
that serves them, against the float64 oracle with all gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from backends import (
    BACKENDS,
    CHOOSY,
    FUSED,
    MATH_CPU,
    Backend,
    call_for,
    refusal_of,
    skip_unless_quick,
    skip_unless_served,
)
from flash_attend import flash_attention, reference
from flash_attend.testing.calls import BIASES, MASKS, Case, budget_of, check, make_call, run

BIASED = (
    *(Case(f"bias_{name}", bias=name) for name in BIASES if name != "none"),
    *(Case(f"bias_{name}_causal", bias=name, causal=True, queries=50) for name in ("1hij", "b11j", "hiding")),
    Case("bias_padded", bias="bhij", mask="pad_left"),
    Case("bias_dense_mask", bias="1hij", mask="bhij"),
    Case("bias_many_batches", batch=16, heads=1, queries=5, keys=9, d=4, bias="1hij", mask="pad_right"),
    Case("bias_grouped", heads=4, kv_heads=2, bias="1hij", mask="1h1j"),
    Case("bias_value_dim", d=8, dv=24, bias="b1ij", bias_in_float32=True),
    Case("bias_dropout", bias="hiding", dropout_p=0.3),
    Case("bias_in_float32", bias="1hij", bias_in_float32=True, causal=True),
    Case("bias_one_query", bias="bhij", queries=1, keys=70),
    Case("bias_only_lse", bias="hiding", grads="lse"),
)
WINDOWED = (
    *(Case(f"window_{left}_{right}", window=(left, right)) for left, right in ((4, 3), (0, 0), (None, 5), (6, None))),
    Case("window_larger_than_the_sequence", window=(1000, 1000)),
    Case("window_causal", window=(7, 3), causal=True, queries=60, keys=60),
    Case("window_cache", window=(9, 0), queries=1, keys=45),
    Case("window_cache_causal", window=(9, None), queries=3, keys=45, causal=True),
    Case("window_more_queries", window=(5, 2), queries=70, keys=19),
    Case("window_tiles", window=(40, 10), heads=1, queries=150, keys=170),
    Case("window_padded", window=(6, 2), mask="pad_left", queries=50, keys=50),
    Case("window_holes_causal", window=(6, None), mask="holes", causal=True, queries=50, keys=50),
    Case("window_dense", window=(8, 8), mask="bhij"),
    Case("window_per_head", heads=4, kv_heads=2, window=(8, 1), mask="bh1j"),
    Case("window_dropout", window=(5, 5), dropout_p=0.4, kv_heads=1),
    Case("window_no_keys", window=(5, 5), keys=0),
)
CAPPED = (
    Case("softcap", softcap=1.5),
    Case("softcap_causal_grouped", softcap=0.7, causal=True, heads=4, kv_heads=2),
    Case("softcap_padded_negative_scale", softcap=3.0, mask="pad_left", scale=-0.6),
    Case("softcap_zero_scale", softcap=3.0, scale=0.0),
    Case("softcap_dropout", softcap=2.0, dropout_p=0.2, mask="bhij"),
)
SLOPED = (
    Case("alibi", alibi="h"),
    Case("alibi_batch", alibi="bh", bias_in_float32=True, mask="pad_left"),
    Case("alibi_causal", alibi="h", causal=True, queries=60, keys=60),
    Case("alibi_more_keys", alibi="h", queries=19, keys=60),
    Case("alibi_more_queries", alibi="bh", queries=60, keys=19),
    Case("alibi_one_query", alibi="h", queries=1, keys=60),
    Case("alibi_dense", alibi="h", mask="bhij", heads=4, kv_heads=2),
)
SUNK = (
    Case("sinks", sinks=True),
    Case("sinks_causal_dead_rows", sinks=True, causal=True, queries=60, keys=19),
    Case("sinks_padded_in_float32", sinks=True, bias_in_float32=True, mask="dead_batch"),
    Case("sinks_grouped_dense", sinks=True, heads=4, kv_heads=2, mask="bhij"),
    Case("sinks_dropout", sinks=True, dropout_p=0.3),
    Case("sinks_no_keys", sinks=True, keys=0),
    Case("sinks_only_lse", sinks=True, grads="lse"),
)
TOGETHER = (
    Case("all", bias="1hij", window=(9, 4), softcap=2.0, alibi="h", sinks=True, mask="pad_right"),
    Case(
        "all_causal_grouped", heads=4, kv_heads=2, queries=40, keys=60, d=8, dv=24, bias="hiding", bias_in_float32=True,
        window=(20, None), causal=True, softcap=1.0, alibi="bh", sinks=True, mask="bhij", dropout_p=0.2, scale=-0.5,
    ),
)  # fmt: skip
CASES = (*BIASED, *WINDOWED, *CAPPED, *SLOPED, *SUNK, *TOGETHER)
EVERY_DTYPE = (*BIASED[-5:], *WINDOWED[:2], *CAPPED[:2], *SLOPED[:2], *SUNK[:2], *TOGETHER)
CALLS = [
    pytest.param(case, dtype, id=f"{case}-{dtype}".replace("torch.", ""))
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    for case in (CASES if dtype == torch.float32 else EVERY_DTYPE)
]

every_backend = pytest.mark.parametrize("backend", (*BACKENDS, *CHOOSY))


@every_backend
@pytest.mark.parametrize(("case", "dtype"), CALLS)
def test_every_result_is_within_the_error_budget(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    skip_unless_quick(backend, dtype)
    call = call_for(backend, case, dtype)
    check(run(call, backend.name), call)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("case", EVERY_DTYPE, ids=str)
def test_so_are_the_gradients_of_the_fused_backward(backend: Backend, case: Case) -> None:
    call = call_for(backend, case, torch.float32)
    check(run(call, backend.name), call)


@st.composite
def cases(draw: st.DrawFn, longest: int) -> Case:
    """Any of them together, with anything else."""
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from((1, 1, 2)))
    ends = st.none() | st.integers(0, longest)
    return Case(
        "drawn",
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * group,
        kv_heads=0 if kv_heads == 1 and draw(st.booleans()) else kv_heads,
        queries=draw(st.integers(0, longest)),
        keys=draw(st.integers(0, longest)),
        d=draw(st.sampled_from((1, 5, 8))),
        dv=draw(st.sampled_from((None, 3, 16))),
        mask=draw(st.sampled_from(("none", *sorted(MASKS)))),
        causal=draw(st.booleans()),
        scale=draw(st.none() | st.sampled_from((0.0, -0.5))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.4))),
        grads=draw(st.sampled_from(("both", "both", "out", "lse"))),
        bias=draw(st.sampled_from(("none", "none", *sorted(BIASES)))),
        bias_in_float32=draw(st.booleans()),
        window=draw(st.none() | st.tuples(ends, ends)),
        softcap=draw(st.none() | st.sampled_from((0.5, 4.0))),
        alibi=draw(st.sampled_from(("none", "h", "bh"))),
        sinks=draw(st.booleans()),
    )


@pytest.mark.parametrize("backend", (*BACKENDS, *FUSED[1:], *CHOOSY))  # the fused backward where it is quick: on a GPU
def test_any_of_them_together(backend: Backend) -> None:
    count = 6 if backend.interpreted else 50
    dtypes = (torch.float32, torch.float64) if backend.interpreted else (torch.float32, torch.bfloat16, torch.float64)

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(30 if backend.interpreted else 60), dtype=st.sampled_from(dtypes), seed=st.integers(0, 2**16))
    def answers(case: Case, dtype: torch.dtype, seed: int) -> None:
        if backend.name == "sdpa":  # which serves none of these
            case = replace(case, grads="out", dv=None, dropout_p=0.0, softcap=None, sinks=False)
        call = make_call(case, dtype, backend.device, seed)
        assume(not (backend.choosy and refusal_of(backend, call)))
        check(run(call, backend.name), call)

    answers()


@pytest.mark.parametrize("case", (*TOGETHER, *WINDOWED[:6], Case("x", bias="hiding", queries=70, mask="bhij")), ids=str)
@pytest.mark.parametrize("held", (0, 2**60), ids=("recomputed", "kept"))
def test_the_einsum_path_in_chunks(case: Case, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "HELD_SCORES", held)
    monkeypatch.setattr(reference, "CACHED_SCORES", 0)
    monkeypatch.setattr(reference, "FEWEST_QUERIES", 8)
    call = make_call(case, torch.float32)
    check(run(call, "math"), call)


# ---------------------------------------------------------------------------------------------------------------------
# What others define, by their formulas
# ---------------------------------------------------------------------------------------------------------------------


def by_formula(q: Tensor, k: Tensor, v: Tensor, score_mod, mask_mod=None) -> Tensor:
    """FlexAttention's definition: `softmax(score_mod(q k^T / sqrt(d), b, h, q_idx, kv_idx)) v`."""
    b, h, i, d = q.shape
    at = torch.meshgrid(*(torch.arange(n) for n in (b, h, i, k.shape[2])), indexing="ij")
    scores = score_mod(q @ k.mT * d**-0.5, *at)
    if mask_mod is not None:
        scores = scores.masked_fill(~mask_mod(*at), -math.inf)
    return scores.softmax(dim=-1) @ v


B, H, N, D = 2, 4, 24, 8
SLOPES = torch.exp2(-(torch.arange(H) + 1.0) * 8.0 / H).double()  # as FlexAttention's example has them
TABLE = torch.randn(H, 2 * N - 1, dtype=torch.float64)
ROWS = torch.arange(N)

# The examples of FlexAttention's documentation and of its blog post "FlexAttention: The Flexibility of PyTorch with the
# Performance of FlashAttention", and FlashAttention-2's window, softcap and ALiBi. Each with the options that mean it.
FORMULAS = {
    "no change": (lambda s, b, h, q, k: s, None, dict()),
    "causal": (lambda s, b, h, q, k: torch.where(q >= k, s, -math.inf), None, dict(causal=True)),
    "relative position": (lambda s, b, h, q, k: s + (q - k), None, dict(bias=(ROWS[:, None] - ROWS).double())),
    "relative position table": (
        lambda s, b, h, q, k: s + TABLE[h, q - k + N - 1],
        None,
        dict(bias=TABLE[:, ROWS[:, None] - ROWS + N - 1]),
    ),
    # Causal attention sees no key ahead: `slope * (kv_idx - q_idx)` is our `-slope * abs(kv_idx - q_idx)` there.
    "alibi": (
        lambda s, b, h, q, k: s + SLOPES[h] * (k - q),
        lambda b, h, q, k: q >= k,
        dict(alibi_slopes=SLOPES, causal=True),
    ),
    # FlashAttention-2: "a bias of (-alibi_slope * |i + seqlen_k - seqlen_q - j|)"
    "alibi on both sides": (
        lambda s, b, h, q, k: s - SLOPES[h] * (q + N - N - k).abs(),
        None,
        dict(alibi_slopes=SLOPES),
    ),
    "soft cap": (lambda s, b, h, q, k: 0.9 * torch.tanh(s / 0.9), None, dict(softcap=0.9)),
    "sliding window": (
        lambda s, b, h, q, k: s,
        lambda b, h, q, k: (q >= k) & (q - k <= 5),
        dict(window=(5, 0)),
    ),
    # FlashAttention-2: keys between [i + seqlen_k - seqlen_q - window[0], i + seqlen_k - seqlen_q + window[1]]
    "two-sided window": (
        lambda s, b, h, q, k: s,
        lambda b, h, q, k: (k >= q - 4) & (k <= q + 2),
        dict(window=(4, 2)),
    ),
    "prefix": (
        lambda s, b, h, q, k: s,
        lambda b, h, q, k: (q >= k) | (k < 7),
        dict(bias=torch.where((ROWS[:, None] >= ROWS) | (ROWS < 7), 0.0, -math.inf).double()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", [b for b in (*BACKENDS, *CHOOSY[:1]) if b.values[0].device == "cpu"])
@pytest.mark.parametrize("name", FORMULAS)
def test_what_others_define(backend: Backend, name: str) -> None:
    score_mod, mask_mod, options = FORMULAS[name]
    call = call_for(backend, Case(name, batch=B, heads=H, queries=N, keys=N, d=D, grads="out"), torch.float64)
    call = call.with_(**options)
    skip_unless_served(backend, call)
    leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
    expected = by_formula(*leaves, score_mod, mask_mod)
    wanted = torch.autograd.grad(expected, leaves, call.grad_out)
    answer = run(call, backend.name)
    for found, right in zip((answer.out, answer.dq, answer.dk, answer.dv), (expected, *wanted), strict=True):
        torch.testing.assert_close(found, right.detach(), rtol=1e-9, atol=1e-10)


@every_backend
def test_sinks_of_zero_are_softmax_plus_one(backend: Backend) -> None:
    """As in Evan Miller's "Attention is off by one": `exp(s) / (1 + sum exp(s))`."""
    call = call_for(backend, Case("off by one", d=64, sinks=True), backend.dtype)
    call = call.with_(sinks=torch.zeros_like(call.sinks))
    scores = call.q.double() @ call.k.double().mT * 64**-0.5
    weights = scores.exp() / (1 + scores.exp().sum(dim=-1, keepdim=True))
    torch.testing.assert_close(
        run(call, backend.name).out, (weights @ call.v.double()).to(backend.dtype), rtol=2e-3, atol=2e-3
    )


# ---------------------------------------------------------------------------------------------------------------------
# Faults that users report of others
# ---------------------------------------------------------------------------------------------------------------------


@every_backend
def test_a_gradient_is_summed_over_the_batch_in_float32(backend: Backend) -> None:
    """64 terms of which each is some hundredth of the sum: in bfloat16 the later ones would be lost."""
    case = Case("summed", batch=64, heads=2, queries=9, keys=13, d=16, bias="1hij", grads="out")
    call = call_for(backend, case, torch.bfloat16 if not backend.interpreted else torch.float16)
    call = call.with_(**{n: getattr(call, n)[:1].expand_as(getattr(call, n)) for n in ("q", "k", "v", "grad_out")})
    one = call.with_(**{n: getattr(call, n)[:1] for n in ("q", "k", "v", "grad_out")})
    summed, single = run(call, backend.name).dbias, run(one.with_(bias=one.bias.float()), backend.name).dbias
    eps = torch.finfo(call.q.dtype).eps
    torch.testing.assert_close(summed.double(), 64 * single.double(), rtol=eps, atol=eps * 0.01)


@every_backend
@pytest.mark.parametrize("sink", (-math.inf, 1e4))
def test_extreme_sinks(backend: Backend, sink: float) -> None:
    """-inf is no sink, bit for bit next to none; 1e4 takes all of the weight."""
    call = call_for(backend, Case("sinks", mask="pad_left", sinks=True, d=64), backend.dtype)
    call = call.with_(sinks=torch.full_like(call.sinks, sink))
    answer = run(call, backend.name)
    if sink < 0:
        assert not answer.dsinks.any()
        check(replace(answer, dsinks=None), call.with_(sinks=None))
        return
    alive = answer.lse > -torch.inf
    assert alive.any()
    assert (answer.lse[alive] == sink).all()
    for name in ("out", "dq", "dk", "dv"):
        assert not getattr(answer, name).any(), name
    expected = torch.where(alive, call.grad_lse, 0).sum(dim=(0, 2)) if call.grad_lse is not None else 0.0
    torch.testing.assert_close(answer.dsinks.float(), torch.zeros_like(answer.dsinks).float() + expected)


@every_backend
def test_a_softcap_of_scores_of_ten_thousand(backend: Backend) -> None:
    call = call_for(backend, Case("huge", softcap=50.0, d=64, queries=20, keys=30), backend.dtype)
    call = call.with_(q=call.q * 40, k=call.k * 40, scale=1.0)
    answer = run(call, backend.name)
    check(answer, call)
    assert (answer.lse <= 50 + math.log(30)).all()


@every_backend
@pytest.mark.parametrize("held", (math.nan, math.inf))
def test_what_a_bias_holds_under_hidden_pairs_stays_out(backend: Backend, held: float) -> None:
    """Under a mask, under causality and outside of a window; and its gradient there is 0."""
    for options in (dict(mask="bhij"), dict(mask="pad_left"), dict(causal=True), dict(window=(3, 2))):
        call = call_for(backend, Case("garbage", bias="bhij", queries=20, keys=24, **options), backend.dtype)
        hidden = ~budget_of(call).pairs
        clean = call.with_(bias=call.bias.masked_fill(hidden, 0.0))
        answer = run(call.with_(bias=call.bias.masked_fill(hidden, held)), backend.name)
        check(answer, clean)
        assert not answer.dbias[hidden].any()


@every_backend
def test_keys_that_a_bias_or_a_window_hides_are_inert(backend: Backend) -> None:
    """NaN in k and v of a key that a bias of -inf hides from every query, or from those that would see it else, or that
    lies before every window."""
    rest = (dict(causal=True), dict(window=(9, 3)), dict(mask="bhij"))
    for options in (
        dict(bias="hiding_keys"),
        dict(window=(3, None), queries=5, keys=43),
        *(dict(bias="1hij", queries=43, **others) for others in rest),
    ):
        call = call_for(backend, Case("inert", **options), backend.dtype)
        if options.get("bias") == "1hij":
            seeing = budget_of(call).pairs.any(dim=0, keepdim=True) & (torch.arange(43) == 9).to(call.q.device)
            assert not seeing[..., 9].all()
            call = call.with_(bias=call.bias.masked_fill(seeing, -math.inf))
        unread = ~budget_of(call).pairs.any(dim=(1, 2))[:, None, :, None]
        assert unread.any()
        poisoned = call.with_(k=call.k.masked_fill(unread, math.nan), v=call.v.masked_fill(unread, math.nan))
        check(run(poisoned, backend.name), call)


@every_backend
def test_a_row_is_dead_if_its_bias_hides_all_that_it_sees(backend: Backend) -> None:
    """One that sees nothing but products of -inf is not: it is NaN, as a softmax of -inf alone is."""
    for options in (
        dict(bias="1hij"),
        dict(bias="b1ij", mask="bhij"),
        dict(bias="bhij", mask="pad_left", window=(20, 2)),
    ):
        call = call_for(backend, Case("alone", grads="out", **options), backend.dtype)
        query = torch.arange(call.q.shape[2], device=call.q.device)[:, None]
        call = call.with_(bias=call.bias.masked_fill(query == 20, -math.inf), k=call.k.abs() + 0.1)
        call = call.with_(q=call.q.masked_fill(query == 30, -math.inf))
        alive = budget_of(call).alive
        assert alive[..., 30].all()
        answer = run(call, backend.name)
        assert answer.out[..., 30, :].isnan().all()
        assert (answer.lse == -math.inf).equal(~alive | (query[:, 0] == 30))
        assert not answer.out[~alive].any()
        assert not answer.dq[~alive].any()
        assert not answer.dbias[..., 20, :].any()
        assert answer.dq[..., :30, :].isfinite().all()


@every_backend
def test_a_bias_without_a_gradient(backend: Backend) -> None:
    call = call_for(backend, Case("constant", bias="expanded", causal=True, sinks=True), backend.dtype)
    answer = run(call, backend.name, needs="qkv")
    assert answer.dbias is answer.dsinks is None
    check(answer, call)


@every_backend
@pytest.mark.parametrize("needs", (["bias"], ["sinks"], ["bias", "q"], ["k", "sinks"]), ids=str)
def test_only_the_needed_gradients(backend: Backend, needs: list[str]) -> None:
    call = call_for(backend, Case("needs", bias="1hij", sinks=True, mask="pad_left"), backend.dtype)
    answer = run(call, backend.name, needs=needs)
    assert [name for name in ("q", "k", "v", "bias", "sinks") if getattr(answer, f"d{name}") is not None] == [
        name for name in ("q", "k", "v", "bias", "sinks") if name in needs
    ]
    check(answer, call)


@pytest.mark.parametrize("ranks", (0, 1, 2, 3))
def test_a_gradient_has_the_shape_of_its_bias(ranks: int) -> None:
    shape = (4, 7, 9)[3 - ranks :]
    bias = torch.randn(shape, requires_grad=True)
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8)
    flash_attention(q, k, k, bias=bias, backend=MATH_CPU.name).sum().backward()
    assert bias.grad.shape == shape
