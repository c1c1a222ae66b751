"""What a run of the benchmarks says: a table for the terminal, a report in markdown, plots, and the README's section.

Everything here is a function of a results file; `verdicts.py` says who is faster, and `plots.py` draws.

`python benchmarks/report.py PATH.json` writes report and plots beside a results file again, `--readme` rewrites the
README's section from all results, and `--check` says whether that would change it.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cases import BOTH, FORWARD
from plots import plots
from results import ROOT as RESULTS
from results import Results, Row
from verdicts import (
    ALONE,
    EVEN,
    LOSS,
    OURS,
    WIN,
    Comparison,
    compare,
    count_failed,
    count_verdicts,
    grouped,
    header_entry,
    is_wrong,
    one_line,
    our_names,
    time_of,
)

__all__ = ["markdown_report", "readme_section", "terminal_table", "write"]

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
README_FILES = ("standard*.json", "full*.json")  # run.py names a file after its grid
VERSIONS = {"torch": "torch", "triton": "Triton", "driver": "driver"}

# The README's cases. Each of them is in the standard grid.
HEADLINES = (
    "bfloat16 b16 h32 s1024 d64 causal",
    "bfloat16 b1 h32 s16384 d64 causal",
    "bfloat16 b16 h16 s1024 d128 causal",
    "bfloat16 b4 h16 s4096 d128 causal",
    "bfloat16 b1 h16 s16384 d128 causal",
    "bfloat16 b16 h8 s1024 d256 causal",
    "bfloat16 b1 h8 s16384 d256 causal",
    "bfloat16 b4 h32 s4096 d64 causal right50",
    "bfloat16 b4 h16 s4096 d128 causal right50",
    "tf32 b16 h8 s1024 d64 causal right50",
    "float32 b16 h8 s1024 d64 causal right50",
    "bfloat16 b8 h16 s2048 d128 causal right50 dropout0.1",
    "bfloat16 b4 h32/8 i1 j32768 d128 causal",
)
HEADLINE_PASSES = (FORWARD, BOTH)
LEGEND = (
    "In the name of a case, b is the batch, h the heads (of queries and of keys), s the length (or i queries and j"
    " keys), d the head dim (of keys and of values); right50 is padding on the right with half of the keys valid."
)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def _significant(value: float | None, digits: int = 3) -> str:
    """A number in plain notation; nothing for None."""
    if value is None:
        return ""
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the number as rounded: 0.9996 has that of 1.00
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _megabytes(row: Row | None) -> str:
    return "" if row is None or row.peak_bytes is None else _significant(row.peak_bytes / 1e6)


def _error(row: Row) -> str:
    """Why a row has no time."""
    return row.error or "not timed"


def _lay_out(table: Sequence[dict[str, str]]) -> tuple[list[str], list[bool]]:
    """The columns of a table that hold anything, and which of them are numbers."""
    names = [name for name in table[0] if any(row[name] for row in table)]
    return names, [all(row[name][:1].isdigit() for row in table if row[name]) for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# The terminal
# ---------------------------------------------------------------------------------------------------------------------

WIDTH = 140


def _terminal_cells(comparison: Comparison) -> dict[str, str]:
    ours, best = comparison.ours, comparison.best
    served = time_of(ours) is not None
    time = f"{_significant(ours.ms_median)} ± {_significant(ours.ms_iqr or 0, 2)}" if served else ""
    peaks = [_megabytes(row) for row in (ours, best)]
    return {
        "pass": ours.pass_,
        "ms ± iqr": time or ("wrong" if is_wrong(ours) else "not served"),
        "TFLOP/s": _significant(ours.tflops) if served else "",
        "ceiling": _share(ours.ceiling_share) if served else "",
        "fastest beside it": one_line(best.peer, 30) if best else "none",
        "its ms": _significant(best.ms_median) if best else "",
        "speed-up": comparison.outcome,
        "peak MB / its": " / ".join(peak or "?" for peak in peaks) if any(peaks) else "",
    }


def _summary_cells(comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
    """The sums of each group, and of all."""
    table = []
    for group, members in (
        *grouped(comparisons, lambda comparison: comparison.ours.group).items(),
        ("all", comparisons),
    ):
        counts = Counter(comparison.verdict for comparison in members)
        ratios = [comparison.ratio for comparison in members if comparison.ratio is not None]
        table.append(
            {
                "group": one_line(group),
                "compared": str(len(members)),
                "wins": str(counts[WIN]),
                "even": str(counts[EVEN]),
                "losses": str(counts[LOSS]),
                "of these without a right result": str(count_failed(members)),
                "alone": str(counts[ALONE]),
                "median ratio": f"{statistics.median(ratios):.2f}x" if ratios else "",
                "worst": f"{min(ratios):.2f}x" if ratios else "",
                "best": f"{max(ratios):.2f}x" if ratios else "",
            }
        )
    return table


def _peer_cells(results: Results) -> list[dict[str, str]]:
    """What became of every peer."""
    comparisons = compare(results)
    fastest = Counter(comparison.best.peer for comparison in comparisons if comparison.best)
    table = []
    for peer, rows in grouped(results, lambda row: row.peer).items():
        timed = sum(time_of(row) is not None for row in rows)
        wrong = sum(map(is_wrong, rows))
        table.append(
            {
                "peer": one_line(peer),
                "timed": str(timed),
                "wrong": str(wrong),
                "not served": str(len(rows) - timed - wrong),
                "fastest beside ours": "" if peer in OURS else str(fastest[peer]),
            }
        )
    return table


def _text_lines(table: Sequence[dict[str, str]], indent: str = "") -> list[str]:
    """The heading and the rows of a table, in columns."""
    names, numeric = _lay_out(table)
    cells = [names, *([row[name] for name in names] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        indent
        + "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]


def terminal_table(results: Results) -> str:
    """A line for each case and pass, ours beside the fastest other peer; then the sums, and who served how much."""
    if not results.rows:
        return "no rows"
    comparisons = compare(results)
    lines: list[str] = []
    if comparisons:
        by_case = grouped(comparisons, lambda comparison: (comparison.ours.group, comparison.ours.case))
        by_group = grouped(by_case, lambda place: place[0])
        ordered = [comparison for cases in by_group.values() for case in cases for comparison in by_case[case]]
        heading, *rest = _text_lines([_terminal_cells(comparison) for comparison in ordered], indent="  ")
        rows = iter(rest)
        lines.append(heading)
        for group, cases in by_group.items():
            lines += ["", one_line(group, WIDTH).upper()]
            for case in cases:
                lines.append(one_line(case[1], WIDTH))
                for comparison in by_case[case]:
                    lines.append(next(rows))
                    if time_of(comparison.ours) is None:
                        lines.append(f"    {one_line(_error(comparison.ours), WIDTH - 4)}")
        lines += ["", *_text_lines(_summary_cells(comparisons)), ""]
        lines += [f"{comparisons[0].ours.peer}: {count_verdicts(comparisons)}", ""]
    return "\n".join([*lines, *_text_lines(_peer_cells(results))])


# ---------------------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------------------


def _escape(text: str) -> str:
    """Text that markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*\[\]<>|~#]|(?<!\w)_|_(?!\w))", r"\\\1", one_line(text))


def _markdown_table(table: Sequence[dict[str, str]], gap: str = " ") -> list[str]:
    """A table whose cells are markdown, `gap` around them; nothing for no rows. Empty columns are left out."""
    if not table:
        return []
    names, numeric = _lay_out(table)
    rules = ["---:" if right else "---" for right in numeric]
    cells = [names, rules, *([row[name] for name in names] for row in table)]
    return [f"|{gap}{f'{gap}|{gap}'.join(line)}{gap}|" for line in cells]


def _flatten(header: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The entries of a header that say anything, those of a dictionary in it under its name."""
    for name, value in header.items():
        name = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            yield from _flatten(value, f"{name} ")
        elif isinstance(value, bool):
            yield name, "yes" if value else "no"
        elif value not in (None, ""):
            yield name, str(value)


def _date(header: dict[str, Any]) -> str:
    return header_entry(header, "started")[:10]


def _environment_lines(header: dict[str, Any]) -> list[str]:
    plain = {name: value for name, value in header.items() if name not in ("ceilings", "clocks_before", "clocks_after")}
    lines = _markdown_table([{"environment": _escape(name), " ": _escape(text)} for name, text in _flatten(plain)])
    before, after = (dict(_flatten(header.get(name) or {})) for name in ("clocks_before", "clocks_after"))
    clocks = [
        {"GPU": _escape(name), "before": _escape(before.get(name, "?")), "after": _escape(after.get(name, "?"))}
        for name in before | after
    ]
    ceilings = header.get("ceilings") or {}
    measured = [
        {"ceiling": f"matrix product, {_escape(dtype)}", "measured": f"{_significant(rate)} TFLOP/s"}
        for dtype, rate in (ceilings.get("tflops") or {}).items()
    ]
    if ceilings.get("copy_gbps") is not None:
        measured.append(
            {"ceiling": "copy, read and written", "measured": f"{_significant(ceilings['copy_gbps'])} GB/s"}
        )
    return [line for part in (lines, _markdown_table(clocks), _markdown_table(measured)) for line in (*part, "")]


def _method_lines(results: Results) -> list[str]:
    timed = [row for row in results if time_of(row) is not None]
    rounds = sorted({len(row.ms_rounds) for row in timed if row.ms_rounds})
    samples = sum(len(samples) for row in timed for samples in row.samples)
    checked = Counter(_escape(row.checked) for row in timed if row.checked)
    return [
        "All peers of a case run in one process, on the same normal random tensors, in turns (A B B A)"
        + (f", for {' or '.join(map(str, rounds))} rounds." if rounds else ".")
        + (f" {samples:,} calls were timed in all." if samples else "")
        + " `ms` is the median of the calls of all rounds, `iqr` lies between their quartiles. On a GPU the L2 cache is"
        " flushed before every call.",
        "",
        "What a peer has to do because the mask came with the batch is in its time; of `flex` alone the making of its"
        " BlockMask is not (`flex + mask` has it), and it counts as a peer like any other. TFLOP/s count visible pairs,"
        " a backward as 2.5 forwards. `ceiling` is the least time in which the measured ceilings allow these operations"
        " and bytes, over the median. Peak memory is what a call allocates beyond its inputs.",
        "",
        "Before a time was taken, the results of that very call were compared with float64. A result outside the error"
        " budget is wrong, and has no time. What a peer's own dropout keeps is not known: it is judged without."
        + (f" Checked were {', '.join(f'{text} ({n:,} x)' for text, n in checked.most_common())}." if checked else ""),
        "",
        "`ratio` is a peer's time over ours: above 1, ours is faster. Where the ranges of the rounds' medians of ours"
        " and of the fastest other peer overlap, the two are even. A case that ours does not serve, or gets wrong, is"
        f" a loss. {LEGEND}",
    ]


def _loss_cells(comparison: Comparison) -> dict[str, str]:
    ours, best = comparison.ours, comparison.best
    return {
        "case": _escape(ours.case),
        "pass": ours.pass_,
        "ours, ms": _escape(_significant(time_of(ours)) or _error(ours)),
        "best peer": _escape(best.peer) if best else "none",
        "its ms": _significant(best.ms_median) if best else "",
        "ratio": "" if comparison.ratio is None else f"{comparison.ratio:.2f}x",
    }


def _loss_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """The losses, those without a right result first, then the worst first."""
    losses = [comparison for comparison in comparisons if comparison.verdict == LOSS]
    losses.sort(key=lambda comparison: comparison.ratio or 0.0)
    return ["## Losses", "", *_markdown_table([_loss_cells(comparison) for comparison in losses]), ""] if losses else []


def _row_cells(row: Row, ours: Row | None) -> dict[str, str]:
    """A peer with a time, beside ours if that has one."""
    peer = _escape(row.peer)
    compared = ours is not None and ours is not row
    return {
        "peer": f"**{peer}**" if ours is row else peer,
        "ms": _significant(row.ms_median),
        "iqr": _significant(row.ms_iqr, 2),
        "TFLOP/s": _significant(row.tflops),
        "ceiling": _share(row.ceiling_share),
        "ratio": f"{row.ms_median / ours.ms_median:.2f}x" if compared else "",
        "rel. error": "" if row.rel_error is None else f"{row.rel_error:.1e}",
        "of its budget": _share(row.budget_used),
        "peak MB": _megabytes(row),
        "kernels alone, ms": _significant(row.ms_kernels),
        "host, us": _significant(row.host_us),
    }


def _case_lines(case: str, rows: Sequence[Row], name: str | None) -> list[str]:
    """One case: the peers with a time, fastest first in each pass, then the others and their errors.

    There are thousands of rows: they are kept short, for a page that is too long is not shown as one.
    """
    table: list[dict[str, str]] = []
    for pass_, members in grouped((row for row in rows if time_of(row) is not None), lambda row: row.pass_).items():
        ours = next((row for row in members if row.peer == name), None)
        labels = [pass_, *[""] * (len(members) - 1)]
        for label, row in zip(labels, sorted(members, key=time_of), strict=True):
            table.append({"pass": label} | _row_cells(row, ours))
    failed = grouped((row for row in rows if time_of(row) is None), lambda row: (row.peer, _error(row)))
    errors = [
        f"- {_escape(peer)} ({', '.join(row.pass_ for row in members)}): {_escape(error)}"
        for (peer, error), members in failed.items()
    ]
    return [f"**{_escape(case)}**", "", *_markdown_table(table, gap=""), "", *errors, ""]


def _first_call_lines(results: Results) -> list[str]:
    table = [
        {
            "case": _escape(row.case),
            "pass": row.pass_,
            "peer": _escape(row.peer),
            "compile cache empty, s": _significant(row.first_call_s[0]),
            "filled, s": _significant(row.first_call_s[1]),
        }
        for row in results
        if row.first_call_s is not None
    ]
    return ["## First calls", "", *_markdown_table(table), ""] if table else []


def markdown_report(results: Results, plots: Sequence[Path]) -> str:
    """The whole run in markdown, with links to its plots. It belongs beside the results file."""
    header = results.header
    lines = [
        f"# {_escape(header_entry(header, 'device'))}, {_date(header)}",
        "",
        *([] if header.get("complete") else ["**The run is not complete: this is what it measured so far.**", ""]),
        *_environment_lines(header),
        "## How it was measured",
        "",
        *_method_lines(results),
        "",
    ]
    names = our_names(results)
    for name in names:
        summary = [row | {"group": _escape(row["group"])} for row in _summary_cells(compare(results, name))]
        lines += [f"## Summary of {name}", "", *_markdown_table(summary), ""]
    lines += ["## Peers", "", *_markdown_table([row | {"peer": _escape(row["peer"])} for row in _peer_cells(results)])]
    if plots:
        lines += ["", "## Plots", ""]
        for path in plots:
            link = quote(Path(os.path.relpath(path, results.path.parent)).as_posix())
            lines += [f"![{_escape(path.stem.replace('-', ' '))}]({link})", ""]
    lines += ["", *_loss_lines(compare(results)), *_first_call_lines(results)]
    for group, members in grouped(results, lambda row: row.group).items():
        lines += [f"## {_escape(group).capitalize()}", ""]
        for case, rows in grouped(members, lambda row: row.case).items():
            lines += _case_lines(case, rows, next(iter(names), None))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def write(results: Results) -> list[Path]:
    """Writes the report and the plots beside the results file. Returns what was written, the report first."""
    drawn = plots(results, results.path.parent)
    path = results.path.with_suffix(".md")
    path.write_text(markdown_report(results, drawn), encoding="utf-8")
    return [path, *drawn]


# ---------------------------------------------------------------------------------------------------------------------
# The README
# ---------------------------------------------------------------------------------------------------------------------


def _newest_runs(folder: Path) -> Iterator[Results]:
    """Of each device the newest complete run of a standard or full grid."""
    for device in sorted(path for path in folder.glob("*") if path.is_dir()):
        files = sorted(file for pattern in README_FILES for file in device.glob(pattern))
        runs = [
            results
            for results in map(Results.load, files)
            if results.header.get("complete") and not (results.header.get("only") or results.header.get("peers"))
        ]
        if runs:
            yield max(runs, key=lambda results: results.header["started"])


def _headline_cells(case: str, found: dict[tuple[str, str], Comparison]) -> dict[str, str]:
    cells = {"case": _escape(case)}
    for pass_ in HEADLINE_PASSES:
        comparison = found.get((case, pass_))
        times, outcome = "", ""
        if comparison is not None:
            ours, best = comparison.ours, comparison.best
            own = _significant(time_of(ours)) or _escape(_error(ours))
            times = f"{own} / {_significant(best.ms_median)} {_escape(best.peer)}" if best else own
            outcome = comparison.outcome
        cells |= {f"{pass_}, ms: ours / best peer": times, f"{pass_}: ratio": outcome}
    return cells


def _run_lines(results: Results, folder: Path) -> list[str]:
    """One device's part of the README's section."""
    header = results.header
    comparisons = compare(results)
    found = {(comparison.ours.case, comparison.ours.pass_): comparison for comparison in comparisons}
    report = Path(os.path.relpath(results.path.with_suffix(".md"), folder)).as_posix()
    commit = header_entry(header, "commit")[:10] + (
        ", with changes that were not committed" if header.get("dirty") else ""
    )
    versions = ", ".join(f"{label} {header_entry(header, name)}" for name, label in VERSIONS.items())
    return [
        f"**{_escape(header_entry(header, 'device'))}**, {_date(header)}, {_escape(f'{versions}, commit {commit}')}:"
        f" {count_verdicts(comparisons)} in [all cases and passes]({quote(report)}). Some of them:",
        "",
        *_markdown_table(
            [_headline_cells(case, found) for case in HEADLINES if any(case == name for name, _ in found)]
        ),
        "",
    ]


def readme_section(results_folder: Path) -> str:
    """What stands between the README's markers: the headline cases of each device's newest complete run."""
    lines = [line for results in _newest_runs(results_folder) for line in _run_lines(results, README.parent)]
    if not lines:
        return "There are no results yet. `make bench` on a machine with an NVIDIA GPU makes them.\n"
    return "\n".join(
        [
            "`ratio` is the time of the fastest other peer that gave a right result over that of flash_attend: above 1,"
            f" flash_attend is faster. It is even where the medians of the rounds overlap. {LEGEND}",
            "",
            *lines,
        ]
    )


def with_section(readme: str, section: str) -> str:
    """The README with another section between its markers. Raises `ValueError` where they are not there once each."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the README must hold {BEGIN} and, after it, {END}, once each")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{section.strip()}\n\n{END}{rest.partition(END)[2]}"


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None, readme: Path = README, results_folder: Path = RESULTS) -> int:
    """0, or 1 where `--check` finds that the README does not say what the results say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="PATH.json", help="results to report on, beside them")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--readme", action="store_true", help="rewrite the README's section from all results")
    action.add_argument("--check", action="store_true", help="fail if that would change it")
    options = parser.parse_args(arguments)
    if not (options.files or options.readme or options.check):
        parser.error("nothing to do: a results file, --readme or --check is needed")
    try:
        for results in map(Results.load, options.files):
            print(terminal_table(results))
            print("written:", *(f"  {path}" for path in write(results)), sep="\n")
        if options.readme or options.check:
            text = readme.read_text(encoding="utf-8")
            wanted = with_section(text, readme_section(results_folder))
            if options.readme:
                readme.write_text(wanted, encoding="utf-8")
            elif wanted != text:
                print(
                    f"{readme} does not say what the results say: python benchmarks/report.py --readme", file=sys.stderr
                )
                return 1
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
