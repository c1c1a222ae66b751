"""The scale, its sign and its magnitude: what becomes of products, and of the gradients on their way back."""

from __future__ import annotations

import math

import pytest
import torch
import triton.language as tl

from flash_attend.kernels.compat import kernel
from flash_attend.kernels.operands import scale_sign
from flash_attend.kernels.scores import scaled_scores
from flash_attend.spec import AttentionSpec

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
SCALES = (0.3, -0.3, 0.0, -0.0, 1e-25, -1e-25, 1e-37, -1e-40, 1e-46, -5e-324, 700.0, -700.0)
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_scale = pytest.mark.parametrize("scale", SCALES)


@kernel
def scores_kernel(OUT, X, scale: tl.float64, SIZE: tl.constexpr, SIGN: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """OUT (2, SIZE): the base-2 exponents of products, and the gradients of products from those of scores."""
    at = tl.arange(0, SIZE)
    x = tl.load(X + at)
    scores = scaled_scores(scale, SIGN, ACCUMULATOR)
    tl.store(OUT + at, scores.apply(x) * scores.factor_log2)
    tl.store(OUT + SIZE + at, scores.gradient(x) * scores.magnitude)


def _scored(x: torch.Tensor, scale: float, device: str) -> torch.Tensor:
    out = torch.empty(2, len(x), dtype=x.dtype, device=device)
    sign = scale_sign(AttentionSpec(1, 1, 1, 1, 1, 16, 16, x.dtype, scale=scale))
    scores_kernel[(1,)](out, x.to(device), scale, SIZE=len(x), SIGN=sign, ACCUMULATOR=DTYPES[x.dtype])
    return out.cpu()


@each_device
@each_dtype
@each_scale
def test_exponents_and_gradients(device: str, dtype: torch.dtype, scale: float) -> None:
    """To the last bit but one of what a factor in that dtype gives: a score of 1e37 too, where the scale is tiny."""
    x = torch.tensor([-3.0, 2.0, 0.0, 1e20 if abs(scale) > 1 else 1e37], dtype=dtype)
    exponents, gradients = _scored(x, scale, device)
    factor = torch.tensor(scale * math.log2(math.e), dtype=torch.float64).to(dtype).double()
    tolerance = dict(rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).smallest_normal)
    torch.testing.assert_close(exponents.double(), x.double() * factor, **tolerance)
    magnitude = torch.tensor(scale, dtype=torch.float64).to(dtype).double()
    torch.testing.assert_close(gradients.double(), x.double() * magnitude, **tolerance)


@each_device
@each_dtype
@each_scale
def test_a_hidden_score_stays_hidden(device: str, dtype: torch.dtype, scale: float) -> None:
    """What `Mask.hide` fills in, after the sign, times the factor, whatever the scale, is -inf again: no zero is."""
    assert _factor(scale, dtype, device) * -math.inf == -math.inf


def _factor(scale: float, dtype: torch.dtype, device: str) -> float:
    """By what a score of 1 is multiplied, where the sign is not taken into account."""
    sign = scale_sign(AttentionSpec(1, 1, 1, 1, 1, 16, 16, dtype, scale=scale))
    out = torch.empty(1, dtype=dtype, device=device)
    factor_kernel[(1,)](out, scale, SIGN=sign, ACCUMULATOR=DTYPES[dtype])
    return out.item()


@kernel
def factor_kernel(OUT, scale: tl.float64, SIGN: tl.constexpr, ACCUMULATOR: tl.constexpr):
    tl.store(OUT + tl.arange(0, 1), scaled_scores(scale, SIGN, ACCUMULATOR).factor_log2 + tl.zeros([1], ACCUMULATOR))
