"""Executes every call of the proof and puts every mistake into the PTX, with a progress bar and a table.

    python tests/ptx/prove.py [--only REGEX] [--jobs N] [--no-mutants | --no-calls]

The exit code is 1 if a call ends in a fault or outside of the error budget, or a mistake is not found and no reason is
known why nothing comes of it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from tqdm import tqdm

from executions import EXECUTIONS, judge
from mutants import HARMLESS, MISTAKES, SOMEWHERE, SUBJECTS, missed, outcomes, recorded

PLACES = 3  # of each mistake in a kernel


@dataclass(frozen=True)
class Row:
    """A line of the table, and whether all is well."""

    text: str
    right: bool


def call_rows(name: str) -> list[Row]:
    start = time.process_time()
    try:
        result = judge(EXECUTIONS[name])
    except Exception as error:  # whatever stops one call is a finding about that call, not the end of the table
        return [Row(f"{name:<58}{time.process_time() - start:>7.1f} s  {type(error).__name__}: {error}", False)]
    running = sum(launched.running for launched in result.launches)
    instructions = sum(launched.instructions for launched in result.launches)
    worst = max(result.shares, key=result.shares.__getitem__)
    share = f"{worst} {result.shares[worst]:.2f} of the budget"
    return [Row(f"{name:<58}{result.seconds:>7.1f} s{running:>7.1f} s{instructions:>10}  {share}", True)]


def mutant_rows(index: str) -> list[Row]:
    subject = SUBJECTS[int(index)]
    recording = recorded(subject)
    rows = []
    for mistake in MISTAKES:
        found = outcomes(recording, mistake, PLACES)
        if not found:
            continue
        counts = [sum(outcome.found == how for outcome in found) for how in ("fault", "result", "")]
        lines = missed(subject, mistake, found)
        reason = HARMLESS.get((subject.kernel, mistake)) or SOMEWHERE.get(mistake, "")
        note = f"NOT FOUND in lines {lines}" if lines else reason if counts[2] else ""
        line = f"{subject.name:<70}{mistake:<34}" + "".join(f"{count:>8}" for count in counts)
        rows.append(Row(f"{line}  {note}", not lines))
    return rows


TABLES = {
    call_rows: f"{'call':<58}{'CPU':>9}{'executing':>9}{'executed':>10}  largest error",
    mutant_rows: f"{'kernel':<70}{'mistake':<34}{'fault':>8}{'result':>8}{'neither':>8}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="only calls and kernels whose name has this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes, one for each core")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--no-mutants", action="store_true", help="only the calls")
    which.add_argument("--no-calls", action="store_true", help="only the mistakes")
    options = parser.parse_args(arguments)
    tasks = [] if options.no_calls else [(call_rows, name, name) for name in EXECUTIONS]
    tasks += [] if options.no_mutants else [(mutant_rows, str(n), x.name) for n, x in enumerate(SUBJECTS)]
    tasks = [(make, key) for make, key, name in tasks if re.search(options.only, name)]
    if not tasks:
        parser.error(f"nothing matches {options.only!r}")
    rows = _in_processes(tasks, options.jobs)
    for make, head in TABLES.items():
        if any(task[0] is make for task in tasks):
            print(f"\n{head}")
        for task in tasks:
            if task[0] is make:
                print("\n".join(row.text for row in rows[task]))
    wrong = sum(not row.right for found in rows.values() for row in found)
    print(f"\n{sum(map(len, rows.values()))} rows, {wrong} wrong", file=sys.stderr)
    return 1 if wrong else 0


def _in_processes(tasks: list[tuple], jobs: int) -> dict[tuple, list[Row]]:
    rows = {}
    with (
        ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
        tqdm(total=len(tasks), unit="task", desc="proving", file=sys.stderr, disable=None) as progress,
    ):
        futures = {pool.submit(make, key): (make, key) for make, key in tasks}
        for future in as_completed(futures):
            rows[futures[future]] = future.result()
            progress.update()
    return rows


if __name__ == "__main__":
    sys.exit(main())
