"""Rings of buffers in shared memory: one partition fills them, others read them and give them back.

A slot of a ring is a buffer with two barriers: one says that it is full, the other that it is empty. `turn` counts how
often the slot has been used before; a barrier's phase is its last bit. Most rings are filled by bulk copies; what a
consumer stores in one itself, it publishes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from flash_attend.kernels.compat import aggregate
from flash_attend.kernels.hopper.versions import load_tile

SLOTS = gl.constexpr(2)
MOST_BARRIERS = gl.constexpr(24)


@aggregate
class Barriers:
    """Barriers of a kernel, from one of its array's on. One array holds all: a partition pays a register for each."""

    array: gl.shared_memory_descriptor
    FIRST: gl.constexpr

    @gluon.jit
    def index(self, index):
        return self.array.index(self.FIRST + index)

    @gluon.jit
    def after(self, N: gl.constexpr):
        """Those that follow the first N."""
        gl.static_assert(self.FIRST + N <= MOST_BARRIERS)
        return Barriers(self.array, self.FIRST + N)


@gluon.jit
def make_barriers():
    """The barriers of a kernel, for its rings, meetings and turns to take the first that are left."""
    return Barriers(gl.allocate_shared_memory(gl.int64, [MOST_BARRIERS, 1], mbarrier.MBarrierLayout()), 0)


@aggregate
class Ring:
    """Buffers [SLOTS, rows, columns], maybe with a number for each row: [SLOTS, rows]."""

    buffers: gl.shared_memory_descriptor
    numbers: object
    barriers: Barriers
    SLOTS: gl.constexpr

    @gluon.jit
    def at(self, step):
        """The slot of the ring's step-th block."""
        if self.SLOTS == 1:
            # Slot 0, though the compiler cannot know it: for a slot that never changes it would keep the address of
            # each part of a product's operand in registers.
            index, turn = step >> 30, step
        else:
            index, turn = step % self.SLOTS, step // self.SLOTS
        return Slot(self, index, turn)

    @gluon.jit
    def of(self, index, turn):
        """A slot by its number: where each consumer has one of its own."""
        return Slot(self, index, turn)


@aggregate
class Slot:
    """A slot of a ring, for one of its turns."""

    ring: Ring
    index: object
    turn: object

    @gluon.jit
    def buffer(self):
        """[rows, columns]."""
        return self.ring.buffers.index(self.index)

    @gluon.jit
    def numbers(self):
        """[rows]."""
        return self.ring.numbers.index(self.index)

    @gluon.jit
    def _full(self):
        return self.ring.barriers.index(self.index)

    @gluon.jit
    def _empty(self):
        return self.ring.barriers.index(self.ring.SLOTS + self.index)

    @gluon.jit
    def await_empty(self):
        """Waits until all readers have given the slot back."""
        mbarrier.wait(self._empty(), (self.turn & 1) ^ 1)

    @gluon.jit
    def expect(self, nbytes):
        """Waits until the slot is empty, to be filled with so many bytes."""
        self.await_empty()
        mbarrier.expect(self._full(), nbytes)

    @gluon.jit
    def fill(self, descriptor, coordinates):
        """Starts to copy a block into the slot, once it is empty."""
        self.expect(descriptor.block_type.nbytes)
        load_tile(descriptor, coordinates, self._full(), self.buffer().reshape(descriptor.block_type.shape))

    @gluon.jit
    def fill_both(self, descriptor, coordinates, row_descriptor, row_coordinates):
        """The same, with the numbers of the block's rows."""
        self.expect(descriptor.block_type.nbytes + row_descriptor.block_type.nbytes)
        load_tile(descriptor, coordinates, self._full(), self.buffer().reshape(descriptor.block_type.shape))
        numbers = self.numbers().reshape(row_descriptor.block_type.shape)
        load_tile(row_descriptor, row_coordinates, self._full(), numbers)

    @gluon.jit
    def publish(self):
        """The slot is full of what this partition has stored there."""
        fence_async_shared()
        mbarrier.arrive(self._full(), count=1)

    @gluon.jit
    def await_full(self):
        """Waits until the slot's block has arrived."""
        mbarrier.wait(self._full(), self.turn & 1)

    @gluon.jit
    def release(self):
        """Gives the slot back: this reader reads no more of it."""
        mbarrier.arrive(self._empty(), count=1)


@gluon.jit
def allocate_rows(dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """So many buffers in shared memory, [COUNT, ROWS, COLUMNS], as copies and products take them."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], dtype)
    return gl.allocate_shared_memory(dtype, [COUNT, ROWS, COLUMNS], layout)


@gluon.jit
def make_ring(
    barriers, dtype: gl.constexpr, SLOTS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    READERS: gl.constexpr, NUMBERED: gl.constexpr = False,
):  # fmt: skip
    """A ring whose slots are empty, and are so again when all READERS have given them back; and the barriers left."""
    buffers = allocate_rows(dtype, SLOTS, ROWS, COLUMNS)
    numbers = None
    if NUMBERED:
        numbers_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS], gl.float32)
        numbers = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], numbers_layout)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=1)
        mbarrier.init(barriers.index(SLOTS + slot), count=READERS)
    return Ring(buffers, numbers, barriers, SLOTS), barriers.after(2 * SLOTS)
