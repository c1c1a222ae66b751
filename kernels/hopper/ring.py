"""Rings of buffers in shared memory: one partition fills them by bulk copies, others read them and give them back.

A ring has SLOTS buffers, and 2 * SLOTS barriers in the kernel's array of barriers, from index `ring` on: which slots
are full, then which are empty. `turn` counts how often a slot has been used before; a barrier's phase is its last bit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_attend.kernels.hopper.versions import load_tile

SLOTS = gl.constexpr(2)


@gluon.jit
def init_ring(barriers, ring: gl.constexpr, READERS: gl.constexpr):
    """Every slot is empty; it is so again when all of its READERS have given it back."""
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(ring + slot), count=1)
        mbarrier.init(barriers.index(ring + SLOTS + slot), count=READERS)


@gluon.jit
def fill(descriptor, coordinates, buffer, barriers, ring: gl.constexpr, slot, turn):
    """Waits until the slot is empty and starts to copy a block into its buffer [rows, columns]."""
    full = barriers.index(ring + slot)
    mbarrier.wait(barriers.index(ring + SLOTS + slot), (turn & 1) ^ 1)
    mbarrier.expect(full, descriptor.block_type.nbytes)
    load_tile(descriptor, coordinates, full, buffer.reshape(descriptor.block_type.shape))


@gluon.jit
def await_full(barriers, ring: gl.constexpr, slot, turn):
    """Waits until the slot's block has arrived."""
    mbarrier.wait(barriers.index(ring + slot), turn & 1)


@gluon.jit
def release(barriers, ring: gl.constexpr, slot):
    """Gives the slot back: this reader reads no more of it."""
    mbarrier.arrive(barriers.index(ring + SLOTS + slot), count=1)
