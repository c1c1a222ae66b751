"""Serving what other people's models hold: `patch`, and the table of the classes that it knows."""

from flash_attend.integrations.known import KNOWN, KnownAttend, register
from flash_attend.integrations.lucidrains import BroadcastMaskAttend, TiledHeadsAttend
from flash_attend.integrations.patching import Outcome, PatchError, PatchHandle, patch
from flash_attend.integrations.served import ServedAttend
from flash_attend.integrations.x_transformers import XTransformersAttend

__all__ = [
    "KNOWN",
    "BroadcastMaskAttend",
    "KnownAttend",
    "Outcome",
    "PatchError",
    "PatchHandle",
    "ServedAttend",
    "TiledHeadsAttend",
    "XTransformersAttend",
    "patch",
    "register",
]
