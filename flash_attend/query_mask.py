"""Padded batches whose queries are padded too: rows that are no queries are left out, and give 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash_attend.checks import is_dense, is_jagged, normalise_call
from flash_attend.derived import derived
from flash_attend.operands import Operands
from flash_attend.options import shown
from flash_attend.segments import segments_of
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.tracing import sharded, transformed

__all__ = ["real_queries"]

Results = Tensor | tuple[Tensor, Tensor]


def real_queries(
    given: Operands, query_mask: Tensor, options: dict[str, Any]
) -> tuple[Operands, Callable[[Results], Results]]:
    """A call in which queries that `query_mask (b, i)` hides take no part, and what makes the results `(b, h, i, ...)`
    of its own.

    Where places do not count, real queries and visible keys are packed, one batch entry after another, and what is
    hidden comes behind them: on the device, with no host sync. Elsewhere the mask hides the rows, pair by pair.
    """
    if sharded(*given, query_mask):
        raise TypeError("query_mask does not go with DTensor; pass each rank's own tensors by to_local()")
    if is_jagged(given.q):
        raise TypeError("query_mask must be None where q, k and v are nested: they have no padding to hide")
    operands, spec = normalise_call(given, **options)
    _check(query_mask, spec, operands.q)
    q, k, v, mask, *_ = operands
    together = given.mask is query_mask  # then what is left out of queries and keys is the same
    # Lengths that differ between what is mapped over have no rule.
    if _places_count(spec, together) or transformed():
        rows = query_mask[:, None, :, None]
        return given._replace(mask=rows if mask is None else rows & mask), _as_they_are
    queries = keys = derived(lambda: _Packing.of(query_mask), "rows", query_mask)
    if given.mask is None:
        keys = derived(lambda: _Packing.of_all(spec, q.device), (spec.batch, spec.keys), query_mask)
    elif not together:
        keys = derived(lambda: _Packing.of(mask[:, 0, 0].expand(spec.batch, -1)), spec.batch, given.mask)  # type: ignore[index]
    segments = segments_of(queries.cu_seqlens, keys.cu_seqlens, spec.batch * spec.queries, spec.batch * spec.keys)
    packed = given._replace(q=queries.pack(q), k=keys.pack(k), v=keys.pack(v), mask=None, segments=segments)

    def unpacked(found: Results) -> Results:
        if isinstance(found, Tensor):
            return queries.unpack(found, spec)
        out, lse = found
        return queries.unpack(out, spec), queries.unpack(lse, spec)

    return packed, unpacked


def _check(query_mask: Tensor, spec: AttentionSpec, q: Tensor) -> None:
    if not isinstance(query_mask, Tensor):
        raise TypeError(f"query_mask must be a torch.Tensor, got {shown(query_mask)}")
    if not is_dense(query_mask) or query_mask.dtype != torch.bool:
        raise TypeError(f"query_mask must be a dense tensor of bool (True = a query), got {query_mask.dtype}")
    if tuple(query_mask.shape) != (spec.batch, spec.queries):
        wanted = spec.batch, spec.queries
        raise ValueError(f"query_mask must be (b, i) = {wanted}, got {tuple(query_mask.shape)}")
    if query_mask.device != q.device:
        raise ValueError(f"query_mask must be on q's device {q.device}, got {query_mask.device}")


def _places_count(spec: AttentionSpec, together: bool) -> bool:
    """Whether leaving out what is hidden would change more of a call than that. Causality asks for the order alone,
    which is kept where queries and keys are left out `together`."""
    by_pairs = spec.mask == MaskKind.DENSE or spec.mask_per_head or spec.bias is not None
    by_distance = spec.window != (None, None) or spec.alibi or spec.dropout_p > 0
    return by_pairs or by_distance or (spec.causal and not together)


def _as_they_are(found: Results) -> Results:
    return found


class _Packing(NamedTuple):
    """Where the rows of `(b, n)` stand when those that a mask shows come first."""

    cu_seqlens: Tensor  # (b + 1,)
    # int64 (b * n,), None where all stay at their places: which row is at each place, and the place of each row.
    rows: Tensor | None = None
    places: Tensor | None = None

    @staticmethod
    def of_all(spec: AttentionSpec, device: torch.device) -> _Packing:
        """Of keys none of which is hidden."""
        return _Packing(torch.arange(spec.batch + 1, device=device) * spec.keys)

    @staticmethod
    def of(mask: Tensor) -> _Packing:
        """Of a mask `(b, n)`."""
        cu_seqlens = pad(mask.sum(1).cumsum(0), (1, 0))
        flat = mask.flatten()
        before, row = flat.cumsum(0), torch.arange(flat.shape[0], device=mask.device)
        places = torch.where(flat, before - 1, cu_seqlens[-1] + row - before)
        return _Packing(cu_seqlens, row.scatter(0, places, row), places)

    def pack(self, tensor: Tensor) -> Tensor:
        """`(b, h, n, d)` as `(1, h, b * n, d)`."""
        flat = tensor.transpose(1, 2).flatten(0, 1)
        return (flat if self.rows is None else _Reordered.apply(flat, self.rows, self.places)).transpose(0, 1)[None]

    def unpack(self, tensor: Tensor, spec: AttentionSpec) -> Tensor:
        """The inverse, of `(1, h, b * i, ...)`."""
        rows = _Reordered.apply(tensor[0].transpose(0, 1), self.places, self.rows)
        return rows.unflatten(0, (spec.batch, spec.queries)).transpose(1, 2)


class _Reordered(torch.autograd.Function):
    """`(tensor, order, inverse) -> tensor[order]`. Each row is there once: its gradient is put back, not added up."""

    @staticmethod
    def forward(tensor: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return tensor.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reordered.apply(grad, inverse, order), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _Reordered.apply(tangent, *ctx.saved_tensors)
