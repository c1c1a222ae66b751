"""Packed sequences as one call of `flash_attention`: a mask lets each see itself alone, a bias is its ALiBi."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flash_attend.dropout import keep_mask
from flash_attend.spec import AttentionSpec

__all__ = ["whole_call"]


def whole_call(
    lengths: Iterable[tuple[int, int]],
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> dict[str, Any]:
    """The options `mask`, `bias`, `dropout_p` and `keep` of one call for `q (1, h, t, d)` and `k (1, hk, tk, d)`, whose
    sequences have so many queries and keys each, under these options of a packed call."""
    (_, heads, queries, dim), (_, kv_heads, keys, _), device = q.shape, k.shape, q.device
    mask = torch.zeros(1, 1, queries, keys, dtype=torch.bool, device=device)
    bias = None if alibi_slopes is None else torch.zeros(1, heads, queries, keys, dtype=torch.float64, device=device)
    keep = None if seed is None else torch.ones(1, heads, queries, keys, dtype=torch.bool, device=device)
    first_query = first_key = 0
    for number, (i, j) in enumerate(lengths):
        here = (0, slice(None), slice(first_query, first_query + i), slice(first_key, first_key + j))
        ahead = torch.arange(j, device=device) - torch.arange(i, device=device)[:, None] - (j - i)
        left, right = window or (None, None)
        right = 0 if causal else right
        shown = torch.ones_like(ahead, dtype=torch.bool) if left is None else ahead >= -left
        mask[here] = shown if right is None else shown & (ahead <= right)
        if bias is not None and alibi_slopes is not None:
            slopes = alibi_slopes if alibi_slopes.ndim == 1 else alibi_slopes[number % alibi_slopes.shape[0]]
            bias[here] = -slopes.double()[:, None, None] * ahead.abs()
        if keep is not None and seed is not None:
            dims = heads, kv_heads, i, j, dim, dim, torch.float32
            keep[here] = keep_mask(seed, AttentionSpec(number + 1, *dims, dropout_p=dropout_p), 0, i)[-1]
        first_query, first_key = first_query + i, first_key + j
    return dict(mask=mask, bias=bias, dropout_p=dropout_p, keep=keep)
