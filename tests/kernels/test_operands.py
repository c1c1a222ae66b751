"""How tensors are handed to kernels: which layouts they read, strides in aligned units, and whose turn it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_attend.checks import normalise_inputs
from flash_attend.kernels.backward import attention_backward
from flash_attend.kernels.configs import Tile, Tiles
from flash_attend.kernels.forward import attention_forward
from flash_attend.kernels.operands import (
    CACHED_BYTES,
    aligned_strides,
    key_section,
    layout_like_heads,
    query_section,
    readable,
)
from flash_attend.operands import Operands
from flash_attend.spec import AttentionSpec
from flash_attend.testing.calls import Case, check, make_call, run

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
on_every_device = pytest.mark.parametrize("device", DEVICES)

# ---------------------------------------------------------------------------------------------------------------------
# Memory layouts
# ---------------------------------------------------------------------------------------------------------------------


def layout(*tensors: Tensor) -> tuple[int, list[int]]:
    """Of tensors: the unit, and the strides in it."""
    unit, strides = aligned_strides(tensors[0].dtype, *((tensor.shape, tensor.stride()) for tensor in tensors))
    return unit, list(strides)


def at_odd_offset(x: Tensor) -> Tensor:
    """The same tensor with aligned strides, one element off the start of an allocation."""
    buffer = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[1:].view(x.shape)
    view.copy_(x)
    return view


@on_every_device
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_unaligned_pointers(device: str, dtype: torch.dtype) -> None:
    call = make_call(Case("offset", batch=1, kv_heads=1, d=16, dv=24, mask="holes", causal=True), dtype, device)
    moved = replace(call, **{name: at_odd_offset(getattr(call, name)) for name in ("q", "k", "v", "grad_out")})
    assert layout(moved.q, moved.k, moved.v)[0] > 1
    assert moved.q.data_ptr() % 16
    check(run(moved, "triton"), call)


@on_every_device
@pytest.mark.parametrize("odd", ("q", "k", "v", "grad_out"))
def test_one_unaligned_stride(device: str, odd: str) -> None:
    call = make_call(Case("odd", batch=1, d=16, dv=32, mask="pad_left", causal=True), torch.float32, device)
    x = getattr(call, odd)
    padded = torch.nn.functional.pad(x, (0, 1), value=torch.nan)[..., :-1]
    assert layout(padded)[0] == 1
    check(run(call.with_(**{odd: padded}), "triton"), call)


def test_strides_in_aligned_units() -> None:
    half, single, double = (
        torch.empty(2, 3, 5, 64, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64)
    )
    assert layout(half) == (8, [120, 40, 8])
    assert layout(single) == (4, [240, 80, 16])
    assert layout(double) == (2, [480, 160, 32])
    assert layout(half, half[..., :60]) == (8, [120, 40, 8] * 2)
    odd = torch.empty(2, 3, 5, 33, dtype=torch.float16)
    assert layout(odd) == (1, [495, 165, 33])
    assert layout(half, odd) == (1, [960, 320, 64, 495, 165, 33]), "one odd stride decides for all"
    assert layout(half[:, :1].expand(2, 3, 5, 64)) == (8, [120, 0, 8])


def test_strides_that_are_never_used_spoil_nothing() -> None:
    buffer = torch.empty(2 * 3 * 64 + 1, dtype=torch.float16)
    one = buffer.as_strided((1, 3, 1, 64), (7, 64, 13, 1))
    assert layout(one) == (8, [0, 8, 0])


def test_only_a_strided_last_dimension_is_copied() -> None:
    x = torch.randn(2, 3, 4, 8)
    for same in (x, x.transpose(1, 2), x[..., 1:], x[:1].expand(5, 3, 4, 8), x[..., :1], x.mT[..., :1]):
        assert readable(same) is same
    for copied in (x.mT, x[..., ::2], x[..., :1].expand(2, 3, 4, 8)):
        assert readable(copied).stride(-1) == 1
        assert torch.equal(readable(copied), copied)


def gradients(operands: Operands, spec: AttentionSpec, grad_out: Tensor, grad_lse: Tensor, change) -> tuple:
    """Out, lse and gradients by the kernels; what the backward is handed comes through `change`."""
    tile = Tile(32, 32, 4, 1)
    tiles = Tiles(tile, tile, tile)
    out, lse, schedule = attention_forward(operands, spec, tiles)
    saved = [None if tensor is None else change(tensor) for tensor in (*operands, out, lse, *schedule)]
    operands, (out, lse), schedule = Operands(*saved[:8]), saved[8:10], type(schedule)(*saved[10:])
    return (
        out,
        lse,
        *attention_backward(change(grad_out), change(grad_lse), operands, out, lse, schedule, spec, tiles, (True,) * 3),
    )


def in_another_order(x: Tensor) -> Tensor:
    """The same values with the strides turned round."""
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


@on_every_device
@pytest.mark.parametrize("mask", ((2, 1, 1, 37), (1, 2, 21, 37)), ids=("key", "dense"))
def test_the_backward_reads_values_whatever_their_strides(device: str, mask: tuple[int, ...]) -> None:
    """Hooks on saved tensors give back what they like, and gradients come as autograd makes them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 16, device=device) for n in (21, 37, 37))
    operands, spec = normalise_inputs(q, k, v, mask=torch.rand(mask, device=device) < 0.7, causal=True)
    inputs = operands[:4]
    grads = torch.randn(2, 2, 21, 16, device=device), torch.randn(2, 2, 21, device=device)
    found = gradients(Operands(*inputs), spec, *grads, in_another_order)
    for one, other in zip(found, gradients(Operands(*inputs), spec, *grads, torch.clone), strict=True):
        assert torch.equal(one, other)


@on_every_device
@pytest.mark.parametrize("shape", ((2, 1, 1, 37), (2, 1, 21, 37)), ids=("key", "dense"))
def test_a_mask_made_for_inference_serves_training(device: str, shape: tuple[int, ...]) -> None:
    q, k = (torch.randn(2, 2, n, 16, device=device, requires_grad=True) for n in (21, 37))
    with torch.inference_mode():
        mask = torch.rand(shape, device=device) < 0.7
    operands, spec = normalise_inputs(q, k, k, mask=mask)
    inputs = operands[:4]
    tile = Tile(32, 32, 4, 1)
    _, lse, schedule = attention_forward(Operands(*inputs), spec, Tiles(tile, tile, tile))
    assert not any(tensor.is_inference() for tensor in (lse, *schedule) if tensor is not None)


def test_new_tensors_lie_in_memory_as_the_old_ones() -> None:
    plain = torch.empty(2, 3, 5, 8)
    inside = torch.empty(2, 5, 3, 8).transpose(1, 2)
    for heads, dim in ((3, 8), (1, 4), (6, 16)):
        new = plain.new_empty_strided(*layout_like_heads((2, 3, 5), plain.stride(), heads, dim))
        assert new.shape == (2, heads, 5, dim)
        assert new.is_contiguous()
        new = plain.new_empty_strided(*layout_like_heads((2, 3, 5), inside.stride(), heads, dim))
        assert new.shape == (2, heads, 5, dim)
        assert new.transpose(1, 2).is_contiguous()


@on_every_device
def test_results_lie_in_memory_as_the_inputs(device: str) -> None:
    case = Case("layout", batch=2, heads=4, kv_heads=2, queries=5, keys=9, dv=24, layout="heads_inside")
    answer = run(make_call(case, torch.float32, device), "triton")
    for name in ("out", "dq", "dk", "dv"):
        assert getattr(answer, name).transpose(1, 2).is_contiguous(), name
    answer = run(make_call(replace(case, layout="contiguous"), torch.float32, device), "triton")
    for name in ("out", "dq", "dk", "dv"):
        assert getattr(answer, name).is_contiguous(), name


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------

MEGABYTE_A_HEAD = AttentionSpec(
    batch=2, heads=48, kv_heads=48, queries=4096, keys=4096, head_dim=64, value_dim=64, dtype=torch.float16, causal=True
)


@pytest.mark.parametrize(
    ("change", "for_queries", "for_keys"),
    (
        (dict(), 32, 32),
        (dict(causal=False), 1, 1),
        (dict(kv_heads=12), 4 * 24, 8),  # k and v of 24 heads, read by four each; q and its like of 32 heads
        (dict(kv_heads=12, causal=False), 4, 1),
        (dict(heads=4, kv_heads=4), 8, 8),
        (dict(keys=8192), 16, 32),
        (dict(keys=2**20, queries=2**20), 1, 1),
        (dict(batch=0), 1, 1),
        (dict(queries=0, keys=0), 96, 96),
    ),
)
def test_as_many_heads_take_turns_as_fit_into_the_cache(change: dict, for_queries: int, for_keys: int) -> None:
    assert CACHED_BYTES == 32 * 2**20
    spec = replace(MEGABYTE_A_HEAD, **change)
    assert (query_section(spec), key_section(spec)) == (for_queries, for_keys)
