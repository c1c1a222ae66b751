"""Which tiles the kernels visit, over every small shape: all that hold a visible pair, none twice, and full ones full.

In a kernel each program sets out one walk. Here it sets out thousands at once, with arrays in the place of its numbers,
which is fair because every step of it is elementwise. `test_the_loops_of_the_kernels` takes some of them one by one, in
loops like those of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from einops import repeat
from torch import Tensor

from flash_attend.kernels.mask import Mask, masks_of_call
from flash_attend.kernels.programs import tile_of_program
from flash_attend.kernels.schedule import Planes
from flash_attend.spec import MaskKind
from plain_schedule import EMPTY, FULL, PARTIAL, block_counts, block_states, lines_of

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
on_every_device = pytest.mark.parametrize("device", DEVICES)
TILES = ((16, 16), (32, 16), (16, 32), (32, 32))
BLOCK = 32  # of the schedules
MOST = 16  # blocks of a line

# ---------------------------------------------------------------------------------------------------------------------
# Tracing
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _walk(
    LINES,
    NUMBERS,
    at,
    BY_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCHEDULE: tl.constexpr,
    KIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The walk number `at`, as the kernels set it out. NUMBERS (walks, 10) are what `take_walks` says."""
    numbers = NUMBERS + 10 * at
    first = tl.load(numbers).to(tl.int32)
    queries = tl.load(numbers + 1).to(tl.int32)
    keys = tl.load(numbers + 2).to(tl.int32)
    lists = LINES + tl.load(numbers + 3)
    zero = tl.zeros_like(first)
    planes = Planes(
        None, lists, zero, zero, tl.cdiv(queries, SCHEDULE), tl.cdiv(keys, SCHEDULE), BLOCK_M=SCHEDULE, BLOCK_N=SCHEDULE
    )
    left = tl.load(numbers + 6).to(tl.int32) if LEFT else None
    right = tl.load(numbers + 7).to(tl.int32) if RIGHT else None
    mask = Mask(planes, zero, None, None, queries, keys, left, right, KIND, CAUSAL or RIGHT, HIDES_KEYS=True)
    if BY_KEYS:
        part = tl.load(numbers + 8).to(tl.int32)
        parts = tl.load(numbers + 9).to(tl.int32) if SPLIT else None
        return mask.walk_over_keys(first, BLOCK_M, BLOCK_N, part, parts)
    else:
        any_key = tl.load(numbers + 4) != 0
        hides_keys = tl.load(numbers + 5) != 0
        return mask.walk_over_queries(first, any_key, hides_keys, BLOCK_M, BLOCK_N)


@triton.jit
def trace_kernel(
    STARTS,
    ENDS,
    MASKED,
    COUNTS,
    LINES,
    NUMBERS,
    BY_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCHEDULE: tl.constexpr,
    KIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
    MOST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """`SIZE` walks at once: their counts of runs and of masked blocks, and the first `MOST` of each."""
    at = (tl.program_id(0) * SIZE + tl.arange(0, SIZE))[:, None]
    walk = _walk(LINES, NUMBERS, at, BY_KEYS, BLOCK_M, BLOCK_N, SCHEDULE, KIND, CAUSAL, LEFT, RIGHT, SPLIT)
    index = tl.arange(0, MOST)[None, :]
    zero = tl.zeros([SIZE, MOST], tl.int32)
    start, end = walk.run_bounds(index)
    place = at * MOST + index
    tl.store(STARTS + place, zero + start)
    tl.store(ENDS + place, zero + end)
    tl.store(MASKED + place, zero + walk.masked_block(index))
    tl.store(COUNTS + at * 2, tl.zeros([SIZE, 1], tl.int32) + walk.run_count())
    tl.store(COUNTS + at * 2 + 1, tl.zeros([SIZE, 1], tl.int32) + walk.masked_count())


@triton.jit
def loop_kernel(
    FULLS,
    MASKED,
    LINES,
    NUMBERS,
    BY_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCHEDULE: tl.constexpr,
    KIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
    MOST: tl.constexpr,
):
    """One walk, in the loops of the kernels: counts how often it comes to each block, as full and as masked."""
    at = tl.program_id(0)
    walk = _walk(LINES, NUMBERS, at, BY_KEYS, BLOCK_M, BLOCK_N, SCHEDULE, KIND, CAUSAL, LEFT, RIGHT, SPLIT)
    for run in tl.range(0, walk.run_count(), num_stages=1):
        start, end = walk.run_bounds(run)
        for block in tl.range(start, end):
            place = FULLS + at * MOST + block
            tl.store(place, tl.load(place) + 1)
    for index in tl.range(0, walk.masked_count(), num_stages=1):
        place = MASKED + at * MOST + walk.masked_block(index)
        tl.store(place, tl.load(place) + 1)


@dataclass(frozen=True)
class Shapes:
    """Calls of one head, small enough to write every pair down."""

    kind: MaskKind
    causal: bool
    queries: Tensor  # (n,)
    keys: Tensor  # (n,)
    left: Tensor | None  # (n,) of windows
    right: Tensor | None  # (n,)
    exists: Tensor  # (n, i, j) pairs within the shape's bounds; i and j are whole blocks of the longest shape
    sight: Tensor  # (n, i, j) and not hidden by causality or the window
    pairs: Tensor  # (n, i, j) and not hidden by the mask: who sees whom
    shown: Tensor  # (n, j) keys that exist and that a key mask shows

    @staticmethod
    def of(
        kind: MaskKind,
        causal: bool,
        queries: Tensor,
        keys: Tensor,
        mask: Tensor | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
    ) -> Shapes:
        """`mask (n, 1|i, j)` is cut to each shape's bounds."""
        query = torch.arange(max(BLOCK, -(-int(queries.max()) // BLOCK) * BLOCK))[:, None]
        key = torch.arange(max(BLOCK, -(-int(keys.max()) // BLOCK) * BLOCK))
        exists = (query < queries[:, None, None]) & (key < keys[:, None, None])
        ahead = key - query - (keys - queries)[:, None, None]
        sight = exists & (ahead <= 0) if causal else exists
        sight = sight if left is None else sight & (ahead >= -left[:, None, None])
        sight = sight if right is None else sight & (ahead <= right[:, None, None])
        pairs = sight if mask is None else sight & mask
        shown = key < keys[:, None]
        if kind == MaskKind.KEY:
            shown = shown & mask[:, 0]
        return Shapes(kind, causal, queries, keys, left, right, exists, sight, pairs, shown)


@dataclass(frozen=True)
class Walks:
    """One walk for each tile of each shape: through key blocks for each query tile, or the other way round."""

    shape: Tensor  # (w,) which shape
    tile: Tensor  # (w,) which of its tiles
    fulls: Tensor  # (w, MOST) how often each block is visited as full
    masked: Tensor  # (w, MOST) and as masked


def lists_of(shapes: Shapes, by_keys: bool) -> tuple[Tensor, Tensor]:
    """The lines that the walks read, one shape's after another's, and where each shape's begin."""
    if shapes.kind == MaskKind.NONE or (shapes.kind == MaskKind.KEY and not by_keys):
        return torch.zeros(1, dtype=torch.int32), torch.zeros(len(shapes.queries), dtype=torch.int64)
    dense = shapes.kind == MaskKind.DENSE
    states = block_states(shapes.pairs, BLOCK, BLOCK) if dense else block_states(shapes.shown[:, None], 1, BLOCK)
    query_blocks, key_blocks = (-(-lengths // BLOCK) for lengths in (shapes.queries, shapes.keys))
    lines = []
    for state, n_query_blocks, n_key_blocks in zip(states, query_blocks.tolist(), key_blocks.tolist(), strict=True):
        state = state[: n_query_blocks if dense else 1, :n_key_blocks]
        lines.append(lines_of(state if by_keys else state.mT).flatten())
    ends = torch.tensor([0, *map(len, lines)]).cumsum(0)
    margin = lines[0].new_zeros(4 * MOST)  # a trace reads `MOST` runs of every line, whether they are there or not
    return torch.cat([*lines, margin]), ends[:-1]


def take_walks(
    shapes: Shapes,
    block_m: int,
    block_n: int,
    by_keys: bool,
    device: str,
    *,
    hide_keys: bool = False,
    only_every: int | None = None,
    parts: int = 1,
) -> Walks:
    """All the walks of the shapes at once; or, `only_every` so many of them, one by one in loops. Each is taken in so
    many `parts`, one after another."""
    lines, offsets = lists_of(shapes, by_keys)
    size = block_m if by_keys else block_n
    tiles = -(-(shapes.queries if by_keys else shapes.keys) // size)
    shape = torch.repeat_interleave(tiles)[::only_every]
    tile = torch.cat([torch.arange(n) for n in tiles.tolist()])[::only_every]
    shown = torch.ones_like(tile) if by_keys else block_counts(shapes.shown[:, None], 1, size)[shape, 0, tile]
    hides = (shown < size) & hide_keys
    part = torch.arange(parts).repeat(len(tile))
    shape, tile, shown, hides = (x.repeat_interleave(parts) for x in (shape, tile, shown, hides))

    at_once = 1 if only_every else 4096 if device == "cpu" else 256
    programs = -(-len(shape) // at_once)
    edges = [torch.zeros_like(tile) if edge is None else edge[shape] for edge in (shapes.left, shapes.right)]
    of_shape = shapes.queries[shape], shapes.keys[shape], offsets[shape]
    numbers = torch.stack((tile * size, *of_shape, shown > 0, hides, *edges, part, torch.full_like(part, parts)), 1)
    last = numbers[-1:].expand(programs * at_once - len(shape), -1)  # again, in the last program
    read = lines.to(device), torch.cat((numbers, last)).to(device)
    choices = dict(
        BY_KEYS=by_keys,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SCHEDULE=BLOCK,
        KIND=int(shapes.kind),
        CAUSAL=shapes.causal and shapes.kind != MaskKind.DENSE,
        LEFT=shapes.left is not None,
        RIGHT=shapes.right is not None,
        SPLIT=parts > 1,
        MOST=MOST,
    )
    new = dict(dtype=torch.int32, device=device)
    if only_every is not None:
        fulls, masked = torch.zeros(programs, MOST, **new), torch.zeros(programs, MOST, **new)
        loop_kernel[(programs,)](fulls, masked, *read, **choices)
        return Walks(shape, tile, fulls.cpu(), masked.cpu())

    starts, ends, blocks = (torch.empty(programs * at_once, MOST, **new) for _ in range(3))
    counts = torch.empty(programs * at_once, 2, **new)
    trace_kernel[(programs,)](starts, ends, blocks, counts, *read, **choices, SIZE=at_once)
    starts, ends, blocks, counts = (x.cpu()[: len(shape)] for x in (starts, ends, blocks, counts))
    assert counts.min() >= 0
    assert counts.max() <= MOST
    index = torch.arange(MOST)
    number = index[:, None]
    runs = (number < counts[:, :1, None]) & (starts[..., None] <= index) & (index < ends[..., None])
    listed = (number < counts[:, 1:, None]) & (blocks[..., None] == index)
    walks = Walks(shape, tile, runs.sum(dim=1), listed.sum(dim=1))
    assert torch.equal(walks.masked.sum(dim=1), counts[:, 1].long()), "a masked block lies outside of the line"
    return walks


# ---------------------------------------------------------------------------------------------------------------------
# Judgement
# ---------------------------------------------------------------------------------------------------------------------


def check_walks(
    shapes: Shapes, walks: Walks, block_m: int, block_n: int, by_keys: bool, hide_keys: bool = False
) -> None:
    """Fails unless all visible pairs are visited, once, tiles visited as full are full, and no other work is done."""

    def across(blocks: Tensor) -> Tensor:
        """(n, query blocks, key blocks) -> the blocks across each walk's tile: (w, MOST), False where there is none."""
        blocks = (blocks if by_keys else blocks.mT)[walks.shape, walks.tile]
        return torch.nn.functional.pad(blocks, (0, MOST - blocks.shape[1]))

    def of_tiles(blocks: Tensor) -> Tensor:
        """Blocks of the schedule -> tiles."""
        return repeat(blocks, "n x y -> n (x m) (y k)", m=BLOCK // block_m, k=BLOCK // block_n)

    def says(message: str, wrong: Tensor) -> str:
        walk, block = wrong.nonzero()[0].tolist() if wrong.any() else (0, 0)
        shape = walks.shape[walk]
        window = [None if edge is None else int(edge[shape]) for edge in (shapes.left, shapes.right)]
        return (
            f"{message}: {shapes.queries[shape]} queries, {shapes.keys[shape]} keys, {window=}, "
            f"tile {walks.tile[walk]}, block {block}, keys {shapes.shown[shape].int().tolist()}"
        )

    in_tile = block_counts(shapes.pairs, block_m, block_n)
    if shapes.kind == MaskKind.DENSE:
        wanted = torch.full_like(in_tile, block_m * block_n)
    elif by_keys:  # every key is there and is seen by all the queries that are
        wanted = block_counts(shapes.exists.any(dim=2, keepdim=True), block_m, 1) * block_n
    else:  # every query is there and sees all the keys that are
        wanted = block_counts(shapes.shown[:, None], 1, block_n) * block_m
    seen, full = across(in_tile > 0), across((in_tile == wanted) & (in_tile > 0))
    visited = walks.fulls + walks.masked
    assert not (visited > 1).any(), says("visited twice", visited > 1)
    assert not (seen & (visited == 0)).any(), says("a visible pair is not visited", seen & (visited == 0))
    assert not (~full & (walks.fulls > 0)).any(), says("visited as full, but is not", ~full & (walks.fulls > 0))

    # And exactly which, so that no tile is visited or masked without need.
    sight = block_counts(shapes.sight, block_m, block_n)
    if shapes.kind == MaskKind.NONE:
        as_full, as_masked = full, seen & ~full
    elif shapes.kind == MaskKind.DENSE:
        states = across(of_tiles(block_states(shapes.pairs, BLOCK, BLOCK)))
        as_full, as_masked = states == FULL, states == PARTIAL
    elif by_keys:
        # A block of the schedule that all queries of the tile see whole is visited by its state. In the others, at the
        # diagonal and at the end, every tile in sight is, from the mask's first block with a key on to its last.
        in_block = block_counts(shapes.sight, block_m, BLOCK)
        clear = in_block == block_counts(shapes.exists.any(dim=2, keepdim=True), block_m, 1) * BLOCK
        clear = across(repeat(clear & (in_block > 0), "n x y -> n x (y k)", k=BLOCK // block_n))
        states = block_states(shapes.shown[:, None], 1, BLOCK)
        states = across(repeat(states, "n 1 y -> n x (y k)", x=in_tile.shape[1], k=BLOCK // block_n))
        index = torch.arange(MOST)
        first = torch.where(states != EMPTY, index, MOST).amin(dim=1, keepdim=True)
        last = torch.where(states != EMPTY, index, -1).amax(dim=1, keepdim=True)
        as_full = clear & (states == FULL)
        as_masked = torch.where(clear, states == PARTIAL, (across(sight) > 0) & (first <= index) & (index <= last))
    else:
        # Keys are hidden as they are loaded, not pair by pair: a tile with any of them is visited as if it had all.
        shown = across(block_counts(shapes.shown[:, None], 1, block_n).expand_as(sight))
        there = block_counts(shapes.exists.any(dim=1, keepdim=True), 1, block_n) * block_m
        as_full = (shown >= (block_n if hide_keys else 1)) & across((sight == there) & (sight > 0))
        as_masked = (shown > 0) & across(sight > 0) & ~as_full
    assert torch.equal(walks.fulls > 0, as_full), says("visited as full or not", (walks.fulls > 0) != as_full)
    assert torch.equal(walks.masked > 0, as_masked), says(
        "visited with masking or not", (walks.masked > 0) != as_masked
    )


def partial_keys(kind: int) -> Tensor:
    """A block with some of its keys: its halves, every other key, and the last one alone."""
    key = torch.arange(BLOCK)
    return (key < BLOCK // 2, key >= BLOCK // 2, key % 2 == 0, key == BLOCK - 1)[kind % 4]


def combinations(*choices: tuple[int, ...] | range) -> tuple[Tensor, ...]:
    return torch.tensor(list(product(*choices))).unbind(dim=1)


def unmasked_shapes(causal: bool) -> Shapes:
    """Lengths around the ends of tiles."""
    lengths = (0, 1, 2, 7, 15, 16, 17, 18, 31, 32, 33, 34, 40, 47, 48, 49, 50)
    return Shapes.of(MaskKind.NONE, causal, *combinations(lengths, lengths))


def key_masked_shapes(causal: bool) -> Shapes:
    """Every pattern of three blocks of keys, cut to lengths around the ends of tiles."""
    queries, keys, *states = combinations((1, 16, 17, 33, 70), (1, 31, 33, 64, 65, 96), *[(EMPTY, PARTIAL, FULL)] * 3)
    mask = torch.stack(states, dim=1)[:, :, None] == FULL
    number = torch.arange(len(queries))
    partials = torch.stack([partial_keys(kind) for kind in range(4)])
    parts = torch.stack([partials[(number // 3 + block) % 4] for block in range(3)], dim=1)
    mask = mask | (parts & (torch.stack(states, dim=1)[:, :, None] == PARTIAL))
    return Shapes.of(MaskKind.KEY, causal, queries, keys, mask.flatten(1)[:, None])


def windowed_shapes(mask: MaskKind, edges: str) -> Shapes:
    """Windows narrower and wider than tiles, and than the sequence, with a left edge or a right one, with both or
    under causality; with every pattern of two blocks of keys."""
    sizes = (0, 15, 40, 90) if mask == MaskKind.NONE else (0, 23, 90)
    queries, keys, left, right, *states = combinations(
        (1, 16, 33, 70),
        (0, 17, 32, 49, 64) if mask == MaskKind.NONE else (17, 32, 64),
        sizes if "left" in edges else (0,),
        sizes if "right" in edges else (0,),
        *[(EMPTY, PARTIAL, FULL) if mask == MaskKind.KEY else (FULL,)] * 2,
    )
    shown = torch.stack(states, dim=1)[:, :, None]
    shown = (shown == FULL) | ((shown == PARTIAL) & partial_keys(2))
    sides = left if "left" in edges else None, right if "right" in edges else None
    of_keys = shown.flatten(1)[:, None] if mask == MaskKind.KEY else None
    return Shapes.of(mask, "causal" in edges, queries, keys, of_keys, *sides)


def dense_shapes(causal: bool) -> Shapes:
    """Every pattern of two by two blocks, cut to lengths around the ends of tiles; partial ones hold two pairs."""
    queries, keys, *states = combinations(
        (1, 16, 31, 33, 40, 64), (1, 16, 31, 33, 40, 64), *[(EMPTY, PARTIAL, FULL)] * 4
    )
    states = torch.stack(states, dim=1).view(-1, 2, 2)
    states = repeat(states, "n x y -> n (x p) (y q)", p=BLOCK, q=BLOCK)
    position = torch.arange(2 * BLOCK) % BLOCK
    corner = (position == 0)[:, None] & (position == BLOCK - 1)
    mask = (states == FULL) | ((states == PARTIAL) & (corner | corner.T))
    return Shapes.of(MaskKind.DENSE, causal, queries, keys, mask)


def named(tiles: tuple[int, int]) -> str:
    return "x".join(map(str, tiles))


with_causality = pytest.mark.parametrize("causal", (False, True), ids=("all", "causal"))
by_keys_or_queries = pytest.mark.parametrize("by_keys", (True, False), ids=("by_keys", "by_queries"))


@on_every_device
@by_keys_or_queries
@with_causality
@pytest.mark.parametrize("tiles", TILES, ids=named)
def test_every_shape_without_a_mask(device: str, tiles: tuple[int, int], causal: bool, by_keys: bool) -> None:
    shapes = unmasked_shapes(causal)
    check_walks(shapes, take_walks(shapes, *tiles, by_keys, device), *tiles, by_keys)


@on_every_device
@with_causality
@pytest.mark.parametrize("tiles", TILES, ids=named)
def test_every_pattern_of_a_key_mask(device: str, tiles: tuple[int, int], causal: bool) -> None:
    shapes = key_masked_shapes(causal)
    check_walks(shapes, take_walks(shapes, *tiles, True, device), *tiles, True)
    for hide_keys in (False, True):
        walks = take_walks(shapes, *tiles, False, device, hide_keys=hide_keys)
        check_walks(shapes, walks, *tiles, False, hide_keys)


@on_every_device
@pytest.mark.parametrize("edges", ("left", "right", "left causal", "left right"))
@pytest.mark.parametrize("kind", (MaskKind.NONE, MaskKind.KEY), ids=("all", "key"))
@pytest.mark.parametrize("tiles", TILES, ids=named)
def test_every_window(device: str, tiles: tuple[int, int], kind: MaskKind, edges: str) -> None:
    shapes = windowed_shapes(kind, edges)
    for by_keys in (True, False):
        check_walks(shapes, take_walks(shapes, *tiles, by_keys, device), *tiles, by_keys)


@on_every_device
@by_keys_or_queries
def test_blocks_visited_are_linear_in_the_window(device: str, by_keys: bool) -> None:
    """A tile comes to as many blocks as its window crosses, however long the sequence is."""
    lengths = torch.full((6,), 15 * BLOCK)
    left = torch.tensor([0, 16, 32, 64, 128, 1000])
    shapes = Shapes.of(MaskKind.NONE, True, lengths, lengths, left=left)
    walks = take_walks(shapes, 32, 32, by_keys, device)
    visited = (walks.fulls + walks.masked).sum(dim=1)
    most = [int(visited[walks.shape == shape].max()) for shape in range(len(left))]
    assert most == [1, 2, 2, 3, 5, 15]
    assert int(visited.sum()) == sum(min(block + 1, blocks) for block in range(15) for blocks in most)


@on_every_device
@by_keys_or_queries
@with_causality
@pytest.mark.parametrize("tiles", TILES, ids=named)
def test_every_pattern_of_a_dense_mask(device: str, tiles: tuple[int, int], causal: bool, by_keys: bool) -> None:
    shapes = dense_shapes(causal)
    check_walks(shapes, take_walks(shapes, *tiles, by_keys, device), *tiles, by_keys)


@on_every_device
@pytest.mark.parametrize(
    "shapes",
    (
        unmasked_shapes(True),
        key_masked_shapes(True),
        dense_shapes(False),
        windowed_shapes(MaskKind.NONE, "left causal"),
        windowed_shapes(MaskKind.KEY, "left right"),
    ),
    ids=("causal", "key causal", "dense", "left causal", "key window"),
)
def test_parts_of_a_walk(device: str, shapes: Shapes) -> None:
    """Together they come to the same blocks, none twice. None is longer, in blocks of the schedule if there is
    one, than all of them together divided by their number."""
    tiles = (16, 16)
    parts = 3
    walks = take_walks(shapes, *tiles, True, device, parts=parts)
    fulls, masked = (x.unflatten(0, (-1, parts)) for x in (walks.fulls, walks.masked))
    whole = Walks(walks.shape[::parts], walks.tile[::parts], fulls.sum(dim=1), masked.sum(dim=1))
    check_walks(shapes, whole, *tiles, True)
    visited = (fulls + masked) > 0  # (w, parts, MOST)
    at = torch.arange(MOST)
    first, last = torch.where(visited, at, MOST).amin(dim=2), torch.where(visited, at, -1).amax(dim=2)
    assert (last[:, :-1] < first[:, 1:])[visited.any(dim=2)[:, 1:]].all(), "parts are in order"
    of_schedule = 1 if shapes.kind == MaskKind.NONE else BLOCK // tiles[1]
    first, last = first // of_schedule, last // of_schedule
    longest = -(-(last.amax(dim=1) - first.amin(dim=1) + 1).clamp(min=0) // parts)
    assert ((last - first + 1).clamp(min=0).amax(dim=1) <= longest).all()


@on_every_device
@by_keys_or_queries
@pytest.mark.parametrize("shapes_of", (unmasked_shapes, key_masked_shapes, dense_shapes))
def test_the_loops_of_the_kernels(device: str, shapes_of: Callable[[bool], Shapes], by_keys: bool) -> None:
    """One walk a program, with numbers in place of arrays: the same blocks, and within the bounds of the same tests."""
    shapes = shapes_of(True)
    tiles = (16, 32) if by_keys else (32, 16)
    # An odd step, so that it comes to tiles of every number.
    alone = take_walks(shapes, *tiles, by_keys, device, only_every=len(shapes.queries) // 25 | 1)
    assert len(alone.shape) > 20
    check_walks(shapes, alone, *tiles, by_keys)


# ---------------------------------------------------------------------------------------------------------------------
# Hiding and order
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def hide_kernel(
    OUT,
    X,
    VISIBLE,
    first_query,
    first_key,
    queries: tl.int32,
    keys: tl.int32,
    window_left: tl.int32,
    window_right: tl.int32,
    fill: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HIDES_KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Hides pairs of a tile X (BLOCK_M, BLOCK_N), or of its transpose, and says which keys are readable at all."""
    batch = tl.program_id(0)
    planes = Planes(VISIBLE, None, batch, batch, batch, tl.cdiv(keys, 32), BLOCK_M=32, BLOCK_N=32)
    masks = masks_of_call(planes, queries, keys, window_left, window_right, KIND, CAUSAL, LEFT, RIGHT, HIDES_KEYS)
    mask = masks.of_head(batch, batch)
    query = first_query + tl.arange(0, BLOCK_M)
    key = first_key + tl.arange(0, BLOCK_N)
    shown, readable = mask.shown(first_query, first_key, BLOCK_M, BLOCK_N)
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if TRANSPOSED:
        shown = readable[:, None]
        if KIND == 2:
            shown = mask.pairs_shown(first_query, first_key, BLOCK_M, BLOCK_N, True)
        tl.store(OUT + at.T, mask.hide(tl.load(X + at.T), query[None, :], key[:, None], shown, fill))
    else:
        tl.store(OUT + at, mask.hide(tl.load(X + at), query[:, None], key[None, :], shown, fill))
    tl.store(OUT + BLOCK_M * BLOCK_N + tl.arange(0, BLOCK_N), readable.to(tl.float32))


def words_of(pairs: Tensor) -> Tensor:
    """(i, j) bools -> (i, j / 32) int32, the least significant bit first."""
    bits = pairs.view(pairs.shape[0], -1, 32).long() << torch.arange(32)
    return bits.sum(dim=2).to(torch.int32)  # wraps where bit 31 is set


@on_every_device
@pytest.mark.parametrize(
    ("first_query", "first_key", "tiles"), ((32, 32, (16, 32)), (32, 48, (32, 16)), (0, 0, (64, 64)))
)
@pytest.mark.parametrize("transposed", (False, True), ids=("", "transposed"))
@pytest.mark.parametrize("hide_keys", (False, True), ids=("", "hide_keys"))
@pytest.mark.parametrize("edges", ("", "causal", "left causal", "left right"))
@pytest.mark.parametrize("kind", MaskKind)
def test_hide(
    device: str,
    kind: MaskKind,
    edges: str,
    hide_keys: bool,
    transposed: bool,
    first_query: int,
    first_key: int,
    tiles: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    queries, keys = 49, 54
    causal, left, right = (word in edges for word in ("causal", "left", "right"))
    x = torch.randn(tiles)
    x[::3] = torch.nan
    x[:, ::4] = torch.inf
    pairs = torch.rand(64, 64) < 0.5
    pairs[:, [33, 50]] = False  # keys that nobody sees
    pairs[:, keys:] = False
    if kind == MaskKind.KEY:
        pairs = pairs[:1].expand(64, 64)
    visible = {MaskKind.NONE: torch.zeros(1), MaskKind.KEY: pairs[0].int(), MaskKind.DENSE: words_of(pairs)}[kind]
    out = torch.empty(x.numel() + tiles[1], device=device)
    numbers = first_query, first_key, queries, keys, 9, 3
    choices = -7.0, *tiles, int(kind), causal, left, right, hide_keys, transposed
    hide_kernel[(1,)](out, x.to(device), visible.to(device), *numbers, *choices)

    query, key = first_query + torch.arange(tiles[0]), first_key + torch.arange(tiles[1])
    tile = pairs[query][:, key]
    shown = key < keys if kind == MaskKind.NONE else tile.any(dim=0)
    kept = tile if kind == MaskKind.DENSE else torch.ones(tiles, dtype=torch.bool)
    ahead = key - query[:, None] - (keys - queries)
    if kind != MaskKind.DENSE:
        kept = kept & (ahead <= (0 if causal else 3 if right else 100)) & (ahead >= (-9 if left else -100))
    if hide_keys and (kind == MaskKind.KEY or (kind == MaskKind.NONE and not causal)):
        kept = kept & shown  # else causality hides the keys past the end from all queries before it
    assert kept.any()
    assert not shown.all()
    result, readable = out.cpu().split((x.numel(), tiles[1]))
    torch.testing.assert_close(result.view(tiles), torch.where(kept, x, -7.0), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(readable, shown.float())


@triton.jit
def order_kernel(OUT, length, heads, section, SIZE: tl.constexpr, LAST_FIRST: tl.constexpr):
    first, batch, head = tile_of_program(length, heads, section, SIZE, LAST_FIRST)
    tl.store(OUT + tl.program_id(0) * 3, first)
    tl.store(OUT + tl.program_id(0) * 3 + 1, batch)
    tl.store(OUT + tl.program_id(0) * 3 + 2, head)


@on_every_device
@pytest.mark.parametrize("last_first", (False, True), ids=("first_first", "last_first"))
@pytest.mark.parametrize("section", (1, 2, 4, 6))
def test_every_tile_has_one_program(device: str, section: int, last_first: bool) -> None:
    """Section by section; in a section position by position; at one position every head, one after another."""
    batch, heads, length = 2, 3, 37
    tiles = [32, 16, 0] if last_first else [0, 16, 32]
    out = torch.empty(batch * heads * len(tiles), 3, dtype=torch.int32, device=device)
    order_kernel[(len(out),)](out, length, heads, section, SIZE=16, LAST_FIRST=last_first)
    pairs = [[b, head] for b in range(batch) for head in range(heads)]
    sections = [pairs[begin : begin + section] for begin in range(0, len(pairs), section)]
    assert out.tolist() == [[tile, *pair] for some in sections for tile in tiles for pair in some]
