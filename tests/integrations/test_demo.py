"""The demo: it runs, it shows what it should, and it notices a wrong Attend."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from clients import serve_by

from flash_attend import flash_attention

pytestmark = pytest.mark.filterwarnings("ignore:.*sdp_kernel.*")  # what the client's flash path calls

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "demo.py"
SIZES = {
    "steps": 4,
    "padded-steps": 3,
    "complete-steps": 0,
    "batch": 2,
    "length": 32,
    "dim": 16,
    "depth": 1,
    "heads": 2,
}
SMALL = ["--device=cpu", *(f"--{name}={size}" for name, size in SIZES.items())]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo"]


@pytest.fixture
def run(demo, tmp_path, capsys, monkeypatch):
    """Runs the demo; returns its exit code and what it printed. Drawing takes longer than all the rest."""

    def run(*options: str, plot: bool = False) -> tuple[int, str]:
        if not plot:
            monkeypatch.setattr(demo, "draw", lambda sections, path: None)
        code = demo.main([*SMALL, "--out", str(tmp_path / "plot.png"), *options])
        return code, capsys.readouterr().out

    return run


def rows(printed: str, label: str) -> list[list[str]]:
    """The cells of every row of the tables that starts with `label`."""
    return [line[len(label) :].split() for line in printed.splitlines() if line.startswith(label)]


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


# ---------------------------------------------------------------------------------------------------------------------
# The whole of it
# ---------------------------------------------------------------------------------------------------------------------


def test_the_script_runs(tmp_path):
    plot = tmp_path / "new folder" / "plot.png"
    done = run_script(*SMALL, "--padded-steps", "0", "--out", str(plot))
    assert done.returncode == 0, done.stderr
    assert f"plot: {plot}" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "the two trainings agree" in done.stdout
    assert "4/4" in done.stderr  # the progress bar
    (peaks,) = rows(done.stdout, "memory of a step, MB")
    assert all(float(peak) > 0 for peak in peaks)


def test_a_backend_that_cannot_serve_ends_it_with_the_reason(run):
    with pytest.raises(SystemExit, match="triton cannot serve"):
        run("--backend", "triton")


def test_the_tables(run):
    code, printed = run("--complete-steps", "2", plot=True)
    assert code == 0
    titles = ["no padding", "with key padding", "the complete complex form"]
    assert [line for line in printed.splitlines() if line in titles] == titles
    assert "net.layers.0.1.attend.keywords['attend']" in printed  # patch's report
    assert "1 replaced, 0 refused" in printed
    assert printed.count("\non cpu: ") == 3  # which backend serves, and why no other
    assert "cpu tensors; the kernels need a CUDA device" in printed
    assert printed.count("own Attend: flash=True") == 3
    for step, sections in ((1, 3), (2, 3), (3, 2), (4, 1)):
        found = rows(printed, f"loss, step {step} ")
        assert len(found) == sections
        for own, ours, difference, bound in found:
            assert float(difference) == pytest.approx(abs(float(own) - float(ours)), abs=2e-6)
            assert float(difference) <= float(bound) < 1e-3
    for label, cells in (("seconds a step", 4), ("first step", 2), ("memory of a step, MB", 2)):
        assert [len(found) for found in rows(printed, label)] == [cells] * 3
    own, ours = map(float, rows(printed, "memory of a step, MB")[2])
    assert ours < own  # the client copies q, k and v four times
    for name in ("out", "dq", "dk", "dv"):
        for own, ours, bound in rows(printed, f"{name} against float64"):
            assert 0 < float(own) < 1e-4
            assert float(ours) <= float(bound)


def test_the_same_seed_gives_the_same_curve(run):
    losses = [rows(run("--seed", seed, "--padded-steps", "0")[1], "loss, step 4")[0][0] for seed in ("1", "1", "2")]
    assert losses[0] == losses[1] != losses[2]


def test_a_flash_path_that_fails_is_told_and_avoided(demo, run, monkeypatch):
    def fail(*inputs, **options):
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    monkeypatch.setattr("complex_valued_transformer.attend.Attend.flash_attn", fail)
    code, printed = run("--padded-steps", "0")
    assert code == 0
    assert "flash=False (flash=True fails here: No available kernel. Aborting execution.)" in printed


# ---------------------------------------------------------------------------------------------------------------------
# A wrong Attend is noticed
# ---------------------------------------------------------------------------------------------------------------------


def wrong_scale(q, k, v, **options):
    return flash_attention(q, k, v, **options | {"scale": 0.9 * q.shape[-1] ** -0.5})


def wrong_causal(q, k, v, **options):
    return flash_attention(q, k, v, **options | {"causal": False})


def wrong_mask(q, k, v, **options):
    return flash_attention(q, k, v, **options | {"mask": None})


def wrong_gradient(q, k, v, **options):
    return flash_attention(q, k.detach(), v, **options) + 0 * k.sum()


def not_a_number(q, k, v, **options):
    return flash_attention(q, k, v, **options) * float("nan")


@pytest.mark.parametrize("wrong", [wrong_scale, wrong_causal, wrong_mask, wrong_gradient, not_a_number])
def test_a_wrong_attend_fails(run, monkeypatch, wrong):
    serve_by(monkeypatch, wrong)
    code, printed = run()
    assert code == 1
    losses = [line for line in printed.splitlines() if line.startswith("FAILED") and "the losses of step" in line]
    attention = [line for line in printed.splitlines() if line.startswith("FAILED") and "from float64" in line]
    assert losses
    assert attention
    assert "the two trainings agree" not in printed


def test_the_bound_is_float32_rounding_amplified(demo):
    assert demo.bound(4.0, 0) == 64 * 2.0**-23 * 4.0
    assert demo.bound(-4.0, 16) == pytest.approx(4 * demo.bound(4.0, 0))


@pytest.mark.parametrize(("step", "apart", "complains"), [(0, 3e-5, False), (0, 3.1e-5, True), (8, 3.1e-5, False)])
def test_losses_may_be_as_far_apart_as_the_bound(demo, step, apart, complains):
    ours = [4.0] * 9
    ours[step] += apart
    assert bool(demo.Section("a section", losses={"own": [4.0] * 9, "ours": ours}).complaints()) is complains


@pytest.mark.parametrize(("ours", "complains"), [(2.05e-7, False), (2.2e-7, True), (float("nan"), True)])
def test_attention_may_be_as_far_from_float64_as_allowed(demo, ours, complains):
    section = demo.Section("a section", losses={"own": [4.0], "ours": [4.0]}, errors={"dq": (1e-7, ours, 2.1e-7)})
    assert bool(section.complaints()) is complains


# ---------------------------------------------------------------------------------------------------------------------
# Text and options
# ---------------------------------------------------------------------------------------------------------------------


def test_batches_are_windows_of_the_text_padded_on_the_right(demo):
    settings = demo.parse_arguments(SMALL)
    whole, padded, again = (demo.Batches(settings, title) for title in ("no padding", *["with key padding"] * 2))
    tokens, mask = whole[0]
    assert mask is None
    text = bytes(whole.corpus.tolist())
    assert all(bytes(row.tolist()) in text for row in tokens)
    assert b"def " in text
    for step in range(settings.padded_steps):
        tokens, mask = padded[step]
        assert tokens.shape == (2, 33)
        valid = mask[:, 0, 0]
        assert valid[:, :8].all()
        assert (valid[:, :-1] | ~valid[:, 1:]).all()
        assert (tokens[:, :-1][~valid] == 0).all()
        assert torch.equal(tokens, again[step][0])
    assert any(not padded[step][1].all() for step in range(settings.padded_steps))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--padded-steps", "-1"], "--padded-steps must be at least 0, got -1"),
        (["--batch", "2.5"], "--batch: invalid int value: '2.5'"),
        (["--device", "meta"], "--device must be cpu, or cuda where torch sees a GPU, got meta"),
        (["--backend", "cudnn"], "--backend: invalid choice: 'cudnn'"),
    ],
)
def test_bad_options_are_named(demo, capsys, options, told):
    with pytest.raises(SystemExit) as ended:
        demo.parse_arguments([*SMALL, *options])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_window_longer_than_the_text_is_named(demo):
    with pytest.raises(SystemExit, match="--length must be below the text's"):
        demo.Batches(demo.parse_arguments([*SMALL, "--length", "100000000"]), "no padding")


def test_sizes_default_to_what_suits_the_device(demo):
    settings = demo.parse_arguments(["--device", "cpu", "--steps", "7"])
    assert (settings.steps, settings.batch) == (7, demo.SIZES["cpu"]["batch"])
    assert settings.out == SCRIPT.parent.parent / "out" / "demo.png"
