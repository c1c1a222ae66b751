"""The einsum path: the definition of what every backend computes, and the fallback where no kernel serves.

Dimension letters as in `spec.py`; `g` is the number of query heads that read one key/value head, `h = hk * g`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from math import isnan
from typing import NamedTuple

import numpy as np
import torch
from einops import reduce
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from flash_attend.dropout import keep_mask
from flash_attend.operands import Operands
from flash_attend.segments import attend_by_groups, gradients_by_groups
from flash_attend.spec import AttentionSpec, MaskKind, describe
from flash_attend.tracing import has_autocast, known, lazy, readable, transformed
from flash_attend.visible import contract, pairs

__all__ = [
    "Gradients",
    "Hidden",
    "Merged",
    "Scores",
    "as_numbers",
    "attention_reference",
    "attention_reference_gradients",
    "bias_of_chunk",
    "bounded",
    "chunks_of",
    "cleared",
    "cut",
    "future",
    "gathered",
    "gradient_of_bias",
    "has_nan",
    "needs_guard",
    "no_autocast",
    "prepared",
    "products",
    "scores_of",
    "visible_pairs",
    "weighted",
    "with_whole_mask",
]

# Sizes in score elements, b * h * i * j. The work goes by chunks of queries: under `causal` a chunk leaves out the keys
# that none of its queries sees, and a CPU's allocator reuses arrays of 16 MB, where larger ones cost new pages.
CACHED_SCORES = 2**22
# Beyond this many, the weights are not kept for the backward: each chunk computes them again. The chunks are then of
# this size: 128 MB an array in float32, of which a backward holds four, and six with the LSE.
HELD_SCORES = 2**25
# A chunk has at least so many queries, because each one passes over all of k and v and of their gradients.
FEWEST_QUERIES = 64


def attention_reference(
    operands: Operands, spec: AttentionSpec, *, return_lse: bool, guard: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Attention as the contract has it, differentiable any number of times.

    Without `guard` NaN and infinity in a row of v that some queries see may show in others, and products take a fifth
    of the time that they take guarded.

    Returns:
        `out (b, h, i, dv)` in q's dtype, and `lse (b, h, i)` in `spec.accumulator_dtype`, natural log; None unless
        `return_lse`.
    """
    if spec.sequences is not None:
        out, lse = attend_by_groups(functools.partial(attention_reference, return_lse=return_lse), operands, spec)
        return out, lse
    chunks, recompute = chunks_of(spec)
    operands, spec, hidden = prepared(operands, spec, chunks)
    given = [x for x in operands if x is not None]
    differentiated = torch.is_grad_enabled() and any([x.requires_grad for x in given])
    # All that a hidden pair lets into a result is NaN: without a backward, a look at that is enough.
    looked_at = guard and not differentiated and readable(*given)
    guarded = guard and not looked_at and needs_guard(spec, operands)

    attend = _attend
    # Transforms of torch.func refuse the hooks that a checkpoint works by: under them the weights are held after all.
    if recompute and differentiated and not transformed():
        attend = functools.partial(checkpoint, _attend, use_reentrant=False, preserve_rng_state=False)

    def computed(guarded: bool) -> Tensor:
        parts = [attend(operands, hidden, spec, guarded, first, last, return_lse) for first, last in chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    with no_autocast(operands.q.device):
        out = computed(guarded)
        if looked_at and hides_in_part(spec, operands.bias) and has_nan(out[..., : spec.value_dim]):
            out = computed(True)
    if not return_lse:
        return out.to(spec.dtype), None
    out, lse = out[..., : spec.value_dim], out[..., spec.value_dim]
    return out.to(spec.dtype).contiguous(), lse


class Merged(NamedTuple):
    """The results of attention over more keys than a call has: weights are theirs, and not the call's own softmax."""

    out: Tensor  # (b, h, i, dv)
    lse: Tensor  # (b, h, i)


def attention_reference_gradients(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    operands: Operands,
    spec: AttentionSpec,
    merged: Merged | None = None,
) -> tuple[Tensor | None, ...]:
    """What a backward through `attention_reference` gives for q, k and v and, where there is either, for the bias and
    the sinks; itself differentiable any number of times.

    From `grad_out (b, h, i, dv)` and `grad_lse (b, h, i)`, where None counts as 0. A chunk at a time: nothing of the
    forward is held. Where the keys are a part of those that `merged` is over, so are the gradients.
    """
    if spec.sequences is not None:
        return gradients_by_groups(attention_reference_gradients, (grad_out, grad_lse), operands, spec)
    q = operands.q
    if grad_out is None:
        grad_out = q.new_zeros(spec.batch, spec.heads, spec.queries, spec.value_dim)
    if grad_lse is None:
        grad_lse = q.new_zeros(spec.batch, spec.heads, spec.queries, dtype=spec.accumulator_dtype)
    chunks, _ = chunks_of(spec)
    operands, spec, hidden = prepared(operands, spec, chunks)
    grad_out, dead = grad_out.to(spec.accumulator_dtype), hidden.rows
    if dead is not None:
        grad_out, grad_lse = grad_out.masked_fill(dead, 0.0), grad_lse.masked_fill(dead[..., 0], 0.0)
    guarded = needs_guard(spec, operands, grad_out, grad_lse, *(() if merged is None else merged[:1]))

    found = Gradients(operands, spec, hidden)
    with no_autocast(q.device):
        for first, last in chunks:
            given = grad_out, grad_lse, operands, hidden, spec, guarded, first, last, merged
            found.add(first, last, *_differentiate(*given))
    grads = found.whole()
    return grads[:3] if operands.bias is operands.sinks is None else grads


class Gradients:
    """Those of q, k, v, the bias and the sinks, of which every chunk of queries gives a part, or None."""

    def __init__(self, operands: Operands, spec: AttentionSpec, hidden: Hidden) -> None:
        self.operands, self.spec, self.hidden = operands, spec, hidden
        self.parts: tuple[list[Tensor], ...] = ([], [], [], [], [])

    def add(self, first: int, last: int, *parts: Tensor | None) -> None:
        """The parts that the queries from `first` to `last` give, those of k and v for the keys that they may see."""
        begin, end = self.spec.keys_seen(first, last)
        rest = (0, 0, begin, self.spec.keys - end)
        by_queries = self.operands.bias is not None and self.operands.bias.shape[2] > 1
        for held, part, name in zip(self.parts, parts, ("q", "k", "v", "bias", "sinks"), strict=True):
            if part is None:
                continue
            part = pad(part, rest) if name in ("k", "v") else part
            if name == "q" or (name == "bias" and by_queries) or not held:
                held.append(part)
            else:
                held[0] = held[0] + part

    def whole(self) -> tuple[Tensor | None, ...]:
        """All five, 0 where nobody looks, in the dtypes of the operands; None where there was no part."""
        of_q, *others = (torch.cat(held, dim=2) if len(held) > 1 else next(iter(held), None) for held in self.parts)
        dead, unread = self.hidden
        filled = [(of_q, dead), (others[0], unread), (others[1], unread)]
        grads = [x if x is None or where is None else x.masked_fill(where, 0.0) for x, where in filled]
        bias, sinks = self.operands.bias, self.operands.sinks
        dtypes = [self.spec.dtype] * 3 + [None if x is None else x.dtype for x in (bias, sinks)]
        pairs = zip((*grads, *others[2:]), dtypes, strict=True)
        return tuple(None if grad is None else grad.to(dtype) for grad, dtype in pairs)


def chunks_of(spec: AttentionSpec, *, small: bool = False) -> tuple[list[tuple[int, int]], bool]:
    """The ranges of queries that are computed at once, and whether there are too many scores to hold them all. Ranges
    are no larger then than those that a CPU's allocator reuses, if they are to be `small`."""
    if spec.symbolic:
        return [(0, spec.queries)], False
    span = _span(spec)
    # A chunk of as many queries as one of them sees keys computes at most twice the scores that it needs.
    most = max(FEWEST_QUERIES, span) if span < spec.keys else max(FEWEST_QUERIES, spec.queries)
    scores_per_query = max(1, spec.batch * spec.heads * min(spec.keys, span + most))
    too_many = scores_per_query * spec.queries > HELD_SCORES
    scores = HELD_SCORES if too_many and not small else CACHED_SCORES
    rows = max(FEWEST_QUERIES, min(most, scores // scores_per_query))
    return [(first, min(first + rows, spec.queries)) for first in range(0, max(1, spec.queries), rows)], too_many


def _span(spec: AttentionSpec) -> int:
    """How many keys a window shows to a query at most."""
    left, right = spec.window[0], spec.right_end
    return spec.keys if left is None or right is None else min(spec.keys, left + 1 + right)


class Hidden(NamedTuple):
    """What takes no part at all, or None where there is nothing of the kind."""

    rows: Tensor | None  # (b|1, h|1, i|1, 1): the queries that see no key
    keys: Tensor | None  # (b|1, hk|1, j, 1): the keys that no query sees


def prepared(
    operands: Operands, spec: AttentionSpec, chunks: list[tuple[int, int]]
) -> tuple[Operands, AttentionSpec, Hidden]:
    """q, k and v in the accumulator's dtype, cleared where they take no part, and with a mask that hides all that the
    bias does."""
    operands, spec = with_whole_mask(operands, spec)
    operands, hidden = cleared(operands, spec, chunks)
    if spec.dtype != spec.accumulator_dtype:
        q, k, v = (tensor.to(spec.accumulator_dtype) for tensor in operands[:3])
        operands = operands._replace(q=q, k=k, v=v)
    return operands, spec, hidden


def with_whole_mask(operands: Operands, spec: AttentionSpec) -> tuple[Operands, AttentionSpec]:
    """The same call, whose mask hides what a bias of -inf hides, and whose bias has no such element."""
    q, k, v, mask, _, bias, *_ = operands
    if bias is None:
        return operands, spec
    hidden = bias.detach() == -torch.inf
    if readable(bias) and not hidden.any():
        return operands, spec
    shown, bias = ~hidden.expand(-1, -1, -1, spec.keys), bias.masked_fill(hidden, 0.0)
    mask = shown if mask is None else mask & shown
    whole = describe(q, k, v, mask, *spec.options, bias=bias, alibi=spec.alibi, sinks=spec.sinks)
    return operands._replace(mask=mask, bias=bias), whole


def cleared(
    operands: Operands, spec: AttentionSpec, chunks: list[tuple[int, int]] | None = None
) -> tuple[Operands, Hidden]:
    """The operands with zeros where they take no part: whatever stands there reaches no product, and changes no bit.
    With them, where that is. `chunks` are the ranges of queries whose visible pairs are looked at together."""
    q, k, v, mask, *_ = operands
    chunks = chunks_of(spec)[0] if chunks is None else chunks
    hidden = Hidden(_dead_rows(mask, spec, chunks, q.device), _unread_keys(mask, spec, chunks, q.device))
    if hidden.rows is hidden.keys is None:
        return operands, hidden
    if hidden.rows is not None:
        q = q.masked_fill(hidden.rows, 0.0)
    if hidden.keys is not None:
        k, v = k.masked_fill(hidden.keys, 0.0), v.masked_fill(hidden.keys, 0.0)
    return operands._replace(q=q, k=k, v=v), hidden


def needs_guard(spec: AttentionSpec, operands: Operands, *grads: Tensor) -> bool:
    """Whether what a hidden pair holds could show.

    On a CPU a look at the tensors says so. Elsewhere, and where there are no values to look at, every call that hides
    pairs of keys and queries which others see is guarded.
    """
    bias, slopes = operands.bias, operands.alibi_slopes
    others = [*grads, *(x for x in (bias, slopes) if x is not None)]
    hides = hides_in_part(spec, bias)
    if not hides or not readable(*operands[:3], *others):
        return hides
    if slopes is not None:
        others[-1] = slopes.to(spec.accumulator_dtype) * max(spec.queries, spec.keys)  # the largest distance
    return not bounded(spec, *operands[:3], *others)


def hides_in_part(spec: AttentionSpec, bias: Tensor | None) -> bool:
    """Whether pairs may be hidden of a key and a query which others see."""
    return (
        (spec.causal and spec.queries > 1)
        or spec.window != (None, None)
        or (bias is not None and spec.mask != MaskKind.NONE)
        or spec.mask == MaskKind.DENSE
        or (spec.mask == MaskKind.KEY and spec.mask_per_head and spec.group > 1)
    )


def bounded(spec: AttentionSpec, q: Tensor, k: Tensor, *others: Tensor) -> bool:
    """Whether the tensors are without NaN and infinity, and so small that no score can be infinite. Reads them."""
    norms = [_norm(x, spec.accumulator_dtype) for x in (q, k, *others)]
    largest = norms[0] * norms[1] * abs(spec.scale) + sum(norms)
    return largest < torch.finfo(spec.accumulator_dtype).max / 4  # a NaN is not less


def has_nan(tensor: Tensor) -> bool:
    """Whether a tensor holds NaN, or infinities of both signs. Reads it."""
    return isnan(tensor.sum().item())


def _norm(tensor: Tensor, dtype: torch.dtype) -> float:
    """The root of a tensor's sum of squares; infinite where those are too large for its dtype. A scalar product of
    numpy's starts in a third of the time that torch's norm takes to, and this one warns of no overflow."""
    dense = tensor.is_contiguous() or (tensor.ndim == 4 and tensor.transpose(1, 2).is_contiguous())
    if not dense or tensor.dtype != dtype or lazy(tensor):
        return torch.linalg.vector_norm(tensor.detach(), dtype=dtype).item()
    flat = tensor.detach().numpy().ravel(order="K")
    return float(np.vdot(flat, flat)) ** 0.5


def _attend(
    operands: Operands, hidden: Hidden, spec: AttentionSpec, guarded: bool, first: int, last: int, return_lse: bool
) -> Tensor:
    """Attention of the queries from `first` to `last` (exclusive), all in the accumulator dtype: `(b, h, i, dv)`.

    With `return_lse` the LSE is one more column. It comes in one tensor with the output so that a backward runs through
    both: what a chunk computes again for one that nobody differentiates would stay, and add up over the chunks.
    """
    scores, _, _, visible, dead = scores_of(operands, hidden, spec, guarded, first, last)
    begin, end = spec.keys_seen(first, last)

    weights = cut(scores.softmax(dim=-1), 3, (0, end - begin))
    if spec.dropout_p > 0:
        assert operands.seed is not None
        kept = keep_mask(operands.seed, spec, first, last, end, operands.entries)[..., begin:]
        factor = _as_integers(kept)
        weights = weights.mul_(factor) if _unwatched(weights) else weights * factor
    out = weighted(weights, cut(operands.v, 2, (begin, end)), visible)
    if spec.dropout_p > 0:
        out = out / (1 - spec.dropout_p)

    if dead is not None:
        out = out.masked_fill(dead, 0.0)
    if not return_lse:
        return out
    lse = scores.logsumexp(dim=-1, keepdim=True)
    if dead is not None:
        lse = lse.masked_fill(dead, -torch.inf)
    return torch.cat([out, lse], dim=-1)


def _differentiate(
    grad_out: Tensor,
    grad_lse: Tensor,
    operands: Operands,
    hidden: Hidden,
    spec: AttentionSpec,
    guarded: bool,
    first: int,
    last: int,
    merged: Merged | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the queries from `first` to `last` give to the gradients: their own, those of the keys they may see, and in
    the accumulator dtype those of the bias and of the sinks, `(b|1, h|1, i'|1, j|1)` and `(h,)`."""
    scores, bent, seen, visible, dead = scores_of(operands, hidden, spec, guarded, first, last)
    begin, end = spec.keys_seen(first, last)
    q = cut(operands.q, 2, (first, last)) * spec.scale
    k, v = cut(operands.k, 2, (begin, end)), cut(operands.v, 2, (begin, end))
    grad_out, grad_lse = cut(grad_out, 2, (first, last)), cut(grad_lse, 2, (first, last))[..., None]

    if merged is None:
        all_weights = scores.softmax(dim=-1)
    else:
        all_weights = _weights_of(scores, merged.lse[:, :, first:last, None], dead)
    weights = kept_weights = all_weights[..., : end - begin]
    grad_weights = products(grad_out, v, visible)
    if spec.dropout_p > 0:
        assert operands.seed is not None
        kept = keep_mask(operands.seed, spec, first, last, end, operands.entries)[..., begin:]
        factor = as_numbers(kept, weights.dtype) / (1 - spec.dropout_p)
        kept_weights, grad_weights = weights * factor, grad_weights * factor
    if merged is None:
        delta = (weights * grad_weights).sum(dim=-1, keepdim=True) - grad_lse
    else:
        delta = (merged.out[:, :, first:last].to(grad_out.dtype) * grad_out).sum(dim=-1, keepdim=True) - grad_lse
        delta = delta if dead is None else delta.masked_fill(dead, 0.0)
    grad_scores = weights * (grad_weights - delta)
    of_bias = of_sinks = None
    if operands.bias is not None:
        of_bias = gradient_of_bias(grad_scores, seen, operands.bias, begin, spec)
    if operands.sinks is not None:
        of_sinks = -(all_weights[..., -1:] * delta).sum(dim=(0, 2, 3))
    if bent is not None:
        grad_scores = grad_scores * (1 - bent.square())

    grad_q = weighted(grad_scores, k, visible) * spec.scale
    grad_k = gathered(grad_scores, q, visible, spec.kv_heads)
    return grad_q, grad_k, gathered(kept_weights, grad_out, visible, spec.kv_heads), of_bias, of_sinks


def _weights_of(scores: Tensor, lse: Tensor, dead: Tensor | None) -> Tensor:
    """The weights that an LSE over more keys gives to scores. Those of rows that see none of these are 0, whatever
    their scores; and of rows that see none at all."""
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    return weights if dead is None else weights.masked_fill(dead, 0.0)


def gradient_of_bias(
    grad_scores: Tensor, visible: Tensor | None, bias: Tensor, begin: int, spec: AttentionSpec
) -> Tensor:
    """That of a chunk's queries, summed over what the bias is broadcast along; the chunk's keys begin at `begin`."""
    if visible is not None:
        grad_scores = torch.where(visible, grad_scores, 0.0)
    kept = zip(bias.shape, grad_scores.shape, strict=True)
    summed = [dim for dim, (own, size) in enumerate(kept) if own == 1 and (size != 1 or dim == 3)]
    of_chunk = grad_scores.sum(dim=summed, keepdim=True) if summed else grad_scores
    rest = spec.keys - begin - grad_scores.shape[3]
    return of_chunk if bias.shape[3] == 1 else pad(of_chunk, (begin, rest))


def as_numbers(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where it is True, else 0."""
    return _as_integers(chosen).to(dtype)


def _as_integers(chosen: Tensor) -> Tensor:
    """The same as integers: those that they are in memory, but for torch.vmap, which cannot read them in the oldest
    torch. On a CPU torch takes five times as long to make floats of bools as of those, and ten times as long to
    multiply by bools."""
    if readable(chosen):
        return chosen.view(torch.int8)
    return chosen.to(torch.int8) if chosen.device.type == "cpu" else chosen


def _unwatched(tensor: Tensor) -> bool:
    """Whether nobody can tell that a tensor of ours is changed in place, which saves a CPU the pages of another one."""
    return not tensor.requires_grad and readable(tensor)


class Scores(NamedTuple):
    scores: Tensor  # (b, h, i, j) and, where there are sinks, theirs as one more key
    bent: Tensor | None  # (b, h, i, j), under a softcap: the hyperbolic tangents
    visible: Tensor | None  # the visible pairs, (b|1, h|1, i|1, j), where they are guarded
    grouped: Tensor | None  # the same as (b, hk, g i, j), or what broadcasts to it
    dead: Tensor | None  # the dead rows


def scores_of(operands: Operands, hidden: Hidden, spec: AttentionSpec, guarded: bool, first: int, last: int) -> Scores:
    """The scores of the queries from `first` to `last` with the keys that any of them may see.

    They are -inf where a pair is hidden, and finite in dead rows: of -inf alone a softmax makes NaN, which a gradient
    of zero would carry on into the keys.
    """
    begin, end = spec.keys_seen(first, last)
    q, k = cut(operands.q, 2, (first, last)) * spec.scale, cut(operands.k, 2, (begin, end))
    hiding, dead = None, hidden.rows
    by_sums = (operands.mask is not None or spec.banded) and not guarded and readable(q)  # finite scores, on a CPU
    if by_sums and operands.mask is dead is None and spec.causal and spec.window == (None, None):
        visible, late = None, end - 1 > first + spec.offset
        hiding = future(spec, (first, last), (begin, end), q.dtype) if late else None
    else:
        visible = visible_pairs(operands.mask, spec, first, last, end, q.device, begin)
    if dead is not None and dead.shape[2] > 1:
        dead = dead[:, :, first:last]
    shown = visible if visible is None or dead is None else visible | dead
    visible = grouped = visible if guarded else None
    if visible is not None and spec.group > 1:
        grouped = _grouped(visible.expand(*q.shape[:3], end - begin), spec.kv_heads)
    within_products = None if spec.softcap else hiding
    scores, bent = products(q, k, grouped, within_products), None
    if spec.softcap:
        bent = torch.tanh(scores / spec.softcap)
        scores = bent * spec.softcap
    for term in _added(operands, spec, first, last):
        scores = scores + (term if visible is None else torch.where(visible, term, 0.0))
    if shown is not None and by_sums:  # in a third of the time that a choice takes a CPU
        hiding = 1 - as_numbers(shown, q.dtype).reciprocal()
    elif shown is not None:
        scores = torch.where(shown, scores, -torch.inf)
    if hiding is not None and hiding is not within_products:
        scores = scores.add_(hiding) if _unwatched(scores) else scores + hiding
    if operands.sinks is not None:
        column = operands.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    return Scores(scores, bent, visible, grouped, dead)


def _added(operands: Operands, spec: AttentionSpec, first: int, last: int) -> Iterator[Tensor]:
    """What is added to the scores of a chunk's queries with the keys that any of them may see."""
    (begin, end), bias, slopes = spec.keys_seen(first, last), operands.bias, operands.alibi_slopes
    if bias is not None:
        yield bias_of_chunk(bias, spec, first, last)
    if slopes is not None:
        query, key = (torch.arange(*span, device=slopes.device) for span in ((first, last), (begin, end)))
        distance = (key - query[:, None] - spec.offset).abs()
        yield -slopes.to(spec.accumulator_dtype)[..., None, None] * distance


def bias_of_chunk(bias: Tensor, spec: AttentionSpec, first: int, last: int) -> Tensor:
    """What a bias has for a chunk's queries and the keys that any of them may see."""
    begin, end = spec.keys_seen(first, last)
    bias = bias if bias.shape[2] == 1 else bias[:, :, first:last]
    return (bias if bias.shape[3] == 1 else bias[..., begin:end]).to(spec.accumulator_dtype)


def cut(tensor: Tensor, dim: int, within: tuple[int, int]) -> Tensor:
    """A range of a dimension: the tensor itself where that is all of it, which saves several microseconds."""
    first, last = within
    return tensor if known(last - first == tensor.shape[dim]) else tensor.narrow(dim, first, last - first)


# Products of query heads with the key/value heads that they read. Where `visible`, `(b, hk, g i, j)`, says which pairs
# to take, the others are left out whatever they hold.


def products(x: Tensor, y: Tensor, visible: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """`(b, h, i, c), (b, hk, j, c) -> (b, h, i, j)`: each row of x with each of y. What is `added` to all heads alike,
    `(1, 1, i, j)`, costs no operator of its own."""
    _, kv_heads, keys, _ = y.shape
    if visible is not None:
        return pairs(_grouped(x, kv_heads), y, visible).view(*x.shape[:3], keys)
    rows, columns = _as_matrices(x, kv_heads), _as_matrices(y, kv_heads).mT
    if added is None:
        return torch.bmm(rows, columns).view(*x.shape[:3], keys)
    once = added[0].expand(_group(x, kv_heads), -1, -1).reshape(1, rows.shape[1], keys)
    return torch.baddbmm(once, rows, columns).view(*x.shape[:3], keys)


def weighted(weights: Tensor, y: Tensor, visible: Tensor | None) -> Tensor:
    """`(b, h, i, j), (b, hk, j, c) -> (b, h, i, c)`: the sums of y's rows by their weights."""
    kv_heads = y.shape[1]
    if visible is not None:
        found = contract(_grouped(weights, kv_heads), y, visible)
    else:
        found = torch.bmm(_as_matrices(weights, kv_heads), _as_matrices(y, kv_heads))
    return found.view(*weights.shape[:3], y.shape[3])


def gathered(weights: Tensor, x: Tensor, visible: Tensor | None, kv_heads: int) -> Tensor:
    """`(b, h, i, j), (b, h, i, c) -> (b, hk, j, c)`: the sums over the queries, and over the heads of a group."""
    if visible is not None:
        return contract(_grouped(weights, kv_heads).mT, _grouped(x, kv_heads), visible.mT)
    found = torch.bmm(_as_matrices(weights, kv_heads).mT, _as_matrices(x, kv_heads))
    return found.view(x.shape[0], kv_heads, *found.shape[1:])


def _grouped(tensor: Tensor, kv_heads: int) -> Tensor:
    """`(b, h, i, c) -> (b, hk, g i, c)`: what reads one key/value head, as one matrix."""
    batch, heads, rows, width = tensor.shape
    return tensor if heads == kv_heads else tensor.reshape(batch, kv_heads, heads // kv_heads * rows, width)


def _as_matrices(tensor: Tensor, kv_heads: int) -> Tensor:
    """The same without a dimension of its own for the batch: `(b hk, g i, c)`."""
    batch, _, rows, width = tensor.shape
    return tensor.reshape(batch * kv_heads, _group(tensor, kv_heads) * rows, width)


def _group(tensor: Tensor, kv_heads: int) -> int:
    return 1 if tensor.shape[1] == kv_heads else tensor.shape[1] // kv_heads


def visible_pairs(
    mask: Tensor | None, spec: AttentionSpec, first: int, last: int, end: int, device: torch.device, begin: int = 0
) -> Tensor | None:
    """Which of the keys from `begin` to `end` each query sees, bool `(b|1, h|1, i|1, end - begin)`; None where it is
    all of them."""
    shown = None if mask is None else (mask if mask.shape[2] == 1 else mask[:, :, first:last])[..., begin:end]
    left, right = spec.window[0], spec.right_end
    late = right is not None and not known(end <= first + spec.offset + right + 1)
    early = left is not None and not known(begin >= last - 1 + spec.offset - left)
    if not (late or early):
        return shown
    query, key = (torch.arange(*span, device=device) for span in ((first, last), (begin, end)))
    ahead = key - (query[:, None] + spec.offset)  # of a query's own place
    within = ahead <= right if late else ahead >= -left  # type: ignore[operator]
    if late and early:
        within = within & (ahead >= -left)  # type: ignore[operator]
    return within[None, None] if shown is None else shown & within


def future(spec: AttentionSpec, rows: tuple[int, int], keys: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """What causality hides of a range of keys from a range of queries, `(1, 1, i, j)`, on a CPU: 0 or -inf."""
    size = 1, 1, rows[1] - rows[0], keys[1] - keys[0]
    return torch.full(size, -torch.inf, dtype=dtype, device="cpu").triu_(rows[0] + spec.offset + 1 - keys[0])


def _dead_rows(
    mask: Tensor | None, spec: AttentionSpec, chunks: list[tuple[int, int]], device: torch.device
) -> Tensor | None:
    """The queries that see no key, bool `(b|1, h|1, i|1, 1)`; None where there can be none."""
    if spec.keys == 0:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    if mask is not None and mask.shape[2] != 1:
        seen = [visible_pairs(mask, spec, *chunk, spec.keys, device) for chunk in chunks]
        return ~torch.cat([part.any(dim=-1, keepdim=True) for part in seen if part is not None], dim=2)
    left, right = spec.window[0], spec.right_end
    if mask is None:
        if right is None or known(spec.offset + right >= 0):
            return None
        return (torch.arange(spec.queries, device=device) < -spec.offset - right)[None, None, :, None]
    if left is right is None:
        return ~mask.any(dim=-1, keepdim=True)
    # How many keys the mask shows before each, and so in any range.
    shown = pad(mask[:, :, 0].cumsum(dim=-1), (1, 0))
    query = torch.arange(spec.queries, device=device) + spec.offset
    begin = torch.zeros_like(query) if left is None else (query - left).clamp(0, spec.keys)
    end = torch.full_like(query, spec.keys) if right is None else (query + right + 1).clamp(0, spec.keys)
    return (shown[..., end] <= shown[..., begin])[..., None]


def _unread_keys(
    mask: Tensor | None, spec: AttentionSpec, chunks: list[tuple[int, int]], device: torch.device
) -> Tensor | None:
    """The keys that no query sees, bool `(b|1, hk|1, j, 1)`; None where there can be none."""
    left = spec.window[0]
    behind = None if left is None else spec.offset - left  # of all windows
    if mask is None or mask.shape[2] == 1:
        # Under `causal` too: the last query sees every key that the mask leaves.
        read = None if mask is None else mask[:, :, 0]
        if behind is not None and not known(behind <= 0):
            within = (torch.arange(spec.keys, device=device) >= behind)[None, None]
            read = within if read is None else read & within
        if read is None:
            return None
    else:
        seen = (visible_pairs(mask, spec, *chunk, spec.keys, mask.device) for chunk in chunks)
        read = functools.reduce(torch.logical_or, (part.any(dim=2) for part in seen if part is not None))
    if read.shape[1] > 1:
        read = reduce(read, "b (hk g) j -> b hk j", "any", hk=spec.kv_heads, g=spec.group)
    return ~read[..., None]


def no_autocast(device: torch.device) -> torch.autocast | nullcontext:
    """Within this context autocast, which would take products to half precision, does not. Where it is off, nothing is
    to be done, which takes less time than two operators."""
    if has_autocast(device.type) and (torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type)):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
