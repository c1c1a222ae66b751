"""The plain kernels' functions as the kernels for Hopper still take them: by loose arguments."""

import triton
import triton.language as tl

from flash_attend.kernels.mask import DENSE, KEY
from flash_attend.kernels.schedule import BITS_PER_WORD, HEADER, line_of
from flash_attend.kernels.softmax import LN2, NEGATIVE_INFINITY


@triton.jit
def key_visibility(visible, key, keys, MASK: tl.constexpr):
    """[SIZE] booleans: keys that exist and that the key mask, from the row `visible` on, shows."""
    if MASK == KEY:
        # int32, not bytes: a byte load behind a product's operand makes the compiler choose a poor layout for it.
        return tl.load(visible + key) != 0
    else:
        return key < keys


@triton.jit
def hide(x, fill, query, key, visible, offset, MASK: tl.constexpr, CAUSAL: tl.constexpr, HIDE_KEYS: tl.constexpr):
    """`x` with `fill` in the place of every pair that may not meet.

    `query`, `key` and `visible` broadcast to x, so that one function serves scores and transposed scores. HIDE_KEYS:
    the visibility of keys is applied here (or was it already, where the keys were loaded?).

    Selects, never sums: what a hidden key held, NaN included, must vanish. Two selects, not one `&`, which makes the
    compiler pack predicates into bit fields.
    """
    if MASK == DENSE:
        x = tl.where(visible, x, fill)
    else:
        if CAUSAL:
            x = tl.where(key <= query + offset, x, fill)
        if HIDE_KEYS:
            x = tl.where(visible, x, fill)
    return x


@triton.jit
def key_blocks(first_query, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Key blocks of a query tile, as far as causality and the last key go: every query sees all of the blocks
    `[0, full_end)`, and the blocks `[full_end, end)` cross an edge."""
    full_end = keys // BLOCK_N
    end = tl.cdiv(keys, BLOCK_N)
    if CAUSAL:
        offset = keys - queries
        last_query = tl.minimum(first_query + BLOCK_M, queries) - 1
        full_end = tl.minimum(tl.maximum(first_query + offset + 1, 0) // BLOCK_N, full_end)
        end = tl.cdiv(tl.maximum(last_query + offset + 1, 0), BLOCK_N)
    return full_end, end


@triton.jit
def query_blocks(first_key, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Query blocks of a key tile, as far as causality and the last query go: every query of the blocks
    `[full_begin, full_end)` exists and sees all keys; `[begin, full_begin)` crosses the diagonal, `[full_end, end)`
    the end.
    """
    begin = 0
    full_begin = 0
    end = tl.cdiv(queries, BLOCK_M)
    if CAUSAL:
        offset = keys - queries
        last_key = first_key + BLOCK_N - 1
        begin = tl.minimum(tl.maximum(first_key - offset, 0) // BLOCK_M, end)
        full_begin = tl.minimum(tl.cdiv(tl.maximum(last_key - offset, 0), BLOCK_M), end)
    full_end = tl.maximum(queries // BLOCK_M, full_begin)
    return begin, full_begin, full_end, end


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


@triton.jit
def online_step(scores, row_max, row_sum, scale_log2, MASKED: tl.constexpr):
    """Takes another tile of scores [BLOCK_M, BLOCK_N] into the running statistics [BLOCK_M].

    Returns the tile's weights, the factor that brings older sums to the new maximum, and the new statistics. The
    maximum is of the scaled base-2 exponents.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    reference = new_max
    if MASKED:
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        reference = tl.where(new_max == NEGATIVE_INFINITY, 0.0, new_max)
    weights = tl.math.exp2(scores * scale_log2 - reference[:, None])
    correction = tl.math.exp2(row_max - reference)
    return weights, correction, new_max, row_sum * correction + tl.sum(weights, 1)


@triton.jit
def finish(row_max, row_sum):
    """The factor that normalises the accumulated output and the natural LSE; 0 and -inf for a row that saw no key."""
    dead = row_sum == 0.0
    safe_sum = tl.where(dead, 1.0, row_sum)
    normaliser = tl.where(dead, 0.0, 1.0 / safe_sum)
    lse_natural = tl.where(dead, NEGATIVE_INFINITY, (row_max + tl.math.log2(safe_sum)) * LN2)
    return normaliser, lse_natural
