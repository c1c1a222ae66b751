"""What a run leaves behind, one JSON file, and what it says: tables for the terminal, a report in markdown, plots.

The file holds a header, which says where it was measured, and rows with every sample. It is written anew after every
case, in one step, so that a run which is interrupted keeps what it measured and can go on from there, in the
environment that it began in.

Ours stands beside the fastest of all others in the same pass of the same case, as results/README.md says.

`python benchmarks/results.py PATH.json ...` writes reports and plots anew.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

__all__ = ["FIELDS", "ROOT", "Results", "compare", "results_folder", "terminal", "write"]

ROOT = Path(__file__).resolve().parent / "results"
SCHEMA = 3

# One peer in one pass of one case. What was not measured is null.
FIELDS = {
    "case": "says all that decides the work",
    "group": "the section of the report",
    "pass": "forward, backward, forward+backward, deterministic backward or training step",
    "dtype": "a key of cases.DTYPES",
    "mask": "who may attend",
    "shape": "b, h, hk, i, j, d, dv",
    "peer": "who computed it",
    "ours": "whether that is flash_attend",
    "served": "of ours: backend and backward",
    "ms_median": "of all samples; the whole call, on the device's clock",
    "ms_iqr": "between their quartiles",
    "ms_rounds": "the median of each round",
    "first_call_s": "of a process, with an empty and with a filled compile cache",
    "tflops": "of the visible pairs: work.py",
    "ceiling_share": "the least time that the run's ceilings allow, over the median",
    "tokens_per_s": "of a training step, those that are no padding",
    "rel_error": "the largest of the results', in the 2-norm, against float64",
    "budget_used": "the largest share of the error budget; above 1 is wrong",
    "checked": "what was checked",
    "peak_bytes": "allocated by torch beyond the inputs",
    "error": "why there is no time: what the peer raised, or 'wrong: ...'",
    "samples": "milliseconds, by round",
}
# What may differ between the parts of one run.
PASSING = ("started", "ended", "complete", "clocks_before", "clocks_after", "ceilings")


def results_folder(device_name: str) -> Path:
    """Where the results of a device belong: `results/nvidia-h200`."""
    return ROOT / re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


class Results:
    """The rows of one run, and the file they are kept in."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.rows: dict[tuple[str, str, str], dict[str, Any]] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows.values())

    def add(self, **fields: Any) -> None:
        """Keeps a row, in place of an earlier one of the same case, pass and peer."""
        row = dict.fromkeys(FIELDS) | {"error": "", "ms_rounds": [], "samples": []} | fields
        if row.keys() != FIELDS.keys():
            raise TypeError(f"no fields of a row: {', '.join(row.keys() - FIELDS.keys())}")
        self.rows[row["case"], row["pass"], row["peer"]] = row

    def save(self) -> None:
        """Writes the file, whole or not at all. JSON knows no infinity and no NaN: such a number is a defect here."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"schema": SCHEMA, **self.header}, indent=1, allow_nan=False)
        lines = ",\n".join(json.dumps(row, allow_nan=False) for row in self)
        partial = self.path.with_suffix(".partial")
        partial.write_text(f'{{"header": {head},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")
        os.replace(partial, self.path)

    @staticmethod
    def load(path: Path) -> Results:
        """Reads what `save` wrote. Raises `ValueError` for anything else."""
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
            results = Results(path, loaded["header"])
            if results.header.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            for row in loaded["rows"]:
                results.add(**{name: row[name] for name in FIELDS})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold results of this version: {error}") from error
        return results

    def differences(self, header: dict[str, Any]) -> list[str]:
        """In what an environment differs from that of these results, as far as numbers depend on it."""
        names = sorted((self.header.keys() | header.keys()) - set(PASSING))
        pairs = ((name, self.header.get(name), header.get(name)) for name in names)
        return [f"{name}: {then!r}, now {now!r}" for name, then, now in pairs if then != now]

    @property
    def frame(self) -> pd.DataFrame:
        """The rows. Only what has no error has a time."""
        frame = pd.DataFrame(list(self), columns=list(FIELDS))
        return frame.astype(dict(ms_median=float, peak_bytes=float, tflops=float, ours=bool))


# ---------------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------------

WIN, EVEN, LOSS, ALONE = VERDICTS = ("win", "even", "loss", "alone")
PLACE = ["group", "case", "pass"]


def compare(frame: pd.DataFrame, name: str = "") -> pd.DataFrame:
    """Ours, by default the one that stands for us, beside the fastest other peer: each case and pass, the worst first.

    Adds to the fields of a row those of the peer, with `_best`, and `ratio`, `low`, `high` and `verdict`.
    """
    others = frame[~frame["ours"] & (frame["error"] == "")]
    best = others.loc[others.groupby(PLACE)["ms_median"].idxmin()]
    best = best[[*PLACE, "peer", "ms_median", "ms_rounds", "peak_bytes"]]
    name = name or next(iter(frame["peer"][frame["ours"]]), "")
    found = frame[frame["peer"] == name].merge(best, "left", PLACE, suffixes=("", "_best"))
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


def count_peers(frame: pd.DataFrame, compared: pd.DataFrame) -> pd.DataFrame:
    """What became of every peer."""
    right, wrong = frame["error"] == "", frame["error"].str.startswith("wrong")
    states = pd.DataFrame({"timed": right, "wrong": wrong, "not served": ~right & ~wrong})
    table = states.groupby(frame["peer"], sort=False).sum()
    table["fastest beside ours"] = compared["peer_best"].value_counts().reindex(table.index, fill_value=0)
    return table.reset_index()


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------

SHOWN = 40  # comparisons, in the terminal
# Plain notation with three significant digits.
_number = partial(np.format_float_positional, precision=3, unique=False, fractional=False, trim="-")
# How fields are written, if not as they are.
FORMATS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("ms_median", "ms_median_best", "ms_iqr", "tflops", "tokens_per_s"), _number),
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
    "of its budget": "budget_used", "checked": "checked", "peak MB": "peak_bytes", "first call, s": "first_call_s",
    "error": "error",
}  # fmt: skip


def _table(frame: pd.DataFrame, columns: dict[str, str] | None = None, width: int | None = None) -> str:
    """The columns as text, empty where there is nothing to tell; without those that are empty."""

    def write(value: Any, field: str) -> str:
        return "" if not isinstance(value, list) and pd.isna(value) else FORMATS.get(field, str)(value)

    columns = columns or {name: name for name in frame}
    table = pd.DataFrame({name: [write(x, field) for x in frame[field]] for name, field in columns.items()})
    table = table.loc[:, (table != "").any()]
    return table.to_string(index=False, max_colwidth=width) if len(table) else "nothing"


def count_verdicts(compared: pd.DataFrame) -> str:
    """All verdicts in a line."""
    counts = compared["verdict"].value_counts().reindex(VERDICTS, fill_value=0)
    failed = (compared["error"] != "").sum()
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"{told}; {failed} without a right result of ours" if failed else told


def terminal(results: Results) -> str:
    """The worst comparisons, the sums of each group, and who served how much."""
    frame = results.frame
    if frame.empty:
        return "no rows"
    compared = compare(frame)
    worst = _table(compared.head(SHOWN), COMPARED, width=60)
    if len(compared) > SHOWN:
        worst += f"\n... and {len(compared) - SHOWN} with a larger ratio, in {results.path.with_suffix('.md')}"
    tables = [worst, _table(summarise(compared)), _table(count_peers(frame, compared))]
    return "\n\n".join([*tables, f"their time over ours, worst first: {count_verdicts(compared)}"])


def markdown(results: Results, plots: list[Path]) -> str:
    """The whole run in markdown, with links to its plots. It belongs beside the results file."""
    header, frame = results.header, results.frame
    parts = [f"# {header['device']}, {header['started'][:10]}"]
    if not header["complete"]:
        parts.append("**The run is not complete: this is what it measured so far.**")
    tables = {"Where": json.dumps(header, indent=1)}
    compared = compare(frame)
    tables |= {
        f"Summary of {name}": _table(summarise(compare(frame, name))) for name in frame["peer"][frame["ours"]].unique()
    }
    tables |= {"Peers": _table(count_peers(frame, compared)), "Worst first": _table(compared, COMPARED)}
    rows = frame.merge(compared[[*PLACE, "ms_median"]], "left", PLACE, suffixes=("", "_ours"))
    rows["ratio"] = rows["ms_median"] / rows["ms_median_ours"]
    for group, part in rows.groupby("group", sort=False):
        # Fastest first in each pass of a case, those without a time last, with their error.
        part = part.sort_values(["case", "pass", "ms_median"], kind="stable", na_position="last")
        tables[group] = _table(part, ROWS)
    method = quote(os.path.relpath(ROOT / "README.md", results.path.parent))
    parts += [f"[How it was measured]({method})", *(f"![{path.stem}]({quote(path.name)})" for path in plots)]
    parts += [f"## {title}\n\n```text\n{table}\n```" for title, table in tables.items()]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def _lines(frame: pd.DataFrame, column: str, title: str, label: str) -> Any:
    """Values against length, a panel for each pass and head dim, a line for each peer."""
    from matplotlib.figure import Figure

    panels = list(frame.groupby(["pass", "dim"], sort=False))
    columns = frame["dim"].nunique()
    figure = Figure(figsize=(1 + 3.2 * columns, 1.2 + 2.2 * len(panels) / columns), layout="constrained")
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat
    for axes, ((name, dim), part) in zip(grid, panels, strict=False):
        lines = part.pivot_table(column, "length", "peer", sort=False).sort_index()
        axes.plot(lines, marker=".", label=list(lines))
        axes.set(title=f"{name}, head dim {dim}", xlabel="length", ylabel=label, ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.legend(fontsize="xx-small")
    figure.suptitle(title)
    return figure


def draw(results: Results) -> Iterator[tuple[str, Any]]:
    """Speed and memory against length, for every dtype and mask that was measured at several: figures with names."""
    frame = results.frame
    frame = frame[(frame["error"] == "") & frame["tflops"].notna()]
    # Of the grid's lengths: calls that differ in length, head dim, dtype and mask alone.
    frame = frame[
        frame["group"].isin(("lengths", "cpu: causal", "cpu: no mask")) & ~frame["case"].str.contains("thread")
    ]
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


if __name__ == "__main__":
    for given in map(Results.load, map(Path, sys.argv[1:])):
        print(terminal(given), *write(given), sep="\n")
