"""Rules for `torch.vmap`: the dimension that is mapped over is folded into the batch, so that one launch serves all.

With dropout and randomness="different" each entry has drawn a seed; the first serves the folded batch, whose entries
differ by their place. With randomness="same" they share a seed, and each takes a launch of its own. So do entries with
sinks of their own, and those whose gradients of sinks are asked for, each a sum over one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from flash_attend import ops
from flash_attend.ops import OUTPUTS, Options

__all__ = ["backward_vmap", "forward_vmap", "map_backward", "map_forward"]

# Outputs of a forward that have a number for each query, or more: out, lse, statistics; in forward mode tangents of the
# first two beside them. The rest is a mask's.
ROWS = 3

Apply = Callable[..., Sequence[Tensor]]
Dims = Sequence[int | None]
Mapped = tuple[tuple[Tensor, ...], tuple[int | None, ...]]  # results, and where the mapped dimension is in each


def map_forward(
    apply: Apply, size: int, numbers: list[float], options: str, operands: Sequence[Tensor], dims: Dims
) -> Mapped:
    """`apply(numbers, options, *operands)` for `size` entries, which are along the dimensions `dims`."""
    call = _Folded(size, options, operands, dims)
    if call.one_by_one:
        return call.each(apply, numbers, options, operands, dims)
    results, rows = apply(numbers, options, *call.operands), ROWS + len(OUTPUTS) * bool(Options.read(options).tangents)
    outputs, schedule = tuple(call.unfold(tensor, call.batch) for tensor in results[:rows]), results[rows:]
    if call.shared_schedule:
        return (*outputs, *schedule), (*(0 for _ in outputs), *(None for _ in schedule))
    schedule = tuple(call.unfold(tensor, call.batch * call.planes) for tensor in schedule)
    return (*outputs, *schedule), tuple(0 for _ in results)


def map_backward(
    apply: Apply, size: int, numbers: list[float], options: str, tensors: Sequence[Tensor], dims: Dims
) -> Mapped:
    """`apply(numbers, options, *tensors)` for `size` entries; the tensors are grads, operands and outputs."""
    said = Options.read(options)
    (grads, operands, outputs), (of_grads, of_operands, of_outputs) = said.parts(tensors), said.parts(dims)
    call = _Folded(size, options, operands, of_operands)
    if call.one_by_one:
        own = [*grads, *operands, *outputs[:ROWS], *map(call.of_entry, outputs[ROWS:], of_outputs[ROWS:])]
        return call.each(apply, numbers, options, own, dims)
    schedule = outputs[ROWS:] if call.shared_schedule else map(call.fold, outputs[ROWS:], of_outputs[ROWS:])
    by_rows = map(call.fold, outputs[:ROWS], of_outputs[:ROWS])
    folded = *map(call.fold, grads, of_grads), *call.operands, *by_rows, *schedule
    results = apply(numbers, options, *folded)
    found = (call.unfold_gradient(name, grad) for name, grad in zip(said.needed, results, strict=True))
    return tuple(found), tuple(0 for _ in results)


class _Folded:
    """The operands of `size` calls as those of one call, whose batch is theirs one after another."""

    def __init__(self, size: int, options: str, operands: Sequence[Tensor], dims: Dims) -> None:
        self.size = size
        self.sizes: dict[str, int] = {}  # of the batch of a bias and of slopes: 1 where that is broadcast
        dim_of = dict(zip(Options.read(options).names, dims, strict=True))
        given = dict(zip(dim_of, operands, strict=True))
        mask = given.get("mask")
        # Whether the schedule is the same for the whole of the folded batch: it is the mask's, or a bias makes it.
        shared = mask is None or (dim_of["mask"] is None and mask.shape[0] == 1)
        self.shared_schedule = shared and "bias" not in given
        self.planes = 1  # of the schedule for each of an entry's batch
        self.one_schedule = False  # whether all of an entry's batch have the same, where its bias makes it
        one_mask = mask is None or mask.shape[1 if dim_of["mask"] == 0 else 0] == 1
        needed = Options.read(options).needed
        # Those that share a seed drop the same weights, which depend on the place in the batch; sinks have no batch,
        # and sequences that are packed one of one.
        of_sinks = given.keys() & {"sinks", "sinks_tangent"}
        own_sinks = any(dim_of[name] is not None or name in needed for name in of_sinks)
        one_seed = "seed" in given and dim_of["seed"] is None
        self.one_by_one = size > 0 and (own_sinks or one_seed or "segments" in given)
        self.batch = self.entries(given["q"], dim_of["q"]).shape[1]
        if mask is not None and not self.shared_schedule:
            mask = self.entries(mask, dim_of["mask"]).expand(-1, self.batch, -1, -1, -1)
            self.planes = mask.shape[2]
            given["mask"] = mask.flatten(0, 1)
        if "seed" in given and not self.one_by_one:
            seeds = self.entries(given["seed"], dim_of["seed"])
            given["seed"] = seeds[0] if size else seeds.new_zeros(1)
        for name in given.keys() & {"bias", "bias_tangent", "alibi_slopes"}:
            entries = self.entries(given[name], dim_of[name])
            self.sizes[name] = entries.shape[1]
            if name != "alibi_slopes" or dim_of[name] is not None or entries.shape[1] > 1:
                given[name] = entries.expand(-1, self.batch, *entries.shape[2:]).flatten(0, 1)
            if name == "bias":
                self.planes = max(self.planes, entries.shape[2])
                self.one_schedule = entries.shape[1] == 1 and one_mask
        if own_sinks and not size:
            given |= dict.fromkeys(of_sinks, given["q"].new_zeros(self.entries(given["q"], dim_of["q"]).shape[2]))
        moved = given.keys() & {"q", "k", "v", "q_tangent", "k_tangent", "v_tangent"}
        given |= {name: self.fold(given[name], dim_of[name]) for name in moved}
        self.operands = tuple(given.values())

    def entries(self, tensor: Tensor, dim: int | None) -> Tensor:
        """`(size, b, ...)`."""
        return tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def fold(self, tensor: Tensor, dim: int | None) -> Tensor:
        """`(b, ...)`, mapped over `dim`, as `(size * b, ...)`: a view where the strides allow it."""
        return self.entries(tensor, dim).flatten(0, 1)

    def of_entry(self, tensor: Tensor, dim: int | None) -> Tensor:
        """A schedule of entries, made for a folded batch, as an entry by itself has it."""
        if dim is None or not self.one_schedule:
            return tensor
        return tensor.narrow(1 if dim == 0 else 0, 0, self.planes)

    def unfold(self, tensor: Tensor, rows: int) -> Tensor:
        """`(size * rows, ...)` as `(size, rows, ...)`."""
        return tensor.unflatten(0, (self.size, rows))

    def unfold_gradient(self, name: str, grad: Tensor) -> Tensor:
        """The gradient of an input for each entry."""
        if name in ("sinks", "sinks_tangent"):  # of no entries: others are taken one by one
            return grad.new_zeros(self.size, *grad.shape)
        grad = self.unfold(grad, self.batch)
        return grad.sum(dim=1, keepdim=True) if self.sizes.get(name, self.batch) != self.batch else grad

    def each(self, apply: Apply, numbers: list[float], options: str, tensors: Sequence[Tensor], dims: Dims) -> Mapped:
        def entry(index: int) -> Sequence[Tensor]:
            parts = (x if dim is None else x.select(dim, index) for x, dim in zip(tensors, dims, strict=True))
            return apply(numbers, options, *parts)

        stacked = tuple(map(torch.stack, zip(*map(entry, range(self.size)), strict=True)))
        return stacked, tuple(0 for _ in stacked)


# ---------------------------------------------------------------------------------------------------------------------
# Of the operators themselves, in exported programs
# ---------------------------------------------------------------------------------------------------------------------


def forward_vmap(info: Any, in_dims: tuple, operands: list[Tensor], numbers: list[float], options: str) -> tuple:
    def apply(numbers: list[float], options: str, *operands: Tensor) -> list[Tensor]:
        return ops.FORWARD(operands, numbers, options)

    return tuple(map(list, map_forward(apply, info.batch_size, numbers, options, operands, in_dims[0])))


def backward_vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
    def apply(numbers: list[float], options: str, *tensors: Tensor) -> list[Tensor]:
        return ops.BACKWARD(*Options.read(options).parts(tensors), numbers, options)

    *lists, numbers, options = arguments
    tensors, dims = ([*chain(*each)] for each in (lists, in_dims[:3]))
    return tuple(map(list, map_backward(apply, info.batch_size, numbers, options, tensors, dims)))


if ops.FIRST_IMPORT:
    for _name in ("forward", "backward"):
        torch.library.register_vmap(f"flash_attend::{_name}", ops.latest(__name__, f"{_name}_vmap"))
