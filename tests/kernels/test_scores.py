"""The scale, its sign and its magnitude: what becomes of products, and of the gradients on their way back."""

from __future__ import annotations

import math

import pytest
import torch
import triton.language as tl

from flash_attend.kernels.compat import kernel
from flash_attend.kernels.scores import scaled_scores

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))


@kernel
def scores_kernel(OUT, X, scale: tl.float64, SIZE: tl.constexpr, NEGATIVE: tl.constexpr):
    """OUT (2, SIZE): the base-2 exponents of products, and the gradients of products from those of scores."""
    at = tl.arange(0, SIZE)
    x = tl.load(X + at)
    scores = scaled_scores(scale, NEGATIVE, tl.float64)
    tl.store(OUT + at, scores.apply(x) * scores.factor_log2)
    tl.store(OUT + SIZE + at, scores.gradient(x) * scores.magnitude)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", (0.3, -0.3, 0.0, -0.0, 1e-25, -1e-25, 1e-40, 700.0, -700.0))
def test_exponents_and_gradients(device: str, scale: float) -> None:
    x = torch.tensor([-3.0, 2.0, 0.0, 1e20], dtype=torch.float64)
    out = torch.empty(2, 4, dtype=torch.float64, device=device)
    scores_kernel[(1,)](out, x.to(device), scale, SIZE=4, NEGATIVE=scale < 0)
    exponents, gradients = out.cpu()
    # A factor below 1e-30 counts as that number, which Triton takes in float32.
    smallest = torch.tensor(1e-30, dtype=torch.float32).item()
    factor = math.copysign(max(abs(scale) * math.log2(math.e), smallest), scale or 1.0)
    torch.testing.assert_close(exponents, x * factor, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradients, x * scale, rtol=1e-14, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", (0.0, 1e-40, 0.3, -0.3))
def test_a_hidden_score_stays_hidden(device: str, scale: float) -> None:
    """-inf times the factor, whatever the scale, is -inf again: the factor is positive and no zero."""
    x = torch.tensor([-math.inf if scale >= 0 else math.inf], dtype=torch.float64)
    out = torch.empty(2, 1, dtype=torch.float64, device=device)
    scores_kernel[(1,)](out, x.to(device), scale, SIZE=1, NEGATIVE=scale < 0)
    assert out[0].item() == -math.inf
