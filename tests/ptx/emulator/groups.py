"""Products of four warps: their operands in shared memory, and when they have been read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from emulator.bulk import swizzled
from emulator.faults import Fault, Unsupported
from emulator.fragments import values_of
from emulator.shared import BASE

if TYPE_CHECKING:
    from emulator.machine import Machine, Mask

__all__ = ["GroupProducts"]

LAYOUTS = (0, 128, 64, 32)  # bytes in which chunks change places, by the two highest bits of a descriptor
DONE = -1
DEPTH = 32  # bytes of an operand along the dimension that is summed over


@dataclass
class _Reads:
    row: int
    four: int  # which four warps
    agents: Array
    units: Array
    group: int


class GroupProducts:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.group = np.zeros((machine.shape[0], -(-machine.warps // 4)), np.int64)  # that the next product belongs to
        self.reads: list[_Reads] = []
        self.fenced = np.zeros(self.group.shape, bool)  # since the last wait
        # Of each register that products write: the group of the last one, until it is waited for.
        self.pending = np.full((*self.group.shape, len(machine.program.sums)), DONE, np.int64)

    def _active(self, mask: Mask) -> Array:
        """Which groups of four warps take part: [programs, groups]."""
        self.machine.whole_groups(mask)
        return self.machine.groups_of(mask)

    def issue(self, registers: Array, mask: Mask) -> None:
        """A product that writes to these begins."""
        active = self._active(mask)
        if not self.fenced[active].all():
            self.unfenced()
        row, four = np.nonzero(active)
        self.pending[row[:, None], four[:, None], registers] = self.group[row, four][:, None]

    def move(self, register: int, to: int, mask: Mask) -> None:
        active = self.machine.groups_of(mask)
        self.pending[active, to] = self.pending[active, register]

    def check(self, registers: list[int], mask: Mask) -> None:
        if (self.pending[:, :, registers][self.machine.groups_of(mask)] != DONE).any():
            raise Fault("registers of a product of four warps are touched before it is waited for")

    def fence(self, mask: Mask) -> None:
        self.fenced |= self._active(mask)

    def unfenced(self) -> None:
        raise Fault("a product of four warps takes registers that were written without a wgmma.fence since")

    def commit(self, mask: Mask) -> None:
        self.group += self._active(mask)

    def wait(self, count: int, mask: Mask) -> None:
        """Until all but the last so many groups of products of each four warps have read their operands."""
        active, races = self._active(mask), self.machine.races
        if not self.machine.program.specialized:  # for those `translate` asks more
            self.fenced &= ~active
        self.pending[active[:, :, None] & (self.pending < (self.group - count)[:, :, None])] = DONE
        done = [
            bool(active[reads.row, reads.four]) and reads.group < self.group[reads.row, reads.four] - count
            for reads in self.reads
        ]
        if not any(done):
            return
        both = list(zip(self.reads, done, strict=True))
        ended, left = ([reads for reads, is_done in both if is_done == x] for x in (True, False))
        for reads in ended:
            races.end_reads(reads.units, reads.agents)
        for reads in left:  # what two products read is read until both have
            races.continue_reads(reads.units, reads.agents)
        self.reads = left

    def operand(self, descriptor: Array, rows: int, element: str, transposed: bool, mask: Mask) -> Array:
        """[programs, groups, rows, depth], by a matrix descriptor (section of wgmma: "Matrix Descriptor Format")."""
        active, shared = self._active(mask), self.machine.shared
        size = 4 if element == "tf32" else 2
        descriptors = np.broadcast_to(descriptor, self.machine.shape).reshape(*active.shape, 128)
        if (descriptors != descriptors[:, :, :1])[active].any():
            raise Fault("a matrix descriptor differs among the threads of four warps")
        bits = np.zeros((*active.shape, rows, DEPTH // size), shared.views[size].dtype)
        for row, four in zip(*np.nonzero(active), strict=True):
            places = operand_places(int(descriptors[row, four, 0]), rows, size, transposed)
            if places.min() < 0 or places.max() > shared.size - size:
                raise Fault(f"a matrix descriptor leads to byte {int(places.max())} of {shared.size}")
            bits[row, four] = shared.views[size].take((places + row * shared.stride) // size)
            self._read(int(row), int(four), places)
        return values_of(bits, element)

    def _read(self, row: int, four: int, places: Array) -> None:
        machine = self.machine
        units = machine.races.units_of(places, row)
        agents = machine.agent(row, 4 * four) + np.arange(4)
        machine.races.start_reads(units, agents)
        self.reads.append(_Reads(row, four, agents, units, int(self.group[row, four])))


@lru_cache(maxsize=4096)
def operand_places(descriptor: int, rows: int, size: int, transposed: bool) -> Array:
    """Offsets in shared memory, in bytes, of an operand [rows, depth] of elements of so many bytes."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width = LAYOUTS[descriptor >> 62]
    if not width:
        raise Unsupported("a matrix without swizzle")
    row, k = np.arange(rows)[:, None], np.arange(DEPTH // size)[None]
    if transposed:
        per = width // size
        offset = (row // per) * leading + (k // 8) * stride + (k % 8) * width + (row % per) * size
    else:
        offset = (row // 8) * stride + (row % 8) * width + k * size
    return swizzled(start + offset, width) - BASE
