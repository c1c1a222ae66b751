"""Whose turn it is: which block is executed next, by which threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from emulator.faults import Fault

if TYPE_CHECKING:
    from emulator.machine import Machine, Mask

__all__ = ["Turns"]

COPY_COMES = 0.1  # how often a copy comes before it has to, of those that come at any time
WARPS_PART = 0.2  # how often some warps of those at a block go first


class Turns:
    """Where every thread is. As long as all are at one block and none waits, that is one number."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        program, options = machine.program, machine.options
        self.end = len(program.blocks)
        self.drawn = (options.order or ("random" if program.specialized else "lockstep")) == "random"
        self.together: int | None = 0
        self.at = np.zeros(machine.shape, np.int64)
        self.waits_at = np.full(machine.shape, -1, np.int64)  # a barrier's number
        self.asleep = np.full(machine.shape, -1, np.int64)  # until an mbarrier changes: how many have at this point
        self.wanted = np.zeros_like(machine.registers)  # registers of a thread, by four warps: they wait for them
        self.pool = int(machine.registers[0].sum())
        self.registers = list(program.poison)

    def run(self) -> None:
        machine = self.machine
        functions, lengths = machine.program.functions, [len(block.code) for block in machine.program.blocks]
        while (turn := self._next()) is not None:
            block, mask = turn
            machine.executed.add(block)
            warps = self.at.size // 32 if mask is None else int(mask.sum()) // 32
            machine.instructions += lengths[block] * warps
            self._go(block, mask, *functions[block](self.registers, machine, mask))
            if machine.options.copies == "random" and machine.random.random() < COPY_COMES:
                machine.copies.land_any()

    # Next ------------------------------------------------------------------------------------------------------------

    def _next(self) -> tuple[int, Mask] | None:
        """A block and who executes it; None at the end."""
        if self.together is not None and not self.drawn:
            return None if self.together == self.end else (self.together, None)
        self._apart()
        machine = self.machine
        while (self.at != self.end).any():
            ready = self._ready()
            come = machine.options.copies == "random" and machine.random.random() < COPY_COMES
            if (come or not ready.any()) and machine.bulk.land_next():
                continue
            if not ready.any():
                raise Fault(f"deadlock: {self._everybody()}")
            return self._choose(ready)
        return None

    def _apart(self) -> None:
        if self.together is not None:
            self.at[:] = self.together
            self.together = None

    def _ready(self) -> Array:
        """Who can go on: of a warp, those of its threads that are furthest behind."""
        first = self.machine.lanes(self.at).min(2).repeat(32, axis=1)
        awake = (self.waits_at < 0) & (self.asleep != self.machine.barriers.changes)
        if self.wanted.any():
            awake &= ~self._wait_for_registers().repeat(self.at.shape[1] // self.wanted.shape[1], axis=1)
        return (self.at != self.end) & awake & (self.at == first)

    def _wait_for_registers(self) -> Array:
        """Which groups of four warps still do, after those that can have taken theirs."""
        held = self.machine.registers
        for row, group in zip(*np.nonzero(self.wanted), strict=True):
            if held[row].sum() - held[row, group] + self.wanted[row, group] <= self.pool:
                held[row, group], self.wanted[row, group] = self.wanted[row, group], 0
        return self.wanted > 0

    def _choose(self, ready: Array) -> tuple[int, Mask]:
        blocks = np.unique(self.at[ready])
        block = int(self.machine.random.choice(list(blocks)) if self.drawn else blocks[0])
        mask = ready & (self.at == block)
        if self.drawn and self.machine.random.random() < WARPS_PART:
            mask = self._some(mask)
        return block, None if mask.all() else mask

    def _some(self, mask: Array) -> Array:
        """Some of the warps, or of the groups of four that multiply together."""
        size = 128 if self.machine.program.sums else 32
        groups = mask.reshape(len(mask), -1, size)
        drawn = np.array([self.machine.random.random() < 0.5 for _ in range(groups[:, :, 0].size)])
        some = groups & drawn.reshape(*groups.shape[:2], 1)
        return some.reshape(mask.shape) if some.any() else mask

    # On --------------------------------------------------------------------------------------------------------------

    def _go(self, block: int, mask: Mask, kind: str, *ways) -> None:
        if kind == "go":
            self._move(mask, ways[0])
        elif kind == "branch":
            self._branch(block, mask, *ways)
        elif kind == "choice":
            targets, choice = ways
            taken = np.where(self.machine.threads_of(mask), choice, 0).astype(np.int64)
            self._move(mask, targets[taken])
        elif kind == "registers":
            following, count = ways
            self.wanted[self.machine.groups_of(mask)] = int(count[0, 0])
            self._move(mask, following)
            self._apart()
        else:
            self._arrive(mask, *ways)

    def _move(self, mask: Mask, to: int | Array) -> None:
        if self.together is not None and isinstance(to, int):
            self.together = to
            return
        self._apart()
        self.at = np.broadcast_to(to, self.at.shape).copy() if mask is None else np.where(mask, to, self.at)
        first = int(self.at[0, 0])
        if not self.drawn and (self.at == first).all() and not (self.wanted.any() or (self.waits_at >= 0).any()):
            self.together = first

    def _branch(self, block: int, mask: Mask, target: int, following: int, condition: Array) -> None:
        if self.together is not None and (condition.all() or not condition.any()):
            to = target if condition.all() else following
            if to != block or not self.machine.program.waits[block]:
                self.together = to
                return
        self._move(mask, np.where(condition, target, following))
        if target == block and self.machine.program.waits[block]:
            self._apart()
            again = self.machine.threads_of(mask) & (self.at == block)
            self.asleep = np.where(again, self.machine.barriers.changes, self.asleep)

    def _arrive(self, mask: Mask, following: int, which: Array, count: Array | None = None) -> None:
        machine = self.machine
        if self.together is not None and count is None and (which == 0).all():
            machine.races.meet(machine.agents[:, ::32])
            self.together = following
            return
        machine.whole_warps(mask)
        self._apart()
        self._move(mask, following)
        self._apart()
        threads = machine.threads_of(mask)
        expected = np.broadcast_to(machine.shape[1] if count is None else count, machine.shape)
        self.waits_at = np.where(threads, which, self.waits_at).astype(np.int64)
        for row in np.flatnonzero(threads.any(1)):
            for barrier in np.unique(self.waits_at[row][threads[row]]):
                here = self.waits_at[row] == barrier
                self._complete(row, int(barrier), here, int(expected[row][threads[row] & here][0]))

    def _complete(self, row: int, barrier: int, here: Array, expected: int) -> None:
        arrived = int(here.sum())
        if arrived > expected:
            raise Fault(f"{arrived} threads at barrier {barrier}, which is for {expected}")
        if arrived == expected:
            self.waits_at[row][here] = -1
            warps = np.unique(np.flatnonzero(here) // 32)
            self.machine.races.meet(self.machine.agent(row, 0) + warps)

    def _everybody(self) -> str:
        """Where each warp waits."""
        from emulator.machine import describe_block

        machine, places = self.machine, []
        for row in range(machine.shape[0]):
            for warp in range(machine.warps):
                at, barrier = int(self.at[row, 32 * warp]), int(self.waits_at[row, 32 * warp])
                if at != self.end:
                    where = f"barrier {barrier}" if barrier >= 0 else describe_block(machine.program.blocks[at])
                    places.append(f"program {machine.programs[row]} warp {warp} at {where}")
        return "; ".join(places)
