"""Rings of buffers in shared memory: one partition fills them, others read them and give them back.

A ring has SLOTS buffers (or one), and 2 * SLOTS barriers in the kernel's array of barriers, from index `ring` on: which
slots are full, then which are empty. `turn` counts how often a slot has been used before; a barrier's phase is its last
bit. Most rings are filled by bulk copies; what a consumer stores in one itself, it publishes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from flash_attend.kernels.hopper.versions import load_tile

SLOTS = gl.constexpr(2)


@gluon.jit
def place(step, ring_slots: gl.constexpr):
    """The slot and the turn of a ring's step-th block."""
    if ring_slots == 1:
        # Slot 0, though the compiler cannot know it: for a slot that never changes it would keep the address of each
        # part of a product's operand in registers.
        slot, turn = step >> 30, step
    else:
        slot, turn = step % SLOTS, step // SLOTS
    return slot, turn


@gluon.jit
def init_ring(barriers, ring: gl.constexpr, READERS: gl.constexpr):
    """Every slot is empty; it is so again when all of its READERS have given it back."""
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(ring + slot), count=1)
        mbarrier.init(barriers.index(ring + SLOTS + slot), count=READERS)


@gluon.jit
def await_empty(barriers, ring: gl.constexpr, slot, turn):
    """Waits until all have given the slot back."""
    mbarrier.wait(barriers.index(ring + SLOTS + slot), (turn & 1) ^ 1)


@gluon.jit
def fill(descriptor, coordinates, buffer, barriers, ring: gl.constexpr, slot, turn):
    """Waits until the slot is empty and starts to copy a block into its buffer [rows, columns]."""
    full = barriers.index(ring + slot)
    await_empty(barriers, ring, slot, turn)
    mbarrier.expect(full, descriptor.block_type.nbytes)
    load_tile(descriptor, coordinates, full, buffer.reshape(descriptor.block_type.shape))


@gluon.jit
def fill_both(
    descriptor, coordinates, buffer, row_descriptor, row_coordinates, row_buffer,
    barriers, ring: gl.constexpr, slot, turn,
):  # fmt: skip
    """The same for a slot that is a block and a number for each of its rows: `row_buffer` [rows]."""
    full = barriers.index(ring + slot)
    await_empty(barriers, ring, slot, turn)
    mbarrier.expect(full, descriptor.block_type.nbytes + row_descriptor.block_type.nbytes)
    load_tile(descriptor, coordinates, full, buffer.reshape(descriptor.block_type.shape))
    load_tile(row_descriptor, row_coordinates, full, row_buffer.reshape(row_descriptor.block_type.shape))


@gluon.jit
def publish(barriers, ring: gl.constexpr, slot):
    """The slot is full of what this partition has stored there."""
    fence_async_shared()
    mbarrier.arrive(barriers.index(ring + slot), count=1)


@gluon.jit
def await_full(barriers, ring: gl.constexpr, slot, turn):
    """Waits until the slot's block has arrived."""
    mbarrier.wait(barriers.index(ring + slot), turn & 1)


@gluon.jit
def release(barriers, ring: gl.constexpr, slot):
    """Gives the slot back: this reader reads no more of it."""
    mbarrier.arrive(barriers.index(ring + SLOTS + slot), count=1)
