"""The report says what the rows say: who won, what was wrong, and nothing about what was not measured."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

import plots
import report
from cases import BACKWARD, BOTH, DETERMINISTIC, FORWARD, Case, select_cases
from report import markdown_report, readme_section, terminal_table
from results import Results, Row
from verdicts import ALONE, EVEN, LOSS, WIN, compare

HEADER = {
    "device": "NVIDIA H200",
    "driver": "580.1",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "commit": "0123456789abcdef",
    "dirty": False,
    "started": "2026-01-02T03:04:05+00:00",
    "ended": "2026-01-02T04:04:05+00:00",
    "preset": "standard",
    "only": "",
    "complete": True,
    "ceilings": {"tflops": {"bfloat16": 790.0, "tf32": 400.0}, "copy_gbps": 4300.0},
    "clocks_before": {"clocks.sm": "1980 MHz", "power.draw": "120.5 W"},
    "clocks_after": {"clocks.sm": "1755 MHz", "power.draw": "690.1 W"},
}
CASE = Case(4, 16, 4096, 4096, 128, 128, 16, causal=True, group="lengths")


def row(peer: str, milliseconds: float | None = 1.0, *, case: Case = CASE, pass_: str = FORWARD, **rest) -> Row:
    """A row of a peer; without `milliseconds` it has no time, and an error unless told otherwise."""
    found = dict(error="RuntimeError: cannot") if milliseconds is None else dict(ms_iqr=0.01, tflops=100 / milliseconds)
    return Row(
        case=case.name,
        group=case.group,
        pass_=pass_,
        dtype=case.dtype,
        mask=case.mask_words,
        shape=case.shape,
        peer=peer,
        ms_median=milliseconds,
        **found | rest,
    )


def results_of(*rows: Row, path: Path = Path("standard.json"), **header) -> Results:
    results = Results(path, HEADER | header)
    for each in rows:
        results.add(each)
    return results


def sweep(*peers: str, lengths: tuple[int, ...] = (512, 1024), passes=(FORWARD, BOTH)) -> list[Row]:
    """Rows with a time and a memory, over lengths, head dims and passes; the first peer is the fastest."""
    return [
        row(peer, length / 1e3 * (1 + place / 4), case=case, pass_=pass_, peak_bytes=length * 1000 * (place + 1))
        for length in lengths
        for dim in (64, 128)
        for case in [replace(CASE, queries=length, keys=length, head_dim=dim, value_dim=dim)]
        for pass_ in passes
        for place, peer in enumerate(peers)
    ]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its first chunk."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", head[16:])


# ---------------------------------------------------------------------------------------------------------------------
# Who is faster
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((0.9, 1.0, 1.1), (1.4, 1.5, 1.6), WIN),
        ((0.9, 1.0, 1.1), (0.7, 0.8, 0.89), LOSS),
        ((0.9, 1.0, 1.1), (1.0, 1.05, 1.2), EVEN),
        ((1.0, 1.05, 1.2), (0.9, 1.0, 1.1), EVEN),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), EVEN),
        ((0.9, 1.0, 1.1), (1.11, 1.11, 1.11), WIN),  # the ranges just do not meet
        ((0.9, 1.0, 1.1), (0.5, 1.5, 9.0), EVEN),  # what spreads far says little
        ((1.0, 1.0), (1.0, 1.01), EVEN),
    ],
)
def test_a_verdict_needs_more_than_the_spread_of_the_rounds(ours, theirs, verdict):
    rows = [
        row(peer, rounds[len(rounds) // 2], ms_rounds=rounds, ms_iqr=9.0)  # the spread of single calls says nothing
        for peer, rounds in (("flash_attend", ours), ("flex", theirs))
    ]
    results = results_of(*rows)
    (comparison,) = compare(results)
    assert comparison.verdict == verdict
    assert comparison.ratio == rows[1].ms_median / rows[0].ms_median


def test_the_best_peer_is_the_fastest_of_the_others_in_the_same_pass_of_the_same_case():
    other_case = replace(CASE, head_dim=64)
    results = results_of(
        row("flex", 3.0),
        row("flash_attend", 1.0),
        row("flash_attend math", 0.1),  # ours too: not a peer of ours
        row("sdpa flash", 2.0),
        row("sdpa flash", 0.2, pass_=BACKWARD),
        row("sdpa flash", 0.3, case=other_case),
    )
    (comparison,) = compare(results)
    assert (comparison.best.peer, comparison.ratio, comparison.verdict) == ("sdpa flash", 2.0, WIN)


def test_a_wrong_result_never_counts_as_a_time():
    wrong = row("cheat", 0.01, error="wrong: dq is off by 0.5")
    results = results_of(row("flash_attend", 1.0), wrong, row("honest", 2.0))
    (comparison,) = compare(results)
    assert (comparison.best.peer, comparison.ratio) == ("honest", 2.0)
    for text in (terminal_table(results), markdown_report(results, [])):
        assert "0.0100" not in text
        assert "100x" not in text
    assert "cheat (forward): wrong: dq is off by 0.5" in markdown_report(results, [])


@pytest.mark.parametrize("error", ["wrong: out has NaN or infinity", "Unserved: d is too large"])
@pytest.mark.parametrize("milliseconds", [None, 0.5])
def test_a_case_without_a_right_result_of_ours_is_a_loss(error, milliseconds):
    results = results_of(row("flash_attend", milliseconds, error=error), row("flex", 1.0))
    (comparison,) = compare(results)
    assert (comparison.verdict, comparison.ratio) == (LOSS, None)
    assert error in terminal_table(results)
    assert "0 wins, 0 even, 1 loss (1 without a right result of ours)" in terminal_table(results)
    losses = markdown_report(results, []).partition("## Losses")[2].partition("\n## ")[0]
    assert error in losses


def test_without_a_right_peer_ours_is_alone_and_does_not_win():
    results = results_of(row("flash_attend", 1.0), row("flex", None), row("cheat", 0.1, error="wrong: out"))
    (comparison,) = compare(results)
    assert (comparison.verdict, comparison.best, comparison.ratio) == (ALONE, None, None)
    assert "0 wins, 0 even, 0 losses, 1 alone" in terminal_table(results)


def test_on_a_cpu_the_einsum_path_stands_for_us():
    results = results_of(row("flash_attend math", 2.0), row("sdpa math", 1.0))
    assert "flash_attend math: 0 wins, 0 even, 1 loss" in terminal_table(results)
    assert "Summary of flash_attend math" in markdown_report(results, [])


def test_where_the_kernels_fail_everywhere_the_einsum_path_does_not_stand_in():
    results = results_of(row("flash_attend", None), row("flash_attend math", 0.5), row("flex", 1.0))
    assert "flash_attend: 0 wins, 0 even, 1 loss" in terminal_table(results)


# ---------------------------------------------------------------------------------------------------------------------
# Terminal and markdown
# ---------------------------------------------------------------------------------------------------------------------


def test_each_of_our_backends_is_summarised_beside_the_others():
    """But for the einsum path, which stands for us only where no kernel ran, and for what served nothing."""
    times = {"flash_attend": 2.0, "flash_attend hopper": 1.0, "flash_attend fused": None, "flash_attend math": 9.0}
    text = markdown_report(results_of(*(row(peer, ms) for peer, ms in times.items()), row("flex", 1.5)), [])
    summaries = dict(part.split("\n", 1) for part in text.split("## Summary of ")[1:])
    assert list(summaries) == ["flash_attend", "flash_attend hopper"]
    for cells, ratio in zip(summaries.values(), ("0.75x", "1.50x"), strict=True):
        assert cells.split("| all ")[1].split("##")[0].count(ratio) == 3  # the median, the worst and the best


def test_the_terminal_table_says_it_all_on_one_line_that_fits():
    ours = row("flash_attend", 1.2345, ms_iqr=0.0123, ceiling_share=0.6249, peak_bytes=67_108_864)
    theirs = row("complex-valued-transformer", 2.4690, peak_bytes=134_217_728)
    printed = terminal_table(results_of(ours, theirs))
    (line,) = [line for line in printed.splitlines() if line.startswith("  forward")]
    words = "forward 1.23 ± 0.012 81.0 62% complex-valued-transformer 2.47 2.00x win 67.1 / 134"
    assert " ".join(line.split()) == words
    longest = max(select_cases("full"), key=lambda case: len(case.name))
    rows = [row("flash_attend math", 1234.5678, case=longest, pass_=DETERMINISTIC, ms_iqr=12.3), ours, theirs]
    wide = terminal_table(results_of(*rows, row("flex", None, case=longest, error="x" * 500)))
    assert max(map(len, wide.splitlines())) <= report.WIDTH


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.012345, "0.0123"),
        (0.9996, "1.00"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (123456.7, "123,457"),
        (0.0, "0.00"),
        (None, ""),
    ],
)
def test_numbers_are_rounded_once_and_plainly(value, text):
    assert report._significant(value) == text


def test_every_peer_is_accounted_for():
    results = results_of(
        row("flash_attend", 1.0), row("flex", 2.0), row("cheat", None, error="wrong: out"), row("sdpa cudnn", None)
    )
    lines = {line.split("  ")[0]: line.split()[-4:] for line in terminal_table(results).splitlines()}
    assert lines["flex"] == ["1", "0", "0", "1"]
    assert lines["cheat"] == ["0", "1", "0", "0"]
    assert lines["sdpa cudnn"] == ["0", "0", "1", "0"]


def test_the_report_holds_every_peer_and_what_was_measured_beside_the_time():
    results = results_of(
        row("flash_attend", 1.0, ms_rounds=(1.0, 1.1), samples=((1.0, 1.0), (1.1,)), checked="all of it"),
        row(
            "flex",
            1.5,
            tflops=500.0,
            ceiling_share=0.63,
            rel_error=0.00312,
            budget_used=0.52,
            peak_bytes=5_000_000,
            ms_kernels=1.4,
            host_us=35.5,
            first_call_s=(12.5, 0.5),
        ),
        row("sdpa cudnn", None, error="No available kernel"),
        row("sdpa cudnn", None, pass_=BACKWARD, error="No available kernel"),
    )
    text = markdown_report(results, [])
    assert text.startswith("# NVIDIA H200, 2026-01-02\n")
    assert "||flex|1.50|0.010|500|63%|1.50x|3.1e-03|52%|5.00|1.40|35.5|" in text
    assert "- sdpa cudnn (forward, backward): No available kernel" in text
    assert "| flex | 12.5 | 0.500 |" in text
    assert "for 2 rounds. 3 calls were timed in all." in text
    assert "Checked were all of it (1 x)." in text
    assert "| clocks.sm | 1980 MHz | 1755 MHz |" in text
    assert "| matrix product, bfloat16 | 790 TFLOP/s |" in text
    assert "| commit | 0123456789abcdef |" in text
    assert "not complete" not in text


def test_the_summary_counts_by_group_and_lists_the_losses_worst_first():
    padded = replace(CASE, mask="right", valid=0.5, group="key padding")
    results = results_of(
        *(row("flash_attend", 1.0, case=case, pass_=pass_) for case in (CASE, padded) for pass_ in (FORWARD, BACKWARD)),
        row("flex", 2.0),
        row("flex", 0.9, pass_=BACKWARD),
        row("flex", 3.0, case=padded),
        row("flex", 0.5, case=padded, pass_=BACKWARD),
    )
    text = markdown_report(results, [])
    assert "| lengths | 2 | 1 | 0 | 1 | 0 | 0 | 1.45x | 0.90x | 2.00x |" in text
    assert "| key padding | 2 | 1 | 0 | 1 | 0 | 0 | 1.75x | 0.50x | 3.00x |" in text
    assert "| all | 4 | 2 | 0 | 2 | 0 | 0 | 1.45x | 0.50x | 3.00x |" in text
    losses = [line for line in text.partition("## Losses")[2].splitlines() if line.endswith("x |")][:2]
    assert [line.split("|")[-2].strip() for line in losses] == ["0.50x", "0.90x"]


def test_an_unfinished_run_says_so():
    assert "The run is not complete" in markdown_report(results_of(row("flash_attend"), complete=False), [])


def test_names_and_errors_are_shown_as_they_are():
    name = "a|b *c* <d> $x$ `e`\n_f_"
    results = results_of(row("flash_attend"), row(name, 2.0), row("g", None, error="first | line\nsecond \x1b[31m"))
    text = markdown_report(results, [])
    assert r"a\|b \*c\* \<d\> $x$ \`e\` \_f\_" in text
    assert r"first \| line second ?\[31m" in text
    printed = terminal_table(results)
    assert "\x1b" not in printed
    assert "a|b *c* <d> $x$ `e` _f_" in printed


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def test_plots_are_pictures_and_the_report_links_to_them(tmp_path):
    results = results_of(*sweep("flash_attend", "flex", *"abcdefgh"), path=tmp_path / "standard.json")
    report_path, *drawn = report.write(results)
    names = "tflops-bfloat16-causal", "memory-bfloat16-causal", "speedup-forward", "speedup-forward-backward"
    assert [path.name for path in drawn] == [f"standard-{name}.png" for name in names]
    for path in drawn:
        width, height = png_size(path)
        assert 600 < width < 1600
        assert height > 200
        assert f"]({path.name})" in report_path.read_text(encoding="utf-8")


def test_a_plot_without_data_is_left_out(tmp_path):
    """No lengths to compare, no memory, no comparison: no picture, rather than one with empty axes."""
    none = results_of(row("flash_attend", None), row("flex", None), path=tmp_path / "none.json")
    assert plots.plots(none, tmp_path) == []
    single = results_of(*sweep("flash_attend", "flex", lengths=(512,), passes=(FORWARD,)), path=tmp_path / "one.json")
    assert [path.name for path in plots.plots(single, tmp_path)] == ["one-speedup-forward.png"]
    peers = [replace(each, peak_bytes=None) for each in sweep("flex", passes=(FORWARD,))]
    drawn = plots.plots(results_of(*peers, path=tmp_path / "p.json"), tmp_path)
    assert [path.name for path in drawn] == ["p-tflops-bfloat16-causal.png"]


def test_full_and_causal_have_figures_of_their_own_and_other_cases_none(tmp_path):
    full = replace(CASE, causal=False)
    others = (
        replace(CASE, kv_heads=4),
        replace(CASE, value_dim=256),
        replace(CASE, mask="right", valid=0.5),
        replace(CASE, dropout_p=0.1),
        replace(CASE, queries=1024),
        replace(CASE, batch=3, group="odd lengths"),
    )
    cases = [
        replace(case, keys=case.keys * times, queries=case.queries * times)
        for case in (CASE, full, *others)
        for times in (1, 2)
    ]
    results = results_of(*(row("flex", 1.0, case=case) for case in cases), path=tmp_path / "run.json")
    assert {path.stem for path in plots.plots(results, tmp_path)} == {
        "run-tflops-bfloat16-causal",
        "run-tflops-bfloat16-full",
    }
    assert {each.case for each in plots._sweep(results)} == {case.name for case in cases[:4]}


def test_no_panel_is_empty():
    rows = [each for each in sweep("flash_attend", "flex") if (each.pass_, each.shape[5]) != (BOTH, 128)]
    styles = plots._line_styles(rows)
    figure = plots._small_multiples(rows, styles, lambda each: each.tflops, "title", "TFLOP/s")
    assert len(figure.axes) == 3
    assert all(len(axes.lines) == 2 for axes in figure.axes)
    assert [axes.get_ylabel() for axes in figure.axes] == ["TFLOP/s", "", "TFLOP/s"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "length", "length"]


def test_a_ceiling_that_is_far_away_is_not_drawn():
    rows = sweep("flash_attend")
    most = max(each.tflops for each in rows)
    for ceiling, lines in ((2 * most, 2), (4 * most, 1)):
        styles = plots._line_styles(rows)
        figure = plots._small_multiples(rows, styles, lambda each: each.tflops, "title", "TFLOP/s", ceiling=ceiling)
        assert {len(axes.lines) for axes in figure.axes} == {lines}


def test_peers_that_come_nearest_get_the_colours():
    peers = [f"peer {place}" for place in range(9)]
    rows = sweep("flash_attend", *peers)
    rows += [row("rare", 0.001, case=replace(CASE, queries=512, keys=512))]  # fast, but serves one case only
    styles = plots._line_styles(rows)
    assert [peer for peer in peers if styles[peer]["label"] == peer] == peers[: len(plots.COLOURS)]
    assert styles["rare"]["label"] == plots.OTHERS
    assert styles["flash_attend"]["linewidth"] > max(styles[peer]["linewidth"] for peer in peers)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("flex", 1.0)],
        [row("flash_attend", None), row("flex", None)],
        [row("flash_attend", 1.0)],
        [row("flash_attend", 1.0, ms_iqr=None, tflops=None), row("_$x_|", 0.5, ms_iqr=None, tflops=None)],
        sweep("flash_attend math", passes=(FORWARD,)),
    ],
    ids=["nothing", "no ours", "all errors", "ours alone", "no fields", "einsum path alone"],
)
@pytest.mark.parametrize("header", [HEADER, dict.fromkeys(HEADER), {}], ids=["header", "nones", "no header"])
def test_whatever_a_run_lacks_there_is_a_report(rows, header, tmp_path):
    results = results_of(*rows, path=tmp_path / "run.json")
    results.header = header
    assert terminal_table(results)
    for path in report.write(results)[1:]:
        assert min(png_size(path)) > 100


# ---------------------------------------------------------------------------------------------------------------------
# The README
# ---------------------------------------------------------------------------------------------------------------------

README = f"# Title\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"


def headline_run(path: Path, milliseconds: float = 1.0, **header) -> Results:
    """A saved run of the headline cases, in which the one peer takes 2 ms forward and 0.5 ms forward + backward."""
    cases = {case.name: case for case in select_cases("standard")}
    rows = [
        row(peer, taken, case=cases[name], pass_=pass_)
        for name in report.HEADLINES
        for pass_ in set(cases[name].passes) & {FORWARD, BOTH}
        for peer, taken in (("flash_attend", milliseconds), ("flex", 2.0 if pass_ == FORWARD else 0.5))
    ]
    results = results_of(*rows, path=path, **header)
    results.save()
    return results


def test_readme_table_agrees_with_results():
    """What the README says of speeds is what `python benchmarks/report.py --readme` makes of the results."""
    assert report.main(["--check"]) == 0


def test_headline_cases_are_in_the_standard_grid():
    cases = {case.name: case for case in select_cases("standard")}
    assert len(set(report.HEADLINES)) == len(report.HEADLINES)
    for name in report.HEADLINES:
        assert FORWARD in cases[name].passes


def test_without_results_the_readme_says_so(tmp_path):
    assert readme_section(tmp_path / "nothing").startswith("There are no results yet. `make bench`")


def test_the_readme_shows_wins_and_losses_of_the_newest_complete_run(tmp_path):
    folder = tmp_path / "nvidia-h200"
    headline_run(folder / "standard.json", started="2026-01-01T00:00:00+00:00", torch="2.10.0")
    headline_run(folder / "full.json", started="2026-02-01T00:00:00+00:00", preset="full")
    headline_run(folder / "standard-late.json", started="2026-03-01T00:00:00+00:00", complete=False, torch="2.12.0")
    headline_run(folder / "standard-part.json", started="2026-04-01T00:00:00+00:00", only="d64", torch="2.13.0")
    headline_run(folder / "standard-few.json", started="2026-04-01T00:00:00+00:00", peers=["flex"], torch="2.13.0")
    headline_run(tmp_path / "cpu" / "cpu.json", device="cpu", preset="cpu")
    (folder / "tune-forward.json").write_text("{}")
    section = readme_section(tmp_path)
    assert (
        section.count("**NVIDIA H200**, 2026-02-01, torch 2.11.0, Triton 3.6.0, driver 580.1, commit 0123456789") == 1
    )
    assert "full.md)" in section
    assert not any(version in section for version in ("2.10.0", "2.12.0", "2.13.0", "cpu"))
    lines = [line for line in section.splitlines() if line.startswith(("| bfloat16", "| tf32", "| float32"))]
    assert len(lines) == len(report.HEADLINES)
    assert lines[0].endswith("| 1.00 / 2.00 flex | 2.00x win | 1.00 / 0.500 flex | 0.50x loss |")
    assert f"{len(lines)} wins, 0 even, {len(lines) - 1} losses in [all cases" in section


def test_every_device_has_its_part(tmp_path):
    for device in ("NVIDIA A100", "NVIDIA H200"):
        headline_run(tmp_path / device / "standard.json", device=device)
    assert [line.split("**")[1] for line in readme_section(tmp_path).splitlines() if line.startswith("**")] == [
        "NVIDIA A100",
        "NVIDIA H200",
    ]


def test_changes_that_were_not_committed_are_told(tmp_path):
    headline_run(tmp_path / "gpu" / "standard.json", dirty=True)
    assert "with changes that were not committed" in readme_section(tmp_path)


def test_a_wrong_result_of_ours_stands_in_the_readme(tmp_path):
    results = headline_run(tmp_path / "gpu" / "standard.json")
    first = next(iter(results))
    results.add(replace(first, peer="flash_attend", error="wrong: dk is off"))
    results.save()
    assert "wrong: dk is off / " in readme_section(tmp_path)


def test_the_readme_is_rewritten_between_its_markers_and_checked(tmp_path, capsys):
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(README, encoding="utf-8")
    assert report.main(["--check"], readme, folder) == 1
    assert "--readme" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == README
    assert report.main(["--readme"], readme, folder) == 0
    written = readme.read_text(encoding="utf-8")
    assert written.startswith("# Title\n\nbefore\n\n")
    assert written.endswith(f"{report.END}\n\nafter\n")
    assert "old" not in written
    assert report.main(["--check"], readme, folder) == 0
    headline_run(folder / "gpu" / "standard.json")
    assert report.main(["--check"], readme, folder) == 1


@pytest.mark.parametrize("text", ["no markers", f"{report.BEGIN} alone", f"{report.END}{report.BEGIN}", README * 2])
def test_a_readme_without_its_markers_is_an_error(text, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        report.main(["--readme"], readme, tmp_path)
    assert "once each" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == text


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_a_results_file_is_reported_on_again(tmp_path, capsys):
    path = tmp_path / "quick.json"
    results_of(*sweep("flash_attend", "flex", passes=(FORWARD,)), path=path).save()
    assert report.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "flash_attend: 4 wins" in printed
    for name in ("quick.md", "quick-tflops-bfloat16-causal.png"):
        assert (tmp_path / name).exists()
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing to do"),
        (["--readme", "--check"], "not allowed with"),
        (["/nowhere/run.json"], "No such file"),
        ([__file__], "does not hold results"),
    ],
)
def test_bad_arguments_are_refused(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert complaint in capsys.readouterr().err
