"""Who may touch shared memory when: vector clocks.

Every warp has a clock, which goes on when the warp tells others what it has done: at a barrier, at an arrival. A warp
knows of the others' clocks what they told it. A byte remembers who wrote it and when, and when each warp last read it;
who comes after must know of it.

An asynchronous copy into shared memory is a write that is unfinished until it is waited for, a product or a copy out of
it a read that is. A bulk copy is written by no warp but by the mbarrier on which it completes: that has a clock of its
own, of which those know who have waited for a phase. So one copy says nothing of another on another mbarrier.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy import ndarray as Array

from emulator.faults import Fault

__all__ = ["ALL_LANES", "LANES", "Races"]

UNFINISHED = 2**30
BARRIERS = 64  # mbarriers of a program on which bulk copies complete
LANES = 64
ALL_LANES = 32


class Races:
    """`places` are bytes of all programs' shared memory, `agents` warps: warp w of the n-th program is n warps + w."""

    def __init__(self, programs: int, warps: int, stride: int, unit: int) -> None:
        self.warps, self.nobody, self.stride, self.unit = warps, warps, stride, unit
        count = programs * stride // unit  # units: as many bytes as the smallest access has
        agents = np.arange(programs * warps)
        self.warp_of = agents % warps
        self.known = np.zeros((programs * warps, warps + 1 + BARRIERS), np.int32)
        self.known[agents, self.warp_of] = 1
        self.columns: dict[int, int] = {}  # of mbarriers in `known`, by their addresses
        self.barrier_clock = np.zeros((programs, BARRIERS), np.int32)
        self.writer = np.full(count, self.nobody, np.int16)
        self.write_clock = np.zeros(count, np.int32)
        self.read_clock = np.zeros((count, warps), np.int32)
        self.lane = np.full(count, -1, np.int64)  # the lane of the last write, as `who` has it
        self.synced = np.zeros(len(agents), np.int32)  # how often the lanes of a warp have waited for each other
        self.synced_at = np.zeros(count, np.int32)  # that, at the last write
        self.dirty = np.zeros(count, bool)  # stored, with no fence since: not for asynchronous eyes

    # Who knows what --------------------------------------------------------------------------------------------------

    def meet(self, agents: Array) -> None:
        """A barrier of these warps of one program, or, in two dimensions, of so many in each."""
        known = self.known[agents].max(axis=-2, keepdims=True)
        self.known[agents] = known
        self.known[agents, self.warp_of[agents]] += 1
        self.synced[agents] += 1

    def sync_lanes(self, agents: Array) -> None:
        self.synced[agents] += 1

    def tell(self, agent: int) -> Array:
        """What a warp knows, for others; what it does from here on they will not know of."""
        known = self.known[agent].copy()
        self.known[agent, self.warp_of[agent]] += 1
        return known

    def learn(self, agent: int, known: Array) -> None:
        self.known[agent] = np.maximum(self.known[agent], known)
        self.synced[agent] += 1

    def knows(self, agent: int, of: int, clock: int) -> bool:
        return bool(self.known[agent, self.warp_of[of]] >= clock)

    def now(self, agents: Array) -> Array:
        return self.known[agents, self.warp_of[agents]]

    # Accesses of threads: `who` is an agent times `LANES`, and a lane or `ALL_LANES` ----------------------------------

    def _units(self, places: Array, who: Array, size: int) -> tuple[Array, Array]:
        units, count = places // self.unit, size // self.unit
        if count > 1:
            return (units[:, None] + np.arange(count)).ravel(), np.repeat(who, count)
        return units, who

    def read(self, places: Array, who: Array, size: int) -> None:
        units, who = self._units(places, who, size)
        agents = who // LANES
        self._check_writer("read", units, agents)
        self._check_lanes(units, who, agents)
        self.read_clock[units, self.warp_of[agents]] = self.now(agents)

    def write(self, places: Array, who: Array, size: int, unfinished: bool = False) -> None:
        units, who = self._units(places, who, size)
        agents = who // LANES
        self._check_writer("write", units, agents)
        self._check_readers(units, agents)
        self.writer[units] = self.warp_of[agents]
        self.write_clock[units] = UNFINISHED if unfinished else self.now(agents)
        self.lane[units], self.synced_at[units] = who, self.synced[agents]
        self.dirty[units] = True
        if unfinished and (self.writer[units] != self.warp_of[agents]).any():  # stores may, of one value
            raise Fault("race: two warps copy to one byte in one instruction")

    def finish_writes(self, places: Array, who: Array, size: int) -> None:
        units, who = self._units(places, who, size)
        self.write_clock[units] = self.now(who // LANES)
        self.synced_at[units] = self.synced[who // LANES]

    def _check_lanes(self, units: Array, who: Array, agents: Array) -> None:
        """A lane reads what another one of its warp has written after they have waited for each other."""
        lane = self.lane[units]
        bad = (lane != who) & (lane // LANES == agents) & (self.synced_at[units] == self.synced[agents])
        if bad.any():
            n = int(np.flatnonzero(bad)[0])
            self._race("read", units[n], agents[n], "written by another of its lanes with no bar.warp.sync in between")

    def _check_writer(self, what: str, units: Array, agents: Array) -> None:
        clock = self.write_clock[units]
        bad = clock > self.known[agents, self.writer[units]]
        if bad.any():
            n = int(np.flatnonzero(bad)[0])
            writer = "a bulk copy" if self.writer[units[n]] > self.nobody else f"warp {self.writer[units[n]]}"
            self._race(what, units[n], agents[n], (
                "into which an asynchronous copy is in flight" if clock[n] == UNFINISHED
                else f"written by {writer} with nothing in between that orders them"
            ))  # fmt: skip

    def _check_readers(self, units: Array, agents: Array) -> None:
        clocks = self.read_clock[units]
        late = clocks > self.known[agents, : self.warps]
        if late.any():
            n, reader = (int(x[0]) for x in np.nonzero(late))
            how = "is still being read" if clocks[n, reader] == UNFINISHED else "was read"
            self._race(
                "write", units[n], agents[n], f"which {how} by warp {reader} with nothing in between that orders them"
            )

    def _race(self, what: str, unit: int, agent: int, why: str) -> None:
        byte = int(unit) * self.unit % self.stride
        raise Fault(f"race: {what} of byte {byte} of shared memory by warp {int(self.warp_of[agent])}, {why}")

    # Asynchronous accesses: `units` of one program, each once -------------------------------------------------------

    def units_of(self, places: Array, program: int) -> Array:
        """Those of these offsets in a program's shared memory."""
        touched = np.zeros(self.stride // self.unit, bool)
        touched[places // self.unit] = True
        return np.flatnonzero(touched) + program * len(touched)

    def start_reads(self, units: Array, agents: Iterable[int]) -> None:
        """Reads that end when they are waited for, of products and bulk copies."""
        if self.dirty[units].any():
            raise Fault("an asynchronous read of what was stored without a fence since")
        for agent in agents:
            self._check_writer("asynchronous read", units, np.full(len(units), agent))
        self.continue_reads(units, agents)

    def continue_reads(self, units: Array, agents: Iterable[int]) -> None:
        for agent in agents:
            self.read_clock[units, self.warp_of[agent]] = UNFINISHED

    def end_reads(self, units: Array, agents: Iterable[int]) -> None:
        for agent in agents:
            self.read_clock[units, self.warp_of[agent]] = self.now(agent)

    def _column(self, barrier: int) -> int:
        return self.columns.setdefault(barrier, self.nobody + 1 + len(self.columns))

    def start_bulk(self, units: Array, agent: int, barrier: int) -> None:
        """A bulk copy into shared memory, issued by a warp, that completes on an mbarrier."""
        self._check_writer("bulk copy", units, np.full(len(units), agent))
        self._check_readers(units, np.full(len(units), agent))
        self.writer[units], self.write_clock[units], self.dirty[units] = self._column(barrier), UNFINISHED, False
        self.lane[units] = -1

    def finish_bulk(self, units: Array, program: int, barrier: int) -> Array:
        """What those know who are told that it has come."""
        column = self._column(barrier)
        clocks = self.barrier_clock[program]
        clocks[column - self.nobody - 1] += 1
        self.write_clock[units] = clocks[column - self.nobody - 1]
        known = np.zeros(self.known.shape[1], np.int32)
        known[column] = self.write_clock[units[0]]
        return known

    def fence(self, agents: Array) -> None:
        """What these warps have stored, or know of, asynchronous reads may see from now on."""
        if not self.dirty.any():
            return
        units = np.flatnonzero(self.dirty)
        programs = units // (self.stride // self.unit)
        for agent in agents:
            mine = programs == agent // self.warps
            seen = self.write_clock[units] <= self.known[agent, self.writer[units]]
            self.dirty[units[mine & seen]] = False
