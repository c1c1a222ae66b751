"""Exact attention from hand-written Triton kernels, behind an `Attend` that replaces the one a model has."""

from flash_attend.attend import Attend
from flash_attend.dispatch import BackendUnavailable
from flash_attend.explanation import explain
from flash_attend.functional import flash_attention
from flash_attend.integrations import patch

__version__ = "0.1.0"
__all__ = ["Attend", "BackendUnavailable", "explain", "flash_attention", "patch"]
