"""The gradient of q for Hopper, in Gluon: by tiles of queries, in a fixed order, and so always bitwise repeatable.

A program has one tile and is three partitions, as the forward's are: two consumers, which have 64 queries each, and a
producer, which copies q and the gradient of out, then block after block of k and v.

For a full block a consumer issues the scores, the gradients of the weights, and what the block before adds to the
gradient of q. It takes the exponentials while the other two products run, and the gradients of the scores while the
last one does. Blocks that need masking come first, one at a time: what hides pairs leaves no registers for more.
"""

from __future__ import annotations

from functools import lru_cache, partial

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_attend.kernels.backward import padded_length
from flash_attend.kernels.configs import Tiles
from flash_attend.kernels.hopper.descriptors import bulk_readable, described
from flash_attend.kernels.hopper.partitions import (
    CONSUMER_ROWS,
    CONSUMERS,
    REGISTERS,
    clear_hidden,
    product_layout,
)
from flash_attend.kernels.hopper.plain import hide, key_visibility, masked_block, masked_count
from flash_attend.kernels.hopper.producer import fill_blocks
from flash_attend.kernels.hopper.products import add_product, issue_product
from flash_attend.kernels.hopper.ring import SLOTS, await_full, fill, init_ring, place, release
from flash_attend.kernels.hopper.versions import store_tile
from flash_attend.kernels.hopper.walk import first_block_of, full_count, tile_at, walk_at
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.mask import KEY, NONE
from flash_attend.kernels.operands import mask_strides, query_section
from flash_attend.kernels.schedule import Schedule
from flash_attend.kernels.scores import LOG2E
from flash_attend.kernels.softmax import recomputed_weights
from flash_attend.spec import CALLS_KEPT, AttentionSpec

__all__ = ["query_gradient"]

# Where each ring's barriers begin, in one array of all.
Q_RING = gl.constexpr(0)  # a slot is a consumer's
GRAD_RING = gl.constexpr(4)  # likewise
K_RING = gl.constexpr(8)
V_RING = gl.constexpr(12)
CLEARED = gl.constexpr(16)  # both consumers have cleared their halves of a block of k
N_BARRIERS = gl.constexpr(17)


@gluon.jit
def _produce(inputs, buffers, barriers, position, walk, RATIO: gl.constexpr, LISTED: gl.constexpr):
    """The producer."""
    q_descriptor, grad_descriptor, k_descriptor, v_descriptor, group = inputs
    q_buffers, grad_buffers, k_buffers, v_buffers = buffers
    first_query, batch, head = position
    for consumer in gl.static_range(CONSUMERS):
        coordinates = [batch, head, first_query + consumer * CONSUMER_ROWS, 0]
        fill(q_descriptor, coordinates, q_buffers.index(consumer), barriers, Q_RING, consumer, 0)
        fill(grad_descriptor, coordinates, grad_buffers.index(consumer), barriers, GRAD_RING, consumer, 0)
    fill_blocks(
        (k_descriptor, v_descriptor), (k_buffers, v_buffers, barriers), walk, batch, head // group, 0,
        K_RING, V_RING, RATIO, LISTED,
    )  # fmt: skip


@gluon.jit
def _masked_block(
    step, buffers, barriers, of_rows, scale_log2, block, row, visible, queries, keys,
    CONSUMER: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The gradients of the scores of a block that needs masking, [CONSUMER_ROWS, BLOCK_N], as an operand."""
    q_buffers, grad_buffers, k_buffers, v_buffers = buffers
    lse_log2, delta = of_rows
    BLOCK_N: gl.constexpr = k_buffers.shape[1]
    WIDTH: gl.constexpr = k_buffers.shape[2]
    if MASK == KEY:
        slot, turn = place(step, SLOTS)
        await_full(barriers, K_RING, slot, turn)
        # Every block so far was cleared, as this one is now. Later ones are full.
        clear_hidden(k_buffers.index(slot), visible, block * BLOCK_N, barriers, CLEARED, step, CONSUMER)
    scores_token = issue_product(q_buffers.index(CONSUMER), k_buffers, barriers, K_RING, step)
    weights_token = issue_product(grad_buffers.index(CONSUMER), v_buffers, barriers, V_RING, step)
    scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores_token,))
    weights = recomputed_weights(scores, lse_log2[:, None], scale_log2)
    slot, turn = place(step, v_buffers.shape[0])
    await_full(barriers, V_RING, slot, turn)  # again, as in `_step`
    grad_weights = warpgroup_mma_wait(num_outstanding=0, deps=(weights_token,))
    release(barriers, V_RING, slot)
    key = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, product_layout(BLOCK_N)))
    grad_scores = hide(
        weights * (grad_weights - delta[:, None]),
        0.0,
        row[:, None],
        key[None, :],
        key_visibility(visible, key, keys, MASK)[None, :],
        keys - queries,
        MASK,
        CAUSAL,
        HIDE_KEYS=MASK == KEY or not CAUSAL,
    )
    return gl.convert_layout(grad_scores.to(k_buffers.dtype), gl.DotOperandLayout(0, product_layout(WIDTH), 2))


@gluon.jit
def _step(total, grad_scores, step, buffers, barriers, of_rows, scale_log2, CONSUMER: gl.constexpr):
    """The gradients of the scores of a full block, and the total with what the block before adds to it."""
    q_buffers, grad_buffers, k_buffers, v_buffers = buffers
    lse_log2, delta = of_rows
    WIDTH: gl.constexpr = k_buffers.shape[2]
    before, _ = place(step, SLOTS)
    step += 1
    k_slot, k_turn = place(step, SLOTS)
    v_slot, v_turn = place(step, v_buffers.shape[0])
    scores_token = issue_product(q_buffers.index(CONSUMER), k_buffers, barriers, K_RING, step)
    weights_token = issue_product(grad_buffers.index(CONSUMER), v_buffers, barriers, V_RING, step)
    total_token = warpgroup_mma(grad_scores, k_buffers.index(before), total, is_async=True)
    scores = warpgroup_mma_wait(num_outstanding=2, deps=(scores_token,))
    weights = recomputed_weights(scores, lse_log2[:, None], scale_log2)
    # Both barriers are through: a wait ends a basic block, and keeps the assembler from hoisting the one for a product,
    # which follows, above the arithmetic that is to run beside it.
    await_full(barriers, V_RING, v_slot, v_turn)
    grad_weights = warpgroup_mma_wait(num_outstanding=1, deps=(weights_token,))
    release(barriers, V_RING, v_slot)
    new = weights * (grad_weights - delta[:, None])
    await_full(barriers, K_RING, k_slot, k_turn)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total_token,))
    grad_scores = gl.convert_layout(new.to(k_buffers.dtype), gl.DotOperandLayout(0, product_layout(WIDTH), 2))
    release(barriers, K_RING, before)
    return total, grad_scores, step


@gluon.jit
def _consume(
    outputs, buffers, barriers, position, walk, visible, queries, keys, heads,
    RATIO: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """A consumer."""
    out_descriptor, LSE_LOG2, DELTA, scale = outputs
    q_buffers, _, k_buffers, _ = buffers
    first_query, batch, head = position
    LISTED: gl.constexpr = MASK != NONE
    BLOCK_N: gl.constexpr = k_buffers.shape[1]
    WIDTH: gl.constexpr = k_buffers.shape[2]
    first_row = first_query + CONSUMER * CONSUMER_ROWS
    row = first_row + gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, product_layout(BLOCK_N)))
    at = (batch * heads + head).to(gl.int64) * padded_length(queries) + row
    of_rows = (gl.load(LSE_LOG2 + at), gl.load(DELTA + at))
    scale_log2 = scale * LOG2E  # with its sign: pairs are hidden after the exponential, not before
    n_masked = masked_count(walk)
    n_full = full_count(walk, RATIO, LISTED)
    if n_masked == 0:
        n_full -= 1  # the first block is one of them

    await_full(barriers, Q_RING, CONSUMER, 0)
    await_full(barriers, GRAD_RING, CONSUMER, 0)
    step = 0
    total = gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, product_layout(WIDTH))
    block = first_block_of(walk, RATIO, LISTED)
    grad_scores = _masked_block(
        step, buffers, barriers, of_rows, scale_log2, block, row, visible, queries, keys, CONSUMER, MASK, CAUSAL
    )
    for masked in range(1, n_masked):
        total = add_product(total, grad_scores, k_buffers, barriers, K_RING, step)
        step += 1
        block = masked_block(walk, masked, RATIO, LISTED)
        grad_scores = _masked_block(
            step, buffers, barriers, of_rows, scale_log2, block, row, visible, queries, keys, CONSUMER, MASK, CAUSAL
        )
    for _ in range(n_full):
        total, grad_scores, step = _step(total, grad_scores, step, buffers, barriers, of_rows, scale_log2, CONSUMER)
    total = add_product(total, grad_scores, k_buffers, barriers, K_RING, step)
    # Nobody reads q any more: its buffer is free.
    out = q_buffers.index(CONSUMER)
    out.store((total * scale).to(out.dtype))
    fence_async_shared()
    store_tile(out_descriptor, [batch, head, first_row, 0], out.reshape(out_descriptor.block_type.shape))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "scale", "queries", "keys", "heads", "group", "mask_stride_batch", "mask_stride_head", "heads_total", "section",
    ]
)  # fmt: skip
def hopper_backward_q_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    grad_out_descriptor,
    grad_q_descriptor,
    LSE_LOG2,
    DELTA,
    VISIBLE,
    LISTS,
    scale: gl.float32,
    queries: gl.int32,
    keys: gl.int32,
    heads: gl.int32,
    group: gl.int32,
    mask_stride_batch: gl.int32,
    mask_stride_head: gl.int32,
    heads_total: gl.int32,
    section: gl.int32,
    WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    V_SLOTS: gl.constexpr,
    SCHEDULE_N: gl.constexpr,
    MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """One tile of BLOCK_M queries of one head: its rows of the gradient of q, (b, h, i, d)."""
    dtype: gl.constexpr = q_descriptor.dtype
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CONSUMER_ROWS, WIDTH], dtype)
    keys_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, WIDTH], dtype)
    RATIO: gl.constexpr = SCHEDULE_N // BLOCK_N
    q_buffers = gl.allocate_shared_memory(dtype, [CONSUMERS, CONSUMER_ROWS, WIDTH], rows_layout)
    grad_buffers = gl.allocate_shared_memory(dtype, [CONSUMERS, CONSUMER_ROWS, WIDTH], rows_layout)
    k_buffers = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, WIDTH], keys_layout)
    v_buffers = gl.allocate_shared_memory(dtype, [V_SLOTS, BLOCK_N, WIDTH], keys_layout)
    barriers = gl.allocate_shared_memory(gl.int64, [N_BARRIERS, 1], mbarrier.MBarrierLayout())
    init_ring(barriers, Q_RING, 1)
    init_ring(barriers, GRAD_RING, 1)
    init_ring(barriers, K_RING, CONSUMERS)
    init_ring(barriers, V_RING, CONSUMERS)
    mbarrier.init(barriers.index(CLEARED), count=CONSUMERS)
    fence_async_shared()

    # Without a mask nothing reads these; None, in a tuple, does not compile.
    mask = (DELTA, DELTA, 0, 0) if MASK == NONE else (VISIBLE, LISTS, mask_stride_batch, mask_stride_head)
    first_query, batch, head = tile_at(gl.program_id(0), queries, heads, heads_total, section, BLOCK_M)
    walk, visible = walk_at(mask, first_query, batch, head, queries, keys, BLOCK_M, BLOCK_N, SCHEDULE_N, MASK, CAUSAL)
    position = (first_query, batch, head)
    inputs = (q_descriptor, grad_out_descriptor, k_descriptor, v_descriptor, group)
    outputs = (grad_q_descriptor, LSE_LOG2, DELTA, scale)
    buffers = (q_buffers, grad_buffers, k_buffers, v_buffers)
    # Compile-time values stay so only outside a tuple with a name.
    gl.warp_specialize(
        [
            (
                _consume,
                (outputs, buffers, barriers, position, walk, visible, queries, keys, heads, RATIO, MASK, CAUSAL, 0),
            ),
            (
                _consume,
                (outputs, buffers, barriers, position, walk, visible, queries, keys, heads, RATIO, MASK, CAUSAL, 1),
            ),
            (_produce, (inputs, buffers, barriers, position, walk, RATIO, MASK != NONE)),
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
    lse_log2: Tensor,
    delta: Tensor,
    schedule: Schedule,
    spec: AttentionSpec,
    tiles: Tiles,
) -> None:
    """Writes the gradient of q into `grad_q` `(b, h, i, d)`, for the calls that the forward serves.

    The last dimensions of q, k, v and grad_out are contiguous. `lse_log2` and `delta` are what
    `kernels.backward.prepare_statistics` gives.
    """
    inputs = (bulk_readable(tensor) for tensor in (q, k, v, grad_out))
    launch(_prepare(spec, tiles, schedule.planes), *inputs, grad_q, lse_log2, delta, schedule.visible, schedule.lists)


@lru_cache(maxsize=CALLS_KEPT)
def _prepare(spec: AttentionSpec, tiles: Tiles, mask_rows: int) -> Prepared:
    """The launch for all tensors of these sizes."""
    block_m, block_n, num_warps, v_slots, *_ = tiles.backward_q
    dim = spec.head_dim
    heads_total = spec.batch * spec.heads
    rows, keys = (CONSUMER_ROWS.value, dim), (block_n, dim)
    return Prepared(
        hopper_backward_q_kernel,
        heads_total * triton.cdiv(spec.queries, block_m),
        (
            float(spec.scale),
            spec.queries,
            spec.keys,
            spec.heads,
            spec.group,
            *mask_strides(spec, mask_rows),
            heads_total,
            query_section(spec),
        ),
        dict(
            WIDTH=dim,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            V_SLOTS=v_slots,
            SCHEDULE_N=tiles.schedule_block[1],
            MASK=int(spec.mask),
            CAUSAL=spec.causal,
        ),
        num_warps,
        registers=REGISTERS,
        hand_over=partial(described, (rows, keys, keys, rows, rows)),
    )
