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
from flash_attend.evidence import Finding, Store, name_of_tuned
from flash_attend.variant import ALL, Kind, Variant


def gpu(name: str, major: int, gib: int, multiprocessors: int, shared: int) -> SimpleNamespace:
    sizes = dict(total_memory=gib * 2**30, multi_processor_count=multiprocessors, shared_memory_per_block_optin=shared)
    return SimpleNamespace(name=name, major=major, minor=0, **sizes)


@pytest.fixture
def fake_gpus(monkeypatch, tmp_path):
    """A machine with an A100 and an H100, as far as torch tells, of which nothing is known."""
    monkeypatch.setenv("FLASH_ATTEND_CACHE", str(tmp_path))
    parts = gpu("NVIDIA A100-SXM4-80GB", 8, 80, 108, 166912), gpu("NVIDIA H100 80GB HBM3", 9, 79, 132, 232448)
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


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = bug_report.report()
    assert value_of("GPU", text) == "none"
    backends = section("backends for", text)
    assert "cpu: on cpu: sdpa serves" in backends
    assert "cuda" not in backends.replace("CUDA", "")
    assert "known of" not in text


def test_each_gpu_is_described_and_judged(fake_gpus):
    text = bug_report.report()
    assert value_of("GPU 0", text) == (
        "NVIDIA A100-SXM4-80GB, sm_80, 80.0 GiB, 108 SMs, 166912 bytes of shared memory a block"
    )
    assert value_of("GPU 1", text).startswith("NVIDIA H100 80GB HBM3, sm_90, 79.0 GiB, 132 SMs, 232448 bytes")
    backends = section("backends for", text)
    assert "cuda:0: on NVIDIA A100-SXM4-80GB: triton serves" in backends
    assert "cuda:1: on NVIDIA H100 80GB HBM3: triton serves" in backends
    assert "  triton     yes      not checked here yet: the first call does" in backends
    assert section("known of cuda:0", text) == "  0 variants right, 0 not"


def test_what_is_known_of_a_part_is_told(fake_gpus):
    kind = Kind("float16", "ieee", 64, 64, "key", True, False, False)
    right, wrong = (Variant("triton", way, kind, *[False] * 3, ALL) for way in ("separate", "fused"))
    store = Store.of(torch.device("cuda", 1))
    store.keep(right, Finding(True, "self-checked: dq used 0.31 of its error budget"), seconds=1.5)
    store.keep(wrong, Finding(False, "dq: max error 1"), seconds=1.5)
    won = dict(backend="triton", ways=[["triton", "fused", ""]], reason="1.20 times as fast")
    store.write(name_of_tuned(kind), dict(won=won))
    text = bug_report.report()
    assert section("known of cuda:0", text) == "  0 variants right, 0 not"
    assert section("known of cuda:1", text).splitlines() == [
        "  1 variant right, 1 not",
        f"  {wrong}: dq: max error 1",
        "  tuned float16 d64 dv64 key causal: 1.20 times as fast",
    ]
    told = "  triton     yes      self-checked: dq used 0.31 of its error budget, 1.20 times as fast"
    assert told in text
    assert "  backward: separate, the fused one is not right: dq: max error 1" in text


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
    monkeypatch.setattr(target, "DRIVER", tmp_path / "missing")
    assert value_of("driver", bug_report.report()) == expected


def test_the_driver_tells_its_version_itself(tmp_path, monkeypatch):
    said = tmp_path / "version"
    said.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12.2\n"
    )
    monkeypatch.setattr(target, "DRIVER", said)
    assert target.driver_version() == "580.95.05"
    said.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n")
    assert target.driver_version() == "535.183.01"


@pytest.mark.parametrize(
    ("arguments", "told"),
    (
        ("check --only [", "argument --only: '[' is no regular expression"),
        ("tune --d 64 0", "argument --d: must be an integer of at least 1, got '0'"),
        ("tune --dv -8", "argument --dv"),
        ("tune --length 0", "argument --length: must be an integer of at least 1"),
        ("tune --tokens x", "argument --tokens: must be an integer of at least 1, got 'x'"),
        ("tune --width 0", "argument --width: must be an integer of at least 1"),
    ),
)
def test_wrong_options_are_told_before_anything_is_done(arguments, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        bug_report.main(arguments.split())
    assert told in capsys.readouterr().err
