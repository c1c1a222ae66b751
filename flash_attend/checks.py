"""The only place where arguments are checked: what a caller gave becomes `Operands` and an `AttentionSpec`, or an
exception that names the argument, what came and what was expected."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from flash_attend.operands import Layouts, Operands, Strides
from flash_attend.options import check_flag, check_number, check_probability, shown
from flash_attend.spec import LARGEST_LENGTH, AttentionSpec, describe
from flash_attend.tracing import constant_when_compiled

__all__ = [
    "Facts",
    "Options",
    "check_call",
    "facts_of",
    "is_dense",
    "layouts_of",
    "normalise_inputs",
    "options_of",
    "view_operands",
]

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FORMS = {"q": "(b, h, i, d)", "k": "(b, hk, j, d) or (b, j, d)", "v": "(b, hk, j, dv) or (b, j, dv)"}

# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


Facts = tuple[tuple, tuple, tuple, tuple | None]  # what is known of q, k, v and the mask, each as in `TensorFacts`
# causal, scale, dropout_p, deterministic, and how float32 products are computed
Options = tuple[bool, float | None, float, bool, str]


class TensorFacts(NamedTuple):
    """A tensor without its values: all that is checked of it, and so what the result is looked up by."""

    shape: tuple[int, ...]
    stride: Strides
    dtype: torch.dtype
    device: torch.device

    @property
    def shown(self) -> str:
        return str(tuple(self.shape))


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has sizes and strides to be read by."""
    initialized = type(tensor) is Tensor or not isinstance(tensor, (UninitializedBuffer, UninitializedParameter))
    return initialized and not tensor.is_nested and tensor.layout == torch.strided


def facts_of(q: Any, k: Any, v: Any, mask: Any) -> Facts:
    """What is known of the tensors of a call. Raises `TypeError` for what is no dense tensor."""
    strided = torch.strided
    if not (type(q) is type(k) is type(v) is Tensor and q.layout is k.layout is v.layout is strided):
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            _check_dense(name, tensor)
    if mask is not None and not (type(mask) is Tensor and mask.layout is strided):
        _check_dense("mask", mask)
    try:
        return (
            (q.shape, q.stride(), q.dtype, q.device),
            (k.shape, k.stride(), k.dtype, k.device),
            (v.shape, v.stride(), v.dtype, v.device),
            None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device),
        )
    except RuntimeError:  # a nested tensor has neither sizes nor strides
        for name, tensor in (("q", q), ("k", k), ("v", v), ("mask", mask)):
            if tensor is not None:
                _check_dense(name, tensor)
        raise


def _check_dense(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {shown(tensor)}")
    if not is_dense(tensor):
        kind = "nested " if tensor.is_nested else "" if tensor.layout == torch.strided else f"{tensor.layout} "
        raise TypeError(f"{name} must be a dense strided tensor, got a {kind}{type(tensor).__name__}")


def _check_tensors(q: TensorFacts, k: TensorFacts, v: TensorFacts, mask: TensorFacts | None) -> None:
    """Each by itself, and whether they are of one kind."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        rank = len(tensor.shape)
        if rank != 4 and (rank != 3 or name == "q"):
            raise ValueError(f"{name} must be {FORMS[name]}, got {rank} dimensions: {tensor.shown}")
        if tensor.dtype not in SUPPORTED_DTYPES:
            hint = "; view complex tensors as real ones first (torch.view_as_real)" if tensor.dtype.is_complex else ""
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}{hint}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = may attend), got {mask.dtype}")
    for name, other in (("k", k), ("v", v), ("mask", mask)):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {other.device}")


def _check_shapes(q: TensorFacts, k: TensorFacts, v: TensorFacts) -> None:
    """Whether q, k and v fit each other."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, value_heads = (x.shape[1] if len(x.shape) == 4 else 1 for x in (k, v))
    keys, values = k.shape[-2], v.shape[-2]
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != batch:
            raise ValueError(f"{name} must have q's batch size {batch}, got {tensor.shown}")
    if k.shape[-1] != head_dim:
        raise ValueError(f"k must have q's last dimension d = {head_dim}, got {k.shown}")
    if values != keys:
        raise ValueError(f"k and v must be equally long, got {keys} keys and {values} values")
    if value_heads != kv_heads:
        raise ValueError(f"k and v must have the same number of heads, got {kv_heads} and {value_heads}")
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"the number of k/v heads must divide q's {heads} heads, got {kv_heads}")
    if head_dim == 0 or v.shape[-1] == 0:
        raise ValueError(f"d and dv must be at least 1, got d = {head_dim} and dv = {v.shape[-1]}")
    for name, length in (("q", queries), ("k", keys)):
        if length > LARGEST_LENGTH:
            raise ValueError(f"{name} is {length} long, the limit is {LARGEST_LENGTH}")


def _check_mask(mask: TensorFacts, full: tuple[int, ...]) -> tuple[int, int, int]:
    """The sizes `(b|1, h|1, i|1)` that a mask for `full = (b, h, i, j)` is read with: 1 along a dimension that was
    expanded (stride 0)."""
    batch, *_, keys = full
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


def _with_heads(q: TensorFacts, tensor: TensorFacts) -> tuple[int, ...]:
    """The shape `(b, hk, j, d)` that k or v is read with: one head where it names none, none where q has none."""
    heads = tensor.shape[1] if len(tensor.shape) == 4 else 1
    return tensor.shape[0], heads if q.shape[1] else 0, *tensor.shape[-2:]


def _view_heads(tensor: Tensor, kv_heads: int) -> Tensor:
    """`(b, j, d)` or `(b, hk, j, d)` -> `(b, hk, j, d)`, a view."""
    tensor = tensor[:, None] if tensor.ndim == 3 else tensor
    return tensor if kv_heads else tensor[:, :0]


# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------


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
) -> tuple[Operands, AttentionSpec]:
    """Checks a call and describes it.

    Returns operands without a seed, every one of them a view of what came, and the spec.

    Raises `TypeError` for a wrong kind (no tensor, dtype, number) and `ValueError` for a wrong value (shape, device,
    range). Nothing is allocated or launched here.
    """
    facts = facts_of(q, k, v, mask)
    spec, mask_sizes = check_call(facts, options_of(q, causal, scale, dropout_p, deterministic))
    return view_operands(q, k, v, mask, spec, mask_sizes), spec


def options_of(q: Tensor, causal: bool, scale: float | None, dropout_p: float, deterministic: bool | None) -> Options:
    """What a call says beside its tensors, each option checked by itself, with what torch is set to."""
    return (
        check_flag("causal", causal),
        None if scale is None else check_number("scale", scale),
        check_probability("dropout_p", dropout_p),
        torch.are_deterministic_algorithms_enabled()
        if deterministic is None
        else check_flag("deterministic", deterministic),
        _float32_precision() if q.dtype == torch.float32 else "ieee",
    )


def check_call(facts: Facts, options: Options) -> tuple[AttentionSpec, tuple[int, int, int]]:
    """The spec of a call, by `facts_of` its tensors and its `options_of`, and the sizes `(b|1, h|1, i|1)` that its mask
    is read with."""
    q, k, v = (TensorFacts(*of_tensor) for of_tensor in facts[:3])
    mask = None if facts[3] is None else TensorFacts(*facts[3])
    causal, scale, dropout_p, deterministic, precision = options
    _check_tensors(q, k, v, mask)
    _check_shapes(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x._replace(shape=_with_heads(q, x)) for x in (k, v))
    sizes = (1, 1, 1)
    if mask is not None:
        sizes = _check_mask(mask, (*q.shape[:3], k.shape[2]))
        mask = mask._replace(shape=sizes)
    return describe(q, k, v, mask, causal, scale, dropout_p, deterministic, precision), sizes


def view_operands(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec, mask_sizes: tuple[int, int, int]
) -> Operands:
    """Tensors that were checked as the operands that they are read as."""
    mask = None if mask is None else _view_mask(mask, mask_sizes, spec.keys)
    return Operands(q, _view_heads(k, spec.kv_heads), _view_heads(v, spec.kv_heads), mask)


def layouts_of(facts: Facts, spec: AttentionSpec, mask_sizes: tuple[int, int, int]) -> Layouts:
    """How the operands of a call will lie, by `facts_of` its tensors. The strides of a dimension of size 1 are any."""
    q, k, v = (TensorFacts(*of_tensor).stride for of_tensor in facts[:3])
    k, v = ((x[0], 0, *x[1:]) if len(x) == 3 else x for x in (k, v))
    if facts[3] is None:
        return Layouts(q, k, v)
    sizes, strides, *_ = facts[3]
    if len(strides) == 2:
        sizes, strides = (sizes[0], 1, 1, sizes[1]), (strides[0], 0, 0, strides[1])
    broadcast = tuple(0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))
    return Layouts(q, k, v, (*mask_sizes, spec.keys), broadcast)


# A graph that holds the answer is guarded by torch.compile, on what torch itself asks at each product of float32: it
# compares this setting at every call.
@constant_when_compiled
def _float32_precision() -> str:
    """How float32 products are computed: in TF32 where torch computes its own so on CUDA, else accurately (3xTF32).

    Asked in the only words that answer to all of torch's ways to say it, the older `allow_tf32` and
    `set_float32_matmul_precision` among them; those two raise once the newer ones were used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
