"""Sequences that the ranks of a group share: which positions each holds, and what of two shards sees each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup

from flash_attend.messages import all_gather
from flash_attend.spec import CALLS_KEPT

__all__ = [
    "Block",
    "Layout",
    "Shards",
    "blocks_between",
    "check_layout",
    "in_order",
    "sequence_positions",
    "shard_sequence",
    "unshard_sequence",
]

# "contiguous": rank r holds the r-th of so many equal pieces. "balanced": of twice as many it holds the r-th from the
# front and the r-th from the back, so that under causality all ranks have the same work.
Layout = Literal["contiguous", "balanced"]
Range = tuple[int, int]  # from the first to one past the last


def check_layout(layout: object) -> Layout:
    """`layout`; raises `ValueError` for what is none."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(map(repr, get_args(Layout)))}, got {layout!r}")
    return cast(Layout, layout)


@lru_cache(maxsize=CALLS_KEPT)
def pieces_of(layout: Layout, held: int, ranks: int, rank: int) -> tuple[Range, ...]:
    """The ranges of positions that a rank holds, in their order, where each rank holds so many."""
    if layout == "contiguous":
        return ((rank * held, (rank + 1) * held),)
    half = held // 2
    back = 2 * ranks - 1 - rank
    return (rank * half, (rank + 1) * half), (back * half, (back + 1) * half)


# ---------------------------------------------------------------------------------------------------------------------
# For callers
# ---------------------------------------------------------------------------------------------------------------------


def sequence_positions(length: int, group: ProcessGroup, layout: Layout = "contiguous") -> Tensor:
    """Which positions of a sequence of `length` this rank holds, int64 `(length // ranks,)`: for embeddings of
    positions, and to take its part of what every rank has."""
    held = _held(length, group.size(), check_layout(layout))
    pieces = pieces_of(layout, held, group.size(), dist.get_rank(group))
    return torch.cat([torch.arange(*piece) for piece in pieces])


def shard_sequence(whole: Tensor, group: ProcessGroup, layout: Layout = "contiguous", *, dim: int) -> Tensor:
    """This rank's shard of a tensor that every rank has, along dimension `dim`; nothing is sent. Raises `ValueError`
    where the ranks' shards would not be of one length."""
    positions = sequence_positions(whole.shape[dim], group, layout)
    return whole.index_select(dim, positions.to(whole.device))


def unshard_sequence(shard: Tensor, group: ProcessGroup, layout: Layout = "contiguous", *, dim: int) -> Tensor:
    """The whole tensor again, on every rank, from the shards that the ranks hold; differentiable. A shard's gradient is
    the sum of those that the ranks have for it."""
    dim %= shard.ndim
    gathered = all_gather(shard, group).movedim(0, dim).flatten(dim, dim + 1)
    return in_order(gathered, group.size(), check_layout(layout), dim=dim)


def _held(length: int, ranks: int, layout: Layout) -> int:
    pieces = ranks if layout == "contiguous" else 2 * ranks
    if length % pieces:
        raise ValueError(
            f"a {layout} sequence must have a multiple of {pieces} positions on {ranks} ranks, got {length}"
        )
    return length // ranks


def in_order(gathered: Tensor, ranks: int, layout: Layout, *, dim: int) -> Tensor:
    """The shards of ranks one after the other along a dimension as a sequence in the order of its positions."""
    if layout == "contiguous":
        return gathered
    front, back = gathered.unflatten(dim, (ranks, 2, -1)).unbind(dim + 1)
    return torch.cat([front, back.flip(dim)], dim=dim).flatten(dim, dim + 1)


def out_of_order(sequence: Tensor, ranks: int, layout: Layout, *, dim: int) -> Tensor:
    """Undoes `in_order`."""
    if layout == "contiguous":
        return sequence
    front, back = sequence.unflatten(dim, (2, ranks, -1)).unbind(dim)
    return torch.stack([front, back.flip(dim)], dim=dim + 1).flatten(dim, dim + 2)


# ---------------------------------------------------------------------------------------------------------------------
# Who sees whom
# ---------------------------------------------------------------------------------------------------------------------


class Shards(NamedTuple):
    """How queries and keys are shared, and which of them see each other: query `x` sees key `y`, by their positions,
    iff `lowest <= y - x <= highest`, where None is no limit."""

    layout: Layout
    ranks: int
    queries: int  # that each rank holds
    keys: int
    lowest: int | None
    highest: int | None
    # Whether positions count beyond who sees whom: then a block has one piece of queries, and one of keys.
    apart: bool = False
    # Whether a block's keys must lie on one side of all its queries, or be as many and at their places.
    sided: bool = False

    @property
    def offset(self) -> int:
        """The last query's place is that of the last key."""
        return self.ranks * (self.keys - self.queries)


class Block(NamedTuple):
    """A rectangle of a shard of queries and one of keys, counted in their shards, cut to what sees each other: the
    first row sees its first key, the last row its last, and each row some."""

    rows: Range
    keys: Range
    # Row `x` sees key `y` of the shards iff `lowest <= y - x <= highest`, where None hides nothing of the block.
    lowest: int | None = None
    highest: int | None = None
    origin: tuple[int, int] = (0, 0)  # the positions of its first row and its first key
    side: int = 0  # -1 or 1: its keys lie before, or behind, all of its rows' places; 0: anywhere

    @property
    def window(self) -> tuple[int | None, int | None]:
        """The same as the window of a call: how many keys a row sees before its own place and after it, where the
        block's last row has the place of its last key."""
        ahead = self.keys[1] - self.rows[1]
        left = None if self.lowest is None else ahead - self.lowest
        return left, None if self.highest is None else self.highest - ahead


@lru_cache(maxsize=CALLS_KEPT)
def blocks_between(shards: Shards, rank: int, source: int) -> tuple[Block, ...]:
    """What `rank` has to compute of its queries and the keys of `source`: together all pairs that see each other, and
    each of them once."""
    queries = _placed(pieces_of(shards.layout, shards.queries, shards.ranks, rank))
    keys = _placed(pieces_of(shards.layout, shards.keys, shards.ranks, source))
    found = [
        block
        for of_queries, of_keys in product(queries, keys)
        for whole in (_sides(of_queries, of_keys, shards.offset) if shards.sided else [(of_queries, of_keys, 0)])
        if (block := _cut(*whole, shards))
    ]
    return tuple(found if shards.apart or shards.sided else _joined(found))


class _Span(NamedTuple):
    """Neighbours of a shard."""

    first: int  # place in the shard
    last: int  # one past the last
    position: int  # of the first in the sequence

    def from_to(self, first: int, last: int) -> _Span:
        """Those within a range of the shard."""
        first, last = max(first, self.first), min(last, self.last)
        return _Span(first, last, self.position + first - self.first)


def _placed(pieces: Iterable[Range]) -> Iterator[_Span]:
    start = 0
    for first, last in pieces:
        yield _Span(start, start + last - first, first)
        start += last - first


def _sides(rows: _Span, keys: _Span, offset: int) -> Iterator[tuple[_Span, _Span, int]]:
    """The same rectangle in up to five: rows whose places are before all keys, those behind them, and of those with a
    place among them what lies before their places, at them, and behind."""
    place = keys.first + rows.position + offset - keys.position - rows.first  # of row 0, among the shard's keys
    yield rows.from_to(rows.first, keys.first - place), keys, 1
    yield rows.from_to(keys.last - place, rows.last), keys, -1
    within = rows.from_to(keys.first - place, keys.last - place)
    yield within, keys.from_to(keys.first, within.first + place), -1
    yield within, keys.from_to(within.first + place, within.last + place), 0
    yield within, keys.from_to(within.last + place, keys.last), 1


def _cut(rows: _Span, keys: _Span, side: int, shards: Shards) -> Block | None:
    """The smallest rectangle around the pairs that see each other; None where there are none."""
    moved = rows.position - rows.first - (keys.position - keys.first)
    lowest, highest = (None if end is None else end + moved for end in (shards.lowest, shards.highest))
    seen = rows.from_to(
        rows.first if highest is None else keys.first - highest, rows.last if lowest is None else keys.last - lowest
    )
    read = keys.from_to(
        keys.first if lowest is None else rows.first + lowest, keys.last if highest is None else rows.last + highest
    )
    if seen.first >= seen.last or read.first >= read.last:
        return None
    early = lowest is not None and read.first < seen.last - 1 + lowest
    late = highest is not None and read.last - 1 > seen.first + highest
    origin = seen.position, read.position
    return Block(seen[:2], read[:2], lowest if early else None, highest if late else None, origin, side)


def _joined(blocks: list[Block]) -> list[Block]:
    """As few blocks as neighbours make, those in the same rows first."""
    for join in (_in_row, _in_column):
        joined: list[Block] = []
        for block in blocks:
            together = join(joined[-1], block) if joined else None
            joined[-1:] = [*joined[-1:], block] if together is None else [together]
        blocks = joined
    return blocks


def _in_row(left: Block, right: Block) -> Block | None:
    """Two blocks of the same rows as one, if their keys are neighbours and nothing is hidden between them."""
    if left.rows != right.rows or left.keys[1] != right.keys[0] or left.highest is not None or right.lowest is not None:
        return None
    return Block(left.rows, (left.keys[0], right.keys[1]), left.lowest, right.highest, left.origin)


def _in_column(upper: Block, lower: Block) -> Block | None:
    """Two blocks of neighbouring rows as one: of the same keys, or where the lower one sees more of them by the same
    rule."""
    if upper.rows[1] != lower.rows[0] or upper.keys[0] != lower.keys[0] or upper.lowest is not None:
        return None
    stairs = upper.highest is not None and upper.highest == lower.highest
    stairs = stairs and upper.rows[1] - 1 + cast(int, upper.highest) < upper.keys[1]
    if upper.keys != lower.keys and not (stairs and upper.keys[1] < lower.keys[1]):
        return None
    if upper.keys == lower.keys and lower.highest is not None and upper.highest != lower.highest:
        return None
    rows, keys = (upper.rows[0], lower.rows[1]), (upper.keys[0], lower.keys[1])
    return Block(rows, keys, lower.lowest, upper.highest, upper.origin)
