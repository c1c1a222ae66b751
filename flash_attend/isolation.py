"""Functions in a process of their own, which may crash or hang there without ending this one.

A request and an answer are one line of JSON each. A process serves one request after the other, until one fails: what
an illegal access leaves behind answers nothing rightly.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
from contextlib import suppress
from types import TracebackType
from typing import Any

__all__ = ["Failed", "Isolated"]


LONGEST_START = 120.0  # seconds until a process can be asked


class Failed(Exception):
    """A function raised, or its process died or took too long."""


class Isolated:
    """A function, `"module:name"`, that is called in a process of its own: started for the first request, and again
    after one that failed."""

    def __init__(self, function: str) -> None:
        self.function = function
        self._process: subprocess.Popen[bytes] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed by `__exit__`

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()
        self._said.close()

    def ask(self, request: Any, limit: float) -> Any:
        """The function's answer to a request, within `limit` seconds. Raises `Failed` with the reason."""
        if self._process is None:
            command = [sys.executable, "-m", __name__, self.function]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._said)
            self._answer(LONGEST_START)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then there is no answer
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        return self._answer(limit)

    def _answer(self, limit: float) -> Any:
        process = self._process
        assert process is not None and process.stdout is not None
        waited = not select.select([process.stdout], [], [], limit)[0]
        line = b"" if waited else process.stdout.readline()
        answer = json.loads(line) if line else dict(error=f"no answer within {limit:g} seconds")
        if "error" in answer:
            self._end()
            ended = "" if line or waited else f"its process ended with status {process.returncode}{self._last_words()}"
            raise Failed(ended or answer["error"])
        return answer["result"]

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def _serve(function: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    print(json.dumps(dict(result="ready")), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = dict(result=call(json.loads(line)))
        except Exception as error:
            answer = dict(error=" ".join(f"{type(error).__name__}: {error}".split())[:500])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
