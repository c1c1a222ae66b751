"""Shared memory, that of all programs side by side, full of NaN at first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from emulator.faults import Fault
from emulator.memory import UNSIGNED, scatter

if TYPE_CHECKING:
    from emulator.machine import Machine, Mask

__all__ = ["BASE", "SharedMemory"]

BASE = 0x400  # the address of its first byte
PAGE = 256


class SharedMemory:
    """`places` are offsets of bytes in the memory of all programs."""

    def __init__(self, machine: Machine, size: int) -> None:
        self.machine, self.size = machine, size
        self.stride = -(-max(size, 1) // PAGE) * PAGE  # from program to program
        programs = machine.shape[0]
        self.bytes = np.full(programs * self.stride, 0xFF, np.uint8)
        self.views = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self.first = (np.arange(programs, dtype=np.int64) * self.stride)[:, None]

    def places(self, address: Array, offset: int, total: int, mask: Mask, what: str) -> Array:
        """[programs, threads]; those that take no part have that of the first byte."""
        place = address - np.uint32((BASE - offset) % 2**32)
        if mask is not None:
            place = np.where(mask, place, np.uint32(0))
        if int(place.max()) > self.size - total or (place & np.uint32(total - 1)).any():
            bad = (place > self.size - total) | ((place & np.uint32(total - 1)) != 0)
            row, thread = (int(x[0]) for x in np.nonzero(np.broadcast_to(bad, self.machine.shape)))
            where = int(np.broadcast_to(place, self.machine.shape)[row, thread].astype(np.int32))
            raise Fault(
                f"{what} of {total} bytes at byte {where} of {self.size} of shared memory, program "
                f"{self.machine.programs[row]}, thread {thread}"
            )
        return place.astype(np.int64) + self.first

    def load(self, address: Array, offset: int, size: int, count: int, mask: Mask) -> list[Array]:
        place = self.places(address, offset, size * count, mask, "load")
        self.machine.races.read(*self.machine.taking_part(place, mask), size * count)
        return [self.views[size].take(place // size + n) for n in range(count)]

    def store(self, address: Array, offset: int, size: int, values: tuple[Array, ...], mask: Mask) -> None:
        place = self.places(address, offset, size * len(values), mask, "store")
        place = np.broadcast_to(place, self.machine.shape)
        chosen = None if mask is None else np.broadcast_to(mask, self.machine.shape)
        self.machine.races.write(*self.machine.taking_part(place, mask), size * len(values))
        for n, value in enumerate(values):
            scatter(self.views[size], place // size + n, np.broadcast_to(value, place.shape), chosen)

    # Rows of matrices: 16 bytes, at the addresses of the first lanes of a warp

    def _rows(self, address: Array, offset: int, count: int, mask: Mask, what: str) -> tuple[Array, Array]:
        """Places [programs, warps, count, 8], and which warps take part."""
        lanes = np.broadcast_to(np.arange(self.machine.shape[1]) % 32 < 8 * count, self.machine.shape)
        taking_part = lanes if mask is None else lanes & mask
        place = np.broadcast_to(self.places(address, offset, 16, taking_part, what), self.machine.shape)
        rows = place.reshape(len(place), -1, 32)[:, :, : 8 * count].reshape(len(place), -1, count, 8)
        return rows, self.machine.warps_of(mask)

    def load_rows(self, address: Array, offset: int, count: int, mask: Mask) -> Array:
        """32-bit words [programs, warps, count, 8, 4]."""
        rows, warps = self._rows(address, offset, count, mask, "load of a matrix")
        self.machine.races.read(*self.machine.of_warps(rows, warps), 16)
        return self.views[4].take((rows // 4)[..., None] + np.arange(4))

    def store_rows(self, address: Array, offset: int, words: Array, mask: Mask) -> None:
        rows, warps = self._rows(address, offset, words.shape[2], mask, "store of a matrix")
        self.machine.races.write(*self.machine.of_warps(rows, warps), 16)
        self.views[4][(rows // 4)[warps][..., None] + np.arange(4)] = words[warps]
