"""What a launch of a kernel in Gluon hands over: descriptors, which have a layout here, and what describes the call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flash_attend.kernels.configs import Tile, Tiles
from flash_attend.kernels.descriptors import block_strides, readable_in_bulk
from flash_attend.kernels.launch import begin_aligned
from flash_attend.kernels.operands import all_edges, mask_strides, scale_sign
from flash_attend.spec import AttentionSpec, MaskKind

__all__ = ["bulk_readable", "call_choices", "call_numbers", "described", "scatters_dead_rows"]

DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


def bulk_readable(tensor: Tensor) -> Tensor:
    """A `(b, h, n, d)` tensor with a contiguous last dimension itself if bulk copies can read it, else a copy.

    They need addresses and strides of whole 16 bytes. Which a tensor has is known only when it is there, not to whoever
    chooses a backend for a program that is being compiled: hence a copy, which costs less than the attention saves.
    """
    if begin_aligned(tensor) and readable_in_bulk(tensor.shape, tensor.stride(), tensor.itemsize):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def described(blocks: tuple[tuple[int, int], ...], tensors: tuple[Tensor | None, ...]) -> tuple:
    """The tensors, the first of them as descriptors of blocks `[1, 1, rows, columns]` of `(b, h, n, d)`; None stays."""
    first = (
        None if tensor is None else _describe(tensor, *block) for tensor, block in zip(tensors, blocks, strict=False)
    )
    return *first, *tensors[len(blocks) :]


def _describe(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    block = [1, 1, rows, columns]
    layout = _layout(rows, columns, tensor.dtype)
    strides = block_strides(tensor.shape, tensor.stride(), columns)
    return TensorDescriptor(tensor, list(tensor.shape), strides, block, layout)


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], DTYPES[dtype])


def scatters_dead_rows(spec: AttentionSpec) -> bool:
    """Whether queries that see no key may be anywhere: where a key mask may hide all that a window shows. Elsewhere
    they are the first ones of their head."""
    return spec.mask == MaskKind.KEY and spec.window[0] is not None


def call_numbers(spec: AttentionSpec, planes: int) -> tuple[int, ...]:
    """The run-time numbers that every kernel takes, in their order. The mask's schedule has so many planes."""
    return spec.queries, spec.keys, spec.heads, spec.group, *mask_strides(spec, planes)


def call_choices(spec: AttentionSpec, tile: Tile, tiles: Tiles) -> dict[str, Any]:
    """The compile-time arguments that every kernel takes."""
    return dict(
        WIDTH=spec.head_dim,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SCHEDULE_N=tiles.schedule_block[1],
        MASK=int(spec.mask),
        **all_edges(spec),
        SCALE_SIGN=scale_sign(spec),
    )
