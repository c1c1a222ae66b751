"""Masks turned into work: which blocks are empty, partial or full, found on the device with no host sync.

A row of `lists` describes one line of blocks: the key blocks of a key mask, the key blocks that one query tile of a
dense mask sees, or the query blocks that see one of its key blocks. Full blocks come as runs `[start, end)`, because
a loop over a run is pipelined like a loop without a mask; partial blocks come as a list, with every block's rank in
it, so that the list can be cut at the diagonal. A row holds, as int32:

    [0] number of runs   [1] first block that is not empty   [2] one past the last such block   [3] number of partial
    blocks then the runs, 2 * n_blocks;   the partial blocks, n_blocks;   the ranks, n_blocks + 1

The forward builds it once and the backward reuses it. A kernel's blocks may be smaller than the schedule's: `RATIO`
of them make one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from flash_attend.kernels.configs import Tiles
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.masking import BITS_PER_WORD, DENSE, KEY, key_blocks, query_blocks
from flash_attend.spec import CALLS_KEPT, AttentionSpec, MaskKind

__all__ = ["Schedule", "build_schedule", "empty_packed", "schedule_layout", "transposed_lists"]

HEADER = tl.constexpr(4)
EMPTY = tl.constexpr(0)
PARTIAL = tl.constexpr(1)
FULL = tl.constexpr(2)
SPARE = (0, 0, 1)  # columns that a packed schedule has beyond its own: of states there may be a single one
BLOCKS_PER_STEP = 16  # blocks that one step of a scan takes


class Schedule(NamedTuple):
    """What the kernels read of a mask, by `rows` of it: one for each batch entry and head that differ.

    All None without a mask; int32, but for `visible` next to float64, which is int64. A word has 32 bits.
    """

    visible: Tensor | None = (
        None  # KEY: (rows, key_blocks * block); DENSE: (rows, query_blocks * block, words of 32 bits)
    )
    lists: Tensor | None = None  # KEY: (rows, length) int32; DENSE: (rows, query_blocks, length)
    states: Tensor | None = None  # DENSE: (rows, query_blocks, key_blocks) int32, of EMPTY, PARTIAL, FULL

    @property
    def rows(self) -> int:
        """How many rows of the mask there are; 0 without one."""
        return 0 if self.visible is None else self.visible.shape[0]

    def packed(self) -> list[Tensor]:
        """The tensors as operators hand them over: `(rows, n)` with `n > 1`.

        A compiler makes a graph of its own of every size that is 1, and so of short sequences, which are one block.
        """
        return [
            pad(tensor.flatten(1), (0, spare)) for tensor, spare in zip(self, SPARE, strict=True) if tensor is not None
        ]

    @staticmethod
    def unpacked(packed: Sequence[Tensor], mask: Tensor | None, spec: AttentionSpec, tiles: Tiles) -> Schedule:
        """The schedule again, whatever became of its strides."""
        shapes = [shape for shape, _ in schedule_layout(mask, spec, tiles)]
        whole = (x.contiguous()[:, : math.prod(shape[1:])] for x, shape in zip(packed, shapes, strict=True))
        return Schedule(*(x.reshape(shape) for x, shape in zip(whole, shapes, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Walking over a schedule
# ---------------------------------------------------------------------------------------------------------------------
# A walk is the tuple (line, n_blocks, runs, partials, begin, full_begin, full_end, tail_begin, end): first the full
# blocks, run after run, within [full_begin, full_end); then the blocks that need masking: the listed ones, those of
# [begin, full_begin) and those of [tail_begin, end).


@triton.jit
def line_of(lists, index, n_blocks):
    """The address of one line's row in `lists`."""
    return lists + index.to(tl.int64) * (4 * n_blocks + 5)


@triton.jit
def mask_row(
    VISIBLE,
    batch,
    head,
    stride_batch,
    stride_head,
    n_query_blocks,
    n_key_blocks,
    SCHEDULE_M: tl.constexpr,
    SCHEDULE_N: tl.constexpr,
    MASK: tl.constexpr,
):
    """One head's row of the mask: its number, where its visibility begins, and how many words of it a query has."""
    row = (batch * stride_batch + head * stride_head).to(tl.int64)
    words_per_query = n_key_blocks * (SCHEDULE_N // BITS_PER_WORD)
    if MASK == DENSE:
        return row, VISIBLE + row * n_query_blocks * SCHEDULE_M * words_per_query, words_per_query
    elif MASK == KEY:
        return row, VISIBLE + row * n_key_blocks * SCHEDULE_N, words_per_query
    else:
        return row, 0, words_per_query  # nothing reads it; None, in a tuple, does not compile before Triton 3.7


@triton.jit
def key_line(LISTS, row, first_query, n_query_blocks, n_key_blocks, SCHEDULE_M: tl.constexpr, MASK: tl.constexpr):
    """The line of key blocks that holds for a query tile."""
    if MASK == DENSE:
        return line_of(LISTS, row * n_query_blocks + first_query // SCHEDULE_M, n_key_blocks)
    elif MASK == KEY:
        return line_of(LISTS, row, n_key_blocks)
    else:
        return 0


@triton.jit
def query_line(LISTS, row, first_key, n_query_blocks, n_key_blocks, SCHEDULE_N: tl.constexpr, MASK: tl.constexpr):
    """The line of query blocks that holds for a key tile; LISTS are the transposed ones."""
    if MASK == DENSE:
        return line_of(LISTS, row * n_key_blocks + first_key // SCHEDULE_N, n_query_blocks)
    else:
        return 0


@triton.jit
def _listed_walk(line, n_blocks, RATIO: tl.constexpr):
    """The walk over a line of a dense mask: causality and bounds are in it already, there are no edges."""
    all_blocks = n_blocks * RATIO
    partials = tl.load(line + 3) * RATIO
    return (line, n_blocks, tl.load(line), partials, 0, 0, all_blocks, all_blocks, all_blocks)


@triton.jit
def walk_over_keys(
    line,
    n_blocks,
    first_query,
    queries,
    keys,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RATIO: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The key blocks that a query tile visits."""
    if MASK == DENSE:
        return _listed_walk(line, n_blocks, RATIO)
    else:
        full_end, end = key_blocks(first_query, queries, keys, BLOCK_M, BLOCK_N, CAUSAL)
        if MASK == KEY:
            end = tl.minimum(end, tl.load(line + 2) * RATIO)
            full_end = tl.minimum(full_end, end) // RATIO * RATIO
            tail_begin = tl.minimum(tl.maximum(full_end, tl.load(line + 1) * RATIO), end)
            partials = tl.load(line + HEADER + 3 * n_blocks + full_end // RATIO) * RATIO
            return (line, n_blocks, tl.load(line), partials, 0, 0, full_end, tail_begin, end)
        else:
            return (line, n_blocks, 1, 0, 0, 0, full_end, full_end, end)


@triton.jit
def walk_over_queries(
    line,
    n_blocks,
    any_key,
    hides_keys,
    first_key,
    queries,
    keys,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RATIO: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The query blocks that visit a key tile: none unless `any_key` is visible. Where the tile's own keys need hiding,
    `hides_keys`, no block is full."""
    if MASK == DENSE:
        return _listed_walk(line, n_blocks, RATIO)
    else:
        begin, full_begin, full_end, end = query_blocks(first_key, queries, keys, BLOCK_M, BLOCK_N, CAUSAL)
        end = tl.where(any_key, end, begin)
        full_begin = tl.where(hides_keys, end, tl.minimum(full_begin, end))
        full_end = tl.maximum(tl.minimum(full_end, end), full_begin)
        return (line, n_blocks, 1, 0, begin, full_begin, full_end, full_end, end)


@triton.jit
def run_count(walk):
    return walk[2]


@triton.jit
def run_bounds(walk, run, RATIO: tl.constexpr, LISTED: tl.constexpr):
    """The blocks `[start, end)` of a run of full blocks."""
    start = walk[5]
    end = walk[6]
    if LISTED:
        start = tl.load(walk[0] + HEADER + 2 * run) * RATIO
        end = tl.minimum(tl.load(walk[0] + HEADER + 2 * run + 1) * RATIO, end)
    return start, end


@triton.jit
def masked_count(walk):
    """How many blocks need masking."""
    return walk[3] + (walk[5] - walk[4]) + (walk[8] - walk[7])


@triton.jit
def masked_block(walk, index, RATIO: tl.constexpr, LISTED: tl.constexpr):
    """The `index`-th block that needs masking."""
    edge = index - walk[3]
    front = walk[5] - walk[4]
    block = tl.where(edge < front, walk[4] + edge, walk[7] + edge - front)
    if LISTED:
        listed = tl.load(walk[0] + HEADER + 2 * walk[1] + index // RATIO, mask=edge < 0, other=0)
        block = tl.where(edge < 0, listed * RATIO + index % RATIO, block)
    return block


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


@triton.jit(do_not_specialize=["keys", "n_blocks", "mask_heads", "stride_batch", "stride_head", "stride_key"])
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
    """One program for each row of a key mask: its visibility as int32, and its line."""
    row = tl.program_id(0).to(tl.int64)
    mask = MASK_POINTER + row // mask_heads * stride_batch + row % mask_heads * stride_head
    visible = VISIBLE + row * n_blocks * BLOCK
    line = line_of(LISTS, row, n_blocks)
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


@triton.jit(
    do_not_specialize=[
        "queries", "keys", "n_query_blocks", "n_key_blocks", "mask_heads",
        "stride_batch", "stride_head", "stride_query", "stride_key",
    ]
)  # fmt: skip
def dense_schedule_kernel(
    MASK_POINTER,
    VISIBLE,
    STATES,
    queries: tl.int32,
    keys: tl.int32,
    n_query_blocks: tl.int32,
    n_key_blocks: tl.int32,
    mask_heads: tl.int32,
    stride_batch: tl.int64,
    stride_head: tl.int64,
    stride_query: tl.int64,
    stride_key: tl.int64,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program for each tile of a dense mask: reads it once, through its strides, and writes one bit a pair, with
    causality and bounds folded in, and the tile's state."""
    tile = tl.program_id(0).to(tl.int64)
    key_block = (tile % n_key_blocks).to(tl.int32)
    query_block = (tile // n_key_blocks % n_query_blocks).to(tl.int32)
    row = tile // n_key_blocks // n_query_blocks
    query = query_block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    key = key_block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    exists = (query < queries)[:, None] & (key < keys)[None, :]
    if CAUSAL:
        exists = exists & (key[None, :] <= query[:, None] + (keys - queries))
    mask = MASK_POINTER + row // mask_heads * stride_batch + row % mask_heads * stride_head
    offsets = query.to(tl.int64)[:, None] * stride_query + key.to(tl.int64)[None, :] * stride_key
    shown = (tl.load(mask + offsets, mask=exists, other=0) != 0).to(tl.int32)
    count = tl.sum(shown)
    # A tile that reaches past the end is partial: the backward must not read the rows that are missing.
    full = count == BLOCK_QUERIES * BLOCK_KEYS
    tl.store(STATES + tile, tl.where(full, FULL, tl.where(count == 0, EMPTY, PARTIAL)))

    WORDS: tl.constexpr = BLOCK_KEYS // BITS_PER_WORD
    bits = tl.reshape(shown, [BLOCK_QUERIES, WORDS, BITS_PER_WORD]) << tl.arange(0, BITS_PER_WORD)[None, None, :]
    words = tl.sum(bits, 2)
    padded_query = (row * n_query_blocks + query_block) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    word = key_block * WORDS + tl.arange(0, WORDS)
    tl.store(VISIBLE + padded_query[:, None] * (n_key_blocks * WORDS) + word[None, :], words)


@triton.jit(do_not_specialize=["n_lines", "n_blocks", "stride_row", "stride_line", "stride_block"])
def line_kernel(
    STATES,
    LISTS,
    n_lines: tl.int32,
    n_blocks: tl.int32,
    stride_row: tl.int64,
    stride_line: tl.int64,
    stride_block: tl.int64,
    STEP: tl.constexpr,
):
    """One program for each line of tile states, (rows, n_lines, n_blocks) through its strides."""
    index = tl.program_id(0).to(tl.int64)
    states = STATES + index // n_lines * stride_row + index % n_lines * stride_line
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


def _fill_lines(states: Tensor, lists: Tensor) -> None:
    """Writes the lists of `(rows, n_lines, n_blocks)` states."""
    launch(_prepare_lines(*states.shape, states.stride()), states, lists)


def schedule_layout(
    mask: Tensor | None, spec: AttentionSpec, tiles: Tiles
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor in the schedule of a mask `(b|1, h|1, i|1, j)`, in the order of `Schedule`."""
    if mask is None:
        return []
    rows = mask.shape[0] * mask.shape[1]
    block_queries, block_keys = tiles.schedule_block
    n_key_blocks = -(-spec.keys // block_keys)
    # Next to a float64 product's operand, a load of anything narrower makes the compiler fail.
    word = torch.int64 if spec.dtype == torch.float64 else torch.int32
    if spec.mask == MaskKind.KEY:
        return [((rows, n_key_blocks * block_keys), word), ((rows, 4 * n_key_blocks + 5), torch.int32)]
    n_query_blocks = -(-spec.queries // block_queries)
    words = n_key_blocks * (block_keys // BITS_PER_WORD.value)
    return [
        ((rows, n_query_blocks * block_queries, words), word),
        ((rows, n_query_blocks, 4 * n_key_blocks + 5), torch.int32),
        ((rows, n_query_blocks, n_key_blocks), torch.int32),
    ]


def empty_packed(mask: Tensor | None, spec: AttentionSpec, tiles: Tiles) -> list[Tensor]:
    """What `Schedule.packed` gives, uninitialised."""
    if mask is None:
        return []
    layout = zip(schedule_layout(mask, spec, tiles), SPARE, strict=False)
    return [mask.new_empty(shape[0], math.prod(shape[1:]) + spare, dtype=dtype) for (shape, dtype), spare in layout]


def build_schedule(mask: Tensor | None, spec: AttentionSpec, tiles: Tiles) -> Schedule:
    """The schedule of a mask `(b|1, h|1, i|1, j)`, in blocks that fit all three kernels."""
    if mask is None:
        return Schedule()
    layout = schedule_layout(mask, spec, tiles)
    visible, lists, *states = (torch.empty(shape, dtype=dtype, device=mask.device) for shape, dtype in layout)
    batch, heads, _, keys = mask.shape
    bytes_of_mask, rows = mask.view(torch.uint8), batch * heads
    if spec.mask == MaskKind.KEY:
        prepared = _prepare_keys(rows, heads, keys, tiles.schedule_block[1], mask.stride())
        launch(prepared, bytes_of_mask, visible, lists)
        return Schedule(visible, lists)
    launch(_prepare_dense(rows, heads, spec, tiles, mask.stride()), bytes_of_mask, visible, *states)
    _fill_lines(*states, lists)
    return Schedule(visible, lists, *states)


def transposed_lists(schedule: Schedule) -> Tensor | None:
    """For each key block of a dense mask the query blocks that see it: (rows, key_blocks, length)."""
    if schedule.states is None:
        return None
    states = schedule.states.transpose(1, 2)
    rows, n_lines, n_blocks = states.shape
    lists = torch.empty(rows, n_lines, 4 * n_blocks + 5, dtype=torch.int32, device=states.device)
    _fill_lines(states, lists)
    return lists


# The launches for masks and states with these strides.


@lru_cache(maxsize=CALLS_KEPT)
def _prepare_keys(rows: int, heads: int, keys: int, block: int, strides: tuple[int, ...]) -> Prepared:
    numbers = (keys, -(-keys // block), heads, strides[0], strides[1], strides[3])
    return Prepared(key_schedule_kernel, rows, numbers, dict(STEP=BLOCKS_PER_STEP, BLOCK=block), num_warps=4)


@lru_cache(maxsize=CALLS_KEPT)
def _prepare_dense(rows: int, heads: int, spec: AttentionSpec, tiles: Tiles, strides: tuple[int, ...]) -> Prepared:
    block_queries, block_keys = tiles.schedule_block
    n_query_blocks, n_key_blocks = -(-spec.queries // block_queries), -(-spec.keys // block_keys)
    return Prepared(
        dense_schedule_kernel,
        rows * n_query_blocks * n_key_blocks,
        (spec.queries, spec.keys, n_query_blocks, n_key_blocks, heads, *strides),
        dict(BLOCK_QUERIES=block_queries, BLOCK_KEYS=block_keys, CAUSAL=spec.causal),
        num_warps=4,
    )


@lru_cache(maxsize=CALLS_KEPT)
def _prepare_lines(rows: int, n_lines: int, n_blocks: int, strides: tuple[int, ...]) -> Prepared:
    numbers = (n_lines, n_blocks, *strides)
    return Prepared(line_kernel, rows * n_lines, numbers, dict(STEP=BLOCKS_PER_STEP), num_warps=1)
