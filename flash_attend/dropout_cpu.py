"""The keep mask of `dropout.py` on a CPU, to the same bits: by numpy, whose 64-bit numbers are unsigned, in pieces that
stay in a core's caches. On one thread: an operator on such a piece takes less time than threads take to hand Python's
lock to each other.

Two words of a counter are one number: c0 and c1, and c2 and c3, the first of them in the upper half. A round makes of
them `c2 * M1 ^ (c1 ^ k0) << 32` and `c0 * M0 ^ (c3 ^ k1) << 32`: five passes each.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flash_attend.dropout import BLOCK, KEY_INCREMENTS, MULTIPLIERS, ROUNDS, SHARED_BIT, keep_threshold
from flash_attend.spec import AttentionSpec

__all__ = ["keep_mask_on_cpu"]

Words = NDArray[np.uint64]

M0, M1 = map(np.uint64, MULTIPLIERS)
HALF, WORD = np.uint64(32), np.uint64(2**32 - 1)
PIECE = 2**15  # evaluations at once: four arrays of 256 KB


def keep_mask_on_cpu(
    seed: Tensor, spec: AttentionSpec, queries: tuple[int, int], keys: tuple[int, int], entries: Tensor | None
) -> Tensor:
    """What is kept of the weights of ranges of queries and keys, none of them empty: bool `(b, h, i', j')`. The
    `entries` (int64, `(b,)`) are the batch entries' numbers, None for 0 to b - 1. What causality and the window hide
    may be False unasked.
    """
    query_block, key_block = queries[0] // BLOCK, keys[0] // BLOCK
    rows, columns = -(-queries[1] // BLOCK) - query_block, -(-keys[1] // BLOCK) - key_block
    # Eight neighbouring keys, which stay together, are one number.
    kept = np.zeros((spec.batch, spec.heads, rows, 2, SHARED_BIT, columns, 2), np.uint64)
    round_keys, limit = [*_round_keys(int(seed.item()))], np.uint64(keep_threshold(spec.dropout_p) << 32)
    batch = _counted(0, spec.batch) if entries is None else entries.numpy().astype(np.uint64)
    for heads, of_rows, of_columns in _pieces(spec, (query_block, rows), (key_block, columns)):
        head = _counted(heads.start, heads.stop)[:, None, None]
        query, key = _shared_positions(of_rows, query_block)[:, None], _shared_positions(of_columns, key_block)
        words = _philox(batch[:, None, None, None], head, query, key, round_keys)
        # [query_bit, b, h, i, 8, j], where i and j count blocks
        into = kept[:, heads, of_rows, :, :, of_columns].transpose(3, 0, 1, 2, 4, 5, 6)
        for key_bit in range(2):
            into[..., key_bit] = (words >= limit).view(np.uint64).reshape(into.shape[:-1])
            words <<= HALF
    whole = torch.from_numpy(kept.view(np.bool_).reshape(spec.batch, spec.heads, rows * BLOCK, columns * BLOCK))
    (first_query, last_query), (first_key, last_key) = [
        (first - block * BLOCK, last - block * BLOCK)
        for (first, last), block in ((queries, query_block), (keys, key_block))
    ]
    return whole[:, :, first_query:last_query, first_key:last_key]


def _pieces(
    spec: AttentionSpec, rows: tuple[int, int], columns: tuple[int, int]
) -> Iterator[tuple[slice, slice, slice]]:
    """The work by ranges of heads, of blocks of queries and of blocks of keys, of which the first and the number are
    given: few queries at a time, so that little of it is of keys that none of them sees."""
    (query_block, rows_in_all), (key_block, columns_in_all) = rows, columns
    of_query, of_key = spec.origin or (0, 0)
    left, steps = max(1, PIECE // (spec.batch * SHARED_BIT**2)), []
    for size in (columns_in_all, spec.heads, rows_in_all):
        steps.append(min(size, left))
        left = max(1, left // steps[-1])
    for first in range(0, rows_in_all, steps[2]):
        last = min(first + steps[2], rows_in_all)
        begin, end = spec.keys_seen(
            max(0, (query_block + first) * BLOCK - of_query),
            min(spec.queries, (query_block + last) * BLOCK - of_query),
        )
        begin = max(0, (of_key + begin) // BLOCK - key_block)
        end = min(columns_in_all, -(-(of_key + end) // BLOCK) - key_block)
        for column in range(begin, end, steps[0]):
            of_columns = slice(column, min(column + steps[0], end))
            for head in range(0, spec.heads, steps[1]):
                yield slice(head, min(head + steps[1], spec.heads)), slice(first, last), of_columns


def _round_keys(seed: int) -> Iterator[tuple[np.uint64, np.uint64]]:
    low, high = seed % 2**32, seed >> 32
    for _ in range(ROUNDS):
        yield np.uint64(low), np.uint64(high)
        low, high = (low + KEY_INCREMENTS[0]) % 2**32, (high + KEY_INCREMENTS[1]) % 2**32


def _counted(first: int, last: int) -> Words:
    return np.arange(first, last, dtype=np.uint64)


def _shared_positions(blocks: slice, first: int) -> Words:
    """The positions with bit 3 clear in a range of blocks, which are counted from block `first`."""
    numbers = _counted(first + blocks.start, first + blocks.stop)
    return (numbers[:, None] * np.uint64(BLOCK) + _counted(0, SHARED_BIT)).ravel()


def _philox(batch: Words, head: Words, query: Words, key: Words, keys: list) -> Words:
    """Both numbers of each counter, `(2, b, h, i, j)`, after all rounds."""
    c0, c1, c2, c3 = query, key, head, batch
    # What does not vary over all dimensions yet is computed without those.
    for k0, k1 in keys[:3]:
        product0, product2 = c0 * M0, c2 * M1
        c0, c2 = (product2 >> HALF) ^ (c1 ^ k0), (product0 >> HALF) ^ (c3 ^ k1)
        c1, c3 = product2 & WORD, product0 & WORD
    (k0, k1), (next0, next1) = keys[3:5]
    numbers = np.empty((2, *c0.shape), np.uint64)
    lower_words = (c1 ^ k0) << HALF ^ next0, (c3 ^ k1) << HALF ^ next1
    for number, upper, multiplier, lower in zip(numbers, (c2, c0), (M1, M0), lower_words, strict=True):
        np.multiply(upper, multiplier, out=number)
        number ^= lower
    # From here on both at once: an operator of numpy takes as long to start as thousands of numbers take. A round's key
    # is in the lower words before it begins.
    uppers, multipliers = np.empty_like(numbers), _of_both(M1, M0)
    for following in (*keys[5:], None):
        np.right_shift(numbers[::-1], HALF, out=uppers)
        uppers *= multipliers
        numbers <<= HALF
        numbers ^= uppers
        if following is not None:
            numbers ^= _of_both(*following)
    return numbers


def _of_both(first: np.uint64, second: np.uint64) -> Words:
    return np.array((first, second)).reshape(2, 1, 1, 1, 1)
