"""What a call has to do at least: the one place where floating-point operations and bytes are counted.

The field's convention: a forward is two products, `2 * pairs * (d + dv)` operations, and a backward 2.5 times that
(five products for two; Dao et al. 2022). Only the pairs that are visible count, so a kernel which computes hidden ones
shows a lower rate, and rates of masked and unmasked cases compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cases import BACKWARD, BOTH, DETERMINISTIC, DTYPES, FORWARD, Case, Inputs

__all__ = ["Work", "count_visible_pairs", "work_of"]

BACKWARD_FACTOR = 2.5
FACTORS = {FORWARD: 1.0, BACKWARD: BACKWARD_FACTOR, DETERMINISTIC: BACKWARD_FACTOR, BOTH: 1 + BACKWARD_FACTOR}


@dataclass(frozen=True)
class Work:
    """What a pass of a case has to do at least."""

    flops: float
    bytes: int  # each input read once and each output written once; of masked k and v, what somebody sees

    def tflops(self, milliseconds: float) -> float:
        """The rate, in 10^12 operations a second."""
        return self.flops / milliseconds / 1e9

    def least_milliseconds(self, tflops: float, gigabytes_per_second: float) -> float:
        """The least time on a device of these ceilings."""
        return max(self.flops / tflops / 1e9, self.bytes / gigabytes_per_second / 1e6)


def count_visible_pairs(case: Case, mask: Tensor | None) -> int:
    """How many pairs of a query and a key are visible, over batch and heads.

    `mask` is bool, `(b, j)` or `(b, 1, i, j)`. Key padding takes prefix sums, `O(b j + i)`, not the pairs themselves.
    """
    queries, keys = case.queries, case.keys
    offset = keys - queries
    if mask is not None and mask.ndim == 4:
        pairs = mask.tril(offset) if case.causal else mask
        return int(pairs.sum()) * case.heads
    device = "cpu" if mask is None else mask.device
    valid = torch.ones(1, keys, dtype=torch.bool, device=device) if mask is None else mask
    repeats = case.heads * (case.batch if mask is None else 1)
    if not case.causal:
        return int(valid.sum()) * queries * repeats
    before = torch.nn.functional.pad(valid.long().cumsum(dim=1), (1, 0))  # (b, j + 1): valid keys before a position
    ends = (torch.arange(queries, device=device) + offset + 1).clamp(0, keys)  # where a query's keys end
    return int(before[:, ends].sum()) * repeats


def _count_seen_keys(case: Case, mask: Tensor | None) -> int:
    """How many rows of k and of v somebody sees, over batch and key heads."""
    if mask is None:
        return case.batch * case.keys * case.kv_heads
    if mask.ndim == 4:
        mask = (mask.tril(case.keys - case.queries) if case.causal else mask).any(dim=2)
    return int(mask.sum()) * case.kv_heads


def work_of(inputs: Inputs) -> dict[str, Work]:
    """The work of every pass of a case."""
    case = inputs.case
    forward = 2.0 * count_visible_pairs(case, inputs.mask) * (case.head_dim + case.value_dim)
    size = DTYPES[case.dtype][0].itemsize
    q = case.batch * case.heads * case.queries * case.head_dim * size
    out = case.batch * case.heads * case.queries * case.value_dim * size
    seen = _count_seen_keys(case, inputs.mask) * (case.head_dim + case.value_dim) * size
    hidden = case.batch * case.keys * case.kv_heads * (case.head_dim + case.value_dim) * size - seen
    lse = case.batch * case.heads * case.queries * 4
    mask = 0 if inputs.mask is None else inputs.mask.numel()
    forward_bytes = q + seen + mask + out + lse
    # Reads q, k, v, mask, out, its gradient and the LSE, writes three gradients; those of hidden keys are zeros.
    backward_bytes = q + seen + mask + 2 * out + lse + q + seen + hidden
    sizes = {FORWARD: forward_bytes, BACKWARD: backward_bytes, DETERMINISTIC: backward_bytes}
    sizes[BOTH] = forward_bytes + backward_bytes
    return {name: Work(FACTORS[name] * forward, sizes[name]) for name in FACTORS}
