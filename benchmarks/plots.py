"""The plots of a run: rates and memory against length, and speed-ups case by case."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cases import BOTH, FORWARD, PASSES
from results import Results, Row
from verdicts import (
    ALONE,
    EVEN,
    LOSS,
    OURS,
    VERDICTS,
    WIN,
    Comparison,
    compare,
    grouped,
    header_entry,
    is_wrong,
    one_line,
    time_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plots"]

SWEEPS = ("lengths", "on a CPU")  # the groups that hold lengths of otherwise equal cases
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
}
DPI = 110
BLUE = "#0072B2"
VERDICT_COLOURS = {WIN: BLUE, EVEN: "0.5", LOSS: "#D55E00", ALONE: "#009E73"}
CEILING = dict(color="0.3", linestyle=":", linewidth=1, label="matrix product")
OTHERS = "other peers"
CLOSE_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2)  # of ratios; beyond these the powers of two
FAR_TICKS = tuple(2.0**exponent for exponent in range(-10, 11))
OUR_LINES = (("-", 3.0), ("-.", 2.0), ("--", 2.0), ((0, (6, 1, 1, 1, 1, 1)), 2.0), (":", 1.5))  # one for each of `OURS`
# What people with any kind of colour vision tell apart (Okabe and Ito), each with a marker of its own.
COLOURS = (("#E69F00", "s"), ("#009E73", "^"), ("#D55E00", "D"), ("#CC79A7", "v"), ("#56B4E9", "P"), ("#000000", "X"))


def _sweep(results: Results) -> list[Row]:
    """The rows with a time that differ in length, head dim and the causal rule alone."""

    def is_plain(row: Row) -> bool:
        _, heads, kv_heads, queries, keys, head_dim, value_dim = row.shape
        square = (heads, queries, head_dim) == (kv_heads, keys, value_dim)
        return square and row.mask in ("none", "causal") and "dropout" not in row.case

    return [row for row in results if row.group in SWEEPS and time_of(row) is not None and is_plain(row)]


def _line_styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """How each peer is drawn: ours blue and thick, those nearest to the fastest in colour, the others grey."""
    scores: dict[str, float] = defaultdict(float)
    for members in grouped(rows, lambda row: (row.case, row.pass_)).values():
        least = min(map(time_of, members))
        for row in members:
            scores[row.peer] += least / time_of(row)
    ranked = sorted((peer for peer in scores if peer not in OURS), key=lambda peer: (-scores[peer], peer))
    held = [name for name in OURS if name in scores]
    styles: dict[str, dict[str, Any]] = {}
    for name, (line, width) in zip(held, OUR_LINES, strict=False):
        styles[name] = dict(color=BLUE, linestyle=line, linewidth=width, marker="o", markersize=5, zorder=4, label=name)
    for peer, (colour, marker) in zip(ranked, COLOURS, strict=False):
        styles[peer] = dict(color=colour, linewidth=1.3, marker=marker, markersize=4, zorder=3, label=_plain(peer))
    for peer in ranked[len(COLOURS) :]:
        styles[peer] = dict(color="0.75", linewidth=1.0, marker=".", markersize=3, zorder=2, label=OTHERS)
    return styles


def _plain(text: str, limit: int = 60) -> str:
    """Text that matplotlib draws as it is: a dollar would begin a formula, an underscore keep a line off the legend."""
    return one_line(text, limit).replace("$", r"\$").lstrip("_")


def _small_multiples(
    rows: Sequence[Row],
    styles: dict[str, dict[str, Any]],
    value: Callable[[Row], float | None],
    title: str,
    label: str,
    *,
    log: bool = False,
    ceiling: float | None = None,
) -> Figure | None:
    """Values against length: a row of panels for each pass, a column for each head dim. None without two lengths."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in rows if row.peer in styles and value(row) is not None]
    lengths = sorted({row.shape[3] for row in rows})
    if len(lengths) < 2:
        return None
    panels = grouped(rows, lambda row: (row.pass_, row.shape[5]))
    passes = [name for name in PASSES if any(name == pass_ for pass_, _ in panels)]
    dims = sorted({dim for _, dim in panels})
    drawn = {row.peer for row in rows}
    handles = {style["label"]: Line2D([], [], **style) for peer, style in styles.items() if peer in drawn}
    if ceiling is not None and ceiling > 3 * max(map(value, rows)):
        ceiling = None  # so far away that the lines would lie on the axis
    figure = Figure(figsize=(max(6.0, 0.6 + 3.1 * len(dims)), 1.1 + 2.0 * len(passes)), layout="constrained")
    grid = figure.subplots(len(passes), len(dims), squeeze=False, sharex=True, sharey="row")
    for pass_, line in zip(passes, grid, strict=True):
        for dim, axes in zip(dims, line, strict=True):
            if (pass_, dim) not in panels:
                axes.remove()
                continue
            for peer, members in grouped(panels[pass_, dim], lambda row: row.peer).items():
                points = sorted((row.shape[3], value(row)) for row in members)
                axes.plot(*zip(*points, strict=True), **styles[peer])
            if ceiling is not None:
                handles[CEILING["label"]] = axes.axhline(ceiling, **CEILING)
            axes.set_title(f"{pass_}, head dim {dim}")
            if dim == next(first for first in dims if (pass_, first) in panels):
                axes.set_ylabel(label)
            if pass_ == next(name for name in reversed(passes) if (name, dim) in panels):
                axes.set_xlabel("length")
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, labels=map(str, lengths))
            axes.tick_params(labelbottom=True, labelleft=True)
            if log:
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
            else:
                axes.set_ylim(bottom=0)
    figure.suptitle(title)
    columns = int(figure.get_figwidth() / 2.4)
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=columns, handlelength=3)
    return figure


def _length_figures(results: Results) -> Iterator[tuple[str, Figure | None]]:
    """Rates and memory against length, by dtype and the causal rule."""
    sweep = _sweep(results)
    styles = _line_styles(sweep)
    coloured = {peer: style for peer, style in styles.items() if style["label"] != OTHERS}
    ceilings = (results.header.get("ceilings") or {}).get("tflops") or {}
    device = _plain(header_entry(results.header, "device"))
    for (dtype, mask), rows in grouped(sweep, lambda row: (row.dtype, row.mask)).items():
        kind = "causal" if mask == "causal" else "full"
        title = f"{device}: {dtype}, {kind}"
        ceiling = ceilings.get(dtype)
        rates = _small_multiples(rows, styles, lambda row: row.tflops, title, "TFLOP/s", ceiling=ceiling)
        yield f"tflops-{dtype}-{kind}", rates
        whole = [row for row in rows if row.pass_ in (FORWARD, BOTH)]
        memory = _small_multiples(
            whole,
            coloured,
            lambda row: row.peak_bytes / 1e6 if row.peak_bytes else None,
            f"{title}: peak memory beyond the inputs",
            "MB",
            log=True,
        )
        yield f"memory-{dtype}-{kind}", memory


def _speedup_figure(title: str, comparisons: Sequence[Comparison]) -> Figure:
    """A bar for each case, in groups, from 1 to the ratio on a log axis."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bars: list[tuple[str, Comparison | None]] = []  # None: the heading of a group
    for group, members in grouped(comparisons, lambda comparison: comparison.ours.group).items():
        bars.append((_plain(group), None))
        bars += [
            (_plain(comparison.ours.case), comparison)
            for comparison in sorted(members, key=lambda comparison: -(comparison.ratio or 0.0))
        ]
    figure = Figure(figsize=(9.0, 1.2 + 0.17 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for place, (_, comparison) in enumerate(bars):
        if comparison is None:
            continue
        colour = VERDICT_COLOURS[comparison.verdict]
        if comparison.ratio is not None:
            axes.barh(place, comparison.ratio - 1, left=1, color=colour, height=0.75)
            text = f"{comparison.ratio:.2f}x  {_plain(comparison.best.peer, 30)}"
        elif comparison.verdict == ALONE:
            text = "alone"
        else:
            text = "ours is wrong" if is_wrong(comparison.ours) else "ours does not serve"
        axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), va="center", color=colour, fontsize=7)
    axes.set_yticks(range(len(bars)), labels=[label for label, _ in bars], fontsize=7)
    for tick, (_, comparison) in zip(axes.get_yticklabels(), bars, strict=True):
        tick.set_fontweight("bold" if comparison is None else "normal")
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.axvline(1, color="0.3", linewidth=1)
    ratios = [comparison.ratio for comparison in comparisons if comparison.ratio is not None]
    low, high, ticks = min([0.8, *ratios]), max([1.25, *ratios]), CLOSE_TICKS
    if low < ticks[0] or high > ticks[-1]:
        low, high, ticks = min(low, ticks[0]), max(high, ticks[-1]), FAR_TICKS
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low * 0.97, high * 1.03)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time of the fastest other peer over ours: above 1, ours is faster")
    found = {comparison.verdict for comparison in comparisons}
    handles = [Patch(color=VERDICT_COLOURS[verdict], label=verdict) for verdict in VERDICTS if verdict in found]
    figure.suptitle(f"{title}: {comparisons[0].ours.peer} against the fastest other peer")
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def plots(results: Results, folder: Path) -> list[Path]:
    """Draws what the rows allow, as PNG files in `folder`: rates and memory against length, and speed-ups by case.

    A picture without data is left out. Returns the files.
    """
    import matplotlib

    device = _plain(header_entry(results.header, "device"))
    paths = []
    with matplotlib.rc_context(STYLE):
        figures = list(_length_figures(results))
        for pass_, comparisons in grouped(compare(results), lambda item: item.ours.pass_).items():
            if any(comparison.ratio is not None for comparison in comparisons):
                figures.append((f"speedup-{pass_}", _speedup_figure(f"{device}, {pass_}", comparisons)))
        for name, figure in figures:
            if figure is not None:
                path = folder / f"{results.path.stem}-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.png"
                figure.savefig(path, dpi=DPI)
                paths.append(path)
    return paths
