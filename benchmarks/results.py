"""What a run leaves behind: a header that says where it was measured, and rows with every sample, as one JSON file.

The file is written anew after every case, in one step, so that a run which is interrupted keeps what it measured and
can go on from there. `measure.environment` makes the header; a run goes on only in the environment that it began in.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Results", "Row", "results_folder", "write_results"]

ROOT = Path(__file__).resolve().parent / "results"
SCHEMA = 1

# What may differ between the parts of one run.
PASSING = ("started", "ended", "complete", "clocks_before", "clocks_after", "ceilings")


@dataclass(frozen=True)
class Row:
    """One peer in one pass of one case. Times are in milliseconds of one call; None where it was not measured."""

    case: str
    group: str
    pass_: str  # "pass" in the file
    dtype: str
    mask: str  # Case.mask_words
    shape: tuple[int, ...]  # (b, h, hk, i, j, d, dv)
    peer: str
    ms_median: float | None = None  # the whole call, on the device's clock
    ms_iqr: float | None = None
    ms_rounds: tuple[float, ...] = ()  # the median of each round
    ms_kernels: float | None = None  # the median of a CUDA graph's replays: no host in it
    host_us: float | None = None  # what the host spends on a call, in microseconds
    first_call_s: tuple[float, float] | None = None  # with an empty and with a filled compile cache, in seconds
    tflops: float | None = None  # of the visible pairs: work.py
    ceiling_share: float | None = None  # the least time that the run's ceilings allow, over the median
    rel_error: float | None = None  # the largest of the results', in the 2-norm, against float64
    budget_used: float | None = None  # the largest share of the error budget; above 1 is wrong
    checked: str = ""  # what was checked
    peak_bytes: int | None = None  # beyond the inputs
    error: str = ""  # why there is no time: what the peer raised, or "wrong: ..."
    samples: tuple[tuple[float, ...], ...] = field(default=(), repr=False)  # by round

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes a row unique in a file."""
        return self.case, self.pass_, self.peer

    def as_json(self) -> dict[str, Any]:
        """The row under the names of the file."""
        return {name.rstrip("_"): value for name, value in asdict(self).items()}

    @staticmethod
    def from_json(loaded: dict[str, Any]) -> Row:
        """The row that `as_json` gave."""
        values = {f.name: loaded[f.name.rstrip("_")] for f in fields(Row)}
        for name in ("shape", "ms_rounds", "first_call_s"):
            values[name] = values[name] if values[name] is None else tuple(values[name])
        values["samples"] = tuple(tuple(samples) for samples in values["samples"])
        return Row(**values)


def results_folder(device_name: str) -> Path:
    """Where the results of a device belong: `results/nvidia-h200`."""
    return ROOT / re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def write_results(path: Path, header: dict[str, Any], name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a header and a line for each row, the whole file or nothing. `ValueError` for infinity and NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(header, indent=1, allow_nan=False)
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{"header": {head},\n"{name}": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(partial, path)


class Results:
    """The rows of one run, and the file they are kept in."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.rows: dict[tuple[str, str, str], Row] = {}

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows.values())

    def __contains__(self, key: tuple[str, str, str]) -> bool:
        return key in self.rows

    def add(self, row: Row) -> None:
        """Keeps a row, in place of an earlier one of the same case, pass and peer."""
        self.rows[row.key] = row

    def save(self) -> None:
        """Writes the file, whole or not at all. JSON knows no infinity and no NaN: such a number is a defect here."""
        write_results(self.path, {"schema": SCHEMA, **self.header}, "rows", (row.as_json() for row in self))

    @staticmethod
    def load(path: Path) -> Results:
        """Reads what `save` wrote. Raises `ValueError` for anything else."""
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
            header = loaded["header"]
            if header.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            results = Results(path, header)
            for row in loaded["rows"]:
                results.add(Row.from_json(row))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold results of this version: {error}") from error
        return results

    def differences(self, header: dict[str, Any]) -> list[str]:
        """In what an environment differs from that of these results, as far as numbers depend on it."""
        names = sorted((self.header.keys() | header.keys()) - set(PASSING))
        return [
            f"{name}: {self.header.get(name)!r}, now {header.get(name)!r}"
            for name in names
            if self.header.get(name) != header.get(name)
        ]
