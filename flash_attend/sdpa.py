"""PyTorch's own fused attention on a CPU, held to the contract, a part of a call at a time: `parts.py` says which.

The kernel lets NaN and infinity through hidden pairs, and all that comes through is NaN: -inf is added to their scores,
and their weights, which are 0, multiply values. So a result without NaN is right. One with NaN is computed again with
zeros where nobody looks, and then by the einsum path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache, partial
from itertools import groupby
from math import copysign, isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attend.operands import Layouts, Operands
from flash_attend.parts import Group, Part, Range, split
from flash_attend.reference import (
    Merged,
    attention_reference,
    attention_reference_gradients,
    bounded,
    cleared,
    right_end,
    visible_pairs,
    with_whole_mask,
)
from flash_attend.segments import attend_by_groups, gradients_by_groups
from flash_attend.spec import CALLS_KEPT, AttentionSpec

__all__ = ["attention_backward", "attention_forward", "backward_of_part", "plan_forward"]

# Called as a function of torch, an operator takes 3 microseconds less; of the backward there is none.
FORWARD = torch._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# In float32: weights are off by half a unit in its last place, 1.5e-5 of their size, at most. In float64 as far off.
LARGEST_LSE = {torch.float32: 256.0, torch.float64: 256.0 * 2.0**29}
CONVERTED = 2**18  # elements of q that are converted at one time


class Kept(NamedTuple):
    """What a forward leaves for its backward beside its results: nothing."""

    def packed(self) -> list[Tensor]:
        """As tensors."""
        return []


NOTHING = Kept()


def attention_forward(operands: Operands, spec: AttentionSpec, tiles: None) -> tuple[Tensor, Tensor, Kept]:
    """`out (b, h, i, dv)` and `lse (b, h, i)`, on a CPU."""
    if spec.sequences is not None:
        out, lse = attend_by_groups(partial(attention_forward, tiles=None), operands, spec)
        assert lse is not None
        return out.clone(), lse.clone(), NOTHING  # no views, as below
    operands, spec = with_whole_mask(operands, spec)
    groups = split(operands.mask, spec)
    for read in (lambda: operands, lambda: cleared(operands, spec)[0]):
        found = _forward(read(), spec, groups)
        if found is not None and not _leaks(groups, found):
            return *found, NOTHING
    out, lse = attention_reference(operands, spec, return_lse=True)
    assert lse is not None
    return out.clone(), lse.clone(), NOTHING  # a view may not be changed in place by whoever is given it


def plan_forward(spec: AttentionSpec, tiles: None, layouts: Layouts) -> Callable[[Operands], tuple] | None:
    """The same for operands with these layouts, where torch's kernel takes them as they are; else None."""
    if spec.sequences is not None:
        return None
    rows_alone = layouts.q[3] == layouts.k[3] == layouts.v[3] == 1
    part = _whole(split(None, spec), spec) if layouts.mask is None and rows_alone else None
    if part is None:
        return None
    causal, scale = part.causal, spec.scale

    def forward(operands: Operands) -> tuple[Tensor, Tensor, Kept]:
        q, k, v, *_ = operands
        out, lse = FORWARD(q, k, v, 0.0, causal, scale=scale)
        sound = lse.count_nonzero().item() == lse.numel() or bounded(spec, q, k)
        if sound and not (causal and _has_nan(out)):
            return out, lse, NOTHING
        return attention_forward(operands, spec, tiles)

    return forward


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    kept: Kept,
    spec: AttentionSpec,
    tiles: None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and, where there is one, the bias; None where `needed` says so. Torch's operator knows
    no gradient of an LSE or of a bias, and its weights are as exact as an LSE is: what has such a gradient or large
    scores goes by the einsum path."""
    if spec.sequences is not None:

        def differentiate(grad_out: Any, grad_lse: Any, out: Any, lse: Any, *call: Any) -> tuple[Tensor | None, ...]:
            of_group, spec_of_group = call
            return attention_backward(grad_out, grad_lse, of_group, out, lse, NOTHING, spec_of_group, None, needed)

        return gradients_by_groups(differentiate, (grad_out, grad_lse, out, lse), operands, spec)
    return _gradients_of(grad_out, grad_lse, operands, out, lse, spec, needed, None)


def backward_of_part(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    tiles: None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The same where the keys are a part of those that `out` and `lse` are over."""
    return _gradients_of(grad_out, grad_lse, operands, out, lse, spec, needed, Merged(out, lse))


def _gradients_of(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    needed: Sequence[bool],
    merged: Merged | None,
) -> tuple[Tensor | None, ...]:
    found: Any = None
    of_bias = spec.bias is not None and needed[3]
    if grad_out is not None and grad_lse is None and not of_bias and _is_exact(lse):
        operands, spec = with_whole_mask(operands, spec)
        groups = split(operands.mask, spec)
        whole = _whole(groups, spec)
        rows_alone = all([tensor.stride(-1) == 1 for tensor in (*operands[:3], grad_out, out)])
        if whole is None or not rows_alone:
            found = _backward(grad_out, operands, out, lse, spec, groups)
        else:
            found = BACKWARD(grad_out, *operands[:3], out, lse, 0.0, whole.causal, scale=spec.scale)
        if _leaks(groups, found):
            read, (rows, _) = cleared(operands, spec)
            grad_out = grad_out if rows is None else grad_out.masked_fill(rows, 0.0)
            found = _backward(grad_out, read, out, lse, spec, groups)
            found = None if _leaks(groups, found) else found
    if found is None:
        found = attention_reference_gradients(grad_out, grad_lse, operands, spec, merged)
    found = *found, *[None] * (len(needed) - len(found))
    return tuple([grad if need else None for grad, need in zip(found, needed, strict=True)])


def _whole(groups: list[Group], spec: AttentionSpec) -> Part | None:
    """The only part of a call that torch's kernel takes as it is, from which everything between it and its caller is
    left out: of a small call that was half the time."""
    if len(groups) != 1 or len(groups[0].parts) != 1 or not _takes(spec):
        return None
    part = groups[0].parts[0]
    whole = part.rows == (0, spec.queries) and part.keys == (0, spec.keys) and groups[0].entries == (0, spec.batch)
    return part if whole and not part.biased else None


def _takes(spec: AttentionSpec) -> bool:
    """Whether torch's kernel takes a call's dtype and scale."""
    return _multiplies(spec.dtype) and _factors(spec) == (1.0, spec.scale)


def _leaks(groups: list[Group], found: Sequence[Tensor]) -> bool:
    """Whether something may have come through a hidden pair: then it is in `out`, or in a gradient of q or k."""
    if not any([part.causal or part.biased for group in groups for part in group.parts]):
        return False
    return any(map(_has_nan, found[:2]))


def _has_nan(tensor: Tensor) -> bool:
    return isnan(tensor.sum().item())


def _is_exact(lse: Tensor) -> bool:
    """Whether weights that are recomputed from an LSE are as exact as a softmax's."""
    sizes, largest = lse.abs(), LARGEST_LSE[lse.dtype]
    return not lse.numel() or sizes.max().item() <= largest or not ((sizes > largest) & sizes.isfinite()).any()


class _Kernel:
    """Torch's kernel on the tensors of one group of batch entries."""

    def __init__(self, operands: Operands, spec: AttentionSpec, group: Group, dtype: torch.dtype) -> None:
        q, k, v = [_cut(tensor, 0, group.entries) for tensor in operands[:3]]
        if group.picked is not None:
            k, v = k.index_select(2, group.picked), v.index_select(2, group.picked)
        self.picked, mask = group.picked, operands.mask
        self.mask = mask if mask is None or mask.shape[0] == 1 else _cut(mask, 0, group.entries)
        self.spec, (self.factor, self.scale) = spec, _factors(spec)
        self.bias: Tensor | None = None
        self.slopes: Tensor | None = None
        if spec.adds_to_scores:
            self._take_added(operands, group)
        q = q if self.factor == 1 else q * self.factor
        self.q, self.k, self.v = [_readable_rows(tensor.to(dtype)) for tensor in (q, k, v)]

    def _take_added(self, operands: Operands, group: Group) -> None:
        """The group's bias and slopes, of the keys that it gathers."""
        self.bias, self.slopes = [
            x if x is None or x.shape[0] == 1 else _cut(x, 0, group.entries)
            for x in (operands.bias, operands.alibi_slopes)
        ]
        if group.picked is not None and self.bias is not None and self.bias.shape[3] > 1:
            self.bias = self.bias.index_select(3, group.picked)

    def forward(self, part: Part) -> tuple[Tensor, Tensor] | None:
        """Of a part's queries: out, and the LSE of the part's keys. The kernel makes 0 of both where all scores are
        -inf; None where those may be of visible keys."""
        bias, visible = self._bias(part)
        out, lse = FORWARD(*self._cut(part), 0.0, part.causal, attn_mask=bias, scale=self.scale)
        if _has_no_zero(lse):
            return out, lse
        if visible is not None:
            lse = lse.masked_fill(~visible.any(dim=-1), -torch.inf)
        return (out, lse) if _has_no_zero(lse) or bounded(self.spec, self.q, self.k) else None

    def backward(self, part: Part, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a part gives to the gradients of its queries and keys; `out` and `lse` are whole rows' own."""
        bias, visible = self._bias(part)
        lse = lse if visible is None else lse.masked_fill(lse == -torch.inf, 0.0)
        grads = BACKWARD(grad_out, *self._cut(part), out, lse, 0.0, part.causal, attn_mask=bias, scale=self.scale)
        return (grads[0] if self.factor == 1 else grads[0] * self.factor), grads[1], grads[2]

    def _cut(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        return _cut(self.q, 2, part.rows), _cut(self.k, 2, part.keys), _cut(self.v, 2, part.keys)

    def _bias(self, part: Part) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the scores, -inf where a pair is hidden, `(b, h, i, j)` by strides; and the visible pairs,
        `(b|1, h|1, i|1, j)`. Each None where there is none, or all are."""
        if not part.biased:
            return None, None
        visible = self._visible(part)
        terms = [*self._added(part)] if self.spec.adds_to_scores else []
        if visible is not None:
            # As a sum it takes a third of the time of a choice, and a logarithm ten times.
            terms.append(1 - visible.to(self.spec.accumulator_dtype).reciprocal_())
        shape = (*self.q.shape[:2], part.rows[1] - part.rows[0], part.keys[1] - part.keys[0])
        bias = terms[0] if len(terms) == 1 else sum(terms[1:], terms[0])
        return bias.expand(shape), visible

    def _ahead(self, part: Part) -> Tensor:
        """How far a part's keys lie behind its queries' own places, `(i, j)`."""
        rows = torch.arange(*part.rows, device=self.q.device)[:, None] + self.spec.offset
        keys = torch.arange(*part.keys, device=self.q.device) if self.picked is None else self.picked[slice(*part.keys)]
        return keys - rows

    def _visible(self, part: Part) -> Tensor | None:
        """The visible pairs, `(b|1, h|1, i|1, j)`; None where it is all of them."""
        if self.picked is None:
            return visible_pairs(self.mask, self.spec, *part.rows, part.keys[1], self.q.device, part.keys[0])
        (left, _), right = self.spec.window, right_end(self.spec)
        if left is right is None:
            return None
        ahead = self._ahead(part)[None, None]
        visible = torch.ones_like(ahead, dtype=torch.bool) if right is None else ahead <= right
        return visible if left is None else visible & (ahead >= -left)

    def _added(self, part: Part) -> Iterator[Tensor]:
        """The bias and ALiBi, `(b|1, h|1, i|1, j|1)`."""
        dtype = self.spec.accumulator_dtype
        if self.bias is not None:
            bias = self.bias if self.bias.shape[2] == 1 else _cut(self.bias, 2, part.rows)
            yield (bias if bias.shape[3] == 1 else _cut(bias, 3, part.keys)).to(dtype)
        if self.slopes is not None:
            yield -self.slopes.to(dtype)[..., None, None] * self._ahead(part).abs()


def _cut(tensor: Tensor, dim: int, within: Range) -> Tensor:
    """A range of a dimension: the tensor itself where that is all of it, which saves several microseconds."""
    first, last = within
    return tensor if last - first == tensor.shape[dim] else tensor.narrow(dim, first, last - first)


def _readable_rows(tensor: Tensor) -> Tensor:
    """The tensor as torch's kernel reads it: it takes a row's elements for neighbours, whatever the stride says."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@lru_cache(maxsize=CALLS_KEPT)
def _factors(spec: AttentionSpec) -> tuple[float, float]:
    """The scale as a factor of q and one of the scores: what hides a pair is -inf times the latter, which is positive
    in the kernel's own dtype."""
    if abs(spec.scale) < torch.finfo(spec.accumulator_dtype).tiny:
        return spec.scale, 1.0
    return copysign(1.0, spec.scale), abs(spec.scale)


def _forward(operands: Operands, spec: AttentionSpec, groups: list[Group]) -> tuple[Tensor, Tensor] | None:
    """`out` and `lse`; None where the kernel may be wrong about a row."""
    out = lse = None
    for group, kernel in _kernels(operands, spec, groups):
        for rows, same in groupby(group.parts, key=lambda part: part.rows):
            found = _merged([kernel.forward(part) for part in same])
            if found is None:
                return None
            if found[0].shape == (spec.batch, spec.heads, spec.queries, spec.head_dim):
                return found[0].to(spec.dtype), found[1]
            if out is None or lse is None:
                out, lse = _of_dead_rows(operands.q, spec)
            for whole, piece in zip((out, lse), found, strict=True):
                _cut(_cut(whole, 0, group.entries), 2, rows).copy_(piece)
            del found, piece  # before the next one is computed
        del kernel
    return _of_dead_rows(operands.q, spec) if out is None or lse is None else (out, lse)


def _has_no_zero(lse: Tensor) -> bool:
    return lse.count_nonzero().item() == lse.numel()


def _of_dead_rows(q: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """In the layout that torch's kernel gives, and no view, which nobody may change in place."""
    shape = spec.batch, spec.heads, spec.queries, spec.value_dim
    row = spec.heads * spec.value_dim
    out = q.new_empty_strided(shape, (spec.queries * row, spec.value_dim, row, 1)).zero_()
    return out, q.new_full(out.shape[:3], -torch.inf, dtype=spec.accumulator_dtype)


def _merged(pieces: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    """The attention over keys that were attended to in one part or in two."""
    first, second = pieces if len(pieces) == 2 else (pieces[0], None)
    if len(pieces) == 1 or first is None or second is None:
        return first if second is None and len(pieces) == 1 else None
    (out, lse), (other, other_lse) = first, second
    # Of the difference: both less their sum, which is rounded, would not give shares that add up to 1.
    share, other_share = ((lse - other_lse).sigmoid()[..., None], (other_lse - lse).sigmoid()[..., None])
    return out * share + other * other_share, torch.logaddexp(lse, other_lse)


def _backward(
    grad_out: Tensor, operands: Operands, out: Tensor, lse: Tensor, spec: AttentionSpec, groups: list[Group]
) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] | None = None
    for group, kernel in _kernels(operands, spec, groups):
        of_rows = [_readable_rows(_cut(tensor, 0, group.entries).to(kernel.q.dtype)) for tensor in (grad_out, out)]
        found, rows, keys = _gradients(kernel, group.parts, [*of_rows, _cut(lse, 0, group.entries)])
        if all([grad.shape == tensor.shape for grad, tensor in zip(found, operands[:3], strict=True)]):
            return tuple([grad.to(spec.dtype) for grad in found])
        grads = grads or _zeros_like(operands[:3])
        for whole, of_group, within in zip(grads, found, (rows, keys, keys), strict=True):
            of_entries = _cut(whole, 0, group.entries)
            if group.picked is None or whole is grads[0]:
                _cut(of_entries, 2, within).copy_(of_group)
            else:
                of_entries.index_copy_(2, group.picked[slice(*within)], of_group.to(whole.dtype))
        del kernel, found, of_rows, of_group
    return grads or _zeros_like(operands[:3])


def _zeros_like(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Of their shapes, each element in a place of its own."""
    return tuple(torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _gradients(kernel: _Kernel, parts: list[Part], of_rows: list[Tensor]) -> tuple[tuple[Tensor, ...], Range, Range]:
    """Those of the queries and keys of a group, by its `grad_out`, `out` and `lse`, and in which ranges they are."""
    sums: tuple[Tensor, ...] = ()
    for part in parts:
        found = kernel.backward(part, *[_cut(tensor, 2, part.rows) for tensor in of_rows])
        if len(parts) == 1:
            return found, part.rows, part.keys
        sums = sums or _zeros_like((kernel.q, kernel.k, kernel.v))
        for total, of_part, within in zip(sums, found, (part.rows, part.keys, part.keys), strict=True):
            _cut(total, 2, within).add_(of_part)
    return sums, (0, kernel.q.shape[2]), (0, kernel.k.shape[2])


def _kernels(operands: Operands, spec: AttentionSpec, groups: list[Group]) -> Iterator[tuple[Group, _Kernel]]:
    """The kernels of the groups, which are cut where they are computed in another dtype, so that what is converted at
    one time stays small.

    Half precision is computed in float32 where the CPU has no products of it: torch's forward is no faster in it and
    gives an LSE of some 14 bits, and its backward takes ten times as long.
    """
    dtype = spec.dtype if _multiplies(spec.dtype) else spec.accumulator_dtype
    step = spec.batch if dtype == spec.dtype else max(1, CONVERTED // max(1, spec.heads * spec.queries * spec.head_dim))
    for whole in groups:
        first, last = whole.entries
        for start in range(first, last, step) if whole.parts else ():
            group = whole if step >= last - first else whole._replace(entries=(start, min(start + step, last)))
            yield group, _Kernel(operands, spec, group, dtype)


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has products of matrices in a dtype, as far as torch tells."""
    if dtype in (torch.float32, torch.float64):
        return True
    tells = getattr(torch.cpu, "get_capabilities", None)  # which the oldest torch has not
    return tells is not None and bool(tells()["amx_bf16" if dtype == torch.bfloat16 else "amx_fp16"])
