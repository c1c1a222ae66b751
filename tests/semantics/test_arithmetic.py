"""Scores of every size, under any scale: huge, tiny, and no numbers at all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, CHOOSY, EFFICIENT, FUSED, Backend
from flash_attend.testing.budget import eager_answer
from flash_attend.testing.calls import Call, Case, check, make_call, run, truth_of
from flash_attend.testing.oracle import Answer, visible_pairs

INFINITY, NAN = math.inf, math.nan

every_backend = pytest.mark.parametrize("backend", (*BACKENDS, *FUSED, *CHOOSY))
# PyTorch's kernel on a GPU among them, whose weights are made of an LSE that is a number of float32, however large.
efficient_too = pytest.mark.parametrize("backend", (*BACKENDS, *FUSED, *CHOOSY, *EFFICIENT))


def _column(backend: Backend, *values: float) -> Tensor:
    """`(1, 1, n, d)`: vectors whose first number alone is not 0."""
    column = torch.zeros(1, 1, len(values), 64 if backend.choosy else 1, dtype=backend.dtype)
    column[0, 0, :, 0] = torch.tensor(values)
    return column.to(backend.device)


def _call(backend: Backend, q: tuple, k: tuple, v: tuple, mask: Tensor | None = None, **options) -> Call:
    columns = (_column(backend, *values) for values in (q, k, v))
    mask = mask if mask is None else mask.to(backend.device)
    grad_out = _column(backend, *[1.0] * len(q))
    return Call(*columns, mask, grad_out, None, scale=options.pop("scale", 1.0), **options)


def _numbers(x: Tensor) -> list[float]:
    return x[0, 0, :, 0].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Large scores
# ---------------------------------------------------------------------------------------------------------------------


def _largest_score(call: Call, size: float) -> Call:
    """The same call with its largest score as large, so that the softmax is nearly a choice."""
    scores = (call.q.double() @ call.k.double().mT).abs().max()
    return call.with_(scale=float(size / scores))


def _worst(answer: Answer, truth: Answer) -> dict[str, float]:
    return {
        name: (getattr(answer, name).double() - getattr(truth, name)).abs().max().item() for name in ("dq", "dk", "dv")
    }


@efficient_too
@pytest.mark.parametrize("size", (481.0, 4326.0))
def test_gradients_of_large_scores_are_as_eager_has_them(backend: Backend, size: float) -> None:
    """At most twice as wrong, in float32 without what the budget adds for the size of scores."""
    call = make_call(Case("large", heads=1, queries=64, keys=64, d=64), backend.dtype, backend.device)
    call = _largest_score(call.with_(grad_lse=None), size)
    truth, found = truth_of(call), run(call, backend.name)
    check(found, call, truth)
    if backend.choosy:  # in half precision delta is made of an output that was rounded: the budget knows by how much
        return
    pairs = visible_pairs(2, 1, 64, 64, None, False, call.q.device)
    eager = eager_answer(call.q, call.k, call.v, pairs, scale=call.scale, grad_out=call.grad_out, grad_lse=None)
    allowed, errors = _worst(eager, truth), _worst(found, truth)
    for name, error in errors.items():
        floor = 2 * torch.finfo(backend.dtype).eps * getattr(truth, name).abs().max().item()
        assert error <= 2 * allowed[name] + floor, f"{name}: {error:.2e}, eager's {allowed[name]:.2e}"


@every_backend
def test_a_single_key_weighs_one(backend: Backend) -> None:
    """Whatever its score, which these numbers bring between two that the exponents' dtype has."""
    q, k = (17682.21875, 11688.58984375) if backend.dtype == torch.float32 else (25000.0, 2.5)
    answer = run(_call(backend, (q,), (k,), (1.0,), scale=0.3535533905932738), backend.name)
    assert _numbers(answer.out) == [1.0]
    tolerance = 0 if backend.dtype == torch.float32 else 0.02  # an LSE of half precision's is one number of float32
    assert abs(_numbers(answer.dv)[0] - 1.0) <= tolerance
    assert _numbers(answer.dq) == _numbers(answer.dk) == [0.0]


@every_backend
def test_weights_never_exceed_one(backend: Backend) -> None:
    """Where scores are beyond what anything can say of them: the gradient of v is a sum of as many weights."""
    call = make_call(Case("huge", heads=1, queries=40, keys=40, d=64), backend.dtype, backend.device)
    size = 1e5 if backend.dtype == torch.float32 else 1e2
    grad_out = torch.ones_like(call.grad_out)
    call = call.with_(q=call.q * size, k=call.k * size, grad_out=grad_out, grad_lse=None)
    answer = run(call, backend.name)
    assert all(x.isfinite().all() for x in (answer.out, answer.lse, answer.dq, answer.dk, answer.dv))
    assert (answer.dv >= 0).all()
    assert (answer.dv.double().sum(2) <= 40 * (1 + 1e-5)).all()
    torch.testing.assert_close(answer.out.double(), truth_of(call).out, rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Scales
# ---------------------------------------------------------------------------------------------------------------------


@efficient_too
@pytest.mark.parametrize("scale", (0.0, -0.0, 1e-37, -1e-37, 1e-40, 1e-46, -5e-324))
@pytest.mark.parametrize("causal", (False, True))
def test_any_scale_is_taken_as_it_is(backend: Backend, scale: float, causal: bool) -> None:
    """A score of 1e37 tells 1e-37 from 0, and a hidden pair stays hidden, where 0 * -inf would be NaN."""
    large = 1e37 if backend.dtype == torch.float32 else 6e4
    call = _call(backend, (1.0, large), (1.0, 0.0), (1.0, 2.0), scale=scale, causal=causal)
    answer, truth = run(call, backend.name), truth_of(call)
    for name in ("out", "lse", "dq", "dk", "dv"):
        got, want = getattr(answer, name), getattr(truth, name)
        torch.testing.assert_close(got.double(), want, rtol=1e-3 if backend.choosy else 1e-5, atol=1e-6, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# What is no number
# ---------------------------------------------------------------------------------------------------------------------


@efficient_too
def test_nan_in_a_query_shows_in_its_gradient(backend: Backend) -> None:
    answer = run(_call(backend, (NAN, 1.0), (1.0, 2.0), (1.0, 2.0), causal=True), backend.name)
    assert [math.isnan(x) for x in _numbers(answer.out)] == [True, False]
    assert [math.isnan(x) for x in _numbers(answer.dq)] == [True, False]
    assert answer.lse.isnan().tolist() == [[[True, False]]]
    assert math.isnan(_numbers(answer.dk)[0])
    assert math.isnan(_numbers(answer.dv)[0])


FIRST = torch.tensor([[True, False]])  # the second key is hidden
DENSE = torch.tensor([[True, False], [False, False]])[None, None]  # and the second query sees nothing


@every_backend
@pytest.mark.parametrize(
    ("keys", "options", "rows"),
    (
        pytest.param((-INFINITY, -INFINITY), {}, "nan nan", id="no mask"),
        pytest.param((-INFINITY, 1.0), dict(mask=FIRST), "nan nan", id="key"),
        pytest.param((-INFINITY, 1.0), dict(causal=True), "nan live", id="causal"),
        pytest.param((1.0, -INFINITY), dict(mask=~FIRST, causal=True), "dead nan", id="key causal"),
        pytest.param((-INFINITY, 1.0), dict(mask=DENSE), "nan dead", id="dense"),
    ),
)
def test_a_row_that_sees_minus_infinity_alone_is_not_dead(
    backend: Backend, keys: tuple, options: dict, rows: str
) -> None:
    """The softmax of such scores is NaN, and so is what comes of it; a row that sees nothing gives exactly 0."""
    if backend.choosy and options.get("mask") is DENSE:
        pytest.skip("reason: the mask varies over queries")
    answer = run(_call(backend, (1.0, 1.0), keys, (1.0, 2.0), **options), backend.name)
    out, lse, dq = _numbers(answer.out), answer.lse[0, 0].tolist(), _numbers(answer.dq)
    for row, kind in enumerate(rows.split()):
        if kind == "nan":
            assert math.isnan(out[row])
            assert math.isnan(dq[row])
            assert lse[row] == -INFINITY  # the logarithm of a sum of nothing but 0
        elif kind == "dead":
            assert (out[row], lse[row], dq[row]) == (0.0, -INFINITY, 0.0)
        else:
            assert math.isfinite(out[row])
            assert math.isfinite(lse[row])
    seen = keys.index(-INFINITY)
    assert math.isnan(_numbers(answer.dk)[seen])
    assert math.isnan(_numbers(answer.dv)[seen])
