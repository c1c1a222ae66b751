"""Sequences that two and four processes share: each has what one process would, and no more is sent than needed."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch.distributed as dist

import sequence_ranks as on_ranks
from flash_attend.sequence import Shards, blocks_between, pieces_of
from ranks import Ranks
from sequence_ranks import CASES, Case

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "context_parallel.py"
WITHOUT_DROPOUT = [name for name, case in CASES.items() if "dropout" not in name and case.kv_heads == 4]
NUMBERS = 2 * 4 * 4 * 8 * 8  # bytes of k on each of four ranks
MASK = 2 * 4

REFUSALS = (
    "ValueError: q must be the same on every rank of the group, got (1, 2, 3, 8) on rank 0 and (1, 2, 4, 8) on rank 1",
    "ValueError: k must be the same on every rank of the group, got (1, 2, 3, 8) on rank 0",
    "ValueError: causal must be the same on every rank of the group, got False on rank 0 and True on rank 1",
    "ValueError: scale must be the same on every rank of the group, got 0.5 on rank 0 and 1.5 on rank 1",
    "ValueError: layout must be the same on every rank of the group, got contiguous on rank 0 and balanced on rank 1",
    "ValueError: way must be the same on every rank of the group, got ring on rank 0 and heads on rank 1",
    "ValueError: softcap must be the same on every rank of the group, got 1.0 on rank 0 and 2.0 on rank 1",
    "ValueError: q must have an even length in a balanced layout, two pieces, got 3",
    "ValueError: way must not be 'heads': 2 ranks cannot share 2 heads of q and 1 of k and v evenly",
    "ValueError: way must not be 'heads': what dropout keeps depends on the head",
    "ValueError: mask must be key padding, (b, j) or (b|1, h|1, 1, j), where ranks share the keys",
    "ValueError: layout must be one of 'contiguous', 'balanced', got 'zigzag'",
    "ValueError: way must be one of 'auto', 'ring', 'heads', got 'star'",
    "TypeError: group must be a torch.distributed.ProcessGroup, got str 'world'",
    "ValueError: a 2-D mask is key padding (b, j) = (1, 4), got (1, 5)",
)


def test_four_processes(tmp_path: Path) -> None:
    """One test, because starting them takes longer than anything that they do."""
    ranks = Ranks(str(tmp_path / "rendezvous"), 4)
    try:
        ranks.run(on_ranks.make_groups)
        every_rank_has_what_one_process_has(ranks)
        keys_go_once_to_everybody_and_their_gradients_straight_home(ranks)
        nothing_goes_to_ranks_whose_windows_do_not_reach_it(ranks)
        heads_are_exchanged_both_ways(ranks)
        ranks.run(on_ranks.whole_again, "contiguous")
        ranks.run(on_ranks.whole_again, "balanced")
        ranks.run(on_ranks.attends_as_a_module)
        ranks.run(on_ranks.trains_the_example, str(EXAMPLE))
        what_ranks_mean_differently_is_refused_on_each(ranks)
        assert "imed out" in ranks.run(on_ranks.missing)[0]
    finally:
        ranks.close()


def every_rank_has_what_one_process_has(ranks: Ranks) -> None:
    ranks.run(on_ranks.equals_one_process, 2, "contiguous", "ring", list(CASES))
    everywhere = ["causal", "window", "both sides", "alibi", "padded, causal", "more queries", "dropout"]
    ranks.run(on_ranks.equals_one_process, 4, "balanced", "ring", everywhere)
    ranks.run(on_ranks.equals_one_process, 4, "contiguous", "ring", ["both sides", "more queries, both sides"])
    ranks.run(on_ranks.equals_one_process, 2, "balanced", "heads", WITHOUT_DROPOUT)
    ranks.run(on_ranks.equals_one_process, 4, "contiguous", "heads", ["padded, causal", "softcap"])


def keys_go_once_to_everybody_and_their_gradients_straight_home(ranks: Ranks) -> None:
    """Three others get k, v and the mask in either direction; each transfer begins before what came is attended to."""
    for forward, backward, kept in ranks.run(
        on_ranks.sent_by, Case(dict(causal=True), mask="keys"), "balanced", "ring"
    ):
        assert forward == [("sent", 2 * NUMBERS + MASK), ("attended", 0)] * 3 + [("attended", 0)]
        assert sum(size for _, size in backward) == 3 * (2 * NUMBERS + MASK) + 3 * 2 * NUMBERS
        assert backward[:4] == [*forward[:3], ("attended", 0)]
        assert kept <= NUMBERS // 8 + MASK  # an lse and the mask: nothing of another rank's
    for forward, _, _ in ranks.run(on_ranks.sent_by, Case({}, kv_heads=1), "contiguous", "ring"):
        assert sum(size for _, size in forward) == 3 * 2 * NUMBERS // 4


def nothing_goes_to_ranks_whose_windows_do_not_reach_it(ranks: Ranks) -> None:
    """Shards are of four positions: of those before a query, 4 are in its own and the one before, 5 in one more."""
    for window, neighbours in (((4, 0), 1), ((5, 0), 2), ((0, 0), 0)):
        found = ranks.run(on_ranks.sent_by, Case(dict(causal=True, window=window)), "contiguous", "ring")
        for rank, (forward, backward, _) in enumerate(found):
            receivers, senders = min(neighbours, 3 - rank), min(neighbours, rank)
            assert sum(size for _, size in forward) == receivers * 2 * NUMBERS
            assert sum(size for _, size in backward) == (receivers + senders) * 2 * NUMBERS


def heads_are_exchanged_both_ways(ranks: Ranks) -> None:
    """Of q, k, v and out, all of the same size, three quarters; and of their gradients."""
    for forward, backward, _ in ranks.run(on_ranks.sent_by, Case({}), "balanced", "heads"):
        assert sum(size for _, size in forward) == sum(size for _, size in backward) == 4 * NUMBERS * 3 // 4


def what_ranks_mean_differently_is_refused_on_each(ranks: Ranks) -> None:
    for told in ranks.run(on_ranks.refusals)[:2]:
        assert len(told) == len(REFUSALS)
        for message, expected in zip(told, REFUSALS, strict=True):
            assert message.startswith(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Who sees whom
# ---------------------------------------------------------------------------------------------------------------------

LENGTHS = ((4, 4), (2, 6), (6, 2))  # of queries and of keys on each rank
WINDOWS = ((None, None), (None, 0), (0, 0), (3, 0), (2, 5), (None, 4), (7, None))


@pytest.mark.parametrize(("apart", "sided"), ((False, False), (True, False), (False, True)))
@pytest.mark.parametrize("layout", ("contiguous", "balanced"))
def test_blocks_are_all_pairs_that_see_each_other(layout: str, apart: bool, sided: bool) -> None:
    """Each once; and what a block says of itself is what the positions of its rows and keys say."""
    ranks = 3
    for (queries, keys), (left, right) in product(LENGTHS, WINDOWS):
        offset = ranks * (keys - queries)
        lowest, highest = None if left is None else offset - left, None if right is None else offset + right
        shards = Shards(layout, ranks, queries, keys, lowest, highest, apart, sided)
        for rank, source in product(range(ranks), repeat=2):
            rows = [x for piece in pieces_of(layout, queries, ranks, rank) for x in range(*piece)]
            columns = [y for piece in pieces_of(layout, keys, ranks, source) for y in range(*piece)]
            ahead = {(x, y): columns[y] - rows[x] - offset for x, y in product(range(queries), range(keys))}
            seen = []
            for block in blocks_between(shards, rank, source):
                found = pairs_of(block)
                seen += found
                if apart or sided:
                    assert block.origin == (rows[block.rows[0]], columns[block.keys[0]])
                if block.side:
                    assert all(ahead[pair] * block.side >= 0 for pair in found)
                elif sided:
                    assert block.rows[1] - block.rows[0] == block.keys[1] - block.keys[0]
                    assert ahead[block.rows[0], block.keys[0]] == 0
            visible = [pair for pair, y in ahead.items() if -y <= (left if left is not None else 99)]
            assert sorted(seen) == [pair for pair in visible if ahead[pair] <= (right if right is not None else 99)]


def pairs_of(block) -> list[tuple[int, int]]:
    """Those that a call with the block's window computes."""
    (first_row, last_row), (first_key, last_key), (left, right) = block.rows, block.keys, block.window
    assert left is None or left >= 0
    assert right is None or right >= 0
    behind = last_key - last_row
    return [
        (x, y)
        for x, y in product(range(first_row, last_row), range(first_key, last_key))
        if (left is None or y >= x + behind - left) and (right is None or y <= x + behind + right)
    ]


def test_a_balanced_layout_gives_each_step_one_block_and_all_ranks_the_same_work() -> None:
    shards = Shards("balanced", 4, 8, 8, None, 0)
    for rank, source in product(range(4), repeat=2):
        (block,) = blocks_between(shards, rank, source)
        assert len(pairs_of(block)) == (8 * 9 // 2 if rank == source else 8 * 4)
