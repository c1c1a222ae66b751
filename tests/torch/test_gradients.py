"""What torch may do to tensors between a forward and its backward, and to those that come in: the same answer from
every backend, or the same error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from backends import BACKENDS, Backend
from flash_attend import flash_attention
from flash_attend.testing.calls import Call, Case, check, make_call, run

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)

SMALL = dict(heads=2, kv_heads=1, queries=5, keys=7, d=4, dv=3)
CASES = (
    Case("plain", **SMALL),
    Case("keys", **SMALL, mask="pad_left", causal=True),
    Case("dense_dropout", **SMALL, mask="b1ij", dropout_p=0.3),
)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def call_of(case: Case, backend: Backend) -> Call:
    return make_call(case, torch.float32, backend.device)


# ---------------------------------------------------------------------------------------------------------------------
# What was saved
# ---------------------------------------------------------------------------------------------------------------------


def laid_out_otherwise(x: Tensor) -> Tensor:
    """The same values with other strides, a padded row and none of the dimensions where it was."""
    order = range(x.ndim - 1, -1, -1)
    wide = torch.stack([x, x], dim=-1).permute(x.ndim, *order).contiguous()
    return wide[0].permute(*order)


@on_every_backend
@each_case
@pytest.mark.parametrize("create_graph", (False, True), ids=("first", "again"))
def test_hooks_may_give_saved_tensors_other_strides(case: Case, backend: Backend, create_graph: bool) -> None:
    call = call_of(case, backend)

    def attend(*args, **options) -> tuple[Tensor, Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, laid_out_otherwise):
            return flash_attention(*args, **options)

    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
    for function in (attend, flash_attention):
        torch.manual_seed(0)
        out, lse = function(*leaves, **call.options, return_lse=True, backend=backend.name)
        found = torch.autograd.grad((out, lse), leaves, (call.grad_out, call.grad_lse), create_graph=create_graph)
        if function is attend:
            got = found
    torch.testing.assert_close(got, found, rtol=1e-5, atol=1e-6)
    check(run(call, backend.name, attend=attend), call)


@on_every_backend
@each_case
@pytest.mark.parametrize("create_graph", (False, True), ids=("first", "again"))
def test_hooks_may_give_saved_tensors_negated_lazily(case: Case, backend: Backend, create_graph: bool) -> None:
    """Of every kind but bool, which has no negative."""
    call, given = call_of(case, backend), []

    def negated(x: Tensor) -> Tensor:
        given.append(x if x.dtype == torch.bool else torch._neg_view(-x))
        return given[-1]

    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
    for hook in (negated, lambda x: x):
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, hook):
            out, lse = flash_attention(*leaves, **call.options, return_lse=True, backend=backend.name)
        incoming = call.grad_out, call.grad_lse
        found = torch.autograd.grad((out, lse), leaves, incoming, create_graph=create_graph)
        if hook is negated:
            got = found
    assert any(x.is_neg() for x in given)
    torch.testing.assert_close(got, found, rtol=1e-5, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("changed", ("out", "lse"))
@pytest.mark.parametrize("mask", ("none", "pad_left"))
def test_results_may_be_changed_in_place_but_not_before_a_backward_that_needs_them(
    backend: Backend, changed: str, mask: str
) -> None:
    """As with torch's own attention; the einsum path's backward does not need them. A dimension of size 1 makes a view
    of a part look whole."""
    for case in (Case("x", **SMALL, mask=mask), Case("x", 1, 1, queries=1, keys=3, mask=mask, d=2)):
        call = call_of(case, backend)
        leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
        results = flash_attention(*leaves, mask=call.mask, return_lse=True, backend=backend.name)
        found = dict(zip(("out", "lse"), results, strict=True))
        before = found[changed].detach().clone()
        if backend.name == "math":
            expected = torch.autograd.grad(2 * found[changed].sum(), leaves[:2], retain_graph=True)
        found[changed].mul_(2).add_(1)
        torch.testing.assert_close(found[changed], 2 * before + 1)
        if backend.name == "math":
            torch.testing.assert_close(torch.autograd.grad(found[changed].sum(), leaves[:2]), expected)
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(found[changed].sum(), leaves[0])


def test_that_is_what_torchs_own_attention_does() -> None:
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@on_every_backend
@pytest.mark.parametrize("mask", ("pad_left", "b1ij", "bh1j"))
def test_a_mask_made_in_inference_mode_serves_in_training(mask: str, backend: Backend) -> None:
    call = call_of(Case("x", **SMALL, mask=mask), backend)
    with torch.inference_mode():
        made = call.mask.clone()
    assert made.is_inference()
    check(run(call.with_(mask=made), backend.name), call)
    q = call.q.clone().requires_grad_()
    (first,) = torch.autograd.grad(
        flash_attention(q, call.k, call.v, mask=made, backend=backend.name).sin().sum(), q, create_graph=True
    )
    assert torch.autograd.grad(first.sum(), q)[0].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# What comes in
# ---------------------------------------------------------------------------------------------------------------------


@on_every_backend
@each_case
def test_gradients_for_many_at_once(case: Case, backend: Backend) -> None:
    """`is_grads_batched`, which is no transform of torch.func."""
    call = call_of(case, backend)
    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
    out, lse = flash_attention(*leaves, **call.options, return_lse=True, backend=backend.name)
    lse = lse.masked_fill(lse.isneginf(), 0.0)
    incoming = [torch.randn(3, *x.shape, device=x.device) for x in (out, lse)]
    got = torch.autograd.grad((out, lse), leaves, incoming, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad((out, lse), leaves, [x[n] for x in incoming], retain_graph=True) for n in range(3)]
    torch.testing.assert_close(got, tuple(map(torch.stack, zip(*each, strict=True))), rtol=1e-5, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("strategy", ("reverse-mode", "forward-mode"))
def test_a_vectorized_jacobian(strategy: str, backend: Backend) -> None:
    call = make_call(CASES[1], torch.float64, backend.device)

    def attend(v: Tensor) -> Tensor:
        return flash_attention(call.q, call.k, v, mask=call.mask, causal=True, backend=backend.name)

    got = jacobian(attend, call.v, vectorize=True, strategy=strategy)
    torch.testing.assert_close(torch.einsum("...bhjd,bhjd->...", got, call.v), attend(call.v))  # it is linear in v


NEGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "negative_view": torch._neg_view,
    "imaginary_part": lambda x: torch.complex(torch.zeros_like(x), x).conj().imag,
}


@on_every_backend
@pytest.mark.parametrize(("d", "negated"), zip((1, 4), NEGATED.values(), strict=True), ids=NEGATED)
def test_lazily_negated_tensors(d: int, negated: Callable, backend: Backend) -> None:
    call = call_of(Case("x", **{**SMALL, "d": d, "dv": d}, mask="pad_left"), backend)
    for names in (("q",), ("k",), ("v",), ("grad_out",), ("grad_lse",), ("q", "k", "v", "grad_out", "grad_lse")):
        lazy = {name: negated(getattr(call, name)) for name in names}
        assert all(x.is_neg() for x in lazy.values())
        done = call.with_(**{name: -getattr(call, name) for name in names})
        check(run(call.with_(**lazy), backend.name), done)
    compiled = torch.compile(flash_attention, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    check(run(call.with_(**lazy), backend.name, attend=compiled), done)


@on_every_backend
@pytest.mark.parametrize("name", ("q", "k", "v", "mask", "grad_out", "grad_lse"))
def test_efficient_zero_tensors(name: str, backend: Backend) -> None:
    """What torch's own derivatives produce for zeros: there is no memory in them."""
    call = call_of(CASES[1], backend)
    x = getattr(call, name)
    zeros = torch._efficientzerotensor(tuple(x.shape), dtype=x.dtype, device=x.device)
    assert zeros._is_zerotensor()
    check(run(call.with_(**{name: zeros}), backend.name), call.with_(**{name: torch.zeros_like(x)}))
