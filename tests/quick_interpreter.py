"""Takes out of Triton's interpreter what costs it most of its time and changes no result.

It replaces the functions of `triton.language` anew for every call of a helper, where once for every helper does; and it
follows every 32-bit addition with the same one in 64 bits, to find overflows, which small tests have not. Without these
two the same kernels run two to three times as fast, to the same bits.
"""

from __future__ import annotations

import dataclasses

from triton.runtime import interpreter

__all__ = ["quicken"]

_prepared = set()


def _call_helper(self: interpreter.InterpretedFunction, *args, **kwargs):
    if self.fn not in _prepared:
        interpreter._patch_lang(self.fn)  # what a kernel's launch has replaced already stays as it is
        _prepared.add(self.fn)
    return self.rewrite()(*args, **kwargs)


def quicken() -> None:
    """For the rest of this process, which has to have TRITON_INTERPRET=1."""
    interpreter.InterpretedFunction.__call__ = _call_helper
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
