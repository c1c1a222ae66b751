"""Products with the blocks of a ring."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flash_attend.kernels.hopper.partitions import CONSUMER_ROWS, product_layout


@gluon.jit
def issue_product(rows, slot):
    """Starts the product of rows [CONSUMER_ROWS, WIDTH] with those of a slot's block, once that is there: every row
    with every row, [CONSUMER_ROWS, BLOCK]."""
    slot.await_full()
    block = slot.buffer()
    BLOCK: gl.constexpr = block.shape[0]
    nothing = gl.zeros([CONSUMER_ROWS, BLOCK], gl.float32, product_layout(BLOCK))
    return warpgroup_mma(rows, block.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def add_product(total, weights, slot):
    """The total [CONSUMER_ROWS, WIDTH] with the sum of the rows of a slot's block, by their weights [CONSUMER_ROWS,
    BLOCK]; gives the block back."""
    token = warpgroup_mma(weights, slot.buffer(), total, is_async=True)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
    slot.release()
    return total
