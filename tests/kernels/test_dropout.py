"""What the kernels drop is what `flash_attend.dropout` says: in every kernel and tiling, and far along a sequence."""

from __future__ import annotations

import math

import pytest
import torch
import triton.language as tl
from torch import Tensor

from flash_attend import flash_attention
from flash_attend.checks import normalise_inputs
from flash_attend.dropout import draw_seed, keep_mask, keep_threshold, philox
from flash_attend.kernels.compat import kernel
from flash_attend.kernels.configs import Tile, Tiles, override
from flash_attend.kernels.dropout import dropout_by
from flash_attend.spec import LARGEST_LENGTH
from flash_attend.testing.oracle import visible_pairs

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
on_every_device = pytest.mark.parametrize("device", DEVICES)


@kernel
def keep_kernel(
    OUT,
    SEED,
    first_query: tl.int32,
    first_key: tl.int32,
    batch: tl.int32,
    head: tl.int32,
    threshold: tl.uint32,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """OUT (QUERIES, KEYS) int32, from the tile or from its transpose."""
    dropout = dropout_by(SEED, threshold, 1.0, True, tl.float32).of_head(batch, head)
    kept = dropout.kept(first_query, first_key, QUERIES, KEYS, TRANSPOSED)
    at = tl.arange(0, QUERIES)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    if TRANSPOSED:
        at = at.T
    tl.store(OUT + at, kept.to(tl.int32))


def definition(seed: Tensor, p: float, batch: int, head: int, query: Tensor, key: Tensor) -> Tensor:
    """What is kept of the pairs `query (i,)` and `key (j,)`, from the words of each pair's own evaluation."""
    query, key = query[:, None], key[None, :]
    words = torch.stack(
        torch.broadcast_tensors(*philox(seed, (query & ~8, key & ~8, torch.tensor(head), torch.tensor(batch))))
    )
    word = 2 * (query >> 3 & 1) + (key >> 3 & 1)
    return words.gather(0, word[None])[0] >= keep_threshold(p)


FAR = LARGEST_LENGTH // 16 * 16 - 256


@on_every_device
@pytest.mark.parametrize("transposed", (False, True), ids=("", "transposed"))
@pytest.mark.parametrize("tile", ((16, 16), (32, 16), (16, 64), (128, 32)), ids=lambda tile: "x".join(map(str, tile)))
@pytest.mark.parametrize(
    ("first_query", "first_key", "batch", "head", "seed", "p"),
    (
        (0, 0, 0, 0, 3, 0.3),
        (48, 16, 2, 1, 2**33 + 3, 0.5),
        (16, 2**16, 70_000, 3, 2**63 - 1, 0.1),
        (FAR, FAR, 1, 2**17 + 5, 2**32 - 1, 0.9),
        (2**30, 32, 0, 1, 7, 1e-9),
        (0, 2**30, 1, 0, 7, 1 - 2**-40),
    ),
)
def test_a_tile_equals_the_definition(
    device: str,
    first_query: int,
    first_key: int,
    batch: int,
    head: int,
    seed: int,
    p: float,
    tile: tuple[int, int],
    transposed: bool,
) -> None:
    seed = torch.tensor([seed])
    out = torch.empty(tile, dtype=torch.int32, device=device)
    keep_kernel[(1,)](
        out, seed.to(device), first_query, first_key, batch, head, keep_threshold(p), *tile, transposed
    )  # fmt: skip
    query, key = first_query + torch.arange(tile[0]), first_key + torch.arange(tile[1])
    assert torch.equal(out.cpu() != 0, definition(seed, p, batch, head, query, key))


def test_the_definition_is_that_of_the_mask() -> None:
    q = torch.zeros(2, 3, 21, 4)
    _, spec = normalise_inputs(q, q, q, dropout_p=0.4)
    seed = torch.tensor([11])
    position = torch.arange(21)
    expected = [[definition(seed, 0.4, batch, head, position, position) for head in range(3)] for batch in range(2)]
    assert torch.equal(keep_mask(seed, spec, 0, 21), torch.stack([torch.stack(heads) for heads in expected]))


SMALLEST = Tile(16, 16, 4, 1)
TILINGS = {
    "smallest": Tiles(SMALLEST, SMALLEST, SMALLEST),
    "all_different": Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(32, 32, 4, 1)),
    "wide": Tiles(Tile(16, 64, 4, 1), Tile(64, 16, 4, 1), Tile(64, 64, 4, 1)),
}
P = 0.4
SHAPE = (2, 2, 21, 37)


def kept_of_call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """What the next call, after `torch.manual_seed(5)`, keeps; and who sees whom."""
    _, spec = normalise_inputs(q, k, v, causal=causal, dropout_p=P)
    torch.manual_seed(5)
    kept = keep_mask(draw_seed(q.device), spec, 0, spec.queries)
    pairs = visible_pairs(*kept.shape, None, causal, q.device)
    return kept & pairs, pairs


def attend(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(5)
    out = flash_attention(*leaves, causal=causal, dropout_p=P, backend="triton")
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def unit_rows(heads: tuple[int, int], rows: int, dim: int, device: str) -> Tensor:
    """Row `n` is the unit vector `n`: products with it show single elements."""
    return torch.eye(rows, dim, dtype=torch.float64, device=device).expand(*heads, rows, dim).contiguous()


@on_every_device
@pytest.mark.parametrize("causal", (False, True), ids=("all", "causal"))
@pytest.mark.parametrize("tiling", TILINGS)
def test_the_output_and_grad_v_show_what_is_kept(device: str, tiling: str, causal: bool) -> None:
    """With unit vectors as v, the output is the matrix of what is left of the weights; so is grad_v, transposed."""
    *heads, queries, keys = SHAPE
    torch.manual_seed(0)
    q, k = (torch.randn(*heads, length, 40, dtype=torch.float64).to(device) for length in (queries, keys))
    v, grad = unit_rows(heads, keys, 40, device), unit_rows(heads, queries, 40, device)
    kept, pairs = kept_of_call(q, k, v, causal)
    with override(TILINGS[tiling]):
        out, _, _, grad_v = attend(q, k, v, grad, causal)
    assert 0.5 < kept.sum() / pairs.sum() < 0.7
    assert torch.equal(out[..., :keys] != 0, kept)
    assert torch.equal(grad_v[..., :queries].mT != 0, kept)
    torch.testing.assert_close(out[..., :keys], grad_v[..., :queries].mT, rtol=1e-13, atol=0)


@on_every_device
@pytest.mark.parametrize("causal", (False, True), ids=("all", "causal"))
@pytest.mark.parametrize("tiling", TILINGS)
def test_grad_q_and_grad_k_show_what_is_kept(device: str, tiling: str, causal: bool) -> None:
    """With unit vectors as q and k, their gradients are the matrix of the scores' gradients and its transpose.

    Where dO V^T is 1 everywhere, that is `weight * (keep - share kept in the row) / (1 - p)`: positive just where the
    weight is kept, except in rows that keep all.
    """
    *heads, queries, keys = SHAPE
    q, k = unit_rows(heads, queries, 40, device), unit_rows(heads, keys, 40, device)
    v, grad = torch.ones_like(k), torch.full((*heads, queries, 40), 1 / 40, dtype=torch.float64, device=device)
    kept, pairs = kept_of_call(q, k, v, causal)
    with override(TILINGS[tiling]):
        _, grad_q, grad_k, _ = attend(q, k, v, grad, causal)
    judged = (kept != pairs).any(dim=3)
    assert judged.float().mean() > 0.9
    assert torch.equal((grad_q[..., :keys] > 0)[judged], kept[judged])
    assert torch.equal((grad_k[..., :queries].mT > 0)[judged], kept[judged])


@on_every_device
@pytest.mark.parametrize("p", (0.05, 0.5, 0.9))
def test_the_output_keeps_its_mean(device: str, p: float) -> None:
    """Uniform weights over values of 1 give 1 on average, within five standard deviations."""
    q, v = torch.zeros(2, 2, 64, 1, device=device), torch.ones(2, 2, 128, 1, device=device)
    torch.manual_seed(17)
    tile = Tile(64, 64, 4, 1)
    with override(Tiles(tile, tile, tile)):
        out = flash_attention(q, v, v, dropout_p=p, backend="triton")
    deviation = math.sqrt(p / (1 - p) / (2 * 2 * 64 * 128))
    assert abs(out.double().mean().item() - 1) < 5 * deviation
    assert out.unique().numel() > 10
