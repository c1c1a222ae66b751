"""When eight H100s attend to sequences that they share faster by a ring, and when by heads: a simulation.

    python benchmarks/context_parallel.py

Each rank computes the blocks that `flash_attend.sequence` gives it, at the rate of a single device; transfers go on
beside them, and begin when sender and receiver have both come so far. A single device's rate is what docs/estimates.md
has until a GPU was measured. Links and memory are by their data sheets, less what is lost as a rule: assumptions, all
of them below.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flash_attend.sequence import Block, Shards, blocks_between

RANKS, HEADS, DIM = 8, 32, 128
HALF = 2  # bytes of a number of bfloat16
LINKS = {"NVLink": 0.8 * 450e9, "InfiniBand": 0.9 * 50e9}  # bytes a second in each direction, of each GPU
MESSAGE = 15e-6  # seconds until a message's first byte, agreement of sender and receiver included
LAUNCHES = 30e-6  # of one block's kernels, and of what merges it
MEMORY = 0.9 * 3.35e12  # bytes a second
# Bytes of memory for each number, beside what the kernels of one device move.
MERGED = 18  # of out: the sum scaled, and what a block found added to it
ADDED_Q = 10  # of the gradient of q, added to its sum
ADDED_K = 40  # of the gradients of k and v: zeros, a sum, rounded, sent, and added where they belong
EXCHANGED = 8  # of what is exchanged for heads: laid out for each rank, and put in order
ESTIMATES = Path(__file__).parent.parent / "docs" / "estimates.md"


class Call(NamedTuple):
    """Attention over one sequence in bfloat16."""

    tokens: int
    kv_heads: int
    kind: str  # "causal", "full" or "window": causal, and no more than 4096 tokens back

    @property
    def shards(self) -> Shards:
        """As they are shared for a ring."""
        layout = "balanced" if self.kind == "causal" else "contiguous"
        lowest, highest = -4096 if self.kind == "window" else None, None if self.kind == "full" else 0
        return Shards(layout, RANKS, self.tokens // RANKS, self.tokens // RANKS, lowest, highest)

    def numbers(self, heads: int) -> int:
        """Of a tensor with so many heads, in a rank's shard."""
        return self.tokens // RANKS * heads * DIM


class Pass(NamedTuple):
    """A forward, or a backward."""

    products: float  # multiplications and additions for a pair of a query and a key, in units of DIM
    tflops: float
    backward: bool

    @staticmethod
    def both(arch: str = "sm_90") -> tuple[Pass, Pass]:
        """By the figures of docs/estimates.md."""
        rates = {
            way: float(rate)
            for way, rate in re.findall(
                rf"^\| (\w+) {arch} half d{DIM} \|[^|]*\| (\d+) \|", ESTIMATES.read_text(), re.M
            )
        }
        return Pass(4, rates["forward"], False), Pass(10, rates["backward"], True)

    def seconds(self, pairs: int) -> float:
        """Of so many pairs, of one head each."""
        return pairs * self.products * DIM / (self.tflops * 1e12)


def pairs_of(block: Block) -> int:
    """How many pairs of a query and a key see each other in a block."""
    (first, last), (first_key, last_key), (left, right) = block.rows, block.keys, block.window
    rows, keys = last - first, last_key - first_key
    # What is cut off at the corners: 1, 2, ... keys of the rows.
    late = 0 if right is None else np.clip(np.arange(rows) - right, 0, keys).sum()
    early = 0 if left is None else np.clip(np.arange(keys) - left, 0, rows).sum()
    return rows * keys - int(late + early)


def by_ring(call: Call, run: Pass, bandwidth: float) -> float:
    """Seconds until the last rank is done."""
    shards = call.shards
    message = 2 * call.numbers(call.kv_heads) * HALF

    def work(rank: int, source: int) -> float:
        blocks = blocks_between(shards, rank, source)
        seconds = sum(HEADS * run.seconds(pairs_of(block)) + LAUNCHES for block in blocks)
        rows = sum(block.rows[1] - block.rows[0] for block in blocks) * HEADS * DIM
        moved = rows * (ADDED_Q if run.backward else MERGED)
        if run.backward and blocks:
            moved += 2 * call.numbers(call.kv_heads) * ADDED_K
        return seconds + moved / MEMORY

    began = done = [0.0] * RANKS  # of the step before
    link = [0.0] * RANKS  # when a rank's link is free again
    for step in range(RANKS):
        following, after = [], []
        for rank in range(RANKS):
            source = (rank - step) % RANKS
            start = done[rank]
            if step and blocks_between(shards, rank, source):
                sent = max(began[rank], began[source], link[rank])
                link[rank] = sent + MESSAGE + message / bandwidth * (2 if run.backward else 1)
                start = max(start, link[rank])
            following.append(start)
            after.append(start + work(rank, source))
        began, done = following, after
    return max(done)


def by_heads(call: Call, run: Pass, bandwidth: float) -> float:
    """Seconds of the exchange, of a device's own attention, and of the exchange back."""
    whole = Shards("contiguous", 1, call.tokens, call.tokens, call.shards.lowest, call.shards.highest)
    (block,) = blocks_between(whole, 0, 0)
    numbers = 2 * call.numbers(HEADS) + 2 * call.numbers(call.kv_heads)
    exchange = numbers * HALF * (RANKS - 1) / RANKS / bandwidth + numbers * EXCHANGED / MEMORY
    return 2 * MESSAGE + exchange + LAUNCHES + HEADS / RANKS * run.seconds(pairs_of(block))


def rows() -> Iterator[tuple[str, ...]]:
    """Of the table: milliseconds of a forward, and of a forward with its backward, by each way."""
    forward, backward = Pass.both()
    lengths, kinds = {"128k": 2**17, "1M": 2**20}, ("causal", "full", "window")
    for link, length, kind, kv_heads in product(LINKS, lengths, kinds, (8, 32)):
        call = Call(lengths[length], kv_heads, kind)
        ahead, back = (
            [1e3 * way(call, run, LINKS[link]) for way in (by_ring, by_heads)] for run in (forward, backward)
        )
        both = [sum(pair) for pair in zip(ahead, back, strict=True)]
        told = (f"{ring:.1f} / {heads:.1f} ({ring / heads:.2f})" for ring, heads in (ahead, both))
        yield (link, length, kind, str(kv_heads), *told)


def table() -> list[str]:
    """The lines of the table in docs/context_parallel.md."""
    head = ("link", "tokens", "kind", "heads of k", "forward, ms: ring / heads", "with backward, ms: ring / heads")
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows())]


if __name__ == "__main__":
    sys.exit(print("\n".join(table())))
