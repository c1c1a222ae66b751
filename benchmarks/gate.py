"""Right first: the results of the very call that is timed, against a float64 oracle, within an error budget.

The oracle writes down every pair, so large calls are checked in slices: one key head of one batch element with the
query heads that read it, which depends on nothing else. A few slices are drawn at random; every element of every result
is checked for NaN and infinity. Oracle and budget are those of the test suite.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from cases import BACKWARD, BOTH, DETERMINISTIC, Inputs
from flash_attend.testing.budget import NAMES, Budget
from flash_attend.testing.calls import Call, keep_of
from flash_attend.testing.oracle import Answer, attention_oracle
from measure import numerics

__all__ = ["Check", "Gate"]

SEED = 20
SLICES = 3
# Pairs, visible or not: more slices are checked where they hold no more.
PAIRS = {"cuda": 2**25, "cpu": 2**20}


@dataclass(frozen=True)
class Check:
    """What the gate found."""

    rel_error: float | None = None  # the largest of the results', in the 2-norm; None where it is not known
    budget_used: float | None = None  # the largest share of the budget
    checked: str = ""
    error: str = ""  # empty where the results are right


class Gate:
    """Judges any number of implementations by one set of inputs. Dropout is judged by what flash_attend keeps."""

    def __init__(self, inputs: Inputs) -> None:
        case, self.inputs = inputs.case, inputs
        self.with_gradients = any(name in case.passes for name in (BACKWARD, BOTH, DETERMINISTIC))
        slices = list(product(range(case.batch), range(case.kv_heads)))
        number = max(SLICES, PAIRS[inputs.q.device.type] // (case.heads // case.kv_heads * case.queries * case.keys))
        drawn = random.Random(SEED).sample(slices, min(number, len(slices)))
        self.checked = f"{len(drawn)} of {len(slices)} slices"
        options = dict(causal=case.causal, dropout_p=case.dropout_p)
        leaves = inputs.q, inputs.k, inputs.v
        keep = keep_of(Call(*leaves, inputs.mask, inputs.grad_out, None, **options, torch_seed=SEED))
        with numerics(case.dtype):  # eager's error, which the budget goes by, is that of the same mode
            self.budgets = {}
            for batch, kv_head in drawn:
                q, k, v, grad_out = (self._slice(x, batch, kv_head) for x in (*leaves, inputs.grad_out))
                call = options | dict(
                    mask=None if inputs.mask is None else inputs.mask[batch : batch + 1],
                    keep=None if keep is None else self._slice(keep, batch, kv_head),
                    grad_out=grad_out,
                )
                self.budgets[batch, kv_head] = Budget(attention_oracle(q, k, v, **call), q, k, v, **call)

    def _slice(self, x: Tensor, batch: int, kv_head: int) -> Tensor:
        """Of an operand or a result what a key head of a batch element reads or makes."""
        return x.detach()[batch : batch + 1].chunk(self.inputs.case.kv_heads, dim=1)[kv_head]

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
        counted = inputs.rows[:, None, :, None]  # (b, 1, i, 1)
        errors, shares = [0.0], [0.0]
        try:
            for (name, result), like in zip(results.items(), (inputs.grad_out, *leaves), strict=False):
                got, wanted = tuple(result.shape), tuple(like.shape)
                assert got == wanted, f"{name} has shape {got}, not {wanted}"
                read = result if whole or name != "out" else result[counted.expand_as(result)]
                assert read.isfinite().all(), f"{name} has NaN or infinity"
            for (batch, kv_head), budget in self.budgets.items():
                parts = {name: self._slice(x, batch, kv_head) for name, x in results.items()}
                if not whole:  # nobody reads the other rows: they are taken as right
                    parts["out"] = torch.where(counted[batch], parts["out"], budget.truth.out.to(out.dtype))
                errors += [_distance(part, getattr(budget.truth, name)) for name, part in parts.items()]
                shares += budget.check(Answer(**{name: parts.get(name) for name in NAMES})).values()
        except AssertionError as wrong:
            return Check(max(errors) or None, None, self.checked, f"wrong: {str(wrong).splitlines()[0]}")
        return Check(max(errors), max(shares), self.checked)


def _distance(result: Tensor, truth: Tensor) -> float:
    """In the 2-norm, relative to the truth; 0 where that is 0."""
    size = truth.norm().item()
    return (result.double() - truth).norm().item() / size if size else 0.0
