"""Bulk copies: boxes of tensors, between global and shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from emulator.faults import Fault
from emulator.shared import BASE

if TYPE_CHECKING:
    from emulator.machine import Machine

__all__ = ["BulkCopies", "TensorMap", "rounded_to_tf32", "swizzled"]

ALIGNMENT = 128  # bytes, of a box in shared memory
STEP = 16  # bytes along the last dimension, at multiples of which a box begins
SWIZZLES = (0, 32, 64, 128)  # bytes, by the numbers that Triton gives them


@dataclass(frozen=True)
class TensorMap:
    """A tensor and the box that is copied; the outermost dimension first."""

    name: str
    start: int  # offset in memory
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    box: tuple[int, ...]
    size: int  # bytes of an element
    swizzle: int  # bytes
    to_tf32: bool = False  # loads round float32

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.size

    def offsets(self, position: tuple[int, ...]) -> Array:
        """Of every element of a box in memory, -1 outside of the tensor."""
        offsets, inside = np.full(1, self.start, np.int64), np.ones(1, bool)
        for first, length, extent, stride in zip(position, self.box, self.shape, self.strides, strict=True):
            index = np.arange(first, first + length, dtype=np.int64)
            offsets = (offsets[:, None] + index * stride).ravel()
            inside = (inside[:, None] & ((index >= 0) & (index < extent))).ravel()
        return np.where(inside, offsets, -1)

    def addresses(self, start: int) -> Array:
        """Of every element of a box in shared memory."""
        return swizzled(start + np.arange(int(np.prod(self.box)), dtype=np.int64) * self.size, self.swizzle)


def swizzled(address: Array, width: int) -> Array:
    """Chunks of 16 bytes change places within rows of so many bytes: bits 4 and up are combined with bits 7 and up."""
    return address ^ (((address >> 7) & (width // 16 - 1)) << 4) if width else address


def rounded_to_tf32(bits: Array) -> Array:
    """float32 rounded to TF32 as these copies do it: to nearest, ties to even, infinity and NaN left alone.

    Triton's own test on a part says so (github.com/triton-lang/triton/pull/11751); the CUDA driver API only names the
    type, CU_TENSOR_MAP_DATA_TYPE_TFLOAT32.
    """
    rounded = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(bits.view(np.float32)), rounded, bits)


@dataclass(eq=False)
class _Load:
    row: int
    places: Array
    units: Array
    described: TensorMap
    offsets: Array
    barrier: int  # address


@dataclass
class _Store:
    row: int
    warp: int
    units: Array
    group: int


class BulkCopies:
    def __init__(self, machine: Machine, maps: dict[int, TensorMap]) -> None:
        self.machine, self.maps = machine, maps
        self.loads: list[_Load] = []  # in flight
        self.stores: list[_Store] = []  # that may still be reading
        self.group = np.zeros((machine.shape[0], machine.warps), np.int64)

    def _described(self, address: int, start: int, position: list[int]) -> TensorMap:
        described = self.maps.get(address)
        if described is None:
            raise Fault(f"no tensor map at {address:#x}")
        last = BASE + self.machine.shared.size - described.bytes
        if start % ALIGNMENT or not BASE <= start <= last:
            raise Fault(f"bulk copy of {described.bytes} bytes at byte {start - BASE} of shared memory")
        if position[0] * described.size % STEP:
            raise Fault(f"bulk copy at {position[0]} of {described.name}, which is no multiple of {STEP} bytes")
        return described

    def _check(self, described: TensorMap, offsets: Array) -> None:
        if (self.machine.memory.allowed[offsets[offsets >= 0]] == 0).any():
            raise Fault(f"bulk copy touches what is no part of {described.name}")

    # Into shared memory ----------------------------------------------------------------------------------------------

    def load(self, row: int, warp: int, start: int, of: int, position: list[int], barrier: int) -> None:
        machine = self.machine
        described = self._described(of, start, position)
        machine.barriers.check_copy(row, barrier, warp)
        offsets = described.offsets(tuple(position[::-1]))
        self._check(described, offsets)
        places = described.addresses(start) - BASE
        units = machine.races.units_of(places, row)
        places += row * machine.shared.stride
        machine.races.start_bulk(units, machine.agent(row, warp), barrier)
        machine.shared.bytes[places.min() : places.min() + described.bytes] = 0xFF
        self.loads.append(_Load(row, places, units, described, offsets, barrier))
        if machine.options.copies == "early":
            self.land(self.loads[-1])

    def completes_on(self, row: int, barrier: int) -> bool:
        return any(load.row == row and load.barrier == barrier for load in self.loads)

    def land_next(self) -> bool:
        """One of those in flight comes: the first one, or with random copies any. False where there is none."""
        if not self.loads:
            return False
        late = self.machine.options.copies == "late"
        self.land(self.loads[0] if late else self.machine.random.choice(self.loads))
        return True

    def land(self, load: _Load) -> None:
        machine, size = self.machine, load.described.size
        self.loads.remove(load)
        view = machine.memory.views[size]
        values = view.take(np.maximum(load.offsets, 0) // size)
        values = np.where(load.offsets < 0, view.dtype.type(0), values)
        machine.shared.views[size][load.places // size] = rounded_to_tf32(values) if load.described.to_tf32 else values
        known = machine.races.finish_bulk(load.units, load.row, load.barrier)
        machine.barriers.complete_bytes(load.row, load.barrier, load.described.bytes, known)

    # Out of it -------------------------------------------------------------------------------------------------------

    def store(self, row: int, warp: int, start: int, to: int, position: list[int], add: bool) -> None:
        """Reads at once what it copies: nobody may write there until it is waited for."""
        machine = self.machine
        described = self._described(to, start, position)
        size = described.size
        places = described.addresses(start) - BASE
        units = machine.races.units_of(places, row)
        places += row * machine.shared.stride
        machine.races.start_reads(units, [machine.agent(row, warp)])
        self.stores.append(_Store(row, warp, units, int(self.group[row, warp])))
        offsets = described.offsets(tuple(position[::-1]))
        self._check(described, offsets)
        inside = offsets >= 0
        values, at = machine.shared.views[size][places[inside] // size], offsets[inside] // size
        view = machine.memory.views[size]
        if add:  # no element is there twice
            view.view(np.float32)[at] += values.view(np.float32)
        else:
            view[at] = values

    def commit(self, warps: Array) -> None:
        self.group += warps

    def wait(self, count: int, warps: Array) -> None:
        """Until all but the last so many groups of each warp have read what they copy."""
        rest = []
        for store in self.stores:
            agent = [self.machine.agent(store.row, store.warp)]
            if warps[store.row, store.warp] and store.group < self.group[store.row, store.warp] - count:
                self.machine.races.end_reads(store.units, agent)
            else:
                rest.append(store)
        self.stores = rest
