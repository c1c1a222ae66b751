"""Tensors as bulk copies (TMA) see them: which layouts they can read, and blocks of `(b, h, n, d)` for descriptors.

In four dimensions no block reaches over the end of a sequence: beyond it zeros are read and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_attend.kernels.configs import SMALLEST_PART, Tile, head_parts, kind_of
from flash_attend.spec import AttentionSpec

__all__ = ["Source", "aligned", "block_strides", "readable_in_bulk", "reading"]

# Sizes and strides of a tensor, of which the first three count, and the last size.
Source = tuple[Sequence[int], Sequence[int], int]
HandOver = Callable[[tuple[Tensor | None, ...]], tuple]

ALIGNMENT = 16  # bytes: of addresses and strides
LARGEST_STRIDE = 2**40  # bytes


def aligned(*tensors: Tensor) -> bool:
    """Whether bulk copies can read from where these tensors begin."""
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    return addresses % ALIGNMENT == 0


def readable_in_bulk(sizes: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether bulk copies can read a 4-D tensor with a contiguous last dimension and an aligned address.

    Only the first three sizes and strides count. The stride of a dimension of size 1 is never used.
    """
    in_bytes = [stride * itemsize for size, stride in zip(sizes[:3], strides[:3], strict=True) if size > 1]
    return 0 not in sizes and all(0 < stride < LARGEST_STRIDE and stride % ALIGNMENT == 0 for stride in in_bytes)


def block_strides(sizes: Sequence[int], strides: Sequence[int], columns: int) -> list[int]:
    """The strides of a tensor as a descriptor takes them, which checks those that are never used too: of its dimensions
    in front of the last, whose `sizes` these are, and of the last, which is contiguous."""
    in_front = zip(sizes, strides, strict=False)
    return [*(stride if size > 1 else columns for size, stride in in_front), 1]


def reading(
    spec: AttentionSpec, tile: Tile, side: Literal["block_m", "block_n"], at_hand: bool, sources: dict[int, Source]
) -> tuple[Tile, HandOver]:
    """A tile as its kernel takes it for these sources, and how the launch hands over its tensors.

    A source is named by its place among the tensors. Where the tile asks for descriptors, all are handed over as such,
    of blocks as long as the tile's `side`, if they can be: their addresses are aligned (`at_hand`), so are their
    strides, and their head dimensions are in one part. Else the kernel reads by pointers, half as many rows at a time,
    because addresses take up registers.
    """
    if not tile.descriptors:
        return tile, tuple
    rows = getattr(tile, side)
    parts = {place: head_parts(dim, kind_of(spec)) for place, (*_, dim) in sources.items()}
    fit = all(readable_in_bulk(sizes, strides, spec.dtype.itemsize) for sizes, strides, _ in sources.values())
    if at_hand and fit and not any(second for _, second in parts.values()):
        blocks = {
            place: ([*sizes, dim], block_strides(sizes, strides, parts[place][0]), [1, 1, rows, parts[place][0]])
            for place, (sizes, strides, dim) in sources.items()
        }
        return tile, partial(_with_blocks, blocks)
    return tile._replace(descriptors=False, **{side: max(SMALLEST_PART, rows // 2)}), tuple


class _Checked(TensorDescriptor):
    """One whose layout was found fit already: Triton would look at it again at every launch."""

    def __post_init__(self) -> None:
        pass


def _with_blocks(blocks: dict[int, tuple], tensors: tuple[Tensor | None, ...]) -> tuple:
    handed: list = [*tensors]
    for place, layout in blocks.items():
        handed[place] = _Checked(tensors[place], *layout)
    return tuple(handed)
