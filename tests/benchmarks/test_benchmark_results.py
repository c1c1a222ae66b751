"""What a run leaves behind, and what it says of who is faster: in a file, the terminal, markdown and plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib import image

import results as reporting
from cases import FORWARD
from results import FIELDS, Results, compare, markdown, results_folder, summarise, terminal, write

HEADER = dict(
    device="NVIDIA H100", commit="0123456789abcdef", started="2026-01-02T03:04:05+00:00", complete=True,
    clocks_before={"clocks.sm": "1980 MHz"},
)  # fmt: skip


def add(results: Results, peer: str, rounds=(), error="", case="a case", group="lengths", length=64, **fields) -> None:
    """A row as a run makes it."""
    ms = sorted(rounds)[len(rounds) // 2] if rounds else None
    results.add(
        case=case, group=group, dtype="bfloat16", mask="causal", shape=[1, 4, 4, length, length, 64, 64], peer=peer,
        ours=peer.startswith("flash_attend"), error=error, ms_rounds=list(rounds), ms_median=ms,
        tflops=None if ms is None else 100 / ms, samples=[[x] for x in rounds],
        **{"pass": FORWARD, "peak_bytes": 2_000_000} | fields,
    )  # fmt: skip


@pytest.fixture
def results(tmp_path) -> Results:
    made = Results(tmp_path / "nvidia-h100" / "standard.json", dict(HEADER))
    for case, ours, theirs in (
        ("won", (1.0, 1.1, 1.2), (2.0, 2.2, 1.8)),
        ("even", (1.0, 1.0, 1.0), (0.9, 1.0, 1.1)),
        ("lost", (4.0, 4.0, 4.0), (2.0, 3.0, 1.0)),
    ):
        add(made, "flash_attend", ours, case=case, served="triton, separate backward")
        add(made, "sdpa", theirs, case=case, peak_bytes=1_000_000)
        add(made, "slow", (9.0, 9.0, 9.0), case=case)
    add(made, "flash_attend", (1.0,) * 3, case="alone", group="masks")
    add(made, "sdpa", error="no available kernel", case="alone", group="masks")
    add(made, "wrong", error="wrong: out is off", case="alone", group="masks")
    add(made, "flash_attend", error="wrong: dq is off", case="wrong", group="masks")
    add(made, "sdpa", (1.0,) * 3, case="wrong", group="masks")
    add(made, "flash_attend math", (3.0,) * 3, case="won")
    return made


def test_ours_is_compared_with_the_fastest_that_is_right_round_by_round(results):
    compared = compare(results.frame).set_index("case")
    verdicts = dict(won="win", even="even", lost="loss", alone="alone", wrong="loss")
    assert compared["verdict"].to_dict() == verdicts
    assert list(compared["peer_best"].loc[["won", "even", "lost"]]) == ["sdpa"] * 3
    assert compared["ratio"].loc["lost"] == pytest.approx(0.5) and compared["low"].loc["lost"] == 0.25
    assert compared["low"].loc["won"] == pytest.approx(1.5) and compared["high"].loc["won"] == pytest.approx(2.0)
    assert list(compared.index[-3:]) == ["lost", "even", "won"], "the worst first"
    assert compare(results.frame, "flash_attend math")["case"].tolist() == ["won"]
    sums = summarise(compare(results.frame)).set_index("group")
    assert list(sums.index) == ["lengths", "masks", "all"]
    assert sums.loc["lengths", ["win", "even", "loss", "alone"]].tolist() == [1, 1, 1, 0]
    assert sums.loc["all", ["win", "even", "loss", "alone"]].tolist() == [1, 1, 2, 1]
    assert sums.loc["masks", "without a right result"] == 1
    assert sums.loc["lengths", "worst"] == 0.5 and sums.loc["lengths", "memory, worst"] == 2.0


def test_the_terminal_says_the_worst_first_and_counts(results, monkeypatch):
    printed = terminal(results)
    places = [printed.index(f" {case} ") for case in ("lost", "even", "won")]
    assert places == sorted(places)
    assert "0.5 0.25 0.75 loss" in " ".join(printed.split()) and "wrong: dq is off" in printed
    sums = dict(zip(*(" ".join(line.split()).split(" ", 5)[:5] for line in printed.splitlines()[-4::3]), strict=True))
    assert sums == dict(group="all", win="1", even="1", loss="2", alone="1")
    monkeypatch.setattr(reporting, "SHOWN", 2)
    assert f"and 3 with a larger ratio, in {results.path.with_suffix('.md')}" in terminal(results)
    assert terminal(Results(results.path, HEADER)) == "no rows"


def test_the_report_holds_every_row_every_error_and_the_environment(results):
    text = markdown(results, [Path("standard-speed.png")])
    assert text.startswith("# NVIDIA H100, 2026-01-02\n")
    for told in ("0123456789abcdef", "1980 MHz", "no available kernel", "wrong: out is off"):
        assert told in text
    assert "![standard-speed](standard-speed.png)" in text
    assert "## Summary of flash_attend\n" in text and "## Summary of flash_attend math\n" in text
    rows = text[text.index("## lengths") : text.index("## masks")].splitlines()
    won = [" ".join(line.split()[2:-4]) for line in rows if line.startswith(" won ")]
    assert won == ["flash_attend", "sdpa", "flash_attend math", "slow"]
    assert "not complete" not in text
    assert "The run is not complete" in markdown(Results(results.path, HEADER | {"complete": False}), [])


def test_plots_are_drawn_of_what_was_measured(results):
    for length in (128, 256):
        for peer, ms in (("flash_attend", 1.0), ("sdpa", 2.0)):
            add(results, peer, (ms,) * 3, case=f"long {length}", length=length)
    results.save()
    report, *plots = write(Results.load(results.path))
    assert sorted(path.stem for path in plots) == [
        "standard-megabytes-bfloat16-causal",
        "standard-tflops-bfloat16-causal",
    ]
    assert all(image.imread(path).std() > 0 for path in plots)
    assert report.read_text().count("![") == 2


def test_results_come_back_as_they_were_written(tmp_path):
    results = Results(tmp_path / "some" / "file.json", {"device": "x", "complete": True})
    results.add(case="c", peer="p", ms_median=1.5, samples=[[1.0, 2.0], [1.5]], **{"pass": FORWARD})
    results.add(case="c", peer="q", error="line", **{"pass": FORWARD})
    results.save()
    assert list(Results.load(results.path)) == list(results) and Results.load(results.path).header == results.header
    assert json.loads(results.path.read_text())["rows"][0].keys() == FIELDS.keys()
    assert not list(results.path.parent.glob("*.partial"))
    with pytest.raises(TypeError, match="no fields of a row: color"):
        results.add(case="c", peer="r", color="red", **{"pass": FORWARD})
    results.add(case="c", peer="p", ms_median=float("nan"), **{"pass": FORWARD})
    with pytest.raises(ValueError, match="JSON"):  # a number that is none is a defect
        results.save()
    assert results_folder("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize(
    "text", ["", "{}", '{"header": {"schema": 0}, "rows": []}', '{"header": {"schema": 3}, "rows": [{}]}']
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="does not hold results"):
        Results.load(path)
