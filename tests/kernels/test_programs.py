"""Which tile each program has: run in Triton's interpreter."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl

from flash_attend.kernels.programs import tile_at

pytestmark = pytest.mark.interpreter

SIZE = 128


@triton.jit
def tiles_kernel(OUT, length, heads, heads_total, section, SIZE: tl.constexpr):
    first, batch, head = tile_at(tl.program_id(0), length, heads, heads_total, section, SIZE)
    at = OUT + 3 * tl.program_id(0)
    tl.store(at, first)
    tl.store(at + 1, batch)
    tl.store(at + 2, head)


def tiles(batch: int, heads: int, length: int, section: int) -> list[tuple[int, ...]]:
    count = batch * heads * triton.cdiv(length, SIZE)
    out = torch.zeros(count, 3, dtype=torch.int32)
    tiles_kernel[(count,)](out, length, heads, batch * heads, section, SIZE=SIZE)
    return [tuple(row) for row in out.tolist()]


@pytest.mark.parametrize("section", (1, 3, 100))
def test_every_tile_is_there_once(section: int) -> None:
    assert sorted(tiles(2, 4, 300, section)) == sorted(product((0, 128, 256), range(2), range(4)))


def test_the_longest_tiles_of_a_section_come_first_and_heads_are_neighbours() -> None:
    found = tiles(3, 2, 300, section=4)
    sections = found[:12], found[12:]
    for heads, section in zip((range(4), range(4, 6)), sections, strict=True):
        assert section == [(row, head // 2, head % 2) for row in (256, 128, 0) for head in heads]
