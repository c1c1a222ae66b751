"""Tile choices as data. Every row compiles without spills for its part, in every mode (see aot.py); none is measured
yet.

A row is `(BLOCK_M, BLOCK_N, num_warps, num_stages)`: queries and keys of a tile, warps, and buffers of the main loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flash_attend.spec import AttentionSpec
from flash_attend.target import DeviceTarget

__all__ = ["Tile", "Tiles", "head_parts", "override", "select_tiles"]


class Tile(NamedTuple):
    """The shape of one kernel's work."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels that serve one call."""

    forward: Tile
    backward_kv: Tile
    backward_q: Tile

    @property
    def schedule_block(self) -> tuple[int, int]:
        """Queries and keys of a block of the mask's schedule: whole tiles of all three kernels, at least one word of
        bits."""
        three = (self.forward, self.backward_kv, self.backward_q)
        return max(tile.block_m for tile in three), max(32, *(tile.block_n for tile in three))


SMALLEST_PART = 16  # the smallest dimension of a tensor-core product


def kind_of(spec: AttentionSpec) -> str:
    """Which kind of rows serves a call: "half", "tf32", "tf32x3" or "double"."""
    return {torch.float32: spec.precision, torch.float64: "double"}.get(spec.dtype, "half")


def head_parts(dim: int, kind: str) -> tuple[int, int]:
    """A head dimension as one power of two, or two where that is less: 64 -> (64, 0), 80 -> (64, 16).

    Float32 keeps to one: in two parts no tile of its backward stays in registers, and spilling costs more than padding.
    """
    power = max(SMALLEST_PART, 1 << (dim - 1).bit_length())
    first = power // 2
    second = max(SMALLEST_PART, 1 << max(dim - first - 1, 0).bit_length())
    splits = kind in ("half", "double") and first >= SMALLEST_PART and first + second < power
    return (first, second) if splits else (power, 0)


WIDTHS = (64, 96, 128, 192, 256)

_HALF_90 = {
    64: Tiles(Tile(128, 128, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),
}

# (arch, kind, width): the kind is that of the products, the width that of the wider head dimension, its parts added up.
ROWS: dict[tuple[str, str, int], Tiles] = {}

# Under the interpreter: small tiles, so that small tests cross many of them, and all three shapes differ.
INTERPRETED = Tiles(forward=Tile(32, 32, 4, 2), backward_kv=Tile(16, 32, 4, 2), backward_q=Tile(32, 16, 4, 2))

_override: Tiles | None = None


@contextmanager
def override(tiles: Tiles) -> Iterator[None]:
    """Within this context every call takes these tiles: for tests and tuning."""
    global _override
    outer, _override = _override, tiles
    try:
        yield
    finally:
        _override = outer


def row_of(spec: AttentionSpec) -> tuple[str, int]:
    """The kind and the width of a call's rows."""
    kind = kind_of(spec)
    widest = max(sum(head_parts(spec.head_dim, kind)), sum(head_parts(spec.value_dim, kind)))
    return kind, next(width for width in WIDTHS if width >= widest)


def select_tiles(spec: AttentionSpec, target: DeviceTarget) -> Tiles:
    """The tiles for a call on a part; parts without rows of their own take the default ones."""
    if _override is not None:
        return _override
    if target.interpreted:
        return INTERPRETED
    kind, width = row_of(spec)
    return ROWS.get((target.arch, kind, width)) or ROWS["default", kind, width]
