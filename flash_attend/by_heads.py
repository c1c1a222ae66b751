"""Attention of sequence shards by exchanging positions for heads: each rank gets all positions of some heads, attends
to them as one device would, and gives the positions back (Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509).

Every step has a gradient of its own, and a compiler follows them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup

from flash_attend.functional import flash_attention
from flash_attend.messages import all_gather, all_to_all
from flash_attend.operands import Operands
from flash_attend.sequence import Layout, in_order, out_of_order
from flash_attend.spec import AttentionSpec

__all__ = ["attend_by_heads", "refuse_heads"]


def refuse_heads(spec: AttentionSpec, ranks: int) -> str:
    """Why a call cannot be served by heads; empty where it can."""
    if spec.heads % ranks or spec.kv_heads % ranks:
        return f"{ranks} ranks cannot share {spec.heads} heads of q and {spec.kv_heads} of k and v evenly"
    if spec.dropout_p > 0:
        return "what dropout keeps depends on the head, and each rank would count its own from 0"
    return ""


def attend_by_heads(
    operands: Operands, group: ProcessGroup, layout: Layout, return_lse: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`out (b, h, i, dv)` and, if asked for, `lse (b, h, i)` of this rank's queries, from its shards."""
    q, k, v, mask, _, _, slopes, sinks, *_ = operands
    ranks, rank = group.size(), dist.get_rank(group)
    q, k, v = (in_order(x, ranks, layout, dim=2) for x in _to_heads((q, k, v), group))

    def own_heads(x: Tensor, dim: int) -> Tensor:
        return x if x.shape[dim] == 1 else x.chunk(ranks, dim)[rank]

    if mask is not None:
        gathered = all_gather(mask.to(torch.uint8), group).movedim(0, 3).flatten(3, 4)
        mask = own_heads(in_order(gathered, ranks, layout, dim=3).bool(), 1)
    slopes = None if slopes is None else slopes.chunk(ranks, 1)[rank]
    sinks = None if sinks is None else sinks.chunk(ranks)[rank]
    scores = dict(alibi_slopes=slopes, sinks=sinks)
    found = cast(Any, flash_attention)(q, k, v, mask=mask, return_lse=return_lse, **scores, **options)
    out, lse = found if return_lse else (found, None)
    out = _to_positions(out_of_order(out, ranks, layout, dim=2), group)
    if lse is not None:
        lse = _to_positions(out_of_order(lse, ranks, layout, dim=2)[..., None], group)[..., 0]
    return out, lse


def _to_heads(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """`(b, h, n, d)` of each rank's positions -> `(b, h / ranks, ranks n, d)` of this one's heads, in one message."""
    ranks = group.size()
    parts = [x.unflatten(1, (ranks, -1)).movedim(1, 0) for x in tensors]  # (ranks, b, h / ranks, n, d)
    sent = torch.cat([part.flatten(1) for part in parts], dim=1)
    came = all_to_all(sent, group).split([part[0].numel() for part in parts], dim=1)
    return [x.reshape(part.shape).movedim(0, 2).flatten(2, 3) for x, part in zip(came, parts, strict=True)]


def _to_positions(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """`(b, h / ranks, ranks n, d)` -> `(b, h, n, d)`: undoes `_to_heads`."""
    sent = tensor.unflatten(2, (group.size(), -1)).movedim(2, 0)  # (ranks, b, h / ranks, n, d)
    return all_to_all(sent, group).movedim(0, 1).flatten(1, 2)
