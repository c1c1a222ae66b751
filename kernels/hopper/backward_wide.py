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

from functools import lru_cache, partial

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_attend.kernels.compat import aggregate, kernel
from flash_attend.kernels.configs import Tile, Tiles
from flash_attend.kernels.hopper.operands import call_choices, call_numbers, described
from flash_attend.kernels.hopper.partitions import (
    CONSUMER_ROWS,
    CONSUMERS,
    REGISTERS,
    Meeting,
    as_operand,
    clear_hidden_rows,
    make_meeting,
    may_hide_keys,
    per_column,
    per_row,
    product_layout,
    store_gradient,
)
from flash_attend.kernels.hopper.producer import Inputs, fill_queries
from flash_attend.kernels.hopper.products import add_product, issue_product
from flash_attend.kernels.hopper.ring import SLOTS, Ring, make_barriers, make_ring
from flash_attend.kernels.hopper.walk import key_tile_of_program, make_mask
from flash_attend.kernels.launch import Prepared
from flash_attend.kernels.operands import window_numbers
from flash_attend.kernels.scores import scores_under
from flash_attend.kernels.softmax import recomputed_weights
from flash_attend.spec import CALLS_KEPT, AttentionSpec

__all__ = ["WIDE", "prepare_wide"]

WIDE = 256  # the head dimension


@aggregate
class Shared:
    """What the partitions have in shared memory."""

    keys: Ring  # slot 0 is k, slot 1 is v; each is filled once
    q: Ring  # with the LSE
    grad: Ring  # that of out, with delta
    grad_scores: object  # a ring, from one consumer to the other, where the gradient of q is made here too
    cleared: Meeting  # the consumers have cleared the hidden rows of k and of v


@aggregate
class Outputs:
    """Where the consumers write."""

    grad_k: object  # descriptors
    grad_v: object
    total: object  # a pointer to the sum that is the gradient of q, but for the scale
    queries: gl.tensor
    heads: gl.tensor


@gluon.jit
def _produce(inputs, shared, tile):
    """The producer: k and v, then q and the gradient of out in the order in which the consumers take them."""
    if tile.n_blocks > 0:
        coordinates = [tile.batch, tile.kv_head, tile.first_key, 0]
        shared.keys.of(0, 0).fill(inputs.k, coordinates)
        shared.keys.of(1, 0).fill(inputs.v, coordinates)
    fill_queries(inputs, shared, tile)


@gluon.jit
def _weights(products, q, block, tile, scores):
    """The weights [CONSUMER_ROWS, BLOCK_M] of a block of queries."""
    BLOCK_M: gl.constexpr = products.shape[1]
    mask = tile.mask
    weights = recomputed_weights(
        scores.apply(products), None, q.numbers().load(per_column(BLOCK_M))[None, :], scores.factor_log2
    )
    # Where no product mixes keys, hidden ones may have weights: their rows are cleared at the end. Here the weights are
    # hidden, not the scores before them: that takes fewer registers where each consumer has scores of its own.
    if mask.CAUSAL or mask.left is not None or mask.HIDES_KEYS:  # noqa: SIM102 (decided when it is compiled)
        if tile.is_masked(block):
            query = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=per_column(BLOCK_M))
            key = gl.arange(0, CONSUMER_ROWS, layout=per_row(BLOCK_M))
            weights = mask.hide(weights, query[None, :], key[:, None], mask.key_shown(key)[:, None], 0.0)
    return weights


@gluon.jit
def _add_to_query_gradient(outputs, shared, tile, step, head, block):
    """Adds to the sum what this step's block of queries gets from these keys."""
    part = shared.grad_scores.at(step)
    k = shared.keys.of(0, 0).buffer()
    BLOCK_M: gl.constexpr = part.buffer().shape[1]
    WIDTH: gl.constexpr = k.shape[1]
    PART: gl.constexpr = 64  # columns at a time
    layout: gl.constexpr = product_layout(PART)
    first = tile.first_query + block * BLOCK_M
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
    at = outputs.total + ((tile.batch * outputs.heads + head).to(gl.int64) * outputs.queries + first) * WIDTH
    at = at + (row[:, None] * WIDTH + column[None, :])
    exists = (row < outputs.queries - first)[:, None]
    part.await_full()
    grad_scores = part.buffer().permute((1, 0))  # [BLOCK_M, CONSUMER_ROWS]
    nothing = gl.zeros([BLOCK_M, PART], gl.float32, layout)
    for columns in gl.static_range(WIDTH // PART):
        token = warpgroup_mma(grad_scores, k.slice(columns * PART, PART, dim=1), nothing, use_acc=False, is_async=True)
        added = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
        gl.atomic_add(at + columns * PART, added, mask=exists, sem="relaxed")
    part.release()


@gluon.jit
def _after(head, block, n_blocks):
    """The head and the block after these; after a head's last block comes the first of the next."""
    is_last = block + 1 == n_blocks
    return gl.where(is_last, head + 1, head), gl.where(is_last, 0, block + 1)


@gluon.jit
def _consume_for_v(outputs, shared, tile, scale, SCALE_SIGN: gl.constexpr, FUSED: gl.constexpr):
    """The consumer that makes the gradient of v, and what these keys add to that of q."""
    scores = scores_under(scale, SCALE_SIGN, gl.float32)  # here: handed over, it would take another register
    mask = tile.mask
    k = shared.keys.of(0, 0)
    dtype: gl.constexpr = k.buffer().dtype
    WIDTH: gl.constexpr = k.buffer().shape[1]
    n_steps = tile.group * tile.n_blocks
    total = gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, product_layout(WIDTH))
    if tile.n_blocks > 0:
        k.await_full()
        if FUSED and may_hide_keys(mask.KIND, mask.left):
            clear_hidden_rows(k.buffer(), mask)
            shared.cleared.meet(0)
    head = tile.kv_head * tile.group
    block = 0
    for step in range(n_steps):
        q = shared.q.at(step)
        grad = shared.grad.at(step)
        token = issue_product(k.buffer(), q)
        products = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
        weights = _weights(products, q, block, tile, scores)
        q.release()
        grad.await_full()
        total = add_product(total, as_operand(weights, dtype, WIDTH), grad)
        if FUSED:
            _add_to_query_gradient(outputs, shared, tile, step, head, block)
        head, block = _after(head, block, tile.n_blocks)
    # As if it were the next block's: the producer fills no more, but the other consumer may still read the slot.
    unused = shared.q.at(n_steps)
    unused.await_empty()
    store_gradient(total, outputs.grad_v, unused.buffer(), mask, tile, 0)


@gluon.jit
def _consume_for_k(outputs, shared, tile, scale, SCALE_SIGN: gl.constexpr, FUSED: gl.constexpr):
    """The consumer that makes the gradient of k."""
    scores = scores_under(scale, SCALE_SIGN, gl.float32)  # here: handed over, it would take another register
    mask = tile.mask
    k = shared.keys.of(0, 0)
    v = shared.keys.of(1, 0)
    dtype: gl.constexpr = k.buffer().dtype
    WIDTH: gl.constexpr = k.buffer().shape[1]
    total = gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, product_layout(WIDTH))
    if tile.n_blocks > 0:
        k.await_full()
        v.await_full()
        if FUSED and may_hide_keys(mask.KIND, mask.left):
            clear_hidden_rows(v.buffer(), mask)
            shared.cleared.meet(0)
    block = 0
    for step in range(tile.group * tile.n_blocks):
        q = shared.q.at(step)
        grad = shared.grad.at(step)
        products_token = issue_product(k.buffer(), q)
        grad_weights_token = issue_product(v.buffer(), grad)
        products = warpgroup_mma_wait(num_outstanding=1, deps=(products_token,))
        weights = _weights(products, q, block, tile, scores)
        # It is through: a wait ends a basic block, and keeps the assembler from hoisting the one for a product, which
        # follows, above the exponentials.
        grad.await_full()
        grad_weights = warpgroup_mma_wait(num_outstanding=0, deps=(grad_weights_token,))
        delta = grad.numbers().load(per_column(weights.shape[1]))
        grad_scores = scores.gradient(weights * (grad_weights - delta[None, :])).to(dtype)
        grad.release()
        if FUSED:
            part = shared.grad_scores.at(step)
            part.await_empty()
            part.buffer().store(grad_scores)
            part.publish()
        total = add_product(total, as_operand(grad_scores, dtype, WIDTH), q)
        _, block = _after(0, block, tile.n_blocks)
    # Nobody else reads v.
    store_gradient(total * scores.magnitude, outputs.grad_k, v.buffer(), mask, tile, 0)


@kernel(jit=gluon.jit)
def hopper_backward_wide_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    grad_descriptor,
    log2_descriptor,
    delta_descriptor,
    grad_k_descriptor,
    grad_v_descriptor,
    TOTAL,
    VISIBLE,
    LISTS,
    scale: gl.float64,
    queries: gl.int32,
    keys: gl.int32,
    heads: gl.int32,
    group: gl.int32,
    mask_stride_batch: gl.int32,
    mask_stride_head: gl.int32,
    window_left: gl.int32,
    window_right: gl.int32,
    WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SCHEDULE_N: gl.constexpr,
    MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    SCALE_SIGN: gl.constexpr,
    FUSED: gl.constexpr,
):
    """One tile of BLOCK_N keys, as many as a consumer takes, of one key/value head: GRAD_K and GRAD_V (b, hk, j, d)."""
    mask = make_mask(
        VISIBLE, LISTS, mask_stride_batch, mask_stride_head, queries, keys, window_left, window_right, SCHEDULE_N, MASK,
        CAUSAL, LEFT, RIGHT, HIDES_KEYS=FUSED,
    )  # fmt: skip
    tile = key_tile_of_program(mask, heads, group, BLOCK_M, BLOCK_N)

    dtype: gl.constexpr = q_descriptor.dtype
    barriers = make_barriers()
    key_rows, barriers = make_ring(barriers, dtype, 2, BLOCK_N, WIDTH, 1)
    q, barriers = make_ring(barriers, dtype, SLOTS, BLOCK_M, WIDTH, CONSUMERS, NUMBERED=True)
    grad, barriers = make_ring(barriers, dtype, SLOTS, BLOCK_M, WIDTH, CONSUMERS, NUMBERED=True)
    cleared, barriers = make_meeting(barriers)
    grad_scores = None
    if FUSED:
        grad_scores, barriers = make_ring(barriers, dtype, SLOTS, BLOCK_N, BLOCK_M, 1)
    fence_async_shared()

    inputs = Inputs(q_descriptor, k_descriptor, v_descriptor, grad_descriptor, log2_descriptor, delta_descriptor)
    outputs = Outputs(grad_k_descriptor, grad_v_descriptor, TOTAL, queries, heads)
    shared = Shared(key_rows, q, grad, grad_scores, cleared)
    gl.warp_specialize(
        [
            (_consume_for_k, (outputs, shared, tile, scale, SCALE_SIGN, FUSED)),
            (_consume_for_v, (outputs, shared, tile, scale, SCALE_SIGN, FUSED)),
            (_produce, (inputs, shared, tile)),
        ],
        [4, 1],
        [240, 24],
    )


@lru_cache(maxsize=CALLS_KEPT)
def prepare_wide(spec: AttentionSpec, tile: Tile, tiles: Tiles, planes: int, fused: bool) -> Prepared:
    """The launch for all tensors of these sizes: q, k, v, the gradient of out, LSE and delta, the gradients of k and v,
    the sum that is the gradient of q or None, and the schedule's visibility and lists."""
    of_queries, of_keys = (tile.block_m, spec.head_dim), (tile.block_n, spec.head_dim)
    numbers = (1, tile.block_m)
    return Prepared(
        hopper_backward_wide_kernel,
        spec.batch * spec.kv_heads * triton.cdiv(spec.keys, tile.block_n) if spec.queries else 0,
        (float(spec.scale), *call_numbers(spec, planes), *window_numbers(spec)),
        dict(FUSED=fused, **call_choices(spec, tile, tiles)),
        tile.num_warps,
        registers=REGISTERS,
        hand_over=partial(described, (of_queries, of_keys, of_keys, of_queries, numbers, numbers, of_keys, of_keys)),
    )
