"""The functional call: check, choose a backend, run it."""

from __future__ import annotations

import warnings
from functools import cache, partial
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from flash_attend.autograd import attend, attend_by_operators
from flash_attend.checks import is_dense, normalise_inputs
from flash_attend.dispatch import choose
from flash_attend.dropout import draw_seed
from flash_attend.options import check_flag
from flash_attend.plans import needed_of, plan_call
from flash_attend.target import DeviceTarget
from flash_attend.tracing import (
    constant_when_compiled,
    has_autocast,
    jit_traced,
    sharded,
    traced,
    undisturbed,
    watched,
)

__all__ = ["flash_attention"]

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
    return_lse = check_flag("return_lse", return_lse)
    if undisturbed(q, k, v, mask):
        call = plan_call(q, k, v, mask, causal, scale, dropout_p, deterministic, backend)
        out, lse = attend(call.operands(q, k, v, mask), call, return_lse=return_lse)
        if call.plan.warning:
            _warn_once(call.plan.warning)
        return (out, cast(Tensor, lse)) if return_lse else out
    return _attend_watched(q, k, v, mask, causal, scale, dropout_p, return_lse, deterministic, backend)


def _attend_watched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    return_lse: bool,
    deterministic: bool | None,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same where somebody else may take part: see `undisturbed`."""
    if jit_traced():
        raise RuntimeError(NO_JIT_TRACE)
    options: dict[str, Any] = dict(causal=causal, scale=scale, deterministic=deterministic)
    opaque = traced(q, k, v, mask)
    if opaque and sharded(q, k, v, mask):
        from flash_attend.sharding import attend_locally  # imports DTensor

        here = partial(flash_attention, return_lse=return_lse, backend=backend, **options)
        return attend_locally(here, q, k, v, mask, dropout_p)
    q, k, v = autocast(q, k, v)
    if opaque:  # lengths may be symbols, by which nothing can be looked up
        operands, spec = normalise_inputs(q, k, v, mask=mask, dropout_p=dropout_p, **options)
        plan = choose(spec, DeviceTarget.of_any_length(q.device), backend, needed_of(q, k, v))
        seed = draw_seed(q.device) if spec.dropout_p > 0 else None
        out, lse = attend_by_operators(operands._replace(seed=seed), spec, plan, return_lse=return_lse)
    else:
        call = plan_call(q, k, v, mask, dropout_p=dropout_p, backend=backend, **options)
        operands, plan = call.operands(q, k, v, mask), call.plan
        if plan.backward != "einsum" and watched():
            out, lse = attend_by_operators(operands, call.spec, plan, return_lse=return_lse)
        else:
            out, lse = attend(operands, call, return_lse=return_lse)
    if plan.warning:
        _warn_once(plan.warning)
    return (out, cast(Tensor, lse)) if return_lse else out


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
