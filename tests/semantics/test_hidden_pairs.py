"""Hidden pairs contribute nothing, whatever their scores, and whatever somebody else sees there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from backends import MATH_CPU, SDPA_CPU, Backend
from flash_attend import flash_attention
from flash_attend.testing.calls import Case, bits_equal, make_call, run
from flash_attend.testing.oracle import visible_pairs

each_backend = pytest.mark.parametrize("backend", [MATH_CPU, SDPA_CPU], ids=str)


def attend(backend: Backend, q: list, k: list, v: list, **options) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Of one head with head dimension 1: out, lse, and the gradients of out's sum."""
    inputs = [torch.tensor(x, device=backend.device)[None, None, :, None].requires_grad_() for x in (q, k, v)]
    out, lse = flash_attention(*inputs, **options, return_lse=True, backend=backend.name)
    return out.detach().flatten(), lse.detach().flatten(), torch.autograd.grad(out.sum(), inputs)


@each_backend
@pytest.mark.parametrize("hidden", [2.4e38, torch.inf, torch.nan])
@pytest.mark.parametrize("seen", [-1.2e38, 0.0])
def test_a_hidden_score_does_not_compete(backend: Backend, seen: float, hidden: float) -> None:
    out, lse, (_, grad_k, grad_v) = attend(backend, [1.0, 1.0], [seen, hidden], [1.0, 1000.0], causal=True, scale=1.0)
    assert out[0] == 1
    assert lse[0] == torch.tensor(seen)
    if hidden == 2.4e38:
        assert out[1] == 1000
        assert grad_k.isfinite().all()
        assert grad_v.isfinite().all()


@pytest.mark.parametrize("value", [1e30, torch.inf, torch.nan])
@pytest.mark.filterwarnings("error")
def test_looking_at_numbers_whose_squares_overflow_warns_of_nothing(value: float) -> None:
    k = torch.ones(1, 1, 4, 8)
    k[..., 3, :] = value
    leaves = [x.requires_grad_() for x in (torch.ones(1, 1, 4, 8), k, torch.ones(1, 1, 4, 8))]
    out = flash_attention(*leaves, causal=True, backend="math")
    torch.testing.assert_close(out[:, :, :3], torch.ones(1, 1, 3, 8))


@each_backend
def test_a_row_that_sees_only_minus_infinity_is_not_dead(backend: Backend) -> None:
    """As a softmax of -inf alone it is NaN; a row that sees another key too has nothing of the former."""
    out, _, (grad_q, _, grad_v) = attend(backend, [1.0, 1.0], [-torch.inf, 1.0], [5.0, 7.0], causal=True, scale=1.0)
    assert out[0].isnan()
    assert out[1] == 7
    assert grad_q.isnan()[0, 0, 0, 0]
    assert grad_v.flatten()[1] == 1


@each_backend
@pytest.mark.parametrize("scale", [0.0, 1e-37, -1e-37])
def test_the_scale_has_no_floor(backend: Backend, scale: float) -> None:
    out, lse, _ = attend(backend, [1e18], [1e19, -1e19], [1.0, 2.0], scale=scale)
    score = scale * 1e37
    weights = torch.tensor([score, -score]).softmax(0)
    torch.testing.assert_close(out.item(), (weights[0] + 2 * weights[1]).item(), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse.item(), torch.tensor([score, -score]).logsumexp(0).item(), rtol=1e-6, atol=0)


PARTLY_HIDING = (
    Case("causal", causal=True, queries=40, keys=43),
    Case("dense", mask="11ij", heads=4, kv_heads=2),
    Case("per_head_of_a_group", mask="bh1j", heads=4, kv_heads=2),
    Case("dense_causal_dead_rows", mask="bhij", causal=True, queries=50, keys=40),
)


@each_backend
@pytest.mark.parametrize("case", PARTLY_HIDING, ids=str)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_garbage_shows_in_what_may_see_it_alone(backend: Backend, case: Case, garbage: float, where: str) -> None:
    """Rows that may not see a key are as they were, and so is what they alone give to gradients; rows that see a NaN
    are NaN. Bit by bit, but for torch's attention: such calls go from it to the einsum path, which rounds otherwise."""
    call = make_call(replace(case, grads="out"), torch.float32, backend.device)
    b, h, i, _ = call.q.shape
    kv_heads, j = call.k.shape[1:3]
    visible = visible_pairs(b, h, i, j, call.mask, call.causal, call.q.device)
    of_first = visible[0, : h // kv_heads]  # who reads the first key/value head
    partly = of_first.any(dim=(0, 1)) & ~of_first.all(dim=(0, 1))
    key = int(partly.nonzero()[partly.sum() // 2])
    touched = torch.zeros(b, h, i, dtype=torch.bool, device=call.q.device)
    touched[0, : h // kv_heads] = of_first[..., key]
    spoilt = getattr(call, where).clone()
    spoilt[0, 0, key, 3] = garbage
    dirty_call = call.with_(**{where: spoilt})

    clean, dirty = run(call, backend.name), run(dirty_call, backend.name)
    same = partial(torch.allclose, atol=1e-5) if backend.name == "sdpa" else bits_equal
    for name in ("out", "lse", "dq"):
        assert same(getattr(dirty, name)[~touched], getattr(clean, name)[~touched]), name
    if backend.name in ("math", "sdpa"):  # which look elsewhere where no gradient is needed
        bare = flash_attention(call.q, dirty_call.k, dirty_call.v, **call.options, backend=backend.name)
        torch.testing.assert_close(bare[~touched], clean.out[~touched])
    met = (visible & touched[..., None]).view(b, kv_heads, h // kv_heads, i, j).any(dim=3).any(dim=2)
    for name in ("dk", "dv"):
        assert same(getattr(dirty, name)[~met], getattr(clean, name)[~met]), name
    assert dirty.dq[touched].isnan().any(dim=-1).all()
    if garbage != garbage:
        assert dirty.out[touched].isnan().any(dim=-1).all()
        assert dirty.out[touched].isnan().all() or where == "v"


@each_backend
def test_garbage_stays_where_it_is_in_second_derivatives(backend: Backend) -> None:
    call = make_call(Case("x", causal=True, batch=1, queries=12, keys=12, d=4), torch.float64, backend.device)

    def second(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Of the gradients of the rows before the garbage."""
        leaves = [x.detach().requires_grad_() for x in (call.q, k, v)]
        out = flash_attention(*leaves, causal=True, backend=backend.name)
        (grad_q,) = torch.autograd.grad(out[:, :, :7].square().sum(), leaves[:1], create_graph=True)
        return torch.autograd.grad(grad_q[:, :, :7].square().sum(), leaves[:1])

    bad_k, bad_v = call.k.clone(), call.v.clone()
    bad_k[:, :, 7:], bad_v[:, :, 7:] = torch.nan, torch.inf
    (got,), (want,) = second(bad_k, bad_v), second(call.k, call.v)
    torch.testing.assert_close(got[:, :, :7], want[:, :, :7], rtol=1e-12, atol=1e-12)
