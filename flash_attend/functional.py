"""The functional call: check, choose a backend, run it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from typing import Literal, cast, overload

import torch
from torch import Tensor

from flash_attend.autograd import attend
from flash_attend.checks import is_dense, normalise_inputs
from flash_attend.dispatch import Plan, check_backend, choose, overridden_backward
from flash_attend.dropout import draw_seed
from flash_attend.operands import Operands
from flash_attend.options import check_flag
from flash_attend.spec import CALLS_KEPT, AttentionSpec
from flash_attend.target import DeviceTarget
from flash_attend.tracing import constant_when_compiled, has_autocast, jit_traced, sharded, traced

__all__ = ["flash_attention", "recorded_calls"]

NONE = (False, False, False)

NO_JIT_TRACE = (
    "torch.jit.trace cannot record flash_attend: lengths and masks decide what is computed, and a trace keeps those of"
    " its example for all calls; use torch.export.export or torch.compile"
)


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
        backend: "auto", or by name "hopper", "triton", "sdpa" or "math": then it serves the call or raises, and
            never falls back.

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
    if jit_traced():
        raise RuntimeError(NO_JIT_TRACE)
    return_lse = check_flag("return_lse", return_lse)
    opaque = traced(q, k, v, mask)
    if opaque and sharded(q, k, v, mask):
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
    q, k, v = autocast(q, k, v)
    (q, k, v, mask, _), spec = normalise_inputs(
        q,
        k,
        v,
        mask=mask,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        deterministic=deterministic,
        opaque=opaque,
    )
    target = DeviceTarget.of(q.device)
    check_backend(backend)
    needed = (q.requires_grad, k.requires_grad, v.requires_grad) if torch.is_grad_enabled() else NONE
    if opaque:
        plan = choose(spec, target, backend, needed)
    else:
        plan = _choose_once(spec, target, backend, needed, overridden_backward())
    if plan.warning:
        _warn_once(plan.warning)
    seed = draw_seed(q.device) if spec.dropout_p > 0 else None
    operands = Operands(q, k, v, mask, seed)
    out, lse = attend(operands, spec, plan, target, needed, return_lse=return_lse, opaque=opaque)
    return (out, cast(Tensor, lse)) if return_lse else out


@lru_cache(maxsize=CALLS_KEPT)
def _choose_once(
    spec: AttentionSpec, target: DeviceTarget, backend: str, needed: tuple[bool, bool, bool], overridden: str | None
) -> Plan:
    if _recorded is not None:
        _recorded.append((spec, target, needed))
    return choose(spec, target, backend, needed)


_recorded: list[tuple[AttentionSpec, DeviceTarget, tuple[bool, bool, bool]]] | None = None


@contextmanager
def recorded_calls() -> Iterator[list[tuple[AttentionSpec, DeviceTarget, tuple[bool, bool, bool]]]]:
    """Within this context the calls that are made eagerly are collected, each once for each shape and option."""
    global _recorded
    outer, _recorded = _recorded, []
    _choose_once.cache_clear()
    try:
        yield _recorded
    finally:
        _recorded = outer


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast gives them to torch's own attention and einsum: float64 is left alone."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    device = tensors[0].device.type
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensors
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = [is_dense(x) and x.is_floating_point() and x.dtype != torch.float64 for x in tensors]
    return tuple(tensor.to(dtype) if cast else tensor for tensor, cast in zip(tensors, castable, strict=True))


@constant_when_compiled  # so that the compiler warns, and does not compile a warning
def _warn_once(warning: str) -> None:
    _warn(warning)


@cache
def _warn(warning: str) -> None:
    warnings.warn(warning, stacklevel=4)
