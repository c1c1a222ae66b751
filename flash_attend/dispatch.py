"""Which backend serves a call, and why: pure functions of a spec and a target, and the only place that decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.validation import FASTER, VALIDATED, Measurement, Validation

__all__ = ["BACKENDS", "BackendUnavailable", "Plan", "Verdict", "check_backend", "choose", "judge"]

LARGEST_HEAD_DIM = 256
LARGEST_ACCURATE_HEAD_DIM = 128  # float64 and 3xTF32 operands fill twice the registers: no tile beyond this has enough
# The fused backward holds more: with dropout, no tile of wide operands has enough beyond these, by `spec.precision`.
LARGEST_FUSED_DROPOUT = {"tf32": 128, "tf32x3": 64, "ieee": 64}
OLDEST_CAPABILITY = (8, 0)
HOPPER_ARCH = "sm_90"
HOPPER_DTYPES = (torch.float16, torch.bfloat16)
HOPPER_HEAD_DIMS = (64, 128, 256)
TRITON_VERSIONS = ((3, 6), (3, 9))  # oldest and newest that the kernels are compiled with in the tests


class BackendUnavailable(ValueError):
    """A backend was asked for by name and cannot serve the call."""


@dataclass(frozen=True)
class Verdict:
    """What one backend has to say to a call."""

    backend: str
    serves: bool  # can serve it when asked for by name
    by_default: bool  # "auto" may choose it
    reason: str


@dataclass(frozen=True)
class Plan:
    """The backend that serves a call, and why it and no faster one."""

    backend: str
    reason: str


Validations = Mapping[tuple[str, str], Validation]
Measurements = Mapping[tuple[str, str], Measurement]

# ---------------------------------------------------------------------------------------------------------------------
# What a backend can serve
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_triton(spec: AttentionSpec, target: DeviceTarget) -> str:
    """Why the kernels cannot serve a call; empty where they can."""
    if target.triton is None:
        return "Triton is not installed"
    oldest = TRITON_VERSIONS[0]
    version = _release(target.triton)
    if version is not None and version < oldest:
        return f"Triton {target.triton} is older than {oldest[0]}.{oldest[1]}"
    for letter, size in (("d", spec.head_dim), ("dv", spec.value_dim)):
        if size > LARGEST_HEAD_DIM:
            return f"{letter} = {size} is beyond the kernels' {LARGEST_HEAD_DIM}"
    if target.interpreted:
        if target.device_type not in ("cpu", "cuda"):
            return f"the interpreter serves CPU and CUDA tensors, not {target.device_type}"
        return ""
    if target.device_type != "cuda":
        return f"{target.device_type} tensors; the kernels need a CUDA device"
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


def _refuse_hopper(spec: AttentionSpec, target: DeviceTarget) -> str:
    if reason := _refuse_triton(spec, target):  # whose kernels do what Gluon's do not
        return reason
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
    if spec.keys == 0:
        return "there are no keys"
    return ""


def _refuse_fused(spec: AttentionSpec, target: DeviceTarget) -> str:
    """Why a family that serves a call cannot do its backward in one pass."""
    if spec.deterministic:
        return "deterministic gradients are asked for, and it adds up those of q in any order"
    if spec.dropout_p > 0 and spec.dtype in (torch.float32, torch.float64) and not target.interpreted:
        widest, limit = max(spec.head_dim, spec.value_dim), LARGEST_FUSED_DROPOUT[spec.precision]
        if widest > limit:
            wide = f"{spec.dtype}, {spec.precision} products".removeprefix("torch.")
            return f"d or dv = {widest} is beyond the fused backward's {limit} with dropout ({wide})"
    return ""


def _refuse_triton_fused(spec: AttentionSpec, target: DeviceTarget) -> str:
    return _refuse_triton(spec, target) or _refuse_fused(spec, target)


def _refuse_hopper_fused(spec: AttentionSpec, target: DeviceTarget) -> str:
    return _refuse_hopper(spec, target) or _refuse_fused(spec, target)


def _refuse_math(spec: AttentionSpec, target: DeviceTarget) -> str:
    return ""


def _release(version: str) -> tuple[int, int] | None:
    try:
        major, minor = version.split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return None


# A fused backend has the forward of its family, and a backward in one pass in place of a kernel for the gradients of
# k and v and another for that of q.
_REFUSALS: dict[str, Callable[[AttentionSpec, DeviceTarget], str]] = {
    "hopper_fused": _refuse_hopper_fused,
    "hopper": _refuse_hopper,
    "triton_fused": _refuse_triton_fused,
    "triton": _refuse_triton,
    "math": _refuse_math,
}
BACKENDS = tuple(_REFUSALS)  # from what should be fastest to what serves everything
UNMEASURED = ("triton", "math")  # need not be shown faster than what comes after them


# ---------------------------------------------------------------------------------------------------------------------
# What "auto" may choose
# ---------------------------------------------------------------------------------------------------------------------


def _stand(
    backend: str, spec: AttentionSpec, target: DeviceTarget, validated: Validations, faster: Measurements
) -> tuple[bool, str]:
    """Whether "auto" may choose a backend for a call that it serves, and why."""
    if backend == "math":
        return True, "the einsum path serves every call"
    if target.interpreted:
        return False, "Triton's interpreter (TRITON_INTERPRET=1) is for tests; ask for it by name"
    arch, by_name = str(target.arch), "ask for it by name"
    proof, measurement = validated.get((backend, arch)), faster.get((backend, arch))
    if proof is None:
        return False, f"not validated on {arch} yet; {by_name}"
    version, newest = _release(target.triton or ""), TRITON_VERSIONS[1]
    if version is not None and version > newest:
        return False, f"Triton {target.triton} is newer than the tested {newest[0]}.{newest[1]}; {by_name}"
    where = f"on {arch} ({proof.gpu}, Triton {proof.triton}, {proof.date})"
    if backend in UNMEASURED:
        return True, f"validated {where}"
    if measurement is None or not any(calls.hold(spec) for calls in measurement.calls):
        return False, f"validated on {arch}, but not shown to be faster there in such calls; {by_name}"
    return True, f"validated {where}, and faster there ({measurement.date})"


def check_backend(backend: str) -> None:
    """Raises `ValueError` unless a backend has this name, or it is "auto"."""
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {backend!r}")


def judge(
    spec: AttentionSpec,
    target: DeviceTarget,
    validated: Validations = VALIDATED,
    faster: Measurements = FASTER,
) -> tuple[Verdict, ...]:
    """Every backend's verdict, in the order in which "auto" asks them."""
    return tuple(_judge_one(backend, spec, target, validated, faster) for backend in BACKENDS)


def _judge_one(
    backend: str, spec: AttentionSpec, target: DeviceTarget, validated: Validations, faster: Measurements
) -> Verdict:
    if reason := _REFUSALS[backend](spec, target):
        return Verdict(backend, False, False, reason)
    return Verdict(backend, True, *_stand(backend, spec, target, validated, faster))


def choose(
    spec: AttentionSpec,
    target: DeviceTarget,
    backend: str = "auto",
    validated: Validations = VALIDATED,
    faster: Measurements = FASTER,
) -> Plan:
    """The plan for a call.

    `backend="auto"` takes the first of `BACKENDS` that serves the call and was shown right on the part, and faster
    there than those after it. A backend asked for by name serves or raises `BackendUnavailable` with the reason: it is
    never replaced by another.
    """
    check_backend(backend)
    if backend != "auto":
        if reason := _REFUSALS[backend](spec, target):
            raise BackendUnavailable(f"backend {backend!r} cannot serve this call: {reason}")
        return Plan(backend, "asked for by name")
    passed_over: dict[str, list[str]] = {}  # by reason, which backends often share
    for name in BACKENDS:
        verdict = _judge_one(name, spec, target, validated, faster)
        if verdict.by_default:
            others = [f"{', '.join(names)}: {reason}" for reason, names in passed_over.items()]
            return Plan(name, "; ".join([*others, verdict.reason]))
        passed_over.setdefault(verdict.reason, []).append(name)
    raise AssertionError("the math backend serves every call")
