"""PyTorch's own fused attention on a CPU, held to the contract, a part of a call at a time: `parts.py` says which.

The kernel lets NaN and infinity through hidden pairs, and all that comes through is NaN: -inf is added to their scores,
and their weights, which are 0, multiply values. So a result without NaN is right. One with NaN is computed again with
zeros where nobody looks, and then by the einsum path.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_char
from dataclasses import replace
from functools import cache, lru_cache, partial
from itertools import groupby
from math import copysign
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attend.operands import Layouts, Operands
from flash_attend.parts import ONE_CALL, Group, Part, Range, is_small, keys_worth, split, whole_and_masked
from flash_attend.reference import (
    Merged,
    attention_reference,
    attention_reference_gradients,
    bounded,
    cleared,
    cut,
    future,
    has_nan,
    visible_pairs,
    with_whole_mask,
)
from flash_attend.segments import attend_by_groups, gradients_by_groups
from flash_attend.spec import CALLS_KEPT, AttentionSpec

__all__ = [
    "NOTHING",
    "Kept",
    "attention_backward",
    "attention_forward",
    "backward_of_part",
    "factors",
    "plan_backward",
    "plan_forward",
    "plan_out",
]

# Called as a function of torch, an operator takes 3 microseconds less; of the backward there is none.
FORWARD = torch._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# In float32: weights are off by half a unit in its last place, 1.5e-5 of their size, at most. In float64 as far off.
LARGEST_LSE = {torch.float32: 256.0, torch.float64: 256.0 * 2.0**29}
# By size, the most significant bytes of numbers within [2^-126, 2^7), or of float64 within [2^-1007, 2^33).
OF_USUAL = {
    size: bytes([sign + byte for sign in (0, 128) for byte in range(1, end)]) for size, end in ((4, 67), (8, 66))
}
# By dtype, those of numbers that are neither NaN nor infinite, without the largest.
OF_FINITE = {
    dtype: bytes([sign + byte for sign in (0, 128) for byte in range(124 if dtype == torch.float16 else 127)])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
HIGHEST = -1 if sys.byteorder == "little" else 0
MOST_READS = 32  # of last rows, one after another: they take as long as two of torch's operators
# By dtype, integers of its size, and the bits of -inf as one of them.
OF_INFINITY = {
    torch.bfloat16: (torch.int16, -(2**7)),
    torch.float16: (torch.int16, -(2**10)),
    torch.float32: (torch.int32, -(2**23)),
    torch.float64: (torch.int64, -(2**52)),
}
FEW = 2**11  # elements, of which an operator takes no longer than to start it
SOME = 2**16  # elements, of which one slow operator takes no longer than to start three
FEWEST_PRODUCTS = 8 * ONE_CALL  # of a unit of work: what is smaller is not cut further


class Kept(NamedTuple):
    """What a forward leaves for its backward beside its results: what hid pairs of a call too small to be split."""

    hiding: Tensor | None = None  # (b|1, h|1, i|1, j), 0 or -inf, of all keys or of those that were read

    def packed(self) -> list[Tensor]:
        """As tensors."""
        return []


class Usual(Kept):
    """The same of a call that torch's kernel took in one piece, whose LSE is usual: see `_Looks`."""


NOTHING, USUAL = Kept(), Usual()


def attention_forward(operands: Operands, spec: AttentionSpec, tiles: None) -> tuple[Tensor, Tensor, Kept]:
    """`out (b, h, i, dv)` and `lse (b, h, i)`, on a CPU."""
    return _attend(operands, spec)


def _attend(operands: Operands, spec: AttentionSpec, *, lse_is_read: bool = True) -> tuple[Tensor, Tensor, Kept]:
    """The same. An LSE that nobody reads may be less exact: see `_dtype_for`."""
    if spec.sequences is not None:
        out, lse = attend_by_groups(partial(attention_forward, tiles=None), operands, spec)
        assert lse is not None
        return out.clone(), lse.clone(), NOTHING  # no views, as below
    if spec.head_dim != spec.value_dim:
        out, lse, kept = _attend(_evened(operands, spec), _even(spec), lse_is_read=lse_is_read)
        return _cut_dims(out, spec.value_dim), lse, kept
    operands, spec = with_whole_mask(operands, spec)
    groups = split(operands.mask, spec)
    part = _only(groups, spec, lse_is_read)
    if part is not None and _rows_alone(*operands[:3]):
        found = _Kernel(operands, spec).forward(part)
        if found is not None and not (part.hides and has_nan(found[0])):
            return *found, NOTHING
    for read in (lambda: operands, lambda: cleared(operands, spec)[0]):
        found = _forward(read(), spec, groups, lse_is_read)
        if found is not None and not _leaks(groups, found):
            return *found, NOTHING
    out, lse = attention_reference(operands, spec, return_lse=True)
    assert lse is not None
    return out.clone(), lse.clone(), NOTHING  # a view may not be changed in place by whoever is given it


@lru_cache(maxsize=CALLS_KEPT)
def _even(spec: AttentionSpec) -> AttentionSpec:
    """That of `_evened` operands."""
    width = max(spec.head_dim, spec.value_dim)
    return replace(spec, head_dim=width, value_dim=width)


def _evened(operands: Operands, spec: AttentionSpec) -> Operands:
    """The same with as many dims of values as of queries and keys, for which alone torch has a kernel: zeros that fill
    vectors up change no score, and give dims of out that are cut off."""
    q, k, v, *others = operands
    width = max(spec.head_dim, spec.value_dim)
    return Operands(_filled_up(q, width), _filled_up(k, width), _filled_up(v, width), *others)


def _filled_up(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[-1]
    return torch.constant_pad_nd(tensor, (0, missing)) if missing else tensor


def _cut_dims(tensor: Tensor, dims: int) -> Tensor:
    """The first dims of vectors, in memory of their own."""
    return tensor if tensor.shape[-1] == dims else tensor[..., :dims].contiguous()


def plan_out(spec: AttentionSpec, layouts: Layouts) -> Callable[[Operands], tuple] | None:
    """`forward` of operands with these layouts, of which nobody reads the LSE; None where that takes as long."""
    if spec.sequences is not None or _multiplies(spec.dtype):
        return None
    planned = plan_forward(spec, None, layouts, lse_is_read=False)
    return planned or partial(_attend, spec=spec, lse_is_read=False)


def plan_forward(
    spec: AttentionSpec, tiles: None, layouts: Layouts, *, lse_is_read: bool = True
) -> Callable[[Operands], tuple] | None:
    """`attention_forward` of operands with these layouts, where torch's kernel takes them as they are; else None."""
    if spec.head_dim != spec.value_dim:
        return _plan_evened(spec, layouts, lse_is_read)
    part = _whole(spec, layouts, lse_is_read)
    if part is None:
        return None
    otherwise = partial(_attend, spec=spec, lse_is_read=lse_is_read)
    if part.biased:
        return _plan_masked(spec, layouts.mask_sizes, otherwise, lse_is_read)
    causal, scale, dtype = part.causal, spec.scale, _dtype_of(spec, lse_is_read)
    converted, looks = dtype != spec.dtype, _Looks.at(spec, dtype)

    def forward(operands: Operands) -> tuple[Tensor, Tensor, Kept]:
        q, k, v, *_ = operands
        if converted:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        out, lse = FORWARD(q, k, v, 0.0, causal, scale=scale)
        found = _checked(looks, spec, q, k, out, lse, causal, None)
        if found is None:
            return otherwise(operands)
        return out.to(spec.dtype) if converted else out, *found

    return forward


def _plan_evened(spec: AttentionSpec, layouts: Layouts, lse_is_read: bool) -> Callable[[Operands], tuple] | None:
    even = plan_forward(_even(spec), None, _even_layouts(layouts, spec), lse_is_read=lse_is_read)
    if even is None:
        return None

    def forward(operands: Operands) -> tuple[Tensor, Tensor, Kept]:
        out, lse, kept = even(_evened(operands, spec))
        return _cut_dims(out, spec.value_dim), lse, kept

    return forward


def _even_layouts(layouts: Layouts, spec: AttentionSpec) -> Layouts:
    """Those of `_evened` operands, as far as `_whole` asks: the rows of what was filled up are neighbours."""
    filled = ("q", "k") if spec.head_dim < spec.value_dim else ("v",)
    return layouts._replace(**{name: (*getattr(layouts, name)[:3], 1) for name in filled})


class _Looks(NamedTuple):
    """Looks at what torch's kernel makes of calls in one piece: at the most significant bytes of numbers, which takes a
    fraction of the time that torch's operators need to start, after a kernel that left nothing of them in the caches.
    """

    # Whether each element of an LSE is surely neither 0 nor infinite, and `_is_exact`.
    usual: Callable[[Tensor], bool]
    # Whether NaN came through hidden pairs into the `out` of such an LSE: then it came from v, and the last row of each
    # head has it too, or something infinite that it sees.
    let_through: Callable[[Tensor], bool]
    # Whether NaN came through hidden pairs into the gradient of q: by that of a score, and so into all of a row, or by
    # an infinite number in k, and so into the same dim of every row, the last among them.
    nan_in_queries: Callable[[Tensor], bool]

    @staticmethod
    def at(spec: AttentionSpec, dtype: torch.dtype) -> _Looks:
        """At calls that are computed in a dtype."""
        of_number, of_out = spec.accumulator_dtype.itemsize, dtype.itemsize
        lse_bytes: Any = c_char * (spec.batch * spec.heads * spec.queries * of_number)
        grad_bytes: Any = c_char * (spec.batch * spec.heads * spec.queries * spec.head_dim * of_out)
        of_number_first, of_out_first = HIGHEST % of_number, HIGHEST % of_out
        usual, finite = OF_USUAL[of_number], OF_FINITE[dtype]

        @cache
        def last_rows(strides: tuple[int, ...]) -> tuple[Any, list[int]]:
            """As bytes, and where they begin in `(b, h, i, d)`; of all heads at once where those are neighbours."""
            of_entry, of_head, of_row, _ = strides
            heads, width = spec.heads, spec.value_dim
            if of_head == width:
                heads, width = 1, heads * width
            if spec.batch * heads > MOST_READS:
                return None, []
            starts = [entry * of_entry + head * of_head for entry in range(spec.batch) for head in range(heads)]
            return c_char * (width * of_out), [(start + (spec.queries - 1) * of_row) * of_out for start in starts]

        def is_usual(lse: Tensor) -> bool:
            return not lse_bytes.from_address(lse.data_ptr())[of_number_first::of_number].translate(None, usual)

        def are_last_rows_finite(tensor: Tensor) -> bool:
            row_bytes, starts = last_rows(tensor.stride())
            if row_bytes is None:
                return False
            first = tensor.data_ptr()
            for start in starts:
                if row_bytes.from_address(first + start)[of_out_first::of_out].translate(None, finite):
                    return False
            return True

        def let_through(out: Tensor) -> bool:
            return not are_last_rows_finite(out) and has_nan(out)

        def nan_in_queries(grad: Tensor) -> bool:
            if not grad.is_contiguous() and not grad.transpose(1, 2).is_contiguous():
                return has_nan(grad)
            firsts = grad_bytes.from_address(grad.data_ptr())[of_out_first :: spec.head_dim * of_out]
            sound = not firsts.translate(None, finite) and are_last_rows_finite(grad)
            return not sound and has_nan(grad)

        return _Looks(is_usual, let_through, nan_in_queries)


def _checked(
    looks: _Looks, spec: AttentionSpec, q: Tensor, k: Tensor, out: Tensor, lse: Tensor, causal: bool,
    hiding: Tensor | None,
) -> tuple[Tensor, Kept] | None:  # fmt: skip
    """The LSE of what torch's kernel made of a call in one piece, and what its backward needs; None where `out` may be
    wrong."""
    hides = causal or hiding is not None
    if looks.usual(lse):  # then there is no NaN among the scores
        return None if hides and looks.let_through(out) else (lse, USUAL if hiding is None else Usual(hiding))
    sound = _has_no_zero(lse)
    if not sound and hiding is not None:
        lse = lse.masked_fill((hiding == -torch.inf).all(dim=-1), -torch.inf)
        sound = _has_no_zero(lse)
    if not (sound or bounded(spec, q, k)) or (hides and has_nan(out)):
        return None
    return lse, Kept(hiding)


def plan_backward(spec: AttentionSpec, layouts: Layouts) -> Callable[..., tuple[Tensor, ...] | None] | None:
    """`(grad_out, operands, out, lse, kept) -> gradients` of a call that `plan_forward` serves, and of whose LSE there
    is none: those of q, k and v whether they are needed or not. None where `attention_backward` is to be asked."""
    part = _whole(spec, layouts) if spec.head_dim == spec.value_dim else None
    if part is None:
        return None
    causal = spec.causal and spec.queries > 1 if part.biased else part.causal
    scale, dtype = spec.scale, _dtype_of(spec)
    looks = _Looks.at(spec, dtype)

    def backward(
        grad_out: Tensor, operands: Operands, out: Tensor, lse: Tensor, kept: Kept
    ) -> tuple[Tensor, ...] | None:
        (q, k, v, *_), (hiding,) = operands, kept
        if type(kept) is not Usual or not _rows_alone(q, k, v, out, grad_out):
            return None
        (first, last), within = (0, spec.keys), causal and hiding is None
        if part.biased and (hiding is None or hiding.shape[3] < last):
            assert operands.mask is not None
            (first, last), _ = keys_worth(operands.mask, spec)
            k, v = cut(k, 2, (first, last)), cut(v, 2, (first, last))
        if dtype != spec.dtype:
            grad_out, q, k, v, out = [x.to(dtype) for x in (grad_out, q, k, v, out)]
        found = BACKWARD(grad_out, q, k, v, out, lse, 0.0, within, attn_mask=hiding, scale=scale)
        if (within or hiding is not None) and looks.nan_in_queries(found[0]):
            return None
        if dtype != spec.dtype:
            found = [grad.to(spec.dtype) for grad in found]
        if last - first < spec.keys:
            found = found[0], *[torch.constant_pad_nd(grad, (0, 0, first, spec.keys - last)) for grad in found[1:]]
        return found

    return backward


def _whole(spec: AttentionSpec, layouts: Layouts, lse_is_read: bool = True) -> Part | None:
    """The only part of a call whose operands torch's kernel takes as they are; None of other calls."""
    if spec.sequences is not None or not layouts.q[3] == layouts.k[3] == layouts.v[3] == 1:
        return None
    small = is_small(spec)
    lse_is_read = lse_is_read and not small  # it may then be computed in another dtype
    if layouts.mask_sizes is None:
        part = _only(split(None, spec), spec, lse_is_read)
        if part is not None and not part.biased:
            return part if part.keys == (0, spec.keys) else None
    return _only(whole_and_masked(spec), spec, lse_is_read) if small and spec.window == (None, None) else None


def _plan_masked(
    spec: AttentionSpec, mask_sizes: tuple[int, ...] | None, otherwise: Callable[[Operands], tuple], lse_is_read: bool
) -> Callable[[Operands], tuple]:
    """That of a call too small to be split, with a mask or causal and no square. A mask over keys cuts those at either
    end off, if they are many."""
    by_keys = mask_sizes is not None and mask_sizes[1] == mask_sizes[2] == 1
    causal, scale, dtype = spec.causal and spec.queries > 1, spec.scale, _dtype_of(spec, lse_is_read)
    looks = _Looks.at(spec, dtype)

    def forward(operands: Operands) -> tuple[Tensor, Tensor, Kept]:
        q, k, v, mask, *_ = operands
        keys, shown = (0, spec.keys), mask is None
        if by_keys:
            keys, shown = keys_worth(mask, spec)  # type: ignore[arg-type]
        if keys[1] == 0:
            return otherwise(operands)
        k, v = cut(k, 2, keys), cut(v, 2, keys)
        within = causal and shown and spec.queries == spec.keys == keys[1] - keys[0]
        hiding = None if shown or mask is None else _hiding(cut(mask, 3, keys), spec.accumulator_dtype)
        if causal and not within:
            later = future(spec, (0, spec.queries), keys, spec.accumulator_dtype)
            hiding = later if hiding is None else hiding + later
        if dtype != spec.dtype:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        out, lse = FORWARD(q, k, v, 0.0, within, attn_mask=hiding, scale=scale)
        found = _checked(looks, spec, q, k, out, lse, within, hiding)
        if found is None:
            return otherwise(operands)
        return out.to(spec.dtype) if dtype != spec.dtype else out, *found

    return forward


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    kept: Kept | None,
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
    hiding = None if kept is None else kept.hiding
    hiding = hiding if hiding is None or hiding.shape[3] == spec.keys else None
    return _gradients_of(grad_out, grad_lse, operands, out, lse, spec, needed, None, hiding)


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
    hiding: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    if spec.head_dim != spec.value_dim:
        width = max(spec.head_dim, spec.value_dim)
        even_out = _filled_up(out, width)
        even_grad = None if grad_out is None else _filled_up(grad_out, width)
        even_merged = None if merged is None else Merged(even_out, lse)
        even = even_grad, grad_lse, _evened(operands, spec), even_out, lse, _even(spec), needed, even_merged, hiding
        of_even = _gradients_of(*even)
        dims = spec.head_dim, spec.head_dim, spec.value_dim
        of_qkv = [None if x is None else _cut_dims(x, n) for x, n in zip(of_even, dims, strict=False)]
        return *of_qkv, *of_even[3:]
    found: Any = None
    of_bias = spec.bias is not None and needed[3]
    if grad_out is not None and grad_lse is None and not of_bias and _is_exact(lse):
        operands, spec = with_whole_mask(operands, spec)
        groups = split(operands.mask, spec) if hiding is None else whole_and_masked(spec)
        part = _only(groups, spec)
        if part is not None and _rows_alone(*operands[:3], grad_out, out):
            of_q, of_k, of_v = _Kernel(operands, spec).backward(part, grad_out, out, lse, hiding)
            found = of_q, _spread(of_k, part.keys, operands.k), _spread(of_v, part.keys, operands.v)
        else:
            found = _backward(grad_out, operands, out, lse, spec, groups)
        if _leaks(groups, found):
            read, (rows, _) = cleared(operands, spec)
            grad_out = grad_out if rows is None else grad_out.masked_fill(rows, 0.0)
            found = _backward(grad_out, read, out, lse, spec, groups)
            found = None if _leaks(groups, found) else found
    if found is None:
        found = attention_reference_gradients(grad_out, grad_lse, operands, spec, merged)
    found = *found, *[None] * (len(needed) - len(found))
    return tuple([grad if need else None for grad, need in zip(found, needed, strict=True)])


def _only(groups: list[Group], spec: AttentionSpec, lse_is_read: bool = True) -> Part | None:
    """The only part of a call whose tensors torch's kernel takes as they are, from which everything between it and its
    caller is left out: of a small call that was half the time."""
    if len(groups) != 1 or len(groups[0].parts) != 1 or spec.adds_to_scores or not _takes(spec, lse_is_read):
        return None
    (entries, (part,), picked) = groups[0]
    return part if entries == (0, spec.batch) and part.rows == (0, spec.queries) and picked is None else None


def _takes(spec: AttentionSpec, lse_is_read: bool) -> bool:
    """Whether torch's kernel takes a call's dtype and scale."""
    return (not lse_is_read or _multiplies(spec.dtype)) and factors(spec) == (1.0, spec.scale)


def _leaks(groups: list[Group], found: Sequence[Tensor]) -> bool:
    """Whether something may have come through a hidden pair: then it is in `out`, or in a gradient of q or k."""
    if not any([part.hides for group in groups for part in group.parts]):
        return False
    return any(map(has_nan, found[:2]))


def _is_exact(lse: Tensor) -> bool:
    """Whether weights that are recomputed from an LSE are as exact as a softmax's."""
    sizes, limit = lse.abs(), LARGEST_LSE[lse.dtype]
    return not lse.numel() or sizes.max().item() <= limit or not ((sizes > limit) & sizes.isfinite()).any()


class _Unit(NamedTuple):
    """What is computed at one time: some heads of some entries of a group, all of its parts."""

    group: Group
    entries: Range
    heads: Range
    kv_heads: Range

    def cut(self, tensor: Tensor) -> Tensor:
        """What a unit takes of a tensor `(b|1, h|1, ...)`."""
        return _cut_unless_1(_cut_unless_1(tensor, 0, self.entries), 1, self.heads)

    def cut_keys(self, tensor: Tensor) -> Tensor:
        """What a unit takes of a tensor `(b, hk, ...)`."""
        return cut(cut(tensor, 0, self.entries), 1, self.kv_heads)


class _Kernel:
    """Torch's kernel on some tensors of a call, with all their keys or with those that are `picked`."""

    def __init__(self, operands: Operands, spec: AttentionSpec, picked: Tensor | None = None) -> None:
        self.q, self.k, self.v, self.mask, _, self.bias, self.slopes, *_ = operands
        self.spec, self.picked, (self.factor, self.scale) = spec, picked, factors(spec)

    @staticmethod
    def of(unit: _Unit, operands: Operands, spec: AttentionSpec, dtype: torch.dtype) -> _Kernel:
        """On the tensors of a unit, computed in a dtype."""
        q, k, v, mask, _, bias, slopes, *_ = operands
        mask, bias, slopes = [None if x is None else unit.cut(x) for x in (mask, bias, slopes)]
        q, k, v, picked = unit.cut(q), unit.cut_keys(k), unit.cut_keys(v), unit.group.picked
        if picked is not None:
            k, v = k.index_select(2, picked), v.index_select(2, picked)
            bias = bias if bias is None or bias.shape[3] == 1 else bias.index_select(3, picked)
        factor, _ = factors(spec)
        q = q if factor == 1 else q * factor
        q, k, v = [_readable_rows(tensor.to(dtype)) for tensor in (q, k, v)]
        return _Kernel(Operands(q, k, v, mask, None, bias, slopes), spec, picked)

    def forward(self, part: Part) -> tuple[Tensor, Tensor] | None:
        """Of a part's queries: out, and the LSE of the part's keys. The kernel makes 0 of both where all scores are
        -inf; None where those may be of visible keys."""
        bias, hiding = self._bias(part)
        out, lse = FORWARD(*self._cut(part), 0.0, part.causal, attn_mask=bias, scale=self.scale)
        if _has_no_zero(lse):
            return out, lse
        if hiding is not None:
            lse = lse.masked_fill((hiding == -torch.inf).all(dim=-1), -torch.inf)
        return (out, lse) if _has_no_zero(lse) or bounded(self.spec, self.q, self.k) else None

    def backward(
        self, part: Part, grad_out: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a part gives to the gradients of its queries and keys; `out` and `lse` are whole rows' own. The
        `bias` is made anew where it was not kept."""
        bias = self._bias(part)[0] if bias is None else bias
        if part.biased:  # rows that see nothing are in it
            lse = lse.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=0.0)
        grads = BACKWARD(grad_out, *self._cut(part), out, lse, 0.0, part.causal, attn_mask=bias, scale=self.scale)
        return (grads[0] if self.factor == 1 else grads[0] * self.factor), grads[1], grads[2]

    def _cut(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        return cut(self.q, 2, part.rows), cut(self.k, 2, part.keys), cut(self.v, 2, part.keys)

    def _bias(self, part: Part) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the scores, `(b, h, i, j)` by strides, and of that what hides pairs, 0 or -inf,
        `(b|1, h|1, i|1, j)`; each None where there is none."""
        if not part.biased:
            return None, None
        hiding = self._hiding(part)
        terms = [*self._added(part)] if self.spec.adds_to_scores else []
        if hiding is not None:
            terms.append(hiding)
        shape = (*self.q.shape[:2], part.rows[1] - part.rows[0], part.keys[1] - part.keys[0])
        bias = terms[0] if len(terms) == 1 else sum(terms[1:], terms[0])
        return bias.expand(shape), hiding

    def _ahead(self, part: Part) -> Tensor:
        """How far a part's keys lie behind its queries' own places, `(i, j)`."""
        rows = torch.arange(*part.rows, device=self.q.device)[:, None] + self.spec.offset
        keys = torch.arange(*part.keys, device=self.q.device) if self.picked is None else self.picked[slice(*part.keys)]
        return keys - rows

    def _hiding(self, part: Part) -> Tensor | None:
        if self.mask is self.picked is None and self.spec.causal and self.spec.window == (None, None):
            return future(self.spec, part.rows, part.keys, self.spec.accumulator_dtype)
        visible = self._visible(part)
        return None if visible is None else _hiding(visible, self.spec.accumulator_dtype)

    def _visible(self, part: Part) -> Tensor | None:
        """The visible pairs, `(b|1, h|1, i|1, j)`; None where it is all of them."""
        if self.picked is None:
            return visible_pairs(self.mask, self.spec, *part.rows, part.keys[1], self.q.device, part.keys[0])
        (left, _), right = self.spec.window, self.spec.right_end
        if left is right is None:
            return None
        ahead = self._ahead(part)[None, None]
        visible = torch.ones_like(ahead, dtype=torch.bool) if right is None else ahead <= right
        return visible if left is None else visible & (ahead >= -left)

    def _added(self, part: Part) -> Iterator[Tensor]:
        """The bias and ALiBi, `(b|1, h|1, i|1, j|1)`."""
        dtype = self.spec.accumulator_dtype
        if self.bias is not None:
            bias = self.bias if self.bias.shape[2] == 1 else cut(self.bias, 2, part.rows)
            yield (bias if bias.shape[3] == 1 else cut(bias, 3, part.keys)).to(dtype)
        if self.slopes is not None:
            yield -self.slopes.to(dtype)[..., None, None] * self._ahead(part).abs()


def _hiding(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a pair is visible, -inf where it is hidden."""
    if visible.numel() <= FEW:
        return torch.where(visible, *_shown_and_hidden(dtype))
    # No bit, or those of -inf of all bits: torch takes ten times as long to choose by bools, or to make floats of them.
    bits, of_infinity = OF_INFINITY[dtype]
    if visible.numel() <= SOME:
        return torch.add(_bits_of_infinity(dtype), visible.view(torch.int8), alpha=-of_infinity).view(dtype)
    return (visible.view(torch.int8) - 1).to(bits).bitwise_and_(of_infinity).view(dtype)


@cache
def _bits_of_infinity(dtype: torch.dtype) -> Tensor:
    bits, of_infinity = OF_INFINITY[dtype]
    return torch.tensor([of_infinity], dtype=bits, device="cpu")


@cache
def _shown_and_hidden(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.tensor(0.0, dtype=dtype, device="cpu"), torch.tensor(-torch.inf, dtype=dtype, device="cpu")


def _spread(grad: Tensor, keys: Range, like: Tensor) -> Tensor:
    """A gradient of the keys in a range as one of all keys."""
    if grad.shape == like.shape:
        return grad
    whole = _zeros_like(like)
    cut(whole, 2, keys).copy_(grad)
    return whole


def _cut_unless_1(tensor: Tensor, dim: int, within: Range) -> Tensor:
    return tensor if tensor.shape[dim] == 1 else cut(tensor, dim, within)


def _rows_alone(*tensors: Tensor) -> bool:
    """Whether torch's kernel reads tensors as they are: it takes a row's elements for neighbours."""
    for tensor in tensors:  # noqa: SIM110  in half the time
        if tensor.stride(-1) != 1:
            return False
    return True


def _readable_rows(tensor: Tensor) -> Tensor:
    """The tensor as torch's kernel reads it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@lru_cache(maxsize=CALLS_KEPT)
def factors(spec: AttentionSpec) -> tuple[float, float]:
    """The scale as a factor of q and one of the scores: what hides a pair is -inf times the latter, which is positive
    in the kernel's own dtype."""
    if abs(spec.scale) < torch.finfo(spec.accumulator_dtype).tiny:
        return spec.scale, 1.0
    return copysign(1.0, spec.scale), abs(spec.scale)


def _forward(
    operands: Operands, spec: AttentionSpec, groups: list[Group], lse_is_read: bool
) -> tuple[Tensor, Tensor] | None:
    """`out` and `lse`; None where the kernel may be wrong about a row."""
    out = lse = None
    for unit, kernel in _kernels(operands, spec, groups, lse_is_read):
        for rows, same in groupby(unit.group.parts, key=lambda part: part.rows):
            found = _merged([kernel.forward(part) for part in same])
            if found is None:
                return None
            if found[0].shape == (spec.batch, spec.heads, spec.queries, spec.head_dim):
                return found[0].to(spec.dtype), found[1]
            if out is None or lse is None:
                out, lse = _of_dead_rows(operands.q, spec)
            for whole, piece in zip((out, lse), found, strict=True):
                cut(unit.cut(whole), 2, rows).copy_(piece)
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
    return out.mul_(share).addcmul_(other, other_share), torch.logaddexp(lse, other_lse)


def _backward(
    grad_out: Tensor, operands: Operands, out: Tensor, lse: Tensor, spec: AttentionSpec, groups: list[Group]
) -> tuple[Tensor, ...]:
    grads: list[Tensor] = []
    for unit, kernel in _kernels(operands, spec, groups):
        of_rows = [_readable_rows(unit.cut(tensor).to(kernel.q.dtype)) for tensor in (grad_out, out)]
        found, rows, keys = _gradients(kernel, unit.group.parts, [*of_rows, unit.cut(lse)])
        grads = grads or [
            grad.to(spec.dtype) if grad.shape == like.shape else _zeros_like(like)
            for grad, like in zip(found, operands[:3], strict=True)
        ]
        for whole, of_unit in zip(grads, found, strict=True):
            if of_unit.shape == whole.shape:  # it is the whole
                continue
            if whole is grads[0]:
                cut(unit.cut(whole), 2, rows).copy_(of_unit)
            elif kernel.picked is None:
                cut(unit.cut_keys(whole), 2, keys).copy_(of_unit)
            else:
                unit.cut_keys(whole).index_copy_(2, kernel.picked[slice(*keys)], of_unit.to(whole.dtype))
        del kernel, found, of_rows, of_unit
    return tuple(grads) or tuple(map(_zeros_like, operands[:3]))


def _zeros_like(tensor: Tensor) -> Tensor:
    """Of its shape, each element in a place of its own."""
    return torch.zeros_like(tensor, memory_format=torch.contiguous_format)


def _gradients(kernel: _Kernel, parts: list[Part], of_rows: list[Tensor]) -> tuple[tuple[Tensor, ...], Range, Range]:
    """Those of the queries and keys of a group, by its `grad_out`, `out` and `lse`, and in which ranges they are."""
    sums: tuple[Tensor, ...] = ()
    for part in parts:
        found = kernel.backward(part, *[cut(tensor, 2, part.rows) for tensor in of_rows])
        if len(parts) == 1:
            return found, part.rows, part.keys
        sums = sums or tuple(map(_zeros_like, (kernel.q, kernel.k, kernel.v)))
        for total, of_part, within in zip(sums, found, (part.rows, part.keys, part.keys), strict=True):
            cut(total, 2, within).add_(of_part)
    return sums, (0, kernel.q.shape[2]), (0, kernel.k.shape[2])


def _kernels(
    operands: Operands, spec: AttentionSpec, groups: list[Group], lse_is_read: bool = True
) -> Iterator[tuple[_Unit, _Kernel]]:
    """The kernels of all units of work, one after the other, so that beside the results little is held."""
    for group in groups:
        dtype = _dtype_for(group, spec, lse_is_read)
        for unit in _units(group, spec, dtype) if group.parts else ():
            yield unit, _Kernel.of(unit, operands, spec, dtype)


def _dtype_for(group: Group, spec: AttentionSpec, lse_is_read: bool) -> torch.dtype:
    """What a group is computed in: what is merged of two parts reads their LSE."""
    return _dtype_of(spec, lse_is_read or len({part.rows for part in group.parts}) < len(group.parts))


def _dtype_of(spec: AttentionSpec, lse_is_read: bool = True) -> torch.dtype:
    """What a call is computed in. Half precision goes by float32 where the CPU has no products of it: in it, torch's
    backward takes ten times as long, and its forward gives an LSE of some 14 bits; which its `out` does not suffer
    from."""
    return spec.dtype if _multiplies(spec.dtype) or not lse_is_read else spec.accumulator_dtype


def _units(group: Group, spec: AttentionSpec, dtype: torch.dtype) -> Iterator[_Unit]:
    """All of a group, where its results are those of the call; else as few heads at a time as keep all threads busy,
    and long enough for a call not to count."""
    first, last = group.entries
    if (
        group.entries == (0, spec.batch)
        and dtype == spec.dtype
        and {part.rows for part in group.parts} == {(0, spec.queries)}
    ):
        yield _Unit(group, group.entries, (0, spec.heads), (0, spec.kv_heads))
        return
    pairs = sum([(part.rows[1] - part.rows[0]) * (part.keys[1] - part.keys[0]) for part in group.parts])
    of_head = pairs * spec.head_dim * spec.group
    # Torch's kernel shares out key heads among threads, and in its backward nothing else.
    wanted = max(torch.get_num_threads(), FEWEST_PRODUCTS * len(group.parts) // max(1, of_head))
    entries, kv_heads = max(1, wanted // spec.kv_heads), min(wanted, spec.kv_heads)
    for entry in range(first, last, entries):
        for head in range(0, spec.kv_heads, kv_heads):
            of_keys = head, min(head + kv_heads, spec.kv_heads)
            of_queries = of_keys[0] * spec.group, of_keys[1] * spec.group
            yield _Unit(group, (entry, min(entry + entries, last)), of_queries, of_keys)


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has products of matrices in a dtype, as far as torch tells."""
    if dtype in (torch.float32, torch.float64):
        return True
    tells = getattr(torch.cpu, "get_capabilities", None)  # which the oldest torch has not
    return tells is not None and bool(tells()["amx_bf16" if dtype == torch.bfloat16 else "amx_fp16"])
