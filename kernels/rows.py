"""Rows in memory: head vectors of q, k, v, out and their gradients, by pointer or by descriptor.

A head dimension that is no power of two is held as two parts, each a power of two (80 = 64 + 16), so that it does not
pay for the next power (128). What is loaded is therefore a tuple of one or two tensors, `[SIZE, PART0]` and
`[SIZE, PART1]` (tiles.py computes with them); `PART1 = 0` means that there is one part.

The last dimension of every tensor is contiguous (the launchers see to it). Positions are multiplied by strides in
int64.
"""

import triton
import triton.language as tl

from flash_attend.kernels.compat import aggregate
from flash_attend.kernels.tiles import clear_rows


@aggregate
class Rows:
    """The rows of one head, vectors of DIM numbers.

    `source` points to the first one; if DESCRIPTOR, it is a descriptor of blocks of all heads, which knows where the
    rows end. `stride` is from row to row, in elements. Where there is a `group` of so many heads, `stride_head` apart,
    they take turns: row `r` is the row `r // group` of their `r % group`-th. A descriptor counts them from `first_row`
    on, unless None.
    """

    source: object
    stride: object
    batch: tl.tensor
    head: tl.tensor
    DIM: tl.constexpr
    PART0: tl.constexpr
    PART1: tl.constexpr
    DESCRIPTOR: tl.constexpr
    stride_head: object
    group: object
    first_row: object

    @triton.jit
    def load(self, first, valid, SIZE: tl.constexpr, MASKED: tl.constexpr, WITHIN: tl.constexpr = True):
        """The `SIZE` rows from `first` on. Where MASKED, rows that are not `valid` [SIZE] are not read and come as 0.

        Through a descriptor, `valid` counts only if some row WITHIN the head may be hidden. Then all rows are read, and
        cleared.
        """
        if self.DESCRIPTOR:
            at = first if self.first_row is None else self.first_row + first
            tile = (self.source.load([self.batch, self.head, at, 0]).reshape([SIZE, self.PART0]),)
            if MASKED and WITHIN:
                tile = clear_rows(tile, valid)
            return tile
        else:
            part0 = self._load_part(first, valid, SIZE, 0, self.PART0, MASKED)
            if self.PART1:
                return (part0, self._load_part(first, valid, SIZE, self.PART0, self.PART1, MASKED))
            else:
                return (part0,)

    @triton.jit
    def store(self, first, tile, valid, SIZE: tl.constexpr, ADD: tl.constexpr = False):
        """Writes the `valid` [SIZE] rows of a tile from `first` on, in the dtype there. ADD: adds them to what is
        there, element by element, in no order among programs."""
        self._store_part(first, tile[0], valid, SIZE, 0, self.PART0, ADD)
        if self.PART1:
            self._store_part(first, tile[1], valid, SIZE, self.PART0, self.PART1, ADD)

    @triton.jit
    def _part(self, first, SIZE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
        """Pointers to columns `START .. START + WIDTH` of the `SIZE` rows from `first` on, and these columns."""
        columns = START + tl.arange(0, WIDTH)
        if self.group is None:
            rows = tl.arange(0, SIZE).to(tl.int64) * self.stride
            return self.source + first.to(tl.int64) * self.stride + rows[:, None] + columns[None, :], columns
        else:
            row = first + tl.arange(0, SIZE)
            in_head = (row // self.group).to(tl.int64) * self.stride
            rows = in_head + (row % self.group).to(tl.int64) * self.stride_head
            return self.source + rows[:, None] + columns[None, :], columns

    @triton.jit
    def _load_part(
        self, first, valid, SIZE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
    ):
        pointers, columns = self._part(first, SIZE, START, WIDTH)
        # A mask costs predicates in every load of the main loop: only where the part reaches past the dimension, or
        # rows do.
        if START + WIDTH > self.DIM:
            if MASKED:
                return tl.load(pointers, mask=valid[:, None] & (columns < self.DIM)[None, :], other=0.0)
            else:
                return tl.load(pointers, mask=(columns < self.DIM)[None, :], other=0.0)
        elif MASKED:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        else:
            return tl.load(pointers)

    @triton.jit
    def _store_part(
        self, first, part, valid, SIZE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr
    ):
        pointers, columns = self._part(first, SIZE, START, WIDTH)
        mask = valid[:, None]
        if START + WIDTH > self.DIM:
            mask = mask & (columns < self.DIM)[None, :]
        part = part.to(self.source.dtype.element_ty)
        if ADD:
            tl.atomic_add(pointers, part, mask=mask, sem="relaxed")
        else:
            tl.store(pointers, part, mask=mask)


@aggregate
class Heads:
    """A tensor (b, h, n, DIM), or a descriptor of it: the rows of every head. Strides come in units of ALIGN elements,
    which tells the compiler how far loads may go together."""

    source: object
    stride_batch: tl.tensor
    stride_head: tl.tensor
    stride_row: tl.tensor
    ALIGN: tl.constexpr
    DIM: tl.constexpr
    PART0: tl.constexpr
    PART1: tl.constexpr
    DESCRIPTOR: tl.constexpr

    @triton.jit
    def rows(self, batch, head, group=None, first_row=None):
        """The rows of a head from the first on, unless None, or of a `group` of so many heads from that one on."""
        source = self.source
        stride = self.stride_row * self.ALIGN
        if not self.DESCRIPTOR:
            # One sum: of two, the compiler would take the second into every loop.
            batch64 = batch.to(tl.int64) * self.ALIGN
            head64 = head.to(tl.int64) * self.ALIGN
            offset = batch64 * self.stride_batch + head64 * self.stride_head
            if first_row is not None:
                offset += first_row.to(tl.int64) * stride
            source += offset
        stride_head = None if group is None else self.stride_head * self.ALIGN
        return Rows(
            source, stride, batch, head, self.DIM, self.PART0, self.PART1, self.DESCRIPTOR, stride_head, group,
            first_row,
        )  # fmt: skip
