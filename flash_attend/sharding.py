"""Attention of DTensors: each rank attends over what it holds, and nothing is sent but keys that ranks share.

Batch entries do not see each other, and neither do heads: a call whose q, k and v are sharded on those is one call a
rank. Where they are sharded on the sequence, ranks attend to each other's keys as `context_parallel_attention` does.
Any other call that would need another rank's data is refused, where DTensor itself would gather it without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from flash_attend.functional import flash_attention
from flash_attend.operands import Operands

__all__ = ["attend_locally"]

BATCH, HEADS, QUERIES = Shard(0), Shard(1), Shard(2)
DIMENSIONS: dict[str, dict[int, tuple[str, ...]]] = {
    "q": {4: ("batch", "heads", "queries", "d")},
    "k": {4: ("batch", "heads", "keys", "d"), 3: ("batch", "keys", "d")},
    "v": {4: ("batch", "heads", "keys", "dv"), 3: ("batch", "keys", "dv")},
    "mask": {4: ("batch", "heads", "queries", "keys"), 2: ("batch", "keys")},
    "bias": {rank: ("batch", "heads", "queries", "keys")[4 - rank :] for rank in range(5)},
    "alibi_slopes": {1: ("heads",), 2: ("batch", "heads")},
    "sinks": {1: ("heads",)},
}


def attend_locally(given: Operands, options: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` with its options on each rank's part of DTensors.

    Shapes as in `flash_attention`. On each dimension of the mesh q is replicated or sharded on batch or heads, and k
    and v are as q is; where q is sharded on heads and k and v have only one, they are replicated. On one of them q may
    be sharded on queries, evenly, and k and v on keys. The mask, the bias, the slopes and the sinks are as q is,
    replicated where they have no such dimension or one of 1, or replicated as a whole where they need no gradient; a
    key mask is as k is. What comes back is placed as q is.

    Raises:
        TypeError: some are DTensors and others are not.
        ValueError: the meshes differ, a placement is another one, or `dropout_p` is not 0.
    """
    q = _checked("q", given.q)
    mesh, placements = q.device_mesh, q.placements
    k, v = _checked("k", given.k, mesh), _checked("v", given.v, mesh)
    names = ("mask", "bias", "alibi_slopes", "sinks")
    others = {name: _checked(name, x, mesh) for name in names if (x := getattr(given, name)) is not None}
    # What is dropped depends on the place in the whole batch, and ranks draw seeds of their own.
    if dropout_p := options["dropout_p"]:
        raise ValueError(f"dropout_p must be 0 for DTensors, got {dropout_p}")
    sequence = next((at for at, placement in enumerate(placements) if placement == QUERIES), None)
    for at, placement in enumerate(placements):
        if placement not in (Replicate(), BATCH, HEADS, QUERIES) or (placement == QUERIES and at != sequence):
            raise _misplaced("q", q, at, "replicated or sharded on batch or heads, or once on queries")

    inputs = [_part("q", q)]
    for name, tensor in (("k", k), ("v", v)):
        wanted = _places_of_heads(name, tensor, q)
        # Where every rank has heads of its own for the same k and v, each finds a part of their gradients.
        pairs = zip(wanted, placements, strict=True)
        parts = [Partial() if ours == Replicate() != theirs else ours for ours, theirs in pairs]
        inputs.append(_part(name, tensor, parts))
    local = {name: _other_part(name, tensor, q) for name, tensor in others.items()}
    attend: Any = flash_attention if sequence is None else _attend_along(sequence, q, k)
    found = attend(*inputs, **local, **options)

    even = all(q.shape[one.dim] % mesh.size(at) == 0 for at, one in enumerate(placements) if isinstance(one, Shard))

    def whole(part: Tensor, *last: int) -> DTensor:
        if even:
            return DTensor.from_local(part, mesh, placements, run_check=False)
        shape = torch.Size((*q.shape[:3], *last))
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=_strides(shape, part))

    if isinstance(found, Tensor):
        return whole(found, v.shape[-1])
    out, lse = found
    return whole(out, v.shape[-1]), whole(lse)


def _attend_along(sequence: int, q: DTensor, k: DTensor) -> Any:
    """`flash_attention` of parts of sequences, which the ranks along a dimension of the mesh share."""
    from flash_attend.context_parallel import ContextParallel

    ranks = q.device_mesh.size(sequence)
    for name, length, dimension in (("q", q.shape[2], "queries"), ("k", k.shape[-2], "keys")):
        if length % ranks:
            raise ValueError(f"{name} must have {dimension} that {ranks} ranks can share evenly, got {length}")
    return ContextParallel(q.device_mesh.get_group(sequence)).attend


def _checked(name: str, tensor: Tensor, mesh: DeviceMesh | None = None) -> DTensor:
    """The tensor, which has to be a DTensor, and on this mesh."""
    if not isinstance(tensor, DTensor):
        raise TypeError(f"{name} must be a DTensor, as others of q, k, v and mask are, got {type(tensor).__name__}")
    if tensor.ndim not in DIMENSIONS[name]:
        ranks = " or ".join(map(str, DIMENSIONS[name]))
        raise ValueError(f"{name} must have {ranks} dimensions, got {tensor.ndim}")
    if mesh is not None and tensor.device_mesh != mesh:
        raise ValueError(f"{name} must be on q's mesh {mesh}, got {tensor.device_mesh}")
    return tensor


def _part(name: str, tensor: DTensor, grad_placements: Sequence[Placement] | None = None) -> Tensor:
    """What this rank holds; raises unless that is as much as the placements say."""
    part = tensor.to_local(grad_placements=grad_placements)
    # The compiler knows the lengths of a part and of the whole by different symbols: comparing them ties one to the
    # other. Left alone, torch finds out what they have in common while it counts a graph's outputs, and miscounts.
    for dim, dimension in enumerate(DIMENSIONS[name][tensor.ndim]):
        held, length = part.shape[dim], tensor.shape[dim]
        ranks = 1
        for at, placement in enumerate(tensor.placements):
            ranks *= tensor.device_mesh.size(at) if placement == Shard(dim) else 1
        if length % ranks == 0 and held * ranks != length:
            raise ValueError(f"{name} must hold {length // ranks} of {length} {dimension} on each rank, got {held}")
    return part


def _places_of_heads(name: str, tensor: DTensor, q: DTensor) -> list[Placement]:
    """Where k or v has to be for q; raises if it is elsewhere."""
    heads, own_heads = q.shape[1], tensor.shape[1] if tensor.ndim == 4 else 1
    ranks = 1
    wanted = []
    for at, (placement, found) in enumerate(zip(q.placements, tensor.placements, strict=True)):
        shared = placement == HEADS and own_heads == 1 and (heads > 1 or tensor.ndim == 3)
        own = Shard(tensor.ndim - 2) if placement == QUERIES else placement
        wanted.append(Replicate() if shared else own)
        if found != wanted[-1]:
            reason = f"as q is {_told('q', q, at)}" + (f" and {name} has one head" if shared else "")
            raise _misplaced(name, tensor, at, f"{_told(name, tensor, at, wanted[-1])}, {reason}")
        ranks *= q.device_mesh.size(at) if placement == HEADS else 1
    if own_heads not in (1, heads) and own_heads % ranks:
        raise ValueError(f"{name} has {own_heads} heads, which {ranks} ranks cannot share as they share q's {heads}")
    return wanted


def _other_part(name: str, tensor: DTensor, q: DTensor) -> Tensor:
    """What this rank reads of a mask, of a bias, of slopes or of sinks."""
    wanted = _places_of(name, tensor, q)
    # What is the same for several ranks has a part of its gradient from each.
    pairs = zip(wanted, q.placements, strict=True)
    parts = [Partial() if ours == Replicate() != theirs else ours for ours, theirs in pairs]
    if list(tensor.placements) != wanted:  # of a tensor without a gradient, which would be gathered
        tensor = tensor.redistribute(placements=wanted)
    return _part(name, tensor, parts)


def _places_of(name: str, tensor: DTensor, q: DTensor) -> list[Placement]:
    """Where a mask, a bias, slopes or sinks have to be for q; raises if they cannot come there without being sent."""
    wanted: list[Placement] = []
    own = DIMENSIONS[name][tensor.ndim]
    for at, (placement, found) in enumerate(zip(q.placements, tensor.placements, strict=True)):
        dimension = DIMENSIONS["q"][4][placement.dim] if isinstance(placement, Shard) else ""
        dimension = "keys" if placement == QUERIES and name == "mask" else dimension
        follows = dimension in own and tensor.shape[own.index(dimension)] > 1
        wanted.append(Shard(own.index(dimension)) if follows else Replicate())
        # The gradient of what each rank cuts out of a replicated tensor would have to be gathered.
        cut = not (follows and tensor.requires_grad)
        if found != wanted[-1] and not (cut and found == Replicate()):
            as_q = _told(name, tensor, at, wanted[-1])
            either = (f"replicated or {as_q}" if cut else as_q) if follows else "replicated"
            raise _misplaced(name, tensor, at, f"{either}, as q is {_told('q', q, at)}")
    return wanted


def _told(name: str, tensor: DTensor, at: int, placement: Placement | None = None) -> str:
    """A placement (the tensor's own by default) in words."""
    placement = tensor.placements[at] if placement is None else placement
    if isinstance(placement, Replicate):
        return "replicated"
    if type(placement) is Shard:
        return f"sharded on {DIMENSIONS[name][tensor.ndim][placement.dim]}"
    return str(placement)


def _misplaced(name: str, tensor: DTensor, at: int, wanted: str) -> ValueError:
    found = f"{_told(name, tensor, at)} ({tensor.placements[at]})"
    return ValueError(f"{name} must be {wanted}; on dimension {at} of the mesh it is {found}")


def _strides(shape: Sequence[int], part: Tensor) -> tuple[int, ...]:
    """The strides of a dense tensor whose dimensions lie in memory in the order of a part's."""
    strides = []
    for dim, stride in enumerate(part.stride()):
        step = 1
        # Strides may be symbols of a compiler, which it can compare, but neither sort nor compare inside a tuple.
        for other, inner in enumerate(part.stride()):
            if inner < stride or (inner == stride and other > dim):
                step *= max(shape[other], 1)
        strides.append(step)
    return tuple(strides)
