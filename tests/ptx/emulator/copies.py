"""Copies of threads (`cp.async`): which group they belong to, and when they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from emulator.faults import Fault

if TYPE_CHECKING:
    from emulator.machine import Machine, Mask

__all__ = ["ThreadCopies"]


@dataclass
class _Copy:
    """One instruction's copies, by lane."""

    lanes: Array  # program n, thread t is n threads + t
    places: Array
    offsets: Array  # in global memory; -1 for zeros
    size: int
    groups: Array
    landed: bool = False

    def split(self, done: Array) -> tuple[_Copy, _Copy]:
        return tuple(
            _Copy(self.lanes[x], self.places[x], self.offsets[x], self.size, self.groups[x], self.landed)
            for x in (done, ~done)
        )  # type: ignore[return-value]


class ThreadCopies:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.group = np.zeros(machine.shape, np.int64)  # that the next copy belongs to
        self.pending: list[_Copy] = []

    def start(
        self, to: Array, to_offset: int, of: Array, of_offset: int, size: int, read: Array | None, mask: Mask
    ) -> None:
        machine = self.machine
        place = machine.shared.places(to, to_offset, size, mask, "copy")
        reads = mask
        if read is not None:
            if not np.isin(machine.chosen(read, mask), (0, size)).all():
                raise Fault("a copy of a part of its bytes")
            reads = machine.both(mask, read != 0)
        offset = machine.memory.offsets(of, of_offset, size, 1, reads, "copy")
        if reads is not None:
            offset = np.where(reads, offset, -1)
        places, who = machine.taking_part(place, mask)
        machine.races.write(places, who, size, unfinished=True)
        lanes, offsets = machine.chosen(machine.all_lanes, mask), machine.chosen(offset, mask)
        copy = _Copy(lanes, places, offsets, size, self.group.ravel()[lanes])
        self.pending.append(copy)
        if machine.options.copies == "early":
            self._land(copy)

    def land_any(self) -> None:
        """One of those in flight comes, in no order."""
        waiting = [copy for copy in self.pending if not copy.landed]
        if waiting:
            self._land(self.machine.random.choice(waiting))

    def _land(self, copy: _Copy) -> None:
        if copy.landed:
            return
        copy.landed = True
        piece = min(copy.size, 8)
        source, target = self.machine.memory.views[piece], self.machine.shared.views[piece]
        for n in range(copy.size // piece):
            data = source.take(np.maximum(copy.offsets, 0) // piece + n)
            target[copy.places // piece + n] = np.where(copy.offsets < 0, source.dtype.type(0), data)

    def commit(self, mask: Mask) -> None:
        self.group += 1 if mask is None else mask

    def wait(self, count: int, mask: Mask) -> None:
        """Until all but the last so many groups of each thread have come."""
        if not self.pending:
            return
        first_left = (self.group if mask is None else np.where(mask, self.group, 0)).ravel() - count
        rest = []
        for copy in self.pending:
            done = copy.groups < first_left[copy.lanes]
            finished, left = copy.split(done)
            if done.any():
                self._land(finished)
                who = self.machine.who.ravel()[finished.lanes]
                self.machine.races.finish_writes(finished.places, who, copy.size)
            if not done.all():
                rest.append(left)
        self.pending = rest
