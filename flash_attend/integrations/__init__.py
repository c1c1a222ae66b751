"""Serving what other people's models hold: `patch`, and the table of the classes that it knows."""

from flash_attend.integrations.lucidrains import KNOWN, KnownAttend, register
from flash_attend.integrations.patching import Outcome, PatchError, PatchHandle, patch
from flash_attend.integrations.served import ServedAttend

__all__ = ["KNOWN", "KnownAttend", "Outcome", "PatchError", "PatchHandle", "ServedAttend", "patch", "register"]
