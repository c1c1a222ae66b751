"""`python -m flash_attend` says what a bug report needs, and nothing that is not so."""

import importlib.metadata
import platform
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import flash_attend
from flash_attend import __main__ as bug_report
from flash_attend import target
from flash_attend.kernels.configs import ROWS
from flash_attend.spec import MaskKind
from flash_attend.validation import Calls, Measurement, Validation

H100_RUN = dict(
    gpu="NVIDIA H100 80GB HBM3",
    torch="2.13.0",
    triton="3.7.1",
    date="2026-01-02",
    commit="0123abc",
    results="benchmarks/results/h100.txt",
)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_gpus(monkeypatch):
    """A machine with an A100 and an H100, as far as torch tells."""
    parts = [
        SimpleNamespace(
            name="NVIDIA A100-SXM4-80GB",
            major=8,
            minor=0,
            total_memory=80 * 2**30,
            multi_processor_count=108,
            shared_memory_per_block_optin=166912,
        ),
        SimpleNamespace(
            name="NVIDIA H100 80GB HBM3",
            major=9,
            minor=0,
            total_memory=79 * 2**30,
            multi_processor_count=132,
            shared_memory_per_block_optin=232448,
        ),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(parts))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: parts[device.index])
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(target, "triton_version", lambda: "3.7.1")
    monkeypatch.setattr(target, "interpreting", lambda: False)
    target._describe.cache_clear()
    yield
    target._describe.cache_clear()


def value_of(name: str, text: str) -> str:
    return re.search(rf"^{re.escape(name)} +(.+)$", text, re.MULTILINE)[1]


def section(title: str, text: str) -> str:
    return re.search(rf"^{re.escape(title)}[^\n]*\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)[1]


def test_the_command_prints_the_report(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "flash_attend"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.rstrip("\n") == bug_report.report()
    assert run.stderr == ""


def test_versions():
    text = bug_report.report()
    assert value_of("flash_attend", text) == flash_attend.__version__
    assert value_of("torch", text) == torch.__version__
    assert value_of("einops", text) == importlib.metadata.version("einops")
    assert value_of("Python", text) == platform.python_version()
    assert value_of("platform", text) == platform.platform()
    assert value_of("triton", text).split()[0] == (target.triton_version() or "not")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(target, "triton_version", lambda: None)
    target._describe.cache_clear()
    try:
        text = bug_report.report()
    finally:
        target._describe.cache_clear()
    assert value_of("triton", text) == "not installed"
    assert "Triton is not installed" in section("backends for", text)


def test_without_a_gpu(no_gpu):
    text = bug_report.report(validated={}, faster={}, measured={})
    assert value_of("GPU", text) == "none"
    backends = section("backends for", text)
    assert "cpu: on cpu: math serves" in backends
    assert "cuda" not in backends.replace("CUDA", "")
    assert section("shown right on a GPU", text) == "  nothing yet, on any part"
    assert section("shown faster on a GPU", text) == "  nothing yet, on any part"
    assert [line.split(":")[0] for line in section("tiles", text).splitlines()] == ["  sm_80", "  sm_90"]


def test_each_gpu_is_described_and_judged(fake_gpus):
    text = bug_report.report(validated={}, faster={})
    assert value_of("GPU 0", text) == (
        "NVIDIA A100-SXM4-80GB, sm_80, 80.0 GiB, 108 SMs, 166912 bytes of shared memory a block"
    )
    assert value_of("GPU 1", text).startswith("NVIDIA H100 80GB HBM3, sm_90, 79.0 GiB, 132 SMs, 232448 bytes")
    backends = section("backends for", text)
    assert "cuda:0: on NVIDIA A100-SXM4-80GB: math serves" in backends
    assert "cuda:1: on NVIDIA H100 80GB HBM3: math serves" in backends
    assert "not validated on sm_80 yet" in backends
    for title in ("shown right on a GPU", "shown faster on a GPU"):
        assert section(title, text) == "  nothing yet, on any part"


def test_what_was_shown_is_told_with_its_evidence(fake_gpus):
    """Right and faster each by itself: the H100 has both for the Gluon kernels, and serves by them."""
    right, measured = (
        Validation(**H100_RUN),
        Measurement(
            **H100_RUN | {"results": "benchmarks/results/h100/standard.json"},
            calls=(Calls("half", 64, 64, MaskKind.KEY), Calls("half", 128, 128, MaskKind.NONE)),
        ),
    )
    validated = {("triton", "sm_90"): right, ("hopper", "sm_90"): right, ("hopper_fused", "sm_90"): right}
    text = bug_report.report(validated, {("hopper", "sm_90"): measured}, {})
    assert section("shown right on a GPU", text).splitlines() == [
        f"  {backend} on sm_90: NVIDIA H100 80GB HBM3, torch 2.13.0, Triton 3.7.1, 2026-01-02, commit 0123abc, "
        "benchmarks/results/h100.txt"
        for backend in ("hopper", "hopper_fused", "triton")
    ] + ["  nothing on sm_80, which is here"]
    first, *rest = section("shown faster on a GPU", text).splitlines()
    assert first.startswith("  hopper on sm_90: ")
    assert first.endswith(measured.results)
    assert rest == [
        "    half, d 64, dv 64, mask key",
        "    half, d 128, dv 128, mask none",
        "  nothing on sm_80, which is here",
    ]
    backends = section("backends for", text)
    assert "cuda:0: on NVIDIA A100-SXM4-80GB: math serves" in backends
    assert "cuda:1: on NVIDIA H100 80GB HBM3: hopper serves" in backends


def test_rows_of_tiles_are_told_with_the_results_that_show_them(fake_gpus, monkeypatch):
    results = "benchmarks/results/h100/tune.json"
    tiles = section(
        "tiles", bug_report.report(measured={("sm_90", "half", 64): results, ("sm_90", "hopper", 64): results})
    )
    sm_80, sm_90, *found = tiles.splitlines()
    assert re.fullmatch(r"  sm_80: 0 of \d+ rows measured there, the others chosen by what compiles well", sm_80)
    assert sm_90.startswith("  sm_90: 2 of ")
    assert int(sm_90.split()[3]) > sum(arch == "sm_90" for arch, *_ in ROWS)
    assert found == [f"    half, 64: {results}", f"    hopper, 64: {results}"]


def test_a_part_without_rows_of_its_own(fake_gpus, monkeypatch):
    monkeypatch.setattr(bug_report, "rows_of", lambda arch: [])
    assert section("tiles", bug_report.report()).splitlines() == [
        f"  {arch}: has no rows of its own, takes those of sm_80" for arch in ("sm_80", "sm_90")
    ]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 580.159.03; echo 580.159.03", "580.159.03"),
        ("exit 9", "unknown (CalledProcessError from nvidia-smi)"),
        ("true", "unknown (nvidia-smi names none)"),
        (None, "unknown (no nvidia-smi)"),
    ],
)
def test_driver(script, expected, tmp_path, monkeypatch):
    if script is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert value_of("driver", bug_report.report()) == expected
