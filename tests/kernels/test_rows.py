"""Tiles: what is loaded, multiplied and stored for every head dimension, and that no tiling changes a result."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_attend.kernels.compat import kernel
from flash_attend.kernels.configs import Tile, Tiles, head_parts, override
from flash_attend.kernels.rows import Heads
from flash_attend.kernels.tiles import Tile as DeviceTile
from flash_attend.kernels.tiles import clear_rows, rounded_to_tf32, row_products, scaled, zeros
from flash_attend.testing.calls import Case, check, make_call, run, truth_of

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
on_every_device = pytest.mark.parametrize("device", DEVICES)

# ---------------------------------------------------------------------------------------------------------------------
# Tilings
# ---------------------------------------------------------------------------------------------------------------------

SMALLEST = Tile(16, 16, 4, 1)
TILINGS = {
    "smallest": Tiles(SMALLEST, SMALLEST, SMALLEST),
    "large": Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    "all_different": Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2, apart=True), Tile(32, 32, 4, 2)),
    "tall_and_wide": Tiles(
        Tile(64, 16, 4, 1, halves=True), Tile(16, 64, 4, 1, halves=True), Tile(16, 128, 4, 1, halves=True)
    ),
    "blocks_far_larger_than_tiles": Tiles(Tile(64, 64, 4, 2), SMALLEST, SMALLEST),
    "by_descriptors": Tiles(*[Tile(32, 64, 4, 2, descriptors=True)] * 3),
    "fused_tall": Tiles(Tile(32, 32, 4, 2), SMALLEST, SMALLEST, Tile(64, 16, 4, 1)),
    "fused_wide": Tiles(Tile(32, 32, 4, 2), SMALLEST, SMALLEST, Tile(16, 64, 4, 1)),
}
CASES = (
    Case("plain", batch=1, heads=2, queries=37, keys=75, d=24, dv=40),
    Case("padded_causal", batch=2, heads=2, kv_heads=1, queries=70, keys=75, mask="holes", causal=True, d=8, dv=16),
    Case("padded_per_head", batch=1, heads=2, kv_heads=1, queries=40, keys=75, mask="bh1j", causal=True, d=8, dv=16),
    Case("dense_causal", batch=1, heads=2, queries=70, keys=75, mask="staircase", causal=True, d=40, dv=8),
)


# Each of them with two of the cases.
TILED = [(tiling, CASES[(n + m) % 4]) for n, tiling in enumerate(TILINGS) for m in (0, 2)]


@on_every_device
@pytest.mark.parametrize(("tiling", "case"), TILED, ids=str)
def test_no_tiling_changes_a_result(device: str, tiling: str, case: Case) -> None:
    call = make_call(case, torch.float64, device)
    with override(TILINGS[tiling]):
        check(run(call, "triton"), call, truth_of(call))


# ---------------------------------------------------------------------------------------------------------------------
# Head dimensions
# ---------------------------------------------------------------------------------------------------------------------


def test_parts_cover_a_head_dimension_with_as_little_as_two_powers_can() -> None:
    powers = [2**n for n in range(4, 9)]
    for dim in range(1, 257):
        first, second = head_parts(dim, "half")
        assert first in powers, dim
        assert second in (0, *powers), dim
        least = min(a + b for a in powers for b in (0, *powers) if a + b >= dim)
        assert first + second == least, dim
        whole = min(power for power in powers if power >= dim)
        assert second == 0 or (second < first and least < whole), f"{dim}: two parts where one does as well"


@pytest.mark.parametrize("kind", ("tf32", "double"))
def test_other_kinds_keep_to_one_part(kind: str) -> None:
    for dim in range(1, 257):
        assert head_parts(dim, kind) == (min(2**n for n in range(4, 9) if 2**n >= dim), 0)


def test_accurate_products_are_in_parts_of_at_most_64() -> None:
    for dim in range(1, 129):
        first, second = head_parts(dim, "tf32x3")
        assert max(first, second) <= 64
        assert (second > 0) == (dim > 64)
        assert dim <= first + second <= max(16, 1 << (dim - 1).bit_length())


def test_parts_of_the_common_head_dimensions() -> None:
    parts = {40: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0), 160: (128, 32), 192: (128, 64)}
    assert {dim: head_parts(dim, "half") for dim in parts} == parts


def test_halves_split_what_is_one_power_of_two() -> None:
    assert [head_parts(dim, "half", halves=True) for dim in (8, 16, 32, 64, 200, 256)] == [
        *((16, 0), (16, 0), (16, 16), (32, 32), (128, 128), (128, 128)),
    ]
    for dim in range(1, 257):
        assert sum(head_parts(dim, "half", halves=True)) == sum(head_parts(dim, "half")), "no more than is needed"


@kernel
def copy_kernel(
    OUT,
    SQUARES,
    X,
    stride_x: tl.int64,
    stride_out: tl.int64,
    first: tl.int32,
    rows: tl.int32,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PART0: tl.constexpr,
    PART1: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Copies the rows `first .. rows` through a tile; SQUARES shows what the whole tile holds, padding too."""
    row = tl.arange(0, SIZE)
    valid = (row >= first) & (row < rows)
    zero = tl.program_id(0)
    tile = Heads(X, zero, zero, stride_x, 1, DIM, PART0, PART1, False).rows(zero, zero).load(zero, valid, SIZE, MASKED)
    tl.store(SQUARES + row, row_products(tile, tile, tl.float64))
    Heads(OUT, zero, zero, stride_out, 1, DIM, PART0, PART1, False).rows(zero, zero).store(zero, tile, valid, SIZE)


@on_every_device
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
def test_rows_of_every_head_dimension(device: str, masked: bool) -> None:
    """What lies beside the rows is NaN: it neither comes in, nor is it written over."""
    size, first, rows = 16, 3, 13
    torch.manual_seed(0)
    for dim in range(1, 257, 1 if device == "cpu" else 23):  # each is a variant to compile
        x = torch.full((size, dim + 5), torch.nan, dtype=torch.float64)
        read = slice(first, rows) if masked else slice(None)
        x[read, 2 : dim + 2] = torch.randn(size, dim, dtype=torch.float64)[read]
        x = x.to(device)
        out = torch.full((size, dim + 3), torch.nan, dtype=torch.float64, device=device)
        squares = torch.empty(size, dtype=torch.float64, device=device)
        parts = head_parts(dim, "half")
        copy_kernel[(1,)](
            out[:, 1:], squares, x[:, 2:], x.stride(0), out.stride(0), first, rows, size, dim, *parts, MASKED=masked
        )
        expected = torch.full_like(out, torch.nan)
        expected[first:rows, 1 : dim + 1] = x[first:rows, 2 : dim + 2]
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True, msg=f"d = {dim}")
        wanted = torch.zeros_like(squares)
        wanted[read] = x[read, 2 : dim + 2].square().sum(dim=1)
        torch.testing.assert_close(squares, wanted, rtol=1e-13, atol=0, msg=f"d = {dim}")


@kernel
def block_kernel(
    OUT,
    SOURCE,
    stride_batch: tl.int64,
    stride_head: tl.int64,
    stride_row: tl.int64,
    head: tl.int32,
    first: tl.int32,
    rows: tl.int32,
    hidden: tl.int32,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    MASKED: tl.constexpr,
    WITHIN: tl.constexpr,
):
    """OUT (SIZE, WIDTH) = a block of the second batch entry's head, of whose rows one is hidden, if any is WITHIN.
    Strides are in units of two elements."""
    row = first + tl.arange(0, SIZE)
    valid = row < rows
    if WITHIN:
        valid = valid & (row != hidden)
    zero = tl.program_id(0)
    heads = Heads(SOURCE, stride_batch, stride_head, stride_row, 2, DIM, WIDTH, 0, DESCRIPTOR)
    block = heads.rows(zero + 1, head).load(first, valid, SIZE, MASKED, WITHIN)
    whole = Heads(OUT, zero, zero, zero + WIDTH, 1, WIDTH, WIDTH, 0, False)
    whole.rows(zero, zero).store(zero, block, row >= first, SIZE)


@on_every_device
@pytest.mark.parametrize("by_descriptors", (False, True), ids=("pointers", "descriptors"))
@pytest.mark.parametrize("mode", ("full", "past_the_end", "hidden_within"))
@pytest.mark.parametrize("dim", (16, 40, 64))
def test_blocks_are_the_same_by_pointers_and_by_descriptors(
    device: str, by_descriptors: bool, mode: str, dim: int
) -> None:
    """What is next to the head, past its end, and in the hidden row is NaN; the columns past the last are zeros."""
    size, rows, head, hidden, width = 16, 37, 1, 35, 1 << (dim - 1).bit_length()
    first = 16 if mode == "full" else 32
    torch.manual_seed(0)
    memory = torch.full((2, 3, rows, dim), torch.nan, dtype=torch.float64)
    memory[1, head] = torch.randn(rows, dim, dtype=torch.float64)
    expected = torch.zeros(size, width, dtype=torch.float64)
    seen = memory[1, head, first : first + size].clone()
    if mode == "hidden_within":
        memory[1, head, hidden] = torch.nan
        seen[hidden - first] = 0
    expected[: len(seen), :dim] = seen
    source = memory.to(device)
    out = torch.empty(size, width, dtype=torch.float64, device=device)
    given = source
    if by_descriptors:
        given = TensorDescriptor(source, [*source.shape], [*source.stride()], [1, 1, size, width])
    strides = [stride // 2 for stride in source.stride()[:3]]
    block_kernel[(1,)](
        out, given, *strides, head, first, rows, hidden, size, dim, width,
        DESCRIPTOR=by_descriptors, MASKED=mode != "full", WITHIN=mode == "hidden_within",
    )  # fmt: skip
    assert torch.equal(out.cpu(), expected)


@triton.jit
def product_kernel(
    OUT,
    A,
    B,
    KEPT,
    FACTOR,
    M: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    PART0: tl.constexpr,
    PART1: tl.constexpr,
):
    """OUT (M, DIM) = the kept rows of (A B^T B) * factor."""
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    zero = tl.program_id(0)
    tile = DeviceTile(M, N, "ieee", tl.float64)
    a = Heads(A, zero, zero, zero + DIM, 1, DIM, PART0, PART1, False).rows(zero, zero).load(zero, m < M, M, False)
    b = Heads(B, zero, zero, zero + DIM, 1, DIM, PART0, PART1, False).rows(zero, zero).load(zero, n < N, N, False)
    total = tile.accumulate(zeros(M, PART0, PART1, tl.float64), tile.inner_products(a, b), b)
    total = clear_rows(scaled(total, tl.load(FACTOR + m)[:, None]), tl.load(KEPT + m) != 0)
    Heads(OUT, zero, zero, zero + DIM, 1, DIM, PART0, PART1, False).rows(zero, zero).store(zero, total, m < M, M)


@on_every_device
@pytest.mark.parametrize("dim", (1, 16, 17, 33, 48, 64, 80, 96, 100, 160, 192, 256))
def test_products_of_one_part_and_of_two(device: str, dim: int) -> None:
    torch.manual_seed(0)
    m, n = 16, 32
    a, b = (torch.randn(rows, dim, dtype=torch.float64) for rows in (m, n))
    factor = torch.randn(m, dtype=torch.float64)
    factor[5] = torch.nan
    kept = torch.rand(m) < 0.5
    kept[5] = False
    out = torch.empty(m, dim, dtype=torch.float64, device=device)
    product_kernel[(1,)](
        out, a.to(device), b.to(device), kept.int().to(device), factor.to(device), m, n, dim, *head_parts(dim, "half")
    )
    expected = torch.where(kept[:, None], (a @ b.T) @ b * factor[:, None], 0.0)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-13 * dim * n)


@triton.jit
def rounding_kernel(OUT, X, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(OUT + at, rounded_to_tf32(tl.load(X + at)))


@on_every_device
def test_operands_are_rounded_to_the_nearest_tf32_number(device: str) -> None:
    unit, largest = 2.0**-10, torch.finfo(torch.float32).max
    numbers = [1 + unit, 1 + 0.49 * unit, -1 - 0.51 * unit, 1 + 0.5 * unit, 2 - 0.5 * unit, -0.0, largest, -torch.inf]
    nearest = [1 + unit, 1, -1 - unit, 1 + unit, 2, -0.0, torch.inf, -torch.inf]  # ties go away from 0
    # NaN, of which half a unit more in integers would make 0 or infinity.
    no_numbers = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x400000] * 2, dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor(numbers), no_numbers])
    out = torch.empty_like(x, device=device)
    rounding_kernel[(1,)](out, x.to(device), len(x))
    found = (out.cpu().view(torch.int32) & -0x2000).view(torch.float32)  # what a product takes of it
    assert found.tolist()[:8] == nearest
    assert found[8:].isnan().all()
