"""Attention as operators of PyTorch, opaque to whatever traces or transforms a program: torch.compile, torch.export,
torch.func, dispatch modes, tensor subclasses.

`flash_attend::forward` and `flash_attend::backward` run the kernels, or the einsum path for a compiler, which would
make of its loop over chunks as many graphs as there are lengths. Each has an implementation, a fake one that says what
comes out without computing it, an autograd kernel, and a rule for `torch.vmap`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.utils._pytree import tree_map

from flash_attend.autograd import Attention, Gradients
from flash_attend.backends import BACKENDS, BackwardName
from flash_attend.dispatch import Plan
from flash_attend.reference import attention_reference, attention_reference_gradients
from flash_attend.spec import AttentionSpec, describe
from flash_attend.target import DeviceTarget
from flash_attend.tracing import forward_mode

if TYPE_CHECKING:
    from flash_attend.kernels.configs import Tiles

__all__ = ["attend", "differentiate"]

_OPTIONS = "bool causal, float scale, float dropout_p, bool deterministic, str precision, str backend, str backward"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library = torch.library.Library("flash_attend", "DEF")
_library.define(
    f"forward(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, {_OPTIONS}, bool return_lse)"
    " -> (Tensor, Tensor, Tensor[])",
    tags=_TAGS,
)
_library.define(
    "backward(bool[] needed, Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? mask,"
    f" Tensor? seed, Tensor out, Tensor lse, Tensor[] schedule, {_OPTIONS}) -> Tensor[]",
    tags=_TAGS,
)
FORWARD = torch.ops.flash_attend.forward.default
BACKWARD = torch.ops.flash_attend.backward.default


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    plan: Plan,
    *,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """`out (b, h, i, dv)` and `lse (b, h, i)`; without `return_lse` the einsum path leaves the lse `(b, h, 0)`.

    Arguments as `normalise_inputs` returns them; `seed` is a one-element int64 tensor on q's device, or None.
    """
    out, lse, _ = FORWARD(q, k, v, mask, seed, *spec.options, plan.name, plan.backward, return_lse)
    return out, lse


def differentiate(
    backend: str,
    way: str,
    needed: Sequence[bool],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    out: Tensor,
    lse: Tensor,
    *schedule: Tensor,
) -> list[Tensor]:
    """The gradients of those of q, k and v that are needed, from those of out and lse; None counts as 0."""
    tensors = grad_out, grad_lse, q, k, v, mask, seed, out, lse
    return BACKWARD(needed, *tensors, schedule, *spec.options, backend, way)


# ---------------------------------------------------------------------------------------------------------------------
# Implementations
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def _forward(q, k, v, mask, seed, causal, scale, dropout_p, deterministic, precision, backend, way, return_lse):
    spec = describe(q, k, v, mask, causal, scale, dropout_p, deterministic, precision)
    if backend == "math":
        with torch.no_grad():
            out, lse = _through_einsum(q, k, v, mask, seed, spec, return_lse)
        return out.contiguous(), lse.contiguous(), []
    from flash_attend import launches

    with torch.no_grad():
        tiles = _tiles(spec, q.device, backend, way)
        out, lse, *schedule = launches.forward(BACKENDS[backend], tiles, q, k, v, mask, seed, spec)
    return out, lse, launches.pack(schedule)


@torch.library.register_fake(FORWARD, lib=_library)
def _like_forward(q, k, v, mask, seed, causal, scale, dropout_p, deterministic, precision, backend, way, return_lse):
    spec = describe(q, k, v, mask, causal, scale, dropout_p, deterministic, precision)
    if backend == "math":
        lse = q.new_empty(spec.batch, spec.heads, spec.queries, dtype=spec.accumulator_dtype)
        out = q.new_empty(spec.batch, spec.heads, spec.queries, spec.value_dim)
        return out, lse if return_lse else _no_lse(q, spec), []
    from flash_attend import launches

    return *launches.like_forward(q, spec), launches.like_packed(_tiles(spec, q.device, backend, way), mask, spec)


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward(
    needed, grad_out, grad_lse, q, k, v, mask, seed, out, lse, schedule,
    causal, scale, dropout_p, deterministic, precision, backend, way,
):  # fmt: skip
    spec = describe(q, k, v, mask, causal, scale, dropout_p, deterministic, precision)
    if backend == "math":
        with torch.no_grad():
            grads = attention_reference_gradients(grad_out, grad_lse, q, k, v, mask, seed, spec)
        return [grad.contiguous() for grad in compress(grads, needed)]
    from flash_attend import launches

    tiles = _tiles(spec, q.device, backend, way)
    # The kernels read an lse as it left the forward; under vmap it may have been expanded since.
    tensors = grad_out, grad_lse, q, k, v, mask, seed, spec, out, lse.contiguous()
    with torch.no_grad():
        schedule = launches.unpack(tiles, schedule, mask, spec)
        return list(launches.backward(BACKENDS[backend], tiles, needed, *tensors, *schedule))


@torch.library.register_fake(BACKWARD, lib=_library)
def _like_backward(
    needed, grad_out, grad_lse, q, k, v, mask, seed, out, lse, schedule,
    causal, scale, dropout_p, deterministic, precision, backend, way,
):  # fmt: skip
    if backend == "math":
        return [x.new_empty(x.shape) for x in compress((q, k, v), needed)]
    from flash_attend import launches

    spec = describe(q, k, v, mask, causal, scale, dropout_p, deterministic, precision)
    return list(launches.like_backward(needed, q, k, v, spec))


def _tiles(spec: AttentionSpec, device: torch.device, backend: str, way: BackwardName) -> Tiles:
    # What they do not depend on is left out, and what they do made a number: a symbol cannot be looked up.
    reduced = AttentionSpec(
        batch=1,
        heads=1,
        kv_heads=1,
        queries=1,
        keys=1,
        head_dim=int(spec.head_dim),
        value_dim=int(spec.value_dim),
        dtype=spec.dtype,
        mask=spec.mask,
        causal=spec.causal,
        dropout_p=float(spec.dropout_p),
        deterministic=spec.deterministic,
        precision=spec.precision,
    )
    return BACKENDS[backend].tiles(reduced, DeviceTarget.of(device), way)


def _through_einsum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    spec: AttentionSpec,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = attention_reference(q, k, v, mask, seed, spec, return_lse=return_lse)
    return out, _no_lse(q, spec) if lse is None else lse


def _no_lse(q: Tensor, spec: AttentionSpec) -> Tensor:
    return q.new_empty(spec.batch, spec.heads, 0, dtype=spec.accumulator_dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd kernels
# ---------------------------------------------------------------------------------------------------------------------

# Functions that deal with one level of torch.func at a time, as the kernels of torch's own operators do. In forward
# mode the operators are the einsum path itself, whose parts know their tangents.


def _forward_autograd(
    keyset, q, k, v, mask, seed, causal, scale, dropout_p, deterministic, precision, backend, way, return_lse
):  # fmt: skip
    def run(q, k, v, mask, seed, spec):
        with _levels_below():
            below = keyset & torch._C._after_autograd_keyset
            out, lse, schedule = FORWARD.redispatch(below, q, k, v, mask, seed, *spec.options, backend, way, return_lse)
        return out, lse, *schedule

    spec = describe(q, k, v, mask, causal, scale, dropout_p, deterministic, precision)
    if forward_mode():
        return *_through_einsum(q, k, v, mask, seed, spec, return_lse), []
    with enable_single_level_autograd_function():
        out, lse, *schedule = Attention.apply(run, partial(differentiate, backend, way), q, k, v, mask, seed, spec)
    return out, lse, schedule


def _backward_autograd(
    keyset, needed, grad_out, grad_lse, q, k, v, mask, seed, out, lse, schedule,
    causal, scale, dropout_p, deterministic, precision, backend, way,
):  # fmt: skip
    def run(needed, grad_out, grad_lse, q, k, v, mask, seed, spec, out, lse, *schedule):
        tensors = grad_out, grad_lse, q, k, v, mask, seed, out, lse, list(schedule)
        with _levels_below():
            below = keyset & torch._C._after_autograd_keyset
            return BACKWARD.redispatch(below, needed, *tensors, *spec.options, backend, way)

    spec = describe(q, k, v, mask, causal, scale, dropout_p, deterministic, precision)
    if forward_mode():
        return list(compress(attention_reference_gradients(grad_out, grad_lse, q, k, v, mask, seed, spec), needed))
    tensors = grad_out, grad_lse, q, k, v, mask, seed, spec, out, lse
    with enable_single_level_autograd_function():
        return list(Gradients.apply(run, needed, *tensors, *schedule))


@contextmanager
def _levels_below() -> Iterator[None]:
    """For what runs inside a function's forward, where torch switches derivatives off: at the next level of torch.func
    the operator may be differentiated again."""
    with torch.enable_grad(), _set_fwd_grad_enabled(True):
        yield


_library.impl("forward", _forward_autograd, "Autograd", with_keyset=True)
_library.impl("backward", _backward_autograd, "Autograd", with_keyset=True)


# ---------------------------------------------------------------------------------------------------------------------
# Rules for torch.vmap
# ---------------------------------------------------------------------------------------------------------------------

# The dimension that is mapped over is folded into the batch, so that one launch serves all of it. Dropout draws a seed
# for each entry with randomness="different"; the first serves the folded batch, whose entries differ by their position.


@torch.library.register_vmap(FORWARD, lib=_library)
def _forward_vmap(info, in_dims, *arguments):
    q, k, v, mask, seed, causal, scale, dropout_p, *others = arguments
    if dropout_p > 0 and in_dims[4] is None:
        return _one_by_one(FORWARD, info, in_dims, arguments)
    q, k, v = map(partial(_fold, info.batch_size), (q, k, v), in_dims)
    tensors = q, k, v, _fold_mask(info.batch_size, mask, in_dims[3], q.shape[0]), _first(seed, in_dims[4])
    out, lse, schedule = FORWARD(*tensors, causal, scale, dropout_p, *others)
    out, lse = _unfold(info.batch_size, out), _unfold(info.batch_size, lse)
    if _is_shared(mask, in_dims[3]):
        return (out, lse, schedule), (0, 0, [None for _ in schedule])
    return (out, lse, [_unfold(info.batch_size, tensor) for tensor in schedule]), (0, 0, [0 for _ in schedule])


@torch.library.register_vmap(BACKWARD, lib=_library)
def _backward_vmap(info, in_dims, *arguments):
    needed, grad_out, grad_lse, q, k, v, mask, seed, out, lse, schedule, causal, scale, dropout_p, *others = arguments
    if dropout_p > 0 and in_dims[7] is None:
        return _one_by_one(BACKWARD, info, in_dims, arguments)
    fold = partial(_fold, info.batch_size)
    grad_out, grad_lse, q, k, v = map(fold, (grad_out, grad_lse, q, k, v), in_dims[1:])
    out, lse = map(fold, (out, lse), in_dims[8:])
    if not _is_shared(mask, in_dims[6]):
        schedule = list(map(fold, schedule, in_dims[10]))
    mask, seed = _fold_mask(info.batch_size, mask, in_dims[6], q.shape[0]), _first(seed, in_dims[7])
    tensors = grad_out, grad_lse, q, k, v, mask, seed, out, lse, schedule
    grads = BACKWARD(needed, *tensors, causal, scale, dropout_p, *others)
    return [_unfold(info.batch_size, grad) for grad in grads], [0 for _ in grads]


def _fold(size: int, tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """`(b, ...)`, mapped over `dim`, as `(size * b, ...)`: a view where the strides allow it."""
    return None if tensor is None else _unfolded(size, tensor, dim).flatten(0, 1)


def _fold_mask(size: int, mask: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
    """`(b|1, ...)` as `(batch, ...)`, where `batch = size * b`, or as it is where it is shared."""
    if mask is None or _is_shared(mask, dim):
        return mask
    return _unfolded(size, mask, dim).expand(-1, batch // size, -1, -1, -1).flatten(0, 1)


def _is_shared(mask: Tensor | None, dim: int | None) -> bool:
    """Whether a mask, and so its schedule, is the same for the whole of the folded batch."""
    return mask is None or (dim is None and mask.shape[0] == 1)


def _unfolded(size: int, tensor: Tensor, dim: int | None) -> Tensor:
    """`(size, b, ...)`."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _unfold(size: int, tensor: Tensor) -> Tensor:
    """`(size * b, ...)` as `(size, b, ...)`."""
    return tensor.unflatten(0, (size, tensor.shape[0] // size))


def _first(seed: Tensor | None, dim: int | None) -> Tensor | None:
    return seed if seed is None or dim is None else seed.select(dim, 0)


def _one_by_one(op: torch._ops.OpOverload, info: Any, in_dims: Any, arguments: Any) -> tuple[Any, Any]:
    """One call for each entry: with randomness="same" all of them drop the same weights, those of one seed."""

    def entry(index: int) -> Any:
        return tree_map(lambda x, dim: x if dim is None else x.select(dim, index), arguments, in_dims)

    results = [op(*entry(index)) for index in range(info.batch_size)]
    stacked = tree_map(lambda *tensors: torch.stack(tensors), *results)
    return stacked, tree_map(lambda _: 0, stacked)
