"""The online softmax over tiles of scores, and the weights again from its LSE."""

from __future__ import annotations

import math

import pytest
import torch
import triton.language as tl

from flash_attend.kernels.compat import kernel
from flash_attend.kernels.softmax import LN2, NEGATIVE_INFINITY, empty_softmax, recomputed_weights

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))


@kernel
def softmax_kernel(
    OUT, LSE, AGAIN, SCORES, VALUES, keys: tl.int32, factor_log2: tl.float64, M: tl.constexpr, N: tl.constexpr
):
    """OUT (M,) and LSE (M,) of SCORES (M, keys) over VALUES (keys,), in tiles of N; AGAIN is OUT from the LSE."""
    m = tl.arange(0, M)
    total = tl.zeros([M], tl.float64)
    softmax = empty_softmax(M, tl.float64)
    for first in tl.range(0, keys, N):
        n = first + tl.arange(0, N)
        scores = tl.load(SCORES + m[:, None] * keys + n[None, :])
        weights, correction, softmax = softmax.step(scores, factor_log2, MASKED=True)
        total = total * correction + tl.sum(weights * tl.load(VALUES + n)[None, :], 1)
    normaliser, lse = softmax.finish()
    tl.store(OUT + m, total * normaliser)
    tl.store(LSE + m, lse)
    again = tl.zeros([M], tl.float64)
    lse_log2 = tl.where(lse == NEGATIVE_INFINITY, -NEGATIVE_INFINITY, lse / LN2)
    for first in tl.range(0, keys, N):
        n = first + tl.arange(0, N)
        scores = tl.load(SCORES + m[:, None] * keys + n[None, :])
        weights = recomputed_weights(scores, lse_log2[:, None], factor_log2)
        again += tl.sum(weights * tl.load(VALUES + n)[None, :], 1)
    tl.store(AGAIN + m, again)


@pytest.mark.parametrize("device", DEVICES)
def test_tiles_with_nothing_to_see(device: str) -> None:
    """In front, in between, at the end, and all of them, among scores that rise and fall far apart."""
    torch.manual_seed(0)
    tiles, width = 4, 4
    seen = torch.tensor([[int(bit) for bit in f"{row:04b}"] for row in range(16)]).bool()
    scores = torch.randn(16, tiles, width, dtype=torch.float64)
    scores += 500 * torch.randn(16, tiles, 1, dtype=torch.float64)
    scores = scores.masked_fill(~seen[..., None], -math.inf).flatten(1)
    values = torch.randn(tiles * width, dtype=torch.float64)
    out, lse, again = (torch.empty(16, dtype=torch.float64, device=device) for _ in range(3))
    softmax_kernel[(1,)](
        out, lse, again, scores.to(device), values.to(device), tiles * width, 0.3 * math.log2(math.e), M=16, N=width
    )
    wanted = (0.3 * scores).softmax(1).nan_to_num(0.0) @ values
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.cpu(), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse.cpu(), (0.3 * scores).logsumexp(1), rtol=1e-12, atol=1e-12)
