"""The benchmark's command, with fake peers and a fake clock: what is measured, kept, gone on with and refused."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

import measure
import results as reporting
import run
from cases import BOTH, DETERMINISTIC, FORWARD, Case, select_cases
from flash_attend import flash_attention
from peers import PEERS, Peer, Unserved
from results import Results
from train_step import workloads

CASES = [
    Case(2, 4, length, length, 32, 32, 4, "float32", causal=True, passes=(FORWARD, BOTH), group="a group")
    for length in (128, 32, 33)
]


def sample(function, milliseconds, times=(2.0, 4.0, 3.0)):
    function()
    return list(times)


def attention(inputs, **changed):
    """The call of a case, as the einsum path computes it."""
    case = inputs.case
    return partial(flash_attention, **dict(mask=inputs.mask, causal=case.causal, backend="math") | changed)


ENTERED = []


@contextmanager
def within():
    """What `attention_within` needs to be in."""
    ENTERED.append(True)
    try:
        yield
    finally:
        ENTERED.pop()


def attention_within(inputs):
    """Runs only within its peer's context."""

    def attend(*leaves):
        assert ENTERED == [True]
        return attention(inputs)(*leaves)

    return attend


def unserved(inputs):
    raise Unserved("needs a licence")


def fails_late(inputs):
    """Passes the gate, and then fails."""
    calls = iter(range(100))

    def attend(q, k, v):
        if next(calls) > 0:
            raise RuntimeError("the second call\nwith a second line")
        return attention(inputs)(q, k, v)

    return attend


FAKES = {
    peer.name: peer
    for peer in (
        Peer("right", "is right", attention_within, ours=True, served=lambda inputs: "by hand", within=within),
        Peer("wrong", "is wrong", partial(attention, scale=0.5)),
        Peer("unserved", "serves nothing", unserved),
        Peer("fails late", "fails", fails_late),
    )
}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the command on fake peers; returns its exit code and the results."""
    path = tmp_path / "cpu.json"
    monkeypatch.setattr(reporting, "draw", lambda results: [])

    def bench(*options, peers=tuple(FAKES), sample=sample, cases=CASES[:1]) -> tuple[int, Results]:
        monkeypatch.setattr(run, "PEERS", [FAKES[name] for name in peers])
        monkeypatch.setattr(run, "select_cases", lambda *_: cases)
        code = run.main(["--device=cpu", "--quick", f"--out={path}", *options], sample=sample)
        return code, Results.load(path)

    return bench


def test_a_run_measures_what_is_right_and_says_why_not(bench, capsys):
    code, results = bench()
    assert code == 0 and results.header["complete"] and results.header["device"] == "cpu"
    case = CASES[0]
    assert list(results.rows) == [(case.name, name, peer) for name in (FORWARD, BOTH) for peer in FAKES]
    by_peer = {row["peer"]: row for row in results if row["pass"] == FORWARD}

    right = by_peer["right"]
    assert right["samples"] == [[2.0, 4.0, 3.0]] * 3 and right["ms_median"] == 3.0 and right["ms_rounds"] == [3.0] * 3
    assert right["ms_iqr"] == 2.0 and right["served"] == "by hand" and right["ours"]
    flops = 2 * (2 * 4 * 128 * 129 / 2) * (32 + 32)
    assert right["tflops"] == pytest.approx(flops / 3e-3 / 1e12, rel=1e-4)
    assert right["rel_error"] < 1e-5 and 0 < right["budget_used"] <= 1 and right["checked"] == "8 of 8 slices"
    assert right["peak_bytes"] >= 2 * 4 * 128 * 32 * 4 and not right["error"]
    assert right["shape"] == [2, 4, 4, 128, 128, 32, 32] and right["mask"] == "causal"

    assert by_peer["wrong"]["error"].startswith("wrong: out") and by_peer["wrong"]["rel_error"] > 0.01
    assert by_peer["unserved"]["error"] == "needs a licence"
    assert by_peer["fails late"]["error"] == "RuntimeError: the second call"
    for name in ("wrong", "unserved", "fails late"):
        row = by_peer[name]
        assert row["ms_median"] is row["tflops"] is None and row["samples"] == [], "no time of a wrong result"
    assert "cpu.md" in capsys.readouterr().out
    markdown = results.path.with_suffix(".md").read_text()
    assert "needs a licence" in markdown and "RuntimeError: the second call" in markdown and "wrong: out" in markdown


def test_our_own_wrong_result_fails_the_run(bench, monkeypatch, capsys):
    monkeypatch.setitem(FAKES, "right", replace(FAKES["wrong"], name="right", ours=True))
    code, results = bench(peers=("right",))
    assert code == 1 and all(row["ms_median"] is None for row in results)
    assert "right FAILED" in capsys.readouterr().err


def test_without_a_check_there_is_no_time(bench, monkeypatch):
    def too_large(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "Gate", too_large)
    code, results = bench(peers=("right",))
    assert code == 0 and all("not checked, and so not timed" in row["error"] for row in results)
    assert all(row["ms_median"] is None for row in results)


def test_a_peer_that_takes_the_device_with_it_ends_the_run(bench, monkeypatch, tmp_path):
    """What follows on a device that is dead is nobody else's error. What was measured before is kept."""

    def dead(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "synchronize", dead)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench(peers=("right", "unserved"))
    results = Results.load(tmp_path / "cpu.json")
    assert not list(results) and not results.header["complete"]


def test_peers_that_compile_anew_take_part_in_the_core_of_the_standard_grid(tmp_path):
    grid = select_cases("cuda", "standard")
    core = {case.name for case in grid if case.core}
    assert 20 < len(core) < len(grid) / 2
    assert {case.group for case in grid if case.core} >= {"lengths", "key padding", "dense mask", "grouped heads"}
    peers = [FAKES["right"], replace(FAKES["right"], name="compiling", compiles=True)]
    everything = {(case.name, name) for case in grid for name in case.passes}
    part = {(case, name) for case, name in everything if case in core and name != DETERMINISTIC}
    for preset, wanted in (("standard", part), ("full", everything)):
        bench = run.Bench(Results(tmp_path / "x.json", {}), torch.device("cpu"), preset, peers, sample)
        found = [(case.name, name, peer.name) for case in grid for name, peer in bench.missing(case)]
        assert {row[:2] for row in found if row[2] == "right"} == everything
        assert {row[:2] for row in found if row[2] == "compiling"} == wanted


def test_an_interrupted_run_keeps_what_it_measured_and_goes_on(bench, monkeypatch, capsys):
    monkeypatch.setattr(run, "peak_bytes", lambda function, device: 1)
    bench = partial(bench, peers=("right",), cases=CASES)
    asked = []

    def interrupted(function, milliseconds):  # by somebody at the keyboard, in the second pass of the second case
        asked.append(function)
        if len(asked) > 3 * 4:  # a pass takes four samples: one to learn how long it takes, three rounds
            raise KeyboardInterrupt
        return sample(function, milliseconds)

    code, results = bench(sample=interrupted)
    assert code == 130 and not results.header["complete"]
    kept = dict(results.rows)
    assert len(kept) == 3
    assert "the same again goes on" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        elsewhere = measure.environment
        patch.setattr(measure, "environment", lambda device: elsewhere(device) | {"torch": "9.9"})
        with pytest.raises(SystemExit, match=r"measured elsewhere.*torch: .*, now '9.9'"):
            bench()

    code, results = bench(sample=partial(sample, times=(5.0,)))
    assert code == 0 and results.header["complete"] and len(results.rows) == 6
    assert all(row["ms_median"] == (3.0 if key in kept else 5.0) for key, row in results.rows.items())
    code, results = bench("--minutes=0")  # out of time is no failure
    assert code == 0 and not list(results) and not results.header["complete"]
    assert "stopped after 0 minutes" in capsys.readouterr().err
    assert bench()[1].header["complete"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only=nonsense"], "no case of the standard grid on cpu contains 'nonsense'"),
        (["--peers", "nobody"], "no peer on cpu is named 'nobody'; there are 'flash_attend'"),
        (["--out=table.csv"], "must be the path of a .json file"),
        (["--device=cuda"], "--device cuda needs a GPU, and torch sees none"),
    ],
)
def test_bad_options_are_named(options, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        run.main(["--device=cpu", *options])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_list_names_cases_and_peers(capsys):
    assert run.main(["--device=cpu", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in select_cases("cpu", "standard"))
    assert all((f"  {peer.name} " in printed) == ("cpu" in peer.devices and not peer.compiles) for peer in PEERS)
    assert run.main(["--device=cpu", "--list", "--only", "cpu: dropout float32 128"]) == 0
    (case,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert case.split()[-2:] == ["forward,", "forward+backward"] and "dropout0.1" in case and "s128" in case
    assert run.main(["--device=cpu", "--list", "--training"]) == 0
    printed = capsys.readouterr().out
    assert all(workload.name in printed for workload in workloads("cpu")) and "own einsum" in printed
