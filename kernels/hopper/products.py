"""Products with the blocks of a ring."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flash_attend.kernels.hopper.partitions import CONSUMER_ROWS, product_layout
from flash_attend.kernels.hopper.ring import await_full, place, release


@gluon.jit
def issue_product(rows, buffers, barriers, ring: gl.constexpr, step):
    """Starts the product of rows [CONSUMER_ROWS, WIDTH] with those of this step's block, once that is there: every row
    with every row, [CONSUMER_ROWS, BLOCK]."""
    BLOCK: gl.constexpr = buffers.shape[1]
    slot, turn = place(step, buffers.shape[0])
    await_full(barriers, ring, slot, turn)
    nothing = gl.zeros([CONSUMER_ROWS, BLOCK], gl.float32, product_layout(BLOCK))
    return warpgroup_mma(rows, buffers.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def add_product(total, weights, buffers, barriers, ring: gl.constexpr, step):
    """The total [CONSUMER_ROWS, WIDTH] with the sum of the rows of this step's block, by their weights [CONSUMER_ROWS,
    BLOCK]; gives the block back."""
    slot, _ = place(step, buffers.shape[0])
    token = warpgroup_mma(weights, buffers.index(slot), total, is_async=True)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
    release(barriers, ring, slot)
    return total
