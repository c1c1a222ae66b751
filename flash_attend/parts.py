"""How a call is split into what one matrix of queries and one of keys can compute: all visible, causal, or with a bias.

Work follows the visible pairs. Where keys are padded, each run of batch entries has its own range of keys; where there
are holes between them, the visible keys are gathered. What that would save in less than a call's time is computed
hidden, and neighbours with it. Causal attention that is no square is a rectangle, all visible, and a square. Any other
mask goes by runs of queries, each with the keys that any of them sees, and so do windows, and what is added to scores
by place. No part has an array of all queries by all keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import string_at
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attend.reference import visible_pairs
from flash_attend.spec import CALLS_KEPT, AttentionSpec

__all__ = ["Group", "Part", "Range", "is_small", "keys_worth", "split", "whole_and_masked"]

ROWS = 128  # queries at once where parts go by runs of them: of each run's square, half is hidden
SHORTEST_RUN = 16  # queries that see the same keys, on average: what changes more often goes by ROWS
WIDTH = 16  # keys in the registers of a product, which is slow where a length is no multiple of it
ONE_CALL = 2**22  # multiplications that take as long as one more call of torch's kernel
GATHERING = 4  # calls that take as long as to gather the keys of one

Range = tuple[int, int]


class Part(NamedTuple):
    """Queries and keys, as ranges, that are computed at once."""

    rows: Range
    keys: Range
    causal: bool = False  # a square, whose first query sees its first key
    biased: bool = False  # the mask says more than the ranges do, or something is added to the scores

    @property
    def hides(self) -> bool:
        """Whether something may be hidden in it."""
        return self.causal or self.biased


class Group(NamedTuple):
    """Batch entries that are split in the same way."""

    entries: Range
    parts: list[Part]
    picked: Tensor | None = None  # the keys that are gathered before: the parts' ranges are ranges of those


def split(mask: Tensor | None, spec: AttentionSpec) -> list[Group]:
    """The parts of a call on a CPU: every visible pair is in one of them."""
    if mask is None:
        return _without_mask(spec)
    if not spec.batch * spec.heads * spec.queries * spec.keys:
        return []
    if is_small(spec):
        return _at_once(mask, spec)
    if mask.shape[1] == mask.shape[2] == 1:
        return [group for run in _runs(mask, spec) if (group := _of_run(run, mask, spec)).parts]
    return _by_rows(mask, spec)


def is_small(spec: AttentionSpec) -> bool:
    """Whether a call is too small to be split, and not empty."""
    return 0 < spec.batch * spec.heads * spec.queries * spec.keys * spec.head_dim <= 2 * ONE_CALL


def whole_and_masked(spec: AttentionSpec, keys: Range | None = None) -> list[Group]:
    """A call, or some keys of it, as one part in which a mask hides something."""
    return [Group((0, spec.batch), [Part((0, spec.queries), keys or (0, spec.keys), biased=True)])]


def keys_worth(mask: Tensor, spec: AttentionSpec) -> tuple[Range, bool]:
    """The keys that are worth reading of a call too small to be split, with a mask `(b|1, 1, 1, j)`: those from the
    first to the last that any entry sees, or all where they are not many more; empty where none is seen. And whether
    the mask hides none of them."""
    shown = _bytes_of(mask)
    if shown.find(0) < 0:
        return (0, spec.keys), True
    rows = [shown[start : start + spec.keys] for start in range(0, len(shown), spec.keys)]
    seen = [keys for keys in map(_range_of, rows) if keys[1]]
    if not seen:
        return (0, 0), False
    keys = min([first for first, _ in seen]), max([last for _, last in seen])
    keys = _widened(keys, spec) if 4 * (keys[1] - keys[0]) <= 3 * spec.keys else (0, spec.keys)
    return keys, not any([row.find(0, *keys) >= 0 for row in rows])


def _at_once(mask: Tensor, spec: AttentionSpec) -> list[Group]:
    """A call too small to be split."""
    if mask.shape[1] > 1 or mask.shape[2] > 1:
        return whole_and_masked(spec)
    keys, _ = keys_worth(mask, spec)
    return whole_and_masked(spec, keys) if keys[1] else []


def _widened(keys: Range, spec: AttentionSpec) -> Range:
    """A range of keys as long as products are fast."""
    return keys[0] // WIDTH * WIDTH, min(-(-keys[1] // WIDTH) * WIDTH, spec.keys)


@lru_cache(maxsize=CALLS_KEPT)
def _without_mask(spec: AttentionSpec) -> list[Group]:
    if not spec.batch * spec.heads * spec.queries * spec.keys:
        return []
    return [Group((0, spec.batch), _ranged((0, spec.keys), spec))]


def _ranged(keys: Range, spec: AttentionSpec, rows: Range | None = None) -> list[Part]:
    """The parts of queries, or of those in a range, that may see the keys of a range."""
    rows = rows or (0, spec.queries)
    if not spec.banded and not spec.alibi:
        return [Part(rows, keys, biased=spec.adds_to_scores)]
    if spec.window != (None, None) or spec.adds_to_scores:
        return list(_banded(keys, spec, rows))
    (first_key, last_key), parts = keys, []
    # Queries before `start` see nothing, those from `turn` on all of the range.
    start = min(max(first_key - spec.offset, rows[0]), rows[1])
    turn = min(max(last_key - spec.offset, start), rows[1])
    diagonal = start + spec.offset
    if turn - start == 1:
        parts.append(Part((start, turn), (first_key, diagonal + 1)))
    elif turn > start and diagonal > first_key and turn - start <= ROWS:
        parts.append(Part((start, turn), (first_key, turn + spec.offset), biased=True))
    elif turn > start:
        if diagonal > first_key:
            parts.append(Part((start, turn), (first_key, diagonal)))
        parts.append(Part((start, turn), (diagonal, turn + spec.offset), causal=True))
    if turn < rows[1]:
        parts.append(Part((turn, rows[1]), keys))
    return parts


def _runs_of_rows(first: int, last: int) -> Iterator[Range]:
    return ((begin, min(begin + ROWS, last)) for begin in range(first, last, ROWS))


def _banded(keys: Range, spec: AttentionSpec, rows: Range) -> Iterator[Part]:
    """The parts of runs of queries, each with those keys of a range that any of them may see."""
    (left, _), right = spec.window, spec.right_end
    for first, last in _runs_of_rows(*rows):
        seen = spec.keys_seen(first, last)
        begin, end = max(seen[0], keys[0]), min(seen[1], keys[1])
        late = right is not None and end - 1 > first + spec.offset + right
        early = left is not None and begin < last - 1 + spec.offset - left
        if end > begin:
            yield Part((first, last), (begin, end), biased=late or early or spec.adds_to_scores)


# ---------------------------------------------------------------------------------------------------------------------
# Key masks
# ---------------------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Neighbouring batch entries, and the range of keys that any of them sees: empty where none does."""

    entries: Range
    keys: Range
    visible: int  # pairs of an entry and a key that it sees
    alike: bool = True  # all entries see the same keys

    @property
    def hidden(self) -> int:
        """Pairs of an entry and a key in the range that it does not see."""
        (first, last), (first_key, last_key) = self.entries, self.keys
        return (last - first) * (last_key - first_key) - self.visible

    def joined(self, other: _Run) -> _Run:
        """The entries of both, of which the other's follow."""
        ranges = [run.keys for run in (self, other) if run.visible] or [self.keys]
        keys = min(first for first, _ in ranges), max(last for _, last in ranges)
        return _Run((self.entries[0], other.entries[1]), keys, self.visible + other.visible, alike=False)


def _runs(mask: Tensor, spec: AttentionSpec) -> Iterator[_Run]:
    """The batch entries of a mask `(b|1, 1, 1, j)`, together where they are alike, or where that takes less time."""
    last = None
    for run in _alike(mask, spec):
        together = run if last is None else last.joined(run)
        if last is not None and _wasted(together, spec) - _wasted(last, spec) - _wasted(run, spec) > ONE_CALL:
            yield last
            together = run
        last = together
    if last is not None:
        yield last


def _wasted(run: _Run, spec: AttentionSpec) -> int:
    """Multiplications of hidden pairs. Gathering the keys of one mask leaves them out, and takes some calls' time."""
    products = run.hidden * spec.heads * spec.queries * spec.head_dim
    return min(products, GATHERING * ONE_CALL) if run.alike else products


def _alike(mask: Tensor, spec: AttentionSpec) -> Iterator[_Run]:
    """Runs of entries that see the same keys."""
    shown, entry = _bytes_of(mask), 0
    rows = (shown[start : start + spec.keys] for start in range(0, len(shown), spec.keys))
    for row, same in groupby(rows):
        count = spec.batch if mask.shape[0] == 1 else sum(1 for _ in same)
        first_key, last_key = keys = _range_of(row)
        # What is searched first says of most masks that there is nothing to count.
        visible = row.count(1) if row.find(0, first_key, last_key) >= 0 else last_key - first_key
        yield _Run((entry, entry + count), keys, count * visible)
        entry += count


def _bytes_of(mask: Tensor) -> bytes:
    """The elements of a tensor of bytes, in their order: a search in them takes a tenth of the time that torch's
    operators need to start."""
    mask = mask.contiguous()
    return string_at(mask.data_ptr(), mask.numel())


def _range_of(shown: bytes) -> Range:
    """From the first to behind the last that is True, `(0, 0)` where none is."""
    first = shown.find(1)
    return (first, shown.rfind(1) + 1) if first >= 0 else (0, 0)


def _of_run(run: _Run, mask: Tensor, spec: AttentionSpec) -> Group:
    if not run.hidden:
        return Group(run.entries, _ranged(run.keys, spec) if run.visible else [])
    if run.alike and _wasted(run, spec) == GATHERING * ONE_CALL:
        picked = mask[run.entries[0] % mask.shape[0], 0, 0].nonzero().flatten()
        return Group(run.entries, list(_of_picked(picked, spec)), picked)
    return Group(run.entries, list(_biased(_widened(run.keys, spec), spec, (0, spec.queries))))


def _of_picked(picked: Tensor, spec: AttentionSpec) -> Iterator[Part]:
    """The parts of queries that may see the keys at these positions, which are counted from the first of them."""
    if not spec.banded and not spec.alibi:
        yield Part((0, spec.queries), (0, picked.numel()), biased=spec.adds_to_scores)
        return
    # Of each query, the range of keys that it sees.
    place, (left, _), right = (
        torch.arange(spec.queries, device=picked.device) + spec.offset,
        spec.window,
        spec.right_end,
    )
    begins = [0] * spec.queries if left is None else torch.searchsorted(picked, place - left).tolist()
    all_seen = [picked.numel()] * spec.queries
    ends = all_seen if right is None else torch.searchsorted(picked, place + right + 1).tolist()
    for first, last in _runs_of_rows(0, spec.queries):
        begin, end = begins[first], ends[last - 1]
        if end > begin:
            cut = begin < begins[last - 1] or ends[first] < end
            yield Part((first, last), (begin, end), biased=cut or spec.adds_to_scores)


def _biased(keys: Range, spec: AttentionSpec, rows: Range) -> Iterator[Part]:
    """The parts of queries that see some keys of a range."""
    if not spec.banded and not spec.alibi:
        yield Part(rows, keys, biased=True)
        return
    for part in _banded(keys, spec, rows):
        yield part._replace(biased=True)


# ---------------------------------------------------------------------------------------------------------------------
# Any mask
# ---------------------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Neighbouring queries, and the range of keys that any of them sees: empty where none does."""

    rows: Range
    keys: Range
    cut: bool = False  # some do not see all of it

    def joined(self, other: _Block) -> _Block:
        """The queries of both, of which the other's follow."""
        keys = min(self.keys[0], other.keys[0]), max(self.keys[1], other.keys[1])
        return _Block((self.rows[0], other.rows[1]), keys, cut=True)

    def parts(self, spec: AttentionSpec) -> list[Part]:
        if not self.keys[1]:
            return []
        return [*_biased(self.keys, spec, self.rows)] if self.cut else _ranged(self.keys, spec, self.rows)


def _alike_rows(mask: Tensor, spec: AttentionSpec) -> list[list[_Block]] | None:
    """Of each entry of a mask `(b|1, 1, i, j)` the runs of queries that see the same keys, as those of a document do;
    neighbours as one where that takes less time. None where queries mostly see others than the one before."""
    rows = mask[:, 0]
    entries, length, _ = rows.shape
    words = rows.view(torch.int64) if _in_words(rows) else rows.view(torch.uint8)
    changed = _bytes_of((words[:, 1:] != words[:, :-1]).view(torch.uint8).amax(dim=2))
    if changed.count(1) * SHORTEST_RUN > entries * length:
        return None
    starts = []  # of runs, as rows of all entries one after another
    for entry in range(entries):
        starts.append(entry * length)
        begin, end = entry * (length - 1), (entry + 1) * (length - 1)
        while (begin := changed.find(1, begin, end) + 1) > 0:
            starts.append(begin + entry)
    shown = _bytes_of(rows.flatten(0, 1).index_select(0, torch.tensor(starts, device=mask.device)))
    found: list[list[_Block]] = [[] for _ in range(entries)]
    for at, (start, end) in enumerate(pairwise([*starts, entries * length])):
        entry, first = divmod(start, length)
        seen = shown[at * spec.keys : (at + 1) * spec.keys]
        keys = _range_of(seen)
        block, blocks = _Block((first, end - entry * length), keys, cut=seen.find(0, *keys) >= 0), found[entry]
        while blocks and block.keys[1] and blocks[-1].keys[1]:
            together = blocks[-1].joined(block)
            if _cost([together], spec) > _cost([blocks[-1], block], spec):
                break
            block = together
            blocks.pop()
        blocks.append(block)
    return found


def _in_words(rows: Tensor) -> bool:
    """Whether bytes can be read eight at a time."""
    *strides, one = rows.stride()
    return one == 1 and not any(size % 8 for size in (rows.shape[-1], rows.storage_offset(), *strides))


def _cost(blocks: list[_Block], spec: AttentionSpec) -> int:
    """Multiplications that take as long as blocks of one entry."""
    each = [(rows[1] - rows[0]) * (keys[1] - keys[0]) * (7 if cut else 6) // 6 for rows, keys, cut in blocks if keys[1]]
    return sum(each) * spec.heads * spec.head_dim + len(each) * ONE_CALL


def _by_rows(mask: Tensor, spec: AttentionSpec) -> list[Group]:
    """Runs of queries, with the range of keys that any of them sees, in all entries or, where that saves more than the
    calls take, in each."""
    runs = _alike_rows(mask, spec) if mask.shape[1] == 1 < mask.shape[2] else None
    if runs is not None:
        by_entry = [[part for block in blocks for part in block.parts(spec)] for blocks in runs]
        if all(parts == by_entry[0] for parts in by_entry):
            return [Group((0, spec.batch), by_entry[0])] if by_entry[0] else []
        of_entry = _cost([_Block((0, spec.queries), (0, spec.keys), cut=True)], spec)
        at_once = spec.batch * (of_entry - ONE_CALL) + ONE_CALL
        if sum(_cost(blocks, spec) for blocks in runs) < at_once:
            return [Group((entry, entry + 1), parts) for entry, parts in enumerate(by_entry) if parts]
    apart: list[list[Part]] = [[] for _ in range(mask.shape[0])]
    together = []
    whole = mask.shape[2] == 1 and not spec.banded and not spec.alibi
    for rows in [(0, spec.queries)] if whole else _runs_of_rows(0, spec.queries):
        begin, end = spec.keys_seen(*rows)
        visible = visible_pairs(mask, spec, *rows, end, mask.device, begin)
        assert visible is not None
        pairs = visible.flatten(1, 2).view(torch.uint8)  # of whose elements the largest is found 20 times sooner
        any_sees, all_see = _bytes_of(pairs.amax(dim=1)), _bytes_of(pairs.amin(dim=1))
        found = []
        for entry, parts in enumerate(apart):
            at = slice(entry * (end - begin), (entry + 1) * (end - begin))
            first_key, last_key = _range_of(any_sees[at])
            if last_key:
                biased = spec.adds_to_scores or all_see[at].find(0, first_key, last_key) >= 0
                found.append(Part(rows, (begin + first_key, begin + last_key), biased=biased))
                parts.append(found[-1])
        if found:
            keys = min(part.keys[0] for part in found), max(part.keys[1] for part in found)
            alike = len(found) == len(apart) and all(part.keys == keys and not part.biased for part in found)
            together.append(Part(rows, keys, biased=not alike))
    calls = sum(map(len, apart)) - len(together)
    saved = spec.batch * _pairs(together) - sum(map(_pairs, apart))
    if mask.shape[0] == 1 or saved * spec.heads * spec.head_dim <= calls * ONE_CALL:
        return [Group((0, spec.batch), together)]
    return [Group((entry, entry + 1), parts) for entry, parts in enumerate(apart)]


def _pairs(parts: list[Part]) -> int:
    return sum([(part.rows[1] - part.rows[0]) * (part.keys[1] - part.keys[0]) for part in parts])
