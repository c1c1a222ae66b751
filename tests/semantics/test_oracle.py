"""The judge, judged: against PyTorch's own float64 attention where that applies, and against results by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attend.testing.budget import assert_within_budget, eager_answer
from flash_attend.testing.calls import MASKS, Case, bits_equal, make_call
from flash_attend.testing.oracle import attention_oracle, visible_pairs

# Masks under which every query sees a key, which is where PyTorch's answer is defined.
LIVELY = ("none", "pad_right", "pad_left", "all_visible", "staircase", "band")


def _sdpa(q, k, v, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize("mask", LIVELY)
@pytest.mark.parametrize("scale", (None, -0.7, 0.0))
@pytest.mark.parametrize("kv_heads", (4, 2, 1))
def test_agrees_with_torch(mask: str, scale: float | None, kv_heads: int) -> None:
    call = make_call(
        Case("x", heads=4, kv_heads=kv_heads, mask=mask, scale=scale, dv=24, queries=30, keys=30), torch.float64
    )
    oracle = attention_oracle(call.q, call.k, call.v, **call.options, grad_out=call.grad_out, grad_lse=call.grad_lse)

    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
    mask4 = call.mask if call.mask is None or call.mask.ndim == 4 else call.mask[:, None, None, :]
    out = _sdpa(*leaves, attn_mask=mask4, scale=scale, enable_gqa=True)
    q, k, _ = leaves
    scores = (q @ k.repeat_interleave(4 // kv_heads, dim=1).mT) * (16**-0.5 if scale is None else scale)
    lse = torch.logsumexp(scores if mask4 is None else scores.masked_fill(~mask4, -torch.inf), dim=-1)
    grads = torch.autograd.grad((out, lse), leaves, (call.grad_out, call.grad_lse))

    for got, want in zip((oracle.out, oracle.lse, oracle.dq, oracle.dk, oracle.dv), (out, lse, *grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_agrees_with_torch_on_square_causal_attention() -> None:
    call = make_call(Case("x", causal=True, queries=33, keys=33, grads="out"), torch.float64)
    oracle = attention_oracle(call.q, call.k, call.v, causal=True, grad_out=call.grad_out)
    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
    out = _sdpa(*leaves, is_causal=True)
    grads = torch.autograd.grad(out, leaves, call.grad_out)
    for got, want in zip((oracle.out, oracle.dq, oracle.dk, oracle.dv), (out, *grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_causal_pairs_are_aligned_at_the_last_query_and_the_last_key() -> None:
    here = torch.device("cpu")
    assert visible_pairs(1, 1, 2, 4, None, True, here)[0, 0].tolist() == [[True, True, True, False], [True] * 4]
    assert visible_pairs(1, 1, 3, 2, None, True, here)[0, 0].tolist() == [[False, False], [True, False], [True, True]]
    assert visible_pairs(1, 1, 1, 5, None, True, here).all()


def test_key_padding_and_causal_together() -> None:
    padding = torch.tensor([[False, True, True], [True, False, True]])
    pairs = visible_pairs(2, 1, 3, 3, padding, True, torch.device("cpu"))
    assert pairs[0, 0].int().tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert pairs[1, 0].int().tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 1]]


def test_by_hand() -> None:
    """One query, two keys with scores 0 and ln 3: weights 1/4 and 3/4, values 8 and 4, so the output is 5."""
    q = torch.tensor([[[[1.0]]]])
    k = torch.tensor([[[[0.0], [math.log(3.0)]]]], dtype=torch.float64)
    v = torch.tensor([[[[8.0], [4.0]]]])
    one = torch.ones(1, 1, 1, 1)
    got = attention_oracle(q, k, v, scale=1.0, grad_out=one, grad_lse=one[..., 0])
    torch.testing.assert_close(got.out.item(), 5.0, rtol=1e-15, atol=0)
    torch.testing.assert_close(got.lse.item(), math.log(4.0), rtol=1e-15, atol=0)
    assert got.dv.flatten().tolist() == pytest.approx([0.25, 0.75])
    # d out / d score = p (v - out) = (3/4, -3/4); d lse / d score = p; both meet q = 1 in dk and k in dq.
    assert got.dk.flatten().tolist() == pytest.approx([0.75 + 0.25, -0.75 + 0.75])
    assert got.dq.item() == pytest.approx(math.log(3.0) * (-0.75 + 0.75))


def test_dropout_by_hand() -> None:
    """Equal weights of 1/4 on values 1, 2, 4, 8; half are dropped, and the kept ones count 1/2 each. The LSE stays."""
    q, k = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 4, 2)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 4, 1)
    keep = torch.tensor([True, False, False, True]).view(1, 1, 1, 4)
    got = attention_oracle(q, k, v, dropout_p=0.5, keep=keep, grad_out=torch.ones(1, 1, 1, 1))
    assert got.out.item() == pytest.approx(4.5)
    assert got.lse.item() == pytest.approx(math.log(4.0))
    assert got.dv.flatten().tolist() == pytest.approx([0.5, 0.0, 0.0, 0.5])


def test_dead_rows_and_hidden_keys_are_silent() -> None:
    """Query 0 sees nothing and key 2 is hidden: NaN in both, and in what comes down to the dead row, goes nowhere."""
    call = make_call(Case("x", batch=1, heads=1, queries=3, keys=3), torch.float64)
    mask = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)[None, None]
    clean = attention_oracle(call.q, call.k, call.v, mask=mask, grad_out=call.grad_out, grad_lse=call.grad_lse)
    q, k, v, grad_out, grad_lse = (x.clone() for x in (call.q, call.k, call.v, call.grad_out, call.grad_lse))
    for tensor, position in ((q, 0), (k, 2), (v, 2), (grad_out, 0), (grad_lse, 0)):
        tensor[:, :, position] = torch.nan
    dirty = attention_oracle(q, k, v, mask=mask, grad_out=grad_out, grad_lse=grad_lse)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert bits_equal(getattr(dirty, name), getattr(clean, name)), name
    assert (clean.out[:, :, 0] == 0).all()
    assert (clean.lse[:, :, 0] == -torch.inf).all()
    assert (clean.dq[:, :, 0] == 0).all()
    assert (clean.dk[:, :, 2] == 0).all()
    assert (clean.dv[:, :, 2] == 0).all()


@pytest.mark.parametrize("shape", ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)))
def test_empty_shapes(shape: tuple[int, int, int, int]) -> None:
    b, h, i, j = shape
    call = make_call(Case("x", batch=b, heads=h, queries=i, keys=j), torch.float64)
    got = attention_oracle(call.q, call.k, call.v, grad_out=call.grad_out, grad_lse=call.grad_lse)
    assert got.out.shape == (b, h, i, 16)
    assert not got.out.any()
    assert (got.lse == -torch.inf).all()
    assert not any(x.any() for x in (got.dq, got.dk, got.dv))


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_broadcasts(name: str) -> None:
    mask = MASKS[name]((3, 4, 5, 6))
    assert visible_pairs(3, 4, 5, 6, mask, False, torch.device("cpu")).shape == (3, 4, 5, 6)


# ---------------------------------------------------------------------------------------------------------------------
# The budget catches mistakes
# ---------------------------------------------------------------------------------------------------------------------


def _budget(call, answer, truth):
    return assert_within_budget(
        answer, truth, call.q, call.k, call.v, **call.options, grad_out=call.grad_out, grad_lse=call.grad_lse
    )


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_the_budget_accepts_the_eager_path_and_refuses_half_a_percent(dtype: torch.dtype) -> None:
    call = make_call(Case("x", mask="pad_right", causal=True, queries=60, keys=60, d=32), dtype)
    truth = attention_oracle(call.q, call.k, call.v, **call.options, grad_out=call.grad_out, grad_lse=call.grad_lse)
    pairs = visible_pairs(2, 2, 60, 60, call.mask, True, call.q.device)
    eager = eager_answer(call.q, call.k, call.v, pairs, scale=32**-0.5, grad_out=call.grad_out, grad_lse=call.grad_lse)
    used = _budget(call, eager, truth)
    assert set(used) == {"out", "lse", "dq", "dk", "dv"}
    assert max(used.values()) <= 0.5
    relative = {torch.float16: 0.005, torch.bfloat16: 0.03, torch.float32: 5e-6}[dtype]
    for name in used:
        wrong = getattr(truth, name) * (1 + relative)
        damaged = {n: getattr(truth, n).to(getattr(eager, n).dtype) for n in used}
        damaged[name] = wrong.to(damaged[name].dtype)
        with pytest.raises(AssertionError, match=name):
            _budget(call, type(truth)(**damaged), truth)


def test_the_budget_refuses_a_leak_however_small() -> None:
    call = make_call(Case("x", mask="pad_right"), torch.float32)
    truth = attention_oracle(call.q, call.k, call.v, **call.options, grad_out=call.grad_out, grad_lse=call.grad_lse)
    rounded = {n: getattr(truth, n).float() for n in ("out", "lse", "dq", "dk", "dv")}
    rounded["dv"][1, 0, -1, 0] = 1e-30
    with pytest.raises(AssertionError, match="dv leaks"):
        _budget(call, type(truth)(**rounded), truth)
