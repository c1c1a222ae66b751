"""The kernels as a backend: tiles chosen, the schedule handed from forward to backward. Importing this needs Triton."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash_attend import operators
from flash_attend.autograd import Attention, Gradients
from flash_attend.kernels.backward import attention_backward, empty_gradients
from flash_attend.kernels.configs import Tiles, select_tiles
from flash_attend.kernels.forward import attention_forward, empty_outputs
from flash_attend.kernels.schedule import Schedule, schedule_layout
from flash_attend.operands import Operands
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    """What `operators.attend` gives, without the detour through an operator, which takes the host longer."""
    tiles = select_tiles(spec, target, backend)  # chosen here: the backward runs in another thread and must agree
    if differentiated(q, k, v):
        run, differentiate = partial(forward, backend, tiles), partial(_differentiate, backend, tiles)
        out, lse, *_ = Attention.apply(run, differentiate, q, k, v, mask, seed, spec)
    else:
        out, lse, _ = _forward_of(backend)(Operands(q, k, v, mask, seed), spec, tiles)
    return out, lse


def _forward_of(backend: str) -> Callable[..., tuple[Tensor, Tensor, Schedule]]:
    if backend.startswith("triton"):
        return attention_forward
    from flash_attend.kernels.hopper.forward import attention_forward as hopper_forward  # imports Gluon

    return hopper_forward


def _backward_of(backend: str) -> Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]:
    if backend.startswith("triton"):
        return attention_backward
    from flash_attend.kernels.hopper.backward import attention_backward as hopper_backward  # imports Gluon

    return hopper_backward


def forward(
    backend: str,
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, ...]:
    """`(out, lse, *schedule)`."""
    out, lse, schedule = _forward_of(backend)(Operands(q, k, v, mask, seed), spec, tiles)
    return out, lse, *_present(schedule)


def like_forward(q: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """The out and the lse of `forward`, uninitialised."""
    return empty_outputs(q, spec)


def backward(
    backend: str,
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
    run = _backward_of(backend)
    return _present(run(grad_out, grad_lse, Operands(q, k, v, mask, seed), out, lse, whole, spec, tiles, needed))


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
    backend: str,
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
        return operators.differentiate(backend, *inputs, *pack(schedule))
    if torch.is_grad_enabled():
        return Gradients.apply(partial(backward, backend, tiles), *inputs, *schedule)
    return backward(backend, tiles, *inputs, *schedule)


def _present(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)
