"""The tensors that a call reads, as one value: what a later feature adds stands here, and in no signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Layouts", "Operands", "Strides", "Tangents", "broadcast_strides"]

Strides = tuple[int, ...]


class Operands(NamedTuple):
    """What attention reads, in the shapes that `normalise_inputs` gives (its letters are those of `spec.py`)."""

    q: Tensor  # (b, h, i, d)
    k: Tensor  # (b, hk, j, d)
    v: Tensor  # (b, hk, j, dv)
    mask: Tensor | None = None  # bool (b|1, h|1, i|1, j), True = may attend
    seed: Tensor | None = None  # int64 (1,) on q's device, where there is dropout
    # Of q's dtype or float32:
    bias: Tensor | None = None  # (b|1, h|1, i|1, j|1), added to the scores; -inf hides a pair as the mask does
    alibi_slopes: Tensor | None = None  # (b|1, h)
    sinks: Tensor | None = None  # (h,), logits that take part in the normaliser alone
    # int32 (n, 4), where a batch of one holds several sequences one after another: see `segments.py`
    segments: Tensor | None = None
    # int64 (b,): which of a larger batch's entries these are, by which dropout goes; None for all of one
    entries: Tensor | None = None


class Tangents(NamedTuple):
    """The derivatives, in one direction, of those operands of a call that are moved along it; each in its operand's
    shape and dtype."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None


def broadcast_strides(sizes: Sequence[int], strides: Strides) -> Strides:
    """The strides of a tensor that is read along all of each dimension, those of size 1 too."""
    return tuple(0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))


class Layouts(NamedTuple):
    """How operands lie in memory: strides in elements, and what no spec tells: the sizes of the mask, and the dtypes of
    slopes and sinks, which are q's or float32."""

    q: Strides
    k: Strides
    v: Strides
    mask_sizes: tuple[int, ...] | None = None
    mask: Strides | None = None
    bias: Strides | None = None
    alibi_slopes: Strides | None = None
    sinks: Strides | None = None
    dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None)

    @staticmethod
    def of(operands: Operands) -> Layouts:
        """Those of operands."""
        q, k, v, mask, _, *others = operands[:8]
        of_mask = (None, None) if mask is None else (mask.shape, mask.stride())
        of_others = [None if tensor is None else broadcast_strides(tensor.shape, tensor.stride()) for tensor in others]
        slopes, sinks = (None if tensor is None else tensor.dtype for tensor in others[1:])
        found = Layouts(q.stride(), k.stride(), v.stride(), *of_mask, *of_others)
        return found if slopes is sinks is None else found._replace(dtypes=(slopes, sinks))
