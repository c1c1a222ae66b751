"""What a run of the benchmarks says: a table for the terminal, a report in markdown, plots, and the README's section.

Everything here is a function of a results file. Ours stands beside the fastest of all others in the same pass of the
same case. Peers take turns, so each round gives a ratio of its own: theirs over ours, above 1 ours is faster.

- win, loss: all rounds say so;
- even: they do not agree;
- alone: no other peer gave a right result;
- loss, too: ours gave none, whatever the others did.

`python benchmarks/report.py PATH.json` writes report and plots beside a results file again, and `--readme` rewrites the
README's section from all results. `--section` prints that section of the files alone, whole runs or not.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from results import ROOT, Results

__all__ = ["compare", "frame_of", "markdown", "readme_section", "summarise", "terminal", "write"]

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
NO_RESULTS = "There are no results yet. `make bench` on a machine with an NVIDIA GPU makes them.\n"
WIN, EVEN, LOSS, ALONE = VERDICTS = ("win", "even", "loss", "alone")
PLACE = ["group", "case", "pass"]
SHOWN = 40  # comparisons, in the terminal
METHOD = """\
All peers of a case run in one process, on the same normal random tensors, in turns (A B B A). `ms` is the median of
the calls of all rounds, `iqr` lies between their quartiles. On a GPU the L2 cache is flushed before every call.

What a peer has to do because the mask came with the batch is in its time; of `flex` alone the making of its BlockMask
is not (`flex + mask` has it), and it counts as a peer like any other. TFLOP/s count visible pairs, a backward as 2.5
forwards. `ceiling` is the least time in which the measured ceilings allow these operations and bytes, over the median.
Peak memory is what torch allocates in a call beyond its inputs.

Before a time was taken, the results of that very call were compared with float64. A result outside the error budget is
wrong, and has no time. What a peer's own dropout keeps is not known: it is judged without.

`ratio` is a peer's time over ours, above 1 ours is faster: beside the fastest peer the median of the rounds' ratios,
with their range; where that holds 1, the two are even. A case that ours does not serve, or gets wrong, is a loss.

In the name of a case, b is the batch, h the heads (of queries and of keys), s the length (or i queries and j keys), d
the head dim (of keys and of values); right50 is padding on the right with half of the keys valid.
"""


# ---------------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------------


def frame_of(results: Results) -> pd.DataFrame:
    """The rows. Only what has no error has a time."""
    frame = pd.DataFrame(list(results), columns=None if len(results.rows) else PLACE)
    return frame.astype({name: float for name in ("ms_median", "peak_bytes", "tflops") if name in frame})


def _ours(frame: pd.DataFrame) -> list[str]:
    """Our peers, in the order of the run: the first stands for us."""
    return list(frame["peer"][frame["ours"].astype(bool)].unique())


def compare(frame: pd.DataFrame, name: str = "") -> pd.DataFrame:
    """Ours, by default the one that stands for us, beside the fastest other peer: each case and pass, the worst first.

    Adds to the fields of a row those of the peer, with `_best`, and `ratio`, `low`, `high` and `verdict`.
    """
    others = frame[~frame["ours"].astype(bool) & (frame["error"] == "")]
    best = others.loc[others.groupby(PLACE)["ms_median"].idxmin()]
    best = best[[*PLACE, "peer", "ms_median", "ms_rounds", "peak_bytes"]]
    found = frame[frame["peer"] == (name or next(iter(_ours(frame)), ""))].merge(
        best, "left", PLACE, suffixes=("", "_best")
    )
    rounds = [
        np.divide(theirs, own) if isinstance(theirs, list) and own else np.array([np.nan])
        for theirs, own in zip(found["ms_rounds_best"], found["ms_rounds"], strict=True)
    ]
    found["ratio"], found["low"], found["high"] = ([of(r) for r in rounds] for of in (np.median, np.min, np.max))
    failed, alone = found["error"] != "", found["peer_best"].isna()
    decided = [failed, alone, found["low"] > 1, found["high"] < 1]
    found["verdict"] = np.select(decided, [LOSS, ALONE, WIN, LOSS], EVEN)
    return found.sort_values("ratio", na_position="first", kind="stable")


def summarise(compared: pd.DataFrame) -> pd.DataFrame:
    """The sums of each group, in the order of the rows, and of all."""
    rows = []
    for group, part in [*compared.sort_index().groupby("group", sort=False), ("all", compared)]:
        memory = part["peak_bytes"] / part["peak_bytes_best"].where(part["peak_bytes_best"] > 0)
        counts = {verdict: (part["verdict"] == verdict).sum() for verdict in VERDICTS}
        counts |= {"without a right result": (part["error"] != "").sum()}
        ratios = {"worst": part["ratio"].min(), "median": part["ratio"].median(), "best": part["ratio"].max()}
        rows.append({"group": group, "compared": len(part)} | counts | ratios | {"memory, worst": memory.max()})
    return pd.DataFrame(rows)


def _peers(frame: pd.DataFrame, compared: pd.DataFrame) -> pd.DataFrame:
    """What became of every peer."""
    right, wrong = frame["error"] == "", frame["error"].str.startswith("wrong")
    states = pd.DataFrame({"timed": right, "wrong": wrong, "not served": ~right & ~wrong})
    table = states.groupby(frame["peer"], sort=False).sum()
    table["fastest beside ours"] = compared["peer_best"].value_counts().reindex(table.index, fill_value=0)
    return table.reset_index()


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------

# Plain notation with three significant digits.
_number = partial(np.format_float_positional, precision=3, unique=False, fractional=False, trim="-")

# How fields are written, if not as they are.
FORMATS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("ms_median", "ms_median_best", "ms_iqr", "ms_kernels", "tflops", "tokens_per_s"), _number),
    **dict.fromkeys(("ratio", "low", "high", "worst", "median", "best", "memory, worst"), "{:.2f}".format),
    **dict.fromkeys(("ceiling_share", "budget_used"), "{:.0%}".format),
    **dict.fromkeys(("peak_bytes", "peak_bytes_best"), lambda x: _number(x / 1e6)),
    "rel_error": "{:.1e}".format,
    "first_call_s": lambda seconds: " then ".join(map(_number, seconds)),
}
# The columns of a table -> the fields they show.
COMPARED = {
    "case": "case", "pass": "pass", "served": "served", "ms": "ms_median", "best peer": "peer_best",
    "its ms": "ms_median_best", "ratio": "ratio", "from": "low", "to": "high", "verdict": "verdict",
    "peak MB": "peak_bytes", "its peak": "peak_bytes_best", "error": "error",
}  # fmt: skip
ROWS = {
    "case": "case", "pass": "pass", "peer": "peer", "ms": "ms_median", "iqr": "ms_iqr", "ratio": "ratio",
    "TFLOP/s": "tflops", "tokens/s": "tokens_per_s", "ceiling": "ceiling_share", "rel. error": "rel_error",
    "of its budget": "budget_used", "checked": "checked", "peak MB": "peak_bytes", "kernels alone, ms": "ms_kernels",
    "first call, s": "first_call_s", "error": "error",
}  # fmt: skip


def _cells(frame: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """The columns as text, empty where there is nothing to tell; without those that are empty."""

    def write(value: Any, field: str) -> str:
        return "" if not isinstance(value, list) and pd.isna(value) else FORMATS.get(field, str)(value)

    table = pd.DataFrame({name: [write(x, field) for x in frame[field]] for name, field in columns.items()})
    return table.loc[:, (table != "").any()]


def _sums(compared: pd.DataFrame) -> pd.DataFrame:
    sums = summarise(compared)
    return _cells(sums, {name: name for name in sums})


def _counts(compared: pd.DataFrame) -> str:
    """All verdicts in a line."""
    counts = compared["verdict"].value_counts().reindex(VERDICTS, fill_value=0)
    failed = (compared["error"] != "").sum()
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"{told}; {failed} without a right result of ours" if failed else told


def terminal(results: Results) -> str:
    """The worst comparisons, the sums of each group, and who served how much."""
    frame = frame_of(results)
    if frame.empty:
        return "no rows"
    compared = compare(frame)
    parts = [_cells(compared.head(SHOWN), COMPARED), _sums(compared), _peers(frame, compared)]
    tables = [part.to_string(index=False, max_colwidth=60) for part in parts if len(part)]
    if len(compared) > SHOWN:
        tables[0] += f"\n... and {len(compared) - SHOWN} with a larger ratio, in {results.path.with_suffix('.md')}"
    return "\n\n".join([*tables, f"their time over ours, worst first: {_counts(compared)}"])


def _escape(text: Any) -> str:
    """Text that markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*\[\]<>|~#]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(text).split()))


def _table(frame: pd.DataFrame) -> str:
    """A table in markdown."""
    lines = [[*map(_escape, frame)], ["---"] * frame.shape[1]]
    lines += [[*map(_escape, row)] for row in frame.itertuples(index=False)]
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def _environment(header: dict[str, Any]) -> str:
    flat = pd.json_normalize({name: value for name, value in header.items() if value not in (None, "", [])}, sep=" ")
    entries = flat.T.reset_index().astype(str)
    return _table(entries.set_axis(["environment", "value"], axis=1))


def _rows(frame: pd.DataFrame, compared: pd.DataFrame) -> pd.DataFrame:
    """All rows of a group, fastest first in each pass of a case, those without a time last, with their error."""
    frame = frame.merge(compared[[*PLACE, "ms_median"]], "left", PLACE, suffixes=("", "_ours"))
    frame["ratio"] = frame["ms_median"] / frame["ms_median_ours"]
    return _cells(frame.sort_values(["case", "pass", "ms_median"], kind="stable", na_position="last"), ROWS)


def markdown(results: Results, plots: list[Path]) -> str:
    """The whole run in markdown, with links to its plots. It belongs beside the results file."""
    header, frame = results.header, frame_of(results)
    parts = [f"# {_escape(header['device'])}, {header['started'][:10]}"]
    if not header["complete"]:
        parts.append("**The run is not complete: this is what it measured so far.**")
    parts += [_environment(header), "## How it was measured", METHOD]
    if not frame.empty:
        compared = compare(frame)
        for name in _ours(frame):
            parts += [f"## Summary of {name}", _table(_sums(compare(frame, name)))]
        parts += ["## Peers", _table(_peers(frame, compared)), "## Worst first", _table(_cells(compared, COMPARED))]
        parts += [f"![{_escape(path.stem)}]({quote(path.name)})" for path in plots]
        for group, part in frame.groupby("group", sort=False):
            parts += [f"## {_escape(group)}", _table(_rows(part, compared))]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def _lines(frame: pd.DataFrame, column: str, title: str, label: str) -> Any:
    """Values against length, a panel for each pass and head dim, a line for each peer."""
    from matplotlib.figure import Figure

    passes, dims = frame["pass"].unique(), sorted(frame["dim"].unique())
    figure = Figure(figsize=(1 + 3.2 * len(dims), 1.2 + 2.2 * len(passes)), layout="constrained")
    grid = figure.subplots(len(passes), len(dims), squeeze=False, sharex=True)
    for (name, dim), part in frame.groupby(["pass", "dim"]):
        axes = grid[list(passes).index(name)][dims.index(dim)]
        for peer, line in part.sort_values("length").groupby("peer", sort=False):
            axes.plot(line["length"], line[column], marker=".", label=peer, linewidth=2.5 if line["ours"].all() else 1)
        axes.set(title=f"{name}, head dim {dim}", xlabel="length", ylabel=label, ylim=(0, None))
        axes.set_xscale("log", base=2)
    handles = {text: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    return figure


def draw(results: Results) -> Iterator[tuple[str, Any]]:
    """Speed and memory against length, for every dtype and mask that was measured at several: figures with names."""
    frame = frame_of(results)
    if frame.empty:
        return
    frame = frame[(frame["error"] == "") & frame["tflops"].notna()]
    # Of the grid's lengths: calls that differ in length, head dim, dtype and mask alone.
    frame = frame[frame["group"].isin(("lengths", "cpu: causal", "cpu: no mask"))]
    frame = frame[~frame["case"].str.contains("thread")]
    frame = frame.assign(length=frame["shape"].str[3], dim=frame["shape"].str[5], megabytes=frame["peak_bytes"] / 1e6)
    for (dtype, mask), part in frame.groupby(["dtype", "mask"]):
        if part["length"].nunique() > 1:
            title = f"{results.header['device']}: {dtype}, mask: {mask}"
            yield f"tflops-{dtype}-{mask}", _lines(part, "tflops", title, "TFLOP/s")
            yield f"memory-{dtype}-{mask}", _lines(part, "megabytes", f"{title}: peak beyond the inputs", "MB")


def write(results: Results) -> list[Path]:
    """Writes the report and the plots beside the results file. Returns what was written, the report first."""
    plots = []
    for name, figure in draw(results):
        path = results.path.with_name(f"{results.path.stem}-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.png")
        figure.savefig(path, dpi=110)
        plots.append(path)
    path = results.path.with_suffix(".md")
    path.write_text(markdown(results, plots), encoding="utf-8")
    return [path, *plots]


# ---------------------------------------------------------------------------------------------------------------------
# The README
# ---------------------------------------------------------------------------------------------------------------------


def _newest_runs(folder: Path) -> Iterator[Results]:
    """Of each device the newest complete run of a standard or full grid. What `results/cpu` holds is not kept."""
    for device in sorted(path for path in folder.glob("*") if path.is_dir() and path.name != "cpu"):
        runs = [results for results in map(Results.load, sorted(device.glob("*.json"))) if results.header["complete"]]
        whole = [run for run in runs if not any(run.header[name] for name in ("group", "only", "peers"))]
        if whole := [run for run in whole if run.header["preset"] != "quick"]:
            yield max(whole, key=lambda run: run.header["started"])


def readme_section(folder: Path) -> str:
    """What stands between the README's markers: the sums of each device's newest complete run."""
    return section_of(_newest_runs(folder))


def section_of(runs: Iterable[Results]) -> str:
    """The sums of these runs."""
    parts = []
    for run in runs:
        header, frame = run.header, frame_of(run)
        compared = compare(frame)
        link = quote(Path(os.path.relpath(run.path.with_suffix(".md"), README.parent)).as_posix())
        machine = header["device"] if header["device"] != "cpu" else header["host"]
        versions = ", ".join(f"{name} {header[name]}" for name in ("torch", "triton", "driver") if header[name])
        commit = header["commit"][:10] + (", with changes that were not committed" if header["dirty"] else "")
        told = f"{header['started'][:10]}, {_escape(versions)}, commit {commit}"
        parts += [f"**{_escape(machine)}**, {told}: {_counts(compared)} in [all cases and passes]({link})."]
        parts += [_table(_sums(compared))]
    if not parts:
        return NO_RESULTS
    head = "The ratio is the time of the fastest other peer that gave a right result over that of flash_attend: above 1"
    return "\n\n".join([f"{head}, flash_attend is faster. It is even where the rounds do not agree.", *parts]) + "\n"


def with_section(readme: str, section: str) -> str:
    """The README with another section between its markers. Raises `ValueError` where they are not there once each."""
    changed, found = re.subn(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{section.strip()}\n\n{END}", readme, flags=re.S)
    if not found == readme.count(BEGIN) == readme.count(END) == 1:
        raise ValueError(f"the README must hold {BEGIN} and, after it, {END}, once each")
    return changed


def main(arguments: list[str] | None = None, readme: Path = README, folder: Path = ROOT) -> None:
    """Writes reports, and the README's section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="PATH.json", help="results to report on, beside them")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's section from all results")
    parser.add_argument("--section", action="store_true", help="print what the README would say of these files alone")
    options = parser.parse_args(arguments)
    if options.section:
        print(section_of(map(Results.load, options.files)))
        return
    for results in map(Results.load, options.files):
        print(terminal(results))
        print("written:", *(f"  {path}" for path in write(results)), sep="\n")
    if options.readme:
        readme.write_text(with_section(readme.read_text(encoding="utf-8"), readme_section(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
