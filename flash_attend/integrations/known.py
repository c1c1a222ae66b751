"""The table of the classes that `patch` knows, and what a row of it says. To make another class known:

    from flash_attend.integrations import KnownAttend, register

    register(KnownAttend("my_package.attend.Attend", options={"dropout", "causal", "flash"}))

A row says what a class accounts for and how it reads its arguments. Whether the installed version computes what the row
promises is compared whenever a model is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flash_attend.integrations.served import ServedAttend

if TYPE_CHECKING:
    from flash_attend.integrations.search import Found

__all__ = ["KNOWN", "KnownAttend", "path_of", "register"]


@dataclass(frozen=True)
class KnownAttend:
    """What is known about one class of attention modules.

    `dropout`, `causal` and `scale` are read from the attributes of these names, where the class has them. Options and
    arguments that a row does not name are accepted as long as they are None or False.
    """

    path: str  # "package.module.Class"
    options: Collection[str]  # the constructor parameters that this row accounts for
    arguments: tuple[str, ...] = ("mask",)  # what is served of what forward takes after q, k and v
    flash: str = "flash"  # the attribute that chooses its flash path
    flash_scale: str = ""  # what its flash path does with `scale`, where that is not what its einsum path does
    flash_differs: Collection[
        str
    ] = ()  # what its flash path treats otherwise: "dropout", "2-D masks", a call's "causal"
    reading: type[ServedAttend] = ServedAttend
    attributes: Collection[str] = ()  # what its instances hold beside the usual, without a say in what they compute
    refuse: Callable[[Found], str | None] = lambda found: None  # the reason to leave an instance alone, or None
    doubt: Callable[[Found], str | None] = lambda found: None  # what to warn of where an instance is served, or None
    read: str = ""  # the version that was read to write the row


KNOWN: dict[str, KnownAttend] = {}


def register(row: KnownAttend) -> KnownAttend:
    """Adds a row to `KNOWN`, or replaces the one of the same class."""
    if not isinstance(row, KnownAttend):
        raise TypeError(f"row must be a KnownAttend, got {type(row).__name__}")
    KNOWN[row.path] = row
    return row


def path_of(kind: type) -> str:
    """What `KnownAttend.path` says of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"
