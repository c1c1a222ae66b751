"""Right first: the results of the very call that is timed, against a float64 oracle, within an error budget.

The oracle writes down every pair, so large calls are checked in slices: one key head of one batch element with the
query heads that read it, which depends on nothing else. A few slices are drawn at random; every element of every result
is checked for NaN and infinity. Oracle and budget are those of the test suite.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cases import BACKWARD, BOTH, DETERMINISTIC, Inputs
from flash_attend.checks import normalise_inputs
from flash_attend.dropout import draw_seed, keep_mask
from flash_attend.testing.budget import NAMES, Budget
from flash_attend.testing.oracle import Answer, attention_oracle
from measure import numerics

__all__ = ["Check", "Gate"]

SEED = 20
# Pairs, visible or not: calls of at most so many are checked in all their slices.
WHOLE = {"cuda": 2**25, "cpu": 2**20}
SLICES = 3


@dataclass(frozen=True)
class Check:
    """What the gate found."""

    rel_error: float | None = None  # the largest of the results', in the 2-norm; None where it is not known
    budget_used: float | None = None  # the largest share of the budget
    checked: str = ""
    error: str = ""  # empty where the results are right


@dataclass(frozen=True)
class _Slice:
    batch: int
    heads: slice  # of the queries
    kv_head: int
    truth: Answer
    budget: Budget

    def of(self, x: Tensor, name: str) -> Tensor:
        heads = slice(self.kv_head, self.kv_head + 1) if name in ("k", "v", "dk", "dv") else self.heads
        return x[self.batch : self.batch + 1, heads]


class Gate:
    """Judges any number of implementations by one set of inputs. Dropout is judged by what flash_attend keeps."""

    def __init__(self, inputs: Inputs) -> None:
        case, self.inputs = inputs.case, inputs
        self.with_gradients = any(name in case.passes for name in (BACKWARD, BOTH, DETERMINISTIC))
        keep = self._keep() if case.dropout_p > 0 else None
        pairs = [(batch, kv_head) for batch in range(case.batch) for kv_head in range(case.kv_heads)]
        self.n_slices = len(pairs)
        if case.batch * case.heads * case.queries * case.keys > WHOLE[inputs.q.device.type]:
            pairs = sorted(random.Random(SEED).sample(pairs, min(SLICES, len(pairs))))
        with numerics(case.dtype):  # eager's error, which the budget goes by, is that of the same mode
            self.slices = [self._slice(*pair, keep) for pair in pairs]

    def _keep(self) -> Tensor:
        inputs, case = self.inputs, self.inputs.case
        _, spec = normalise_inputs(
            inputs.q, inputs.k, inputs.v, mask=inputs.mask, causal=case.causal, dropout_p=case.dropout_p
        )
        torch.manual_seed(SEED)
        return keep_mask(draw_seed(inputs.q.device), spec, 0, case.queries)

    def _slice(self, batch: int, kv_head: int, keep: Tensor | None) -> _Slice:
        inputs, case = self.inputs, self.inputs.case
        group = case.heads // case.kv_heads
        heads = slice(kv_head * group, (kv_head + 1) * group)

        def part(x: Tensor | None, heads: slice) -> Tensor | None:
            return None if x is None else x.detach()[batch : batch + 1, heads]

        kv = slice(kv_head, kv_head + 1)
        tensors = part(inputs.q, heads), part(inputs.k, kv), part(inputs.v, kv)
        call = dict(
            mask=None if inputs.mask is None else inputs.mask[batch : batch + 1],
            causal=case.causal,
            dropout_p=case.dropout_p,
            keep=part(keep, heads),
            grad_out=part(inputs.grad_out, heads),
        )
        truth = attention_oracle(*tensors, **call)
        return _Slice(batch, heads, kv_head, truth, Budget(truth, *tensors, **call))

    def judge(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], *, whole: bool) -> Check:
        """Checks `attend(q, k, v) -> out`, its output and gradients; `whole`: also where a query is padding or dead.

        Whatever `attend` raises goes through.
        """
        inputs = self.inputs
        leaves = inputs.q, inputs.k, inputs.v
        torch.manual_seed(SEED)
        out = attend(*leaves)
        results = {"out": out.detach()}
        if self.with_gradients:
            results |= zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, inputs.grad_out), strict=True)
        complete = len(self.slices) == self.n_slices
        checked = "all of it" if complete else f"{len(self.slices)} of {self.n_slices} slices"
        counted = inputs.rows[:, None, :, None]  # (b, 1, i, 1)
        alike = dict(zip(results, (inputs.grad_out, *leaves), strict=False))
        largest, used = 0.0, 0.0
        try:
            for name, result in results.items():
                got, wanted = tuple(result.shape), tuple(alike[name].shape)
                assert got == wanted, f"{name} has shape {got}, not {wanted}"
                read = result if whole or name != "out" else result[counted.expand_as(result)]
                assert read.isfinite().all(), f"{name} has NaN or infinity"
            for piece in self.slices:
                parts = {name: piece.of(result, name) for name, result in results.items()}
                if not whole:  # nobody reads the other rows: they are taken as right
                    rows = counted[piece.batch : piece.batch + 1]
                    parts["out"] = torch.where(rows, parts["out"], piece.truth.out.to(out.dtype))
                largest = max(largest, *(_distance(part, getattr(piece.truth, name)) for name, part in parts.items()))
                shares = piece.budget.check(Answer(**{name: parts.get(name) for name in NAMES}))
                used = max(used, *shares.values())
        except AssertionError as wrong:
            return Check(largest or None, None, checked, f"wrong: {str(wrong).splitlines()[0]}")
        return Check(largest, used, checked)


def _distance(result: Tensor, truth: Tensor) -> float:
    """In the 2-norm, relative to the truth; 0 where that is 0."""
    size = truth.norm().item()
    return (result.double() - truth).norm().item() / size if size else 0.0
