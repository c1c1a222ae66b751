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

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "demo.py"
SIZES = {"steps": 4, "padded-steps": 3, "batch": 2, "length": 32, "dim": 16, "depth": 1, "heads": 2}
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
def run(demo, tmp_path, capsys):
    """Runs the demo with all arms in this process; returns its exit code and what it printed."""

    def run(*options: str) -> tuple[int, str]:
        code = demo.main([*SMALL, "--out", str(tmp_path / "plot.png"), *options], make_arm=demo.Arm)
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
    (peaks,) = rows(done.stdout, "peak memory, MB")
    assert all(float(peak) >= 0 for peak in peaks)  # of each arm's own process


def test_a_backend_that_cannot_serve_ends_it_with_the_reason(tmp_path):
    done = run_script(*SMALL, "--backend", "triton", "--out", str(tmp_path / "plot.png"))
    assert done.returncode != 0
    assert "triton cannot serve" in done.stderr
    assert not (tmp_path / "plot.png").exists()


def test_the_tables(run):
    code, printed = run()
    assert code == 0
    assert [line for line in printed.splitlines() if line in ("no padding", "with key padding")] == [
        "no padding",
        "with key padding",
    ]
    assert "net.layers.0.1.attend.keywords['attend']" in printed  # patch's report
    assert "1 replaced, 0 refused" in printed
    assert printed.count("flash_attend on cpu: math serves") == 2
    assert "cpu tensors; the kernels need a CUDA device" in printed
    assert printed.count("own Attend: the client's Attend, flash=True") == 2
    for step, sections in ((1, 2), (3, 2), (4, 1)):
        found = rows(printed, f"loss, step {step} ")
        assert len(found) == sections
        for own, ours, difference, bound in found:
            assert float(difference) == pytest.approx(abs(float(own) - float(ours)), abs=2e-6)
            assert float(difference) <= float(bound) < 1e-3
    for label, cells in (("seconds a step", 4), ("first step", 2), ("peak memory, MB", 2)):
        assert [len(found) for found in rows(printed, label)] == [cells, cells]
    for name in ("out", "dq", "dk", "dv"):
        for own, ours, bound in rows(printed, f"{name} against float64"):
            assert 0 < float(own) < 1e-4
            assert float(ours) <= float(bound)


def test_the_same_seed_gives_the_same_curve(run):
    losses = [rows(run("--seed", seed)[1], "loss, step 4")[0][0] for seed in ("1", "1", "2")]
    assert losses[0] == losses[1] != losses[2]


def test_the_clients_flash_flag_and_ours(run):
    _, printed = run("--no-client-flash", "--keep-flash", "--padded-steps", "0")
    assert "own Attend: the client's Attend, flash=False" in printed
    assert "flash_attend on cpu: math serves" in printed


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


def section(demo, own, ours, errors=None):
    losses = {"own": own, "ours": ours}
    summaries = {kind: demo.Summary(None, "", errors=errors or {}) for kind in losses}
    return demo.Section("a section", losses, {kind: [1.0] * len(own) for kind in losses}, summaries)


def test_the_bound_is_float32_rounding_amplified(demo):
    bounds = section(demo, [4.0] * 17, [4.0] * 17).bounds
    assert bounds[0] == 64 * 2.0**-23 * 4.0
    assert bounds[8] == pytest.approx(2 * bounds[0])
    assert bounds[16] == pytest.approx(4 * bounds[0])


@pytest.mark.parametrize(("step", "apart", "complains"), [(0, 3e-5, False), (0, 3.1e-5, True), (8, 3.1e-5, False)])
def test_losses_may_be_as_far_apart_as_the_bound(demo, step, apart, complains):
    ours = [4.0] * 9
    ours[step] += apart
    assert bool(section(demo, [4.0] * 9, ours).complaints()) is complains


@pytest.mark.parametrize(("ours", "complains"), [(2.05e-7, False), (2.2e-7, True), (float("nan"), True)])
def test_attention_may_be_twice_as_far_from_float64(demo, ours, complains):
    made = section(demo, [4.0], [4.0], {"dq": (1e-7, ours, 1e-8)})
    assert bool(made.complaints()) is complains


def test_an_unknown_peak_is_shown_as_such(demo):
    (cells,) = rows(demo.tabulate(section(demo, [4.0], [4.0])), "peak memory, MB")
    assert cells == ["n/a", "n/a"]


# ---------------------------------------------------------------------------------------------------------------------
# Text and options
# ---------------------------------------------------------------------------------------------------------------------


def test_padded_batches(demo, tmp_path):
    settings, _ = demo.parse_arguments([*SMALL, "--out", str(tmp_path / "x.png")])
    batches = demo.Batches(settings, padded=True)
    again = demo.Batches(settings, padded=True)
    for step in range(settings.padded_steps):
        tokens, mask = batches[step]
        assert tokens.shape == (2, 33)
        assert mask.shape == (2, 1, 1, 32)
        valid = mask[:, 0, 0]
        assert valid[:, :8].all()
        assert (valid[:, :-1] | ~valid[:, 1:]).all()  # right padding
        assert (tokens[:, :-1][~valid] == 0).all()
        assert torch.equal(tokens, again[step][0])
        assert torch.equal(mask, again[step][1])
    assert any(not batches[step][1].all() for step in range(settings.padded_steps))


def test_unpadded_batches_are_windows_of_the_text(demo, tmp_path):
    settings, _ = demo.parse_arguments([*SMALL, "--out", str(tmp_path / "x.png")])
    tokens, mask = demo.Batches(settings, padded=False)[0]
    assert mask is None
    text = bytes(demo.read_corpus().tolist())
    assert all(bytes(row.tolist()) in text for row in tokens)
    assert b"def " in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--padded-steps", "-1"], "--padded-steps: must be at least 0, got -1"),
        (["--batch", "2.5"], "--batch: a whole number is needed, got '2.5'"),
        (["--length", "1"], "--length: must be at least 2, got 1"),
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["--device", "gpu"], "--device: no device 'gpu'"),
        (["--device", "meta"], "--device: must be cpu or cuda, got 'meta'"),
        (["--backend", "cudnn"], "--backend: invalid choice: 'cudnn'"),
        (["--out", "plot.jpg"], "--out must end in .png, got plot.jpg"),
    ],
)
def test_bad_options_are_named(demo, capsys, options, told):
    with pytest.raises(SystemExit) as ended:
        demo.parse_arguments([*SMALL, *options])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_named(demo, capsys):
    with pytest.raises(SystemExit):
        demo.parse_arguments(["--device", "cuda"])
    assert "--device: torch sees no CUDA device" in capsys.readouterr().err


def test_a_window_longer_than_the_text_is_named(demo, tmp_path):
    settings, _ = demo.parse_arguments([*SMALL, "--length", "100000000", "--out", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit, match="--length must be below the text's"):
        demo.Batches(settings, padded=False)


def test_sizes_default_to_what_suits_the_device(demo):
    settings, plot = demo.parse_arguments(["--device", "cpu", "--steps", "7"])
    assert settings.steps == 7
    assert settings.batch == demo.SIZES["cpu"]["batch"]
    assert plot == SCRIPT.parent.parent / "out" / "demo.png"
