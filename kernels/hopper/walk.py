"""Which tile a program takes when, and the key blocks that it visits: the same for all partitions."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_attend.kernels.hopper.plain import (
    key_line,
    mask_row,
    masked_block,
    masked_count,
    run_bounds,
    run_count,
    walk_over_keys,
)
from flash_attend.kernels.mask import KEY
from flash_attend.kernels.programs import tile_at
from flash_attend.kernels.schedule import HEADER, line_of

__all__ = ["first_block_of", "first_live_query", "full_count", "tile_at", "turn_count", "walk_at"]


@gluon.jit
def turn_count(queries, heads_total, BLOCK_M: gl.constexpr):
    """How many tiles this program takes: every n-th, of n programs."""
    return gl.cdiv(heads_total * gl.cdiv(queries, BLOCK_M) - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def walk_at(
    mask, first_query, batch, head, queries, keys,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SCHEDULE_N: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The key blocks that a tile visits, and where the visibility of its keys begins. No dense mask comes here, so that
    blocks of queries do not matter."""
    VISIBLE, LISTS, stride_batch, stride_head = mask
    n_blocks = gl.cdiv(keys, SCHEDULE_N)
    RATIO: gl.constexpr = SCHEDULE_N // BLOCK_N
    row, visible, _ = mask_row(VISIBLE, batch, head, stride_batch, stride_head, 0, n_blocks, BLOCK_M, SCHEDULE_N, MASK)
    line = key_line(LISTS, row, first_query, 0, n_blocks, BLOCK_M, MASK)
    return walk_over_keys(line, n_blocks, first_query, queries, keys, BLOCK_M, BLOCK_N, RATIO, MASK, CAUSAL), visible


@gluon.jit
def first_block_of(walk, RATIO: gl.constexpr, LISTED: gl.constexpr):
    """The first block that needs masking, else the first full one, else block 0, all of which is hidden then."""
    first = 0
    if LISTED:
        first = gl.load(walk[0] + HEADER, mask=run_count(walk) > 0, other=0) * RATIO
    if masked_count(walk) > 0:
        first = masked_block(walk, 0, RATIO, LISTED)
    return first


@gluon.jit
def full_count(walk, RATIO: gl.constexpr, LISTED: gl.constexpr):
    """How many full blocks there are."""
    count = 0
    for run in range(0, run_count(walk)):
        start, end = run_bounds(walk, run, RATIO, LISTED)
        count += gl.maximum(end - start, 0)
    return count


@gluon.jit
def first_live_query(LISTS, visible, row, queries, keys, SCHEDULE_N: gl.constexpr, MASK: gl.constexpr):
    """The first query that sees a key under causality: all after it do. Those before it may hold anything."""
    key = 0
    if MASK == KEY:
        n_blocks = gl.cdiv(keys, SCHEDULE_N)
        first_block = gl.minimum(gl.load(line_of(LISTS, row, n_blocks) + 1), n_blocks - 1)
        candidate = first_block * SCHEDULE_N + gl.arange(0, SCHEDULE_N, layout=gl.BlockedLayout([1], [32], [4], [0]))
        key = gl.min(gl.where(gl.load(visible + candidate) != 0, candidate, keys), 0)
    return gl.minimum(gl.maximum(key - (keys - queries), 0), queries)
