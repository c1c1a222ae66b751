"""The end-to-end benchmark: its arms agree, a wrong one gets no time, one that cannot run is listed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from clients import serve_by
from matplotlib import image

import train_step
from flash_attend import flash_attention
from measure import summarise
from train_step import Arm, Batch, Gate, Plan, Row, Training, Workload, arms_for, judge, measure_workload

pytestmark = pytest.mark.filterwarnings("ignore:.*sdp_kernel.*")  # what the client's flash path calls

CPU = torch.device("cpu")
OURS = "flash_attend math"
ARMS = ["own einsum", "own flash", "own flash, no mask", OURS]
SIZES = dict(dim=16, depth=2, heads=2, length=24, batch=3)
SMALL = ["--device=cpu", "--quick", "--rounds=2", *(f"--{name}={size}" for name, size in SIZES.items())]
PLAN = Plan("quick", rounds=2, milliseconds=1.0)


@pytest.fixture(autouse=True)
def one_thread():
    """Small models gain nothing from more, and wait for them where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class CountingStopwatch:
    """Calls a function once, and says that it took 1, 2, 3... ms."""

    def __init__(self) -> None:
        self.calls = 0

    def sample(self, function, milliseconds):
        function()
        self.calls += 1
        return [float(self.calls)]


class Bar:
    """As much of a progress bar as is moved."""

    def __init__(self, total: int) -> None:
        self.n, self.total, self.descriptions = 0, total, []

    def update(self) -> None:
        self.n += 1

    def set_description(self, text: str) -> None:
        self.descriptions.append(text)


def workload(model: str = "padded", **changes) -> Workload:
    common = dict(dtype="float32", complete_complex=False, device="cpu", seed=0)
    return Workload(model=model, **SIZES | common | changes)


def measure(arms: list[Arm] | None = None, **changes) -> dict[str, Row]:
    """The rows of a small workload by arm, with told times."""
    arms = arms or arms_for(CPU)
    bar = Bar(train_step.count_samples(arms, PLAN))
    rows = measure_workload(workload(**changes), arms, PLAN, CountingStopwatch(), bar)
    assert bar.n == bar.total
    return {row.peer: row for row in rows}


# ---------------------------------------------------------------------------------------------------------------------
# The whole of it
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(train_step.PLANS, "quick", Plan("quick", 3, milliseconds=10.0))
    path = tmp_path / "new folder" / "steps.json"
    assert train_step.main([*SMALL, "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "this says nothing about a GPU" in printed
    for arm in ARMS:
        assert sum(line.startswith(f"{arm}  ") for line in printed.splitlines()) == 2  # a table of each model

    written = json.loads(path.read_text())
    assert written["header"].keys() >= {"device", "torch", "commit", "started", "ended", "preset", "clocks_before"}
    assert [row["peer"] for row in written["rows"]] == 2 * ARMS
    for row in written["rows"]:
        assert row["error"] == ""
        assert row["budget_used"] <= 1
        assert row["mask"] == f"right{100 * row['valid_tokens'] / row['tokens']:.0f} causal"
        assert len(row["samples"]) == 2
        found = summarise(row["samples"])
        assert row["ms_median"] == pytest.approx(found.median, rel=1e-4)
        assert row["ms_iqr"] == pytest.approx(found.iqr, rel=1e-3, abs=1e-4 * found.median)
        assert row["valid_tokens_per_s"] == pytest.approx(1e3 * row["valid_tokens"] / found.median, rel=1e-4)
        assert row["tokens_per_s"] == pytest.approx(1e3 * 72 / found.median, rel=1e-4)
    assert image.imread(path.with_suffix(".png")).std() > 0


def test_the_arms_take_turns():
    rows = measure()
    # Each has a first sample by which its rounds are measured; then A B C D, D C B A.
    assert [row.samples for row in rows.values()] == [((5,), (12,)), ((6,), (11,)), ((7,), (10,)), ((8,), (9,))]
    assert {row.ms_median for row in rows.values()} == {8.5}


@pytest.mark.parametrize(
    ("model", "options", "shape"),
    [
        ("padded", dict(dtype="bfloat16"), (3, 2, 2, 24, 24, 8, 8)),
        ("complex", dict(dtype="tf32"), (3, 2, 2, 24, 24, 64, 64)),
        ("complex", dict(complete_complex=True), (12, 2, 2, 24, 24, 32, 64)),
    ],
)
def test_all_arms_agree(monkeypatch, model, options, shape):
    """In every precision; and `shape` is what the Attend gets."""
    seen = set()

    def watched(q, k, v, **rest):
        batch, heads, queries, dim = q.shape
        seen.add((batch, heads, k.shape[1], queries, k.shape[2], dim, v.shape[3]))
        return flash_attention(q, k, v, **rest)

    serve_by(monkeypatch, watched)
    rows = measure(model=model, **options)
    assert list(rows) == ARMS
    assert {row.error for row in rows.values()} == {""}
    assert all(0 < row.rel_error < 0.02 for row in rows.values())
    assert {row.shape for row in rows.values()} == {shape}
    assert shape in seen
    assert len({row.case for row in rows.values()}) == 1


def test_the_models_and_precisions_have_names_of_their_own():
    variants = [
        workload(),
        workload(dtype="bfloat16"),
        workload("complex"),
        workload("complex", complete_complex=True),
        *(workload(**{name: 2 * size}) for name, size in SIZES.items()),
    ]
    assert len({variant.name for variant in variants}) == len(variants)


def test_autocast_reaches_our_attend(monkeypatch):
    seen = []

    def watched(q, k, v, **rest):
        seen.append(q.dtype)
        return flash_attention(q, k, v, **rest)

    serve_by(monkeypatch, watched)
    Training(workload(dtype="bfloat16"), arms_for(CPU)[-1]).step()
    assert seen == 2 * [torch.bfloat16]


def test_every_arm_starts_from_the_same_weights_and_takes_the_same_batch():
    for model in ("padded", "complex"):
        first, *others = (Training(workload(model), arm) for arm in arms_for(CPU))
        for other in others:
            assert first.model.state_dict().keys() == other.model.state_dict().keys()
            pairs = zip(first.model.state_dict().values(), other.model.state_dict().values(), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)
            assert torch.equal(first.batch.tokens, other.batch.tokens)
            assert torch.equal(first.batch.labels, other.batch.labels)


def test_a_step_trains():
    training = Training(workload(), arms_for(CPU)[-1])
    before = training.loss().item()
    for _ in range(5):
        training.step()
    assert training.loss().item() < 0.99 * before


# ---------------------------------------------------------------------------------------------------------------------
# Right first
# ---------------------------------------------------------------------------------------------------------------------


def wrong_scale(q, k, v, **options):
    return flash_attention(q, k, v, **options | {"scale": 0.9 * q.shape[-1] ** -0.5})


def wrong_causal(q, k, v, **options):
    return flash_attention(q, k, v, **options | {"causal": False})


def wrong_mask(q, k, v, **options):
    return flash_attention(q, k, v, **options | {"mask": None})


def wrong_gradient(q, k, v, **options):
    return flash_attention(q, k.detach(), v, **options)


def not_a_number(q, k, v, **options):
    return flash_attention(q, k, v, **options) * float("nan")


WRONG = [wrong_scale, wrong_causal, wrong_mask, wrong_gradient, not_a_number]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", [dict(), dict(dtype="bfloat16"), dict(model="complex"), dict(complete_complex=True)])
def test_a_wrong_attend_is_told_and_not_timed(monkeypatch, kind, wrong):
    kind = kind | {"model": "complex"} if "complete_complex" in kind else kind
    serve_by(monkeypatch, wrong)
    rows = measure(**kind)
    row = rows.pop(OURS)
    assert row.error.startswith("wrong: the ")
    assert row.ms_median is row.valid_tokens_per_s is row.tokens_per_s is row.peak_bytes is None
    assert row.samples == ()
    assert all(other.error == "" and other.ms_median for other in rows.values())


def test_a_wrong_arm_of_ours_fails_the_command(monkeypatch, tmp_path, capsys):
    serve_by(monkeypatch, not_a_number)
    path = tmp_path / "x.json"
    assert train_step.main([*SMALL, "--model=padded", "--out", str(path)]) == 1
    assert f"{OURS}: wrong: the loss of the tokens has NaN or infinity" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"][-1]["ms_median"] is None  # which no NaN could be written into
    assert path.with_suffix(".png").exists()


def test_only_the_padding_shows_that_the_mask_is_heeded(monkeypatch):
    """Hence the arm without a mask, and the second loss for the others."""
    made = workload()
    gate = Gate(made)
    serve_by(monkeypatch, wrong_mask)
    masked = arms_for(CPU)[-1]
    assert "with the padding counted" in gate.check(Training(made, masked)).error
    assert gate.check(Training(made, replace(masked, masked=False))).error == ""


def test_training_that_diverges_is_told(monkeypatch):
    monkeypatch.setattr(train_step, "LEARNING_RATE", 1e30)
    rows = measure()
    assert {row.error for row in rows.values()} == {"wrong: the loss is not finite after the training"}
    assert {row.ms_median for row in rows.values()} == {None}


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
    assert right.rel_error == pytest.approx(max(0.99 * allowed, einsum))
    wrong = judge({"loss": 1.01 * allowed, "gradient": einsum}, yardstick, dtype)
    assert wrong.error == f"wrong: the loss is {1.01 * allowed:.1e} from float64, allowed is {allowed:.1e}"
    for value in (float("nan"), float("inf")):
        check = judge({"loss": einsum, "gradient": value}, yardstick, dtype)
        assert (check.rel_error, check.budget_used) == (None, None)
        assert check.error == "wrong: the gradient has NaN or infinity"


def test_the_answers_are_every_loss_and_every_gradient():
    made = workload("complex")
    model = train_step.build(made, flash=False)
    answers = train_step.first_step(model, [Batch.of(made)], "float32")
    assert answers["loss of the tokens"].shape == (72,)
    numbers = sum(parameter.numel() * (2 if parameter.is_complex() else 1) for parameter in model.parameters())
    assert answers["gradient of everything"].shape == (numbers,)
    assert answers["gradient of net.layers.*.*.to_q.weight"].shape == (2 * 2 * 16 * 64,)  # layers, parts
    assert all(len(answer) >= 64 for answer in answers.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sequences_add_up_to_their_batch():
    made = workload()
    batch = Batch.of(made)
    model = train_step.build(made, flash=False)
    with train_step.in_float64(model):
        whole = train_step.all_answers(model, [batch], "float64")
        parts = train_step.all_answers(model, batch.sequences(), "float64")
    assert max(train_step.distances(parts, whole).values()) < 1e-13
    assert len(batch.sequences()) == 3


def test_the_batch():
    batch = Batch.of(workload())
    valid = batch.mask[:, 0, 0]
    lengths = valid.sum(dim=1)
    assert batch.tokens.shape == batch.labels.shape == (3, 24)
    assert batch.valid == lengths.sum() < 72
    assert len(lengths.unique()) > 1
    assert ((batch.labels == -100) == ~valid).all()
    for tokens, labels, length in zip(batch.tokens, batch.labels, lengths, strict=True):
        assert torch.equal(tokens[1:length], labels[: length - 1])
        assert not tokens[length:].any()
    counted = batch.counting_padding().labels
    assert torch.equal(counted[valid], batch.labels[valid])
    assert not counted[~valid].any()
    assert Batch.of(workload(), masked=False).mask is None


def out_of_memory(name: str, batch: int, original, model, given, dtype):
    if dtype == name and len(given.tokens) >= batch:
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB.\nmore")
    return original(model, given, dtype)


def test_where_einsum_does_not_fit_it_is_measured_in_parts(monkeypatch):
    made = workload()
    whole = Gate(made)
    monkeypatch.setattr(train_step, "token_losses", partial(out_of_memory, "float32", 2, train_step.token_losses))
    parts = Gate(made)
    assert whole.checked.endswith("on the whole batch")
    assert parts.checked.endswith("a sequence at a time")
    assert parts.einsum.keys() == whole.einsum.keys()
    assert all(0 < parts.einsum[name] < 10 * error for name, error in whole.einsum.items())


def test_arms_that_fit_alone_only_are_not_timed():
    class FullStopwatch:
        def sample(self, function, milliseconds):
            raise torch.OutOfMemoryError("Tried to allocate 20 GiB.\nmore")

    rows = measure_workload(workload(), arms_for(CPU), PLAN, FullStopwatch(), Bar(0))
    assert {row.error for row in rows} == {"beside the others: OutOfMemoryError: Tried to allocate 20 GiB."}
    assert {row.ms_median for row in rows} == {None}


def test_what_cannot_be_checked_is_not_timed(monkeypatch):
    monkeypatch.setattr(train_step, "token_losses", partial(out_of_memory, "float64", 1, train_step.token_losses))
    rows = measure()
    assert list(rows) == ARMS
    assert {row.error for row in rows.values()} == {"not checked: OutOfMemoryError: Tried to allocate 20 GiB."}


# ---------------------------------------------------------------------------------------------------------------------
# Arms that cannot run, and what a GPU has
# ---------------------------------------------------------------------------------------------------------------------


def test_an_arm_that_raises_is_listed(monkeypatch, tmp_path, capsys):
    def fail(*inputs, **options):
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    monkeypatch.setattr("complex_valued_transformer.attend.Attend.flash_attn", fail)
    path = tmp_path / "x.json"
    assert train_step.main([*SMALL, "--model=complex", "--out", str(path)]) == 0  # ours ran
    told = "RuntimeError: No available kernel. Aborting execution."
    assert f"own flash: {told}\nown flash, no mask: {told}\n" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [row["error"] for row in rows] == ["", told, told, ""]
    assert [row["ms_median"] is None for row in rows] == [False, True, True, False]


def test_the_arms_of_a_gpu():
    """Here its kernels refuse; they are never replaced by the einsum path."""
    arms = arms_for(torch.device("cuda"))
    for model in ("padded", "complex"):
        rows = measure(arms, model=model)
        assert [row.peer for row in rows.values() if not row.error] == [arm.name for arm in arms[:-1]]
        assert rows["flash_attend"].error.startswith("BackendUnavailable: ")
        assert rows["flash_attend"].ms_median is None


@pytest.mark.parametrize("model", ["padded", "complex"])
def test_every_kernel_is_allowed(monkeypatch, model):
    from complex_valued_transformer.attend import Attend, EfficientAttentionConfig

    made = train_step.build(workload(model), flash=True)
    attends = [module for module in made.modules() if isinstance(module, Attend)] or train_step.held_attends(made)
    assert len(attends) == 2
    for attend in attends:
        attend.cuda_config = EfficientAttentionConfig(True, False, False)  # what it takes on A100 and H100
    train_step.allow_every_kernel(made)
    assert [attend.cuda_config for attend in attends] == 2 * [EfficientAttentionConfig(True, True, True)]


def test_memory_is_that_of_the_whole_step(monkeypatch, tmp_path):
    monkeypatch.setattr(train_step, "peak_bytes", lambda function, device: function() or 10**6)
    rows = measure()
    weights = sum(x.nbytes for x in train_step.build(workload(), flash=False).parameters())
    for row in rows.values():
        assert row.peak_bytes - 10**6 == pytest.approx(3 * weights, rel=0.01)  # Adam's moments, and its step counts
    assert " 1.2  " in train_step.tabulate(list(rows.values()))  # MB
    train_step.draw(list(rows.values()), "", tmp_path / "both.png")
    one = [replace(row, peak_bytes=None) for row in rows.values()]
    train_step.draw(one, "", tmp_path / "one.png")
    sizes = [image.imread(tmp_path / f"{name}.png").shape[1] for name in ("both", "one")]
    assert sizes[0] > sizes[1]  # no empty axes


def test_without_einsum_there_is_no_speed_up():
    rows = measure([arms_for(CPU)[1]])
    assert train_step.tabulate(list(rows.values())).splitlines()[-1].split()[-2] == "n/a"


def test_an_interrupted_run_keeps_the_models_that_it_measured(monkeypatch, tmp_path):
    original = train_step.measure_workload

    def interrupted(made, *rest):
        if made.model == "complex":
            raise KeyboardInterrupt
        return original(made, *rest)

    monkeypatch.setattr(train_step, "measure_workload", interrupted)
    path = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt):
        train_step.main([*SMALL, "--out", str(path)])
    assert [row["peer"] for row in json.loads(path.read_text())["rows"]] == ARMS
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--depth", "0"], "--depth: must be at least 1, got 0"),
        (["--length", "1"], "--length: must be at least 2, got 1"),
        (["--rounds", "many"], "--rounds: a whole number is needed, got 'many'"),
        (["--model", "gpt"], "--model: invalid choice: 'gpt'"),
        (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 is not for complex numbers: add --model padded"),
        (["--dim", "15"], "--dim must be a multiple of --heads, got 15 and 2"),
        (["--complete-complex", "--model", "padded"], "--complete-complex is an option of the complex model"),
        (["--device", "gpu"], "--device: no device 'gpu'"),
        (["--out", "x.csv"], "--out must end in .json, got x.csv"),
    ],
)
def test_bad_options_are_named(capsys, options, told):
    with pytest.raises(SystemExit) as ended:
        train_step.main([*SMALL, *options])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_missing_client_is_named(monkeypatch, capsys):
    monkeypatch.setattr(train_step.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train_step.main(SMALL)
    assert "complex-valued-transformer, whose Attend is measured, is not installed" in capsys.readouterr().err


def test_a_sequence_longer_than_the_text_is_named(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(SystemExit, match="--length must be below the text's"):
        train_step.main([*SMALL, "--length=100000000", "--out", str(path)])
    assert not path.exists()


def test_defaults_suit_the_device_and_the_model():
    (padded, client), plan, path = train_step.parse_arguments(["--device=cpu", "--depth=7", "--complete-complex"])
    assert (padded.model, client.model) == ("padded", "complex")
    assert (padded.complete_complex, client.complete_complex) == (False, True)
    assert padded.depth == client.depth == 7
    assert padded.dim == train_step.SIZES["cpu", "padded"]["dim"] != client.dim
    assert (plan.preset, path) == ("standard", None)
    assert set(train_step.SIZES) == {(device, model) for device in ("cpu", "cuda") for model in ("padded", "complex")}
    for (_, model), sizes in train_step.SIZES.items():
        assert sizes["dtype"] in train_step.MODEL_DTYPES[model]
