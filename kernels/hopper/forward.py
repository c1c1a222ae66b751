"""The forward for Hopper, in Gluon: after FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608).

A program is three partitions: two consumers, four warps each, which have 64 queries of a tile each, and a producer, one
warp, which copies q, k and v into shared memory ahead of them. Programs are persistent: each takes every n-th tile.

A consumer issues the scores of a block before the weighted sum of the block before, and takes the softmax of the block
while that sum is still running. Blocks that need masking come first, the full ones after them.
"""

from functools import lru_cache, partial

import torch
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
from flash_attend.kernels.forward import empty_outputs
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
    Turns,
    as_operand,
    clear_hidden,
    make_meeting,
    make_turns,
    per_column,
    per_row,
    product_layout,
    store_rows,
)
from flash_attend.kernels.hopper.producer import Inputs, fill_blocks
from flash_attend.kernels.hopper.products import issue_product
from flash_attend.kernels.hopper.ring import SLOTS, Ring, allocate_rows, make_barriers, make_ring
from flash_attend.kernels.hopper.walk import QueryTiles, alive, first_live_query, make_mask
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.mask import KEY
from flash_attend.kernels.operands import factor_log2, query_section, readable, window_numbers
from flash_attend.kernels.schedule import build_schedule
from flash_attend.kernels.scores import LOG2E, Scores
from flash_attend.kernels.softmax import LOWEST32, NEGATIVE_INFINITY, Softmax
from flash_attend.kernels.statistics import Kept, store_statistics
from flash_attend.operands import Operands
from flash_attend.spec import CALLS_KEPT, AttentionSpec
from flash_attend.target import DeviceTarget

__all__ = ["attention_forward"]


@aggregate
class Outputs:
    """What the consumers read where a tile ends, or None, and where they write."""

    out: object  # a descriptor
    lse: gl.tensor  # pointers, as the others are
    statistics: gl.tensor
    counts: object  # of keys that the key mask shows, up to each, where queries that see none may be anywhere
    sinks: object


@aggregate
class Shared:
    """What the partitions have in shared memory."""

    q: Ring  # a slot is a consumer's
    k: Ring
    v: Ring
    out: gl.shared_memory_descriptor  # [CONSUMERS, CONSUMER_ROWS, WIDTH], maybe that of q
    cleared: Meeting  # both consumers have cleared their halves of a block of v
    turns: Turns


@aggregate
class State:
    """What a consumer carries from block to block."""

    total: gl.tensor  # [CONSUMER_ROWS, WIDTH]: the weighted sum of the blocks before the last one
    softmax: Softmax
    weights: gl.tensor  # of the last one, an operand
    step: gl.tensor  # that of the last one
    cleared: object  # how many blocks were


@gluon.jit
def _produce(inputs, shared, tiles):
    """The producer: for each tile its q, then its blocks of k and v in the order in which the consumers take them."""
    step = 0
    for turn in range(tiles.count()):
        tile = tiles.at(turn)
        for consumer in gl.static_range(CONSUMERS):
            row = tile.first_query + consumer * CONSUMER_ROWS
            shared.q.of(consumer, turn).fill(inputs.q, [tile.batch, tile.head, row, 0])
        step = fill_blocks(inputs, shared, tile, step)


@gluon.jit
def _weigh(products, softmax, scores, mask, row, block, MASKED: gl.constexpr):
    """The weights [CONSUMER_ROWS, BLOCK_N] of a block, the correction of older sums, and the softmax with it."""
    BLOCK_N: gl.constexpr = products.shape[1]
    x = scores.apply(products)
    if MASKED:
        key = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=per_column(BLOCK_N))
        x = mask.hide(x, row[:, None], key[None, :], mask.key_shown(key)[None, :], NEGATIVE_INFINITY)
    return softmax.step(x, scores.factor_log2)


@gluon.jit
def _step(state, q, shared, scores, mask, row, block, CONSUMER: gl.constexpr, MASKED: gl.constexpr):
    """The weights of one block, and the weighted sum of the block before."""
    WIDTH: gl.constexpr = state.total.shape[1]
    before = shared.v.at(state.step)
    step = state.step + 1
    cleared = state.cleared
    k = shared.k.at(step)
    v = shared.v.at(step)
    shared.turns.take(step, CONSUMER)
    products_token = issue_product(q, k)
    total_token = warpgroup_mma(state.weights, before.buffer(), state.total, is_async=True)
    shared.turns.hand_on(CONSUMER)
    products = warpgroup_mma_wait(num_outstanding=1, deps=(products_token,))
    k.release()
    weights, correction, softmax = _weigh(products, state.softmax, scores, mask, row, block, MASKED)
    # Here, not in the next step: a wait ends a basic block, and keeps the assembler from hoisting the one for the sum,
    # which follows, above the exponentials.
    v.await_full()
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total_token,))
    weights = as_operand(weights, state.weights.dtype, WIDTH)
    before.release()
    if MASKED and mask.KIND == KEY:
        rows = v.buffer()
        clear_hidden(rows, mask.counted_from(0, block * rows.shape[0]), cleared, shared.cleared, CONSUMER)
        cleared += 1
    total = total * gl.convert_layout(correction, per_row(WIDTH))[:, None]
    return State(total, softmax, weights, step, cleared)


@gluon.jit
def _consume(outputs, shared, tiles, scores, OUT_IN_Q: gl.constexpr, CONSUMER: gl.constexpr):
    """A consumer: its rows of each tile."""
    q = shared.q.of(CONSUMER, 0).buffer()
    BLOCK_N: gl.constexpr = tiles.BLOCK_N
    WIDTH: gl.constexpr = q.shape[1]
    of_rows: gl.constexpr = per_row(BLOCK_N)
    step = 0
    cleared = 0
    for turn in range(tiles.count()):
        tile = tiles.at(turn)
        mask = tile.mask
        n_masked = tile.walk.masked_count()
        n_full = tile.full_count()
        block = tile.first_block()
        first_live = 0
        if outputs.counts is None:
            first_live = first_live_query(mask)
        first_row = tile.first_query + CONSUMER * CONSUMER_ROWS
        row = first_row + gl.arange(0, CONSUMER_ROWS, layout=of_rows)
        softmax = Softmax(
            gl.full([CONSUMER_ROWS], LOWEST32, gl.float32, of_rows),
            gl.zeros([CONSUMER_ROWS], gl.float32, of_rows),
            False,
        )

        rows = shared.q.of(CONSUMER, turn)
        k = shared.k.at(step)
        v = shared.v.at(step)
        rows.await_full()
        shared.turns.take(step, CONSUMER)
        token = issue_product(q, k)
        shared.turns.hand_on(CONSUMER)
        products = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
        k.release()
        weights, _, softmax = _weigh(products, softmax, scores, mask, row, block, True)
        weights = as_operand(weights, q.dtype, WIDTH)
        v.await_full()
        # Without a key mask, only the first block may reach before every window.
        if mask.KIND == KEY or (mask.left is not None and block * BLOCK_N < mask.first_offset()):
            clear_hidden(v.buffer(), mask.counted_from(0, block * BLOCK_N), cleared, shared.cleared, CONSUMER)
            cleared += 1
        total = gl.zeros([CONSUMER_ROWS, WIDTH], gl.float32, product_layout(WIDTH))
        state = State(total, softmax, weights, step, cleared)
        for masked in range(1, n_masked):
            block = tile.walk.masked_block(masked)
            state = _step(state, q, shared, scores, mask, row, block, CONSUMER, True)
        for _ in range(n_full):
            state = _step(state, q, shared, scores, mask, row, 0, CONSUMER, False)
        if not OUT_IN_Q:
            rows.release()
        step = state.step
        cleared = state.cleared
        v = shared.v.at(step)
        token = warpgroup_mma(state.weights, v.buffer(), state.total, is_async=True)
        sink_log2 = None
        if outputs.sinks is not None:
            sink_log2 = gl.load(outputs.sinks + tile.head).to(gl.float32) * LOG2E
        normaliser, lse, log2 = state.softmax.finish(
            alive(mask, outputs.counts, first_live, row), scores.factor_log2, False, sink_log2
        )
        at = (tile.batch * tiles.heads + tile.head).to(gl.int64) * mask.queries + row
        exists = row < mask.queries
        gl.store(outputs.lse + at, lse, mask=exists)
        store_statistics(outputs.statistics, at, None, log2, exists, False)
        total = warpgroup_mma_wait(num_outstanding=0, deps=(token,))
        v.release()
        total = total * gl.convert_layout(normaliser, per_row(WIDTH))[:, None]
        # A key that others of the tile see may hold infinity, which a dead row's weights of 0 do not hide.
        seeing = alive(mask, outputs.counts, first_live, first_row + gl.arange(0, CONSUMER_ROWS, layout=per_row(WIDTH)))
        total = gl.where(seeing[:, None], total, 0.0)
        if not OUT_IN_Q:
            tma.store_wait(0)  # of the tile before
        store_rows(total, outputs.out, [tile.batch, tile.head, first_row, 0], shared.out.index(CONSUMER))
        if OUT_IN_Q:
            tma.store_wait(0)
            rows.release()
        step += 1
    tma.store_wait(0)


@kernel(jit=gluon.jit)
def hopper_forward_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    out_descriptor,
    LSE,
    STATISTICS,
    VISIBLE,
    LISTS,
    COUNTS,
    SINKS,
    factor_log2: gl.float32,
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
    SCHEDULE_N: gl.constexpr,
    MASK: gl.constexpr,
    CAUSAL: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    SCALE_SIGN: gl.constexpr,
    OUT_IN_Q: gl.constexpr,
    PING_PONG: gl.constexpr,
):
    """Every n-th tile of BLOCK_M queries: OUT (b, h, i, d); LSE (b, h, i) and STATISTICS (b, h, i, 1), contiguous."""
    dtype: gl.constexpr = q_descriptor.dtype
    barriers = make_barriers()
    q, barriers = make_ring(barriers, dtype, CONSUMERS, CONSUMER_ROWS, WIDTH, 1)
    k, barriers = make_ring(barriers, dtype, SLOTS, BLOCK_N, WIDTH, CONSUMERS)
    v, barriers = make_ring(barriers, dtype, SLOTS, BLOCK_N, WIDTH, CONSUMERS)
    cleared, barriers = make_meeting(barriers)
    turns, barriers = make_turns(barriers, PING_PONG)
    out = q.buffers if OUT_IN_Q else allocate_rows(dtype, CONSUMERS, CONSUMER_ROWS, WIDTH)
    fence_async_shared()

    mask = make_mask(
        VISIBLE, LISTS, mask_stride_batch, mask_stride_head, queries, keys, window_left, window_right, SCHEDULE_N, MASK,
        CAUSAL, LEFT, RIGHT, HIDES_KEYS=True,
    )  # fmt: skip
    tiles = QueryTiles(mask, heads, group, heads_total, section, BLOCK_M, BLOCK_N)
    scores = Scores(factor_log2, None, None, None, None, None, SCALE_SIGN, "")
    inputs = Inputs(q_descriptor, k_descriptor, v_descriptor, None, None, None)
    outputs = Outputs(out_descriptor, LSE, STATISTICS, COUNTS, SINKS)
    shared = Shared(q, k, v, out, cleared, turns)
    gl.warp_specialize(
        [
            (_consume, (outputs, shared, tiles, scores, OUT_IN_Q, 0)),
            (_consume, (outputs, shared, tiles, scores, OUT_IN_Q, 1)),
            (_produce, (inputs, shared, tiles)),
        ],
        [4, 1],
        [240, 24],
    )


def attention_forward(operands: Operands, spec: AttentionSpec, tiles: Tiles) -> tuple[Tensor, Tensor, Kept]:
    """What `kernels.forward.attention_forward` gives, for the calls that the dispatcher lets through.

    Half precision, `d = dv` of 64, 128 or 256, no dropout, at least one key, a mask of keys or none, a window, and
    sinks.
    """
    q, k, v = readable(operands.q), readable(operands.k), readable(operands.v)
    out, lse, statistics = empty_outputs(q, spec)
    schedule = build_schedule(operands.mask, spec, tiles)
    prepared = _prepare(spec, tiles, schedule.planes, DeviceTarget.of(q.device).multiprocessors)
    counts = None
    if schedule.visible is not None and scatters_dead_rows(spec):
        counts = schedule.visible.cumsum(1, dtype=torch.int32)
    sinks = None if operands.sinks is None else operands.sinks.contiguous()
    read = schedule.visible, schedule.lists, counts, sinks
    launch(prepared, *map(bulk_readable, (q, k, v)), out, lse, statistics, *read)
    return out, lse, Kept(statistics, *schedule)


@lru_cache(maxsize=CALLS_KEPT)
def _prepare(spec: AttentionSpec, tiles: Tiles, planes: int, multiprocessors: int) -> Prepared:
    """The launch for all tensors of these sizes."""
    tile = tiles.forward
    dim = spec.head_dim
    heads_total = spec.batch * spec.heads
    n_tiles = heads_total * triton.cdiv(spec.queries, tile.block_m)
    rows, keys = (CONSUMER_ROWS.value, dim), (tile.block_n, dim)
    return Prepared(
        hopper_forward_kernel,
        min(n_tiles, multiprocessors or n_tiles),  # a device without any is none that runs
        (factor_log2(spec), *call_numbers(spec, planes), heads_total, query_section(spec), *window_numbers(spec)),
        dict(
            PING_PONG=tile.ping_pong,
            OUT_IN_Q=dim == 256,  # out has no room of its own beside two buffers each of k and v
            **call_choices(spec, tile, tiles),
        ),
        tile.num_warps,
        registers=REGISTERS,
        hand_over=partial(described, (rows, keys, keys, rows)),
    )
