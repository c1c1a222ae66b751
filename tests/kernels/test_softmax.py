"""The online softmax over tiles of scores, and the weights again from what it leaves."""

from __future__ import annotations

import math

import pytest
import torch
import triton.language as tl

from flash_attend.kernels.compat import kernel
from flash_attend.kernels.softmax import empty_softmax, recomputed_weights

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
each_device = pytest.mark.parametrize("device", DEVICES)
each_kind = pytest.mark.parametrize("exact", (False, True), ids=("half precision's", "exact"))
FACTOR = 0.3 * math.log2(math.e)


@kernel
def softmax_kernel(
    OUT, LSE, AGAIN, SCORES, VALUES, ALIVE, keys: tl.int32, factor_log2: tl.float64, M: tl.constexpr, N: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """OUT (M,) and LSE (M,) of SCORES (M, keys) over VALUES (keys,), in tiles of N, for rows that are ALIVE or not;
    AGAIN is OUT from what the softmax leaves."""
    m = tl.arange(0, M)
    total = tl.zeros([M], tl.float64)
    softmax = empty_softmax(M, tl.float64, EXACT)
    for first in tl.range(0, keys, N):
        n = first + tl.arange(0, N)
        scores = tl.load(SCORES + m[:, None] * keys + n[None, :])
        weights, correction, softmax = softmax.step(scores, factor_log2)
        total = total * correction + tl.sum(weights * tl.load(VALUES + n)[None, :], 1)
    normaliser, lse, log2 = softmax.finish(tl.load(ALIVE + m) != 0, factor_log2, EXACT)
    tl.store(OUT + m, total * normaliser)
    tl.store(LSE + m, lse)
    again = tl.zeros([M], tl.float64)
    maximum = None
    if EXACT:
        maximum = softmax.maximum[:, None]
    for first in tl.range(0, keys, N):
        n = first + tl.arange(0, N)
        scores = tl.load(SCORES + m[:, None] * keys + n[None, :])
        weights = recomputed_weights(scores, maximum, log2[:, None], factor_log2)
        again += tl.sum(weights * tl.load(VALUES + n)[None, :], 1)
    tl.store(AGAIN + m, again)


def _softmax(scores, values, alive, exact, device):
    """`(out, lse, again)`."""
    rows, keys = scores.shape
    found = [torch.empty(rows, dtype=torch.float64, device=device) for _ in range(3)]
    inputs = (x.to(device) for x in (scores, values, alive.int()))
    softmax_kernel[(1,)](*found, *inputs, keys, FACTOR, M=rows, N=4, EXACT=exact)
    return [x.cpu() for x in found]


@each_device
@each_kind
def test_tiles_with_nothing_to_see(device: str, exact: bool) -> None:
    """In front, in between, at the end, and all of them, among scores that rise and fall far apart."""
    torch.manual_seed(0)
    tiles, width = 4, 4
    seen = torch.tensor([[int(bit) for bit in f"{row:04b}"] for row in range(16)]).bool()
    scores = torch.randn(16, tiles, width, dtype=torch.float64)
    scores += 500 * torch.randn(16, tiles, 1, dtype=torch.float64)
    scores = scores.masked_fill(~seen[..., None], -math.inf).flatten(1)
    values = torch.randn(tiles * width, dtype=torch.float64)
    out, lse, again = _softmax(scores, values, seen.any(1), exact, device)
    wanted = (0.3 * scores).softmax(1).nan_to_num(0.0) @ values
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, (0.3 * scores).logsumexp(1), rtol=1e-12, atol=1e-12)


@each_device
@each_kind
def test_rows_that_see_what_is_not_finite(device: str, exact: bool) -> None:
    """A row that sees nothing but -inf is none that sees nothing; NaN and infinity, beside -inf too, come out."""
    inf, nan = math.inf, math.nan
    rows = [[-inf, -inf], [-inf, 1.0], [nan, -inf], [nan, 1.0], [inf, 1.0], [-inf, -inf], [1.0, 2.0], [0.0, -inf]]
    scores = torch.tensor(rows, dtype=torch.float64).repeat_interleave(4, 1)
    values = torch.arange(8, dtype=torch.float64)
    alive = torch.arange(8) != 5
    out, lse, again = _softmax(scores, values, alive, exact, device)
    wanted = ((0.3 * scores).softmax(1) @ values).masked_fill(~alive, 0.0)
    assert wanted.isnan().tolist() == [True, False, True, True, True, False, False, False]
    torch.testing.assert_close(out, wanted, equal_nan=True)
    torch.testing.assert_close(again, wanted, equal_nan=True)
    torch.testing.assert_close(lse[[0, 1, 5, 6, 7]], (0.3 * scores).logsumexp(1)[[0, 1, 5, 6, 7]])
    assert lse[[2, 3, 4]].isnan().all()


@each_device
@each_kind
@pytest.mark.parametrize("size", (1e3, 1e12, 1e30))
def test_weights_of_large_scores(device: str, exact: bool, size: float) -> None:
    """Never more than 1, nor anything but finite; and where the factor is taken last, a largest score, or two that are
    the same, weigh what they should, whatever their size."""
    scores = size * torch.tensor([[3.1, 1.0, -2.0, 0.5], [1.7, 1.7, -1.0, 1.0], [-0.7, -0.9, -3.0, -1.1]]).double()
    scores = torch.cat([scores, scores[:1]])
    out, _, again = _softmax(scores, torch.ones(4).double(), torch.ones(4), exact, device)
    if exact:
        torch.testing.assert_close(out, torch.ones(4).double(), rtol=1e-14, atol=0)
        torch.testing.assert_close(again, torch.ones(4).double(), rtol=1e-14, atol=0)
    assert again.isfinite().all()
    assert (again <= 2).all()
