"""The backward for Hopper, in Gluon, in one pass over the scores: after FlashAttention-3 (Shah et al. 2024,
arXiv:2407.08608).

A program has 128 keys of one key/value head and visits the queries that see them. It is two consumers, four warps each,
which have 64 of the keys each; a producer, one warp, which copies k and v, and then q and the gradient of out block
after block; and, where the gradient of q is made here too, a reducer, one warp, which adds that to a sum in global
memory. Else a kernel of its own makes it, in a fixed order.

Scores are computed transposed, keys by queries, so that the weights and the gradients of the scores are where the
products for the gradients of v and k take them: in a consumer's own registers. Only the gradient of q, a sum over the
keys of both, takes those of the scores through shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from math import copysign

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_attend.kernels.backward import empty_gradients, prepare_rows
from flash_attend.kernels.configs import Tile, Tiles
from flash_attend.kernels.hopper.backward_q import query_gradient
from flash_attend.kernels.hopper.backward_wide import WIDE, prepare_wide
from flash_attend.kernels.hopper.descriptors import bulk_readable, described
from flash_attend.kernels.hopper.partitions import (
    CONSUMER_ROWS,
    CONSUMERS,
    REGISTERS,
    clear_hidden_rows,
    meet,
    product_layout,
    store_gradient,
)
from flash_attend.kernels.hopper.producer import SHIFTS, fill_queries
from flash_attend.kernels.hopper.ring import (
    SLOTS,
    await_empty,
    await_full,
    fill,
    init_ring,
    publish,
    release,
)
from flash_attend.kernels.hopper.versions import reduce_tile
from flash_attend.kernels.hopper.walk import first_live_query
from flash_attend.kernels.key_schedule import Schedule, mask_row
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.masking import KEY, hide, key_visibility, query_blocks
from flash_attend.kernels.operands import mask_strides, readable
from flash_attend.kernels.softmax import LOG2E, SMALLEST_SCALE, recomputed_weights
from flash_attend.operands import Operands
from flash_attend.spec import CALLS_KEPT, AttentionSpec, MaskKind

__all__ = ["attention_backward"]

# Where each ring's barriers begin. All barriers are one array: a partition pays registers for all that it is handed.
K_RING = gl.constexpr(0)  # a slot is a consumer's, and filled once
V_RING = gl.constexpr(4)  # likewise
Q_RING = gl.constexpr(8)  # blocks of q with their LSE
GRAD_RING = gl.constexpr(12)  # blocks of the gradient of out with their delta
GRAD_Q_RING = gl.constexpr(16)  # a slot is a consumer's, and the reducer reads it
EXCHANGED = gl.constexpr(20)  # both consumers have stored their gradients of a block's scores
CLEARED = gl.constexpr(21)  # both consumers have cleared their rows of k and v
N_BARRIERS = gl.constexpr(22)


@gluon.jit
def _produce(inputs, shared, work):
    """The producer: k and v, then q and the gradient of out in the order in which the consumers take them."""
    q_descriptor, k_descriptor, v_descriptor, grad_descriptor, lse_descriptor, delta_descriptor = inputs
    q_buffers, k_buffers, v_buffers, grad_buffers, lse_buffers, delta_buffers, barriers = shared
    batch, kv_head, group, first_key, first_query, begin, end = work
    if begin < end:
        for consumer in gl.static_range(CONSUMERS):
            row = first_key + consumer * CONSUMER_ROWS
            fill(k_descriptor, [batch, kv_head, row, 0], k_buffers.index(consumer), barriers, K_RING, consumer, 0)
            fill(v_descriptor, [batch, kv_head, row, 0], v_buffers.index(consumer), barriers, V_RING, consumer, 0)
    BLOCK_M: gl.constexpr = q_buffers.shape[1]
    fill_queries(
        (q_descriptor, grad_descriptor, lse_descriptor, delta_descriptor),
        (q_buffers, grad_buffers, lse_buffers, delta_buffers, barriers),
        batch, kv_head * group, group, first_query + begin * BLOCK_M, end - begin, Q_RING, GRAD_RING,
    )  # fmt: skip


@gluon.jit
def _reduce(sum_descriptor, grad_q_buffers, barriers, work, BLOCK_M: gl.constexpr):
    """The reducer: adds each consumer's part of a block's gradient of q to the sum."""
    batch, kv_head, group, _, first_query, begin, end = work
    step = 0
    for head in range(kv_head * group, (kv_head + 1) * group):
        for block in range(begin, end):
            for consumer in gl.static_range(CONSUMERS):
                row = first_query + block * BLOCK_M
                column = 0
                if BLOCK_M == CONSUMER_ROWS:
                    column = consumer * CONSUMER_ROWS
                else:
                    row += consumer * CONSUMER_ROWS
                buffer = grad_q_buffers.index(consumer)
                await_full(barriers, GRAD_Q_RING, consumer, step)
                reduce_tile(sum_descriptor, [batch, head, row, column], buffer.reshape(sum_descriptor.block_type.shape))
            for consumer in gl.static_range(CONSUMERS):
                tma.store_wait(CONSUMERS - 1 - consumer)
                release(barriers, GRAD_Q_RING, consumer)
            step += 1


@gluon.jit
def _issue_query_gradient(grad_scores, k_buffers, slot, CONSUMER: gl.constexpr):
    """Starts the products of this consumer's part of a block's gradient of q [CONSUMER_ROWS, CONSUMER_ROWS], over the
    keys of one consumer and then of the other: half of its columns, or of its rows where it has twice as many."""
    BLOCK_M: gl.constexpr = grad_scores.shape[2]
    PART: gl.constexpr = CONSUMER * CONSUMER_ROWS
    total = gl.zeros([CONSUMER_ROWS, CONSUMER_ROWS], gl.float32, product_layout(CONSUMER_ROWS))
    for half in gl.static_range(CONSUMERS):
        scores = grad_scores.index(slot * CONSUMERS + half)  # [CONSUMER_ROWS, BLOCK_M]
        k = k_buffers.index(half)
        if BLOCK_M == CONSUMER_ROWS:
            k = k.slice(PART, CONSUMER_ROWS, dim=1)
        else:
            scores = scores.slice(PART, CONSUMER_ROWS, dim=1)
        total = warpgroup_mma(scores.permute((1, 0)), k, total, use_acc=half > 0, is_async=True)
    return total


@gluon.jit
def _step(
    grad_k, grad_v, step, block, k, v, shared, exchange, edges, visible, scale_log2,
    CONSUMER: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr, FUSED: gl.constexpr,
):  # fmt: skip
    """One block of queries."""
    q_buffers, k_buffers, _, grad_buffers, lse_buffers, delta_buffers, barriers = shared
    grad_scores_buffers, grad_q_buffers = exchange
    masked_end, offset, keys = edges
    BLOCK_M: gl.constexpr = q_buffers.shape[1]
    WIDTH: gl.constexpr = q_buffers.shape[2]
    scores_layout: gl.constexpr = product_layout(BLOCK_M)
    of_queries: gl.constexpr = gl.SliceLayout(0, scores_layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, product_layout(WIDTH), 2)
    slot = step % SLOTS
    turn = step // SLOTS
    q = q_buffers.index(slot)
    grad = grad_buffers.index(slot)
    nothing = gl.zeros([CONSUMER_ROWS, BLOCK_M], gl.float32, scores_layout)
    await_full(barriers, Q_RING, slot, turn)
    scores_token = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
    await_full(barriers, GRAD_RING, slot, turn)
    grad_weights_token = warpgroup_mma(v, grad.permute((1, 0)), nothing, use_acc=False, is_async=True)

    scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores_token,))
    # Without the gradient of q no product mixes keys: what a hidden one holds stays in its own rows until the end.
    HIDE_KEYS: gl.constexpr = FUSED and (MASK == KEY or not CAUSAL)
    if CAUSAL or HIDE_KEYS:  # noqa: SIM102 (decided when it is compiled, and the next when it runs)
        if block < masked_end:
            query = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=of_queries)
            key = gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, scores_layout))
            shown = key_visibility(visible, key, keys, MASK)
            fill = gl.where(scale_log2 < 0, float("inf"), float("-inf"))
            scores = hide(scores, fill, query[None, :], key[:, None], shown[:, None], offset, MASK, CAUSAL, HIDE_KEYS)
    weights = recomputed_weights(scores, lse_buffers.index(slot).load(of_queries)[None, :], scale_log2)
    # Issued here, before the wait that follows: it takes every exponential, and so holds them all under the product
    # before it.
    grad_v_token = warpgroup_mma(gl.convert_layout(weights.to(q.dtype), operand), grad, grad_v, is_async=True)

    grad_weights = warpgroup_mma_wait(num_outstanding=1, deps=(grad_weights_token,))
    delta = delta_buffers.index(slot).load(of_queries)[None, :]
    grad_scores = (weights * (grad_weights - delta)).to(q.dtype)
    if FUSED:
        # In turn two buffers each: who gets through to the next block's knows that this one's products are done.
        grad_scores_buffers.index(slot * CONSUMERS + CONSUMER).store(grad_scores)
        meet(barriers, EXCHANGED, step)
        grad_q_token = _issue_query_gradient(grad_scores_buffers, k_buffers, slot, CONSUMER)
    grad_k_token = warpgroup_mma(gl.convert_layout(grad_scores, operand), q, grad_k, is_async=True)
    if FUSED:
        await_empty(barriers, GRAD_Q_RING, CONSUMER, step)
        grad_q, grad_v = warpgroup_mma_wait(num_outstanding=1, deps=(grad_q_token, grad_v_token))
        release(barriers, GRAD_RING, slot)
        grad_q_buffers.index(CONSUMER).store(grad_q)
        publish(barriers, GRAD_Q_RING, CONSUMER)
    else:
        grad_v = warpgroup_mma_wait(num_outstanding=1, deps=(grad_v_token,))
        release(barriers, GRAD_RING, slot)
    # A product that still ran at the loop's end would make the assembler wait for every other one as it is issued.
    grad_k = warpgroup_mma_wait(num_outstanding=0, deps=(grad_k_token,))
    release(barriers, Q_RING, slot)
    return grad_k, grad_v


@gluon.jit
def _consume(
    outputs, shared, exchange, work, edges, visible,
    MASK: gl.constexpr, CAUSAL: gl.constexpr, FUSED: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """A consumer: its keys' gradients, and its part of each block's gradient of q."""
    grad_k_descriptor, grad_v_descriptor, scale, scale_log2 = outputs
    q_buffers, k_buffers, v_buffers, _, _, _, barriers = shared
    batch, kv_head, group, first_key, _, begin, end = work
    masked_end, offset, keys, hides = edges
    WIDTH: gl.constexpr = q_buffers.shape[2]
    k = k_buffers.index(CONSUMER)
    v = v_buffers.index(CONSUMER)
    # From here on keys are counted from this consumer's first.
    FIRST: gl.constexpr = CONSUMER * CONSUMER_ROWS
    edges = (masked_end - begin, offset - FIRST + begin * q_buffers.shape[1], keys - FIRST)
    visible += FIRST
    if begin < end:
        for consumer in gl.static_range(CONSUMERS):
            await_full(barriers, K_RING, consumer, 0)
        await_full(barriers, V_RING, CONSUMER, 0)
        if FUSED and MASK == KEY:  # noqa: SIM102 (likewise)
            if hides:
                # The gradients of their scores are 0, but 0 * NaN is no 0.
                clear_hidden_rows(k, visible)
                clear_hidden_rows(v, visible)
                meet(barriers, CLEARED, 0)
    grad_k = gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, product_layout(WIDTH))
    grad_v = gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, product_layout(WIDTH))
    block = 0
    n_blocks = end - begin
    for step in range(group * n_blocks):  # one loop over heads and blocks: two take more registers
        grad_k, grad_v = _step(
            grad_k, grad_v, step, block, k, v, shared, exchange, edges, visible, scale_log2,
            CONSUMER, MASK, CAUSAL, FUSED,
        )  # fmt: skip
        if CAUSAL:
            block = gl.where(block + 1 == n_blocks, 0, block + 1)
    at = (batch, kv_head, first_key + FIRST)
    store_gradient(grad_v, grad_v_descriptor, v, visible, at, MASK)
    store_gradient(grad_k * scale, grad_k_descriptor, v, visible, at, MASK)


@gluon.jit(
    do_not_specialize=[
        "scale", "scale_log2", "queries", "keys", "heads", "group", "mask_stride_batch", "mask_stride_head",
    ]
)  # fmt: skip
def hopper_backward_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    grad_descriptor,
    lse_descriptor,
    delta_descriptor,
    grad_k_descriptor,
    grad_v_descriptor,
    sum_descriptor,
    VISIBLE,
    LISTS,
    scale: gl.float32,
    scale_log2: gl.float32,
    queries: gl.int32,
    keys: gl.int32,
    heads: gl.int32,
    group: gl.int32,
    mask_stride_batch: gl.int32,
    mask_stride_head: gl.int32,
    WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SCHEDULE_N: gl.constexpr,
    MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    FUSED: gl.constexpr,
):
    """One tile of BLOCK_N keys of one key/value head: GRAD_K and GRAD_V (b, hk, j, d). FUSED: its share of the sum that
    is the gradient of q (b, h, i, d) but for the scale, float32."""
    gl.static_assert(BLOCK_N == CONSUMERS * CONSUMER_ROWS)
    tiles = gl.cdiv(keys, BLOCK_N)
    first_key = gl.program_id(0) % tiles * BLOCK_N  # under causality the longest come first as they are
    kv_heads = heads // group
    batch = gl.program_id(0) // tiles // kv_heads
    kv_head = gl.program_id(0) // tiles % kv_heads
    row, visible, _ = mask_row(
        VISIBLE, batch, kv_head * group, mask_stride_batch, mask_stride_head, 0, gl.cdiv(keys, SCHEDULE_N),
        BLOCK_M, SCHEDULE_N, MASK,
    )  # fmt: skip
    # Queries are counted from the first live one. Those past the end need no hiding: all that is read of them is 0, or
    # an LSE of inf.
    first_query = 0
    if CAUSAL:
        first_query = first_live_query(LISTS, visible, row, queries, keys, SCHEDULE_N, MASK)
        queries -= first_query
    begin, masked_end, _, end = query_blocks(first_key, queries, keys, BLOCK_M, BLOCK_N, CAUSAL)
    offset = keys - queries - first_key
    hides = first_key + BLOCK_N > keys
    visible += first_key
    if MASK == KEY:
        shown = gl.load(visible + gl.arange(0, BLOCK_N, layout=gl.BlockedLayout([1], [32], [4], [0])))
        end = gl.where(gl.max(shown, 0) != 0, end, begin)
        hides = gl.min(shown, 0) == 0

    if FUSED and (MASK == KEY or not CAUSAL):
        masked_end = gl.where(hides, end, masked_end)

    dtype: gl.constexpr = q_descriptor.dtype
    keys_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CONSUMER_ROWS, WIDTH], dtype)
    queries_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, WIDTH], dtype)
    numbers_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M], gl.float32)
    k_buffers = gl.allocate_shared_memory(dtype, [CONSUMERS, CONSUMER_ROWS, WIDTH], keys_layout)
    v_buffers = gl.allocate_shared_memory(dtype, [CONSUMERS, CONSUMER_ROWS, WIDTH], keys_layout)
    q_buffers = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_M, WIDTH], queries_layout)
    grad_buffers = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_M, WIDTH], queries_layout)
    lse_buffers = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_M], numbers_layout)
    delta_buffers = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_M], numbers_layout)
    barriers = gl.allocate_shared_memory(gl.int64, [N_BARRIERS, 1], mbarrier.MBarrierLayout())
    init_ring(barriers, K_RING, 1)
    init_ring(barriers, V_RING, 1)
    init_ring(barriers, Q_RING, CONSUMERS)
    init_ring(barriers, GRAD_RING, CONSUMERS)
    init_ring(barriers, GRAD_Q_RING, 1)
    for together in gl.static_range(EXCHANGED, N_BARRIERS):
        mbarrier.init(barriers.index(together), count=CONSUMERS)
    fence_async_shared()

    inputs = (q_descriptor, k_descriptor, v_descriptor, grad_descriptor, lse_descriptor, delta_descriptor)
    outputs = (grad_k_descriptor, grad_v_descriptor, scale, scale_log2)
    shared = (q_buffers, k_buffers, v_buffers, grad_buffers, lse_buffers, delta_buffers, barriers)
    work = (batch, kv_head, group, first_key, first_query, begin, end)
    edges = (masked_end, offset, keys - first_key, hides)
    # Compile-time values stay so only outside a tuple with a name.
    if FUSED:
        gl.static_assert(BLOCK_M * WIDTH == CONSUMERS * CONSUMER_ROWS * CONSUMER_ROWS)
        scores_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CONSUMER_ROWS, BLOCK_M], dtype)
        sum_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CONSUMER_ROWS, CONSUMER_ROWS], gl.float32)
        grad_scores_buffers = gl.allocate_shared_memory(
            dtype, [SLOTS * CONSUMERS, CONSUMER_ROWS, BLOCK_M], scores_layout
        )
        grad_q_buffers = gl.allocate_shared_memory(gl.float32, [CONSUMERS, CONSUMER_ROWS, CONSUMER_ROWS], sum_layout)
        exchange = (grad_scores_buffers, grad_q_buffers)
        gl.warp_specialize(
            [
                (_consume, (outputs, shared, exchange, work, edges, visible, MASK, CAUSAL, FUSED, 0)),
                (_consume, (outputs, shared, exchange, work, edges, visible, MASK, CAUSAL, FUSED, 1)),
                (_produce, (inputs, shared, work)),
                (_reduce, (sum_descriptor, grad_q_buffers, barriers, work, BLOCK_M)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        exchange = (barriers, barriers)  # nothing reads it; None, in a tuple, does not compile
        gl.warp_specialize(
            [
                (_consume, (outputs, shared, exchange, work, edges, visible, MASK, CAUSAL, FUSED, 0)),
                (_consume, (outputs, shared, exchange, work, edges, visible, MASK, CAUSAL, FUSED, 1)),
                (_produce, (inputs, shared, work)),
            ],
            [4, 1],
            [240, 24],
        )


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    schedule: Schedule,
    spec: AttentionSpec,
    tiles: Tiles,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `kernels.backward.attention_backward` gives, for the calls that the dispatcher lets through."""
    needs_q, needs_k, needs_v = needed
    q, k, v, out = readable(operands.q), readable(operands.k), readable(operands.v), readable(out)
    grad_out = torch.zeros_like(out) if grad_out is None else readable(grad_out)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    delta, lse_log2 = prepare_rows(grad_out, grad_lse, out, lse, spec, tiles)

    needs_keys = needs_k or needs_v
    fused = tiles.backward_fused is not None and needs_q and needs_keys
    grad_q, grad_k, grad_v = empty_gradients(q, k, v, spec, (needs_q, needs_keys, needs_keys))
    if needs_keys:
        if spec.queries == 0:  # there are no descriptors of nothing
            grad_k.zero_()
            grad_v.zero_()
        total = lse.new_zeros(spec.batch, spec.heads, spec.queries, spec.head_dim) if fused else None
        starts_anywhere = spec.causal and (spec.mask == MaskKind.KEY or spec.queries > spec.keys)
        rows = (_shifted(row, beyond, starts_anywhere) for row, beyond in ((lse_log2, torch.inf), (delta, 0.0)))
        tile = tiles.backward_fused if fused else tiles.backward_kv
        prepare = prepare_wide if spec.head_dim == WIDE else _prepare
        prepared = prepare(spec, tile, tiles, schedule.rows, fused)
        inputs = map(bulk_readable, (q, k, v, grad_out))
        launch(prepared, *inputs, *rows, grad_k, grad_v, total, schedule.visible, schedule.lists)
    if fused:
        torch.mul(total, spec.scale, out=grad_q)
    elif needs_q:
        query_gradient(q, k, v, grad_out, grad_q, lse_log2, delta, schedule, spec, tiles)
    return grad_q, grad_k if needs_k else None, grad_v if needs_v else None


def _shifted(rows: Tensor, beyond: float, starts_anywhere: bool) -> Tensor:
    """Rows `(b, h, n)` as `(b, h, SHIFTS, n)`, each SHIFTS times, moved by one more: so a bulk copy begins anywhere.

    Where there are no dead rows, all begin at whole tiles, and `(b, h, 1, n)` will do.
    """
    if not starts_anywhere:
        return rows.unsqueeze(2)
    n_shifts = SHIFTS.value
    return pad(rows, (0, n_shifts - 1), value=beyond).unfold(2, rows.shape[2], 1).contiguous()


@lru_cache(maxsize=CALLS_KEPT)
def _prepare(spec: AttentionSpec, tile: Tile, tiles: Tiles, mask_rows: int, fused: bool) -> Prepared:
    """The launch for all tensors of these sizes."""
    block_m, block_n, num_warps, *_ = tile
    dim, consumer_rows = spec.head_dim, CONSUMER_ROWS.value
    of_queries, of_keys, part_of_queries = (block_m, dim), (consumer_rows, dim), (consumer_rows, consumer_rows)
    return Prepared(
        hopper_backward_kernel,
        spec.batch * spec.kv_heads * triton.cdiv(spec.keys, block_n) if spec.queries else 0,
        (
            spec.scale,
            copysign(max(abs(spec.scale) * LOG2E.value, SMALLEST_SCALE.value), spec.scale),
            spec.queries,
            spec.keys,
            spec.heads,
            spec.group,
            *mask_strides(spec, mask_rows),
        ),
        dict(
            WIDTH=dim,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            SCHEDULE_N=tiles.schedule_block[1],
            MASK=int(spec.mask),
            CAUSAL=spec.causal,
            FUSED=fused,
        ),
        num_warps,
        registers=REGISTERS,
        hand_over=partial(
            described,
            (of_queries, of_keys, of_keys, of_queries, (1, block_m), (1, block_m), of_keys, of_keys, part_of_queries),
        ),
    )
