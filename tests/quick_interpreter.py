"""Takes out of Triton's interpreter what costs it most of its time and changes no result.

It replaces the functions of `triton.language` anew for every launch and every call of a helper, where once does; it
follows every 32-bit addition with the same one in 64 bits, to find overflows, which small tests have not; and it works
out anew, for every value, what its type and its shape alone decide, and for every operation what becomes of operands
that agree already. Without these the same kernels run several times as fast, to the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from math import prod

import numpy as np
from triton.language import core, semantic
from triton.runtime import interpreter

__all__ = ["quicken"]

_patch = interpreter._patch_lang
_patched: dict[int, tuple[dict, interpreter._LangPatchScope]] = {}
_match = semantic.TritonSemantic.binary_op_type_checking_impl
_conversions: dict[tuple, tuple[Callable, Callable]] = {}
_block_type = core.block_type.__init__
_block_types: dict[tuple, dict] = {}
_unwrap = core._unwrap_if_constexpr
_np_dtype = interpreter._get_np_dtype
_np_dtypes: dict[str, object] = {}


def _call_helper(self: interpreter.InterpretedFunction, *args, **kwargs):
    _patch_lang(self.fn)  # what a kernel's launch has replaced already stays as it is
    return self.rewrite()(*args, **kwargs)


def _init_block_type(self: core.block_type, element_ty: core.dtype, shape: list) -> None:
    """Once for an element and a shape: types do not change."""
    key = (element_ty.name, *shape)
    if key not in _block_types:
        _block_type(self, element_ty, shape)
        self.seen = _as_seen(shape)
        _block_types[key] = self.__dict__
    self.__dict__ = _block_types[key]


def _as_seen(sizes: Iterable[int]) -> tuple[core.constexpr, core.tuple]:
    """How many elements a tensor has, and its shape, as kernels see them."""
    return core.constexpr(prod(sizes)), core.tuple([core.constexpr(size) for size in sizes])


_SCALAR = _as_seen(())


def _init_tensor(self: core.tensor, handle: object, type: core.dtype) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.numel, self.shape = type.seen if type.__class__ is core.block_type else _SCALAR


def _unwrap_if_constexpr(value: object) -> object:
    kind = value.__class__
    if kind is core.constexpr:
        return value.value
    return value if kind in (core.tensor, int, float) else _unwrap(value)


def _dtype_in_numpy(dtype: core.dtype) -> object:
    if dtype.name not in _np_dtypes:
        _np_dtypes[dtype.name] = _np_dtype(dtype)
    return _np_dtypes[dtype.name]


# ---------------------------------------------------------------------------------------------------------------------
# The operands of an operation, in one type and one shape
# ---------------------------------------------------------------------------------------------------------------------


def _key_of(operand: object) -> object:
    """What decides how an operand is converted; types of blocks that are the same share what they hold."""
    if operand.__class__ is core.tensor:
        type = operand.type
        return id(type.__dict__) if type.__class__ is core.block_type else type.name
    return operand.__class__, operand


def _conversion(before: object, after: core.tensor) -> Callable[[object], core.tensor] | None:
    """What makes of an operand what Triton made of it; None where that is more than numpy's own conversion."""
    type, handle = after.type, after.handle
    if not isinstance(before, core.tensor):  # a number, made once
        handle.data.flags.writeable = False
        return lambda number: after
    if _key_of(before) == _key_of(after):
        return lambda operand: operand
    if core.bfloat16 in (before.type.scalar, type.scalar):
        return None

    def convert(operand: core.tensor) -> core.tensor:
        data = np.empty(handle.data.shape, handle.data.dtype)
        data[...] = operand.handle.data
        return core.tensor(interpreter.TensorHandle(data, handle.dtype), type)

    return convert


def _match_operands(self: semantic.TritonSemantic, lhs, rhs, *flags, **named) -> tuple[core.tensor, core.tensor]:
    key = (_key_of(lhs), _key_of(rhs), flags, *named.items())
    if key not in _conversions:
        matched = _match(self, lhs, rhs, *flags, **named)
        of_lhs, of_rhs = (_conversion(*pair) for pair in zip((lhs, rhs), matched, strict=True))
        if of_lhs is None or of_rhs is None:
            return matched
        _conversions[key] = of_lhs, of_rhs
    of_lhs, of_rhs = _conversions[key]
    return of_lhs(lhs), of_rhs(rhs)


def _same_dtype(self: core.dtype, other: object) -> bool:
    if other.__class__ is core.constexpr:
        other = other.value
    return self is other or (isinstance(other, core.dtype) and self.name == other.name)


# ---------------------------------------------------------------------------------------------------------------------
# What Triton replaces in its own language
# ---------------------------------------------------------------------------------------------------------------------


def _patch_attr(obj: object, name: str, member, builder: object, scope: interpreter._LangPatchScope) -> None:
    function = getattr(member, "__wrapped__", member)
    semantics = interpreter.interpreter_semantic

    def call(*args, **kwargs):
        kwargs["_semantic"] = semantics
        return function(*args, **kwargs)

    scope.set_attr(obj, name, call)


def _patch_lang(fn) -> interpreter._LangPatchScope:
    """Once for a module of kernels, and for good."""
    globals_ = id(fn.__globals__)
    if globals_ not in _patched:
        _patched[globals_] = fn.__globals__, _patch(fn)
    return interpreter._LangPatchScope()


def quicken() -> None:
    """For the rest of this process, which has to have TRITON_INTERPRET=1."""
    interpreter.InterpretedFunction.__call__ = _call_helper
    semantic.TritonSemantic.binary_op_type_checking_impl = _match_operands
    core.dtype.__eq__ = _same_dtype
    core._unwrap_if_constexpr = _unwrap_if_constexpr
    interpreter._patch_attr = _patch_attr
    interpreter._patch_lang = _patch_lang
    interpreter.TensorHandle.__post_init__ = lambda self: None
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    core.block_type.__init__ = _init_block_type
    core.tensor.__init__ = _init_tensor
    interpreter._get_np_dtype = _dtype_in_numpy
