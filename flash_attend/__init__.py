"""Exact attention from hand-written Triton kernels, behind an `Attend` that replaces the one a model has."""

from typing import TYPE_CHECKING, Any

from flash_attend.attend import Attend
from flash_attend.dispatch import BackendUnavailable
from flash_attend.explanation import explain
from flash_attend.functional import flash_attention

if TYPE_CHECKING:
    from flash_attend.integrations import patch

__version__ = "0.1.0"
__all__ = ["Attend", "BackendUnavailable", "explain", "flash_attention", "patch"]


def __getattr__(name: str) -> Any:
    """`patch`, imported by the first who asks for it: everybody else's import stays short."""
    if name != "patch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flash_attend.integrations import patch

    globals()[name] = patch
    return patch


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
