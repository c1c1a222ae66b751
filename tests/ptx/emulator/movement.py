"""Moves, conversions, loads and stores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from emulator.arithmetic import bfloat16_bits, bfloat16_values, flushed
from emulator.faults import Unsupported
from emulator.kinds import DTYPES, is_float, kind_of, raw, size_of
from emulator.meaning import Meaning, address, instruction, known, same
from emulator.syntax import Argument, Instruction

if TYPE_CHECKING:
    from emulator.machine import Machine, Mask

MOVEMENT = "Data Movement and Conversion Instructions: {}"


# ---------------------------------------------------------------------------------------------------------------------
# Moves
# ---------------------------------------------------------------------------------------------------------------------


@instruction("mov", section=MOVEMENT)
def _mov(item: Instruction) -> Meaning:
    """A register, a number or an address; several registers as one, or one as several."""
    known(item, ())
    to, of = item.arguments
    kind = "pred" if item.type == "pred" else raw(size_of(kind_of(item.type)))
    if isinstance(of, tuple):
        piece = raw(size_of(kind) // len(of))
        return Meaning(partial(_pack, DTYPES[kind]), tuple((x, piece) for x in of), ((to, kind),))
    if isinstance(to, tuple):
        piece = raw(size_of(kind) // len(to))
        return Meaning(partial(_unpack, DTYPES[piece], len(to)), ((of, kind),), tuple((x, piece) for x in to))
    return Meaning(same, ((of, kind),), ((to, kind),))


def _pack(dtype: np.dtype, *pieces: Array) -> Array:
    out = pieces[0].astype(dtype)
    for n, piece in enumerate(pieces[1:], 1):
        out = out | (piece.astype(dtype) << dtype.type(8 * n * piece.dtype.itemsize))
    return out


def _unpack(dtype: np.dtype, count: int, whole: Array) -> Sequence[Array]:
    pieces = [(whole >> whole.dtype.type(8 * n * dtype.itemsize)).astype(dtype) for n in range(count)]
    return pieces if count > 1 else pieces[0]


@instruction("cvta", section=MOVEMENT)
def _cvta(item: Instruction) -> Meaning:
    """All addresses are generic ones here."""
    to, of = item.arguments
    return Meaning(same, ((of, "u64"),), ((to, "u64"),))


# ---------------------------------------------------------------------------------------------------------------------
# Conversions
# ---------------------------------------------------------------------------------------------------------------------

TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt", section=MOVEMENT)
def _cvt(item: Instruction) -> Meaning:
    known(item, ("rn", "rna", "ftz", *TO_INTEGER, *DTYPES, "bf16", "bf16x2", "f16x2", "tf32"))
    to, of = item.parts[-2:]
    if to in ("bf16x2", "f16x2"):
        return _to_pair(item, to)
    result, *sources = item.arguments
    return Meaning(_conversion(item, to, of), tuple((x, kind_of(of)) for x in sources), ((result, kind_of(to)),))


def _conversion(item: Instruction, to: str, of: str):
    if to == "tf32" and of == "f32" and "rna" in item.modifiers:
        return _tf32
    if to == "bf16" and of == "f32" and "rn" in item.modifiers:
        return bfloat16_bits
    if to == "f32" and of == "bf16":
        return bfloat16_values
    if not {to, of} <= DTYPES.keys():
        raise Unsupported(f"from {of} to {to}")
    dtype = DTYPES[to]
    rounding = next((TO_INTEGER[name] for name in item.modifiers if name in TO_INTEGER), None)
    if is_float(of) and not is_float(to):
        if rounding is None:
            raise Unsupported("without a rounding")
        return lambda x: _integer(rounding(x), dtype)
    if is_float(to) and "rn" not in item.modifiers and (not is_float(of) or size_of(to) < size_of(of)):
        raise Unsupported("without a rounding")
    flush = flushed if "ftz" in item.modifiers else same
    return lambda x: flush((rounding(x) if rounding else x).astype(dtype))


def _tf32(x: Array) -> Array:
    """To 10 bits of fraction, ties away from 0."""
    rounded = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), rounded)


def _integer(x: Array, dtype: np.dtype) -> Array:
    """The nearest integer that there is; 0 for NaN."""
    limits = np.iinfo(dtype)
    inside = (x >= limits.min) & (x < float(limits.max))
    outside = np.where(x > 0, limits.max, np.where(np.isnan(x), 0, limits.min)).astype(dtype)
    return np.where(inside, np.where(inside, x, 0).astype(dtype), outside)


def _to_pair(item: Instruction, to: str) -> Meaning:
    """Two float32 as one register: the first operand is the upper half."""
    if "rn" not in item.modifiers or item.type != "f32":
        raise Unsupported(item.op)
    bits = bfloat16_bits if to == "bf16x2" else (lambda x: x.astype(np.float16).view(np.uint16))
    result, high, low = item.arguments
    return Meaning(
        lambda high, low: (bits(high).astype(np.uint32) << np.uint32(16)) | bits(low),
        ((high, "f32"), (low, "f32")),
        ((result, "u32"),),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

CACHING = (
    "L1::evict_last",
    "L1::evict_first",
    "L1::evict_normal",
    "L1::no_allocate",
    "L2::cache_hint",
    "nc",
    "relaxed",
)
VECTORS = ("v2", "v4", "v8")
SPACES = {"param": "u64", "global": "u64", "shared": "u32", "shared::cta": "u32"}  # and the kind of their addresses


def _space(item: Instruction) -> str:
    known(item, (*SPACES, *VECTORS, *CACHING))
    space = next((name for name in item.modifiers if name in SPACES), None)
    if space is None:
        raise Unsupported("a generic address")
    return space.removesuffix("::cta")


def _several(argument: Argument) -> tuple[str, ...]:
    return argument if isinstance(argument, tuple) else (argument,)


def _loaded(values: Sequence[Array], kind: str) -> Sequence[Array] | Array:
    values = [value.view(DTYPES[kind]) for value in values]
    return values if len(values) > 1 else values[0]


@instruction("ld", section=MOVEMENT)
def _ld(item: Instruction) -> Meaning:
    space = _space(item)
    kind = kind_of(item.type)
    size, registers = size_of(kind), _several(item.arguments[0])
    base, offset = address(item.arguments[1])
    results = tuple((register, kind) for register in registers)

    def parameter(machine: Machine, mask: Mask) -> Sequence[Array] | Array:
        values = [machine.parameter(base, offset + n * size, size) for n in range(len(registers))]
        return _loaded(values, kind)

    def load(machine: Machine, mask: Mask, at: Array) -> Sequence[Array] | Array:
        return _loaded(machine.space(space).load(at, offset, size, len(registers), mask), kind)

    if space == "param":
        return Meaning(parameter, (), results, acts=True)
    return Meaning(load, ((base, SPACES[space]),), results, acts=True)


@instruction("st", section=MOVEMENT)
def _st(item: Instruction) -> Meaning:
    space = _space(item)
    kind = raw(size_of(kind_of(item.type)))
    base, offset = address(item.arguments[0])

    def store(machine: Machine, mask: Mask, at: Array, *values: Array) -> None:
        machine.space(space).store(at, offset, size_of(kind), values, mask)

    values = tuple((value, kind) for value in _several(item.arguments[1]))
    return Meaning(store, ((base, SPACES[space]), *values), acts=True)


@instruction("red", "atom", section="Parallel Synchronization and Communication Instructions: {}")
def _add_to_memory(item: Instruction) -> Meaning:
    """Additions to global memory, none of which gives the old value to anybody who reads it."""
    known(item, ("global", "add", "gpu", "relaxed", "acq_rel", "v2", "v4"))
    if "add" not in item.modifiers:
        raise Unsupported(item.op)
    kind = kind_of(item.type)
    *result, to, values = item.arguments
    base, offset = address(to)

    def add(machine: Machine, mask: Mask, at: Array, *values: Array) -> Array | list[Array]:
        for n, value in enumerate(values):
            machine.space("global").add(at, offset + n * size_of(kind), value, mask)
        old = np.full((1, 1), np.nan).astype(DTYPES[kind])
        return old if len(results) == 1 else [old] * len(results)

    sources = ((base, "u64"), *((value, kind) for value in _several(values)))
    results = tuple((register, kind) for registers in result for register in _several(registers))
    return Meaning(add, sources, results, acts=True)
