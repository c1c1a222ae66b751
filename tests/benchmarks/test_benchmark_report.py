"""The report: who is faster, told from a results file alone: in the terminal, in markdown, plots and the README."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import image

import report
from cases import BOTH, FORWARD
from report import compare, frame_of, markdown, readme_section, terminal
from results import Results

HEADER = dict(
    device="NVIDIA H100", host="8 x CPU", torch="2.13.0", triton="3.7.1", driver="590", commit="0123456789abcdef",
    dirty=False, started="2026-01-02T03:04:05+00:00", complete=True, preset="standard", group="", only="", peers=[],
    ceilings={"tflops": {"bfloat16": 800.0}, "copy_gbps": 3000.0}, clocks_before={"clocks.sm": "1980 MHz"},
)  # fmt: skip


def add(results: Results, peer: str, rounds=(), error="", case="a case", group="lengths", length=64, **fields) -> None:
    """A row as a run makes it."""
    ms = sorted(rounds)[len(rounds) // 2] if rounds else None
    results.add(
        case=case, group=group, dtype="bfloat16", mask="causal", shape=[1, 4, 4, length, length, 64, 64], peer=peer,
        ours=peer.startswith("flash_attend"), error=error, ms_rounds=list(rounds), ms_median=ms,
        ms_iqr=None if ms is None else 0.1, tflops=None if ms is None else 100 / ms,
        samples=[[x] for x in rounds], **{"pass": FORWARD, "peak_bytes": 2_000_000} | fields,
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
    add(made, "sdpa", error="no available kernel: a|b *c*", case="alone", group="masks")
    add(made, "wrong", error="wrong: out is off", case="alone", group="masks")
    add(made, "flash_attend", error="wrong: dq is off", case="wrong", group="masks")
    add(made, "sdpa", (1.0,) * 3, case="wrong", group="masks")
    add(made, "flash_attend math", (3.0,) * 3, case="won")
    return made


def test_ours_is_compared_with_the_fastest_that_is_right_round_by_round(results):
    compared = compare(frame_of(results)).set_index("case")
    verdicts = dict(won="win", even="even", lost="loss", alone="alone", wrong="loss")
    assert compared["verdict"].to_dict() == verdicts
    assert list(compared["peer_best"].loc[["won", "even", "lost"]]) == ["sdpa"] * 3
    assert compared["ratio"].loc["lost"] == pytest.approx(0.5) and compared["low"].loc["lost"] == 0.25
    assert compared["low"].loc["won"] == pytest.approx(1.5) and compared["high"].loc["won"] == pytest.approx(2.0)
    assert list(compared.index[-3:]) == ["lost", "even", "won"], "the worst first"
    assert compare(frame_of(results), "flash_attend math")["case"].tolist() == ["won"]


def test_the_sums_of_groups(results):
    sums = report.summarise(compare(frame_of(results))).set_index("group")
    assert list(sums.index) == ["lengths", "masks", "all"]
    assert sums.loc["lengths", ["compared", "win", "even", "loss", "alone"]].tolist() == [3, 1, 1, 1, 0]
    assert sums.loc["all", ["compared", "win", "even", "loss", "alone"]].tolist() == [5, 1, 1, 2, 1]
    assert sums.loc["masks", "without a right result"] == 1
    assert sums.loc["lengths", "worst"] == 0.5 and sums.loc["lengths", "memory, worst"] == 2.0


def test_the_terminal_says_the_worst_first_and_counts(results, monkeypatch):
    printed = terminal(results)
    places = [printed.index(f" {case} ") for case in ("lost", "even", "won")]
    assert places == sorted(places)
    assert "0.50 0.25 0.75 loss" in " ".join(printed.split()) and "wrong: dq is off" in printed
    assert printed.endswith("1 win, 1 even, 2 loss, 1 alone; 1 without a right result of ours")
    monkeypatch.setattr(report, "SHOWN", 2)
    assert f"and 3 with a larger ratio, in {results.path.with_suffix('.md')}" in terminal(results)
    assert terminal(Results(results.path, HEADER)) == "no rows"


def test_the_report_holds_every_row_every_error_and_the_environment(results):
    text = markdown(results, [Path("standard-speedup-forward.png")])
    assert text.startswith("# NVIDIA H100, 2026-01-02\n")
    for told in ("0123456789abcdef", "ceilings tflops bfloat16|800.0", "clocks\\_before clocks.sm|1980 MHz"):
        assert told.replace("\\_", "_") in text
    assert "no available kernel: a\\|b \\*c\\*" in text and "wrong: out is off" in text
    assert "![standard-speedup-forward](standard-speedup-forward.png)" in text
    assert "## Summary of flash_attend\n" in text and "## Summary of flash_attend math\n" in text
    rows = text[text.index("## lengths") : text.index("## masks")].splitlines()
    assert [line.split("|")[3] for line in rows if line.startswith("|won|")] == [
        "flash_attend", "sdpa", "flash_attend math", "slow",
    ]  # fmt: skip
    assert all(line.count("|") == rows[2].count("|") for line in rows[2:] if line)
    assert "not complete" not in text
    assert "The run is not complete" in markdown(Results(results.path, HEADER | {"complete": False}), [])


def test_plots_are_drawn_of_what_was_measured(results):
    for length in (128, 256):
        for peer, ms in (("flash_attend", 1.0), ("sdpa", 2.0)):
            add(results, peer, (ms,) * 3, case=f"long {length}", length=length)
    results.save()
    report.main([str(results.path)])
    plots = sorted(results.path.parent.glob("*.png"))
    assert [path.stem for path in plots] == ["standard-memory-bfloat16-causal", "standard-tflops-bfloat16-causal"]
    assert all(image.imread(path).std() > 0 for path in plots)
    assert results.path.with_suffix(".md").read_text().count("![") == 2


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, True),
        ({"complete": False}, False),
        ({"preset": "quick"}, False),
        ({"only": "causal"}, False),
        ({"peers": ["sdpa"]}, False),
    ],
)
def test_the_readme_tells_of_whole_runs(results, changed, told):
    results.header |= changed
    results.save()
    section = readme_section(results.path.parent.parent)
    assert (
        "**NVIDIA H100**, 2026-01-02, torch 2.13.0, triton 3.7.1, driver 590, commit 0123456789:" in section
    ) == told
    assert ("1 win, 1 even, 2 loss" in section) == told == ("There are no results yet" not in section)


def test_the_readme_tells_of_the_newest_run_and_of_no_cpu_that_is_not_kept(results):
    results.save()
    folder = results.path.parent.parent
    newer = Results(
        results.path.with_name("full.json"), HEADER | {"preset": "full", "started": "2027-01-01", "dirty": True}
    )
    add(newer, "flash_attend", (1.0,) * 3, **{"pass": BOTH})
    add(newer, "sdpa", (3.0,) * 3, **{"pass": BOTH})
    newer.save()
    Results(folder / "cpu" / "standard.json", HEADER | {"device": "cpu"}).save()
    section = readme_section(folder)
    assert section.count("**NVIDIA H100**") == 1 and "2027-01-01" in section and "not committed" in section
    assert "1 win, 0 even, 0 loss" in section and "8 x CPU" not in section


def test_the_readme_is_rewritten_between_its_markers(results, tmp_path, capsys):
    results.save()
    report.main(["--section", str(results.path)])
    assert capsys.readouterr().out.strip() == report.section_of([results]).strip()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.main(["--readme"], readme, results.path.parent.parent)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("**NVIDIA H100**") == 1
    for broken in ("no markers", f"{report.END} {report.BEGIN}", text + text):
        with pytest.raises(ValueError, match="once each"):
            report.with_section(broken, "text")


def test_the_readme_says_what_the_results_say():
    text = report.README.read_text(encoding="utf-8")
    assert report.with_section(text, readme_section(report.ROOT)) == text
