"""The types of PTX as numpy's.

A value is an array [programs, threads], or one that broadcasts to it: [1, 1], [programs, 1], [1, threads].
"""

from __future__ import annotations

import numpy as np

__all__ = ["DTYPES", "constant", "is_float", "kind_of", "raw", "size_of", "widened"]

DTYPES = {
    "pred": np.dtype(np.bool_),
    **{f"u{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
}
# Types without an array type of their own: bits, and floats that numpy does not have.
BITS = {
    "b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64", "bf16": "u16", "bf16x2": "u32", "f16x2": "u32", "tf32": "u32",
}  # fmt: skip


def kind_of(ptx_type: str) -> str:
    """The kind of array that holds a type of PTX."""
    return BITS.get(ptx_type, ptx_type)


def size_of(kind: str) -> int:
    """Bytes."""
    return DTYPES[kind].itemsize


def raw(size: int) -> str:
    """The kind of so many bytes of bits."""
    return f"u{8 * size}"


def is_float(kind: str) -> bool:
    return kind[0] == "f"


def widened(kind: str, size: int) -> str:
    """The kind of so many bytes with the same sign."""
    return f"{kind[0]}{8 * size}"


def constant(value: float | bool, kind: str) -> np.ndarray:
    """An array [1, 1]; an integer becomes the bits of the kind."""
    if kind == "pred" or (is_float(kind) and isinstance(value, float)):
        return np.array([[value]], DTYPES[kind])
    bits = 8 * size_of(kind)
    return (
        np.array([[int(value) % (1 << bits)]], np.uint64).astype(raw(bits // 8).replace("u", "uint")).view(DTYPES[kind])
    )
