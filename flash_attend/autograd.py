"""Attention as a differentiable function: a backend's own functions for plain eager calls, the opaque operators under
the transforms of torch.func, and formulas of the operators themselves for compiled and exported programs.

First derivatives come from the backend, backward and pushed forward, together or not; gradients of a loss on what was
pushed forward from the einsum path, a chunk of queries at a time. Further derivatives are those of the einsum path:
correct, slower, and holding several arrays of all scores, `(b, h, i, j)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from flash_attend import ops
from flash_attend.flops import count_flops
from flash_attend.operands import Operands
from flash_attend.ops import DIFFERENTIABLE, INPUTS, OUTPUT_TANGENTS, OUTPUTS, Options, latest
from flash_attend.reference import attention_reference
from flash_attend.spec import AttentionSpec
from flash_attend.tracing import (
    constant_when_compiled,
    directly,
    exporting_to_onnx,
    forward_mode,
    innermost_forward_mode,
    lazy,
    mapped,
    pushed,
    settled,
    tangent_of,
    traced,
    transformed,
    watched,
    with_tangent,
)
from flash_attend.vmap import map_backward, map_forward

if TYPE_CHECKING:
    from flash_attend.dispatch import Plan
    from flash_attend.plans import CallPlan

__all__ = ["attend", "attend_by_operators", "runner"]


def attend(operands: Operands, call: CallPlan, *, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """`out (b, h, i, dv)`, or with `lse (b, h, i)`, computed as planned, of plain tensors and where nobody watches but
    the einsum path."""
    q, k, v, mask, _, bias, slopes, sinks, *_ = operands
    if call.plan.backward != "einsum" and lazy(q, k, v, mask, bias, slopes, sinks):
        return runner(call, return_lse, call.forward)(Operands(*map(settled, operands)))  # type: ignore[arg-type]
    return runner(call, return_lse)(operands)


def runner(
    call: CallPlan, return_lse: bool, forward: Callable[[Operands], Any] | None = None
) -> Callable[[Operands], Any]:
    """What computes a call as planned from operands in memory, by another forward than was planned if there is one."""
    if call.plan.backward == "einsum":
        return partial(_attend_by_einsum, spec=call.spec, return_lse=return_lse)
    if forward is None:
        forward = call.planned_out if call.planned_out is not None and not return_lse else call.planned or call.forward

    def differentiated(operands: Operands) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v, _, _, bias, _, sinks, *_ = operands
        others = () if bias is sinks is None else (bias, sinks)
        return _attend_eagerly(q, k, v, (operands, forward, call, return_lse), *others)

    if call.differentiated:
        return differentiated
    return (lambda operands: forward(operands)[:2]) if return_lse else lambda operands: forward(operands)[0]


def _attend_by_einsum(
    operands: Operands, spec: AttentionSpec, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor | None]:
    out, lse = attention_reference(operands, spec, return_lse=return_lse)
    return (out, lse) if return_lse else out


def attend_by_operators(
    operands: Operands, spec: AttentionSpec, plan: Plan, *, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The same by operators, for tensors that know nothing else and for compilers, which would make of the einsum
    path's loop over chunks as many graphs as there are lengths."""
    if plan.backward == "einsum" and exporting_to_onnx():
        out, lse = attention_reference(operands, spec, return_lse=return_lse, guard=False)
        return out if lse is None else (out, lse)
    compiled = torch.compiler.is_compiling()
    if not compiled:
        operands = operands._replace(
            mask=_savable(operands.mask), bias=_savable(operands.bias),
            alibi_slopes=_savable(operands.alibi_slopes), sinks=_savable(operands.sinks),
        )  # fmt: skip
    numbers, options = ops.options_of(operands, spec, plan, return_lse=return_lse)
    present = [tensor for tensor in operands if tensor is not None]
    if transformed() or forward_mode():
        if compiled:
            _leave_to_the_tracer()
        out, *others = _transformable(numbers, options, *present)
    else:
        out, *others = ops.FORWARD(present, numbers, options)
    return (out, others[0]) if return_lse else out


def _savable(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy of one made in inference mode, which may not be saved for a backward."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


# ---------------------------------------------------------------------------------------------------------------------
# Plain eager calls
# ---------------------------------------------------------------------------------------------------------------------


class Attention(torch.autograd.Function):
    """`(q, k, v, planned) -> out`, or `(out, lse)` where the lse is asked for, by a backend's own functions. Last
    come the bias and the sinks, where there is either."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, planned: tuple, *others: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        operands, forward, call, return_lse = planned
        out, lse, kept = forward(operands)
        _, _, _, mask, seed, bias, slopes, sinks, segments, _ = operands
        if bias is slopes is sinks is segments is None:
            others = kept[:1] if mask is seed is None else (*kept, _savable(mask), *([] if seed is None else [seed]))
        else:
            others = (*kept, _savable(mask), seed, _savable(bias), _savable(slopes), _savable(sinks), segments)
        ctx.save_for_backward(q, k, v, out, lse, *others)
        ctx.call = call, type(kept), len(kept)
        if not return_lse:  # an output costs a microsecond
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        (call, kept_of, count), saved = ctx.call, ctx.saved_tensors
        given = [x for x in (grad_out, grad_lse, *saved) if x is not None]
        alone = not is_dynamo_compiling() and call.alone_with.find(*given)
        by_operators = False
        if not alone:  # a backward may be differentiated, and transformed where its forward was not
            by_operators = torch.is_grad_enabled() or watched() or traced(grad_out, grad_lse)
            by_operators = by_operators or mapped(grad_out, grad_lse)
            # Hooks of what was saved may give lazy tensors, as torch's own derivatives do.
            if not by_operators and lazy(*given):
                saved, grad_out, grad_lse = [*map(settled, saved)], settled(grad_out), settled(grad_lse)
            elif not by_operators:
                call.alone_with.keep(True, *given)
        q, k, v, out, lse, *others = saved
        operands, kept, grads = Operands(q, k, v, *others[count:]), kept_of(*others[:count]), None
        if by_operators:
            needed = _needed(ctx)
            numbers, options = ops.options_of(operands, call.spec, call.plan, return_lse=True)
            present = [tensor for tensor in operands if tensor is not None]
            outputs, names = [out, lse, *kept.packed()], list(compress(INPUTS, needed))
            found = _differentiate((grad_out, grad_lse), present, outputs, numbers, options, names)
            grads = tuple(map(found.get, INPUTS[: len(needed)]))
        elif call.planned_backward is not None and grad_out is not None and grad_lse is None:
            grads = call.planned_backward(grad_out, operands, out, lse, kept)
        if grads is None:
            of_call = operands, out, lse, kept, call.spec, call.tiles
            grads = call.functions.backward(grad_out, grad_lse, *of_call, _needed(ctx))
        return *grads[:3], None, *grads[3:]


def _needed(ctx: Any) -> tuple[bool, ...]:
    """Of which of `INPUTS` a gradient is needed."""
    return *ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:]


_attend_eagerly = directly(Attention)


# ---------------------------------------------------------------------------------------------------------------------
# Formulas of the operators
# ---------------------------------------------------------------------------------------------------------------------


def _keep_for_first(ctx: Any, inputs: tuple, output: Sequence[Tensor]) -> None:
    operands, ctx.numbers, ctx.options = inputs
    pushed_forward = slice(len(OUTPUTS), len(Options.read(ctx.options).outputs))  # which no backward reads
    ctx.save_for_backward(*operands, *output[: pushed_forward.start], *output[pushed_forward.stop :])
    ctx.set_materialize_grads(False)


def _first_gradients(ctx: Any, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Of every operand that there is, and of every tangent."""
    names = Options.read(ctx.options).names
    operands, outputs = ctx.saved_tensors[: len(names)], ctx.saved_tensors[len(names) :]
    needed = [name for name in compress(names, needs) if name in DIFFERENTIABLE]  # there is no gradient of slopes
    found = _differentiate(grads, operands, outputs, ctx.numbers, ctx.options, needed)
    return [found.get(name) for name in names]


def _differentiate(
    grads: Sequence[Tensor | None],
    operands: Sequence[Tensor],
    outputs: Sequence[Tensor],
    numbers: list[float],
    options: str,
    needed: list[str],
) -> dict[str, Tensor]:
    """The gradients by name, of those of DIFFERENTIABLE that are `needed`; `outputs` are those that were kept."""
    said = Options.read(options)
    given = {name: grad for name, grad in zip(said.outputs, grads, strict=False) if grad is not None}
    if said.tangents and given.keys().isdisjoint(OUTPUT_TANGENTS):  # an ordinary backward
        options, operands = ops.without_tangents(options), operands[: len(said.operands)]
        needed = [name for name in needed if name in INPUTS]
    elif said.tangents:
        outputs = ()
    options = ops.with_gradients(options, list(given), needed)
    present = list(given.values())
    if mapped(*present):
        found = _pull_back(given, operands, numbers, options)
    elif pushed(*present, *operands):
        found = ops.backward_composite(present, operands, outputs, numbers, options)
    elif transformed():
        found = TransformableGradients.apply(numbers, options, *present, *operands, *outputs)
    else:
        found = ops.BACKWARD(present, operands, outputs, numbers, options)
    return dict(zip(needed, found, strict=True))


def _pull_back(
    grads: dict[str, Tensor], operands: Sequence[Tensor], numbers: list[float], options: str
) -> Sequence[Tensor]:
    """The gradients that are needed by torch's own formulas, which alone have rules for many gradients at once."""
    said = Options.read(options)
    whole = dict(zip(said.names, operands, strict=True))
    leaves = {name: x for name, x in whole.items() if name in DIFFERENTIABLE}
    leaves = {name: x if x.requires_grad else x.detach().requires_grad_() for name, x in leaves.items()}
    with torch.enable_grad():
        results = ops.forward_composite([*{**whole, **leaves}.values()], numbers, options)
    roots: dict[str, Any] = dict(zip(said.outputs, results, strict=False))
    return torch.autograd.grad(
        [roots[name] for name in grads],
        [leaves[name] for name in said.needed],
        list(grads.values()),
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
        materialize_grads=True,
    )


def _keep_for_second(ctx: Any, inputs: tuple, output: Sequence[Tensor]) -> None:
    grads, operands, outputs, ctx.numbers, ctx.options = inputs
    ctx.save_for_backward(*grads, *operands)
    ctx.set_materialize_grads(False)
    ctx.of_outputs = [None] * len(outputs)  # they follow from the operands


def _second_gradients(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Of the gradients that were given, and of every operand and tangent that there is."""
    options = Options.read(ctx.options)
    saved = dict(zip((*options.grads, *options.names), ctx.saved_tensors, strict=True))
    inputs = {name: saved[name] for name in (*options.grads, *DIFFERENTIABLE) if name in saved}

    def gradients(*tensors: Tensor) -> list[Tensor]:
        given = {**saved, **dict(zip(inputs, tensors, strict=True))}
        grads, operands = ([given[name] for name in names] for names in (options.grads, options.names))
        return ops.backward_composite(grads, operands, (), ctx.numbers, ctx.options)

    found, pull_back, *_ = torch.func.vjp(gradients, *inputs.values())
    pairs = zip(found, cotangents, strict=True)
    pulled = pull_back([torch.zeros_like(x) if cotangent is None else cotangent for x, cotangent in pairs])
    by_name = dict(zip(inputs, pulled, strict=True))
    return [by_name[name] for name in options.grads], [by_name.get(name) for name in options.names]


# ---------------------------------------------------------------------------------------------------------------------
# Under the transforms of torch.func
# ---------------------------------------------------------------------------------------------------------------------


class TransformableAttention(torch.autograd.Function):
    """`(numbers, options, *operands) -> (out, lse, *kept)`, as `ops.forward` has them."""

    @staticmethod
    def forward(numbers: list[float], options: str, *operands: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.FORWARD(operands, numbers, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        numbers, options, *operands = inputs
        _keep_for_first(ctx, (operands, numbers, options), output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_first_gradients(ctx, grads, ctx.needs_input_grad[2:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, numbers: list[float], options: str, *operands: Tensor) -> tuple[tuple, tuple]:
        return map_forward(_transformable, info.batch_size, numbers, options, operands, in_dims[2:])


class TransformableGradients(torch.autograd.Function):
    """`(numbers, options, *grads, *operands, *outputs) ->` the gradients that are needed."""

    @staticmethod
    def forward(numbers: list[float], options: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.BACKWARD(*Options.read(options).parts(tensors), numbers, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        numbers, options, *tensors = inputs
        _keep_for_second(ctx, (*Options.read(options).parts(tensors), numbers, options), output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        of_grads, of_operands = _second_gradients(ctx, cotangents)
        return None, None, *of_grads, *of_operands, *ctx.of_outputs

    @staticmethod
    def vmap(info: Any, in_dims: tuple, numbers: list[float], options: str, *tensors: Tensor) -> tuple[tuple, tuple]:
        return map_backward(TransformableGradients.apply, info.batch_size, numbers, options, tensors, in_dims[2:])


def _transformable(numbers: list[float], options: str, *operands: Tensor) -> Sequence[Tensor]:
    """What `ops.forward` gives, under any transforms; where tangents are pushed forward, out and lse, which have
    theirs."""
    said, innermost = Options.read(options), innermost_forward_mode()
    if innermost == "outside" and not said.tangents:
        return _composite(numbers, options, *operands)
    if innermost in ("alone", "again") and not said.tangents:
        primals, tangents = zip(*map(tangent_of, operands), strict=True)
        moved = {name: x for name, x in zip(said.operands, tangents, strict=True) if x is not None}
        if mapped(*moved.values()):
            return _composite(numbers, options, *operands)
        if moved:
            tensors = *primals, *moved.values()
            return _push(numbers, ops.with_tangents(options, list(moved)), tensors, again=innermost == "again")
    return TransformableAttention.apply(numbers, options, *operands)


def _push(numbers: list[float], options: str, tensors: Sequence[Tensor], *, again: bool) -> tuple[Tensor, ...]:
    """Out and lse, which have their tangents; of tensors that may have others, if forward mode is on `again`."""
    if "alibi_slopes" in Options.read(options).tangents:
        raise ValueError("alibi_slopes must not have a tangent, there is none of them; detach them, or pass a bias")
    push = TransformableAttention.apply if not again else _composite
    out, lse, of_out, of_lse, *_ = push(numbers, options, *tensors)
    return with_tangent(out, of_out), with_tangent(lse, of_lse)


def _composite(numbers: list[float], options: str, *tensors: Tensor) -> list[Tensor]:
    return ops.forward_composite(tensors, numbers, options)


@constant_when_compiled
def _leave_to_the_tracer() -> None:
    """Has a compiler take `_transformable` as it is, for what traces operators: there the transforms are at work."""
    torch.compiler.allow_in_graph(_transformable)


# ---------------------------------------------------------------------------------------------------------------------
# In exported programs, which hold the operators alone
# ---------------------------------------------------------------------------------------------------------------------


def forward_formula(ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
    return _first_gradients(ctx, grads, ctx.needs_input_grad[0]), None, None


def backward_formula(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple:
    return *_second_gradients(ctx, cotangents), ctx.of_outputs, None, None


def forward_in_parts(
    operands: Sequence[Tensor], numbers: Sequence[float], options: str, *, guard: bool = True
) -> list[Tensor]:
    """What `ops.forward` gives, of which nobody reads more then."""
    found = ops.forward_composite(operands, numbers, options, guard=guard)
    return [*found, *ops.like_forward(operands, numbers, options)[len(found) :]]


backward_in_parts = ops.backward_composite


class _InParts(torch.library.Library):
    """Where formulas are registered that give way to the einsum path: in forward mode, which they do not know, and at a
    level of torch.func, which does not know them."""

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", **options: Any) -> None:
        in_parts = latest(__name__, f"{op_name}_in_parts")

        def either(keyset: Any, *arguments: Any) -> Any:
            *lists, _, _ = arguments
            return in_parts(*arguments) if transformed() or pushed(*chain(*lists)) else fn(keyset, *arguments)

        either.library = self  # type: ignore[attr-defined]  # what is registered ends when nobody holds it
        super().impl(op_name, either, dispatch_key, **options)


if ops.FIRST_IMPORT:
    for _name, _keep in (("forward", "_keep_for_first"), ("backward", "_keep_for_second")):
        torch.library.register_autograd(
            f"flash_attend::{_name}",
            latest(__name__, f"{_name}_formula"),
            setup_context=latest(__name__, _keep),
            lib=_InParts("flash_attend", "FRAGMENT"),
        )
    count_flops()
