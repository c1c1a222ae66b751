"""The tensors that a call reads, as one value: what a later feature adds stands here, and in no signature."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Layouts", "Operands", "Strides"]

Strides = tuple[int, ...]


class Operands(NamedTuple):
    """What attention reads, in the shapes that `normalise_inputs` gives (its letters are those of `spec.py`)."""

    q: Tensor  # (b, h, i, d)
    k: Tensor  # (b, hk, j, d)
    v: Tensor  # (b, hk, j, dv)
    mask: Tensor | None = None  # bool (b|1, h|1, i|1, j), True = may attend
    seed: Tensor | None = None  # int64 (1,) on q's device, where there is dropout


class Layouts(NamedTuple):
    """How operands lie in memory: strides in elements, and the sizes of the mask, which no spec tells."""

    q: Strides
    k: Strides
    v: Strides
    mask_sizes: tuple[int, ...] | None = None
    mask: Strides | None = None

    @staticmethod
    def of(operands: Operands) -> Layouts:
        """Those of operands."""
        q, k, v, mask, _ = operands
        of_mask = () if mask is None else (mask.shape, mask.stride())
        return Layouts(q.stride(), k.stride(), v.stride(), *of_mask)
