"""Serving what other people's models hold: `patch`, and the table of the classes that it knows."""

from flash_attend.integrations.lucidrains import (
    KNOWN,
    BroadcastMaskAttend,
    KnownAttend,
    NoBiasAttend,
    TiledHeadsAttend,
    register,
)
from flash_attend.integrations.patching import Outcome, PatchError, PatchHandle, patch
from flash_attend.integrations.served import ServedAttend

__all__ = [
    "KNOWN",
    "BroadcastMaskAttend",
    "KnownAttend",
    "NoBiasAttend",
    "Outcome",
    "PatchError",
    "PatchHandle",
    "ServedAttend",
    "TiledHeadsAttend",
    "patch",
    "register",
]
