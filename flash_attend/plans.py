"""What is left to do of a call: worked out once, and then looked up by everything that it depends on but the values of
its tensors, which it therefore does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flash_attend.backends import Functions
from flash_attend.checks import Facts, Options, TensorFacts, check_call, facts_of, layouts_of, options_of, view_operands
from flash_attend.dispatch import Plan, check_backend, choose
from flash_attend.dropout import draw_seed
from flash_attend.generation import generation, renew
from flash_attend.operands import Operands
from flash_attend.spec import CALLS_KEPT, AttentionSpec
from flash_attend.target import DeviceTarget

if TYPE_CHECKING:
    from flash_attend.kernels.configs import Tiles

__all__ = ["CallPlan", "needed_of", "plan_call", "recorded_calls"]

NONE = (False, False, False)


class CallPlan(NamedTuple):
    """A call that was checked and given to a backend, for all tensors of the same kinds, sizes and strides."""

    spec: AttentionSpec
    plan: Plan
    functions: Functions
    tiles: Tiles | None
    planned: Callable[[Operands], Any] | None  # `forward` of operands with the layouts of the call, or None
    differentiated: bool  # q, k or v needs a gradient
    mask_sizes: tuple[int, int, int]
    as_given: bool  # the operands are the tensors themselves, none of them a view

    def forward(self, operands: Operands) -> Any:
        """`(out, lse, schedule)` of operands with any layouts."""
        return self.functions.forward(operands, self.spec, self.tiles)

    def operands(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Operands:
        """The operands of a call; where it drops weights, with a new seed."""
        seed = draw_seed(q.device) if self.spec.dropout_p > 0 else None
        if self.as_given:
            return Operands(q, k, v, mask, seed)
        return view_operands(q, k, v, mask, self.spec, self.mask_sizes)._replace(seed=seed)


def plan_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    deterministic: bool | None,
    backend: str,
) -> CallPlan:
    """The plan of a call of plain tensors, with what torch is set to at the moment.

    Raises what the checks and the dispatcher raise; of such calls nothing is kept.
    """
    facts = facts_of(q, k, v, mask)
    options = options_of(q, causal, scale, dropout_p, deterministic)
    if type(backend) is not str:
        check_backend(backend)
    return _work_out(facts, options, needed_of(q, k, v), backend, generation())


def needed_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[bool, bool, bool]:
    """Which of q, k and v need a gradient."""
    return (q.requires_grad, k.requires_grad, v.requires_grad) if torch.is_grad_enabled() else NONE


@lru_cache(maxsize=CALLS_KEPT)
def _work_out(
    facts: Facts, options: Options, needed: tuple[bool, bool, bool], backend: str, generation: object
) -> CallPlan:
    spec, mask_sizes = check_call(facts, options)
    target = DeviceTarget.of(TensorFacts(*facts[0]).device)
    if _recorded is not None:
        _recorded.append((spec, target, needed))
    plan = choose(spec, target, backend, needed)
    functions = plan.backend.load()
    tiles = functions.tiles(spec, target, plan.backward)
    planned = functions.plan_forward
    forward = None if planned is None else planned(spec, tiles, layouts_of(facts, spec, mask_sizes))
    _, of_k, of_v, of_mask = facts
    as_given = len(of_k[0]) == len(of_v[0]) == 4 and spec.kv_heads > 0
    as_given = as_given and (of_mask is None or of_mask[0] == (*mask_sizes, spec.keys))
    return CallPlan(spec, plan, functions, tiles, forward, True in needed, mask_sizes, as_given)


_recorded: list[tuple[AttentionSpec, DeviceTarget, tuple[bool, bool, bool]]] | None = None


@contextmanager
def recorded_calls() -> Iterator[list[tuple[AttentionSpec, DeviceTarget, tuple[bool, bool, bool]]]]:
    """Within this context the calls that are made eagerly are collected, each once for each shape and option."""
    global _recorded
    outer, _recorded = _recorded, []
    renew()
    try:
        yield _recorded
    finally:
        _recorded = outer
