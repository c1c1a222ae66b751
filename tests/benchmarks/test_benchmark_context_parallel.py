"""The simulation of shared sequences: its table is the one in the documents, and its counts are those of pairs."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

import context_parallel
from context_parallel import Call, Pass
from flash_attend.sequence import Shards, blocks_between

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "context_parallel.md"


def test_the_document_has_its_table() -> None:
    assert "\n".join(context_parallel.table()) in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("lengths", ((6, 6), (3, 7), (7, 2)))
@pytest.mark.parametrize("window", ((None, None), (None, 0), (2, 0), (0, 0), (3, 2), (None, 2), (1, None)))
def test_pairs_are_counted(lengths: tuple[int, int], window: tuple[int | None, int | None]) -> None:
    (queries, keys), (left, right) = lengths, window
    offset = keys - queries
    lowest, highest = None if left is None else offset - left, None if right is None else offset + right
    seen = [
        (x, y)
        for x, y in product(range(queries), range(keys))
        if (lowest is None or y - x >= lowest) and (highest is None or y - x <= highest)
    ]
    blocks = blocks_between(Shards("contiguous", 1, queries, keys, lowest, highest), 0, 0)
    assert sum(map(context_parallel.pairs_of, blocks)) == len(seen)


def test_free_links_and_memory_leave_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MESSAGE", "LAUNCHES"):
        monkeypatch.setattr(context_parallel, name, 0.0)
    monkeypatch.setattr(context_parallel, "MEMORY", 1e99)
    run = Pass(4, 500.0, backward=False)
    products = 4 * 32 * 128 * 2**17 * (2**17 + 1) / 2  # of a causal call
    for way in (context_parallel.by_ring, context_parallel.by_heads):
        assert way(Call(2**17, 8, "causal"), run, 1e99) == pytest.approx(products / 8 / 500e12, rel=1e-4)


def test_a_slow_link_is_waited_for() -> None:
    """Seven messages of k and v, one after the other, and the last block."""
    run, call = Pass(4, 500.0, backward=False), Call(2**17, 8, "full")
    message = 2 * call.numbers(8) * 2
    assert context_parallel.by_ring(call, run, 1e6) == pytest.approx(7 * message / 1e6, rel=1e-2)
