"""Torch's own function, computed by ours: its signature, its shapes, its causality."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from flash_attend.checks import check_dense
from flash_attend.functional import flash_attention
from flash_attend.options import check_flag
from flash_attend.spec import Window

__all__ = ["scaled_dot_product_attention"]

_TENSORS = {"q": "query", "k": "key", "v": "value"}
_OTHERS = {"mask": "attn_mask", "bias": "attn_mask", "causal": "is_causal"}


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, computed by `flash_attention`.

    Args:
        query: `(..., h, i, d)`, of any rank from 2.
        key: `(..., hk, j, d)`; leading dimensions broadcast.
        value: `(..., hk, j, dv)`.
        attn_mask: broadcasts to `(..., h, i, j)`. Bool, True = may attend; or in query's dtype or float32, added to the
            scores, with a gradient of its own shape: where it is -inf the pair is hidden. One that varies over some of
            several leading dimensions is expanded over the others.
        dropout_p: probability in [0, 1) of dropping a weight, in training or not.
        is_causal: query `x` sees key `y` iff `y <= x`, aligned top-left, and the mask does not hide it (torch takes
            both on a CPU alone). `flash_attention` aligns bottom-right, as a cache needs it: there the last query sees
            the last key.
        scale: factor on the scores, default `d ** -0.5`.
        enable_gqa: query head `n` reads key head `n // (h // hk)`; without it `hk` is `h` or 1.
        backend: as in `flash_attention`.

    Returns:
        `(..., h, i, dv)`. A query that sees no key gives 0; torch's kernels give 0 or NaN.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched.
    """
    is_causal, enable_gqa = check_flag("is_causal", is_causal), check_flag("enable_gqa", enable_gqa)
    q, k, v = tensors = query, key, value
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        check_dense(name, tensor)
    shape = None
    if not (q.ndim == k.ndim == v.ndim == 4 and q.shape[0] == k.shape[0] == v.shape[0]) or not (
        enable_gqa or q.shape[1] == k.shape[1] == v.shape[1]
    ):
        shape, (q, k, v) = _with_four_dimensions(tensors, enable_gqa)
    if attn_mask is not None:
        attn_mask = _with_four_dimensions_as(attn_mask, shape)
    causal, window = False, None
    if is_causal:
        causal, window, k, v, attn_mask = _top_left(q, k, v, attn_mask)
    is_bias = attn_mask is not None and attn_mask.dtype != torch.bool
    try:
        out = flash_attention(
            q,
            k,
            v,
            mask=None if is_bias else attn_mask,
            bias=attn_mask if is_bias else None,
            causal=causal,
            window=window,
            scale=scale,
            dropout_p=dropout_p,
            backend=backend,
        )
    except (TypeError, ValueError) as error:
        raise type(error)(_in_torchs_words(str(error))) from error
    return out if shape is None else out.reshape(*shape, *out.shape[-2:])


def _top_left(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None
) -> tuple[bool, Window | None, Tensor, Tensor, Tensor | None]:
    """Causality aligned top-left in the words of `flash_attention`: causal and window, with k, v and the mask.

    Keys behind the last query are seen by nobody. Where queries outnumber keys, the last query's own place is `i - j`
    behind the last key: a right end as long leads back to the diagonal.
    """
    queries, keys = q.shape[2], k.shape[2]
    if queries > keys:
        return False, (None, queries - keys), k, v, attn_mask
    if queries < keys == v.shape[2]:
        k, v = k[:, :, :queries], v[:, :, :queries]
        if attn_mask is not None and attn_mask.shape[3] == keys:
            attn_mask = attn_mask[..., :queries]
    return True, None, k, v, attn_mask


def _with_four_dimensions(tensors: tuple[Tensor, ...], enable_gqa: bool) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """The leading dimensions `(..., h)` of the result, and q, k and v as `(b, h, i, d)`, views where they can be."""
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        if tensor.ndim < 2:
            raise ValueError(f"{name} must have two dimensions or more, got {tuple(tensor.shape)}")
    rank = max(tensor.ndim for tensor in tensors)
    of_four = [tensor[(None,) * (max(rank, 4) - tensor.ndim)] for tensor in tensors]
    batches, heads = [x.shape[:-3] for x in of_four], [x.shape[-3] for x in of_four]
    try:
        batch = torch.broadcast_shapes(*batches)
    except RuntimeError:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"query, key and value must broadcast along leading dimensions, got {shapes}") from None
    if not enable_gqa:
        heads = _without_groups(heads)
    wanted = zip(of_four, heads, strict=True)
    q, k, v = (x.expand(*batch, h, *x.shape[-2:]).flatten(0, -4) for x, h in wanted)
    leading = (*batch, heads[0])
    return leading[len(leading) - (rank - 2) :], (q, k, v)


def _without_groups(heads: list[int]) -> list[int]:
    """How many heads q, k and v are read with, where theirs broadcast: one head of k and v stays one."""
    common = max(heads) if 0 not in heads else 0
    if any(count not in (1, common) for count in heads):
        raise ValueError(f"query, key and value have {heads} heads; enable_gqa=True shares those of key and value")
    return [common, 1, 1] if heads[1] == heads[2] == 1 else [common] * 3


def _with_four_dimensions_as(attn_mask: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """A mask as `(b|1, h|1, i|1, j|1)`; the leading dimensions of the result are `shape`, or two where that is None."""
    check_dense("attn_mask", attn_mask)
    if shape is not None and attn_mask.ndim > len(shape) + 2:
        raise ValueError(f"attn_mask must have no more dimensions than the result, got {tuple(attn_mask.shape)}")
    if attn_mask.ndim < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    batch = () if shape is None else shape[:-1]
    if len(batch) < 2:
        return attn_mask
    of_batch = (1,) * (len(batch) + 3 - attn_mask.ndim) + tuple(attn_mask.shape[:-3])
    if math.prod(of_batch) == 1:
        return attn_mask.reshape(1, *attn_mask.shape[-3:])
    return attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, -4)


def _in_torchs_words(message: str) -> str:
    """A message of `flash_attention` with arguments' names as they are here."""
    message = re.sub(r"\b[qkv]\b", lambda found: _TENSORS[found[0]], message)
    name, space, rest = message.partition(" ")
    return f"{_OTHERS.get(name, name)}{space}{rest}"
