"""Which program takes which tile of packed sequences: each once, the longest first, and no block that nobody sees."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from backends import TRITON_INTERPRETER, Backend
from flash_attend import flash_attention_packed
from flash_attend.kernels import backward, forward
from flash_attend.kernels.compat import kernel
from flash_attend.kernels.configs import INTERPRETED
from flash_attend.kernels.lengths import packed_tiles, place_of_program, tile_count
from flash_attend.kernels.rows import Heads
from flash_attend.segments import segments_of
from flash_attend.spec import AttentionSpec
from flash_attend.testing.sequences import whole_call

LENGTHS = ((5, 40), (0, 9), (100, 70), (31, 0), (0, 0), (64, 64), (1, 33))
BEHIND = 40, 35
PLACES = [torch.tensor([0, *(pair[side] for pair in LENGTHS)]).cumsum(0) for side in (0, 1)]
TOTALS = [int(places[-1]) + more for places, more in zip(PLACES, BEHIND, strict=True)]
SPEC = AttentionSpec(1, 2, 2, *TOTALS, 16, 16, torch.float32, sequences=len(LENGTHS))
MODES = {"plain": {}, "causal": dict(causal=True), "window": dict(window=(20, 3))}


@pytest.mark.parametrize("of_keys", (False, True), ids=("queries", "keys"))
@pytest.mark.parametrize("mode", MODES)
def test_every_tile_is_taken_once_and_the_longest_last_in_the_table(mode: str, of_keys: bool) -> None:
    spec, size = replace(SPEC, **MODES[mode]), 32
    segments, tiles = packed_tiles(segments_of(*PLACES, *TOTALS), spec, size, of_keys=of_keys)
    assert len(tiles) == tile_count(spec, TOTALS[of_keys], size)
    wanted = [(n, at) for n, line in enumerate(segments.tolist()) for at in range(-(-line[1 + 2 * of_keys] // size))]
    found = [(number, tile) for number, tile in tiles.tolist() if tile >= 0]
    assert sorted(found) == wanted
    assert all(tile < 0 for _, tile in tiles[: len(tiles) - len(found)].tolist())

    pairs = whole_call(LENGTHS, *(torch.zeros(1, 1, n, 1) for n in TOTALS), causal=spec.causal, window=spec.window)
    seen = pairs["mask"][0, 0].mT if of_keys else pairs["mask"][0, 0]

    def work(number: int, tile: int) -> int:
        begin, length = segments[number].tolist()[2 * of_keys :][:2]
        rows = seen[begin + tile * size : begin + min(tile * size + size, length)]
        return int(rows.any(0).sum())

    assert all(work(*first) <= work(*second) for first, second in pairwise(found))


def test_segments_cover_everything_whatever_came() -> None:
    """Places that decrease or lead past the end: each row is in one segment."""
    for places in ([0, 9, 4, 6], [3, 2, 1, 0], [0, 2**31 - 1, 5, 7], [-5, -7, 20, 11]):
        for begin, length in ((0, 1), (2, 3)):
            given = torch.tensor(places)
            segments = segments_of(given, given, 10, 10)
            rows = [at for line in segments.tolist() for at in range(line[begin], line[begin] + line[length])]
            assert sorted(rows) == [*range(10)]


@pytest.mark.parametrize("of_keys", (False, True), ids=("queries", "keys"))
def test_ten_thousand_short_sequences_have_a_tile_for_each_row(of_keys: bool) -> None:
    """Of each the tiles that it needs, and no more programs than one for each sequence and each whole tile."""
    size, count = 4, 10_000
    torch.manual_seed(0)
    lengths = torch.randint(0, 10, (2, count))
    places = torch.nn.functional.pad(lengths.cumsum(1), (1, 0))
    totals = [int(n) + 3 for n in places[:, -1]]
    spec = AttentionSpec(1, 2, 2, *totals, 16, 16, torch.float32, causal=True, sequences=count)
    segments, tiles = packed_tiles(segments_of(*places, *totals), spec, size, of_keys=of_keys)
    assert len(tiles) == tile_count(spec, totals[of_keys], size) <= totals[of_keys] // size + count + 1
    number, tile = tiles[tiles[:, 1] >= 0].long().unbind(1)
    begins, own = segments.long()[number, 2 * of_keys : 2 * of_keys + 2].unbind(1)
    assert (tile * size < own).all()
    taken = torch.zeros(totals[of_keys], dtype=torch.int64)
    for at in range(size):
        row = tile * size + at
        taken[(begins + row)[row < own]] += 1
    assert (taken == 1).all()


class Operations(TorchDispatchMode):
    """How many operations of torch are run, views apart."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "most"), (("plain", 20), ("causal", 23), ("window", 25)))
def test_few_operations_make_the_tables(mode: str, most: int) -> None:
    """And as many for any number of sequences."""
    with Operations() as made:
        segments = segments_of(*PLACES, *TOTALS)
    assert made.count <= 10
    for of_keys in (False, True):
        with Operations() as made:
            packed_tiles(segments, replace(SPEC, **MODES[mode]), 32, of_keys=of_keys)
        assert made.count <= most


@kernel
def place_kernel(
    OUT, SEGMENTS, TILES, ROWS, queries: tl.int32, keys: tl.int32, heads: tl.int32, row: tl.int64, SIZE: tl.constexpr
):
    """Of each program how many queries its sequence has, which one and which head that is, where its numbers of queries
    begin, and where its first query and the sequence's first key lie, in bytes from ROWS on, which stands for a tensor
    (1, heads, t, 16) of half precision whose heads are neighbours, `row` elements from token to token."""
    place = place_of_program(SEGMENTS, TILES, queries, queries, keys, heads, heads, SIZE)
    tensor = Heads(ROWS, row, row // row, row // 16, 16, 16, 16, 0, False)
    of_queries = tensor.rows(place.batch, place.head, None, place.first_query)
    of_keys = tensor.rows(place.batch, place.head, None, place.first_key)
    first, _ = of_queries._part(place.first, 1, 0, 16)
    at = OUT + tl.program_id(0) * 6
    tl.store(at, place.queries)
    tl.store(at + 1, place.sequence)
    tl.store(at + 2, place.head)
    tl.store(at + 3, place.first_number(place.batch.to(tl.int64) * heads + place.head))
    tl.store(at + 4, tl.min(first.to(tl.int64)) - ROWS.to(tl.int64))
    tl.store(at + 5, of_keys.source.to(tl.int64) - ROWS.to(tl.int64))


@pytest.mark.parametrize(
    "device", (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
)
def test_places_past_two_to_the_31_elements(device: str) -> None:
    """Of 2**30 queries, and as many keys, of three heads: the addresses, at which nothing is read."""
    size, heads, long = 2**27, 3, 2**30
    of_queries, of_keys = ([0, 7, long + 9, long + 20], [0, long, long + 5, long + 9])
    totals = long + 30, long + 9
    places = [torch.tensor(of_one, device=device) for of_one in (of_queries, of_keys)]
    spec = AttentionSpec(1, heads, heads, *totals, 16, 16, torch.float16, sequences=3)
    table = packed_tiles(segments_of(*places, *totals), spec, size, of_keys=False)
    programs, row = tile_count(spec, totals[0], size) * heads, heads * 16
    found = torch.zeros(programs, 6, dtype=torch.int64, device=device)
    start = torch.zeros(16, dtype=torch.float16, device=device)
    place_kernel[(programs,)](found, *table, start, *totals, heads, row, size)

    sequences = [(n, *pairs) for n, pairs in enumerate(zip(pairwise(of_queries), of_keys, strict=False))]
    wanted = [
        [last - first, n, head, head * totals[0] + first, (tile * row + head * 16) * 2, (key * row + head * 16) * 2]
        for n, (first, last), key in (*sequences, (0, (long + 20, totals[0]), of_keys[-1]))
        for tile in range(first, last, size)
        for head in range(heads)
    ]
    assert sorted(line for line in found.tolist() if line[0]) == sorted(wanted)


@pytest.mark.parametrize("backend", [pytest.param(TRITON_INTERPRETER, marks=pytest.mark.interpreter)], ids=str)
def test_no_block_is_visited_that_nobody_sees(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kernel: as many blocks as hold a visible pair, for each head."""
    counts: Counter[str] = Counter()

    def count(module: ModuleType, name: str) -> None:
        visit = getattr(module, name)

        def counted(*args, **named):
            counts[name] += 1
            return visit(*args, **named)

        monkeypatch.setattr(module, name, counted)

    tiles = {
        "_tile": INTERPRETED.forward,
        "_key_value_tile": INTERPRETED.backward_kv,
        "_query_gradient_tile": INTERPRETED.backward_q,
    }
    for name in tiles:
        count(forward if name == "_tile" else backward, name)
    tensors = [torch.randn(n, 1, 16, requires_grad=True) for n in (TOTALS[0], TOTALS[1], TOTALS[1])]
    flash_attention_packed(*tensors, *PLACES, 100, 70, causal=True, backend=backend.name).sum().backward()

    pairs = whole_call(LENGTHS, *(torch.zeros(1, 1, n, 1) for n in TOTALS), causal=True)["mask"][0, 0]
    edges = zip(*(pairwise(places.tolist()) for places in PLACES), strict=True)
    sequences = [pairs[slice(*of_queries), slice(*of_keys)] for of_queries, of_keys in edges]
    for name, tile in tiles.items():
        blocks = [
            block for one in sequences for rows in one.split(tile.block_m) for block in rows.split(tile.block_n, 1)
        ]
        assert counts[name] == sum(bool(block.any()) for block in blocks) > 0, name
