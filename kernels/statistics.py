"""What a backward reads of each query: what makes its scores weights again, and delta.

The forward hands over what `Softmax.finish` gives, its own arithmetic in base 2, and not the natural LSE that callers
get: to go there and back rounds twice, and a weight errs by e to the power of what is lost. One kernel then computes
delta and lays both out as every kernel of the backward reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flash_attend.kernels.compat import aggregate, kernel
from flash_attend.kernels.configs import Tiles
from flash_attend.kernels.launch import Prepared, launch
from flash_attend.kernels.operands import aligned_strides, call_choices, query_sizes
from flash_attend.kernels.programs import tile_of_program
from flash_attend.kernels.rows import Heads
from flash_attend.kernels.schedule import Schedule
from flash_attend.kernels.softmax import INFINITY, recomputed_weights
from flash_attend.kernels.tiles import row_products
from flash_attend.operands import Operands, Strides
from flash_attend.spec import CALLS_KEPT, AttentionSpec

__all__ = ["Kept", "Statistics", "is_apart", "is_exact", "prepare_statistics", "statistics_of"]

# Queries: a head's statistics are whole tiles, so that no load needs a mask, and whole blocks of a mask's schedule,
# which a backward visits with all of its tiles: past the last query it reads that nobody is alive there.
LONGEST_TILE = tl.constexpr(256)
DELTA_ROWS = 32  # queries of one program of the delta kernel, which is bound by memory


class Kept(NamedTuple):
    """What a forward keeps for its backward, beside its results: statistics and the fields of a `Schedule`."""

    statistics: Tensor  # (b, h, i, 2), maximum and logarithm if APART, else (b, h, i, 1)
    visible: Tensor | None = None
    lists: Tensor | None = None
    states: Tensor | None = None

    @property
    def schedule(self) -> Schedule:
        """As kernels read it, whatever its strides have become."""
        return Schedule(*self[1:]).contiguous()

    def packed(self) -> list[Tensor]:
        """The tensors as operators hand them over."""
        return [self.statistics, *Schedule(*self[1:]).packed()]

    @staticmethod
    def unpacked(packed: Sequence[Tensor], operands: Operands, spec: AttentionSpec, tiles: Tiles) -> Kept:
        """The same again."""
        return Kept(packed[0], *Schedule.unpacked(packed[1:], operands, spec, tiles))


def is_exact(spec: AttentionSpec) -> bool:
    """Whether the softmax of a call is `EXACT`."""
    return spec.dtype.itemsize >= 4


def is_apart(spec: AttentionSpec) -> bool:
    """Whether the backward gets maximum and logarithm APART: where products take operands as they are."""
    return is_exact(spec) and spec.precision != "tf32"


def statistics_of(spec: AttentionSpec) -> int:
    """How many numbers a forward keeps of each query."""
    return 2 if is_apart(spec) else 1


@triton.jit
def store_statistics(STATISTICS, row, maximum, log2, exists, APART: tl.constexpr):
    """Writes what is kept of the queries that `exist`; `row` counts those of all heads."""
    if APART:
        tl.store(STATISTICS + 2 * row, maximum, mask=exists)
        tl.store(STATISTICS + 2 * row + 1, log2, mask=exists)
    else:
        tl.store(STATISTICS + row, log2, mask=exists)


@triton.jit
def padded_length(queries):
    """How many numbers a head has in each of `Statistics`."""
    return tl.cdiv(queries, LONGEST_TILE) * LONGEST_TILE


@kernel
def delta_kernel(
    OUT,
    GRAD_OUT,
    STATISTICS,
    GRAD_LSE,
    DELTA,
    LOG2,
    MAXIMUM,
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
    """DELTA, LOG2 and, unless None, MAXIMUM, padded. Dead queries and those past the last get delta 0 and a log of
    +inf: their weights are 0."""
    first_query, batch, head = tile_of_program(padded_length(queries), heads, 1, BLOCK_M)
    out_rows = Heads(OUT, out_batch, out_head, out_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False).rows(batch, head)
    grad_rows = Heads(GRAD_OUT, grad_batch, grad_head, grad_row, ALIGN, VALUE_DIM, VALUE0, VALUE1, False).rows(
        batch, head
    )
    query = first_query + tl.arange(0, BLOCK_M)
    exists = query < queries
    out = out_rows.load(first_query, exists, BLOCK_M, MASKED=True)
    grad = grad_rows.load(first_query, exists, BLOCK_M, MASKED=True)
    index = batch.to(tl.int64) * heads + head
    row = index * queries + query
    at = index * padded_length(queries) + query
    if MAXIMUM is None:
        log2 = tl.load(STATISTICS + row, mask=exists, other=INFINITY)
    else:
        log2 = tl.load(STATISTICS + 2 * row + 1, mask=exists, other=INFINITY)
        maximum = tl.load(STATISTICS + 2 * row, mask=exists, other=0.0)
        tl.store(MAXIMUM + at, tl.where(log2 == INFINITY, 0.0, maximum))
    delta = row_products(out, grad, ACCUMULATOR)
    if GRAD_LSE is not None:
        delta -= tl.load(GRAD_LSE + row, mask=exists, other=0.0)
    tl.store(DELTA + at, tl.where(log2 == INFINITY, 0.0, delta))
    tl.store(LOG2 + at, log2)


class Statistics(NamedTuple):
    """What every kernel of a backward reads of each query, `(b, h, i)` with i padded to whole tiles."""

    delta: Tensor
    log2: Tensor
    maximum: Tensor | None  # None unless APART


@aggregate
class QueryStatistics:
    """The same as kernels read it: pointers to the numbers of all heads, those of one, or the numbers of some queries
    [SIZE]. Where others follow a head's `queries`, those are not read; else None."""

    delta: tl.tensor
    log2: tl.tensor
    maximum: object
    queries: object

    @triton.jit
    def of_head(self, index, total, first_query=None, queries=None):
        """Those of a head, by its index among all, each with so many queries in `total`; or of some of its queries,
        from the first one on."""
        at = index * padded_length(total)
        if first_query is not None:
            at += first_query
        maximum = None
        if self.maximum is not None:
            maximum = self.maximum + at
        return QueryStatistics(self.delta + at, self.log2 + at, maximum, queries)

    @triton.jit
    def load(self, query, MASKED: tl.constexpr = True):
        """Those of some queries of the head; unless MASKED, all of these exist."""
        maximum = None
        if self.queries is None or not MASKED:
            if self.maximum is not None:
                maximum = tl.load(self.maximum + query)
            return QueryStatistics(tl.load(self.delta + query), tl.load(self.log2 + query), maximum, None)
        else:
            exists = query < self.queries
            if self.maximum is not None:
                maximum = tl.load(self.maximum + query, mask=exists, other=0.0)
            delta = tl.load(self.delta + query, mask=exists, other=0.0)
            return QueryStatistics(delta, tl.load(self.log2 + query, mask=exists, other=INFINITY), maximum, None)

    @triton.jit
    def alive(self):
        """[SIZE] booleans: which of them see a key. What others hold may be anything. A log may be NaN."""
        return self.log2 != INFINITY

    @triton.jit
    def weights(self, scores, factor_log2, AXIS: tl.constexpr):
        """The weights of scores; of those the queries are along the other axis than AXIS."""
        maximum = None
        if self.maximum is not None:
            maximum = tl.expand_dims(self.maximum, AXIS)
        return recomputed_weights(scores, maximum, tl.expand_dims(self.log2, AXIS), factor_log2)


def prepare_statistics(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, kept: Kept, spec: AttentionSpec, tiles: Tiles
) -> Statistics:
    """The statistics of a call, from the gradients of its results, `out`, and what its forward kept."""
    longest = LONGEST_TILE.value
    shape = spec.batch, spec.heads, -(-spec.queries // longest) * longest  # `triton.cdiv` takes a microsecond
    new = kept.statistics.new_empty
    found = Statistics(new(shape), new(shape), new(shape) if is_apart(spec) else None)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    prepared = _prepare_delta(spec, tiles, out.stride(), grad_out.stride(), grad_lse is not None)
    launch(prepared, out, grad_out, kept.statistics.contiguous(), grad_lse, *found)
    return found


@lru_cache(maxsize=CALLS_KEPT)
def _prepare_delta(spec: AttentionSpec, tiles: Tiles, out: Strides, grad_out: Strides, with_lse: bool) -> Prepared:
    """The launch for tensors with these strides."""
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
