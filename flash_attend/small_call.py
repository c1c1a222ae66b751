"""The call that a variant checks itself by: full tiles and cut ones both ways, queries that see no key, NaN in hidden
keys; with what it should give, and how far from that an answer may be.

Lengths are run-time values of the kernels: what is compiled for it is what the call needs that asked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash_attend.dropout import keep_mask
from flash_attend.operands import Operands, Tangents
from flash_attend.reference import attention_reference, attention_reference_gradients
from flash_attend.segments import segments_of
from flash_attend.spec import PACKED_ROWS, AttentionSpec, BiasKind, MaskKind, describe
from flash_attend.tangents import attend_tangents
from flash_attend.testing.budget import Budget
from flash_attend.testing.oracle import Answer
from flash_attend.testing.sequences import whole_call
from flash_attend.variant import Variant

__all__ = ["SmallCall", "budget_of", "small_call", "spec_of", "truth_of"]

DROPOUT_P = 0.25
SEED = 20_260_131
FEW = 5  # queries of a call whose heads are packed
# Of sequences that are packed: eighths of the queries and of the keys that each has, and what is left is in none.
SHARES = ((4, 3), (0, 1), (1, 0), (2, 3))
HIDDEN = 7  # keys at the end that a mask hides from everybody


class SmallCall(NamedTuple):
    """A call that a variant serves."""

    operands: Operands  # clean
    poisoned: Operands  # NaN in keys that nobody sees
    spec: AttentionSpec
    grad_out: Tensor
    tangents: Tangents
    poisoned_tangents: Tangents  # NaN in the same keys, and where a bias hides


def spec_of(variant: Variant) -> AttentionSpec:
    """The spec of a variant's small call, but for its lengths."""
    kind = variant.kind
    return AttentionSpec(
        *(
            3 if kind.mask != "none" else 2 if "bias-b" in kind.scores else 1,
            4 if variant.grouped else 2,
            2,
            1 if kind.one_query else FEW if variant.packed else PACKED_ROWS,
            1,
        ),
        *(kind.head_dim, kind.value_dim),
        getattr(torch, kind.dtype),
        mask=MaskKind[kind.mask.upper()],
        mask_per_head=variant.mask_per_head,
        causal=kind.causal,
        scale=kind.head_dim**-0.5 * (-1 if variant.negative_scale else 1),
        dropout_p=DROPOUT_P if kind.dropout else 0.0,
        precision=kind.precision,
        **_changes(kind.scores),
        sequences=len(SHARES) if kind.sequences else None,
    )


def _changes(scores: str) -> dict[str, Any]:
    """The fields of a spec for what changes scores; the window's edges are near ones."""
    words = scores.split("+")
    found: dict[str, Any] = dict(alibi="alibi" in words, sinks="sinks" in words)
    found["window"] = (1 if "left" in words else None, 1 if "right" in words else None)
    found["softcap"] = 4.0 if "softcap" in words else 0.0
    for word in words:
        if word.startswith("bias-"):
            _, form, dtype = word.split("-")
            batch, heads, queries, keys = (letter != "1" for letter in form)
            found["bias"] = BiasKind(batch, heads, queries, keys, getattr(torch, dtype))
    return found


def small_call(variant: Variant, block: tuple[int, int], device: torch.device) -> SmallCall:
    """A call of a variant whose tiles have at most so many queries and keys: the same numbers each time."""
    edge, kind = max(block), variant.kind
    keys = 2 * edge + edge // 2 + 5
    # Without a mask only causality leaves queries with nothing to see, where they outnumber the keys.
    queries = 3 * edge + 9 if kind.causal and kind.mask == "none" else edge + edge // 2 - 3
    queries = 1 if kind.one_query else FEW if variant.packed else queries
    if kind.sequences:
        queries, keys = 6 * edge - 3, 6 * edge + 5
    spec = spec_of(variant)
    # So far that there are full blocks in it, and so near that blocks are cut by it.
    left, right = spec.window
    window = None if left is None else 2 * edge, None if right is None else edge // 2
    spec = replace(spec, queries=queries, keys=keys, window=window)

    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device, spec.dtype)

    q = draw(spec.batch, spec.heads, queries, spec.head_dim)
    k = draw(spec.batch, spec.kv_heads, keys, spec.head_dim)
    v = draw(spec.batch, spec.kv_heads, keys, spec.value_dim)
    mask = _mask(spec, device)
    seed = torch.tensor([SEED], device=device) if spec.dropout_p else None
    slopes = torch.linspace(0.02, 0.3, spec.heads, device=device)[None] if spec.alibi else None
    sinks = torch.linspace(-1.0, 2.0, spec.heads, device=device).to(spec.dtype) if spec.sinks else None
    bias = None
    if spec.bias is not None:
        sizes = (spec.batch, spec.heads, queries, keys)
        bias = draw(*(n if varies else 1 for n, varies in zip(sizes, spec.bias[:4], strict=True))).to(spec.bias.dtype)
        if spec.bias.keys:
            bias[..., 3::11] = -torch.inf
    segments = _segments(spec, device) if spec.sequences else None
    clean = Operands(q, k, v, mask, seed, bias, slopes, sinks, segments)
    hidden = None
    if mask is not None:
        hidden = ~mask.flatten(1, 2).any(dim=1)[:, None, :, None]  # (b, 1, j, 1)
    if segments is not None:
        hidden = (torch.arange(keys, device=device) >= segments[-1, 2])[:, None]
    poisoned = clean._replace(k=_without(k, hidden), v=_without(v, hidden))
    described = describe(q, k, v, mask, *spec.options, bias=bias, alibi=spec.alibi, sinks=spec.sinks, segments=segments)
    assert described == spec
    grad_out = draw(spec.batch, spec.heads, queries, spec.value_dim)
    there = zip(Tangents._fields, variant.tangents, strict=False)
    given = {name: x for name, has_one in there if has_one and (x := getattr(clean, name)) is not None}
    tangents = {name: draw(*x.shape).to(x.dtype) for name, x in given.items()}
    silent = dict(k=hidden, v=hidden, bias=None if bias is None else bias == -torch.inf)
    nowhere = {name: _without(x, silent.get(name)) for name, x in tangents.items()}
    return SmallCall(clean, poisoned, spec, grad_out, Tangents(**tangents), Tangents(**nowhere))


def _without(x: Tensor, hidden: Tensor | None) -> Tensor:
    """The same with NaN in what is hidden."""
    return x if hidden is None else x.masked_fill(hidden, torch.nan)


def _segments(spec: AttentionSpec, device: torch.device) -> Tensor:
    """Of sequences of which one has no queries and one no keys, and of queries and keys that are in none."""
    lengths = torch.tensor(SHARES, device=device) * torch.tensor([spec.queries // 8, spec.keys // 8], device=device)
    places = pad(lengths.cumsum(0), (0, 0, 1, 0))
    return segments_of(places[:, 0], places[:, 1], spec.queries, spec.keys)


def _mask(spec: AttentionSpec, device: torch.device) -> Tensor | None:
    """`(3, h|1, i|1, j)`: one batch entry with full tiles, one with holes everywhere, one that sees nothing."""
    if spec.mask == MaskKind.NONE:
        return None
    heads, rows = spec.heads if spec.mask_per_head else 1, spec.queries if spec.mask == MaskKind.DENSE else 1
    entry = torch.arange(3, device=device).view(3, 1, 1, 1)
    head, row, key = (torch.arange(n, device=device) for n in (heads, rows, spec.keys))
    place = key + 5 * row[:, None] + 3 * head[:, None, None]  # (h|1, i|1, j)
    whole = (head == 0)[:, None, None] | (place % 64 > 2)
    visible = ((entry == 0) & whole) | ((entry == 1) & (place % 7 > 2))
    dead = (row < 3)[:, None] if rows > 1 else False
    return visible & (key < spec.keys - HIDDEN) & ~torch.as_tensor(dead, device=device)


def truth_of(call: SmallCall) -> Answer:
    spec = replace(call.spec, dtype=torch.float64, precision="ieee")
    exact = (x if x is None or not x.is_floating_point() else x.double() for x in call.operands)
    operands = Operands(*exact)  # type: ignore[arg-type]
    out, lse = attention_reference(operands, spec, return_lse=True)
    assert lse is not None
    answer = Answer(out, lse, *attention_reference_gradients(call.grad_out.double(), None, operands, spec))
    if all(x is None for x in call.tangents):
        return answer
    tangents = Tangents(*(None if x is None else x.double() for x in call.tangents))
    _, _, out_tangent, lse_tangent = attend_tangents(operands, tangents, spec)
    return replace(answer, out_tangent=out_tangent, lse_tangent=lse_tangent)


def budget_of(call: SmallCall, truth: Answer) -> Budget:
    (q, k, v, mask, seed, bias, slopes, sinks, segments, _), spec = call.operands, call.spec
    tangents = {name: x for name, x in call.tangents._asdict().items() if x is not None} or None
    if segments is not None:
        lengths = segments[: spec.sequences, 1::2].tolist()
        edges: dict[str, Any] = dict(causal=spec.causal, window=spec.window)
        whole = whole_call(lengths, q, k, alibi_slopes=slopes, dropout_p=spec.dropout_p, seed=seed, **edges)
        return Budget(
            truth, q, k, v, scale=spec.scale, grad_out=call.grad_out, tf32=spec.precision == "tf32",
            softcap=spec.softcap or None, sinks=sinks, tangents=tangents, **whole,
        )  # fmt: skip
    return Budget(
        truth,
        q,
        k,
        v,
        mask=mask,
        causal=spec.causal,
        scale=spec.scale,
        dropout_p=spec.dropout_p,
        keep=None if seed is None else keep_mask(seed, spec, 0, spec.queries),
        grad_out=call.grad_out,
        tf32=spec.precision == "tf32",
        bias=bias,
        window=spec.window,
        softcap=spec.softcap or None,
        alibi_slopes=slopes,
        sinks=sinks,
        tangents=tangents,
    )
