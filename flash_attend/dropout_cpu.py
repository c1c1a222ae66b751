"""The keep mask of `dropout.py` on a CPU, to the same bits: by numpy, whose 64-bit numbers are unsigned, in pieces that
stay in a core's cache, on as many threads as torch has.

Two words of a counter are one number: c0 and c1, and c2 and c3, the first of them in the upper half. A round makes of
them `c2 * M1 ^ (c1 ^ k0) << 32` and `c0 * M0 ^ (c3 ^ k1) << 32`: five passes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

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
PIECE = 2**14  # evaluations at once: four arrays of 128 KB
FEWEST_PIECES = 4  # a pool of threads takes as long to start as two


def keep_mask_on_cpu(
    seed: Tensor, spec: AttentionSpec, queries: tuple[int, int], keys: tuple[int, int], entries: Tensor
) -> Tensor:
    """What is kept of the weights of ranges of queries and keys, none of them empty: bool `(b, h, i', j')`. The
    `entries` (int64, `(b,)`) are the batch entries' numbers."""
    query_block, key_block = queries[0] // BLOCK, keys[0] // BLOCK
    rows, columns = -(-queries[1] // BLOCK) - query_block, -(-keys[1] // BLOCK) - key_block
    # Eight neighbouring keys, which stay together, are one number.
    kept = np.empty((spec.batch, spec.heads, rows, 2, SHARED_BIT, columns, 2), np.uint64)
    round_keys, limit = [*_round_keys(int(seed.item()))], np.uint64(keep_threshold(spec.dropout_p) << 32)
    batch = entries.numpy().astype(np.uint64)[:, None, None, None]

    def fill(piece: tuple[slice, slice, slice]) -> None:
        heads, of_rows, of_columns = piece
        head = _counted(heads.start, heads.stop)[:, None, None]
        query, key = _shared_positions(of_rows, query_block)[:, None], _shared_positions(of_columns, key_block)
        words = _philox(batch, head, query, key, round_keys)
        into = kept[:, heads, of_rows, :, :, of_columns]
        shape = (*into.shape[:3], SHARED_BIT, into.shape[5])
        for query_bit, word in enumerate(words):
            for key_bit in range(2):
                into[:, :, :, query_bit, ..., key_bit] = (word >= limit).view(np.uint64).reshape(shape)
                word <<= HALF

    pieces = [*_pieces(spec, rows, columns)]
    threads = min(torch.get_num_threads(), len(pieces) // FEWEST_PIECES)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            [*pool.map(fill, pieces)]
    else:
        [*map(fill, pieces)]
    whole = torch.from_numpy(kept.view(np.bool_).reshape(spec.batch, spec.heads, rows * BLOCK, columns * BLOCK))
    (first_query, last_query), (first_key, last_key) = [
        (first - block * BLOCK, last - block * BLOCK)
        for (first, last), block in ((queries, query_block), (keys, key_block))
    ]
    return whole[:, :, first_query:last_query, first_key:last_key]


def _pieces(spec: AttentionSpec, rows: int, columns: int) -> Iterator[tuple[slice, slice, slice]]:
    """The work by ranges of heads, of blocks of queries and of blocks of keys."""
    left, steps = max(1, PIECE // (spec.batch * SHARED_BIT**2)), []
    for size in (columns, rows, spec.heads):
        steps.append(min(size, left))
        left = max(1, left // steps[-1])
    sizes = zip((spec.heads, rows, columns), reversed(steps), strict=True)
    return product(*([slice(at, min(at + step, size)) for at in range(0, size, step)] for size, step in sizes))


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
