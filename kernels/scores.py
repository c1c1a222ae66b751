"""What becomes of the products of q and k before the softmax, and of the gradients on their way back.

Exponentials are taken to the base 2, with the scale folded in: `exp(scale * q k) = exp2(apply(q k) * factor_log2)`,
where `factor_log2` is positive, whatever the scale: a hidden score is -inf, and so is its exponent.
"""

import triton
import triton.language as tl

from flash_attend.kernels.compat import aggregate

LOG2E = tl.constexpr(1.4426950408889634)


@aggregate
class Scores:
    """The scale, as its SIGN and its magnitude.

    `apply` and `gradient` take the sign, element by element; sums of gradients are multiplied by the magnitude at their
    end. A SIGN of 0 makes all scores 0, and the factor is 1.
    """

    factor_log2: tl.tensor  # of what `apply` gives, on base-2 exponents
    magnitude: object  # None, where there are no gradients
    SIGN: tl.constexpr

    @triton.jit
    def apply(self, products):
        """The scores, but for a factor that is positive."""
        if self.SIGN < 0:
            products = -products
        elif self.SIGN == 0:
            products = products * 0.0  # NaN and infinity become NaN, as they do in a product with the scale
        return products

    @triton.jit
    def gradient(self, grad_scores):
        """The gradient of the products, but for the magnitude of the scale, from that of the scores."""
        if self.SIGN < 0:
            grad_scores = -grad_scores
        return grad_scores


@triton.jit
def scaled_scores(scale, SIGN: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """The scores under a scale, a float64 argument of a kernel, whose sign is what `scale_sign` says."""
    return scores_under(tl.full([], scale, tl.float64), SIGN, ACCUMULATOR)  # the interpreter hands over a float


@triton.jit
def scores_under(scale, SIGN: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """The same for a scale that is a tensor, as Gluon has it."""
    magnitude = scale
    if SIGN < 0:
        magnitude = -magnitude
    factor_log2 = tl.full([], 1.0, ACCUMULATOR) if SIGN == 0 else (magnitude * LOG2E).to(ACCUMULATOR)
    return Scores(factor_log2, magnitude.to(ACCUMULATOR), SIGN)
