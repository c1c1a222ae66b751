"""Attention of complex tensors against its formulas, written out over all pairs in complex128: outputs, the LSE and
every gradient, on every backend."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, SDPA_CPU, Backend
from flash_attend import BackendUnavailable, complex_attention
from flash_attend.testing.oracle import changed_scores, visible_pairs

PARTS = (torch.real, torch.imag)
either_form = pytest.mark.parametrize("complete", (False, True), ids=("real", "complete"))


def formula(q: Tensor, k: Tensor, v: Tensor, *, complete: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """`out` and `lse` of 4-D tensors without garbage, in the words of `complex_attention`."""
    mask, causal, window, scale = (options.pop(name, None) for name in ("mask", "causal", "window", "scale"))
    sinks = options.pop("sinks", None)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    sizes = *q.shape[:3], k.shape[2]
    pairs = visible_pairs(*sizes, mask, bool(causal), q.device, window=window)
    alive = pairs.any(dim=3, keepdim=True)
    scale = scale or ((1 if complete else 2) * q.shape[3]) ** -0.5

    def softmax_of(products: Tensor) -> tuple[Tensor, Tensor]:
        changes = dict(bias=None, softcap=None, alibi_slopes=None) | options
        scores = changed_scores(products * scale, **changes).masked_fill(~pairs & alive, -torch.inf)
        column = [] if sinks is None else [sinks.view(-1, 1, 1).expand(*sizes[:3], 1)]
        scores = torch.cat([scores, *column], dim=3)
        weights, lse = scores.softmax(dim=3)[..., : sizes[3]], scores.logsumexp(dim=3)
        return torch.where(alive, weights, 0.0), lse.masked_fill(~alive[..., 0], -torch.inf)

    if not complete:
        weights, lse = softmax_of((q @ k.mT.conj()).real)
        return weights.to(v.dtype) @ v, lse
    out, lses = torch.zeros_like(v[:, :, :1]), []
    for x, y in product((0, 1), (0, 1)):
        weights, lse = softmax_of(PARTS[x](q) @ PARTS[y](k).mT)
        out = out + 1j ** (x + y) * (weights.to(v.dtype) @ v)
        lses.append(lse)
    return out, torch.stack(lses, dim=2).unflatten(2, (2, 2))


def normal(*shape: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def inputs(heads: int, kv_heads: int, queries: int, keys: int, d: int, dv: int) -> dict[str, Tensor]:
    kv = 2, kv_heads, keys
    return {"q": normal(2, heads, queries, d), "k": normal(*kv, d), "v": normal(*kv, dv)}


# Of the second entry the last keys are hidden, and with causality its first queries see nothing, as do the first two
# of every head.
MASK = torch.arange(6) < torch.tensor([[6], [4]])
CASES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "plain": (inputs(2, 2, 5, 6, 4, 3), {}),
    "masked": (inputs(4, 2, 8, 6, 4, 2), dict(mask=MASK, causal=True, window=(3, None), scale=0.7)),
    "square": (inputs(2, 1, 6, 6, 4, 4), dict(mask=MASK, causal=True)),
    "dense_mask": (inputs(2, 2, 5, 6, 3, 3), dict(mask=torch.rand(2, 2, 5, 6) < 0.5)),
    "changed_scores": (
        inputs(2, 2, 7, 6, 3, 2) | {"bias": normal(1, 2, 7, 6).real, "sinks": normal(2).real},
        dict(softcap=1.5, alibi_slopes=torch.rand(2).double(), mask=MASK, causal=True),
    ),
}


def results(attend: Any, given: dict[str, Tensor], options: dict[str, Any], grads: tuple[Tensor, ...]) -> list[Tensor]:
    """Output, LSE, and the gradients of all that is `given`; those from the LSE only where there is one in `grads`."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    found = attend(**leaves, **options)
    return [*found, *torch.autograd.grad(found[: len(grads)], [*leaves.values()], grads)]


# The einsum path shows the algebra, in every case; the others, that they are handed what they take.
WHERE = [
    pytest.param(case, *of.values, id=f"{case}-{of.id}", marks=of.marks)
    for of in (*BACKENDS, pytest.param(SDPA_CPU, id=str(SDPA_CPU)))
    for case in (CASES if of.values[0].name == "math" else ("masked", "square"))
]


@pytest.mark.parametrize(("case", "backend"), WHERE)
@either_form
def test_out_lse_and_all_gradients(complete: bool, case: str, backend: Backend) -> None:
    """With NaN wherever nobody looks: in keys that are hidden from all, in dead queries and their gradients."""
    given, options = CASES[case]
    given = {name: x.to(backend.device) for name, x in given.items()}
    options = {name: x.to(backend.device) if isinstance(x, Tensor) else x for name, x in options.items()}
    out, lse = formula(**given, complete=complete, **options)
    torch.manual_seed(0)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    dead = lse.isneginf()
    grad_lse = torch.where(dead, 0.0, grad_lse)
    grads = (grad_out,) if backend == SDPA_CPU else (grad_out, grad_lse)
    want = results(partial(formula, complete=complete), given, options, grads)

    dead_rows = (dead[:, :, 0, 0] if complete else dead)[..., None]
    pairs = visible_pairs(
        *given["q"].shape[:3], given["k"].shape[2], options.get("mask"), options.get("causal", False), out.device
    )
    hidden = ~pairs.any(dim=2).unflatten(1, (given["k"].shape[1], -1)).any(dim=2)[..., None]
    garbage = dict(given, q=given["q"].masked_fill(dead_rows, torch.nan))
    garbage |= {name: given[name].masked_fill(hidden, torch.nan) for name in "kv"}
    grads = (grad_out.masked_fill(dead_rows, torch.nan), *grads[1:])
    by_backend = partial(complex_attention, complete=complete, return_lse=True, backend=backend.name)
    try:
        got = results(by_backend, garbage, options, grads)
    except BackendUnavailable as refusal:
        assert backend == SDPA_CPU
        pytest.skip(f"reason: {refusal}")
    assert [x.dtype for x in got[:3]] == [torch.complex128, torch.float64, torch.complex128]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert torch.equal(got[0].masked_fill(~dead_rows, 0.0), torch.zeros_like(out))


@either_form
def test_second_derivatives(complete: bool) -> None:
    given, options = CASES["masked"]
    q, k, v = (x[:, ::2, :4, :2].detach().requires_grad_() for x in given.values())
    attend = partial(complex_attention, complete=complete, causal=options["causal"], return_lse=True, backend="math")
    assert torch.autograd.gradgradcheck(attend, (q, k, v), fast_mode=True)


@either_form
def test_views_and_lower_precision(complete: bool) -> None:
    """Heads inside, rows that are no neighbours, lazy conjugates, k and v without heads, float32 under autocast."""
    q, k, v = normal(2, 5, 3, 4).transpose(1, 2), normal(2, 4, 6).mT.conj(), normal(2, 6, 8)[..., ::2]
    want, lse = formula(q, k[:, None], v[:, None], complete=complete)
    assert k.is_conj()
    got = complex_attention(q, k, v, complete=complete, return_lse=True)
    torch.testing.assert_close(got, (want, lse), rtol=1e-10, atol=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = complex_attention(q.cfloat(), k.cfloat(), v.cfloat(), complete=complete, return_lse=True)
    torch.testing.assert_close(single, (want.cfloat(), lse.float()), rtol=1e-5, atol=1e-5)


def test_an_infinity_makes_nan_only_where_infinities_cancel() -> None:
    """A product with 1j would make it of both parts."""
    v = torch.full((1, 1, 1, 1), complex(torch.inf, 1.0), dtype=torch.complex128)
    q = torch.ones_like(v)  # one key: all weights are 1
    assert torch.equal(complex_attention(q, q, v), v)
    out = complex_attention(q, q, v, complete=True)
    assert out.real.isnan().item() and out.imag.item() == torch.inf
    assert torch.equal(complex_attention(q, q, 3 * q, complete=True), 6j * q)


@either_form
def test_compiled(complete: bool) -> None:
    given, options = CASES["masked"]
    attend = partial(complex_attention, complete=complete, **options)
    q, k, v = (x.detach().requires_grad_() for x in given.values())
    plain, compiled = attend(q, k, v), torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-12)
    loss = [(x * x.conj()).real.sum() for x in (plain, compiled)]
    torch.testing.assert_close(*(torch.autograd.grad(x, (q, k, v)) for x in loss), rtol=1e-10, atol=1e-12)


def test_dropout_is_that_of_four_attentions() -> None:
    """Over equal scores and values of 1, out counts the weights that each of them kept."""
    torch.manual_seed(0)
    q = torch.zeros(1, 2, 50, 1, dtype=torch.complex64)
    out = complex_attention(q, q, torch.ones_like(q), complete=True, dropout_p=0.5)
    counts = torch.view_as_real(out) * 50 * 0.5  # rr - ii, and ri + ir
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-3)
    differences, sums = counts.flatten(0, -2).unbind(-1)
    # Each of the four keeps 25 of 50, with a variance of 12.5.
    for found, mean in ((differences, 0.0), (sums, 50.0)):
        assert abs(found.mean().item() - mean) < 2.5
        assert 15 < found.var().item() < 38


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "real": (dict(k=torch.ones(1, 2, 3, 4)), TypeError, "k must be complex64 or complex128, got torch.float32; flash_"),
    "mixed": (dict(v=normal(1, 2, 3, 4)), TypeError, "v must have q's dtype torch.complex64, got torch.complex128"),
    "d": (dict(k=normal(1, 2, 3, 5).cfloat()), ValueError, "k must have q's last dimension d = 4, got (1, 2, 3, 5)"),
    "rank": (dict(q=normal(2, 3, 4).cfloat()), ValueError, "q must be (b, h, i, d), got 3 dimensions: (2, 3, 4)"),
    "no_tensor": (dict(q=1j), TypeError, "q must be a torch.Tensor, got complex"),
    "flag": (dict(complete=1), TypeError, "complete must be a bool, got int 1"),
    "option": (dict(scale=float("inf")), ValueError, "scale must be finite"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_told_in_the_callers_shapes(mistake: str) -> None:
    change, error, told = WRONG[mistake]
    good = dict.fromkeys("qkv", torch.ones(1, 2, 3, 4, dtype=torch.complex64))
    with pytest.raises(error) as caught:
        complex_attention(**{**good, **change})  # type: ignore[arg-type]
    assert str(caught.value).startswith(told)
