"""Attention and its gradients as differentiable functions, whoever runs them. No arithmetic here.

The first derivatives come from whoever ran the forward. Further ones come from a recomputation through the einsum path:
correct, slower, and holding several arrays of all scores, `(b, h, i, j)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from flash_attend.reference import attention_reference_gradients
from flash_attend.spec import AttentionSpec

__all__ = ["Attention", "Gradients"]


class _Function(_SingleLevelFunction):
    """What `torch.autograd.Function` is made from, and torch.func makes the single levels of a function from.

    Its `apply` goes straight to the engine. That of `Function` binds arguments and looks for torch.func first, in some
    25 microseconds. Where torch.func is on, an operator's autograd kernel calls it, which sees one level at a time.
    """

    apply: ClassVar[Callable[..., tuple[Tensor, ...]]]


class Attention(_Function):
    """`(q, k, v) -> (out, lse, *schedule)`; out and lse are differentiable.

    `run(q, k, v, mask, seed, spec)` gives the outputs, and `differentiate(needed, grad_out, grad_lse, q, k, v, mask,
    seed, spec, out, lse, *schedule)` the gradients of those of q, k and v that are needed. Shapes as `normalise_inputs`
    returns them; `seed` is a one-element int64 tensor on q's device, or None.
    """

    @staticmethod
    def forward(
        run: Callable[..., tuple[Tensor, ...]],
        differentiate: Callable[..., Iterable[Tensor]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        spec: AttentionSpec,
    ) -> tuple[Tensor, ...]:
        return run(q, k, v, mask, seed, spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _, ctx.differentiate, *tensors, ctx.spec = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        q, k, v, mask, seed, *outputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:5]
        found = ctx.differentiate(needed, grad_out, grad_lse, q, k, v, mask, seed, ctx.spec, *outputs)
        return None, None, *_spread(found, needed), None, None, None


class Gradients(_Function):
    """`(grad_out, grad_lse, q, k, v) ->` the gradients of those of q, k and v that are needed.

    `run` takes all inputs after itself and gives them. Out, lse and the schedule follow from q, k and v, so that no
    derivative goes through them.
    """

    @staticmethod
    def forward(
        run: Callable[..., Iterable[Tensor]],
        needed: Sequence[bool],
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        spec: AttentionSpec,
        *outputs: Tensor,
    ) -> tuple[Tensor, ...]:
        return tuple(run(needed, grad_out, grad_lse, q, k, v, mask, seed, spec, *outputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _, ctx.needed, *tensors, ctx.spec = inputs[:10]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, mask, seed = ctx.saved_tensors
        present = [tensor is not None for tensor in tensors]

        def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
            every: list[Any] = _spread(inputs, present)
            grad_out, grad_lse, q, k, v = every
            return attention_reference_gradients(grad_out, grad_lse, q, k, v, mask, seed, ctx.spec)

        found, pull_back, *_ = torch.func.vjp(gradients, *compress(tensors, present))
        cotangents = zip(found, _spread(grads, ctx.needed), strict=True)
        pulled = pull_back(tuple(torch.zeros_like(x) if grad is None else grad for x, grad in cotangents))
        others = len(ctx.needs_input_grad) - 2 - len(tensors)
        return None, None, *_spread(pulled, present), *(None for _ in range(others))


def _spread(found: Iterable[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """What was found in the places where it is needed, None elsewhere."""
    following = iter(found)
    return [next(following) if need else None for need in needed]
