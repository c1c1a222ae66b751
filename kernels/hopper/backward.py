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

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_attend.kernels.backward import empty_gradients, sinks_gradient
from flash_attend.kernels.compat import aggregate, kernel
from flash_attend.kernels.configs import Tile, Tiles
from flash_attend.kernels.hopper.backward_q import query_gradient
from flash_attend.kernels.hopper.backward_wide import WIDE, prepare_wide
from flash_attend.kernels.hopper.operands import (
    bulk_readable,
    call_choices,
    call_numbers,
    described,
    scatters_dead_rows,
)
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
from flash_attend.kernels.hopper.producer import SHIFTS, Inputs, fill_queries
from flash_attend.kernels.hopper.products import issue_product
from flash_attend.kernels.hopper.ring import SLOTS, Ring, allocate_rows, make_barriers, make_ring
from flash_attend.kernels.hopper.versions import reduce_tile
from flash_attend.kernels.hopper.walk import key_tile_of_program, make_mask
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.operands import readable, window_numbers
from flash_attend.kernels.scores import scores_under
from flash_attend.kernels.softmax import NEGATIVE_INFINITY, recomputed_weights
from flash_attend.kernels.statistics import Kept, prepare_statistics
from flash_attend.operands import Operands
from flash_attend.spec import CALLS_KEPT, AttentionSpec, MaskKind

__all__ = ["attention_backward"]


@aggregate
class Exchange:
    """The gradients of a block's scores, transposed, of both consumers. In turn two buffers each: who gets through to
    the next block's knows that this one's products are done."""

    buffers: gl.shared_memory_descriptor  # [SLOTS * CONSUMERS, CONSUMER_ROWS, BLOCK_M]
    complete: Meeting

    @gluon.jit
    def part(self, step, consumer):
        """[CONSUMER_ROWS, BLOCK_M]: those of a consumer's keys."""
        return self.buffers.index(step % SLOTS * CONSUMERS + consumer)

    @gluon.jit
    def put(self, grad_scores, step, CONSUMER: gl.constexpr):
        """Stores a consumer's, and waits until both are there."""
        self.part(step, CONSUMER).store(grad_scores)
        self.complete.meet(step)


@aggregate
class Shared:
    """What the partitions have in shared memory; the last three only where the gradient of q is made here too."""

    k: Ring  # a slot is a consumer's, and filled once
    v: Ring  # likewise
    q: Ring  # with the LSE
    grad: Ring  # that of out, with delta
    grad_q: object  # a ring: a slot is a consumer's, and the reducer reads it
    grad_scores: object  # an exchange
    cleared: object  # a meeting: both consumers have cleared their rows of k and v


@aggregate
class Outputs:
    """Descriptors of where the consumers and the reducer write."""

    grad_k: object
    grad_v: object
    total: object  # the sum that is the gradient of q, but for the scale


@gluon.jit
def _produce(inputs, shared, tile):
    """The producer: k and v, then q and the gradient of out in the order in which the consumers take them."""
    if tile.n_blocks > 0:
        for consumer in gl.static_range(CONSUMERS):
            coordinates = [tile.batch, tile.kv_head, tile.first_key + consumer * CONSUMER_ROWS, 0]
            shared.k.of(consumer, 0).fill(inputs.k, coordinates)
            shared.v.of(consumer, 0).fill(inputs.v, coordinates)
    fill_queries(inputs, shared, tile)


@gluon.jit
def _reduce(outputs, shared, tile, BLOCK_M: gl.constexpr):
    """The reducer: adds each consumer's part of a block's gradient of q to the sum."""
    step = 0
    for head in range(tile.kv_head * tile.group, (tile.kv_head + 1) * tile.group):
        for block in range(tile.n_blocks):
            for consumer in gl.static_range(CONSUMERS):
                row = tile.first_query + block * BLOCK_M
                column = 0
                if BLOCK_M == CONSUMER_ROWS:
                    column = consumer * CONSUMER_ROWS
                else:
                    row += consumer * CONSUMER_ROWS
                part = shared.grad_q.of(consumer, step)
                part.await_full()
                rows = part.buffer().reshape(outputs.total.block_type.shape)
                reduce_tile(outputs.total, [tile.batch, head, row, column], rows)
            for consumer in gl.static_range(CONSUMERS):
                tma.store_wait(CONSUMERS - 1 - consumer)
                shared.grad_q.of(consumer, step).release()
            step += 1


@gluon.jit
def _issue_query_gradient(shared, step, CONSUMER: gl.constexpr):
    """Starts the products of this consumer's part of a block's gradient of q [CONSUMER_ROWS, CONSUMER_ROWS], over the
    keys of one consumer and then of the other: half of its columns, or of its rows where it has twice as many."""
    PART: gl.constexpr = CONSUMER * CONSUMER_ROWS
    total = gl.zeros([CONSUMER_ROWS, CONSUMER_ROWS], gl.float32, product_layout(CONSUMER_ROWS))
    for half in gl.static_range(CONSUMERS):
        grad_scores = shared.grad_scores.part(step, half)  # [CONSUMER_ROWS, BLOCK_M]
        k = shared.k.of(half, 0).buffer()
        if grad_scores.shape[1] == CONSUMER_ROWS:
            k = k.slice(PART, CONSUMER_ROWS, dim=1)
        else:
            grad_scores = grad_scores.slice(PART, CONSUMER_ROWS, dim=1)
        total = warpgroup_mma(grad_scores.permute((1, 0)), k, total, use_acc=half > 0, is_async=True)
    return total


@gluon.jit
def _step(grad_k, grad_v, step, block, shared, mask, scores, tile, CONSUMER: gl.constexpr, FUSED: gl.constexpr):
    """One block of queries."""
    q = shared.q.at(step)
    grad = shared.grad.at(step)
    dtype: gl.constexpr = q.buffer().dtype
    BLOCK_M: gl.constexpr = q.buffer().shape[0]
    WIDTH: gl.constexpr = q.buffer().shape[1]
    products_token = issue_product(shared.k.of(CONSUMER, 0).buffer(), q)
    grad_weights_token = issue_product(shared.v.of(CONSUMER, 0).buffer(), grad)

    products = warpgroup_mma_wait(num_outstanding=1, deps=(products_token,))
    x = scores.apply(products)
    # Without the gradient of q no product mixes keys: what a hidden one holds stays in its own rows until the end.
    if mask.CAUSAL or mask.left is not None or mask.HIDES_KEYS:  # noqa: SIM102 (when it is compiled; next, when it runs)
        if tile.is_masked(block):
            query = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=per_column(BLOCK_M))
            key = gl.arange(0, CONSUMER_ROWS, layout=per_row(BLOCK_M))
            x = mask.hide(x, query[None, :], key[:, None], mask.key_shown(key)[:, None], NEGATIVE_INFINITY)
    weights = recomputed_weights(x, None, q.numbers().load(per_column(BLOCK_M))[None, :], scores.factor_log2)
    # Issued here, before the wait that follows: it takes every exponential, and so holds them all under the product
    # before it.
    grad_v_token = warpgroup_mma(as_operand(weights, dtype, WIDTH), grad.buffer(), grad_v, is_async=True)

    grad_weights = warpgroup_mma_wait(num_outstanding=1, deps=(grad_weights_token,))
    delta = grad.numbers().load(per_column(BLOCK_M))[None, :]
    grad_scores = scores.gradient(weights * (grad_weights - delta)).to(dtype)
    if FUSED:
        shared.grad_scores.put(grad_scores, step, CONSUMER)
        grad_q_token = _issue_query_gradient(shared, step, CONSUMER)
    grad_k_token = warpgroup_mma(as_operand(grad_scores, dtype, WIDTH), q.buffer(), grad_k, is_async=True)
    if FUSED:
        part = shared.grad_q.of(CONSUMER, step)
        part.await_empty()
        grad_q, grad_v = warpgroup_mma_wait(num_outstanding=1, deps=(grad_q_token, grad_v_token))
        grad.release()
        part.buffer().store(grad_q)
        part.publish()
    else:
        grad_v = warpgroup_mma_wait(num_outstanding=1, deps=(grad_v_token,))
        grad.release()
    # A product that still ran at the loop's end would make the assembler wait for every other one as it is issued.
    grad_k = warpgroup_mma_wait(num_outstanding=0, deps=(grad_k_token,))
    q.release()
    return grad_k, grad_v


@gluon.jit
def _consume(outputs, shared, tile, scores, FUSED: gl.constexpr, CONSUMER: gl.constexpr):
    """A consumer: its keys' gradients, and its part of each block's gradient of q."""
    FIRST: gl.constexpr = CONSUMER * CONSUMER_ROWS
    mask = tile.mask.counted_from(0, FIRST)
    k = shared.k.of(CONSUMER, 0).buffer()
    v = shared.v.of(CONSUMER, 0).buffer()
    WIDTH: gl.constexpr = k.shape[1]
    if tile.n_blocks > 0:
        for consumer in gl.static_range(CONSUMERS):
            shared.k.of(consumer, 0).await_full()
        shared.v.of(CONSUMER, 0).await_full()
        if FUSED and may_hide_keys(mask.KIND, mask.left):  # noqa: SIM102 (likewise)
            if tile.hides:
                # The gradients of their scores are 0, but 0 * NaN is no 0.
                clear_hidden_rows(k, mask)
                clear_hidden_rows(v, mask)
                shared.cleared.meet(0)
    grad_k = gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, product_layout(WIDTH))
    grad_v = gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, product_layout(WIDTH))
    block = 0
    for step in range(tile.group * tile.n_blocks):  # one loop over heads and blocks: two take more registers
        grad_k, grad_v = _step(grad_k, grad_v, step, block, shared, mask, scores, tile, CONSUMER, FUSED)
        if mask.CAUSAL or mask.left is not None:
            block = gl.where(block + 1 == tile.n_blocks, 0, block + 1)
    store_gradient(grad_v, outputs.grad_v, v, mask, tile, FIRST)
    store_gradient(grad_k * scores.magnitude, outputs.grad_k, v, mask, tile, FIRST)


@kernel(jit=gluon.jit)
def hopper_backward_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    grad_descriptor,
    log2_descriptor,
    delta_descriptor,
    grad_k_descriptor,
    grad_v_descriptor,
    sum_descriptor,
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
    """One tile of BLOCK_N keys of one key/value head: GRAD_K and GRAD_V (b, hk, j, d). FUSED: its share of the sum that
    is the gradient of q (b, h, i, d) but for the scale, float32."""
    gl.static_assert(BLOCK_N == CONSUMERS * CONSUMER_ROWS)
    mask = make_mask(
        VISIBLE, LISTS, mask_stride_batch, mask_stride_head, queries, keys, window_left, window_right, SCHEDULE_N, MASK,
        CAUSAL, LEFT, RIGHT, HIDES_KEYS=FUSED,
    )  # fmt: skip
    tile = key_tile_of_program(mask, heads, group, BLOCK_M, BLOCK_N)
    # Made here: an argument would be loaded anew in every round.
    scores = scores_under(scale, SCALE_SIGN, gl.float32)

    dtype: gl.constexpr = q_descriptor.dtype
    barriers = make_barriers()
    k, barriers = make_ring(barriers, dtype, CONSUMERS, CONSUMER_ROWS, WIDTH, 1)
    v, barriers = make_ring(barriers, dtype, CONSUMERS, CONSUMER_ROWS, WIDTH, 1)
    q, barriers = make_ring(barriers, dtype, SLOTS, BLOCK_M, WIDTH, CONSUMERS, NUMBERED=True)
    grad, barriers = make_ring(barriers, dtype, SLOTS, BLOCK_M, WIDTH, CONSUMERS, NUMBERED=True)
    inputs = Inputs(q_descriptor, k_descriptor, v_descriptor, grad_descriptor, log2_descriptor, delta_descriptor)
    outputs = Outputs(grad_k_descriptor, grad_v_descriptor, sum_descriptor)
    if FUSED:
        gl.static_assert(BLOCK_M * WIDTH == CONSUMERS * CONSUMER_ROWS * CONSUMER_ROWS)
        grad_q, barriers = make_ring(barriers, gl.float32, CONSUMERS, CONSUMER_ROWS, CONSUMER_ROWS, 1)
        complete, barriers = make_meeting(barriers)
        cleared, barriers = make_meeting(barriers)
        fence_async_shared()
        grad_scores = Exchange(allocate_rows(dtype, SLOTS * CONSUMERS, CONSUMER_ROWS, BLOCK_M), complete)
        shared = Shared(k, v, q, grad, grad_q, grad_scores, cleared)
        gl.warp_specialize(
            [
                (_consume, (outputs, shared, tile, scores, FUSED, 0)),
                (_consume, (outputs, shared, tile, scores, FUSED, 1)),
                (_produce, (inputs, shared, tile)),
                (_reduce, (outputs, shared, tile, BLOCK_M)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        fence_async_shared()
        shared = Shared(k, v, q, grad, None, None, None)
        gl.warp_specialize(
            [
                (_consume, (outputs, shared, tile, scores, FUSED, 0)),
                (_consume, (outputs, shared, tile, scores, FUSED, 1)),
                (_produce, (inputs, shared, tile)),
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
    kept: Kept,
    spec: AttentionSpec,
    tiles: Tiles,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """What `kernels.backward.attention_backward` gives, for the calls that the dispatcher lets through."""
    needs_q, needs_k, needs_v, *of_others = needed
    q, k, v, out = readable(operands.q), readable(operands.k), readable(operands.v), readable(out)
    grad_out = torch.zeros_like(out) if grad_out is None else readable(grad_out)
    schedule = kept.schedule
    delta, log2, _ = prepare_statistics(grad_out, grad_lse, out, kept, spec, tiles)

    needs_keys = needs_k or needs_v
    fused = tiles.backward_fused is not None and needs_q and needs_keys
    grad_q, grad_k, grad_v = empty_gradients((q, k, v), spec, (needs_q, needs_keys, needs_keys))
    if needs_keys:
        if spec.queries == 0:  # there are no descriptors of nothing
            grad_k.zero_()
            grad_v.zero_()
        total = lse.new_zeros(spec.batch, spec.heads, spec.queries, spec.head_dim) if fused else None
        rows = (_shifted(row, beyond, _starts_anywhere(spec)) for row, beyond in ((log2, torch.inf), (delta, 0.0)))
        tile = tiles.backward_fused if fused else tiles.backward_kv
        prepare = prepare_wide if spec.head_dim == WIDE else _prepare
        prepared = prepare(spec, tile, tiles, schedule.planes, fused)
        of_queries = q, grad_out
        if scatters_dead_rows(spec):  # they are read, and a weight of 0 does not hide a NaN
            dead = log2[..., : spec.queries, None] == torch.inf
            of_queries = q.masked_fill(dead, 0.0), grad_out.masked_fill(dead, 0.0)
        inputs = map(bulk_readable, (of_queries[0], k, v, of_queries[1]))
        launch(prepared, *inputs, *rows, grad_k, grad_v, total, schedule.visible, schedule.lists)
    if fused:
        torch.mul(total, abs(spec.scale), out=grad_q)
    elif needs_q:
        query_gradient(q, k, v, grad_out, grad_q, log2, delta, schedule, spec, tiles)
    grads = grad_q, grad_k if needs_k else None, grad_v if needs_v else None
    if not of_others:
        return grads
    return *grads, None, sinks_gradient(operands.sinks, lse, delta) if needed[4] else None


def _starts_anywhere(spec: AttentionSpec) -> bool:
    """Whether a head's first query that sees a key may be any."""
    right = 0 if spec.causal else spec.window[1]
    if right is None or scatters_dead_rows(spec):
        return False
    return spec.mask == MaskKind.KEY or spec.queries > spec.keys + right


def _shifted(rows: Tensor, beyond: float, starts_anywhere: bool) -> Tensor:
    """Rows `(b, h, n)` as `(b, h, SHIFTS, n)`, each SHIFTS times, moved by one more: so a bulk copy begins anywhere.

    Where there are no dead rows, all begin at whole tiles, and `(b, h, 1, n)` will do.
    """
    if not starts_anywhere:
        return rows.unsqueeze(2)
    n_shifts = SHIFTS.value
    return pad(rows, (0, n_shifts - 1), value=beyond).unfold(2, rows.shape[2], 1).contiguous()


@lru_cache(maxsize=CALLS_KEPT)
def _prepare(spec: AttentionSpec, tile: Tile, tiles: Tiles, planes: int, fused: bool) -> Prepared:
    """The launch for all tensors of these sizes."""
    dim, block_m, consumer_rows = spec.head_dim, tile.block_m, CONSUMER_ROWS.value
    of_queries, of_keys, part_of_queries = (block_m, dim), (consumer_rows, dim), (consumer_rows, consumer_rows)
    return Prepared(
        hopper_backward_kernel,
        spec.batch * spec.kv_heads * triton.cdiv(spec.keys, tile.block_n) if spec.queries else 0,
        (float(spec.scale), *call_numbers(spec, planes), *window_numbers(spec)),
        dict(FUSED=fused, **call_choices(spec, tile, tiles)),
        tile.num_warps,
        registers=REGISTERS,
        hand_over=partial(
            described,
            (of_queries, of_keys, of_keys, of_queries, (1, block_m), (1, block_m), of_keys, of_keys, part_of_queries),
        ),
    )
