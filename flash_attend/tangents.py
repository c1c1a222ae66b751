"""Forward mode by the einsum path: attention with its derivative in a direction, and what a loss on either gives to the
operands and to the direction; a chunk of queries at a time, so that no array of all scores is held.

In the comments x' is the tangent of x. With the scores s, their softmax p, and z, what dropout makes of a weight of 1
(1 where there is none):

    lse' = sum(p s')        p' = p (s' - lse')        out' = (z p') v + (z p) v'

A loss on out' and lse' has the gradients by the tangents that the same loss on out and lse has by the operands, because
those depend linearly on the tangents; its gradients by the operands are how these move along the tangents.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash_attend.dropout import keep_mask
from flash_attend.operands import Operands, Tangents
from flash_attend.reference import (
    Gradients,
    Hidden,
    Scores,
    as_numbers,
    bias_of_chunk,
    chunks_of,
    gathered,
    gradient_of_bias,
    needs_guard,
    no_autocast,
    prepared,
    products,
    scores_of,
    weighted,
)
from flash_attend.segments import attend_by_groups, gradients_by_groups
from flash_attend.spec import AttentionSpec

__all__ = ["attend_tangents", "attend_tangents_gradients"]


def attend_tangents(operands: Operands, tangents: Tangents, spec: AttentionSpec) -> tuple[Tensor, ...]:
    """Attention as the contract has it, and how it moves when the operands move by their tangents; both differentiable
    any number of times.

    Returns:
        `out (b, h, i, dv)` and `lse (b, h, i)` as `attention_reference` has them, and the tangents of both, 0 of a
        query that sees no key.
    """
    if spec.sequences is not None:
        return attend_by_groups(attend_tangents, operands, spec, tangents)
    chunks, _ = chunks_of(spec, small=True)
    call = _Call.of(operands, tangents, spec, chunks)
    with no_autocast(operands.q.device):
        parts = [_push(call, *chunk) for chunk in chunks]
    out, lse, of_out, of_lse = (x[0] if len(x) == 1 else torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return out.to(spec.dtype), lse, of_out.to(spec.dtype), of_lse


def attend_tangents_gradients(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_out_tangent: Tensor | None,
    grad_lse_tangent: Tensor | None,
    operands: Operands,
    tangents: Tangents,
    spec: AttentionSpec,
) -> tuple[Tensor | None, ...]:
    """What a backward through `attend_tangents` gives for q, k, v, the bias and the sinks, and then for the tangents of
    these five; None of what there is not. Itself differentiable any number of times.

    From gradients of the shapes of its results, where None counts as 0.
    """
    grads = grad_out, grad_lse, grad_out_tangent, grad_lse_tangent
    if spec.sequences is not None:
        return gradients_by_groups(attend_tangents_gradients, grads, operands, spec, tangents)
    shape, dtype, device = (spec.batch, spec.heads, spec.queries), spec.accumulator_dtype, operands.q.device
    chunks, _ = chunks_of(spec, small=True)
    whole = [
        torch.zeros(*shape, width, dtype=dtype, device=device) if grad is None else grad.to(dtype).view(*shape, width)
        for grad, width in zip(grads, (spec.value_dim, 1) * 2, strict=True)
    ]
    call = _Call.of(operands, tangents, spec, chunks, whole)
    if call.hidden.rows is not None:
        whole = [grad.masked_fill(call.hidden.rows, 0.0) for grad in whole]
    by_operands, by_tangents = (Gradients(call.operands, call.spec, call.hidden) for _ in range(2))
    with no_autocast(device):
        for chunk in chunks:
            of_operands, of_tangents = _differentiate(call, [grad[:, :, slice(*chunk)] for grad in whole], *chunk)
            by_operands.add(*chunk, *of_operands)
            by_tangents.add(*chunk, *of_tangents)
    return *by_operands.whole(), *by_tangents.whole()


class _Call(NamedTuple):
    """What chunks are computed from: in the accumulator's dtype but for biases and sinks, 0 where it takes no part."""

    operands: Operands
    tangents: Tangents
    spec: AttentionSpec
    hidden: Hidden
    guarded: bool  # whether what a hidden pair holds could show

    @staticmethod
    def of(
        operands: Operands,
        tangents: Tangents,
        spec: AttentionSpec,
        chunks: list[tuple[int, int]],
        grads: list[Tensor] | None = None,
    ) -> _Call:
        of_bias = tangents.bias
        if of_bias is not None and operands.bias is not None:
            of_bias = of_bias.masked_fill(operands.bias.detach() == -torch.inf, 0.0)
        operands, spec, hidden = prepared(operands, spec, chunks)
        q, k, v, _, sinks = tangents
        q, k, v = (
            x if x is None else (x if where is None else x.masked_fill(where, 0.0)).to(spec.accumulator_dtype)
            for x, where in ((q, hidden.rows), (k, hidden.keys), (v, hidden.keys))
        )
        tangents = Tangents(q, k, v, of_bias, sinks)
        others = [x for x in (*tangents, *(grads or ())) if x is not None]
        moved = [operands._replace(**{name: x}) for name in "qk" if (x := getattr(tangents, name)) is not None]
        guarded = any(needs_guard(spec, given, *others) for given in (operands, *moved))
        return _Call(operands, tangents, spec, hidden, guarded)


class _Chunk(NamedTuple):
    """What some queries have to do with the keys that any of them may see. Tangents are None where nothing moves."""

    q: Tensor  # (b, h, i, d)
    k: Tensor  # (b, hk, j, d)
    v: Tensor
    of_q: Tensor | None
    of_k: Tensor | None
    of_v: Tensor | None
    scores: Scores
    weights: Tensor  # (b, h, i, j) and, where there are sinks, theirs as one more key
    of_products: Tensor | None = None  # (b, h, i, j), of q k^T * scale
    of_weights: Tensor | None = None
    of_lse: Tensor | None = None  # (b, h, i, 1)
    kept: Tensor | None = None  # (b, h, i, j), what dropout keeps; None without it

    @staticmethod
    def of(call: _Call, first: int, last: int) -> _Chunk:
        operands, tangents, spec, hidden, guarded = call
        begin, end = spec.keys_seen(first, last)
        q, k, v = operands.q[:, :, first:last], operands.k[:, :, begin:end], operands.v[:, :, begin:end]
        of_q = None if tangents.q is None else tangents.q[:, :, first:last]
        of_k, of_v = (None if x is None else x[:, :, begin:end] for x in (tangents.k, tangents.v))
        scores = scores_of(operands, hidden, spec, guarded, first, last)
        chunk = _Chunk(q, k, v, of_q, of_k, of_v, scores, scores.scores.softmax(dim=-1))
        if spec.dropout_p > 0:
            assert operands.seed is not None
            kept = keep_mask(operands.seed, spec, first, last, end, operands.entries)[..., begin:]
            chunk = chunk._replace(kept=as_numbers(kept, chunk.weights.dtype))
        of_products = _of_products(chunk, spec.scale)
        of_scores = _of_scores(call, chunk, of_products, first, last)
        if of_scores is None:
            return chunk
        of_lse = (chunk.weights * of_scores).sum(dim=-1, keepdim=True)
        of_weights = chunk.weights * (of_scores - of_lse)
        return chunk._replace(of_products=of_products, of_weights=of_weights, of_lse=of_lse)


def _of_products(chunk: _Chunk, scale: float) -> Tensor | None:
    """The tangent of `q k^T * scale`."""
    found = None
    for q, k in ((chunk.of_q, chunk.k), (chunk.q, chunk.of_k)):
        if q is not None and k is not None:
            term = products(q * scale, k, chunk.scores.grouped)
            found = term if found is None else found + term
    return found


def _of_scores(call: _Call, chunk: _Chunk, of_products: Tensor | None, first: int, last: int) -> Tensor | None:
    """s', `(b, h, i, j)` and, where there are sinks, theirs as one more key."""
    found, scores, bias, sinks = of_products, chunk.scores, call.tangents.bias, call.tangents.sinks
    if found is not None and scores.bent is not None:
        found = found * (1 - scores.bent.square())
    if bias is not None:
        term = bias_of_chunk(bias, call.spec, first, last)
        term = term if scores.visible is None else torch.where(scores.visible, term, 0.0)
        found = term if found is None else found + term
    if call.operands.sinks is None or found is sinks is None:
        return found
    *shape, columns = scores.scores.shape
    whole = chunk.q.new_zeros(1, 1, 1, 1) if found is None else found
    column = chunk.q.new_zeros(1, 1, 1) if sinks is None else sinks.to(chunk.q.dtype)[:, None, None]
    return torch.cat([whole.expand(*shape, columns - 1), column.expand(*shape, 1)], dim=-1)


def _push(call: _Call, first: int, last: int) -> tuple[Tensor, ...]:
    """Out and lse of the queries from `first` to `last`, and their tangents, all in the accumulator's dtype."""
    chunk, drop = _Chunk.of(call, first, last), call.spec.dropout_p
    visible, dead, keys = chunk.scores.grouped, chunk.scores.dead, chunk.k.shape[2]
    weights = chunk.weights[..., :keys] if chunk.kept is None else chunk.weights[..., :keys] * chunk.kept
    out = weighted(weights, chunk.v, visible)
    lse = chunk.scores.scores.logsumexp(dim=-1)
    of_out, of_lse = torch.zeros_like(out), torch.zeros_like(lse)
    if chunk.of_v is not None:
        of_out = weighted(weights, chunk.of_v, visible)
    if chunk.of_weights is not None and chunk.of_lse is not None:
        moved = chunk.of_weights[..., :keys] if chunk.kept is None else chunk.of_weights[..., :keys] * chunk.kept
        of_out, of_lse = of_out + weighted(moved, chunk.v, visible), chunk.of_lse[..., 0]
    if drop > 0:
        out, of_out = out / (1 - drop), of_out / (1 - drop)
    if dead is not None:
        out, of_out = out.masked_fill(dead, 0.0), of_out.masked_fill(dead, 0.0)
        lse, of_lse = lse.masked_fill(dead[..., 0], -torch.inf), of_lse.masked_fill(dead[..., 0], 0.0)
    return out, lse, of_out, of_lse


Parts = tuple[Tensor | None, ...]  # of the gradients of q, k, v, the bias and the sinks


def _differentiate(call: _Call, grads: list[Tensor], first: int, last: int) -> tuple[Parts, Parts]:
    """What the queries from `first` to `last` give to the gradients of the operands and of the tangents."""
    chunk, spec = _Chunk.of(call, first, last), call.spec
    q, k, v, of_q, of_k, of_v, scores, p, of_products, of_p, _, kept = chunk
    visible, bent, keys = scores.grouped, scores.bent, k.shape[2]
    by_out, by_lse, by_of_out, by_of_lse = grads

    # By p and p', and, as a softmax has them, by s and s'.
    by_p, by_of_p = products(by_out, v, visible), products(by_of_out, v, visible)
    if of_v is not None:
        by_p = by_p + products(by_of_out, of_v, visible)
    if kept is not None:
        z = kept / (1 - spec.dropout_p)
        by_p, by_of_p = by_p * z, by_of_p * z
    if call.operands.sinks is not None:  # whose value is 0
        by_p, by_of_p = pad(by_p, (0, 1)), pad(by_of_p, (0, 1))
    centred = by_of_p - ((p * by_of_p).sum(dim=-1, keepdim=True) - by_of_lse)
    mean = (p * by_p).sum(dim=-1, keepdim=True) - by_lse
    if of_p is not None:
        mean = mean + (of_p * by_of_p).sum(dim=-1, keepdim=True)
    by_s, by_of_s = p * (by_p - mean), p * centred
    if of_p is not None:
        by_s = by_s + of_p * centred

    of_added = _of_added(call, chunk, first, last, by_s, call.operands)
    of_added_tangents = _of_added(call, chunk, first, last, by_of_s, call.tangents)
    p, of_p = p[..., :keys], of_p if of_p is None else of_p[..., :keys]
    by_s, by_of_s = by_s[..., :keys], by_of_s[..., :keys]
    if bent is not None:
        if of_products is not None:
            by_s = by_s - by_of_s * bent * of_products * (2 / spec.softcap)
        by_s, by_of_s = by_s * (1 - bent.square()), by_of_s * (1 - bent.square())
    if kept is not None:
        p, of_p = p * z, of_p if of_p is None else of_p * z

    gather = functools.partial(gathered, visible=visible, kv_heads=spec.kv_heads)
    by_q, by_k, by_v = weighted(by_s, k, visible), gather(by_s, q), gather(p, by_out)
    if of_k is not None:
        by_q = by_q + weighted(by_of_s, of_k, visible)
    if of_q is not None:
        by_k = by_k + gather(by_of_s, of_q)
    if of_p is not None:
        by_v = by_v + gather(of_p, by_of_out)
    by_of_q = None if of_q is None else weighted(by_of_s, k, visible) * spec.scale
    by_of_k = None if of_k is None else gather(by_of_s, q) * spec.scale
    by_of_v = None if of_v is None else gather(p, by_of_out)
    by_operands = by_q * spec.scale, by_k * spec.scale, by_v, *of_added
    return by_operands, (by_of_q, by_of_k, by_of_v, *of_added_tangents)


def _of_added(
    call: _Call, chunk: _Chunk, first: int, last: int, by_scores: Tensor, given: Operands | Tangents
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a bias and of sinks, or of the tangents of both, as far as there are `given`, from those of
    scores."""
    (begin, _), keys, by_bias = call.spec.keys_seen(first, last), chunk.k.shape[2], None
    if given.bias is not None:
        by_bias = gradient_of_bias(by_scores[..., :keys], chunk.scores.visible, given.bias, begin, call.spec)
    return by_bias, None if given.sinks is None else by_scores[..., -1].sum(dim=(0, 2))
