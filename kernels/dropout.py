"""Which weights dropout keeps: the same pure function of (seed, batch, head, query, key) as `flash_attend.dropout`."""

import triton
import triton.language as tl

from flash_attend.dropout import ROUNDS

PHILOX_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _without_bit_3(first, SIZE: tl.constexpr):
    """The `SIZE // 2` positions from `first` (a multiple of 16) on whose bit 3 is 0."""
    position = tl.arange(0, SIZE // 2)
    return (first + position // 8 * 16 + position % 8).to(tl.uint32)


@triton.jit
def kept_by_dropout(
    first_query,
    first_key,
    batch,
    head,
    seed,
    keep_threshold,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """[QUERIES, KEYS] booleans, or [KEYS, QUERIES] if TRANSPOSED: True where the weight stays.

    One Philox call (Salmon et al. 2011) gives the four words of {x, x + 8} in both directions. In the accumulator of a
    tensor-core product one thread owns just these four, in the scores and in their transpose alike, so nothing moves
    between threads.
    """
    if TRANSPOSED:
        ROWS: tl.constexpr = KEYS
        COLUMNS: tl.constexpr = QUERIES
        query = _without_bit_3(first_query, QUERIES)[None, :]
        key = _without_bit_3(first_key, KEYS)[:, None]
    else:
        ROWS: tl.constexpr = QUERIES
        COLUMNS: tl.constexpr = KEYS
        query = _without_bit_3(first_query, QUERIES)[:, None]
        key = _without_bit_3(first_key, KEYS)[None, :]
    zero = tl.zeros([ROWS // 2, COLUMNS // 2], tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed, zero + query, zero + key, zero + head.to(tl.uint32), zero + batch.to(tl.uint32), PHILOX_ROUNDS
    )
    # Word 2 * (query bit 3) + (key bit 3); below, the last two dimensions are [column bit, row bit].
    if TRANSPOSED:
        words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    else:
        words = tl.join(tl.join(word0, word1), tl.join(word2, word3))
    words = tl.reshape(words, [ROWS // 16, 8, COLUMNS // 16, 8, 2, 2])
    words = tl.reshape(tl.permute(words, (0, 5, 1, 2, 4, 3)), [ROWS, COLUMNS])
    return words >= keep_threshold
