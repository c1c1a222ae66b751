"""Forward mode: out and LSE with their tangents, in one pass.

With s' the tangent of the scores, p the softmax, and z what dropout makes of a weight of 1 (1 without it):

    lse' = sum(p s')        out' = sum(z p s' v) + sum(z p v') - lse' out

The sums are taken as the softmax is: online, relative to the largest score so far, and normalised at the end. A sink is
one more key, whose v is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attend.kernels.compat import aggregate, kernel
from flash_attend.kernels.configs import SMALLEST_PART, Tiles
from flash_attend.kernels.descriptors import reading_keys
from flash_attend.kernels.dropout import dropout_by
from flash_attend.kernels.forward import finish, statistics_layout
from flash_attend.kernels.launch import Prepared, begin_aligned, launch
from flash_attend.kernels.lengths import packed_tiles, place_of_program, tile_count
from flash_attend.kernels.mask import NONE, masks_of_call
from flash_attend.kernels.operands import (
    HeadsLayout,
    aligned_strides,
    bias_strides,
    call_arguments,
    call_choices,
    key_sizes,
    layout_like_heads,
    lse_layout,
    query_section,
    query_sizes,
    readable,
    readable_operands,
    score_numbers,
)
from flash_attend.kernels.rows import Heads
from flash_attend.kernels.schedule import Planes, Schedule, plan_schedule, scheduled_sizes, scheduled_spec
from flash_attend.kernels.scores import LOG2E, MINUS_INFINITY, Bias, scores_of_call
from flash_attend.kernels.softmax import NEGATIVE_INFINITY, empty_softmax
from flash_attend.kernels.statistics import Kept, is_apart, is_exact
from flash_attend.kernels.tiles import Tile, added, clear_rows, scaled, zeros
from flash_attend.operands import Layouts, Operands, Strides, Tangents, broadcast_strides
from flash_attend.spec import CALLS_KEPT, AttentionSpec

__all__ = ["attention_tangents"]


@aggregate
class KeyRows:
    """The rows of k and v of one head, or those of their tangents, each None without one."""

    k: object
    v: object


@aggregate
class Sums:
    """What is summed over keys beside the softmax, relative to its maximum."""

    total: object  # [BLOCK_M, dv], of weights times v
    tangent: object  # [BLOCK_M, dv], of its tangent, but for what the normaliser's has to do with it
    scores: object  # [BLOCK_M], of weights times tangents of scores; None where no score has one


@triton.jit
def _products_tangent(q, q_tangent, k, k_tangent, tile):
    """The tangent of q k^T, [BLOCK_M, BLOCK_N], of an operand or both."""
    if k_tangent is None:
        return tile.inner_products(q_tangent, k)
    elif q_tangent is None:
        return tile.inner_products(q, k_tangent)
    else:
        return tile.inner_products(q, k_tangent, tile.inner_products(q_tangent, k))


@triton.jit
def _tile(
    sums, softmax, q, q_tangent, rows, tangent_rows, mask, scores, bias_tangent, dropout, first_query, block, tile,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One key block for one tile of queries."""
    first_key = block * tile.BLOCK_N
    query = first_query + tl.arange(0, tile.BLOCK_M)
    key = first_key + tl.arange(0, tile.BLOCK_N)
    # Other sequences follow those that are packed.
    HIDDEN_WITHIN: tl.constexpr = mask.KIND != NONE or mask.left is not None or rows.k.first_row is not None
    OF_PRODUCTS: tl.constexpr = q_tangent is not None or tangent_rows.k is not None
    readable = None
    if MASKED:
        shown, readable = mask.shown(first_query, first_key, tile.BLOCK_M, tile.BLOCK_N)
    # NaN in a hidden key's k or in its tangent stays in its own column and is hidden there; in v it must not be read.
    k = tile.load(rows.k, first_key, key < mask.keys, tile.BLOCK_N, MASKED, WITHIN=False)
    applied = scores.apply(tile.inner_products(q, k))  # [BLOCK_M, BLOCK_N]
    seen = scores.add(applied, first_query, first_key, MASKED)
    if MASKED:
        seen = mask.hide(seen, query[:, None], key[None, :], shown, NEGATIVE_INFINITY)
    weights, correction, softmax = softmax.step(seen, scores.factor_log2)
    kept = dropout.kept(first_query, first_key, tile.BLOCK_M, tile.BLOCK_N)
    tangent = scaled(sums.tangent, correction[:, None])
    of_scores = None
    if sums.scores is not None:
        if OF_PRODUCTS:
            k_tangent = None
            if tangent_rows.k is not None:
                k_tangent = tile.load(tangent_rows.k, first_key, key < mask.keys, tile.BLOCK_N, MASKED, WITHIN=False)
            changes = scores.tangent(_products_tangent(q, q_tangent, k, k_tangent, tile), applied)
        if bias_tangent is not None:
            of_bias = bias_tangent.load(first_query, first_key, tile.BLOCK_M, tile.BLOCK_N, MASKED, TRANSPOSED=False)
            changes = changes + of_bias if OF_PRODUCTS else of_bias
        if MASKED:
            changes = mask.hide(changes, query[:, None], key[None, :], shown, 0.0)
        if scores.bias is not None:
            changes = tl.where(seen == MINUS_INFINITY, 0.0, changes)  # it hides, whatever they are
        changes = weights * changes
        of_scores = sums.scores * correction + tl.sum(changes, 1)
        changes = dropout.drop(changes, kept)
    weights = dropout.drop(weights, kept)
    v = tile.load(rows.v, first_key, readable, tile.BLOCK_N, MASKED, HIDDEN_WITHIN)
    if sums.scores is not None:
        tangent = tile.accumulate(tangent, changes, v)
    if tangent_rows.v is not None:
        v_tangent = tile.load(tangent_rows.v, first_key, readable, tile.BLOCK_N, MASKED, HIDDEN_WITHIN)
        tangent = tile.accumulate(tangent, weights, v_tangent)
    total = tile.accumulate(scaled(sums.total, correction[:, None]), weights, v)
    return Sums(total, tangent, of_scores), softmax


@kernel
def tangents_kernel(
    Q,
    K,
    V,
    K_TANGENT,
    V_TANGENT,
    Q_TANGENT,
    OUT,
    LSE,
    STATISTICS,
    OUT_TANGENT,
    LSE_TANGENT,
    VISIBLE,
    LISTS,
    SEED,
    BIAS,
    ALIBI_SLOPES,
    SINKS,
    BIAS_TANGENT,
    SINKS_TANGENT,
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
    k_tangent_batch: tl.int64,
    k_tangent_head: tl.int64,
    k_tangent_row: tl.int64,
    v_tangent_batch: tl.int64,
    v_tangent_head: tl.int64,
    v_tangent_row: tl.int64,
    q_tangent_batch: tl.int64,
    q_tangent_head: tl.int64,
    q_tangent_row: tl.int64,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int64,
    window_left: tl.int32,
    window_right: tl.int32,
    softcap: tl.float64,
    bias_batch: tl.int64,
    bias_head: tl.int64,
    bias_query: tl.int64,
    bias_key: tl.int64,
    slopes_batch: tl.int64,
    slopes_head: tl.int64,
    bias_tangent_batch: tl.int64,
    bias_tangent_head: tl.int64,
    bias_tangent_query: tl.int64,
    bias_tangent_key: tl.int64,
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
    BIAS_TANGENT_ALIGN: tl.constexpr,
    EXACT: tl.constexpr,
    APART: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One query tile of one head: what `forward_kernel` writes, and OUT_TANGENT, whose strides are those of OUT, and
    LSE_TANGENT (b, h, i), contiguous. The tangents of operands that have none are None. If DESCRIPTORS, those of k and
    v are as k and v are."""
    place = place_of_program(SEGMENTS, TILES, queries, queries, keys, heads, section, BLOCK_M)
    if SEGMENTS is not None:
        queries = place.queries
        keys = place.keys
    first_query = place.first
    batch = place.batch
    head = place.head
    kv_head = head // group
    q_rows = Heads(Q, q_batch, q_head, q_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, False).rows(
        batch, head, None, place.first_query
    )
    k_rows = Heads(K, k_batch, k_head, k_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, DESCRIPTORS).rows(
        batch, kv_head, None, place.first_key
    )
    v_rows = Heads(V, v_batch, v_head, v_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, DESCRIPTORS).rows(
        batch, kv_head, None, place.first_key
    )
    k_tangent_rows = None
    if K_TANGENT is not None:
        k_tangent_rows = Heads(
            K_TANGENT, k_tangent_batch, k_tangent_head, k_tangent_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, DESCRIPTORS
        ).rows(batch, kv_head, None, place.first_key)
    v_tangent_rows = None
    if V_TANGENT is not None:
        v_tangent_rows = Heads(
            V_TANGENT, v_tangent_batch, v_tangent_head, v_tangent_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, DESCRIPTORS
        ).rows(batch, kv_head, None, place.first_key)
    rows = KeyRows(k_rows, v_rows)
    tangent_rows = KeyRows(k_tangent_rows, v_tangent_rows)
    planes = Planes(
        VISIBLE, LISTS, mask_stride_batch, mask_stride_head, n_query_blocks, n_key_blocks, SCHEDULE_M, SCHEDULE_N
    )
    masks = masks_of_call(planes, queries, keys, window_left, window_right, MASK, CAUSAL, LEFT, RIGHT, HIDES_KEYS=True)
    mask = masks.of_head(batch, head)
    scores = scores_of_call(
        scale, softcap, BIAS, (bias_batch, bias_head, bias_query, bias_key), ALIBI_SLOPES, (slopes_batch, slopes_head),
        queries, keys, SCALE_SIGN, SOFTCAP, BIAS_ALIGN, ACCUMULATOR,
    ).of_head(place.sequence, head)  # fmt: skip
    bias_tangent = None
    if BIAS_TANGENT is not None:
        bias_tangent = Bias(
            BIAS_TANGENT, bias_tangent_batch, bias_tangent_head, bias_tangent_query, bias_tangent_key, queries, keys,
            None, BIAS_TANGENT_ALIGN, ACCUMULATOR,
        ).of_head(place.sequence, head)  # fmt: skip
    dropout = dropout_by(SEED, keep_threshold, keep_scale, DROPOUT, ACCUMULATOR).of_head(place.sequence, head)
    tile = Tile(BLOCK_M, BLOCK_N, PRECISION, ACCUMULATOR)

    query = first_query + tl.arange(0, BLOCK_M)
    exists = query < queries
    q = tile.load(q_rows, first_query, exists, BLOCK_M, MASKED=True)
    q_tangent = None
    if Q_TANGENT is not None:
        q_tangent_rows = Heads(
            Q_TANGENT, q_tangent_batch, q_tangent_head, q_tangent_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, False
        ).rows(batch, head, None, place.first_query)
        q_tangent = tile.load(q_tangent_rows, first_query, exists, BLOCK_M, MASKED=True)
    of_scores = None
    if Q_TANGENT is not None or K_TANGENT is not None or BIAS_TANGENT is not None:
        of_scores = tl.zeros([BLOCK_M], ACCUMULATOR)
    nothing = zeros(BLOCK_M, VALUE0, VALUE1, ACCUMULATOR)
    sums = Sums(nothing, nothing, of_scores)
    softmax = empty_softmax(BLOCK_M, ACCUMULATOR, EXACT)
    walk = mask.walk_over_keys(first_query, BLOCK_M, BLOCK_N)
    for run in tl.range(0, walk.run_count(), num_stages=1):
        start, end = walk.run_bounds(run)
        for block in tl.range(start, end, num_stages=STAGES):
            sums, softmax = _tile(
                sums, softmax, q, q_tangent, rows, tangent_rows, mask, scores, bias_tangent, dropout, first_query,
                block, tile, MASKED=False,
            )  # fmt: skip
    for index in tl.range(0, walk.masked_count(), num_stages=1):
        block = walk.masked_block(index)
        sums, softmax = _tile(
            sums, softmax, q, q_tangent, rows, tangent_rows, mask, scores, bias_tangent, dropout, first_query, block,
            tile, MASKED=True,
        )  # fmt: skip

    alive = mask.alive(query, first_query, softmax.sum == 0.0, scores.bias, first_query)
    index = place.first_number(batch.to(tl.int64) * heads + head) + query
    keep_factor = dropout.factor if DROPOUT else None
    out_rows = Heads(OUT, out_batch, out_head, out_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False).rows(
        batch, head, None, place.first_query
    )
    out, normaliser, lse = finish(
        sums.total, softmax, alive, scores.factor_log2, keep_factor, SINKS, head, first_query, exists, out_rows, LSE,
        STATISTICS, index, APART,
    )  # fmt: skip
    lse_tangent = tl.zeros([BLOCK_M], ACCUMULATOR)
    if sums.scores is not None:
        lse_tangent = sums.scores * normaliser
    if SINKS_TANGENT is not None:
        sink_weight = tl.math.exp2((tl.load(SINKS + head).to(ACCUMULATOR) - lse) * LOG2E)
        lse_tangent += sink_weight * tl.load(SINKS_TANGENT + head).to(ACCUMULATOR)
    lse_tangent = tl.where(alive, lse_tangent, 0.0)
    tl.store(LSE_TANGENT + index, lse_tangent, mask=exists)
    if DROPOUT:
        normaliser *= dropout.factor
    tangent = added(scaled(sums.tangent, normaliser[:, None]), scaled(out, -lse_tangent[:, None]))
    out_tangent_rows = Heads(OUT_TANGENT, out_batch, out_head, out_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False).rows(
        batch, head, None, place.first_query
    )
    out_tangent_rows.store(first_query, clear_rows(tangent, alive), exists, BLOCK_M)


def attention_tangents(
    operands: Operands, tangents: Tangents, spec: AttentionSpec, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor, Tensor, Kept]:
    """`out (b, h, i, dv)` and `lse (b, h, i)`, their tangents in the same layouts, and what the backward of out and lse
    reads beside them.

    The tile of this kernel is `tiles.forward`. Where that says `apart`, a launch each serves two halves of the columns
    of v, and computes the scores.
    """
    operands = readable_operands(operands)
    tangents = _readable_tangents(tangents, spec)
    return _prepare(spec, tiles, Layouts.of(operands), _strides(tangents)).run(operands, tangents)


def _readable_tangents(tangents: Tangents, spec: AttentionSpec) -> Tangents:
    """Tangents as the kernel reads them: see `readable_operands`."""
    q, k, v = (None if x is None else readable(x) for x in tangents[:3])
    bias, sinks = (x if x is None or spec.dtype != torch.float64 else x.double() for x in tangents[3:])
    return Tangents(q, k, v, bias, None if sinks is None else sinks.contiguous())


NOWHERE = (0, 0, 0, 0)  # the strides of a tensor that there is not
TangentStrides = tuple[Strides | None, ...]  # of `Tangents`, None for what is not there


def _strides(tangents: Tangents) -> TangentStrides:
    return tuple(None if x is None else broadcast_strides(x.shape, x.stride()) for x in tangents)


class OfColumns(NamedTuple):
    """The launches for a part of the columns of v, and so of out."""

    first: int
    last: int
    in_bulk: Prepared  # where k, v and their tangents begin where bulk copies can read
    by_pointers: Prepared  # where they do not

    def of(self, rows: Tensor | None) -> Tensor | None:
        """These columns of v, of out, or of their tangents."""
        return rows if rows is None or self.last - self.first == rows.shape[3] else rows[..., self.first : self.last]


@dataclass(frozen=True, eq=False)
class ForwardMode:
    """The forward mode of calls that differ in nothing but what their tensors hold: it allocates and launches."""

    out: HeadsLayout
    lse: HeadsLayout
    statistics: HeadsLayout
    lse_dtype: torch.dtype  # and that of the statistics
    schedule: Callable[[Tensor | None, Tensor | None], Schedule]  # of the mask and the bias
    sequences: Callable[[Tensor], tuple[Tensor, Tensor]]  # `packed_tiles` of the segments
    launches: tuple[OfColumns, ...]

    def run(self, operands: Operands, tangents: Tangents) -> tuple[Tensor, Tensor, Tensor, Tensor, Kept]:
        """As `attention_tangents`."""
        q, k, v, mask, seed, bias, slopes, sinks, segments, _ = operands
        out, out_tangent = (q.new_empty_strided(*self.out) for _ in range(2))
        lse, lse_tangent = (q.new_empty_strided(*self.lse, dtype=self.lse_dtype) for _ in range(2))
        statistics = lse.new_empty_strided(*self.statistics)
        schedule = self.schedule(mask, bias)
        sequences = (None, None) if segments is None else self.sequences(segments)
        aligned = begin_aligned(k, v, tangents.k, tangents.v)
        for part in self.launches:
            own_v, own_v_tangent, own_out, own_out_tangent = map(part.of, (v, tangents.v, out, out_tangent))
            launch(
                part.in_bulk if aligned else part.by_pointers, q, k, own_v, tangents.k, own_v_tangent, tangents.q,
                own_out, lse, statistics, own_out_tangent, lse_tangent, *schedule[:2], seed, bias, slopes, sinks,
                tangents.bias, tangents.sinks, *sequences,
            )  # fmt: skip
        return out, lse, out_tangent, lse_tangent, Kept(statistics, *schedule)


@lru_cache(maxsize=CALLS_KEPT)
def _prepare(spec: AttentionSpec, tiles: Tiles, layouts: Layouts, tangents: TangentStrides) -> ForwardMode:
    out = layout_like_heads(query_sizes(spec), layouts.q, spec.heads, spec.value_dim)
    schedule = plan_schedule(spec, tiles, layouts.mask_sizes, layouts.mask, layouts.bias)
    sizes = scheduled_sizes(layouts.mask_sizes, spec)
    planes = 0 if sizes is None else sizes[0] * sizes[1]
    spec = scheduled_spec(spec)
    given = tiles, planes, layouts, tangents, out[1]
    launches = []
    for first, last in value_columns(spec, tiles):
        part = replace(spec, value_dim=last - first)
        launches.append(OfColumns(first, last, *(_prepare_launch(part, *given, at_hand) for at_hand in (True, False))))
    sequences = partial(packed_tiles, spec=spec, size=tiles.forward.block_m, of_keys=False)
    return ForwardMode(
        out, lse_layout(spec), statistics_layout(spec), spec.accumulator_dtype, schedule, sequences, tuple(launches)
    )


def value_columns(spec: AttentionSpec, tiles: Tiles) -> list[tuple[int, int]]:
    """The parts of the columns of v: all of them or, apart, two halves, as far as products are made of whole tiles."""
    half = -(-spec.value_dim // (2 * SMALLEST_PART)) * SMALLEST_PART
    if not tiles.forward.apart or half >= spec.value_dim:
        return [(0, spec.value_dim)]
    return [(0, half), (half, spec.value_dim)]


def _prepare_launch(
    spec: AttentionSpec,
    tiles: Tiles,
    planes: int,
    layouts: Layouts,
    tangents: TangentStrides,
    out: Strides,
    at_hand: bool,
) -> Prepared:
    """The launch for tensors with these strides, `at_hand` if those of keys begin where bulk copies can read."""
    q_tangent, k_tangent, v_tangent, bias_tangent, _ = tangents
    of_queries, of_keys = query_sizes(spec), key_sizes(spec)
    read_of_keys = layouts.k, layouts.v, k_tangent, v_tangent
    align, strides = aligned_strides(
        spec.dtype,
        (of_queries, layouts.q),
        # One that there is not is not read: it must not spoil the alignment.
        *((of_keys, strides or NOWHERE) for strides in read_of_keys),
        (of_queries, q_tangent or NOWHERE),
        (of_queries, out),
    )
    tile, hand_over = reading_keys(spec, tiles.forward, at_hand, *read_of_keys)
    tangent_align, of_bias_tangent = bias_strides(spec, bias_tangent)
    return Prepared(
        tangents_kernel,
        spec.batch * spec.heads * tile_count(spec, spec.queries, tile.block_m),
        (
            *call_arguments(spec, planes, tiles),
            query_section(spec),
            *strides,
            *score_numbers(spec, layouts.bias, layouts.alibi_slopes),
            *of_bias_tangent,
        ),
        dict(
            ALIGN=align,
            BIAS_ALIGN=bias_strides(spec, layouts.bias)[0],
            BIAS_TANGENT_ALIGN=tangent_align,
            EXACT=is_exact(spec),
            APART=is_apart(spec),
            DESCRIPTORS=tile.descriptors,
            **call_choices(spec, tile, tiles),
        ),
        tile.num_warps,
        tile.num_stages,
        hand_over=hand_over,
    )
