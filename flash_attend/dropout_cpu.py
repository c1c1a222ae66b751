"""The keep mask of `dropout.py` on a CPU, to the same bits: by numpy, whose 64-bit numbers are unsigned, in pieces that
stay in a core's cache, on as many threads as torch has.

Two words of a counter are one number: c0 and c1, and c2 and c3, the first of them in the upper half. A round makes of
them `c2 * M1 ^ (c1 ^ k0) << 32` and `c0 * M0 ^ (c3 ^ k1) << 32`: five passes each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flash_attend.dropout import BLOCK, KEY_INCREMENTS, MULTIPLIERS, ROUNDS, SHARED_BIT, keep_threshold

__all__ = ["keep_mask_on_cpu"]

Words = NDArray[np.uint64]

M0, M1 = map(np.uint64, MULTIPLIERS)
HALF, WORD = np.uint64(32), np.uint64(2**32 - 1)
PIECE = 2**14  # evaluations at once: four arrays of 128 KB
FEWEST_PIECES = 4  # a pool of threads takes as long to start as two


def keep_mask_on_cpu(
    seed: int, p: float, entries: Sequence[int], heads: int, queries: tuple[int, int], keys: tuple[int, int]
) -> Tensor:
    """`keep_mask`, bool `(b, h, i', j')`, of batch entries by their numbers and of positions from the first up to the
    last, exclusive. No size is 0."""
    starts = [first - first % BLOCK for first, _ in (queries, keys)]
    rows, columns = (-((start - last) // BLOCK) for start, (_, last) in zip(starts, (queries, keys), strict=True))
    # Eight neighbouring keys, which stay together, are one number.
    kept = np.empty((len(entries), heads, rows, 2, SHARED_BIT, columns, 2), np.uint64)
    round_keys, limit = [*_round_keys(seed)], np.uint64(keep_threshold(p) << 32)
    batch = np.array(entries, dtype=np.uint64)[:, None, None, None]

    def fill(piece: tuple[slice, slice, slice]) -> None:
        of_heads, of_rows, of_columns = piece
        head = _counted(of_heads.start, of_heads.stop)[:, None, None]
        query, key = _shared_positions(of_rows, starts[0])[:, None], _shared_positions(of_columns, starts[1])
        words = _philox(batch, head, query, key, round_keys)
        into = kept[:, of_heads, of_rows, :, :, of_columns]
        shape = (*into.shape[:3], SHARED_BIT, into.shape[5])
        for query_bit, word in enumerate(words):
            for key_bit in range(2):
                into[:, :, :, query_bit, ..., key_bit] = (word >= limit).view(np.uint64).reshape(shape)
                word <<= HALF

    pieces = [*_pieces(len(entries), heads, rows, columns)]
    threads = min(torch.get_num_threads(), len(pieces) // FEWEST_PIECES)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            [*pool.map(fill, pieces)]
    else:
        [*map(fill, pieces)]
    whole = torch.from_numpy(kept.view(np.bool_).reshape(len(entries), heads, rows * BLOCK, columns * BLOCK))
    of_queries, of_keys = (
        slice(first - start, last - start) for start, (first, last) in zip(starts, (queries, keys), strict=True)
    )
    return whole[:, :, of_queries, of_keys]


def _pieces(entries: int, heads: int, rows: int, columns: int) -> Iterator[tuple[slice, slice, slice]]:
    """The work by ranges of heads, of blocks of queries and of blocks of keys."""
    left, steps = max(1, PIECE // (entries * SHARED_BIT**2)), []
    for size in (columns, rows, heads):
        steps.append(min(size, left))
        left = max(1, left // steps[-1])
    sizes = zip((heads, rows, columns), reversed(steps), strict=True)
    return product(*([slice(at, min(at + step, size)) for at in range(0, size, step)] for size, step in sizes))


def _round_keys(seed: int) -> Iterator[tuple[np.uint64, np.uint64]]:
    low, high = seed % 2**32, seed >> 32
    for _ in range(ROUNDS):
        yield np.uint64(low), np.uint64(high)
        low, high = (low + KEY_INCREMENTS[0]) % 2**32, (high + KEY_INCREMENTS[1]) % 2**32


def _counted(first: int, last: int) -> Words:
    return np.arange(first, last, dtype=np.uint64)


def _shared_positions(blocks: slice, start: int) -> Words:
    """The positions with bit 3 clear in a range of blocks, which are counted from position `start`."""
    firsts = _counted(blocks.start, blocks.stop) * np.uint64(BLOCK) + np.uint64(start)
    return (firsts[:, None] + _counted(0, SHARED_BIT)).ravel()


def _philox(batch: Words, head: Words, query: Words, key: Words, keys: list) -> tuple[Words, Words]:
    """Both numbers of each counter, `(b, h, i, j)`, after all rounds."""
    c0, c1, c2, c3 = query, key, head, batch
    # What does not vary over all dimensions yet is computed without those.
    for k0, k1 in keys[:3]:
        product0, product2 = c0 * M0, c2 * M1
        c0, c2 = (product2 >> HALF) ^ (c1 ^ k0), (product0 >> HALF) ^ (c3 ^ k1)
        c1, c3 = product2 & WORD, product0 & WORD
    k0, k1 = keys[3]
    first, second = c2 * M1, c0 * M0
    first ^= (c1 ^ k0) << HALF
    second ^= (c3 ^ k1) << HALF
    upper0, upper2 = np.empty_like(first), np.empty_like(first)
    for k0, k1 in keys[4:]:
        np.right_shift(first, HALF, out=upper0)
        np.right_shift(second, HALF, out=upper2)
        upper0 *= M0
        upper2 *= M1
        for number, k, upper in ((first, k0, upper2), (second, k1, upper0)):
            number ^= k
            number <<= HALF
            number ^= upper
    return first, second
