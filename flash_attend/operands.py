"""The tensors that a call reads, as one value: what a later feature adds stands here, and in no signature."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Operands"]


class Operands(NamedTuple):
    """What attention reads, in the shapes that `normalise_inputs` gives (its letters are those of `spec.py`)."""

    q: Tensor  # (b, h, i, d)
    k: Tensor  # (b, hk, j, d)
    v: Tensor  # (b, hk, j, dv)
    mask: Tensor | None = None  # bool (b|1, h|1, i|1, j), True = may attend
    seed: Tensor | None = None  # int64 (1,) on q's device, where there is dropout
