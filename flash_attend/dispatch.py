"""Which backend serves a call, and why: pure functions of a spec and a target, and the only place that decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.validation import VALIDATED, Validation

__all__ = ["BACKENDS", "BackendUnavailable", "Plan", "Verdict", "check_backend", "choose", "judge"]

LARGEST_HEAD_DIM = 256
LARGEST_ACCURATE_HEAD_DIM = 128  # float64 and 3xTF32 operands fill twice the registers: no tile beyond this has enough
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


def _judge_triton(
    spec: AttentionSpec, target: DeviceTarget, validated: Mapping[tuple[str, str], Validation]
) -> tuple[bool, bool, str]:
    if target.triton is None:
        return False, False, "Triton is not installed"
    oldest = TRITON_VERSIONS[0]
    version = _release(target.triton)
    if version is not None and version < oldest:
        return False, False, f"Triton {target.triton} is older than {oldest[0]}.{oldest[1]}"
    for letter, size in (("d", spec.head_dim), ("dv", spec.value_dim)):
        if size > LARGEST_HEAD_DIM:
            return False, False, f"{letter} = {size} is beyond the kernels' {LARGEST_HEAD_DIM}"
    if target.interpreted:
        if target.device_type not in ("cpu", "cuda"):
            return False, False, f"the interpreter serves CPU and CUDA tensors, not {target.device_type}"
        return True, False, "Triton's interpreter (TRITON_INTERPRET=1) is for tests; ask for it by name"
    if target.device_type != "cuda":
        return False, False, f"{target.device_type} tensors; the kernels need a CUDA device"
    arch, capability = target.arch, target.capability
    if arch is None or capability is None:
        return False, False, "the device has no CUDA compute capability (ROCm is not supported)"
    if capability < OLDEST_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (capability, OLDEST_CAPABILITY))
        return False, False, f"compute capability {have} is below {need}"
    accurate = {torch.float64: "float64", torch.float32: "float32-accurate"}.get(spec.dtype)
    if accurate and spec.precision != "tf32":
        for letter, size in (("d", spec.head_dim), ("dv", spec.value_dim)):
            if size > LARGEST_ACCURATE_HEAD_DIM:
                limit = f"{letter} = {size} is beyond the kernels' {LARGEST_ACCURATE_HEAD_DIM} in {accurate} mode"
                return False, False, limit
    return _default_where_validated("triton", arch, target.triton, validated)


def _judge_hopper(
    spec: AttentionSpec, target: DeviceTarget, validated: Mapping[tuple[str, str], Validation]
) -> tuple[bool, bool, str]:
    serves, _, reason = _judge_triton(spec, target, validated)  # whose kernels are the backward
    if not serves:
        return False, False, reason
    if target.interpreted:
        return False, False, "Triton's interpreter runs no Gluon"
    if target.arch != HOPPER_ARCH:
        return False, False, f"the kernels are for {HOPPER_ARCH}, the part is {target.arch}"
    if spec.dtype not in HOPPER_DTYPES:
        return False, False, f"{spec.dtype} is not float16 or bfloat16".replace("torch.", "")
    if spec.head_dim != spec.value_dim or spec.head_dim not in HOPPER_HEAD_DIMS:
        dims = ", ".join(map(str, HOPPER_HEAD_DIMS))
        return False, False, f"d = {spec.head_dim} and dv = {spec.value_dim} are not the same one of {dims}"
    if spec.mask == MaskKind.DENSE:
        return False, False, "the mask varies over queries"
    if spec.dropout_p > 0:
        return False, False, "dropout is on"
    if spec.keys == 0:
        return False, False, "there are no keys"
    return _default_where_validated("hopper", HOPPER_ARCH, target.triton, validated)


def _judge_fused(
    family: str, spec: AttentionSpec, target: DeviceTarget, validated: Mapping[tuple[str, str], Validation]
) -> tuple[bool, bool, str]:
    """The same kernels, but for the backward: one pass, which sums the gradient of q up in no fixed order."""
    serves, by_default, reason = _JUDGES[family](spec, target, validated)
    if not serves:
        return False, False, reason
    if spec.deterministic:
        return False, False, "deterministic gradients are asked for, and it sums those of q up in no fixed order"
    if target.interpreted or target.arch is None:
        return serves, by_default, reason
    return _default_where_validated(f"{family}_fused", target.arch, target.triton, validated)


def _default_where_validated(
    backend: str, arch: str, triton: str | None, validated: Mapping[tuple[str, str], Validation]
) -> tuple[bool, bool, str]:
    """The verdict on a call that a backend serves."""
    evidence = validated.get((backend, arch))
    if evidence is None:
        return True, False, f'not validated on {arch} yet; ask for it with backend="{backend}"'
    version, newest = _release(triton or ""), TRITON_VERSIONS[1]
    if version is not None and version > newest:
        return True, False, f"Triton {triton} is newer than the tested {newest[0]}.{newest[1]}; ask by name"
    return True, True, f"validated on {arch} ({evidence.gpu}, Triton {evidence.triton}, {evidence.date})"


def _release(version: str) -> tuple[int, int] | None:
    try:
        major, minor = version.split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return None


def _judge_math(
    spec: AttentionSpec, target: DeviceTarget, validated: Mapping[tuple[str, str], Validation]
) -> tuple[bool, bool, str]:
    return True, True, "the einsum path serves every call"


_JUDGES = {
    "hopper_fused": partial(_judge_fused, "hopper"),
    "hopper": _judge_hopper,
    "triton_fused": partial(_judge_fused, "triton"),
    "triton": _judge_triton,
    "math": _judge_math,
}
BACKENDS = tuple(_JUDGES)  # fastest first


def check_backend(backend: str) -> None:
    """Raises `ValueError` unless a backend has this name, or it is "auto"."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {backend!r}")


def judge(
    spec: AttentionSpec, target: DeviceTarget, validated: Mapping[tuple[str, str], Validation] = VALIDATED
) -> tuple[Verdict, ...]:
    """Every backend's verdict, fastest first."""
    return tuple(Verdict(backend, *judge_one(spec, target, validated)) for backend, judge_one in _JUDGES.items())


def choose(
    spec: AttentionSpec,
    target: DeviceTarget,
    backend: str = "auto",
    validated: Mapping[tuple[str, str], Validation] = VALIDATED,
) -> Plan:
    """The plan for a call.

    `backend="auto"` takes the fastest backend that serves the call and has been validated on the part. A backend asked
    for by name serves or raises `BackendUnavailable` with the reason: it is never replaced by another.
    """
    check_backend(backend)
    if backend != "auto":
        serves, _, reason = _JUDGES[backend](spec, target, validated)
        if not serves:
            raise BackendUnavailable(f"backend {backend!r} cannot serve this call: {reason}")
        return Plan(backend, "asked for by name")
    passed_over: list[str] = []
    for name, judge_one in _JUDGES.items():
        serves, by_default, reason = judge_one(spec, target, validated)
        if serves and by_default:
            return Plan(name, "; ".join([*passed_over, reason]))
        passed_over.append(f"{name}: {reason}")
    raise AssertionError("the math backend serves every call")
