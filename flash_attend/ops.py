"""Attention as operators of PyTorch, opaque to whatever traces or transforms a program: torch.compile, torch.export,
torch.func, dispatch modes, tensor subclasses.

`flash_attend::forward` and `flash_attend::backward` run a backend. Their schema is tensors, numbers and one string of
options, by name: what a later feature adds is another name in the string. Derivatives and rules for `torch.vmap` are in
`autograd.py`.
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

__all__ = ["BACKWARD", "FIRST_IMPORT", "FORWARD", "Options", "latest", "options_of", "with_gradients"]

INPUTS = ("q", "k", "v")  # what there are gradients of


class Options(NamedTuple):
    """What the tensors and the numbers of a call do not say."""

    backend: str
    backward: str
    causal: bool
    deterministic: bool
    precision: str
    return_lse: bool
    operands: tuple[str, ...]  # which fields of `Operands` there are, in their order
    grads: tuple[str, ...] = ()  # of a backward: which of "out" and "lse" have a gradient
    needed: tuple[str, ...] = ()  # of a backward: which of q, k and v need one

    @staticmethod
    @lru_cache(maxsize=None)
    def read(text: str) -> Options:
        """Of a string that `options_of` or `with_gradients` wrote."""
        said = dict(item.split("=") for item in text.split())
        flags = {name: said.pop(name) == "1" for name in ("causal", "deterministic", "return_lse")}
        lists = {name: tuple(filter(None, said.pop(name, "").split(","))) for name in ("operands", "grads", "needed")}
        return Options(**said, **flags, **lists)  # type: ignore[arg-type]


def options_of(operands: Operands, spec: AttentionSpec, plan: Plan, return_lse: bool) -> tuple[list[float], str]:
    """The numbers and the options of a call. In words that a compiler follows."""
    present = ",".join([name for name, tensor in zip(Operands._fields, operands, strict=True) if tensor is not None])
    flags = f"causal={int(spec.causal)} deterministic={int(spec.deterministic)} return_lse={int(return_lse)}"
    served = f"backend={plan.backend.name} backward={plan.backward} precision={spec.precision}"
    return [spec.scale, spec.dropout_p], f"{served} {flags} operands={present}"


def with_gradients(options: str, grads: Sequence[str], needed: Sequence[str]) -> str:
    """The options of a backward, from those of its forward."""
    return f"{options} grads={','.join(grads)} needed={','.join(needed)}"


# ---------------------------------------------------------------------------------------------------------------------
# What they do
# ---------------------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call again, from what an operator is given. Its arguments were checked where it began."""

    operands: Operands
    spec: AttentionSpec
    options: Options
    backend: Backend
    tiles: Tiles | None

    @staticmethod
    def of(tensors: Sequence[Tensor], numbers: Sequence[float], text: str) -> _Call:
        options = Options.read(text)
        operands = Operands(**dict(zip(options.operands, tensors, strict=True)))
        spec, backend = _spec_of(operands, numbers, options), BACKENDS[options.backend]
        # What tiles do not depend on is left out, and what they do made a number: a symbol cannot be looked up.
        sizes = dict(batch=1, heads=1, kv_heads=1, queries=1, keys=1, scale=1.0)
        dims = dict(head_dim=int(spec.head_dim), value_dim=int(spec.value_dim))
        reduced = AttentionSpec(**{**vars_of(spec), **sizes, **dims})
        return _Call(operands, spec, options, backend, backend.tiles(reduced, DeviceTarget.of(operands.q.device), options.backward))


def _forward(tensors: Sequence[Tensor], numbers: Sequence[float], text: str) -> list[Tensor]:
    pass
