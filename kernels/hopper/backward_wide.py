"""The backward for Hopper at head dimension 256, in Gluon: the gradients of k and v, and that of q in the same pass.

The sum that becomes one gradient of 64 keys, [64, 256] in float32, is all that a consumer has registers for. So the two
consumers of a program have the same 64 keys: one makes the gradient of k, the other that of v. Each computes the scores
for itself, transposed, keys by queries. That is one product in five that could be spared, but to share the weights,
through shared memory, each would compute half of them, and the tensor cores lose as much time on products so narrow.

Within a consumer little runs beside its products. What does is the other consumer: at this width a product takes so
long, beside the exponentials, that the two keep the tensor cores busy.

Where the gradient of q is made here too, the gradients of the scores go through shared memory to the consumer that
makes the gradient of v, which has a product less. It adds to a sum in global memory, by atomics: for bulk reductions,
as in `backward.py`, there would be no room.
"""

from __future__ import annotations

from functools import lru_cache, partial

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_attend.kernels.configs import Tile, Tiles
from flash_attend.kernels.hopper.descriptors import described
from flash_attend.kernels.hopper.partitions import (
    CONSUMER_ROWS,
    CONSUMERS,
    REGISTERS,
    clear_hidden_rows,
    meet,
    product_layout,
    store_gradient,
)
from flash_attend.kernels.hopper.plain import hide, key_visibility, mask_row, query_blocks
from flash_attend.kernels.hopper.producer import fill_queries
from flash_attend.kernels.hopper.products import add_product, issue_product
from flash_attend.kernels.hopper.ring import (
    SLOTS,
    await_empty,
    await_full,
    fill,
    init_ring,
    place,
    publish,
    release,
)
from flash_attend.kernels.hopper.walk import first_live_query
from flash_attend.kernels.launch import Prepared
from flash_attend.kernels.mask import KEY
from flash_attend.kernels.operands import mask_strides
from flash_attend.kernels.scores import LOG2E
from flash_attend.kernels.softmax import recomputed_weights
from flash_attend.spec import CALLS_KEPT, AttentionSpec

__all__ = ["WIDE", "prepare_wide"]

WIDE = 256  # the head dimension

# Where each ring's barriers begin, in one array of all.
KEY_RING = gl.constexpr(0)  # slot 0 is for k, slot 1 for v; each is filled once
Q_RING = gl.constexpr(4)  # blocks of q with their LSE
GRAD_RING = gl.constexpr(8)  # blocks of the gradient of out with their delta
SCORES_RING = gl.constexpr(12)  # gradients of scores, from one consumer to the other
CLEARED = gl.constexpr(16)  # the consumers have cleared the hidden rows of k and of v
N_BARRIERS = gl.constexpr(17)


@gluon.jit
def _produce(inputs, shared, work):
    """The producer: k and v, then q and the gradient of out in the order in which the consumers take them."""
    q_descriptor, k_descriptor, v_descriptor, grad_descriptor, lse_descriptor, delta_descriptor = inputs
    key_buffers, q_buffers, grad_buffers, lse_buffers, delta_buffers, _, barriers = shared
    batch, kv_head, group, first_key, first_query, n_blocks = work
    if n_blocks > 0:
        fill(k_descriptor, [batch, kv_head, first_key, 0], key_buffers.index(0), barriers, KEY_RING, 0, 0)
        fill(v_descriptor, [batch, kv_head, first_key, 0], key_buffers.index(1), barriers, KEY_RING, 1, 0)
    fill_queries(
        (q_descriptor, grad_descriptor, lse_descriptor, delta_descriptor),
        (q_buffers, grad_buffers, lse_buffers, delta_buffers, barriers),
        batch, kv_head * group, group, first_query, n_blocks, Q_RING, GRAD_RING,
    )  # fmt: skip


@gluon.jit
def _weights(
    scores, lse_buffers, step, block, edges, visible, scale_log2,
    MASK: gl.constexpr, CAUSAL: gl.constexpr, FUSED: gl.constexpr,
):  # fmt: skip
    """The weights [CONSUMER_ROWS, BLOCK_M] of a block of queries."""
    masked_end, offset, keys = edges
    BLOCK_M: gl.constexpr = lse_buffers.shape[1]
    of_queries: gl.constexpr = gl.SliceLayout(0, product_layout(BLOCK_M))
    # Where no product mixes keys, hidden ones may have weights: their rows are cleared at the end.
    HIDE_KEYS: gl.constexpr = FUSED and (MASK == KEY or not CAUSAL)
    slot, _ = place(step, SLOTS)
    weights = recomputed_weights(scores, lse_buffers.index(slot).load(of_queries)[None, :], scale_log2)
    if CAUSAL or HIDE_KEYS:  # noqa: SIM102 - this one is decided when the kernel is compiled
        if block < masked_end:
            query = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=of_queries)
            key = gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, product_layout(BLOCK_M)))
            shown = key_visibility(visible, key, keys, MASK)
            weights = hide(weights, 0.0, query[None, :], key[:, None], shown[:, None], offset, MASK, CAUSAL, HIDE_KEYS)
    return weights


@gluon.jit
def _add_to_query_gradient(outputs, k, scores_buffers, barriers, work, step, head, block):
    """Adds to the sum what this step's block of queries gets from these keys."""
    _, _, TOTAL, _, queries, heads = outputs
    batch, _, _, _, first_query, _ = work
    BLOCK_M: gl.constexpr = scores_buffers.shape[2]
    WIDTH: gl.constexpr = k.shape[1]
    PART: gl.constexpr = 64  # columns at a time
    layout: gl.constexpr = product_layout(PART)
    slot, turn = place(step, SLOTS)
    first = first_query + block * BLOCK_M
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
    at = TOTAL + ((batch * heads + head).to(gl.int64) * queries + first) * WIDTH
    at = at + (row[:, None] * WIDTH + column[None, :])
    exists = (row < queries - first)[:, None]
    await_full(barriers, SCORES_RING, slot, turn)
    grad_scores = scores_buffers.index(slot).permute((1, 0))  # [BLOCK_M, CONSUMER_ROWS]
    nothing = gl.zeros([BLOCK_M, PART], gl.float32, layout)
    for part in gl.static_range(WIDTH // PART):
        columns = k.slice(part * PART, PART, dim=1)
        token = warpgroup_mma(grad_scores, columns, nothing, use_acc=False, is_async=True)
        added = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
        gl.atomic_add(at + part * PART, added, mask=exists, sem="relaxed")
    release(barriers, SCORES_RING, slot)


@gluon.jit
def _as_operand(x, buffers):
    """Weights, or the gradients of scores, as the left operand of a product with a block of these buffers."""
    return gl.convert_layout(x.to(buffers.dtype), gl.DotOperandLayout(0, product_layout(buffers.shape[2]), 2))


@gluon.jit
def _after(head, block, n_blocks):
    """The head and the block after these; after a head's last block comes the first of the next."""
    is_last = block + 1 == n_blocks
    return gl.where(is_last, head + 1, head), gl.where(is_last, 0, block + 1)


@gluon.jit
def _consume_for_v(
    outputs, shared, work, edges, visible, MASK: gl.constexpr, CAUSAL: gl.constexpr, FUSED: gl.constexpr
):
    """The consumer that makes the gradient of v, and what these keys add to that of q."""
    _, descriptor, _, scale, _, _ = outputs
    key_buffers, q_buffers, grad_buffers, lse_buffers, _, scores_buffers, barriers = shared
    batch, kv_head, group, first_key, _, n_blocks = work
    WIDTH: gl.constexpr = q_buffers.shape[2]
    scale_log2 = scale * LOG2E
    k = key_buffers.index(0)
    n_steps = group * n_blocks
    total = gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, product_layout(WIDTH))
    if n_blocks > 0:
        await_full(barriers, KEY_RING, 0, 0)
        if FUSED and MASK == KEY:
            clear_hidden_rows(k, visible)
            meet(barriers, CLEARED, 0)
    head = kv_head * group
    block = 0
    for step in range(n_steps):
        slot, turn = place(step, SLOTS)
        token = issue_product(k, q_buffers, barriers, Q_RING, step)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
        weights = _weights(scores, lse_buffers, step, block, edges, visible, scale_log2, MASK, CAUSAL, FUSED)
        release(barriers, Q_RING, slot)
        await_full(barriers, GRAD_RING, slot, turn)
        total = add_product(total, _as_operand(weights, grad_buffers), grad_buffers, barriers, GRAD_RING, step)
        if FUSED:
            _add_to_query_gradient(outputs, k, scores_buffers, barriers, work, step, head, block)
        head, block = _after(head, block, n_blocks)
    # As if it were the next block's: the producer fills no more, but the other consumer may still read the slot.
    slot, turn = place(n_steps, SLOTS)
    await_empty(barriers, Q_RING, slot, turn)
    store_gradient(total, descriptor, q_buffers.index(slot), visible, (batch, kv_head, first_key), MASK)


@gluon.jit
def _consume_for_k(
    outputs, shared, work, edges, visible, MASK: gl.constexpr, CAUSAL: gl.constexpr, FUSED: gl.constexpr
):
    """The consumer that makes the gradient of k."""
    descriptor, _, _, scale, _, _ = outputs
    key_buffers, q_buffers, grad_buffers, lse_buffers, delta_buffers, scores_buffers, barriers = shared
    batch, kv_head, group, first_key, _, n_blocks = work
    BLOCK_M: gl.constexpr = q_buffers.shape[1]
    WIDTH: gl.constexpr = q_buffers.shape[2]
    scale_log2 = scale * LOG2E
    k = key_buffers.index(0)
    v = key_buffers.index(1)
    total = gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, product_layout(WIDTH))
    if n_blocks > 0:
        await_full(barriers, KEY_RING, 0, 0)
        await_full(barriers, KEY_RING, 1, 0)
        if FUSED and MASK == KEY:
            clear_hidden_rows(v, visible)
            meet(barriers, CLEARED, 0)
    block = 0
    for step in range(group * n_blocks):
        slot, turn = place(step, SLOTS)
        scores_token = issue_product(k, q_buffers, barriers, Q_RING, step)
        weights_token = issue_product(v, grad_buffers, barriers, GRAD_RING, step)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores_token,))
        weights = _weights(scores, lse_buffers, step, block, edges, visible, scale_log2, MASK, CAUSAL, FUSED)
        # It is through: a wait ends a basic block, and keeps the assembler from hoisting the one for a product, which
        # follows, above the exponentials.
        await_full(barriers, GRAD_RING, slot, turn)
        grad_weights = warpgroup_mma_wait(num_outstanding=0, deps=(weights_token,))
        delta = delta_buffers.index(slot).load(gl.SliceLayout(0, product_layout(BLOCK_M)))
        grad_scores = (weights * (grad_weights - delta[None, :])).to(q_buffers.dtype)
        release(barriers, GRAD_RING, slot)
        if FUSED:
            await_empty(barriers, SCORES_RING, slot, turn)
            scores_buffers.index(slot).store(grad_scores)
            publish(barriers, SCORES_RING, slot)
        grad_scores = _as_operand(grad_scores, q_buffers)
        total = add_product(total, grad_scores, q_buffers, barriers, Q_RING, step)
        _, block = _after(0, block, n_blocks)
    # Nobody else reads v.
    store_gradient(total * scale, descriptor, v, visible, (batch, kv_head, first_key), MASK)


@gluon.jit(do_not_specialize=["scale", "queries", "keys", "heads", "group", "mask_stride_batch", "mask_stride_head"])
def hopper_backward_wide_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    grad_descriptor,
    lse_descriptor,
    delta_descriptor,
    grad_k_descriptor,
    grad_v_descriptor,
    TOTAL,
    VISIBLE,
    LISTS,
    scale: gl.float32,
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
    """One tile of BLOCK_N keys, as many as a consumer takes, of one key/value head: GRAD_K and GRAD_V (b, hk, j, d)."""
    tiles = gl.cdiv(keys, BLOCK_N)
    first_key = gl.program_id(0) % tiles * BLOCK_N  # under causality the longest come first as they are
    kv_heads = heads // group
    batch = gl.program_id(0) // tiles // kv_heads
    kv_head = gl.program_id(0) // tiles % kv_heads
    row, visible, _ = mask_row(
        VISIBLE, batch, kv_head * group, mask_stride_batch, mask_stride_head, 0, gl.cdiv(keys, SCHEDULE_N),
        BLOCK_M, SCHEDULE_N, MASK,
    )  # fmt: skip
    # Queries are counted from the first that sees a key: what those before it hold may be anything. Those past the end
    # need no hiding: all that is read of them is 0, or an LSE of inf.
    first_query = 0
    if CAUSAL:
        first_query = first_live_query(LISTS, visible, row, queries, keys, SCHEDULE_N, MASK)
    live = queries - first_query
    begin, masked_end, _, end = query_blocks(first_key, live, keys, BLOCK_M, BLOCK_N, CAUSAL)
    visible += first_key
    if MASK == KEY:
        shown = gl.load(visible + gl.arange(0, BLOCK_N, layout=gl.BlockedLayout([1], [32], [4], [0])))
        end = gl.where(gl.max(shown, 0) != 0, end, begin)
        if FUSED:
            masked_end = gl.where(gl.min(shown, 0) == 0, end, masked_end)
    elif FUSED and not CAUSAL:
        masked_end = gl.where(first_key + BLOCK_N > keys, end, masked_end)

    dtype: gl.constexpr = q_descriptor.dtype
    keys_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, WIDTH], dtype)
    queries_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, WIDTH], dtype)
    numbers_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M], gl.float32)
    key_buffers = gl.allocate_shared_memory(dtype, [2, BLOCK_N, WIDTH], keys_layout)
    q_buffers = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_M, WIDTH], queries_layout)
    grad_buffers = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_M, WIDTH], queries_layout)
    lse_buffers = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_M], numbers_layout)
    delta_buffers = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_M], numbers_layout)
    barriers = gl.allocate_shared_memory(gl.int64, [N_BARRIERS, 1], mbarrier.MBarrierLayout())
    init_ring(barriers, KEY_RING, 1)
    init_ring(barriers, Q_RING, CONSUMERS)
    init_ring(barriers, GRAD_RING, CONSUMERS)
    init_ring(barriers, SCORES_RING, 1)
    mbarrier.init(barriers.index(CLEARED), count=CONSUMERS)
    fence_async_shared()

    if FUSED:
        scores_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
        scores_buffers = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, BLOCK_M], scores_layout)
        sum_pointer = TOTAL
    else:
        scores_buffers = q_buffers  # nothing reads these; None, in a tuple, does not compile
        sum_pointer = scale
    inputs = (q_descriptor, k_descriptor, v_descriptor, grad_descriptor, lse_descriptor, delta_descriptor)
    outputs = (grad_k_descriptor, grad_v_descriptor, sum_pointer, scale, queries, heads)
    shared = (key_buffers, q_buffers, grad_buffers, lse_buffers, delta_buffers, scores_buffers, barriers)
    work = (batch, kv_head, group, first_key, first_query + begin * BLOCK_M, end - begin)
    # For the consumers the first block is block 0, and the tile's first key is key 0.
    edges = (masked_end - begin, keys - live - first_key + begin * BLOCK_M, keys - first_key)
    gl.warp_specialize(
        [
            (_consume_for_k, (outputs, shared, work, edges, visible, MASK, CAUSAL, FUSED)),
            (_consume_for_v, (outputs, shared, work, edges, visible, MASK, CAUSAL, FUSED)),
            (_produce, (inputs, shared, work)),
        ],
        [4, 1],
        [240, 24],
    )


@lru_cache(maxsize=CALLS_KEPT)
def prepare_wide(spec: AttentionSpec, tile: Tile, tiles: Tiles, mask_rows: int, fused: bool) -> Prepared:
    """The launch for all tensors of these sizes: q, k, v, the gradient of out, LSE and delta, the gradients of k and v,
    the sum that is the gradient of q or None, and the schedule's visibility and lists."""
    block_m, block_n, num_warps, *_ = tile
    dim = spec.head_dim
    of_queries, of_keys = (block_m, dim), (block_n, dim)
    return Prepared(
        hopper_backward_wide_kernel,
        spec.batch * spec.kv_heads * triton.cdiv(spec.keys, block_n) if spec.queries else 0,
        (
            float(spec.scale),
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
            described, (of_queries, of_keys, of_keys, of_queries, (1, block_m), (1, block_m), of_keys, of_keys)
        ),
    )
