"""Jagged nested tensors, which hold sequences of different lengths without padding, as packed sequences."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from flash_attend.operands import Operands
from flash_attend.packed import flash_attention_packed

__all__ = ["attend_jagged"]


def attend_jagged(
    given: Operands, options: dict[str, Any], return_lse: bool, backend: str
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` of jagged `q (b, h, i*, d)`, `k (b, hk, j*, d)` and `v (b, hk, j*, dv)`: out `(b, h, i*, dv)`
    and lse `(b, h, i*)`, jagged as q is."""
    q, k, v, mask, _, bias, slopes, sinks, *_ = given
    for name, other in (("mask", mask), ("bias", bias)):
        if other is not None:
            raise TypeError(f"{name} must be None where q, k and v are nested: they have no padding to hide")
    values, places = {}, {}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4 or tensor.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must be {'(b, h, i*, d)'}, of b = {q.shape[0]}, got {tuple(tensor.shape)}")
        rows: Any = tensor.transpose(1, 2)  # (b, i*, h, d), with the methods of a nested tensor
        if rows.lengths() is not None or rows.values().shape[1:] != tensor.shape[1::2]:
            raise ValueError(f"{name} must be ragged along its third dimension alone, and without holes")
        values[name], places[name] = rows.values(), rows.offsets()
    if k.shape[2] != v.shape[2]:
        raise ValueError("k and v must share their offsets, as nested tensors of one length do")
    longest = values["q"].shape[0], values["k"].shape[0]
    found = cast(Any, flash_attention_packed)(
        *values.values(), places["q"], places["k"], *longest, alibi_slopes=slopes, sinks=sinks, return_lse=return_lse,
        backend=backend, **options,
    )  # fmt: skip

    def nested(rows: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(rows, places["q"]).transpose(1, 2)

    if isinstance(found, Tensor):
        return nested(found)
    out, lse = found
    return nested(out), nested(lse.t())
