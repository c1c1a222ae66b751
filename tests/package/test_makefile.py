"""What `make` does where a tool is missing or finds something."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make(target: str, path: Path) -> subprocess.CompletedProcess:
    """Makes a target with this folder put first on a PATH that holds no CUDA, and the environment taken as it is."""
    environment = os.environ | {"PATH": f"{path}:/usr/bin:/bin"}
    tool = shutil.which("make") or pytest.skip("reason: there is no make")
    command = [tool, "--no-print-directory", "--old-file=.venv/.installed", target]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_sanitizing_fails_without_the_tool(tmp_path):
    if shutil.which("compute-sanitizer", path="/usr/bin:/bin"):
        pytest.skip("reason: the tool is here")
    done = make("sanitize", tmp_path)
    assert done.returncode != 0
    assert "compute-sanitizer is missing" in done.stderr


@pytest.mark.parametrize("found", (0, 99))
def test_sanitizing_fails_where_the_tool_finds_something(found, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho cached $PYTORCH_NO_CUDA_MEMORY_CACHING: $*\nexit {found}\n")
    tool.chmod(0o755)
    done = make("sanitize", tmp_path)
    assert (done.returncode != 0) == (found != 0)
    assert done.stdout.startswith("cached 1: --tool memcheck ")
    assert ".venv/bin/pytest -q -m gpu" in done.stdout
