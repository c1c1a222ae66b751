"""Tensors as bulk copies (TMA) see them: which layouts they can read, and blocks of `(b, h, n, d)` for descriptors.

In four dimensions no block reaches over the end of a sequence: beyond it zeros are read and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_attend.kernels.compat import BULK_COPIES_ROUND
from flash_attend.kernels.configs import SMALLEST_PART, Tile, head_parts, kind_of
from flash_attend.kernels.operands import key_sizes
from flash_attend.spec import AttentionSpec

__all__ = ["block_strides", "readable_in_bulk", "reading_keys"]

HandOver = Callable[[tuple[Tensor | None, ...]], tuple]

ALIGNMENT = 16  # bytes: of addresses and strides
LARGEST_STRIDE = 2**40  # bytes
SHORT = 64  # of a vector: whole tiles of such fit by pointers too


def readable_in_bulk(sizes: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether bulk copies can read a 4-D tensor with a contiguous last dimension and an aligned address.

    Only the first three sizes and strides count. The stride of a dimension of size 1 is never used.
    """
    in_bytes = [stride * itemsize for size, stride in zip(sizes[:3], strides[:3], strict=True) if size > 1]
    return 0 not in sizes and all(0 < stride < LARGEST_STRIDE and stride % ALIGNMENT == 0 for stride in in_bytes)


def block_strides(sizes: Sequence[int], strides: Sequence[int], columns: int) -> list[int]:
    """The strides of a `(b, h, n, d)` tensor as a descriptor takes them: those that are never used have to fit too."""
    in_front = zip(sizes[:3], strides[:3], strict=True)
    return [*(stride if size > 1 else columns for size, stride in in_front), 1]


def reading_keys(
    spec: AttentionSpec, tile: Tile, at_hand: bool, *of_keys: Sequence[int] | None
) -> tuple[Tile, HandOver]:
    """A tile as its kernel takes it for k and v, and after them what is like them, with these strides, each None where
    there is no such tensor; and how the launch hands over its tensors.

    Where the tile asks for descriptors, these, from the second tensor on, are handed over as such, if they can be:
    their addresses are aligned (`at_hand`), so are their strides, and their head dimensions are in one part. Else the
    kernel reads by pointers, and because addresses take up registers half as many keys at a time, unless their vectors
    are short. Descriptors round what products in TF32 take, where Triton lets them.
    """
    if not tile.descriptors:
        return tile, tuple
    sizes = key_sizes(spec)
    dims = spec.head_dim, spec.value_dim
    parts = [head_parts(dim, kind_of(spec), tile.halves) for dim in dims]
    there = [strides for strides in of_keys if strides is not None]
    in_reach = at_hand and all(readable_in_bulk(sizes, strides, spec.dtype.itemsize) for strides in there)
    if in_reach and not any(second for _, second in parts):
        layouts = [
            strides and ([*sizes, dim], block_strides(sizes, strides, width), [1, 1, tile.block_n, width])
            for strides, dim, (width, _) in zip(of_keys, cycle(dims), cycle(parts), strict=False)
        ]
        rounds = BULK_COPIES_ROUND and spec.precision == "tf32"
        if len(layouts) == len(dims):  # as in every ordinary call, whose cost on the host counts
            return tile, partial(_with_two, *layouts, rounds)
        return tile, partial(_with_blocks, layouts, rounds)
    whole = in_reach and all(sum(both) <= SHORT for both in parts)
    block_n = tile.block_n if whole else max(SMALLEST_PART, tile.block_n // 2)
    return tile._replace(block_n=block_n, descriptors=False), tuple


class _Checked(TensorDescriptor):
    """One whose layout was found fit already: Triton would look at it again at every launch."""

    def __init__(
        self, base: Tensor, shape: list[int], strides: list[int], block_shape: list[int], rounds: bool
    ) -> None:
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape
        self.round_f32_to_tf32 = rounds  # which Triton 3.6 does not know


def _with_two(of_k: tuple, of_v: tuple, rounds: bool, tensors: tuple[Tensor | None, ...]) -> tuple:
    return tensors[0], _Checked(tensors[1], *of_k, rounds), _Checked(tensors[2], *of_v, rounds), *tensors[3:]


def _with_blocks(layouts: list, rounds: bool, tensors: tuple[Tensor | None, ...]) -> tuple:
    read = zip(tensors[1:], layouts, strict=False)
    blocks = [of and _Checked(tensor, *of, rounds) for tensor, of in read]
    return tensors[0], *blocks, *tensors[1 + len(layouts) :]
