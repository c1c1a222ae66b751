"""Masks turned into work: which blocks are empty, partial or full, found on the device with no host sync.

A mask is planes of pairs, one for each batch entry and head whose masks differ. A line of `lists` describes one line of
a plane's blocks: the key blocks of a key mask, the key blocks that one block of queries of a dense mask sees, or the
query blocks that see one of its key blocks. Full blocks come as runs `[start, end)`, because a loop over a run is
pipelined like a loop without a mask; partial blocks come as a list, with every block's rank in it, so that the list can
be cut at the diagonal. A line holds, as int32:

    [0] number of runs   [1] first block that is not empty   [2] one past the last such block   [3] number of partial
    blocks then the runs, 2 * n_blocks;   the partial blocks, n_blocks;   the ranks, n_blocks + 1

The forward builds it once and the backward reuses it. A kernel's blocks may be smaller than the schedule's: `RATIO`
of them make one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from flash_attend.kernels.compat import aggregate, kernel
from flash_attend.kernels.configs import Tiles
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.operands import all_edges, as_bytes, contiguous_strides, window_numbers
from flash_attend.kernels.softmax import NEGATIVE_INFINITY
from flash_attend.operands import Operands, Strides, broadcast_strides
from flash_attend.spec import CALLS_KEPT, AttentionSpec, MaskKind

__all__ = ["Schedule", "build_schedule", "empty_packed", "plan_schedule", "schedule_layout", "transposed_lists"]

BITS_PER_WORD = tl.constexpr(32)
HEADER = tl.constexpr(4)
EMPTY = tl.constexpr(0)
PARTIAL = tl.constexpr(1)
FULL = tl.constexpr(2)
SPARE = (0, 0, 1)  # columns that a packed schedule has beyond its own: of states there may be a single one
BLOCKS_PER_STEP = 16  # blocks that one step of a scan takes
BIAS_BLOCK = 32, 64  # rows and keys of a bias that a program looks at together


class Schedule(NamedTuple):
    """What the kernels read of a mask: all None without one. int32, but for `visible` next to float64: int64."""

    # KEY: (planes, key_blocks * block); DENSE: (planes, query_blocks * block, words of 32 bits)
    visible: Tensor | None = None
    lists: Tensor | None = None  # KEY: (planes, length) int32; DENSE: (planes, query_blocks, length)
    states: Tensor | None = None  # DENSE: (planes, query_blocks, key_blocks) int32, of EMPTY, PARTIAL, FULL

    @property
    def planes(self) -> int:
        """How many planes the mask has; 0 without one."""
        return 0 if self.visible is None else self.visible.shape[0]

    def packed(self) -> list[Tensor]:
        """The tensors as operators hand them over: `(planes, n)` with `n > 1`.

        A compiler makes a graph of its own of every size that is 1, and so of short sequences, which are one block.
        """
        present = ((tensor, spare) for tensor, spare in zip(self, SPARE, strict=True) if tensor is not None)
        return [pad(tensor.flatten(1), (0, spare)) for tensor, spare in present]

    @staticmethod
    def unpacked(packed: Sequence[Tensor], operands: Operands, spec: AttentionSpec, tiles: Tiles) -> Schedule:
        """The schedule again, whatever became of its strides."""
        shapes = [shape for shape, _ in layout_of(operands.mask, spec, tiles)]
        pairs = zip(packed, shapes, strict=True)
        return Schedule(*(x.contiguous().narrow(1, 0, prod(shape[1:])).reshape(shape) for x, shape in pairs))

    def contiguous(self) -> Schedule:
        """The same as kernels read it, whatever its strides have become."""
        if self.visible is None:
            return self
        return Schedule(*[None if tensor is None else tensor.contiguous() for tensor in self])


# ---------------------------------------------------------------------------------------------------------------------
# Reading a schedule, on the device
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def line_length(n_blocks):
    """How many numbers a line of so many blocks takes: a header, runs, partial blocks, ranks. `line_length.fn` is for
    the host."""
    return 4 * n_blocks + 5


@triton.jit
def line_of(lists, index, n_blocks):
    """Where a line begins in `lists`."""
    return lists + index.to(tl.int64) * line_length(n_blocks)


@aggregate
class Planes:
    """A `Schedule` as kernels read it: a plane of it for each batch entry and head whose masks differ.

    `visible` and `lists` are pointers, which nothing reads without a mask. The strides say how many planes lie between
    two batch entries and between two heads.
    """

    visible: object
    lists: object
    stride_batch: tl.tensor
    stride_head: tl.tensor
    n_query_blocks: object
    n_key_blocks: tl.tensor
    BLOCK_M: tl.constexpr  # queries of a block
    BLOCK_N: tl.constexpr  # keys of a block

    @triton.jit
    def index(self, batch, head):
        """Which plane is a head's."""
        return (batch * self.stride_batch + head * self.stride_head).to(tl.int64)

    @triton.jit
    def words_per_query(self):
        """How many words hold the pairs of one query of a dense mask."""
        return self.n_key_blocks * (self.BLOCK_N // BITS_PER_WORD)

    @triton.jit
    def pairs(self, plane):
        """Where the words of a plane of a dense mask begin."""
        return self.visible + plane * self.n_query_blocks * self.BLOCK_M * self.words_per_query()

    @triton.jit
    def keys(self, plane):
        """Where the visibility of keys begins in a plane of a key mask."""
        return self.visible + plane * self.n_key_blocks * self.BLOCK_N

    @triton.jit
    def line_of_keys(self, plane):
        """The line of key blocks of a key mask."""
        return line_of(self.lists, plane, self.n_key_blocks)

    @triton.jit
    def line_of_queries(self, plane, first_query):
        """The line of key blocks that the block of a query sees, of a dense mask."""
        return line_of(self.lists, plane * self.n_query_blocks + first_query // self.BLOCK_M, self.n_key_blocks)

    @triton.jit
    def line_of_key_block(self, plane, first_key):
        """The line of query blocks that see the block of a key, of a dense mask whose lists are transposed."""
        return line_of(self.lists, plane * self.n_key_blocks + first_key // self.BLOCK_N, self.n_query_blocks)


@aggregate
class Walk:
    """The blocks that a tile visits: the full ones, run after run, within `[full_begin, full_end)`, and those that need
    masking: the listed ones, those of `[begin, full_begin)` and those of `[tail_begin, end)`.

    If LISTED, `line` says where the runs are, and which blocks are partial, from the one numbered `first_partial` on;
    else all within the bounds is one run. RATIO blocks make one of the schedule.
    """

    line: object
    n_blocks: object  # of the schedule, in the line
    n_runs: object
    n_partial: object
    first_partial: object  # None for 0, in a walk from the line's beginning on
    begin: object
    full_begin: object
    full_end: tl.tensor
    tail_begin: tl.tensor
    end: tl.tensor
    RATIO: tl.constexpr
    LISTED: tl.constexpr

    @triton.jit
    def run_count(self):
        """How many runs of full blocks there are."""
        return self.n_runs

    @triton.jit
    def run_bounds(self, run):
        """The blocks `[start, end)` of a run of full blocks."""
        start = self.full_begin
        end = self.full_end
        if self.LISTED:
            start = tl.load(self.line + HEADER + 2 * run) * self.RATIO
            if self.first_partial is not None:
                start = tl.maximum(start, self.full_begin)
            end = tl.minimum(tl.load(self.line + HEADER + 2 * run + 1) * self.RATIO, end)
        return start, end

    @triton.jit
    def masked_count(self):
        """How many blocks need masking."""
        return self.n_partial + (self.full_begin - self.begin) + (self.end - self.tail_begin)

    @triton.jit
    def masked_block(self, index):
        """The `index`-th block that needs masking."""
        edge = index - self.n_partial
        front = self.full_begin - self.begin
        block = tl.where(edge < front, self.begin + edge, self.tail_begin + edge - front)
        if self.LISTED:
            at = self.line + HEADER + 2 * self.n_blocks + index // self.RATIO
            if self.first_partial is not None:
                at += self.first_partial
            listed = tl.load(at, mask=edge < 0, other=0)
            block = tl.where(edge < 0, listed * self.RATIO + index % self.RATIO, block)
        return block


@triton.jit
def bounded_walk(begin, full_begin, full_end, end):
    """The walk over the blocks `[begin, end)`, of which `[full_begin, full_end)` are full."""
    return Walk(0, 0, 1, 0, None, begin, full_begin, full_end, full_end, end, RATIO=1, LISTED=False)


@triton.jit
def listed_walk(line, n_blocks, RATIO: tl.constexpr):
    """The walk over a whole line, which knows causality and the ends of the sequences already."""
    last = n_blocks * RATIO
    partial = tl.load(line + 3) * RATIO
    return Walk(line, n_blocks, tl.load(line), partial, None, 0, 0, last, last, last, RATIO, LISTED=True)


@triton.jit
def cut_walk(line, n_blocks, full_end, end, RATIO: tl.constexpr):
    """The walk over a line as far as `end`, in which blocks from `full_end` on are not full, whatever the line says."""
    end = tl.minimum(end, tl.load(line + 2) * RATIO)
    full_end = tl.minimum(full_end, end) // RATIO * RATIO
    tail_begin = tl.minimum(tl.maximum(full_end, tl.load(line + 1) * RATIO), end)
    partial = tl.load(line + HEADER + 3 * n_blocks + full_end // RATIO) * RATIO
    return Walk(line, n_blocks, tl.load(line), partial, None, 0, 0, full_end, tail_begin, end, RATIO, LISTED=True)


@triton.jit
def band_walk(line, n_blocks, begin, full_begin, full_end, end, RATIO: tl.constexpr):
    """The walk over the blocks `[begin, end)` of a line, in which those outside of `[full_begin, full_end)` are not
    full, whatever the line says."""
    first = tl.load(line + 1) * RATIO
    end = tl.minimum(end, tl.load(line + 2) * RATIO)
    full_begin = tl.minimum(tl.cdiv(full_begin, RATIO) * RATIO, end)
    full_end = tl.maximum(tl.minimum(full_end, end) // RATIO * RATIO, full_begin)
    begin = tl.minimum(tl.maximum(begin, first), full_begin)
    tail_begin = tl.minimum(tl.maximum(full_end, first), end)
    ranks = line + HEADER + 3 * n_blocks
    first_partial = tl.load(ranks + full_begin // RATIO)
    partial = (tl.load(ranks + full_end // RATIO) - first_partial) * RATIO
    return Walk(
        line, n_blocks, tl.load(line), partial, first_partial, begin, full_begin, full_end, tail_begin, end, RATIO,
        LISTED=True,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _append(line, n_blocks, block, state, before, after, totals):
    """Takes the next step of blocks, with their states [STEP] and their neighbours', into a line.

    `totals` = (runs begun, runs ended, partial blocks, first, one past the last block that is not empty), so far.
    """
    runs, ended, partials, first, last = totals
    starts_run = ((state == FULL) & (before != FULL)).to(tl.int32)
    ends_run = ((state == FULL) & (after != FULL)).to(tl.int32)
    partial = (state == PARTIAL).to(tl.int32)
    run = line + HEADER
    tl.store(run + 2 * (runs + tl.cumsum(starts_run, 0) - 1), block, mask=starts_run != 0)
    tl.store(run + 2 * (ended + tl.cumsum(ends_run, 0) - 1) + 1, block + 1, mask=ends_run != 0)
    rank = partials + tl.cumsum(partial, 0)
    tl.store(run + 2 * n_blocks + rank - 1, block, mask=partial != 0)
    tl.store(run + 3 * n_blocks + block, rank - partial, mask=block < n_blocks)
    shown = state != EMPTY
    first = tl.minimum(first, tl.min(tl.where(shown, block, n_blocks), 0))
    last = tl.maximum(last, tl.max(tl.where(shown, block + 1, 0), 0))
    return (runs + tl.sum(starts_run, 0), ended + tl.sum(ends_run, 0), partials + tl.sum(partial, 0), first, last)


@triton.jit
def _close(line, n_blocks, totals):
    runs, _, partials, first, last = totals
    tl.store(line, runs)
    tl.store(line + 1, first)
    tl.store(line + 2, last)
    tl.store(line + 3, partials)
    tl.store(line + HEADER + 4 * n_blocks, partials)


@triton.jit
def _key_step(mask, first_block, stride_key, keys, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Which keys of `STEP` blocks are visible [STEP, BLOCK], and the blocks' states [STEP]."""
    key = (first_block + tl.arange(0, STEP))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    shown = tl.load(mask + key.to(tl.int64) * stride_key, mask=(key >= 0) & (key < keys), other=0) != 0
    shown = shown.to(tl.int32)
    count = tl.sum(shown, 1)
    return shown, tl.where(count == 0, EMPTY, tl.where(count == BLOCK, FULL, PARTIAL))


@kernel
def key_schedule_kernel(
    MASK_POINTER,
    VISIBLE,
    LISTS,
    keys: tl.int32,
    n_blocks: tl.int32,
    mask_heads: tl.int32,
    stride_batch: tl.int64,
    stride_head: tl.int64,
    stride_key: tl.int64,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each plane of a key mask: its visibility as int32, and its line."""
    plane = tl.program_id(0).to(tl.int64)
    mask = MASK_POINTER + plane // mask_heads * stride_batch + plane % mask_heads * stride_head
    visible = VISIBLE + plane * n_blocks * BLOCK
    line = line_of(LISTS, plane, n_blocks)
    totals = (0, 0, 0, n_blocks, 0)
    for first_block in tl.range(0, n_blocks, STEP):
        shown, state = _key_step(mask, first_block, stride_key, keys, STEP, BLOCK)
        _, before = _key_step(mask, first_block - 1, stride_key, keys, STEP, BLOCK)
        _, after = _key_step(mask, first_block + 1, stride_key, keys, STEP, BLOCK)
        block = first_block + tl.arange(0, STEP)
        key = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(visible + key, shown, mask=(block < n_blocks)[:, None])
        totals = _append(line, n_blocks, block, state, before, after, totals)
    _close(line, n_blocks, totals)


@triton.jit
def _within(
    query, key, queries, keys, window_left, window_right, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):  # fmt: skip
    """Pairs [M, N] that exist, and that causality and the window let meet."""
    within = (query < queries)[:, None] & (key < keys)[None, :]
    if CAUSAL:
        within = within & (key[None, :] <= query[:, None] + (keys - queries))
    if RIGHT:
        within = within & (key[None, :] <= query[:, None] + (keys - queries + window_right))
    if LEFT:
        within = within & (key[None, :] >= query[:, None] + (keys - queries - window_left))
    return within


@triton.jit
def _unhidden(BIAS, pairs, query, key, stride_query, stride_key):
    """Those of some pairs [M, N] that a bias does not hide: what it holds of others is not read."""
    offsets = query.to(tl.int64)[:, None] * stride_query + key.to(tl.int64)[None, :] * stride_key
    return pairs & (tl.load(BIAS + offsets, mask=pairs, other=0.0) != NEGATIVE_INFINITY)


@kernel
def shown_keys_kernel(
    BIAS,
    MASK_POINTER,
    SHOWN,
    queries: tl.int32,
    keys: tl.int32,
    rows: tl.int32,
    plane_heads: tl.int32,
    mask_batch: tl.int64,
    mask_head: tl.int64,
    mask_key: tl.int64,
    bias_batch: tl.int64,
    bias_head: tl.int64,
    bias_query: tl.int64,
    bias_key: tl.int64,
    window_left: tl.int32,
    window_right: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """One program for each block of keys of a plane: SHOWN (planes, keys) says which of them a mask of keys shows, if
    there is one, and a bias does not hide from all of so many rows: the queries, or one that stands for all of them."""
    key_blocks = tl.cdiv(keys, BLOCK_N)
    plane = (tl.program_id(0) // key_blocks).to(tl.int64)
    key = tl.program_id(0) % key_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = plane // plane_heads
    head = plane % plane_heads
    bias = BIAS + (batch * bias_batch + head * bias_head)
    found = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for first_row in tl.range(0, rows, BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        pairs = (row < rows)[:, None] & (key < keys)[None, :]
        pairs = pairs & _within(row, key, queries, keys, window_left, window_right, CAUSAL, LEFT, RIGHT)
        found = tl.maximum(found, _unhidden(bias, pairs, row, key, bias_query, bias_key).to(tl.int32))
    shown = tl.max(found, 0) != 0
    if MASK_POINTER is not None:
        at = MASK_POINTER + (batch * mask_batch + head * mask_head) + key.to(tl.int64) * mask_key
        shown = tl.load(at, mask=shown, other=0) != 0
    tl.store(SHOWN + plane * keys + key, shown.to(tl.uint8), mask=key < keys)


@kernel
def dense_schedule_kernel(
    MASK_POINTER,
    VISIBLE,
    STATES,
    BIAS,
    queries: tl.int32,
    keys: tl.int32,
    n_query_blocks: tl.int32,
    n_key_blocks: tl.int32,
    mask_heads: tl.int32,
    stride_batch: tl.int64,
    stride_head: tl.int64,
    stride_query: tl.int64,
    stride_key: tl.int64,
    window_left: tl.int32,
    window_right: tl.int32,
    bias_batch: tl.int64,
    bias_head: tl.int64,
    bias_query: tl.int64,
    bias_key: tl.int64,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """One program for each tile of a dense mask: reads it once, through its strides, and writes one bit a pair, with
    causality, the window, bounds and what a bias hides folded in, and the tile's state."""
    tile = tl.program_id(0).to(tl.int64)
    key_block = (tile % n_key_blocks).to(tl.int32)
    query_block = (tile // n_key_blocks % n_query_blocks).to(tl.int32)
    plane = tile // n_key_blocks // n_query_blocks
    query = query_block * BLOCK_M + tl.arange(0, BLOCK_M)
    key = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = _within(query, key, queries, keys, window_left, window_right, CAUSAL, LEFT, RIGHT)
    if BIAS is not None:
        bias = BIAS + plane // mask_heads * bias_batch + plane % mask_heads * bias_head
        exists = _unhidden(bias, exists, query, key, bias_query, bias_key)
    mask = MASK_POINTER + plane // mask_heads * stride_batch + plane % mask_heads * stride_head
    offsets = query.to(tl.int64)[:, None] * stride_query + key.to(tl.int64)[None, :] * stride_key
    shown = (tl.load(mask + offsets, mask=exists, other=0) != 0).to(tl.int32)
    count = tl.sum(shown)
    # A tile that reaches past the end is partial: the backward must not read the rows that are missing.
    full = count == BLOCK_M * BLOCK_N
    tl.store(STATES + tile, tl.where(full, FULL, tl.where(count == 0, EMPTY, PARTIAL)))

    WORDS: tl.constexpr = BLOCK_N // BITS_PER_WORD
    bits = tl.reshape(shown, [BLOCK_M, WORDS, BITS_PER_WORD]) << tl.arange(0, BITS_PER_WORD)[None, None, :]
    words = tl.sum(bits, 2)
    padded_query = (plane * n_query_blocks + query_block) * BLOCK_M + tl.arange(0, BLOCK_M)
    word = key_block * WORDS + tl.arange(0, WORDS)
    tl.store(VISIBLE + padded_query[:, None] * (n_key_blocks * WORDS) + word[None, :], words)


@kernel
def line_kernel(
    STATES,
    LISTS,
    n_lines: tl.int32,
    n_blocks: tl.int32,
    stride_plane: tl.int64,
    stride_line: tl.int64,
    stride_block: tl.int64,
    STEP: tl.constexpr,
):
    """One program for each line of tile states, (planes, n_lines, n_blocks) through its strides."""
    index = tl.program_id(0).to(tl.int64)
    states = STATES + index // n_lines * stride_plane + index % n_lines * stride_line
    line = line_of(LISTS, index, n_blocks)
    totals = (0, 0, 0, n_blocks, 0)
    for first_block in tl.range(0, n_blocks, STEP):
        block = first_block + tl.arange(0, STEP)
        at = states + block.to(tl.int64) * stride_block
        state = tl.load(at, mask=block < n_blocks, other=0)
        before = tl.load(at - stride_block, mask=(block > 0) & (block <= n_blocks), other=0)
        after = tl.load(at + stride_block, mask=block + 1 < n_blocks, other=0)
        totals = _append(line, n_blocks, block, state, before, after, totals)
    _close(line, n_blocks, totals)


Shapes = list[tuple[tuple[int, ...], torch.dtype]]


def schedule_layout(sizes: Sequence[int], spec: AttentionSpec, tiles: Tiles) -> Shapes:
    """Shape and dtype of each tensor in the schedule of a mask `(b|1, h|1, i|1, j)`, in the order of `Schedule`."""
    planes = sizes[0] * sizes[1]
    block_m, block_n = block = tiles.schedule_block
    n_query_blocks, n_key_blocks = block_counts(spec, block)
    length = line_length.fn(n_key_blocks)
    # Next to a float64 product's operand, a load of anything narrower makes the compiler fail.
    word = torch.int64 if spec.dtype == torch.float64 else torch.int32
    if spec.mask == MaskKind.KEY:
        return [((planes, n_key_blocks * block_n), word), ((planes, length), torch.int32)]
    words = n_key_blocks * (block_n // BITS_PER_WORD.value)
    return [
        ((planes, n_query_blocks * block_m, words), word),
        ((planes, n_query_blocks, length), torch.int32),
        ((planes, n_query_blocks, n_key_blocks), torch.int32),
    ]


def layout_of(mask: Tensor | None, spec: AttentionSpec, tiles: Tiles) -> Shapes:
    """The same of the schedule of a call, which has none without a mask or a bias."""
    sizes = scheduled_sizes(None if mask is None else mask.shape, spec)
    return [] if sizes is None else schedule_layout(sizes, scheduled_spec(spec), tiles)


def scheduled_spec(spec: AttentionSpec) -> AttentionSpec:
    """A call as its schedule is built and kernels see it, in which a bias is a part of the mask: keys that it hides
    from every query may hold anything. A dense mask hides what it hides pair by pair; else there is a mask of keys."""
    if spec.bias is None:
        return spec
    mask = MaskKind.DENSE if spec.mask == MaskKind.DENSE else MaskKind.KEY
    return replace(spec, mask=mask, mask_per_head=spec.mask_per_head or spec.bias.heads)


def scheduled_sizes(sizes: Sequence[int] | None, spec: AttentionSpec) -> Sequence[int] | None:
    """The sizes of the mask of `scheduled_spec`, from those of the mask that was given."""
    if spec.bias is None:
        return sizes
    per_batch = spec.bias.batch or (sizes is not None and bool(sizes[0] > 1))
    per_head = spec.mask_per_head or spec.bias.heads
    rows = spec.queries if spec.mask == MaskKind.DENSE else 1
    return (spec.batch if per_batch else 1, spec.heads if per_head else 1, rows, spec.keys)


def block_counts(spec: AttentionSpec, block: tuple[int, int]) -> tuple[int, int]:
    """How many such blocks of queries and of keys a schedule has."""
    block_m, block_n = block
    # At every call with a mask, where `triton.cdiv` takes a microsecond.
    return -(-spec.queries // block_m), -(-spec.keys // block_n)


def empty_packed(operands: Operands, spec: AttentionSpec, tiles: Tiles) -> list[Tensor]:
    """What `Schedule.packed` gives, uninitialised."""
    layout = zip(layout_of(operands.mask, spec, tiles), SPARE, strict=False)
    return [operands.q.new_empty(shape[0], prod(shape[1:]) + spare, dtype=dtype) for (shape, dtype), spare in layout]


def build_schedule(mask: Tensor | None, spec: AttentionSpec, tiles: Tiles, bias: Tensor | None = None) -> Schedule:
    """The schedule of a mask `(b|1, h|1, i|1, j)` and a bias `(b|1, h|1, i|1, j|1)`, in blocks that fit all three
    kernels."""
    of_mask = (None, None) if mask is None else (mask.shape, mask.stride())
    of_bias = None if bias is None else broadcast_strides(bias.shape, bias.stride())
    return plan_schedule(spec, tiles, *of_mask, of_bias)(mask, bias)


@lru_cache(maxsize=CALLS_KEPT)
def plan_schedule(
    spec: AttentionSpec,
    tiles: Tiles,
    sizes: tuple[int, ...] | None,
    strides: Strides | None,
    bias: Strides | None = None,
) -> Callable[[Tensor | None, Tensor | None], Schedule]:
    """The schedule of all masks with these sizes and strides, and biases with the strides that `Layouts` has."""
    planes = scheduled_sizes(sizes, spec)
    if planes is None:
        return lambda mask, bias: NO_SCHEDULE
    layout = schedule_layout(planes, scheduled_spec(spec), tiles)
    of_mask = (0, 0, 0, 0) if sizes is None or strides is None else broadcast_strides(sizes, strides)
    if spec.mask == MaskKind.DENSE:
        return partial(_build_dense, layout, _prepare_dense(planes, of_mask, bias, spec, tiles))
    if bias is None:
        return partial(_build_of_keys, layout, _prepare_keys(planes, of_mask, spec, tiles))
    shown = _prepare_shown(planes, of_mask, bias, spec)
    prepared = _prepare_keys(planes, contiguous_strides(planes), spec, tiles)
    return partial(_build_of_bias, layout, planes, shown, prepared)


NO_SCHEDULE = Schedule()


def _build_of_keys(layout: Shapes, prepared: Prepared, mask: Tensor, bias: None) -> Schedule:
    visible, lists = [mask.new_empty(shape, dtype=dtype) for shape, dtype in layout]
    launch(prepared, as_bytes(mask), visible, lists)
    return Schedule(visible, lists)


def _build_of_bias(
    layout: Shapes, planes: Sequence[int], shown: Prepared, prepared: Prepared, mask: Tensor | None, bias: Tensor
) -> Schedule:
    whole = bias.new_empty(planes, dtype=torch.bool)
    launch(shown, bias, None if mask is None else as_bytes(mask), as_bytes(whole))
    return _build_of_keys(layout, prepared, whole, None)


def _build_dense(layout: Shapes, prepared: Prepared, mask: Tensor, bias: Tensor | None) -> Schedule:
    visible, lists, states = [mask.new_empty(shape, dtype=dtype) for shape, dtype in layout]
    launch(prepared, as_bytes(mask), visible, states, bias)
    _fill_lines(states, lists)
    return Schedule(visible, lists, states)


def transposed_lists(schedule: Schedule) -> Tensor | None:
    """For each key block of a dense mask the query blocks that see it: (planes, key_blocks, length)."""
    if schedule.states is None:
        return None
    states = schedule.states.transpose(1, 2)
    planes, n_lines, n_blocks = states.shape
    lists = torch.empty(planes, n_lines, line_length.fn(n_blocks), dtype=torch.int32, device=states.device)
    _fill_lines(states, lists)
    return lists


def _fill_lines(states: Tensor, lists: Tensor) -> None:
    """Writes the lists of `(planes, n_lines, n_blocks)` states."""
    launch(_prepare_lines(states.shape, states.stride()), states, lists)


# The launches for masks and states of these shapes, with these strides; the dtype of `visible` follows from the spec.


def _prepare_shown(planes: Sequence[int], mask: Strides, bias: Strides, spec: AttentionSpec) -> Prepared:
    batch, heads, _, keys = planes
    by_query = spec.bias is not None and spec.bias.queries
    mask_batch, mask_head, _, mask_key = mask
    # One that is the same for all queries hides from all of them what it hides from the last, which sees every key that
    # is in a window.
    edges = all_edges(spec) if by_query else dict(CAUSAL=False, LEFT=False, RIGHT=False)
    rows = spec.queries if by_query else 1
    return Prepared(
        shown_keys_kernel,
        batch * heads * triton.cdiv(keys, BIAS_BLOCK[1]),
        (spec.queries, keys, rows, heads, mask_batch, mask_head, mask_key, *bias, *window_numbers(spec)),
        dict(BLOCK_M=BIAS_BLOCK[0], BLOCK_N=BIAS_BLOCK[1], **edges),
        num_warps=4,
    )


def _prepare_keys(shape: Sequence[int], strides: Strides, spec: AttentionSpec, tiles: Tiles) -> Prepared:
    block = tiles.schedule_block
    _, n_key_blocks = block_counts(spec, block)
    by_batch, by_head, _, by_key = strides
    return Prepared(
        key_schedule_kernel,
        shape[0] * shape[1],
        (spec.keys, n_key_blocks, shape[1], by_batch, by_head, by_key),
        dict(STEP=BLOCKS_PER_STEP, BLOCK=block[1]),
        num_warps=4,
    )


def _prepare_dense(
    shape: Sequence[int], strides: Strides, bias: Strides | None, spec: AttentionSpec, tiles: Tiles
) -> Prepared:
    block_m, block_n = block = tiles.schedule_block
    n_query_blocks, n_key_blocks = block_counts(spec, block)
    return Prepared(
        dense_schedule_kernel,
        shape[0] * shape[1] * n_query_blocks * n_key_blocks,
        (
            *(spec.queries, spec.keys, n_query_blocks, n_key_blocks, shape[1], *strides, *window_numbers(spec)),
            *(bias or (0, 0, 0, 0)),
        ),
        dict(BLOCK_M=block_m, BLOCK_N=block_n, **all_edges(spec)),
        num_warps=4,
    )


@lru_cache(maxsize=CALLS_KEPT)
def _prepare_lines(shape: torch.Size, strides: Strides) -> Prepared:
    planes, n_lines, n_blocks = shape
    return Prepared(
        line_kernel, planes * n_lines, (n_lines, n_blocks, *strides), dict(STEP=BLOCKS_PER_STEP), num_warps=1
    )
