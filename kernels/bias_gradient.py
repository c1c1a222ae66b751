"""The gradient of a bias, in the bias's own shape: one program for a tile of it, which goes in order through all that
the bias was broadcast over, computes the gradient of the scores anew, and sums it in the accumulator's dtype.

Nothing is added by two programs, so that it is bitwise repeatable, and no array is larger than the bias. Where a bias
has few tiles, several programs share what one was broadcast over, and each writes a sum of its own.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attend.kernels.compat import kernel
from flash_attend.kernels.configs import Tiles, bias_tile
from flash_attend.kernels.dropout import dropout_by
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.mask import masks_of_call
from flash_attend.kernels.operands import (
    aligned_strides,
    bias_strides,
    call_arguments,
    call_choices,
    key_sizes,
    query_sizes,
    score_numbers,
)
from flash_attend.kernels.rows import Heads
from flash_attend.kernels.schedule import Planes, Schedule
from flash_attend.kernels.scores import scores_of_call
from flash_attend.kernels.softmax import NEGATIVE_INFINITY
from flash_attend.kernels.statistics import QueryStatistics, Statistics
from flash_attend.kernels.tiles import Tile
from flash_attend.operands import Layouts, Operands, Strides
from flash_attend.spec import CALLS_KEPT, AttentionSpec
from flash_attend.target import DeviceTarget

__all__ = ["bias_gradient"]

PROGRAMS_PER_MULTIPROCESSOR = 4  # that a part should have at least


@triton.jit
def _score_gradients(
    q, grad, statistics, k_rows, v_rows, mask, scores, dropout, first_query, first_key, tile
):  # fmt: skip
    """The gradients of the scores of a block [BLOCK_M, BLOCK_N], 0 for hidden pairs."""
    query = first_query + tl.arange(0, tile.BLOCK_M)
    key = first_key + tl.arange(0, tile.BLOCK_N)
    shown, readable = mask.shown(first_query, first_key, tile.BLOCK_M, tile.BLOCK_N)
    k = tile.load(k_rows, first_key, readable, tile.BLOCK_N, MASKED=True)
    v = tile.load(v_rows, first_key, readable, tile.BLOCK_N, MASKED=True)
    seen = scores.add(scores.apply(tile.inner_products(q, k)), first_query, first_key, MASKED=True)
    seen = mask.hide(seen, query[:, None], key[None, :], shown, NEGATIVE_INFINITY)
    weights = statistics.weights(seen, scores.factor_log2, AXIS=1)
    kept = dropout.kept(first_query, first_key, tile.BLOCK_M, tile.BLOCK_N)
    grad_weights = dropout.gradient(tile.inner_products(grad, v), kept)
    # A weight of 0 does not hide the NaN that v may hold where others see it.
    return tl.where(seen == NEGATIVE_INFINITY, 0.0, weights * (grad_weights - statistics.delta[:, None]))


@kernel
def bias_gradient_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    GRAD_BIAS,
    DELTA,
    LOG2,
    MAXIMUM,
    VISIBLE,
    LISTS,
    SEED,
    BIAS,
    ALIBI_SLOPES,
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
    batches: tl.int32,
    splits: tl.int32,
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
    BY_BATCH: tl.constexpr,
    BY_HEAD: tl.constexpr,
    BY_QUERY: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """One tile of GRAD_BIAS (splits, b|1, h|1, i|1, j|1), contiguous: of each split, the sum over so many of the batch
    entries and heads that the bias does not vary BY."""
    query_tiles = tl.cdiv(queries, BLOCK_M)
    key_tiles = tl.cdiv(keys, BLOCK_N)
    n_batches = batches if BY_BATCH else 1
    n_heads = heads if BY_HEAD else 1
    tiles_m = query_tiles if BY_QUERY else 1
    tiles_n = key_tiles if BY_KEY else 1
    key_tile = tl.program_id(0) % tiles_n
    rest = tl.program_id(0) // tiles_n
    query_tile = rest % tiles_m
    plane = rest // tiles_m  # of all splits
    own_head = plane % n_heads
    own_batch = plane // n_heads % n_batches
    split = plane // n_heads // n_batches
    other_heads = 1 if BY_HEAD else heads
    members = other_heads * (1 if BY_BATCH else batches)
    members_per_split = tl.cdiv(members, splits)

    planes = Planes(
        VISIBLE, LISTS, mask_stride_batch, mask_stride_head, n_query_blocks, n_key_blocks, SCHEDULE_M, SCHEDULE_N
    )
    masks = masks_of_call(planes, queries, keys, window_left, window_right, MASK, CAUSAL, LEFT, RIGHT, HIDES_KEYS=True)
    scores = scores_of_call(
        scale, softcap, BIAS, (bias_batch, bias_head, bias_query, bias_key), ALIBI_SLOPES, (slopes_batch, slopes_head),
        queries, keys, SCALE_SIGN, SOFTCAP, BIAS_ALIGN, ACCUMULATOR,
    )  # fmt: skip
    dropout = dropout_by(SEED, keep_threshold, keep_scale, DROPOUT, ACCUMULATOR)
    tile = Tile(BLOCK_M, BLOCK_N, PRECISION, ACCUMULATOR)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
    first_member = split * members_per_split
    for member in tl.range(first_member, tl.minimum(first_member + members_per_split, members), num_stages=1):
        batch = own_batch if BY_BATCH else member // other_heads
        head = own_head if BY_HEAD else member % other_heads
        q_rows = Heads(Q, q_batch, q_head, q_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, False).rows(batch, head)
        k_rows = Heads(K, k_batch, k_head, k_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, False).rows(batch, head // group)
        v_rows = Heads(V, v_batch, v_head, v_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False).rows(batch, head // group)
        grad_rows = Heads(GRAD_OUT, grad_batch, grad_head, grad_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False).rows(
            batch, head
        )
        index = batch.to(tl.int64) * heads + head
        of_head = QueryStatistics(DELTA, LOG2, MAXIMUM, None).of_head(index, queries)
        mask = masks.of_head(batch, head)
        first_tile = query_tile if BY_QUERY else 0
        for query_block in tl.range(first_tile, first_tile + (1 if BY_QUERY else query_tiles), num_stages=1):
            first_query = query_block * BLOCK_M
            query = first_query + tl.arange(0, BLOCK_M)
            statistics = of_head.load(query)
            begin, _, _, end = mask.key_blocks(first_query, BLOCK_M, BLOCK_N)
            if BY_KEY:
                begin = tl.maximum(key_tile, begin)
                end = tl.minimum(key_tile + 1, end)
            # What a dead query holds may be anything: it is not read.
            q = tile.load(q_rows, first_query, statistics.alive(), BLOCK_M, MASKED=True)
            grad = tile.load(grad_rows, first_query, statistics.alive(), BLOCK_M, MASKED=True)
            for block in tl.range(begin, end, num_stages=1):
                first_key = block * BLOCK_N
                total += _score_gradients(
                    q, grad, statistics, k_rows, v_rows, mask, scores.of_head(batch, head),
                    dropout.of_head(batch, head), first_query, first_key, tile,
                )  # fmt: skip

    query = query_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    key = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    size_m = queries if BY_QUERY else 1
    size_n = keys if BY_KEY else 1
    start = GRAD_BIAS + plane.to(tl.int64) * size_m * size_n
    if not BY_QUERY:
        total = tl.sum(total, 0, keep_dims=True)  # [1, BLOCK_N]
        query = tl.zeros([1], tl.int32)
    if not BY_KEY:
        total = tl.sum(total, 1, keep_dims=True)
        key = tl.zeros([1], tl.int32)
    at = start + query.to(tl.int64)[:, None] * size_n + key[None, :]
    exists = (query < size_m)[:, None] & (key < size_n)[None, :]
    tl.store(at, total.to(GRAD_BIAS.dtype.element_ty), mask=exists)


def bias_gradient(
    grad_out: Tensor, operands: Operands, statistics: Statistics, schedule: Schedule, spec: AttentionSpec, tiles: Tiles
) -> Tensor:
    """The gradient of the bias `(b|1, h|1, i|1, j|1)`, in its shape and dtype, from that of out and what a backward
    reads of each query."""
    q, k, v, _, seed, bias, slopes, *_ = operands
    assert bias is not None
    strides = q.stride(), k.stride(), v.stride(), grad_out.stride(), bias.stride()
    of_slopes = None if slopes is None else Layouts.of(operands).alibi_slopes
    splits = _splits(spec, tiles, DeviceTarget.of(q.device).multiprocessors or 1)
    slopes_dtype = None if slopes is None else slopes.dtype
    prepared = _prepare(spec, tiles, schedule.planes, splits, *strides, of_slopes, slopes_dtype)
    dtype = bias.dtype if splits == 1 else spec.accumulator_dtype
    found = bias.new_empty((splits, *bias.shape), dtype=dtype)
    read = *statistics, schedule.visible, schedule.lists, seed, bias, slopes
    launch(prepared, q, k, v, grad_out, found, *read)
    if not found.numel() or not prepared.programs:
        return found.new_zeros(bias.shape, dtype=bias.dtype)
    return found[0] if splits == 1 else found.sum(0).to(bias.dtype)


def _tiles_of(spec: AttentionSpec, tiles: Tiles) -> int:
    """How many tiles the bias has."""
    by_batch, by_head, by_query, by_key, _ = spec.bias
    tile = bias_tile(spec, tiles)
    rows = triton.cdiv(spec.queries, tile.block_m) if by_query else 1
    columns = triton.cdiv(spec.keys, tile.block_n) if by_key else 1
    return (spec.batch if by_batch else 1) * (spec.heads if by_head else 1) * rows * columns


def _splits(spec: AttentionSpec, tiles: Tiles, multiprocessors: int) -> int:
    """How many programs share what a tile of the bias was broadcast over."""
    by_batch, by_head, *_ = spec.bias
    members = (1 if by_batch else spec.batch) * (1 if by_head else spec.heads)
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // max(_tiles_of(spec, tiles), 1)
    return max(1, min(members, wanted))


@lru_cache(maxsize=CALLS_KEPT)
def _prepare(
    spec: AttentionSpec,
    tiles: Tiles,
    planes: int,
    splits: int,
    q: Strides,
    k: Strides,
    v: Strides,
    grad_out: Strides,
    bias: Strides,
    slopes: Strides | None,
    slopes_dtype: torch.dtype | None,
) -> Prepared:
    """The launch for tensors with these strides, and slopes of this dtype."""
    of_queries, of_keys = query_sizes(spec), key_sizes(spec)
    align, strides = aligned_strides(spec.dtype, (of_queries, q), (of_keys, k), (of_keys, v), (of_queries, grad_out))
    by_batch, by_head, by_query, by_key, _ = spec.bias
    tile = bias_tile(spec, tiles)
    return Prepared(
        bias_gradient_kernel,
        splits * _tiles_of(spec, tiles),
        (*call_arguments(spec, planes, tiles), spec.batch, splits, *strides, *score_numbers(spec, bias, slopes)),
        dict(
            ALIGN=align,
            BIAS_ALIGN=bias_strides(spec, bias)[0],
            BY_BATCH=by_batch,
            BY_HEAD=by_head,
            BY_QUERY=by_query,
            BY_KEY=by_key,
            **call_choices(spec, tile, tiles),
        ),
        tile.num_warps,
        tile.num_stages,
    )
