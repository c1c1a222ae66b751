"""What becomes of the products of q and k before the softmax, and of the gradients on their way back.

Exponentials are taken to the base 2, with the scale folded in: `exp(scale * q k) = exp2(apply(q k) * factor_log2)`,
where `factor_log2` is positive, whatever the sign of the scale.
"""

import triton
import triton.language as tl

from flash_attend.kernels.compat import aggregate

LOG2E = tl.constexpr(1.4426950408889634)
# A scale of 0 is taken as this instead in exponents: 0 * -inf, where a key is hidden, would be NaN.
SMALLEST_SCALE = tl.constexpr(1e-30)


@aggregate
class Scores:
    """The scale, as its sign and its magnitude.

    `apply` and `gradient` take the sign, element by element; sums of gradients are multiplied by the magnitude at their
    end.
    """

    factor_log2: tl.tensor  # of what `apply` gives, on base-2 exponents
    magnitude: object  # None, where there are no gradients
    NEGATIVE: tl.constexpr

    @triton.jit
    def apply(self, products):
        """The scores, but for a factor that is positive."""
        if self.NEGATIVE:
            products = -products
        return products

    @triton.jit
    def gradient(self, grad_scores):
        """The gradient of the products, but for the magnitude of the scale, from that of the scores."""
        if self.NEGATIVE:
            grad_scores = -grad_scores
        return grad_scores


@triton.jit
def scaled_scores(scale, NEGATIVE: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """The scores under a scale, a float64 argument of a kernel, which is NEGATIVE or not."""
    return scores_under(tl.full([], scale, tl.float64), NEGATIVE, ACCUMULATOR)  # the interpreter hands over a float


@triton.jit
def scores_under(scale, NEGATIVE: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """The same for a scale that is a tensor, as Gluon has it."""
    magnitude = scale
    if NEGATIVE:
        magnitude = -magnitude
    factor_log2 = tl.maximum(magnitude * LOG2E, SMALLEST_SCALE).to(ACCUMULATOR)
    return Scores(factor_log2, magnitude.to(ACCUMULATOR), NEGATIVE)
