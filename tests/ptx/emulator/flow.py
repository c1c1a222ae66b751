"""Basic blocks: where they end, which may follow, which registers live across their edges, and which goes first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from emulator.meaning import meaning_of
from emulator.syntax import Instruction, Kernel

__all__ = ["END", "Block", "blocks_of"]

END = "end"  # the label of what is after the program


@dataclass
class Block:
    """Instructions that are executed one after the other. Only the last may lead elsewhere, or wait."""

    label: str
    code: list[Instruction] = field(default_factory=list)
    follows: str = END  # the label of the block that stands after it
    leads_to: list[int] = field(default_factory=list)  # indices of blocks
    reads: set[str] = field(default_factory=set)  # registers that it reads before it writes them
    writes: set[str] = field(default_factory=set)
    live_out: set[str] = field(default_factory=set)  # of those alive at its end

    @property
    def last(self) -> Instruction | None:
        """The instruction that leads elsewhere, or waits for other warps."""
        return self.code[-1] if self.code and meaning_of(self.code[-1]).ends else None


def blocks_of(kernel: Kernel) -> list[Block]:
    """The blocks that can be reached, in the order in which lanes that part meet again: the lowest goes first."""
    blocks = _cut(kernel)
    _link(blocks, kernel)
    blocks = _in_order(blocks)
    _find_live(blocks)
    return blocks


def _cut(kernel: Kernel) -> list[Block]:
    targets = {target for item in kernel.instructions for target in meaning_of(item).targets}
    targets |= {label for labels in kernel.tables.values() for label in labels}
    blocks = [Block("entry")]
    for item in kernel.code:
        if isinstance(item, str):
            if item in targets:  # the others are for debuggers
                blocks.append(Block(item))
            continue
        blocks[-1].code.append(item)
        if meaning_of(item).ends:
            blocks.append(Block(f"after {len(blocks)}"))
    for block, following in itertools.pairwise(blocks):
        block.follows = following.label
    return blocks


def _link(blocks: list[Block], kernel: Kernel) -> None:
    index = {block.label: n for n, block in enumerate(blocks)}
    for block in blocks:
        labels = [block.follows]
        if last := block.last:
            meaning = meaning_of(last)
            labels = [label for target in meaning.targets for label in kernel.tables.get(target, [target])]
            if meaning.ends in ("barrier", "registers") or (last.predicate and meaning.ends != "choice"):
                labels.append(block.follows)
        block.leads_to = [index[label] for label in labels if label in index]


def _find_live(blocks: list[Block]) -> None:
    for block in blocks:
        for instruction in block.code:
            block.reads |= set(reads_of(instruction)) - block.writes
            block.writes |= set(meaning_of(instruction).written)
    live_in = [set(block.reads) for block in blocks]
    changed = True
    while changed:
        changed = False
        for n in reversed(range(len(blocks))):
            block = blocks[n]
            block.live_out = set().union(*(live_in[following] for following in block.leads_to))
            alive = block.reads | (block.live_out - block.writes)
            if alive != live_in[n]:
                live_in[n], changed = alive, True


def reads_of(instruction: Instruction) -> Iterator[str]:
    """Registers that it reads. What it writes under a predicate keeps its value where that is false."""
    meaning = meaning_of(instruction)
    yield from meaning.read
    if instruction.predicate:
        yield instruction.predicate
        yield from meaning.written


# ---------------------------------------------------------------------------------------------------------------------
# Order: reverse postorder, in which all blocks of a loop come before what is after it
# ---------------------------------------------------------------------------------------------------------------------


def _in_order(blocks: list[Block]) -> list[Block]:
    loops = _loops(blocks)

    def left(block: int, following: int) -> int:
        """How many loops that step leaves."""
        return sum(block in body and following not in body for body in loops)

    order = _postorder(blocks, left)[::-1]
    rank = {block: n for n, block in enumerate(order)}
    for n in order:
        blocks[n].leads_to = [rank[following] for following in blocks[n].leads_to]
    return [blocks[n] for n in order]


def _postorder(blocks: list[Block], left: Callable[[int, int], int] = lambda block, following: 0) -> list[int]:
    """Depth first, what leaves most loops first (and so, in reverse, last)."""

    def following(block: int) -> Iterator[int]:
        return iter(sorted(blocks[block].leads_to, key=lambda other: -left(block, other)))

    order: list[int] = []
    seen = {0}
    stack = [(0, following(0))]
    while stack:
        block, rest = stack[-1]
        fresh = next((other for other in rest if other not in seen), None)
        if fresh is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(fresh)
            stack.append((fresh, following(fresh)))
    return order


def _loops(blocks: list[Block]) -> Iterable[set[int]]:
    """The bodies of the natural loops: what leads back to a block that dominates it."""
    reachable = set(_postorder(blocks))
    before: dict[int, list[int]] = {block: [] for block in reachable}
    for block in reachable:
        for following in blocks[block].leads_to:
            before[following].append(block)
    dominators = _dominators(reachable, before)
    bodies: dict[int, set[int]] = {}
    for block in reachable:
        for header in set(blocks[block].leads_to) & dominators[block]:
            body, stack = bodies.setdefault(header, {header}), [block]
            while stack:
                other = stack.pop()
                if other not in body:
                    body.add(other)
                    stack += before[other]
    return bodies.values()


def _dominators(reachable: set[int], before: dict[int, list[int]]) -> dict[int, set[int]]:
    dominators = {block: {0} if block == 0 else set(reachable) for block in reachable}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            found = {block} | set.intersection(*(dominators[other] for other in before[block]))
            if found != dominators[block]:
                dominators[block], changed = found, True
    return dominators
