"""The forward kernel: FlashAttention's online softmax (Dao et al. 2022, arXiv:2205.14135) over the tiles that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attend.kernels.compat import kernel
from flash_attend.kernels.configs import PARTS_PER_STEP, Tiles, key_splits
from flash_attend.kernels.descriptors import reading_keys
from flash_attend.kernels.dropout import dropout_by
from flash_attend.kernels.launch import ALIGNMENT, Prepared, begin_aligned, launch
from flash_attend.kernels.lengths import packed_tiles, place_in_batch, place_of_program, tile_count
from flash_attend.kernels.mask import NONE, masks_of_call
from flash_attend.kernels.operands import (
    HeadsLayout,
    aligned_strides,
    are_readable,
    bias_strides,
    call_arguments,
    call_choices,
    contiguous_strides,
    factor_log2,
    key_sizes,
    layout_like_heads,
    lse_layout,
    query_section,
    query_sizes,
    readable,
    readable_operands,
    score_numbers,
    window_numbers,
)
from flash_attend.kernels.programs import part_of_program, tile_of_program
from flash_attend.kernels.rows import Heads
from flash_attend.kernels.schedule import (
    Planes,
    Schedule,
    plan_schedule,
    scheduled_sizes,
    scheduled_spec,
)
from flash_attend.kernels.scores import LOG2E, Bias, query_of, scores_of_call
from flash_attend.kernels.softmax import NEGATIVE_INFINITY, empty_softmax
from flash_attend.kernels.statistics import Kept, is_apart, is_exact, statistics_of, store_statistics
from flash_attend.kernels.tiles import Tile, added, clear_rows, scaled, weighted_sum, zeros
from flash_attend.operands import Layouts, Operands, Strides
from flash_attend.spec import CALLS_KEPT, AttentionSpec

__all__ = ["attention_forward", "empty_outputs", "plan_forward"]

WIDEST_PART = tl.constexpr(256)  # of a head dimension
# What `merge_kernel` takes of a call's choices.
OF_MERGE = (
    "VALUE_DIM", "VALUE0", "VALUE1", "SCHEDULE_M", "SCHEDULE_N", "MASK", "CAUSAL", "LEFT", "RIGHT", "DROPOUT",
    "ACCUMULATOR",
)  # fmt: skip


@triton.jit
def _tile(
    total, softmax, q, k_rows, v_rows, mask, scores, dropout, first_row, group, block, tile, MASKED: tl.constexpr
):  # fmt: skip
    """One key block for one tile of rows: the total [BLOCK_M, dv] and the state of its softmax. Rows are queries, or
    those of the heads of a `group`, which take turns."""
    first_key = block * tile.BLOCK_N
    query = query_of(first_row + tl.arange(0, tile.BLOCK_M), group)
    key = first_key + tl.arange(0, tile.BLOCK_N)
    # Other sequences follow those that are packed.
    HIDDEN_WITHIN: tl.constexpr = mask.KIND != NONE or mask.left is not None or k_rows.first_row is not None
    readable = None
    if MASKED:
        shown, readable = mask.shown(first_row, first_key, tile.BLOCK_M, tile.BLOCK_N)
    # A wide v is cleared where it must be while there are no scores in registers yet, beside which it finds no room.
    EARLY: tl.constexpr = v_rows.PART0 == WIDEST_PART
    if EARLY:
        v = tile.load(v_rows, first_key, readable, tile.BLOCK_N, MASKED, HIDDEN_WITHIN)
    # NaN in a hidden key's k stays in its own column of the scores and is hidden there; in v it must not be read.
    k = tile.load(k_rows, first_key, key < mask.keys, tile.BLOCK_N, MASKED, WITHIN=False)
    applied = scores.apply(tile.inner_products(q, k))  # [BLOCK_M, BLOCK_N]
    seen = scores.add(applied, first_row, first_key, MASKED)
    if MASKED:
        seen = mask.hide(seen, query[:, None], key[None, :], shown, NEGATIVE_INFINITY)
    weights, correction, softmax = softmax.step(seen, scores.factor_log2)
    weights = dropout.drop(weights, dropout.kept(first_row, first_key, tile.BLOCK_M, tile.BLOCK_N))
    if not EARLY:
        v = tile.load(v_rows, first_key, readable, tile.BLOCK_N, MASKED, HIDDEN_WITHIN)
    return tile.accumulate(scaled(total, correction[:, None]), weights, v), softmax


@triton.jit
def finish(
    total, softmax, alive, factor_log2, keep_scale, SINKS, head, row, exists, out_rows, LSE, STATISTICS, index,
    APART: tl.constexpr,
):  # fmt: skip
    """Writes the results of the rows that exist, [SIZE] from the first one, `row`, on, whose heads are `head`; `index`
    [SIZE] counts the queries of all heads. `keep_scale` is the factor of weights that dropout keeps, or None.

    Returns out, the factor that normalises sums of weights, and the LSE.
    """
    SIZE: tl.constexpr = exists.shape[0]
    ACCUMULATOR: tl.constexpr = softmax.sum.dtype
    sink_log2 = None
    if SINKS is not None:
        sink_log2 = tl.load(SINKS + head).to(ACCUMULATOR) * LOG2E
    normaliser, lse, log2 = softmax.finish(alive, factor_log2, APART, sink_log2)
    tl.store(LSE + index, lse, mask=exists)
    store_statistics(STATISTICS, index, softmax.maximum, log2, exists, APART)
    of_out = normaliser
    if keep_scale is not None:
        of_out *= keep_scale
    # A key that others of the tile see may hold infinity, which a dead row's weights of 0 do not hide.
    out = clear_rows(scaled(total, of_out[:, None]), alive)
    out_rows.store(row, out, exists, SIZE)
    return out, normaliser, lse


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
    BIAS,
    ALIBI_SLOPES,
    SINKS,
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
    splits: tl.int32,
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
    EXACT: tl.constexpr,
    APART: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One query tile of one head: OUT (b, h, i, dv); LSE (b, h, i) and STATISTICS (b, h, i, 1 or 2), contiguous.

    K and V are descriptors, if DESCRIPTORS, of blocks of BLOCK_N keys. If PACKED, the rows of a tile are the queries of
    the heads of a group, which take turns. If SPLIT, a program visits one of so many parts of the keys, and leaves to
    `merge_kernel` what it found: OUT (b, h, i, splits, dv) is not normalised, STATISTICS (b, h, i, splits, 2) are
    maxima and sums. With SEGMENTS, the sequences of a batch of one, and their TILES, positions are counted within one.
    """
    rows = queries * group if PACKED else queries
    tile_heads = heads // group if PACKED else heads
    if SPLIT:
        first_row, batch, head, part = part_of_program(rows, tile_heads, section, splits, BLOCK_M)
        place = place_in_batch(first_row, batch, head, queries, keys)
        parts = splits
        OUT += part * VALUE_DIM
    else:
        place = place_of_program(SEGMENTS, TILES, rows, queries, keys, tile_heads, section, BLOCK_M)
        part = 0
        parts = None
        if SEGMENTS is not None:
            queries = place.queries
            keys = place.keys
            rows = queries
    first_row = place.first
    batch = place.batch
    head = place.head
    if PACKED:
        kv_head = head
        head = kv_head * group
        in_group = group
    else:
        kv_head = head // group
        in_group = None
    first_query = query_of(first_row, in_group)
    q_rows = Heads(Q, q_batch, q_head, q_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, False).rows(
        batch, head, in_group, place.first_query
    )
    k_rows = Heads(K, k_batch, k_head, k_row, ALIGN, HEAD_DIM, HEAD0, HEAD1, DESCRIPTORS).rows(
        batch, kv_head, None, place.first_key
    )
    v_rows = Heads(V, v_batch, v_head, v_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, DESCRIPTORS).rows(
        batch, kv_head, None, place.first_key
    )
    out_rows = Heads(OUT, out_batch, out_head, out_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False).rows(
        batch, head, in_group, place.first_query
    )
    planes = Planes(
        VISIBLE, LISTS, mask_stride_batch, mask_stride_head, n_query_blocks, n_key_blocks, SCHEDULE_M, SCHEDULE_N
    )
    masks = masks_of_call(planes, queries, keys, window_left, window_right, MASK, CAUSAL, LEFT, RIGHT, HIDES_KEYS=True)
    mask = masks.of_head(batch, head)
    scores = scores_of_call(
        scale, softcap, BIAS, (bias_batch, bias_head, bias_query, bias_key), ALIBI_SLOPES, (slopes_batch, slopes_head),
        queries, keys, SCALE_SIGN, SOFTCAP, BIAS_ALIGN, ACCUMULATOR, in_group,
    ).of_head(place.sequence, head)  # fmt: skip
    dropout = dropout_by(SEED, keep_threshold, keep_scale, DROPOUT, ACCUMULATOR).of_head(place.sequence, head)
    tile = Tile(BLOCK_M, BLOCK_N, PRECISION, ACCUMULATOR)

    row = first_row + tl.arange(0, BLOCK_M)
    exists = row < rows
    q = tile.load(q_rows, first_row, exists, BLOCK_M, MASKED=True)
    total = zeros(BLOCK_M, VALUE0, VALUE1, ACCUMULATOR)
    softmax = empty_softmax(BLOCK_M, ACCUMULATOR, EXACT)
    walk = mask.walk_over_keys(first_query, BLOCK_M, BLOCK_N, part, parts)
    # Full blocks first: with the masked ones in front, the compiler serializes the products of the main loop.
    for run in tl.range(0, walk.run_count(), num_stages=1):
        start, end = walk.run_bounds(run)
        for block in tl.range(start, end, num_stages=STAGES):
            total, softmax = _tile(
                total, softmax, q, k_rows, v_rows, mask, scores, dropout, first_row, in_group, block, tile, MASKED=False
            )
    for index in tl.range(0, walk.masked_count(), num_stages=1):
        block = walk.masked_block(index)
        total, softmax = _tile(
            total, softmax, q, k_rows, v_rows, mask, scores, dropout, first_row, in_group, block, tile, MASKED=True
        )

    query = query_of(row, in_group)
    if PACKED:
        head += row % group
    if SPLIT:
        index = (batch.to(tl.int64) * heads + head) * queries + query
        at = STATISTICS + 2 * (index * splits + part)
        tl.store(at, softmax.maximum, mask=exists)
        tl.store(at + 1, softmax.sum, mask=exists)
        # Where nothing was seen there is nothing to merge.
        out_rows.store(first_row, total, exists & (softmax.sum != 0.0), BLOCK_M)
    else:
        alive = mask.alive(query, first_query, softmax.sum == 0.0, scores.bias, first_row)
        index = place.first_number(batch.to(tl.int64) * heads + head) + query
        keep_factor = dropout.factor if DROPOUT else None
        finish(
            total, softmax, alive, scores.factor_log2, keep_factor, SINKS, head, first_row, exists, out_rows, LSE,
            STATISTICS, index, APART,
        )  # fmt: skip


@kernel
def merge_kernel(
    PARTS,
    PARTS_STATISTICS,
    OUT,
    LSE,
    STATISTICS,
    VISIBLE,
    LISTS,
    SINKS,
    BIAS,
    factor_log2: tl.float64,
    keep_scale: tl.float64,
    queries: tl.int32,
    keys: tl.int32,
    heads: tl.int32,
    mask_stride_batch: tl.int32,
    mask_stride_head: tl.int32,
    n_query_blocks: tl.int32,
    n_key_blocks: tl.int32,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int64,
    window_left: tl.int32,
    window_right: tl.int32,
    splits: tl.int32,
    bias_batch: tl.int64,
    bias_head: tl.int64,
    bias_query: tl.int64,
    bias_key: tl.int64,
    ALIGN: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE0: tl.constexpr,
    VALUE1: tl.constexpr,
    SCHEDULE_M: tl.constexpr,
    SCHEDULE_N: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BIAS_ALIGN: tl.constexpr,
    EXACT: tl.constexpr,
    APART: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    STEP: tl.constexpr,
):
    """One query of one head: what `forward_kernel` gives, from what it found in the parts of a call that is SPLIT, STEP
    of them at a time, in their order."""
    first_query, batch, head = tile_of_program(queries, heads, 1, 1)
    index = (batch.to(tl.int64) * heads + head) * queries + first_query + tl.arange(0, 1)
    zero = tl.zeros([], tl.int32)
    parts = Heads(
        PARTS + tl.sum(index, 0) * splits * VALUE_DIM, zero, zero, zero + VALUE_DIM, 1, VALUE_DIM, VALUE0, VALUE1, False
    ).rows(zero, zero)  # fmt: skip
    out_rows = Heads(OUT, out_batch, out_head, out_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False).rows(batch, head)
    factor = tl.full([], factor_log2, tl.float64).to(ACCUMULATOR)
    total = zeros(1, VALUE0, VALUE1, ACCUMULATOR)
    softmax = empty_softmax(1, ACCUMULATOR, EXACT)
    for first_part in tl.range(0, splits, STEP):
        part = first_part + tl.arange(0, STEP)
        at = PARTS_STATISTICS + 2 * (index[:, None] * splits + part[None, :])
        maxima = tl.load(at, mask=(part < splits)[None, :], other=NEGATIVE_INFINITY)
        sums = tl.load(at + 1, mask=(part < splits)[None, :], other=0.0)
        found = parts.load(zero + first_part, tl.sum((sums != 0.0).to(tl.int32), 0) != 0, STEP, MASKED=True)
        # Exponents have the factor in them already, unless they are EXACT.
        weights, correction, softmax = softmax.step(maxima, factor if EXACT else 1.0, sums)
        total = added(scaled(total, correction[:, None]), weighted_sum(found, tl.sum(weights, 0)))
    planes = Planes(
        VISIBLE, LISTS, mask_stride_batch, mask_stride_head, n_query_blocks, n_key_blocks, SCHEDULE_M, SCHEDULE_N
    )
    masks = masks_of_call(planes, queries, keys, window_left, window_right, MASK, CAUSAL, LEFT, RIGHT, HIDES_KEYS=True)
    query = first_query + tl.arange(0, 1)
    bias = None
    if BIAS is not None:
        bias = Bias(
            BIAS, bias_batch, bias_head, bias_query, bias_key, queries, keys, None, BIAS_ALIGN, ACCUMULATOR
        ).of_head(batch, head)  # fmt: skip
    alive = masks.of_head(batch, head).alive(query, first_query, softmax.sum == 0.0, bias, first_query)
    keep_factor = tl.full([], keep_scale, tl.float64).to(ACCUMULATOR) if DROPOUT else None
    finish(
        total, softmax, alive, factor, keep_factor, SINKS, head, first_query, query < queries, out_rows, LSE,
        STATISTICS, index, APART,
    )  # fmt: skip


def empty_outputs(q: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Where a forward writes `out (b, h, i, dv)`, `lse (b, h, i)` and the statistics of `Kept`. Also what it gives when
    nothing is launched."""
    out = layout_like_heads(query_sizes(spec), readable(q).stride(), spec.heads, spec.value_dim)
    lse = q.new_empty_strided(*lse_layout(spec), dtype=spec.accumulator_dtype)
    return q.new_empty_strided(*out), lse, lse.new_empty_strided(*statistics_layout(spec))


def statistics_layout(spec: AttentionSpec) -> HeadsLayout:
    """Sizes and strides of the statistics."""
    (*rows, length), last = query_sizes(spec), statistics_of(spec)
    return (*rows, length, last), (spec.heads * length * last, length * last, last, 1)


def attention_forward(operands: Operands, spec: AttentionSpec, tiles: Tiles) -> tuple[Tensor, Tensor, Kept]:
    """`out (b, h, i, dv)` in q's dtype, `lse (b, h, i)`, natural, and what the backward reads beside them."""
    operands = readable_operands(operands)
    return _prepare(spec, tiles, Layouts.of(operands)).run(operands)


def plan_forward(
    spec: AttentionSpec, tiles: Tiles, layouts: Layouts
) -> Callable[[Operands], tuple[Tensor, Tensor, Kept]]:
    """`attention_forward` of all operands with these layouts."""
    if are_readable(spec, layouts):
        return _prepare(spec, tiles, layouts).run
    return partial(attention_forward, spec=spec, tiles=tiles)


@dataclass(frozen=True, eq=False)
class Forward:
    """The forward of calls that differ in nothing but what their tensors hold: it allocates and launches."""

    out: HeadsLayout
    lse: HeadsLayout
    statistics: HeadsLayout
    lse_dtype: torch.dtype  # and that of the statistics
    schedule: Callable[[Tensor | None, Tensor | None], Schedule]  # of the mask and the bias
    sequences: Callable[[Tensor], tuple[Tensor, Tensor]]  # `packed_tiles` of the segments
    in_bulk: Prepared  # the launch where k and v begin where bulk copies can read
    by_pointers: Prepared  # the launch where they do not
    changes_scores: bool  # there is a bias, or there are slopes or sinks
    merge: Merge | None  # of a call whose keys are split

    def run(self, operands: Operands) -> tuple[Tensor, Tensor, Kept]:
        """As `attention_forward`."""
        q, k, v, mask, seed, *others, segments, _ = operands
        out = q.new_empty_strided(*self.out)
        lse = q.new_empty_strided(*self.lse, dtype=self.lse_dtype)
        statistics = lse.new_empty_strided(*self.statistics)
        schedule = self.schedule(mask, operands.bias)
        aligned = (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT == 0
        prepared = self.in_bulk if aligned or begin_aligned(k, v) else self.by_pointers
        if aligned and self.changes_scores:
            aligned = begin_aligned(*others)
        results = out, lse, statistics
        sequences = (None, None) if segments is None else self.sequences(segments)
        parts = results if self.merge is None else self.merge.empty_parts(statistics)
        launch(prepared, q, k, v, *parts, *schedule[:2], seed, *others, *sequences, aligned=aligned)
        if self.merge is not None:
            found, _, of_found = parts
            launch(self.merge.prepared, found, of_found, *results, *schedule[:2], operands.sinks, operands.bias)
        return out, lse, Kept(statistics, *schedule)


@dataclass(frozen=True, eq=False)
class Merge:
    """What makes one result of those of so many parts of the keys."""

    parts: tuple[int, ...]  # (b, h, i, splits, dv)
    prepared: Prepared

    def empty_parts(self, like: Tensor) -> tuple[Tensor, None, Tensor]:
        """What a forward that is split writes in place of its results."""
        return like.new_empty(self.parts), None, like.new_empty(*self.parts[:4], 2)


@lru_cache(maxsize=CALLS_KEPT)
def _prepare(spec: AttentionSpec, tiles: Tiles, layouts: Layouts) -> Forward:
    out = layout_like_heads(query_sizes(spec), layouts.q, spec.heads, spec.value_dim)
    changes_scores = spec.bias is not None or spec.alibi or spec.sinks
    schedule = plan_schedule(spec, tiles, layouts.mask_sizes, layouts.mask, layouts.bias)
    layouts = layouts._replace(mask_sizes=scheduled_sizes(layouts.mask_sizes, spec))
    spec = scheduled_spec(spec)
    launches = (_prepare_launch(spec, tiles, layouts, out[1], at_hand) for at_hand in (True, False))
    layouts_of = out, lse_layout(spec), statistics_layout(spec)
    merge = None
    if (splits := key_splits(spec, tiles.forward)) > 1:
        sizes = *query_sizes(spec), splits, spec.value_dim
        merge = Merge(sizes, _prepare_merge(spec, tiles, layouts, out[1], splits))
    sequences = partial(packed_tiles, spec=spec, size=tiles.forward.block_m, of_keys=False)
    return Forward(*layouts_of, spec.accumulator_dtype, schedule, sequences, *launches, changes_scores, merge)


def _prepare_launch(spec: AttentionSpec, tiles: Tiles, layouts: Layouts, out: Strides, at_hand: bool) -> Prepared:
    """The launch for tensors with these strides, `at_hand` if k and v begin where bulk copies can read."""
    q, k, v, mask_sizes, _, bias, slopes, *_ = layouts
    spec = _without_causality(spec)
    of_queries, of_keys = query_sizes(spec), key_sizes(spec)
    splits = key_splits(spec, tiles.forward)
    if splits > 1:
        out = contiguous_strides((*of_queries, splits * spec.value_dim))
    align, strides = aligned_strides(spec.dtype, (of_queries, q), (of_keys, k), (of_keys, v), (of_queries, out))
    tile, hand_over = reading_keys(spec, tiles.forward, at_hand, k, v)
    heads, rows = (spec.kv_heads, spec.queries * spec.group) if spec.packed else (spec.heads, spec.queries)
    section = 1 if spec.packed else query_section(spec)
    numbers = *call_arguments(spec, _planes(mask_sizes), tiles), section, *strides, *score_numbers(spec, bias, slopes)
    return Prepared(
        forward_kernel,
        spec.batch * heads * tile_count(spec, rows, tile.block_m) * splits,
        (*numbers, splits),
        dict(
            ALIGN=align,
            EXACT=is_exact(spec),
            APART=is_apart(spec),
            DESCRIPTORS=tile.descriptors,
            BIAS_ALIGN=bias_strides(spec, bias)[0],
            PACKED=spec.packed,
            SPLIT=splits > 1,
            **call_choices(spec, tile, tiles),
        ),
        tile.num_warps,
        tile.num_stages,
        hand_over=hand_over,
    )


def _without_causality(spec: AttentionSpec) -> AttentionSpec:
    """Of a single query, which sees every key before its position anyway."""
    return replace(spec, causal=False) if spec.one_query else spec


def _planes(mask_sizes: Sequence[int] | None) -> int:
    return 0 if mask_sizes is None else mask_sizes[0] * mask_sizes[1]


def _prepare_merge(spec: AttentionSpec, tiles: Tiles, layouts: Layouts, out: Strides, splits: int) -> Prepared:
    """The launch that writes out with these strides."""
    spec = _without_causality(spec)
    align, strides = aligned_strides(spec.dtype, (query_sizes(spec), out))
    _, keep_scale, _, queries, keys, heads, _, *schedule = call_arguments(spec, _planes(layouts.mask_sizes), tiles)
    bias_align, of_bias = bias_strides(spec, layouts.bias)
    choices = call_choices(spec, tiles.forward, tiles)
    return Prepared(
        merge_kernel,
        spec.batch * heads * queries,
        (
            *(factor_log2(spec), keep_scale, queries, keys, heads, *schedule, *strides, *window_numbers(spec), splits),
            *of_bias,
        ),
        dict(
            ALIGN=align,
            BIAS_ALIGN=bias_align,
            EXACT=is_exact(spec),
            APART=is_apart(spec),
            STEP=PARTS_PER_STEP,
            **{name: choices[name] for name in OF_MERGE},
        ),
        num_warps=4,
    )
