"""Arithmetic on tiles whose rows are head vectors.

A tile is a tuple of one tensor `[SIZE, PART0]` or two, `[SIZE, PART0]` and `[SIZE, PART1]`: the parts of a head
dimension (see rows.py). The functions here are the only ones that know.

Products in TF32 take float32 registers and cut 13 bits of them off. All operands are therefore rounded to nearest: rows
as they are loaded, weights before their product.
"""

import triton
import triton.language as tl

from flash_attend.kernels.compat import BULK_COPIES_ROUND, INTERPRETED, aggregate

ROUNDED_HERE = tl.constexpr(not BULK_COPIES_ROUND)  # what comes through descriptors
CUTS_OFF = tl.constexpr(not INTERPRETED)  # products of the interpreter take all bits
SIGN_AND_EXPONENT = tl.constexpr(-0x800000)  # of the bits of a float32
TF32_BITS = tl.constexpr(-0x2000)
HALF_A_UNIT = tl.constexpr(2.0**-11)  # in the last place of a TF32 number between 1 and 2


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
def added(a, b):
    """The sum of two tiles of as many rows, or of one."""
    if len(a) == 2:
        return (a[0] + b[0], a[1] + b[1])
    else:
        return (a[0] + b[0],)


@triton.jit
def weighted_sum(tile, weights):
    """The sum of the rows of a tile, each times its weight [SIZE], as a tile of one row."""
    first = tl.sum(tile[0] * weights[:, None], 0)[None, :]
    if len(tile) == 2:
        return (first, tl.sum(tile[1] * weights[:, None], 0)[None, :])
    else:
        return (first,)


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


@triton.jit
def rounded_to_tf32(x):
    """float32 numbers whose upper 19 bits are the nearest TF32 number, ties away from 0; the rest may be anything.

    As `cvt.rna.tf32.f32` does, in 2 instructions instead of 3. Half a unit is added as a float, because in integers a
    NaN whose bits are all ones would become 0.
    """
    power = (x.to(tl.int32, bitcast=True) & SIGN_AND_EXPONENT).to(tl.float32, bitcast=True)
    x = tl.fma(power, HALF_A_UNIT, x)
    if not CUTS_OFF:
        x = (x.to(tl.int32, bitcast=True) & TF32_BITS).to(tl.float32, bitcast=True)
    return x


@aggregate
class Tile:
    """What is fixed about a kernel's tiles when it is compiled: their sizes, and how products are computed."""

    BLOCK_M: tl.constexpr  # queries
    BLOCK_N: tl.constexpr  # keys
    PRECISION: tl.constexpr
    ACCUMULATOR: tl.constexpr

    @triton.jit
    def load(self, rows, first, valid, SIZE: tl.constexpr, MASKED: tl.constexpr, WITHIN: tl.constexpr = True):
        """What `rows.load` gives, as operands of products."""
        loaded = rows.load(first, valid, SIZE, MASKED, WITHIN)
        if self.PRECISION == "tf32" and (ROUNDED_HERE or not rows.DESCRIPTOR):
            if len(loaded) == 2:
                loaded = (rounded_to_tf32(loaded[0]), rounded_to_tf32(loaded[1]))
            else:
                loaded = (rounded_to_tf32(loaded[0]),)
        return loaded

    @triton.jit
    def inner_products(self, a, b, products=None):
        """Every row of `a` with every row of `b`: [SIZE_A, SIZE_B]. Added to other `products`, unless None."""
        products = tl.dot(a[0], b[0].T, products, input_precision=self.PRECISION, out_dtype=self.ACCUMULATOR)
        if len(a) == 2:
            products = tl.dot(a[1], b[1].T, products, input_precision=self.PRECISION, out_dtype=self.ACCUMULATOR)
        return products

    @triton.jit
    def accumulate(self, total, weights, rows):
        """`total + weights @ rows`, weights [SIZE_A, SIZE_B] in the rows' dtype."""
        weights = weights.to(rows[0].dtype)
        if self.PRECISION == "tf32":
            weights = rounded_to_tf32(weights)
        first = tl.dot(weights, rows[0], total[0], input_precision=self.PRECISION, out_dtype=self.ACCUMULATOR)
        if len(total) == 2:
            second = tl.dot(weights, rows[1], total[1], input_precision=self.PRECISION, out_dtype=self.ACCUMULATOR)
            return (first, second)
        else:
            return (first,)
