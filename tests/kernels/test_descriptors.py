"""Bulk copies: which tensors they can read, and what a launch makes of a tile that asks for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_attend.checks import normalise_inputs
from flash_attend.kernels.configs import Tile, Tiles
from flash_attend.kernels.descriptors import block_strides, readable_in_bulk
from flash_attend.kernels.forward import attention_forward
from flash_attend.kernels.launch import Launch, begin_aligned, recorded_launches
from flash_attend.operands import Operands
from flash_attend.testing.calls import LAYOUTS

IN_BULK = Tile(32, 64, 4, 2, descriptors=True)
TILES = Tiles(IN_BULK, IN_BULK, IN_BULK)


@pytest.mark.parametrize(
    ("sizes", "strides", "readable"),
    (
        ((2, 3, 5, 64), (960, 320, 64, 1), True),
        ((2, 3, 5, 64), (960, 64, 192, 1), True),
        ((2, 3, 5, 64), (960, 320, 65, 1), False),
        ((2, 3, 5, 64), (960, 0, 64, 1), False),
        ((2, 1, 5, 64), (960, 0, 64, 1), True),
        ((2, 3, 1, 64), (960, 320, 7, 1), True),
        ((2, 3, 0, 64), (960, 320, 64, 1), False),
        ((2, 3, 5, 64), (2**40, 320, 64, 1), False),
    ),
)
def test_readable_layouts(sizes: tuple[int, ...], strides: tuple[int, ...], readable: bool) -> None:
    assert readable_in_bulk(sizes, strides, 2) == readable


def test_alignment_counts_for_all() -> None:
    buffer = torch.empty(64, dtype=torch.float16)
    assert begin_aligned(buffer, buffer[8:])
    assert not begin_aligned(buffer, buffer[4:])


def test_strides_that_are_never_used_are_replaced() -> None:
    assert block_strides((1, 3, 1, 64), (7, 128, 13, 1), 64) == [64, 128, 64, 1]


def launched(
    change: Callable[[Tensor], Tensor] = Tensor.contiguous, head_dim: int = 64, tiles: Tiles = TILES
) -> Launch:
    """The forward's launch for k and v that were changed so."""
    q = torch.zeros(2, 2, 40, head_dim, dtype=torch.float16)
    k = v = change(torch.zeros(2, 2, 70, head_dim, dtype=torch.float16))
    (q, k, v, mask, *_), spec = normalise_inputs(q, k, v)
    with recorded_launches() as launches:
        attention_forward(Operands(q, k, v, mask), spec, tiles)
    return launches[0]


@pytest.mark.parametrize("layout", ("contiguous", "heads_inside"))
@pytest.mark.parametrize(("head_dim", "columns"), ((64, 64), (48, None), (56, 64), (16, 16)))
def test_blocks_are_handed_over(layout: str, head_dim: int, columns: int | None) -> None:
    """Of a head dimension in two parts, 48 = 32 + 16, they are not."""
    launch = launched(LAYOUTS[layout], head_dim)
    q, k, v, *others = launch.prepared.hand_over(launch.tensors)
    assert q is launch.tensors[0]
    assert [*map(id, others)] == [*map(id, launch.tensors[3:])]
    assert launch.prepared.choices["DESCRIPTORS"] == (columns is not None)
    for given, tensor in ((k, launch.tensors[1]), (v, launch.tensors[2])):
        if columns is None:
            assert given is tensor
        else:
            assert isinstance(given, TensorDescriptor)
            assert given.base is tensor
            assert (given.block_shape, given.shape) == ([1, 1, 64, columns], [2, 2, 70, head_dim])


@pytest.mark.parametrize(("head_dim", "keys"), ((48, 64), (80, 32)))
def test_short_rows_in_two_parts_stay_together(head_dim: int, keys: int) -> None:
    choices = launched(head_dim=head_dim).prepared.choices
    assert not choices["DESCRIPTORS"]
    assert choices["BLOCK_N"] == keys


@pytest.mark.parametrize("layout", ("sliced", "broadcast_heads", "broadcast_batch"))
def test_what_cannot_be_copied_in_bulk_is_read_by_pointers_in_shorter_blocks(layout: str) -> None:
    choices = launched(LAYOUTS[layout]).prepared.choices
    assert not choices["DESCRIPTORS"]
    assert (choices["BLOCK_M"], choices["BLOCK_N"]) == (32, 32)


def test_an_address_decides_too() -> None:
    def moved(x: Tensor) -> Tensor:
        return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)

    assert not launched(moved).prepared.choices["DESCRIPTORS"]


def test_nothing_is_copied_in_bulk_unasked() -> None:
    by_pointers = IN_BULK._replace(descriptors=False)
    choices = launched(tiles=Tiles(*[by_pointers] * 3)).prepared.choices
    assert not choices["DESCRIPTORS"]
    assert choices["BLOCK_N"] == 64
