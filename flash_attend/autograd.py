"""Attention as a differentiable function, in three ways: a backend's own functions for plain eager calls, the opaque
operators under the transforms of torch.func, and formulas of the operators themselves for compiled and exported programs.

First derivatives come from the backend. Further ones, and all that are pushed forward, are those of the einsum path:
correct, slower, and holding several arrays of all scores, `(b, h, i, j)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_attend import ops
from flash_attend.operands import Operands
from flash_attend.ops import INPUTS, OUTPUTS, Options
from flash_attend.reference import attention_reference, attention_reference_gradients
from flash_attend.spec import AttentionSpec
from flash_attend.target import DeviceTarget
from flash_attend.tracing import constant_when_compiled, differentiated, directly, forward_mode, mapped, traced, transformed, watched
from flash_attend.vmap import map_backward, map_forward

if TYPE_CHECKING:
    from flash_attend.dispatch import Plan

__all__ = ["attend"]

OPERANDS = len(Operands._fields)


def attend(
    operands: Operands, spec: AttentionSpec, plan: Plan, *, return_lse: bool, traced: bool
) -> tuple[Tensor, Tensor | None]:
    """`out (b, h, i, dv)` and `lse (b, h, i)`, as a plan has them computed; without `return_lse` the lse may be None.

    `traced` says whether operators are called for: by a compiler, which would make of the einsum path's loop over chunks
    as many graphs as there are lengths, or by the class of a tensor.
    """
    einsum = plan.backward == "einsum"
    if traced or (not einsum and watched()):
        return _through_operators(operands, spec, plan, return_lse)
    if einsum:
        out, lse = attention_reference(operands, spec, return_lse=return_lse)
        return _keep_outputs(out, lse) if out.requires_grad and not watched() else (out, lse)
    tiles = plan.backend.tiles(spec, DeviceTarget.of(operands.q.device), plan.backward)
    if not differentiated(*operands[:3]):
        return plan.backend.forward(operands, spec, tiles)[:2]
    return _attend_eagerly(*operands[:3], (operands, spec, plan, tiles))


def _through_operators(
    operands: Operands, spec: AttentionSpec, plan: Plan, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    if forward_mode():
        return attention_reference(operands, spec, return_lse=return_lse)
    if not torch.compiler.is_compiling():
        operands = operands._replace(mask=_savable(operands.mask))
    numbers, options = ops.options_of(operands, spec, plan, return_lse)
    present = [tensor for tensor in operands if tensor is not None]
    if transformed():
        if torch.compiler.is_compiling():
            _keep_in_graph()
        out, *others = _transformable(numbers, options, *present)
    else:
        out, *others = ops.FORWARD(present, numbers, options)
    return out, others[0] if others else None


@constant_when_compiled
def _keep_in_graph() -> None:
    """Has a compiler that traces Python leave this function to what traces below it, where the transforms are on."""
    torch.compiler.allow_in_graph(_transformable)


def _savable(mask: Tensor | None) -> Tensor | None:
    """A mask made in inference mode may not be saved for a backward, which reads no values but those saved."""
    return mask.clone() if mask is not None and mask.is_inference() else mask


# ---------------------------------------------------------------------------------------------------------------------
# Plain eager calls
# ---------------------------------------------------------------------------------------------------------------------


class Attention(torch.autograd.Function):
    """`(q, k, v, call) -> (out, lse)` by a backend's own functions, with what a call consists of."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: tuple) -> tuple[Tensor, Tensor]:
        operands, spec, plan, tiles = call
        out, lse, schedule = plan.backend.forward(operands, spec, tiles)
        ctx.save_for_backward(q, k, v, _savable(operands.mask), operands.seed, out, lse, *schedule)
        ctx.set_materialize_grads(False)
        ctx.call = spec, plan, tiles, type(schedule)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        spec, plan, tiles, schedule_of = ctx.call
        operands, (out, lse, *schedule) = Operands(*ctx.saved_tensors[:OPERANDS]), ctx.saved_tensors[OPERANDS:]
        needed = ctx.needs_input_grad[:3]
        # Whoever saved them may have changed their strides, of which the kernels take those of q, k, v and out as they are.
        lse = lse.contiguous()
        schedule = schedule_of(*(tensor if tensor is None else tensor.contiguous() for tensor in schedule))
        # A backward may be differentiated, and transformed where its forward was not.
        if torch.is_grad_enabled() or watched() or traced(grad_out, grad_lse) or mapped(grad_out, grad_lse):
            numbers, options = ops.options_of(operands, spec, plan, True)
            present = [tensor for tensor in operands if tensor is not None]
            outputs = [out, lse, *schedule.packed()]
            found = _differentiate((grad_out, grad_lse), present, outputs, numbers, options, [*compress(INPUTS, needed)])
            return *map(found.get, INPUTS), None
        return *plan.backend.backward(grad_out, grad_lse, operands, out, lse, schedule, spec, tiles, needed), None


class Kept(torch.autograd.Function):
    """`(out, lse) -> (out, lse)` of the einsum path, kept for the backward as those of the kernels are: whoever changes
    them in place is told then, as with torch's own attention."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        kept = out.clone(), None if lse is None else lse.clone()
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises where they were changed
        return grads


_attend_eagerly, _keep_outputs = directly(Attention), directly(Kept)


# ---------------------------------------------------------------------------------------------------------------------
# Formulas of the operators
# ---------------------------------------------------------------------------------------------------------------------


def _differentiate(
    grads: Sequence[Tensor | None],
    operands: Sequence[Tensor],
    outputs: Sequence[Tensor],
    numbers: Sequence[float],
    options: str,
    needed: Sequence[str],
) -> dict[str, Tensor]:
    """The gradients by name, of those of q, k and v that are `needed`."""
    if forward_mode() or mapped(*grads):
        said = Options.read(options)
        whole = said.operands_of(operands)
        recompute = _pull_back if mapped(*grads) else attention_reference_gradients
        found = recompute(*grads, whole, ops.spec_of(whole, numbers, said))
        return {name: grad for name, grad in zip(INPUTS, found, strict=True) if name in needed}
    given = [name for name, grad in zip(OUTPUTS, grads, strict=False) if grad is not None]
    present = [grad for grad in grads if grad is not None]
    options = ops.with_gradients(options, given, needed)
    if transformed():
        gradients = TransformableGradients.apply(numbers, options, *present, *operands, *outputs)
    else:
        gradients = ops.BACKWARD(present, operands, outputs, numbers, options)
    return dict(zip(needed, gradients, strict=True))


def _pull_back(
    grad_out: Tensor | None, grad_lse: Tensor | None, operands: Operands, spec: AttentionSpec
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v by torch's own formulas, which alone have a rule for many gradients at once."""
    inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in operands[:3]]
    with torch.enable_grad():
        outputs = attention_reference(Operands(*inputs, *operands[3:]), spec, return_lse=True)
    pairs = [(x, grad) for x, grad in zip(outputs, (grad_out, grad_lse), strict=True) if grad is not None]
    roots, incoming = zip(*pairs, strict=True)
    again = torch.is_grad_enabled()
    return torch.autograd.grad(roots, inputs, incoming, create_graph=again, allow_unused=True, materialize_grads=True)


def _keep(ctx: Any, inputs: tuple, output: Sequence[Tensor]) -> None:
    operands, ctx.numbers, ctx.options = inputs
    ctx.save_for_backward(*operands, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Of every operand that there is."""
    names = Options.read(ctx.options).operands
    operands, outputs = ctx.saved_tensors[: len(names)], ctx.saved_tensors[len(names) :]
    found = _differentiate((*grads, None)[:2], operands, outputs, ctx.numbers, ctx.options, [*compress(names, needs)])
    return [found.get(name) for name in names]


def _keep_for_second(ctx: Any, inputs: tuple, output: Sequence[Tensor]) -> None:
    grads, operands, outputs, ctx.numbers, ctx.options = inputs
    ctx.save_for_backward(*grads, *operands)
    ctx.set_materialize_grads(False)
    ctx.unused = [None] * len(outputs)  # out, lse and the schedule follow from q, k and v


def _second_gradients(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Of the gradients that were given, and of every operand that there is."""
    options = Options.read(ctx.options)
    names = (*options.grads, *options.operands)
    saved = dict(zip(names, ctx.saved_tensors, strict=True))
    inputs = {name: saved[name] for name in (*options.grads, *INPUTS)}

    def gradients(*tensors: Tensor) -> list[Tensor]:
        given = {**saved, **dict(zip(inputs, tensors, strict=True))}
        operands = options.operands_of([given[name] for name in options.operands])
        spec = ops.spec_of(operands, ctx.numbers, options)
        found = attention_reference_gradients(*map(given.get, OUTPUTS), operands, spec)
        return [grad for name, grad in zip(INPUTS, found, strict=True) if name in options.needed]

    found, pull_back, *_ = torch.func.vjp(gradients, *inputs.values())
    pulled = pull_back([torch.zeros_like(x) if grad is None else grad for x, grad in zip(found, cotangents, strict=True)])
    by_name = dict(zip(inputs, pulled, strict=True))
    return [by_name[name] for name in options.grads], [by_name.get(name) for name in options.operands]


# ---------------------------------------------------------------------------------------------------------------------
# Under the transforms of torch.func
# ---------------------------------------------------------------------------------------------------------------------


class TransformableAttention(torch.autograd.Function):
    """`(numbers, options, *operands) -> (out, lse, *schedule)`."""

    @staticmethod
    def forward(numbers: list[float], options: str, *operands: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.FORWARD(operands, numbers, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        numbers, options, *operands = inputs
        _keep(ctx, (operands, numbers, options), output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_gradients(ctx, grads, ctx.needs_input_grad[2:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, numbers: list[float], options: str, *operands: Tensor) -> tuple[tuple, tuple]:
        return map_forward(_transformable, info.batch_size, numbers, options, operands, in_dims[2:])


def _transformable(numbers: list[float], options: str, *operands: Tensor) -> tuple[Tensor, ...]:
    return TransformableAttention.apply(numbers, options, *operands)


class TransformableGradients(torch.autograd.Function):
    """`(numbers, options, *grads, *operands, *outputs) ->` the gradients that are needed."""

    @staticmethod
    def forward(numbers: list[float], options: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.BACKWARD(*_parts(options, tensors), numbers, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        numbers, options, *tensors = inputs
        _keep_for_second(ctx, (*_parts(options, tensors), numbers, options), output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        of_grads, of_operands = _second_gradients(ctx, cotangents)
        return None, None, *of_grads, *of_operands, *ctx.unused

    @staticmethod
    def vmap(info: Any, in_dims: tuple, numbers: list[float], options: str, *tensors: Tensor) -> tuple[tuple, tuple]:
        return map_backward(TransformableGradients.apply, info.batch_size, numbers, options, tensors, in_dims[2:])


def _parts(options: str, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Grads, operands and outputs, which stand one after another."""
    said = Options.read(options)
    first, last = len(said.grads), len(said.grads) + len(said.operands)
    return tensors[:first], tensors[first:last], tensors[last:]


# ---------------------------------------------------------------------------------------------------------------------
# In exported programs, which hold the operators alone
# ---------------------------------------------------------------------------------------------------------------------


def forward_formula(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    return _gradients(ctx, grads, ctx.needs_input_grad[0]), None, None


def backward_formula(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple:
    return *_second_gradients(ctx, cotangents), ctx.unused, None, None


def forward_composite(operands: Sequence[Tensor], numbers: Sequence[float], options: str) -> list[Tensor]:
    said = Options.read(options)
    whole = said.operands_of(operands)
    return [x for x in attention_reference(whole, ops.spec_of(whole, numbers, said), return_lse=True) if x is not None]


def backward_composite(
    grads: Sequence[Tensor], operands: Sequence[Tensor], outputs: Sequence[Tensor], numbers: Sequence[float], options: str
) -> list[Tensor]:
    said = Options.read(options)
    whole, given = said.operands_of(operands), dict(zip(said.grads, grads, strict=True))
    found = attention_reference_gradients(*map(given.get, OUTPUTS), whole, ops.spec_of(whole, numbers, said))
    return [grad for name, grad in zip(INPUTS, found, strict=True) if name in said.needed]


def forward_vmap(info: Any, in_dims: tuple, operands: list[Tensor], numbers: list[float], options: str) -> tuple:
    def apply(numbers: list[float], options: str, *operands: Tensor) -> list[Tensor]:
        return ops.FORWARD(operands, numbers, options)

    return tuple(map(list, map_forward(apply, info.batch_size, numbers, options, operands, in_dims[0])))


def backward_vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
    def apply(numbers: list[float], options: str, *tensors: Tensor) -> list[Tensor]:
        return ops.BACKWARD(*_parts(options, tensors), numbers, options)

    *lists, numbers, options = arguments
    tensors, dims = ([*chain(*each)] for each in (lists, in_dims[:3]))
    return tuple(map(list, map_backward(apply, info.batch_size, numbers, options, tensors, dims)))


class _WithComposite(torch.library.Library):
    """Where formulas are registered that give way to the einsum path where they have none: in forward mode, which they
    do not know, and at a level of torch.func, which does not know them."""

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", **options: Any) -> None:
        composite = ops.current(__name__, f"{op_name}_composite")

        def either(keyset: Any, *arguments: Any) -> Any:
            return composite(*arguments) if forward_mode() or transformed() else fn(keyset, *arguments)

        either.library = self  # type: ignore[attr-defined]  # which ends what is registered when nobody holds it
        super().impl(op_name, either, dispatch_key, **options)


if ops.NEW:
    for _name, _keeping in (("forward", "_keep"), ("backward", "_keep_for_second")):
        torch.library.register_autograd(
            f"flash_attend::{_name}",
            ops.current(__name__, f"{_name}_formula"),
            setup_context=ops.current(__name__, _keeping),
            lib=_WithComposite("flash_attend", "FRAGMENT"),
        )
        torch.library.register_vmap(f"flash_attend::{_name}", ops.current(__name__, f"{_name}_vmap"))
