"""One frozen description of an attention call, and the only place where arguments are checked.

Dimension letters, used in every docstring of the package:

    b - batch        h - query heads     hk - key/value heads (hk divides h)
    i - queries      j - keys            d  - key dimension    dv - value dimension
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attend.tracing import constant_when_compiled, traced

__all__ = ["CALLS_KEPT", "AttentionSpec", "MaskKind", "describe", "kind_of", "normalise_inputs"]

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CALLS_KEPT = 512  # of how many different calls (shapes, layouts, options) what was worked out is kept
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

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Taken once: launches are looked up by their spec. Of numbers alone, which hash alike in every process."""
        sizes = (self.batch, self.heads, self.kv_heads, self.queries, self.keys, self.head_dim, self.value_dim)
        mode = (int(self.mask), self.mask_per_head, self.causal, self.scale, self.dropout_p, self.deterministic)
        return hash((sizes, mode, self.dtype.itemsize))

    @property
    def group(self) -> int:
        """How many query heads read one key/value head."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def offset(self) -> int:
        """Under `causal`, query `x` sees key `y` iff `y <= x + offset` (the last query sees the last key)."""
        return self.keys - self.queries

    @property
    def options(self) -> tuple[bool, float, float, bool, str]:
        """What the tensors of a call do not say, in the order in which `describe` takes it."""
        return self.causal, self.scale, self.dropout_p, self.deterministic, self.precision

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """The dtype of the softmax statistics, of the LSE and of every sum."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def kind_of(spec: AttentionSpec) -> str:
    """How a call's products are computed: "half", "tf32", "tf32x3" or "double"."""
    return {torch.float32: spec.precision, torch.float64: "double"}.get(spec.dtype, "half")


class _Facts(NamedTuple):
    """A tensor without its values: all that is checked of it, and so what the result is looked up by."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout
    nested: bool
    stride: tuple[int, ...] | None = None  # of a mask, which is read once along a dimension that was expanded

    @property
    def shown(self) -> str:
        return str(tuple(self.shape))


def _facts(name: str, tensor: object) -> _Facts:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    nested = tensor.is_nested
    stride = tensor.stride() if name == "mask" and tensor.layout == torch.strided and not nested else None
    return _Facts(tensor.shape, tensor.dtype, tensor.device, tensor.layout, nested, stride)


def _check_tensor(name: str, facts: _Facts, ranks: tuple[int, ...]) -> None:
    if len(facts.shape) not in ranks:
        forms = {"q": "(b, h, i, d)", "k": "(b, hk, j, d) or (b, j, d)", "v": "(b, hk, j, dv) or (b, j, dv)"}
        raise ValueError(f"{name} must be {forms[name]}, got {len(facts.shape)} dimensions: {facts.shown}")
    if facts.dtype not in SUPPORTED_DTYPES:
        hint = "; view complex tensors as real ones first (torch.view_as_real)" if facts.dtype.is_complex else ""
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {facts.dtype}{hint}")
    if facts.layout != torch.strided or facts.nested:
        raise TypeError(f"{name} must be a dense strided tensor, got layout {facts.layout}")


def _check_number(name: str, value: object) -> float:
    if isinstance(value, (Tensor, bool)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # in words that a compiler follows where the number is a symbol
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _check_mask(mask: _Facts, batch: int, heads: int, queries: int, keys: int) -> tuple[int, int, int]:
    """The sizes `(b|1, h|1, i|1)` that a mask is read with: 1 along a dimension that was expanded (stride 0)."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = may attend), got {mask.dtype}")
    if mask.stride is None:
        raise TypeError(f"mask must be a dense strided tensor, got layout {mask.layout}")
    full = (batch, heads, queries, keys)
    shape: tuple[int, ...] = mask.shape
    stride = mask.stride
    if len(shape) == 2:
        if tuple(shape) != (batch, keys):
            raise ValueError(
                f"a 2-D mask is key padding (b, j) = {(batch, keys)}, got {mask.shown}; "
                "write an (i, j) mask as mask[None, None]"
            )
        shape, stride = (shape[0], 1, 1, shape[1]), (stride[0], 0, 0, stride[1])
    elif len(shape) != 4:
        raise ValueError(f"mask must be (b, j) or broadcast to (b, h, i, j), got {len(shape)} dimensions: {mask.shown}")
    for letter, size, wanted in zip("bhij", shape, full, strict=True):
        if size != 1 and size != wanted:  # torch.compile takes a symbol for not being in a tuple of its value
            raise ValueError(f"mask {mask.shown} does not broadcast to (b, h, i, j) = {full}: {letter} is {size}")
    b, h, i = (1 if size > 1 and step == 0 else size for size, step in zip(shape[:3], stride[:3], strict=True))
    return b, h, i


def _view_mask(mask: Tensor, sizes: tuple[int, int, int], keys: int) -> Tensor:
    """`(b, j)` or 4-D -> `(b|1, h|1, i|1, j)`, a view: nothing is expanded in memory or copied."""
    if mask.ndim == 2:
        mask = mask.view(mask.shape[0], 1, 1, keys)
    for dim, size in enumerate(sizes):
        if mask.shape[dim] != size:
            mask = mask.narrow(dim, 0, 1)
    return mask if mask.shape[3] == keys else mask.expand(-1, -1, -1, keys)


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
    for name, flag in (("causal", causal), ("deterministic", deterministic)):
        if not isinstance(flag, bool) and not (name == "deterministic" and flag is None):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
    dropout_p = _check_number("dropout_p", dropout_p)
    scale = None if scale is None else _check_number("scale", scale)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    precision = _float32_precision() if isinstance(q, Tensor) and q.dtype == torch.float32 else "ieee"
    # While a call is traced, its lengths may be symbols, which cannot be looked up.
    describe_facts = _describe.__wrapped__ if traced(q, k, v, mask) else _describe
    spec, mask_sizes = describe_facts(
        _facts("q", q),
        _facts("k", k),
        _facts("v", v),
        None if mask is None else _facts("mask", mask),
        causal,
        scale,
        dropout_p,
        deterministic,
        precision,
    )
    k = k[:, None] if k.ndim == 3 else k
    v = v[:, None] if v.ndim == 3 else v
    mask = None if mask is None else _view_mask(mask, mask_sizes, spec.keys)
    return q, k, v, mask, spec


def describe(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *options: Any) -> AttentionSpec:
    """The spec of tensors that `normalise_inputs` has returned, with the `options` of theirs; whatever became of the
    tensors' strides since."""
    of_mask = None if mask is None else _facts("mask", mask)._replace(stride=(1, 1, 1, 1))
    return _describe.__wrapped__(_facts("q", q), _facts("k", k), _facts("v", v), of_mask, *options)[0]


# A graph that holds the answer is guarded by torch.compile: at every call it compares
# torch.backends.cuda.matmul.allow_tf32, which follows this setting.
@constant_when_compiled
def _float32_precision() -> str:
    """How float32 products are computed: accurately (3xTF32) at "highest", else in TF32."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@lru_cache(maxsize=CALLS_KEPT)
def _describe(
    q: _Facts,
    k: _Facts,
    v: _Facts,
    mask: _Facts | None,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    deterministic: bool,
    precision: str,
) -> tuple[AttentionSpec, tuple[int, int, int]]:
    """The spec of a call, and the sizes `(b|1, h|1, i|1)` that its mask is read with."""
    for name, tensor, ranks in (("q", q, (4,)), ("k", k, (3, 4)), ("v", v, (3, 4))):
        _check_tensor(name, tensor, ranks)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    for name, other in (("k", k), ("v", v), ("mask", mask)):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {other.device}")

    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1] if len(k.shape) == 4 else 1
    value_heads = v.shape[1] if len(v.shape) == 4 else 1
    keys, value_dim = k.shape[-2], v.shape[-1]
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != batch:
            raise ValueError(f"{name} must have q's batch size {batch}, got {tensor.shown}")
    if k.shape[-1] != head_dim:
        raise ValueError(f"k must have q's last dimension d = {head_dim}, got {k.shown}")
    if v.shape[-2] != keys:
        raise ValueError(f"k and v must be equally long, got {keys} keys and {v.shape[-2]} values")
    if value_heads != kv_heads:
        raise ValueError(f"k and v must have the same number of heads, got {kv_heads} and {value_heads}")
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"the number of k/v heads must divide q's {heads} heads, got {kv_heads}")
    if not heads and kv_heads:
        raise ValueError(f"q has no heads but k has {kv_heads}")
    if head_dim == 0 or value_dim == 0:
        raise ValueError(f"d and dv must be at least 1, got d = {head_dim} and dv = {value_dim}")
    for name, length in (("q", queries), ("k", keys)):
        if length > LARGEST_LENGTH:
            raise ValueError(f"{name} is {length} long, the limit is {LARGEST_LENGTH}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")

    kind, mask_sizes = MaskKind.NONE, (1, 1, 1)
    if mask is not None:
        mask_sizes = _check_mask(mask, batch, heads, queries, keys)
        kind = MaskKind.KEY if mask_sizes[2] == 1 else MaskKind.DENSE
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
        mask_per_head=mask_sizes[1] > 1,
        causal=causal,
        scale=head_dim**-0.5 if scale is None else scale,
        dropout_p=dropout_p,
        deterministic=deterministic,
        precision=precision,
    )
    return spec, mask_sizes
