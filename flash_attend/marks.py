"""Marks of work in progress that may end its process: a file that is locked, by a lock that dies with its process, and
that says who holds it. One that says so and is not locked was left by a process that died."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is marked
    fcntl = None  # type: ignore[assignment]

__all__ = ["left", "marked"]

LONGEST_WAIT = 600.0  # seconds for another process's work


@contextmanager
def marked(path: Path, what: str, *, anew: bool = False) -> Iterator[str]:
    """Within this context no other process is in the same one; gives why not to work, or "".

    Waits for another process that works. Where one died, only who asks for it to be done `anew` is let in. Where a file
    system has no room or no locks, everybody is.
    """
    mark, reason = _lock(path)
    if mark is None:
        yield reason
        return
    with open(mark, "r+", errors="replace") as file:
        if (died := file.read().partition("\n")[0]) and not anew:
            yield f"{died}, died or was ended in its check; `python -m flash_attend check` tries it again"
            return
        _say(mark, f"process {os.getpid()} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M')}\n{what}")
        try:
            yield ""
        finally:
            _say(mark, "")


def left(path: Path) -> str:
    """What a process that died left: who it was, and in the next line what it did. Empty where none died."""
    try:
        with path.open(errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return file.read()
    except (AttributeError, OSError):  # no locks here, or somebody works
        return ""


def _lock(path: Path) -> tuple[int | None, str]:
    """The file, locked; or None, and why not to work. Where nothing can be locked there is no reason."""
    mark = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mark = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _locked(mark):
            return mark, ""
        os.close(mark)
        return None, f"another process has been checking it for {LONGEST_WAIT:.0f} seconds"
    except (AttributeError, OSError):
        if mark is not None:
            os.close(mark)
        return None, ""


def _locked(mark: int) -> bool:
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
