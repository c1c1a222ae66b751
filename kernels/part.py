"""A backward whose keys are a part of those that its queries attend to: others hold the rest, and so the softmax.

Weights are then those of an LSE over all keys, and delta is that of the output of all: the kernels take both as they
are. Nothing of the part's own forward is needed, and so nothing of it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flash_attend.kernels.configs import Tiles
from flash_attend.kernels.schedule import build_schedule
from flash_attend.kernels.softmax import LN2
from flash_attend.kernels.statistics import Kept, is_apart
from flash_attend.operands import Operands
from flash_attend.spec import AttentionSpec

__all__ = ["backward_of_part", "kept_of_part"]


def backward_of_part(
    backward: Callable[..., tuple[Tensor | None, ...]],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    tiles: Tiles,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """What a part of the keys gives to the gradients that are `needed`, by an `attention_backward`; `out (b, h, i, dv)`
    and `lse (b, h, i)` are those over all keys."""
    kept = kept_of_part(lse, operands, spec, tiles)
    return backward(grad_out, grad_lse, operands, out, lse, kept, spec, tiles, needed)


def kept_of_part(lse: Tensor, operands: Operands, spec: AttentionSpec, tiles: Tiles) -> Kept:
    """What a forward would have kept of a call, had it seen all the keys that `lse (b, h, i)` is over.

    The maximum counts as 0 where it is apart: the logarithm is then whole, and rounded as `lse` is.
    """
    log2 = (lse / LN2.value).masked_fill_(lse == -torch.inf, torch.inf)
    statistics = torch.stack((torch.zeros_like(log2), log2), dim=3) if is_apart(spec) else log2[..., None]
    return Kept(statistics, *build_schedule(operands.mask, spec, tiles, operands.bias))
