"""Training steps as cases of the benchmark: their arms agree, a wrong one gets no time, one that cannot run is told."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from clients import serve_by

import flash_attend
import run
import train_step
from flash_attend import flash_attention
from peers import peers_for
from results import Results
from train_step import ARMS, COMPLETE, COMPLEX, REAL, Arm, Batch, Training, judge, workload, workloads

pytestmark = pytest.mark.filterwarnings("ignore:.*sdp_kernel.*")  # what the client's flash path calls

CPU = torch.device("cpu")
NAMES = ["flash_attend", "own einsum", "own flash", "own flash, no mask"]
SMALL = dict(dim=16, depth=2, heads=2, length=24, batch=3)
OURS, YARDSTICKS = ARMS[0], Training.yardsticks


@pytest.fixture(autouse=True)
def one_thread():
    """Small models gain nothing from more, and wait for them where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def yardsticks_of(case):
    """The same for every arm and every test."""
    return YARDSTICKS.func(Training(case, CPU))


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """The rows of a small workload by arm, with told times; ours may be computed by something else."""
    monkeypatch.setattr(run, "peak_bytes", lambda function, device: 1)
    monkeypatch.setattr(Training, "yardsticks", property(lambda training: yardsticks_of(training.case)))

    def measure(model=REAL, dtype="float32", attention=None):
        arms = peers_for(ARMS, "cpu")
        if attention is not None:
            serve_by(monkeypatch, attention)
        # `serve_by` puts another `patch` in its place.
        arms[0] = replace(OURS, prepare=Arm(change=partial(flash_attend.patch, strict=True)))
        results = Results(tmp_path / "x.json", {})
        monkeypatch.setitem(run.PLANS, "quick", (2, 1.0))
        turns = iter(range(1, 100))

        def sample(function, milliseconds):
            function()
            return [float(next(turns))]

        bench = run.Bench(results, CPU, "quick", arms, sample)
        bench.measure(workload(model, dtype, **SMALL), lambda text: None)
        return {row["peer"]: row for row in results}

    return measure


def test_the_arms_take_turns_and_are_told_in_tokens(measure):
    rows = measure()
    assert list(rows) == NAMES
    # Each has a first sample by which its rounds are measured; then A B C D, D C B A.
    assert [row["samples"] for row in rows.values()] == [[[5], [12]], [[6], [11]], [[7], [10]], [[8], [9]]]
    valid = Batch.of(workload(REAL, "float32", **SMALL), CPU).valid
    assert all(row["tokens_per_s"] == pytest.approx(1e3 * valid / 8.5, rel=1e-4) for row in rows.values())
    assert {row["pass"] for row in rows.values()} == {"training step"}


@pytest.mark.parametrize(
    ("model", "dtype", "shape", "ours"),
    [
        (REAL, "bfloat16", (3, 2, 2, 24, 24, 8, 8), (3, 2, 2, 24, 24, 8, 8)),
        (COMPLEX, "tf32", (3, 2, 2, 24, 24, 64, 64), (3, 2, 2, 24, 24, 64, 64)),
        (COMPLETE, "float32", (12, 2, 2, 24, 24, 32, 64), (3, 2, 2, 24, 24, 32, 32)),
    ],
)
def test_all_arms_agree(measure, model, dtype, shape, ours):
    """In every precision; `shape` is what the model's own Attend gets, and `ours` what it gets patched, in autocast's
    dtype."""
    seen = set()

    def watched(q, k, v, **rest):
        seen.add((q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype))
        return flash_attention(q, k, v, **rest)

    rows = measure(model, dtype, watched)
    assert {row["error"] for row in rows.values()} == {""}
    assert all(0 < row["rel_error"] < 0.02 and row["ms_median"] for row in rows.values())
    assert {tuple(row["shape"]) for row in rows.values()} == {shape}
    assert seen == {(*ours, torch.bfloat16 if dtype == "bfloat16" else torch.float32)}


def wrong_scale(q, k, v, **options):
    return flash_attention(q, k, v, **options | {"scale": 0.9 * q.shape[-1] ** -0.5})


def wrong_causal(q, k, v, **options):
    return flash_attention(q, k, v, **options | {"causal": False})


def wrong_mask(q, k, v, **options):
    """Only the padding shows it: hence the arm without a mask, and the second loss for the others."""
    return flash_attention(q, k, v, **options | {"mask": None})


def wrong_gradient(q, k, v, **options):
    return flash_attention(q, k.detach(), v, **options)


def not_a_number(q, k, v, **options):
    return flash_attention(q, k, v, **options) * float("nan")


@pytest.mark.parametrize(
    ("model", "dtype", "wrong"),
    [(REAL, "bfloat16", wrong) for wrong in (wrong_scale, wrong_causal, wrong_gradient)]
    + [(COMPLEX, "float32", wrong) for wrong in (wrong_scale, wrong_mask, not_a_number)],
)
def test_a_wrong_attend_is_told_and_not_timed(measure, model, dtype, wrong):
    rows = measure(model, dtype, wrong)
    row = rows.pop("flash_attend")
    assert row["error"].startswith("wrong: the ")
    assert ("padding counted" in row["error"]) or wrong is not wrong_mask
    assert row["ms_median"] is row["tokens_per_s"] is None and row["samples"] == []
    assert all(other["error"] == "" and other["ms_median"] for other in rows.values())


def test_without_a_yardstick_there_is_no_time(measure, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_step, "distances", too_large)
    assert {row["error"] for row in measure().values()} == {"OutOfMemoryError: CUDA out of memory"}


@pytest.mark.parametrize(
    ("dtype", "einsum", "allowed"),
    [
        ("float32", 1e-6, 2e-6 + 64.5 * 2.0**-23),
        ("tf32", 1e-4, 2e-4 + 2.0**-11 + 64 * 2.0**-23),
        ("bfloat16", 1e-2, 2e-2 + 2.0**-8 + 64 * 2.0**-23),
    ],
)
def test_the_budget(dtype, einsum, allowed):
    yardstick = {"loss": einsum, "gradient": 3 * einsum}
    right = judge({"loss": 0.99 * allowed, "gradient": einsum}, yardstick, dtype)
    assert (right.error, right.budget_used) == ("", pytest.approx(0.99))
    wrong = judge({"loss": 1.01 * allowed, "gradient": einsum}, yardstick, dtype)
    assert wrong.error == f"wrong: the loss is {1.01 * allowed:.1e} from float64, allowed is {allowed:.1e}"
    for value in (float("nan"), float("inf")):
        check = judge({"loss": einsum, "gradient": value}, yardstick, dtype)
        assert check.rel_error is None and check.error == "wrong: the gradient has NaN or infinity"


def test_every_step_is_the_one_that_was_judged_of_the_same_weights():
    training = Training(workload(COMPLEX, "float32", **SMALL), CPU)
    arms = peers_for(ARMS, "cpu")
    for arm in arms:
        assert training.admit(arm).error == ""
        for _ in range(2):
            training.function(arm, "training step")()
    first, *others = (training.models[arm.name].state_dict() for arm in arms)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    exact, _ = training.yardsticks
    numbers = sum(p.numel() * (2 if p.is_complex() else 1) for p in training.models["own einsum"].parameters())
    assert exact["gradient of everything"].shape == (numbers,) and exact["loss of the tokens"].shape == (72,)


def test_a_step_gives_its_gradients_to_the_optimizer(monkeypatch):
    training, stepped = Training(workload(REAL, "float32", **SMALL), CPU), []

    class Noting(torch.optim.AdamW):
        def step(self):
            stepped.append(
                [parameter.grad.norm().item() for group in self.param_groups for parameter in group["params"]]
            )
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Noting)
    training.admit(OURS)
    step = training.function(OURS, "training step")
    step(), step()
    assert stepped[0] == stepped[1] and min(stepped[0]) > 0


def test_the_batch_is_padded_on_the_right():
    batch = Batch.of(workload(REAL, "float32", **SMALL), CPU)
    valid = batch.mask[:, 0, 0]
    assert batch.tokens.shape == batch.labels.shape == (3, 24)
    assert (valid[:, :-1] | ~valid[:, 1:]).all() and batch.valid == valid.sum() < 72
    assert torch.equal(batch.labels == -100, ~valid) and (batch.counting_padding().labels >= 0).all()
    assert len({int(row.sum()) for row in valid}) == len(batch.sequences()) == 3


def test_a_model_that_cannot_be_patched_fails_the_command(tmp_path, monkeypatch, capsys):
    def refuse(model):
        raise ValueError("no Attend here")

    monkeypatch.setattr(run, "ARMS", [replace(OURS, prepare=Arm(change=refuse))])
    monkeypatch.setattr(run, "workloads", lambda *_: [workload(REAL, "float32", **SMALL)])
    assert run.main(["--device=cpu", "--training", f"--out={tmp_path / 'x.json'}"]) == 1
    assert "flash_attend FAILED" in capsys.readouterr().err and "no Attend here" in (tmp_path / "x.md").read_text()


def test_workloads_have_names_of_their_own():
    for device in ("cpu", "cuda"):
        made = workloads(device)
        assert len({one.name for one in made}) == len(made) == 4
