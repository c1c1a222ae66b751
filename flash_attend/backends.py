"""The backends, an object each: what one refuses and why, and what runs it. A new one is one more object here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from flash_attend.operands import Layouts, Operands, Tangents
from flash_attend.reference import Merged, attention_reference, attention_reference_gradients
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.tangents import attend_tangents
from flash_attend.target import DeviceTarget, release
from flash_attend.tracing import constant_when_compiled

if TYPE_CHECKING:
    from flash_attend.kernels.configs import Tiles

__all__ = ["BACKENDS", "OLDEST_CAPABILITY", "TRITON_VERSIONS", "Backend", "BackwardName", "Functions", "has_kernels"]

LARGEST_HEAD_DIM = 256
LARGEST_ACCURATE_HEAD_DIM = 128  # float64 and 3xTF32 operands fill twice the registers: no tile beyond this has enough
# The fused backward holds more: with dropout, no tile of wide operands has enough beyond these, by `spec.precision`.
LARGEST_FUSED_DROPOUT = {"tf32": 128, "tf32x3": 64, "ieee": 64}
LARGEST_TANGENTS = {"tf32": 128, "tf32x3": 64, "ieee": 64}  # likewise: beyond, the einsum path takes as long or less
OLDEST_CAPABILITY = (8, 0)
LARGEST_GRID = 65535  # programs along any but the first dimension of a CUDA grid
HOPPER_ARCH = "sm_90"
HOPPER_DTYPES = (torch.float16, torch.bfloat16)
HOPPER_HEAD_DIMS = (64, 128, 256)
TRITON_VERSIONS = ((3, 6), (3, 9))  # oldest and newest that the kernels are compiled with in the tests

Refusal = Callable[[AttentionSpec, DeviceTarget], str]  # why a call cannot be served; empty where it can
# Two kernels, one for the gradients of k and v and one for that of q; one kernel for all of them; torch's own; or the
# einsum path.
BackwardName = Literal["separate", "fused", "torch", "einsum"]


class Functions(NamedTuple):
    """What runs a backend."""

    forward: Callable[..., Any]  # (operands, spec, tiles) -> out, lse, kept
    backward: Callable[..., Any]  # (grad_out, grad_lse, operands, out, lse, kept, spec, tiles, needed) -> gradients
    tiles: Callable[[AttentionSpec, DeviceTarget, BackwardName], Tiles | None]
    # `backward` without `kept`, where the keys are a part of those that out and lse are over
    backward_of_part: Callable[..., Any]
    # (spec, tiles, layouts) -> `forward` of operands with these layouts, which is then called with nothing else; None
    # where nothing is worked out of it once
    plan_forward: Callable[[AttentionSpec, Any, Layouts], Callable[[Operands], Any] | None] | None = None
    # (operands, tangents, spec, tiles) -> out, lse, their tangents, kept; None where another backend does it
    tangents: Callable[..., Any] | None = None
    # `tiles` of a call in forward mode, by which its `kept` and so its `backward` go; None where it has none
    tangent_tiles: Callable[[AttentionSpec, DeviceTarget, BackwardName], Tiles] | None = None
    # (spec, layouts) -> what `plan_forward` gives, of which nobody reads the LSE; None where that takes as long
    plan_out: Callable[[AttentionSpec, Layouts], Callable[[Operands], Any] | None] | None = None
    # (spec, layouts) -> (grad_out, operands, out, lse, kept) -> gradients of a call with these layouts, whose lse has
    # none; it, or what it gives, is None where `backward` itself is to be asked
    plan_backward: Callable[[AttentionSpec, Layouts], Callable[..., Any] | None] | None = None


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to compute attention."""

    name: str
    refuse: Refusal = field(repr=False)
    refuse_fused: Refusal | None = field(repr=False)  # for calls that it serves; None where it has no fused backward
    load: Callable[[], Functions] = field(repr=False)  # imports them
    usual_backward: BackwardName = field(default="separate", repr=False)  # what serves where fused does not
    # The backend that pushes tangents forward for this one; empty where it does so itself, but for calls that it
    # refuses, whose tangents are left to the einsum path.
    tangents_by: str = field(default="", repr=False)
    refuse_tangents: Refusal = field(default=lambda spec, target: "", repr=False)
    # Why "auto" leaves a call to others that it could serve, by what needs a gradient; empty where it does not.
    leave: Callable[[AttentionSpec, tuple[bool, ...]], str] = field(default=lambda spec, needed: "", repr=False)
    # What a run on a part has to have shown of it before "auto" takes it there.
    proof: Literal["none", "right", "faster"] = field(default="right", repr=False)

    @property
    def forward(self) -> Callable[..., Any]:
        """`(operands, spec, tiles) -> (out, lse, kept)`, the last for the backward alone."""
        return self.load().forward

    @property
    def backward(self) -> Callable[..., Any]:
        """`(grad_out | None, grad_lse | None, operands, out, lse, kept, spec, tiles, needed) -> (dq, dk, dv)` and,
        where there is either, those of the bias and the sinks; None where `needed`, a bool for each, says so."""
        return self.load().backward

    @property
    def tangents(self) -> Callable[..., Any]:
        """`(operands, tangents, spec, tiles) -> (out, lse, out_tangent, lse_tangent, kept)`, the last as `forward` has
        it; the tangents are a `Tangents`, and 0 of a query that sees no key."""
        found = BACKENDS[self.tangents_by or self.name].load().tangents
        assert found is not None
        return found

    def tiles(self, spec: AttentionSpec, target: DeviceTarget, backward: BackwardName) -> Tiles | None:
        """The tiles of a call whose gradients come by `backward`; None where a backend has none."""
        return self.load().tiles(spec, target, backward)

    def tangent_tiles(self, spec: AttentionSpec, target: DeviceTarget, backward: BackwardName) -> Tiles | None:
        """The same of a call in forward mode."""
        select = self.load().tangent_tiles
        return None if select is None else select(spec, target, backward)

    def tiles_by_lengths(self, spec: AttentionSpec, target: DeviceTarget, backward: BackwardName) -> str:
        """The tiles of a call as text, where they are others than long calls have; else empty."""
        tiles = self.tiles(spec, target, backward)
        if not target.multiprocessors or tiles == self.tiles(spec, replace(target, multiprocessors=0), backward):
            return ""
        from flash_attend.kernels.configs import as_text

        return as_text(tiles)

    def fault(self) -> str:
        """Why what runs it cannot be imported; empty where it can. The first call imports it."""
        return _import_fault(self.name)


@constant_when_compiled  # which a compiler looks for on the function itself, not on what keeps its results
def _import_fault(name: str) -> str:
    return _try_import(name)


@cache
def _try_import(name: str) -> str:
    try:
        BACKENDS[name].load()
    except Exception as error:  # a broken installation raises anything
        return f"its kernels cannot be imported ({type(error).__name__}: {error})"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Triton, for every NVIDIA GPU
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_scores(spec: AttentionSpec, served: tuple[str, ...] = ()) -> str:
    """Why a call cannot be served by what knows none but the `served` changes of scores."""
    asked = dict(
        window=spec.window != (None, None), softcap=spec.softcap > 0, bias=spec.bias is not None,
        alibi=spec.alibi, sinks=spec.sinks,
    )  # fmt: skip
    words = dict(window="a window", softcap="softcap", bias="a bias", alibi="ALiBi", sinks="sinks")
    missing = [words[name] for name, wanted in asked.items() if wanted and name not in served]
    return f"it does not serve {' and '.join(missing)}" if missing else ""


def has_kernels(target: DeviceTarget) -> bool:
    """Whether our kernels are for a part."""
    return target.capability is not None and target.capability >= OLDEST_CAPABILITY


def _refuse_triton(spec: AttentionSpec, target: DeviceTarget) -> str:
    if target.triton is None:
        return "Triton is not installed"
    oldest = TRITON_VERSIONS[0]
    version = release(target.triton)
    if version is not None and version < oldest:
        return f"Triton {target.triton} is older than {oldest[0]}.{oldest[1]}"
    if spec.dropout_p > 0 and spec.origin is not None:
        return "its dropout counts queries and keys from those of the call, which are parts of longer sequences"
    for letter, size in (("d", spec.head_dim), ("dv", spec.value_dim)):
        if size > LARGEST_HEAD_DIM:
            return f"{letter} = {size} is beyond the kernels' {LARGEST_HEAD_DIM}"
    if target.interpreted:
        if target.device_type not in ("cpu", "cuda"):
            return f"the interpreter serves CPU and CUDA tensors, not {target.device_type}"
        return ""
    if target.device_type != "cuda":
        return f"{target.device_type} tensors; the kernels need a CUDA device"
    if target.absent:
        return "this machine has no such CUDA device"
    if target.capability is None:
        return "the device has no CUDA compute capability (ROCm is not supported)"
    if target.capability < OLDEST_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (target.capability, OLDEST_CAPABILITY))
        return f"compute capability {have} is below {need}"
    accurate = {torch.float64: "float64", torch.float32: "float32-accurate"}.get(spec.dtype)
    if accurate and spec.precision != "tf32":
        for letter, size in (("d", spec.head_dim), ("dv", spec.value_dim)):
            if size > LARGEST_ACCURATE_HEAD_DIM:
                return f"{letter} = {size} is beyond the kernels' {LARGEST_ACCURATE_HEAD_DIM} in {accurate} mode"
    return ""


def _refuse_fused(spec: AttentionSpec, target: DeviceTarget) -> str:
    if spec.deterministic:
        return "deterministic gradients are asked for, and it adds up those of q in any order"
    return _refuse_wide(spec, target, LARGEST_FUSED_DROPOUT, "with dropout") if spec.dropout_p > 0 else ""


def _refuse_tangents(spec: AttentionSpec, target: DeviceTarget) -> str:
    return _refuse_wide(spec, target, LARGEST_TANGENTS, "for tangents")


def _refuse_wide(spec: AttentionSpec, target: DeviceTarget, limits: dict[str, int], case: str) -> str:
    """Why operands of float32 or float64 are too wide for a kernel that has these limits, by `spec.precision`."""
    widest, limit = max(spec.head_dim, spec.value_dim), limits[spec.precision]
    if spec.dtype not in (torch.float32, torch.float64) or target.interpreted or widest <= limit:
        return ""
    wide = f"{spec.dtype}, {spec.precision} products".removeprefix("torch.")
    return f"d or dv = {widest} is beyond its {limit} {case} ({wide})"


@cache
def _load_triton() -> Functions:
    from flash_attend.kernels.backward import attention_backward
    from flash_attend.kernels.configs import select_tangent_tiles, select_tiles
    from flash_attend.kernels.forward import attention_forward, plan_forward
    from flash_attend.kernels.part import backward_of_part
    from flash_attend.kernels.tangents import attention_tangents

    of_part = partial(backward_of_part, attention_backward)
    forward_mode = attention_tangents, select_tangent_tiles
    return Functions(attention_forward, attention_backward, select_tiles, of_part, plan_forward, *forward_mode)


# ---------------------------------------------------------------------------------------------------------------------
# Gluon, for Hopper alone: what it leaves, Triton's kernels do
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_hopper(spec: AttentionSpec, target: DeviceTarget) -> str:
    if reason := _refuse_triton(spec, target) or _refuse_scores(spec, ("window", "softcap", "sinks")):
        return reason
    if spec.sequences is not None:
        return "sequences are packed one after another"
    if target.interpreted:
        return "Triton's interpreter runs no Gluon"
    if target.arch != HOPPER_ARCH:
        return f"the kernels are for {HOPPER_ARCH}, the part is {target.arch}"
    if spec.dtype not in HOPPER_DTYPES:
        return f"{spec.dtype} is not float16 or bfloat16".replace("torch.", "")
    if spec.head_dim != spec.value_dim or spec.head_dim not in HOPPER_HEAD_DIMS:
        dims = ", ".join(map(str, HOPPER_HEAD_DIMS))
        return f"d = {spec.head_dim} and dv = {spec.value_dim} are not the same one of {dims}"
    if spec.mask == MaskKind.DENSE:
        return "the mask varies over queries"
    if spec.mask_per_head and spec.group > 1:
        return "query heads that share a kv head have key masks of their own"
    if spec.dropout_p > 0:
        return "dropout is on"
    # What was compiled of these had accesses to spilled registers in its main loops.
    if spec.softcap:
        return "its backward has no registers for a softcap"
    if spec.head_dim == LARGEST_HEAD_DIM and _masks_a_window(spec):
        return f"at d = {LARGEST_HEAD_DIM} its backward has no registers for a key mask in a window"
    if spec.keys == 0:
        return "there are no keys"
    return ""


def _masks_a_window(spec: AttentionSpec) -> bool:
    return spec.mask == MaskKind.KEY and spec.window[0] is not None


def _refuse_fused_hopper(spec: AttentionSpec, target: DeviceTarget) -> str:
    if reason := _refuse_fused(spec, target):
        return reason
    return "it has no registers for a key mask in a window" if _masks_a_window(spec) else ""


@cache
def _load_hopper() -> Functions:
    from flash_attend.kernels.configs import select_hopper_tiles
    from flash_attend.kernels.hopper.backward import attention_backward
    from flash_attend.kernels.hopper.forward import attention_forward
    from flash_attend.kernels.part import backward_of_part

    of_part = partial(backward_of_part, attention_backward)
    return Functions(attention_forward, attention_backward, select_hopper_tiles, of_part)


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's own fused attention
# ---------------------------------------------------------------------------------------------------------------------


def _no_tiles(spec: AttentionSpec, target: DeviceTarget, backward: BackwardName) -> None:
    """Those of what runs no kernel of ours."""


def _refuse_sdpa(spec: AttentionSpec, target: DeviceTarget) -> str:
    if target.device_type != "cpu":
        return f"{target.device_type} tensors; it serves a CPU"
    if reason := _refuse_scores(spec, ("window", "bias", "alibi")):
        return reason
    if spec.dropout_p > 0:
        return "dropout is on"
    return ""


def _leave_sdpa(spec: AttentionSpec, needed: tuple[bool, ...]) -> str:
    uneven = spec.head_dim != spec.value_dim and True in needed
    return f"d = {spec.head_dim} and dv = {spec.value_dim} differ, and its backward is no faster then" if uneven else ""


def _load_sdpa() -> Functions:
    from flash_attend import sdpa

    functions = sdpa.attention_forward, sdpa.attention_backward, _no_tiles, sdpa.backward_of_part, sdpa.plan_forward
    return Functions(*functions, plan_out=sdpa.plan_out, plan_backward=sdpa.plan_backward)


def _refuse_efficient(spec: AttentionSpec, target: DeviceTarget) -> str:
    if target.device_type != "cuda":
        return f"{target.device_type} tensors; it serves NVIDIA's and AMD's GPUs"
    if target.absent:
        return "this machine has no such CUDA device"
    if reason := _refuse_scores(spec):
        return reason
    if spec.sequences is not None:
        return "sequences are packed one after another"
    if spec.dropout_p > 0:
        return "dropout is on"
    rocm, name = target.capability is None, str(spec.dtype).removeprefix("torch.")
    if spec.dtype == torch.float64:
        return f"{name} tensors"
    if spec.dtype == torch.bfloat16 and not (rocm or has_kernels(target)):
        return f"{name} needs compute capability {'.'.join(map(str, OLDEST_CAPABILITY))}"
    if spec.deterministic and rocm:
        return "deterministic gradients are asked for, which ROCm's build does not promise"
    across = 16 // spec.dtype.itemsize
    for letter, size in (("d", spec.head_dim), ("dv", spec.value_dim)):
        if size % across:
            return f"{letter} = {size} is no multiple of {across}, which it reads of {name} at a time"
    if spec.keys == 0:
        return "there are no keys"
    for what, size in (("entries", spec.batch), ("heads", spec.heads)):
        if size > LARGEST_GRID:
            return f"{size} {what} are beyond its {LARGEST_GRID}"
    return ""


def _load_efficient() -> Functions:
    from flash_attend import efficient

    return Functions(efficient.attention_forward, efficient.attention_backward, _no_tiles, efficient.backward_of_part)


# ---------------------------------------------------------------------------------------------------------------------
# The einsum path
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_nothing(spec: AttentionSpec, target: DeviceTarget) -> str:
    return ""


def _load_math() -> Functions:
    return Functions(_einsum_forward, _einsum_backward, _no_tiles, _einsum_backward_of_part, tangents=_einsum_tangents)


def _einsum_forward(operands: Operands, spec: AttentionSpec, tiles: None) -> tuple[Tensor, Tensor | None, tuple[()]]:
    return *attention_reference(operands, spec, return_lse=True), ()


def _einsum_tangents(operands: Operands, tangents: Tangents, spec: AttentionSpec, tiles: None) -> tuple[Any, ...]:
    return *attend_tangents(operands, tangents, spec), ()


def _einsum_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    kept: Sequence[Tensor],
    spec: AttentionSpec,
    tiles: None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    found = attention_reference_gradients(grad_out, grad_lse, operands, spec)
    return tuple(grad if need else None for grad, need in zip(found, needed, strict=False))


def _einsum_backward_of_part(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    tiles: None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    found = attention_reference_gradients(grad_out, grad_lse, operands, spec, Merged(out, lse))
    return tuple(grad if need else None for grad, need in zip(found, needed, strict=False))


# In the order in which "auto" asks them: from what should be fastest to what serves everything.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("hopper", _refuse_hopper, _refuse_fused_hopper, _load_hopper, tangents_by="triton", proof="faster"),
        Backend("triton", _refuse_triton, _refuse_fused, _load_triton, refuse_tangents=_refuse_tangents),
        Backend(
            *("sdpa", _refuse_sdpa, None, _load_sdpa),
            usual_backward="torch",
            tangents_by="math",
            leave=_leave_sdpa,
            proof="none",
        ),
        Backend("efficient", _refuse_efficient, None, _load_efficient, usual_backward="torch", tangents_by="math"),
        Backend("math", _refuse_nothing, None, _load_math, usual_backward="einsum", proof="none"),
    )
}
