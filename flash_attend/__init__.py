"""Exact attention from hand-written Triton kernels, behind an `Attend` that replaces the one a model has."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flash_attend.attend import Attend
from flash_attend.complex_valued import complex_attention
from flash_attend.dispatch import BackendUnavailable
from flash_attend.documents import cu_seqlens_of_documents
from flash_attend.explanation import explain
from flash_attend.functional import flash_attention
from flash_attend.packed import flash_attention_packed
from flash_attend.scaled_dot_product import scaled_dot_product_attention

if TYPE_CHECKING:
    from flash_attend.context_parallel import context_parallel_attention
    from flash_attend.integrations import patch, patch_sdpa, replace_sdpa
    from flash_attend.tuning import tune

__version__ = "0.1.0"
__all__ = [
    "Attend",
    "BackendUnavailable",
    "complex_attention",
    "context_parallel_attention",
    "cu_seqlens_of_documents",
    "explain",
    "flash_attention",
    "flash_attention_packed",
    "patch",
    "patch_sdpa",
    "replace_sdpa",
    "scaled_dot_product_attention",
    "tune",
]
_LATE = {
    "context_parallel_attention": "context_parallel",
    **dict.fromkeys(("patch", "patch_sdpa", "replace_sdpa"), "integrations"),
    "tune": "tuning",
}


def __getattr__(name: str) -> Any:
    """What is imported by the first who asks for it: everybody else's import stays short."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
