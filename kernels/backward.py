"""The backward: delta once (statistics.py), then dK/dV by key tiles and dQ by query tiles. No atomics: always bitwise
repeatable. Or fused, where that is asked for: dK/dV by key tiles, of which each adds its part of dQ to a sum,
atomically. That takes 5 products instead of 7, and the order of additions is not repeatable.

With P the softmax weights (after dropout P'), the gradients are dV = P'^T dO, dS = P * (dropout(dO V^T) - delta),
dQ = scale * dS K and dK = scale * dS^T Q, where delta = rowsum(dO * O) - dLSE (Dao 2023, arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attend.kernels.bias_gradient import bias_gradient
from flash_attend.kernels.compat import aggregate, kernel
from flash_attend.kernels.configs import Tiles
from flash_attend.kernels.descriptors import reading_keys
from flash_attend.kernels.dropout import dropout_by
from flash_attend.kernels.launch import Prepared, begin_aligned, launch
from flash_attend.kernels.lengths import packed_tiles, place_of_program, tile_count
from flash_attend.kernels.mask import DENSE, NONE, masks_of_call
from flash_attend.kernels.operands import (
    HeadsLayout,
    aligned_strides,
    bias_strides,
    call_arguments,
    call_choices,
    contiguous_strides,
    is_readable,
    key_section,
    key_sizes,
    layout_like_heads,
    query_section,
    query_sizes,
    readable,
    readable_operands,
    scale_sign,
    score_numbers,
)
from flash_attend.kernels.rows import Heads, Rows
from flash_attend.kernels.schedule import Planes, scheduled_spec, transposed_lists
from flash_attend.kernels.scores import scores_of_call
from flash_attend.kernels.softmax import NEGATIVE_INFINITY
from flash_attend.kernels.statistics import Kept, QueryStatistics, prepare_statistics
from flash_attend.kernels.tiles import Tile, clear_rows, scaled, zeros
from flash_attend.operands import Layouts, Operands, Strides
from flash_attend.spec import CALLS_KEPT, AttentionSpec, MaskKind

__all__ = ["attention_backward", "empty_gradients", "sinks_gradient"]


@aggregate
class Queries:
    """What a tile of keys reads of the queries of one head, and the sum to which it adds its part of their gradient."""

    q: object
    grad_out: object
    statistics: QueryStatistics
    grad_q: object  # None where the gradient of q is not made here


@aggregate
class QueryHeads:
    """The same of all heads."""

    q: object
    grad_out: object
    statistics: QueryStatistics
    grad_q: object  # a pointer to (b, h, i, d), contiguous, or None
    n_heads: tl.tensor

    @triton.jit
    def of_head(self, place, head):
        """The queries of a head, of the sequence at a place."""
        index = place.batch.to(tl.int64) * self.n_heads + head.to(tl.int64)
        q = self.q.rows(place.batch, head, None, place.first_query)
        grad_out = self.grad_out.rows(place.batch, head, None, place.first_query)
        statistics = self.statistics.of_head(
            index, place.total, place.first_query, None if place.first_query is None else place.queries
        )
        grad_q = None
        if self.grad_q is not None:
            start = self.grad_q + place.first_number(index) * q.DIM
            grad_q = Rows(start, q.DIM, place.batch, head, q.DIM, q.PART0, q.PART1, False, None, None, None)
        return Queries(q, grad_out, statistics, grad_q)


@aggregate
class KeyTile:
    """The keys of a tile: where it begins, which of them are visible [BLOCK_N], and their rows, 0 for the others."""

    first: tl.tensor
    shown: tl.tensor
    k: object
    v: object


@triton.jit
def _load_keys(k_rows, v_rows, first_key, shown, tile):
    k = tile.load(k_rows, first_key, shown, tile.BLOCK_N, MASKED=True)
    v = tile.load(v_rows, first_key, shown, tile.BLOCK_N, MASKED=True)
    return KeyTile(first_key, shown, k, v)


@aggregate
class KeyGradients:
    """The gradients of a tile of keys, but for factors that they get at the end."""

    k: object
    v: object
    NEEDS_K: tl.constexpr
    NEEDS_V: tl.constexpr


@triton.jit
def _key_value_tile(grads, keys, queries, mask, scores, dropout, block, tile, MASKED: tl.constexpr):
    """One query block for one key tile, transposed: scores are [BLOCK_N, BLOCK_M]."""
    FUSED: tl.constexpr = queries.grad_q is not None
    first_query = block * tile.BLOCK_M
    query = first_query + tl.arange(0, tile.BLOCK_M)
    key = keys.first + tl.arange(0, tile.BLOCK_N)
    statistics = queries.statistics.load(query, MASKED)
    alive = None
    # What a dead query holds, in q and in the gradient, may be anything: it is not read. No full block has any, but
    # for those that a bias hides everything from.
    MAYBE_DEAD: tl.constexpr = MASKED or scores.bias is not None
    if MAYBE_DEAD:
        alive = statistics.alive()
    q = tile.load(queries.q, first_query, alive, tile.BLOCK_M, MAYBE_DEAD)
    applied = scores.apply(tile.inner_products(keys.k, q))
    seen = scores.add(applied, first_query, keys.first, MASKED, TRANSPOSED=True)
    weights = statistics.weights(seen, scores.factor_log2, AXIS=0)
    if MASKED:
        if mask.KIND == DENSE:
            shown = mask.pairs_shown(first_query, keys.first, tile.BLOCK_M, tile.BLOCK_N, TRANSPOSED=True)
        else:
            shown = keys.shown[:, None]
        # Weights, not scores, whose selects would wait for their product with packed predicates.
        weights = mask.hide(weights, query[None, :], key[:, None], shown, 0.0)
    grad = tile.load(queries.grad_out, first_query, alive, tile.BLOCK_M, MAYBE_DEAD)
    kept = dropout.kept(first_query, keys.first, tile.BLOCK_M, tile.BLOCK_N, TRANSPOSED=True)
    grad_k = grads.k
    grad_v = grads.v
    if grads.NEEDS_V:
        grad_v = tile.accumulate(grad_v, dropout.drop(weights, kept), grad)
    if grads.NEEDS_K or FUSED:
        grad_weights = dropout.gradient(tile.inner_products(keys.v, grad), kept)
        grad_scores = scores.gradient(weights * (grad_weights - statistics.delta[None, :]), applied)
        if MASKED and (mask.KIND == DENSE or (mask.HIDES_KEYS and not FUSED)):
            # Hidden keys were read here, and the NaN that v may hold has survived the zero weight.
            grad_scores = mask.hide(grad_scores, query[None, :], key[:, None], shown, 0.0)
        grad_scores = grad_scores.to(q[0].dtype)
        if grads.NEEDS_K:
            grad_k = tile.accumulate(grad_k, grad_scores, q)
        if FUSED:
            k = keys.k
            if MASKED and mask.KIND == DENSE:
                # Nor may k bring NaN in: from a key that no query here sees, times a zero.
                k = clear_rows(k, tl.max(shown.to(tl.int32), 1) != 0)
            if not MAYBE_DEAD:
                alive = tl.full([tile.BLOCK_M], True, tl.int1)
            nothing = zeros(tile.BLOCK_M, queries.q.PART0, queries.q.PART1, tile.ACCUMULATOR)
            grad_q = tile.accumulate(nothing, grad_scores.T, k)
            queries.grad_q.store(first_query, grad_q, alive, tile.BLOCK_M, ADD=True)
    return KeyGradients(grad_k, grad_v, grads.NEEDS_K, grads.NEEDS_V)


@triton.jit
def _key_value_head(grads, keys, queries, mask, scores, dropout, tile, STAGES: tl.constexpr):
    """Every query block of one query head for one key tile."""
    FUSED: tl.constexpr = queries.grad_q is not None
    any_key = tl.max(keys.shown.to(tl.int32), 0) != 0
    # Where only pairs are hidden, hidden keys gather in rows of their own, which are cleared at the end.
    hides_keys = mask.HIDES_KEYS
    if FUSED:
        hides_keys = tl.min(keys.shown.to(tl.int32), 0) == 0
    elif scores.bias is not None and not mask.HIDES_KEYS:
        hides_keys = keys.first + tile.BLOCK_N > mask.keys  # those past the end have no bias to read
    walk = mask.walk_over_queries(keys.first, any_key, hides_keys, tile.BLOCK_M, tile.BLOCK_N)
    for run in tl.range(0, walk.run_count(), num_stages=1):
        start, end = walk.run_bounds(run)
        for block in tl.range(start, end, num_stages=STAGES):
            grads = _key_value_tile(grads, keys, queries, mask, scores, dropout, block, tile, MASKED=False)
    for index in tl.range(0, walk.masked_count(), num_stages=1, disable_licm=FUSED):
        block = walk.masked_block(index)
        grads = _key_value_tile(grads, keys, queries, mask, scores, dropout, block, tile, MASKED=True)
    return grads


@kernel
def backward_kv_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    GRAD_K,
    GRAD_V,
    GRAD_Q,
    DELTA,
    LOG2,
    MAXIMUM,
    VISIBLE,
    LISTS,
    SEED,
    BIAS,
    ALIBI_SLOPES,
    SEGMENTS,
    TILES,
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
    window_left: tl.int32,
    window_right: tl.int32,
    softcap: tl.float64,
    bias_batch: tl.int64,
    bias_head: tl.int64,
    bias_query: tl.int64,
    bias_key: tl.int64,
    slopes_batch: tl.int64,
    slopes_head: tl.int64,
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
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SCALE_SIGN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS_ALIGN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    GROUPED: tl.constexpr,
    MASKS_DIFFER: tl.constexpr,
    NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr,
):
    """One key tile of one key/value head: GRAD_K (b, hk, j, d) and GRAD_V (b, hk, j, dv), each where it is needed.

    GRAD_Q, unless None: the sum (b, h, i, d), contiguous, to which the tile adds its part of the gradient of q.

    MASKS_DIFFER: the heads of a group have key masks of their own: a key may be hidden from some and read by others.
    """
    FUSED: tl.constexpr = GRAD_Q is not None
    place = place_of_program(SEGMENTS, TILES, keys, queries, keys, heads // group, section, BLOCK_N, LAST_FIRST=False)
    first_key = place.first
    batch = place.batch
    kv_head = place.head
    queries = place.queries
    keys = place.keys
    q_heads = Heads(Q, q_batch, q_head, q_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, False)
    grad_heads = Heads(GRAD_OUT, grad_batch, grad_head, grad_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False)
    query_heads = QueryHeads(q_heads, grad_heads, QueryStatistics(DELTA, LOG2, MAXIMUM, None), GRAD_Q, heads)
    k_rows = Heads(K, k_batch, k_head, k_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, False).rows(
        batch, kv_head, None, place.first_key
    )
    v_rows = Heads(V, v_batch, v_head, v_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False).rows(
        batch, kv_head, None, place.first_key
    )
    planes = Planes(
        VISIBLE, LISTS, mask_stride_batch, mask_stride_head, n_query_blocks, n_key_blocks, SCHEDULE_M, SCHEDULE_N
    )
    masks = masks_of_call(
        planes, queries, keys, window_left, window_right, MASK, CAUSAL, LEFT, RIGHT, HIDES_KEYS=MASKS_DIFFER or FUSED
    )
    tile = Tile(BLOCK_M, BLOCK_N, PRECISION, ACCUMULATOR)

    # Keys that are hidden from all come as zeros, once; what gathers in their rows is cleared at the end.
    key = first_key + tl.arange(0, BLOCK_N)
    exists = key < keys
    shown = exists
    if not MASKS_DIFFER:
        shown = masks.of_head(batch, kv_head * group).key_shown(key)
    key_tile = _load_keys(k_rows, v_rows, first_key, shown, tile)
    scores = scores_of_call(
        scale, softcap, BIAS, (bias_batch, bias_head, bias_query, bias_key), ALIBI_SLOPES, (slopes_batch, slopes_head),
        queries, keys, SCALE_SIGN, SOFTCAP, BIAS_ALIGN, ACCUMULATOR,
    )  # fmt: skip
    dropout = dropout_by(SEED, keep_threshold, keep_scale, DROPOUT, ACCUMULATOR)
    grads = KeyGradients(
        zeros(BLOCK_N, HEAD0, HEAD1, ACCUMULATOR), zeros(BLOCK_N, VALUE0, VALUE1, ACCUMULATOR), NEEDS_K, NEEDS_V
    )
    if GROUPED:  # a loop over heads costs registers even when it runs once
        for member in tl.range(0, group, num_stages=1, disable_licm=FUSED):
            head = kv_head * group + member
            mask = masks.of_head(batch, head)
            keys_of_head = key_tile
            if MASKS_DIFFER:
                shown_here = mask.key_shown(key)
                if FUSED:
                    keys_of_head = _load_keys(k_rows, v_rows, first_key, shown_here, tile)
                else:
                    # Rows are the same for all heads: to load them anew would cost registers.
                    keys_of_head = KeyTile(first_key, shown_here, key_tile.k, key_tile.v)
            grads = _key_value_head(
                grads, keys_of_head, query_heads.of_head(place, head), mask, scores.of_head(place.sequence, head),
                dropout.of_head(place.sequence, head), tile, STAGES,
            )  # fmt: skip
    else:
        grads = _key_value_head(
            grads, key_tile, query_heads.of_head(place, kv_head), masks.of_head(batch, kv_head),
            scores.of_head(place.sequence, kv_head), dropout.of_head(place.sequence, kv_head), tile, STAGES,
        )  # fmt: skip
    # As tensors: with factors that are scalars, the assembler moves addresses about in the loops before.
    nothing = tl.zeros([1, 1], ACCUMULATOR)
    if NEEDS_K:
        grad_k_rows = Heads(GRAD_K, grad_k_batch, grad_k_head, grad_k_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, False).rows(
            batch, kv_head, None, place.first_key
        )
        grad_k_rows.store(first_key, clear_rows(scaled(grads.k, nothing + scores.magnitude), shown), exists, BLOCK_N)
    if NEEDS_V:
        grad_v_rows = Heads(
            GRAD_V, grad_v_batch, grad_v_head, grad_v_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False
        ).rows(batch, kv_head, None, place.first_key)
        grad_v_rows.store(first_key, clear_rows(scaled(grads.v, nothing + dropout.factor), shown), exists, BLOCK_N)


@triton.jit
def _query_gradient_tile(
    grad_q, q, grad, statistics, k_rows, v_rows, mask, scores, dropout, first_query, block, tile,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One key block for one query tile."""
    first_key = block * tile.BLOCK_N
    query = first_query + tl.arange(0, tile.BLOCK_M)
    key = first_key + tl.arange(0, tile.BLOCK_N)
    HIDDEN_WITHIN: tl.constexpr = mask.KIND != NONE or mask.left is not None or k_rows.first_row is not None
    readable = None
    if MASKED:
        shown, readable = mask.shown(first_query, first_key, tile.BLOCK_M, tile.BLOCK_N)
    # Neither in k nor in v: both enter a product whose zeros would not hide a NaN.
    k = tile.load(k_rows, first_key, readable, tile.BLOCK_N, MASKED, HIDDEN_WITHIN)
    applied = scores.apply(tile.inner_products(q, k))  # [BLOCK_M, BLOCK_N]
    seen = scores.add(applied, first_query, first_key, MASKED)
    if MASKED:
        seen = mask.hide(seen, query[:, None], key[None, :], shown, NEGATIVE_INFINITY)
    weights = statistics.weights(seen, scores.factor_log2, AXIS=1)
    v = tile.load(v_rows, first_key, readable, tile.BLOCK_N, MASKED, HIDDEN_WITHIN)
    grad_weights = tile.inner_products(grad, v)
    grad_weights = dropout.gradient(grad_weights, dropout.kept(first_query, first_key, tile.BLOCK_M, tile.BLOCK_N))
    grad_scores = scores.gradient(weights * (grad_weights - statistics.delta[:, None]), applied)
    return tile.accumulate(grad_q, grad_scores, k)


@kernel
def backward_q_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    GRAD_Q,
    DELTA,
    LOG2,
    MAXIMUM,
    VISIBLE,
    LISTS,
    SEED,
    BIAS,
    ALIBI_SLOPES,
    SEGMENTS,
    TILES,
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
    window_left: tl.int32,
    window_right: tl.int32,
    softcap: tl.float64,
    bias_batch: tl.int64,
    bias_head: tl.int64,
    bias_query: tl.int64,
    bias_key: tl.int64,
    slopes_batch: tl.int64,
    slopes_head: tl.int64,
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
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SCALE_SIGN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS_ALIGN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One query tile of one head: GRAD_Q (b, h, i, d).

    K and V are descriptors, if DESCRIPTORS, of blocks of BLOCK_N keys.
    """
    place = place_of_program(SEGMENTS, TILES, queries, queries, keys, heads, section, BLOCK_M)
    first_query = place.first
    batch = place.batch
    head = place.head
    queries = place.queries
    keys = place.keys
    kv_head = head // group
    q_heads = Heads(Q, q_batch, q_head, q_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, False)
    grad_heads = Heads(GRAD_OUT, grad_batch, grad_head, grad_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False)
    rows = QueryHeads(q_heads, grad_heads, QueryStatistics(DELTA, LOG2, MAXIMUM, None), None, heads).of_head(
        place, head
    )
    k_rows = Heads(K, k_batch, k_head, k_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, DESCRIPTORS).rows(
        batch, kv_head, None, place.first_key
    )
    v_rows = Heads(V, v_batch, v_head, v_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, DESCRIPTORS).rows(
        batch, kv_head, None, place.first_key
    )
    grad_q_rows = Heads(GRAD_Q, grad_q_batch, grad_q_head, grad_q_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, False).rows(
        batch, head, None, place.first_query
    )
    planes = Planes(
        VISIBLE, LISTS, mask_stride_batch, mask_stride_head, n_query_blocks, n_key_blocks, SCHEDULE_M, SCHEDULE_N
    )
    masks = masks_of_call(planes, queries, keys, window_left, window_right, MASK, CAUSAL, LEFT, RIGHT, HIDES_KEYS=True)
    mask = masks.of_head(batch, head)
    scores = scores_of_call(
        scale, softcap, BIAS, (bias_batch, bias_head, bias_query, bias_key), ALIBI_SLOPES, (slopes_batch, slopes_head),
        queries, keys, SCALE_SIGN, SOFTCAP, BIAS_ALIGN, ACCUMULATOR,
    ).of_head(place.sequence, head)  # fmt: skip
    dropout = dropout_by(SEED, keep_threshold, keep_scale, DROPOUT, ACCUMULATOR).of_head(place.sequence, head)
    tile = Tile(BLOCK_M, BLOCK_N, PRECISION, ACCUMULATOR)

    query = first_query + tl.arange(0, BLOCK_M)
    exists = query < queries
    statistics = rows.statistics.load(query)
    # NaN in a dead query's q stays in its scores, all of which are hidden; in the gradient it must not be read.
    q = tile.load(rows.q, first_query, exists, BLOCK_M, MASKED=True)
    grad = tile.load(rows.grad_out, first_query, statistics.alive(), BLOCK_M, MASKED=True)
    grad_q = zeros(BLOCK_M, HEAD0, HEAD1, ACCUMULATOR)
    walk = mask.walk_over_keys(first_query, BLOCK_M, BLOCK_N)
    for run in tl.range(0, walk.run_count(), num_stages=1):
        start, end = walk.run_bounds(run)
        for block in tl.range(start, end, num_stages=STAGES):
            grad_q = _query_gradient_tile(
                grad_q, q, grad, statistics, k_rows, v_rows, mask, scores, dropout, first_query, block, tile,
                MASKED=False,
            )  # fmt: skip
    for index in tl.range(0, walk.masked_count(), num_stages=1):
        block = walk.masked_block(index)
        grad_q = _query_gradient_tile(
            grad_q, q, grad, statistics, k_rows, v_rows, mask, scores, dropout, first_query, block, tile,
            MASKED=True,
        )  # fmt: skip
    grad_q = clear_rows(scaled(grad_q, scores.magnitude), statistics.alive())
    grad_q_rows.store(first_query, grad_q, exists, BLOCK_M)


def empty_gradients(
    inputs: Sequence[Tensor | None], spec: AttentionSpec, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Where a backward writes the gradients that are `needed` of its inputs: q, k and v and, where there is either, the
    bias and the sinks."""
    strides = [readable(tensor).stride() for tensor in inputs[:3]]
    layouts: list[HeadsLayout | None] = [*gradient_layouts(spec, strides, needed[:3])]
    for tensor, need in zip(inputs[3:], needed[3:], strict=True):
        layouts.append((tensor.shape, contiguous_strides(tensor.shape)) if need else None)
    return tuple(
        None if layout is None else tensor.new_empty_strided(*layout)
        for tensor, layout in zip(inputs, layouts, strict=True)
    )


def gradient_layouts(
    spec: AttentionSpec, strides: Sequence[Strides], needed: Sequence[bool]
) -> tuple[HeadsLayout | None, ...]:
    """Sizes and strides of the gradients that are `needed`, of q, k and v with these strides."""
    of_queries, of_keys = query_sizes(spec), key_sizes(spec)
    heads = (of_queries, spec.heads), (of_keys, spec.kv_heads), (of_keys, spec.kv_heads)
    dims = spec.head_dim, spec.head_dim, spec.value_dim
    return tuple(
        layout_like_heads(sizes, of_input, n_heads, dim) if need else None
        for (sizes, n_heads), of_input, dim, need in zip(heads, strides, dims, needed, strict=True)
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
    """The gradients of q, k and v that are `needed`, from those of out `(b, h, i, dv)` and lse `(b, h, i)`; with five
    that may be, of the bias and the sinks too.

    Everything else is what the forward took and gave: `kept` says of each query what `lse` rounds. A gradient that is
    None counts as 0.

    With a tile for the fused backward, one kernel computes what takes two kernels else, where the gradients of q and of
    k or v are needed. Beside them it takes memory for a second gradient of q, `(b, h, i, d)` in float32 (float64 for
    float64), and which bits that of q comes to changes from run to run.
    """
    q, k, v, _, _, bias, slopes, sinks, *_ = operands
    if spec.dtype == torch.float64 and any(x is not None and x.dtype != spec.dtype for x in (bias, slopes, sinks)):
        given = grad_out, grad_lse, readable_operands(operands), out, lse, kept
        grads = attention_backward(*given, spec, tiles, needed)
        pairs = zip((bias, sinks), grads[3:], strict=False)
        return *grads[:3], *(grad if grad is None else grad.to(x.dtype) for x, grad in pairs)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    # What autograd saved may come back with other strides: hooks on saved tensors give what they like.
    strides = q.stride(), k.stride(), v.stride(), grad_out.stride(), out.stride()
    planes = 0 if kept.visible is None else kept.visible.shape[0]
    of_others = (None, None) if bias is slopes is None else Layouts.of(operands)[5:7]
    dtype = None if slopes is None else slopes.dtype
    backward = _prepare(spec, tiles, tuple(needed), planes, *strides, *of_others, dtype)
    if backward is not None:
        return backward.run(grad_out, grad_lse, operands, out, lse, kept)
    operands = readable_operands(operands)
    given = readable(grad_out), grad_lse, operands, readable(out), lse, kept
    return attention_backward(*given, spec, tiles, needed)


@dataclass(frozen=True, eq=False)
class Backward:
    """The backward of calls that differ in nothing but what their tensors hold: it allocates and launches."""

    spec: AttentionSpec
    tiles: Tiles
    grads: tuple[HeadsLayout | None, ...]  # of q, k and v
    by_keys: tuple[tuple[Prepared, bool, bool], ...]  # and which of the gradients of k and v a launch makes
    fused: bool
    by_queries: tuple[Prepared, Prepared] | None  # where k and v do not begin where bulk copies can read, and where
    of_others: tuple[bool, ...]  # whether the gradients of the bias and of the sinks are needed; empty without them

    def run(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        operands: Operands,
        out: Tensor,
        lse: Tensor,
        kept: Kept,
    ) -> tuple[Tensor | None, ...]:
        """As `attention_backward`."""
        q, k, v, _, seed, bias, slopes, sinks, segments, _ = operands
        schedule = kept.schedule
        # What is allocated here is aligned. Where something else is not, each launch sees for itself.
        aligned = begin_aligned(q, k, v, grad_out, schedule.visible, schedule.lists, seed, bias, slopes) or None
        statistics = prepare_statistics(grad_out, grad_lse, out, kept, self.spec, self.tiles)
        grad_q, grad_k, grad_v = [None if layout is None else q.new_empty_strided(*layout) for layout in self.grads]
        inputs = q, k, v, grad_out
        accumulator = kept.statistics.dtype
        sum_q = torch.zeros(grad_q.shape, dtype=accumulator, device=q.device) if self.fused else None
        by_keys = transposed_lists(schedule) if self.by_keys else None
        tile = self.tiles.backward_fused if self.fused else self.tiles.backward_kv
        sequences: Sequence[Tensor | None] = (None, None)
        if segments is not None:
            sequences = packed_tiles(segments, self.spec, tile.block_n, of_keys=True)
        for prepared, makes_k, makes_v in self.by_keys:
            made = grad_k if makes_k else None, grad_v if makes_v else None, sum_q
            read = *statistics, schedule.visible, by_keys, seed, bias, slopes, *sequences
            launch(prepared, *inputs, *made, *read, aligned=aligned)
        if self.fused:
            torch.mul(sum_q, self.spec.scale * (scale_sign(self.spec) or 1), out=grad_q)
        if self.by_queries is not None:
            prepared = self.by_queries[aligned or begin_aligned(k, v)]
            if segments is not None:
                sequences = packed_tiles(segments, self.spec, self.tiles.backward_q.block_m, of_keys=False)
            read = *statistics, schedule.visible, schedule.lists, seed, bias, slopes, *sequences
            launch(prepared, *inputs, grad_q, *read, aligned=aligned)
        if self.of_others == ():
            return grad_q, grad_k, grad_v
        of_bias, of_sinks = self.of_others
        grad_bias = None
        if of_bias:
            grad_bias = bias_gradient(grad_out, operands, statistics, schedule, self.spec, self.tiles)
        grad_sinks = sinks_gradient(sinks, lse, statistics.delta) if of_sinks else None
        return grad_q, grad_k, grad_v, grad_bias, grad_sinks


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of the sinks `(h,)`, by their weights and the `delta` of each query."""
    weights = torch.exp(sinks[:, None] - lse).masked_fill_(lse == -torch.inf, 0.0)  # (b, h, i)
    return -(weights * delta[..., : lse.shape[2]]).sum((0, 2)).to(sinks.dtype)


@lru_cache(maxsize=CALLS_KEPT)
def _prepare(
    spec: AttentionSpec,
    tiles: Tiles,
    needed: tuple[bool, ...],
    planes: int,
    q: Strides,
    k: Strides,
    v: Strides,
    grad_out: Strides,
    out: Strides,
    bias: Strides | None,
    slopes: Strides | None,
    slopes_dtype: torch.dtype | None,
) -> Backward | None:
    """None where kernels cannot read a tensor: then of copies."""
    dims = spec.head_dim, spec.head_dim, spec.value_dim, spec.value_dim, spec.value_dim
    if not all(map(is_readable, (q, k, v, grad_out, out), dims)):
        return None
    spec = scheduled_spec(spec)
    grads = gradient_layouts(spec, (q, k, v), needed[:3])
    of_q, of_k, of_v = (None if layout is None else layout[1] for layout in grads)
    by_keys = of_k is not None or of_v is not None
    fused = by_keys and of_q is not None and tiles.backward_fused is not None
    strides = q, k, v, grad_out, bias, slopes, slopes_dtype
    apart = tiles.backward_kv.apart and not fused
    made = [steps for steps in (((of_k, None), (None, of_v)) if apart else ((of_k, of_v),)) if steps != (None, None)]
    return Backward(
        spec,
        tiles,
        grads,
        tuple(
            (_prepare_kv(spec, tiles, fused, planes, *strides, *steps), steps[0] is not None, steps[1] is not None)
            for steps in made
        ),
        fused,
        None
        if of_q is None or fused
        else tuple(_prepare_q(spec, tiles, planes, at_hand, *strides, of_q) for at_hand in (False, True)),
        needed[3:],
    )


# The launches for tensors with these strides, and slopes of this dtype; `at_hand` if k and v begin where bulk copies
# can read.


@lru_cache(maxsize=CALLS_KEPT)
def _prepare_kv(
    spec: AttentionSpec,
    tiles: Tiles,
    fused: bool,
    planes: int,
    q: Strides,
    k: Strides,
    v: Strides,
    grad_out: Strides,
    bias: Strides | None,
    slopes: Strides | None,
    slopes_dtype: torch.dtype | None,
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
        spec.batch * spec.kv_heads * tile_count(spec, spec.keys, tile.block_n),
        (*call_arguments(spec, planes, tiles), key_section(spec), *strides, *score_numbers(spec, bias, slopes)),
        dict(
            ALIGN=align,
            GROUPED=spec.group > 1,
            MASKS_DIFFER=spec.group > 1 and spec.mask == MaskKind.KEY and spec.mask_per_head,
            NEEDS_K=grad_k is not None,
            NEEDS_V=grad_v is not None,
            BIAS_ALIGN=bias_strides(spec, bias)[0],
            **call_choices(spec, tile, tiles),
        ),
        tile.num_warps,
        tile.num_stages,
    )


@lru_cache(maxsize=CALLS_KEPT)
def _prepare_q(
    spec: AttentionSpec,
    tiles: Tiles,
    planes: int,
    at_hand: bool,
    q: Strides,
    k: Strides,
    v: Strides,
    grad_out: Strides,
    bias: Strides | None,
    slopes: Strides | None,
    slopes_dtype: torch.dtype | None,
    grad_q: Strides,
) -> Prepared:
    of_queries, of_keys = query_sizes(spec), key_sizes(spec)
    align, strides = aligned_strides(
        spec.dtype, (of_queries, q), (of_keys, k), (of_keys, v), (of_queries, grad_out), (of_queries, grad_q)
    )
    tile, hand_over = reading_keys(spec, tiles.backward_q, at_hand, k, v)
    return Prepared(
        backward_q_kernel,
        spec.batch * spec.heads * tile_count(spec, spec.queries, tile.block_m),
        (*call_arguments(spec, planes, tiles), query_section(spec), *strides, *score_numbers(spec, bias, slopes)),
        dict(
            ALIGN=align,
            DESCRIPTORS=tile.descriptors,
            BIAS_ALIGN=bias_strides(spec, bias)[0],
            **call_choices(spec, tile, tiles),
        ),
        tile.num_warps,
        tile.num_stages,
        hand_over=hand_over,
    )
