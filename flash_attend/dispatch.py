"""Which backend serves a call, by which backward, and why: the only place that decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flash_attend.backends import BACKENDS, TRITON_VERSIONS, Backend, BackwardName, has_kernels
from flash_attend.evidence import Finding, Tuned, known, tuned, way_of
from flash_attend.generation import renew
from flash_attend.spec import CALLS_KEPT, AttentionSpec
from flash_attend.target import DeviceTarget, release
from flash_attend.tracing import constant_when_compiled
from flash_attend.variant import ALL, kind_of_call, variant_of

if TYPE_CHECKING:
    from flash_attend.kernels.configs import Tiles

__all__ = [
    "LOOKING",
    "BackendUnavailable",
    "Knowledge",
    "Plan",
    "Verdict",
    "check_backend",
    "choose",
    "judge",
    "left_in_forward_mode",
    "override_backward",
    "split_tiles",
]

BY_NAME = "ask for it by name"
REPORT = "please report it, with what `python -m flash_attend` prints"


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
    warning: str = ""  # what a user should be told once

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.backend.name


def check_backend(backend: str) -> None:
    """Raises `ValueError` unless a backend has this name, or it is "auto"."""
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {backend!r}")


class Knowledge(NamedTuple):
    """How "auto" learns of a part what it goes by."""

    finding: Callable[[tuple, Any], Finding | None]  # whether a variant is right there, by `variant_of` and the device
    tuned: Callable[[tuple, Any], Tuned | None]  # what is fastest there, by `kind_of_call` and the device


@constant_when_compiled
def _found_out(variant: tuple, device: torch.device) -> Finding:
    if found := known(variant, device):
        return found
    from flash_attend.check import checked  # of which what was found before needs nothing

    return checked(variant, device)


FINDING_OUT = Knowledge(_found_out, tuned)


def split_tiles(spec: AttentionSpec, backend: Backend, backward: BackwardName, device: torch.device) -> Tiles | None:
    """The tiles with which the keys of a call are split over programs, for what was compiled for calls of any length;
    None where that gains nothing, or is not right on the part. The first call of a variant has it checked, unless a
    CUDA graph is being captured."""
    candidate = _splitting(spec, backend, backward, DeviceTarget.of(device))
    if candidate is None:
        return None
    tiles, variant = candidate
    found = known(variant, device)
    if found is None and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        found = _found_out(variant, device)
    return tiles if found is not None and found.right else None


@lru_cache(maxsize=CALLS_KEPT)
def _splitting(
    spec: AttentionSpec, backend: Backend, backward: BackwardName, target: DeviceTarget
) -> tuple[Tiles, tuple] | None:
    """The tiles that split the keys of a call, if any do that leave its schedule as it is; and their variant."""
    tiles = backend.tiles(spec, target, backward)
    usual = backend.tiles(spec, replace(target, multiprocessors=0), backward)
    if not (tiles and usual and tiles.forward.programs):
        return None
    split = usual._replace(forward=tiles.forward)
    if split.schedule_block != usual.schedule_block:
        return None
    from flash_attend.kernels.configs import as_text

    needed = (False,) * (3 if spec.bias is None and not spec.sinks else 5)
    return split, variant_of(spec, backend.name, backward, needed, as_text(split))


LOOKING = Knowledge(known, tuned)  # without finding out


def judge(
    spec: AttentionSpec, target: DeviceTarget, needed: tuple[bool, ...] = ALL, knowledge: Knowledge = LOOKING
) -> tuple[Verdict, ...]:
    """Every backend's verdict, in the order in which "auto" asks them. Imports those that could serve."""
    return tuple(_judge_one(backend, _Question.of(spec, target, needed, knowledge)) for backend in BACKENDS.values())


def choose(
    spec: AttentionSpec,
    target: DeviceTarget,
    backend: str = "auto",
    needed: tuple[bool, ...] = ALL,
    knowledge: Knowledge = FINDING_OUT,
    *,
    tangents: tuple[bool, ...] = (),
) -> Plan:
    """The plan for a call, of whose q, k and v those need a gradient that `needed` says; in forward mode, `tangents`
    says which have one.

    `backend="auto"` takes what was measured fastest on the part or, where nothing was, the first of `BACKENDS`, that
    serves the call and is right on the part; the first call of a variant has it checked. A backend asked for by name
    serves or raises `BackendUnavailable` with the reason: it is never replaced by another, but for tangents by the one
    that it leaves them to.
    """
    check_backend(backend)
    question = _Question.of(spec, target, needed, knowledge, tangents)
    if backend != "auto":
        asked = BACKENDS[backend]
        if reason := _refuse(asked, spec, target):
            raise BackendUnavailable(f"backend {backend!r} cannot serve this call: {reason}")
        while serves := _left(asked, question)[0]:
            asked = BACKENDS[serves]
        backward, backward_reason = _choose_backward(asked, question)
        return Plan(asked, backward, "asked for by name", backward_reason)
    passed_over: dict[str, list[str]] = {}  # by reason, which backends often share
    wrong: list[str] = []
    for candidate in question.order:
        if reason := _left(candidate, question)[1]:
            passed_over.setdefault(reason, []).append(candidate.name)
            continue
        stand = _stand(candidate, question)
        wrong += stand.wrong
        if stand.by_default:
            others = [f"{', '.join(names)}: {reason}" for reason, names in passed_over.items()]
            reason = "; ".join([*others, stand.reason])
            warning = _warning(candidate, reason, wrong, question)
            return Plan(candidate, stand.backward, reason, stand.backward_reason, warning)
        passed_over.setdefault(stand.reason, []).append(candidate.name)
    raise AssertionError("the last backend serves every call")


def _warning(serves: Backend, reason: str, wrong: list[str], question: _Question) -> str:
    asks = f"; {REPORT}" if wrong else ""
    target = question.target
    on_a_gpu = target.device_type == "cuda" and not target.absent
    by = {"einsum": "its einsum path", "torch": "PyTorch's attention" * has_kernels(target)}.get(serves.usual_backward)
    if by and on_a_gpu and not question.measured(serves):
        return f"flash_attend serves a CUDA call by {by}: {reason}{asks}"
    return f"flash_attend serves a call by {serves.name}, because {'; '.join(wrong)}{asks}" if wrong else ""


def left_in_forward_mode(backend: Backend, spec: AttentionSpec, target: DeviceTarget) -> tuple[str, str]:
    """To which other backend one leaves the tangents of a call, and why; twice nothing where it pushes them itself."""
    if backend.tangents_by:
        return backend.tangents_by, "it has no forward mode"
    reason = backend.refuse_tangents(spec, target)
    return ("math", reason) if reason else ("", "")


def _left(backend: Backend, question: _Question) -> tuple[str, str]:
    """The same of a whole call. PyTorch's own backward reads nothing that a forward has kept, and so serves whoever
    pushes the tangents."""
    if not question.tangents or backend.usual_backward == "torch":
        return "", ""
    return left_in_forward_mode(backend, question.spec, question.target)


def _refuse(backend: Backend, spec: AttentionSpec, target: DeviceTarget) -> str:
    return backend.refuse(spec, target) or backend.fault()


@dataclass(frozen=True)  # of which the compiler of torch 2.10 takes properties, and not of a tuple
class _Question:
    """A call, where, and what is known there."""

    spec: AttentionSpec
    target: DeviceTarget
    needed: tuple[bool, ...]
    knowledge: Knowledge
    fastest: Tuned | None
    tangents: tuple[bool, ...]

    @staticmethod
    def of(
        spec: AttentionSpec,
        target: DeviceTarget,
        needed: tuple[bool, ...],
        how: Knowledge,
        tangents: tuple[bool, ...] = (),
    ) -> _Question:
        measurable = target.device_type == "cuda" and not target.absent and target.device is not None
        fastest = how.tuned(kind_of_call(spec), target.device) if measurable else None
        return _Question(spec, target, needed, how, fastest, tangents)

    @property
    def order(self) -> list[Backend]:
        """The backends as "auto" asks them: first what was fastest."""
        others = list(BACKENDS.values())
        if self.fastest is None or self.fastest.backend not in BACKENDS:
            return others
        first = BACKENDS[self.fastest.backend]
        return [first, *[backend for backend in others if backend is not first]]

    def measured(self, backend: Backend) -> bool:
        """Whether a backend was fastest."""
        return self.fastest is not None and self.fastest.backend == backend.name

    def find(self, backend: Backend, backward: BackwardName) -> Finding | None:
        """What is known of the variant that would serve."""
        fastest, tiles = way_of(self.fastest, backend.name)
        tiles = backend.tiles_by_lengths(self.spec, self.target, backward) or (tiles if backward == fastest else "")
        tiles = "" if self.tangents else tiles  # those of forward mode are the same for all lengths
        variant = variant_of(self.spec, backend.name, backward, self.needed, tiles, self.tangents)
        return self.knowledge.finding(variant, self.target.device)


class _Stand(NamedTuple):
    by_default: bool  # "auto" may choose it
    reason: str
    backward: BackwardName
    backward_reason: str
    wrong: tuple[str, ...] = ()  # what was wrong of it on the part


def _judge_one(backend: Backend, question: _Question) -> Verdict:
    if reason := _refuse(backend, question.spec, question.target):
        return Verdict(backend.name, False, False, reason)
    return Verdict(backend.name, True, *_stand(backend, question)[:2])


def _stand(backend: Backend, question: _Question) -> _Stand:
    """Whether "auto" may choose a backend for a call, by which backward, and why."""
    usual = backend.usual_backward
    if reason := _pass_over(backend, question):
        return _Stand(False, reason, usual, "")
    backward, backward_reason = _choose_backward(backend, question)
    fastest = question.fastest
    faster = f", {fastest.reason}" if fastest is not None and question.measured(backend) else ""
    if backend.proof == "none":
        return _Stand(True, f"it needs no evidence{faster}", backward, backward_reason)
    wrong: tuple[str, ...] = ()
    found = question.find(backend, backward)
    if found is not None and not found.right and backward != usual:
        backward, backward_reason = usual, f"the {backward} one is not right: {found.reason}"
        wrong = (f"{backend.name}: {backward_reason}",)
        found = question.find(backend, usual)
    if found is None:
        return _Stand(True, f"not checked here yet: the first call does{faster}", backward, backward_reason, wrong)
    if not found.right:
        wrong = (*wrong, f"{backend.name}: {found.reason}")
    return _Stand(found.right, f"{found.reason}{faster}", backward, backward_reason, wrong)


def _pass_over(backend: Backend, question: _Question) -> str:
    """Why "auto" does not so much as check a backend; empty where it does. Imports what runs it only there."""
    target = question.target
    if reason := backend.refuse(question.spec, target):
        return reason
    if reason := backend.leave(question.spec, question.needed):
        return f"{reason}; {BY_NAME}"
    if backend.proof == "none":
        return ""
    if backend.usual_backward == "torch":
        return backend.fault()
    if target.interpreted:
        return f"Triton's interpreter (TRITON_INTERPRET=1) is for tests; {BY_NAME}"
    version, newest = release(target.triton or ""), TRITON_VERSIONS[1]
    if version is not None and version > newest:
        return f"Triton {target.triton} is newer than the tested {newest[0]}.{newest[1]}; {BY_NAME}"
    if backend.proof == "faster" and not question.measured(backend):
        return f"not measured faster here (`python -m flash_attend tune` does); {BY_NAME}"
    return backend.fault()


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


def _choose_backward(backend: Backend, question: _Question) -> tuple[BackwardName, str]:
    usual, fastest = backend.usual_backward, question.fastest
    if backend.refuse_fused is None:
        of_bias = usual == "torch" and question.needed[3:4] == (True,)
        return usual, "it has none for a bias: all gradients by the einsum path" if of_bias else "it has no other"
    if refusal := backend.refuse_fused(question.spec, question.target):
        return usual, f"fused is refused: {refusal}"
    if _override is not None:
        return ("fused" if _override == "fused" else usual), "asked for by override_backward"
    if fastest is not None and way_of(fastest, backend.name)[0] == "fused":
        return "fused", fastest.reason
    where = "in Triton's interpreter" if question.target.interpreted else "here"
    return usual, f"the fused one was not measured faster {where}"
