"""Serving other people's models: `patch` with the table of the classes that it knows, and torch's own function."""

from flash_attend.integrations.lucidrains import (
    KNOWN,
    BroadcastMaskAttend,
    KnownAttend,
    NoBiasAttend,
    TiledHeadsAttend,
    register,
)
from flash_attend.integrations.patching import Outcome, PatchError, PatchHandle, patch
from flash_attend.integrations.pytorch import SDPAPatch, patch_sdpa, replace_sdpa
from flash_attend.integrations.served import ServedAttend

__all__ = [
    "KNOWN",
    "BroadcastMaskAttend",
    "KnownAttend",
    "NoBiasAttend",
    "Outcome",
    "PatchError",
    "PatchHandle",
    "SDPAPatch",
    "ServedAttend",
    "TiledHeadsAttend",
    "patch",
    "patch_sdpa",
    "register",
    "replace_sdpa",
]
