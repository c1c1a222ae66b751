"""Attention over sequences of which each rank of a process group holds a shard: for those that one device cannot hold.

Everything else of a model works on a shard as on a short sequence; attention alone needs the others' keys. See
`sequence.py` for who holds what, and docs/context_parallel.md for which way is faster where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup

from flash_attend.by_heads import attend_by_heads, refuse_heads
from flash_attend.checks import needed_of, normalise_call
from flash_attend.dispatch import check_backend
from flash_attend.dropout import draw_seed
from flash_attend.functional import autocast
from flash_attend.messages import agree, group_named, of_first
from flash_attend.operands import Operands
from flash_attend.ops import INPUTS
from flash_attend.options import check_flag, shown
from flash_attend.ring import FORWARD, ring_options
from flash_attend.sequence import (
    Layout,
    check_layout,
    sequence_positions,
    shard_sequence,
    unshard_sequence,
)
from flash_attend.spec import AttentionSpec, MaskKind, Window

__all__ = [
    "ContextParallel",
    "context_parallel_attention",
    "sequence_positions",
    "shard_sequence",
    "unshard_sequence",
]

Way = Literal["auto", "ring", "heads"]


@dataclass(frozen=True)
class ContextParallel:
    """How ranks share the activations of a model, as `context_parallel_attention` takes it: for `Attend` and `patch`.
    Copies and pickles name the group, and find the one of that name."""

    group: ProcessGroup
    layout: Layout = "contiguous"
    way: Way = "auto"

    def __post_init__(self) -> None:
        _check_group(self.group)
        check_layout(self.layout)
        _check_way(self.way)

    def __reduce__(self) -> tuple:
        return _restored, (self.group.group_name, self.layout, self.way)

    @staticmethod
    def of(name: str, value: object) -> ContextParallel:
        """`value`, a group or how one is shared; raises `TypeError` for anything else, which the option `name` is."""
        if isinstance(value, ProcessGroup):
            return ContextParallel(value)
        if not isinstance(value, ContextParallel):
            raise TypeError(f"{name} must be a ProcessGroup or a ContextParallel, got {shown(value)}")
        return value

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None = None,
        query_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """What `flash_attention` takes, with shards in place of sequences."""
        for name, tensor in (("bias", bias), ("query_mask", query_mask)):
            if tensor is not None:
                raise ValueError(f"{name} must be None where ranks share the sequences")
        shared = dict(group=self.group, layout=self.layout, way=self.way)
        return context_parallel_attention(q, k, v, **shared, **options)  # type: ignore[arg-type]


def _restored(name: str, layout: Layout, way: Way) -> ContextParallel:
    return ContextParallel(group_named(name), layout, way)


def _check_group(group: object) -> None:
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {shown(group)}")


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: ProcessGroup,
    layout: Layout = "contiguous",
    way: Way = "auto",
    mask: Tensor | None = None,
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
    """What `flash_attention` gives for whole sequences, of which each rank of `group` has shards.

    All ranks call it together, with shards of one size and the same options; every rank runs the backward, or none.
    In the shapes, `i` and `j` are the shards' lengths; positions, `causal` and `window` count in the whole sequences.

    Args:
        q: `(b, h, i, d)`.
        k: `(b, hk, j, d)` or `(b, j, d)`.
        v: `(b, hk, j, dv)` or `(b, j, dv)`.
        group: the ranks that share the sequences, in their order; NCCL, gloo or any other.
        layout: "contiguous", rank r has the r-th of equal pieces; or "balanced", of twice as many the r-th from either
            end, which gives ranks the same work under causality. `shard_sequence` and `sequence_positions` follow it.
        way: "ring", in which keys come from one rank after the other while others are attended to; "heads", in which
            ranks exchange positions for heads, where they can share those of q and of k evenly; or "auto": heads where
            that is possible and there is no window.
        mask: bool, True = may attend: key padding, `(b, j)` or `(b|1, h|1, 1, j)`, sharded as k is.
        causal, window, scale, softcap, dropout_p, deterministic, backend: as in `flash_attention`.
        alibi_slopes, sinks: as in `flash_attention`, the same on every rank. Of the gradient of the sinks each rank has
            a part: like that of any parameter, it has to be summed over the ranks.
        return_lse: also return the natural-log sum of exponentials, `(b, h, i)`, differentiable.

    Returns:
        `out (b, h, i, dv)` of this rank's queries, or `(out, lse)`. Dropout keeps what one device would by the seed
        that rank 0 draws. On a GPU dropout takes `math`.

    Raises:
        TypeError, ValueError: an argument is wrong, or the ranks do not mean the same call, which they are asked once
            for each kind of calls. A rank that is missing ends in the time-out of the group.
    """
    _check_group(group)
    layout, way, return_lse = check_layout(layout), _check_way(way), check_flag("return_lse", return_lse)
    check_backend(backend)
    given = autocast(Operands(q, k, v, mask, None, None, alibi_slopes, sinks))
    options: dict[str, Any] = dict(
        causal=causal, window=window, scale=scale, softcap=softcap, dropout_p=dropout_p, deterministic=deterministic
    )
    operands, spec = normalise_call(given, **options)
    _check_shards(spec, layout)
    if _goes_by_heads(spec, window, way, group.size()):
        options |= dict(backend=backend)
        out, lse = _by_heads(operands, spec, group, layout, return_lse, options)
    else:
        needed = [name for name, need in zip(INPUTS, needed_of(given), strict=False) if need]
        said = replace(spec, causal=bool(causal), window=window or (None, None))
        out, lse = _by_ring(operands, said, group, layout, backend, needed)
    return (out, cast(Tensor, lse)) if return_lse else out


def _check_way(way: object) -> Way:
    if way not in get_args(Way):
        raise ValueError(f"way must be one of {', '.join(map(repr, get_args(Way)))}, got {way!r}")
    return cast(Way, way)


def _check_shards(spec: AttentionSpec, layout: Layout) -> None:
    if spec.mask == MaskKind.DENSE:
        raise ValueError("mask must be key padding, (b, j) or (b|1, h|1, 1, j), where ranks share the keys")
    for name, length in (("q", spec.queries), ("k", spec.keys)):
        if layout == "balanced" and length % 2:
            raise ValueError(f"{name} must have an even length in a balanced layout, two pieces, got {length}")


def _goes_by_heads(spec: AttentionSpec, window: Window | None, way: Way, ranks: int) -> bool:
    refusal = refuse_heads(spec, ranks)
    if way == "heads" and refusal:
        raise ValueError(f"way must not be 'heads': {refusal}")
    if way == "auto":  # as benchmarks/context_parallel.py has it: a ring does not send what a window hides
        return not refusal and (window is None or window[0] is None)
    return way == "heads"


def _by_heads(
    operands: Operands, spec: AttentionSpec, group: ProcessGroup, layout: Layout, return_lse: bool, options: dict
) -> tuple[Tensor, Tensor | None]:
    facts = {"way": "heads", **options, "backend": "", "layout": layout, "dtype": spec.dtype}
    if not torch.compiler.is_compiling():  # where a graph has no place for the question
        facts |= {name: None if x is None else tuple(x.shape) for name, x in operands._asdict().items()}
        agree(group.group_name, tuple(facts.items()))
    return attend_by_heads(operands, group, layout, return_lse, **options)


def _by_ring(
    operands: Operands, spec: AttentionSpec, group: ProcessGroup, layout: Layout, backend: str, needed: Sequence[str]
) -> tuple[Tensor, Tensor]:
    if spec.dropout_p > 0:
        operands = operands._replace(seed=of_first(draw_seed(operands.q.device), group))
    present = [tensor for tensor in operands if tensor is not None]
    text = ring_options(operands, spec, layout, backend, needed)
    out, lse = FORWARD(present, [spec.scale, spec.dropout_p, spec.softcap], text, group.group_name)
    return out, lse
