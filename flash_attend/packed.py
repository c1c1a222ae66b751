"""Attention over sequences of different lengths without padding, packed one after another."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from flash_attend.checks import is_dense
from flash_attend.functional import attend_given
from flash_attend.operands import Operands
from flash_attend.options import check_flag, check_length, shown
from flash_attend.segments import segments_of
from flash_attend.spec import Window
from flash_attend.tracing import readable, sharded, traced

__all__ = ["flash_attention_packed", "values_are_checked"]

FORMS = {"q": "(t, h, d)", "k": "(tk, hk, d)", "v": "(tk, hk, dv)"}


@overload
def flash_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def flash_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
    deterministic: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def flash_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` of b sequences of different lengths, packed one after another: each as if it were alone.

    Args:
        q: `(t, h, d)`: the queries of all sequences; float16, bfloat16, float32 or float64.
        k: `(tk, hk, d)`; `hk` divides `h`.
        v: `(tk, hk, dv)`.
        cu_seqlens_q: `(b + 1,)`, int32 or int64, on q's device: sequence `s` has the queries from `cu_seqlens_q[s]` up
            to `cu_seqlens_q[s + 1]`. The first number is 0, none is less than the one before, and the last is at most
            t: queries behind it are in no sequence, and so see no key, as those of a sequence without keys do.
        cu_seqlens_k: `(b + 1,)`, the same of keys. Keys that are in no sequence may hold anything.
        max_q, max_k: no fewer than the longest sequence has queries and keys.
        causal, window, scale, softcap, sinks, return_lse, deterministic, backend: as in `flash_attention`, where i and
            j are a sequence's own numbers of queries and keys: under `causal` its last query sees its last key.
        alibi_slopes: `(h,)`, or `(b, h)` for slopes of each sequence.
        dropout_p: as in `flash_attention`; which weights are dropped is a function of the seed and of (sequence, head,
            query, key), positions counted within a sequence: the same as of a padded batch.

    Returns:
        `out (t, h, dv)` in q's dtype, or `(out, lse)` with lse `(h, t)`, FlashAttention's layouts.

    On a GPU what follows from `cu_seqlens_q` and `cu_seqlens_k` is made once for all calls that are given these two
    tensors, and again when torch changed one of them. What writes into them without torch's knowledge, a kernel of
    one's own or `.data`, is not noticed: pass a new tensor then.

    Lengths are not read on the host, except by `math` and `sdpa`, which a CPU has without waiting for anything. Wrong
    values never lead out of the tensors. They raise `ValueError` on a CPU; on other devices, to look at them would mean
    to wait, which `FLASH_ATTEND_CHECK_LENGTHS=1` in the environment asks for.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `flash_attention` does.
    """
    return_lse = check_flag("return_lse", return_lse)
    if sharded(q, k, v, cu_seqlens_q, cu_seqlens_k):
        raise TypeError("packed sequences must be torch.Tensor, got DTensor; pass each rank's own by to_local()")
    lengths = check_length("max_q", max_q), check_length("max_k", max_k)
    _check_tensors(q=q, k=k, v=v)
    _check_cu_seqlens(q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, cu_seqlens, tensor, longest in zip(
        ("q", "k"), (cu_seqlens_q, cu_seqlens_k), (q, k), lengths, strict=True
    ):
        if values_are_checked(cu_seqlens):
            _check_values(name, cu_seqlens, tensor.shape[0], longest)
    segments = segments_of(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    options: dict[str, Any] = dict(
        causal=causal, window=window, scale=scale, softcap=softcap, dropout_p=dropout_p, deterministic=deterministic
    )
    given = Operands(q, k, v, alibi_slopes=alibi_slopes, sinks=sinks, segments=segments)
    found = attend_given(given, options, return_lse, backend)
    if isinstance(found, Tensor):
        return found[0].transpose(0, 1)
    out, lse = found
    return out[0].transpose(0, 1), lse[0]


def values_are_checked(tensor: Tensor) -> bool:
    """Whether values that say where sequences are get looked at: where nobody waits for that, or where it is asked."""
    return not traced(tensor) and (readable(tensor) or os.environ.get("FLASH_ATTEND_CHECK_LENGTHS") == "1")


def _check_tensors(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {shown(tensor)}")
        if not is_dense(tensor):
            raise TypeError(f"{name} must be a dense strided tensor; nested ones go to flash_attention")
        if tensor.ndim != 3:
            raise ValueError(f"{name} must be {FORMS[name]}, got {tensor.ndim} dimensions: {tuple(tensor.shape)}")


def _check_cu_seqlens(q: Tensor, **given: Any) -> None:
    """What shapes tell."""
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {shown(tensor)}")
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if tensor.ndim != 1 or tensor.shape[0] == 0:
            raise ValueError(f"{name} must be (b + 1,), got {tuple(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")
    of_queries, of_keys = given.values()
    if of_queries.shape != of_keys.shape:
        counts = of_queries.shape[0] - 1, of_keys.shape[0] - 1
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be of as many sequences, got {counts[0]} and {counts[1]}")


def _check_values(name: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    """Whether sequences lie within their tensor, and none is longer than was said. Reads the values."""
    places = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(places)]
    if places[0] != 0:
        raise ValueError(f"cu_seqlens_{name} must begin with 0, got {places[0]}")
    if min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens_{name} must not decrease, got {places[lengths.index(min(lengths)) :][:2]}")
    if places[-1] > total:
        raise ValueError(f"cu_seqlens_{name} must end by {name}'s {total} rows, got {places[-1]}")
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_{name} must be no less than the longest sequence, {max(lengths)}, got {longest}")
