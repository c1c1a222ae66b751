"""The functional call: check, choose a backend, run it."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal, overload

import torch
from torch import Tensor

from flash_attend.autograd import attend, attend_by_operators, runner
from flash_attend.checks import is_dense, is_jagged, needed_of, normalise_call
from flash_attend.dispatch import choose
from flash_attend.dropout import draw_seed
from flash_attend.operands import Operands
from flash_attend.options import check_flag
from flash_attend.plans import plan_call, recall
from flash_attend.query_mask import real_queries
from flash_attend.spec import Window
from flash_attend.target import DeviceTarget
from flash_attend.tracing import (
    constant_when_compiled,
    exporting_to_onnx,
    forward_mode,
    has_autocast,
    jit_traced,
    pushed,
    sharded,
    traced,
    undisturbed,
    watched,
)

__all__ = ["attend_given", "autocast", "flash_attention", "tangents_of", "warn_once"]

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
    query_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
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
    query_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, `softmax(q k^T * scale) v`, with masks, windows, and what is added to scores.

    Args:
        q: `(b, h, i, d)`; float16, bfloat16, float32 or float64. Jagged nested tensors `(b, h, i*, d)`, q, k and v
            alike, are packed sequences: see `flash_attention_packed`.
        k: `(b, hk, j, d)` or `(b, j, d)`; `hk` divides `h`, and query head `n` reads key head `n // (h // hk)`.
        v: `(b, hk, j, dv)` or `(b, j, dv)`; `dv` may differ from `d`.
        mask: bool, True = may attend: `(b, j)` for key padding, or 4-D and broadcastable to `(b, h, i, j)`.
        query_mask: bool, `(b, i)`, True = a query, of batches whose queries are padded too: rows that are none may hold
            anything, cost nothing, and give what a query gives that sees no key. Where queries and keys are padded
            alike, `mask` and `query_mask` should be one tensor.
        bias: added to the scores: q's dtype or float32, of any shape that broadcasts to `(b, h, i, j)`; differentiable,
            with a gradient of its own shape. Where it is -inf the pair is hidden, as by the mask.
        causal: query `x` sees key `y` iff `y <= x + (j - i)`: the last query sees the last key.
        window: `(left, right)`, integers or None for no limit: query `x` sees key `y` iff
            `x + (j - i) - left <= y <= x + (j - i) + right`. With `causal`, right counts as 0.
        scale: factor on the scores, default `d ** -0.5`; any finite number.
        softcap: a positive number `c`: scores `s` become `c * tanh(s / c)` before the bias is added, as in Gemma 2.
        alibi_slopes: `(h,)` or `(b, h)`, q's dtype or float32: `slope * abs(y - x - (j - i))` is taken off the score of
            query `x` and key `y` (Press et al. 2021, arXiv:2108.12409). There is no gradient, nor tangent, of slopes.
        sinks: `(h,)`, q's dtype or float32: logits that take part in the normaliser, and so in the LSE, and have no
            value; differentiable. Zeros give softmax plus one; -inf is no sink. What sees no key sees no sink.
        dropout_p: probability in [0, 1) of dropping a normalised weight. The drop mask is a pure function of a seed,
            drawn from torch's generator of q's device, and of (batch, head, query, key).
        return_lse: also return the natural-log sum of exponentials of the scores, `(b, h, i)`, differentiable.
        deterministic: bitwise repeatable gradients; default `torch.are_deterministic_algorithms_enabled()`.
        backend: "auto", or by name "hopper", "triton", "sdpa", "efficient" or "math": then it serves the call or
            raises, and never falls back.

    Returns:
        `out (b, h, i, dv)` in q's dtype, or `(out, lse)` with lse in float32 (float64 for float64 inputs). A query that
        sees no key has output 0, lse -inf and gradient 0.

    Under autocast q, k and v are cast to its dtype first, unless they are float64. In forward mode (`torch.func.jvp`,
    `torch.autograd.forward_ad` and what builds on them) out, lse and their tangents come in one pass, and no array of
    `(b, h, i, j)` is held, nor by a backward from any of them. Derivatives beyond these, of any order, are there on
    every backend through the einsum path, which takes longer, and memory for several such arrays. Under
    `torch.vmap` one launch serves all entries; with dropout and randomness="same" each takes its own.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched. `BackendUnavailable` (a ValueError): the
            backend asked for by name cannot serve the call.

    The algorithm is that of FlashAttention (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691).
    """
    known = None
    if query_mask is bias is window is softcap is alibi_slopes is sinks is None:
        run, known = recall(q, k, v, mask, causal, scale, dropout_p, deterministic, backend, return_lse)
        if run is not None:
            return run(Operands(q, k, v, mask))
    return_lse = check_flag("return_lse", return_lse)
    given = Operands(q, k, v, mask, None, bias, alibi_slopes, sinks)
    if query_mask is None and undisturbed(*given):
        call = plan_call(given, causal, scale, dropout_p, deterministic, backend, window, softcap)
        found = attend(call.operands(given), call, return_lse=return_lse)
        if call.plan.warning:
            warn_once(call.plan.warning)
        elif known is not None:
            run = call.read_by(runner(call, return_lse))
            known.keep(run, *((q, k, v) if mask is None else (q, k, v, mask)))
        return found
    options: dict[str, Any] = dict(
        causal=causal, window=window, scale=scale, softcap=softcap, dropout_p=dropout_p, deterministic=deterministic
    )
    if query_mask is None:
        return attend_given(given, options, return_lse, backend)
    given, as_called = real_queries(autocast(given), query_mask, options)
    return as_called(attend_given(given, options, return_lse, backend))


def attend_given(
    given: Operands, options: dict[str, Any], return_lse: bool, backend: str
) -> Tensor | tuple[Tensor, Tensor]:
    """The same of operands that were not checked, where somebody else may take part: see `undisturbed`."""
    if jit_traced():
        raise RuntimeError(NO_JIT_TRACE)
    if all(map(is_jagged, given[:3])):
        from flash_attend.jagged import attend_jagged  # which packs them, and comes back here

        return attend_jagged(given, options, return_lse, backend)
    opaque = traced(*given)
    if opaque and sharded(*given):
        from flash_attend.sharding import attend_locally  # imports DTensor

        return attend_locally(given, dict(options, return_lse=return_lse, backend=backend))
    given = autocast(given)
    if opaque:  # lengths may be symbols, by which nothing can be looked up
        operands, spec = normalise_call(given, **options)
        device = operands.q.device
        if backend == "auto" and exporting_to_onnx():
            backend = "math"
        target = DeviceTarget.of_any_length(device)
        plan = choose(spec, target, backend, needed_of(given), tangents=tangents_of(given))
        seed = draw_seed(device) if spec.dropout_p > 0 else None
        found = attend_by_operators(operands._replace(seed=seed), spec, plan, return_lse=return_lse)
    else:
        call = plan_call(given, backend=backend, tangents=tangents_of(given), **options)
        operands, plan = call.operands(given), call.plan
        if forward_mode() or (plan.backward != "einsum" and watched()):
            found = attend_by_operators(operands, call.spec, plan, return_lse=return_lse)
        else:
            found = attend(operands, call, return_lse=return_lse)
    if plan.warning:
        warn_once(plan.warning)
    return found


def tangents_of(given: Operands) -> tuple[bool, ...]:
    """Which of q, k, v and, where there is either, of the bias and the sinks have a tangent, or may have; empty where
    none does."""
    if not forward_mode():
        return ()
    q, k, v, _, _, bias, _, sinks, *_ = given
    whole = (q, k, v) if bias is sinks is None else (q, k, v, bias, sinks)
    found = tuple([isinstance(x, Tensor) and (torch.compiler.is_compiling() or pushed(x)) for x in whole])
    return found if True in found else ()


HALF = (torch.float16, torch.bfloat16)


def autocast(given: Operands) -> Operands:
    """The tensors as autocast gives them to torch's own attention and einsum: float64 is left alone. What is added to
    scores or to their normaliser is left in float32, and goes to autocast's dtype from another half precision."""
    q, k, v, _, _, *others = given
    if not isinstance(q, Tensor):
        return given
    device = q.device.type
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return given
    if not all(isinstance(tensor, Tensor) for tensor in (k, v, *(x for x in others if x is not None))):
        return given
    dtype = torch.get_autocast_dtype(device)
    castable = [is_dense(x) and x.is_floating_point() and x.dtype != torch.float64 for x in (q, k, v)]
    q, k, v = (tensor.to(dtype) if cast else tensor for tensor, cast in zip((q, k, v), castable, strict=True))
    if castable[0]:
        others = [x.to(dtype) if x is not None and is_dense(x) and x.dtype in HALF else x for x in others]
    return Operands(q, k, v, given.mask, given.seed, *others)


@constant_when_compiled  # so that the compiler warns, and does not compile a warning
def warn_once(warning: str) -> None:
    """What a plan has to tell its user."""
    _warn(warning)


@cache
def _warn(warning: str) -> None:
    warnings.warn(warning, stacklevel=4)
