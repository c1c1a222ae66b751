"""One frozen description of an attention call, and the only place where arguments are checked.

Dimension letters, used in every docstring of the package:

    b - batch        h - query heads     hk - key/value heads (hk divides h)
    i - queries      j - keys            d  - key dimension    dv - value dimension
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

__all__ = ["AttentionSpec", "MaskKind", "normalise_inputs"]

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_LENGTH = 2**31 - 1 - 4096  # positions are 32-bit in the kernels, with room for one tile past the end


class MaskKind(IntEnum):
    """What a mask varies over, which decides the work it costs."""

    NONE = 0
    KEY = 1  # the same for every query of a head: key padding, `(b, j)` or `(b|1, h|1, 1, j)`
    DENSE = 2  # varies over queries


@dataclass(frozen=True)
class AttentionSpec:
    """Everything that decides how a call is served, without the tensors themselves."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    mask: MaskKind = MaskKind.NONE
    mask_per_head: bool = False  # the mask differs between query heads
    causal: bool = False
    scale: float = 1.0
    dropout_p: float = 0.0
    deterministic: bool = False
    precision: str = "ieee"  # of float32 products: "tf32", "tf32x3" (float32-accurate); "ieee" for other dtypes

    @property
    def group(self) -> int:
        """How many query heads read one key/value head."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def offset(self) -> int:
        """Under `causal`, query `x` sees key `y` iff `y <= x + offset` (the last query sees the last key)."""
        return self.keys - self.queries

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """The dtype of the softmax statistics, of the LSE and of every sum."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_tensor(name: str, tensor: object, ranks: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.ndim not in ranks:
        forms = {"q": "(b, h, i, d)", "k": "(b, hk, j, d) or (b, j, d)", "v": "(b, hk, j, dv) or (b, j, dv)"}
        raise ValueError(f"{name} must be {forms[name]}, got {tensor.ndim} dimensions: {_shape(tensor)}")
    if tensor.dtype not in SUPPORTED_DTYPES:
        hint = "; view complex tensors as real ones first (torch.view_as_real)" if tensor.is_complex() else ""
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}{hint}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense strided tensor, got layout {tensor.layout}")


def _check_number(name: str, value: object) -> float:
    if isinstance(value, (Tensor, bool)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _normalise_mask(mask: Tensor, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """`(b, j)` or any broadcastable 4-D bool mask -> `(b|1, h|1, i|1, j)`, a view: nothing is expanded or copied."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = may attend), got {mask.dtype}")
    if mask.layout != torch.strided or mask.is_nested:
        raise TypeError(f"mask must be a dense strided tensor, got layout {mask.layout}")
    full = (batch, heads, queries, keys)
    if mask.ndim == 2:
        if tuple(mask.shape) != (batch, keys):
            raise ValueError(
                f"a 2-D mask is key padding (b, j) = {(batch, keys)}, got {_shape(mask)}; "
                "write an (i, j) mask as mask[None, None]"
            )
        mask = mask[:, None, None, :]
    elif mask.ndim != 4:
        raise ValueError(
            f"mask must be (b, j) or broadcast to (b, h, i, j), got {mask.ndim} dimensions: {_shape(mask)}"
        )
    for letter, size, wanted in zip("bhij", mask.shape, full, strict=True):
        if size not in (1, wanted):
            raise ValueError(f"mask {_shape(mask)} does not broadcast to (b, h, i, j) = {full}: {letter} is {size}")
    # A dimension that was expanded (stride 0) is the same along it: read it once.
    for dim in range(3):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask.expand(-1, -1, -1, keys)


def normalise_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, AttentionSpec]:
    """Checks a call and describes it; every tensor that comes back is a view.

    Returns `q (b, h, i, d)`, `k (b, hk, j, d)`, `v (b, hk, j, dv)`, `mask (b|1, h|1, i|1, j)` or None, and the spec.

    Raises `TypeError` for a wrong kind (no tensor, dtype, number) and `ValueError` for a wrong value (shape, device,
    range). Nothing is allocated or launched here.
    """
    for name, tensor, ranks in (("q", q, (4,)), ("k", k, (3, 4)), ("v", v, (3, 4))):
        _check_tensor(name, tensor, ranks)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    for name, tensor in (("k", k), ("v", v), ("mask", mask)):
        if isinstance(tensor, Tensor) and tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")

    k = k[:, None] if k.ndim == 3 else k
    v = v[:, None] if v.ndim == 3 else v
    batch, heads, queries, head_dim = q.shape
    _, kv_heads, keys, key_dim = k.shape
    value_dim = v.shape[-1]
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != batch:
            raise ValueError(f"{name} must have q's batch size {batch}, got {_shape(tensor)}")
    if key_dim != head_dim:
        raise ValueError(f"k must have q's last dimension d = {head_dim}, got {_shape(k)}")
    if v.shape[2] != keys:
        raise ValueError(f"k and v must be equally long, got {keys} keys and {v.shape[2]} values")
    if v.shape[1] != kv_heads:
        raise ValueError(f"k and v must have the same number of heads, got {kv_heads} and {v.shape[1]}")
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"the number of k/v heads must divide q's {heads} heads, got {kv_heads}")
    if not heads and kv_heads:
        raise ValueError(f"q has no heads but k has {kv_heads}")
    if head_dim == 0 or value_dim == 0:
        raise ValueError(f"d and dv must be at least 1, got d = {head_dim} and dv = {value_dim}")
    for name, length in (("q", queries), ("k", keys)):
        if length > LARGEST_LENGTH:
            raise ValueError(f"{name} is {length} long, the limit is {LARGEST_LENGTH}")

    for name, flag in (("causal", causal), ("deterministic", deterministic)):
        if not isinstance(flag, bool) and not (name == "deterministic" and flag is None):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
    dropout_p = _check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    scale = head_dim**-0.5 if scale is None else _check_number("scale", scale)

    kind = MaskKind.NONE
    if mask is not None:
        mask = _normalise_mask(mask, batch, heads, queries, keys)
        kind = MaskKind.KEY if mask.shape[2] == 1 else MaskKind.DENSE
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    precision = "ieee"
    if q.dtype == torch.float32:
        precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    spec = AttentionSpec(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=q.dtype,
        mask=kind,
        mask_per_head=mask is not None and mask.shape[1] > 1,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        deterministic=deterministic,
        precision=precision,
    )
    return q, k, v, mask, spec
