"""`patch`: finds every `Attend` that a model holds, and has it computed by us, where it is.

What is known about other people's classes is the table in `lucidrains.py`. A class named `Attend` that has no row is
taken only if it has the form of the known ones. Either is compared with ours before it is served; one that computes
something else is left alone, with the reason in the report.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from flash_attend.attend import Attend
from flash_attend.integrations.complex_valued import give_back, serve_whole
from flash_attend.integrations.judging import Judge, flash_name
from flash_attend.integrations.known import KNOWN, path_of
from flash_attend.integrations.search import attention_like, find
from flash_attend.integrations.served import Service, dropout_in_force, served_class, serving_of

__all__ = ["Outcome", "PatchError", "PatchHandle", "patch"]


class PatchError(ValueError):
    """`patch(..., strict=True)` found no `Attend`, or one that it refuses. The model is as it was."""


@dataclass(frozen=True)
class Outcome:
    """What became of one Attend. Its options are those that it has when they are asked for."""

    attend: nn.Module
    paths: tuple[str, ...]  # every place that holds it; a container held in many places counts once
    kind: str  # the class that it had before
    status: str  # "replaced", "refused" or "ours already"
    reason: str  # why it was refused, or a note

    @property
    def causal(self) -> Any:
        """Its option `causal`."""
        return _read(lambda: getattr(self.attend, "causal", None))

    @property
    def dropout(self) -> Any:
        """The probability of dropping a weight while it is training."""
        return _read(lambda: dropout_in_force(self.attend, flash_name(self.attend, KNOWN.get(self.kind)))[0])

    @property
    def scale(self) -> Any:
        """Its option `scale`."""
        return _read(lambda: getattr(self.attend, "scale", None))


def _read(option: Callable[[], Any]) -> Any:
    try:
        return option()
    except Exception as error:  # whatever a property raises
        return f"({type(error).__name__})"


class PatchHandle:
    """What `patch` did; print it. `restore()` undoes it, and so does leaving a `with` block."""

    def __init__(self, outcomes: tuple[Outcome, ...], service: Service, whole: Sequence[nn.Module]) -> None:
        self.outcomes = outcomes
        self._service = service
        self._whole = whole

    @property
    def replaced(self) -> int:
        """How many Attends are computed by us since, each counted once however many places hold it."""
        return sum(outcome.status == "replaced" for outcome in self.outcomes)

    @property
    def refused(self) -> int:
        """How many were left as they are."""
        return sum(outcome.status == "refused" for outcome in self.outcomes)

    def restore(self) -> None:
        """Gives every Attend the class back that it had, or what other calls of `patch` have asked for.

        One whose class was changed by somebody else since is left alone. A second call does nothing.
        """
        for outcome in self.outcomes:
            serving = serving_of(outcome.attend)
            if serving is not None and self._service in serving.services:
                left = tuple(service for service in serving.services if service is not self._service)
                outcome.attend.__class__ = served_class(serving._replace(services=left))
        give_back(self._whole)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __str__(self) -> str:
        head = ("path", "class", "causal", "dropout", "scale", "status", "reason or note")
        rows: list[tuple[str, ...]] = [head]
        for outcome in self.outcomes:
            options = (outcome.causal, outcome.dropout, outcome.scale)
            shown = (textwrap.shorten(str(option), 24) for option in options)
            rows.append((_counted(outcome.paths), outcome.kind, *shown, outcome.status, outcome.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.replaced} replaced, {self.refused} refused"])

    __repr__ = __str__


def _counted(paths: Sequence[str]) -> str:
    return paths[0] + (f" (+{len(paths) - 1} more)" if len(paths) > 1 else "")


def _grouped(outcomes: Iterable[Outcome]) -> list[str]:
    """One line for all that share class and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.kind, outcome.reason), []).append(outcome.paths[0])
    return [f"{_counted(paths)} ({kind}): {reason}" for (kind, reason), paths in groups.items()]


def _seen_instead(model: nn.Module) -> str:
    """What may be attention in a model without an Attend."""
    paths: dict[str, list[str]] = {}
    for path, module in attention_like(model):
        paths.setdefault(path_of(type(module)), []).append(path or "(the model itself)")
    seen = [f"{_counted(places)} ({kind})" for kind, places in paths.items()]
    return f", only {', '.join(seen)}, which patch_sdpa or huggingface.register() may serve" if seen else ""


def patch(
    model: nn.Module,
    *,
    backend: str = "auto",
    keep_flash: bool = False,
    deterministic: bool | None = None,
    strict: bool = False,
    context_parallel: Any = None,
) -> PatchHandle:
    """Has every lucidrains-style `Attend` in `model` computed by `flash_attention`, where it is.

    Submodules are found, and what is held outside the module tree too: plain attributes, lists, tuples, dicts,
    `functools.partial`, closures, defaults, bound methods, records and callable objects. Each stays the object that it
    is, with its hooks and all that it holds; only its class changes, to one derived from its own. Its options (causal,
    dropout, scale, train or eval) are read at every call. One that other models share is served there too.

    Each kind of them is compared with ours first, at up to a thousand keys, in forward, gradients and dropout; what
    computes something else is left alone.

    Two things change, by contract: a query that sees no key gives 0 (in the originals the mean of all values), and keys
    that the mask hides from every query may hold NaN.

    Args:
        model: any module that is an Attend or holds some; its state dict stays as it is.
        backend: "auto" or a backend by name, as in `flash_attention`, for all of them.
        keep_flash: heed each one's flash flag, so that flash=False stays on the einsum path. By default the fastest
            backend serves whatever the flag is.
        deterministic: as in `Attend`.
        strict: raise `PatchError`, with the model as it was, if any is refused or none is found.
        context_parallel: as in `Attend`, for a model of whose activations each rank holds shards.

    Returns:
        A handle: `print(handle)` shows what was found and what became of it; `handle.restore()` undoes it. Where a
        model is patched again, with other options, the last call counts that was not undone.

    Raises:
        TypeError: `model` is no module. ValueError: an unknown backend.

    Warns:
        If nothing was found, or an Attend was refused, or one applies a scale that its flash path did not: once for
        those of one class and reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, flag in (("keep_flash", keep_flash), ("strict", strict)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    # Raises for what is wrong whatever the model holds.
    shared = Attend(backend=backend, deterministic=deterministic, context_parallel=context_parallel).context_parallel

    service = Service(backend, keep_flash, deterministic, shared)
    judge = Judge(service)
    judged = []
    for found in find(model):
        judgement = judge.judge(found)
        kind = path_of(judge.original(found.attend))
        outcome = Outcome(found.attend, tuple(found.paths), kind, judgement.status, judgement.reason)
        judged.append((outcome, judgement))

    outcomes = tuple(outcome for outcome, _ in judged)
    refusals = _grouped(outcome for outcome in outcomes if outcome.status == "refused")
    searched = f"{type(model).__name__}{_seen_instead(model)}" if not outcomes else ""
    if strict and searched:
        raise PatchError(f"no Attend found in {searched}")
    if strict and refusals:
        raise PatchError("; ".join(refusals))

    for outcome, judgement in judged:
        if judgement.serving is not None:
            outcome.attend.__class__ = served_class(judgement.serving)
    whole = serve_whole(model)

    if searched:
        warnings.warn(f"patch found no Attend in {searched}: nothing was changed", stacklevel=2)
    for refusal in refusals:
        warnings.warn(f"patch left as it is: {refusal}", stacklevel=2)
    for doubt in _grouped(outcome for outcome, judgement in judged if judgement.doubtful):
        warnings.warn(f"patch served with a change: {doubt}", stacklevel=2)
    return PatchHandle(outcomes, service, whole)
