"""Tile choices as data.

Every row of `ROWS`, `VARIANTS`, `FUSED` and `FUSED_VARIANTS` compiles without spills for its part in the modes of
aot.py. Those of `HOPPER_ROWS` may spill outside of their main loops, and one of them does a little inside; aot.py says
how much.

A row is `(BLOCK_M, BLOCK_N, num_warps, num_stages, descriptors, ping_pong)`: queries and keys of a tile, warps, buffers
of the main loop, whether bulk copies fill them, and what `Tile` says of the last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import NamedTuple

from flash_attend.evidence import tuned_tiles
from flash_attend.spec import CALLS_KEPT, AttentionSpec, MaskKind, kind_of
from flash_attend.target import DeviceTarget
from flash_attend.variant import kind_of_call

__all__ = [
    "Tile",
    "Tiles",
    "as_text",
    "candidate_tiles",
    "head_parts",
    "of_text",
    "override",
    "select_hopper_tiles",
    "select_tiles",
]


class Tile(NamedTuple):
    """The shape of one kernel's work."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    descriptors: bool = False  # the main loop reads through them where the layouts allow it: for parts with bulk copies
    ping_pong: bool = False  # of the forward for Hopper: its two consumers issue their products in turns


class Tiles(NamedTuple):
    """The tiles of the kernels that serve one call: the backward is two kernels, or one that does the work of both."""

    forward: Tile
    backward_kv: Tile
    backward_q: Tile
    backward_fused: Tile | None = None  # in place of the two before it

    @property
    def schedule_block(self) -> tuple[int, int]:
        """Queries and keys of a block of the mask's schedule: whole tiles of all kernels, at least one word of bits."""
        return _schedule_block(self)


@cache
def _schedule_block(tiles: Tiles) -> tuple[int, int]:
    used = list(filter(None, tiles))
    return max(tile.block_m for tile in used), max(32, *(tile.block_n for tile in used))


SMALLEST_PART = 16  # the smallest dimension of a tensor-core product


def head_parts(dim: int, kind: str) -> tuple[int, int]:
    """A head dimension as one power of two, or as two where that serves better: 64 -> (64, 0), 80 -> (64, 16).

    TF32 and float64 keep to one: in two parts no tile of their backward stays in registers, and spilling costs more
    than padding. A float32-accurate product holds each operand twice: there every dimension above 64 is in two, even
    128.
    """
    power = max(SMALLEST_PART, 1 << (dim - 1).bit_length())
    first = power // 2
    second = max(SMALLEST_PART, 1 << max(dim - first - 1, 0).bit_length())
    narrower = kind == "half" and first >= SMALLEST_PART and first + second < power
    splits = narrower or (kind == "tf32x3" and first >= 64)
    return (first, second) if splits else (power, 0)


# (arch, kind, width) -> forward, backward_kv, backward_q. The kind is that of the products, the width that of the wider
# head dimension with its parts added up. Each tile keeps everything in registers; larger ones that do may exist.
ROWS: dict[tuple[str, str, int], Tiles] = {
    ("sm_80", "half", 64): Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),
    ("sm_80", "half", 96): Tiles(Tile(128, 64, 8, 2), Tile(16, 128, 8, 2), Tile(64, 32, 8, 2)),
    ("sm_80", "half", 128): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 64, 8, 2)),
    ("sm_80", "half", 192): Tiles(Tile(32, 32, 8, 2), Tile(32, 16, 8, 1), Tile(32, 32, 8, 2)),
    ("sm_80", "half", 256): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 64, 8, 1)),
    ("sm_90", "half", 64): Tiles(Tile(128, 128, 8, 3, True), Tile(64, 128, 8, 2), Tile(128, 128, 8, 2, True)),
    ("sm_90", "half", 96): Tiles(Tile(128, 64, 8, 2), Tile(16, 128, 8, 2), Tile(128, 64, 8, 2)),
    ("sm_90", "half", 128): Tiles(Tile(128, 128, 8, 2, True), Tile(32, 128, 8, 2), Tile(128, 128, 8, 2, True)),
    ("sm_90", "half", 192): Tiles(Tile(128, 32, 8, 2), Tile(32, 16, 8, 1), Tile(64, 32, 8, 2)),
    ("sm_90", "half", 256): Tiles(Tile(128, 64, 8, 2, True), Tile(32, 32, 8, 2), Tile(32, 64, 8, 1, True)),
    ("sm_80", "double", 64): Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)),
    ("sm_80", "double", 128): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ("sm_90", "double", 64): Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)),
    ("sm_90", "double", 128): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ("sm_80", "tf32", 64): Tiles(Tile(128, 32, 4, 2), Tile(32, 32, 4, 2), Tile(128, 32, 8, 2)),
    ("sm_80", "tf32", 128): Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 8, 2), Tile(32, 32, 4, 2)),
    ("sm_80", "tf32", 256): Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    ("sm_90", "tf32", 64): Tiles(Tile(128, 128, 8, 2, True), Tile(32, 32, 4, 2), Tile(128, 64, 8, 2, True)),
    ("sm_90", "tf32", 128): Tiles(Tile(128, 64, 8, 2, True), Tile(32, 32, 8, 2), Tile(128, 32, 8, 2, True)),
    ("sm_90", "tf32", 256): Tiles(Tile(32, 32, 8, 1, True), Tile(16, 32, 8, 1), Tile(32, 32, 8, 1, True)),
    ("sm_80", "tf32x3", 64): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("sm_80", "tf32x3", 128): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
    ("sm_90", "tf32x3", 64): Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("sm_90", "tf32x3", 128): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(64, 16, 8, 1)),
}
# Instead of its row, where that would spill in one of these modes.
VARIANTS: dict[tuple[str, str, int, str], Tiles] = {
    ("sm_80", "half", 64, "dense+dropout"): Tiles(Tile(128, 64, 8, 3), Tile(32, 64, 8, 2), Tile(128, 64, 8, 2)),
    ("sm_80", "half", 96, "dense"): Tiles(Tile(128, 64, 8, 2), Tile(16, 128, 8, 1), Tile(64, 32, 8, 2)),
    ("sm_80", "half", 96, "dense+dropout"): Tiles(Tile(128, 32, 8, 2), Tile(16, 128, 8, 2), Tile(64, 32, 8, 2)),
    ("sm_90", "half", 64, "dropout"): Tiles(Tile(128, 128, 8, 3, True), Tile(32, 64, 8, 2), Tile(128, 128, 8, 2, True)),
    ("sm_90", "half", 64, "dense+dropout"): Tiles(Tile(128, 128, 8, 3, True), Tile(32, 64, 8, 2), Tile(128, 64, 8, 2)),
    ("sm_90", "half", 128, "dense"): Tiles(Tile(128, 128, 8, 2, True), Tile(64, 32, 8, 2), Tile(128, 64, 8, 2, True)),
    ("sm_90", "half", 128, "dropout"): Tiles(Tile(128, 64, 8, 3, True), Tile(64, 32, 8, 2), Tile(128, 64, 8, 2, True)),
    ("sm_90", "half", 128, "dense+dropout"): Tiles(
        Tile(128, 64, 8, 3, True), Tile(64, 32, 8, 2), Tile(128, 64, 8, 2, True)
    ),
    ("sm_90", "half", 192, "dropout"): Tiles(Tile(128, 32, 8, 2), Tile(32, 16, 8, 1), Tile(32, 32, 8, 2)),
    ("sm_90", "half", 192, "dense+dropout"): Tiles(Tile(128, 32, 8, 2), Tile(32, 16, 8, 1), Tile(32, 32, 8, 2)),
    ("sm_90", "half", 256, "dropout"): Tiles(Tile(128, 32, 8, 2, True), Tile(32, 32, 8, 2), Tile(32, 64, 8, 1, True)),
    ("sm_80", "tf32", 64, "dropout"): Tiles(Tile(128, 32, 4, 2), Tile(32, 32, 4, 2), Tile(128, 16, 8, 2)),
    ("sm_80", "tf32", 64, "dense+dropout"): Tiles(Tile(128, 32, 4, 2), Tile(32, 32, 4, 2), Tile(128, 16, 8, 2)),
    ("sm_80", "tf32", 128, "dense"): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 4, 2)),
    ("sm_80", "tf32", 128, "dense+dropout"): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 4, 2)),
    ("sm_80", "tf32", 256, "dense"): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
    ("sm_80", "tf32", 256, "dropout"): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
    ("sm_80", "tf32", 256, "dense+dropout"): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
    ("sm_90", "tf32", 128, "dense"): Tiles(Tile(128, 64, 8, 2, True), Tile(32, 32, 8, 2), Tile(128, 16, 8, 2, True)),
    ("sm_90", "tf32", 128, "dropout"): Tiles(Tile(128, 32, 8, 2, True), Tile(32, 32, 8, 2), Tile(128, 32, 8, 2, True)),
    ("sm_90", "tf32", 128, "dense+dropout"): Tiles(
        Tile(128, 32, 8, 2, True), Tile(32, 32, 8, 2), Tile(128, 16, 8, 2, True)
    ),
    ("sm_90", "tf32x3", 128, "dense"): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
    ("sm_90", "tf32x3", 128, "dropout"): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
    ("sm_90", "tf32x3", 128, "dense+dropout"): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
}
# (arch, kind, width) -> backward_fused, and instead of it where it would spill in one of these modes.
FUSED: dict[tuple[str, str, int], Tile] = {
    ("sm_80", "half", 64): Tile(32, 128, 4, 2),
    ("sm_80", "half", 96): Tile(16, 64, 4, 2),
    ("sm_80", "half", 128): Tile(32, 32, 4, 2),
    ("sm_80", "half", 192): Tile(16, 64, 8, 2),
    ("sm_80", "half", 256): Tile(32, 32, 8, 2),
    ("sm_90", "half", 64): Tile(64, 128, 8, 2),
    ("sm_90", "half", 96): Tile(16, 64, 4, 1),
    ("sm_90", "half", 128): Tile(16, 128, 8, 2),
    ("sm_90", "half", 192): Tile(16, 64, 8, 2),
    ("sm_90", "half", 256): Tile(64, 32, 8, 2),
    ("sm_80", "double", 64): Tile(16, 32, 8, 1),
    ("sm_80", "double", 128): Tile(16, 16, 8, 1),
    ("sm_90", "double", 64): Tile(32, 32, 4, 1),
    ("sm_90", "double", 128): Tile(16, 16, 8, 1),
    ("sm_80", "tf32", 64): Tile(32, 64, 4, 2),
    ("sm_80", "tf32", 128): Tile(16, 32, 8, 2),
    ("sm_80", "tf32", 256): Tile(16, 32, 8, 1),
    ("sm_90", "tf32", 64): Tile(32, 64, 4, 2),
    ("sm_90", "tf32", 128): Tile(64, 32, 8, 2),
    ("sm_90", "tf32", 256): Tile(32, 16, 8, 2),
    ("sm_80", "tf32x3", 64): Tile(32, 32, 8, 1),
    ("sm_80", "tf32x3", 128): Tile(16, 16, 8, 1),
    ("sm_90", "tf32x3", 64): Tile(32, 32, 8, 1),
    ("sm_90", "tf32x3", 128): Tile(16, 16, 8, 1),
}
FUSED_VARIANTS: dict[tuple[str, str, int, str], Tile] = {
    ("sm_80", "half", 64, "dense"): Tile(32, 64, 8, 2),
    ("sm_80", "half", 64, "dropout"): Tile(32, 64, 8, 2),
    ("sm_80", "half", 64, "dense+dropout"): Tile(32, 64, 8, 2),
    ("sm_80", "half", 96, "dense"): Tile(16, 64, 8, 2),
    ("sm_80", "half", 96, "dropout"): Tile(16, 32, 8, 2),
    ("sm_80", "half", 96, "dense+dropout"): Tile(16, 32, 8, 2),
    ("sm_80", "half", 128, "dense"): Tile(64, 32, 8, 2),
    ("sm_80", "half", 128, "dropout"): Tile(16, 32, 8, 2),
    ("sm_80", "half", 128, "dense+dropout"): Tile(32, 32, 8, 2),
    ("sm_80", "half", 192, "dense"): Tile(16, 16, 8, 2),
    ("sm_80", "half", 192, "dropout"): Tile(16, 16, 8, 2),
    ("sm_80", "half", 192, "dense+dropout"): Tile(16, 32, 8, 2),
    ("sm_80", "half", 256, "dense"): Tile(32, 16, 8, 2),
    ("sm_80", "half", 256, "dropout"): Tile(16, 16, 8, 2),
    ("sm_80", "half", 256, "dense+dropout"): Tile(16, 16, 8, 2),
    ("sm_90", "half", 64, "dense"): Tile(64, 64, 8, 2),
    ("sm_90", "half", 64, "dropout"): Tile(32, 32, 8, 2),
    ("sm_90", "half", 64, "dense+dropout"): Tile(64, 32, 8, 1),
    ("sm_90", "half", 96, "dense"): Tile(16, 64, 8, 2),
    ("sm_90", "half", 96, "dropout"): Tile(16, 32, 8, 2),
    ("sm_90", "half", 96, "dense+dropout"): Tile(16, 64, 8, 2),
    ("sm_90", "half", 128, "dense"): Tile(64, 32, 8, 2),
    ("sm_90", "half", 128, "dropout"): Tile(32, 32, 8, 2),
    ("sm_90", "half", 128, "dense+dropout"): Tile(32, 32, 8, 2),
    ("sm_90", "half", 192, "dense"): Tile(16, 32, 8, 2),
    ("sm_90", "half", 192, "dropout"): Tile(16, 16, 8, 2),
    ("sm_90", "half", 192, "dense+dropout"): Tile(16, 32, 8, 2),
    ("sm_90", "half", 256, "dense"): Tile(32, 16, 8, 2),
    ("sm_90", "half", 256, "dropout"): Tile(32, 16, 8, 2),
    ("sm_90", "half", 256, "dense+dropout"): Tile(32, 16, 8, 2),
    ("sm_90", "double", 64, "dense"): Tile(16, 32, 8, 1),
    ("sm_90", "double", 64, "dropout"): Tile(16, 16, 8, 1),
    ("sm_90", "double", 64, "dense+dropout"): Tile(16, 16, 8, 1),
    ("sm_80", "tf32", 64, "dense"): Tile(32, 32, 8, 2),
    ("sm_80", "tf32", 64, "dropout"): Tile(32, 32, 8, 2),
    ("sm_80", "tf32", 64, "dense+dropout"): Tile(32, 32, 8, 2),
    ("sm_80", "tf32", 256, "dense"): Tile(16, 16, 8, 2),
    ("sm_90", "tf32", 64, "dense"): Tile(32, 32, 8, 2),
    ("sm_90", "tf32", 64, "dropout"): Tile(32, 32, 8, 2),
    ("sm_90", "tf32", 64, "dense+dropout"): Tile(32, 32, 8, 2),
    ("sm_90", "tf32", 128, "dense"): Tile(32, 32, 8, 2),
    ("sm_90", "tf32", 128, "dropout"): Tile(32, 32, 8, 2),
    ("sm_90", "tf32", 128, "dense+dropout"): Tile(32, 32, 8, 2),
    ("sm_90", "tf32", 256, "dense"): Tile(16, 16, 8, 2),
    ("sm_80", "tf32x3", 64, "dense"): Tile(16, 32, 8, 1),
    ("sm_80", "tf32x3", 64, "dropout"): Tile(16, 32, 8, 1),
    ("sm_80", "tf32x3", 64, "dense+dropout"): Tile(16, 32, 8, 1),
}
# Those of the kernels for Hopper, by head dimension (d = dv). With twice the queries or the keys
# registers are spilled and products serialized, and there is no power of two in between. What a kernel walks over has
# two buffers each, but v, for the gradient of q, as many as stages: at 256 there is room for one.
HOPPER_ROWS: dict[int, Tiles] = {
    64: Tiles(Tile(128, 128, 4, 2), Tile(128, 128, 4, 2), Tile(128, 128, 4, 2), Tile(128, 128, 4, 2)),
    128: Tiles(Tile(128, 128, 4, 2), Tile(64, 128, 4, 2), Tile(128, 64, 4, 2), Tile(64, 128, 4, 2)),
    256: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 4, 1), Tile(64, 64, 4, 2)),
}
ARCHS = frozenset(arch for arch, _, _ in ROWS)

# Under the interpreter: small tiles, so that small tests cross many of them, and all shapes differ.
INTERPRETED = Tiles(
    forward=Tile(32, 32, 4, 2, True), backward_kv=Tile(16, 32, 4, 2), backward_q=Tile(32, 16, 4, 2, True)
)
INTERPRETED_FUSED = Tile(16, 16, 4, 2)

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
    return kind, min(width for _, of, width in ROWS if of == kind and width >= widest)


def mode_of(spec: AttentionSpec) -> str:
    """The mode of a call, as `VARIANTS` names it: "", "dense", "dropout" or "dense+dropout"."""
    return "+".join(["dense"] * (spec.mask == MaskKind.DENSE) + ["dropout"] * (spec.dropout_p > 0))


def select_tiles(spec: AttentionSpec, target: DeviceTarget, backward: str = "separate") -> Tiles:
    """The tiles for a call on a part, whose backward is "separate" or "fused".

    Parts without rows of their own take those of sm_80, which fit them all.
    """
    return _override or _look_up_tiles(spec, target, backward)


def select_hopper_tiles(spec: AttentionSpec, target: DeviceTarget, backward: str = "separate") -> Tiles:
    """The tiles for a call of the kernels for Hopper."""
    return _override or _look_up_hopper_tiles(spec.head_dim, backward)


@lru_cache(maxsize=CALLS_KEPT)
def _look_up_tiles(spec: AttentionSpec, target: DeviceTarget, backward: str) -> Tiles:
    fastest = tuned_tiles("triton", kind_of_call(spec), target, backward)
    return of_text(fastest) if fastest else _tiles_by_rule(spec, target, backward)


def candidate_tiles(spec: AttentionSpec, target: DeviceTarget, backward: str) -> list[Tiles]:
    """What may be fastest on a part: first the tiles that a call takes untuned, then those of other parts, and of wider
    head dimensions. What a part cannot hold is found out when it is timed."""
    usual, (kind, width) = _tiles_by_rule(spec, target, backward), row_of(spec)
    if backward == "fused":
        tiles = [tile for (_, of, wide), tile in FUSED.items() if of == kind and wide >= width]
        others = [usual._replace(backward_fused=tile) for tile in tiles]
    else:
        others = [tiles for (_, of, wide), tiles in ROWS.items() if of == kind and wide >= width]
    return list(dict.fromkeys([usual, *others]))


def as_text(tiles: Tiles) -> str:
    """Tiles as JSON."""
    return json.dumps(tiles)


def of_text(text: str) -> Tiles:
    """The tiles of `as_text`."""
    return Tiles(*(tile and Tile(*tile) for tile in json.loads(text)))


def _tiles_by_rule(spec: AttentionSpec, target: DeviceTarget, backward: str) -> Tiles:
    if target.interpreted:
        tiles, fused = INTERPRETED, INTERPRETED_FUSED
    else:
        row = (target.arch if target.arch in ARCHS else "sm_80", *row_of(spec))
        variant = (*row, mode_of(spec))
        tiles, fused = VARIANTS.get(variant) or ROWS[row], FUSED_VARIANTS.get(variant) or FUSED[row]
    return tiles._replace(backward_fused=fused) if backward == "fused" else tiles


@cache
def _look_up_hopper_tiles(head_dim: int, backward: str) -> Tiles:
    tiles = HOPPER_ROWS[head_dim]
    return tiles if backward == "fused" else tiles._replace(backward_fused=None)
