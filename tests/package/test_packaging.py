"""The wheel and the sdist hold the package and nothing else, and what is installed needs no more than it says."""

import ast
import compileall
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import flash_attend

ROOT = Path(__file__).resolve().parents[2]

# What may stand where Triton should, as code to run before anything else.
TRITONS = {
    # Every finder is replaced by one that does not know it, as on a machine without it.
    "absent": """
import sys

class WithoutTriton:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [WithoutTriton(finder) for finder in sys.meta_path]
""",
    "blocked": "import sys; sys.modules['triton'] = None",
    "stub": "import sys, types; sys.modules['triton'] = types.SimpleNamespace()",
    "stub_module": "import sys, types; sys.modules['triton'] = types.ModuleType('triton')",
    "raises": "import sys; sys.path.insert(0, 'broken')",
    "sources_missing": "import sys; sys.path.insert(0, 'compiled')",
}
REASONS = {
    "absent": "Triton is not installed",
    "blocked": "Triton is not installed",
    "stub": r"its kernels cannot be imported \(\w+: .*triton",
    "stub_module": r"its kernels cannot be imported \(ModuleNotFoundError: No module named 'triton\.language'",
    "raises": r"its kernels cannot be imported \(RuntimeError: no driver, try 1\)",
    "sources_missing": r"its kernels cannot be imported \(\w+: .*defined in a Python file",
}

CPU_CALL = """
import torch
from flash_attend import Attend, flash_attention

q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
mask = torch.tensor([[True, True, True, False, False]])
flash_attention(q, k, v, mask=mask, causal=True).sum().backward()
Attend(causal=True)(q, k, v).sum().backward()
"""


def run_python(code: str, cwd: Path, *flags: str, path: Path | str = "") -> str:
    """Runs code in a fresh process of this interpreter, with a folder put first on its path; its output."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(path)
    run = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def build(source: Path, kind: str, destination: Path) -> Path:
    """Builds the "wheel", the "editable" wheel or the "sdist" of a source tree; its path."""
    destination.mkdir(parents=True, exist_ok=True)
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}({str(destination)!r}))"
    return destination / run_python(code, source).splitlines()[-1]


def package_files() -> set[str]:
    """What the package consists of, by the names it is installed under, read from the source tree."""
    folders = {"flash_attend": ROOT / "flash_attend", "flash_attend/kernels": ROOT / "kernels"}
    modules = {
        f"{name}/{file.relative_to(folder).as_posix()}"
        for name, folder in folders.items()
        for file in folder.rglob("*.py")
    }
    return modules | {"flash_attend/py.typed"}


def imported_by_the_package() -> set[str]:
    """The top-level names that the package imports, wherever in its code."""
    names = set()
    for file in [*(ROOT / "flash_attend").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clean copy of the repository. Builds in the repository itself would leave, and reuse, folders there."""
    copy = tmp_path_factory.mktemp("source") / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info"))
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run = subprocess.run([*command, "-w", folder, source], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel installed in it, beside somebody else's top-level `kernels`."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("OWNER = 'somebody else'\n")
    return folder


def test_the_wheel_is_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == package_files()
    assert any(name.endswith("/LICENSE") for name in metadata)


def test_the_wheel_says_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    required = set(re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE))
    extras = r"^Requires-Dist: ([\w-]+)[^\n]*extra == \"(?:triton|huggingface)\""
    optional = set(re.findall(extras, metadata, re.MULTILINE))
    assert optional == {"triton", "transformers"}
    assert required | optional == imported_by_the_package() - sys.stdlib_module_names - {"flash_attend"}
    assert re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE) == [
        "triton",
        "huggingface",
        "demo",
        "bench",
        "test",
    ]
    assert f"\nVersion: {flash_attend.__version__}\n" in metadata


def test_the_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    sdist = build(source, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    rebuilt = build(unpacked, "wheel", tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(rebuilt).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_beside_another_package_named_kernels(installed, tmp_path):
    code = """
import kernels, flash_attend, flash_attend.kernels.configs
print(kernels.OWNER, kernels.__file__, flash_attend.__file__, flash_attend.kernels.configs.__file__, sep="\\n")
"""
    owner, *files = run_python(code, tmp_path, path=installed).splitlines()
    assert owner == "somebody else"
    expected = ["kernels/__init__.py", "flash_attend/__init__.py", "flash_attend/kernels/configs.py"]
    assert files == [str(installed / name) for name in expected]


@pytest.fixture(scope="module")
def damaged(installed, tmp_path_factory) -> Path:
    """A folder with a Triton that raises and with this package without its sources."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "broken" / "triton").mkdir(parents=True)
    counting = "import sys; sys.tries = getattr(sys, 'tries', 0) + 1; raise RuntimeError(f'no driver, try {sys.tries}')"
    (folder / "broken" / "triton" / "__init__.py").write_text(counting)
    shutil.copytree(installed / "flash_attend", folder / "compiled" / "flash_attend")
    assert compileall.compile_dir(folder / "compiled", quiet=1, legacy=True)
    for source in (folder / "compiled").rglob("*.py"):
        source.unlink()
    return folder


# What is run beside each of TRITONS: it ends the process.
WITHOUT_TRITON = f"""
print("ENTER")
{CPU_CALL}
import runpy
from flash_attend import BackendUnavailable, explain
from flash_attend.target import DeviceTarget

assert explain(q, k, v).plan.name == "sdpa"
assert "sdpa serves" in str(explain(q, k, v))
version = DeviceTarget.of(q.device).triton
part = DeviceTarget("cuda", "a part", (9, 0), triton=version, device=q.device)  # where torch's kernel cannot serve
DeviceTarget.of = lambda device: part
assert flash_attention(q, k, v).shape == v.shape
for _ in range(2):
    try:
        flash_attention(q, k, v, backend="triton")
    except BackendUnavailable as refusal:
        print(refusal)
print(explain(q, k, v))
runpy.run_module("flash_attend", run_name="__main__")
"""
FORKED = f"""
import os, torch

for prepare in {[*TRITONS.values()]!r}:
    if not os.fork():
        exec(prepare + {WITHOUT_TRITON!r})
    assert os.wait()[1] == 0, prepare
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks a process for each")
def test_without_a_triton_that_works(installed, damaged):
    """A CPU call needs none; a GPU's is told why, once it has tried, and falls back where it may."""
    printed = run_python(FORKED, damaged, path=installed).split("ENTER\n")[1:]
    for triton, lines in zip(TRITONS, printed, strict=True):
        refusal, again, *told = lines.splitlines()
        assert re.fullmatch(rf"backend 'triton' cannot serve this call: {REASONS[triton]}.*", refusal)
        assert again == refusal
        assert any(re.match(rf"  triton +no +{REASONS[triton]}", line) for line in told)
        reported = "not installed" if "not installed" in REASONS[triton] else rf".*, but {REASONS[triton]}"
        assert any(re.match(rf"triton +{reported}", line) for line in told)


def test_nothing_imports_triton_before_a_kernel_is_needed(installed, tmp_path):
    count = "print(sorted(name for name in sys.modules if name.split('.')[0] == 'triton'))"
    code = "\n".join(("import sys, torch", count, "import flash_attend", count, CPU_CALL, count))
    assert run_python(code, tmp_path, path=installed).splitlines() == ["[]"] * 3


def test_the_kernels_for_every_gpu_are_imported_without_those_for_hopper(installed, tmp_path):
    pytest.importorskip("triton", reason="the kernels need Triton")
    code = """
import sys
from flash_attend.backends import BACKENDS
for name in ("math", "sdpa", "efficient", "triton", "hopper"):
    assert BACKENDS[name].fault() == ""
    print(name, *(part for part in ("triton", "flash_attend.kernels.hopper") if part in sys.modules))
"""
    assert run_python(code, tmp_path, path=installed).splitlines() == [
        "math",
        "sdpa",
        "efficient",
        "triton triton",
        "hopper triton flash_attend.kernels.hopper",
    ]


# Only site.addsitedir reads the .pth file of an editable install. -S keeps out whatever this environment has installed,
# torch too, so that a stand-in for the package itself lets the import system look for what lies in it.
FIND_KERNELS = """
import importlib.util, site, sys, types
site.addsitedir({site!r})
found = importlib.util.find_spec("flash_attend")
package = sys.modules["flash_attend"] = types.ModuleType("flash_attend")
package.__path__ = found.submodule_search_locations
print(found.origin, importlib.util.find_spec("flash_attend.kernels").origin, sep="\\n")
"""


@pytest.mark.parametrize("place", ["elsewhere", "in the repository"])
def test_the_editable_install_maps_the_kernels(place, source, tmp_path):
    """What `make` installs: edits count at once, and the kernels are found from anywhere."""
    editable = build(source, "editable", tmp_path / "wheel")
    zipfile.ZipFile(editable).extractall(tmp_path / "site")
    found = run_python(
        FIND_KERNELS.format(site=str(tmp_path / "site")), source if place == "in the repository" else tmp_path, "-S"
    )
    assert found.splitlines() == [str(source / "flash_attend/__init__.py"), str(source / "kernels/__init__.py")]
