"""Takes out of Triton's interpreter what costs it most of its time and changes no result.

It replaces the functions of `triton.language` anew for every call of a helper, where once for every helper does; it
follows every 32-bit addition with the same one in 64 bits, to find overflows, which small tests have not; and it works
out anew, for every value, what its type and its shape alone decide. Without these the same kernels run several times as
fast, to the same bits.
"""

from __future__ import annotations

import dataclasses
from functools import cache

from triton.language import core
from triton.runtime import interpreter

__all__ = ["quicken"]

_prepared = set()
_block_type = core.block_type.__init__
_block_types: dict[tuple, tuple[core.dtype, dict]] = {}
_np_dtype = interpreter._get_np_dtype
_np_dtypes: dict[str, object] = {}


def _call_helper(self: interpreter.InterpretedFunction, *args, **kwargs):
    if self.fn not in _prepared:
        interpreter._patch_lang(self.fn)  # what a kernel's launch has replaced already stays as it is
        _prepared.add(self.fn)
    return self.rewrite()(*args, **kwargs)


def _init_block_type(self: core.block_type, element_ty: core.dtype, shape: list) -> None:
    """Once for an element and a shape: types do not change."""
    key = (id(element_ty), *shape)
    if key not in _block_types:
        _block_type(self, element_ty, shape)
        _block_types[key] = element_ty, self.__dict__  # the element too, so that no other takes its id
    self.__dict__ = _block_types[key][1]


@cache
def _shape_of(sizes: tuple[int, ...]) -> tuple[core.constexpr, core.tuple]:
    """How many elements a tensor has, and its shape, as kernels see them."""
    numel = 1
    for size in sizes:
        numel *= size
    return core.constexpr(numel), core.tuple([core.constexpr(size) for size in sizes])


def _init_tensor(self: core.tensor, handle: object, type: core.dtype) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.numel, self.shape = _shape_of(tuple(type.shape) if type.is_block() else ())


def _dtype_in_numpy(dtype: core.dtype) -> object:
    if dtype.name not in _np_dtypes:
        _np_dtypes[dtype.name] = _np_dtype(dtype)
    return _np_dtypes[dtype.name]


def quicken() -> None:
    """For the rest of this process, which has to have TRITON_INTERPRET=1."""
    interpreter.InterpretedFunction.__call__ = _call_helper
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    core.block_type.__init__ = _init_block_type
    core.tensor.__init__ = _init_tensor
    interpreter._get_np_dtype = _dtype_in_numpy
