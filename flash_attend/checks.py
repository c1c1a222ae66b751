"""The only place where arguments are checked: what a caller gave becomes `Operands` and an `AttentionSpec`, or an
exception that names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from flash_attend.operands import Layouts, Operands, Strides, broadcast_strides
from flash_attend.options import check_flag, check_number, check_positive, check_probability, check_window, shown
from flash_attend.spec import DEAD_SEGMENTS, LARGEST_LENGTH, AttentionSpec, Window, canonical, describe
from flash_attend.tracing import constant_when_compiled, float32_products

__all__ = [
    "Facts",
    "Needed",
    "Options",
    "Sizes",
    "check_call",
    "check_complex",
    "check_dense",
    "facts_of",
    "is_dense",
    "is_jagged",
    "layouts_of",
    "needed_of",
    "normalise_call",
    "normalise_inputs",
    "options_of",
    "view_operands",
]

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
COMPLEX_HINT = "; flash_attend.complex_attention takes complex tensors, or view them as real ones (torch.view_as_real)"
OTHERS = ("bias", "alibi_slopes", "sinks")
UNLIMITED: Window = (None, None)
NONE = (False, False, False)
FORMS = {"q": "(b, h, i, d)", "k": "(b, hk, j, d) or (b, j, d)", "v": "(b, hk, j, dv) or (b, j, dv)"}

# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


# What is known of q, k, v, the mask, the bias, the slopes, the sinks and the segments, each as in `TensorFacts`.
Facts = tuple[tuple, tuple, tuple, tuple | None, tuple | None, tuple | None, tuple | None, tuple | None]
# causal, scale, dropout_p, deterministic, how float32 products are computed, window, softcap
Options = tuple[bool, float | None, float, bool, str, Window, float]
Needed = tuple[bool, ...]  # of what a gradient is needed: q, k, v and, where there is either, the bias and the sinks


class TensorFacts(NamedTuple):
    """A tensor without its values: all that is checked of it, and so what the result is looked up by."""

    shape: tuple[int, ...]
    stride: Strides
    dtype: torch.dtype
    device: torch.device
    packed: bool = False  # it came as (t, h, d), and is read as (1, h, t, d)

    @property
    def shown(self) -> str:
        return str(tuple(self.shape[at] for at in (2, 1, 3)) if self.packed else tuple(self.shape))


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has sizes and strides to be read by."""
    initialized = type(tensor) is Tensor or not isinstance(tensor, (UninitializedBuffer, UninitializedParameter))
    return initialized and not tensor.is_nested and tensor.layout == torch.strided


def is_jagged(tensor: object) -> bool:
    """Whether it is a nested tensor that holds sequences one after another."""
    return isinstance(tensor, Tensor) and tensor.is_nested and tensor.layout == torch.jagged


class Sizes(NamedTuple):
    """What masks and biases are read with: 1 along a dimension that was expanded, where that makes no difference."""

    mask: tuple[int, int, int] = (1, 1, 1)  # (b|1, h|1, i|1); their last is that of the keys
    bias: tuple[int, ...] | None = None  # (b|1, h|1, i|1, j|1)


def facts_of(given: Operands) -> Facts:
    """What is known of the tensors of a call. Raises `TypeError` for what is no dense tensor."""
    q, k, v, mask, _, bias, alibi_slopes, sinks, segments, _ = given
    strided = torch.strided
    if not (type(q) is type(k) is type(v) is Tensor and q.layout is k.layout is v.layout is strided):
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            check_dense(name, tensor)
    if mask is not None and not (type(mask) is Tensor and mask.layout is strided):
        check_dense("mask", mask)
    others: tuple = (None, None, None)
    if not (bias is alibi_slopes is sinks is None):
        others = _facts_of_others(bias=bias, alibi_slopes=alibi_slopes, sinks=sinks)
    try:
        return (
            (q.shape, q.stride(), q.dtype, q.device),
            (k.shape, k.stride(), k.dtype, k.device),
            (v.shape, v.stride(), v.dtype, v.device),
            None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device),
            *others,
            None if segments is None else (segments.shape, segments.stride(), segments.dtype, segments.device),
        )
    except RuntimeError:  # a nested tensor has neither sizes nor strides
        for name, found in zip(("q", "k", "v", "mask"), given, strict=False):
            if found is not None:
                check_dense(name, found)
        raise


def _facts_of_others(**others: Tensor | None) -> tuple:
    for name, given in others.items():
        if given is not None:
            check_dense(name, given)
    slopes = others["alibi_slopes"]
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes must not require a gradient, there is none of them; detach them, or pass a bias")
    found = others.values()
    return tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in found)


def check_dense(name: str, tensor: object) -> None:
    """Raises `TypeError` for what is no tensor, or none with sizes and strides."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {shown(tensor)}")
    if not is_dense(tensor):
        kind = "nested " if tensor.is_nested else "" if tensor.layout == torch.strided else f"{tensor.layout} "
        raise TypeError(f"{name} must be a dense strided tensor, got a {kind}{type(tensor).__name__}")


def _check_tensors(
    q: TensorFacts, k: TensorFacts, v: TensorFacts, mask: TensorFacts | None, others: dict[str, TensorFacts]
) -> None:
    """Each by itself, and whether they are of one kind."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, tensor)
        if tensor.dtype not in SUPPORTED_DTYPES:
            hint = COMPLEX_HINT if tensor.dtype.is_complex else ""
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}{hint}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = may attend), got {mask.dtype}")
    for name, other in others.items():
        if other.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"{name} must have q's dtype {q.dtype}, or float32, got {other.dtype}")
    for name, at in (("k", k), ("v", v), ("mask", mask), *others.items()):
        if at is not None and at.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {at.device}")


def _check_rank(name: str, tensor: TensorFacts) -> None:
    rank = len(tensor.shape)
    if rank != 4 and (rank != 3 or name == "q"):
        raise ValueError(f"{name} must be {FORMS[name]}, got {rank} dimensions: {tensor.shown}")


def check_complex(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Whether these are what `complex_attention` takes, told in its caller's shapes and not in those of what it views
    them as. Raises as `check_call` does."""
    facts = facts_of(Operands(q, k, v))[:3]
    of_q, of_k, of_v = (TensorFacts(*of) for of in facts)
    for name, tensor in (("q", of_q), ("k", of_k), ("v", of_v)):
        _check_rank(name, tensor)
        if tensor.dtype not in COMPLEX_DTYPES:
            hint = "" if tensor.dtype.is_complex else "; flash_attend.flash_attention takes real ones"
            raise TypeError(f"{name} must be complex64 or complex128, got {tensor.dtype}{hint}")
        if tensor.dtype != of_q.dtype:
            raise TypeError(f"{name} must have q's dtype {of_q.dtype}, got {tensor.dtype}")
    _check_shapes(of_q, of_k, of_v)


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
    _check_broadcast("mask", mask, shape, full)
    b, h, i = (1 if size > 1 and step == 0 else size for size, step in zip(shape[:3], stride[:3], strict=True))
    return b, h, i


def _check_broadcast(name: str, tensor: TensorFacts, shape: tuple[int, ...], full: tuple[int, ...]) -> None:
    for letter, size, wanted in zip("bhij", shape, full, strict=True):
        if size != 1 and size != wanted:  # torch.compile takes a symbol for not being in a tuple of its value
            raise ValueError(f"{name} {tensor.shown} does not broadcast to (b, h, i, j) = {full}: {letter} is {size}")


def _check_bias(bias: TensorFacts, full: tuple[int, ...], needs_gradient: bool) -> tuple[int, ...]:
    """The sizes `(b|1, h|1, i|1, j|1)` that a bias for `full = (b, h, i, j)` is read with. One whose gradient is needed
    is read as it is: each of its elements has one, though memory holds it once."""
    missing = 4 - len(bias.shape)
    if missing < 0:
        raise ValueError(f"bias must broadcast to (b, h, i, j), got {len(bias.shape)} dimensions: {bias.shown}")
    shape, strides = (1,) * missing + tuple(bias.shape), (0,) * missing + tuple(bias.stride)
    _check_broadcast("bias", bias, shape, full)
    if needs_gradient:
        return shape
    return tuple(1 if size > 1 and step == 0 else size for size, step in zip(shape, strides, strict=True))


def _check_by_heads(batch: int, heads: int, others: dict[str, TensorFacts]) -> None:
    """Whether slopes and sinks fit so many batch entries, or sequences, and heads."""
    if (slopes := others.get("alibi_slopes")) is not None:
        rank, fitting = len(slopes.shape), slopes.shape[-1:] == (heads,)
        if not (fitting and (rank == 1 or (rank == 2 and slopes.shape[0] in (1, batch)))):
            raise ValueError(f"alibi_slopes must be (h,) = {(heads,)} or (b, h) = {(batch, heads)}, got {slopes.shown}")
    if (sinks := others.get("sinks")) is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must be (h,) = {(heads,)}, got {sinks.shown}")


def _view_mask(mask: Tensor, sizes: tuple[int, int, int], keys: int) -> Tensor:
    """`(b, j)` or 4-D -> `(b|1, h|1, i|1, j)`, a view: nothing is expanded in memory or copied."""
    if mask.ndim == 2:
        mask = mask.view(mask.shape[0], 1, 1, keys)
    mask = _narrowed(mask, sizes)
    return mask if mask.shape[3] == keys else mask.expand(-1, -1, -1, keys)


def _view_bias(bias: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Up to 4 dimensions -> `(b|1, h|1, i|1, j|1)`, a view."""
    return _narrowed(bias[(None,) * (4 - bias.ndim)], sizes)


def _narrowed(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """The tensor with one element along dimensions that it is expanded along."""
    for dim, size in enumerate(sizes):
        if tensor.shape[dim] != size:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


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


def needed_of(given: Operands) -> Needed:
    """Of which of the tensors of a call a gradient is needed."""
    q, k, v, _, _, bias, _, sinks, *_ = given
    if bias is sinks is None:
        return (q.requires_grad, k.requires_grad, v.requires_grad) if torch.is_grad_enabled() else NONE
    return tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in (q, k, v, bias, sinks))


def normalise_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
) -> tuple[Operands, AttentionSpec]:
    """Checks a call and describes it.

    Returns operands without a seed, every one of them a view of what came, and the spec.

    Raises `TypeError` for a wrong kind (no tensor, dtype, number) and `ValueError` for a wrong value (shape, device,
    range). Nothing is allocated or launched here.
    """
    given = Operands(q, k, v, mask, None, bias, alibi_slopes, sinks)
    return normalise_call(given, causal, scale, dropout_p, deterministic, window, softcap)


def normalise_call(given: Operands, *options: Any, **named: Any) -> tuple[Operands, AttentionSpec]:
    """The same of tensors as one value, and of what `options_of` takes."""
    facts = facts_of(given)
    spec, sizes = check_call(facts, options_of(given.q, *options, **named), needed_of(given))
    return view_operands(given, spec, sizes), spec


def options_of(
    q: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    deterministic: bool | None,
    window: Window | None = None,
    softcap: float | None = None,
) -> Options:
    """What a call says beside its tensors, each option checked by itself, with what torch is set to."""
    return (
        check_flag("causal", causal),
        None if scale is None else check_number("scale", scale),
        check_probability("dropout_p", dropout_p),
        torch.are_deterministic_algorithms_enabled()
        if deterministic is None
        else check_flag("deterministic", deterministic),
        _float32_precision() if q.dtype == torch.float32 else "ieee",
        UNLIMITED if window is None else check_window("window", window),
        0.0 if softcap is None else check_positive("softcap", softcap),
    )


def check_call(facts: Facts, options: Options, needed: Needed) -> tuple[AttentionSpec, Sizes]:
    """The spec of a call, by `facts_of` its tensors, its `options_of` and `needed_of` it, and the sizes that its mask
    and its bias are read with."""
    q, k, v = (TensorFacts(*of_tensor) for of_tensor in facts[:3])
    segments = None if facts[7] is None else TensorFacts(*facts[7])
    mask = None if facts[3] is None else TensorFacts(*facts[3])
    others = {name: TensorFacts(*of) for name, of in zip(OTHERS, facts[4:7], strict=True) if of is not None}
    causal, scale, dropout_p, deterministic, precision, window, softcap = options
    if segments is not None:
        q, k, v = (tensor._replace(packed=True) for tensor in (q, k, v))
    _check_tensors(q, k, v, mask, others)
    _check_shapes(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x._replace(shape=_with_heads(q, x)) for x in (k, v))
    full, sizes, bias = (*q.shape[:3], k.shape[2]), Sizes(), others.get("bias")
    if mask is not None:
        sizes = sizes._replace(mask=_check_mask(mask, full))
        mask = mask._replace(shape=sizes.mask)
    if bias is not None:
        of_bias = _check_bias(bias, full, needed[3])
        sizes, bias = sizes._replace(bias=of_bias), bias._replace(shape=of_bias)
    _check_by_heads(q.shape[0] if segments is None else segments.shape[0] - DEAD_SEGMENTS, q.shape[1], others)
    causal, window = canonical(causal, window, full[2], full[3])
    said = causal, scale, dropout_p, deterministic, precision, window, softcap
    alibi, sinks = "alibi_slopes" in others, "sinks" in others
    return describe(q, k, v, mask, *said, bias=bias, alibi=alibi, sinks=sinks, segments=segments), sizes


def view_operands(given: Operands, spec: AttentionSpec, sizes: Sizes) -> Operands:
    """Tensors that were checked as the operands that they are read as."""
    q, k, v, mask, seed, bias, alibi_slopes, sinks, segments, _ = given
    mask = None if mask is None else _view_mask(mask, sizes.mask, spec.keys)
    bias = None if bias is None or sizes.bias is None else _view_bias(bias, sizes.bias)
    if alibi_slopes is not None and alibi_slopes.ndim == 1:
        alibi_slopes = alibi_slopes[None]
    elif alibi_slopes is not None and segments is not None and alibi_slopes.shape[0] == 0:
        alibi_slopes = alibi_slopes.new_zeros(1, spec.heads)  # of no sequences, of which nothing is read
    k, v = (_view_heads(tensor, spec.kv_heads) for tensor in (k, v))
    return Operands(q, k, v, mask, seed, bias, alibi_slopes, sinks, segments)


def layouts_of(facts: Facts, spec: AttentionSpec, sizes: Sizes) -> Layouts:
    """How the operands of a call will lie, by `facts_of` its tensors. The strides of a dimension of size 1 are any."""
    q, k, v = (TensorFacts(*of_tensor).stride for of_tensor in facts[:3])
    k, v = ((x[0], 0, *x[1:]) if len(x) == 3 else x for x in (k, v))
    found, (mask, bias, slopes, sinks) = Layouts(q, k, v), facts[3:7]
    if mask is not None:
        shape, strides, *_ = mask
        if len(strides) == 2:
            shape, strides = (shape[0], 1, 1, shape[1]), (strides[0], 0, 0, strides[1])
        found = found._replace(mask_sizes=(*sizes.mask, spec.keys), mask=broadcast_strides(shape, strides))
    if bias is not None:
        found = found._replace(bias=(0,) * (4 - len(bias[0])) + broadcast_strides(bias[0], bias[1]))
    if slopes is not None:
        of_slopes = (0,) * (2 - len(slopes[0])) + broadcast_strides(slopes[0], slopes[1])
        found = found._replace(alibi_slopes=of_slopes, dtypes=(slopes[2], None))
    if sinks is not None:
        found = found._replace(sinks=broadcast_strides(*sinks[:2]), dtypes=(found.dtypes[0], sinks[2]))
    return found


# A graph that holds the answer is guarded by torch.compile, on what torch itself asks at each product of float32: it
# compares this setting at every call.
@constant_when_compiled
def _float32_precision() -> str:
    """How float32 products are computed: in TF32 where torch computes its own so on CUDA, else accurately (3xTF32).

    Asked in the only words that answer to all of torch's ways to say it, the older `allow_tf32` and
    `set_float32_matmul_precision` among them; those two raise once the newer ones were used.
    """
    return "tf32" if float32_products() == "tf32" else "tf32x3"
