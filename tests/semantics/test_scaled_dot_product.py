"""Torch's function computed by ours: what torch's own gives, in its shapes, with its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from backends import BACKENDS, Backend
from flash_attend import scaled_dot_product
from flash_attend.scaled_dot_product import scaled_dot_product_attention


class Shapes(NamedTuple):
    """The shapes of query, key and value, of a bool mask and of a float one, and options."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    options: dict[str, Any] = {}  # noqa: RUF012  nobody changes it


CASES = {
    "plain": Shapes((2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 6)),
    "scale": Shapes((2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 6), options=dict(scale=0.3)),
    "(i, j) mask": Shapes((2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 8), mask=(7, 5)),
    "2-D mask of b and j": Shapes((2, 3, 2, 8), (2, 3, 5, 8), (2, 3, 5, 8), mask=(2, 5)),
    "4-D mask": Shapes((2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 8), mask=(2, 1, 1, 5)),
    "float mask": Shapes((2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 8), bias=(3, 7, 5)),
    "float mask of keys": Shapes((2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 8), bias=(5,)),
    "groups": Shapes((2, 6, 7, 8), (2, 2, 5, 8), (2, 2, 5, 8), bias=(6, 1, 5), options=dict(enable_gqa=True)),
    "groups of rank 3": Shapes((6, 7, 8), (2, 5, 8), (2, 5, 8), mask=(7, 5), options=dict(enable_gqa=True)),
    "causal, mask": Shapes((2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 8), mask=(7, 5), options=dict(is_causal=True)),
    "causal, float mask": Shapes(
        (2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), bias=(2, 1, 4, 5), options=dict(is_causal=True)
    ),
    "causal, mask of queries": Shapes((3, 4, 8), (3, 5, 8), (3, 5, 8), bias=(4, 1), options=dict(is_causal=True)),
    "rank 2": Shapes((7, 8), (5, 8), (5, 6), mask=(7, 5)),
    "rank 3": Shapes((4, 7, 8), (4, 5, 8), (4, 5, 6), mask=(4, 1, 5)),
    "rank 5": Shapes((2, 3, 4, 7, 8), (2, 3, 4, 5, 8), (2, 3, 4, 5, 6), mask=(7, 5)),
    "rank 5, a mask of some": Shapes((2, 3, 4, 7, 8), (2, 3, 4, 5, 8), (2, 3, 4, 5, 6), bias=(2, 1, 4, 1, 5)),
    "one head of keys": Shapes((2, 3, 7, 8), (2, 1, 5, 8), (2, 1, 5, 8)),
    "one head of queries": Shapes((2, 1, 7, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
    "one batch entry of keys": Shapes((2, 3, 7, 8), (1, 3, 5, 8), (3, 5, 8)),
}


def drawn(shapes: Shapes) -> tuple[list[Tensor], Tensor | None]:
    """Leaves q, k, v and, where there is one, the float mask; and the mask of either kind."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes[:3]]
    if shapes.mask is not None:
        mask = torch.rand(shapes.mask, generator=generator) < 0.6
        mask[..., 0] = True
        return leaves, mask
    if shapes.bias is None:
        return leaves, None
    bias = torch.randn(shapes.bias, generator=generator, dtype=torch.float64)
    bias[..., -1] = -torch.inf
    return [*leaves, bias.requires_grad_()], bias


def results(function: Any, leaves: list[Tensor], mask: Tensor | None, **options: Any) -> list[Tensor]:
    """Its output and the gradients of its leaves."""
    out = function(*leaves[:3], attn_mask=mask, **options)
    grad_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out, *torch.autograd.grad(out, leaves, grad_out)]


def torchs(*args: Any, attn_mask: Tensor | None, is_causal: bool = False, **options: Any) -> Tensor:
    if is_causal:  # beside a mask, torch takes it in some kernels alone
        diagonal = torch.ones(args[0].shape[-2], args[1].shape[-2], dtype=torch.bool).tril()
        as_bias = attn_mask is not None and attn_mask.dtype != torch.bool
        attn_mask = attn_mask.where(diagonal, -torch.inf) if as_bias else diagonal & attn_mask
    options["attn_mask"] = attn_mask
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **options)


@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES)
def test_what_torch_gives(shapes: Shapes) -> None:
    leaves, mask = drawn(shapes)
    theirs, ours = (results(f, leaves, mask, **shapes.options) for f in (torchs, scaled_dot_product_attention))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "keys"), ((5, 5), (5, 9), (9, 5), (1, 4), (4, 1)))
def test_causal_is_aligned_top_left(backend: Backend, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(options["mask"] is options["bias"] is None)
        return attend(*args, **options)

    attend = scaled_dot_product.flash_attention
    monkeypatch.setattr(scaled_dot_product, "flash_attention", counted)
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, 2, length, 16, generator=generator).to(backend.device).requires_grad_()
        for length in (queries, keys, keys)
    ]
    ours = results(scaled_dot_product_attention, leaves, None, is_causal=True, backend=backend.name)
    diagonal = torch.ones(queries, keys, dtype=torch.bool, device=backend.device).tril()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for x, y in zip(ours, results(torchs, exact, diagonal), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
    assert calls == [True], "no mask is made of it"


def test_a_query_that_sees_no_key_gives_zero() -> None:
    leaves, mask = drawn(CASES["4-D mask"])
    assert mask is not None
    mask[1] = False
    hidden = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    for of_either_kind in (mask, hidden):
        out, *grads = results(scaled_dot_product_attention, leaves, of_either_kind)
        assert out[0].all()
        for tensor in (out, *grads):
            assert (tensor[1] == 0).all()


def test_dropout_follows_torchs_generator() -> None:
    (q, k, v), _ = drawn(CASES["rank 3"])
    torch.manual_seed(0)
    first, second = (scaled_dot_product_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (dict(attn_mask=torch.ones(7, 4, dtype=torch.bool)), ValueError, "attn_mask .* does not broadcast"),
        (dict(attn_mask=torch.ones(7, 5, dtype=torch.int32)), TypeError, "attn_mask must have query's dtype"),
        (dict(attn_mask=torch.ones(1, 1, 1, 7, 5)), ValueError, "attn_mask must broadcast"),
        (dict(attn_mask=0), TypeError, "attn_mask must be a torch.Tensor, got int 0"),
        (dict(is_causal=1), TypeError, "is_causal must be a bool"),
        (dict(query=torch.zeros(2, 4, 7, 8)), ValueError, r"\[4, 2, 2\] heads; enable_gqa=True"),
        (dict(query=torch.zeros(3, 2, 7, 8)), ValueError, "must broadcast along leading dimensions"),
        (dict(query=torch.zeros(8)), ValueError, "query must have two dimensions or more"),
        (dict(query=torch.zeros(2, 2, 7, 8, dtype=torch.float16)), TypeError, "key must have query's dtype"),
        (dict(value=torch.zeros(2, 2, 6, 8), is_causal=True), ValueError, "equally long, got 5 keys and 6 values"),
        (
            dict(query=torch.zeros(2, 2, 3, 8), value=torch.zeros(2, 2, 6, 8), is_causal=True),
            ValueError,
            "5 keys and 6",
        ),
    ],
)
def test_errors_name_torchs_arguments(change: dict[str, Any], error: type[Exception], told: str) -> None:
    arguments = dict(query=torch.zeros(2, 2, 7, 8), key=torch.zeros(2, 2, 5, 8), value=torch.zeros(2, 2, 5, 8))
    with pytest.raises(error, match=told):
        scaled_dot_product_attention(**{**arguments, **change})
