"""Tensors as bulk copies see them: layouts that they can read, and the descriptors that a launch hands over."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["bulk_readable", "described"]

ALIGNMENT = 16  # bytes: of addresses and strides
LARGEST_STRIDE = 2**40  # bytes
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def bulk_readable(tensor: Tensor) -> Tensor:
    """A `(b, h, n, d)` tensor with a contiguous last dimension itself if bulk copies can read it, else a copy.

    They need addresses and strides of whole 16 bytes. Which a tensor has is known only when it is there, not to whoever
    chooses a backend for a program that is being compiled: hence a copy, which costs less than the attention saves.
    """
    strides = (
        stride * tensor.itemsize for stride, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if size > 1
    )
    fit = all(0 < stride < LARGEST_STRIDE and stride % ALIGNMENT == 0 for stride in strides)
    if fit and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def described(blocks: tuple[tuple[int, int], ...], tensors: tuple[Tensor | None, ...]) -> tuple:
    """The tensors, the first of them as descriptors of blocks `[1, 1, rows, columns]` of `(b, h, n, d)`.

    In four dimensions no block reaches over the end of a sequence: beyond it zeros are read and nothing is written.
    """
    first = (_describe(tensor, *block) for tensor, block in zip(tensors, blocks, strict=False))
    return *first, *tensors[len(blocks) :]


def _describe(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    # The stride of a dimension of size 1 is never used, and may be anything.
    strides = [
        stride if size > 1 else columns for stride, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True)
    ]
    block = [1, 1, rows, columns]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], block, _layout(rows, columns, tensor.dtype))


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], DTYPES[dtype])
