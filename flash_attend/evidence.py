"""What is known of a part: which variants of the kernels were right there, and what was fastest.

One small JSON file for each variant and each kind of call, in a folder for each part, under `$FLASH_ATTEND_CACHE` or
`$XDG_CACHE_HOME/flash_attend/`. A file is written whole or not at all; one that is damaged, of another format or about
another part counts as missing. Where nothing can be written, what is found lives as long as the process.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import tempfile
import warnings
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flash_attend.generation import renew
from flash_attend.marks import left, marked
from flash_attend.target import DeviceTarget, driver_version
from flash_attend.tracing import constant_when_compiled
from flash_attend.variant import ALL, Kind, Variant

__all__ = ["Finding", "Store", "Tuned", "known", "name_of_tuned", "read_anew", "tuned", "tuned_tiles", "way_of"]

FORMAT = 1
MARK = ".checking"  # the suffix of a check that is under way
UNREADABLE = (ValueError, RecursionError)  # what is raised where a file holds no JSON, or none that anybody wrote


class Finding(NamedTuple):
    """What a check said of a variant."""

    right: bool
    reason: str


class Tuned(NamedTuple):
    """What was fastest on a part for a kind of calls."""

    backend: str
    # Of each backend its faster backward, and the tiles that go with it, as `kernels.configs.as_text` has them.
    ways: tuple[tuple[str, str, str], ...]
    reason: str


# ---------------------------------------------------------------------------------------------------------------------
# Looking up
# ---------------------------------------------------------------------------------------------------------------------


@constant_when_compiled
def known(variant: tuple, device: torch.device) -> Finding | None:
    """What is known of a variant on the part of a device, without finding it out; None where nothing is."""
    if os.environ.get("FLASH_ATTEND_CHECK") == "0":
        return Finding(True, "trusted unchecked, because FLASH_ATTEND_CHECK is 0")
    return Store.of(device).finding(Variant.read(variant))


@constant_when_compiled
def tuned(kind: tuple, device: torch.device) -> Tuned | None:
    """What was fastest on the part of a device; None where nothing was measured."""
    return _tuned_once(Store.of(device), Kind(*kind))


@cache
def _tuned_once(store: Store, kind: Kind) -> Tuned | None:
    return store.tuned(kind)


def read_anew() -> None:
    """Has what was fastest be read again."""
    _tuned_once.cache_clear()
    renew()


def way_of(fastest: Tuned | None, backend: str) -> tuple[str, str]:
    """The backward of a backend that was fastest, and its tiles; empty where none was measured."""
    for name, backward, tiles in () if fastest is None else fastest.ways:
        if name == backend:
            return backward, tiles
    return "", ""


def tuned_tiles(backend: str, kind: tuple, target: DeviceTarget, backward: str) -> str:
    """The tiles that were fastest on a part, of a backend by a backward; empty where none were measured."""
    fastest, tiles = way_of(None if target.device is None else tuned(kind, target.device), backend)
    return tiles if fastest == backward else ""


@cache
def _digest_of_kernels() -> str:
    """Of the sources that decide what a kernel computes, or what one of PyTorch's is given."""
    package = importlib.util.find_spec("flash_attend.kernels")
    folders = () if package is None else package.submodule_search_locations or ()
    digest = hashlib.sha256()
    ours = sorted(source for folder in folders for source in Path(folder).rglob("*.py"))
    for source in (*ours, *sorted(Path(__file__).parent.glob("efficient.py*"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _part_of(target: DeviceTarget) -> dict[str, str]:
    return {
        "name": target.name or target.device_type,
        "arch": target.arch or "",
        "driver": driver_version() if target.device_type == "cuda" else "",
        "torch": torch.__version__,
        "triton": target.triton or "",
        "kernels": _digest_of_kernels(),
    }


def _root() -> Path:
    if given := os.environ.get("FLASH_ATTEND_CACHE"):
        return Path(os.path.expanduser(given))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "flash_attend")


@cache
def _store(root: Path, target: DeviceTarget) -> Store:
    part = _part_of(target)
    digest = hashlib.sha256(json.dumps(part).encode()).hexdigest()[:12]
    return Store(root / f"{_as_name(part['name'])}-{digest}", part)


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)


# ---------------------------------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------------------------------


class Store:
    """What is known of one part."""

    def __init__(self, folder: Path, part: dict[str, str]) -> None:
        self.folder, self.part = folder, part
        self._findings: dict[Variant, Finding] = {}

    @staticmethod
    def of(device: torch.device) -> Store:
        """That of a device's part."""
        return _store(_root(), DeviceTarget.of(device))

    def finding(self, variant: Variant) -> Finding | None:
        """What a check of a variant said, here or in another process. A check of all gradients tells of the forward and
        of the gradient of q alone, too, which are the same kernels."""
        found = self._findings.get(variant) or self._read_finding(variant)
        if found is None and not any(variant.needed[1:]):
            whole = self._read_finding(variant._replace(needed=ALL))
            found = whole if whole is not None and whole.right else None
        if found is not None:
            self._findings[variant] = found
        return found

    def _read_finding(self, variant: Variant) -> Finding | None:
        found = self.read(str(variant))
        if found is None or not isinstance(found.get("right"), bool) or not isinstance(found.get("reason"), str):
            return None
        return Finding(found["right"], found["reason"])

    def keep(self, variant: Variant, finding: Finding, **details: Any) -> None:
        """Writes a finding; without `details`, which say how it was found, it is for this process alone."""
        self._findings[variant] = finding
        if details:
            self.write(str(variant), dict(variant=variant, **finding._asdict(), **details))

    def tuned(self, kind: Kind) -> Tuned | None:
        """What was fastest for a kind of calls, read at each time. Where tiles cannot be read, nothing is known."""
        found: Any = (self.read(name_of_tuned(kind)) or {}).get("won")
        try:
            won = Tuned(found["backend"], tuple((str(a), str(b), str(c)) for a, b, c in found["ways"]), found["reason"])
        except (KeyError, TypeError, ValueError):
            return None
        try:
            for _, _, tiles in won.ways:
                _read_tiles(tiles)
        except ValueError as error:
            path = self._path(name_of_tuned(kind))
            warnings.warn(f"flash_attend ignores what was tuned in {path}: {error}", stacklevel=2)
            return None
        return won if isinstance(won.backend, str) and isinstance(won.reason, str) else None

    def forget(self, variant: Variant) -> None:
        """Forgets what was found, here and on the disk, so that it is found anew."""
        self._findings.pop(variant, None)
        renew()
        with suppress(OSError):
            self._path(str(variant)).unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{_as_name(name)}.json"

    def read(self, name: str) -> dict[str, Any] | None:
        """What a file holds; None where there is none that can be relied on."""
        try:
            found = json.loads(self._path(name).read_text())
        except (OSError, *UNREADABLE):
            return None
        head = dict(format=FORMAT, part=self.part, name=name)
        return found if isinstance(found, dict) and {key: found.get(key) for key in head} == head else None

    def write(self, name: str, found: dict[str, Any]) -> bool:
        """Writes a file, whole or not at all; whether it could."""
        temporary = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.folder, prefix=".", delete=False) as file:
                temporary = file.name
                json.dump(dict(format=FORMAT, part=self.part, name=name, **found), file, indent=1)
            os.replace(temporary, self._path(name))
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            return False
        return True

    def findings(self) -> dict[Variant, Finding]:
        """All that is on the disk about variants of this part."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            with suppress(OSError, KeyError, TypeError, *UNREADABLE):
                variant = Variant.read(json.loads(path.read_text())["variant"])
                if finding := self._read_finding(variant):
                    found[variant] = finding
        return found

    def reasons_of_tuned(self) -> dict[str, str]:
        """Why what was fastest is, by the kind's name, of all kinds on the disk."""
        found = {}
        for path in sorted(self.folder.glob("tuned*.json")):
            with suppress(OSError, KeyError, TypeError, *UNREADABLE):
                name = json.loads(path.read_text())["name"]
                found[name] = (self.read(name) or {})["won"]["reason"]
        return found

    def checking(self, variant: Variant, *, anew: bool = False) -> AbstractContextManager[str]:
        """Within this context no other process checks the variant; gives why it must not be checked, or "": a process
        died while it checked it, and it is not asked for `anew`, or one takes too long."""
        return marked(self._path(str(variant)).with_suffix(MARK), json.dumps(variant), anew=anew)

    def died(self) -> dict[Variant, str]:
        """The variants that a process died in the check of, and which one."""
        found = {}
        for path in sorted(self.folder.glob(f"*{MARK}")):
            who, _, variant = left(path).partition("\n")
            with suppress(TypeError, *UNREADABLE):
                found[Variant.read(json.loads(variant))] = who
        return found


def _read_tiles(text: str) -> None:
    """Raises `ValueError` for a text that holds no tiles."""
    if text:
        from flash_attend.kernels.configs import of_text  # which asks here what is fastest

        of_text(text)


def name_of_tuned(kind: Kind) -> str:
    """The name of what was measured for a kind of calls."""
    return f"tuned {kind}"
