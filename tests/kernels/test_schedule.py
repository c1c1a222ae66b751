"""The schedule that the kernels build of a mask, against the one worked out the slow way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from flash_attend.checks import normalise_inputs
from flash_attend.kernels.configs import Tile, Tiles
from flash_attend.kernels.schedule import BLOCKS_PER_STEP, Schedule, build_schedule, transposed_lists
from flash_attend.spec import MaskKind
from flash_attend.testing.oracle import visible_pairs
from plain_schedule import EMPTY, FULL, PARTIAL, UNUSED, block_states, lines_of

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
on_every_device = pytest.mark.parametrize("device", DEVICES)


def blocks_of(block_queries: int, block_keys: int) -> Tiles:
    """Tiles whose schedule has blocks of this size."""
    tile = Tile(block_queries, block_keys, 4, 1)
    return Tiles(tile, tile, tile)


def schedule_of(mask: Tensor, shape: Sequence[int], tiles: Tiles, device: str, causal: bool = False):
    """What is built of a mask for a call of `shape` (b, h, i, j); and the pairs that it says are visible."""
    b, h, i, j = shape
    q, k = torch.empty(b, h, i, 16, device=device), torch.empty(b, h, j, 16, device=device)
    mask = mask.to(device)
    (_, _, _, view, *_), spec = normalise_inputs(q, k, k, mask=mask, causal=causal)
    return build_schedule(view, spec, tiles), spec


def assert_lines(lists: Tensor, states: Tensor) -> None:
    """Fails unless `lists (..., 4 n + 5)` are the lines of `states (..., n)`, wherever an entry means something."""
    wanted = lines_of(states)
    assert lists.shape == wanted.shape
    assert lists.dtype == torch.int32
    used = wanted != UNUSED
    got = torch.where(used, lists.cpu(), UNUSED)
    wrong = (got != wanted).any(dim=-1)
    assert not wrong.any(), (
        f"states {states[wrong][0].tolist()}: {got[wrong][0].tolist()}, not {wanted[wrong][0].tolist()}"
    )


def assert_key_schedule(schedule: Schedule, mask: Tensor, block: int) -> None:
    """Fails unless the schedule is that of a key mask `(rows, j)`."""
    rows, keys = mask.shape
    padded = torch.zeros(rows, -(-keys // block) * block, dtype=torch.int32)
    padded[:, :keys] = mask
    assert schedule.states is None
    assert torch.equal(schedule.visible.cpu(), padded)
    assert_lines(schedule.lists, block_states(mask[:, None], 1, block)[:, 0])


def assert_dense_schedule(schedule: Schedule, pairs: Tensor, block_queries: int, block_keys: int) -> None:
    """Fails unless the schedule is that of the visible pairs `(rows, i, j)`, causality counted."""
    queries, keys = pairs.shape[1:]
    states = block_states(pairs, block_queries, block_keys)
    assert torch.equal(schedule.states.cpu(), states.int())
    bits = schedule.visible.cpu()[..., None] >> torch.arange(32, dtype=torch.int32) & 1
    bits = bits.flatten(2)
    assert bits.shape[1:] == (states.shape[1] * block_queries, states.shape[2] * block_keys)
    assert torch.equal(bits[:, :queries, :keys], pairs.int())
    assert bits[:, queries:].sum() == bits[:, :, keys:].sum() == 0
    assert_lines(schedule.lists, states)
    assert_lines(transposed_lists(schedule), states.mT)


def block_of_keys(state: int, size: int, kind: int) -> Tensor:
    """`size` keys in a state; a partial block shows its first key, its last one, or every other."""
    keys = torch.zeros(size, dtype=torch.bool)
    if state == FULL:
        keys[:] = True
    elif state == PARTIAL:
        keys[(slice(0, 1), slice(size - 1, size), slice(None, None, 2))[kind % 3]] = True
    return keys


def key_masks(patterns: Sequence[Sequence[int]], size: int) -> Tensor:
    """A key mask `(patterns, blocks * size)` with the blocks of each pattern in the states it names."""
    return torch.stack(
        [
            torch.cat([block_of_keys(state, size, row + column) for column, state in enumerate(pattern)])
            for row, pattern in enumerate(patterns)
        ]
    )


def all_patterns(n_blocks: int) -> list[tuple[int, ...]]:
    return list(product((EMPTY, PARTIAL, FULL), repeat=n_blocks))


def around_a_step(filler: int) -> list[list[int]]:
    """Three steps of blocks, with every combination of states in the four blocks around the seam of the first two."""
    before, after = [filler] * (BLOCKS_PER_STEP - 2), [filler] * (2 * BLOCKS_PER_STEP - 2)
    return [[*before, *pattern, *after] for pattern in all_patterns(4)]


@on_every_device
@pytest.mark.parametrize(("n_blocks", "cut"), [*product((1, 2, 3), (0, 1, 31)), (4, 0), (4, 5)])
def test_every_pattern_of_key_blocks(device: str, n_blocks: int, cut: int) -> None:
    mask = key_masks(all_patterns(n_blocks), 32)[:, : n_blocks * 32 - cut]
    schedule, spec = schedule_of(mask, (len(mask), 1, 40, mask.shape[1]), blocks_of(16, 32), device)
    assert spec.mask == MaskKind.KEY
    assert_key_schedule(schedule, mask, 32)


@on_every_device
def test_key_blocks_around_the_seam_of_two_steps(device: str) -> None:
    mask = key_masks(around_a_step(FULL), 32)[:, :-3]
    schedule, _ = schedule_of(mask, (len(mask), 1, 40, mask.shape[1]), blocks_of(16, 32), device)
    assert_key_schedule(schedule, mask, 32)


@on_every_device
def test_every_pattern_of_tile_states(device: str) -> None:
    """Every pattern of five tiles: as lines of one step, and as the columns that the transposed lists read."""
    states = torch.tensor(all_patterns(5), dtype=torch.int32)
    transposed = transposed_lists(Schedule(None, None, states.mT.contiguous()[None].to(device)))
    assert_lines(transposed[0], states)


@on_every_device
@pytest.mark.parametrize("filler", (EMPTY, FULL), ids=("empty", "full"))
def test_tile_states_around_the_seam_of_two_steps(device: str, filler: int) -> None:
    states = torch.tensor(around_a_step(filler), dtype=torch.int32)
    transposed = transposed_lists(Schedule(None, None, states.mT.contiguous()[None].to(device)))
    assert_lines(transposed[0], states)


def strided(rows: int, columns: int) -> Tensor:
    """A random mask with no two neighbours next to each other in memory, between others that say the opposite."""
    mask = torch.rand(rows, columns) < 0.9
    buffer = torch.empty(columns + 1, 2 * rows + 1, dtype=torch.bool)
    view = buffer[1:, 1::2].T
    buffer[:] = True
    buffer[0] = False
    buffer[1:, 0::2] = False
    view.copy_(mask)
    return view


def runs_of_keys(*shape: int) -> Tensor:
    """Random masks whose stretches are long enough to fill blocks."""
    flips = torch.rand(shape) < 1 / 40
    return (flips.cumsum(dim=-1) + torch.randint(2, (*shape[:-1], 1))) % 2 == 0


KEY_MASKS = {
    "runs": ((4, 2, 5, 1000), lambda: runs_of_keys(4, 1000)),
    "scattered": ((3, 1, 5, 301), lambda: torch.rand(3, 301) < 0.5),
    "per_head": ((2, 3, 5, 300), lambda: runs_of_keys(2, 3, 1, 300)),
    "heads_alone": ((2, 3, 5, 300), lambda: runs_of_keys(1, 3, 1, 300)),
    "heads_expanded": ((2, 3, 5, 300), lambda: runs_of_keys(2, 1, 1, 300).expand(2, 3, 5, 300)),
    "batch_expanded": ((2, 3, 5, 300), lambda: runs_of_keys(1, 3, 1, 300).expand(2, 3, 5, 300)),
    "keys_expanded": ((3, 1, 5, 300), lambda: torch.tensor([True, False, True]).view(3, 1, 1, 1)),
    "heads_inside": ((2, 3, 5, 300), lambda: runs_of_keys(300, 3, 2).permute(2, 1, 0)[:, :, None]),
    "strided": ((3, 1, 5, 300), lambda: strided(3, 300)),
    "one_key": ((2, 1, 5, 1), lambda: torch.tensor([[True], [False]])),
    "no_keys": ((2, 1, 5, 0), lambda: torch.ones(2, 0, dtype=torch.bool)),
    "no_queries": ((2, 1, 0, 70), lambda: runs_of_keys(2, 70)),
}


@on_every_device
@pytest.mark.parametrize("block", (32, 64))
@pytest.mark.parametrize("name", KEY_MASKS)
def test_key_masks_through_their_strides(device: str, name: str, block: int) -> None:
    torch.manual_seed(0)
    shape, make = KEY_MASKS[name]
    mask = make()
    schedule, spec = schedule_of(mask, shape, blocks_of(16, block), device, causal=True)
    assert spec.mask == MaskKind.KEY
    four = mask[:, None, None] if mask.ndim == 2 else mask
    rows = four[: 1 if four.stride(0) == 0 else None, : 1 if four.stride(1) == 0 else None, :1].expand(
        -1, -1, -1, shape[3]
    )
    assert schedule.visible.shape[0] == rows.shape[0] * rows.shape[1]
    assert_key_schedule(schedule, rows.flatten(0, 2), block)


def dense_patterns(n_query_blocks: int, n_key_blocks: int, block_queries: int, block_keys: int) -> Tensor:
    """A mask `(patterns, 1, i, j)` for each way to give blocks their states."""
    masks = []
    for number, pattern in enumerate(all_patterns(n_query_blocks * n_key_blocks)):
        blocks = [
            block_of_keys(state, block_queries * block_keys, number + at).view(block_queries, block_keys)
            for at, state in enumerate(pattern)
        ]
        rows = [torch.cat(blocks[at : at + n_key_blocks], dim=1) for at in range(0, len(blocks), n_key_blocks)]
        masks.append(torch.cat(rows, dim=0))
    return torch.stack(masks)[:, None]


@on_every_device
def test_every_pattern_of_dense_tiles(device: str) -> None:
    mask = dense_patterns(2, 2, 16, 32)
    schedule, spec = schedule_of(mask, (len(mask), 1, 32, 64), blocks_of(16, 32), device)
    assert spec.mask == MaskKind.DENSE
    assert_dense_schedule(schedule, mask[:, 0], 16, 32)


def staircase(queries: int, keys: int) -> Tensor:
    return (torch.arange(queries).view(-1, 1) // 24 >= torch.arange(keys) // 20)[None, None]


DENSE_MASKS = {
    "random": ((2, 1, 37, 70), lambda: torch.rand(2, 1, 37, 70) < 0.6),
    "staircase": ((1, 1, 100, 90), lambda: staircase(100, 90)),
    "all": ((1, 1, 64, 96), lambda: torch.ones(1, 1, 64, 96, dtype=torch.bool)),
    "nothing": ((1, 1, 40, 40), lambda: torch.zeros(1, 1, 40, 40, dtype=torch.bool)),
    "more_queries_than_keys": ((1, 1, 80, 40), lambda: staircase(80, 40)),
    "more_keys_than_queries": ((1, 1, 40, 100), lambda: torch.rand(1, 1, 40, 100) < 0.97),
    "per_head": ((2, 2, 37, 40), lambda: torch.rand(2, 2, 37, 40) < 0.6),
    "heads_expanded": ((2, 3, 37, 40), lambda: (torch.rand(2, 1, 37, 40) < 0.6).expand(2, 3, 37, 40)),
    "queries_alone": ((2, 2, 37, 40), lambda: torch.rand(2, 1, 37, 1) < 0.6),
    "transposed": ((1, 1, 37, 40), lambda: (torch.rand(1, 1, 40, 37) < 0.6).mT),
    "strided": ((1, 1, 37, 40), lambda: strided(37, 40)[None, None]),
    "many_blocks": ((1, 1, 20, 700), lambda: runs_of_keys(1, 1, 20, 700)),
    "no_queries": ((1, 1, 0, 40), lambda: torch.ones(1, 1, 0, 40, dtype=torch.bool)),
    "no_keys": ((1, 1, 40, 0), lambda: torch.ones(1, 1, 40, 0, dtype=torch.bool)),
}


@on_every_device
@pytest.mark.parametrize("causal", (False, True), ids=("", "causal"))
@pytest.mark.parametrize("name", DENSE_MASKS)
def test_dense_masks_through_their_strides(device: str, name: str, causal: bool) -> None:
    torch.manual_seed(0)
    (b, h, i, j), make = DENSE_MASKS[name]
    mask = make()
    schedule, spec = schedule_of(mask, (b, h, i, j), blocks_of(32, 32), device, causal)
    assert spec.mask == MaskKind.DENSE
    view = mask[:, : 1 if mask.stride(1) == 0 else None].expand(-1, -1, -1, j)
    pairs = visible_pairs(*view.shape[:2], i, j, view, causal, view.device)
    assert_dense_schedule(schedule, pairs.flatten(0, 1), 32, 32)


def test_blocks_hold_whole_tiles_of_all_three_kernels() -> None:
    tiles = Tiles(Tile(64, 16, 4, 1), Tile(16, 128, 4, 1), Tile(32, 64, 4, 1))
    assert tiles.schedule_block == (64, 128)
    small = Tile(16, 16, 4, 1)
    assert Tiles(small, small, small).schedule_block == (16, 32), "a word of a dense mask holds 32 keys"
