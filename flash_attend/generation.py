"""Whether what was worked out for earlier calls still holds: the one place that says when it no longer does.

What a call says of itself stands in the key that its plan is looked up by (`plans.py`). Whatever else decides, and may
change while a process runs (what is overridden, what was found out about a part), begins a new generation.
"""

from __future__ import annotations

from typing import TypeVar

__all__ = ["generation", "kept", "renew"]

_D = TypeVar("_D", bound=dict)
_generation = object()
_kept: list[dict] = []


def kept(found: _D) -> _D:
    """The dict, which is empty from each new generation on: what is put into what it held before is lost with that."""
    _kept.append(found)
    return found


def generation() -> object:
    """What is to stand in the key of whatever is kept of a call; taken before it is worked out."""
    return _generation


def renew() -> None:
    """From here on nothing counts that was worked out before, or is being worked out in another thread."""
    global _generation
    _generation = object()
    for found in _kept:
        found.clear()
