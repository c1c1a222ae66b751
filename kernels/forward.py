"""The forward kernel: FlashAttention's online softmax (Dao et al. 2022, arXiv:2205.14135) over the tiles that count."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attend.kernels.compat import kernel
from flash_attend.kernels.configs import Tiles
from flash_attend.kernels.descriptors import aligned, reading_keys
from flash_attend.kernels.dropout import dropout_by
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.mask import NONE, Mask
from flash_attend.kernels.operands import (
    Strides,
    aligned_strides,
    as_queries,
    call_arguments,
    call_choices,
    empty_like_heads,
    key_sizes,
    packed_group,
    query_section,
    query_sizes,
    readable,
)
from flash_attend.kernels.programs import tile_of_program
from flash_attend.kernels.rows import Heads
from flash_attend.kernels.schedule import Planes, build_schedule
from flash_attend.kernels.scores import scaled_scores
from flash_attend.kernels.softmax import NEGATIVE_INFINITY, empty_softmax
from flash_attend.kernels.statistics import Kept, is_apart, is_exact, statistics_of, store_statistics
from flash_attend.kernels.tiles import Tile, clear_rows, scaled, zeros
from flash_attend.operands import Operands
from flash_attend.spec import CALLS_KEPT, AttentionSpec

__all__ = ["attention_forward", "empty_outputs"]

WIDEST_PART = tl.constexpr(256)  # of a head dimension


@triton.jit
def _tile(
    total, softmax, q, k_rows, v_rows, mask, scores, dropout, first_query, block, tile, MASKED: tl.constexpr
):  # fmt: skip
    """One key block for one query tile: the total [BLOCK_M, dv] and the state of its softmax."""
    first_key = block * tile.BLOCK_N
    query = first_query + tl.arange(0, tile.BLOCK_M)
    key = first_key + tl.arange(0, tile.BLOCK_N)
    HIDDEN_WITHIN: tl.constexpr = mask.KIND != NONE
    readable = None
    if MASKED:
        shown, readable = mask.shown(first_query, first_key, tile.BLOCK_M, tile.BLOCK_N)
    # A wide v is cleared where it must be while there are no scores in registers yet, beside which it finds no room.
    EARLY: tl.constexpr = v_rows.PART0 == WIDEST_PART
    if EARLY:
        v = tile.load(v_rows, first_key, readable, tile.BLOCK_N, MASKED, HIDDEN_WITHIN)
    # NaN in a hidden key's k stays in its own column of the scores and is hidden there; in v it must not be read.
    k = tile.load(k_rows, first_key, key < mask.keys, tile.BLOCK_N, MASKED, WITHIN=False)
    seen = scores.apply(tile.inner_products(q, k))  # [BLOCK_M, BLOCK_N]
    if MASKED:
        seen = mask.hide(seen, query[:, None], key[None, :], shown, NEGATIVE_INFINITY)
    weights, correction, softmax = softmax.step(seen, scores.factor_log2)
    weights = dropout.drop(weights, dropout.kept(first_query, first_key, tile.BLOCK_M, tile.BLOCK_N))
    if not EARLY:
        v = tile.load(v_rows, first_key, readable, tile.BLOCK_N, MASKED, HIDDEN_WITHIN)
    return tile.accumulate(scaled(total, correction[:, None]), weights, v), softmax


@kernel
def forward_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    STATISTICS,
    VISIBLE,
    LISTS,
    SEED,
    scale: tl.float64,
    keep_scale: tl.float64,
    keep_threshold: tl.uint32,
    queries: tl.int32,
    keys: tl.int32,
    heads: tl.int32,
    group: tl.int32,
    mask_stride_batch: tl.int32,
    mask_stride_head: tl.int32,
    n_query_blocks: tl.int32,
    n_key_blocks: tl.int32,
    section: tl.int32,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_row: tl.int64,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int64,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_row: tl.int64,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int64,
    ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD0: tl.constexpr,
    HEAD1: tl.constexpr,
    VALUE0: tl.constexpr,
    VALUE1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SCHEDULE_M: tl.constexpr,
    SCHEDULE_N: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCALE_SIGN: tl.constexpr,
    EXACT: tl.constexpr,
    APART: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One query tile of one head: OUT (b, h, i, dv); LSE (b, h, i) and STATISTICS (b, h, i, 1 or 2), contiguous.

    K and V are descriptors, if DESCRIPTORS, of blocks of BLOCK_N keys.
    """
    first_query, batch, head = tile_of_program(queries, heads, section, BLOCK_M)
    kv_head = head // group
    q_rows = Heads(Q, q_batch, q_head, q_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, False).rows(batch, head)
    k_rows = Heads(K, k_batch, k_head, k_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, DESCRIPTORS).rows(batch, kv_head)
    v_rows = Heads(V, v_batch, v_head, v_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, DESCRIPTORS).rows(batch, kv_head)
    out_rows = Heads(OUT, out_batch, out_head, out_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False).rows(batch, head)
    planes = Planes(
        VISIBLE, LISTS, mask_stride_batch, mask_stride_head, n_query_blocks, n_key_blocks, SCHEDULE_M, SCHEDULE_N
    )
    mask = Mask(planes, 0, None, None, queries, keys, MASK, CAUSAL, HIDES_KEYS=True).of_head(batch, head)
    scores = scaled_scores(scale, SCALE_SIGN, ACCUMULATOR)
    dropout = dropout_by(SEED, keep_threshold, keep_scale, DROPOUT, ACCUMULATOR).of_head(batch, head)
    tile = Tile(BLOCK_M, BLOCK_N, PRECISION, ACCUMULATOR)

    query = first_query + tl.arange(0, BLOCK_M)
    exists = query < queries
    q = tile.load(q_rows, first_query, exists, BLOCK_M, MASKED=True)
    total = zeros(BLOCK_M, VALUE0, VALUE1, ACCUMULATOR)
    softmax = empty_softmax(BLOCK_M, ACCUMULATOR, EXACT)
    walk = mask.walk_over_keys(first_query, BLOCK_M, BLOCK_N)
    # Full blocks first: with the masked ones in front, the compiler serializes the products of the main loop.
    for run in tl.range(0, walk.run_count(), num_stages=1):
        start, end = walk.run_bounds(run)
        for block in tl.range(start, end, num_stages=STAGES):
            total, softmax = _tile(
                total, softmax, q, k_rows, v_rows, mask, scores, dropout, first_query, block, tile, MASKED=False
            )
    for index in tl.range(0, walk.masked_count(), num_stages=1):
        block = walk.masked_block(index)
        total, softmax = _tile(
            total, softmax, q, k_rows, v_rows, mask, scores, dropout, first_query, block, tile, MASKED=True
        )

    alive = mask.alive(first_query, BLOCK_M, softmax.sum == 0.0)
    normaliser, lse, log2 = softmax.finish(alive, scores.factor_log2, APART)
    row = (batch.to(tl.int64) * heads + head) * queries + query
    tl.store(LSE + row, lse, mask=exists)
    store_statistics(STATISTICS, row, softmax.maximum, log2, exists, APART)
    if DROPOUT:
        normaliser *= dropout.factor
    # A key that others of the tile see may hold infinity, which a dead row's weights of 0 do not hide.
    out_rows.store(first_query, clear_rows(scaled(total, normaliser[:, None]), alive), exists, BLOCK_M)


def empty_outputs(q: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Where a forward writes `out (b, h, i, dv)`, `lse (b, h, i)` and the statistics of `Kept`. Also what it gives when
    nothing is launched."""
    out = empty_like_heads(readable(q), spec.heads, spec.value_dim)
    rows = spec.batch, spec.heads, spec.queries
    lse = torch.empty(rows, dtype=spec.accumulator_dtype, device=q.device)
    return out, lse, lse.new_empty(*rows, statistics_of(spec))


def attention_forward(operands: Operands, spec: AttentionSpec, tiles: Tiles) -> tuple[Tensor, Tensor, Kept]:
    """`out (b, h, i, dv)` in q's dtype, `lse (b, h, i)`, natural, and what the backward reads beside them."""
    q, k, v = readable(operands.q), readable(operands.k), readable(operands.v)
    out, lse, statistics = empty_outputs(q, spec)
    schedule = build_schedule(operands.mask, spec, tiles)
    q_rows, out_rows = q, out
    if packed := packed_group(spec):
        spec, q_rows, out_rows = packed, *(as_queries(tensor, spec.kv_heads) for tensor in (q, out))
    strides = q_rows.stride(), k.stride(), v.stride(), out_rows.stride()
    prepared = _prepare(spec, tiles, schedule.planes, aligned(k, v), *strides)
    launch(prepared, q_rows, k, v, out_rows, lse, statistics, schedule.visible, schedule.lists, operands.seed)
    return out, lse, Kept(statistics, *schedule)


@lru_cache(maxsize=CALLS_KEPT)
def _prepare(
    spec: AttentionSpec,
    tiles: Tiles,
    planes: int,
    at_hand: bool,
    q: Strides,
    k: Strides,
    v: Strides,
    out: Strides,
) -> Prepared:
    """The launch for tensors with these strides, `at_hand` if k and v begin where bulk copies can read."""
    of_queries, of_keys = query_sizes(spec), key_sizes(spec)
    align, strides = aligned_strides(spec.dtype, (of_queries, q), (of_keys, k), (of_keys, v), (of_queries, out))
    tile, hand_over = reading_keys(spec, tiles.forward, at_hand, k, v)
    return Prepared(
        forward_kernel,
        spec.batch * spec.heads * triton.cdiv(spec.queries, tile.block_m),
        (*call_arguments(spec, planes, tiles), query_section(spec), *strides),
        dict(
            ALIGN=align,
            EXACT=is_exact(spec),
            APART=is_apart(spec),
            DESCRIPTORS=tile.descriptors,
            **call_choices(spec, tile, tiles),
        ),
        tile.num_warps,
        tile.num_stages,
        hand_over=hand_over,
    )
