"""Tile choices as rules with evidence.

A row says which tiles each kernel may take on a family of parts: the first one serves, the others are worth timing. The
first is what the throughput model (estimate.py) takes to be fastest of what public projects chose by measurement and of
what lies near it; `python -m flash_attend.kernels.aot --estimate` prints the figures. The rules behind it:

- On sm_80 shared memory is the bottleneck: 8 warps of 16 rows each read twice what 4 warps of 32 rows do. A tile has at
  least as many rows as the product has columns, or weights go through shared memory and sums across warps.
- On sm_90 a product needs 64 rows for 4 warps, else it falls back to those of single warps.
- Up to 2% of a main loop's instructions may access spilled registers; outside of it they are free. Where more serve,
  the model has counted them: as traffic of shared memory.
- Two stages at least, unless shared memory forbids it, or with one there is room for two blocks; no product is
  computed twice.
- In TF32 on sm_80 every warp rounds all keys that it multiplies: 256 queries share them.
- Where a grid has fewer programs than the part has multiprocessors, tiles have half as many rows.
- Where a window shows a query 64 others at most, most of what a large tile visits is hidden: a small one takes 6 to 46%
  less by the model, where it reads no more of shared memory for each row.
- Where few queries read many keys, which is bound by memory, tiles have as many rows as there are, and the keys are
  split over as many programs as are to be under way: lengths alone say over how many, and nothing is compiled anew.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import NamedTuple

from flash_attend.evidence import tuned_tiles
from flash_attend.generation import renew
from flash_attend.spec import CALLS_KEPT, PACKED_ROWS, AttentionSpec, MaskKind, kind_of
from flash_attend.target import DeviceTarget
from flash_attend.variant import kind_of_call

__all__ = [
    "Tile",
    "Tiles",
    "as_text",
    "bias_tile",
    "candidate_tiles",
    "choices_for",
    "head_parts",
    "key_splits",
    "of_text",
    "override",
    "select_hopper_tiles",
    "select_tangent_tiles",
    "select_tiles",
    "tiles_of",
]


class Tile(NamedTuple):
    """The shape of one kernel's work."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    descriptors: bool = False  # the main loop reads through them where the layouts allow it: for parts with bulk copies
    ping_pong: bool = False  # of the forward for Hopper: its two consumers issue their products in turns
    halves: bool = False  # head dimensions in two parts even where they are one power of two
    # Of backward_kv: the gradients of k and of v by a launch each, of which neither spills. Of tangents: likewise two
    # halves of the columns of v.
    apart: bool = False
    programs: int = 0  # of the forward: how many the keys are split over; 0: they are not split


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

    @property
    def crossed_block(self) -> tuple[int, int]:
        """Queries and keys of which a call has several in each tile, in each block of the schedule, and in each part of
        keys that are split."""
        block_m, block_n = self.schedule_block
        return block_m, max(block_n, BLOCKS_OF_SPLIT * self.forward.block_n if self.forward.programs else 0)


@cache
def _schedule_block(tiles: Tiles) -> tuple[int, int]:
    used = list(filter(None, tiles))
    return max(tile.block_m for tile in used), max(32, *(tile.block_n for tile in used))


def bias_tile(spec: AttentionSpec, tiles: Tiles) -> Tile:
    """That of the kernel for the gradient of a bias: no wider than a block of the schedule."""
    size = BIAS_TILES[kind_of(spec)]
    block_m, block_n = tiles.schedule_block
    return Tile(min(size, block_m), min(size, block_n), 4, 1)


SMALLEST_PART = 16  # the smallest dimension of a tensor-core product


def head_parts(dim: int, kind: str, halves: bool = False) -> tuple[int, int]:
    """A head dimension as one power of two, or as two where that serves better: 64 -> (64, 0), 80 -> (64, 16).

    TF32 and float64 keep to one: in two parts no tile of their backward stays in registers, and spilling costs more
    than padding. A float32-accurate product holds each operand twice: there every dimension above 64 is in two, even
    128.
    """
    power = max(SMALLEST_PART, 1 << (dim - 1).bit_length())
    first = power // 2
    second = max(SMALLEST_PART, 1 << max(dim - first - 1, 0).bit_length())
    narrower = kind == "half" and first >= SMALLEST_PART and first + second < power
    splits = narrower or (halves and first >= SMALLEST_PART) or (kind == "tf32x3" and first >= 64)
    return (first, second) if splits else (power, 0)


class Choices(NamedTuple):
    """What each kernel may take: the first serves, the others are worth timing. A fused backward, which holds most in
    registers, takes its last with a dense mask, dropout or changed scores."""

    forward: tuple[Tile, ...]
    backward_kv: tuple[Tile, ...]
    backward_q: tuple[Tile, ...]
    backward_fused: tuple[Tile, ...]


TILE = re.compile(r"(\d+)x(\d+)w(\d+)s(\d+)(d?)(h?)(a?)")


def _choices(*kernels: str) -> Choices:
    """Of four lists of tiles."""
    return Choices(*(tuple(map(tile_of, kernel.split())) for kernel in kernels))


def tile_of(text: str) -> Tile:
    """A tile from "128x64w4s3": queries, keys, warps, stages; `d` adds descriptors, `h` halves, `a` apart."""
    *sizes, descriptors, halves, apart = TILE.fullmatch(text).groups()
    return Tile(*map(int, sizes), descriptors=bool(descriptors), halves=bool(halves), apart=bool(apart))


# (family of parts, kind of products, width) -> choices. The width is that of the wider head dimension with its parts
# added up. A family takes what it has no row for from sm_80.
# fmt: off
ROWS: dict[tuple[str, str, int], Choices] = {
    ("sm_80", "half", 64): _choices(
        "128x64w4s3 128x32w4s3 128x128w8s2", "32x128w4s2 16x128w4s2 64x128w8s2", "128x32w4s2 128x64w4s2 128x64w8s2",
        "32x128w4s2 64x128w8s2 32x64w8s2"),
    ("sm_80", "half", 96): _choices(
        "128x64w4s2 128x32w4s2", "32x128w8s2 64x64w4s2", "128x32w4s2 128x64w8s2", "16x64w4s2 16x32w8s2"),
    ("sm_80", "half", 128): _choices(
        "128x32w4s2 128x64w8s2 128x128w8s2", "64x64w4s2 32x128w8s2", "128x32w4s2 128x64w8s2",
        "32x32w4s2 64x64w4s2 64x128w8s1 16x32w8s2"),
    ("sm_80", "half", 192): _choices(
        "128x32w8s2 64x64w4s2", "32x128w8s2a 32x32w4s2", "64x32w4s2 128x32w8s1", "16x64w8s2 16x16w8s2"),
    ("sm_86", "half", 192): _choices("128x32w8s2 64x32w4s2", "32x32w4s2", "64x32w4s2", "16x64w8s2 16x16w8s2"),
    ("sm_80", "half", 256): _choices(
        "128x32w8s2h 64x64w4s2", "64x64w8s2", "64x64w4s2 64x64w8s1", "32x32w8s2 16x16w8s2"),
    ("sm_86", "half", 256): _choices("128x32w8s2h", "32x32w4s2", "32x32w4s2", "32x32w8s2 16x16w8s2"),
    ("sm_90", "half", 64): _choices(
        "128x64w4s3d 128x128w4s3d 128x128w8s3d", "64x64w4s2 64x128w8s2", "128x64w4s2d 128x128w8s2d",
        "64x128w8s2 32x32w8s2"),
    ("sm_90", "half", 96): _choices(
        "128x64w4s2 128x128w8s2", "64x64w4s2 64x128w8s2", "128x64w8s2", "16x64w4s1 16x32w8s2"),
    ("sm_90", "half", 128): _choices(
        "128x128w8s2d 128x64w8s3d", "64x128w8s2 64x64w4s2 32x128w8s2", "128x128w8s2d 128x64w8s2d",
        "16x128w8s2 32x32w8s2"),
    ("sm_90", "half", 192): _choices("128x64w8s2", "64x128w8s2a", "128x64w8s2", "16x64w8s2 16x16w8s2"),
    ("sm_90", "half", 256): _choices("128x64w8s2d", "64x128w8s1a 32x128w8s2a", "128x32w8s2d", "64x32w8s2 32x16w8s2"),
    ("sm_80", "tf32", 64): _choices(
        "256x32w4s2h 128x64w4s2h 128x32w4s3", "32x128w8s2 32x128w4s2", "128x32w4s2 128x32w8s2", "32x64w4s2 32x32w8s2"),
    ("sm_80", "tf32", 128): _choices(
        "256x32w8s2h 128x16w4s2h 128x32w4s2h", "32x64w4s2", "128x16w8s2 64x32w4s2", "16x32w8s2"),
    ("sm_86", "tf32", 128): _choices("128x16w4s2h 128x32w4s2h", "32x32w4s2", "32x32w4s2", "16x32w8s2"),
    ("sm_80", "tf32", 256): _choices("128x16w8s1h 64x32w4s1h", "32x32w4s1a", "32x32w4s1", "16x32w8s1 16x16w8s2"),
    ("sm_86", "tf32", 256): _choices("32x32w8s1", "16x32w8s1", "16x32w8s1", "16x16w4s2 16x16w8s2"),
    ("sm_90", "tf32", 64): _choices("128x64w4s2d 128x128w8s2d", "32x128w8s2", "128x64w8s2d", "32x64w4s2 32x32w8s2"),
    ("sm_90", "tf32", 128): _choices("128x64w8s2d", "32x64w4s1 32x64w4s2", "128x32w8s2d", "64x32w8s2 32x32w8s2"),
    ("sm_90", "tf32", 256): _choices("32x32w4s2 64x32w4s2d", "32x32w4s1a", "32x32w4s1", "32x16w8s2 16x16w8s2"),
    ("sm_80", "tf32x3", 64): _choices(
        "64x32w4s2 32x32w4s2", "16x64w4s1 32x64w4s1 32x32w8s2", "64x16w4s1 64x32w4s1", "32x32w8s1 16x32w8s1"),
    ("sm_80", "tf32x3", 128): _choices(
        "64x16w4s1 64x32w4s1", "16x64w4s1 16x16w4s1", "64x16w4s1 16x16w4s1", "16x16w8s1"),
    ("sm_86", "tf32x3", 128): _choices("64x16w4s1", "16x16w4s1", "16x16w4s1", "16x16w8s1"),
    ("sm_90", "tf32x3", 64): _choices("128x32w8s2 64x32w4s2", "32x64w4s1", "64x32w4s1", "32x32w8s1"),
    ("sm_90", "tf32x3", 128): _choices("64x32w4s1 128x32w8s1", "16x64w4s1 16x16w4s1", "64x16w4s1", "16x16w8s1"),
    ("sm_80", "double", 64): _choices("32x32w4s1", "16x32w4s1", "32x16w4s1", "16x32w8s1 16x16w8s1"),
    ("sm_80", "double", 128): _choices("16x16w4s1", "16x16w8s1", "16x16w8s1", "16x16w8s1"),
}
# fmt: on
# What serves with dropout, whose numbers take registers and make instructions the bottleneck, where that is not the
# first: by the kernel.
DROPOUT: dict[tuple[str, str, int], dict[str, str]] = {
    ("sm_80", "half", 64): dict(backward_kv="32x128w8s2"),
    ("sm_80", "half", 128): dict(backward_kv="32x128w8s2"),
    ("sm_90", "tf32x3", 128): dict(backward_q="16x16w4s1"),
}
# And with a bias or a softcap, whose tiles take registers beside the scores.
BIAS: dict[tuple[str, str, int], dict[str, str]] = {
    ("sm_80", "half", 64): dict(backward_kv="16x128w4s2"),
    ("sm_90", "half", 128): dict(backward_kv="32x128w8s2"),
}
SOFTCAP: dict[tuple[str, str, int], dict[str, str]] = {
    ("sm_90", "half", 128): dict(backward_kv="32x128w8s2"),
}
# And with sequences that are packed, whose places take registers beside the sums.
PACKED: dict[tuple[str, str, int], dict[str, str]] = {
    ("sm_90", "half", 256): dict(backward_kv="32x128w8s2a"),
}
# And in a window of so many keys beside a query's own, or fewer.
NARROW_WINDOW = 64
NARROW: dict[tuple[str, str, int], dict[str, str]] = {
    ("sm_80", "half", 64): dict(forward="64x32w4s3"),
    ("sm_90", "half", 64): dict(forward="64x32w4s3d", backward_q="64x32w4s2d"),
    ("sm_90", "half", 128): dict(forward="64x64w4s3d", backward_kv="64x64w4s2", backward_q="64x64w4s2d"),
}
# What the kernel for tangents takes, which holds two sums as wide as v, and beside the scores their tangents. What has
# no row is refused. Values are apart where they are wider than half of the keys.
TANGENT_ROWS: dict[tuple[str, str, int], str] = {
    ("sm_80", "half", 64): "128x64w8s2",
    ("sm_80", "half", 96): "128x32w8s2",
    ("sm_80", "half", 128): "128x16w8s2",
    ("sm_80", "half", 192): "128x32w8s2a",
    ("sm_86", "half", 192): "64x16w4s2",
    ("sm_80", "half", 256): "128x16w8s2a",
    ("sm_86", "half", 256): "32x32w8s2",
    ("sm_90", "half", 64): "64x64w4s2d",
    ("sm_90", "half", 96): "128x64w8s2",
    ("sm_90", "half", 128): "128x64w8s2d",
    ("sm_90", "half", 192): "128x32w8s2a",
    ("sm_90", "half", 256): "128x64w8s1da",
    ("sm_80", "tf32", 64): "128x32w8s2",
    ("sm_80", "tf32", 128): "128x16w8s2",
    ("sm_86", "tf32", 128): "32x32w4s1",
    ("sm_90", "tf32", 64): "128x64w8s2d",
    ("sm_90", "tf32", 128): "128x32w8s1d",
    ("sm_80", "tf32x3", 64): "64x16w4s1",
    ("sm_80", "double", 64): "16x16w4s1",
}
# Of these, whose shared memory has no room for a bias and its tangent twice: with a bias they have one stage.
TANGENTS_FULL = (("sm_80", "tf32", 128), ("sm_86", "tf32", 64), ("sm_86", "half", 256), ("sm_90", "tf32", 64))
# Where the parts are that share rows: by their shared memory, 99 KB a block on sm_86, and by their products.
OLDEST = "sm_80"
FAMILIES = {
    "sm_86": "sm_86",
    "sm_89": "sm_86",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
    "sm_90": "sm_90",
    "sm_100": "sm_90",
    "sm_103": "sm_90",
}
# Those of the kernels for Hopper, by head dimension (d = dv). With twice the queries or the keys
# registers are spilled and products serialized, and there is no power of two in between. What a kernel walks over has
# two buffers each, but v, for the gradient of q, as many as stages: at 256 there is room for one.
HOPPER_ROWS: dict[int, Tiles] = {
    64: Tiles(Tile(128, 128, 4, 2), Tile(128, 128, 4, 2), Tile(128, 128, 4, 2), Tile(128, 128, 4, 2)),
    128: Tiles(Tile(128, 128, 4, 2), Tile(64, 128, 4, 2), Tile(128, 64, 4, 2), Tile(64, 128, 4, 2)),
    256: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 4, 1), Tile(64, 64, 4, 2)),
}

# Queries and keys of a tile of a bias whose gradient is computed, by the kind of products.
BIAS_TILES = {"half": 64, "tf32": 32, "tf32x3": 32, "double": 16}
FEWEST_ROWS = 64  # of a tile that is made smaller for a small grid: what four warps take on sm_90
# For decoding, where the heads of a group are rows: bound by reading k and v, of which much is to be under way.
ONE_QUERY = tuple(map(tile_of, ("16x64w4s2", "16x128w4s2", "16x64w4s3", "16x32w4s3")))
# For few queries whose keys are split, with as many rows as there are, by the kind of products.
FEW_QUERIES = dict(half=ONE_QUERY[0], tf32=Tile(16, 32, 4, 2), tf32x3=Tile(16, 32, 4, 2), double=Tile(16, 16, 4, 2))
PROGRAMS_OF_SPLIT = (
    2  # for each multiprocessor, that keys are split over: what runs at a time, whatever the head dimension
)
PARTS_PER_STEP = 16  # that are merged at a time
BLOCKS_OF_SPLIT = 2  # of keys at least in a part: the next is read while one is multiplied

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
    renew()
    try:
        yield
    finally:
        _override = outer
        renew()


def row_of(spec: AttentionSpec) -> tuple[str, int]:
    """The kind and the width of a call's rows."""
    kind = kind_of(spec)
    widest = max(sum(head_parts(spec.head_dim, kind)), sum(head_parts(spec.value_dim, kind)))
    return kind, min(width for _, of, width in ROWS if of == kind and width >= widest)


def choices_for(spec: AttentionSpec, target: DeviceTarget) -> Choices:
    """What serves a call on a part, first, and what is worth timing."""
    kind, width = row_of(spec)
    family = FAMILIES.get(target.arch or "", OLDEST)
    row = (family if (family, kind, width) in ROWS else OLDEST, kind, width)
    choices = ROWS[row]
    own = (
        (spec.dropout_p > 0, DROPOUT),
        (spec.softcap > 0, SOFTCAP),
        (spec.bias is not None, BIAS),
        (spec.sequences is not None, PACKED),
    )
    for applies, tiles in own:
        if applies:
            others = {kernel: (tile_of(text), *getattr(choices, kernel)) for kernel, text in tiles.get(row, {}).items()}
            choices = choices._replace(**others)
    if spec.dropout_p > 0 or spec.mask == MaskKind.DENSE or not spec.plain_scores:
        choices = choices._replace(backward_fused=choices.backward_fused[::-1])
    return choices._replace(forward=ONE_QUERY) if spec.one_query and kind == "half" else choices


def select_tiles(spec: AttentionSpec, target: DeviceTarget, backward: str = "separate") -> Tiles:
    """The tiles for a call on a part, whose backward is "separate" or "fused"."""
    return _override or _look_up_tiles(spec, target, backward)


def select_tangent_tiles(spec: AttentionSpec, target: DeviceTarget, backward: str = "separate") -> Tiles:
    """The tiles for a call on a part of which tangents are taken: that of their kernel stands in the place of the
    forward's."""
    return _override or _look_up_tangent_tiles(spec, target, backward)


@lru_cache(maxsize=CALLS_KEPT)
def _look_up_tangent_tiles(spec: AttentionSpec, target: DeviceTarget, backward: str) -> Tiles:
    tiles = select_tiles(spec, target, backward)
    if target.interpreted:
        return tiles
    family, row = FAMILIES.get(target.arch or "", OLDEST), row_of(spec)
    tile = tile_of(TANGENT_ROWS.get((family, *row)) or TANGENT_ROWS[(OLDEST, *row)])
    tile = tile._replace(apart=tile.apart and 2 * spec.value_dim > spec.head_dim)
    if spec.bias is not None and (family, *row) in TANGENTS_FULL:
        tile = tile._replace(num_stages=1)
    return tiles._replace(forward=tile)


def select_hopper_tiles(spec: AttentionSpec, target: DeviceTarget, backward: str = "separate") -> Tiles:
    """The tiles for a call of the kernels for Hopper."""
    return _override or _look_up_hopper_tiles(spec.head_dim, backward)


def candidate_tiles(spec: AttentionSpec, target: DeviceTarget, backward: str = "separate") -> list[Tiles]:
    """What is worth timing for a call on a part: what serves untuned first, then the same with another tile for
    one of its kernels. A tile may take more than the part has: whoever times it finds out when it is launched."""
    first = tiles_of("", spec, target, backward)
    if target.interpreted:
        return [first]
    others = choices_for(spec, target)._asdict()
    return [first] + [
        first._replace(**{kernel: tile})
        for kernel, chosen in zip(Tiles._fields, first, strict=True)
        for tile in others[kernel]
        if chosen is not None and tile != chosen
    ]


@lru_cache(maxsize=CALLS_KEPT)
def _look_up_tiles(spec: AttentionSpec, target: DeviceTarget, backward: str) -> Tiles:
    return tiles_of(tuned_tiles("triton", kind_of_call(spec), target, backward), spec, target, backward)


def tiles_of(text: str, spec: AttentionSpec, target: DeviceTarget, backward: str) -> Tiles:
    """The tiles for a call on a part by a text of `as_text` or, where that is empty, by the rules; smaller where they
    would leave multiprocessors without work, if it is known how many there are."""
    tiles = of_text(text) if text else _tiles_by_rule(spec, target, backward)
    return _filling(tiles, spec, target) if target.multiprocessors else tiles


def as_text(tiles: Tiles) -> str:
    """Tiles as JSON."""
    return json.dumps(tiles)


def of_text(text: str) -> Tiles:
    """The tiles of `as_text`. Raises `ValueError` for any other text."""
    try:
        tiles = Tiles(*(tile and Tile(*tile) for tile in json.loads(text)))
        if not all(
            operator.index(number) >= 0 for tile in tiles[:3] + tuple(filter(None, tiles[3:])) for number in tile
        ):
            raise ValueError("a negative number")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"not the tiles of a call: {text[:100]!r} ({error})") from error
    return tiles


def _tiles_by_rule(spec: AttentionSpec, target: DeviceTarget, backward: str) -> Tiles:
    if target.interpreted:
        tiles = INTERPRETED._replace(backward_fused=INTERPRETED_FUSED)
    else:
        tiles = Tiles(*(tiles[0] for tiles in choices_for(spec, target)))
    return tiles if backward == "fused" else tiles._replace(backward_fused=None)


def _filling(tiles: Tiles, spec: AttentionSpec, target: DeviceTarget) -> Tiles:
    of_queries, of_keys = spec.batch * spec.heads, spec.batch * spec.kv_heads
    tiles = _narrowed(tiles, spec, target)
    split = _splitting(tiles.forward, spec, target)
    return tiles._replace(
        forward=split or _halved(tiles.forward, "block_m", of_queries, spec.queries, target),
        backward_kv=_halved(tiles.backward_kv, "block_n", of_keys, spec.keys, target),
        backward_q=_halved(tiles.backward_q, "block_m", of_queries, spec.queries, target),
    )


def _narrowed(tiles: Tiles, spec: AttentionSpec, target: DeviceTarget) -> Tiles:
    """The same for a narrow window."""
    left, right = spec.window
    right = 0 if spec.causal else right
    if left is None or right is None or left + right > NARROW_WINDOW:
        return tiles
    family, (kind, width) = FAMILIES.get(target.arch or "", OLDEST), row_of(spec)
    return tiles._replace(**{name: tile_of(text) for name, text in NARROW.get((family, kind, width), {}).items()})


def _splitting(tile: Tile, spec: AttentionSpec, target: DeviceTarget) -> Tile | None:
    """A tile of few queries whose keys are split over programs; None where there are more, or that many anyway."""
    rows = _rows(spec)
    if spec.sequences is not None or (rows > PACKED_ROWS and spec.queries > 1):
        return None
    if tile.block_m > SMALLEST_PART:
        tile = FEW_QUERIES[kind_of(spec)]
    block_m = min(PACKED_ROWS, max(SMALLEST_PART, 1 << max(rows - 1, 0).bit_length()))
    tile = tile._replace(block_m=block_m, programs=PROGRAMS_OF_SPLIT * target.multiprocessors)
    return tile if key_splits(spec, tile) > 1 else None


def key_splits(spec: AttentionSpec, tile: Tile) -> int:
    """Over how many programs the keys of each tile of a forward are split: as many as there should be, and as have
    something to do."""
    heads = spec.kv_heads if spec.packed else spec.heads
    without = spec.batch * heads * -(-_rows(spec) // tile.block_m)
    keys, (left, right) = spec.keys, spec.window
    if left is not None and (spec.causal or right is not None):
        keys = min(keys, left + spec.queries + (right or 0))
    return max(1, min(tile.programs // max(without, 1), keys // (BLOCKS_OF_SPLIT * tile.block_n)))


def _rows(spec: AttentionSpec) -> int:
    """Queries of a head, or of a group's heads where they are packed."""
    return spec.queries * (spec.group if spec.packed else 1)


def _halved(tile: Tile, side: str, heads: int, length: int, target: DeviceTarget) -> Tile:
    """A tile with half as many rows on this side, and no more warps than they take, if that fills the part better."""
    rows = getattr(tile, side)
    if rows <= FEWEST_ROWS or heads * -(-length // rows) >= target.multiprocessors:
        return tile
    return tile._replace(**{side: rows // 2}, num_warps=4)


@cache
def _look_up_hopper_tiles(head_dim: int, backward: str) -> Tiles:
    tiles = HOPPER_ROWS[head_dim]
    return tiles if backward == "fused" else tiles._replace(backward_fused=None)
