"""What would serve a call, and why, for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_attend.backends import BACKENDS, has_kernels
from flash_attend.checks import needed_of, normalise_call
from flash_attend.dispatch import LOOKING, Plan, Verdict, check_backend, choose, judge, left_in_forward_mode
from flash_attend.functional import autocast, tangents_of
from flash_attend.operands import Operands
from flash_attend.options import check_flag
from flash_attend.query_mask import real_queries
from flash_attend.spec import Window
from flash_attend.target import DeviceTarget
from flash_attend.tracing import constant_when_compiled

__all__ = ["Explanation", "explain", "kept_by_torch"]

ADVICE = (
    "nothing faster than einsum is here for this call on this part: where memory or time matter, leave the model its"
    " own attention, which PyTorch may have a fused kernel for"
)
NO_KERNELS = "no kernel here is for this part, and PyTorch's own is what would serve"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; print it."""

    plan: Plan | None
    refusal: str  # why the backend asked for by name cannot serve; empty where a plan exists
    verdicts: tuple[Verdict, ...]
    target: DeviceTarget
    forward_mode: str = ""  # which backend serves the same call in forward mode, and why; empty where it is the plan's

    def __str__(self) -> str:
        where = self.target.name or self.target.device_type
        lines = [f"on {where}: " + (f"{self.plan.name} serves" if self.plan else self.refusal)]
        if self.plan:
            lines.append(f"  backward: {self.plan.backward}, {self.plan.backward_reason}")
            if self.forward_mode:
                lines.append(f"  forward mode: {self.forward_mode}")
        width = max(map(len, BACKENDS))
        for verdict in self.verdicts:
            state = "yes" if verdict.by_default else "by name" if verdict.serves else "no"
            lines.append(f"  {verdict.backend:<{width}}  {state:<7}  {verdict.reason}")
        if self.advice:
            lines.append(f"  advice: {self.advice}")
        return "\n".join(lines)

    __repr__ = __str__

    @property
    def advice(self) -> str:
        """What to do where the einsum path serves on a part that no kernel of ours is for; empty elsewhere."""
        by_einsum = self.plan is not None and self.plan.backward == "einsum"
        return ADVICE if by_einsum and _lacks_kernels(self.target) else ""


def _lacks_kernels(target: DeviceTarget) -> bool:
    return not (has_kernels(target) or target.absent or target.device_type == "cpu")


@constant_when_compiled
def kept_by_torch(device: torch.device) -> str:
    """Why a call of PyTorch's own attention on a device had better stay one; empty where ours should serve it."""
    return NO_KERNELS if _lacks_kernels(DeviceTarget.of(device)) else ""


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Explanation:
    """Which backend would serve `flash_attention` with these arguments, by which backward, and what each one says of
    the call: "yes" where "auto" may choose it, "by name" where it can serve but was not shown right and faster on this
    part, or "no"; and, where it is another, which backend serves the same call in forward mode.

    Raises what `flash_attention` raises for wrong arguments; a backend that cannot serve is told, not raised.
    """
    check_flag("return_lse", return_lse)
    check_backend(backend)
    given = autocast(Operands(q, k, v, mask, None, bias, alibi_slopes, sinks))
    options: dict[str, Any] = dict(
        causal=causal, window=window, scale=scale, softcap=softcap, dropout_p=dropout_p, deterministic=deterministic
    )
    if query_mask is not None:
        given, _ = real_queries(given, query_mask, options)
    operands, spec = normalise_call(given, **options)
    target = DeviceTarget.of(operands.q.device)
    needed = needed_of(operands)
    verdicts = judge(spec, target, needed)
    asked = next((verdict for verdict in verdicts if verdict.backend == backend), None)
    if asked is not None and not asked.serves:
        return Explanation(None, f"{backend} cannot serve: {asked.reason}", verdicts, target)
    plan = choose(spec, target, backend, needed, LOOKING, tangents=tangents_of(given))
    serves, reason = left_in_forward_mode(plan.backend, spec, target)
    return Explanation(plan, "", verdicts, target, f"{serves}, {plan.name}: {reason}" if serves else "")
