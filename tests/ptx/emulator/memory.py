"""Global memory: tensors between red zones, of which programs may touch their own elements and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from emulator.faults import Fault

if TYPE_CHECKING:
    from emulator.machine import Machine, Mask

__all__ = ["BASE", "GlobalMemory", "Region", "scatter"]

BASE = 0x10_0000_0000
RED_ZONE = 1024
PAGE = 256  # bytes: tensors keep their alignment up to this
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
ALL = {size: np.iinfo(dtype).max for size, dtype in UNSIGNED.items()}


@dataclass
class Region:
    """Where a tensor is."""

    name: str
    start: int  # offset in memory
    size: int  # bytes


def scatter(view: Array, at: Array, values: Array, chosen: Array | None) -> None:
    """Stores one value of each lane."""
    if chosen is not None:
        at, values = at[chosen], values[chosen]
    view[at] = values
    if (view[at] != values).any():
        raise Fault("lanes store different values to one place in one instruction")


class GlobalMemory:
    """Built in two steps: `place` every tensor, then `build`."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.size = RED_ZONE
        self.machine: Machine

    def place(self, name: str, size: int, address: int) -> Region:
        """Room for a tensor that is aligned as this address is."""
        region = Region(name, -(-self.size // PAGE) * PAGE + address % PAGE, size)
        self.regions.append(region)
        self.size = region.start + size + RED_ZONE
        return region

    def build(self) -> None:
        self.size = -(-self.size // PAGE) * PAGE
        self.bytes = np.full(self.size, 0xFF, np.uint8)
        self.allowed = np.zeros(self.size, np.uint8)  # 0xFF where there is an element
        self.owner = np.zeros(self.size, np.int32)  # the program that wrote a byte in this launch, and 1
        self.views = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self.allowed_views = {size: self.allowed.view(dtype) for size, dtype in UNSIGNED.items()}

    def fill(self, region: Region, data: Array, elements: Array, element_size: int) -> None:
        """The bytes of a tensor, whose elements begin at these offsets."""
        self.bytes[region.start : region.start + region.size] = data
        for byte in range(element_size):
            self.allowed[region.start + elements + byte] = 0xFF

    def describe(self, offset: int) -> str:
        def distance(region: Region) -> int:
            return max(region.start - offset, offset - (region.start + region.size - 1), 0)

        near = min(self.regions, key=distance, default=Region("memory", 0, 0))
        if offset < near.start:
            return f"{near.start - offset} bytes before {near.name}"
        if offset >= near.start + near.size:
            return f"{offset - near.start - near.size} bytes past the end of {near.name} ({near.size} bytes)"
        return f"byte {offset - near.start} of {near.name} ({near.size} bytes)"

    # Accesses of threads ---------------------------------------------------------------------------------------------

    def offsets(self, address: Array, offset: int, size: int, count: int, mask: Mask, what: str) -> Array:
        """Offsets in memory, 0 for threads that take no part; a fault where one may not go there."""
        total = size * count
        off = (address - np.uint64(BASE - offset)).view(np.int64)
        if mask is not None:
            off = np.where(mask, off, 0)
        bad = (off < 0) | (off > self.size - total) | (off & (total - 1) != 0)
        if not bad.any():
            piece = min(total, 8)
            at = off // piece
            for n in range(total // piece):
                bad |= self.allowed_views[piece].take(at + n) != ALL[piece]
        if mask is not None:
            bad = bad & mask
        if bad.any():
            self._refuse(np.broadcast_to(bad, self.machine.shape), off, total, what)
        return off

    def _refuse(self, bad: Array, off: Array, total: int, what: str) -> None:
        row, thread = (int(x[0]) for x in np.nonzero(bad))
        where = int(np.broadcast_to(off, self.machine.shape)[row, thread])
        aligned = "" if where % total == 0 else f" (not aligned to {total})"
        raise Fault(
            f"{what} of {total} bytes at {self.describe(where)}{aligned}, program {self.machine.programs[row]}, "
            f"thread {thread}; {int(bad.sum())} threads"
        )

    def load(self, address: Array, offset: int, size: int, count: int, mask: Mask) -> list[Array]:
        off = self.offsets(address, offset, size, count, mask, "load")
        owner = self.owner.take(off)
        if owner.any():
            foreign = (owner != 0) & (owner != self.machine.programs[:, None] + 1)
            if (foreign if mask is None else foreign & mask).any():
                raise Fault("load of what another program of the launch has written")
        return [self.views[size].take(off // size + n) for n in range(count)]

    def store(self, address: Array, offset: int, size: int, values: tuple[Array, ...], mask: Mask) -> None:
        off = self.offsets(address, offset, size, len(values), mask, "store")
        off = np.broadcast_to(off, self.machine.shape)
        chosen = None if mask is None else np.broadcast_to(mask, self.machine.shape)
        self._own(off, chosen, size * len(values))
        for n, value in enumerate(values):
            scatter(self.views[size], off // size + n, np.broadcast_to(value, off.shape), chosen)

    def _own(self, off: Array, chosen: Array | None, total: int) -> None:
        """A place belongs to the first program that stores there."""
        owner = np.broadcast_to((self.machine.programs + 1).astype(np.int32)[:, None], off.shape)
        off, owner = (off.ravel(), owner.ravel()) if chosen is None else (off[chosen], owner[chosen])
        for byte in range(total):
            before = self.owner[off + byte]
            self.owner[off + byte] = owner
            if ((before != 0) & (before != owner)).any() or (self.owner[off + byte] != owner).any():
                raise Fault("store where another program of the launch has stored")

    def add(self, address: Array, offset: int, value: Array, mask: Mask) -> None:
        size = value.dtype.itemsize
        off = self.offsets(address, offset, size, 1, mask, "addition")
        at, value = (np.broadcast_to(x, self.machine.shape) for x in (off // size, value))
        chosen = slice(None) if mask is None else np.broadcast_to(mask, self.machine.shape)
        np.add.at(self.views[size].view(value.dtype), at[chosen].ravel(), value[chosen].ravel())
