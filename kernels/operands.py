"""How tensors are handed to a kernel: layouts it can read, strides in aligned units, outputs in the order of the
inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from flash_attend.dropout import keep_threshold
from flash_attend.kernels.configs import Tile, Tiles, head_parts, kind_of
from flash_attend.kernels.scores import LOG2E
from flash_attend.operands import Layouts, Operands, Strides
from flash_attend.spec import AttentionSpec, MaskKind

__all__ = [
    "HeadsLayout",
    "aligned_strides",
    "all_edges",
    "are_readable",
    "as_bytes",
    "bias_strides",
    "call_arguments",
    "call_choices",
    "contiguous_strides",
    "factor_log2",
    "is_readable",
    "key_section",
    "key_sizes",
    "layout_like_heads",
    "lse_layout",
    "mask_strides",
    "query_section",
    "query_sizes",
    "readable",
    "readable_operands",
    "scale_sign",
    "score_numbers",
    "window_numbers",
]

HeadsLayout = tuple[tuple[int, ...], Strides]  # sizes and strides of a tensor to be allocated

VECTOR_BYTES = 16  # the widest load
SMALLEST_FACTOR = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}  # that is not 0
CACHED_BYTES = 32 * 2**20  # in use at once: what an L2 cache of 40 or 50 MB holds beside everything else


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, else a copy.

    Any other stride is read as it is. A copy is cheaper than a strided last dimension, which every query block would
    read again, element by element.
    """
    if is_readable(tensor.stride(), tensor.shape[-1]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # of no elements `contiguous` would keep the strides


def contiguous_strides(sizes: Sequence[int]) -> Strides:
    """The strides of a tensor that lies in memory as its sizes say."""
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)


def is_readable(strides: Strides, dim: int) -> bool:
    """Whether kernels can read `dim` numbers in a row of a tensor with these strides."""
    return strides[-1] == 1 or dim == 1


def as_bytes(mask: Tensor) -> Tensor:
    """A mask as kernels read it, without a copy."""
    return mask.view(torch.uint8)


def query_sizes(spec: AttentionSpec) -> tuple[int, int, int]:
    """The sizes of q, out and their gradients but for the last."""
    return spec.batch, spec.heads, spec.queries


def key_sizes(spec: AttentionSpec) -> tuple[int, int, int]:
    """The sizes of k, v and their gradients but for the last."""
    return spec.batch, spec.kv_heads, spec.keys


def aligned_strides(dtype: torch.dtype, *layouts: tuple[Sequence[int], Strides]) -> tuple[int, Strides]:
    """`ALIGN`, and the batch, head and row strides of 4-D tensors, one after another, in units of `ALIGN` elements.

    A layout is `(sizes, strides)`, of which the first three count. ALIGN is 16 bytes' worth where every stride allows
    it, else 1. The kernel multiplies by it, which tells the compiler that wide loads are safe, with no variant for each
    length or stride.
    """
    # The stride of a dimension of size 1 is never used: it must not spoil the alignment.
    strides = [
        stride if size > 1 else 0
        for sizes, of_tensor in layouts
        for size, stride in zip(sizes[:3], of_tensor[:3], strict=True)
    ]
    unit = VECTOR_BYTES // dtype.itemsize
    if any(stride % unit for stride in strides):
        return 1, tuple(strides)
    return unit, tuple(stride // unit for stride in strides)


def layout_like_heads(sizes: tuple[int, int, int], strides: Strides, heads: int, dim: int) -> HeadsLayout:
    """Sizes and strides of `(b, heads, n, dim)` for a tensor `(b, h, n, d)` with these, of which the first three sizes
    count: in memory as `(b, n, heads, dim)` if the tensor is.

    Models that merge heads after attention then need no copy.
    """
    batch, own_heads, length = sizes
    _, head_stride, row_stride, _ = strides
    inside = own_heads > 1 and length > 1 and head_stride < row_stride
    head, row = (dim, heads * dim) if inside else (length * dim, dim)
    return (batch, heads, length, dim), (heads * length * dim, head, row, 1)


def lse_layout(spec: AttentionSpec) -> HeadsLayout:
    """Sizes and strides of the LSE."""
    return query_sizes(spec), (spec.heads * spec.queries, spec.queries, 1)


def mask_strides(spec: AttentionSpec, planes: int) -> tuple[int, int]:
    """How many of a schedule's planes lie between two batch entries and two heads."""
    mask_heads = spec.heads if spec.mask_per_head else 1
    return mask_heads if planes > mask_heads else 0, 1 if spec.mask_per_head else 0


def query_section(spec: AttentionSpec) -> int:
    """How many query heads take turns at tiles of queries (see `tile_at`): those whose k and v fit into the cache.

    Without causality a head's tiles are all as long, and the order serves the cache alone.
    """
    by_length = spec.causal or spec.sequences is not None
    return spec.group * (_heads_cached(spec, spec.batch * spec.kv_heads, spec.keys) if by_length else 1)


def scale_sign(spec: AttentionSpec) -> int:
    """1 or -1, or 0 for a scale whose factor of base-2 exponents is 0 in the accumulator's dtype. 1 where the scale is
    no part of that factor, whatever it is."""
    if spec.softcap or spec.bias is not None or spec.alibi:
        return 1
    if abs(spec.scale) * LOG2E.value <= SMALLEST_FACTOR[spec.accumulator_dtype] / 2:
        return 0
    return -1 if spec.scale < 0 else 1


def factor_log2(spec: AttentionSpec) -> float:
    """The factor of base-2 exponents that `Scores` has."""
    if spec.adds_to_scores:
        return LOG2E.value
    return (spec.softcap or abs(spec.scale)) * LOG2E.value if scale_sign(spec) else 1.0


def key_section(spec: AttentionSpec) -> int:
    """How many key/value heads take turns at tiles of keys: those whose queries and output gradients fit."""
    by_length = spec.causal or spec.sequences is not None
    return _heads_cached(spec, spec.batch * spec.kv_heads, spec.group * spec.queries) if by_length else 1


def _heads_cached(spec: AttentionSpec, heads: int, rows: int) -> int:
    """How many of `heads` fit into the cache, at least 1, with so many rows of two tensors each."""
    bytes_of_head = rows * (spec.head_dim + spec.value_dim) * spec.dtype.itemsize
    return max(1, min(heads, CACHED_BYTES // max(bytes_of_head, 1)))


def call_arguments(spec: AttentionSpec, planes: int, tiles: Tiles) -> tuple:
    """The run-time numbers that all three attention kernels take, in their order: none of them makes a variant.

    `planes` is the number of planes in the schedule: 0 without a mask.
    """
    block_queries, block_keys = tiles.schedule_block
    return (
        float(spec.scale),
        1.0 / (1.0 - spec.dropout_p),
        keep_threshold(spec.dropout_p),
        spec.queries,
        spec.keys,
        spec.heads,
        spec.group,
        *mask_strides(spec, planes),
        -(-spec.queries // block_queries),
        -(-spec.keys // block_keys),
    )


def call_choices(spec: AttentionSpec, tile: Tile, tiles: Tiles) -> dict:
    """The compile-time choices that all three attention kernels take: each combination is one variant."""
    block_queries, block_keys = tiles.schedule_block
    dims, kind = (spec.head_dim, spec.value_dim), kind_of(spec)
    (head0, head1), (value0, value1) = (head_parts(dim, kind, tile.halves) for dim in dims)
    return dict(
        HEAD_DIM=spec.head_dim,
        VALUE_DIM=spec.value_dim,
        HEAD0=head0,
        HEAD1=head1,
        VALUE0=value0,
        VALUE1=value1,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        STAGES=tile.num_stages,
        SCHEDULE_M=block_queries,
        SCHEDULE_N=block_keys,
        MASK=int(spec.mask),
        **edge_choices(spec),
        SCALE_SIGN=scale_sign(spec),
        SOFTCAP="" if not spec.softcap else "fast" if spec.dtype.itemsize == 2 else "exact",
        DROPOUT=spec.dropout_p > 0,
        PRECISION=spec.precision,
        ACCUMULATOR=tl.float64 if spec.dtype == torch.float64 else tl.float32,
    )


def edge_choices(spec: AttentionSpec) -> dict[str, bool]:
    """Which edges `Mask` knows: all but those that a dense mask's schedule holds already."""
    if spec.mask == MaskKind.DENSE:
        return dict(CAUSAL=False, LEFT=False, RIGHT=False)
    return all_edges(spec)


def all_edges(spec: AttentionSpec) -> dict[str, bool]:
    """Causality, and the edges of the window."""
    left, right = spec.window
    return dict(CAUSAL=spec.causal, LEFT=left is not None, RIGHT=right is not None)


def window_numbers(spec: AttentionSpec) -> tuple[int, int]:
    """How far a window reaches to the left and to the right, 0 where it has no edge. No further than the sequence."""
    left, right = (min(end or 0, spec.keys) for end in spec.window)
    return left, right


def readable_operands(operands: Operands) -> Operands:
    """Operands as kernels read them: rows in one piece, and beside float64 nothing that is narrower."""
    q, k, v, mask, seed, *others, segments, _ = operands
    others = [tensor if tensor is None or q.dtype != torch.float64 else tensor.double() for tensor in others]
    bias, slopes, sinks = others
    sinks = None if sinks is None else sinks.contiguous()
    return Operands(readable(q), readable(k), readable(v), mask, seed, bias, slopes, sinks, segments)


def are_readable(spec: AttentionSpec, layouts: Layouts) -> bool:
    """Whether `readable_operands` leaves operands with these layouts as they are."""
    others = layouts.bias, layouts.alibi_slopes, layouts.sinks
    dims = spec.head_dim, spec.head_dim, spec.value_dim
    as_they_are = spec.dtype != torch.float64 or others == (None, None, None)
    return as_they_are and layouts.sinks in (None, (1,)) and all(map(is_readable, layouts[:3], dims))


def score_numbers(spec: AttentionSpec, bias: Strides | None, slopes: Strides | None) -> tuple[int | float, ...]:
    """The run-time numbers of the window and of what changes scores, by the strides of the bias and the slopes: the
    last that all attention kernels take."""
    return *window_numbers(spec), float(spec.softcap), *bias_strides(spec, bias)[1], *(slopes or (0, 0))


def bias_strides(spec: AttentionSpec, strides: Strides | None) -> tuple[int, Strides]:
    """`ALIGN` of a bias, and its strides in units of so many elements, 0 where it is broadcast. 0 where its keys do not
    follow each other: then in elements."""
    if spec.bias is None or strides is None:
        return 0, (0, 0, 0, 0)
    strides = tuple(stride if varies else 0 for varies, stride in zip(spec.bias[:4], strides, strict=True))
    if strides[3] != 1:
        return 0, strides
    unit = VECTOR_BYTES // spec.bias.dtype.itemsize
    if any(stride % unit for stride in strides[:3]):
        return 1, strides
    return unit, (*(stride // unit for stride in strides[:3]), 1)
