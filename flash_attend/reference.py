"""The einsum path: the definition of what every backend computes, and the fallback where no kernel serves.

Dimension letters as in `spec.py`; `g` is the number of query heads that read one key/value head, `h = hk * g`.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from flash_attend.dropout import keep_mask
from flash_attend.operands import Operands
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.tracing import has_autocast, readable, transformed
from flash_attend.visible import contract, pairs

__all__ = ["attention_reference", "attention_reference_gradients", "bounded", "cleared", "visible_pairs"]

# Sizes in score elements, b * h * i * j. The work goes by chunks of queries: under `causal` a chunk leaves out the keys
# that none of its queries sees, and a CPU's allocator reuses arrays of 16 MB, where larger ones cost new pages.
CACHED_SCORES = 2**22
# Beyond this many, the weights are not kept for the backward: each chunk computes them again. The chunks are then of
# this size: 128 MB an array in float32, of which a backward holds four, and six with the LSE.
HELD_SCORES = 2**25
# A chunk has at least so many queries, because each one passes over all of k and v and of their gradients.
FEWEST_QUERIES = 64


def attention_reference(operands: Operands, spec: AttentionSpec, *, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Attention as the contract has it, differentiable any number of times.

    Returns:
        `out (b, h, i, dv)` in q's dtype, and `lse (b, h, i)` in `spec.accumulator_dtype`, natural log; None unless
        `return_lse`.
    """
    chunks, recompute = _chunks(spec)
    operands, hidden = _prepared(operands, spec, chunks)
    guarded = _needs_guard(spec, operands)

    attend = _attend
    # Transforms of torch.func refuse the hooks that a checkpoint works by: under them the weights are held after all.
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands[:3])
    if recompute and differentiated and not transformed():
        attend = functools.partial(checkpoint, _attend, use_reentrant=False, preserve_rng_state=False)
    with _no_autocast(operands.q.device):
        parts = [attend(operands, hidden, spec, guarded, first, last, return_lse) for first, last in chunks]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    if not return_lse:
        return out.to(spec.dtype), None
    out, lse = out[..., : spec.value_dim], out[..., spec.value_dim]
    return out.to(spec.dtype).contiguous(), lse


def attention_reference_gradients(
    grad_out: Tensor | None, grad_lse: Tensor | None, operands: Operands, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward through `attention_reference` gives for q, k and v, itself differentiable any number of times.

    From `grad_out (b, h, i, dv)` and `grad_lse (b, h, i)`, where None counts as 0. A chunk at a time: nothing of the
    forward is held.
    """
    q = operands.q
    if grad_out is None:
        grad_out = q.new_zeros(spec.batch, spec.heads, spec.queries, spec.value_dim)
    if grad_lse is None:
        grad_lse = q.new_zeros(spec.batch, spec.heads, spec.queries, dtype=spec.accumulator_dtype)
    chunks, _ = _chunks(spec)
    operands, hidden = _prepared(operands, spec, chunks)
    grad_out, (dead, unread) = grad_out.to(spec.accumulator_dtype), hidden
    if dead is not None:
        grad_out, grad_lse = grad_out.masked_fill(dead, 0.0), grad_lse.masked_fill(dead[..., 0], 0.0)
    guarded = _needs_guard(spec, operands, grad_out, grad_lse)

    grads_q, grad_k, grad_v = [], torch.zeros_like(operands.k), torch.zeros_like(operands.v)
    with _no_autocast(q.device):
        for first, last in chunks:
            of_q, of_k, of_v = _differentiate(grad_out, grad_lse, operands, hidden, spec, guarded, first, last)
            rest = (0, 0, 0, spec.keys - of_k.shape[2])  # the keys that no query of the chunk sees
            grads_q.append(of_q)
            grad_k, grad_v = grad_k + pad(of_k, rest), grad_v + pad(of_v, rest)
    grad_q = torch.cat(grads_q, dim=2)
    if dead is not None:
        grad_q = grad_q.masked_fill(dead, 0.0)
    if unread is not None:
        grad_k, grad_v = grad_k.masked_fill(unread, 0.0), grad_v.masked_fill(unread, 0.0)
    return grad_q.to(spec.dtype), grad_k.to(spec.dtype), grad_v.to(spec.dtype)


def _chunks(spec: AttentionSpec) -> tuple[list[tuple[int, int]], bool]:
    """The ranges of queries that are computed at once, and whether there are too many scores to hold them all."""
    scores_per_query = max(1, spec.batch * spec.heads * spec.keys)
    too_many = scores_per_query * spec.queries > HELD_SCORES
    rows = max(FEWEST_QUERIES, (HELD_SCORES if too_many else CACHED_SCORES) // scores_per_query)
    return [(first, min(first + rows, spec.queries)) for first in range(0, max(1, spec.queries), rows)], too_many


class _Hidden(NamedTuple):
    """What takes no part at all, or None where there is nothing of the kind."""

    rows: Tensor | None  # (b|1, h|1, i|1, 1): the queries that see no key
    keys: Tensor | None  # (b|1, hk|1, j, 1): the keys that no query sees


def _prepared(operands: Operands, spec: AttentionSpec, chunks: list[tuple[int, int]]) -> tuple[Operands, _Hidden]:
    """q, k and v in the accumulator's dtype, cleared where they take no part."""
    operands, hidden = cleared(operands, spec, chunks)
    q, k, v = (tensor.to(spec.accumulator_dtype) for tensor in operands[:3])
    return operands._replace(q=q, k=k, v=v), hidden


def cleared(
    operands: Operands, spec: AttentionSpec, chunks: list[tuple[int, int]] | None = None
) -> tuple[Operands, _Hidden]:
    """The operands with zeros where they take no part: whatever stands there reaches no product, and changes no bit.
    With them, where that is. `chunks` are the ranges of queries whose visible pairs are looked at together."""
    q, k, v, mask, *_ = operands
    chunks = _chunks(spec)[0] if chunks is None else chunks
    hidden = _Hidden(_dead_rows(mask, spec, chunks, q.device), _unread_keys(mask, spec, chunks))
    if hidden.rows is not None:
        q = q.masked_fill(hidden.rows, 0.0)
    if hidden.keys is not None:
        k, v = k.masked_fill(hidden.keys, 0.0), v.masked_fill(hidden.keys, 0.0)
    return operands._replace(q=q, k=k, v=v), hidden


def _needs_guard(spec: AttentionSpec, operands: Operands, *grads: Tensor) -> bool:
    """Whether what a hidden pair holds could show.

    On a CPU a look at the tensors says so. Elsewhere, and where there are no values to look at, every call that hides
    pairs of keys and queries which others see is guarded.
    """
    partly_hidden = (
        (spec.causal and spec.queries > 1)
        or spec.mask == MaskKind.DENSE
        or (spec.mask == MaskKind.KEY and spec.mask_per_head and spec.group > 1)
    )
    if not partly_hidden or not readable(*operands[:3], *grads):
        return partly_hidden
    return not bounded(spec, *operands[:3], *grads)


def bounded(spec: AttentionSpec, q: Tensor, k: Tensor, *others: Tensor) -> bool:
    """Whether the tensors are without NaN and infinity, and so small that no score can be infinite. Reads them."""
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(tensor, dtype=spec.accumulator_dtype) for tensor in (q, k, *others)]
        largest = norms[0] * norms[1] * abs(spec.scale) + sum(norms)
    return largest.item() < torch.finfo(spec.accumulator_dtype).max / 4  # a NaN is not less


def _attend(
    operands: Operands, hidden: _Hidden, spec: AttentionSpec, guarded: bool, first: int, last: int, return_lse: bool
) -> Tensor:
    """Attention of the queries from `first` to `last` (exclusive), all in the accumulator dtype: `(b, h, i, dv)`.

    With `return_lse` the LSE is one more column. It comes in one tensor with the output so that a backward runs through
    both: what a chunk computes again for one that nobody differentiates would stay, and add up over the chunks.
    """
    scores, visible, dead = _scores(operands, hidden, spec, guarded, first, last)
    keys = scores.shape[-1]

    weights = scores.softmax(dim=-1)
    if spec.dropout_p > 0:
        assert operands.seed is not None
        weights = weights * keep_mask(operands.seed, spec, first, last, keys)
    out = _weighted(weights, operands.v[:, :, :keys], visible)
    if spec.dropout_p > 0:
        out = out / (1 - spec.dropout_p)

    if dead is not None:
        out = out.masked_fill(dead, 0.0)
    if not return_lse:
        return out
    lse = scores.logsumexp(dim=-1, keepdim=True)
    if dead is not None:
        lse = lse.masked_fill(dead, -torch.inf)
    return torch.cat([out, lse], dim=-1)


def _differentiate(
    grad_out: Tensor,
    grad_lse: Tensor,
    operands: Operands,
    hidden: _Hidden,
    spec: AttentionSpec,
    guarded: bool,
    first: int,
    last: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the queries from `first` to `last` give to the gradients: their own, and those of the keys they may see."""
    scores, visible, _ = _scores(operands, hidden, spec, guarded, first, last)
    keys = scores.shape[-1]
    q, k, v = operands.q[:, :, first:last] * spec.scale, operands.k[:, :, :keys], operands.v[:, :, :keys]
    grad_out, grad_lse = grad_out[:, :, first:last], grad_lse[:, :, first:last, None]

    weights = kept_weights = scores.softmax(dim=-1)
    grad_weights = _products(grad_out, v, visible)
    if spec.dropout_p > 0:
        assert operands.seed is not None
        factor = keep_mask(operands.seed, spec, first, last, keys).to(weights.dtype) / (1 - spec.dropout_p)
        kept_weights, grad_weights = weights * factor, grad_weights * factor
    delta = (weights * grad_weights).sum(dim=-1, keepdim=True) - grad_lse
    grad_scores = weights * (grad_weights - delta)

    grad_q = _weighted(grad_scores, k, visible) * spec.scale
    grad_k = _gathered(grad_scores, q, visible, spec.kv_heads)
    return grad_q, grad_k, _gathered(kept_weights, grad_out, visible, spec.kv_heads)


def _scores(
    operands: Operands, hidden: _Hidden, spec: AttentionSpec, guarded: bool, first: int, last: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The scores `(b, h, i, j)` of the queries from `first` to `last` with the keys that any of them may see.

    They are -inf where a pair is hidden, and 0 in dead rows: of -inf alone a softmax makes NaN, which a gradient of
    zero would carry on into the keys. With them come the visible pairs, `(b, hk, g i, j)` or what broadcasts to it,
    where they are guarded, and the dead rows of the chunk.
    """
    keys = min(max(last + spec.offset, 0), spec.keys) if spec.causal else spec.keys
    q, k = operands.q[:, :, first:last] * spec.scale, operands.k[:, :, :keys]
    visible, dead = visible_pairs(operands.mask, spec, first, last, keys, q.device), hidden.rows
    if dead is not None and dead.shape[2] > 1:
        dead = dead[:, :, first:last]
    if visible is None:
        return _products(q, k), None, dead
    shown = visible if dead is None else visible | dead
    if not guarded:
        # 1 - 1 / shown, 0 or -inf: finite scores are hidden by a sum in a third of the time that a choice takes a CPU.
        return _products(q, k) - shown.to(q.dtype).reciprocal().sub(1), None, dead
    if spec.group > 1:
        visible = _grouped(visible.expand(*q.shape[:3], keys), spec.kv_heads)
    return torch.where(shown, _products(q, k, visible), -torch.inf), visible, dead


# Products of query heads with the key/value heads that they read. Where `visible`, `(b, hk, g i, j)`, says which pairs
# to take, the others are left out whatever they hold.


def _products(x: Tensor, y: Tensor, visible: Tensor | None = None) -> Tensor:
    """`(b, h, i, c), (b, hk, j, c) -> (b, h, i, j)`: each row of x with each of y."""
    grouped = _grouped(x, y.shape[1])
    found = grouped @ y.mT if visible is None else pairs(grouped, y, visible)
    return found.view(*x.shape[:3], y.shape[2])


def _weighted(weights: Tensor, y: Tensor, visible: Tensor | None) -> Tensor:
    """`(b, h, i, j), (b, hk, j, c) -> (b, h, i, c)`: the sums of y's rows by their weights."""
    grouped = _grouped(weights, y.shape[1])
    found = grouped @ y if visible is None else contract(grouped, y, visible)
    return found.view(*weights.shape[:3], y.shape[3])


def _gathered(weights: Tensor, x: Tensor, visible: Tensor | None, kv_heads: int) -> Tensor:
    """`(b, h, i, j), (b, h, i, c) -> (b, hk, j, c)`: the sums over the queries, and over the heads of a group."""
    weights, x = _grouped(weights, kv_heads).mT, _grouped(x, kv_heads)
    return weights @ x if visible is None else contract(weights, x, visible.mT)


def _grouped(tensor: Tensor, kv_heads: int) -> Tensor:
    """`(b, h, i, c) -> (b, hk, g i, c)`: what reads one key/value head, as one matrix."""
    batch, heads, rows, width = tensor.shape
    return tensor if heads == kv_heads else tensor.reshape(batch, kv_heads, heads // kv_heads * rows, width)


def visible_pairs(
    mask: Tensor | None, spec: AttentionSpec, first: int, last: int, keys: int, device: torch.device
) -> Tensor | None:
    """Which of the first `keys` keys each query sees, bool `(b|1, h|1, i|1, keys)`; None where it is all of them."""
    if mask is not None:
        mask = (mask if mask.shape[2] == 1 else mask[:, :, first:last])[..., :keys]
    if not spec.causal or keys <= first + spec.offset + 1:
        return mask
    query = torch.arange(first, last, device=device)
    causal = torch.arange(keys, device=device) <= query[:, None] + spec.offset
    return causal[None, None] if mask is None else mask & causal


def _dead_rows(
    mask: Tensor | None, spec: AttentionSpec, chunks: list[tuple[int, int]], device: torch.device
) -> Tensor | None:
    """The queries that see no key, bool `(b|1, h|1, i|1, 1)`; None where there can be none."""
    if mask is not None and mask.shape[2] != 1:
        seen = [visible_pairs(mask, spec, *chunk, spec.keys, device) for chunk in chunks]
        return ~torch.cat([part.any(dim=-1, keepdim=True) for part in seen if part is not None], dim=2)
    if mask is None:
        dead = torch.arange(spec.queries, device=device) < -spec.offset
        return dead[None, None, :, None] if spec.causal and spec.offset < 0 else None
    if not spec.causal:
        return ~mask.any(dim=-1, keepdim=True)
    # A query sees a key once it is as far on as the first that the mask shows; max of a bool is "any so far".
    so_far = pad(mask.to(torch.uint8).cummax(dim=-1).values, (1, 0))
    position = torch.arange(spec.queries, device=device) + spec.offset + 1
    return (so_far[:, :, 0, position.clamp(min=0)] == 0)[..., None]


def _unread_keys(mask: Tensor | None, spec: AttentionSpec, chunks: list[tuple[int, int]]) -> Tensor | None:
    """The keys that no query sees, bool `(b|1, hk|1, j, 1)`; None without a mask."""
    if mask is None:
        return None
    if mask.shape[2] == 1:
        read = mask[:, :, 0]  # under `causal` too: the last query sees every key that the mask leaves
    else:
        seen = (visible_pairs(mask, spec, *chunk, spec.keys, mask.device) for chunk in chunks)
        read = functools.reduce(torch.logical_or, (part.any(dim=2) for part in seen if part is not None))
    if read.shape[1] > 1:
        read = reduce(read, "b (hk g) j -> b hk j", "any", hk=spec.kv_heads, g=spec.group)
    return ~read[..., None]


def _no_autocast(device: torch.device) -> torch.autocast | nullcontext:
    """Autocast would take the products to half precision, whatever dtype the call asked for."""
    if has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
