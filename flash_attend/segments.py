"""Sequences of different lengths, packed one after another without padding: where each begins, and packed calls
computed as calls of equal lengths.

The segments of a packed call are an int32 tensor `(b + 2, 4)`. A line is where the queries of a sequence begin and how
many they are, and the same of its keys. The first b lines are the sequences. The last two are what is in none of them:
the queries behind the last sequence, with no keys, and the keys behind it, with no queries. Whatever came, segments lie
side by side and cover each query and each key once, so that nothing is read out of bounds, or left unwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import chain, cycle, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attend.derived import derived
from flash_attend.operands import Operands, Tangents
from flash_attend.spec import AttentionSpec, canonical

COPIED_IN_A_CALL = 2**13  # elements of q that are put into another order, with all else, in the time of one more call

Attend = Callable[..., Any]
Differentiate = Callable[..., Sequence[Tensor | None]]

__all__ = ["Groups", "attend_by_groups", "gradients_by_groups", "segments_of"]


def segments_of(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int) -> Tensor:
    """The segments of sequences that begin and end at these places, `(b + 1,)` each, of so many queries and keys.
    Nothing is read on the host; on a GPU they are made once of the same tensors."""
    make = partial(_segments_of, cu_seqlens_q, cu_seqlens_k, queries, keys)
    return derived(make, (queries, keys), cu_seqlens_q, cu_seqlens_k)


def _segments_of(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int) -> Tensor:
    # As tensors: a compiler makes a graph of its own of every number that fills one.
    end_q, end_k = (torch.full((1,), n, dtype=cu_seqlens_q.dtype, device=cu_seqlens_q.device) for n in (queries, keys))
    zero = torch.zeros_like(end_q)
    # What is in no sequence begins at the last one's end, by the maximum: its queries first, and then its keys.
    edges = torch.cat((zero, cu_seqlens_q[1:], end_q, end_q, zero, cu_seqlens_k[1:], zero, end_k)).view(2, -1)
    edges = torch.minimum(edges, edges[:, -1:]).clamp_(min=0).cummax(1).values
    begins, lengths = edges[:, :-1], edges.diff()
    return torch.stack((begins[0], lengths[0], begins[1], lengths[1]), 1).to(torch.int32)


class _Group(NamedTuple):
    """Sequences of the same lengths."""

    sequences: int
    queries: int
    keys: int


class Groups:
    """The segments of a call, those of the same lengths together, each group as a batch without padding."""

    def __init__(self, segments: Tensor, elements: int) -> None:
        """Reads them on the host, for which a GPU is waited for. Neighbours of the same lengths are together; all are,
        and stand in another order, where that takes less time than calls of their own: q has so many elements."""
        lengths = [(queries, keys) for _, queries, _, keys in segments.tolist()]
        present = [number for number, pair in enumerate(lengths) if pair != (0, 0)] or [0]
        runs = [[*run] for _, run in groupby(present, key=lengths.__getitem__)]
        by_lengths: dict[tuple[int, int], list[int]] = {}
        for run in runs:
            by_lengths.setdefault(lengths[run[0]], []).extend(run)
        apart = len(by_lengths) < len(runs) and (len(runs) - len(by_lengths)) * COPIED_IN_A_CALL > elements
        members = [*by_lengths.values()] if apart else runs
        self.groups = [_Group(len(numbers), *lengths[numbers[0]]) for numbers in members]
        self.order = torch.tensor([*chain(*members)], dtype=torch.int64, device=segments.device)
        self.query_rows = self.key_rows = None  # where each row stands in the call, unless they are as they were
        if apart:
            query_begins, queries, key_begins, keys = segments.long()[self.order].unbind(1)
            self.query_rows, self.key_rows = _rows(query_begins, queries), _rows(key_begins, keys)

    def of_queries(self, tensor: Tensor | None) -> Sequence[Tensor | None]:
        """`(1, h, t, ...)` as `(n, h, i, ...)` for each group of n sequences; of None as many of it."""
        return self._cut(tensor, self.query_rows, [(group.sequences, group.queries) for group in self.groups])

    def of_keys(self, tensor: Tensor | None) -> Sequence[Tensor | None]:
        """The same of keys."""
        return self._cut(tensor, self.key_rows, [(group.sequences, group.keys) for group in self.groups])

    def _cut(self, tensor: Tensor | None, rows: Tensor | None, sizes: list[tuple[int, int]]) -> Sequence[Tensor | None]:
        if tensor is None:
            return [None] * len(sizes)
        tensor = tensor if rows is None else tensor.index_select(2, rows)
        parts = tensor.split([batch * length for batch, length in sizes], 2)
        return [part.unflatten(2, size)[0].transpose(0, 1) for part, size in zip(parts, sizes, strict=True)]

    def all_queries(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of `of_queries`. In memory the heads of a row are neighbours."""
        return _joined(pieces, self.query_rows)

    def all_keys(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of `of_keys`."""
        return _joined(pieces, self.key_rows)

    def calls(self, operands: Operands, spec: AttentionSpec, *tangents: Tangents) -> Iterator[tuple]:
        """The calls that together are this one, each of the sequences of one group: `(operands, *tangents, spec)`."""
        seed, slopes, sinks = operands.seed, operands.alibi_slopes, operands.sinks
        numbers = self.order.split([group.sequences for group in self.groups])
        pieces = [self._pieces(*whole[:3]) for whole in (operands, *tangents)]
        for group, entries, (q, k, v), *moved in zip(self.groups, numbers, *pieces, strict=True):
            own = slopes
            if slopes is not None and slopes.shape[0] > 1:
                own = slopes[entries.clamp(max=slopes.shape[0] - 1)]  # what is in no sequence has no scores
            given = Operands(q, k, v, seed=seed, alibi_slopes=own, sinks=sinks, entries=entries)
            causal, window = canonical(spec.causal, spec.window, group.queries, group.keys)
            lengths = dict(batch=group.sequences, queries=group.queries, keys=group.keys)
            own_spec = replace(spec, sequences=None, causal=causal, window=window, **lengths)
            yield given, *map(_of_group, moved, tangents), own_spec

    def _pieces(self, q: Tensor | None, k: Tensor | None, v: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
        return zip(self.of_queries(q), self.of_keys(k), self.of_keys(v), strict=True)


def attend_by_groups(attend: Attend, operands: Operands, spec: AttentionSpec, *tangents: Tangents) -> tuple[Any, ...]:
    """`out (1, h, t, dv)` and `lse (1, h, t)` of a packed call, and with tangents those of both, by `attend`, which
    computes calls without segments, `(operands, *tangents, spec)`, and may give no lse."""
    assert operands.segments is not None
    groups = Groups(operands.segments, operands.q.numel())
    found = [attend(*call)[: 2 + 2 * len(tangents)] for call in groups.calls(operands, spec, *tangents)]
    return tuple(None if pieces[0] is None else groups.all_queries(pieces) for pieces in zip(*found, strict=True))


def gradients_by_groups(
    differentiate: Differentiate,
    of_rows: Sequence[Tensor | None],
    operands: Operands,
    spec: AttentionSpec,
    *tangents: Tangents,
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k and v and, where there are sinks, of a bias, which there is not, and of those; then, where
    there are tangents, of these five.

    `differentiate(*rows, operands, *tangents, spec)` gives them of calls without segments, where `rows` is what their
    queries have of each of the tensors `of_rows (1, h, t, ...)`, of which some may be None.
    """
    assert operands.segments is not None
    groups = Groups(operands.segments, operands.q.numel())
    rows = zip(*map(groups.of_queries, of_rows), strict=True)
    calls = zip(rows, groups.calls(operands, spec, *tangents), strict=True)
    found = zip(*[differentiate(*of_group, *call) for of_group, call in calls], strict=True)
    joins = cycle((groups.all_queries, groups.all_keys, groups.all_keys, _added, _added))
    return tuple(None if pieces[0] is None else join(pieces) for join, pieces in zip(joins, found, strict=False))


def _of_group(pieces: Sequence[Tensor | None], whole: Tangents) -> Tangents:
    q, k, v = pieces
    return Tangents(q, k, v, sinks=whole.sinks)


def _added(pieces: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, pieces)


def _rows(begins: Tensor, lengths: Tensor) -> Tensor:
    """The places of segments' rows, one segment after another."""
    shift = (begins - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
    return torch.arange(shift.numel(), device=shift.device) + shift


def _joined(pieces: Sequence[Tensor], rows: Tensor | None) -> Tensor:
    """`(n, h, i, ...)` of each group as `(1, h, t, ...)`, in the order of the call."""
    whole = torch.cat([piece.transpose(1, 2).flatten(0, 1) for piece in pieces])
    if rows is not None:
        places = torch.arange(rows.numel(), device=rows.device)
        whole = whole.index_select(0, torch.empty_like(rows).scatter_(0, rows, places))
    return whole.transpose(0, 1)[None]
