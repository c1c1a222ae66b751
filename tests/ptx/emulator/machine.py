"""The machine: programs of a launch side by side, and who executes which block when.

Threads that are at the same block execute it together. Which block is next is the lowest that any thread is ready for
(`lockstep`), or drawn (`random`, in which warps part too, four at a time where they multiply together). Nothing takes
time: a copy comes when nobody can go on without it (`late`), at once (`early`), or at any time (`random`).
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy import ndarray as Array

from emulator.barriers import Barriers
from emulator.bulk import BulkCopies, TensorMap
from emulator.copies import ThreadCopies
from emulator.faults import Fault, Unsupported
from emulator.flow import Block
from emulator.groups import GroupProducts
from emulator.kinds import DTYPES, raw
from emulator.meaning import lookup
from emulator.memory import GlobalMemory
from emulator.races import ALL_LANES, LANES, Races
from emulator.shared import SharedMemory
from emulator.syntax import Kernel
from emulator.translate import Program
from emulator.turns import Turns

__all__ = ["Machine", "Mask", "Options"]

Mask = Array | None  # which threads take part, [programs, threads]; None for all


@dataclass(frozen=True)
class Options:
    copies: Literal["late", "early", "random"] = "late"
    order: Literal["lockstep", "random"] | None = None  # None: random where warps have programs of their own
    seed: int = 0
    threads: int = 2048  # at most so many side by side, but for one program


class _TakingPart:
    """The threads, warps and groups of four warps that a mask names: what instruction after instruction asks for."""

    def __init__(self, mask: Mask, shape: tuple[int, int]) -> None:
        self.threads = np.ones(shape, bool) if mask is None else spread(mask, shape)
        lanes = self.threads.reshape(shape[0], -1, 32)
        self.warps = lanes.any(2)  # [programs, warps]: those of which a thread takes part
        self.whole = bool((self.warps == lanes.all(2)).all())

    @cached_property
    def groups(self) -> Array:
        """[programs, groups]: those of which a warp takes part."""
        return self.warps.reshape(len(self.warps), -1, 4).any(2)

    @cached_property
    def whole_groups(self) -> bool:
        return bool((self.groups == self.warps.reshape(len(self.warps), -1, 4).all(2)).all())


class Machine:
    """Some programs of a launch. Tensors are in `memory`; shared memory, barriers and copies are the machine's own."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        parameters: dict[str, bytes],
        shared: int,
        grid: int,
        programs: Array,
        *,
        maps: dict[int, TensorMap] | None = None,
        options: Options = Options(),
    ) -> None:
        self.program, self.memory, self.parameters, self.options = program, memory, parameters, options
        self.programs = programs
        threads = program.kernel.threads
        self.shape = len(programs), threads
        self.warps = threads // 32
        self.random = random.Random(f"{options.seed} {int(programs[0])}")
        self.special = _special_registers(programs, threads, grid)
        self.agents = np.arange(len(programs) * self.warps).repeat(32).reshape(self.shape)
        self.who = self.agents * LANES + np.arange(threads) % 32
        self.all_lanes = np.arange(len(programs) * threads).reshape(self.shape)
        memory.machine = self
        self.shared = SharedMemory(self, shared)
        self.races = Races(len(programs), self.warps, self.shared.stride, smallest_access(program.kernel))
        self.copies = ThreadCopies(self)
        self.barriers = Barriers(self)
        self.bulk = BulkCopies(self, maps or {})
        self.products = GroupProducts(self)
        own = program.kernel.most_registers or 0
        self.registers = np.full((len(programs), -(-self.warps // 4)), own, np.int64)  # of a thread, by four warps
        self._everybody = _TakingPart(None, self.shape)
        self._last: tuple[Mask, _TakingPart] = (None, self._everybody)
        self.instructions = 0  # executed, by warps
        self.executed: set[int] = set()  # blocks

    def run(self) -> None:
        try:
            with np.errstate(all="ignore"):
                Turns(self).run()
        except (Fault, Unsupported) as error:
            raise type(error)(f"{error}{self._where(error)}") from error
        if self.bulk.loads:
            raise Fault(f"{len(self.bulk.loads)} bulk copies are in flight when the programs end")
        if self.bulk.stores:
            raise Fault("a bulk copy may still be reading shared memory when the programs end")

    def _where(self, error: Exception) -> str:
        """The instruction that an error comes from."""
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.program.file
        ]
        item = self.program.instruction_at(lines[0]) if lines else None
        if item is None:
            return ""
        place = f"line {item.line} of {self.program.kernel.name}'s PTX, from {item.source or 'nowhere'}"
        return f"\n    `{item.text}`, {place} (PTX ISA, {lookup(item.op).section})"

    # Who takes part --------------------------------------------------------------------------------------------------

    def both(self, mask: Mask, predicate: Array) -> Mask:
        return predicate if mask is None else mask & predicate

    def chosen(self, values: Array, mask: Mask) -> Array:
        """The values of the threads that take part, in a row."""
        values = spread(values, self.shape)
        return values.ravel() if mask is None else values[spread(mask, self.shape)]

    def taking_part(self, places: Array, mask: Mask) -> tuple[Array, Array]:
        """Their places, and who they are, for `races`."""
        return self.chosen(places, mask), self.chosen(self.who, mask)

    def of_warps(self, places: Array, warps: Array) -> tuple[Array, Array]:
        """The same of places [programs, warps, ...] that belong to no single lane."""
        who = self.who[:, ::32].reshape(*warps.shape, *[1] * (places.ndim - 2)) + ALL_LANES
        return places[warps].ravel(), np.broadcast_to(who, places.shape)[warps].ravel()

    def each(self, mask: Mask, first: Array, offset: int, *values: Array) -> Iterator[list[int]]:
        """Program, thread and values of every thread that takes part, `offset` added to the first."""
        arrays = [spread(x, self.shape) for x in (first, *values)]
        for row, thread in zip(*np.nonzero(self.threads_of(mask)), strict=True):
            at, *rest = (int(x[row, thread]) for x in arrays)
            yield [int(row), int(thread), at + offset, *rest]

    def each_warp(self, mask: Mask, *values: Array) -> Iterator[tuple]:
        """Program, warp, threads and values of every warp that takes part; twice, where its threads' values differ."""
        arrays = [self.lanes(x) for x in values]
        threads = self.lanes(self.threads_of(mask))
        for row, warp in zip(*np.nonzero(threads.any(2)), strict=True):
            lanes = np.flatnonzero(threads[row, warp])
            while len(lanes):
                found = [x[row, warp, lanes[0]] for x in arrays]
                same = np.all([x[row, warp, lanes] == value for x, value in zip(arrays, found, strict=True)], axis=0)
                yield int(row), int(warp), 32 * warp + lanes[same], *map(int, found)
                lanes = lanes[~same]

    def _taking_part(self, mask: Mask) -> _TakingPart:
        """Kept for the last mask: the instructions of a block have one."""
        if mask is None:
            return self._everybody
        if mask is not self._last[0]:
            self._last = mask, _TakingPart(mask, self.shape)
        return self._last[1]

    def threads_of(self, mask: Mask) -> Array:
        return self._taking_part(mask).threads

    def warps_of(self, mask: Mask) -> Array:
        return self._taking_part(mask).warps

    def groups_of(self, mask: Mask) -> Array:
        return self._taking_part(mask).groups

    def lanes(self, values: Array) -> Array:
        """[programs, warps, 32]."""
        return spread(values, self.shape).reshape(self.shape[0], self.warps, 32)

    def agent(self, row: int, warp: int) -> int:
        return row * self.warps + warp

    def whole_warps(self, mask: Mask) -> None:
        if not self._taking_part(mask).whole:
            raise Fault("an instruction for whole warps is reached by a part of one")

    def whole_groups(self, mask: Mask) -> None:
        self.whole_warps(mask)
        if not self._taking_part(mask).whole_groups:
            raise Fault("an instruction for four warps is reached by some of them")

    # What instructions ask for ---------------------------------------------------------------------------------------

    def space(self, name: str) -> GlobalMemory | SharedMemory:
        return self.memory if name == "global" else self.shared

    def parameter(self, name: str, offset: int, size: int) -> Array:
        piece = self.parameters[name][offset : offset + size]
        return np.frombuffer(piece, DTYPES[raw(size)]).reshape(1, 1)

    def sync_warps(self, mask: Mask) -> None:
        self.whole_warps(mask)
        self.races.sync_lanes(np.flatnonzero(self.warps_of(mask)))

    def fence_async(self, mask: Mask) -> None:
        """What these warps have done to shared memory, copies in bulk and products may see from now on."""
        warps = self.warps_of(mask)
        self.races.fence(np.flatnonzero(warps))
        self.barriers.fence(warps)

    def give_registers(self, count: int, mask: Mask) -> None:
        self.registers[self.groups_of(mask)] = count


def spread(values: Array, shape: tuple[int, int]) -> Array:
    """`np.broadcast_to`, which takes its time even where there is nothing to do."""
    return values if values.shape == shape else np.broadcast_to(values, shape)


def _special_registers(programs: Array, threads: int, grid: int) -> dict[str, Array]:
    thread = np.arange(threads, dtype=np.uint32)[None]
    one = np.ones((1, 1), np.uint32)
    return {
        **{f"%{name}.{axis}": one * (name[0] == "n") for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "yz"},
        "%tid.x": thread, "%ntid.x": one * np.uint32(threads), "%laneid": thread % np.uint32(32),
        "%warpid": thread // np.uint32(32), "%ctaid.x": programs.astype(np.uint32)[:, None],
        "%nctaid.x": one * np.uint32(grid),
    }  # fmt: skip


def smallest_access(kernel: Kernel) -> int:
    """Bytes that two warps may touch side by side: the smallest that an instruction touches."""
    sizes = [
        int(item.type[1:]) // 8
        for item in kernel.instructions
        if item.parts[0] in ("ld", "st", "atom", "red") and any(part.startswith("shared") for part in item.parts)
    ]
    return min([4, *sizes])


def describe_block(block: Block) -> str:
    item = block.code[-1] if block.code else None
    return f"`{item.text}`, line {item.line}, from {item.source or 'nowhere'}" if item else block.label
