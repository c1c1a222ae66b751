"""The tuner: what its arithmetic throws out, what it makes of times, and that a run which stops can go on."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="tuning needs Triton")

import tune
from cases import DTYPES, Case, make_inputs
from flash_attend.checks import normalise_inputs
from flash_attend.dispatch import HOPPER_HEAD_DIMS
from flash_attend.kernels import aot
from flash_attend.kernels.configs import HOPPER_ROWS, ROWS, VARIANTS, Tile, Tiles, mode_of, override, row_of
from gate import Check, Gate
from measure import numerics, stopwatch_for, summarise
from tune import Candidate, Question, Trial, Tuning

CASE = Case(batch=2, heads=2, kv_heads=2, queries=96, keys=96, head_dim=32, value_dim=32, causal=True)
QUESTION = Question("sm_90", "forward", CASE)
KINDS = {"half": "bfloat16", "tf32": "tf32", "tf32x3": "float32", "double": "float64"}
HEADER = dict(device="Some GPU", triton="3.7.1", torch="2.13.0", commit="0123456789abcdef", dirty=False)
HEADER["started"] = "2026-01-02T03:04:05+00:00"


def question(kernel: str = "forward", dtype: str = "bfloat16", arch: str = "sm_90", **case) -> Question:
    return Question(arch, kernel, replace(CASE, dtype=dtype, **case))


def asked(*arguments: str) -> Question:
    """The question of a command line."""
    return tune.parse([*arguments, "--arch", "sm_90"]).question


# ---------------------------------------------------------------------------------------------------------------------
# The question
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "key+causal", "dense", "causal+dropout", "key+grouped", "dense+causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_question_describes_the_call_that_is_measured(dtype: str, mode: str) -> None:
    """The kernels that are compiled are those of the public call on the tensors that are measured."""
    whole = asked("--kernel=forward", "--dim=40", "--value-dim=24", f"--dtype={dtype}", f"--mode={mode}", "--length=64")
    assert whole.mode == mode
    ratio = whole.case.heads // whole.case.kv_heads
    small = replace(whole, case=replace(whole.case, batch=2, heads=2 * ratio, kv_heads=2))
    inputs = make_inputs(small.case, torch.device("cpu"))
    with numerics(small.case.dtype):
        *_, spec = normalise_inputs(
            inputs.q, inputs.k, inputs.v, mask=inputs.mask, causal=small.case.causal, dropout_p=small.case.dropout_p
        )
    assert small.spec == spec
    assert inputs.grad_out.dtype == spec.dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel=sideways"], "invalid choice: 'sideways'"),
        (["--mode=causal+sparse"], "--mode is plain or words of key, dense, causal, dropout, grouped joined by +"),
        (["--mode=key+dense"], "a mask is key or dense, not both"),
        (["--dim=0"], "--dim must be at least 1, got 0"),
        (["--value-dim=0"], "--value-dim must be at least 1, got 0"),
        (["--length=0"], "--length must be at least 1, got 0"),
        (["--dim=257"], "d = 257 is beyond the kernels' 256"),
        (["--dim=160", "--dtype=float64"], "d = 160 is beyond the kernels' 128 in float64 mode"),
        (["--dtype=int8"], "invalid choice: 'int8'"),
        (["--arch=sm_75"], "invalid choice: 'sm_75'"),
        (["--limit=0"], "--limit must be at least 1, got 0"),
        (["--jobs=0"], "--jobs must be at least 1, got 0"),
        (["--resume"], "is not there to resume"),
        (["--backend=hopper_fused", "--kernel=backward_kv"], "hopper_fused launches no backward_kv"),
        (["--backend=triton", "--kernel=backward_fused"], "triton launches no backward_fused"),
        (["--backend=hopper", "--dim=80"], "d = 80 and dv = 80 are not the same one of 64, 128, 256"),
        (["--backend=hopper", "--arch=sm_80"], "the kernels are for sm_90, the part is sm_80"),
        (["--backend=math"], "invalid choice: 'math'"),
    ],
)
def test_bad_options(arguments: list[str], message: str, tmp_path, capsys) -> None:
    good = ["--kernel=forward", "--dim=64", "--arch=sm_90", f"--out={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        tune.main([*good, *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_part_must_be_named(capsys) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--kernel=forward", "--dim=64"])
    assert "name the part: --arch sm_80 | sm_89 | sm_90" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Candidates and arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def test_every_tile_of_the_space_is_looked_at_once_and_the_current_one_first() -> None:
    tiles = [candidate.tile for candidate in tune.enumerate_tiles(QUESTION)]
    assert tiles[0] == QUESTION.current
    assert len(tiles) == len(set(tiles)) == math.prod(map(len, tune.SPACE.values()))  # the current one is of the space
    loaded = [tune.loaded_per_pair(QUESTION, tile) for tile in tiles[1:]]
    assert loaded == sorted(loaded)


def test_another_tile_changes_one_kernel_and_the_schedule_with_it() -> None:
    tile = Tile(16, 16, 4, 1)
    tiles = question("backward_q").tiles_with(tile)
    assert tiles == QUESTION.tiles._replace(backward_q=tile)
    small = QUESTION.tiles._replace(backward_kv=tile, backward_q=tile)
    assert QUESTION.tiles_with(tile, small).schedule_block == (16, 32)


@pytest.mark.parametrize("row", [*ROWS.items(), *VARIANTS.items()], ids=lambda row: "-".join(map(str, row[0])))
def test_arithmetic_leaves_every_tile_of_the_table(row) -> None:
    """They are known to compile well, so a bound that throws one out is wrong."""
    (arch, kind, width, *_), tiles = row
    for kernel in filter(tiles._asdict().get, tune.LAUNCHED):
        about = question(kernel, KINDS[kind], arch, head_dim=width, value_dim=width)
        assert tune.why_pruned(about, getattr(tiles, kernel)) == ""


@pytest.mark.parametrize("backend", ["hopper", "hopper_fused"])
@pytest.mark.parametrize("dim", HOPPER_HEAD_DIMS)
def test_arithmetic_leaves_every_tile_for_hopper(dim: int, backend: str) -> None:
    for kernel in tune.KERNELS[backend == "hopper_fused"]:
        about = replace(question(kernel, head_dim=dim, value_dim=dim), backend=backend)
        if about.current is not None and about.launched.startswith("hopper"):
            candidates = tune.enumerate_tiles(about)
            assert tune.why_pruned(about, about.current) == ""
            assert candidates[0].tile == about.current
            fixed = set(Tile._fields) - set(tune.SPACES["hopper", kernel])
            assert all(
                getattr(each.tile, name) == getattr(about.current, name) for each in candidates for name in fixed
            )
            assert len(candidates) > 1


@pytest.mark.parametrize(
    ("arguments", "backend", "launched"),
    [
        (["--kernel=forward"], "triton", "forward"),
        (["--kernel=backward_q"], "triton", "backward_q"),
        (["--kernel=forward", "--backend=triton_fused"], "triton_fused", "forward"),
        (["--kernel=forward", "--backend=hopper"], "hopper", "hopper_forward"),
    ],
)
def test_a_question_is_about_the_kernel_that_the_backend_launches(arguments, backend, launched) -> None:
    about = asked("--dim=128", *arguments)
    assert (about.backend, about.launched) == (backend, launched)
    assert f"-{backend}-{about.kernel}-" in about.name
    assert about.as_json()["backend"] == backend


def test_the_kernel_of_a_fused_backward_is_asked_of_a_fused_backend() -> None:
    tiles = QUESTION.tiles._replace(backward_fused=Tile(64, 64, 8, 2))
    with override(tiles):
        about = asked("--kernel=backward_fused", "--dim=64")
        assert about.backend == "triton_fused"
        assert about.current == tiles.backward_fused


def test_what_cannot_fit_is_thrown_out() -> None:
    """By hand, for d 128 in bfloat16: what a thread sums, and what a block must hold."""
    about = question("backward_kv", head_dim=128, value_dim=128)
    # grad_k and grad_v, 128 x 128 each, and two score tiles of 128 x 128, among 128 threads of one 4-byte word each.
    assert tune.why_pruned(about, Tile(128, 128, 4, 1)) == "registers: sums and scores alone take 512 of a thread's 255"
    # k and v, 32 x 128 each, and three steps of q and the gradient, 128 x 128 each, of 2 bytes.
    shared = 2 * (2 * 32 * 128 + 3 * 2 * 128 * 128)
    on_a100 = replace(about, arch="sm_80")
    expected = f"shared memory: at least {shared} bytes, the part has 166912"
    assert tune.why_pruned(on_a100, Tile(128, 32, 8, 4)) == expected
    assert tune.why_pruned(about, Tile(128, 32, 8, 4)) == ""  # an H100 has more


@pytest.fixture
def ready_to_compile(tmp_path, monkeypatch) -> None:
    for name, value in dict(ALWAYS_COMPILE="1", DUMP_PTXAS_LOG="1", CACHE_DIR=str(tmp_path)).items():
        monkeypatch.setenv(f"TRITON_{name}", value)


@pytest.mark.parametrize(
    ("about", "tile"),
    [
        (question("forward", head_dim=64, value_dim=64), Tile(64, 64, 4, 3)),
        (question("backward_kv", arch="sm_80", head_dim=64, value_dim=64), Tile(32, 32, 4, 2)),
        (question("backward_q", "tf32", head_dim=32, value_dim=64), Tile(32, 16, 4, 2)),
    ],
    ids=lambda part: tune.label(part) if isinstance(part, Tile) else part.name,
)
def test_the_bounds_hold_in_compilations(about: Question, tile: Tile, ready_to_compile) -> None:
    """Bounds that are never above what the compiler takes, and of shared memory not far below."""
    case = aot.Case(about.arch, about.spec, about.tiles_with(tile))
    (report,) = aot.compile_case(case, [about.kernel])
    assert not report.problems()
    assert tune.least_registers(about, tile) + 57 <= report.registers
    bound = tune.least_shared_bytes(about, tile)
    assert bound <= report.shared_bytes <= 2 * bound


def test_resident_warps() -> None:
    tile = Tile(128, 64, 8, 2)
    for registers, shared, warps in [
        (128, 1023, 16),
        (129, 1023, 8),
        (255, 50000, 8),
        (64, 100000, 16),
        (64, 1023, 32),
    ]:
        candidate = Candidate(tile, registers=registers, shared_bytes=shared)
        assert tune.resident_warps(QUESTION, candidate) == warps


# ---------------------------------------------------------------------------------------------------------------------
# Times, proposals, and going on: on a device of fakes
# ---------------------------------------------------------------------------------------------------------------------

RIGHT = Check(0.003, 0.5, "all of it")
WRONG = Check(0.5, None, "all of it", error="wrong: out has NaN or infinity")


class FakeStopwatch:
    """Functions say themselves how long they take."""

    def sample(self, function, milliseconds: float) -> list[float]:
        return [function() * factor for factor in (0.99, 1.0, 1.01)]


class Device:
    """Tiles and what they do on it: milliseconds of the kernel, a `Check` that fails, or an exception."""

    def __init__(self, behaviour: dict[Tile, object], call: dict[Tile, float] | None = None) -> None:
        self.behaviour, self.call, self.admitted = behaviour, call or {}, []

    def admit(self, about: Question, tiles: Tiles, inputs, gate) -> Trial:
        tile = getattr(tiles, about.kernel)
        self.admitted.append(tile)
        does = self.behaviour[tile]
        if isinstance(does, Exception):
            raise does
        if isinstance(does, Check):
            return Trial(does, partial(float, 1), partial(float, 1))
        return Trial(RIGHT, partial(float, does), partial(float, self.call.get(tile, 100.0)))


def use(device: Device, monkeypatch) -> None:
    """Makes the tuner find this device. It judges its tiles itself: no gate is built."""
    monkeypatch.setattr(tune, "Gate", lambda inputs: None)
    monkeypatch.setattr(tune, "admit", device.admit)


CURRENT = QUESTION.current
FAST, SLOW, CLOSE, BAD, BROKEN = (
    CURRENT._replace(block_m=64, block_n=64, num_warps=4, num_stages=stages) for stages in (1, 2, 3, 4, 5)
)
BEHAVIOUR = {CURRENT: 10.0, FAST: 8.0, SLOW: 12.0, CLOSE: 9.9, BAD: WRONG, BROKEN: RuntimeError("out of resources")}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs the tuner's measuring on a fake device, in a space of its tiles, all of which compiled."""

    def run(device: Device, limit: int | None = None, tuning: Tuning | None = None) -> tuple[Tuning, tune.Bench]:
        use(device, monkeypatch)
        if tuning is None:
            monkeypatch.setattr(tune, "SPACE", dict.fromkeys(tune.SPACE, ()))
            tuning = Tuning(QUESTION, tmp_path / "tune.json", dict(HEADER))
            tuning.candidates = {
                tile: Candidate(tile, registers=200, spill_bytes=0, shared_bytes=1024, problems=())
                for tile in device.behaviour
            }
        bench = tune.Bench(QUESTION, torch.device("cpu"), FakeStopwatch())
        tune.measure_candidates(tuning, bench, limit)
        return tuning, bench

    return run


def nothing_elsewhere(tile: Tile) -> list[str]:
    return []


def test_the_fastest_right_tile_is_proposed_with_its_evidence(measured) -> None:
    tuning, bench = measured(Device(BEHAVIOUR, call={FAST: 98.0}))
    source = tune.propose(tuning, bench.compare_calls, nothing_elsewhere)
    *evidence, row = source.splitlines()
    assert [line.strip() for line in evidence] == [
        f"# forward {tune.label(FAST)}: 8 ms, before ({tune.label(CURRENT)}) 10 ms, spread 0.2 ms.",
        "# Whole call: 98 ms, before 100 ms, spread 2 ms.",
        "# bfloat16 b2 h2 s96 d32 causal on Some GPU, Triton 3.7.1, torch 2.13.0,",
        "# 2026-01-02, commit 0123456789.",
    ]
    assert eval(f"{{{row}}}", dict(Tile=Tile, Tiles=Tiles)) == {("sm_90", "half", 64): QUESTION.tiles_with(FAST)}
    assert all(len(line) <= 120 for line in source.splitlines())


def test_a_variant_is_proposed_where_the_mode_may_have_one() -> None:
    about = asked("--kernel=backward_q", "--dim=128", "--dtype=float32", "--mode=dense+dropout")
    row = tune.row_source(about, Tile(128, 128, 8, 3))
    assert row.startswith('    ("sm_90", "tf32x3", 128, "dense+dropout"): Tiles(')
    assert len(row) <= 120


def test_a_row_for_hopper_is_that_of_its_head_dim() -> None:
    about = asked("--kernel=forward", "--backend=hopper", "--dim=128", "--mode=key+causal")
    assert about.row == ("sm_90", "hopper", 128)
    assert tune.table_of(about) == "HOPPER_ROWS"
    row = tune.row_source(about, Tile(128, 64, 4, 2))
    assert eval(f"{{{row}}}", dict(Tile=Tile, Tiles=Tiles)) == {
        128: HOPPER_ROWS[128]._replace(forward=Tile(128, 64, 4, 2))
    }
    assert {case.backend for case in about.served()} == {"hopper"}
    assert {case.spec.head_dim for case in about.served()} == {128}


def test_a_tile_of_the_fused_backward_is_a_row_of_its_own() -> None:
    with override(QUESTION.tiles._replace(backward_fused=Tile(64, 64, 8, 2))):
        about = asked("--kernel=backward_fused", "--dim=64", "--mode=dropout")
        assert tune.table_of(about) == "FUSED_VARIANTS"
        source = tune.row_source(about, FAST)
    assert eval(f"{{{source}}}", dict(Tile=Tile)) == {("sm_90", "half", 64, "dropout"): FAST}


def test_a_measured_row_names_its_file() -> None:
    line = tune.measured_source(QUESTION, tune.RESULTS / "some-gpu" / "tune-x.json")
    assert eval(f"{{{line}}}") == {("sm_90", "half", 64): "benchmarks/results/some-gpu/tune-x.json"}


def test_a_gain_within_the_spread_is_no_gain(measured) -> None:
    tuning, bench = measured(Device({CURRENT: 10.0, CLOSE: 9.9, SLOW: 12.0}))
    assert tuning.candidates[CLOSE].ratio() == pytest.approx(0.99)
    assert tune.propose(tuning, bench.compare_calls, nothing_elsewhere) == ""


def test_the_spread_is_that_of_samples_and_that_of_rounds() -> None:
    steady, drifting = summarise([[10.0, 10.0, 10.0]] * 2), summarise([[10.0] * 3, [10.0] * 3, [11.0] * 2])
    assert tune.spread(steady, steady) == 0
    assert tune.spread(steady, drifting) == 1.0
    assert tune.spread(summarise([[8.0, 10.0, 12.0]] * 2)) == pytest.approx(2.0, rel=0.6)


def test_a_wrong_or_failing_tile_is_not_timed(measured) -> None:
    tuning, bench = measured(Device({**BEHAVIOUR, FAST: WRONG}))
    for tile, error in [
        (FAST, WRONG.error),
        (BAD, WRONG.error),
        (BROKEN, "RuntimeError: out of resources"),
    ]:
        candidate = tuning.candidates[tile]
        assert (candidate.error, candidate.samples) == (error, None)
        assert error in tune.table(tuning)
    assert tune.propose(tuning, bench.compare_calls, nothing_elsewhere) == ""


def test_nothing_is_measured_beside_a_current_tile_that_is_wrong(measured) -> None:
    with pytest.raises(RuntimeError, match=f"the current tile {tune.label(CURRENT)} is wrong: out has NaN"):
        measured(Device({**BEHAVIOUR, CURRENT: WRONG}))


def test_a_device_that_is_past_use_ends_the_run(measured, monkeypatch) -> None:
    """Or every tile after the one that broke it would be recorded as failing."""

    def synchronize(device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tune, "synchronize", synchronize)
    device = Device({CURRENT: 10.0, BROKEN: RuntimeError("an illegal memory access"), FAST: 8.0})
    with pytest.raises(RuntimeError, match="was encountered"):
        measured(device)
    assert device.admitted == [CURRENT, BROKEN]


def test_what_fails_elsewhere_or_slows_the_whole_call_is_refused(measured) -> None:
    second = Tile(32, 32, 4, 1)
    third = Tile(32, 32, 4, 2)
    device = Device({CURRENT: 10.0, FAST: 7.0, second: 8.0, third: 8.5}, call={second: 103.0, third: 99.0})
    tuning, bench = measured(device)

    def elsewhere(tile: Tile) -> list[str]:
        return ["plain: spills 8 bytes"] if tile == FAST else []

    source = tune.propose(tuning, bench.compare_calls, elsewhere)
    assert source.startswith("    # forward 32x32 w4 s2")
    assert tuning.candidates[FAST].refused == "plain: spills 8 bytes"
    assert tuning.candidates[second].refused == "the whole call takes 103 ms, before 100 ms"


def test_a_run_goes_on_where_it_stopped(measured, monkeypatch) -> None:
    first = Device(BEHAVIOUR)
    tuning, _ = measured(first, limit=2)
    assert first.admitted == [CURRENT, FAST, SLOW]

    resumed = Tuning(QUESTION, tuning.path, dict(HEADER, started="2026-01-03T00:00:00+00:00"))
    resumed.candidates = {tile: Candidate(tile) for tile in BEHAVIOUR}
    resumed.resume()
    assert resumed.candidates == tuning.candidates
    second = Device(BEHAVIOUR)
    measured(second, tuning=resumed)
    assert second.admitted == [CURRENT, CLOSE, BAD, BROKEN]
    third = Device(BEHAVIOUR)
    measured(third, tuning=resumed)
    assert third.admitted == [CURRENT], "wrong and failing tiles are not tried again"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loaded: loaded["header"].update(triton="3.6.0"), "triton: '3.6.0', now '3.7.1'"),
        (lambda loaded: loaded["header"]["question"].update(kernel="backward_q"), "'kernel': 'backward_q'"),
        (lambda loaded: loaded["candidates"][0].pop("tile"), "does not hold a tuning of this version"),
        (lambda loaded: loaded.pop("header"), "does not hold a tuning of this version"),
    ],
)
def test_another_question_or_environment_is_not_gone_on_with(change, message: str, tmp_path) -> None:
    tuning = Tuning(QUESTION, tmp_path / "tune.json", dict(HEADER))
    tuning.save()
    tuning.resume()
    loaded = json.loads(tuning.path.read_text())
    change(loaded)
    tuning.path.write_text(json.dumps(loaded))
    with pytest.raises(ValueError, match=message):
        tuning.resume()


def compiled_well(tasks, jobs=None):
    """In place of `aot.compile_tasks`."""
    for index, (case, kernels) in enumerate(tasks):
        (kernel,) = kernels
        yield index, [aot.Report(kernel, case.arch, "d32", 200, 0, 1024, tensor_core_instructions=8, triton="3.7.1")]


@pytest.mark.parametrize(("milliseconds", "proposed"), [(8.0, True), (9.9, False)])
def test_measuring_from_end_to_end(milliseconds, proposed, tmp_path, monkeypatch, capsys) -> None:
    """The whole command, but for the device and the compiler."""
    options = argparse.Namespace(
        question=QUESTION,
        path=tmp_path / "tune.json",
        device=torch.device("cpu"),
        arch=None,
        limit=None,
        jobs=1,
        resume=False,
    )
    monkeypatch.setattr(tune, "parse", lambda arguments: options)
    monkeypatch.setattr(tune, "SPACE", dict(block_m=(64,), block_n=(64,), num_warps=(4,), num_stages=(1, 2, 4)))
    monkeypatch.setattr(aot, "compile_tasks", compiled_well)
    use(Device(BEHAVIOUR | {FAST: milliseconds}), monkeypatch)
    assert tune.main([], FakeStopwatch()) == 0

    printed = capsys.readouterr().out
    assert "4 tiles; thrown out by arithmetic: none; compiled: 4, of which 4 without a problem" in printed
    ordered = [line.split("  ")[0] for line in printed.splitlines()[2:6]]
    assert ordered[:2] == [tune.label(FAST), tune.label(SLOW)], "those that were timed, the fastest first"
    saved = json.loads(options.path.read_text())
    assert ("For ROWS in kernels/configs.py:" in printed) == proposed
    assert ("And, once tune.json is committed, for MEASURED:" in printed) == proposed
    assert ("No row is proposed" in printed) == (not proposed)
    assert bool(saved["header"]["proposal"]) == proposed
    assert saved["header"]["proposal"] in printed
    samples = {tuple(one["tile"]): one["samples"] for one in saved["candidates"]}
    assert [len(taken) for taken in samples[FAST]] == [3] * tune.ROUNDS
    assert samples[BAD] is None


def test_an_interrupted_run_leaves_a_file_to_go_on_with(tmp_path, monkeypatch, capsys) -> None:
    def interrupted(tasks, jobs):
        yield next(compiled_well(tasks))
        raise KeyboardInterrupt

    command = ["--kernel=forward", "--dim=64", "--arch=sm_90", "--limit=2", f"--out={tmp_path}"]
    monkeypatch.setattr(aot, "compile_tasks", interrupted)
    assert tune.main(command) == 130
    assert "--resume goes on" in capsys.readouterr().err
    monkeypatch.setattr(aot, "compile_tasks", compiled_well)
    assert tune.main([*command, "--resume"]) == 0
    assert "compiled: 3, of which 3 without a problem" in capsys.readouterr().out


def test_a_row_is_compiled_in_every_call_that_it_serves() -> None:
    """That of the plain mode serves each mode without a variant of its own; a new variant one mode alone."""
    plain = question(head_dim=256, value_dim=256)
    modes = {mode_of(case.spec) for case in plain.served()}
    own = {mode for mode in ("", "dense", "dropout", "dense+dropout") if (*plain.row, mode) not in VARIANTS}
    assert modes >= own != {""}
    assert {case.tiles.forward for case in plain.served()} == {plain.current}
    assert {row_of(case.spec) for case in plain.served()} == {("half", 256)}
    widths = {(case.spec.head_dim, case.spec.value_dim) for case in question(head_dim=64, value_dim=64).served()}
    assert widths == {(64, 64), (40, 40), (32, 64)}
    dense = question(head_dim=96, value_dim=96, mask="documents", valid=0.25)
    assert ("sm_90", "half", 96, "dense") not in VARIANTS
    assert [mode_of(case.spec) for case in dense.served()] == ["dense"]
    assert "dense" in {mode_of(case.spec) for case in question(head_dim=96, value_dim=96).served()}


# ---------------------------------------------------------------------------------------------------------------------
# Without a GPU, from end to end; and the kernels themselves, in the interpreter
# ---------------------------------------------------------------------------------------------------------------------


def test_compiling_only(tmp_path, monkeypatch, capsys) -> None:
    """A space of three tiles, one of which arithmetic throws out; then nothing is left to compile."""
    space = dict(block_m=(128,), block_n=(32, 128), num_warps=(4,), num_stages=(1,))
    monkeypatch.setattr(tune, "SPACE", space)
    command = ["--kernel=backward_q", "--dim=64", "--arch=sm_90", "--jobs=1", f"--out={tmp_path}"]
    assert tune.main(command) == 0
    printed = capsys.readouterr().out
    assert "3 tiles; thrown out by arithmetic: 1 by registers; compiled: 2, of which 2 without a problem" in printed
    assert "Nothing was measured" in printed
    about = asked("--kernel=backward_q", "--dim=64")
    small, large = (about.current._replace(block_m=128, block_n=keys, num_warps=4, num_stages=1) for keys in (32, 128))
    assert [line.split("  ")[0] for line in printed.splitlines()[2:4]] == [
        tune.label(about.current),
        tune.label(small),
    ]

    (path,) = tmp_path.glob("*.json")
    assert path.name == "tune-sm_90-triton-backward_q-bfloat16-d64-plain-s4096.json"
    current, *others = map(Candidate.from_json, json.loads(path.read_text())["candidates"])
    assert current.tile == about.current
    pruned, compiled = sorted(others, key=lambda candidate: candidate.survives)
    assert (pruned.tile, pruned.registers) == (large, None)
    assert pruned.pruned.startswith("registers: ")
    assert (compiled.tile, compiled.spill_bytes, compiled.samples) == (small, 0, None)

    with pytest.raises(SystemExit):
        tune.main(command)
    assert "exists: --resume goes on with it" in capsys.readouterr().err
    monkeypatch.setattr(aot, "compile_tasks", None)  # nothing is compiled again
    assert tune.main([*command, "--resume"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.interpreter
@pytest.mark.parametrize("kernel", tune.KERNELS[False])
def test_a_trial_repeats_the_one_kernel_of_a_right_call(kernel: str) -> None:
    """On the tensors of the call: what the kernel wrote is written again, the same, and nothing else is."""
    about = question(kernel, "float16", mask="right", valid=0.5, batch=1, heads=1, kv_heads=1, queries=40, keys=40)
    inputs = make_inputs(about.case, torch.device("cpu"))
    tiles = Tiles(Tile(16, 32, 4, 2), Tile(32, 16, 4, 2), Tile(16, 16, 4, 1))
    trial = tune.admit(about, tiles, inputs, Gate(inputs))
    assert trial.check.passed, trial.check.error
    assert trial.check.checked == "all of it"

    (own,) = trial.kernel.args[0]
    assert (own.prepared.choices["BLOCK_M"], own.prepared.choices["BLOCK_N"]) == getattr(tiles, kernel)[:2]
    launches = trial.call.args[0]
    names = [one.prepared.kernel.__name__ for one in launches]
    assert names == ["key_schedule_kernel", "forward_kernel", "delta_kernel", "backward_kv_kernel", "backward_q_kernel"]

    tensors = [x for one in launches for x in one.tensors if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]
    written = {"forward": own.tensors[3:5], "backward_kv": own.tensors[4:6], "backward_q": own.tensors[4:5]}
    for x in written[kernel]:
        x.fill_(7.0)
    trial.kernel()
    for x, same in zip(tensors, before, strict=True):
        assert torch.equal(x, same)


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_tiles_are_measured_by_a_real_stopwatch(device: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tune, "ROUNDS", 2)
    monkeypatch.setattr(tune, "MILLISECONDS", 0.0)
    about = question("forward", "float16", batch=1, heads=1, kv_heads=1, queries=40, keys=40)
    tuning = Tuning(about, tmp_path / "tune.json", dict(HEADER))
    tile = Tile(32, 32, 4, 1)
    tuning.candidates = {at: Candidate(at, problems=()) for at in (about.current, tile)}
    bench = tune.Bench(about, torch.device(device), stopwatch_for(torch.device(device)))
    tune.measure_candidates(tuning, bench, None)
    candidate = tuning.candidates[tile]
    assert not candidate.error
    assert len(candidate.samples) == len(candidate.current_samples) == 2
    assert all(sample > 0 for taken in candidate.samples for sample in taken)
    assert 0 < candidate.rel_error < torch.finfo(torch.float16).eps
