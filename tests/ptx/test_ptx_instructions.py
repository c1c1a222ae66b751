"""What instructions mean, one by one, beside numpy and Python's own numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray as Array

from emulator import synchronization
from emulator.arithmetic import bfloat16_bits, bfloat16_values, quotient
from emulator.faults import Unsupported
from emulator.kinds import DTYPES, is_float, size_of
from emulator.machine import Options
from emulator.meaning import TABLE, lookup
from emulator.translate import Program  # noqa: F401  # which fills the table
from programs import run

pytestmark = pytest.mark.ptx

COUNT = 128
INTEGERS = (0, 1, 2, 3, 7, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.5, 0.1, 1e-39, 1e38, np.inf, -np.inf, np.nan, 3.7, -2.5, 65504.0)
PREFIX = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}


def values(kind: str, seed: int) -> Array:
    """Numbers of a kind: at random, and those that are apt to go wrong."""
    draw = np.random.default_rng(seed)
    if kind == "pred":
        return draw.integers(0, 2, COUNT).astype(np.uint16)
    special = FLOATS if is_float(kind) else INTEGERS
    dtype = DTYPES[kind]
    found = draw.standard_normal(COUNT) * 10 if is_float(kind) else draw.integers(0, 2**63, COUNT, dtype=np.uint64)
    with np.errstate(over="ignore"):
        found = found.astype(dtype)
        found[: len(special)] = draw.permutation(np.array(special, np.float64 if is_float(kind) else np.uint64)).astype(
            dtype
        )
    return found


def compute(instruction: str, results: str, *operands: Array) -> list[Array]:
    """What an instruction with `{d}`, `{e}` for its results and `{a}`, `{b}`, `{c}` for its operands gives."""
    kinds = results.split()
    outputs = [np.zeros(COUNT, np.uint16 if kind == "pred" else DTYPES[kind]) for kind in kinds]
    arrays = [*outputs, *operands]
    names, lines = {}, []
    for n, array in enumerate(operands):
        register = f"{PREFIX[array.itemsize]}{20 + n}"
        lines.append(f"ld.global.b{8 * array.itemsize} {register}, [%rd{10 + len(outputs) + n}];")
        lines.append(f"setp.ne.b16 %p{n}, {register}, 0;" if array.itemsize == 2 else "")
        names |= {"abc"[n]: register, "pqr"[n]: f"%p{n}"}
    ends = []
    for n, kind in enumerate(kinds):
        register = f"%p{10 + n}" if kind == "pred" else f"{PREFIX[size_of(kind)]}{30 + n}"
        names["de"[n]] = register
        size = 2 if kind == "pred" else size_of(kind)
        stored = f"%rs{35 + n}" if kind == "pred" else register
        ends.append(f"selp.b16 {stored}, 1, 0, {register};" if kind == "pred" else "")
        ends.append(f"st.global.b{8 * size} [%rd{10 + n}], {stored};")
    found = run("\n".join([*lines, instruction.format(**names), *ends]), *arrays, threads=COUNT)
    return found[: len(outputs)]


def check(instruction: str, result: str, kinds: str, reference: Callable[..., Array]) -> None:
    operands = [values(kind, n) for n, kind in enumerate(kinds.split())]
    (found,) = compute(instruction, result, *operands)
    with np.errstate(all="ignore"):
        want = np.asarray(reference(*operands)).astype(np.uint16 if result == "pred" else DTYPES[result])
    np.testing.assert_array_equal(found, want)


def ftz(x: Array) -> Array:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


def trunc_divide(a: Array, b: Array) -> list[int]:
    """By Python's numbers; all ones where it divides by 0."""
    return [
        (abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) if y else -1) % 2 ** (8 * a.itemsize)
        for x, y in zip(a, b, strict=True)
    ]


def as_kind(numbers: list[int], kind: str) -> Array:
    bits = 8 * size_of(kind)
    return np.array([n % 2**bits for n in numbers], np.uint64).astype(f"uint{bits}").view(DTYPES[kind])


def each(function: Callable[..., int], kind: str) -> Callable[..., Array]:
    """A function of Python's integers, thread by thread."""
    return lambda *arrays: as_kind([function(*map(int, row)) for row in zip(*arrays, strict=True)], kind)


def bits_of_byte(word: int, n: int, sign: bool) -> int:
    byte = word >> (8 * n) & 255
    return (255 if byte & 128 else 0) if sign else byte


def permuted(a: int, b: int, selector: int) -> int:
    both = a | b << 32
    return sum(bits_of_byte(both, selector >> 4 * n & 7, bool(selector >> 4 * n & 8)) << 8 * n for n in range(4))


# instruction, kind of the result, kinds of the operands, what it gives
CASES = [
    ("add.s32 {d}, {a}, {b};", "s32", "s32 s32", np.add),
    ("add.s64 {d}, {a}, {b};", "s64", "s64 s64", np.add),
    ("add.f32 {d}, {a}, {b};", "f32", "f32 f32", np.add),
    ("add.rn.ftz.f32 {d}, {a}, {b};", "f32", "f32 f32", lambda a, b: ftz(ftz(a) + ftz(b))),
    ("sub.s32 {d}, {a}, {b};", "s32", "s32 s32", np.subtract),
    ("sub.f64 {d}, {a}, {b};", "f64", "f64 f64", np.subtract),
    ("mul.lo.s32 {d}, {a}, {b};", "s32", "s32 s32", np.multiply),
    ("mul.wide.s32 {d}, {a}, {b};", "s64", "s32 s32", each(lambda a, b: a * b, "s64")),
    ("mul.wide.u32 {d}, {a}, {b};", "u64", "u32 u32", each(lambda a, b: a * b, "u64")),
    ("mul.hi.u32 {d}, {a}, {b};", "u32", "u32 u32", each(lambda a, b: a * b >> 32, "u32")),
    ("mul.hi.s32 {d}, {a}, {b};", "s32", "s32 s32", each(lambda a, b: a * b >> 32, "s32")),
    ("mul.hi.u64 {d}, {a}, {b};", "u64", "u64 u64", each(lambda a, b: a * b >> 64, "u64")),
    ("mad.lo.s32 {d}, {a}, {b}, {c};", "s32", "s32 s32 s32", lambda a, b, c: a * b + c),
    ("mad.wide.s32 {d}, {a}, {b}, {c};", "s64", "s32 s32 s64", each(lambda a, b, c: a * b + c, "s64")),
    ("fma.rn.f32 {d}, {a}, {b}, {c};", "f32", "f32 f32 f32", lambda a, b, c: a.astype("f8") * b + c),
    ("div.s32 {d}, {a}, {b};", "s32", "s32 s32", lambda a, b: as_kind(trunc_divide(a, b), "s32")),
    ("div.u32 {d}, {a}, {b};", "u32", "u32 u32", lambda a, b: as_kind(trunc_divide(a, b), "u32")),
    ("div.full.f32 {d}, {a}, {b};", "f32", "f32 f32", np.divide),
    ("rem.s32 {d}, {a}, 7;", "s32", "s32", lambda a: np.fmod(a, 7)),
    ("abs.f64 {d}, {a};", "f64", "f64", np.abs),
    ("neg.f32 {d}, {a};", "f32", "f32", np.negative),
    ("neg.s32 {d}, {a};", "s32", "s32", np.negative),
    ("min.s32 {d}, {a}, {b};", "s32", "s32 s32", np.minimum),
    ("min.relu.s32 {d}, {a}, {b};", "s32", "s32 s32", lambda a, b: np.maximum(np.minimum(a, b), 0)),
    ("max.u32 {d}, {a}, {b};", "u32", "u32 u32", np.maximum),
    ("max.f32 {d}, {a}, {b};", "f32", "f32 f32", np.fmax),
    ("max.NaN.f32 {d}, {a}, {b};", "f32", "f32 f32", np.maximum),
    ("min.f32 {d}, {a}, {b};", "f32", "f32 f32", np.fmin),
    ("ex2.approx.ftz.f32 {d}, {a};", "f32", "f32", lambda a: ftz(np.exp2(ftz(a)))),
    ("lg2.approx.ftz.f32 {d}, {a};", "f32", "f32", lambda a: np.log2(ftz(a))),
    ("sqrt.rn.f32 {d}, {a};", "f32", "f32", np.sqrt),
    ("rsqrt.approx.f32 {d}, {a};", "f32", "f32", lambda a: np.float32(1) / np.sqrt(a)),
    ("rcp.rn.f32 {d}, {a};", "f32", "f32", lambda a: np.float32(1) / a),
    ("and.b32 {d}, {a}, {b};", "u32", "u32 u32", np.bitwise_and),
    ("or.b64 {d}, {a}, {b};", "u64", "u64 u64", np.bitwise_or),
    ("xor.b16 {d}, {a}, {b};", "u16", "u16 u16", np.bitwise_xor),
    ("and.pred {d}, {p}, {q};", "pred", "pred pred", np.minimum),
    ("not.b32 {d}, {a};", "u32", "u32", np.invert),
    ("shl.b32 {d}, {a}, 5;", "u32", "u32", lambda a: a << np.uint32(5)),
    ("shl.b32 {d}, {a}, {b};", "u32", "u32 u32", each(lambda a, b: a << b if b < 32 else 0, "u32")),
    ("shr.u64 {d}, {a}, {b};", "u64", "u64 u32", each(lambda a, b: a >> b, "u64")),
    ("shr.s32 {d}, {a}, {b};", "s32", "s32 u32", each(lambda a, b: a >> min(b, 40), "s32")),
    ("bfe.u32 {d}, {a}, 4, 6;", "u32", "u32", each(lambda a: a >> 4 & 63, "u32")),
    ("bfe.s32 {d}, {a}, 4, 6;", "s32", "s32", each(lambda a: (a >> 4 & 63) - 64 * (a >> 9 & 1), "s32")),
    ("bfi.b32 {d}, {a}, {b}, 3, 5;", "u32", "u32 u32", each(lambda a, b: b & ~(31 << 3) | (a & 31) << 3, "u32")),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0x96;", "u32", "u32 u32 u32", lambda a, b, c: a ^ b ^ c),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0xE8;", "u32", "u32 u32 u32", lambda a, b, c: (a & b) | (a & c) | (b & c)),
    ("prmt.b32 {d}, {a}, {b}, 0x5410;", "u32", "u32 u32", each(lambda a, b: permuted(a, b, 0x5410), "u32")),
    ("prmt.b32 {d}, {a}, {b}, {c};", "u32", "u32 u32 u32", each(permuted, "u32")),
    ("popc.b32 {d}, {a};", "u32", "u32", each(int.bit_count, "u32")),
    ("clz.b32 {d}, {a};", "u32", "u32", each(lambda a: 32 - a.bit_length(), "u32")),
    ("setp.lt.s32 {d}, {a}, {b};", "pred", "s32 s32", np.less),
    ("setp.ge.u64 {d}, {a}, {b};", "pred", "u64 u64", np.greater_equal),
    ("setp.lt.f32 {d}, {a}, {b};", "pred", "f32 f32", np.less),
    ("setp.ne.f32 {d}, {a}, {a};", "pred", "f32", lambda a: np.zeros_like(a)),
    ("setp.neu.f32 {d}, {a}, {a};", "pred", "f32", np.isnan),
    ("setp.leu.f32 {d}, {a}, {b};", "pred", "f32 f32", lambda a, b: ~(a > b)),
    ("setp.nan.f32 {d}, {a}, {b};", "pred", "f32 f32", lambda a, b: np.isnan(a) | np.isnan(b)),
    ("setp.lt.bf16 {d}, {a}, {b};", "pred", "u16 u16", lambda a, b: np.less(*map(bfloat16_values, (a, b)))),
    ("setp.neu.bf16 {d}, {a}, {a};", "pred", "u16", lambda a: np.isnan(bfloat16_values(a))),
    ("setp.gt.and.s32 {d}, {a}, {b}, {r};", "pred", "s32 s32 pred", lambda a, b, r: (a > b) & (r == 1)),
    ("setp.gt.or.s32 {d}, {a}, {b}, !{r};", "pred", "s32 s32 pred", lambda a, b, r: (a > b) | (r == 0)),
    ("selp.b32 {d}, {a}, {b}, {r};", "u32", "u32 u32 pred", lambda a, b, r: np.where(r == 1, a, b)),
    ("mov.b32 {d}, {a};", "u32", "u32", lambda a: a),
    ("mov.b32 {d}, {{{a}, {b}}};", "u32", "u16 u16", each(lambda a, b: a | b << 16, "u32")),
    ("mov.b64 {d}, {{{a}, {b}}};", "u64", "u32 u32", each(lambda a, b: a | b << 32, "u64")),
    ("mov.f32 {d}, 0fC0200000;", "f32", "f32", lambda a: np.full_like(a, -2.5)),
    ("cvt.s64.s32 {d}, {a};", "s64", "s32", lambda a: a),
    ("cvt.u64.u32 {d}, {a};", "u64", "u32", lambda a: a),
    ("cvt.u32.u64 {d}, {a};", "u32", "u64", lambda a: a),
    ("cvt.s32.s16 {d}, {a};", "s32", "s16", lambda a: a),
    ("cvt.s32.s8 {d}, {a};", "s32", "u32", lambda a: a.astype(np.int8)),
    ("cvt.rn.f32.s32 {d}, {a};", "f32", "s32", lambda a: a),
    ("cvt.rn.f32.f64 {d}, {a};", "f32", "f64", lambda a: a),
    ("cvt.f64.f32 {d}, {a};", "f64", "f32", lambda a: a),
    ("cvt.rn.f16.f32 {d}, {a};", "f16", "f32", lambda a: a),
    ("cvt.f32.f16 {d}, {a};", "f32", "f16", lambda a: a),
    ("cvta.to.global.u64 {d}, {a};", "u64", "u64", lambda a: a),
    # Where the predicate is false, what was there stays.
    ("mov.b32 {d}, 5;\n@{q} mov.b32 {d}, {a};", "u32", "u32 pred", lambda a, p: np.where(p == 1, a, 5)),
    ("mov.b32 {d}, 5;\n@!{q} mov.b32 {d}, {a};", "u32", "u32 pred", lambda a, p: np.where(p == 1, 5, a)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("instruction", "result", "kinds", "reference"), CASES, ids=[case[0] for case in CASES])
def test_like_numpy(instruction: str, result: str, kinds: str, reference: Callable[..., Array]) -> None:
    check(instruction, result, kinds, reference)


def torch_pairs(a: Array, b: Array, function: Callable, dtype: torch.dtype) -> Array:
    """A function of torch on the halves of each word."""
    x, y = (torch.from_numpy(z.view(np.int16).copy()).view(dtype).double() for z in (a, b))
    return function(x, y).float().to(dtype).view(torch.int16).numpy().view(np.uint32)


@pytest.mark.parametrize(("name", "dtype"), (("bf16x2", torch.bfloat16), ("f16x2", torch.float16)))
@pytest.mark.parametrize("operation", ("add", "sub", "mul"))
def test_arithmetic_of_halves(operation: str, name: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    words = [
        torch.randn(2 * COUNT, generator=draw).to(dtype).view(torch.int16).numpy().view(np.uint32) for _ in range(2)
    ]
    (found,) = compute(f"{operation}.{name} {{d}}, {{a}}, {{b}};", "u32", *words)
    function = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[operation]
    np.testing.assert_array_equal(found, torch_pairs(*words, function, dtype))


def test_conversions_to_bfloat16_round_to_nearest_even() -> None:
    numbers = values("f32", 5)
    want = torch.from_numpy(numbers).bfloat16()
    (found,) = compute("cvt.rn.bf16.f32 {d}, {a};", "u16", numbers)
    got = torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    (pair,) = compute("cvt.rn.bf16x2.f32 {d}, {a}, {b};", "u32", numbers, numbers[::-1].copy())
    np.testing.assert_array_equal(pair, found.astype(np.uint32) << np.uint32(16) | found[::-1])
    (back,) = compute("cvt.f32.bf16 {d}, {a};", "f32", found)
    np.testing.assert_array_equal(back, want.float().numpy())


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_bfloat16_is_torchs(bits: list[int]) -> None:
    numbers = np.array(bits, np.uint32).view(np.float32)
    want = torch.from_numpy(numbers.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(bfloat16_values(bfloat16_bits(numbers)), want)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1).filter(bool))
def test_quotients_are_rounded_towards_0(a: int, b: int) -> None:
    want = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    with np.errstate(over="ignore"):
        found = quotient(np.array([a], np.int32), np.array([b], np.int32))
    assert int(found[0]) == (want + 2**31) % 2**32 - 2**31


def test_tf32_rounds_ties_away_from_0() -> None:
    numbers = np.resize(np.array([1 + 2**-11, -1 - 2**-11, 1 + 2**-12, 3.0], np.float32), COUNT)
    (found,) = compute("cvt.rna.tf32.f32 {d}, {a};", "u32", numbers)
    np.testing.assert_array_equal(found.view(np.float32)[:4], [1 + 2**-10, -1 - 2**-10, 1, 3])


def test_conversions_to_integers_stay_within_them() -> None:
    numbers = np.resize(np.array([2.5, -2.5, 3.5, 1e20, -1e20, np.nan], np.float32), COUNT)
    for rounding, want in (("rni", [2, -2, 4]), ("rzi", [2, -2, 3]), ("rmi", [2, -3, 3]), ("rpi", [3, -2, 4])):
        (found,) = compute(f"cvt.{rounding}.s32.f32 {{d}}, {{a}};", "s32", numbers)
        assert found[:6].tolist() == [*want, 2**31 - 1, -(2**31), 0]


def test_two_predicates_are_opposites() -> None:
    a, b = values("s32", 1), values("s32", 2)
    yes, no = compute("setp.lt.s32 {d}|{e}, {a}, {b};", "pred pred", a, b)
    np.testing.assert_array_equal(yes, a < b)
    np.testing.assert_array_equal(no, a >= b)


@pytest.mark.parametrize(("kind", "values_of"), (("bf16x2", bfloat16_values), ("f16x2", lambda x: x.view(np.float16))))
def test_two_predicates_of_a_pair_are_those_of_its_halves(kind: str, values_of: Callable) -> None:
    a, b = values("u32", 1), values("u32", 2)
    b[::3] = a[::3]
    b[1::3] = b[1::3] & 0xFFFF | a[1::3] & 0xFFFF0000
    halves = [(x.astype(np.uint16), (x >> 16).astype(np.uint16)) for x in (a, b)]
    want = [values_of(x) == values_of(y) for x, y in zip(*halves, strict=True)]
    for found, wanted in zip(
        compute(f"setp.eq.{kind} {{d}}|{{e}}, {{a}}, {{b}};", "pred pred", a, b), want, strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_a_register_as_two() -> None:
    words = values("u32", 1)
    low, high = compute("mov.b32 {{{d}, {e}}}, {a};", "u16 u16", words)
    np.testing.assert_array_equal(low, words & 0xFFFF)
    np.testing.assert_array_equal(high, words >> 16)


# ---------------------------------------------------------------------------------------------------------------------
# Lanes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "by"), (("bfly", 5), ("up", 3), ("down", 7), ("idx", 9)))
@pytest.mark.parametrize("clamp", (31, 0x1C1F, 0x101F, 0))
@pytest.mark.parametrize("fixed", (True, False))
def test_shuffles(mode: str, by: int, clamp: int, fixed: bool) -> None:
    """By the words of the ISA: segments of lanes, a limit in each, and who reads beyond it reads itself."""
    clamp = {"up": clamp & 0x1F00}.get(mode, clamp)

    def source(lane: int) -> int:
        segment, limit = clamp >> 8 & 31, clamp & 31
        last = lane & segment | limit & ~segment
        j = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lane & segment | by & ~segment}[mode]
        return j if (j >= last if mode == "up" else j <= last) else lane

    words, bys = values("u32", 1), np.full(COUNT, by, np.uint32)
    (found,) = compute(f"shfl.sync.{mode}.b32 {{d}}, {{a}}, {by if fixed else '{b}'}, {clamp}, -1;", "u32", words, bys)
    want = [words[32 * (n // 32) + source(n % 32)] for n in range(COUNT)]
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("name", synchronization.REDUCTIONS)
def test_reductions_over_a_warp(name: str) -> None:
    kind = "b32" if name in ("and", "or", "xor") else "s32"
    words = values("s32", 1)
    (found,) = compute(f"redux.sync.{name}.{kind} {{d}}, {{a}}, -1;", "s32", words)
    with np.errstate(over="ignore"):
        want = synchronization.REDUCTIONS[name].reduce(words.reshape(-1, 32), axis=1, dtype=np.int32)
    np.testing.assert_array_equal(found, want.repeat(32))


def test_one_lane_is_elected() -> None:
    (found,) = compute("elect.sync %r50|{d}, -1;", "pred", values("u32", 0))
    np.testing.assert_array_equal(found, np.arange(COUNT) % 32 == 0)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def test_vectors_of_memory() -> None:
    words, out = np.arange(4 * 32, dtype=np.uint32), np.zeros(4 * 32, np.uint32)
    body = """
    mad.wide.u32 %rd5, %r0, 16, %rd0;
    mad.wide.u32 %rd6, %r0, 16, %rd1;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd5];
    st.global.v4.b32 [%rd6], {%r4, %r3, %r2, %r1};
    """
    np.testing.assert_array_equal(run(body, words, out)[1], words.reshape(-1, 4)[:, ::-1].ravel())


def test_narrow_loads_fill_wide_registers_by_their_sign() -> None:
    numbers, out = np.arange(-16, 16, dtype=np.int8), np.zeros(32, np.int32)
    for kind, want in (("s8", numbers), ("u8", numbers.view(np.uint8)), ("b8", numbers.view(np.uint8))):
        body = f"ld.global.{kind} %r1, [%rd10];\nst.global.b32 [%rd11], %r1;"
        np.testing.assert_array_equal(run(body, numbers, out)[1], want)


def test_shared_memory_and_a_barrier() -> None:
    words, out = values("u32", 3), np.zeros(COUNT, np.uint32)
    body = """
    ld.global.b32 %r1, [%rd10];
    shl.b32 %r2, %r0, 2;
    mov.b32 %r5, global_smem;
    add.s32 %r2, %r2, %r5;
    st.shared.b32 [%r2+16], %r1;
    bar.sync 0;
    xor.b32 %r3, %r2, 256;
    xor.b32 %r3, %r3, 0;
    ld.shared.b32 %r4, [%r3+16];
    st.global.b32 [%rd11], %r4;
    """
    found = run(body, words, out, threads=COUNT)[1]
    np.testing.assert_array_equal(found, words[np.arange(COUNT) ^ 64])


@pytest.mark.parametrize(
    "name", ("red.global.add.f32 [%rd0], %r1;", "atom.global.gpu.relaxed.add.f32 %r2, [%rd0], %r1;")
)
def test_additions_to_memory(name: str) -> None:
    (total,) = run(f"mov.b32 %r1, 0f3F800000;\n{name}", np.zeros(1, np.float32), threads=64, programs=3)
    assert total == 3 * 64


@pytest.mark.parametrize("copies", ("late", "early", "random"))
def test_copies_of_threads(copies: str) -> None:
    words, out = np.arange(1, 33, dtype=np.uint32), np.zeros(32, np.uint32)
    body = """
    shl.b32 %r2, %r0, 2;
    add.s32 %r2, %r2, global_smem;
    setp.lt.s32 %p1, %r0, 20;
    selp.b32 %r3, 4, 0, %p1;
    cp.async.ca.shared.global [ %r2 + 0 ], [ %rd10 + 0 ], 0x4, %r3;
    cp.async.commit_group;
    cp.async.wait_group 0;
    cp.async.wait_all;
    bar.warp.sync -1;
    ld.shared.b32 %r4, [%r2];
    st.global.b32 [%rd11], %r4;
    """
    np.testing.assert_array_equal(run(body, words, out, options=Options(copies))[1], np.where(words <= 20, words, 0))


def test_wide_copies_of_threads() -> None:
    words, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    body = """
    shl.b32 %r2, %r0, 4;
    add.s32 %r2, %r2, global_smem;
    mad.wide.u32 %rd5, %r0, 16, %rd0;
    mad.wide.u32 %rd6, %r0, 16, %rd1;
    cp.async.cg.shared.global [ %r2 + 0 ], [ %rd5 + 0 ], 0x10;
    cp.async.wait_all;
    ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2];
    st.global.v4.b32 [%rd6], {%r3, %r4, %r5, %r6};
    """
    np.testing.assert_array_equal(run(body, words, out)[1], words)


# ---------------------------------------------------------------------------------------------------------------------
# Matrices
# ---------------------------------------------------------------------------------------------------------------------


def fragment(matrix: Array, per: int) -> Array:
    """[lanes, registers] of words, from [rows, columns]: each lane has `per` elements of a row, then of the next."""
    rows, columns = matrix.shape
    lanes = []
    for lane in range(32):
        g, t = divmod(lane, 4)
        pieces = [
            matrix[row + g, column + per * t : column + per * t + per]
            for column in range(0, columns, 4 * per)
            for row in range(0, rows, 8)
        ]
        lanes.append(np.concatenate(pieces).copy().view(np.uint64 if matrix.itemsize == 8 else np.uint32))
    return np.stack(lanes)


MMA = (
    ("m16n8k16", "bf16", 16, 2), ("m16n8k8", "bf16", 8, 2), ("m16n8k16", "f16", 16, 2), ("m16n8k8", "tf32", 8, 1),
    ("m16n8k4", "tf32", 4, 1), ("m8n8k4", "f64", 4, 1), ("m16n8k8", "f64", 8, 1),
)  # fmt: skip


@pytest.mark.parametrize(("shape", "element", "depth", "per"), MMA)
def test_products_of_a_warp(shape: str, element: str, depth: int, per: int) -> None:
    """mma.sync, beside a product of whole matrices whose parts are laid out by the figures of the ISA."""
    rows, draw = int(shape[1:].split("n")[0]), np.random.default_rng(0)
    left, right, c = (draw.integers(-8, 8, size).astype(np.float64) for size in ((rows, depth), (depth, 8), (rows, 8)))
    dtype = {"bf16": None, "f16": np.float16, "tf32": np.float32, "f64": np.float64}[element]

    def encode(matrix: Array) -> Array:
        if dtype is None:
            return bfloat16_bits(matrix.astype(np.float32))
        return matrix.astype(dtype)

    wide = np.float64 if element == "f64" else np.float32
    prefix, kind = ("%rd", "b64") if element == "f64" else ("%r", "b32")
    operands = [fragment(encode(left), per), fragment(encode(right.T.copy()), per), _accumulator(c.astype(wide))]
    names, lines = [], []
    for n, operand in enumerate(operands):
        registers = [f"{prefix}{(14, 22, 26)[n] + m}" for m in range(operand.shape[1])]
        names.append("{" + ", ".join(registers) + "}")
        lines.append(f"mad.wide.u32 %rd9, %r0, {operand.shape[1] * operand.itemsize}, %rd{n + 1};")
        lines += [
            f"ld.global.{kind} {register}, [%rd9+{m * operand.itemsize}];" for m, register in enumerate(registers)
        ]
    size = operands[2].itemsize
    result = [f"{prefix}{30 + m}" for m in range(operands[2].shape[1])]
    types = {"f64": "f64.f64.f64.f64"}.get(element, f"f32.{element}.{element}.f32")
    lines.append(f"mma.sync.aligned.{shape}.row.col.{types} {{ {', '.join(result)} }}, {', '.join(names)};")
    lines.append(f"mad.wide.u32 %rd9, %r0, {operands[2].shape[1] * size}, %rd0;")
    lines += [f"st.global.{kind} [%rd9+{m * size}], {register};" for m, register in enumerate(result)]
    found, *_ = run("\n".join(lines), np.zeros_like(operands[2]), *operands)
    np.testing.assert_array_equal(found, _accumulator((left @ right + c).astype(wide)))


def _accumulator(matrix: Array) -> Array:
    """[lanes, registers]: two columns of the upper half, then of the lower."""
    lanes = [
        [matrix[half + lane // 4, 2 * (lane % 4) + column] for half in range(0, len(matrix), 8) for column in (0, 1)]
        for lane in range(32)
    ]
    return np.array(lanes, matrix.dtype).view(np.uint64 if matrix.itemsize == 8 else np.uint32)


@pytest.mark.parametrize("trans", (False, True))
def test_matrices_to_shared_memory_and_back(trans: bool) -> None:
    """stmatrix and ldmatrix, of which one may transpose."""
    words, out = values("u32", 1)[:32].repeat(4).reshape(32, 4).copy(), np.zeros((32, 4), np.uint32)
    words += np.arange(4, dtype=np.uint32)
    way = ".trans" if trans else ""
    body = f"""
    mad.wide.u32 %rd5, %r0, 16, %rd0;
    mad.wide.u32 %rd6, %r0, 16, %rd1;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd5];
    shl.b32 %r9, %r0, 4;
    add.s32 %r9, %r9, global_smem;
    stmatrix.sync.aligned.m8n8.x4{way}.shared.b16 [%r9], {{%r1, %r2, %r3, %r4}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r5, %r6, %r7, %r8}}, [%r9];
    st.global.v4.b32 [%rd6], {{%r5, %r6, %r7, %r8}};
    """
    found = run(body, words, out)[1]
    matrices = words.T.reshape(4, 8, 4).copy().view(np.uint16)  # [matrix, row, column]
    want = (matrices.swapaxes(1, 2) if trans else matrices).copy().view(np.uint32).reshape(4, 32).T
    np.testing.assert_array_equal(found, want)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    (
        "sin.approx.f32 %r1, %r2;", "add.sat.s32 %r1, %r2, %r3;", "cvt.rz.f32.f64 %r1, %rd1;", "ld.b32 %r1, [%rd1];",
        "atom.global.max.s32 %r1, [%rd0], %r2;", "bar.warp.sync 15;",
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 %r1, %r2, %r3, 1;",
    ),
)  # fmt: skip
def test_what_is_not_known_is_refused(line: str) -> None:
    with pytest.raises(Unsupported):
        run(line, np.zeros(1, np.uint32))


def test_the_longest_name_decides() -> None:
    assert lookup("cp.async.wait_group") is TABLE["cp.async.wait_group"]
    assert lookup("cp.async.bulk.wait_group.read") is TABLE["cp.async.bulk.wait_group"]
    with pytest.raises(Unsupported):
        lookup("cp.sync")


def test_every_row_has_a_section_and_a_test() -> None:
    here = Path(__file__).parent
    tests = " ".join(path.read_text() for path in here.glob("test_ptx_*.py"))
    missing = [name for name in TABLE if not re.search(rf"\b{re.escape(name)}\b", tests)]
    assert not missing
    assert all("Instructions: " in entry.section for entry in TABLE.values())
