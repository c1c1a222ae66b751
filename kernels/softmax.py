"""The arithmetic of the softmax: its state while it is online, its end, and the weights again in the backward.

Scores come as `Scores.apply` gives them, and `factor_log2` is the one that belongs to them.
"""

import triton
import triton.language as tl

from flash_attend.kernels.compat import aggregate

LN2 = tl.constexpr(0.6931471805599453)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@aggregate
class Softmax:
    """The state of an online softmax over so many queries: what has been seen of each one's scores [BLOCK_M]."""

    maximum: tl.tensor  # of the base-2 exponents
    sum: tl.tensor  # of exponentials, relative to that maximum

    @triton.jit
    def step(self, scores, factor_log2, MASKED: tl.constexpr):
        """Takes in another tile of scores [BLOCK_M, BLOCK_N].

        Returns the tile's weights, the factor that brings older sums to the new maximum, and the new state.
        """
        maximum = tl.maximum(self.maximum, tl.max(scores, 1) * factor_log2)
        reference = maximum
        if MASKED:
            # A query that has seen nothing yet: -inf - -inf would be NaN.
            reference = tl.where(maximum == NEGATIVE_INFINITY, 0.0, maximum)
        weights = tl.math.exp2(scores * factor_log2 - reference[:, None])
        correction = tl.math.exp2(self.maximum - reference)
        return weights, correction, Softmax(maximum, self.sum * correction + tl.sum(weights, 1))

    @triton.jit
    def finish(self):
        """The factor that normalises what was accumulated, and the natural LSE; 0 and -inf where no key was seen."""
        dead = self.sum == 0.0
        safe_sum = tl.where(dead, 1.0, self.sum)
        normaliser = tl.where(dead, 0.0, 1.0 / safe_sum)
        lse = tl.where(dead, NEGATIVE_INFINITY, (self.maximum + tl.math.log2(safe_sum)) * LN2)
        return normaliser, lse


@triton.jit
def empty_softmax(BLOCK_M: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """The state before the first tile."""
    return Softmax(tl.full([BLOCK_M], NEGATIVE_INFINITY, ACCUMULATOR), tl.zeros([BLOCK_M], ACCUMULATOR))


@triton.jit
def recomputed_weights(scores, lse_log2, factor_log2):
    """The normalised weights; `lse_log2` broadcasts against the scores and is +inf for queries that get nothing."""
    return tl.math.exp2(scores * factor_log2 - lse_log2)
