"""The backward: delta once, then dK/dV by key tiles and dQ by query tiles. No atomics: always bitwise repeatable. Or
fused, where that is asked for: dK/dV by key tiles, of which each adds its part of dQ to a sum, atomically. That takes 5
products instead of 7, and the order of additions is not repeatable.

With P the softmax weights (after dropout P'), the gradients are dV = P'^T dO, dS = P * (dropout(dO V^T) - delta),
dQ = scale * dS K and dK = scale * dS^T Q, where delta = rowsum(dO * O) - dLSE (Dao 2023, arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Sequence
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
    key_line,
    mask_row,
    masked_block,
    masked_count,
    query_line,
    run_bounds,
    run_count,
    transposed_lists,
    walk_over_keys,
    walk_over_queries,
)
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.masking import (
    DENSE,
    KEY,
    NONE,
    hide,
    key_visibility,
    pair_visibility,
    tile_of_program,
    tile_visibility,
)
from flash_attend.kernels.operands import (
    Strides,
    aligned_strides,
    call_arguments,
    call_choices,
    empty_like_heads,
    key_section,
    key_sizes,
    query_section,
    query_sizes,
    readable,
)
from flash_attend.kernels.softmax import LOG2E, NEGATIVE_INFINITY, recomputed_weights, to_log2_scale
from flash_attend.kernels.tiles import (
    accumulate,
    clear_rows,
    inner_products,
    load_block,
    load_rows,
    negate,
    row_products,
    scale_rows,
    store_rows,
    zeros,
)
from flash_attend.operands import Operands
from flash_attend.spec import CALLS_KEPT, AttentionSpec, MaskKind

__all__ = ["attention_backward", "empty_gradients", "prepare_rows"]

INFINITY = tl.constexpr(float("inf"))
LONGEST_TILE = tl.constexpr(128)  # queries: rows of DELTA and LSE_LOG2 are whole tiles, so that no load needs a mask


@triton.jit
def padded_length(queries):
    """The length of a row of DELTA and LSE_LOG2."""
    return tl.cdiv(queries, LONGEST_TILE) * LONGEST_TILE


@triton.jit(
    do_not_specialize=[
        "queries", "heads", "out_batch", "out_head", "out_row", "grad_batch", "grad_head", "grad_row",
    ]
)  # fmt: skip
def delta_kernel(
    OUT,
    GRAD_OUT,
    LSE,
    GRAD_LSE,
    DELTA,
    LSE_LOG2,
    queries: tl.int32,
    heads: tl.int32,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int64,
    grad_batch: tl.int64,
    grad_head: tl.int64,
    grad_row: tl.int64,
    ALIGN: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE0: tl.constexpr,
    VALUE1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """DELTA and LSE_LOG2, in padded rows, for the kernels below. Dead rows and those past the last get delta 0 and LSE
    +inf: their weights are 0."""
    first_query, batch, head = tile_of_program(padded_length(queries), heads, 1, BLOCK_M)
    query = first_query + tl.arange(0, BLOCK_M)
    exists = query < queries
    batch64 = batch.to(tl.int64) * ALIGN
    head64 = head.to(tl.int64) * ALIGN
    first64 = first_query.to(tl.int64) * ALIGN
    out_rows = OUT + batch64 * out_batch + head64 * out_head + first64 * out_row
    grad_rows = GRAD_OUT + batch64 * grad_batch + head64 * grad_head + first64 * grad_row
    out = load_rows(out_rows, out_row * ALIGN, exists, BLOCK_M, VALUE_DIM, VALUE0, VALUE1, True)
    grad = load_rows(grad_rows, grad_row * ALIGN, exists, BLOCK_M, VALUE_DIM, VALUE0, VALUE1, True)
    row = batch.to(tl.int64) * heads + head
    lse = tl.load(LSE + row * queries + query, mask=exists, other=NEGATIVE_INFINITY)
    dead = lse == NEGATIVE_INFINITY
    delta = row_products(out, grad, ACCUMULATOR)
    if GRAD_LSE is not None:
        delta -= tl.load(GRAD_LSE + row * queries + query, mask=exists, other=0.0)
    at = row * padded_length(queries) + query
    tl.store(DELTA + at, tl.where(dead, 0.0, delta))
    tl.store(LSE_LOG2 + at, tl.where(dead, INFINITY, lse * LOG2E))


@triton.jit
def _key_value_tile(
    grad_k,
    grad_v,
    k,
    v,
    Q,
    GRAD_OUT,
    GRAD_Q,
    LSE_LOG2,
    DELTA,
    stride_q,
    stride_grad,
    block,
    first_key,
    key_shown,
    queries,
    keys,
    visible,
    words_per_query,
    scale_log2,
    batch,
    head,
    seed,
    keep_threshold,
    keep_scale,
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
    HIDE_KEYS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr,
):
    """One query block for one key tile, transposed: scores are [BLOCK_N, BLOCK_M]. GRAD_Q, unless None, is the sum to
    which the tile's part in the gradient of q is added, without the magnitude of the scale."""
    first_query = block * BLOCK_M
    query = first_query + tl.arange(0, BLOCK_M)
    key = first_key + tl.arange(0, BLOCK_N)
    lse_log2 = tl.load(LSE_LOG2 + query)
    delta = tl.load(DELTA + query)
    alive = None
    if MASKED:
        # What a dead row holds, in q and in the gradient, may be anything: it is not read. No full block has dead rows.
        alive = lse_log2 < INFINITY
    q = load_rows(Q + first_query.to(tl.int64) * stride_q, stride_q, alive, BLOCK_M, HEAD_DIM, HEAD0, HEAD1, MASKED)
    scores = inner_products(k, q, PRECISION, ACCUMULATOR)
    weights = recomputed_weights(scores, lse_log2[None, :], scale_log2)
    if MASKED:
        if MASK == DENSE:
            shown = pair_visibility(visible, first_query, first_key, words_per_query, BLOCK_M, BLOCK_N, True)
        else:
            shown = key_shown[:, None]
        weights = hide(weights, 0.0, query[None, :], key[:, None], shown, keys - queries, MASK, CAUSAL, HIDE_KEYS)
    grad = load_rows(
        GRAD_OUT + first_query.to(tl.int64) * stride_grad,
        stride_grad, alive, BLOCK_M, VALUE_DIM, VALUE0, VALUE1, MASKED,
    )  # fmt: skip
    dropped_weights = weights
    if DROPOUT:
        kept = kept_by_dropout(
            first_query, first_key, batch, head, seed, keep_threshold, BLOCK_M, BLOCK_N, TRANSPOSED=True
        )
        dropped_weights = tl.where(kept, weights, 0.0)
    if NEEDS_V:
        grad_v = accumulate(grad_v, dropped_weights.to(grad[0].dtype), grad, PRECISION, ACCUMULATOR)
    if NEEDS_K or GRAD_Q is not None:
        grad_weights = inner_products(v, grad, PRECISION, ACCUMULATOR)
        if DROPOUT:
            grad_weights = tl.where(kept, grad_weights * keep_scale, 0.0)
        grad_scores = weights * (grad_weights - delta[None, :])
        if MASKED and (MASK == DENSE or (HIDE_KEYS and GRAD_Q is None)):
            # Hidden keys were read here, and the NaN that v may hold has survived the zero weight.
            grad_scores = hide(
                grad_scores, 0.0, query[None, :], key[:, None], shown, keys - queries, MASK, CAUSAL, HIDE_KEYS
            )
        grad_scores = grad_scores.to(q[0].dtype)
        if NEEDS_K:
            grad_k = accumulate(grad_k, grad_scores, q, PRECISION, ACCUMULATOR)
        if GRAD_Q is not None:
            if MASKED and MASK == DENSE:
                # Nor may k bring NaN in: from a key that no query here sees, times a zero.
                k = clear_rows(k, tl.max(shown.to(tl.int32), 1) != 0)
            if not MASKED:
                alive = tl.full([BLOCK_M], True, tl.int1)
            grad_q = accumulate(zeros(BLOCK_M, HEAD0, HEAD1, ACCUMULATOR), grad_scores.T, k, PRECISION, ACCUMULATOR)
            store_rows(
                GRAD_Q + first_query.to(tl.int64) * HEAD_DIM,
                HEAD_DIM, grad_q, alive, BLOCK_M, HEAD_DIM, HEAD0, HEAD1, ADD=True,
            )  # fmt: skip
    return grad_k, grad_v


@triton.jit
def _load_keys(
    K,
    V,
    stride_k,
    stride_v,
    key_shown,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD0: tl.constexpr,
    HEAD1: tl.constexpr,
    VALUE0: tl.constexpr,
    VALUE1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
):
    """The rows of k, with the sign of the scale, and of v for a key tile: zeros where a key is not `key_shown`."""
    k = load_rows(K, stride_k, key_shown, BLOCK_N, HEAD_DIM, HEAD0, HEAD1, True)
    v = load_rows(V, stride_v, key_shown, BLOCK_N, VALUE_DIM, VALUE0, VALUE1, True)
    if NEGATIVE_SCALE:
        k = negate(k)
    return k, v


@triton.jit
def _key_value_head(
    grad_k,
    grad_v,
    k,
    v,
    K,
    V,
    Q,
    GRAD_OUT,
    GRAD_Q,
    LSE_LOG2,
    DELTA,
    VISIBLE,
    LISTS,
    key_shown,
    first_key,
    batch,
    head,
    queries,
    keys,
    heads,
    mask_stride_batch,
    mask_stride_head,
    n_query_blocks,
    n_key_blocks,
    k_row,
    v_row,
    q_batch,
    q_head,
    q_row,
    grad_batch,
    grad_head,
    grad_row,
    scale_log2,
    seed,
    keep_threshold,
    keep_scale,
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
    HIDE_KEYS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr,
):
    """Every query block of one query head for one key tile."""
    FUSED: tl.constexpr = GRAD_Q is not None
    LISTED: tl.constexpr = MASK == DENSE
    RATIO: tl.constexpr = SCHEDULE_M // BLOCK_M
    batch64 = batch.to(tl.int64)
    head64 = head.to(tl.int64)
    Q += batch64 * q_batch + head64 * q_head
    GRAD_OUT += batch64 * grad_batch + head64 * grad_head
    LSE_LOG2 += (batch64 * heads + head) * padded_length(queries)
    DELTA += (batch64 * heads + head) * padded_length(queries)
    if FUSED:
        GRAD_Q += (batch64 * heads + head) * queries * HEAD_DIM
    row, visible, words_per_query = mask_row(
        VISIBLE, batch, head, mask_stride_batch, mask_stride_head, n_query_blocks, n_key_blocks,
        SCHEDULE_M, SCHEDULE_N, MASK,
    )  # fmt: skip
    line = query_line(LISTS, row, first_key, n_query_blocks, n_key_blocks, SCHEDULE_N, MASK)
    if HIDE_KEYS:
        key_shown = key_visibility(visible, first_key + tl.arange(0, BLOCK_N), keys, MASK)
        if FUSED:
            k, v = _load_keys(
                K, V, k_row, v_row, key_shown, HEAD_DIM, VALUE_DIM, HEAD0, HEAD1, VALUE0, VALUE1, BLOCK_N,
                NEGATIVE_SCALE,
            )  # fmt: skip
    any_key = tl.max(key_shown.to(tl.int32), 0) != 0
    hides_keys = HIDE_KEYS
    if FUSED:
        # What hidden keys gather in their own rows is cleared at the end. What they would add to dQ is not.
        hides_keys = tl.min(key_shown.to(tl.int32), 0) == 0
    walk = walk_over_queries(
        line, n_query_blocks, any_key, hides_keys, first_key, queries, keys, BLOCK_M, BLOCK_N, RATIO, MASK, CAUSAL
    )
    for run in tl.range(0, run_count(walk), num_stages=1):
        start, end = run_bounds(walk, run, RATIO, LISTED)
        for block in tl.range(start, end, num_stages=STAGES):
            grad_k, grad_v = _key_value_tile(
                grad_k, grad_v, k, v, Q, GRAD_OUT, GRAD_Q, LSE_LOG2, DELTA, q_row, grad_row, block, first_key,
                key_shown, queries, keys, visible, words_per_query, scale_log2, batch, head, seed,
                keep_threshold, keep_scale, HEAD_DIM, VALUE_DIM, HEAD0, HEAD1, VALUE0, VALUE1, BLOCK_M, BLOCK_N,
                False, MASK, CAUSAL, HIDE_KEYS or FUSED, DROPOUT, PRECISION, ACCUMULATOR, NEEDS_K, NEEDS_V,
            )  # fmt: skip
    for index in tl.range(0, masked_count(walk), num_stages=1, disable_licm=FUSED):
        block = masked_block(walk, index, RATIO, LISTED)
        grad_k, grad_v = _key_value_tile(
            grad_k, grad_v, k, v, Q, GRAD_OUT, GRAD_Q, LSE_LOG2, DELTA, q_row, grad_row, block, first_key,
            key_shown, queries, keys, visible, words_per_query, scale_log2, batch, head, seed,
            keep_threshold, keep_scale, HEAD_DIM, VALUE_DIM, HEAD0, HEAD1, VALUE0, VALUE1, BLOCK_M, BLOCK_N,
            True, MASK, CAUSAL, HIDE_KEYS or FUSED, DROPOUT, PRECISION, ACCUMULATOR, NEEDS_K, NEEDS_V,
        )  # fmt: skip
    return grad_k, grad_v


@triton.jit(
    do_not_specialize=[
        "scale", "keep_scale", "keep_threshold", "queries", "keys", "heads", "group",
        "mask_stride_batch", "mask_stride_head", "n_query_blocks", "n_key_blocks", "section",
        "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row",
        "v_batch", "v_head", "v_row", "grad_batch", "grad_head", "grad_row",
        "grad_k_batch", "grad_k_head", "grad_k_row", "grad_v_batch", "grad_v_head", "grad_v_row",
    ]
)  # fmt: skip
def backward_kv_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    GRAD_K,
    GRAD_V,
    GRAD_Q,
    LSE_LOG2,
    DELTA,
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
    grad_batch: tl.int64,
    grad_head: tl.int64,
    grad_row: tl.int64,
    grad_k_batch: tl.int64,
    grad_k_head: tl.int64,
    grad_k_row: tl.int64,
    grad_v_batch: tl.int64,
    grad_v_head: tl.int64,
    grad_v_row: tl.int64,
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
    GROUPED: tl.constexpr,
    HIDE_KEYS: tl.constexpr,
    NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr,
):
    """One key tile of one key/value head: GRAD_K (b, hk, j, d) and GRAD_V (b, hk, j, dv), each where it is needed.

    GRAD_Q, unless None: the sum (b, h, i, d), contiguous, to which the tile adds its part of the gradient of q.

    HIDE_KEYS: the heads of a group have key masks of their own, so that a key is hidden from some and read by others.
    """
    first_key, batch, kv_head = tile_of_program(keys, heads // group, section, BLOCK_N, LAST_FIRST=False)
    batch64 = batch.to(tl.int64) * ALIGN
    kv_head64 = kv_head.to(tl.int64) * ALIGN
    first64 = first_key.to(tl.int64) * ALIGN
    K += batch64 * k_batch + kv_head64 * k_head + first64 * k_row
    V += batch64 * v_batch + kv_head64 * v_head + first64 * v_row
    key = first_key + tl.arange(0, BLOCK_N)
    exists = key < keys

    # Keys that are hidden from all come as zeros, once; what gathers in their rows is cleared at the end.
    key_shown = exists
    if MASK == KEY and not HIDE_KEYS:
        _, visible, _ = mask_row(
            VISIBLE, batch, kv_head * group, mask_stride_batch, mask_stride_head, n_query_blocks, n_key_blocks,
            SCHEDULE_M, SCHEDULE_N, MASK,
        )  # fmt: skip
        key_shown = key_visibility(visible, key, keys, MASK)
    k, v = _load_keys(
        K, V, k_row * ALIGN, v_row * ALIGN, key_shown, HEAD_DIM, VALUE_DIM, HEAD0, HEAD1, VALUE0, VALUE1, BLOCK_N,
        NEGATIVE_SCALE,
    )  # fmt: skip
    signed_scale = tl.full([], scale, tl.float64).to(ACCUMULATOR)
    scale_log2 = to_log2_scale(scale, ACCUMULATOR)
    keep_factor = tl.full([], keep_scale, tl.float64).to(ACCUMULATOR)
    seed = tl.load(SEED) if DROPOUT else 0
    grad_k = zeros(BLOCK_N, HEAD0, HEAD1, ACCUMULATOR)
    grad_v = zeros(BLOCK_N, VALUE0, VALUE1, ACCUMULATOR)
    if GROUPED:  # a loop over heads costs registers even when it runs once
        for member in tl.range(0, group, num_stages=1, disable_licm=GRAD_Q is not None):
            grad_k, grad_v = _key_value_head(
                grad_k, grad_v, k, v, K, V, Q, GRAD_OUT, GRAD_Q, LSE_LOG2, DELTA, VISIBLE, LISTS, key_shown,
                first_key, batch, kv_head * group + member, queries, keys, heads, mask_stride_batch, mask_stride_head,
                n_query_blocks, n_key_blocks, k_row * ALIGN, v_row * ALIGN,
                q_batch * ALIGN, q_head * ALIGN, q_row * ALIGN,
                grad_batch * ALIGN, grad_head * ALIGN, grad_row * ALIGN, scale_log2, seed, keep_threshold, keep_factor,
                HEAD_DIM, VALUE_DIM, HEAD0, HEAD1, VALUE0, VALUE1, BLOCK_M, BLOCK_N, STAGES, SCHEDULE_M, SCHEDULE_N,
                MASK, CAUSAL, NEGATIVE_SCALE, HIDE_KEYS, DROPOUT, PRECISION, ACCUMULATOR, NEEDS_K, NEEDS_V,
            )  # fmt: skip
    else:
        grad_k, grad_v = _key_value_head(
            grad_k, grad_v, k, v, K, V, Q, GRAD_OUT, GRAD_Q, LSE_LOG2, DELTA, VISIBLE, LISTS, key_shown, first_key,
            batch, kv_head, queries, keys, heads, mask_stride_batch, mask_stride_head,
            n_query_blocks, n_key_blocks, k_row * ALIGN, v_row * ALIGN,
            q_batch * ALIGN, q_head * ALIGN, q_row * ALIGN,
            grad_batch * ALIGN, grad_head * ALIGN, grad_row * ALIGN, scale_log2, seed, keep_threshold, keep_factor,
            HEAD_DIM, VALUE_DIM, HEAD0, HEAD1, VALUE0, VALUE1, BLOCK_M, BLOCK_N, STAGES, SCHEDULE_M, SCHEDULE_N,
            MASK, CAUSAL, NEGATIVE_SCALE, HIDE_KEYS, DROPOUT, PRECISION, ACCUMULATOR, NEEDS_K, NEEDS_V,
        )  # fmt: skip
    if NEEDS_K:
        grad_k = clear_rows(scale_rows(grad_k, tl.zeros([BLOCK_N], ACCUMULATOR) + signed_scale), key_shown)
        GRAD_K += batch64 * grad_k_batch + kv_head64 * grad_k_head + first64 * grad_k_row
        store_rows(GRAD_K, grad_k_row * ALIGN, grad_k, exists, BLOCK_N, HEAD_DIM, HEAD0, HEAD1)
    if NEEDS_V:
        grad_v = clear_rows(scale_rows(grad_v, tl.zeros([BLOCK_N], ACCUMULATOR) + keep_factor), key_shown)
        GRAD_V += batch64 * grad_v_batch + kv_head64 * grad_v_head + first64 * grad_v_row
        store_rows(GRAD_V, grad_v_row * ALIGN, grad_v, exists, BLOCK_N, VALUE_DIM, VALUE0, VALUE1)


@triton.jit
def _query_gradient_tile(
    grad_q,
    q,
    grad,
    lse_log2,
    delta,
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
    keep_scale,
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
    # Neither in k nor in v: both enter a product whose zeros would not hide a NaN.
    k = load_block(
        K, batch, kv_head, first_key, stride_k, readable, BLOCK_N, HEAD_DIM, HEAD0, HEAD1,
        DESCRIPTORS, MASKED, WITHIN=MASK != NONE,
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
            HIDE_KEYS=MASK == KEY or not CAUSAL,
        )
    weights = recomputed_weights(scores, lse_log2[:, None], scale_log2)
    v = load_block(
        V, batch, kv_head, first_key, stride_v, readable, BLOCK_N, VALUE_DIM, VALUE0, VALUE1,
        DESCRIPTORS, MASKED, WITHIN=MASK != NONE,
    )  # fmt: skip
    grad_weights = inner_products(grad, v, PRECISION, ACCUMULATOR)
    if DROPOUT:
        kept = kept_by_dropout(
            first_query, first_key, batch, head, seed, keep_threshold, BLOCK_M, BLOCK_N, TRANSPOSED=False
        )
        grad_weights = tl.where(kept, grad_weights * keep_scale, 0.0)
    grad_scores = weights * (grad_weights - delta[:, None])
    return accumulate(grad_q, grad_scores.to(k[0].dtype), k, PRECISION, ACCUMULATOR)


@triton.jit(
    do_not_specialize=[
        "scale", "keep_scale", "keep_threshold", "queries", "keys", "heads", "group",
        "mask_stride_batch", "mask_stride_head", "n_query_blocks", "n_key_blocks", "section",
        "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row",
        "v_batch", "v_head", "v_row", "grad_batch", "grad_head", "grad_row",
        "grad_q_batch", "grad_q_head", "grad_q_row",
    ]
)  # fmt: skip
def backward_q_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    GRAD_Q,
    LSE_LOG2,
    DELTA,
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
    grad_batch: tl.int64,
    grad_head: tl.int64,
    grad_row: tl.int64,
    grad_q_batch: tl.int64,
    grad_q_head: tl.int64,
    grad_q_row: tl.int64,
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
    """One query tile of one head: GRAD_Q (b, h, i, d).

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
    GRAD_OUT += batch64 * grad_batch + head64 * grad_head + first64 * grad_row
    GRAD_Q += batch64 * grad_q_batch + head64 * grad_q_head + first64 * grad_q_row
    if not DESCRIPTORS:
        K += batch64 * k_batch + kv_head.to(tl.int64) * ALIGN * k_head
        V += batch64 * v_batch + kv_head.to(tl.int64) * ALIGN * v_head
    query = first_query + tl.arange(0, BLOCK_M)
    exists = query < queries

    at = (batch.to(tl.int64) * heads + head) * padded_length(queries) + query
    lse_log2 = tl.load(LSE_LOG2 + at)
    delta = tl.load(DELTA + at)
    # NaN in a dead row's q stays in its scores, all of which are hidden; in the gradient it must not be read.
    q = load_rows(Q, q_row * ALIGN, exists, BLOCK_M, HEAD_DIM, HEAD0, HEAD1, True)
    grad = load_rows(GRAD_OUT, grad_row * ALIGN, lse_log2 < INFINITY, BLOCK_M, VALUE_DIM, VALUE0, VALUE1, True)
    if NEGATIVE_SCALE:
        q = negate(q)
    signed_scale = tl.full([], scale, tl.float64).to(ACCUMULATOR)
    scale_log2 = to_log2_scale(scale, ACCUMULATOR)
    keep_factor = tl.full([], keep_scale, tl.float64).to(ACCUMULATOR)
    seed = tl.load(SEED) if DROPOUT else 0

    row, visible, words_per_query = mask_row(
        VISIBLE, batch, head, mask_stride_batch, mask_stride_head, n_query_blocks, n_key_blocks,
        SCHEDULE_M, SCHEDULE_N, MASK,
    )  # fmt: skip
    line = key_line(LISTS, row, first_query, n_query_blocks, n_key_blocks, SCHEDULE_M, MASK)
    walk = walk_over_keys(line, n_key_blocks, first_query, queries, keys, BLOCK_M, BLOCK_N, RATIO, MASK, CAUSAL)
    grad_q = zeros(BLOCK_M, HEAD0, HEAD1, ACCUMULATOR)
    for run in tl.range(0, run_count(walk), num_stages=1):
        start, end = run_bounds(walk, run, RATIO, LISTED)
        for block in tl.range(start, end, num_stages=STAGES):
            grad_q = _query_gradient_tile(
                grad_q, q, grad, lse_log2, delta, K, V, kv_head, k_row * ALIGN, v_row * ALIGN, block, first_query,
                queries, keys, visible, words_per_query, scale_log2, batch, head, seed, keep_threshold, keep_factor,
                HEAD_DIM, VALUE_DIM, HEAD0, HEAD1, VALUE0, VALUE1, BLOCK_M, BLOCK_N,
                False, MASK, CAUSAL, DROPOUT, PRECISION, ACCUMULATOR, DESCRIPTORS,
            )  # fmt: skip
    for index in tl.range(0, masked_count(walk), num_stages=1):
        block = masked_block(walk, index, RATIO, LISTED)
        grad_q = _query_gradient_tile(
            grad_q, q, grad, lse_log2, delta, K, V, kv_head, k_row * ALIGN, v_row * ALIGN, block, first_query,
            queries, keys, visible, words_per_query, scale_log2, batch, head, seed, keep_threshold, keep_factor,
            HEAD_DIM, VALUE_DIM, HEAD0, HEAD1, VALUE0, VALUE1, BLOCK_M, BLOCK_N,
            True, MASK, CAUSAL, DROPOUT, PRECISION, ACCUMULATOR, DESCRIPTORS,
        )  # fmt: skip
    grad_q = scale_rows(grad_q, tl.zeros([BLOCK_M], ACCUMULATOR) + signed_scale)
    store_rows(GRAD_Q, grad_q_row * ALIGN, grad_q, exists, BLOCK_M, HEAD_DIM, HEAD0, HEAD1)


DELTA_ROWS = 32  # queries of one program of the delta kernel, which is bound by memory


def empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where a backward writes the gradients of q, k and v that are `needed`."""
    needs_q, needs_k, needs_v = needed
    return (
        empty_like_heads(readable(q), spec.heads, spec.head_dim) if needs_q else None,
        empty_like_heads(readable(k), spec.kv_heads, spec.head_dim) if needs_k else None,
        empty_like_heads(readable(v), spec.kv_heads, spec.value_dim) if needs_v else None,
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
    """The gradients of q, k and v that are `needed`, from those of out `(b, h, i, dv)` and lse `(b, h, i)`.

    Everything else is what the forward took and gave. A gradient that is None counts as 0.

    With a tile for the fused backward, one kernel computes what takes two kernels else, where the gradients of q and of
    k or v are needed. Beside them it takes memory for a second gradient of q, `(b, h, i, d)` in float32 (float64 for
    float64), and which bits that of q comes to changes from run to run.
    """
    q, k, v, out = readable(operands.q), readable(operands.k), readable(operands.v), readable(out)
    grad_out = torch.zeros_like(out) if grad_out is None else readable(grad_out)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()

    delta, lse_log2 = prepare_rows(grad_out, grad_lse, out, lse, spec, tiles)

    grad_q, grad_k, grad_v = empty_gradients(q, k, v, spec, needed)
    inputs = q, k, v, grad_out
    strides = q.stride(), k.stride(), v.stride(), grad_out.stride()
    by_keys = grad_k is not None or grad_v is not None
    sum_q = None
    if by_keys and grad_q is not None and tiles.backward_fused is not None:
        sum_q = torch.zeros(grad_q.shape, dtype=spec.accumulator_dtype, device=q.device)
    if by_keys:
        lists = transposed_lists(schedule)
        of_outputs = (None if grad is None else grad.stride() for grad in (grad_k, grad_v))
        prepared = _prepare_kv(spec, tiles, sum_q is not None, schedule.rows, *strides, *of_outputs)
        launch(prepared, *inputs, grad_k, grad_v, sum_q, lse_log2, delta, schedule.visible, lists, operands.seed)
    if sum_q is not None:
        torch.mul(sum_q, abs(spec.scale), out=grad_q)
    elif grad_q is not None:
        prepared = _prepare_q(spec, tiles, schedule.rows, aligned(k, v), *strides, grad_q.stride())
        launch(prepared, *inputs, grad_q, lse_log2, delta, schedule.visible, schedule.lists, operands.seed)
    return grad_q, grad_k, grad_v


def prepare_rows(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, spec: AttentionSpec, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """What every backward kernel reads of each query: delta and the LSE in base 2, `(b, h, i)` with i padded."""
    length = triton.cdiv(spec.queries, LONGEST_TILE.value) * LONGEST_TILE.value
    delta, lse_log2 = (lse.new_empty(spec.batch, spec.heads, length) for _ in range(2))
    prepared = _prepare_delta(spec, tiles, out.stride(), grad_out.stride(), grad_lse is not None)
    launch(prepared, out, grad_out, lse, grad_lse, delta, lse_log2)
    return delta, lse_log2


# The launches for tensors with these strides; `at_hand` if k and v begin where bulk copies can read.


@lru_cache(maxsize=CALLS_KEPT)
def _prepare_delta(spec: AttentionSpec, tiles: Tiles, out: Strides, grad_out: Strides, with_lse: bool) -> Prepared:
    # Calls with a gradient of the LSE and those without are prepared apart: None is a variant of its own.
    sizes = query_sizes(spec)
    align, strides = aligned_strides(spec.dtype, (sizes, out), (sizes, grad_out))
    choices = call_choices(spec, tiles.backward_q, tiles)
    return Prepared(
        delta_kernel,
        spec.batch * spec.heads * triton.cdiv(spec.queries, LONGEST_TILE.value) * (LONGEST_TILE.value // DELTA_ROWS),
        (spec.queries, spec.heads, *strides),
        dict(
            ALIGN=align,
            BLOCK_M=DELTA_ROWS,
            **{name: choices[name] for name in ("VALUE_DIM", "VALUE0", "VALUE1", "ACCUMULATOR")},
        ),
        num_warps=4,
    )


@lru_cache(maxsize=CALLS_KEPT)
def _prepare_kv(
    spec: AttentionSpec,
    tiles: Tiles,
    fused: bool,
    mask_rows: int,
    q: Strides,
    k: Strides,
    v: Strides,
    grad_out: Strides,
    grad_k: Strides | None,
    grad_v: Strides | None,
) -> Prepared:
    of_queries, of_keys = query_sizes(spec), key_sizes(spec)
    align, strides = aligned_strides(
        spec.dtype,
        (of_queries, q),
        (of_keys, k),
        (of_keys, v),
        (of_queries, grad_out),
        (of_keys, grad_k or k),  # one that is not needed is not written: it must not spoil the alignment
        (of_keys, grad_v or v),
    )
    tile = tiles.backward_fused if fused else tiles.backward_kv
    return Prepared(
        backward_kv_kernel,
        spec.batch * spec.kv_heads * triton.cdiv(spec.keys, tile.block_n),
        (*call_arguments(spec, mask_rows, tiles), key_section(spec), *strides),
        dict(
            ALIGN=align,
            GROUPED=spec.group > 1,
            HIDE_KEYS=spec.group > 1 and spec.mask == MaskKind.KEY and spec.mask_per_head,
            NEEDS_K=grad_k is not None,
            NEEDS_V=grad_v is not None,
            **call_choices(spec, tile, tiles),
        ),
        tile.num_warps,
        tile.num_stages,
    )


@lru_cache(maxsize=CALLS_KEPT)
def _prepare_q(
    spec: AttentionSpec,
    tiles: Tiles,
    mask_rows: int,
    at_hand: bool,
    q: Strides,
    k: Strides,
    v: Strides,
    grad_out: Strides,
    grad_q: Strides,
) -> Prepared:
    of_queries, of_keys = query_sizes(spec), key_sizes(spec)
    align, strides = aligned_strides(
        spec.dtype, (of_queries, q), (of_keys, k), (of_keys, v), (of_queries, grad_out), (of_queries, grad_q)
    )
    tile, hand_over = reading_keys(spec, tiles.backward_q, at_hand, k, v)
    return Prepared(
        backward_q_kernel,
        spec.batch * spec.heads * triton.cdiv(spec.queries, tile.block_m),
        (*call_arguments(spec, mask_rows, tiles), query_section(spec), *strides),
        dict(ALIGN=align, DESCRIPTORS=tile.descriptors, **call_choices(spec, tile, tiles)),
        tile.num_warps,
        tile.num_stages,
        hand_over=hand_over,
    )
