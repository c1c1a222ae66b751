"""Who may see whom: the one function that hides scores, and which tiles need it, for the forward and both backwards.

Three kinds of masks, the values of `MaskKind`: NONE; KEY, one visibility for each key (int32, padded to whole
blocks); and DENSE, one bit for each pair with causality and bounds already folded in (int32 words of 32 keys, padded
to whole tiles).
"""

import triton
import triton.language as tl

NONE = tl.constexpr(0)
KEY = tl.constexpr(1)
DENSE = tl.constexpr(2)
BITS_PER_WORD = tl.constexpr(32)


@triton.jit
def key_visibility(visible, key, keys, MASK: tl.constexpr):
    """[SIZE] booleans: keys that exist and that the key mask, from the row `visible` on, shows."""
    if MASK == KEY:
        # int32, not bytes: a byte load behind a product's operand makes the compiler choose a poor layout for it.
        return tl.load(visible + key) != 0
    else:
        return key < keys


@triton.jit
def pair_visibility(
    visible,
    first_query,
    first_key,
    words_per_query,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """[QUERIES, KEYS] booleans of a DENSE mask, or [KEYS, QUERIES] if TRANSPOSED.

    Each word is loaded once and spread over its bits: a load for each pair would hold a pointer for each pair.
    """
    BITS: tl.constexpr = min(KEYS, BITS_PER_WORD)
    WORDS: tl.constexpr = KEYS // BITS
    query = (first_query + tl.arange(0, QUERIES)).to(tl.int64) * words_per_query
    word = first_key // BITS_PER_WORD + tl.arange(0, WORDS)
    bit = first_key % BITS_PER_WORD + tl.arange(0, BITS)
    if TRANSPOSED:
        words = tl.load(visible + word[:, None] + query[None, :])
        pairs = tl.reshape((words[:, None, :] >> bit[None, :, None]) & 1, [KEYS, QUERIES])
    else:
        words = tl.load(visible + query[:, None] + word[None, :])
        pairs = tl.reshape((words[:, :, None] >> bit[None, None, :]) & 1, [QUERIES, KEYS])
    return pairs != 0


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
def tile_visibility(
    visible,
    first_query,
    first_key,
    keys,
    words_per_query,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
):
    """What `hide` needs for a tile [BLOCK_M, BLOCK_N] of scores, and which keys [BLOCK_N] any of its queries may see:
    the rows of k or v of the others may hold NaN and must not reach a product."""
    if MASK == DENSE:
        pairs = pair_visibility(visible, first_query, first_key, words_per_query, BLOCK_M, BLOCK_N, False)
        return pairs, tl.max(pairs.to(tl.int32), 0) != 0
    else:
        shown = key_visibility(visible, first_key + tl.arange(0, BLOCK_N), keys, MASK)
        return shown[None, :], shown


@triton.jit
def tile_at(index, length, heads, heads_total, section, SIZE: tl.constexpr):
    """First position, batch and head of the `index`-th tile of `SIZE` positions.

    Sections of so many heads follow each other, which fit into the cache together with all that their tiles read. In a
    section the last tiles of all heads come first, which under causality are the longest for queries: then none of them
    is left running at the end.
    """
    tiles = tl.cdiv(length, SIZE)
    first_head = index // (section * tiles) * section
    in_section = index % (section * tiles)
    heads_here = tl.minimum(section, heads_total - first_head)
    batch_head = first_head + in_section % heads_here
    return (tiles - 1 - in_section // heads_here) * SIZE, batch_head // heads, batch_head % heads


@triton.jit
def tile_of_program(length, heads, section, SIZE: tl.constexpr, LAST_FIRST: tl.constexpr = True):
    """`tile_at` for this program, of as many as there are tiles. Or the first tiles first: the longest for keys."""
    tiles = tl.cdiv(length, SIZE)
    heads_total = tl.num_programs(0) // tiles
    first, batch, head = tile_at(tl.program_id(0), length, heads, heads_total, section, SIZE)
    if not LAST_FIRST:
        first = (tiles - 1) * SIZE - first
    return first, batch, head
