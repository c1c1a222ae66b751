"""PyTorch's memory-efficient attention for tests without a GPU: what its operators take and give by their source
(aten/src/ATen/native/transformers/cuda), on tensors of the CPU that count as if they lay on a GPU.

What the kernel may not be given fails here; what it lets through hidden pairs, this does too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attend import efficient
from flash_attend.generation import renew
from flash_attend.target import DeviceTarget
from flash_attend.tracing import constant_when_compiled

__all__ = ["PART", "played"]

PART = DeviceTarget("cuda", "a part", (8, 0), multiprocessors=108, device=torch.device("cpu"))
SEED = torch.zeros((), dtype=torch.int64)


@contextmanager
def played(part: DeviceTarget = PART) -> Iterator[None]:
    """Within this context every tensor counts as one on a part, and the operators are these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficient, "FORWARD", forward)
        patch.setattr(efficient, "BACKWARD", backward)
        patch.setattr(efficient, "ROCM", part.capability is None)
        patch.setattr(DeviceTarget, "of", staticmethod(constant_when_compiled(lambda device: part)))
        renew()
        yield
    renew()


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *others: Tensor) -> None:
    (batch, queries, heads, dim), keys = q.shape, k.shape[1]
    assert k.shape == (batch, keys, heads, dim)
    assert v.shape[:3] == k.shape[:3]
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    for x in (q, k, v, *others):
        assert x.dtype == q.dtype
        assert x.stride(3) == 1
        assert not any(stride * x.element_size() % 16 for stride in x.stride()[:3])
        assert x.data_ptr() % 16 == 0
    if bias is not None:
        assert bias.dtype == q.dtype
        assert bias.shape == (batch, heads, queries, keys)
        assert bias.stride(3) == 1
        assert not any(stride % 16 for stride in bias.stride()[:3])


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, sees: int, scale: float) -> Tensor:
    """`(b, h, i, j)`."""
    assert sees in (0, 2)
    scores = q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) * scale
    if bias is not None:
        scores = scores + bias.double()
    if sees:  # counted from the last query; set, where a bias is added
        later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1 + scores.shape[3] - scores.shape[2])
        scores = scores.masked_fill(later, -torch.inf)
    return scores


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, starts_q: None, starts_k: None, longest_q: None,
    longest_k: None, dropout_p: float, sees: int, gives_lse: bool, *, scale: float,
) -> tuple[Any, ...]:  # fmt: skip
    _check_inputs(q, k, v, bias)
    assert starts_q is starts_k is longest_q is longest_k is None
    assert dropout_p == 0
    assert gives_lse
    scores = _scores(q, k, bias, sees, scale)
    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest).exp()  # NaN where a query sees nothing
    total = weights.sum(dim=-1, keepdim=True)
    out = ((weights / total) @ v.double().transpose(1, 2)).transpose(1, 2).to(q.dtype).contiguous()
    lse = (largest + total.log()).squeeze(-1).float()
    if not efficient.ROCM:
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    return out, lse, SEED, SEED, q.shape[1], k.shape[1]


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, starts_q: None, starts_k: None,
    queries: int, keys: int, lse: Tensor, dropout_p: float, seed: Tensor, offset: Tensor, sees: int, of_bias: bool, *,
    scale: float, num_splits_key: int | None,
) -> tuple[Tensor, Tensor, Tensor, None]:  # fmt: skip
    _check_inputs(q, k, v, bias, grad_out, out)
    assert grad_out.shape == out.shape == (*q.shape[:3], v.shape[3])
    assert starts_q is starts_k is None
    assert (queries, keys) == (q.shape[1], k.shape[1])
    assert (dropout_p, of_bias) == (0, False)
    assert seed.dtype == offset.dtype == torch.int64
    assert num_splits_key is None or (num_splits_key == 1 and not efficient.ROCM)
    assert lse.dtype == torch.float32
    assert lse.shape[2] == (queries if efficient.ROCM else -(-queries // 32) * 32)
    assert (lse[..., queries:] == torch.inf).all()
    weights = (_scores(q, k, bias, sees, scale) - lse[..., :queries, None].double()).exp()
    grad_out, out, v = (x.double().transpose(1, 2) for x in (grad_out, out, v))
    of_scores = weights * (grad_out @ v.mT - (grad_out * out).sum(dim=-1, keepdim=True)) * scale
    of_q = of_scores @ k.double().transpose(1, 2)
    of_k = of_scores.mT @ q.double().transpose(1, 2)
    of_q, of_k, of_v = (x.transpose(1, 2).to(q.dtype).contiguous() for x in (of_q, of_k, weights.mT @ grad_out))
    return of_q, of_k, of_v, None
