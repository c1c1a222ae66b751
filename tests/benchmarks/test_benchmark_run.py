"""The benchmark's command, with fake peers and a fake clock: what is measured, kept, gone on with and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import report
import run
from cases import BOTH, DETERMINISTIC, FORWARD, select_cases
from flash_attend import flash_attention
from peers import Peer, Unserved
from results import Results, Row, results_folder

ONLY = "on a CPU: s128 causal"  # one case


class FakeStopwatch:
    """Gives the times in its list, by turns; counts how often it was asked."""

    def __init__(self, times=(2.0, 4.0, 3.0)) -> None:
        self.times, self.asked = list(times), 0

    def sample(self, function, milliseconds):
        function()
        self.asked += 1
        return self.times


def attention(inputs, **changed):
    """The call of a case, as the einsum path computes it."""
    case = inputs.case
    return partial(flash_attention, **dict(mask=inputs.mask, causal=case.causal, backend="math") | changed)


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


PEERS = {
    peer.name: peer
    for peer in (
        Peer("right", "is right", attention, judged_whole=True),
        Peer("wrong", "is wrong", partial(attention, scale=0.5)),
        Peer("unserved", "serves nothing", unserved),
        Peer("fails late", "fails", fails_late),
    )
}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the command on fake peers; returns its exit code and the results."""
    path = tmp_path / "cpu.json"
    # Slow, and tested by themselves.
    monkeypatch.setattr(report, "plots", lambda results, folder: [])
    monkeypatch.setattr(run, "ceilings", lambda device, stopwatch: {"tflops": {"float32": 1.0}, "copy_gbps": 10.0})

    def bench(*options, peers=tuple(PEERS), stopwatch=None) -> tuple[int, Results]:
        monkeypatch.setattr(run, "peers_for", lambda *_, **__: [PEERS[name] for name in peers])
        code = run.main(
            ["--device=cpu", f"--only={ONLY}", f"--out={path}", *options], stopwatch=stopwatch or FakeStopwatch()
        )
        return code, Results.load(path)

    return bench


def test_a_run_measures_what_is_right_and_says_why_not(bench, capsys):
    code, results = bench()
    assert code == 0 and results.header["complete"] and results.header["device"] == "cpu"
    (case,) = select_cases("cpu", ONLY)
    assert [row.key for row in results] == [(case.name, name, peer) for name in (FORWARD, BOTH) for peer in PEERS]
    by_peer = {row.peer: row for row in results if row.pass_ == FORWARD}

    right = by_peer["right"]
    assert right.samples == ((2.0, 4.0, 3.0),) * 3 and right.ms_median == 3.0 and right.ms_rounds == (3.0,) * 3
    assert right.ms_iqr == 2.0
    flops = 2 * (2 * 4 * 128 * 129 / 2) * (32 + 32)
    assert right.tflops == pytest.approx(flops / 3e-3 / 1e12, rel=1e-4)
    assert right.rel_error < 1e-5 and 0 < right.budget_used <= 1 and right.checked == "all of it"
    assert right.shape == (2, 4, 4, 128, 128, 32, 32) and right.mask == "causal" and not right.error

    assert by_peer["wrong"].error.startswith("wrong: out") and by_peer["wrong"].rel_error > 0.01
    assert by_peer["unserved"].error == "needs a licence"
    assert by_peer["fails late"].error == "RuntimeError: the second call"
    for name in ("wrong", "unserved", "fails late"):
        row = by_peer[name]
        assert row.ms_median is None and row.tflops is None and row.samples == (), "no time of a wrong result"
    printed = capsys.readouterr().out
    assert "no GPU" in printed and "cpu.md" in printed
    markdown = results.path.with_suffix(".md").read_text()
    assert "needs a licence" in markdown and "RuntimeError: the second call" in markdown and "wrong: out" in markdown


def test_our_own_wrong_result_fails_the_run(bench, monkeypatch, capsys):
    monkeypatch.setitem(PEERS, "right", replace(PEERS["wrong"], name="right", judged_whole=True))
    code, results = bench(peers=("right",))
    assert code == 1 and all(row.ms_median is None for row in results)
    assert "right is WRONG" in capsys.readouterr().err


def test_without_a_check_there_is_no_time(bench, monkeypatch):
    def too_large(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "Gate", too_large)
    code, results = bench(peers=("right",))
    assert code == 0 and all("not checked, and so not timed" in row.error for row in results)
    assert all(row.ms_median is None for row in results)


def test_a_peer_that_takes_the_device_with_it_ends_the_run(bench, monkeypatch, tmp_path):
    """What follows on a device that is dead is nobody else's error. What was measured before is kept."""

    def dead(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(run, "synchronize", dead)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench(peers=("right", "unserved"))
    results = Results.load(tmp_path / "cpu.json")
    assert not list(results) and not results.header["complete"]


def test_peers_that_compile_anew_take_part_in_the_core_of_the_standard_grid(tmp_path):
    grid = select_cases("standard")
    core = [case for case in grid if case.core]
    assert 20 < len(core) < len(grid) / 2
    assert {case.group for case in core} >= {"lengths", "key padding", "dense mask", "grouped heads", "float32"}
    peers = [PEERS["right"], replace(PEERS["right"], name="compiling", compiles="each case")]
    for preset, cases in (("standard", core), ("full", grid)):
        bench = run.Bench(Results(tmp_path / "x.json", {}), torch.device("cpu"), peers, run.PLANS[preset], None)
        for case in grid:
            missing = [(name, peer.name) for name, peer in bench.missing(case)]
            assert {name for name, peer in missing if peer == "right"} == set(case.passes)
            left_out = {DETERMINISTIC} if preset == "standard" else set()
            wanted = set(case.passes) - left_out if case in cases else set()
            assert {name for name, peer in missing if peer == "compiling"} == wanted


def test_the_file_has_the_fields_that_are_promised(bench, tmp_path):
    bench(peers=("right",))
    loaded = json.loads((tmp_path / "cpu.json").read_text())
    promised = {"case", "pass", "dtype", "mask", "shape", "peer", "ms_median", "ms_iqr", "tflops", "rel_error"}
    assert all(promised | {"peak_bytes", "error"} <= row.keys() for row in loaded["rows"])
    assert {"commit", "dirty", "ceilings", "started", "ended", "torch"} <= loaded["header"].keys()


class Interrupting(FakeStopwatch):
    """Stands for somebody at the keyboard, after so many samples."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def sample(self, function, milliseconds):
        if self.asked == self.after:
            raise KeyboardInterrupt
        return super().sample(function, milliseconds)


def test_an_interrupted_run_keeps_what_it_measured_and_goes_on(bench, capsys):
    # A pass takes four samples: one to learn how long it takes, three rounds.
    code, results = bench("--only=s128", peers=("right",), stopwatch=Interrupting(3 * 4))
    assert code == 130 and not results.header["complete"]
    kept = {row.key: row for row in results}
    assert len(kept) == 3, "two passes of the first case, one of the next, which was cut short in its second"
    assert "--resume goes on" in capsys.readouterr().err

    with pytest.raises(SystemExit, match="unfinished run: --resume goes on, --restart drops it"):
        bench("--only=s128", peers=("right",))

    stopwatch = FakeStopwatch([5.0])
    code, results = bench("--only=s128", "--resume", peers=("right",), stopwatch=stopwatch)
    assert code == 0 and results.header["complete"]
    cases = len(select_cases("cpu", "s128"))
    assert len(list(results)) == 2 * cases and stopwatch.asked == 4 * (2 * cases - 3)
    assert all(row.ms_median == (3.0 if row.key in kept else 5.0) for row in results)

    with pytest.raises(SystemExit, match="no unfinished run"):
        bench("--only=s128", "--resume", peers=("right",))


def test_another_environment_is_not_mixed_in(bench, monkeypatch):
    bench("--only=s128", peers=("right",), stopwatch=Interrupting(3 * 4))
    elsewhere = run.environment
    monkeypatch.setattr(run, "environment", lambda device: elsewhere(device) | {"torch": "9.9"})
    with pytest.raises(SystemExit, match=r"measured elsewhere(.|\n)*torch: .*, now '9.9'"):
        bench("--only=s128", "--resume", peers=("right",))
    code, results = bench("--only=s128", "--restart", peers=("right",))
    assert code == 0 and results.header["torch"] == "9.9"


def test_out_of_time_is_no_failure(bench, capsys):
    code, results = bench("--minutes=0", peers=("right",))
    assert code == 0 and not list(results) and not results.header["complete"]
    assert "stopped after 0 minutes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quick"], "--quick is for GPUs"),
        (["--only=nonsense"], "no case of the cpu grid contains 'nonsense'"),
        (["--peers", "nobody"], "no peer on cpu is named 'nobody'"),
        (["--rounds=0"], "--rounds must be at least 1"),
        (["--out=table.csv"], "must be the path of a .json file"),
        (["--device=meta"], "must be a CUDA device or cpu"),
    ],
)
def test_bad_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run.main(["--device=cpu", *options])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main(["--device=cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err


def test_the_list_names_cases_and_peers(capsys):
    assert run.main(["--device=cpu", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in select_cases("cpu")) and "flash_attend math" in printed


def test_results_come_back_as_they_were_written(tmp_path):
    results = Results(tmp_path / "some" / "file.json", {"device": "x", "complete": True})
    common = dict(case="c", group="g", pass_=FORWARD, dtype="tf32", mask="none", shape=(1, 2, 3))
    results.add(Row(**common, peer="p", ms_median=1.5, samples=((1.0, 2.0), (1.5,)), first_call_s=(3.0, 1.0)))
    results.add(Row(**common, peer="q", error="line"))
    results.save()
    assert list(Results.load(results.path)) == list(results) and Results.load(results.path).header == results.header
    assert not list(results.path.parent.glob("*.partial"))


@pytest.mark.parametrize(
    "text", ["", "{}", '{"header": {"schema": 0}, "rows": []}', '{"header": {"schema": 1}, "rows": [{}]}']
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="does not hold results"):
        Results.load(path)


def test_a_number_that_is_none_is_a_defect(tmp_path):
    results = Results(tmp_path / "file.json", {})
    results.add(Row("c", "g", FORWARD, "tf32", "none", (1,), "p", ms_median=float("nan")))
    with pytest.raises(ValueError, match="JSON"):
        results.save()
    assert not results.path.exists()


def test_a_device_has_a_folder_of_its_own():
    assert results_folder("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3"


def test_the_report_is_rendered_again_from_the_file(bench, tmp_path, capsys):
    bench(peers=("right",))
    (tmp_path / "cpu.md").unlink()
    assert report.main([str(tmp_path / "cpu.json")]) == 0
    assert (tmp_path / "cpu.md").exists()
