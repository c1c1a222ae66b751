"""What a run leaves behind, one JSON file, and what it says: tables for the terminal, a report in markdown, plots.

The file holds a header, which says where it was measured, and rows with every sample. It is written anew after every
case, in one step, so that a run which is interrupted keeps what it measured and can go on from there, in the
environment that it began in.

Ours stands beside the fastest of all others in the same pass of the same case, as results/README.md says.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

__all__ = ["FIELDS", "ROOT", "Results", "compare", "results_folder", "summarise", "terminal", "write"]

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
    "tflops": "of the visible pairs: `Inputs.tflops`",
    "tokens_per_s": "of a training step, those that are no padding",
    "rel_error": "the largest of the results', in the 2-norm, against float64",
    "budget_used": "the largest share of the error budget; above 1 is wrong",
    "checked": "what was checked",
    "peak_bytes": "allocated by torch beyond the inputs",
    "error": "why there is no time: what the peer raised, or 'wrong: ...'",
    "samples": "milliseconds, by round",
}
# What may differ between the parts of one run.
PASSING = {"started", "ended", "complete", "clocks_before", "clocks_after"}


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
        names = sorted((self.header.keys() | header.keys()) - PASSING)
        pairs = ((name, self.header.get(name), header.get(name)) for name in names)
        return [f"{name}: {then!r}, now {now!r}" for name, then, now in pairs if then != now]

    @property
    def frame(self) -> pd.DataFrame:
        """The rows. Only what has no error has a time."""
        frame = pd.DataFrame(list(self), columns=list(FIELDS))
        frame = frame.astype(dict(ours=bool, ms_median=float, peak_bytes=float, tflops=float, tokens_per_s=float))
        return frame.assign(megabytes=frame["peak_bytes"] / 1e6)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------------

WIN, EVEN, LOSS, ALONE = VERDICTS = ["win", "even", "loss", "alone"]
PLACE = ["group", "case", "pass"]


def compare(frame: pd.DataFrame, name: str = "") -> pd.DataFrame:
    """Ours, by default the one that stands for us, beside the fastest other peer: each case and pass, the worst first.

    Adds to the fields of a row those of the peer, with `_best`, and `ratio`, `low`, `high`, `memory` and `verdict`.
    """
    others = frame[~frame["ours"] & (frame["error"] == "")]
    best = others.loc[others.groupby(PLACE)["ms_median"].idxmin()]
    best = best[[*PLACE, "peer", "ms_median", "ms_rounds", "megabytes"]]
    name = name or next(iter(frame["peer"][frame["ours"]]), "")
    found = frame[frame["peer"] == name].merge(best, "left", PLACE, suffixes=("", "_best"))
    rounds = [
        np.divide(theirs, own) if isinstance(theirs, list) and own else np.array([np.nan])
        for theirs, own in zip(found["ms_rounds_best"], found["ms_rounds"], strict=True)
    ]
    found["ratio"], found["low"], found["high"] = ([of(r) for r in rounds] for of in (np.median, np.min, np.max))
    found["memory"] = found["megabytes"] / found["megabytes_best"].where(found["megabytes_best"] > 0)
    failed, alone = found["error"] != "", found["peer_best"].isna()
    decided = [failed, alone, found["low"] > 1, found["high"] < 1]
    found["verdict"] = np.select(decided, [LOSS, ALONE, WIN, LOSS], EVEN)
    return found.sort_values("ratio", na_position="first", kind="stable")


def summarise(compared: pd.DataFrame) -> pd.DataFrame:
    """The sums of each group, in the order of the rows, and of all."""
    both = pd.concat([compared.sort_index(), compared.assign(group="all")])
    by_group = both.assign(failed=both["error"] != "").groupby("group", sort=False)
    found = by_group["ratio"].agg(worst="min", median="median", best="max")
    counts = by_group["verdict"].value_counts().unstack(fill_value=0).reindex(columns=VERDICTS, fill_value=0)
    found = counts.loc[found.index].join(found)
    found["without a right result"], found["memory, worst"] = by_group["failed"].sum(), by_group["memory"].max()
    return found.reset_index()


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
TITLES = dict(
    ms_median="ms", ms_iqr="iqr", peer_best="best peer", ms_median_best="its ms", low="from", high="to",
    megabytes="peak MB", megabytes_best="its peak", tflops="TFLOP/s", tokens_per_s="tokens/s", rel_error="rel. error",
    budget_used="of its budget",
)  # fmt: skip
COMPARED = [
    "case", "pass", "served", "ms_median", "peer_best", "ms_median_best", "ratio", "low", "high", "verdict",
    "megabytes", "megabytes_best", "error",
]  # fmt: skip
ROWS = [
    "case", "pass", "peer", "ms_median", "ms_iqr", "ratio", "tflops", "tokens_per_s", "rel_error", "budget_used",
    "checked", "megabytes", "error",
]  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _table(frame: pd.DataFrame, width: int | None = None) -> str:
    """A frame as text, with three significant digits, empty where there is nothing to tell; without empty columns."""
    told = frame.mask(frame == "").dropna(axis="columns", how="all").rename(columns=TITLES)
    options: dict[str, Any] = dict(index=False, na_rep="", float_format=_number, max_colwidth=width)
    return told.to_string(**options) if len(told) else "nothing"


def terminal(results: Results) -> str:
    """The worst comparisons, who served how much, and the sums of each group."""
    frame = results.frame
    if frame.empty:
        return "no rows"
    compared = compare(frame)
    worst = _table(compared[COMPARED].head(SHOWN), width=60)
    if len(compared) > SHOWN:
        worst += f"\n... and {len(compared) - SHOWN} with a larger ratio, in {results.path.with_suffix('.md')}"
    tables = [worst, _table(count_peers(frame, compared)), _table(summarise(compared))]
    return "\n\n".join(["their time over ours, worst first", *tables])


def markdown(results: Results, plots: list[Path]) -> str:
    """The whole run in markdown, with links to its plots. It belongs beside the results file."""
    header, frame = results.header, results.frame
    parts = [f"# {header['device']}, {header['started'][:10]}"]
    if not header["complete"]:
        parts.append("**The run is not complete: this is what it measured so far.**")
    compared, ours = compare(frame), frame["peer"][frame["ours"]].unique()
    tables = {"Where": json.dumps(header, indent=1)}
    tables |= {f"Summary of {name}": _table(summarise(compare(frame, name))) for name in ours}
    tables |= {"Peers": _table(count_peers(frame, compared)), "Worst first": _table(compared[COMPARED])}
    rows = frame.merge(compared[[*PLACE, "ms_median"]], "left", PLACE, suffixes=("", "_ours"))
    rows["ratio"] = rows["ms_median"] / rows["ms_median_ours"]
    for group, part in rows.groupby("group", sort=False):
        # Fastest first in each pass of a case, those without a time last, with their error.
        part = part.sort_values(["case", "pass", "ms_median"], kind="stable", na_position="last")
        tables[group] = _table(part[ROWS])
    method = quote(os.path.relpath(ROOT / "README.md", results.path.parent))
    parts += [f"[How it was measured]({method})", *(f"![{path.stem}]({quote(path.name)})" for path in plots)]
    parts += [f"## {title}\n\n```text\n{table}\n```" for title, table in tables.items()]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def draw(results: Results) -> Iterator[tuple[str, Any]]:
    """Speed and memory against length, for every dtype and mask that was measured at several: figures with names. Each
    has a panel for a pass and a head dim, and in it a line for a peer."""
    from matplotlib.figure import Figure

    frame = results.frame
    # Calls that differ in length, head dim, dtype and mask alone.
    alike = frame["group"].isin(("lengths", "cpu: causal", "cpu: no mask")) & ~frame["case"].str.contains("thread")
    frame = frame[alike & (frame["error"] == "")]
    frame = frame.assign(length=frame["shape"].str[3], dim=frame["shape"].str[5])
    for (dtype, mask), part in frame.groupby(["dtype", "mask"]):
        panels = part.groupby(["pass", "dim"], sort=False)
        for column, label in dict(tflops="TFLOP/s", megabytes="peak MB beyond the inputs").items():
            if part["length"].nunique() == 1:
                continue
            figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
            for axes, ((name, dim), lines) in zip(
                figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
            ):
                told = dict(title=f"{name}, head dim {dim}", ylabel=label, ylim=(0, None), marker=".")
                lines.pivot_table(column, "length", "peer", sort=False).sort_index().plot(ax=axes, **told)
                axes.set_xscale("log", base=2)
            figure.suptitle(f"{results.header['device']}: {dtype}, mask: {mask}")
            yield f"{column}-{dtype}-{mask}", figure


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
