"""Who else takes part in a call: compilers, transforms, tensor subclasses. Decides between a direct launch and the
operators."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

__all__ = [
    "constant_when_compiled",
    "differentiated",
    "forward_mode",
    "has_autocast",
    "intercepted",
    "sharded",
    "traced",
]

_F = TypeVar("_F", bound=Callable)

_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})


def constant_when_compiled(function: _F) -> _F:
    """Lets torch.compile call `function` while it traces, and put the result into its graph as a constant.

    What `torch.compiler.assume_constant_result` does, but that one imports the compiler, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def has_autocast(device_type: str) -> bool:
    """Whether autocast knows this type of device. The compiler of torch 2.10 cannot trace the question itself."""
    return device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)


def traced(*tensors: Tensor | None) -> bool:
    """Whether the call is being compiled or exported, or a tensor is of a class that sees operators: fake, functional,
    DTensor."""
    return torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors))


def sharded(*tensors: Tensor | None) -> bool:
    """Whether a tensor is a DTensor. Where nobody has imported their module, which takes a second, there are none."""
    if _PLAIN.issuperset(map(type, tensors)) or "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def intercepted() -> bool:
    """Whether forward mode, a transform of torch.func or a dispatch mode is on, which deal with operators."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or torch._C._len_torch_dispatch_stack() > 0


def forward_mode() -> bool:
    """Whether derivatives are pushed forward, by torch.autograd.forward_ad, torch.func.jvp or what builds on them."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(level.key() == TransformType.Jvp for level in levels)


def differentiated(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a backward may be asked for."""
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
