"""What the partitions of every kernel for Hopper have in common: consumers of 64 rows, and what they do together."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from flash_attend.kernels.compat import aggregate
from flash_attend.kernels.hopper.ring import Barriers
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
def per_row(columns):
    """Where they hold one number for each of its rows, [CONSUMER_ROWS]."""
    return gl.SliceLayout(1, product_layout(columns))


@gluon.constexpr_function
def per_column(columns):
    """Where they hold one number for each of its columns, [columns]."""
    return gl.SliceLayout(0, product_layout(columns))


@gluon.jit
def as_operand(x, dtype: gl.constexpr, WIDTH: gl.constexpr):
    """What products made, as the left operand of one of WIDTH columns, in registers."""
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, product_layout(WIDTH), 2))


@gluon.constexpr_function
def rows_at_a_time(columns):
    """How many rows of a block four warps clear in one go: two vectors of 16 bytes for each thread."""
    return 2048 // columns


@gluon.constexpr_function
def clearing_layout(columns):
    """Where the registers of four warps hold as many rows."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@aggregate
class Meeting:
    """Where both consumers wait for each other."""

    barriers: Barriers

    @gluon.jit
    def meet(self, turn):
        """Waits until both are here: what each of them has stored is there for the products of both."""
        fence_async_shared()
        mbarrier.arrive(self.barriers.index(0), count=1)
        self.await_both(turn)

    @gluon.jit
    def await_both(self, turn):
        mbarrier.wait(self.barriers.index(0), turn & 1)


@gluon.jit
def make_meeting(barriers):
    """A meeting, and the barriers left."""
    mbarrier.init(barriers.index(0), count=CONSUMERS)
    return Meeting(barriers), barriers.after(1)


@aggregate
class Turns:
    """The consumers issue their products in turns, if they do: each has a barrier, at which the other one arrives.

    While one waits for its products the other takes exponentials, and neither's products wait behind the other's
    ("ping-pong" in FlashAttention-3).
    """

    barriers: Barriers
    TAKEN: gl.constexpr

    @gluon.jit
    def take(self, step, CONSUMER: gl.constexpr):
        """Waits until this consumer may issue the products of its `step`: after the other one's, but that of step 0."""
        if self.TAKEN:
            mbarrier.wait(self.barriers.index(CONSUMER), (step & 1) ^ (1 - CONSUMER))

    @gluon.jit
    def hand_on(self, CONSUMER: gl.constexpr):
        """This consumer has issued its products: it is the other's turn."""
        if self.TAKEN:
            mbarrier.arrive(self.barriers.index(1 - CONSUMER), count=1)


@gluon.jit
def make_turns(barriers, TAKEN: gl.constexpr):
    """The consumers' turns, and the barriers left."""
    if TAKEN:
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.init(barriers.index(consumer), count=1)
    return Turns(barriers, TAKEN), barriers.after(CONSUMERS)


@gluon.constexpr_function
def may_hide_keys(kind, left):
    """Whether keys may be hidden from every query: by a key mask, or because they lie before every window."""
    return kind == KEY or left is not None


@gluon.jit
def _keep_rows(rows, kept):
    """Zeroes those of some rows of a block that are not `kept`."""
    values = rows.load(clearing_layout(rows.shape[1]))
    rows.store(gl.where(kept[:, None], values, gl.full_like(values, 0.0)))


@gluon.jit
def clear_hidden_rows(rows, mask):
    """Zeroes those rows of k or v that are hidden; the mask counts keys from the first of them."""
    PART: gl.constexpr = rows_at_a_time(rows.shape[1])
    gl.static_assert(rows.shape[0] % PART == 0)
    layout: gl.constexpr = gl.SliceLayout(1, clearing_layout(rows.shape[1]))
    for part in gl.static_range(rows.shape[0] // PART):
        shown = mask.counted_from(0, part * PART).key_shown(gl.arange(0, PART, layout=layout))
        _keep_rows(rows.slice(part * PART, PART), shown)


@gluon.jit
def clear_hidden(block, mask, cleared, meeting, CONSUMER: gl.constexpr):
    """Zeroes this consumer's half of those rows of a block of k or v that are hidden, and waits for the other half.

    A hidden key's weight is 0, but what it holds may be NaN, and 0 * NaN is no 0. The mask counts keys from the block's
    first one.
    """
    HALF: gl.constexpr = block.shape[0] // CONSUMERS
    FIRST: gl.constexpr = CONSUMER * HALF
    clear_hidden_rows(block.slice(FIRST, HALF), mask.counted_from(0, FIRST))
    meeting.meet(cleared)


@gluon.jit
def store_rows(rows, descriptor, coordinates, buffer):
    """Starts to write a consumer's rows [CONSUMER_ROWS, WIDTH] through a buffer that nobody else uses."""
    buffer.store(rows.to(buffer.dtype))
    fence_async_shared()
    store_tile(descriptor, coordinates, buffer.reshape(descriptor.block_type.shape))


@gluon.jit
def clear_hidden_gradients(grad, mask):
    """The gradients of a consumer's keys [CONSUMER_ROWS, WIDTH], those of hidden ones as zeros."""
    if may_hide_keys(mask.KIND, mask.left):
        key = gl.arange(0, CONSUMER_ROWS, layout=per_row(grad.shape[1]))
        grad = gl.where(mask.key_shown(key)[:, None], grad, 0.0)
    return grad


@gluon.jit
def store_gradient(grad, descriptor, buffer, mask, tile, FIRST: gl.constexpr):
    """Writes the gradients of a consumer's keys, the first of which is the FIRST of the tile, and for `mask` key 0."""
    coordinates = [tile.batch, tile.kv_head, tile.first_key + FIRST, 0]
    store_rows(clear_hidden_gradients(grad, mask), descriptor, coordinates, buffer)
    tma.store_wait(0)
