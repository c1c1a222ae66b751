"""The arithmetic of the softmax: one online step, its end, and the weights again in the backward.

Exponentials are taken to the base 2, with the scale folded in: `exp(score * scale) = exp2(score * scale_log2)`.
`scale_log2` is positive; the sign of a negative scale is put into q or k, which is exact.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
# A scale of 0 is taken as this instead: 0 * -inf, where a key is hidden, would be NaN.
SMALLEST_SCALE = tl.constexpr(1e-30)


@triton.jit
def to_log2_scale(scale, DTYPE: tl.constexpr):
    """The magnitude of a scale (a float64 scalar) as a factor on base-2 exponents."""
    return tl.maximum(tl.abs(tl.full([], scale, tl.float64)) * LOG2E, SMALLEST_SCALE).to(DTYPE)


@triton.jit
def online_step(scores, row_max, row_sum, scale_log2, MASKED: tl.constexpr):
    """Takes another tile of scores [BLOCK_M, BLOCK_N] into the running statistics [BLOCK_M].

    Returns the tile's weights, the factor that brings older sums to the new maximum, and the new statistics. The
    maximum is of the scaled base-2 exponents.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    reference = new_max
    if MASKED:
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        reference = tl.where(new_max == NEGATIVE_INFINITY, 0.0, new_max)
    weights = tl.math.exp2(scores * scale_log2 - reference[:, None])
    correction = tl.math.exp2(row_max - reference)
    return weights, correction, new_max, row_sum * correction + tl.sum(weights, 1)


@triton.jit
def finish(row_max, row_sum):
    """The factor that normalises the accumulated output and the natural LSE; 0 and -inf for a row that saw no key."""
    dead = row_sum == 0.0
    safe_sum = tl.where(dead, 1.0, row_sum)
    normaliser = tl.where(dead, 0.0, 1.0 / safe_sum)
    lse_natural = tl.where(dead, NEGATIVE_INFINITY, (row_max + tl.math.log2(safe_sum)) * LN2)
    return normaliser, lse_natural


@triton.jit
def recomputed_weights(scores, lse_log2, scale_log2):
    """The normalised weights; `lse_log2` broadcasts against the scores and is +inf for rows that get nothing."""
    return tl.math.exp2(scores * scale_log2 - lse_log2)
