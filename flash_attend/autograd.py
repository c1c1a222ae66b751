"""Attention and its gradients as differentiable functions, whoever runs them. No arithmetic here.

The first derivatives come from whoever ran the forward. Further ones, and forward mode, come from a recomputation
through the einsum path: correct, slower, and holding several arrays of all scores, `(b, h, i, j)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from flash_attend.reference import attention_reference
from flash_attend.spec import AttentionSpec

__all__ = ["Attention", "Gradients", "apply"]


def apply(function: type[torch.autograd.Function], *inputs: Any) -> tuple[Tensor, ...]:
    """`function.apply`, without what Python puts before it: 25 microseconds, and torch.func's own way to a function.

    Under a transform of torch.func this belongs into an operator's autograd kernel, which sees one level at a time.
    """
    return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]


class Attention(torch.autograd.Function):
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
        ctx.save_for_forward(*tensors, *output)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        q, k, v, mask, seed, *outputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:5]
        found = ctx.differentiate(needed, grad_out, grad_lse, q, k, v, mask, seed, ctx.spec, *outputs)
        return None, None, *_spread(found, needed), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, mask, seed, out, lse, *schedule = ctx.saved_tensors
        function = _recomputation(mask, seed, ctx.spec)
        return *_push_forward(function, (q, k, v), tangents[2:5], (out, lse)), *(None for _ in schedule)


class Gradients(torch.autograd.Function):
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
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        function, primals = _recomputed_gradients(ctx)
        _, pull_back = torch.func.vjp(function, *primals)
        found = pull_back(_filled(grads, compress(primals[2:], ctx.needed)))
        wanted = ctx.needs_input_grad[2:7]
        others = len(ctx.needs_input_grad) - 7
        return None, None, *_spread(compress(found, wanted), wanted), *(None for _ in range(others))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        function, primals = _recomputed_gradients(ctx)
        return _push_forward(function, primals, tangents[2:7], tuple(compress(primals[2:], ctx.needed)))


Function = Callable[..., tuple[Tensor, ...]]


def _recomputation(mask: Tensor | None, seed: Tensor | None, spec: AttentionSpec) -> Function:
    """`(q, k, v) -> (out, lse)` through the einsum path."""
    return partial(attention_reference, mask=mask, seed=seed, spec=spec, return_lse=True)


def _recomputed_gradients(ctx: Any) -> tuple[Function, tuple[Tensor, ...]]:
    """What `Gradients` computes, in operations that are differentiable, and its inputs."""
    grad_out, grad_lse, q, k, v, mask, seed = ctx.saved_tensors
    attend, spec = _recomputation(mask, seed, ctx.spec), ctx.spec
    if grad_out is None:
        grad_out = q.new_zeros(spec.batch, spec.heads, spec.queries, spec.value_dim)
    if grad_lse is None:
        grad_lse = q.new_zeros(spec.batch, spec.heads, spec.queries, dtype=spec.accumulator_dtype)

    def gradients(grad_out: Tensor, grad_lse: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        _, pull_back = torch.func.vjp(attend, *inputs)
        return tuple(compress(pull_back((grad_out, grad_lse)), ctx.needed))

    return gradients, (grad_out, grad_lse, q, k, v)


def _push_forward(
    function: Function,
    primals: tuple[Tensor, ...],
    tangents: Sequence[Tensor | None],
    outputs: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """The derivatives of `outputs = function(*primals)` along tangents, None for none.

    By reverse mode twice: pulling back is linear, and the transpose of that is pushing forward. Forward mode itself
    does not nest inside torch's own forward mode.
    """

    def pull_back(*cotangents: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(function, *primals)[1](cotangents)

    _, transposed = torch.func.vjp(pull_back, *map(torch.zeros_like, outputs))
    return transposed(_filled(tangents, primals))


def _filled(tensors: Sequence[Tensor | None], like: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The tensors, with zeros in place of None."""
    return tuple(torch.zeros_like(y) if x is None else x for x, y in zip(tensors, like, strict=True))


def _spread(found: Iterable[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """What was found in the places where it is needed, None elsewhere."""
    following = iter(found)
    return [next(following) if need else None for need in needed]
