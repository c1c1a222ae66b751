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
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flash_attend.target import DeviceTarget, driver_version
from flash_attend.tracing import constant_when_compiled
from flash_attend.variant import ALL, Kind, Variant

try:
    import fcntl
except ImportError:  # Windows: what cannot be locked is kept in memory
    fcntl = None  # type: ignore[assignment]

__all__ = ["Finding", "Store", "Tuned", "known", "name_of_tuned", "tiles_of", "tuned", "tuned_tiles"]

FORMAT = 1
LONGEST_WAIT = 600.0  # seconds for another process that checks the same variant


class Finding(NamedTuple):
    """What a check said of a variant."""

    right: bool
    reason: str


class Tuned(NamedTuple):
    """What was fastest on a part for a kind of calls."""

    backend: str
    backwards: dict[str, str]  # by backend: its faster backward
    tiles: dict[str, str]  # by backend: the tiles that go with that backward, as `kernels.configs.as_text` has them
    reason: str


# ---------------------------------------------------------------------------------------------------------------------
# Looking up
# ---------------------------------------------------------------------------------------------------------------------


@constant_when_compiled
def known(variant: tuple, device: torch.device) -> Finding | None:
    """What is known of a variant on the part of a device, without finding it out; None where nothing is."""
    return Store.of(device).finding(Variant.read(variant))


@constant_when_compiled
def tuned(kind: tuple, device: torch.device) -> Tuned | None:
    """What was fastest on the part of a device; None where nothing was measured."""
    return Store.of(device).tuned(Kind(*kind))


def tiles_of(fastest: Tuned, backend: str, backward: str) -> str:
    """The tiles that were fastest, of a backend by a backward; empty where none were measured."""
    return fastest.tiles.get(backend, "") if fastest.backwards.get(backend) == backward else ""


def tuned_tiles(backend: str, kind: tuple, target: DeviceTarget, backward: str) -> str:
    """`tiles_of` what was fastest on a part."""
    found = None if target.device is None else tuned(kind, target.device)
    return "" if found is None else tiles_of(found, backend, backward)


@cache
def _digest_of_kernels() -> str:
    """Of the sources that decide what a kernel computes."""
    package = importlib.util.find_spec("flash_attend.kernels")
    folders = () if package is None else package.submodule_search_locations or ()
    digest = hashlib.sha256()
    for source in sorted(source for folder in folders for source in Path(folder).rglob("*.py")):
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
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "flash_attend"


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


_stores: list[Store] = []


class Store:
    """What is known of one part."""

    def __init__(self, folder: Path, part: dict[str, str]) -> None:
        self.folder, self.part = folder, part
        self._findings: dict[Variant, Finding] = {}
        self._tuned: dict[Kind, Tuned | None] = {}
        _stores.append(self)

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
            self.write(str(variant), {**finding._asdict(), **details})

    def tuned(self, kind: Kind) -> Tuned | None:
        """What was fastest for a kind of calls."""
        if kind not in self._tuned:
            found = (self.read(name_of_tuned(kind)) or {}).get("won")
            whole = found if isinstance(found, dict) and found.keys() == set(Tuned._fields) else None
            self._tuned[kind] = None if whole is None else Tuned(**whole)
        return self._tuned[kind]

    @staticmethod
    def forget_tuned() -> None:
        """Has what was fastest read again."""
        for store in _stores:
            store._tuned.clear()

    def forget(self, variant: Variant) -> None:
        """Forgets what was found, here and on the disk, so that it is found anew."""
        self._findings.pop(variant, None)
        with suppress(OSError):
            self._path(str(variant)).unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{_as_name(name)}.json"

    def read(self, name: str) -> dict[str, Any] | None:
        """What a file holds; None where there is none that can be relied on."""
        try:
            found = json.loads(self._path(name).read_text())
        except (OSError, ValueError):
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

    def findings(self) -> dict[str, Finding]:
        """All that is on the disk about this part, by the variant's name."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                name = json.loads(path.read_text())["name"]
                if (read := self.read(name)) and "right" in read:
                    found[name] = Finding(read["right"], read["reason"])
        return found

    def reasons_of_tuned(self) -> dict[str, str]:
        """Why what was fastest is, by the kind's name, of all kinds on the disk."""
        found = {}
        for path in sorted(self.folder.glob("tuned*.json")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                name = json.loads(path.read_text())["name"]
                found[name] = (self.read(name) or {})["won"]["reason"]
        return found

    @contextmanager
    def checking(self, variant: Variant, *, anew: bool = False) -> Iterator[str]:
        """Within this context no other process checks the variant; gives why it must not be checked, or "".

        A file is locked for it, by a lock that dies with its process, and says who holds it. Where it can be locked and
        says so, that process died, and nobody checks the variant but who asks for it to be done `anew`.
        """
        mark, reason = self._lock_mark(variant)
        if mark is None:
            yield reason
            return
        with open(mark, "r+") as file:
            if (died := file.read(200)) and not anew:
                yield f"{died}, died or was ended in its check; `python -m flash_attend check` tries it again"
                return
            _say(mark, f"process {os.getpid()} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M')}")
            try:
                yield ""
            finally:
                _say(mark, "")

    def _lock_mark(self, variant: Variant) -> tuple[int | None, str]:
        """The file, locked; or None, and why not to check. Where nothing can be locked there is no reason."""
        if fcntl is None:
            return None, ""
        mark = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            mark = os.open(self.folder / f"{_as_name(str(variant))}.checking", os.O_RDWR | os.O_CREAT, 0o666)
            if _lock(mark):
                return mark, ""
            os.close(mark)
            return None, f"another process has been checking it for {LONGEST_WAIT:.0f} seconds"
        except OSError:
            if mark is not None:
                os.close(mark)
            return None, ""


def name_of_tuned(kind: Kind) -> str:
    """The name of what was measured for a kind of calls."""
    return "tuned " + " ".join(map(str, kind))


def _lock(mark: int) -> bool:
    """Whether the file was locked within `LONGEST_WAIT`."""
    end = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < end:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return True
    return False


def _say(mark: int, text: str) -> None:
    """Makes the file say this. On a full disk it says nothing, and a death goes unnoticed."""
    with suppress(OSError):
        os.ftruncate(mark, 0)
        os.pwrite(mark, text.encode(), 0)
