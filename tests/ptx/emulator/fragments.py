"""Matrices in the registers of a warp, and of four: "Matrix Fragments" in the sections of `mma` and `wgmma`.

In all of them lane 4 g + t holds, of each piece of 8 rows, parts of row g: 2 t and 2 t + 1 of 8 columns of 16 bits, t
of 4 columns of 32 or 64. A matrix is an array [programs, warps or groups of four, rows, columns].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from emulator.arithmetic import bfloat16_values
from emulator.kinds import DTYPES

__all__ = ["Accumulator", "GroupAccumulator", "LeftOperand", "RightOperand", "values_of"]

Shape = tuple[int, int]  # programs, threads


def values_of(bits: Array, element: str) -> Array:
    """What a product makes of the bits of an operand: of TF32 the upper 19, whatever the others are."""
    if element == "bf16":
        return bfloat16_values(bits)
    if element == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _pieces(registers: tuple[Array, ...], shape: Shape) -> list[Array]:
    programs, threads = shape
    return [np.broadcast_to(x, shape).reshape(programs, threads // 32, 8, 4) for x in registers]


@dataclass(frozen=True)
class _Operand:
    element: str  # bf16, f16, tf32, f64

    @property
    def kind(self) -> str:
        return "f64" if self.element == "f64" else "u32"

    def _values(self, registers: tuple[Array, ...], shape: Shape) -> list[Array]:
        pieces = _pieces(registers, shape)
        if self.element == "f64":
            return pieces
        if self.element in ("bf16", "f16"):
            pieces = [np.ascontiguousarray(piece).view(np.uint16) for piece in pieces]  # [.., 8, 8]
        return [values_of(piece, self.element) for piece in pieces]

    def part(self, matrix: Array, index: int) -> Array:
        raise NotImplementedError("an operand is no result")


class LeftOperand(_Operand):
    """A, [16, k], or [8, k] of one register: upper and lower half of the first columns, then of the next."""

    def join(self, shape: Shape, registers: tuple[Array, ...]) -> Array:
        pieces = self._values(registers, shape)
        halves = [pieces[::2], pieces[1::2]] if len(pieces) > 1 else [pieces]
        return np.concatenate([np.concatenate(half, axis=3) for half in halves], axis=2)


class RightOperand(_Operand):
    """B, [k, 8], whose columns lie as the rows of A."""

    def join(self, shape: Shape, registers: tuple[Array, ...]) -> Array:
        return np.concatenate(self._values(registers, shape), axis=3).swapaxes(2, 3)


@dataclass(frozen=True)
class Accumulator:
    """C and D, [8 or 16, 8]: two columns of the upper half, then two of the lower."""

    kind: str

    def join(self, shape: Shape, registers: tuple[Array, ...]) -> Array:
        programs, threads = shape
        out = np.empty((programs, threads // 32, 4 * len(registers), 8), DTYPES[self.kind])
        for n, piece in enumerate(_pieces(registers, shape)):
            half = 8 * (n // 2)
            out[:, :, half : half + 8, n % 2 :: 2] = piece
        return out

    def part(self, matrix: Array, index: int) -> Array:
        half, column = divmod(index, 2)
        return matrix[:, :, 8 * half : 8 * half + 8, column::2].reshape(len(matrix), -1)


@dataclass(frozen=True)
class GroupAccumulator:
    """D of `wgmma`, [64, n]: each warp has 16 rows, and of every 8 columns of them what an accumulator of `mma` has."""

    kind: str = "f32"

    def join(self, shape: Shape, registers: tuple[Array, ...]) -> Array:
        programs, groups, blocks = shape[0], shape[1] // 128, len(registers) // 4
        parts = np.stack([np.broadcast_to(x, shape) for x in registers])
        # [block of columns, half of the rows, column, program, group, warp, g, t]
        parts = parts.reshape(blocks, 2, 2, programs, groups, 4, 8, 4)
        return np.ascontiguousarray(parts.transpose(3, 4, 5, 1, 6, 0, 7, 2)).reshape(programs, groups, 64, 8 * blocks)

    def part(self, matrix: Array, index: int) -> Array:
        programs, groups, _, columns = matrix.shape
        block, half, column = index // 4, (index // 2) % 2, index % 2
        pieces = matrix.reshape(programs, groups, 4, 2, 8, columns // 8, 4, 2)
        return pieces[:, :, :, half, :, block, :, column].reshape(programs, -1)
