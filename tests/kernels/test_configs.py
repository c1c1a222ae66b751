"""The table of tiles: there is a row for every call on every part, and every row is one that the kernels can take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from flash_attend.backends import LARGEST_ACCURATE_HEAD_DIM, LARGEST_HEAD_DIM
from flash_attend.kernels.configs import (
    FUSED,
    FUSED_VARIANTS,
    HOPPER_ROWS,
    INTERPRETED,
    INTERPRETED_FUSED,
    ROWS,
    VARIANTS,
    Tile,
    Tiles,
    candidate_hopper_tiles,
    candidate_tiles,
    mode_of,
    override,
    row_of,
    select_hopper_tiles,
    select_tiles,
)
from flash_attend.kernels.schedule import BLOCKS_PER_STEP
from flash_attend.spec import LARGEST_LENGTH, AttentionSpec, MaskKind
from flash_attend.target import DeviceTarget

SPEC = AttentionSpec(
    batch=1, heads=1, kv_heads=1, queries=8, keys=8, head_dim=64, value_dim=64, dtype=torch.float16, scale=0.1
)
KINDS = {
    "half": dict(dtype=torch.float16),
    "bfloat16": dict(dtype=torch.bfloat16),
    "tf32": dict(dtype=torch.float32, precision="tf32"),
    "tf32x3": dict(dtype=torch.float32, precision="tf32x3"),
    "double": dict(dtype=torch.float64),
}
# As far as the dispatcher lets a call come, by kind.
LARGEST = {"tf32x3": LARGEST_ACCURATE_HEAD_DIM, "double": LARGEST_ACCURATE_HEAD_DIM}
PARTS = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (99, 0))
SMALL = Tile(16, 16, 4, 1)


def part(capability: tuple[int, int] | None, **more) -> DeviceTarget:
    return DeviceTarget("cuda", "some GPU", capability, 99 * 1024, 100, "3.7.1", **more)


def dims(kind: str) -> range:
    return range(1, LARGEST.get(kind, LARGEST_HEAD_DIM) + 1)


def specs(kind: str) -> list[AttentionSpec]:
    """A call of each head dimension with itself, with the smallest, and with the largest."""
    most = dims(kind)[-1]
    pairs = {pair for dim in dims(kind) for pair in ((dim, dim), (dim, 1), (1, dim), (dim, most), (most, dim))}
    return [replace(SPEC, head_dim=d, value_dim=dv, **KINDS[kind]) for d, dv in sorted(pairs)]


@pytest.mark.parametrize("capability", PARTS, ids=lambda pair: f"sm_{pair[0]}{pair[1]}")
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_has_its_tiles_on_every_part(kind: str, capability: tuple[int, int]) -> None:
    target = part(capability)
    arch = target.arch if target.arch in ("sm_80", "sm_90") else "sm_80"  # whose tiles fit every other part
    for spec in specs(kind):
        row = (arch, *row_of(spec))
        assert select_tiles(spec, target) == ROWS[row]
        assert select_tiles(replace(spec, mask=MaskKind.KEY), target) == ROWS[row]
        dense = replace(spec, mask=MaskKind.DENSE)
        for special in (dense, replace(spec, dropout_p=0.1), replace(dense, dropout_p=0.1)):
            variant = (*row, mode_of(special))
            tiles = VARIANTS.get(variant, ROWS[row])
            assert select_tiles(special, target) == tiles
            fused = tiles._replace(backward_fused=FUSED_VARIANTS.get(variant, FUSED[row]))
            assert select_tiles(special, target, "fused") == fused


def test_modes() -> None:
    dense = replace(SPEC, mask=MaskKind.DENSE)
    calls = (SPEC, replace(SPEC, mask=MaskKind.KEY), dense, replace(SPEC, dropout_p=0.1), replace(dense, dropout_p=0.1))
    assert [mode_of(spec) for spec in calls] == ["", "", "dense", "dropout", "dense+dropout"]


def test_a_part_has_all_of_its_rows_and_no_other() -> None:
    """A row that no call takes is a mistake in its key; a part that has rows of its own has them for every call."""
    taken = {row_of(spec) for kind in KINDS for spec in specs(kind)}
    assert {arch for arch, *_ in ROWS} == {"sm_80", "sm_90"}
    assert FUSED.keys() == ROWS.keys()
    for arch in ("sm_80", "sm_90"):
        assert {(kind, width) for own, kind, width in ROWS if own == arch} == taken


def test_a_variant_stands_beside_a_row_and_differs_from_it() -> None:
    for (arch, kind, width, mode), tiles in VARIANTS.items():
        assert mode in ("dense", "dropout", "dense+dropout")
        assert tiles != ROWS[(arch, kind, width)]
    for (arch, kind, width, mode), tile in FUSED_VARIANTS.items():
        assert mode in ("dense", "dropout", "dense+dropout")
        assert tile != FUSED[(arch, kind, width)]


def test_a_wider_head_dimension_has_the_row_of_a_wider_width() -> None:
    for kind in KINDS:
        widths = [row_of(replace(SPEC, head_dim=d, value_dim=1, **KINDS[kind]))[1] for d in dims(kind)]
        assert widths == sorted(widths)
        assert all(width >= d for d, width in enumerate(widths, 1))
        assert widths == [row_of(replace(SPEC, head_dim=1, value_dim=d, **KINDS[kind]))[1] for d in dims(kind)]


def every_row() -> Iterator[tuple[tuple, Tiles]]:
    """Every row and variant, with every tile of the fused backward that may stand beside it."""
    for row, mode in product(ROWS, ("", "dense", "dropout", "dense+dropout")):
        variant = (*row, mode)
        tiles, fused = VARIANTS.get(variant, ROWS[row]), FUSED_VARIANTS.get(variant, FUSED[row])
        yield variant, tiles._replace(backward_fused=fused)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize(
    "row",
    [
        *every_row(),
        *((("hopper", dim), tiles) for dim, tiles in HOPPER_ROWS.items()),
        (("interpreted",), INTERPRETED._replace(backward_fused=INTERPRETED_FUSED)),
    ],
    ids=lambda row: "-".join(map(str, row[0])),
)
def test_a_row_is_one_that_the_kernels_can_take(row: tuple[object, Tiles]) -> None:
    _, tiles = row
    block_queries, block_keys = tiles.schedule_block
    for tile in filter(None, tiles):
        assert is_power_of_two(tile.block_m)
        assert is_power_of_two(tile.block_n)
        assert min(tile.block_m, tile.block_n) >= 16, "the smallest side of a tensor-core product, and of dropout's"
        assert tile.num_warps in (4, 8)
        assert tile.num_stages >= 1
        assert block_queries % tile.block_m == 0
        assert block_keys % tile.block_n == 0
    assert block_keys % 32 == 0, "a word of a dense mask"
    assert LARGEST_LENGTH + (BLOCKS_PER_STEP + 1) * max(block_queries, block_keys) < 2**31, "positions have 32 bits"


def test_the_interpreter_has_tiles_of_its_own() -> None:
    fused = INTERPRETED._replace(backward_fused=INTERPRETED_FUSED)
    for target in (part((9, 0), interpreted=True), DeviceTarget("cpu", interpreted=True)):
        assert select_tiles(SPEC, target) == INTERPRETED
        assert select_tiles(SPEC, target, "fused") == fused
    assert len({tile[:2] for tile in fused}) == 4, "or a test cannot tell one kernel's tiles from another's"


@pytest.mark.parametrize("dim", HOPPER_ROWS)
def test_the_kernels_for_hopper_have_rows_by_head_dimension(dim: int) -> None:
    spec, target = replace(SPEC, head_dim=dim, value_dim=dim), part((9, 0))
    assert select_hopper_tiles(spec, target, "fused") == HOPPER_ROWS[dim]
    assert select_hopper_tiles(spec, target) == HOPPER_ROWS[dim]._replace(backward_fused=None)


def test_override_holds_within_and_not_beyond() -> None:
    one, two = Tiles(SMALL, SMALL, SMALL), Tiles(SMALL, SMALL, Tile(32, 16, 4, 1))
    target = part((9, 0))
    usual = select_tiles(SPEC, target)
    with override(one):
        assert select_tiles(SPEC, target) is one
        assert select_tiles(SPEC, replace(target, interpreted=True)) is one
        assert select_hopper_tiles(SPEC, target) is one
        with pytest.raises(RuntimeError, match="inside"), override(two):
            assert select_tiles(SPEC, target) is two
            raise RuntimeError("inside")
        assert select_tiles(SPEC, target) is one
    assert select_tiles(SPEC, target) is usual


@pytest.mark.parametrize("backward", ["separate", "fused"])
@pytest.mark.parametrize("capability", PARTS, ids=lambda pair: f"sm_{pair[0]}{pair[1]}")
def test_candidates_begin_with_what_serves_and_differ_in_one_kernel(capability: tuple[int, int], backward: str) -> None:
    target = part(capability)
    for spec in (SPEC, replace(SPEC, head_dim=128, value_dim=128), replace(SPEC, head_dim=200)):
        for select, candidates in (
            (select_tiles, candidate_tiles),
            *([(select_hopper_tiles, candidate_hopper_tiles)] if spec.head_dim <= 128 else []),
        ):
            first, *others = candidates(spec, target, backward)
            assert first == select(spec, target, backward)
            assert len({first, *others}) == 1 + len(others)
            for other in others:
                assert sum(one != two for one, two in zip(first, other, strict=True)) == 1
                assert (other.backward_fused is None) == (backward == "separate")


def test_the_interpreter_has_no_candidates() -> None:
    assert candidate_tiles(SPEC, part((9, 0), interpreted=True)) == [INTERPRETED]
