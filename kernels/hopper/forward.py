"""The forward for Hopper, in Gluon: after FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608).

A program is three partitions: two consumers, four warps each, which have 64 queries of a tile each, and a producer, one
warp, which copies q, k and v into shared memory ahead of them. Programs are persistent: each takes every n-th tile.

A consumer issues the scores of a block before the weighted sum of the block before, and takes the softmax of the block
while that sum is still running. Blocks that need masking come first, the full ones after them.
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

from flash_attend.kernels.configs import Tiles
from flash_attend.kernels.forward import empty_outputs
from flash_attend.kernels.hopper.descriptors import bulk_readable, described
from flash_attend.kernels.hopper.partitions import (
    CONSUMER_ROWS,
    CONSUMERS,
    REGISTERS,
    clear_hidden,
    init_turns,
    pass_turn,
    product_layout,
    take_turn,
)
from flash_attend.kernels.hopper.producer import fill_blocks
from flash_attend.kernels.hopper.products import issue_product
from flash_attend.kernels.hopper.ring import SLOTS, await_full, fill, init_ring, release
from flash_attend.kernels.hopper.versions import store_tile
from flash_attend.kernels.hopper.walk import (
    first_block_of,
    full_count,
    tile_at,
    turn_count,
    walk_at,
)
from flash_attend.kernels.key_schedule import (
    Schedule,
    build_schedule,
    masked_block,
    masked_count,
)
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.masking import KEY, NONE, hide, key_visibility
from flash_attend.kernels.operands import mask_strides, query_section, readable
from flash_attend.kernels.softmax import LOG2E, NEGATIVE_INFINITY, SMALLEST_SCALE, finish, online_step
from flash_attend.operands import Operands
from flash_attend.spec import CALLS_KEPT, AttentionSpec
from flash_attend.target import DeviceTarget

__all__ = ["attention_forward"]

# Where each ring's barriers begin. All barriers are one array: a partition pays registers for all that it is handed.
Q_RING = gl.constexpr(0)  # a slot is a consumer's
K_RING = gl.constexpr(4)
V_RING = gl.constexpr(8)
CLEARED = gl.constexpr(12)  # both consumers have cleared their halves of a block of v
TURNS = gl.constexpr(13)  # with PING_PONG
N_BARRIERS = gl.constexpr(15)


@gluon.jit
def _produce(
    inputs, shared, mask, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SCHEDULE_N: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The producer: for each tile its q, then its blocks of k and v in the order in which the consumers take them."""
    q_descriptor, k_descriptor, v_descriptor, group = inputs
    q_buffers, k_buffers, v_buffers, barriers = shared
    queries, keys, heads, heads_total, section = sizes
    step = 0
    for turn in range(turn_count(queries, heads_total, BLOCK_M)):
        index = gl.program_id(0) + turn * gl.num_programs(0)
        first_query, batch, head = tile_at(index, queries, heads, heads_total, section, BLOCK_M)
        walk, _ = walk_at(mask, first_query, batch, head, queries, keys, BLOCK_M, BLOCK_N, SCHEDULE_N, MASK, CAUSAL)
        for consumer in gl.static_range(CONSUMERS):
            row = first_query + consumer * CONSUMER_ROWS
            fill(q_descriptor, [batch, head, row, 0], q_buffers.index(consumer), barriers, Q_RING, consumer, turn)
        step = fill_blocks(
            (k_descriptor, v_descriptor), (k_buffers, v_buffers, barriers), walk, batch, head // group, step,
            K_RING, V_RING, SCHEDULE_N // BLOCK_N, MASK != NONE,
        )  # fmt: skip


@gluon.jit
def _take_in(
    scores, row_max, row_sum, block, row, visible, queries, keys, scale_log2,
    MASKED: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr, NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    """The weights [CONSUMER_ROWS, BLOCK_N] of a block's scores, the correction of older sums, the new statistics."""
    if NEGATIVE_SCALE:
        scores = -scores
    if MASKED:
        BLOCK_N: gl.constexpr = scores.shape[1]
        key = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, product_layout(BLOCK_N)))
        scores = hide(
            scores,
            NEGATIVE_INFINITY,
            row[:, None],
            key[None, :],
            key_visibility(visible, key, keys, MASK)[None, :],
            keys - queries,
            MASK,
            CAUSAL,
            HIDE_KEYS=MASK == KEY or not CAUSAL,
        )
    return online_step(scores, row_max, row_sum, scale_log2, MASKED)


@gluon.jit
def _step(
    total, row_max, row_sum, weights, step, cleared, q, k_buffers, v_buffers, barriers,
    block, row, visible, queries, keys, scale_log2,
    CONSUMER: gl.constexpr, MASKED: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """The scores and weights of one block, and the weighted sum of the block before."""
    before = step % SLOTS
    step += 1
    slot = step % SLOTS
    BLOCK_N: gl.constexpr = k_buffers.shape[1]
    WIDTH: gl.constexpr = v_buffers.shape[2]
    if PING_PONG:
        take_turn(barriers, TURNS, step, CONSUMER)
    scores_token = issue_product(q, k_buffers, barriers, K_RING, step)
    total_token = warpgroup_mma(weights, v_buffers.index(before), total, is_async=True)
    if PING_PONG:
        pass_turn(barriers, TURNS, CONSUMER)
    scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores_token,))
    release(barriers, K_RING, slot)
    exponentials, correction, row_max, row_sum = _take_in(
        scores, row_max, row_sum, block, row, visible, queries, keys, scale_log2, MASKED, MASK, CAUSAL, NEGATIVE_SCALE
    )
    # Here, not in the next step: a wait ends a basic block, and keeps the assembler from hoisting the one for the sum,
    # which follows, above the exponentials.
    await_full(barriers, V_RING, slot, step // SLOTS)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total_token,))
    weights = gl.convert_layout(exponentials.to(weights.dtype), gl.DotOperandLayout(0, product_layout(WIDTH), 2))
    release(barriers, V_RING, before)
    if MASKED and MASK == KEY:
        clear_hidden(v_buffers.index(slot), visible, block * BLOCK_N, barriers, CLEARED, cleared, CONSUMER)
        cleared += 1
    total = total * gl.convert_layout(correction, gl.SliceLayout(1, product_layout(WIDTH)))[:, None]
    return total, row_max, row_sum, weights, step, cleared


@gluon.jit
def _consume(
    outputs, shared, mask, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SCHEDULE_N: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr, OUT_IN_Q: gl.constexpr, PING_PONG: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """A consumer: its rows of each tile."""
    out_descriptor, LSE, out_buffers, scale_log2 = outputs
    q_buffers, k_buffers, v_buffers, barriers = shared
    queries, keys, heads, heads_total, section = sizes
    LISTED: gl.constexpr = MASK != NONE
    RATIO: gl.constexpr = SCHEDULE_N // BLOCK_N
    WIDTH: gl.constexpr = q_buffers.shape[2]
    total_layout: gl.constexpr = product_layout(WIDTH)
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, total_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, product_layout(BLOCK_N))
    q = q_buffers.index(CONSUMER)
    step = 0
    cleared = 0
    for turn in range(turn_count(queries, heads_total, BLOCK_M)):
        index = gl.program_id(0) + turn * gl.num_programs(0)
        first_query, batch, head = tile_at(index, queries, heads, heads_total, section, BLOCK_M)
        walk, visible = walk_at(
            mask, first_query, batch, head, queries, keys, BLOCK_M, BLOCK_N, SCHEDULE_N, MASK, CAUSAL
        )
        n_masked = masked_count(walk)
        n_full = full_count(walk, RATIO, LISTED)
        block = first_block_of(walk, RATIO, LISTED)
        if n_masked == 0:
            n_full -= 1  # the first block is one of them
        first_row = first_query + CONSUMER * CONSUMER_ROWS
        row = first_row + gl.arange(0, CONSUMER_ROWS, layout=rows_layout)
        row_max = gl.full([CONSUMER_ROWS], NEGATIVE_INFINITY, gl.float32, rows_layout)
        row_sum = gl.zeros([CONSUMER_ROWS], gl.float32, rows_layout)

        slot = step % SLOTS
        await_full(barriers, Q_RING, CONSUMER, turn)
        if PING_PONG:
            take_turn(barriers, TURNS, step, CONSUMER)
        token = issue_product(q, k_buffers, barriers, K_RING, step)
        if PING_PONG:
            pass_turn(barriers, TURNS, CONSUMER)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
        release(barriers, K_RING, slot)
        exponentials, _, row_max, row_sum = _take_in(
            scores, row_max, row_sum, block, row, visible, queries, keys, scale_log2, True, MASK, CAUSAL, NEGATIVE_SCALE
        )
        weights = gl.convert_layout(exponentials.to(q.dtype), weights_layout)
        await_full(barriers, V_RING, slot, step // SLOTS)
        if MASK == KEY:
            clear_hidden(v_buffers.index(slot), visible, block * BLOCK_N, barriers, CLEARED, cleared, CONSUMER)
            cleared += 1
        total = gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, total_layout)
        for masked in range(1, n_masked):
            block = masked_block(walk, masked, RATIO, LISTED)
            total, row_max, row_sum, weights, step, cleared = _step(
                total, row_max, row_sum, weights, step, cleared, q, k_buffers, v_buffers, barriers,
                block, row, visible, queries, keys, scale_log2, CONSUMER, True, MASK, CAUSAL, NEGATIVE_SCALE,
                PING_PONG,
            )  # fmt: skip
        for _ in range(n_full):
            total, row_max, row_sum, weights, step, cleared = _step(
                total, row_max, row_sum, weights, step, cleared, q, k_buffers, v_buffers, barriers,
                0, row, visible, queries, keys, scale_log2, CONSUMER, False, MASK, CAUSAL, NEGATIVE_SCALE,
                PING_PONG,
            )  # fmt: skip
        if not OUT_IN_Q:
            release(barriers, Q_RING, CONSUMER)
        slot = step % SLOTS
        token = warpgroup_mma(weights, v_buffers.index(slot), total, is_async=True)
        normaliser, lse_natural = finish(row_max, row_sum)
        gl.store(LSE + (batch * heads + head).to(gl.int64) * queries + row, lse_natural, mask=row < queries)
        total = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
        release(barriers, V_RING, slot)
        out = out_buffers.index(CONSUMER)
        total = total * gl.convert_layout(normaliser, gl.SliceLayout(1, total_layout))[:, None]
        if not OUT_IN_Q:
            tma.store_wait(0)  # of the tile before
        out.store(total.to(out.dtype))
        fence_async_shared()
        store_tile(out_descriptor, [batch, head, first_row, 0], out.reshape(out_descriptor.block_type.shape))
        if OUT_IN_Q:
            tma.store_wait(0)
            release(barriers, Q_RING, CONSUMER)
        step += 1
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "scale_log2", "queries", "keys", "heads", "group", "mask_stride_batch", "mask_stride_head",
        "heads_total", "section",
    ]
)  # fmt: skip
def hopper_forward_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    out_descriptor,
    LSE,
    VISIBLE,
    LISTS,
    scale_log2: gl.float32,
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
    SCHEDULE_N: gl.constexpr,
    MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr,
    OUT_IN_Q: gl.constexpr,
    PING_PONG: gl.constexpr,
):
    """Every n-th tile of BLOCK_M queries: OUT (b, h, i, d), and LSE (b, h, i), contiguous."""
    dtype: gl.constexpr = q_descriptor.dtype
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CONSUMER_ROWS, WIDTH], dtype)
    keys_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, WIDTH], dtype)
    q_buffers = gl.allocate_shared_memory(dtype, [CONSUMERS, CONSUMER_ROWS, WIDTH], rows_layout)
    k_buffers = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, WIDTH], keys_layout)
    v_buffers = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, WIDTH], keys_layout)
    if OUT_IN_Q:
        out_buffers = q_buffers
    else:
        out_buffers = gl.allocate_shared_memory(dtype, [CONSUMERS, CONSUMER_ROWS, WIDTH], rows_layout)
    barriers = gl.allocate_shared_memory(gl.int64, [N_BARRIERS, 1], mbarrier.MBarrierLayout())
    init_ring(barriers, Q_RING, 1)
    init_ring(barriers, K_RING, CONSUMERS)
    init_ring(barriers, V_RING, CONSUMERS)
    mbarrier.init(barriers.index(CLEARED), count=CONSUMERS)
    if PING_PONG:
        init_turns(barriers, TURNS)
    fence_async_shared()
    outputs = (out_descriptor, LSE, out_buffers, scale_log2)
    inputs = (q_descriptor, k_descriptor, v_descriptor, group)
    shared = (q_buffers, k_buffers, v_buffers, barriers)
    # Without a mask nothing reads these; None, in a tuple, does not compile.
    mask = (LSE, LSE, 0, 0) if MASK == NONE else (VISIBLE, LISTS, mask_stride_batch, mask_stride_head)
    sizes = (queries, keys, heads, heads_total, section)
    # Compile-time values stay so only outside a tuple with a name.
    gl.warp_specialize(
        [
            (_consume, (outputs, shared, mask, sizes, BLOCK_M, BLOCK_N, SCHEDULE_N, MASK, CAUSAL, NEGATIVE_SCALE,
                        OUT_IN_Q, PING_PONG, 0)),
            (_consume, (outputs, shared, mask, sizes, BLOCK_M, BLOCK_N, SCHEDULE_N, MASK, CAUSAL, NEGATIVE_SCALE,
                        OUT_IN_Q, PING_PONG, 1)),
            (_produce, (inputs, shared, mask, sizes, BLOCK_M, BLOCK_N, SCHEDULE_N, MASK, CAUSAL)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def attention_forward(operands: Operands, spec: AttentionSpec, tiles: Tiles) -> tuple[Tensor, Tensor, Schedule]:
    """What `kernels.forward.attention_forward` gives, for the calls that the dispatcher lets through.

    Half precision, `d = dv` of 64, 128 or 256, no dropout, at least one key, and a mask of keys or none.
    """
    q, k, v = readable(operands.q), readable(operands.k), readable(operands.v)
    out, lse = empty_outputs(q, spec)
    schedule = build_schedule(operands.mask, spec, tiles)
    prepared = _prepare(spec, tiles, schedule.rows, DeviceTarget.of(q.device).multiprocessors)
    tensors = bulk_readable(q), bulk_readable(k), bulk_readable(v), out, lse, schedule.visible, schedule.lists
    launch(prepared, *tensors)
    return out, lse, schedule


@lru_cache(maxsize=CALLS_KEPT)
def _prepare(spec: AttentionSpec, tiles: Tiles, mask_rows: int, multiprocessors: int) -> Prepared:
    """The launch for all tensors of these sizes."""
    tile = tiles.forward
    dim = spec.head_dim
    heads_total = spec.batch * spec.heads
    n_tiles = heads_total * triton.cdiv(spec.queries, tile.block_m)
    rows, keys = (CONSUMER_ROWS.value, dim), (tile.block_n, dim)
    return Prepared(
        hopper_forward_kernel,
        min(n_tiles, multiprocessors or n_tiles),  # a device without any is none that runs
        (
            max(abs(spec.scale) * LOG2E.value, SMALLEST_SCALE.value),
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
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            SCHEDULE_N=tiles.schedule_block[1],
            MASK=int(spec.mask),
            CAUSAL=spec.causal,
            NEGATIVE_SCALE=spec.scale < 0,
            PING_PONG=tile.ping_pong,
            OUT_IN_Q=dim == 256,  # out has no room of its own beside two buffers each of k and v
        ),
        tile.num_warps,
        registers=REGISTERS,
        hand_over=partial(described, (rows, keys, keys, rows)),
    )
