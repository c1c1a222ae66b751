"""Serving other people's models: `patch` with the table of the classes that it knows, and torch's own function."""

from flash_attend.integrations.known import KNOWN, KnownAttend, register
from flash_attend.integrations.lucidrains import BroadcastMaskAttend, TiledHeadsAttend
from flash_attend.integrations.patching import Outcome, PatchError, PatchHandle, patch
from flash_attend.integrations.pytorch import SDPAPatch, patch_sdpa, replace_sdpa
from flash_attend.integrations.served import ServedAttend
from flash_attend.integrations.x_transformers import XTransformersAttend

__all__ = [
    "KNOWN",
    "BroadcastMaskAttend",
    "KnownAttend",
    "Outcome",
    "PatchError",
    "PatchHandle",
    "SDPAPatch",
    "ServedAttend",
    "TiledHeadsAttend",
    "XTransformersAttend",
    "patch",
    "patch_sdpa",
    "register",
    "replace_sdpa",
]
