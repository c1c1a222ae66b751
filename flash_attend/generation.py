"""Whether what was worked out for earlier calls still holds: the one place that says when it no longer does.

What a call says of itself stands in the key that its plan is looked up by (`plans.py`). Whatever else decides, and may
change while a process runs (what is overridden, what was found out about a part), begins a new generation.
"""

from __future__ import annotations

__all__ = ["generation", "renew"]

_generation = object()


def generation() -> object:
    """What is to stand in the key of whatever is kept of a call; taken before it is worked out."""
    return _generation


def renew() -> None:
    """From here on nothing counts that was worked out before, or is being worked out in another thread."""
    global _generation
    _generation = object()
