"""The scale, softcap, ALiBi and biases: what becomes of products, and of the gradients on their way back."""

from __future__ import annotations

import math

import pytest
import torch
import triton.language as tl

from flash_attend.kernels.compat import kernel
from flash_attend.kernels.operands import bias_strides, scale_sign
from flash_attend.kernels.scores import scaled_scores, scores_of_call
from flash_attend.spec import AttentionSpec, BiasKind

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


# ---------------------------------------------------------------------------------------------------------------------
# Softcap, ALiBi and biases
# ---------------------------------------------------------------------------------------------------------------------

QUERIES, KEYS, SOFTCAP = 29, 45, 1.5


@kernel
def changed_kernel(
    OUT,
    X,
    BIAS,
    SLOPES,
    scale: tl.float64,
    softcap: tl.float64,
    queries: tl.int32,
    keys: tl.int32,
    bias_batch: tl.int64,
    bias_head: tl.int64,
    bias_query: tl.int64,
    bias_key: tl.int64,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HOW: tl.constexpr,
    ALIGN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """OUT (2, i, j) for products X (i, j) of batch entry 1 and head 1, by tiles: natural exponents of the scores, and
    the gradients of the products from those of the scores, which are X too."""
    scores = scores_of_call(
        scale, softcap, BIAS, (bias_batch, bias_head, bias_query, bias_key), SLOPES, (2, 1), queries, keys, 1, HOW,
        ALIGN, ACCUMULATOR,
    ).of_head(tl.program_id(0) * 0 + 1, tl.program_id(0) * 0 + 1)  # fmt: skip
    first_query = tl.program_id(0) * BLOCK_M
    for block in tl.range(0, tl.cdiv(keys, BLOCK_N)):
        first_key = block * BLOCK_N
        query = first_query + tl.arange(0, BLOCK_M)
        key = first_key + tl.arange(0, BLOCK_N)
        at = query[:, None] * keys + key[None, :]
        exists = (query < queries)[:, None] & (key < keys)[None, :]
        if TRANSPOSED:
            at = at.T
            exists = exists.T
        x = tl.load(X + at, mask=exists, other=0.0)
        applied = scores.apply(x)
        seen = scores.add(applied, first_query, first_key, True, TRANSPOSED)
        tl.store(OUT + at, seen * scores.factor_log2 * 0.6931471805599453, mask=exists)
        tl.store(OUT + queries * keys + at, scores.gradient(x, applied) * scores.magnitude, mask=exists)


def biases(dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    """(b|1, h|1, i|1, j|1), read by their strides."""
    whole = torch.randn(2, 2, QUERIES, 48, dtype=dtype)
    whole[..., 3::7] = -math.inf
    found = dict(none=None, aligned=whole[..., :KEYS], odd=torch.randn(2, 2, QUERIES, KEYS, dtype=dtype))
    found["transposed"] = torch.randn(2, 2, KEYS, QUERIES, dtype=dtype).mT
    found["keys"] = torch.randn(1, 2, 1, 48).to(dtype)[..., :KEYS]
    return found | dict(queries=torch.randn(2, 1, QUERIES, 1).to(dtype), number=torch.randn(1, 1, 1, 1).to(dtype))


@each_device
@each_dtype
@pytest.mark.parametrize("changes", ("softcap", "alibi", "softcap alibi", "bias", "softcap alibi bias"))
def test_changed_scores_and_their_gradients(device: str, dtype: torch.dtype, changes: str) -> None:
    """In both orientations, with a negative scale; a bias of -inf hides what the product holds, NaN too."""
    torch.manual_seed(0)
    x = 3 * torch.randn(QUERIES, KEYS, dtype=dtype)
    slopes = torch.rand(2, 2, dtype=dtype) if "alibi" in changes else None
    ahead = torch.arange(KEYS) - torch.arange(QUERIES)[:, None] - (KEYS - QUERIES)
    for name, bias in biases(dtype).items():
        if ("bias" in changes) != (name != "none"):
            continue
        softcap = SOFTCAP if "softcap" in changes else 0.0
        products = x.double().requires_grad_()
        wanted = -0.7 * products
        wanted = softcap * torch.tanh(wanted / softcap) if softcap else wanted
        (gradient,) = torch.autograd.grad(wanted, products, x.double(), retain_graph=True)
        wanted = wanted if slopes is None else wanted - slopes[1, 1].double() * ahead.abs()
        given = x
        if bias is not None:
            wanted = wanted + bias.expand(2, 2, QUERIES, KEYS)[1, 1].double()
            given = x.masked_fill(bias.expand(2, 2, QUERIES, KEYS)[1, 1] == -math.inf, math.nan)
        size = (1, 1, 1, 1) if bias is None else bias.shape
        kind = BiasKind(*(n > 1 for n in size), dtype=dtype)
        spec = AttentionSpec(2, 2, 2, QUERIES, KEYS, 16, 16, dtype, bias=kind)
        how = "exact" if dtype == torch.float64 else "fast"
        align, strides = bias_strides(spec, None if bias is None else bias.stride())
        assert (align > 1) == (name in ("aligned", "keys"))
        for transposed in (False, True):
            out = torch.empty(2, QUERIES, KEYS, dtype=dtype, device=device)
            tensors = (t if t is None else t.to(device) for t in (given, bias, slopes))
            changed_kernel[(2,)](
                out, *tensors, -0.7, softcap, QUERIES, KEYS, *strides, BLOCK_M=16, BLOCK_N=32, ALIGN=align,
                HOW=how if softcap else "", TRANSPOSED=transposed, ACCUMULATOR=DTYPES[dtype],
            )  # fmt: skip
            exponents, gradients = out.cpu().double()
            tolerance = dict(rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)
            torch.testing.assert_close(exponents, wanted.detach(), **tolerance)
            gradient = gradient.masked_fill(given.isnan(), math.nan)
            torch.testing.assert_close(gradients, gradient, equal_nan=True, **tolerance)
