"""Which backend serves a call, by which backward, and why: the only place that decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from flash_attend.backends import BACKENDS, TRITON_VERSIONS, Backend, BackwardName
from flash_attend.generation import renew
from flash_attend.spec import AttentionSpec
from flash_attend.target import DeviceTarget, release
from flash_attend.validation import EVIDENCE, Evidence, EvidenceTable

__all__ = ["BackendUnavailable", "Plan", "Verdict", "check_backend", "choose", "judge", "override_backward"]

BY_NAME = "ask for it by name"


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
    """The backend that serves a call and the backward that goes with it, and why they and no faster ones."""

    backend: Backend
    backward: BackwardName
    reason: str
    backward_reason: str
    fallback: str = ""  # why the einsum path serves where "auto" was asked for on a CUDA device; else empty

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.backend.name


def check_backend(backend: str) -> None:
    """Raises `ValueError` unless a backend has this name, or it is "auto"."""
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {backend!r}")


def judge(spec: AttentionSpec, target: DeviceTarget, evidence: EvidenceTable = EVIDENCE) -> tuple[Verdict, ...]:
    """Every backend's verdict, in the order in which "auto" asks them. Imports those that could serve."""
    return tuple(_judge_one(backend, spec, target, evidence) for backend in BACKENDS.values())


def choose(
    spec: AttentionSpec, target: DeviceTarget, backend: str = "auto", evidence: EvidenceTable = EVIDENCE
) -> Plan:
    """The plan for a call.

    `backend="auto"` takes the first of `BACKENDS` that serves the call and has on the part what its `proof` asks for.
    A backend asked for by name serves or raises `BackendUnavailable` with the reason: it is never replaced by another.
    """
    check_backend(backend)
    if backend != "auto":
        asked = BACKENDS[backend]
        if reason := _refuse(asked, spec, target):
            raise BackendUnavailable(f"backend {backend!r} cannot serve this call: {reason}")
        return _plan(asked, spec, target, evidence, "asked for by name")
    passed_over: dict[str, list[str]] = {}  # by reason, which backends often share
    for candidate in BACKENDS.values():
        by_default, reason = _stand(candidate, spec, target, evidence)
        if by_default:
            others = [f"{', '.join(names)}: {reason}" for reason, names in passed_over.items()]
            plan = _plan(candidate, spec, target, evidence, "; ".join([*others, reason]))
            left = plan.backward == "einsum" and target.device_type == "cuda" and not target.absent
            return replace(plan, fallback=plan.reason) if left else plan
        passed_over.setdefault(reason, []).append(candidate.name)
    raise AssertionError("the last backend serves every call")


def _refuse(backend: Backend, spec: AttentionSpec, target: DeviceTarget) -> str:
    return backend.refuse(spec, target) or backend.fault()


def _judge_one(backend: Backend, spec: AttentionSpec, target: DeviceTarget, evidence: EvidenceTable) -> Verdict:
    if reason := _refuse(backend, spec, target):
        return Verdict(backend.name, False, False, reason)
    return Verdict(backend.name, True, *_stand(backend, spec, target, evidence))


def _stand(backend: Backend, spec: AttentionSpec, target: DeviceTarget, evidence: EvidenceTable) -> tuple[bool, str]:
    """Whether "auto" may choose a backend for a call, and why. Imports what runs it only where it may."""
    if reason := backend.refuse(spec, target):
        return False, reason
    trusted, reason = _trust(backend, target, evidence)
    fault = backend.fault() if trusted else ""
    return (False, fault) if fault else (trusted, reason)


def _trust(backend: Backend, target: DeviceTarget, evidence: EvidenceTable) -> tuple[bool, str]:
    """Whether a part has shown of a backend what "auto" goes by, and what."""
    if backend.proof == "none":
        return True, "it needs no evidence"
    if target.interpreted:
        return False, f"Triton's interpreter (TRITON_INTERPRET=1) is for tests; {BY_NAME}"
    found = _find(evidence, backend, backend.usual_backward, target)
    if found is None:
        return False, f"not validated on {target.arch} yet; {BY_NAME}"
    version, newest = release(target.triton or ""), TRITON_VERSIONS[1]
    if version is not None and version > newest:
        return False, f"Triton {target.triton} is newer than the tested {newest[0]}.{newest[1]}; {BY_NAME}"
    if backend.proof == "faster" and not found.faster:
        return False, f"validated on {target.arch}, but not shown to be faster there; {BY_NAME}"
    faster = ", and faster there" if found.faster else ""
    return True, f"validated on {target.arch} ({found.gpu}, Triton {found.triton}, {found.date}){faster}"


def _find(evidence: EvidenceTable, backend: Backend, backward: BackwardName, target: DeviceTarget) -> Evidence | None:
    arch = target.arch
    return None if arch is None else evidence.get((backend.name, backward, arch))


# ---------------------------------------------------------------------------------------------------------------------
# The backward
# ---------------------------------------------------------------------------------------------------------------------

_override: BackwardName | None = None


@contextmanager
def override_backward(backward: BackwardName) -> Iterator[None]:
    """Within this context gradients come by this backward wherever it can serve: for tests and tuning."""
    global _override
    outer, _override = _override, backward
    renew()
    try:
        yield
    finally:
        _override = outer
        renew()


def _plan(backend: Backend, spec: AttentionSpec, target: DeviceTarget, evidence: EvidenceTable, reason: str) -> Plan:
    backward, backward_reason = _choose_backward(backend, spec, target, evidence)
    return Plan(backend, backward, reason, backward_reason)


def _choose_backward(
    backend: Backend, spec: AttentionSpec, target: DeviceTarget, evidence: EvidenceTable
) -> tuple[BackwardName, str]:
    usual = backend.usual_backward
    if backend.refuse_fused is None:
        return usual, "it has no other"
    if refusal := backend.refuse_fused(spec, target):
        return usual, f"fused is refused: {refusal}"
    if _override is not None:
        return ("fused" if _override == "fused" else usual), "asked for by override_backward"
    found = _find(evidence, backend, "fused", target)
    if found is None or not found.faster:
        where = "in Triton's interpreter" if target.interpreted else f"on {target.arch}"
        return usual, f"the fused one was not measured faster {where}"
    return "fused", f"measured faster on {target.arch} ({found.gpu}, {found.date})"
