"""What attention is, in float64 and without a thought for speed: the judge of every backend.

Nothing here comes from `flash_attend`. Every pair of a query and a key is written down, visible or not, by comparing
indices; the softmax is computed over the rows that see something and over no other; a key that nobody sees is zeroed
before it meets anything. Gradients are autograd's, through these few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

__all__ = ["Answer", "attention_oracle", "changed_scores", "pushed_through", "visible_pairs"]


@dataclass(frozen=True)
class Answer:
    """One attention call and its backward: what a backend returned, or what it should have returned."""

    out: Tensor  # (b, h, i, dv)
    lse: Tensor  # (b, h, i)
    dq: Tensor | None
    dk: Tensor | None  # in the shape that k came in, 3-D or 4-D
    dv: Tensor | None
    dbias: Tensor | None = None  # in the shape that the bias came in
    dsinks: Tensor | None = None  # (h,)
    out_tangent: Tensor | None = None  # (b, h, i, dv), of tangents of the inputs
    lse_tangent: Tensor | None = None  # (b, h, i), 0 in dead rows


def visible_pairs(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    mask: Tensor | None,
    causal: bool,
    device: torch.device,
    *,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Who may see whom: bool `(b, h, i, j)`, materialised."""
    pairs = torch.ones(batch, heads, queries, keys, dtype=torch.bool, device=device)
    if mask is not None:
        pairs = pairs & (mask[:, None, None, :] if mask.ndim == 2 else mask)
    if bias is not None:
        pairs = pairs & (bias.detach() != -torch.inf)
    ahead = _ahead(queries, keys, device)
    left, right = window or (None, None)
    if causal:
        pairs = pairs & (ahead <= 0)
    if left is not None:
        pairs = pairs & (ahead >= -left)
    if right is not None:
        pairs = pairs & (ahead <= right)
    return pairs


def _ahead(queries: int, keys: int, device: torch.device) -> Tensor:
    """How far each key lies behind (positive) or before a query's own place, where the last ones meet: `(i, j)`."""
    return torch.arange(keys, device=device) - torch.arange(queries, device=device).view(-1, 1) - (keys - queries)


def changed_scores(
    products: Tensor, *, bias: Tensor | None, softcap: float | None, alibi_slopes: Tensor | None
) -> Tensor:
    """The scores `(b, h, i, j)` that become of products under the scale."""
    scores = products
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if alibi_slopes is not None:
        distance = _ahead(scores.shape[2], scores.shape[3], scores.device).abs()
        scores = scores - alibi_slopes.to(scores.dtype).view(-1, scores.shape[1], 1, 1) * distance
    return scores


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    tangents: Mapping[str, Tensor] | None = None,
) -> Answer:
    """Attention of `q (b, h, i, d)`, `k (b, [hk,] j, d)`, `v (b, [hk,] j, dv)` in float64, with its gradients.

    `keep (b, h, i, j)` says which weights dropout keeps; it is needed where `dropout_p > 0`. The gradients are those of
    `sum(out * grad_out) + sum(lse * grad_lse)`, where a missing term is left out; without both they are None. So are
    the tangents of out and LSE without `tangents`, which has those of q, k, v, the bias and the sinks that have one.
    """
    wants_gradients = grad_out is not None or grad_lse is not None
    given = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    leaves = {name: x.detach().double().clone() for name, x in given.items() if x is not None}
    (batch, heads, queries, _), keys = q.shape, k.shape[-2]
    pairs = visible_pairs(batch, heads, queries, keys, mask, causal, q.device, window=window, bias=bias)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    attend = partial(
        _attend, pairs=pairs, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p, keep=keep
    )
    pushed = {} if tangents is None else pushed_through(attend, leaves, tangents)
    for leaf in leaves.values():
        leaf.requires_grad_(wants_gradients)
    out, lse = attend(leaves)
    if not wants_gradients:
        return Answer(out, lse, None, None, None, **pushed)
    # A dead row takes no part: whatever came down to it, NaN too, goes no further.
    alive = pairs.any(dim=3)
    loss = out.new_zeros(())
    if grad_out is not None:
        loss = loss + (out[alive] * grad_out[alive].double()).sum()
    if grad_lse is not None:
        loss = loss + (lse[alive] * grad_lse[alive].double()).sum()
    found = torch.autograd.grad(loss, [*leaves.values()], materialize_grads=True, allow_unused=True)
    gradients = {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return Answer(out.detach(), lse.detach(), **gradients, **pushed)


def pushed_through(
    attend: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]],
    leaves: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The tangents of out and LSE as an `Answer` has them, by two derivatives backward: the first depends linearly on
    what comes down, and the second is by that. Forward mode, of which there is one in a process, may be on."""
    moved = {name: leaves[name].detach().requires_grad_() for name in tangents}
    with torch.enable_grad():
        outputs = attend({**leaves, **moved})
        down = [torch.zeros_like(x, requires_grad=True) for x in outputs]
        loss = torch.stack([(x * y).sum() for x, y in zip(outputs, down, strict=True)]).sum()
        pulled = torch.autograd.grad(loss, [*moved.values()], create_graph=True)
        pairs = zip(pulled, tangents.values(), strict=True)
        loss = torch.stack([(grad * tangent.to(grad.dtype)).sum() for grad, tangent in pairs]).sum()
    whole = torch.autograd.grad(loss, down, allow_unused=True, materialize_grads=True)
    return dict(zip(("out_tangent", "lse_tangent"), whole, strict=True))


def _attend(
    leaves: Mapping[str, Tensor],
    pairs: Tensor,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Out and LSE of operands in float64, by their names, of which those pairs are visible."""
    q64, k64, v64 = (leaves[name] for name in "qkv")
    k64, v64 = (x.unsqueeze(1) if x.ndim == 3 else x for x in (k64, v64))
    batch, heads, queries, _ = q64.shape
    kv_heads, keys = k64.shape[1:3]
    group = heads // max(kv_heads, 1)
    alive = pairs.any(dim=3)  # (b, h, i): the queries that see a key
    seen = pairs.view(batch, kv_heads, group, queries, keys).any(dim=3).any(dim=2)  # (b, hk, j): keys that a query sees
    q64 = torch.where(alive.unsqueeze(3), q64, 0.0)
    k64, v64 = (torch.where(seen.unsqueeze(3), x, 0.0) for x in (k64, v64))

    reads = torch.arange(heads, device=q64.device) // max(group, 1)  # the kv head of every query head
    k64, v64 = k64[:, reads], v64[:, reads]
    products = torch.einsum("bhid,bhjd->bhij", q64, k64) * scale
    scores = changed_scores(products, bias=leaves.get("bias"), softcap=softcap, alibi_slopes=alibi_slopes)
    rows = scores[alive].masked_fill(~pairs[alive], -torch.inf)  # (rows that are alive, j)
    if "sinks" not in leaves:
        rows_lse = rows.logsumexp(dim=1)
    else:
        own_sink = leaves["sinks"].view(1, heads, 1).expand(batch, heads, queries)[alive]
        rows_lse = torch.cat([rows, own_sink.unsqueeze(1)], dim=1).logsumexp(dim=1)
    # Where all that a row sees is -inf its weights are NaN, as a softmax of -inf alone is: those that it sees.
    rows_weights = (rows - rows_lse.unsqueeze(1)).exp().masked_fill(~pairs[alive], 0.0)
    if dropout_p > 0:
        assert keep is not None
        rows_weights = rows_weights * keep[alive] / (1 - dropout_p)
    weights = torch.zeros_like(scores).masked_scatter(alive.unsqueeze(3).expand_as(scores), rows_weights)
    out = torch.einsum("bhij,bhje->bhie", weights, v64)
    lse = scores.new_full((batch, heads, queries), -torch.inf).masked_scatter(alive, rows_lse)
    return out, lse
