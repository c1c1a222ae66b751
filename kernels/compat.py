"""Triton 3.6 to 3.9, compiled or interpreted, in the same words: what kernels are made of.

An aggregate is a class whose instances live inside a kernel: what belongs together travels as one value. It declares
its fields and has methods, which are `triton.jit` functions:

    @aggregate
    class Rows:
        pointer: tl.tensor
        stride: tl.tensor
        DIM: tl.constexpr

        @triton.jit
        def load(self, first): ...

Fields are given in this order, or by name. `tl.tensor` is a run-time value, `tl.constexpr` a compile-time one, and
`object` may be either: a pointer or None, a tuple, another aggregate. Instances do not change; methods return new ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["BULK_COPIES_ROUND", "INTERPRETED", "TWICE_LOG2E", "aggregate", "constexpr_function", "kernel", "tanh"]

INTERPRETED = triton.knobs.runtime.interpret
TWICE_LOG2E = tl.constexpr(2.8853900817779268)
# To TF32, where a descriptor says so: from Triton 3.7 on. The interpreter would not.
BULK_COPIES_ROUND = not INTERPRETED and hasattr(TensorDescriptor, "round_f32_to_tf32")

# `triton.aggregate` from Triton 3.8 on.
_compiled_aggregate = getattr(triton, "aggregate", None) or tl.core._aggregate


def aggregate(cls: type) -> Any:
    """Makes a class an aggregate. Its constructor takes the fields."""
    fields = cls.__annotations__ = inspect.get_annotations(cls, eval_str=True)
    field = _interpreted_field if INTERPRETED else _compiled_field

    def __init__(self: Any, *values: Any, **named: Any) -> None:
        given = dict(zip(fields, values, strict=False)) | named
        if given.keys() != fields.keys() or len(values) + len(named) != len(fields):
            raise TypeError(f"{cls.__name__} has the fields {', '.join(fields)}; got {len(values)} and {list(named)}")
        for name, value in given.items():
            setattr(self, name, field(value))

    __init__.__triton_builtin__ = True  # type: ignore[attr-defined]  # Triton need not read its source
    cls.__init__ = __init__  # type: ignore[misc]
    return _interpreted_aggregate(cls) if INTERPRETED else _compiled_aggregate(cls)


def _compiled_field(value: Any) -> Any:
    return value if isinstance(value, tl.core.base_value) else tl.constexpr(value)


def _interpreted_field(value: Any) -> Any:
    return value.value if isinstance(value, tl.constexpr) else value


def _interpreted_aggregate(cls: type) -> type:
    """The interpreter runs a kernel as Python does, where a class is a class. Only its interpreted functions have to be
    told who they are methods of."""
    for name, member in list(vars(cls).items()):
        if isinstance(member, triton.runtime.interpreter.InterpretedFunction):
            setattr(cls, name, _method(member))
    return cls


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **named: function(self, *args, **named)


def _interpreted_tanh(x: Any, how: str) -> Any:
    data = torch.as_tensor(x.handle.data)
    if how == "fast":
        data = data / TWICE_LOG2E.value
    return tl.tensor(TensorHandle(data.tanh().numpy(), x.handle.dtype), x.type)


@triton.jit
def _compiled_tanh(x, HOW: tl.constexpr):
    if HOW == "fast":
        # 1 - 2 / (exp(2 x) + 1). The instruction `tanh.approx` errs by 2^-11, which shows in the LSE.
        raised = tl.math.exp2(x) + 1.0
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [raised], dtype=tl.float32, is_pure=True, pack=1
        )
        return 1.0 - 2.0 * inverse
    else:
        return libdevice.tanh(x)


# The hyperbolic tangent of a tensor: "exact"; or "fast", in float32, with an error of some 2^-23 however small it is,
# of a tensor that comes multiplied by TWICE_LOG2E.
tanh = _interpreted_tanh if INTERPRETED else _compiled_tanh


def constexpr_function(function: Callable[..., Any]) -> Any:
    """A function of compile-time values that kernels may call."""
    return function if INTERPRETED else triton.constexpr_function(function)


def kernel(function: Callable[..., Any] | None = None, *, jit: Callable[..., Any] = triton.jit) -> Any:
    """A kernel that the host launches. `jit` is what compiles it: `gluon.jit` for one in Gluon.

    Every argument that is annotated with a type (`tl.int32`, `tl.float64`) is a run-time number: it makes no variant of
    the kernel, whatever its value.
    """
    if function is None:
        return lambda function: kernel(function, jit=jit)
    types = inspect.get_annotations(function, eval_str=True)
    return jit(do_not_specialize=[name for name, kind in types.items() if isinstance(kind, tl.dtype)])(function)
