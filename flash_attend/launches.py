"""The kernels as a backend: tiles chosen, the schedule handed from forward to backward. Importing this needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from flash_attend import operators
from flash_attend.autograd import Attention, Gradients, apply
from flash_attend.kernels.backward import attention_backward, empty_gradients
from flash_attend.kernels.configs import Tiles, select_tiles
from flash_attend.kernels.forward import attention_forward, empty_outputs
from flash_attend.kernels.key_schedule import Schedule, empty_schedule
from flash_attend.spec import AttentionSpec
from flash_attend.target import DeviceTarget
from flash_attend.tracing import differentiated, intercepted, traced

__all__ = ["attend", "backward", "forward", "like_backward", "like_forward"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    target: DeviceTarget,
) -> tuple[Tensor, Tensor]:
    """What `operators.attend` gives, without the detour through an operator, which takes the host longer."""
    tiles = select_tiles(spec, target)  # chosen here: the backward runs in another thread and must agree
    if differentiated(q, k, v):
        run, differentiate = partial(forward, tiles), partial(_differentiate, tiles)
        out, lse, *_ = apply(Attention, run, differentiate, q, k, v, mask, seed, spec)
    else:
        out, lse, _ = attention_forward(q, k, v, mask, seed, spec, tiles)
    return out, lse


def forward(
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, ...]:
    """`(out, lse, *schedule)`."""
    out, lse, schedule = attention_forward(q, k, v, mask, seed, spec, tiles)
    return out, lse, *_present(schedule)


def like_forward(tiles: Tiles, q: Tensor, mask: Tensor | None, spec: AttentionSpec) -> tuple[Tensor, ...]:
    """What `forward` gives, uninitialised."""
    return *empty_outputs(q, spec), *_present(empty_schedule(mask, spec, tiles))


def backward(
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
    return _present(attention_backward(grad_out, grad_lse, q, k, v, out, lse, seed, whole, spec, tiles, needed))


def like_backward(needed: Sequence[bool], q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, ...]:
    """What `backward` gives, uninitialised."""
    return _present(empty_gradients(q, k, v, spec, needed))


def _differentiate(
    tiles: Tiles, needed: Sequence[bool], grad_out: Tensor | None, grad_lse: Tensor | None, *others
) -> Sequence[Tensor]:
    if traced(grad_out, grad_lse) or intercepted():  # a backward may be transformed where its forward was not
        return operators.differentiate("triton", needed, grad_out, grad_lse, *others)
    if torch.is_grad_enabled():
        return apply(Gradients, partial(backward, tiles), needed, grad_out, grad_lse, *others)
    return backward(tiles, needed, grad_out, grad_lse, *others)


def _present(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)
