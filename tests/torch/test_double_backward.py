"""Second derivatives against differences of first ones, in float64; and what they are for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, Backend, skip_unless_served
from flash_attend import flash_attention
from flash_attend.testing.calls import Case, function_of, make_call

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)

TINY = dict(batch=1, heads=2, kv_heads=1, queries=3, keys=4, d=2, dv=3)
DENSE = Case("dense_mask_causal", **{**TINY, "queries": 5}, mask="bhij", causal=True)
CASES = (
    Case("padded_dead_rows_negative_scale", **{**TINY, "queries": 5}, mask="holes", causal=True, scale=-0.8),
    replace(DENSE, name="dense_mask_dropout", dropout_p=0.4),
    Case(
        "changed_scores",
        **{**TINY, "batch": 2},
        window=(2, 1),
        softcap=1.5,
        alibi="h",
        bias="1hij",
        sinks=True,
        mask="pad_left",
    ),
)


@on_every_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradgradcheck(case: Case, backend: Backend) -> None:
    call = make_call(case, torch.float64, backend.device)
    skip_unless_served(backend, call)
    attend, inputs = function_of(call, backend.name)
    grads = tuple(torch.randn_like(x).requires_grad_() for x in attend(*inputs))
    assert torch.autograd.gradgradcheck(attend, inputs, grads, fast_mode=True, eps=1e-6, atol=1e-8, rtol=1e-6)


@on_every_backend
@pytest.mark.parametrize("case", (DENSE, *CASES[2:]), ids=str)
def test_forward_gradcheck(case: Case, backend: Backend) -> None:
    call = make_call(case, torch.float64, backend.device)
    skip_unless_served(backend, call)
    attend, inputs = function_of(call, backend.name)
    forward = dict(check_forward_ad=True, check_backward_ad=False)
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True, eps=1e-6, atol=1e-8, rtol=1e-6, **forward)


@on_every_backend
@pytest.mark.parametrize("grads", ("out", "lse"))
def test_the_first_gradients_do_not_change_where_second_ones_may_follow(grads: str, backend: Backend) -> None:
    call = make_call(
        Case("x", heads=4, kv_heads=2, queries=6, keys=9, d=4, mask="pad_left"), torch.float32, backend.device
    )
    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]

    def first(create_graph: bool) -> tuple[Tensor, ...]:
        out, lse = flash_attention(*leaves, **call.options, return_lse=True, backend=backend.name)
        chosen, grad = (out, call.grad_out) if grads == "out" else (lse, call.grad_lse)
        return torch.autograd.grad(chosen, leaves[:2], grad, create_graph=create_graph)

    for plain, with_graph in zip(first(False), first(True), strict=True):
        assert torch.equal(plain, with_graph)
        assert with_graph.requires_grad


@on_every_backend
def test_a_gradient_penalty_in_half_precision(backend: Backend) -> None:
    """A penalty on the gradient of a score, as for a discriminator, next to the same in float64."""
    case = Case("x", heads=2, queries=6, keys=9, d=4, mask="pad_left", causal=True)

    def penalised(dtype: torch.dtype) -> tuple[Tensor, ...]:
        call = make_call(case, torch.float16, backend.device)
        leaves = [x.to(dtype).requires_grad_() for x in (call.q, call.k, call.v)]
        score = flash_attention(*leaves, **call.options, backend=backend.name).tanh().sum()
        gradients = torch.autograd.grad(score, leaves, create_graph=True)
        penalty = sum(grad.double().square().sum() for grad in gradients)
        return torch.autograd.grad(penalty, leaves)

    for half, double in zip(penalised(torch.float16), penalised(torch.float64), strict=True):
        assert half.dtype == torch.float16
        assert (half - double).norm() <= 32 * torch.finfo(torch.float16).eps * double.norm()
