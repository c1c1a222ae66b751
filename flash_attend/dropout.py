"""Which attention weights dropout keeps: a pure function of (seed, batch, head, query, key).

Random numbers come from Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a bijection of
a 128-bit counter under a 64-bit key. The key is the seed and the counter is the position itself, 32 bits to each of
query, key, head and batch, so no two positions of a call share a number however long the call is, and forward,
backward, any tiling and any device agree without storing a mask.

One evaluation yields four words. They serve the four elements whose query and key differ in bit 3 only: a distance of
eight, because that is how far apart a tensor-core accumulator keeps the elements of one thread.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from flash_attend.spec import AttentionSpec
from flash_attend.tracing import readable

__all__ = ["ROUNDS", "draw_seed", "keep_mask", "keep_threshold"]

ROUNDS = 7  # the paper's fewest that pass all of BigCrush

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
WORD = 2**32 - 1
LARGEST_SEED = 2**63 - 1

SHARED_BIT = 8  # of query and of key: elements that differ in it alone share an evaluation
BLOCK = 2 * SHARED_BIT
LARGEST_PIECE = 2**17  # evaluations at once: an array of 1 MB stays in a core's cache


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed, int64 of shape `(1,)`, from torch's generator of the device. It stays on the device."""
    return torch.randint(LARGEST_SEED, (1,), dtype=torch.int64, device=device)


def keep_threshold(p: float) -> int:
    """The 32-bit threshold that a random word reaches with probability `1 - p`: an element is kept iff word >= it."""
    return min(round(p * 2**32), WORD)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 of `ROUNDS` rounds: four int64 tensors of 32-bit words, in the shape that the counters broadcast to.

    int64 products wrap modulo 2^64, which leaves every bit of the unsigned product in place. A word's upper half is
    cleared only where it matters: before a multiplication and at the end.
    """
    c0, c1, c2, c3 = counter
    low, high = seed & WORD, (seed >> 32) & WORD
    for number in range(ROUNDS):
        # In place once they are ours: new arrays would take most of the time.
        product0 = c0.mul_(MULTIPLIERS[0]) if number else c0 * MULTIPLIERS[0]
        product2 = c2.mul_(MULTIPLIERS[1]) if number else c2 * MULTIPLIERS[1]
        c0, c2 = _mixed(product2, c1, low), _mixed(product0, c3, high)
        c1, c3 = product2, product0
        low, high = (low + KEY_INCREMENTS[0]) & WORD, (high + KEY_INCREMENTS[1]) & WORD
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)


def _mixed(product: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """A word of the next round: the upper half of a product, another word and a key, in a new tensor."""
    mixed, upper = word ^ key, product >> 32
    mixed = mixed.bitwise_xor_(upper) if mixed.shape == upper.shape else mixed ^ upper
    return mixed.bitwise_and_(WORD)


def keep_mask(
    seed: Tensor,
    spec: AttentionSpec,
    first_query: int,
    last_query: int,
    last_key: int | None = None,
    entries: Tensor | None = None,
) -> Tensor:
    """What dropout keeps of the weights of queries `first_query` to `last_query` (exclusive): bool `(b, h, i', j)`.

    `seed` is the int64 `(1,)` tensor of `draw_seed`; on a GPU it is never read on the host. The positions need not be
    multiples of anything, and the range does not change what is kept. `last_key` (default `spec.keys`) leaves out the
    keys from there on. All of them are counted from `spec.origin`. `entries` (int64, `(b,)`) are the batch entries' own
    numbers, default 0 to b - 1. What causality and the window hide may be False unasked.
    """
    last_key = spec.keys if last_key is None else last_key
    shape = (spec.batch, spec.heads, last_query - first_query, last_key)
    if 0 in shape:
        return torch.empty(shape, dtype=torch.bool, device=seed.device)
    of_query, of_key = spec.origin or (0, 0)
    first_query, last_query = first_query + of_query, last_query + of_query
    if readable(seed) and (entries is None or readable(entries)):
        from flash_attend.dropout_cpu import keep_mask_on_cpu  # which imports this

        return keep_mask_on_cpu(seed, spec, (first_query, last_query), (of_key, of_key + last_key), entries)
    threshold = keep_threshold(spec.dropout_p)
    entries = torch.arange(spec.batch, device=seed.device) if entries is None else entries
    batch = entries[:, None, None, None]
    head = torch.arange(spec.heads, device=seed.device)[:, None, None]
    start_key = of_key - of_key % BLOCK
    key = _shared_positions(start_key, of_key + last_key, seed.device)

    pieces = []
    evaluations = spec.batch * spec.heads * key.numel() * SHARED_BIT  # of one block of queries
    step = BLOCK * max(1, LARGEST_PIECE // evaluations)
    start = first_query - first_query % BLOCK
    for first in range(start, last_query, step):
        query = _shared_positions(first, min(first + step, last_query), seed.device)[:, None]
        words = philox(seed, (query, key, head, batch))
        kept = torch.stack([word >= threshold for word in words])
        moved = "(query_bit key_bit) b h (i x) (j y) -> b h (i query_bit x) (j key_bit y)"
        pieces.append(rearrange(kept, moved, query_bit=2, x=SHARED_BIT, y=SHARED_BIT))
    rows, keys = (
        slice(first_query - start, last_query - start),
        slice(of_key - start_key, of_key - start_key + last_key),
    )
    return torch.cat(pieces, dim=2)[:, :, rows, keys]


def _shared_positions(first: int, last: int, device: torch.device) -> Tensor:
    """The positions with bit 3 clear in the blocks that reach from `first`, a multiple of 16, to `last`."""
    blocks = torch.arange(first, last, BLOCK, dtype=torch.int64, device=device)
    return (blocks[:, None] + torch.arange(SHARED_BIT, dtype=torch.int64, device=device)).flatten()
