"""What a run leaves behind: a header that says where it was measured, and rows with every sample, as one JSON file.

The file is written anew after every case, in one step, so that a run which is interrupted keeps what it measured and
can go on from there, in the environment that it began in.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["FIELDS", "ROOT", "Results", "Row", "results_folder"]

ROOT = Path(__file__).resolve().parent / "results"
SCHEMA = 2
Row = dict[str, Any]

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
    "ms_kernels": "of a call in a CUDA graph of many: no host in it, and no flush of the L2 cache",
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
        self.rows: dict[tuple[str, str, str], Row] = {}

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows.values())

    def __contains__(self, key: tuple[str, str, str]) -> bool:
        return key in self.rows

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
            header = loaded["header"]
            if header.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            results = Results(path, header)
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
