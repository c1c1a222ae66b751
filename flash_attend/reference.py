"""The einsum path: the definition of what every backend computes, and the fallback where no kernel serves.

Dimension letters as in `spec.py`; `g` is the number of query heads that read one key/value head, `h = hk * g`.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_attend.dropout import keep_mask
from flash_attend.spec import AttentionSpec

__all__ = ["attention_reference"]

# Sizes in score elements, b * h * i * j. The work goes by chunks of queries: under `causal` a chunk leaves out the keys
# that none of its queries sees, and a CPU's allocator reuses arrays of 16 MB, where larger ones cost new pages.
CACHED_SCORES = 2**22
# Beyond this many, the weights are not kept for the backward: each chunk computes them again. The chunks are then of
# this size: 128 MB an array in float32, of which a backward holds four, and six with the LSE.
HELD_SCORES = 2**25
# A chunk has at least so many queries, because each one passes over all of k and v and of their gradients.
FEWEST_QUERIES = 64


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention as the contract has it, differentiable any number of times.

    Args:
        q, k, v, mask, spec: as `normalise_inputs` returns them: `(b, h, i, d)`, `(b, hk, j, d)`, `(b, hk, j, dv)` and
            `(b|1, h|1, i|1, j)` or None.
        seed: int64 `(1,)` from `draw_seed`; read only where `spec.dropout_p > 0`.
        return_lse: compute the LSE too.

    Returns:
        `out (b, h, i, dv)` in q's dtype, and `lse (b, h, i)` in `spec.accumulator_dtype`, natural log, or None.
    """
    scores_per_query = max(1, spec.batch * spec.heads * spec.keys)
    recompute = scores_per_query * spec.queries > HELD_SCORES
    rows = max(FEWEST_QUERIES, (HELD_SCORES if recompute else CACHED_SCORES) // scores_per_query)
    chunks = [(first, min(first + rows, spec.queries)) for first in range(0, max(1, spec.queries), rows)]

    if mask is not None:  # whatever an unread key holds, it must not reach a product
        unread = _unread_keys(mask, spec, chunks)[..., None]
        k, v = k.masked_fill(unread, 0.0), v.masked_fill(unread, 0.0)
    q, k, v = (tensor.to(spec.accumulator_dtype) for tensor in (q, k, v))

    attend = _attend
    # Transforms of torch.func refuse the hooks that a checkpoint works by: under them the weights are held after all.
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    if recompute and differentiated and not torch._C._are_functorch_transforms_active():
        attend = functools.partial(checkpoint, _attend, use_reentrant=False, preserve_rng_state=False)
    with _no_autocast(q.device):
        parts = [attend(q, k, v, mask, seed, spec, first, last, return_lse) for first, last in chunks]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    if not return_lse:
        return out.to(spec.dtype), None
    out, lse = out.split([spec.value_dim, 1], dim=-1)
    return out.to(spec.dtype).contiguous(), lse.squeeze(-1)


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
    keys = min(max(last + spec.offset, 0), spec.keys) if spec.causal else spec.keys
    q, k, v = q[:, :, first:last] * spec.scale, k[:, :, :keys], v[:, :, :keys]

    visible = _visible(mask, spec, first, last, keys, q.device)
    rows_may_die = mask is not None or (spec.causal and first + spec.offset < 0)
    if rows_may_die:
        dead = ~visible.any(dim=-1, keepdim=True)  # (b|1, h|1, i|1, 1)
        q = q.masked_fill(dead, 0.0)

    q = rearrange(q, "b (hk g) i d -> b hk g i d", hk=spec.kv_heads, g=spec.group)
    scores = einsum(q, k, "b hk g i d, b hk j d -> b hk g i j")
    scores = rearrange(scores, "b hk g i j -> b (hk g) i j")
    if visible is not None:
        # Added and not filled in: that is several times faster on a CPU. Finite and not -inf: in a dead row it makes no
        # NaN, which a gradient of zero would carry on into the keys.
        scores = scores + (~visible).to(scores.dtype) * torch.finfo(scores.dtype).min

    weights = scores.softmax(dim=-1)
    if spec.dropout_p > 0:
        weights = weights * keep_mask(seed, spec, first, last, keys)

    weights = rearrange(weights, "b (hk g) i j -> b hk g i j", hk=spec.kv_heads, g=spec.group)
    out = einsum(weights, v, "b hk g i j, b hk j dv -> b hk g i dv")
    out = rearrange(out, "b hk g i dv -> b (hk g) i dv")
    if spec.dropout_p > 0:
        out = out / (1 - spec.dropout_p)

    if rows_may_die:
        out = out.masked_fill(dead, 0.0)
    if not return_lse:
        return out
    lse = scores.logsumexp(dim=-1, keepdim=True)
    if rows_may_die:
        lse = lse.masked_fill(dead, -torch.inf)
    return torch.cat([out, lse], dim=-1)


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
    """The keys that no query sees, bool `(b|1, hk|1, j)`."""
    if mask.shape[2] == 1:
        read = mask[:, :, 0]  # under `causal` too: the last query sees every key that the mask leaves
    else:
        seen = (_visible(mask, spec, *chunk, spec.keys, mask.device).any(dim=2) for chunk in chunks)
        read = functools.reduce(torch.logical_or, seen)
    if read.shape[1] > 1:
        read = reduce(read, "b (hk g) j -> b hk j", "any", hk=spec.kv_heads, g=spec.group)
    return ~read


def _no_autocast(device: torch.device) -> torch.autocast | nullcontext:
    """Autocast would take the products to half precision, whatever dtype the call asked for."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
