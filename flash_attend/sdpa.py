"""PyTorch's own fused attention on a CPU, held to the contract, with work that follows the visible pairs.

Torch's kernel takes one matrix of queries and one of keys, causal or not, with or without a bias. So a call is split
into parts. Where keys are padded, each batch entry (or run of equal ones) has its own range of keys; where there are
holes between them, the visible keys are gathered. Queries that see nothing are left out. Causal attention that is no
square is a rectangle, all visible, and a square. Any other mask goes by runs of queries, each with the keys that any
of them sees, and a bias of that size. No part has an array of all queries by all keys.

The kernel lets NaN and infinity through hidden pairs. Where a pair is hidden inside a part, the tensors are looked at
first, and the einsum path serves those that hold something of the kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby, pairwise
from math import copysign
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attend.operands import Operands
from flash_attend.reference import (
    attention_reference,
    attention_reference_gradients,
    bounded,
    cleared,
    visible_pairs,
)
from flash_attend.spec import AttentionSpec

__all__ = ["attention_backward", "attention_forward"]

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# In float32: weights are off by half a unit in its last place, 1.5e-5 of their size, at most. In float64 as far off.
LARGEST_LSE = 256.0
ROWS = 128  # queries at once where parts go by runs of them: of each run's square, half is hidden
CONVERTED = 2**20  # elements of q that are converted at one time


class Part(NamedTuple):
    """Queries and keys, as ranges, in one call of torch's kernel."""

    rows: tuple[int, int]
    keys: tuple[int, int]
    causal: bool = False  # a square, whose first query sees its first key
    biased: bool = False  # the mask says more than the ranges do


class Group(NamedTuple):
    """Batch entries that are split in the same way."""

    entries: tuple[int, int]
    parts: list[Part]
    picked: Tensor | None = None  # the keys that are gathered before: the parts' ranges are ranges of those


class Kept(NamedTuple):
    """What a forward leaves for its backward beside its results: nothing."""

    def packed(self) -> list[Tensor]:
        """As tensors."""
        return []


def attention_forward(operands: Operands, spec: AttentionSpec, tiles: None) -> tuple[Tensor, Tensor, Kept]:
    """`out (b, h, i, dv)` and `lse (b, h, i)`, on a CPU."""
    groups = _split(operands.mask, spec)
    harmless = _harmless(operands, spec, groups)
    if harmless is not None:
        out, lse = _forward(harmless[0], spec, groups)
        if _hides(groups) or _is_sound(lse):
            return out, lse, Kept()
    out, found = attention_reference(operands, spec, return_lse=True)
    assert found is not None
    return out.clone(), found.clone(), Kept()  # a view may not be changed in place by whoever is given it


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
    """The gradients of q, k and v, None where `needed` says so. Torch's operator knows no gradient of an LSE, and its
    weights are as exact as an LSE is: what has such a gradient or large scores goes by the einsum path."""
    found: tuple[Tensor | None, ...] | None = None
    if grad_out is not None and grad_lse is None and _is_exact(lse):
        groups = _split(operands.mask, spec)
        harmless = _harmless(operands, spec, groups, grad_out)
        if harmless is not None and (_hides(groups) or _is_sound(lse)):
            cleared_grad = harmless[1]
            assert cleared_grad is not None
            found = _backward(cleared_grad, harmless[0], out, lse, spec, groups)
    if found is None:
        found = attention_reference_gradients(grad_out, grad_lse, operands, spec)
    return tuple(grad if need else None for grad, need in zip(found, needed, strict=True))


def _hides(groups: list[Group]) -> bool:
    """Whether a part holds hidden pairs."""
    return any(part.causal or part.biased for group in groups for part in group.parts)


def _is_exact(lse: Tensor) -> bool:
    """Whether weights that are recomputed from an LSE are as exact as a softmax's."""
    largest = LARGEST_LSE * torch.finfo(torch.float32).eps / torch.finfo(lse.dtype).eps
    return not bool((lse.abs() > largest).logical_and(lse.isfinite()).any())


def _is_sound(lse: Tensor) -> bool:
    """Whether no row can have had scores of -inf alone, which torch's kernel gives an LSE of 0 and an output of 0."""
    return int(lse.count_nonzero()) == lse.numel()


def _harmless(
    operands: Operands, spec: AttentionSpec, groups: list[Group], grad_out: Tensor | None = None
) -> tuple[Operands, Tensor | None] | None:
    """The operands and the gradient, cleared where they take no part if that is needed, so that nothing shows through
    hidden pairs; None where something would."""
    if not _hides(groups):
        return operands, grad_out
    for attempt in (lambda: (operands, grad_out), lambda: _cleared(operands, spec, grad_out)):
        tensors, grad = attempt()
        if bounded(spec, *tensors[:3], *([] if grad is None else [grad])):
            return tensors, grad
    return None


def _cleared(operands: Operands, spec: AttentionSpec, grad_out: Tensor | None) -> tuple[Operands, Tensor | None]:
    operands, (rows, _) = cleared(operands, spec)
    return operands, grad_out if grad_out is None or rows is None else grad_out.masked_fill(rows, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# What is computed: read from the mask
# ---------------------------------------------------------------------------------------------------------------------


def _split(mask: Tensor | None, spec: AttentionSpec) -> list[Group]:
    """The parts of a call: every visible pair is in one of them."""
    if not spec.batch * spec.heads * spec.queries * spec.keys:
        return []
    if mask is None:
        return [Group((0, spec.batch), _ranged(0, spec.keys, spec))]
    if mask.shape[1] == mask.shape[2] == 1:
        return list(_by_entries(mask, spec))
    return [Group((0, spec.batch), list(_by_rows(mask, spec)))]


def _ranged(first_key: int, last_key: int, spec: AttentionSpec) -> list[Part]:
    """The parts of queries that may see the keys of a range."""
    if not spec.causal:
        return [Part((0, spec.queries), (first_key, last_key))]
    parts = []
    # Queries before `start` see nothing, those from `turn` on all of the range.
    start = min(max(first_key - spec.offset, 0), spec.queries)
    turn = min(max(last_key - spec.offset, start), spec.queries)
    diagonal = start + spec.offset
    if turn - start == 1:
        parts.append(Part((start, turn), (first_key, diagonal + 1)))
    elif turn > start:
        if diagonal > first_key and turn - start <= ROWS:
            parts.append(Part((start, turn), (first_key, turn + spec.offset), biased=True))
        else:
            if diagonal > first_key:
                parts.append(Part((start, turn), (first_key, diagonal)))
            parts.append(Part((start, turn), (diagonal, turn + spec.offset), causal=True))
    if turn < spec.queries:
        parts.append(Part((turn, spec.queries), (first_key, last_key)))
    return parts


def _by_entries(mask: Tensor, spec: AttentionSpec) -> Iterator[Group]:
    """The groups of a mask `(b|1, 1, 1, j)`."""
    shown = mask[:, 0, 0]
    steps = torch.ones(shown.shape[0], dtype=torch.bool, device=mask.device)
    steps[1:] = (shown[1:] != shown[:-1]).any(dim=1)
    firsts = steps.nonzero().flatten()
    counts, ranges = shown[firsts].sum(dim=1).tolist(), _ranges(shown[firsts])
    borders = [*firsts.tolist(), spec.batch]
    for entries, count, (first_key, last_key) in zip(pairwise(borders), counts, ranges, strict=True):
        if count == last_key - first_key:
            yield Group(entries, _ranged(first_key, last_key, spec) if count else [])
        else:
            picked = shown[entries[0]].nonzero().flatten()
            yield Group(entries, list(_of_picked(picked, spec)), picked)


def _of_picked(picked: Tensor, spec: AttentionSpec) -> Iterator[Part]:
    """The parts of queries that may see the keys at these positions, which are counted from the first of them."""
    if not spec.causal:
        yield Part((0, spec.queries), (0, picked.numel()))
        return
    # Of each query, how many keys it sees.
    last_seen = torch.arange(spec.offset + 1, spec.queries + spec.offset + 1, device=picked.device)
    counts = torch.searchsorted(picked, last_seen).tolist()
    for first in range(0, spec.queries, ROWS):
        last = min(first + ROWS, spec.queries)
        if counts[last - 1]:
            yield Part((first, last), (0, counts[last - 1]), biased=counts[first] < counts[last - 1])


def _by_rows(mask: Tensor, spec: AttentionSpec) -> Iterator[Part]:
    """The parts of any mask: runs of queries, with the range of keys that any of them sees."""
    whole = mask.shape[2] == 1 and not spec.causal
    rows = spec.queries if whole else ROWS
    for first in range(0, spec.queries, rows):
        last = min(first + rows, spec.queries)
        keys = min(max(last + spec.offset, 0), spec.keys) if spec.causal else spec.keys
        if not keys:
            continue
        visible = visible_pairs(mask, spec, first, last, keys, mask.device)
        assert visible is not None
        ((first_key, last_key),) = _ranges(visible.flatten(0, 2).any(dim=0)[None])
        if last_key > first_key:
            biased = not visible[..., first_key:last_key].all()
            yield Part((first, last), (first_key, last_key), biased=biased)


def _ranges(shown: Tensor) -> list[tuple[int, int]]:
    """From the first to behind the last that is True in each row of `(n, j)`; where none is, an empty range."""
    numbers = shown.to(torch.uint8)
    firsts, lasts = numbers.argmax(dim=1), shown.shape[1] - numbers.flip(1).argmax(dim=1)
    lasts = torch.where(shown.any(dim=1), lasts, firsts)
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Torch's kernel
# ---------------------------------------------------------------------------------------------------------------------


class _Kernel:
    """Torch's kernel on the tensors of one group of batch entries."""

    def __init__(self, operands: Operands, spec: AttentionSpec, group: Group, dtype: torch.dtype) -> None:
        first, last = group.entries
        q, k, v = (tensor[first:last] for tensor in operands[:3])
        if group.picked is not None:
            k, v = k.index_select(2, group.picked), v.index_select(2, group.picked)
        self.picked, mask = group.picked, operands.mask
        self.mask = mask if mask is None or mask.shape[0] == 1 else mask[first:last]
        # What hides a pair is -inf times a scale that has to be positive in the kernel's own dtype.
        usual = abs(spec.scale) >= torch.finfo(spec.accumulator_dtype).tiny
        self.factor, self.scale = (copysign(1.0, spec.scale), abs(spec.scale)) if usual else (spec.scale, 1.0)
        q = q if self.factor == 1 else q * self.factor
        self.q, self.k, self.v = (_readable_rows(tensor.to(dtype)) for tensor in (q, k, v))
        self.spec = spec

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        """Of a part's queries: out, and the LSE of the part's keys."""
        q, k, v = self._slices(part)
        bias, dead = self._bias(part)
        out, lse = FORWARD(q, k, v, 0.0, part.causal, attn_mask=bias, scale=self.scale)
        return out, lse if dead is None else lse.masked_fill(dead, -torch.inf)

    def backward(self, part: Part, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a part gives to the gradients of its queries and keys; `out` and `lse` are whole rows' own."""
        bias, dead = self._bias(part)
        lse = lse if dead is None else lse.masked_fill(dead, 0.0)
        grads = BACKWARD(grad_out, *self._slices(part), out, lse, 0.0, part.causal, attn_mask=bias, scale=self.scale)
        return (grads[0] if self.factor == 1 else grads[0] * self.factor), grads[1], grads[2]

    def _slices(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        rows, keys = slice(*part.rows), slice(*part.keys)
        return self.q[:, :, rows], self.k[:, :, keys], self.v[:, :, keys]

    def _bias(self, part: Part) -> tuple[Tensor | None, Tensor | None]:
        """0 or -inf, `(b, h, i, j)` by strides, and the rows that see nothing, `(b|1, h|1, i|1)`."""
        if not part.biased:
            return None, None
        if self.picked is not None:
            rows = torch.arange(*part.rows, device=self.picked.device)[:, None] + self.spec.offset
            visible = (self.picked[slice(*part.keys)] <= rows)[None, None]
        else:
            pairs = visible_pairs(self.mask, self.spec, *part.rows, part.keys[1], self.q.device)
            assert pairs is not None
            visible = pairs[..., part.keys[0] :]
        shape = (*self.q.shape[:2], part.rows[1] - part.rows[0], part.keys[1] - part.keys[0])
        bias = 1 - visible.to(self.spec.accumulator_dtype).reciprocal()
        return bias.expand(shape), ~visible.any(dim=-1)


def _readable_rows(tensor: Tensor) -> Tensor:
    """The tensor as torch's kernel reads it: it takes a row's elements for neighbours, whatever the stride says."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _forward(operands: Operands, spec: AttentionSpec, groups: list[Group]) -> tuple[Tensor, Tensor]:
    out = lse = None
    for group, kernel in _kernels(operands, spec, groups):
        for rows, same in groupby(group.parts, key=lambda part: part.rows):
            found = _merged([kernel.forward(part) for part in same])
            if group.entries == (0, spec.batch) and rows == (0, spec.queries):
                return found[0].to(spec.dtype), found[1]
            if out is None or lse is None:
                out, lse = _of_dead_rows(operands.q, spec)
            at = slice(*group.entries), slice(None), slice(*rows)
            out[at], lse[at] = found
    return _of_dead_rows(operands.q, spec) if out is None or lse is None else (out, lse)


def _of_dead_rows(q: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """In the layout that torch's kernel gives, and no view, which nobody may change in place."""
    shape = spec.batch, spec.heads, spec.queries, spec.value_dim
    row = spec.heads * spec.value_dim
    out = q.new_empty_strided(shape, (spec.queries * row, spec.value_dim, row, 1)).zero_()
    return out, q.new_full(out.shape[:3], -torch.inf, dtype=spec.accumulator_dtype)


def _merged(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention over keys that were attended to in one part or in two."""
    if len(found) == 1:
        return found[0]
    (out, lse), (other, other_lse) = found
    # Of the difference: both less their sum, which is rounded, would not give shares that add up to 1.
    share, other_share = ((lse - other_lse).sigmoid()[..., None], (other_lse - lse).sigmoid()[..., None])
    return out * share + other * other_share, torch.logaddexp(lse, other_lse)


def _backward(
    grad_out: Tensor, operands: Operands, out: Tensor, lse: Tensor, spec: AttentionSpec, groups: list[Group]
) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] | None = None
    for group, kernel in _kernels(operands, spec, groups):
        entries, dtype = slice(*group.entries), kernel.q.dtype
        rows = *(_readable_rows(tensor[entries].to(dtype)) for tensor in (grad_out, out)), lse[entries]
        found = _gradients(kernel, group.parts, *rows)
        if found is None:
            continue
        if group.entries == (0, spec.batch) and group.picked is None:
            return tuple(grad.to(spec.dtype) for grad in found)
        grads = grads or _zeros_like(operands[:3])
        for total, of_group, picked in zip(grads, found, (None, group.picked, group.picked), strict=True):
            if picked is None:
                total[entries] = of_group
            else:
                total[entries].index_copy_(2, picked, of_group.to(total.dtype))
    return grads or _zeros_like(operands[:3])


def _zeros_like(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Of their shapes, each element in a place of its own."""
    return tuple(torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _gradients(
    kernel: _Kernel, parts: list[Part], grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...] | None:
    """Those of the queries and keys of a group; None where it has no visible pair."""
    pieces, sums = [piece for part in parts for piece in _narrow(part)], None
    for piece in pieces:
        rows, keys = slice(*piece.rows), slice(*piece.keys)
        found = kernel.backward(piece, grad_out[:, :, rows], out[:, :, rows], lse[:, :, rows])
        whole = kernel.q, kernel.k, kernel.v
        if len(pieces) == 1 and all(grad.shape == tensor.shape for grad, tensor in zip(found, whole, strict=True)):
            return found
        sums = sums or _zeros_like(whole)
        for total, of_piece, at in zip(sums, found, (rows, keys, keys), strict=True):
            total[:, :, at] += of_piece
    return sums


def _narrow(part: Part) -> Iterator[Part]:
    """A square as narrow squares and the rectangles beside them: the backward computes all of what it is given."""
    if not part.causal:
        yield part
        return
    (first_row, last_row), (first_key, _) = part.rows, part.keys
    for first in range(first_row, last_row, ROWS):
        rows = first, min(first + ROWS, last_row)
        begin, end = (first_key + row - first_row for row in rows)
        if begin > first_key:
            yield Part(rows, (first_key, begin))
        yield Part(rows, (begin, end), causal=True)


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
            group = whole._replace(entries=(start, min(start + step, last)))
            yield group, _Kernel(operands, spec, group, dtype)


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has products of matrices in a dtype, as far as torch tells."""
    if dtype in (torch.float32, torch.float64):
        return True
    tells = getattr(torch.cpu, "get_capabilities", None)  # which the oldest torch has not
    return tells is not None and bool(tells()["amx_bf16" if dtype == torch.bfloat16 else "amx_fp16"])
