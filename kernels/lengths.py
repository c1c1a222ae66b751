"""Where sequences begin, and which program takes which tile of which: the only place that knows.

Without segments all entries of a batch are as long, and a tile follows from a program's number. With them, a batch of
one holds sequences of different lengths one after another (`flash_attend/segments.py`), and a table, made on the device
with no host sync, says which tile of which sequence a program takes.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attend.derived import derived
from flash_attend.kernels.compat import aggregate
from flash_attend.kernels.programs import tile_at, tile_of_program
from flash_attend.spec import AttentionSpec

__all__ = ["packed_tiles", "tile_count"]


@aggregate
class Place:
    """The tile of a program, and the sequence that it belongs to.

    `batch` is where the sequence's rows are, and `sequence` its number, by which slopes and dropout go. It has so many
    queries and keys. Where sequences are packed, it begins at `first_query` and `first_key` of the `total` queries, and
    of all keys; else these two are None.
    """

    first: tl.tensor  # position of the tile
    batch: tl.tensor
    head: tl.tensor
    sequence: tl.tensor
    queries: tl.tensor
    keys: tl.tensor
    total: tl.tensor
    first_query: object
    first_key: object

    @triton.jit
    def first_number(self, index):
        """Where the numbers of a head's queries begin, in a tensor (b, h, i), by the index of the head in the batch."""
        at = index * self.total
        if self.first_query is not None:
            at += self.first_query
        return at


@triton.jit
def place_in_batch(first, batch, head, queries, keys):
    """The tile of a batch entry."""
    return Place(first, batch, head, batch, queries, keys, queries, None, None)


@triton.jit
def place_of_program(
    SEGMENTS, TILES, length, queries, keys, heads, section, SIZE: tl.constexpr, LAST_FIRST: tl.constexpr = True
):
    """The tile of `SIZE` positions that this program takes, of as many as there are: by TILES of SEGMENTS or, where
    these are None, of `length` positions of each entry and head, as `tile_of_program` has it."""
    if SEGMENTS is None:
        first, batch, head = tile_of_program(length, heads, section, SIZE, LAST_FIRST)
        return place_in_batch(first, batch, head, queries, keys)
    else:
        line, batch, head = tile_at(tl.program_id(0), tl.num_programs(0) // heads, heads, heads, section, 1)
        number = tl.load(TILES + 2 * line)
        tile = tl.load(TILES + 2 * line + 1)
        segment = SEGMENTS + 4 * number
        own_queries = tl.load(segment + 1, mask=tile >= 0, other=0)
        own_keys = tl.load(segment + 3, mask=tile >= 0, other=0)
        # What is in no sequence has no number of its own, and no scores.
        sequence = tl.where((own_queries > 0) & (own_keys > 0), number, 0)
        return Place(
            tl.maximum(tile, 0) * SIZE, batch, head, sequence, own_queries, own_keys, queries, tl.load(segment),
            tl.load(segment + 2),
        )  # fmt: skip


def tile_count(spec: AttentionSpec, length: int, size: int) -> int:
    """How many tiles of so many positions a head has at most, of queries or of keys, of which there are `length`: each
    sequence, and what is in none, may have one that is cut."""
    return -(-length // size) if spec.sequences is None else length // size + spec.sequences + 1


def packed_tiles(segments: Tensor, spec: AttentionSpec, size: int, *, of_keys: bool) -> tuple[Tensor, Tensor]:
    """SEGMENTS and TILES of so many queries, or keys; on a GPU made once of the same segments.

    A tile, int32 `(tile_count, 2)`, is a segment and the number of the tile in it. They come in the order of their
    work, the longest at the end, which is where `tile_at` begins; before all others, with the number -1, those that
    there are not.
    """
    depends_on = size, of_keys, spec.queries, spec.keys, spec.causal, spec.window
    return segments.contiguous(), derived(partial(_tiles_of, segments, spec, size, of_keys), depends_on, segments)


def _tiles_of(segments: Tensor, spec: AttentionSpec, size: int, of_keys: bool) -> Tensor:
    _, own, _, others = segments.unbind(1)
    if of_keys:
        own, others = others, own
    counts = (own + (size - 1)) // size
    ends = counts.cumsum(0)
    index = torch.arange(tile_count(spec, spec.keys if of_keys else spec.queries, size), device=segments.device)
    number = torch.searchsorted(ends, index, right=True).clamp_(max=segments.shape[0] - 1)
    own, others, begin = torch.stack((own, others, ends - counts), 1)[number].unbind(1)
    tile, missing = index - begin, index >= ends[-1]
    # The range of queries or keys that the tile's own may see, or that may see them.
    before, after = spec.window[0], 0 if spec.causal else spec.window[1]
    if of_keys:
        before, after = after, before
    first, work = (others - own).add_(tile, alpha=size), others
    if after is not None:
        work = torch.minimum(first + (size + after), others)
    if before is not None:
        work = work - (first - before).clamp_(min=0)
    order = work.clamp(min=0).masked_fill_(missing, -1).argsort(stable=True)  # a sequence's tiles stay neighbours
    return torch.stack((number, tile.masked_fill_(missing, -1)), 1).to(torch.int32)[order]
