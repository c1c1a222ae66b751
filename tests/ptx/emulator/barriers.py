"""mbarriers: phases, arrivals, bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from emulator.faults import Fault
from emulator.races import LANES
from emulator.shared import BASE

if TYPE_CHECKING:
    from emulator.machine import Machine

__all__ = ["Barriers"]

BYTES = 8  # of one in shared memory


@dataclass
class _Barrier:
    expected: int  # arrivals in each phase
    pending: int  # arrivals until the phase is complete
    made_by: int  # the warp that initialized it
    made_at: int  # and its clock
    bytes: int = 0  # that are still to come
    phase: int = 0
    fenced: bool = False  # since it was initialized: bulk copies may complete on it
    gathered: Array | None = None  # what those who arrived in this phase knew
    published: Array | None = None  # what those who arrived in complete phases knew
    used: dict[int, int] = field(default_factory=dict)  # by which warps, and their clocks then


class Barriers:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.barriers: dict[tuple[int, int], _Barrier] = {}  # by program and address
        self.changes = 0  # phases that were completed

    def _at(self, row: int, address: int, warp: int | None = None) -> _Barrier:
        barrier = self.barriers.get((row, address))
        if barrier is None:
            raise Fault(f"no mbarrier at byte {address - BASE} of shared memory")
        if warp is not None:
            agent = self.machine.agent(row, warp)
            if not self.machine.races.knows(agent, barrier.made_by, barrier.made_at):
                raise Fault(f"warp {warp} uses an mbarrier whose initialization is not ordered before")
            barrier.used[agent] = int(self.machine.races.now(agent))
        return barrier

    def init(self, lanes: Iterable[list[int]], count: int) -> None:
        for row, thread, address in lanes:
            if (row, address) in self.barriers:
                raise Fault("an mbarrier is initialized where there is one")
            agent, races, shared = self.machine.agent(row, thread // 32), self.machine.races, self.machine.shared
            place = int(shared.first[row, 0]) + address - BASE
            races.write(np.array([place]), np.array([agent * LANES + thread % 32]), BYTES)
            shared.bytes[place : place + BYTES] = 0xFF
            self.barriers[row, address] = _Barrier(count, count, agent, int(races.now(agent)))

    def fence(self, warps: Array) -> None:
        """What these warps have initialized, bulk copies may complete on from now on."""
        for (row, _), barrier in self.barriers.items():
            for warp in () if barrier.fenced else np.flatnonzero(warps[row]):
                agent = self.machine.agent(row, int(warp))
                barrier.fenced |= self.machine.races.knows(agent, barrier.made_by, barrier.made_at)

    def invalidate(self, lanes: Iterable[list[int]]) -> None:
        for row, thread, address in lanes:
            barrier, agent = self._at(row, address, thread // 32), self.machine.agent(row, thread // 32)
            if not all(self.machine.races.knows(agent, of, clock) for of, clock in barrier.used.items()):
                raise Fault("an mbarrier is invalidated with nothing that orders its uses before")
            if self.machine.bulk.completes_on(row, address):
                raise Fault("an mbarrier is invalidated while a copy to it is in flight")
            del self.barriers[row, address]

    def arrive(self, lanes: Iterable[list[int]], count: int, expected: int) -> None:
        for row, thread, address in lanes:
            barrier = self._at(row, address, thread // 32)
            self._gather(barrier, self.machine.races.tell(self.machine.agent(row, thread // 32)))
            barrier.bytes += expected
            barrier.pending -= count
            if barrier.pending < 0:
                raise Fault("more arrivals than an mbarrier expects")
            self._step(barrier)

    def check_copy(self, row: int, address: int, warp: int) -> None:
        """Whether a bulk copy may complete on it. In kernels without partitions Triton itself puts no fence there."""
        fenced = self._at(row, address, warp).fenced
        if not fenced and self.machine.program.specialized:
            raise Fault("a bulk copy completes on an mbarrier that was initialized without a fence since")

    def complete_bytes(self, row: int, address: int, size: int, known: Array) -> None:
        barrier = self._at(row, address)
        self._gather(barrier, known)
        barrier.bytes -= size
        self._step(barrier)

    def _gather(self, barrier: _Barrier, known: Array) -> None:
        barrier.gathered = known if barrier.gathered is None else np.maximum(barrier.gathered, known)

    def _step(self, barrier: _Barrier) -> None:
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.published = barrier.gathered
            barrier.phase ^= 1
            barrier.pending = barrier.expected
            self.changes += 1

    def complete(self, row: int, warp: int, address: int, parity: int) -> bool:
        """Whether the phase of this parity is complete; who hears so knows what those who arrived knew."""
        barrier = self._at(row, address, warp)
        if parity == barrier.phase:
            return False
        if barrier.published is not None:
            self.machine.races.learn(self.machine.agent(row, warp), barrier.published)
        return True
