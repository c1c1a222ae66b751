"""What becomes of the products of q and k before the softmax, and of the gradients on their way back.

A product becomes a score in two steps: `apply` takes the scale's sign or the softcap, one by one, and `add` what
depends on who meets whom: a bias, and ALiBi's penalty. Exponentials are taken to the base 2, with a factor folded in:
`exp(score) = exp2(add(apply(q k)) * factor_log2)`, where `factor_log2` is positive, whatever the scale: a hidden score
is -inf, and so is its exponent. With nothing but a scale, the factor is its magnitude; with a softcap, the cap; where
something is added, scores are whole, and the factor turns natural exponents into those of base 2.
"""

import triton
import triton.language as tl

from flash_attend.kernels.compat import TWICE_LOG2E, aggregate, tanh

LOG2E = tl.constexpr(1.4426950408889634)
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def per_query(x, TRANSPOSED: tl.constexpr):
    """Numbers of queries [BLOCK_M], to broadcast to a tile of scores, or of scores TRANSPOSED."""
    return x[None, :] if TRANSPOSED else x[:, None]


@triton.jit
def per_key(x, TRANSPOSED: tl.constexpr):
    """Numbers of keys [BLOCK_N], likewise."""
    return x[:, None] if TRANSPOSED else x[None, :]


@triton.jit
def query_of(row, group):
    """Which query a row of a tile is: each a row, or each as many as the `group` has heads."""
    return row if group is None else row // group


@aggregate
class Bias:
    """A bias (b|1, h|1, i|1, j|1), or one head's, read by its strides, which are 0 where it is broadcast.

    If ALIGN, its keys follow each other, and the other strides come in units of so many elements, which tells the
    compiler how far loads may go together. Where the heads of a `group` take turns in rows, they share it.
    """

    source: tl.tensor
    stride_batch: tl.tensor
    stride_head: tl.tensor
    stride_query: tl.tensor
    stride_key: tl.tensor
    queries: tl.tensor
    keys: tl.tensor
    group: object
    ALIGN: tl.constexpr
    ACCUMULATOR: tl.constexpr

    @triton.jit
    def of_head(self, batch, head):
        """The same for a head."""
        UNIT: tl.constexpr = max(self.ALIGN, 1)
        batch64 = batch.to(tl.int64) * UNIT
        head64 = head.to(tl.int64) * UNIT
        source = self.source + (batch64 * self.stride_batch + head64 * self.stride_head)
        return Bias(
            source,
            self.stride_batch,
            self.stride_head,
            self.stride_query,
            self.stride_key,
            self.queries,
            self.keys,
            self.group,
            self.ALIGN,
            self.ACCUMULATOR,
        )

    @triton.jit
    def load(
        self, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
        TRANSPOSED: tl.constexpr,
    ):  # fmt: skip
        """[BLOCK_M, BLOCK_N], or its transpose. Queries past the last one have what that has; keys past the last one,
        which only a MASKED block may have, 0."""
        UNIT: tl.constexpr = max(self.ALIGN, 1)
        stride = self.stride_query * UNIT
        if self.group is None:
            row = tl.minimum(tl.arange(0, BLOCK_M), self.queries - 1 - first_query).to(tl.int64) * stride
            start = first_query.to(tl.int64) * stride
        else:
            query = query_of(first_query + tl.arange(0, BLOCK_M), self.group)
            row = tl.minimum(query, self.queries - 1).to(tl.int64) * stride
            start = stride * 0
        key = tl.arange(0, BLOCK_N)
        if self.ALIGN:
            start += first_key
            column = key
        else:
            start += first_key.to(tl.int64) * self.stride_key
            column = key.to(tl.int64) * self.stride_key
        pointers = self.source + start + per_query(row, TRANSPOSED) + per_key(column, TRANSPOSED)
        if MASKED:
            loaded = tl.load(pointers, mask=per_key(first_key + key < self.keys, TRANSPOSED), other=0.0)
        else:
            loaded = tl.load(pointers)
        return loaded.to(self.ACCUMULATOR)


@aggregate
class Alibi:
    """ALiBi (Press et al. 2022, arXiv:2108.12409): each head's slope times the distance, off its scores. `slopes`
    points to all of them; of a head, it is the slope itself or, where the heads of a `group` take turns in rows, points
    to theirs. `offset` is the position of query 0."""

    slopes: tl.tensor
    stride_batch: tl.tensor
    stride_head: tl.tensor
    offset: tl.tensor
    group: object
    ACCUMULATOR: tl.constexpr

    @triton.jit
    def of_head(self, batch, head):
        """The same for a head."""
        batch64 = batch.to(tl.int64)
        head64 = head.to(tl.int64)
        slopes = self.slopes + (batch64 * self.stride_batch + head64 * self.stride_head)
        if self.group is None:
            slopes = tl.load(slopes).to(self.ACCUMULATOR)
        return Alibi(slopes, self.stride_batch, self.stride_head, self.offset, self.group, self.ACCUMULATOR)

    @triton.jit
    def penalty(self, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
        """[BLOCK_M, BLOCK_N], or its transpose. Positions are counted from the first key: near ones are exact."""
        slope = self.slopes
        if self.group is None:
            position = (first_query + self.offset - first_key + tl.arange(0, BLOCK_M)).to(self.ACCUMULATOR)
        else:
            row = first_query + tl.arange(0, BLOCK_M)
            position = (query_of(row, self.group) + self.offset - first_key).to(self.ACCUMULATOR)
            head = (row % self.group).to(tl.int64)
            slope = per_query(tl.load(self.slopes + head * self.stride_head).to(self.ACCUMULATOR), TRANSPOSED)
        key = tl.arange(0, BLOCK_N).to(self.ACCUMULATOR)
        return slope * tl.abs(per_key(key, TRANSPOSED) - per_query(position, TRANSPOSED))


@aggregate
class Scores:
    """The scale, as its SIGN and its magnitude, the softcap, and what is added.

    `apply` and `gradient` take the sign, element by element; sums of gradients are multiplied by the magnitude at their
    end. A SIGN of 0 makes all scores 0, and the factor is 1. With a softcap, or where something is added, SIGN is 1,
    and the magnitude the scale itself.
    """

    factor_log2: tl.tensor  # of what `add` gives, on base-2 exponents
    magnitude: object  # None, where there are no gradients
    capped_scale: object  # the scale, divided by the softcap, in the units that its tanh takes; None without one
    unit: object  # of what `apply` gives, where something is added: the softcap or the scale
    bias: object
    alibi: object
    SIGN: tl.constexpr
    SOFTCAP: tl.constexpr

    @triton.jit
    def of_head(self, batch, head):
        """The same for a head."""
        bias = None if self.bias is None else self.bias.of_head(batch, head)
        alibi = None if self.alibi is None else self.alibi.of_head(batch, head)
        return Scores(
            self.factor_log2, self.magnitude, self.capped_scale, self.unit, bias, alibi, self.SIGN, self.SOFTCAP
        )

    @triton.jit
    def apply(self, products):
        """The scores before anything is added, but for a factor."""
        if self.capped_scale is not None:
            products = tanh(products * self.capped_scale, self.SOFTCAP)
        elif self.SIGN < 0:
            products = -products
        elif self.SIGN == 0:
            products = products * 0.0  # NaN and infinity become NaN, as they do in a product with the scale
        return products

    @triton.jit
    def add(self, applied, first_query, first_key, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr = False):
        """The scores, but for a factor that is positive, of what `apply` gave [BLOCK_M, BLOCK_N], or its transpose."""
        scores = applied
        if self.unit is not None:
            BLOCK_M: tl.constexpr = applied.shape[1 if TRANSPOSED else 0]
            BLOCK_N: tl.constexpr = applied.shape[0 if TRANSPOSED else 1]
            scores = applied * self.unit
            if self.alibi is not None:
                scores -= self.alibi.penalty(first_query, first_key, BLOCK_M, BLOCK_N, TRANSPOSED)
            if self.bias is not None:
                bias = self.bias.load(first_query, first_key, BLOCK_M, BLOCK_N, MASKED, TRANSPOSED)
                # It hides, whatever the product is.
                scores = tl.where(bias == MINUS_INFINITY, MINUS_INFINITY, scores + bias)
        return scores

    @triton.jit
    def gradient(self, grad_scores, applied=None):
        """The gradient of the products, but for the magnitude of the scale, from that of the scores, which is that of
        the bias too. A softcap needs what `apply` gave."""
        if self.capped_scale is not None:
            grad_scores = grad_scores * (1.0 - applied * applied)
        elif self.SIGN < 0:
            grad_scores = -grad_scores
        return grad_scores

    @triton.jit
    def tangent(self, products, applied):
        """The tangent of the scores, whole, from that of the products. That of a bias is to be added."""
        return self.gradient(products, applied) * self.magnitude


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
    # Of a scale of 0 the factor is 1, which Gluon has no other way to write without a layout.
    factor_log2 = (magnitude + 1.0 if SIGN == 0 else magnitude * LOG2E).to(ACCUMULATOR)
    return Scores(factor_log2, magnitude.to(ACCUMULATOR), None, None, None, None, SIGN, "")


@triton.jit
def scores_of_call(
    scale, softcap, BIAS, bias_strides, ALIBI_SLOPES, slopes_strides, queries, keys, SIGN: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS_ALIGN: tl.constexpr, ACCUMULATOR: tl.constexpr, group=None,
):  # fmt: skip
    """The scores of a call, of no head yet: under a scale and a softcap, float64 arguments of a kernel, with a bias and
    ALiBi unless they are None. SOFTCAP is how its tanh is taken, or empty without one. The heads of a `group`, unless
    it is None, take turns in the rows of a tile."""
    if SOFTCAP == "" and BIAS is None and ALIBI_SLOPES is None:
        return scaled_scores(scale, SIGN, ACCUMULATOR)
    else:
        whole_scale = tl.full([], scale, tl.float64)
        capped_scale = None
        unit = whole_scale
        if SOFTCAP != "":
            unit = tl.full([], softcap, tl.float64)
            capped_scale = whole_scale / unit
            if SOFTCAP == "fast":
                capped_scale = capped_scale * TWICE_LOG2E
            capped_scale = capped_scale.to(ACCUMULATOR)
        magnitude = whole_scale.to(ACCUMULATOR)
        if BIAS is None and ALIBI_SLOPES is None:
            return Scores((unit * LOG2E).to(ACCUMULATOR), magnitude, capped_scale, None, None, None, SIGN, SOFTCAP)
        else:
            factor_log2 = tl.full([], LOG2E, ACCUMULATOR)
            bias = None
            if BIAS is not None:
                batch, head, query, key = bias_strides
                bias = Bias(BIAS, batch, head, query, key, queries, keys, group, BIAS_ALIGN, ACCUMULATOR)
            alibi = None
            if ALIBI_SLOPES is not None:
                batch, head = slopes_strides
                alibi = Alibi(ALIBI_SLOPES, batch, head, keys - queries, group, ACCUMULATOR)
            return Scores(factor_log2, magnitude, capped_scale, unit.to(ACCUMULATOR), bias, alibi, SIGN, SOFTCAP)
