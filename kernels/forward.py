"""The forward kernel: FlashAttention's online softmax (Dao et al. 2022, arXiv:2205.14135) over the tiles that count."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attend.kernels.configs import Tiles
from flash_attend.kernels.descriptors import aligned, reading_keys
from flash_attend.kernels.dropout import kept_by_dropout
from flash_attend.kernels.key_schedule import (
    Schedule,
    build_schedule,
    key_line,
    mask_row,
    masked_block,
    masked_count,
    run_bounds,
    run_count,
    walk_over_keys,
)
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.masking import KEY, NONE, hide, tile_of_program, tile_visibility
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
from flash_attend.kernels.softmax import NEGATIVE_INFINITY, finish, online_step, to_log2_scale
from flash_attend.kernels.tiles import (
    accumulate,
    inner_products,
    load_block,
    load_rows,
    negate,
    scale_rows,
    store_rows,
    zeros,
)
from flash_attend.operands import Operands
from flash_attend.spec import CALLS_KEPT, AttentionSpec

__all__ = ["attention_forward", "empty_outputs"]

WIDEST_PART = tl.constexpr(256)  # of a head dimension


@triton.jit
def _forward_tile(
    total,
    row_max,
    row_sum,
    q,
    K,
    V,
    kv_head,
    stride_k,
    stride_v,
    block,
    first_query,
    queries,
    keys,
    visible,
    words_per_query,
    scale_log2,
    batch,
    head,
    seed,
    keep_threshold,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD0: tl.constexpr,
    HEAD1: tl.constexpr,
    VALUE0: tl.constexpr,
    VALUE1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One key block for one query tile."""
    first_key = block * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    readable = None
    if MASKED:
        query = first_query + tl.arange(0, BLOCK_M)
        shown, readable = tile_visibility(
            visible, first_query, first_key, keys, words_per_query, BLOCK_M, BLOCK_N, MASK
        )
    # A wide v is cleared where it must be while there are no scores in registers yet, beside which it finds no room.
    EARLY: tl.constexpr = VALUE0 == WIDEST_PART
    if EARLY:
        v = load_block(
            V, batch, kv_head, first_key, stride_v, readable, BLOCK_N, VALUE_DIM, VALUE0, VALUE1,
            DESCRIPTORS, MASKED, WITHIN=MASK != NONE,
        )  # fmt: skip
    # NaN in a hidden key's k stays in its own column of the scores and is hidden there; in v it must not be read.
    k = load_block(
        K, batch, kv_head, first_key, stride_k, key < keys, BLOCK_N, HEAD_DIM, HEAD0, HEAD1,
        DESCRIPTORS, MASKED, WITHIN=False,
    )  # fmt: skip
    scores = inner_products(q, k, PRECISION, ACCUMULATOR)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        scores = hide(
            scores,
            NEGATIVE_INFINITY,
            query[:, None],
            key[None, :],
            shown,
            keys - queries,
            MASK,
            CAUSAL,
            HIDE_KEYS=MASK == KEY or not CAUSAL,  # causality alone hides the keys past the end from every real query
        )
    weights, correction, row_max, row_sum = online_step(scores, row_max, row_sum, scale_log2, MASKED)
    if DROPOUT:
        kept = kept_by_dropout(
            first_query, first_key, batch, head, seed, keep_threshold, BLOCK_M, BLOCK_N, TRANSPOSED=False
        )
        weights = tl.where(kept, weights, 0.0)
    if not EARLY:
        v = load_block(
            V, batch, kv_head, first_key, stride_v, readable, BLOCK_N, VALUE_DIM, VALUE0, VALUE1,
            DESCRIPTORS, MASKED, WITHIN=MASK != NONE,
        )  # fmt: skip
    total = accumulate(scale_rows(total, correction), weights.to(v[0].dtype), v, PRECISION, ACCUMULATOR)
    return total, row_max, row_sum


@triton.jit(
    do_not_specialize=[
        "scale", "keep_scale", "keep_threshold", "queries", "keys", "heads", "group",
        "mask_stride_batch", "mask_stride_head", "n_query_blocks", "n_key_blocks", "section",
        "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row",
        "v_batch", "v_head", "v_row", "out_batch", "out_head", "out_row",
    ]
)  # fmt: skip
def forward_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
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
    NEGATIVE_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One query tile of one head: OUT (b, h, i, dv) and LSE (b, h, i), contiguous.

    K and V are descriptors, if DESCRIPTORS, of blocks of BLOCK_N keys.
    """
    LISTED: tl.constexpr = MASK != NONE
    RATIO: tl.constexpr = SCHEDULE_N // BLOCK_N
    first_query, batch, head = tile_of_program(queries, heads, section, BLOCK_M)
    batch64 = batch.to(tl.int64) * ALIGN
    head64 = head.to(tl.int64) * ALIGN
    kv_head = head // group
    first64 = first_query.to(tl.int64) * ALIGN
    Q += batch64 * q_batch + head64 * q_head + first64 * q_row
    OUT += batch64 * out_batch + head64 * out_head + first64 * out_row
    if not DESCRIPTORS:
        K += batch64 * k_batch + kv_head.to(tl.int64) * ALIGN * k_head
        V += batch64 * v_batch + kv_head.to(tl.int64) * ALIGN * v_head
    query = first_query + tl.arange(0, BLOCK_M)
    exists = query < queries

    q = load_rows(Q, q_row * ALIGN, exists, BLOCK_M, HEAD_DIM, HEAD0, HEAD1, True)
    if NEGATIVE_SCALE:
        q = negate(q)
    scale_log2 = to_log2_scale(scale, ACCUMULATOR)
    seed = tl.load(SEED) if DROPOUT else 0

    row, visible, words_per_query = mask_row(
        VISIBLE, batch, head, mask_stride_batch, mask_stride_head, n_query_blocks, n_key_blocks,
        SCHEDULE_M, SCHEDULE_N, MASK,
    )  # fmt: skip
    line = key_line(LISTS, row, first_query, n_query_blocks, n_key_blocks, SCHEDULE_M, MASK)
    walk = walk_over_keys(line, n_key_blocks, first_query, queries, keys, BLOCK_M, BLOCK_N, RATIO, MASK, CAUSAL)
    total = zeros(BLOCK_M, VALUE0, VALUE1, ACCUMULATOR)
    row_max = tl.full([BLOCK_M], NEGATIVE_INFINITY, ACCUMULATOR)
    row_sum = tl.zeros([BLOCK_M], ACCUMULATOR)
    # Full blocks first: with the masked ones in front, the compiler serializes the products of the main loop.
    for run in tl.range(0, run_count(walk), num_stages=1):
        start, end = run_bounds(walk, run, RATIO, LISTED)
        for block in tl.range(start, end, num_stages=STAGES):
            total, row_max, row_sum = _forward_tile(
                total, row_max, row_sum, q, K, V, kv_head, k_row * ALIGN, v_row * ALIGN, block, first_query,
                queries, keys, visible, words_per_query, scale_log2, batch, head, seed, keep_threshold,
                HEAD_DIM, VALUE_DIM, HEAD0, HEAD1, VALUE0, VALUE1, BLOCK_M, BLOCK_N,
                False, MASK, CAUSAL, DROPOUT, PRECISION, ACCUMULATOR, DESCRIPTORS,
            )  # fmt: skip
    for index in tl.range(0, masked_count(walk), num_stages=1):
        block = masked_block(walk, index, RATIO, LISTED)
        total, row_max, row_sum = _forward_tile(
            total, row_max, row_sum, q, K, V, kv_head, k_row * ALIGN, v_row * ALIGN, block, first_query,
            queries, keys, visible, words_per_query, scale_log2, batch, head, seed, keep_threshold,
            HEAD_DIM, VALUE_DIM, HEAD0, HEAD1, VALUE0, VALUE1, BLOCK_M, BLOCK_N,
            True, MASK, CAUSAL, DROPOUT, PRECISION, ACCUMULATOR, DESCRIPTORS,
        )  # fmt: skip

    normaliser, lse_natural = finish(row_max, row_sum)
    tl.store(LSE + (batch.to(tl.int64) * heads + head) * queries + query, lse_natural, mask=exists)
    if DROPOUT:
        normaliser *= tl.full([], keep_scale, tl.float64).to(ACCUMULATOR)
    store_rows(OUT, out_row * ALIGN, scale_rows(total, normaliser), exists, BLOCK_M, VALUE_DIM, VALUE0, VALUE1)


def empty_outputs(q: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Where a forward writes `out (b, h, i, dv)` and `lse (b, h, i)`. Also what it gives when nothing is launched."""
    out = empty_like_heads(readable(q), spec.heads, spec.value_dim)
    lse = torch.empty(spec.batch, spec.heads, spec.queries, dtype=spec.accumulator_dtype, device=q.device)
    return out, lse


def attention_forward(operands: Operands, spec: AttentionSpec, tiles: Tiles) -> tuple[Tensor, Tensor, Schedule]:
    """`out (b, h, i, dv)` in q's dtype, `lse (b, h, i)`, natural, and the schedule that the backward reads again."""
    q, k, v = readable(operands.q), readable(operands.k), readable(operands.v)
    out, lse = empty_outputs(q, spec)
    schedule = build_schedule(operands.mask, spec, tiles)
    q_rows, out_rows = q, out
    if packed := packed_group(spec):
        spec, q_rows, out_rows = packed, *(as_queries(tensor, spec.kv_heads) for tensor in (q, out))
    strides = q_rows.stride(), k.stride(), v.stride(), out_rows.stride()
    prepared = _prepare(spec, tiles, schedule.rows, aligned(k, v), *strides)
    launch(prepared, q_rows, k, v, out_rows, lse, schedule.visible, schedule.lists, operands.seed)
    return out, lse, schedule


@lru_cache(maxsize=CALLS_KEPT)
def _prepare(
    spec: AttentionSpec,
    tiles: Tiles,
    mask_rows: int,
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
        (*call_arguments(spec, mask_rows, tiles), query_section(spec), *strides),
        dict(ALIGN=align, DESCRIPTORS=tile.descriptors, **call_choices(spec, tile, tiles)),
        tile.num_warps,
        tile.num_stages,
        hand_over=hand_over,
    )
