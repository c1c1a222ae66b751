"""Loads, stores and products of tiles whose rows are head vectors.

A head dimension that is no power of two is held as two parts, each a power of two (80 = 64 + 16), so that it does not
pay for the next power (128). A tile is therefore a tuple of one or two tensors, `[SIZE, PART0]` and `[SIZE, PART1]`;
`PART1 = 0` means that there is one part. The functions here are the only ones that know.

The last dimension of every tensor is contiguous (the launchers see to it). Positions are multiplied by strides in
int64.
"""

import triton
import triton.language as tl


@triton.jit
def _part_of_rows(pointer, stride, SIZE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers of columns `START .. START + WIDTH` of the `SIZE` rows from `pointer` on, and these columns."""
    columns = START + tl.arange(0, WIDTH)
    rows = tl.arange(0, SIZE).to(tl.int64) * stride
    return pointer + rows[:, None] + columns[None, :], columns


@triton.jit
def _load_part(
    pointer,
    stride,
    valid,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    pointers, columns = _part_of_rows(pointer, stride, SIZE, START, WIDTH)
    # A mask costs predicates in every load of the main loop: only where the part reaches past the dimension, or rows
    # do.
    if START + WIDTH > DIM:
        if MASKED:
            return tl.load(pointers, mask=valid[:, None] & (columns < DIM)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(columns < DIM)[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_rows(
    pointer,
    stride,
    valid,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PART0: tl.constexpr,
    PART1: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The `SIZE` rows from `pointer` on. Where MASKED, rows that are not `valid` [SIZE] are not read and come as 0."""
    first = _load_part(pointer, stride, valid, SIZE, DIM, 0, PART0, MASKED)
    if PART1:
        return (first, _load_part(pointer, stride, valid, SIZE, DIM, PART0, PART1, MASKED))
    else:
        return (first,)


@triton.jit
def load_block(
    SOURCE,
    batch,
    head,
    first,
    stride,
    valid,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PART0: tl.constexpr,
    PART1: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
    WITHIN: tl.constexpr,
):
    """The `SIZE` rows of a head from `first` on. Where MASKED, rows that are not `valid` [SIZE] come as 0.

    SOURCE points to the head's first row; if DESCRIPTORS, it is a descriptor of blocks of all heads, which knows the
    end of the rows, and `valid` counts only if some row WITHIN them may be hidden. Then all rows are read, and cleared.
    """
    if DESCRIPTORS:
        block = (SOURCE.load([batch, head, first, 0]).reshape([SIZE, PART0]),)
        if MASKED and WITHIN:
            block = clear_rows(block, valid)
        return block
    else:
        return load_rows(SOURCE + first.to(tl.int64) * stride, stride, valid, SIZE, DIM, PART0, PART1, MASKED)


@triton.jit
def _store_part(
    pointer,
    stride,
    tile,
    valid,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
):
    pointers, columns = _part_of_rows(pointer, stride, SIZE, START, WIDTH)
    mask = valid[:, None]
    if START + WIDTH > DIM:
        mask = mask & (columns < DIM)[None, :]
    if ADD:
        tl.atomic_add(pointers, tile.to(pointer.dtype.element_ty), mask=mask, sem="relaxed")
    else:
        tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(
    pointer,
    stride,
    tile,
    valid,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PART0: tl.constexpr,
    PART1: tl.constexpr,
    ADD: tl.constexpr = False,
):
    """Writes the `valid` [SIZE] rows of a tile from `pointer` on, in the pointer's dtype. ADD: adds them to what is
    there, element by element, in no order among programs."""
    _store_part(pointer, stride, tile[0], valid, SIZE, DIM, 0, PART0, ADD)
    if PART1:
        _store_part(pointer, stride, tile[1], valid, SIZE, DIM, PART0, PART1, ADD)


@triton.jit
def zeros(SIZE: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr, DTYPE: tl.constexpr):
    """An accumulator of `SIZE` rows."""
    if PART1:
        return (tl.zeros([SIZE, PART0], DTYPE), tl.zeros([SIZE, PART1], DTYPE))
    else:
        return (tl.zeros([SIZE, PART0], DTYPE),)


@triton.jit
def negate(tile):
    if len(tile) == 2:
        return (-tile[0], -tile[1])
    else:
        return (-tile[0],)


@triton.jit
def scale_rows(tile, factor):
    """Each row times its `factor` [SIZE]."""
    if len(tile) == 2:
        return (tile[0] * factor[:, None], tile[1] * factor[:, None])
    else:
        return (tile[0] * factor[:, None],)


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
def inner_products(a, b, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """Every row of `a` with every row of `b`: [SIZE_A, SIZE_B]."""
    products = tl.dot(a[0], b[0].T, input_precision=PRECISION, out_dtype=DTYPE)
    if len(a) == 2:
        products = tl.dot(a[1], b[1].T, products, input_precision=PRECISION, out_dtype=DTYPE)
    return products


@triton.jit
def accumulate(total, weights, rows, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """`total + weights @ rows`, weights [SIZE_A, SIZE_B] already in the rows' dtype."""
    first = tl.dot(weights, rows[0], total[0], input_precision=PRECISION, out_dtype=DTYPE)
    if len(total) == 2:
        return (first, tl.dot(weights, rows[1], total[1], input_precision=PRECISION, out_dtype=DTYPE))
    else:
        return (first,)
