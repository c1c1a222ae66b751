"""PyTorch's memory-efficient attention on a GPU, held to the contract: for parts and calls that no kernel here is for.

It is PyTorch's operator below `scaled_dot_product_attention`, which alone counts causality from the last query. A mask
is a bias of q's dtype, 0 or -inf, of the mask's own size. What nobody looks at is 0 in what the kernel reads, and what
it makes of queries that see nothing is not read. Nothing here waits for the device.

It has not run on a GPU of ours: like the kernels, each variant checks itself on a part before it first serves there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash_attend.operands import Operands
from flash_attend.reference import Hidden, Merged, attention_reference_gradients, cleared
from flash_attend.sdpa import NOTHING, Kept, factors
from flash_attend.spec import AttentionSpec

__all__ = ["attention_backward", "attention_forward", "backward_of_part"]

FORWARD = torch.ops.aten._efficient_attention_forward.default
BACKWARD = torch.ops.aten._efficient_attention_backward.default

ALL, CAUSAL = 0, 2  # which keys a query sees of those that the bias shows; causality counts from the last query
ALIGNMENT = 16  # bytes: where rows begin, for the kernel to take its wide loads
BIAS_COLUMNS = 16  # a multiple of which rows of a bias lie apart, as torch's own do
LSE_ROWS = 32  # a multiple of which the backward of NVIDIA's build reads of an LSE
ROCM = torch.version.hip is not None


class _Call(NamedTuple):
    """A call as the kernel reads it."""

    q: Tensor  # (b, i, h, d)
    k: Tensor  # (b, j, h, d)
    v: Tensor  # (b, j, h, dv)
    bias: Tensor | None  # (b, h, i, j) by strides
    sees: int
    factor: float  # of q, of which the rest of the scale is the kernel's
    scale: float
    hidden: Hidden

    @staticmethod
    def of(operands: Operands, spec: AttentionSpec) -> _Call:
        (q, k, v, mask, *_), hidden = cleared(operands, spec)
        factor, scale = factors(spec)
        q = q if factor == 1 else q * factor
        if spec.group > 1:
            k, v = k.repeat_interleave(spec.group, dim=1), v.repeat_interleave(spec.group, dim=1)
        q, k, v = (_readable(x.transpose(1, 2)) for x in (q, k, v))
        bias = None if mask is None else _as_bias(mask, spec)
        return _Call(q, k, v, bias, CAUSAL if spec.causal else ALL, factor, scale, hidden)


def _readable(x: Tensor) -> Tensor:
    """The tensor, or a copy where its rows do not begin where the kernel reads."""
    size = x.element_size()
    aligned = x.data_ptr() % ALIGNMENT == 0 and all([stride * size % ALIGNMENT == 0 for stride in x.stride()[:-1]])
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _as_bias(mask: Tensor, spec: AttentionSpec) -> Tensor:
    """-inf where a mask hides a pair, else 0, `(b, h, i, j)`: of the mask's size in memory, with aligned rows."""
    sizes = *mask.shape[:3], -(-spec.keys // BIAS_COLUMNS) * BIAS_COLUMNS
    bias = torch.full(sizes, -torch.inf, dtype=spec.dtype, device=mask.device)[..., : spec.keys]
    return bias.masked_fill_(mask, 0.0).expand(spec.batch, spec.heads, spec.queries, spec.keys)


def attention_forward(operands: Operands, spec: AttentionSpec, tiles: None) -> tuple[Tensor, Tensor, Kept]:
    """`out (b, h, i, dv)` and `lse (b, h, i)`, on a GPU."""
    call = _Call.of(operands, spec)
    out, lse, *_ = FORWARD(
        call.q, call.k, call.v, call.bias, None, None, None, None, 0.0, call.sees, True, scale=call.scale
    )
    out.transpose_(1, 2)  # in place: nobody may change a view in place who is given it
    lse = lse if lse.shape[2] == spec.queries else lse[..., : spec.queries].contiguous()
    if (dead := call.hidden.rows) is not None:
        out.masked_fill_(dead, 0.0)
        lse.masked_fill_(dead[..., 0], -torch.inf)
    return out, lse, NOTHING


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
    merged: Merged | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k and v; None where `needed` says so. The operator knows no gradient of an LSE: that goes by
    the einsum path, which has to be told where `out` and `lse` are `merged`."""
    if grad_out is None or grad_lse is not None:
        found = attention_reference_gradients(grad_out, grad_lse, operands, spec, merged)
    else:
        found = _by_the_operator(grad_out, operands, out, lse, spec)
    return tuple([grad if need else None for grad, need in zip(found, needed, strict=True)])


def backward_of_part(
    grad_out: Tensor | None, grad_lse: Tensor | None, operands: Operands, out: Tensor, lse: Tensor,
    spec: AttentionSpec, tiles: None, needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The same where the keys are a part of those that `out` and `lse` are over."""
    return attention_backward(grad_out, grad_lse, operands, out, lse, None, spec, tiles, needed, Merged(out, lse))


def _by_the_operator(
    grad_out: Tensor, operands: Operands, out: Tensor, lse: Tensor, spec: AttentionSpec
) -> tuple[Tensor, ...]:
    call = _Call.of(operands, spec)
    # Of rows that see none of these keys, and of those that fill the LSE up: their weights are 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    if not ROCM and spec.queries % LSE_ROWS:
        lse = pad(lse, (0, -spec.queries % LSE_ROWS), value=torch.inf)
    if (dead := call.hidden.rows) is not None:
        grad_out = grad_out.masked_fill(dead, 0.0)
    unused = torch.zeros((), dtype=torch.int64, device="cpu")  # by which dropout would go
    grads = BACKWARD(
        _readable(grad_out.transpose(1, 2)),
        *call[:4],
        _readable(out.transpose(1, 2)),
        None,
        None,
        spec.queries,
        spec.keys,
        lse,
        0.0,
        unused,
        unused,
        call.sees,
        False,
        scale=call.scale,
        num_splits_key=1 if spec.deterministic else None,
    )
    of_q, of_k, of_v = (grad.transpose(1, 2) for grad in grads[:3])
    if call.factor != 1:
        of_q = of_q * call.factor
    if spec.group > 1:
        of_k, of_v = (x.unflatten(1, (spec.kv_heads, spec.group)).sum(dim=2) for x in (of_k, of_v))
    # Whatever came down: 0 of what takes no part.
    if dead is not None:
        of_q = of_q.masked_fill(dead, 0.0)
    if (unread := call.hidden.keys) is not None:
        of_k, of_v = of_k.masked_fill(unread, 0.0), of_v.masked_fill(unread, 0.0)
    return of_q, of_k, of_v
