"""Attention as operators of PyTorch, opaque to whatever traces or transforms a program: torch.compile, torch.export,
torch.func, dispatch modes, tensor subclasses.

`flash_attend::forward` and `flash_attend::backward` run a backend. Their schema is tensors, numbers and one string of
options by name: what a later feature adds is a name in the string. Their derivatives and their rules for `torch.vmap`
are in `autograd.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flash_attend.backends import BACKENDS, Backend
from flash_attend.operands import Operands
from flash_attend.reference import attention_reference, attention_reference_gradients
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.target import DeviceTarget

if TYPE_CHECKING:
    from flash_attend.dispatch import Plan
    from flash_attend.kernels.configs import Tiles

__all__ = ["BACKWARD", "FORWARD", "NEW", "Options", "current", "options_of", "spec_of", "with_gradients"]

INPUTS = ("q", "k", "v")  # what there are gradients of
OUTPUTS = ("out", "lse")  # what there are gradients from


class Options(NamedTuple):
    """What the tensors and the numbers of a call do not say."""

    backend: str
    backward: str
    precision: str
    causal: bool
    deterministic: bool
    return_lse: bool
    operands: tuple[str, ...]  # the fields of `Operands` that there are, in their order
    grads: tuple[str, ...] = ()  # of a backward: which of OUTPUTS have a gradient
    needed: tuple[str, ...] = ()  # of a backward: which of INPUTS need one

    @staticmethod
    @lru_cache(maxsize=None)
    def read(text: str) -> Options:
        """What `options_of` or `with_gradients` wrote."""
        said: dict[str, Any] = dict(item.split("=") for item in text.split())
        said |= {name: said[name] == "1" for name in ("causal", "deterministic", "return_lse")}
        said |= {name: tuple(filter(None, said[name].split(","))) for name in said.keys() & {"operands", "grads", "needed"}}
        return Options(**said)

    def operands_of(self, tensors: Sequence[Tensor]) -> Operands:
        """The operands of a call, from those that there are."""
        return Operands(**dict(zip(self.operands, tensors, strict=True)))


def options_of(operands: Operands, spec: AttentionSpec, plan: Plan, return_lse: bool) -> tuple[list[float], str]:
    """The numbers and the options of a call; in words that a compiler follows."""
    present = ",".join([name for name, tensor in zip(Operands._fields, operands, strict=True) if tensor is not None])
    served = f"backend={plan.backend.name} backward={plan.backward} precision={spec.precision}"
    flags = f"causal={int(spec.causal)} deterministic={int(spec.deterministic)} return_lse={int(return_lse)}"
    return [spec.scale, spec.dropout_p], f"{served} {flags} operands={present}"


def with_gradients(options: str, grads: Sequence[str], needed: Sequence[str]) -> str:
    """The options of a backward, from those of its forward."""
    return f"{options} grads={','.join(grads)} needed={','.join(needed)}"


def spec_of(operands: Operands, numbers: Sequence[float], options: Options) -> AttentionSpec:
    """The description of a call that has been checked."""
    q, k, v, mask, _ = operands
    kind = MaskKind.NONE if mask is None else MaskKind.KEY if mask.shape[2] == 1 else MaskKind.DENSE
    return AttentionSpec(
        *(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype),
        mask=kind,
        mask_per_head=mask is not None and bool(mask.shape[1] > 1),
        causal=options.causal,
        scale=numbers[0],
        dropout_p=numbers[1],
        deterministic=options.deterministic,
        precision=options.precision,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What they do
# ---------------------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call again, from what an operator is given."""

    operands: Operands
    spec: AttentionSpec
    options: Options
    backend: Backend
    tiles: Tiles | None  # None where derivatives are those of the einsum path

    @staticmethod
    def of(tensors: Sequence[Tensor], numbers: Sequence[float], text: str) -> _Call:
        options = Options.read(text)
        operands = options.operands_of(tensors)
        spec, backend = spec_of(operands, numbers, options), BACKENDS[options.backend]
        # What tiles do not depend on is left out, and what they do made a number: a symbol cannot be looked up.
        reduced = AttentionSpec(
            *(1, 1, 1, 1, 1, int(spec.head_dim), int(spec.value_dim), spec.dtype, spec.mask),
            causal=spec.causal,
            dropout_p=spec.dropout_p,
            deterministic=spec.deterministic,
            precision=spec.precision,
        )
        tiles = backend.tiles(reduced, DeviceTarget.of(operands.q.device), options.backward)
        return _Call(operands, spec, options, backend, tiles)


def forward(tensors: Sequence[Tensor], numbers: Sequence[float], text: str) -> list[Tensor]:
    """`[out, lse, *schedule]`; the einsum path has no schedule, and an lse only where it is asked for."""
    operands, spec, options, backend, tiles = _Call.of(tensors, numbers, text)
    with torch.no_grad():
        if tiles is None:
            found = attention_reference(operands, spec, return_lse=options.return_lse)
            return [tensor.contiguous() for tensor in found if tensor is not None]
        out, lse, schedule = backend.forward(operands, spec, tiles)
        return [out, lse, *schedule.packed()]


def like_forward(tensors: Sequence[Tensor], numbers: Sequence[float], text: str) -> list[Tensor]:
    """What `forward` gives, uninitialised."""
    operands, spec, options, _, tiles = _Call.of(tensors, numbers, text)
    if tiles is None:
        out = operands.q.new_empty(spec.batch, spec.heads, spec.queries, spec.value_dim)
        lse = operands.q.new_empty(spec.batch, spec.heads, spec.queries, dtype=spec.accumulator_dtype)
        return [out, lse] if options.return_lse else [out]
    from flash_attend.kernels.forward import empty_outputs
    from flash_attend.kernels.key_schedule import empty_packed

    return [*empty_outputs(operands.q, spec), *empty_packed(operands.mask, spec, tiles)]


def backward(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    outputs: Sequence[Tensor],
    numbers: Sequence[float],
    text: str,
) -> list[Tensor]:
    """The gradients of those of q, k and v that are needed, from those of out and lse; `outputs` are the forward's."""
    operands, spec, options, backend, tiles = _Call.of(tensors, numbers, text)
    grad_out, grad_lse = map(dict(zip(options.grads, grads, strict=True)).get, OUTPUTS)
    needed = tuple(name in options.needed for name in INPUTS)
    with torch.no_grad():
        if tiles is None:
            found = attention_reference_gradients(grad_out, grad_lse, operands, spec)
            return [grad.contiguous() for grad in compress(found, needed)]
        from flash_attend.kernels.key_schedule import Schedule

        out, lse, *packed = outputs
        schedule = Schedule.unpacked(packed, operands.mask, spec, tiles)
        # The kernels read an lse as it left the forward; under vmap it may have been expanded since.
        found = backend.backward(grad_out, grad_lse, operands, out, lse.contiguous(), schedule, spec, tiles, needed)
        return list(compress(found, needed))


def like_backward(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    outputs: Sequence[Tensor],
    numbers: Sequence[float],
    text: str,
) -> list[Tensor]:
    """What `backward` gives, uninitialised."""
    operands, spec, options, _, tiles = _Call.of(tensors, numbers, text)
    needed = tuple(name in options.needed for name in INPUTS)
    if tiles is None:
        return [tensor.new_empty(tensor.shape) for tensor in compress(operands, needed)]
    from flash_attend.kernels.backward import empty_gradients

    return list(compress(empty_gradients(*operands[:3], spec, needed), needed))


# ---------------------------------------------------------------------------------------------------------------------
# Their registration
# ---------------------------------------------------------------------------------------------------------------------


def current(module: str, name: str) -> Callable[..., Any]:
    """A function of a module as it is when it is called: operators are defined once in a process, and the package may
    be imported anew or reloaded."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


_SCHEMAS = {
    "forward": "(Tensor[] operands, float[] numbers, str options) -> Tensor[]",
    "backward": "(Tensor[] grads, Tensor[] operands, Tensor[] outputs, float[] numbers, str options) -> Tensor[]",
}
NEW = not hasattr(torch.ops.flash_attend, "forward")  # the first import in this process
if NEW:
    for _name, _schema in _SCHEMAS.items():
        _operator = f"flash_attend::{_name}"
        torch.library.define(_operator, _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        torch.library.impl(_operator, "default", current(__name__, _name))
        torch.library.register_fake(_operator, current(__name__, f"like_{_name}"))

FORWARD = torch.ops.flash_attend.forward.default
BACKWARD = torch.ops.flash_attend.backward.default
