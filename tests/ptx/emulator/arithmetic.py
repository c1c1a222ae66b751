"""Arithmetic, comparison, selection, logic: what a result is, element by element.

Where the part may differ from these functions: `fma.f32` goes through float64 and `fma.f64` through numpy's long
double, so that a result may be rounded twice; `ex2`, `lg2`, `rsqrt`, `div.full` and `rcp.approx` are exact to a
rounding, where the part's err by a unit or two in the last place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy import ndarray as Array

from emulator.faults import Unsupported
from emulator.kinds import DTYPES, is_float, kind_of, raw, size_of, widened
from emulator.meaning import Meaning, instruction, known, number
from emulator.syntax import Instruction

__all__ = ["bfloat16_bits", "bfloat16_values", "flushed"]

INTEGER, FLOAT, HALF = (
    f"{kind} Instructions: {{}}" for kind in ("Integer Arithmetic", "Floating Point", "Half Precision Floating Point")
)
ALL_FLOATS = ("f16", "f32", "f64")
HALVES = ("bf16", "bf16x2", "f16", "f16x2")
TINY = np.float32(2.0**-126)


# ---------------------------------------------------------------------------------------------------------------------
# Floats that numpy does not have, and floats without denormals
# ---------------------------------------------------------------------------------------------------------------------


def bfloat16_values(bits: Array) -> Array:
    """float32 from the bits of bfloat16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16_bits(values: Array) -> Array:
    """The bits of float32 rounded to bfloat16, to nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def float16_values(bits: Array) -> Array:
    """float16 from its bits."""
    return np.ascontiguousarray(bits).view(np.float16)


def _low(pair: Array) -> Array:
    """The lower half of each register of two."""
    return pair.astype(np.uint16)


def _high(pair: Array) -> Array:
    return (pair >> np.uint32(16)).astype(np.uint16)


def flushed(values: Array) -> Array:
    """float32 with zeros, of the same sign, for denormal numbers."""
    return np.where(np.abs(values) < TINY, np.copysign(np.float32(0), values), values)


def _flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *values: flushed(function(*map(flushed, values)))


def _on_halves(function: Callable[..., Array], half: str) -> Callable[..., Array]:
    """A function of float64 on the one or two 16-bit floats of each register; rounded to float32 on the way to bf16."""

    def one(*bits: Array) -> Array:
        if half.startswith("bf16"):
            return bfloat16_bits(function(*(bfloat16_values(x).astype(np.float64) for x in bits)).astype(np.float32))
        values = function(*(float16_values(x).astype(np.float64) for x in bits))
        return values.astype(np.float16).view(np.uint16)

    def pair(*bits: Array) -> Array:
        low, high = (one(*map(half_of, bits)) for half_of in (_low, _high))
        return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))

    return pair if half.endswith("x2") else one


def elementwise(item: Instruction, function: Callable[..., Array], modifiers: tuple[str, ...] = ()) -> Meaning:
    """A result of operands of its own type."""
    known(item, ("ftz", *modifiers))
    kind, half = kind_of(item.type), item.type in HALVES
    if half:
        if "ftz" in item.modifiers:
            raise Unsupported(".ftz")
        kind, function = kind_of(item.type).replace("f", "u"), _on_halves(function, item.type)
    elif "ftz" in item.modifiers:
        function = _flushing(function)
    to, *operands = item.arguments
    return Meaning(function, tuple((operand, kind) for operand in operands), ((to, kind),))


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


@instruction("add", section=f"{INTEGER}; {FLOAT}; {HALF}")
def _add(item: Instruction) -> Meaning:
    return elementwise(item, np.add, ("rn",))


@instruction("sub", section=f"{INTEGER}; {FLOAT}; {HALF}")
def _sub(item: Instruction) -> Meaning:
    return elementwise(item, np.subtract, ("rn",))


@instruction("mul", "mad", section=f"{INTEGER}; {FLOAT}; {HALF}")
def _mul(item: Instruction) -> Meaning:
    if item.type in HALVES or is_float(kind_of(item.type)):
        if item.parts[0] == "mad":
            raise Unsupported("mad of floats")
        return elementwise(item, np.multiply, ("rn",))
    known(item, ("lo", "hi", "wide"))
    kind = kind_of(item.type)
    to, a, b, *c = item.arguments
    result = widened(kind, 2 * size_of(kind)) if "wide" in item.modifiers else kind
    product = {"lo": np.multiply, "hi": _high_product, "wide": partial(np.multiply, dtype=DTYPES[result])}
    function = product[item.modifiers[0]]
    compute = (lambda a, b, c: function(a, b) + c) if c else function
    return Meaning(compute, ((a, kind), (b, kind), *((x, result) for x in c)), ((to, result),))


def _high_product(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return (a.astype(wide) * b >> wide.type(bits)).astype(a.dtype)
    if a.dtype.kind == "i":
        raise Unsupported("mul.hi.s64")
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    a_low, a_high, b_low, b_high = a & mask, a >> half, b & mask, b >> half
    middle = ((a_low * b_low) >> half) + ((a_high * b_low) & mask) + ((a_low * b_high) & mask)
    return a_high * b_high + ((a_high * b_low) >> half) + ((a_low * b_high) >> half) + (middle >> half)


def _fma(a: Array, b: Array, c: Array) -> Array:
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return np.add(np.multiply(a, b, dtype=wide), c).astype(a.dtype)


@instruction("fma", section=f"{FLOAT}; {HALF}")
def _read_fma(item: Instruction) -> Meaning:
    return elementwise(item, (lambda a, b, c: a * b + c) if item.type in HALVES else _fma, ("rn",))


@instruction("div", section=f"{INTEGER}; {FLOAT}")
def _div(item: Instruction) -> Meaning:
    return elementwise(item, np.divide if item.type in ALL_FLOATS else quotient, ("rn", "full", "approx"))


@instruction("rem", section=INTEGER)
def _rem(item: Instruction) -> Meaning:
    return elementwise(item, lambda a, b: a - quotient(a, b) * b)


def quotient(a: Array, b: Array) -> Array:
    """Rounded towards 0; what the part gives for a division by 0 is not said, here it is all ones."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    down = a // divisor
    towards_zero = down + ((down < 0) & (down * divisor != a)).astype(a.dtype) if a.dtype.kind == "i" else down
    return np.where(b == 0, np.array(-1).astype(a.dtype), towards_zero)


@instruction("abs", section=f"{INTEGER}; {FLOAT}; {HALF}")
def _abs(item: Instruction) -> Meaning:
    return elementwise(item, np.abs)


@instruction("neg", section=f"{INTEGER}; {FLOAT}; {HALF}")
def _neg(item: Instruction) -> Meaning:
    return elementwise(item, np.negative)


@instruction("min", "max", section=f"{INTEGER}; {FLOAT}; {HALF}")
def _minmax(item: Instruction) -> Meaning:
    """The number where one of two is NaN, but with `.NaN`; with `.relu` no less than 0."""
    if len(item.arguments) != 3 or ("relu" in item.modifiers and item.type != "s32"):
        raise Unsupported(item.op)
    with_nan = "NaN" in item.modifiers or item.type not in (*ALL_FLOATS, *HALVES)
    functions = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[item.parts[0]]
    function = functions[with_nan]
    if "relu" in item.modifiers:
        return elementwise(item, lambda a, b: np.maximum(function(a, b), np.int32(0)), ("relu",))
    return elementwise(item, function, ("NaN",))


@instruction("ex2", section=FLOAT)
def _ex2(item: Instruction) -> Meaning:
    return elementwise(item, np.exp2, ("approx",))


@instruction("lg2", section=FLOAT)
def _lg2(item: Instruction) -> Meaning:
    return elementwise(item, np.log2, ("approx",))


@instruction("sqrt", section=FLOAT)
def _sqrt(item: Instruction) -> Meaning:
    return elementwise(item, np.sqrt, ("approx", "rn"))


@instruction("rsqrt", section=FLOAT)
def _rsqrt(item: Instruction) -> Meaning:
    return elementwise(item, lambda x: x.dtype.type(1) / np.sqrt(x), ("approx",))


@instruction("rcp", section=FLOAT)
def _rcp(item: Instruction) -> Meaning:
    """Of float64, approximately, only the upper half of the result counts."""
    if item.type == "f64" and "approx" in item.modifiers:
        kept = np.uint64(0xFFFFFFFF00000000)
        (to, a) = item.arguments
        return Meaning(lambda x: ((1.0 / x).view(np.uint64) & kept).view(np.float64), ((a, "f64"),), ((to, "f64"),))
    return elementwise(item, lambda x: x.dtype.type(1) / x, ("approx", "rn"))


# ---------------------------------------------------------------------------------------------------------------------
# Bits
# ---------------------------------------------------------------------------------------------------------------------

LOGIC = "Logic and Shift Instructions: {}"


@instruction("and", section=LOGIC)
def _and(item: Instruction) -> Meaning:
    return elementwise(item, np.bitwise_and)


@instruction("or", section=LOGIC)
def _or(item: Instruction) -> Meaning:
    return elementwise(item, np.bitwise_or)


@instruction("xor", section=LOGIC)
def _xor(item: Instruction) -> Meaning:
    return elementwise(item, np.bitwise_xor)


@instruction("not", section=LOGIC)
def _not(item: Instruction) -> Meaning:
    return elementwise(item, np.invert)


@instruction("shl", "shr", section=LOGIC)
def _shift(item: Instruction) -> Meaning:
    """By more than there are bits: as far as there are."""
    known(item, ())
    kind, left = kind_of(item.type), item.parts[0] == "shl"
    bits = 8 * size_of(kind)

    def compute(x: Array, by: Array) -> Array:
        few = np.minimum(by, np.uint32(bits - 1)).astype(x.dtype)
        shifted = x << few if left else x >> few
        return shifted if kind[0] == "s" and not left else np.where(by >= bits, x.dtype.type(0), shifted)

    to, x, by = item.arguments
    return Meaning(compute, ((x, kind), (by, "u32")), ((to, kind),))


@instruction("bfe", section="Integer Arithmetic Instructions: bfe")
def _bfe(item: Instruction) -> Meaning:
    """A field of bits; in a signed type its highest is its sign."""
    kind = kind_of(item.type)
    to, x, position, length = item.arguments
    position, length = number(position), number(length)
    bits = 8 * size_of(kind)
    if length == 0 or position + length > bits:
        raise Unsupported("a field beyond the register")
    up, down = (DTYPES[kind].type(n) for n in (bits - position - length, bits - length))
    return Meaning(lambda x: (x << up) >> down, ((x, kind),), ((to, kind),))


@instruction("bfi", section="Integer Arithmetic Instructions: bfi")
def _bfi(item: Instruction) -> Meaning:
    kind = kind_of(item.type)
    to, field, into, position, length = item.arguments
    position, length = number(position), number(length)
    dtype = DTYPES[kind].type
    mask = dtype(((1 << length) - 1) << position)
    return Meaning(
        lambda field, into: (into & ~mask) | ((field << dtype(position)) & mask),
        ((field, kind), (into, kind)),
        ((to, kind),),
    )


@instruction("lop3", section=LOGIC)
def _lop3(item: Instruction) -> Meaning:
    """Any function of three bits: bit 4 a + 2 b + c of a table."""
    to, *operands, table = item.arguments
    rows = [row for row in range(8) if number(table) >> row & 1]

    def compute(*bits: Array) -> Array:
        out = np.zeros((1, 1), np.uint32)
        for row in rows:
            a, b, c = (x if row >> n & 1 else ~x for x, n in zip(bits, (2, 1, 0), strict=True))
            out = out | (a & b & c)
        return out

    return Meaning(compute, tuple((operand, "u32") for operand in operands), ((to, "u32"),))


@instruction("prmt", section="Data Movement and Conversion Instructions: prmt")
def _prmt(item: Instruction) -> Meaning:
    """Four of eight bytes, each by four bits of the selector, the highest of which stands for its sign alone."""
    known(item, ())
    to, *operands = item.arguments

    def compute(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        out = np.zeros((1, 1), np.uint32)
        for n in range(4):
            nibble = (selector >> np.uint32(4 * n)) & np.uint32(15)
            byte = ((both >> (np.uint64(8) * (nibble & np.uint32(7)))) & np.uint64(255)).astype(np.uint32)
            sign = (byte >> np.uint32(7)) * np.uint32(255)
            out = out | (np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * n))
        return out

    return Meaning(compute, tuple((operand, "u32") for operand in operands), ((to, "u32"),))


@instruction("popc", section=INTEGER)
def _popc(item: Instruction) -> Meaning:
    to, x = item.arguments
    return Meaning(lambda x: np.bitwise_count(x).astype(np.uint32), ((x, kind_of(item.type)),), ((to, "u32"),))


@instruction("clz", section=INTEGER)
def _clz(item: Instruction) -> Meaning:
    to, x = item.arguments
    kind = kind_of(item.type)
    bits = 8 * size_of(kind)

    def compute(x: Array) -> Array:
        highest = [np.where((x >> x.dtype.type(n)) & x.dtype.type(1), n + 1, 0) for n in range(bits)]
        return (bits - np.max(highest, axis=0)).astype(np.uint32)

    return Meaning(compute, ((x, kind),), ((to, "u32"),))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison and selection
# ---------------------------------------------------------------------------------------------------------------------


def _ordered(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: compare(a, b) & ~np.isnan(a) & ~np.isnan(b)


def _unordered(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
FLOAT_COMPARISONS = {
    **{name: COMPARISONS[name] for name in ("eq", "lt", "le", "gt", "ge")},
    "ne": _ordered(np.not_equal),
    **{f"{name}u": _unordered(COMPARISONS[name]) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@instruction("setp", section="Comparison and Selection Instructions: setp")
def _setp(item: Instruction) -> Meaning:
    """One predicate, or two, each joined to a third: of a pair of halves one for the lower and one for the upper, of
    others two that are each other's opposite."""
    known(item, (*COMPARISONS, *FLOAT_COMPARISONS, *JOINS, "ftz"))
    kind, half = kind_of(item.type), item.type in HALVES
    compare = (FLOAT_COMPARISONS if is_float(kind) or half else COMPARISONS)[item.modifiers[0]]
    join = next((JOINS[name] for name in item.modifiers if name in JOINS), None)
    to, a, b, *third = item.arguments
    results = to.split("|")
    of_half = bfloat16_values if item.type.startswith("bf16") else float16_values
    read = of_half if half else flushed if "ftz" in item.modifiers else (lambda x: x)

    def compute(a: Array, b: Array, *third: Array) -> Array | tuple[Array, ...]:
        if item.type.endswith("x2"):
            found = [compare(read(low_or_high(a)), read(low_or_high(b))) for low_or_high in (_low, _high)]
        else:
            found = [compare(read(a), read(b))]
            found.append(~found[0])
        both = tuple(join(x, *third) if join else x for x in found[: len(results)])
        return both if len(results) > 1 else both[0]

    sources = ((a, kind), (b, kind), *((x, "pred") for x in third))
    return Meaning(compute, sources, tuple((result, "pred") for result in results))


@instruction("selp", section="Comparison and Selection Instructions: selp")
def _selp(item: Instruction) -> Meaning:
    known(item, ())
    kind = kind_of(item.type)
    kind = raw(size_of(kind)) if kind == "f16" else kind
    to, a, b, predicate = item.arguments
    return Meaning(lambda a, b, p: np.where(p, a, b), ((a, kind), (b, kind), (predicate, "pred")), ((to, kind),))
