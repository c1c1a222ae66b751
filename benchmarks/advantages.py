"""Where one of our backends was faster than those that would serve in its place: the evidence for "auto" to choose it.

A run's cases are told apart as `flash_attend.validation.Calls` does. In each kind of calls every case counts, forward
and forward with backward, that the backend served and one that comes after it in `dispatch.BACKENDS` served too. It was
faster there if it won more of them than it lost, and lost none by more than 5%; what is within the spread is neither. A
wrong result, or an error other than a refusal, spoils the whole kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cases import BOTH, DTYPES, FORWARD
from flash_attend.dispatch import BACKENDS, UNMEASURED
from flash_attend.spec import MaskKind
from flash_attend.validation import Calls
from results import Results, Row
from verdicts import EVEN, LOSS, OURS, WIN, Comparison, grouped, time_of

__all__ = ["Advantage", "advantages", "calls_of", "row_source"]

WORST = 0.95  # the least ratio of times in a case that is lost by a backend which is faster on the whole
PASSES = (FORWARD, BOTH)
KINDS = dict.fromkeys(DTYPES, "half") | {"tf32": "tf32", "float32": "tf32x3", "float64": "double"}
REFUSAL = "BackendUnavailable"  # how the error of a row begins where the backend does not serve the case


@dataclass(frozen=True)
class Advantage:
    """A backend beside the fastest of those after it, in one kind of calls."""

    calls: Calls
    comparisons: tuple[Comparison, ...]  # of cases that both served
    spoiled: str = ""  # a case that failed, and how

    @property
    def worst(self) -> Comparison:
        """The case in which it looks worst."""
        return min(self.comparisons, key=lambda each: each.ratio)

    @property
    def found(self) -> bool:
        """Whether it was faster."""
        wins, losses = ([each.ratio for each in self.comparisons if each.verdict == verdict] for verdict in (WIN, LOSS))
        return not self.spoiled and len(wins) > len(losses) and all(ratio >= WORST for ratio in losses)

    def __str__(self) -> str:
        if self.spoiled:
            return f"{self.calls}: {self.spoiled}"
        counts = Counter(each.verdict for each in self.comparisons)
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (WIN, EVEN, LOSS))
        row, best = self.worst.ours, self.worst.best
        return f"{self.calls}: {told}; at worst {self.worst.ratio:.2f}x of {best.peer}, {row.case}, {row.pass_}"


def calls_of(row: Row) -> Calls:
    """The kind of calls that a row is about."""
    words = set(row.mask.split()) - {"none", "causal"}
    dense = any(word.startswith("documents") for word in words)
    mask = MaskKind.DENSE if dense else MaskKind.KEY if words else MaskKind.NONE
    *_, head_dim, value_dim = row.shape
    return Calls(KINDS[row.dtype], head_dim, value_dim, mask)


def advantages(results: Results, backend: str) -> list[Advantage]:
    """What a run says of a backend, by kind of calls; nothing where it served none beside another of ours."""
    later = BACKENDS[BACKENDS.index(backend) + 1 :]
    own = [row for row in results if OURS.get(row.peer) == backend and row.pass_ in PASSES]
    best: dict[tuple[str, str], Row] = {}
    for row in results:
        if OURS.get(row.peer) in later and time_of(row) is not None:
            place = row.case, row.pass_
            best[place] = min(best.get(place, row), row, key=time_of)
    found = []
    for calls, rows in grouped((row for row in own if not row.error.startswith(REFUSAL)), calls_of).items():
        spoiled = next((f"{row.case}, {row.pass_}: {row.error}" for row in rows if row.error), "")
        places = ((row, best.get((row.case, row.pass_))) for row in rows if not row.error)
        comparisons = tuple(Comparison(row, rival) for row, rival in places if rival is not None)
        if spoiled or comparisons:
            found.append(Advantage(calls, comparisons, spoiled))
    return found


def row_source(backend: str, arch: str, facts: dict[str, Any], found: Iterable[Advantage]) -> str:
    """The row of `FASTER`, as flash_attend/validation.py has it; empty where the backend was not, or need not be."""
    faster = [advantage.calls for advantage in found if advantage.found]
    if not faster or backend in UNMEASURED:
        return ""
    lines = [f'    ("{backend}", "{arch}"): Measurement(']
    lines += [f'        {name}="{value}",' for name, value in facts.items()]
    lines += ["        calls=("]
    lines += [
        f'            Calls("{calls.kind}", {calls.head_dim}, {calls.value_dim}, MaskKind.{calls.mask.name}),'
        for calls in faster
    ]
    return "\n".join([*lines, "        ),", "    ),"])
