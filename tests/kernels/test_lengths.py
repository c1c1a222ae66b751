"""Which program takes which tile of packed sequences: each once, the longest first, and no block that nobody sees."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from backends import TRITON_INTERPRETER, Backend
from flash_attend import flash_attention_packed
from flash_attend.kernels import backward, forward
from flash_attend.kernels.configs import INTERPRETED
from flash_attend.kernels.lengths import packed_tiles, tile_count
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
