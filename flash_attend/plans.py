"""What is left to do of a call: worked out once, and then looked up by everything that it depends on but the values of
its tensors, which it therefore does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from flash_attend.backends import Functions
from flash_attend.checks import (
    Facts,
    Needed,
    Options,
    Sizes,
    TensorFacts,
    check_call,
    facts_of,
    layouts_of,
    needed_of,
    options_of,
    view_operands,
)
from flash_attend.dispatch import Plan, check_backend, choose
from flash_attend.dropout import draw_seed
from flash_attend.generation import generation, kept, renew
from flash_attend.operands import Operands
from flash_attend.spec import CALLS_KEPT, AttentionSpec, Window
from flash_attend.target import DeviceTarget
from flash_attend.tracing import Guarded, float32_products

if TYPE_CHECKING:
    from flash_attend.kernels.configs import Tiles

__all__ = ["CallPlan", "Run", "plan_call", "recall", "recorded_calls"]


class CallPlan(NamedTuple):
    """A call that was checked and given to a backend, for all tensors of the same kinds, sizes and strides."""

    spec: AttentionSpec
    plan: Plan
    functions: Functions
    tiles: Tiles | None
    planned: Callable[[Operands], Any] | None  # `forward` of operands with the layouts of the call, or None
    planned_out: Callable[[Operands], Any] | None  # the same, where neither a backward nor the caller reads the LSE
    planned_backward: Callable[..., Any] | None  # `plan_backward` of the backend, or None
    alone_with: Guarded[bool]  # for the tensors of backwards in which nobody else took part
    differentiated: bool  # a gradient is needed of something
    sizes: Sizes
    as_given: bool  # the operands are the tensors themselves, none of them a view
    padding: tuple[int, ...] | None  # the shape of the mask, where it alone is a view: `(b, 1, 1, j)`

    def forward(self, operands: Operands) -> Any:
        """`(out, lse, schedule)` of operands with any layouts."""
        return self.functions.forward(operands, self.spec, self.tiles)

    def operands(self, given: Operands) -> Operands:
        """The operands of a call; where it drops weights, with a new seed."""
        if self.spec.dropout_p > 0:
            q, k, v, mask, _, *others = given
            given = Operands(q, k, v, mask, draw_seed(q.device), *others)
        if self.padding is not None:
            q, k, v, mask, seed, *others = given
            return Operands(q, k, v, mask.view(self.padding), seed, *others)  # type: ignore[union-attr]
        return given if self.as_given else view_operands(given, self.spec, self.sizes)

    def read_by(self, run: Run) -> Run:
        """The same of the tensors of a call, as they were given."""
        if self.as_given and self.padding is None and self.spec.dropout_p == 0:
            return run
        return lambda given: run(self.operands(given))


def plan_call(
    given: Operands,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    deterministic: bool | None,
    backend: str,
    window: Window | None = None,
    softcap: float | None = None,
    tangents: tuple[bool, ...] = (),
) -> CallPlan:
    """The plan of a call of plain tensors, with what torch is set to at the moment; `tangents` as `choose` has them.

    Raises what the checks and the dispatcher raise; of such calls nothing is kept.
    """
    facts = facts_of(given)
    options = options_of(given.q, causal, scale, dropout_p, deterministic, window, softcap)
    if type(backend) is not str:
        check_backend(backend)
    return _work_out(facts, options, needed_of(given), backend, tangents, generation())


Run = Callable[[Operands], Any]  # of the tensors of a call, as they were given, to what it returns
Known = Guarded[Run]
_known: dict[tuple, Known] = kept({})


def recall(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, dropout_p: float,
    deterministic: bool | None, backend: str, return_lse: bool,
) -> tuple[Run | None, Known | None]:  # fmt: skip
    """What was found to `Run` a call that was made before with such tensors and the same options, in which nobody else
    took part, without a look at anything by itself; and where to keep it if there is none: nowhere if a compiler takes
    part, or something cannot be looked up by.

    Between two kernels nothing of this is in the caches: what it touches counts, and not what it computes.
    """
    if is_dynamo_compiling() or not (  # True is 1, and no number
        (scale is None or type(scale) is float)
        and (type(dropout_p) is float or type(dropout_p) is int)
        and type(causal) is type(return_lse) is bool
        and (deterministic is None or type(deterministic) is bool)
        and type(backend) is str
    ):
        return None, None
    try:
        products = "" if k.is_cpu or k.dtype != torch.float32 else float32_products()
        key = k.shape, mask is None, causal, scale, dropout_p, deterministic, backend, return_lse, products
        known = _known.get(key)
    except (AttributeError, RuntimeError, TypeError):  # k has no shape, or none that is known
        return None, None
    if known is None:
        if len(_known) >= CALLS_KEPT:
            _known.clear()
        known = _known[key] = Guarded()
        return None, known
    return known.find(q, k, v) if mask is None else known.find(q, k, v, mask), known


@lru_cache(maxsize=CALLS_KEPT)
def _work_out(
    facts: Facts, options: Options, needed: Needed, backend: str, tangents: tuple[bool, ...], generation: object
) -> CallPlan:
    spec, sizes = check_call(facts, options, needed)
    target = DeviceTarget.of(TensorFacts(*facts[0]).device)
    if _recorded is not None:
        _recorded.append((spec, target, needed))
    plan = choose(spec, target, backend, needed, tangents=tangents)
    functions = plan.backend.load()
    tiles = functions.tiles(spec, target, plan.backward)
    planned = functions.plan_forward
    layouts, differentiated = layouts_of(facts, spec, sizes), True in needed
    forward = None if planned is None else planned(spec, tiles, layouts)
    out = None if functions.plan_out is None or differentiated else functions.plan_out(spec, layouts)
    gradients = functions.plan_backward(spec, layouts) if differentiated and functions.plan_backward else None
    mask = facts[3]
    as_given, padding = _as_given(facts, spec, sizes), None
    if mask is not None and len(mask[0]) == 2 and sizes.mask == (spec.batch, 1, 1):
        padding = (*sizes.mask, spec.keys) if _as_given((*facts[:3], None, *facts[4:]), spec, sizes) else None
    planned_ways = forward, out, gradients, Guarded[bool]()
    return CallPlan(spec, plan, functions, tiles, *planned_ways, differentiated, sizes, as_given, padding)


def _as_given(facts: Facts, spec: AttentionSpec, sizes: Sizes) -> bool:
    _, of_k, of_v, of_mask, of_bias, of_slopes, *_ = facts
    return (
        (len(of_k[0]) == len(of_v[0]) == 4 and spec.kv_heads > 0)
        and (of_mask is None or of_mask[0] == (*sizes.mask, spec.keys))
        and (of_bias is None or of_bias[0] == sizes.bias)
        and (of_slopes is None or (len(of_slopes[0]) == 2 and of_slopes[0][0] > 0))
    )


_recorded: list[tuple[AttentionSpec, DeviceTarget, Needed]] | None = None


@contextmanager
def recorded_calls() -> Iterator[list[tuple[AttentionSpec, DeviceTarget, Needed]]]:
    """Within this context the calls that are made eagerly are collected, each once for each shape and option."""
    global _recorded
    outer, _recorded = _recorded, []
    renew()
    try:
        yield _recorded
    finally:
        _recorded = outer
