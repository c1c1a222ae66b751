"""Attention as operators of PyTorch, opaque to whatever traces or transforms a program: torch.compile, torch.export,
torch.func, dispatch modes, tensor subclasses.

`flash_attend::forward` and `flash_attend::backward` run a backend. Their schema is tensors, numbers and one string of
options by name: what a later feature adds is a name in the string. Their derivatives are in `autograd.py`, their rules
for `torch.vmap` in `vmap.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from flash_attend.backends import BACKENDS, Backend, BackwardName
from flash_attend.dispatch import split_tiles
from flash_attend.operands import Operands, Tangents
from flash_attend.reference import attention_reference, attention_reference_gradients
from flash_attend.spec import CALLS_KEPT, AttentionSpec, Window, describe
from flash_attend.tangents import attend_tangents, attend_tangents_gradients
from flash_attend.target import DeviceTarget
from flash_attend.tracing import allow_forward_mode

if TYPE_CHECKING:
    from flash_attend.dispatch import Plan
    from flash_attend.kernels.configs import Tiles

__all__ = [
    "BACKWARD",
    "DIFFERENTIABLE",
    "FIRST_IMPORT",
    "FORWARD",
    "INPUTS",
    "OUTPUTS",
    "OUTPUT_TANGENTS",
    "Options",
    "latest",
    "options_of",
    "spec_of",
    "with_gradients",
    "with_tangents",
    "without_tangents",
]

INPUTS = ("q", "k", "v", "bias", "sinks")  # what there are gradients of, where there is such a thing
OUTPUTS = ("out", "lse")  # what there are gradients from
TANGENTS = tuple(f"{name}_tangent" for name in INPUTS)  # in forward mode there are these, too
OUTPUT_TANGENTS = tuple(f"{name}_tangent" for name in OUTPUTS)
DIFFERENTIABLE = (*INPUTS, *TANGENTS)

T = TypeVar("T")


class Options(NamedTuple):
    """What the tensors and the numbers of a call do not say."""

    backend: str
    backward: BackwardName
    precision: str
    causal: bool
    deterministic: bool
    return_lse: bool
    window: Window
    operands: tuple[str, ...]  # the fields of `Operands` that there are, in their order
    tangents: tuple[str, ...] = ()  # in forward mode: those of INPUTS that have one, in their order
    grads: tuple[str, ...] = ()  # of a backward: which outputs have a gradient
    needed: tuple[str, ...] = ()  # of a backward: which of DIFFERENTIABLE need one
    pushed: bool = False  # of a backward without tangents: its forward had some, by whose tiles what it kept goes
    layout: str = ""  # how ranks share the sequences of which these are shards

    @staticmethod
    @lru_cache(maxsize=CALLS_KEPT)
    def read(text: str) -> Options:
        """What `options_of`, `with_tangents` or `with_gradients` wrote."""
        said: dict[str, Any] = dict(item.split("=") for item in text.split())
        flags = said.keys() & {"causal", "deterministic", "return_lse", "pushed"}
        said |= {name: said[name] == "1" for name in flags}
        said["window"] = tuple(int(end) if end else None for end in said["window"].split(","))
        lists = said.keys() & {"operands", "tangents", "grads", "needed"}
        return Options(**{**said, **{name: tuple(filter(None, said[name].split(","))) for name in lists}})

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors of a call: the operands that there are, and then tangents."""
        return *self.operands, *(f"{name}_tangent" for name in self.tangents)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what a forward gives first."""
        return (*OUTPUTS, *OUTPUT_TANGENTS) if self.tangents else OUTPUTS

    def operands_of(self, tensors: Sequence[Tensor]) -> Operands:
        """The operands of a call, from its tensors."""
        return Operands(**dict(zip(self.operands, tensors, strict=False)))

    def tangents_of(self, tensors: Sequence[Tensor]) -> Tangents:
        """The tangents of a call, from its tensors."""
        return Tangents(**dict(zip(self.tangents, tensors[len(self.operands) :], strict=True)))

    def parts(self, items: Sequence[T]) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
        """What there is for each tensor of a backward: for the gradients, the forward's tensors and its outputs."""
        first, last = len(self.grads), len(self.grads) + len(self.names)
        return items[:first], items[first:last], items[last:]


def options_of(operands: Operands, spec: AttentionSpec, plan: Plan, *, return_lse: bool) -> tuple[list[float], str]:
    """The numbers and the options of a call, in words that a compiler follows. Kernels return the lse in any case."""
    left, right = ["" if end is None else str(int(end)) for end in spec.window]
    present = ",".join([name for name, tensor in zip(Operands._fields, operands, strict=True) if tensor is not None])
    served = f"backend={plan.backend.name} backward={plan.backward} precision={spec.precision}"
    flags = f"causal={int(spec.causal)} deterministic={int(spec.deterministic)}"
    lse = int(return_lse or plan.backward != "einsum")
    numbers = [spec.scale, spec.dropout_p, spec.softcap]
    return numbers, f"{served} {flags} return_lse={lse} window={left},{right} operands={present}"


def with_tangents(options: str, tangents: Sequence[str]) -> str:
    """The options of a call in forward mode, from those of the call itself."""
    return f"{options} tangents={','.join(tangents)} return_lse=1"


def without_tangents(options: str) -> str:
    """The options of the backward of a call in forward mode, where nothing comes down to the tangents."""
    return f"{options.partition(' tangents=')[0]} pushed=1"


def with_gradients(options: str, grads: Sequence[str], needed: Sequence[str]) -> str:
    """The options of a backward, from those of its forward."""
    return f"{options} grads={','.join(grads)} needed={','.join(needed)}"


def spec_of(operands: Operands, numbers: Sequence[float], options: Options) -> AttentionSpec:
    """The description of a call that has been checked."""
    q, k, v, mask, _, bias, slopes, sinks, segments, _ = operands
    (scale, dropout_p, softcap), flag = numbers, options.deterministic
    said = options.causal, scale, dropout_p, flag, options.precision, options.window, softcap
    alibi, has_sinks = slopes is not None, sinks is not None
    return describe(q, k, v, mask, *said, bias=bias, alibi=alibi, sinks=has_sinks, segments=segments)


# ---------------------------------------------------------------------------------------------------------------------
# What they do
# ---------------------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call again, from what an operator is given."""

    operands: Operands
    tangents: Tangents
    spec: AttentionSpec
    options: Options
    backend: Backend
    tiles: Tiles | None  # None where no kernel of ours serves

    @staticmethod
    def of(tensors: Sequence[Tensor], numbers: Sequence[float], text: str) -> _Call:
        options = Options.read(text)
        # PyTorch resolves lazy negation for what computes, and not for what says how the results are laid out.
        tensors = [tensor.resolve_neg() for tensor in tensors]
        operands = options.operands_of(tensors)
        spec, backend = spec_of(operands, numbers, options), BACKENDS[options.backend]
        # What tiles do not depend on is left out, and what they do made a number: a symbol cannot be looked up.
        reduced = AttentionSpec(
            *(
                1,
                1,
                1,
                1 if spec.one_query else 2,
                1,
                int(spec.head_dim),
                int(spec.value_dim),
                spec.dtype,
                spec.mask,
            ),
            causal=spec.causal,
            dropout_p=spec.dropout_p,
            deterministic=spec.deterministic,
            precision=spec.precision,
            window=spec.window,
            softcap=spec.softcap,
            bias=spec.bias,
            alibi=spec.alibi,
            sinks=spec.sinks,
            sequences=None if spec.sequences is None else 1,
        )
        select = backend.tangent_tiles if options.tangents or options.pushed else backend.tiles
        tiles = select(reduced, DeviceTarget.of_any_length(operands.q.device), options.backward)
        return _Call(operands, options.tangents_of(tensors), spec, options, backend, tiles)

    @property
    def inputs(self) -> tuple[str, ...]:
        """What there are gradients of: q, k and v and, where there is either, the bias and the sinks."""
        others = self.operands.bias is not None or self.operands.sinks is not None
        return INPUTS if others else INPUTS[:3]

    def tiles_by_lengths(self) -> Tiles | None:
        """The tiles again, with those of the forward that its lengths ask for, which are numbers where it runs."""
        if self.tiles is None:
            return None
        return split_tiles(self.spec, self.backend, self.options.backward, self.operands.q.device) or self.tiles

    @property
    def needed(self) -> tuple[bool, ...]:
        return tuple(name in self.options.needed for name in self.inputs)


def forward(tensors: Sequence[Tensor], numbers: Sequence[float], text: str) -> list[Tensor]:
    """`[out, lse, statistics, *schedule]` of kernels; of PyTorch's own attention `[out, lse]`; of the einsum path the
    same, or `[out]` where no more is asked for. In forward mode the tangents of out and lse follow on these two."""
    call = _Call.of(tensors, numbers, text)
    operands, tangents, spec, options, backend, tiles = call
    with torch.no_grad(), allow_forward_mode(False):
        if options.backward == "einsum":
            return [tensor.contiguous() for tensor in forward_composite(tensors, numbers, text)]
        if options.tangents:
            *found, kept = backend.tangents(operands, tangents, spec, tiles)
        else:
            *found, kept = backend.forward(operands, spec, call.tiles_by_lengths())
    if tiles is None:
        return [tensor.contiguous() for tensor in found]
    return [*found, *kept.packed()]


def like_forward(tensors: Sequence[Tensor], numbers: Sequence[float], text: str) -> list[Tensor]:
    """What `forward` gives, uninitialised."""
    operands, _, spec, options, _, tiles = _Call.of(tensors, numbers, text)
    if tiles is None:
        out = operands.q.new_empty(spec.batch, spec.heads, spec.queries, spec.value_dim)
        lse = operands.q.new_empty(spec.batch, spec.heads, spec.queries, dtype=spec.accumulator_dtype)
        outputs, kept = [out, lse] if options.return_lse else [out], []
    else:
        from flash_attend.kernels.forward import empty_outputs
        from flash_attend.kernels.schedule import empty_packed

        *outputs, statistics = empty_outputs(operands.q, spec)
        kept = [statistics, *empty_packed(operands, spec, tiles)]
    of_outputs = map(torch.empty_like, outputs) if options.tangents else ()
    return [*outputs, *of_outputs, *kept]


def backward(
    grads: Sequence[Tensor], tensors: Sequence[Tensor], outputs: Sequence[Tensor], numbers: Sequence[float], text: str
) -> list[Tensor]:
    """The gradients of those of DIFFERENTIABLE that are needed; `outputs` are those of `forward`, but for tangents."""
    call = _Call.of(tensors, numbers, text)
    operands, _, spec, options, backend, tiles = call
    with torch.no_grad(), allow_forward_mode(False):
        if options.backward == "einsum" or options.tangents:
            return [grad.contiguous() for grad in backward_composite(grads, tensors, outputs, numbers, text)]
        out, lse, *packed = outputs
        kept = None
        if tiles is not None:
            from flash_attend.kernels.statistics import Kept

            kept = Kept.unpacked(packed, operands, spec, tiles)
        grad_out, grad_lse = map(dict(zip(options.grads, grads, strict=True)).get, OUTPUTS)
        found = backend.backward(grad_out, grad_lse, operands, out, lse, kept, spec, tiles, call.needed)
        if tiles is None:
            found = [grad if grad is None else grad.contiguous() for grad in found]
    return list(compress(found, call.needed))


def like_backward(
    grads: Sequence[Tensor], tensors: Sequence[Tensor], outputs: Sequence[Tensor], numbers: Sequence[float], text: str
) -> list[Tensor]:
    """What `backward` gives, uninitialised."""
    call = _Call.of(tensors, numbers, text)
    if call.tiles is None or call.options.tangents:
        named = dict(zip(call.options.names, tensors, strict=True))
        return [named[name].new_empty(named[name].shape) for name in DIFFERENTIABLE if name in call.options.needed]
    inputs = [getattr(call.operands, name) for name in call.inputs]
    from flash_attend.kernels.backward import empty_gradients

    return [tensor for tensor in empty_gradients(inputs, call.spec, call.needed) if tensor is not None]


# The same by the einsum path, whose parts can be differentiated and transformed.


def forward_composite(
    tensors: Sequence[Tensor], numbers: Sequence[float], text: str, *, guard: bool = True
) -> list[Tensor]:
    options = Options.read(text)
    operands = options.operands_of(tensors)
    spec = spec_of(operands, numbers, options)
    if options.tangents:
        return [*attend_tangents(operands, options.tangents_of(tensors), spec)]
    found = attention_reference(operands, spec, return_lse=options.return_lse, guard=guard)
    return [tensor for tensor in found if tensor is not None]


def backward_composite(
    grads: Sequence[Tensor], tensors: Sequence[Tensor], outputs: Sequence[Tensor], numbers: Sequence[float], text: str
) -> list[Tensor]:
    options = Options.read(text)
    operands, given = options.operands_of(tensors), dict(zip(options.grads, grads, strict=True))
    spec = spec_of(operands, numbers, options)
    out, lse, of_out, of_lse = map(given.get, (*OUTPUTS, *OUTPUT_TANGENTS))
    if options.tangents:
        found = attend_tangents_gradients(out, lse, of_out, of_lse, operands, options.tangents_of(tensors), spec)
    else:
        found = attention_reference_gradients(out, lse, operands, spec)
    named = zip(DIFFERENTIABLE, found, strict=False)
    return [grad for name, grad in named if name in options.needed and grad is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Their registration
# ---------------------------------------------------------------------------------------------------------------------


def latest(module: str, name: str) -> Callable[..., Any]:
    """A function as its module has it when it is called: operators are defined once in a process, and the package may
    be reloaded, or imported again."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


_SCHEMAS = {
    "forward": "(Tensor[] operands, float[] numbers, str options) -> Tensor[]",
    "backward": "(Tensor[] grads, Tensor[] operands, Tensor[] outputs, float[] numbers, str options) -> Tensor[]",
}
FIRST_IMPORT = not hasattr(torch.ops.flash_attend, "forward")
if FIRST_IMPORT:
    for _name, _schema in _SCHEMAS.items():
        _operator = f"flash_attend::{_name}"
        torch.library.define(_operator, _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        torch.library.impl(_operator, "default", latest(__name__, _name))
        torch.library.register_fake(_operator, latest(__name__, f"like_{_name}"))

FORWARD = torch.ops.flash_attend.forward.default
BACKWARD = torch.ops.flash_attend.backward.default
