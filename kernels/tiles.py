"""Arithmetic on tiles whose rows are head vectors.

A tile is a tuple of one tensor `[SIZE, PART0]` or two, `[SIZE, PART0]` and `[SIZE, PART1]`: the parts of a head
dimension (see rows.py). The functions here are the only ones that know.
"""

import triton
import triton.language as tl

from flash_attend.kernels.compat import aggregate


@triton.jit
def zeros(SIZE: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr, DTYPE: tl.constexpr):
    """An accumulator of `SIZE` rows."""
    if PART1:
        return (tl.zeros([SIZE, PART0], DTYPE), tl.zeros([SIZE, PART1], DTYPE))
    else:
        return (tl.zeros([SIZE, PART0], DTYPE),)


@triton.jit
def scaled(tile, factor):
    """A tile times a factor, which broadcasts to it."""
    if len(tile) == 2:
        return (tile[0] * factor, tile[1] * factor)
    else:
        return (tile[0] * factor,)


@triton.jit
def clear_rows(tile, kept):
    """Rows that are not `kept` [SIZE] become 0, whatever they held."""
    if len(tile) == 2:
        return (tl.where(kept[:, None], tile[0], 0.0), tl.where(kept[:, None], tile[1], 0.0))
    else:
        return (tl.where(kept[:, None], tile[0], 0.0),)


@triton.jit
def row_products(a, b, DTYPE: tl.constexpr):
    """The inner product of each row of `a` with the same row of `b`: [SIZE]."""
    total = tl.sum(a[0].to(DTYPE) * b[0].to(DTYPE), 1)
    if len(a) == 2:
        total += tl.sum(a[1].to(DTYPE) * b[1].to(DTYPE), 1)
    return total


@aggregate
class Tile:
    """What is fixed about a kernel's tiles when it is compiled: their sizes, and how products are computed."""

    BLOCK_M: tl.constexpr  # queries
    BLOCK_N: tl.constexpr  # keys
    PRECISION: tl.constexpr
    ACCUMULATOR: tl.constexpr

    @triton.jit
    def inner_products(self, a, b):
        """Every row of `a` with every row of `b`: [SIZE_A, SIZE_B]."""
        products = tl.dot(a[0], b[0].T, input_precision=self.PRECISION, out_dtype=self.ACCUMULATOR)
        if len(a) == 2:
            products = tl.dot(a[1], b[1].T, products, input_precision=self.PRECISION, out_dtype=self.ACCUMULATOR)
        return products

    @triton.jit
    def accumulate(self, total, weights, rows):
        """`total + weights @ rows`, weights [SIZE_A, SIZE_B] in the rows' dtype."""
        weights = weights.to(rows[0].dtype)
        first = tl.dot(weights, rows[0], total[0], input_precision=self.PRECISION, out_dtype=self.ACCUMULATOR)
        if len(total) == 2:
            second = tl.dot(weights, rows[1], total[1], input_precision=self.PRECISION, out_dtype=self.ACCUMULATOR)
            return (first, second)
        else:
            return (first,)
