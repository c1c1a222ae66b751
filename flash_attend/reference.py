"""The einsum path: the definition of what every backend computes, and the fallback where no kernel serves.

Dimension letters as in `spec.py`; `g` is the number of query heads that read one key/value head, `h = hk * g`.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from flash_attend.dropout import keep_mask
from flash_attend.operands import Operands
from flash_attend.spec import AttentionSpec
from flash_attend.tracing import transformed

__all__ = ["attention_reference", "attention_reference_gradients"]

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
    q, k, v, mask, seed = operands
    chunks, recompute = _chunks(spec)
    if mask is not None:  # whatever an unread key holds, it must not reach a product
        unread = _unread_keys(mask, spec, chunks)
        k, v = k.masked_fill(unread, 0.0), v.masked_fill(unread, 0.0)
    q, k, v = (tensor.to(spec.accumulator_dtype) for tensor in (q, k, v))

    attend = _attend
    # Transforms of torch.func refuse the hooks that a checkpoint works by: under them the weights are held after all.
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    if recompute and differentiated and not transformed():
        attend = functools.partial(checkpoint, _attend, use_reentrant=False, preserve_rng_state=False)
    with _no_autocast(q.device):
        parts = [attend(q, k, v, mask, seed, spec, first, last, return_lse) for first, last in chunks]
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
    q, k, v, mask, seed = operands
    if grad_out is None:
        grad_out = q.new_zeros(spec.batch, spec.heads, spec.queries, spec.value_dim)
    if grad_lse is None:
        grad_lse = q.new_zeros(spec.batch, spec.heads, spec.queries, dtype=spec.accumulator_dtype)
    chunks, _ = _chunks(spec)
    if mask is not None:
        unread = _unread_keys(mask, spec, chunks)
        k, v = k.masked_fill(unread, 0.0), v.masked_fill(unread, 0.0)
    q, k, v, grad_out = (tensor.to(spec.accumulator_dtype) for tensor in (q, k, v, grad_out))

    grads_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
    with _no_autocast(q.device):
        for first, last in chunks:
            of_q, of_k, of_v = _differentiate(grad_out, grad_lse, q, k, v, mask, seed, spec, first, last)
            rest = (0, 0, 0, spec.keys - of_k.shape[2])  # the keys that no query of the chunk sees
            grads_q.append(of_q)
            grad_k, grad_v = grad_k + pad(of_k, rest), grad_v + pad(of_v, rest)
    if mask is not None:
        grad_k, grad_v = grad_k.masked_fill(unread, 0.0), grad_v.masked_fill(unread, 0.0)
    return torch.cat(grads_q, dim=2).to(spec.dtype), grad_k.to(spec.dtype), grad_v.to(spec.dtype)


def _chunks(spec: AttentionSpec) -> tuple[list[tuple[int, int]], bool]:
    """The ranges of queries that are computed at once, and whether there are too many scores to hold them all."""
    scores_per_query = max(1, spec.batch * spec.heads * spec.keys)
    too_many = scores_per_query * spec.queries > HELD_SCORES
    rows = max(FEWEST_QUERIES, (HELD_SCORES if too_many else CACHED_SCORES) // scores_per_query)
    return [(first, min(first + rows, spec.queries)) for first in range(0, max(1, spec.queries), rows)], too_many


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    first: int,
    last: int,
    return_lse: bool,
) -> Tensor:
    """Attention of the queries from `first` to `last` (exclusive), all in the accumulator dtype: `(b, h, i, dv)`.

    With `return_lse` the LSE is one more column. It comes in one tensor with the output so that a backward runs through
    both: what a chunk computes again for one that nobody differentiates would stay, and add up over the chunks.
    """
    scores, dead = _scores(q, k, mask, spec, first, last)
    v = v[:, :, : scores.shape[-1]]

    weights = scores.softmax(dim=-1)
    if spec.dropout_p > 0:
        assert seed is not None
        weights = weights * keep_mask(seed, spec, first, last, scores.shape[-1])
    out = _ungrouped(einsum(_grouped(weights, spec), v, "b hk g i j, b hk j dv -> b hk g i dv"))
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    first: int,
    last: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the queries from `first` to `last` give to the gradients: their own, and those of the keys they may see."""
    scores, dead = _scores(q, k, mask, spec, first, last)
    keys = scores.shape[-1]
    q, k, v = q[:, :, first:last] * spec.scale, k[:, :, :keys], v[:, :, :keys]
    grad_out, grad_lse = grad_out[:, :, first:last], grad_lse[:, :, first:last, None]
    if dead is not None:
        q, grad_out, grad_lse = (tensor.masked_fill(dead, 0.0) for tensor in (q, grad_out, grad_lse))
    q, grad_out = _grouped(q, spec), _grouped(grad_out, spec)

    weights = kept_weights = scores.softmax(dim=-1)
    grad_weights = _ungrouped(einsum(grad_out, v, "b hk g i dv, b hk j dv -> b hk g i j"))
    if spec.dropout_p > 0:
        assert seed is not None
        factor = keep_mask(seed, spec, first, last, keys).to(weights.dtype) / (1 - spec.dropout_p)
        kept_weights, grad_weights = weights * factor, grad_weights * factor
    delta = (weights * grad_weights).sum(dim=-1, keepdim=True) - grad_lse
    grad_scores = _grouped(weights * (grad_weights - delta), spec)

    grad_q = _ungrouped(einsum(grad_scores, k, "b hk g i j, b hk j d -> b hk g i d")) * spec.scale
    if dead is not None:
        grad_q = grad_q.masked_fill(dead, 0.0)
    grad_k = einsum(grad_scores, q, "b hk g i j, b hk g i d -> b hk j d")
    grad_v = einsum(_grouped(kept_weights, spec), grad_out, "b hk g i j, b hk g i dv -> b hk j dv")
    return grad_q, grad_k, grad_v


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, spec: AttentionSpec, first: int, last: int
) -> tuple[Tensor, Tensor | None]:
    """The scores `(b, h, i, j)` of the queries from `first` to `last` with the keys that any of them may see, and which
    rows are dead, `(b|1, h|1, i|1, 1)`, or None where none can be."""
    keys = min(max(last + spec.offset, 0), spec.keys) if spec.causal else spec.keys
    q, k = q[:, :, first:last] * spec.scale, k[:, :, :keys]

    visible, dead = _visible(mask, spec, first, last, keys, q.device), None
    if visible is not None and (mask is not None or first + spec.offset < 0):
        dead = ~visible.any(dim=-1, keepdim=True)
        q = q.masked_fill(dead, 0.0)

    scores = _ungrouped(einsum(_grouped(q, spec), k, "b hk g i d, b hk j d -> b hk g i j"))
    if visible is not None:
        # Added and not filled in: that is several times faster on a CPU. Finite and not -inf: in a dead row it makes no
        # NaN, which a gradient of zero would carry on into the keys.
        scores = scores + (~visible).to(scores.dtype) * torch.finfo(scores.dtype).min
    return scores, dead


def _grouped(tensor: Tensor, spec: AttentionSpec) -> Tensor:
    return rearrange(tensor, "b (hk g) i x -> b hk g i x", hk=spec.kv_heads, g=spec.group)


def _ungrouped(tensor: Tensor) -> Tensor:
    return rearrange(tensor, "b hk g i x -> b (hk g) i x")


def _visible(
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


def _unread_keys(mask: Tensor, spec: AttentionSpec, chunks: list[tuple[int, int]]) -> Tensor:
    """The keys that no query sees, bool `(b|1, hk|1, j, 1)`."""
    if mask.shape[2] == 1:
        read = mask[:, :, 0]  # under `causal` too: the last query sees every key that the mask leaves
    else:
        seen = (_visible(mask, spec, *chunk, spec.keys, mask.device) for chunk in chunks)
        read = functools.reduce(torch.logical_or, (part.any(dim=2) for part in seen if part is not None))
    if read.shape[1] > 1:
        read = reduce(read, "b (hk g) j -> b hk j", "any", hk=spec.kv_heads, g=spec.group)
    return ~read[..., None]


def _no_autocast(device: torch.device) -> torch.autocast | nullcontext:
    """Autocast would take the products to half precision, whatever dtype the call asked for."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
