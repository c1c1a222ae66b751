"""Which tests a process can run, and what all of them share."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import hypothesis
import pytest
import torch

# Without it cuBLAS, which the einsum path and torch's own layers use, refuses where determinism is asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# What a machine's own calls found out is no concern of the tests, and what they find out is none of its.
os.environ["FLASH_ATTEND_CACHE"] = tempfile.mkdtemp(prefix="flash_attend-tests-")

ROOT = Path(__file__).resolve().parent.parent

# The tests are about the installed package. With the root on the path (`python -m pytest` puts it there) the folder
# flash_attend would be found instead, without its kernels, and the folder kernels as a top-level package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

from efficient_kernel import played  # noqa: E402
from flash_attend.backends import OLDEST_CAPABILITY  # noqa: E402
from flash_attend.dispatch import override_backward  # noqa: E402
from flash_attend.target import interpreting  # noqa: E402

# Their assertions are the suite's own, and should fail as readably as a test's.
pytest.register_assert_rewrite("flash_attend.testing")

if interpreting():
    from quick_interpreter import quicken

    quicken()

# Two workers on two cores, each with a pool of threads of its own, run slower than two with one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# The interpreter needs seconds for what hypothesis expects in milliseconds; the same examples every time, or a failure
# on one machine says nothing on the next.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


# Where tests of a marker are: to import the modules of others would take longer than some of them do.
FOLDERS = {"interpreter": ("kernels", "package", "semantics", "torch"), "ptx": ("ptx",)}


def _missing_for_gpu() -> str | None:
    if interpreting():
        return "TRITON_INTERPRET is set: GPU tests need kernels that are compiled"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is not None or capability < OLDEST_CAPABILITY:
        return f"no CUDA device of compute capability {'.'.join(map(str, OLDEST_CAPABILITY))} or more"
    return None


def _missing_for_interpreter() -> str | None:
    return None if interpreting() else "Triton's interpreter needs TRITON_INTERPRET=1 when the process starts"


def _missing_for_others() -> str | None:
    return "TRITON_INTERPRET is set: this process runs interpreter tests only" if interpreting() else None


def _missing() -> dict[str | None, str | None]:
    """What this process lacks for the tests of each marker (None: of neither), or None where it lacks nothing."""
    return {"gpu": _missing_for_gpu(), "interpreter": _missing_for_interpreter(), None: _missing_for_others()}


def pytest_configure(config: pytest.Config) -> None:
    """Fails where exactly the tests that this process cannot run were asked for: skipping them all would look green."""
    asked = config.option.markexpr.strip()
    if reason := _missing().get(asked):
        raise pytest.UsageError(f"-m {asked}: {reason}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out folders that have no tests of the marker that was asked for, or asked for first."""
    folders = FOLDERS.get(config.option.markexpr.partition(" ")[0])
    if folders is None or not collection_path.is_relative_to(ROOT / "tests"):
        return None
    inside = collection_path.relative_to(ROOT / "tests").parts
    return True if inside and inside[0] not in folders else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this process cannot run, with the reason. Fails where a test stands where nobody runs it."""
    missing = _missing()
    for item in items:
        for marker, folders in FOLDERS.items():
            if item.get_closest_marker(marker) and item.path.relative_to(ROOT / "tests").parts[0] not in folders:
                raise pytest.UsageError(f"{item.nodeid}: {marker} tests are looked for in {', '.join(folders)} only")
        marker = next((name for name in ("gpu", "interpreter") if item.get_closest_marker(name)), None)
        if reason := missing[marker]:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["FLASH_ATTEND_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _backward_of_the_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that is given a backend runs with its backward, and where it is played."""
    given = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    backward = override_backward("fused") if getattr(given, "backward", "") == "fused" else nullcontext()
    with backward, played() if getattr(given, "played", False) else nullcontext():
        yield
