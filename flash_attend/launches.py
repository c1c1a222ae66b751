"""The kernels as a backend: tiles chosen, the schedule handed from forward to backward. Importing this needs Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash_attend import operators
from flash_attend.autograd import Attention, Gradients
from flash_attend.backends import Backend
from flash_attend.dispatch import Plan
from flash_attend.kernels.backward import empty_gradients
from flash_attend.kernels.configs import Tiles
from flash_attend.kernels.forward import empty_outputs
from flash_attend.kernels.key_schedule import Schedule, schedule_layout
from flash_attend.spec import AttentionSpec
from flash_attend.target import DeviceTarget
from flash_attend.tracing import differentiated, intercepted, traced

__all__ = ["attend", "backward", "forward", "like_backward", "like_forward", "like_packed", "pack", "unpack"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    target: DeviceTarget,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """What `operators.attend` gives, without the detour through an operator, which takes the host longer."""
    backend = plan.backend
    # Chosen here: the backward runs in another thread and must agree.
    tiles = backend.tiles(spec, target, plan.backward)
    if differentiated(q, k, v):
        run, differentiate = partial(forward, backend, tiles), partial(_differentiate, plan, tiles)
        out, lse, *_ = Attention.apply(run, differentiate, q, k, v, mask, seed, spec)
    else:
        out, lse, _ = backend.forward(q, k, v, mask, seed, spec, tiles)
    return out, lse


def forward(
    backend: Backend,
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, ...]:
    """`(out, lse, *schedule)`."""
    out, lse, schedule = backend.forward(q, k, v, mask, seed, spec, tiles)
    return out, lse, *_present(schedule)


def like_forward(q: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """The out and the lse of `forward`, uninitialised."""
    return empty_outputs(q, spec)


def backward(
    backend: Backend,
    tiles: Tiles,
    needed: Sequence[bool],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    out: Tensor,
    lse: Tensor,
    *schedule: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of those of q, k and v that are needed; `mask` is read through the schedule."""
    whole = Schedule(*schedule, *[None] * (3 - len(schedule)))
    return _present(backend.backward(grad_out, grad_lse, q, k, v, out, lse, seed, whole, spec, tiles, needed))


def like_backward(needed: Sequence[bool], q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, ...]:
    """What `backward` gives, uninitialised."""
    return _present(empty_gradients(q, k, v, spec, needed))


def pack(schedule: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a schedule as the operators hand them over: `(rows, n)` with `n > 1`.

    A compiler makes a graph of its own of every size that is 1, and so of short sequences, which are one block.
    """
    return [
        pad(tensor.flatten(1), (0, 1)) if index == 2 else tensor.flatten(1) for index, tensor in enumerate(schedule)
    ]


def like_packed(tiles: Tiles, mask: Tensor | None, spec: AttentionSpec) -> list[Tensor]:
    """What `pack` gives, uninitialised."""
    if mask is None:
        return []
    layout = enumerate(schedule_layout(mask, spec, tiles))
    return [
        mask.new_empty(shape[0], math.prod(shape[1:]) + (index == 2), dtype=dtype) for index, (shape, dtype) in layout
    ]


def unpack(tiles: Tiles, packed: Sequence[Tensor], mask: Tensor | None, spec: AttentionSpec) -> list[Tensor]:
    """The schedule's tensors again."""
    layout = schedule_layout(mask, spec, tiles)
    return [
        tensor.narrow(1, 0, math.prod(shape[1:])).reshape(shape)
        for tensor, (shape, _) in zip(packed, layout, strict=True)
    ]


def _differentiate(
    plan: Plan,
    tiles: Tiles,
    needed: Sequence[bool],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    out: Tensor,
    lse: Tensor,
    *schedule: Tensor,
) -> Sequence[Tensor]:
    inputs = needed, grad_out, grad_lse, q, k, v, mask, seed, spec, out, lse
    if traced(grad_out, grad_lse) or intercepted():  # a backward may be transformed where its forward was not
        return operators.differentiate(plan.name, plan.backward, *inputs, *pack(schedule))
    if torch.is_grad_enabled():
        return Gradients.apply(partial(backward, plan.backend, tiles), *inputs, *schedule)
    return backward(plan.backend, tiles, *inputs, *schedule)


def _present(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)
