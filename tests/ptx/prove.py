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
from dataclasses import dataclass
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


def attempts(index: str) -> list[list]:
    """Of each mistake that a subject can have: how often it was a fault and a wrong result, where it was neither, and
    seconds. Reasons come later, so that what was executed outlives them."""
    recording = recorded(SUBJECTS[int(index)])
    made = []
    for mistake in MISTAKES:
        start = time.process_time()
        places = places_of(recording, mistake)
        outcomes = [attempt(recording, mistake, place) for place in places]
        if outcomes:
            found = Counter(outcome.found for outcome in outcomes)
            missed = [outcome.where for outcome in outcomes if not outcome.found]
            made.append([mistake, found["fault"], found["result"], missed, round(time.process_time() - start, 1)])
    return made


def mutant_rows(index: str, made: list[list]) -> list[Row]:
    """With the reason for everything of which nothing came, where there is one."""
    subject, rows = SUBJECTS[int(index)], []
    for mistake, faults, results, missed, seconds in made:
        reasons = {where: reason_for(subject, mistake, where) for where in missed}
        because = "; ".join(sorted({row.reason for row in reasons.values() if row}))
        unknown = "; ".join(where for where, row in reasons.items() if not row)
        counts = [str(count or "") for count in (faults, results, len(missed))]
        wrong = f"NOT FOUND: {unknown}" if unknown else ""
        rows.append([wrong, str(subject), mistake, *counts, because, str(seconds)])
    return rows


@dataclass(frozen=True)
class Table:
    head: Row
    work: Callable[[str], list]  # what is executed of one task, in a process of its own; kept by `--resume`
    rows: Callable[[str, list], list[Row]] = lambda key, rows: rows  # what the table says of it


TABLES = {
    "calls": Table(["", "call: error as a share of the budget", *GRADS, "CPU s", "instructions of warps"], call_rows),
    "mutants": Table(
        ["", "kernel", "mistake", "faults", "wrong results", "nothing", "because", "CPU s"], attempts, mutant_rows
    ),
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
    kept = _executed(tasks, options.jobs, options.resume)
    rows = {(kind, key): TABLES[kind].rows(key, kept[kind, key]) for kind, key in tasks}
    tables = [
        _table(table.head, [row for task in tasks if task[0] == kind for row in rows[task]])
        for kind, table in TABLES.items()
    ]
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


def _executed(tasks: list[tuple[str, str]], jobs: int, resume: Path | None) -> dict[tuple[str, str], list]:
    """What came of every task, by itself in a process. What `resume` has is not done again."""
    done = _kept(resume) if resume else {}
    left = [task for task in tasks if task not in done]
    with (
        ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
        tqdm(total=len(left), unit="task", desc="proving", file=sys.stderr, disable=None) as progress,
    ):
        futures = {pool.submit(TABLES[kind].work, key): (kind, key) for kind, key in left}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            if resume:
                with resume.open("a") as file:
                    print(json.dumps([*futures[future], future.result()]), file=file)
            progress.update()
    return done


def _kept(path: Path) -> dict[tuple[str, str], list]:
    """What a file has of the same kernels and the same proof: its first line tells them. Others begin anew."""
    sources = sorted(x for folder in (launch.__file__, __file__) for x in Path(folder).parent.rglob("*.py"))
    executed = [x for x in sources if x.name != "harmless.py" and not x.name.startswith("test_")]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in executed)).hexdigest()
    lines = path.read_text().splitlines() if path.exists() else []
    if lines[:1] != [digest]:
        path.write_text(digest + "\n")
        return {}
    return {(kind, key): made for kind, key, made in map(json.loads, lines[1:])}


if __name__ == "__main__":
    sys.exit(main())
