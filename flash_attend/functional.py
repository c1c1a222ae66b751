"""The functional call: check, choose a backend, run it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Literal, cast, overload

import torch
from torch import Tensor

from flash_attend import operators
from flash_attend.checks import is_dense, normalise_inputs
from flash_attend.dispatch import BACKENDS, Plan, Verdict, check_backend, choose, judge
from flash_attend.dropout import draw_seed
from flash_attend.options import check_flag
from flash_attend.reference import attention_reference
from flash_attend.spec import CALLS_KEPT, AttentionSpec
from flash_attend.target import DeviceTarget
from flash_attend.tracing import constant_when_compiled, intercepted, sharded, traced

__all__ = ["Explanation", "explain", "flash_attention"]


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
    deterministic: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, `softmax(q k^T * scale) v`, with masks.

    Args:
        q: `(b, h, i, d)`; float16, bfloat16, float32 or float64.
        k: `(b, hk, j, d)` or `(b, j, d)`; `hk` divides `h`, and query head `n` reads key head `n // (h // hk)`.
        v: `(b, hk, j, dv)` or `(b, j, dv)`; `dv` may differ from `d`.
        mask: bool, True = may attend: `(b, j)` for key padding, or 4-D and broadcastable to `(b, h, i, j)`.
        causal: query `x` sees key `y` iff `y <= x + (j - i)`: the last query sees the last key.
        scale: factor on the scores, default `d ** -0.5`; any finite number.
        dropout_p: probability in [0, 1) of dropping a normalised weight. The drop mask is a pure function of a seed,
            drawn from torch's generator of q's device, and of (batch, head, query, key).
        return_lse: also return the natural-log sum of exponentials of the scores, `(b, h, i)`, differentiable.
        deterministic: bitwise repeatable gradients; default `torch.are_deterministic_algorithms_enabled()`.
        backend: "auto", or by name "hopper_fused", "hopper", "triton_fused", "triton" or "math": then it serves the
            call or raises, and never falls back. A fused one computes all gradients in one pass, which adds those of q
            up in no fixed order: they are not bitwise repeatable, and it refuses where they have to be.

    Returns:
        `out (b, h, i, dv)` in q's dtype, or `(out, lse)` with lse in float32 (float64 for float64 inputs). A query that
        sees no key has output 0, lse -inf and gradient 0.

    Under autocast q, k and v are cast to its dtype first, unless they are float64. Derivatives of any order and in
    forward mode are there on every backend; what goes beyond the gradients is computed through the einsum path, which
    takes longer, and memory for several arrays of `(b, h, i, j)`. Under `torch.vmap` one launch serves all entries;
    with dropout and randomness="same" each takes its own.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched. `BackendUnavailable` (a ValueError): the
            backend asked for by name cannot serve the call.

    The algorithm is that of FlashAttention (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691).
    """
    return_lse = check_flag("return_lse", return_lse)
    if sharded(q, k, v, mask):
        from flash_attend.sharding import attend_locally  # imports DTensor

        here = partial(
            flash_attention,
            causal=causal,
            scale=scale,
            return_lse=return_lse,
            deterministic=deterministic,
            backend=backend,
        )
        return attend_locally(here, q, k, v, mask, dropout_p)
    q, k, v = _autocast(q, k, v)
    (q, k, v, mask, _), spec = normalise_inputs(
        q, k, v, mask=mask, causal=causal, scale=scale, dropout_p=dropout_p, deterministic=deterministic
    )
    target = DeviceTarget.of(q.device)
    watched = traced(q, k, v, mask)
    check_backend(backend)
    plan = (choose if watched else _choose_once)(spec, target, backend)
    if plan.backend == "math" and backend == "auto" and target.device_type == "cuda":
        _warn_once(plan.reason)
    seed = draw_seed(q.device) if spec.dropout_p > 0 else None
    lse: Tensor | None
    # The one place that decides between an opaque operator and what is in it. In the einsum path that is operators too,
    # and all but a compiler and a sharded tensor do better with them.
    if watched or (plan.backend != "math" and intercepted()):
        out, lse = operators.attend(q, k, v, mask, seed, spec, plan.backend, return_lse=return_lse)
    elif plan.backend == "math":
        out, lse = attention_reference(q, k, v, mask, seed, spec, return_lse=return_lse)
    else:
        from flash_attend import launches  # imports Triton

        out, lse = launches.attend(q, k, v, mask, seed, spec, target, plan.backend)
    return (out, cast(Tensor, lse)) if return_lse else out


@lru_cache(maxsize=CALLS_KEPT)
def _choose_once(spec: AttentionSpec, target: DeviceTarget, backend: str) -> Plan:
    return choose(spec, target, backend)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast gives them to torch's own attention and einsum: float64 is left alone."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = [is_dense(x) and x.is_floating_point() and x.dtype != torch.float64 for x in tensors]
    return tuple(tensor.to(dtype) if cast else tensor for tensor, cast in zip(tensors, castable, strict=True))


@constant_when_compiled  # so that the compiler warns, and does not compile a warning
def _warn_once(reason: str) -> None:
    _warn_of_fallback(reason)


@cache
def _warn_of_fallback(reason: str) -> None:
    warnings.warn(f"flash_attend serves a CUDA call by its einsum path: {reason}", stacklevel=4)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; print it."""

    plan: Plan | None
    refusal: str  # why the backend asked for by name cannot serve; empty where a plan exists
    verdicts: tuple[Verdict, ...]
    target: DeviceTarget

    def __str__(self) -> str:
        where = self.target.name or self.target.device_type
        lines = [f"on {where}: " + (f"{self.plan.backend} serves" if self.plan else self.refusal)]
        width = max(map(len, BACKENDS))
        for verdict in self.verdicts:
            state = "yes" if verdict.by_default else "by name" if verdict.serves else "no"
            lines.append(f"  {verdict.backend:<{width}}  {state:<7}  {verdict.reason}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Explanation:
    """Which backend would serve `flash_attention` with these arguments, and what each one says of the call: "yes" where
    "auto" may choose it, "by name" where it can serve but was not shown right and faster on this part, or "no".

    Raises what `flash_attention` raises for wrong arguments; a backend that cannot serve is told, not raised.
    """
    q, k, v = _autocast(q, k, v)
    check_flag("return_lse", return_lse)
    check_backend(backend)
    (q, k, v, mask, _), spec = normalise_inputs(
        q, k, v, mask=mask, causal=causal, scale=scale, dropout_p=dropout_p, deterministic=deterministic
    )
    target = DeviceTarget.of(q.device)
    verdicts = judge(spec, target)
    asked = next((verdict for verdict in verdicts if verdict.backend == backend), None)
    if asked is not None and not asked.serves:
        return Explanation(None, f"{backend} cannot serve: {asked.reason}", verdicts, target)
    return Explanation(choose(spec, target, backend), "", verdicts, target)
