"""Rules for `torch.vmap`: the dimension that is mapped over is folded into the batch, so that one launch serves all of it.

With dropout and randomness="different" each entry has drawn a seed; the first serves the folded batch, whose entries
differ by their place. With randomness="same" they share a seed, and each takes a launch of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attend.ops import Options

__all__ = ["map_forward", "map_backward"]

Dims = Sequence[int | None]
Mapped = tuple[tuple[Tensor, ...], tuple[int | None, ...]]  # results, and where the mapped dimension is in each


def map_forward(
    apply: Callable[..., Sequence[Tensor]],
    size: int,
    numbers: list[float],
    options: str,
    operands: Sequence[Tensor],
    dims: Dims,
) -> Mapped:
    """`apply(numbers, options, *operands)` for `size` entries, which operand has along its dimension in `dims`."""
    call = _Folded(size, options, operands, dims)
    if call.one_by_one:
        return call.each(apply, numbers, options, operands, dims)
    results = apply(numbers, options, *call.operands)
    outputs = tuple(call.unfold(tensor, call.batch) for tensor in results[:2])
    if call.shared_mask:
        return (*outputs, *results[2:]), (*(0 for _ in outputs), *(None for _ in results[2:]))
    schedule = tuple(call.unfold(tensor, call.mask_rows) for tensor in results[2:])
    return (*outputs, *schedule), tuple(0 for _ in results)


def map_backward(
    apply: Callable[..., Sequence[Tensor]],
    size: int,
    numbers: list[float],
    options: str,
    tensors: Sequence[Tensor],
    dims: Dims,
) -> Mapped:
    """`apply(numbers, options, *tensors)` for `size` entries; the tensors are grads, operands and outputs."""
    said = Options.read(options)
    first, last = len(said.grads), len(said.grads) + len(said.operands)
    call = _Folded(size, options, tensors[first:last], dims[first:last])
    if call.one_by_one:
        return call.each(apply, numbers, options, tensors, dims)
    grads = map(call.fold, tensors[:first], dims[:first])
    outputs = map(call.fold, tensors[last : last + 2], dims[last : last + 2])
    schedule = tensors[last + 2 :]
    if not call.shared_mask:
        schedule = tuple(map(call.fold, schedule, dims[last + 2 :]))
    results = apply(numbers, options, *grads, *call.operands, *outputs, *schedule)
    return tuple(call.unfold(grad, call.batch) for grad in results), tuple(0 for _ in results)


class _Folded:
    """The operands of `size` calls as those of one call, whose batch is theirs one after another."""

    def __init__(self, size: int, options: str, operands: Sequence[Tensor], dims: Dims) -> None:
        self.size = size
        dim_of = dict(zip(Options.read(options).operands, dims, strict=True))
        given = dict(zip(dim_of, operands, strict=True))
        mask = given.get("mask")
        # Whether the mask, and so its schedule, is the same for the whole of the folded batch.
        self.shared_mask = mask is None or (dim_of["mask"] is None and mask.shape[0] == 1)
        # What shares a seed drops the same weights, which depend on the place in the batch.
        self.one_by_one = size > 0 and "seed" in given and dim_of["seed"] is None
        self.batch = self.entries(given["q"], dim_of["q"]).shape[1]
        if mask is not None and not self.shared_mask:
            mask = self.entries(mask, dim_of["mask"]).expand(-1, self.batch, -1, -1, -1)
            self.mask_rows = self.batch * mask.shape[2]
            given["mask"] = mask.flatten(0, 1)
        if "seed" in given and not self.one_by_one:
            given["seed"] = _first(given["seed"], dim_of["seed"])
        given |= {name: self.fold(given[name], dim_of[name]) for name in ("q", "k", "v")}
        self.operands = tuple(given.values())

    def entries(self, tensor: Tensor, dim: int | None) -> Tensor:
        """`(size, b, ...)`."""
        return tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def fold(self, tensor: Tensor, dim: int | None) -> Tensor:
        """`(b, ...)`, mapped over `dim`, as `(size * b, ...)`: a view where the strides allow it."""
        return self.entries(tensor, dim).flatten(0, 1)

    def unfold(self, tensor: Tensor, rows: int) -> Tensor:
        """`(size * rows, ...)` as `(size, rows, ...)`."""
        return tensor.unflatten(0, (self.size, rows))

    def each(
        self, apply: Callable[..., Sequence[Tensor]], numbers: list[float], options: str, tensors: Sequence[Tensor], dims: Dims
    ) -> Mapped:
        def entry(index: int) -> Sequence[Tensor]:
            parts = (x if dim is None else x.select(dim, index) for x, dim in zip(tensors, dims, strict=True))
            return apply(numbers, options, *parts)

        stacked = tuple(map(torch.stack, zip(*map(entry, range(self.size)), strict=True)))
        return stacked, tuple(0 for _ in stacked)


def _first(seed: Tensor, dim: int | None) -> Tensor:
    """Of the seeds of all entries, one; any, where there are none."""
    if dim is None:
        return seed
    return seed.select(dim, 0) if seed.shape[dim] else seed.new_zeros(1)
