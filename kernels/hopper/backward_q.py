"""The gradient of q for Hopper, in Gluon: by tiles of queries, in a fixed order, and so always bitwise repeatable.

A program has one tile and is three partitions, as the forward's are: two consumers, which have 64 queries each, and a
producer, which copies q and the gradient of out, then block after block of k and v.

For a full block a consumer issues the scores, the gradients of the weights, and what the block before adds to the
gradient of q. It takes the exponentials while the other two products run, and the gradients of the scores while the
last one does. Blocks that need masking come first, one at a time: what hides pairs leaves no registers for more.
"""

from functools import lru_cache, partial

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_attend.kernels.compat import aggregate, kernel
from flash_attend.kernels.configs import Tiles
from flash_attend.kernels.hopper.operands import bulk_readable, call_choices, call_numbers, described
from flash_attend.kernels.hopper.partitions import (
    CONSUMER_ROWS,
    CONSUMERS,
    REGISTERS,
    Meeting,
    as_operand,
    clear_hidden,
    make_meeting,
    per_column,
    per_row,
    product_layout,
    store_rows,
)
from flash_attend.kernels.hopper.producer import Inputs, fill_blocks
from flash_attend.kernels.hopper.products import add_product, issue_product
from flash_attend.kernels.hopper.ring import SLOTS, Ring, make_barriers, make_ring
from flash_attend.kernels.hopper.walk import QueryTiles, make_mask
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.mask import KEY
from flash_attend.kernels.operands import query_section, window_numbers
from flash_attend.kernels.schedule import Schedule
from flash_attend.kernels.scores import scores_under
from flash_attend.kernels.softmax import INFINITY, recomputed_weights
from flash_attend.kernels.statistics import padded_length
from flash_attend.spec import CALLS_KEPT, AttentionSpec

__all__ = ["query_gradient"]


@aggregate
class Outputs:
    """What the consumers read of each query, by pointers, and where they write."""

    grad_q: object  # a descriptor
    log2: gl.tensor
    delta: gl.tensor


@aggregate
class Shared:
    """What the partitions have in shared memory."""

    q: Ring  # a slot is a consumer's
    grad: Ring  # likewise
    k: Ring
    v: Ring
    cleared: Meeting  # both consumers have cleared their halves of a block of k


@aggregate
class Rows:
    """A consumer's queries, [CONSUMER_ROWS]."""

    row: gl.tensor
    log2: gl.tensor
    delta: gl.tensor

    @gluon.jit
    def weights(self, products, scores):
        return recomputed_weights(scores.apply(products), None, self.log2[:, None], scores.factor_log2)

    @gluon.jit
    def grad_scores(self, weights, grad_weights, scores):
        """The gradients of the products, but for the magnitude of the scale."""
        return scores.gradient(weights * (grad_weights - self.delta[:, None]))


@gluon.jit
def _produce(inputs, shared, tile):
    """The producer."""
    for consumer in gl.static_range(CONSUMERS):
        coordinates = [tile.batch, tile.head, tile.first_query + consumer * CONSUMER_ROWS, 0]
        shared.q.of(consumer, 0).fill(inputs.q, coordinates)
        shared.grad.of(consumer, 0).fill(inputs.grad, coordinates)
    fill_blocks(inputs, shared, tile, 0)


@gluon.jit
def _masked_block(step, shared, scores, mask, rows, block, CONSUMER: gl.constexpr):
    """The gradients of the scores of a block that needs masking, [CONSUMER_ROWS, BLOCK_N], as an operand."""
    k = shared.k.at(step)
    v = shared.v.at(step)
    BLOCK_N: gl.constexpr = k.buffer().shape[0]
    WIDTH: gl.constexpr = k.buffer().shape[1]
    if mask.KIND == KEY or (mask.left is not None and block * BLOCK_N < mask.first_offset()):
        k.await_full()
        # Every block so far was cleared, as this one is now: later ones are full, or reach before no window.
        clear_hidden(k.buffer(), mask.counted_from(0, block * BLOCK_N), step, shared.cleared, CONSUMER)
    products_token = issue_product(shared.q.of(CONSUMER, 0).buffer(), k)
    grad_weights_token = issue_product(shared.grad.of(CONSUMER, 0).buffer(), v)
    products = warpgroup_mma_wait(num_outstanding=1, deps=(products_token,))
    weights = rows.weights(products, scores)
    v.await_full()  # again, as in `_step`
    grad_weights = warpgroup_mma_wait(num_outstanding=0, deps=(grad_weights_token,))
    v.release()
    key = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=per_column(BLOCK_N))
    grad_scores = rows.grad_scores(weights, grad_weights, scores)
    grad_scores = mask.hide(grad_scores, rows.row[:, None], key[None, :], mask.key_shown(key)[None, :], 0.0)
    return as_operand(grad_scores, k.buffer().dtype, WIDTH)


@gluon.jit
def _step(total, grad_scores, step, shared, scores, rows, CONSUMER: gl.constexpr):
    """The gradients of the scores of a full block, and the total with what the block before adds to it."""
    before = shared.k.at(step)
    step += 1
    k = shared.k.at(step)
    v = shared.v.at(step)
    products_token = issue_product(shared.q.of(CONSUMER, 0).buffer(), k)
    grad_weights_token = issue_product(shared.grad.of(CONSUMER, 0).buffer(), v)
    total_token = warpgroup_mma(grad_scores, before.buffer(), total, is_async=True)
    products = warpgroup_mma_wait(num_outstanding=2, deps=(products_token,))
    weights = rows.weights(products, scores)
    # Both barriers are through: a wait ends a basic block, and keeps the assembler from hoisting the one for a product,
    # which follows, above the arithmetic that is to run beside it.
    v.await_full()
    grad_weights = warpgroup_mma_wait(num_outstanding=1, deps=(grad_weights_token,))
    v.release()
    new = rows.grad_scores(weights, grad_weights, scores)
    k.await_full()
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total_token,))
    grad_scores = as_operand(new, grad_scores.dtype, total.shape[1])
    before.release()
    return total, grad_scores, step


@gluon.jit
def _consume(outputs, shared, tiles, tile, scale, SCALE_SIGN: gl.constexpr, CONSUMER: gl.constexpr):
    """A consumer."""
    out = shared.q.of(CONSUMER, 0)
    WIDTH: gl.constexpr = out.buffer().shape[1]
    mask = tile.mask
    scores = scores_under(scale, SCALE_SIGN, gl.float32)  # here: handed over, it would take another register
    first_row = tile.first_query + CONSUMER * CONSUMER_ROWS
    row = first_row + gl.arange(0, CONSUMER_ROWS, layout=per_row(tiles.BLOCK_N))
    at = (tile.batch * tiles.heads + tile.head).to(gl.int64) * padded_length(mask.queries) + row
    rows = Rows(row, gl.load(outputs.log2 + at), gl.load(outputs.delta + at))
    n_masked = tile.walk.masked_count()
    n_full = tile.full_count()

    out.await_full()
    shared.grad.of(CONSUMER, 0).await_full()
    step = 0
    total = gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, product_layout(WIDTH))
    grad_scores = _masked_block(step, shared, scores, mask, rows, tile.first_block(), CONSUMER)
    for masked in range(1, n_masked):
        total = add_product(total, grad_scores, shared.k.at(step))
        step += 1
        grad_scores = _masked_block(step, shared, scores, mask, rows, tile.walk.masked_block(masked), CONSUMER)
    for _ in range(n_full):
        total, grad_scores, step = _step(total, grad_scores, step, shared, scores, rows, CONSUMER)
    total = add_product(total, grad_scores, shared.k.at(step))
    # Infinity in a key that others of the tile see is not hidden by a dead row's weights of 0.
    alive = gl.convert_layout(rows.log2, per_row(WIDTH)) != INFINITY
    total = gl.where(alive[:, None], total * scores.magnitude, 0.0)
    # Nobody reads q any more: its buffer is free.
    store_rows(total, outputs.grad_q, [tile.batch, tile.head, first_row, 0], out.buffer())
    tma.store_wait(0)


@kernel(jit=gluon.jit)
def hopper_backward_q_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    grad_out_descriptor,
    grad_q_descriptor,
    LOG2,
    DELTA,
    VISIBLE,
    LISTS,
    scale: gl.float64,
    queries: gl.int32,
    keys: gl.int32,
    heads: gl.int32,
    group: gl.int32,
    mask_stride_batch: gl.int32,
    mask_stride_head: gl.int32,
    heads_total: gl.int32,
    section: gl.int32,
    window_left: gl.int32,
    window_right: gl.int32,
    WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    V_SLOTS: gl.constexpr,
    SCHEDULE_N: gl.constexpr,
    MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    SCALE_SIGN: gl.constexpr,
):
    """One tile of BLOCK_M queries of one head: its rows of the gradient of q, (b, h, i, d)."""
    dtype: gl.constexpr = q_descriptor.dtype
    barriers = make_barriers()
    q, barriers = make_ring(barriers, dtype, CONSUMERS, CONSUMER_ROWS, WIDTH, 1)
    grad, barriers = make_ring(barriers, dtype, CONSUMERS, CONSUMER_ROWS, WIDTH, 1)
    k, barriers = make_ring(barriers, dtype, SLOTS, BLOCK_N, WIDTH, CONSUMERS)
    v, barriers = make_ring(barriers, dtype, V_SLOTS, BLOCK_N, WIDTH, CONSUMERS)
    cleared, barriers = make_meeting(barriers)
    fence_async_shared()

    mask = make_mask(
        VISIBLE, LISTS, mask_stride_batch, mask_stride_head, queries, keys, window_left, window_right, SCHEDULE_N, MASK,
        CAUSAL, LEFT, RIGHT, HIDES_KEYS=True,
    )  # fmt: skip
    tiles = QueryTiles(mask, heads, group, heads_total, section, BLOCK_M, BLOCK_N)
    tile = tiles.at(0)
    inputs = Inputs(q_descriptor, k_descriptor, v_descriptor, grad_out_descriptor, None, None)
    outputs = Outputs(grad_q_descriptor, LOG2, DELTA)
    shared = Shared(q, grad, k, v, cleared)
    gl.warp_specialize(
        [
            (_consume, (outputs, shared, tiles, tile, scale, SCALE_SIGN, 0)),
            (_consume, (outputs, shared, tiles, tile, scale, SCALE_SIGN, 1)),
            (_produce, (inputs, shared, tile)),
        ],
        [4, 1],
        [240, 24],
    )


def query_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    grad_q: Tensor,
    log2: Tensor,
    delta: Tensor,
    schedule: Schedule,
    spec: AttentionSpec,
    tiles: Tiles,
) -> None:
    """Writes the gradient of q into `grad_q` `(b, h, i, d)`, for the calls that the forward serves.

    The last dimensions of q, k, v and grad_out are contiguous. `log2` and `delta` are those of
    `Statistics`.
    """
    inputs = (bulk_readable(tensor) for tensor in (q, k, v, grad_out))
    launch(_prepare(spec, tiles, schedule.planes), *inputs, grad_q, log2, delta, schedule.visible, schedule.lists)


@lru_cache(maxsize=CALLS_KEPT)
def _prepare(spec: AttentionSpec, tiles: Tiles, planes: int) -> Prepared:
    """The launch for all tensors of these sizes."""
    tile = tiles.backward_q
    heads_total = spec.batch * spec.heads
    rows, keys = (CONSUMER_ROWS.value, spec.head_dim), (tile.block_n, spec.head_dim)
    return Prepared(
        hopper_backward_q_kernel,
        heads_total * triton.cdiv(spec.queries, tile.block_m),
        (float(spec.scale), *call_numbers(spec, planes), heads_total, query_section(spec), *window_numbers(spec)),
        dict(V_SLOTS=tile.num_stages, **call_choices(spec, tile, tiles)),
        tile.num_warps,
        registers=REGISTERS,
        hand_over=partial(described, (rows, keys, keys, rows, rows)),
    )
