"""What the partitions of every kernel for Hopper have in common: consumers of 64 rows, and what they do together."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from flash_attend.kernels.hopper.versions import store_tile
from flash_attend.kernels.mask import KEY

CONSUMERS = gl.constexpr(2)
CONSUMER_ROWS = gl.constexpr(64)  # of a tile: what one asynchronous product of four warps takes

REGISTERS = 168  # of a thread, of twelve warps: all there are, before the consumers take 240 and leave the producer 24


@gluon.constexpr_function
def product_layout(columns):
    """Where the registers of four warps hold a product [CONSUMER_ROWS, columns]."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def rows_at_a_time(columns):
    """How many rows of a block four warps clear in one go: two vectors of 16 bytes for each thread."""
    return 2048 // columns


@gluon.constexpr_function
def clearing_layout(columns):
    """Where the registers of four warps hold as many rows."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def meet(barriers, BARRIER: gl.constexpr, turn):
    """Waits until both consumers are here: what each of them has stored is there for the products of both."""
    fence_async_shared()
    mbarrier.arrive(barriers.index(BARRIER), count=1)
    mbarrier.wait(barriers.index(BARRIER), turn & 1)


@gluon.jit
def _keep_rows(rows, kept):
    """Zeroes those of some rows of a block that are not `kept`."""
    values = rows.load(clearing_layout(rows.shape[1]))
    rows.store(gl.where(kept[:, None], values, gl.full_like(values, 0.0)))


@gluon.jit
def clear_hidden_rows(rows, visible):
    """Zeroes those rows of k or v that are hidden, by the visibility that begins at `visible`."""
    PART: gl.constexpr = rows_at_a_time(rows.shape[1])
    layout: gl.constexpr = gl.SliceLayout(1, clearing_layout(rows.shape[1]))
    for part in gl.static_range(rows.shape[0] // PART):
        shown = gl.load(visible + part * PART + gl.arange(0, PART, layout=layout)) != 0
        _keep_rows(rows.slice(part * PART, PART), shown)


@gluon.jit
def clear_hidden(buffer, visible, first_key, barriers, CLEARED: gl.constexpr, cleared, CONSUMER: gl.constexpr):
    """Zeroes this consumer's half of those rows of a block of k or v that are hidden, and waits for the other half.

    A hidden key's weight is 0, but what it holds may be NaN, and 0 * NaN is no 0.
    """
    HALF: gl.constexpr = buffer.shape[0] // CONSUMERS
    clear_hidden_rows(buffer.slice(CONSUMER * HALF, HALF), visible + first_key + CONSUMER * HALF)
    meet(barriers, CLEARED, cleared)


# Two barriers: a consumer's says that the other one has issued the products of its own step.


@gluon.jit
def init_turns(barriers, TURNS: gl.constexpr):
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(barriers.index(TURNS + consumer), count=1)


@gluon.jit
def take_turn(barriers, TURNS: gl.constexpr, step, CONSUMER: gl.constexpr):
    """Waits until this consumer may issue the products of its `step`: after the other one's, the first one first.

    While one waits for its products the other takes exponentials, and neither's products wait behind the other's
    ("ping-pong" in FlashAttention-3).
    """
    mbarrier.wait(barriers.index(TURNS + CONSUMER), (step & 1) ^ (1 - CONSUMER))


@gluon.jit
def pass_turn(barriers, TURNS: gl.constexpr, CONSUMER: gl.constexpr):
    """This consumer has issued its products: it is the other's turn."""
    mbarrier.arrive(barriers.index(TURNS + 1 - CONSUMER), count=1)


@gluon.jit
def store_gradient(grad, descriptor, buffer, visible, at, MASK: gl.constexpr):
    """Writes this consumer's rows [CONSUMER_ROWS, WIDTH] of a gradient through a buffer that nobody else uses."""
    batch, kv_head, first_key = at
    if MASK == KEY:
        key = gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, product_layout(grad.shape[1])))
        grad = gl.where((gl.load(visible + key) != 0)[:, None], grad, 0.0)
    buffer.store(grad.to(buffer.dtype))
    fence_async_shared()
    store_tile(descriptor, [batch, kv_head, first_key, 0], buffer.reshape(descriptor.block_type.shape))
    tma.store_wait(0)
