"""The arithmetic of the softmax: its state while it is online, its end, and the weights again in the backward.

Scores come as `Scores.apply` gives them, and `factor_log2` is the one that belongs to them. That factor may be taken
before the maximum is subtracted or after it. Before, both are one instruction, but a product that is rounded comes off
one that is not, and what is left errs by a rounding of the maximum: it overflows where scores are beyond 1e9. After, it
takes two, and the largest score has the exponent 0, whatever its size. `EXACT` says which: after, in float32 and
float64.

The backward gets the maximum and the base-2 logarithm of the sum, apart, or both in one number, which is rounded once.
That is enough where weights are rounded anyway when they enter a product, to 12 bits or fewer: until scores are beyond
some thousands, no more is lost.
"""

import triton
import triton.language as tl

from flash_attend.kernels.compat import aggregate

LN2 = tl.constexpr(0.6931471805599453)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
INFINITY = tl.constexpr(float("inf"))
# The finite numbers that are lowest. A maximum begins with one: below it there is -inf alone, whose difference from it
# is -inf again, where that of two -inf would be NaN.
LOWEST32 = tl.constexpr(-3.4028234663852886e38)
LOWEST64 = tl.constexpr(-1.7976931348623157e308)
# Four units in the last place of numbers near 1: by how much sums of products may differ, relative to a large one.
ROUNDING32 = tl.constexpr(2.0**-21)
ROUNDING64 = tl.constexpr(2.0**-50)


@aggregate
class Softmax:
    """The state of an online softmax over so many queries: what has been seen of each one's scores [BLOCK_M]."""

    maximum: tl.tensor  # of the scores if EXACT, else of the base-2 exponents
    sum: tl.tensor  # of exponentials, relative to that maximum
    EXACT: tl.constexpr

    @triton.jit
    def step(self, scores, factor_log2, counts=None):
        """Takes in another tile of scores [BLOCK_M, BLOCK_N]; those of hidden pairs are -inf. Each counts once, or so
        often as `counts` says: the maximum of other scores stands for the sum of their exponentials, relative to it.

        Returns the tile's weights, the factor that brings older sums to the new maximum, and the new state.
        """
        if self.EXACT:
            maximum = tl.maximum(self.maximum, tl.max(scores, 1))
            exponents = (scores - maximum[:, None]) * factor_log2
            change = (self.maximum - maximum) * factor_log2
        else:
            maximum = tl.maximum(self.maximum, tl.max(scores, 1) * factor_log2)
            exponents = scores * factor_log2 - maximum[:, None]
            change = self.maximum - maximum
        weights = tl.math.exp2(exponents)
        correction = tl.math.exp2(change)
        counted = weights if counts is None else weights * counts
        return weights, correction, Softmax(maximum, self.sum * correction + tl.sum(counted, 1), self.EXACT)

    @triton.jit
    def finish(self, alive, factor_log2, APART: tl.constexpr, sink_log2=None):
        """The factor that normalises what was accumulated, the natural LSE, and the base-2 one, if APART without the
        maximum. They are 0, -inf and +inf for a query that sees no key: is not `alive`. A sink, unless None, takes part
        as one more score, given as a base-2 exponent.

        A sum of 0 where it does see some is that of scores which are all -inf: 0 / 0 is NaN.
        """
        maximum_log2 = self.maximum * factor_log2 if self.EXACT else self.maximum
        total = self.sum
        correction = 1.0
        if sink_log2 is not None:
            highest = tl.maximum(maximum_log2, sink_log2)
            correction = tl.math.exp2(maximum_log2 - highest)
            total = total * correction + tl.math.exp2(sink_log2 - highest)
        log2_sum = tl.math.log2(total)
        lse_log2 = maximum_log2 + log2_sum
        if sink_log2 is not None:
            lse_log2 = highest + log2_sum
            log2_sum += highest - maximum_log2
        normaliser = tl.where(alive, correction / total, 0.0)
        lse = tl.where(alive, lse_log2 * LN2, NEGATIVE_INFINITY)
        return normaliser, lse, tl.where(alive, log2_sum if APART else lse_log2, INFINITY)


@triton.jit
def empty_softmax(BLOCK_M: tl.constexpr, ACCUMULATOR: tl.constexpr, EXACT: tl.constexpr):
    """The state before the first tile."""
    LOWEST: tl.constexpr = LOWEST32 if ACCUMULATOR.primitive_bitwidth == 32 else LOWEST64
    return Softmax(tl.full([BLOCK_M], LOWEST, ACCUMULATOR), tl.zeros([BLOCK_M], ACCUMULATOR), EXACT)


@triton.jit
def recomputed_weights(scores, maximum, log2, factor_log2):
    """The normalised weights. `maximum`, None unless APART, and `log2` are what was left of a `Softmax`, and broadcast
    against the scores.

    Never more than 1: where scores come out larger than they were, or the logarithm was rounded, the exponent counts as
    if it were as much below 0. The sign costs nothing.
    """
    relative = scores
    if maximum is not None:
        # Scores that were summed in another order are not the same to the last bits, and one key that outweighs all
        # others weighs 1, or else a large score errs by e to the power of those bits: what is as near is the maximum.
        ROUNDING: tl.constexpr = ROUNDING32 if scores.dtype.primitive_bitwidth == 32 else ROUNDING64
        relative = scores - maximum
        # From the scores, not the maximum: what is the same in every round would take registers.
        relative = tl.where(tl.abs(relative) < tl.abs(scores) * ROUNDING, 0.0, relative)
    return tl.math.exp2(-1.0 * tl.abs(relative * factor_log2 - log2))
