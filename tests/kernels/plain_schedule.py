"""The schedule of a mask worked out the slow way: what the kernels in schedule.py have to come to."""

from __future__ import annotations

import math
from functools import cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EMPTY", "FULL", "PARTIAL", "UNUSED", "block_counts", "block_states", "lines_of"]

EMPTY, PARTIAL, FULL = 0, 1, 2
UNUSED = 10**8  # an entry of a line that nobody may read: as a block, it lies past every end


def block_counts(pairs: Tensor, block_queries: int, block_keys: int) -> Tensor:
    """How many pairs of `(..., i, j)` bools are True in each block: `(..., query blocks, key blocks)`."""
    queries, keys = pairs.shape[-2:]
    padded = F.pad(pairs, (0, -keys % block_keys, 0, -queries % block_queries))
    blocks = padded.unflatten(-1, (padded.shape[-1] // block_keys, block_keys))
    blocks = blocks.unflatten(-3, (padded.shape[-2] // block_queries, block_queries))
    return blocks.sum(dim=(-3, -1))


def block_states(pairs: Tensor, block_queries: int, block_keys: int) -> Tensor:
    """EMPTY, PARTIAL or FULL for each block of `(..., i, j)` bools; a block that reaches past an end is never full."""
    counts = block_counts(pairs, block_queries, block_keys)
    return torch.where(counts == 0, EMPTY, torch.where(counts == block_queries * block_keys, FULL, PARTIAL))


@cache
def _line(states: tuple[int, ...]) -> list[int]:
    n_blocks = len(states)
    runs, partials, ranks = [], [], [0]
    for is_full, run in groupby(range(n_blocks), key=lambda block: states[block] == FULL):
        if is_full:
            blocks = list(run)
            runs += [blocks[0], blocks[-1] + 1]
    for block, state in enumerate(states):
        partials += [block] if state == PARTIAL else []
        ranks.append(len(partials))
    shown = [block for block, state in enumerate(states) if state != EMPTY]
    first, end = (shown[0], shown[-1] + 1) if shown else (n_blocks, 0)
    line = [len(runs) // 2, first, end, len(partials)]
    line += runs + [UNUSED] * (2 * n_blocks - len(runs))
    line += partials + [UNUSED] * (n_blocks - len(partials))
    return line + ranks


def lines_of(states: Tensor) -> Tensor:
    """The lines `(..., 4 n + 5)` of states `(..., n)`, with UNUSED where an entry means nothing."""
    *shape, n_blocks = states.shape
    lines = [_line(tuple(row)) for row in states.reshape(math.prod(shape), n_blocks).tolist()]
    return torch.tensor(lines, dtype=torch.int32).view(*shape, 4 * n_blocks + 5)
