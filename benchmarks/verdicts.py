"""Who is faster: ours beside the fastest of all others, in the same pass of the same case.

A row counts as a time only if it has no error, so a wrong result is never the best and never wins. The verdicts:

- win, loss: the ranges of the medians that the rounds gave do not overlap;
- even: they do;
- alone: no other peer gave a right result;
- loss, too: ours gave none, whatever the others did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flash_attend.backends import BackwardName
from results import Results, Row

__all__ = [
    "ALONE",
    "EVEN",
    "LOSS",
    "OURS",
    "VERDICTS",
    "WIN",
    "Comparison",
    "compare",
    "count_failed",
    "count_verdicts",
    "grouped",
    "header_entry",
    "is_wrong",
    "one_line",
    "our_names",
    "time_of",
]

# Peers of ours -> the backend that each asks for by name, and its backward. The first that a run holds stands for us.
OURS: dict[str, tuple[str, BackwardName]] = {
    "flash_attend": ("triton", "separate"),
    "flash_attend fused": ("triton", "fused"),
    "flash_attend hopper": ("hopper", "separate"),
    "flash_attend hopper fused": ("hopper", "fused"),
    "flash_attend math": ("math", "einsum"),
}
WIN, EVEN, LOSS, ALONE = VERDICTS = ("win", "even", "loss", "alone")

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def time_of(row: Row) -> float | None:
    """The milliseconds of a call; None for a row with an error, whatever else it holds."""
    return None if row.error else row.ms_median


def _interval(row: Row) -> tuple[float, float]:
    """Where the medians of the rounds lie. The spread of single calls says little of how well a median is known."""
    rounds = row.ms_rounds or (row.ms_median,)
    return min(rounds), max(rounds)


@dataclass(frozen=True)
class Comparison:
    """Ours and the fastest other peer in one pass of one case."""

    ours: Row
    best: Row | None  # None where no other peer has a time

    @property
    def ratio(self) -> float | None:
        """Their time over ours: above 1, ours is faster. None unless both have one."""
        if self.best is None or time_of(self.ours) is None:
            return None
        return self.best.ms_median / self.ours.ms_median

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if time_of(self.ours) is None:
            return LOSS
        if self.best is None:
            return ALONE
        (low, high), (best_low, best_high) = _interval(self.ours), _interval(self.best)
        if low <= best_high and best_low <= high:
            return EVEN
        return WIN if self.ratio > 1 else LOSS

    @property
    def outcome(self) -> str:
        """The ratio and the verdict in words."""
        return self.verdict if self.ratio is None else f"{self.ratio:.2f}x {self.verdict}"


def our_names(results: Results) -> list[str]:
    """Those of ours that a run holds: first the one that stands for us, then what has a time.

    The einsum path is only told of where it is alone.
    """
    held, timed = {row.peer for row in results}, {row.peer for row in results if time_of(row) is not None}
    names = [name for name in OURS if name in held]
    return names[:1] + [name for name in names[1:] if name in timed and OURS[name][0] != "math"]


def compare(results: Results, name: str = "") -> list[Comparison]:
    """The comparisons of a run, in the order of its rows: of the one of ours that is named, or that stands for us."""
    best: dict[tuple[str, str], Row] = {}
    for row in results:
        place = row.case, row.pass_
        if row.peer not in OURS and time_of(row) is not None:
            best[place] = min(best.get(place, row), row, key=time_of)
    name = name or next(iter(our_names(results)), "")
    return [Comparison(row, best.get((row.case, row.pass_))) for row in results if row.peer == name]


def count_failed(comparisons: Iterable[Comparison]) -> int:
    """In how many there is no right result of ours."""
    return sum(time_of(comparison.ours) is None for comparison in comparisons)


def count_verdicts(comparisons: Sequence[Comparison]) -> str:
    """All verdicts as text: 3 wins, 1 even, 2 losses (1 without a right result of ours), 1 alone."""
    counts = Counter(comparison.verdict for comparison in comparisons)
    failed = count_failed(comparisons)
    return (
        f"{counts[WIN]} win{'s' * (counts[WIN] != 1)}, {counts[EVEN]} even"
        f", {counts[LOSS]} loss{'es' * (counts[LOSS] != 1)}"
        + (f" ({failed} without a right result of ours)" if failed else "")
        + (f", {counts[ALONE]} alone" if counts[ALONE] else "")
    )


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items by key, both in the order of first appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def one_line(text: str, limit: int = 10_000) -> str:
    """Printable text on one line, cut at `limit` characters."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def is_wrong(row: Row) -> bool:
    """Whether the gate refused the row's result."""
    return row.error.startswith("wrong")


def header_entry(header: dict[str, Any], name: str) -> str:
    """An entry of a header as text."""
    value = header.get(name)
    return f"unknown {name}" if value is None else str(value)
