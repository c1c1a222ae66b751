"""The kernels as one differentiable operation: launch, save, return. No arithmetic here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash_attend.kernels.backward import attention_backward
from flash_attend.kernels.configs import select_tiles
from flash_attend.kernels.forward import attention_forward
from flash_attend.kernels.key_schedule import Schedule
from flash_attend.spec import AttentionSpec
from flash_attend.target import DeviceTarget

__all__ = ["FlashAttention"]


class FlashAttention(torch.autograd.Function):
    """`(q, k, v) -> (out, lse)`, both differentiable once.

    Shapes as `normalise_inputs` returns them; `seed` is a one-element int64 tensor on q's device, or None.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        spec: AttentionSpec,
        target: DeviceTarget,
    ) -> tuple[Tensor, Tensor]:
        tiles = select_tiles(spec, target)  # chosen here: the backward runs in another thread and must agree
        out, lse, schedule = attention_forward(q, k, v, mask, seed, spec, tiles)
        ctx.spec, ctx.tiles = spec, tiles
        ctx.save_for_backward(q, k, v, out, lse, seed, *schedule)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
        q, k, v, out, lse, seed, *schedule = ctx.saved_tensors
        grads = attention_backward(
            grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            lse,
            seed,
            Schedule(*schedule),
            ctx.spec,
            ctx.tiles,
            ctx.needs_input_grad[:3],
        )
        return *grads, None, None, None, None
