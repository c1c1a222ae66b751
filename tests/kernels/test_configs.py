"""The table of tiles: there is a row for every call on every part, and every row is one that the kernels can take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from flash_attend.backends import BACKENDS, LARGEST_ACCURATE_HEAD_DIM, LARGEST_HEAD_DIM
from flash_attend.kernels.configs import (
    DROPOUT,
    FAMILIES,
    HOPPER_ROWS,
    INTERPRETED,
    INTERPRETED_FUSED,
    ONE_QUERY,
    ROWS,
    Tile,
    Tiles,
    as_text,
    candidate_tiles,
    override,
    row_of,
    select_hopper_tiles,
    select_tangent_tiles,
    select_tiles,
    tiles_of,
)
from flash_attend.kernels.schedule import BLOCKS_PER_STEP
from flash_attend.kernels.statistics import LONGEST_TILE
from flash_attend.spec import LARGEST_LENGTH, AttentionSpec, BiasKind, MaskKind
from flash_attend.target import DeviceTarget

SPEC = AttentionSpec(
    batch=1, heads=1, kv_heads=1, queries=99, keys=99, head_dim=64, value_dim=64, dtype=torch.float16, scale=0.1
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


def part(capability: tuple[int, int] | None, multiprocessors: int = 1, **more) -> DeviceTarget:
    """With a single multiprocessor, to which every grid gives enough to do."""
    return DeviceTarget("cuda", "some GPU", capability, 99 * 1024, multiprocessors, "3.7.1", **more)


def dims(kind: str) -> range:
    return range(1, LARGEST.get(kind, LARGEST_HEAD_DIM) + 1)


def specs(kind: str) -> list[AttentionSpec]:
    """A call of each head dimension with itself, with the smallest, and with the largest."""
    most = dims(kind)[-1]
    pairs = {pair for dim in dims(kind) for pair in ((dim, dim), (dim, 1), (1, dim), (dim, most), (most, dim))}
    return [replace(SPEC, head_dim=d, value_dim=dv, **KINDS[kind]) for d, dv in sorted(pairs)]


MODES = {
    "plain": dict(),
    "key": dict(mask=MaskKind.KEY),
    "dense": dict(mask=MaskKind.DENSE),
    "dropout": dict(dropout_p=0.1),
    "dense+dropout": dict(mask=MaskKind.DENSE, dropout_p=0.1),
}


ONE_OF_EACH_FAMILY = ((8, 0), (8, 6), (9, 0))


def test_parts_are_of_a_family() -> None:
    families = [FAMILIES.get(part(capability).arch, "sm_80") for capability in PARTS]
    assert families == ["sm_80", "sm_86", "sm_86", "sm_90", "sm_90", "sm_86", "sm_80"]
    for capability, family in zip(PARTS, families, strict=True):
        (same,) = (one for one in ONE_OF_EACH_FAMILY if part(one).arch == family)
        assert select_tiles(SPEC, part(capability)) == select_tiles(SPEC, part(same))


@pytest.mark.parametrize("capability", ONE_OF_EACH_FAMILY, ids=lambda pair: f"sm_{pair[0]}{pair[1]}")
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_has_its_tiles_on_every_part(kind: str, capability: tuple[int, int]) -> None:
    target = part(capability)
    family = FAMILIES.get(target.arch, "sm_80")
    for spec in specs(kind):
        row = ROWS.get((family, *row_of(spec))) or ROWS[("sm_80", *row_of(spec))]
        first = Tiles(*(tiles[0] for tiles in row))
        for mode in ("plain", "key"):
            assert select_tiles(replace(spec, **MODES[mode]), target, "fused") == first
            assert select_tiles(replace(spec, **MODES[mode]), target) == first._replace(backward_fused=None)
        dense = select_tiles(replace(spec, **MODES["dense"]), target, "fused")
        assert dense == first._replace(backward_fused=row.backward_fused[-1])
        dropping = select_tiles(replace(spec, **MODES["dropout"]), target, "fused")
        assert dropping == select_tiles(replace(spec, **MODES["dense+dropout"]), target, "fused")
        assert dropping.backward_fused == row.backward_fused[-1]


def test_dropout_has_tiles_of_its_own() -> None:
    assert DROPOUT.keys() <= ROWS.keys()
    for (family, kind, width), kernels in DROPOUT.items():
        spec = replace(SPEC, head_dim=width, value_dim=width, **KINDS[kind])
        target = part(next(pair for pair in PARTS if FAMILIES.get(part(pair).arch, "sm_80") == family))
        usual, dropping = (select_tiles(replace(spec, dropout_p=p), target) for p in (0.0, 0.1))
        assert {name for name in Tiles._fields if getattr(usual, name) != getattr(dropping, name)} == kernels.keys()


def test_a_family_has_no_row_that_no_call_takes() -> None:
    taken = {row_of(spec) for kind in KINDS for spec in specs(kind)}
    assert {(kind, width) for family, kind, width in ROWS if family == "sm_80"} == taken
    assert {(kind, width) for _, kind, width in ROWS} == taken
    assert {family for family, *_ in ROWS} == {"sm_80", *FAMILIES.values()}


def test_a_wider_head_dimension_has_the_row_of_a_wider_width() -> None:
    for kind in KINDS:
        widths = [row_of(replace(SPEC, head_dim=d, value_dim=1, **KINDS[kind]))[1] for d in dims(kind)]
        assert widths == sorted(widths)
        assert all(width >= d for d, width in enumerate(widths, 1))
        assert widths == [row_of(replace(SPEC, head_dim=1, value_dim=d, **KINDS[kind]))[1] for d in dims(kind)]


def every_row() -> Iterator[tuple[tuple, Tiles]]:
    """Every tile of every row, each with the first of the other kernels, and those of dropout."""
    for (family, kind, width), mode in product(ROWS, ("plain", "dropout")):
        spec = replace(SPEC, head_dim=width, value_dim=width, **KINDS[kind], **MODES[mode])
        target = part(next(pair for pair in PARTS if FAMILIES.get(part(pair).arch, "sm_80") == family))
        for number, tiles in enumerate(candidate_tiles(spec, target, "fused")):
            yield (family, kind, width, mode, number), tiles


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
        assert tile.block_m <= LONGEST_TILE.value, "statistics of queries are padded to that"
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


def test_a_small_grid_has_smaller_tiles() -> None:
    """Half as many queries or keys, where there are fewer programs than multiprocessors."""
    call = replace(SPEC, batch=2, heads=8, kv_heads=4, queries=1024, keys=1024)
    usual = select_tiles(call, part((8, 0)))
    assert [usual.forward.block_m, usual.backward_q.block_m, usual.backward_kv.block_n] == [128] * 3
    of_queries, of_keys = 2 * 8 * 8, 2 * 4 * 8
    assert select_tiles(call, part((8, 0), of_keys)) == usual
    fewer = select_tiles(call, part((8, 0), of_queries))
    assert fewer == usual._replace(backward_kv=usual.backward_kv._replace(block_n=64, num_warps=4))
    fewest = select_tiles(call, part((8, 0), of_queries + 1))
    assert [fewest.forward.block_m, fewest.backward_q.block_m, fewest.backward_kv.block_n] == [64] * 3
    assert fewest == select_tiles(call, part((8, 0), 10**6)), "no tile is halved twice"
    assert fewest == tiles_of(as_text(usual), call, part((8, 0), 10**6), "separate"), "those of tuning are as well"
    assert select_tiles(call, part((8, 0), 0)) == usual, "where their number is not known, it is as if they were few"


def test_a_narrow_window_has_smaller_tiles() -> None:
    call, target = replace(SPEC, queries=4096, keys=4096), part((8, 0))
    usual = select_tiles(call, target)
    for window, causal in (((64, None), True), ((40, 24), False)):
        narrow = select_tiles(replace(call, window=window, causal=causal), target)
        assert narrow == usual._replace(forward=Tile(64, 32, 4, 3))
        assert tiles_of(as_text(usual), replace(call, window=window, causal=causal), target, "separate") == narrow
    for window, causal in (((65, None), True), ((40, 25), False), ((9, None), False), ((None, 9), False)):
        assert select_tiles(replace(call, window=window, causal=causal), target) == usual
    assert select_tiles(replace(call, window=(9, 9)), part((8, 0), 0)) == usual, "which has variants of its own"


def test_one_query_has_a_tile_of_its_own() -> None:
    """Decoding, of grouped heads too, which are read as queries of one head."""
    one = replace(SPEC, queries=1, heads=32, kv_heads=4, keys=4096)
    for multiprocessors in (0, 1, 132):
        target = part((9, 0), multiprocessors)
        assert select_tiles(one, target).forward._replace(programs=0) == ONE_QUERY[0]
        for spec in (replace(one, queries=2), replace(one, **KINDS["tf32"])):
            forward = select_tiles(spec, target).forward
            assert forward not in ONE_QUERY
            assert (forward.block_m == 16) == (forward.programs > 0) == (multiprocessors == 132), "unless it is split"


@pytest.mark.parametrize("capability", ONE_OF_EACH_FAMILY, ids=lambda pair: f"sm_{pair[0]}{pair[1]}")
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_with_tangents_has_a_tile_or_is_refused(kind: str, capability: tuple[int, int]) -> None:
    target, triton = part(capability), BACKENDS["triton"]
    for spec in specs(kind):
        if triton.refuse_tangents(spec, target):
            assert kind in ("tf32", "tf32x3", "double")
            assert max(spec.head_dim, spec.value_dim) > 64
            continue
        usual, tiles = select_tiles(spec, target), select_tangent_tiles(spec, target)
        assert tiles[1:] == usual[1:], "those of the backward"
        assert tiles.forward.programs == 0
        assert not tiles.forward.apart or 2 * spec.value_dim > spec.head_dim > 0
        block_queries, block_keys = tiles.schedule_block
        assert block_queries % tiles.forward.block_m == block_keys % tiles.forward.block_n == 0


def test_tangents_split_no_keys_and_leave_a_bias_room() -> None:
    """One query against many keys has the tile of many queries."""
    one = replace(SPEC, queries=1, keys=2**15)
    assert select_tiles(one, part((9, 0), 132)).forward.programs > 0
    assert select_tangent_tiles(one, part((9, 0), 132)).forward == select_tangent_tiles(SPEC, part((9, 0))).forward
    tf32 = replace(SPEC, **KINDS["tf32"])
    biased = replace(tf32, bias=BiasKind(False, True, True, True, torch.float32))
    stages = [select_tangent_tiles(spec, part((9, 0))).forward.num_stages for spec in (tf32, biased)]
    assert stages == [2, 1]


@pytest.mark.parametrize("backward", ["separate", "fused"])
@pytest.mark.parametrize("capability", PARTS, ids=lambda pair: f"sm_{pair[0]}{pair[1]}")
def test_candidates_begin_with_what_serves_and_differ_in_one_kernel(capability: tuple[int, int], backward: str) -> None:
    target = part(capability)
    for spec in (SPEC, replace(SPEC, head_dim=128, value_dim=128), replace(SPEC, head_dim=200, dropout_p=0.1)):
        first, *others = candidate_tiles(spec, target, backward)
        assert first == select_tiles(spec, target, backward)
        assert len({first, *others}) == 1 + len(others)
        assert len(others) <= 9
        for other in others:
            assert sum(one != two for one, two in zip(first, other, strict=True)) == 1
            assert (other.backward_fused is None) == (backward == "separate")


def test_the_interpreter_has_no_candidates() -> None:
    assert candidate_tiles(SPEC, part((9, 0), interpreted=True)) == [INTERPRETED]
