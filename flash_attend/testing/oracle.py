"""What attention is, in float64 and without a thought for speed: the judge of every backend.

Nothing here comes from `flash_attend`. Every pair of a query and a key is written down, visible or not, by comparing
indices; the softmax is computed over the rows that see something and over no other; a key that nobody sees is zeroed
before it meets anything. Gradients are autograd's, through these few lines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Answer", "attention_oracle", "visible_pairs"]


@dataclass(frozen=True)
class Answer:
    """One attention call and its backward: what a backend returned, or what it should have returned."""

    out: Tensor  # (b, h, i, dv)
    lse: Tensor  # (b, h, i)
    dq: Tensor | None
    dk: Tensor | None  # in the shape that k came in, 3-D or 4-D
    dv: Tensor | None


def visible_pairs(
    batch: int, heads: int, queries: int, keys: int, mask: Tensor | None, causal: bool, device: torch.device
) -> Tensor:
    """Who may see whom: bool `(b, h, i, j)`, materialised."""
    pairs = torch.ones(batch, heads, queries, keys, dtype=torch.bool, device=device)
    if mask is not None:
        pairs = pairs & (mask[:, None, None, :] if mask.ndim == 2 else mask)
    if causal:
        positions_q = torch.arange(queries, device=device).view(-1, 1) + (keys - queries)
        positions_k = torch.arange(keys, device=device).view(1, -1)
        pairs = pairs & (positions_k <= positions_q)
    return pairs


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> Answer:
    """Attention of `q (b, h, i, d)`, `k (b, [hk,] j, d)`, `v (b, [hk,] j, dv)` in float64, with its gradients.

    `keep (b, h, i, j)` says which weights dropout keeps; it is needed where `dropout_p > 0`. The gradients are those of
    `sum(out * grad_out) + sum(lse * grad_lse)`, where a missing term is left out; without both they are None.
    """
    wants_gradients = grad_out is not None or grad_lse is not None
    leaves = [x.detach().double().clone().requires_grad_(wants_gradients) for x in (q, k, v)]
    q64, k64, v64 = leaves
    k64, v64 = (x.unsqueeze(1) if x.ndim == 3 else x for x in (k64, v64))
    batch, heads, queries, head_dim = q64.shape
    kv_heads, keys = k64.shape[1:3]
    group = heads // max(kv_heads, 1)
    scale = head_dim**-0.5 if scale is None else scale

    pairs = visible_pairs(batch, heads, queries, keys, mask, causal, q.device)
    alive = pairs.any(dim=3)  # (b, h, i): the queries that see a key
    seen = pairs.view(batch, kv_heads, group, queries, keys).any(dim=3).any(dim=2)  # (b, hk, j): keys that a query sees
    q64 = torch.where(alive.unsqueeze(3), q64, 0.0)
    k64, v64 = (torch.where(seen.unsqueeze(3), x, 0.0) for x in (k64, v64))

    reads = torch.arange(heads, device=q.device) // max(group, 1)  # the kv head of every query head
    k64, v64 = k64[:, reads], v64[:, reads]
    scores = torch.einsum("bhid,bhjd->bhij", q64, k64) * scale
    rows = scores[alive].masked_fill(~pairs[alive], -torch.inf)  # (rows that are alive, j)
    rows_lse = rows.logsumexp(dim=1)
    # Where all that a row sees is -inf its weights are NaN, as a softmax of -inf alone is: those that it sees.
    rows_weights = (rows - rows_lse.unsqueeze(1)).exp().masked_fill(~pairs[alive], 0.0)
    if dropout_p > 0:
        assert keep is not None
        rows_weights = rows_weights * keep[alive] / (1 - dropout_p)
    weights = torch.zeros_like(scores).masked_scatter(alive.unsqueeze(3).expand_as(scores), rows_weights)
    out = torch.einsum("bhij,bhje->bhie", weights, v64)
    lse = scores.new_full((batch, heads, queries), -torch.inf).masked_scatter(alive, rows_lse)

    if not wants_gradients:
        return Answer(out, lse, None, None, None)
    # A dead row takes no part: whatever came down to it, NaN too, goes no further.
    loss = out.new_zeros(())
    if grad_out is not None:
        loss = loss + (out[alive] * grad_out[alive].double()).sum()
    if grad_lse is not None:
        loss = loss + (rows_lse * grad_lse[alive].double()).sum()
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
    return Answer(out.detach(), lse.detach(), *gradients)
