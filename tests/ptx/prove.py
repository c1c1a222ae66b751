"""Executes every call of the proof and puts every mistake into the PTX, with a progress bar and tables in Markdown.

    python tests/ptx/prove.py [--only REGEX] [--jobs N] [--no-mutants | --no-calls] [--to FILE] [--resume FILE]

The exit code is 1 if a call ends in a fault or outside of the error budget, or a mistake is not found and no reason is
known why nothing comes of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from executions import EXECUTIONS, judge
from flash_attend.kernels import launch
from harmless import reason_for
from mistakes import MISTAKES
from mutants import SUBJECTS, attempt, places_of, recorded

Row = list[str]  # the cells of a line of a table; the first is empty, or says what is wrong
GRADS = ("out", "lse", "dq", "dk", "dv")


def call_rows(name: str) -> list[Row]:
    start = time.process_time()
    try:
        result = judge(EXECUTIONS[name])
    except Exception as error:  # whatever stops one call is a finding about that call, not the end of the table
        seconds = time.process_time() - start
        return [[f"{type(error).__name__}: {error}".split("\n")[0], name, *[""] * len(GRADS), f"{seconds:.1f}", ""]]
    shares = [f"{result.shares[grad]:.2f}" if grad in result.shares else "" for grad in GRADS]
    instructions = sum(launched.instructions for launched in result.launches)
    return [["", name, *shares, f"{result.seconds:.1f}", str(instructions)]]


def mutant_rows(index: str) -> list[Row]:
    subject = SUBJECTS[int(index)]
    recording = recorded(subject)
    rows = []
    for mistake in MISTAKES:
        start = time.process_time()
        found, missed, reasons = Counter(), [], set()
        for place in places_of(recording, mistake):
            outcome = attempt(recording, mistake, place)
            reason = None if outcome.found else reason_for(subject, mistake, place.where)
            found[outcome.found] += 1
            reasons |= {reason.reason} if reason else set()
            missed += [] if outcome.found or reason else [place.where]
        if found:
            counts = [str(found[how] or "") for how in ("fault", "result", "")]
            seconds = f"{time.process_time() - start:.1f}"
            wrong = f"NOT FOUND: {'; '.join(missed)}" if missed else ""
            rows.append([wrong, str(subject), mistake, *counts, "; ".join(sorted(reasons)), seconds])
    return rows


TABLES: dict[str, tuple[Callable[[str], list[Row]], Row]] = {
    "calls": (call_rows, ["", "call: error as a share of the budget", *GRADS, "CPU s", "instructions of warps"]),
    "mutants": (mutant_rows, ["", "kernel", "mistake", "faults", "wrong results", "nothing", "because", "CPU s"]),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="only calls and kernels whose name has this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes, one for each core")
    parser.add_argument("--to", type=Path, metavar="FILE", help="writes the tables here too")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keeps here what is done, and goes on from there")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--no-mutants", action="store_true", help="only the calls")
    which.add_argument("--no-calls", action="store_true", help="only the mistakes")
    options = parser.parse_args(arguments)
    tasks = [] if options.no_mutants else [("mutants", str(n), str(x)) for n, x in enumerate(SUBJECTS)]  # the long ones
    tasks += [] if options.no_calls else [("calls", name, name) for name in EXECUTIONS]
    tasks = [(kind, key) for kind, key, name in tasks if re.search(options.only, name)]
    if not tasks:
        parser.error(f"nothing matches {options.only!r}")
    start = time.time()
    kept = _rows_of(tasks, options.jobs, options.resume)
    rows = {task: kept[task] for task in tasks}
    tables = [_table(head, [row for task in tasks if task[0] == kind for row in rows[task]])
              for kind, (_, head) in TABLES.items()]  # fmt: skip
    wrong = sum(bool(row[0]) for found in rows.values() for row in found)
    minutes = f"{(time.time() - start) / 60:.1f} minutes with {options.jobs} processes"
    text = "\n\n".join([*filter(None, tables), f"{sum(map(len, rows.values()))} rows, {wrong} wrong, in {minutes}."])
    print(text)
    if options.to:
        options.to.write_text(text + "\n")
    return 1 if wrong else 0


def _table(head: Row, rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _rows_of(tasks: list[tuple[str, str]], jobs: int, resume: Path | None) -> dict[tuple[str, str], list[Row]]:
    """The rows of every task, by itself in a process. What `resume` has is not done again."""
    rows = _kept(resume) if resume else {}
    left = [task for task in tasks if task not in rows]
    with (
        ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
        tqdm(total=len(left), unit="task", desc="proving", file=sys.stderr, disable=None) as progress,
    ):
        futures = {pool.submit(TABLES[kind][0], key): (kind, key) for kind, key in left}
        for future in as_completed(futures):
            rows[futures[future]] = future.result()
            if resume:
                with resume.open("a") as file:
                    print(json.dumps([*futures[future], future.result()]), file=file)
            progress.update()
    return rows


def _kept(path: Path) -> dict[tuple[str, str], list[Row]]:
    """What a file has of the same kernels and tests: its first line tells them. Others begin anew."""
    sources = sorted(x for folder in (launch.__file__, __file__) for x in Path(folder).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    lines = path.read_text().splitlines() if path.exists() else []
    if lines[:1] != [digest]:
        path.write_text(digest + "\n")
        return {}
    return {(kind, key): rows for kind, key, rows in map(json.loads, lines[1:])}


if __name__ == "__main__":
    sys.exit(main())
