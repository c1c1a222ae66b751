"""Proves our backends right on the GPU at hand, then measures them, in stages, and says what that validates.

    python benchmarks/validate.py                                   goes on where the last call stopped
    python benchmarks/validate.py --list                            the stages, and what each of them proves
    python benchmarks/validate.py --backend triton                  only what proves one backend
    python benchmarks/validate.py --reproduce 17 --backend hopper   one random call again, by its seed
    python benchmarks/validate.py --verdict                         what the results say of the commit checked out

Each backend that can serve on the part has a verdict of its own: a stage is a proof for one of them, or for all, and
what fails for one says nothing of the others. Which is faster where, the standard grid tells.

A call begins no stage that it may not finish in `--minutes`, and the next call goes on: what passed with these sources
in this environment is not run again, and what failed is run again after everything else. Results and logs are in
`benchmarks/results/<gpu>/validation/`; that folder is all that a call needs to know of earlier ones.

The exit code is 0 where every stage passed, 1 where one failed or could not run, 2 where nothing can be validated here,
and 3 where nothing failed and time ran out. What a reader has to judge does not count: it is printed every time.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

INSTALL = "pip install -e . --no-deps --no-build-isolation"
REFUSED, OUT_OF_TIME = 2, 3  # exit codes

if any(importlib.util.find_spec(name) is None for name in ("flash_attend", "flash_attend.kernels")):
    print(f"flash_attend is not installed with its kernels; in the repository's root: {INSTALL}", file=sys.stderr)
    sys.exit(REFUSED)

from advantages import advantages, row_source  # noqa: E402
from flash_attend.__main__ import REPRESENTATIVE  # noqa: E402
from flash_attend.dispatch import BACKENDS, UNMEASURED, judge  # noqa: E402
from flash_attend.target import DeviceTarget  # noqa: E402
from measure import environment  # noqa: E402
from results import ROOT as ALL_RESULTS  # noqa: E402
from results import Results, results_folder, write_results  # noqa: E402

__all__ = ["Ledger", "Outcome", "Record", "Stage", "Validator", "main", "stages", "verdict"]

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = Path(__file__).resolve().parent
PASSED, FAILED, TIMED_OUT, UNFINISHED, NOT_RUN = "passed", "FAILED", "TIMED OUT", "unfinished", "NOT RUN"
TO_JUDGE = "TO JUDGE"  # what was found may be a fault or not: only a reader can tell

# What the proofs are made with and about. The table of validated parts is what comes of them.
SOURCES = (
    "flash_attend/**/*.py",
    "kernels/**/*.py",
    "tests/*.py",
    "benchmarks/validate.py",
    "benchmarks/gpu_checks.py",
)
NO_SOURCE = "flash_attend/validation.py"
# A proof holds where all of these are the same. The commit is not among them: sources can be checked without git.
SAME = ("device", "arch", "driver", "cuda", "torch", "triton", "python", "sources")


def sources_digest(root: Path = ROOT) -> str:
    """A digest of the files that the proofs are about."""
    files = {file.relative_to(root).as_posix(): file for pattern in SOURCES for file in root.glob(pattern)}
    digest = hashlib.sha256()
    for name in sorted(files.keys() - {NO_SOURCE}):
        digest.update(f"{name}\0".encode() + files[name].read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# What a stage's process left behind
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: its status, a line that says what was found, and what is wrong, a line each."""

    status: str
    detail: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """A process that ended by itself."""

    code: int
    log: str
    folder: Path  # where the stage's files are

    @property
    def problems(self) -> tuple[str, ...]:
        """What it said is wrong: every `FAILED: ...`."""
        return tuple(line.removeprefix("FAILED: ") for line in self.log.splitlines() if line.startswith("FAILED: "))

    @property
    def last(self) -> str:
        """The last line: the summary, or the error."""
        return next((line for line in reversed(self.log.splitlines()) if line.strip()), "no output")


Reader = Callable[[Ended], Outcome]


def read_log(ended: Ended) -> Outcome:
    """By the exit code and by what it says."""
    if ended.code == 0 and not ended.problems:
        return Outcome(PASSED, ended.last)
    return Outcome(FAILED, f"exit code {ended.code}: {ended.last}", ended.problems or (ended.last,))


def read_pytest(ended: Ended, *, junit: str, may_skip: bool = True) -> Outcome:
    """By pytest's own XML: without it, or without a test that ran, nothing is proven."""
    try:
        cases = list(ElementTree.parse(ended.folder / junit).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return Outcome(FAILED, f"exit code {ended.code}, and no report: {ended.last}", (ended.last,))
    found: dict[str, list[str]] = {"failure": [], "error": [], "skipped": []}
    for case in cases:
        for result in case:
            if result.tag in found:
                said = (result.get("message") or result.text or "").strip().splitlines() or [""]
                found[result.tag].append(f"{case.get('name')}: {said[0][:200]}")
    problems = found["failure"] + found["error"]
    skipped = found["skipped"]
    ran = len(cases) - len(skipped)
    detail = f"{ran} tests ran, {len(problems)} failed, {len(skipped)} skipped"
    if not may_skip:
        problems += [f"skipped: {line}" for line in skipped]
    if not problems and ended.code != 0:
        problems.append(f"pytest ended with exit code {ended.code}")
    if not ran:
        problems.append("no test ran")
    return Outcome(FAILED if problems else PASSED, detail, tuple(problems))


SUMMARIES = {
    "memcheck": re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?", re.MULTILINE),
    "racecheck": re.compile(r"^=+ RACECHECK SUMMARY: (\d+) hazards?", re.MULTILINE),
}
FINDING = re.compile(r"^=+ (?! )(?!COMPUTE-SANITIZER|.*SUMMARY)(.+)\n(?:=+ +(at .+)\n)?", re.MULTILINE)


def read_sanitizer(ended: Ended, *, tool: str, finds: bool = False, certain: bool = True) -> Outcome:
    """By the tool's summary, which must be there. `finds`: a planted fault must be found, or the tool sees nothing.

    Not `certain`: what the tool finds need not be a fault.
    """
    summary = SUMMARIES[tool].search(ended.log)
    findings = dict.fromkeys(" ".join(filter(None, found)) for found in FINDING.findall(f"{ended.log}\n"))
    if summary is None:
        return Outcome(FAILED, f"{tool} gave no summary", tuple(findings) or (ended.last,))
    found = int(summary[1])
    detail = summary[0].lstrip("= ")
    if finds and found:
        return Outcome(PASSED, f"found as planted: {detail}")
    if finds:
        return Outcome(FAILED, detail, ("the planted fault was not found",))
    calls = re.search(r"^\d+ calls ran: .+", ended.log, re.MULTILINE)
    if found and calls is not None and not certain:
        return Outcome(TO_JUDGE, f"{detail}; {calls[0]}", tuple(findings))
    if found or ended.code != 0:
        return Outcome(FAILED, detail, tuple(findings) or (f"exit code {ended.code}",))
    if calls is None:
        return Outcome(FAILED, detail, ("the calls did not all run",))
    return Outcome(PASSED, f"{detail}; {calls[0]}")


def read_grid(ended: Ended, *, file: str) -> Outcome:
    """By the grid's results, which say whether they are complete."""
    if ended.code != 0:
        wrong = tuple(line for line in ended.log.splitlines() if " is WRONG: " in line)
        outcome = read_log(ended)
        return replace(outcome, problems=wrong or outcome.problems)
    results = Results.load(ended.folder.parent / file)
    rows = list(results)
    timed = sum(row.ms_median is not None for row in rows)
    return Outcome(PASSED if results.header["complete"] else UNFINISHED, f"{len(rows)} rows, {timed} with a time")


# ---------------------------------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------------------------------


def _file_stem(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Stage:
    """One process, and what it proves."""

    name: str
    proves: str
    minutes: float  # about as long as it takes: an estimate
    command: Callable[[Path, float], list[str]]  # of the folder for its files, and of the minutes that are left
    read: Reader
    backends: tuple[str, ...] = ()  # whom it is about; empty: all of them
    proof: bool = True  # False for a measurement, and for what a reader has to judge: no verdict rests on it
    needs: tuple[str, ...] = ()  # packages, and programs on the PATH
    variables: tuple[tuple[str, str], ...] = ()  # of the process's environment
    goes_on: bool = False  # a call that is stopped keeps what it finished, and the next one goes on from there

    @property
    def stem(self) -> str:
        """What the names of its files begin with, before the dot."""
        return _file_stem(self.name)

    @property
    def least(self) -> float:
        """The minutes without which it does not begin."""
        return min(self.minutes, 3.0) if self.goes_on else self.minutes

    def about(self, backend: str) -> bool:
        """Whether it says something of a backend."""
        return not self.backends or backend in self.backends

    def missing(self) -> list[str]:
        """What it needs and is not here."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None and shutil.which(name) is None]


# Whom a test is about: pytest's expression for it. Tests of every backend are called after the one that they run
# (tests/calls.py); what nobody else claims is about the plain kernels.
CLAIMS = {
    "triton_fused": "triton_fused-cuda",
    "hopper": "hopper-cuda",
    "hopper_fused": "hopper_fused-cuda",
    "Gluon": "test_hopper",
}
CLAIMS = {"triton": f"not ({' or '.join(CLAIMS.values())})"} | CLAIMS
PROVEN_BY = {name: (name,) for name in CLAIMS} | {"Gluon": ("hopper", "hopper_fused")}


@dataclass(frozen=True)
class Tests:
    """Tests for a GPU that are a stage: of those about somebody, the ones of a file that an expression selects."""

    name: str
    proves: str
    minutes: float
    file: str = ""  # "": every file that no other part names, so that no test is left out
    expression: str = ""  # "": what no other part of the file selects
    claim: str = "triton"  # of `CLAIMS`
    parallel: bool = True  # most of a test is compilation, which processes share out
    may_skip: bool = True


TESTS = (
    Tests(
        "float32", "every kind of call, in float32", 4, "tests/semantics/test_semantics.py", "error_budget and float32"
    ),
    Tests(
        "other dtypes", "the same in the others", 4, "tests/semantics/test_semantics.py", "error_budget and not float32"
    ),
    Tests("semantics", "masks in half precision, TF32, repeats, generators", 4, "tests/semantics/test_semantics.py"),
    Tests("properties", "calls that hypothesis draws", 4, "tests/semantics/test_properties.py"),
    Tests("compile", "torch.compile, whole graphs", 4, "tests/torch/test_compile.py"),
    Tests("gradients", "gradients against finite differences, in float64", 2, "tests/semantics/test_gradcheck.py"),
    Tests(
        "large",
        "tensors and masks past 2^31 elements, b * h > 65535",
        2,
        "tests/gpu/test_gpu.py",
        "past_two_to_the_31",
        parallel=False,
        may_skip=False,
    ),
    Tests(
        "graphs",
        "CUDA graphs, with dropout too; the host never waits, by torch's debug mode",
        2,
        "tests/gpu/test_gpu.py",
        "captured or never_waits",
        parallel=False,
    ),
    Tests("device", "long calls, streams, repeats, memory", 4, "tests/gpu/test_gpu.py", parallel=False),
    Tests("the others", "garbage, dropout, masks, tiles, launches, and whatever is newer", 6),
    Tests(
        "triton_fused, semantics",
        "every kind of call, with the backward in one pass",
        4,
        "tests/semantics/test_semantics.py",
        claim="triton_fused",
    ),
    Tests("triton_fused, the others", "all other tests of every backend", 6, claim="triton_fused"),
    Tests("hopper", "those calls of the tests of every backend that it serves", 5, claim="hopper"),
    Tests("hopper_fused", "the same with the backward in one pass", 5, claim="hopper_fused"),
    Tests("Gluon", "the calls that run in the emulator, without it", 5, claim="Gluon"),
)


def _selection(part: Tests, parts: Sequence[Tests]) -> list[str]:
    """What pytest is told to select, so that no test is left out of all parts."""
    parts = [other for other in parts if other.claim == part.claim]
    others = [other for other in parts if other.file == part.file and other.expression]
    expression = part.expression or " and ".join(f"not ({other.expression})" for other in others)
    where = [part.file] if part.file else ["tests", *(f"--ignore={file}" for file in _files(parts))]
    return [*where, "-k", " and ".join(f"({each})" for each in (CLAIMS[part.claim], expression) if each)]


def _files(parts: Iterable[Tests]) -> list[str]:
    """The files that parts name, each once."""
    return list(dict.fromkeys(part.file for part in parts if part.file))


def _pytest_command(folder: Path, minutes: float, *, part: Tests, junit: str) -> list[str]:
    jobs = min(8, (os.cpu_count() or 1) // 2) if part.parallel and importlib.util.find_spec("xdist") else 1
    options = ["-q", "-p", "no:cacheprovider", "-m", "gpu", f"--junitxml={folder / junit}"]
    workers = ["-n", str(jobs)] if jobs > 1 else []
    return [sys.executable, "-m", "pytest", *options, *workers, *_selection(part, TESTS)]


def _test_stage(part: Tests) -> Stage:
    name = f"tests: {part.name}"
    junit = f"{_file_stem(name)}.xml"
    return Stage(
        name,
        part.proves,
        part.minutes,
        partial(_pytest_command, part=part, junit=junit),
        partial(read_pytest, junit=junit, may_skip=part.may_skip),
        PROVEN_BY[part.claim],
        needs=("pytest", "hypothesis"),  # hypothesis for all of them: tests/conftest.py sets it up
    )


def _check_command(folder: Path, minutes: float, *, check: Sequence[str]) -> list[str]:
    return [sys.executable, str(BENCHMARKS / "gpu_checks.py"), *check]


RANDOM_CALLS, RANDOM_SHARE = 200, 100  # of a backend, and of them in one stage


def _random_command(folder: Path, minutes: float, *, backend: str, first: int, count: int, file: str) -> list[str]:
    drawn = ["--first", str(first), "--count", str(count)]
    return _check_command(folder, minutes, check=["random", "--backend", backend, *drawn, "--out", str(folder / file)])


def _random_stage(backend: str, first: int) -> Stage:
    name = f"random {first}-{first + RANDOM_SHARE - 1}: {backend}"
    file = f"{_file_stem(name)}.json"
    return Stage(
        name,
        "output, LSE and gradients of drawn calls against float64",
        4,
        partial(_random_command, backend=backend, first=first, count=RANDOM_SHARE, file=file),
        read_log,
        (backend,),
        needs=("pytest",),  # the calls are made as the tests make them
    )


SANITIZER = "compute-sanitizer"


def _sanitizer_command(folder: Path, minutes: float, *, tool: str, check: Sequence[str]) -> list[str]:
    # What the compiler's own processes and torch's probing of the driver do is none of this project's business.
    options = ["--tool", tool, "--target-processes", "application-only", "--error-exitcode", "99"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [SANITIZER, *options, *_check_command(folder, minutes, check=check)]


def _sanitizer_stage(
    tool: str, proves: str, minutes: float, backend: str = "", finds: bool = False, certain: bool = True
) -> Stage:
    """A backend's small calls under a tool; without a backend, a planted fault."""
    check = ["sanitized", "--backend", backend] if backend else ["overrun"]
    return Stage(
        f"{tool}: {backend or 'control'}",
        proves,
        minutes,
        partial(_sanitizer_command, tool=tool, check=check),
        partial(read_sanitizer, tool=tool, finds=finds, certain=certain),
        (backend,) if backend else (),
        proof=certain,
        needs=(SANITIZER, "pytest"),
        # In a pool of memory an access past the end of one tensor is an access to another.
        variables=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    )


def _check_stage(check: str, backend: str, proves: str, minutes: float) -> Stage:
    return Stage(
        f"{check}: {backend}",
        proves,
        minutes,
        partial(_check_command, check=[check, "--backend", backend]),
        read_log,
        (backend,),
        needs=("pytest",),
    )


def _grid_command(folder: Path, minutes: float, *, preset: str) -> list[str]:
    file = folder.parent / f"{preset}.json"
    begin = []
    if file.exists():
        earlier = Results.load(file)
        if not earlier.header["complete"]:
            here = environment(torch.device("cuda")) | {"preset": preset, "only": "", "peers": []}
            begin = ["--restart" if earlier.differences(here) else "--resume"]
    size = [] if preset == "standard" else [f"--{preset}"]
    # A case that has begun is finished: that can take minutes, where first calls are measured.
    limits = ["--minutes", f"{max(0.5, minutes - 2):.1f}"]
    return [sys.executable, str(BENCHMARKS / "run.py"), *size, *limits, "--out", str(file), *begin]


def _grid_stage(preset: str, proves: str, minutes: float) -> Stage:
    return Stage(
        f"benchmarks: {preset}",
        proves,
        minutes,
        partial(_grid_command, preset=preset),
        partial(read_grid, file=f"{preset}.json"),
        proof=False,
        needs=("matplotlib",),
        goes_on=True,
    )


def _train_command(folder: Path, minutes: float) -> list[str]:
    file = folder.parent / "train-step.json"
    return [sys.executable, str(BENCHMARKS / "train_step.py"), "--quick", "--out", str(file)]


KERNELS = tuple(backend for backend in reversed(BACKENDS) if backend != "math")  # the plain ones first


def _proofs_of(backend: str) -> list[Stage]:
    """The stages about one backend, and about others that come after it."""
    gluon, fused = backend.startswith("hopper"), backend.endswith("_fused")
    race = "no race for shared memory"
    if gluon:
        race = "what racecheck, which follows neither barriers in memory nor bulk copies, finds; for a reader to judge"
    bits = "forward bitwise, gradients within the budget" if fused else "forward, and deterministic backward, bitwise"
    found = [
        *(stage for stage in map(_test_stage, TESTS) if stage.backends[0] == backend),
        *(_random_stage(backend, first) for first in range(0, RANDOM_CALLS, RANDOM_SHARE)),
        _sanitizer_stage("memcheck", "no kernel reads or writes outside its tensors", 4, backend),
        _sanitizer_stage("racecheck", race, 4, backend, certain=not gluon),
        _check_stage("repeats", backend, f"fifty times the same while another stream is busy: {bits}", 3),
    ]
    if gluon:
        beside = "the error of the Gluon kernels beside that of the plain ones, on the same long inputs"
        found.append(_check_stage("twins", backend, beside, 4))
    return found


def stages(backends: Sequence[str] = KERNELS) -> list[Stage]:
    """All that are about these backends, in their order: right first, one backend after the other, then fast."""
    everything = [
        Stage(
            "environment",
            "the package is installed, and its kernels serve on this GPU",
            1,
            partial(_check_command, check=["environment"]),
            read_log,
        ),
        _sanitizer_stage("memcheck", "memcheck sees a fault that is planted", 1, finds=True),
        *(stage for backend in KERNELS for stage in _proofs_of(backend)),
        _grid_stage("quick", "a few cases beside our peers", 5),
        Stage(
            "training steps",
            "whole steps of models, with their own Attend and with ours",
            3,
            _train_command,
            read_log,
            proof=False,
            needs=("complex_valued_transformer", "matplotlib"),
        ),
        _grid_stage("standard", "the standard grid, with host overhead and first calls: which backend is faster", 75),
    ]
    return [stage for stage in everything if any(map(stage.about, backends))]


def backends_on(environment: dict[str, Any]) -> tuple[str, ...]:
    """The backends that can serve in an environment, as the dispatcher says: those that have a verdict there."""
    arch = environment["arch"]
    capability = None if arch is None else (int(arch[3:-1]), int(arch[-1]))
    target = DeviceTarget("cuda", capability=capability, triton=environment["triton"])
    serving = {verdict.backend for verdict in judge(REPRESENTATIVE, target) if verdict.serves}
    return tuple(backend for backend in KERNELS if backend in serving)


# ---------------------------------------------------------------------------------------------------------------------
# What is kept, and what it proves
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What became of a stage, where, and with which sources."""

    stage: str
    status: str
    detail: str
    problems: tuple[str, ...]
    seconds: float
    ended: str  # ISO
    environment: dict[str, Any] = field(repr=False)

    def differences(self, environment: dict[str, Any]) -> list[str]:
        """Why it says nothing about another environment; empty where it does."""
        return [
            f"{name} {self.environment.get(name)}, now {environment.get(name)}"
            for name in SAME
            if self.environment.get(name) != environment.get(name)
        ]


class Ledger:
    """The latest record of every stage, and the file that they are kept in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}

    @staticmethod
    def load(path: Path) -> Ledger:
        """The file's records; none where there is no file."""
        ledger = Ledger(path)
        if path.exists():
            for row in json.loads(path.read_text(encoding="utf-8"))["stages"]:
                ledger.records[row["stage"]] = Record(**row | {"problems": tuple(row["problems"])})
        return ledger

    def add(self, record: Record) -> None:
        """Keeps a record in place of the stage's earlier one, in the file too."""
        self.records[record.stage] = record
        write_results(self.path, record.environment, "stages", map(asdict, self.records.values()))

    def current(self, stage: Stage, environment: dict[str, Any]) -> Record | None:
        """The record of a stage, if it is about this environment and these sources."""
        record = self.records.get(stage.name)
        return None if record is None or record.differences(environment) else record

    def newest(self) -> Record:
        """The record that was written last."""
        return max(self.records.values(), key=lambda record: record.ended)


@dataclass(frozen=True)
class Verdict:
    """A backend's row for the table of validated parts, or what it lacks; and what a reader has yet to judge."""

    backend: str
    row: str
    lacking: tuple[str, ...]
    to_judge: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.lacking:
            lines = [f"{self.backend}: not validated by these results:", *(f"  {reason}" for reason in self.lacking)]
        else:
            lines = [f"{self.backend}: validated; the row for VALIDATED in {NO_SOURCE}:", self.row]
        if self.to_judge:
            lines += ["but first judge for yourself:", *(f"  {finding}" for finding in self.to_judge)]
        return "\n".join(lines)


def verdict(
    backend: str,
    chosen: Iterable[Stage],
    ledger: Ledger,
    environment: dict[str, Any],
    commit: str,
    unclear: str = "",
) -> Verdict:
    """What the records say of a backend in this environment: a row only where every proof passed, on a commit without
    changes.

    `unclear` says why the sources are not known to be those of `commit`; empty where they are.
    """
    lacking, to_judge, ended = [], [], []
    for stage in chosen:
        if not stage.about(backend):
            continue
        record, found = ledger.records.get(stage.name), ledger.current(stage, environment)
        if not stage.proof:
            if found is not None and found.status == TO_JUDGE:
                to_judge.append(f"{stage.name}: {found.detail}")
        elif found is not None and found.status == PASSED:
            ended.append(found.ended)
        elif found is not None:
            lacking.append(f"{stage.name}: {found.status}: {found.detail}")
        elif record is not None:
            lacking.append(f"{stage.name}: {record.status} with {'; '.join(record.differences(environment))}")
        else:
            lacking.append(f"{stage.name}: has not run")
    if unclear:
        lacking.append(unclear)
    if lacking or not ended:
        return Verdict(backend, "", tuple(lacking or ["no proof was asked for"]), tuple(to_judge))
    facts = _facts(environment, max(ended), commit, ledger.path)
    lines = [f'        {name}="{value}",' for name, value in facts.items()]
    row = "\n".join([f'    ("{backend}", "{environment["arch"]}"): Validation(', *lines, "    ),"])
    return Verdict(backend, row, (), tuple(to_judge))


def _facts(environment: dict[str, Any], when: str, commit: str, path: Path) -> dict[str, Any]:
    """What every row of evidence says of its run."""
    return {
        "gpu": environment["device"],
        "torch": environment["torch"],
        "triton": environment["triton"],
        "date": when[:10],
        "commit": commit,
        "results": path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path),
    }


def who_is_faster(path: Path, arch: str, backends: Iterable[str]) -> list[str]:
    """What the standard grid says of each backend beside those after it, and the rows for the table, in lines."""
    if not path.exists():
        return ["which backend is faster where: the standard grid has not run"]
    results = Results.load(path)
    header = results.header
    if not header["complete"]:
        return [f"which backend is faster where: {path} is not complete"]
    if header["dirty"] or header["commit"] == "unknown":
        return [f"which backend is faster where: {path} was not measured on a commit without changes"]
    facts = _facts(header, header["started"], header["commit"], path)
    lines = []
    for backend in backends:
        found = advantages(results, backend)
        row = row_source(backend, arch, facts, found)
        lines += [f"{backend}, beside the backends after it:" if found else f"{backend}: measured beside nobody"]
        lines += [f"  {'faster' if advantage.found else '      '}  {advantage}" for advantage in found]
        lines += [f"the row for FASTER in {NO_SOURCE}:", row] if row else []
    return lines


def _git(*arguments: str, root: Path) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def commit_of_sources(root: Path = ROOT) -> tuple[str, str]:
    """The commit that is checked out, and why the sources are not known to be its own: empty where they are."""
    commit = _git("rev-parse", "HEAD", root=root)
    paths = [f":(glob){pattern}" for pattern in SOURCES]
    changed = _git("status", "--porcelain", "--untracked-files=all", "--", *paths, f":(exclude){NO_SOURCE}", root=root)
    if commit is None or changed is None:
        return "", "git knows no commit here: --verdict in a clean checkout of it tells the row"
    if changed:
        names = [line.split(maxsplit=1)[1] for line in changed.splitlines()]
        return commit, f"not as committed: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
    return commit, ""


# ---------------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------------

HEARTBEAT = 30.0  # seconds between two signs of life
GRACE = 10.0  # seconds that a process has to end when it is told to


def run_process(command: Sequence[str], log: Path, seconds: float, variables: dict[str, str]) -> int | None:
    """Runs a command with its output in a file; its exit code, or None where it and its children had to be killed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    stop = time.monotonic() + seconds
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, to be killed with its children
        )
        try:
            while True:
                try:
                    return process.wait(max(0.0, min(HEARTBEAT, stop - time.monotonic())))
                except subprocess.TimeoutExpired:
                    if time.monotonic() >= stop:
                        return None
                    print(f"      ... {_tail(log)[:100]}", flush=True)
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen) -> None:
    """Ends a process, if it runs, and every child that it left."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _tail(log: Path) -> str:
    """The last words of a log, which need not be whole lines."""
    return " ".join(log.read_text(encoding="utf-8", errors="replace").split()[-12:])


RunProcess = Callable[[Sequence[str], Path, float, dict[str, str]], int | None]


class Validator:
    """One call: stages in their order, until the time is spent."""

    def __init__(
        self,
        ledger: Ledger,
        environment: dict[str, Any],
        minutes: float,
        run: RunProcess = run_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ledger, self.environment, self.run, self.clock = ledger, environment, run, clock
        self.folder = ledger.path.parent
        self.deadline = clock() + 60 * minutes

    def pending(self, chosen: Sequence[Stage]) -> list[Stage]:
        """Those that are not done: first those that never ended, then those that did not pass."""
        current = {stage.name: self.ledger.current(stage, self.environment) for stage in chosen}
        status = {name: UNFINISHED if record is None else record.status for name, record in current.items()}
        fresh = [stage for stage in chosen if status[stage.name] == UNFINISHED]
        again = [stage for stage in chosen if status[stage.name] not in (UNFINISHED, PASSED, TO_JUDGE)]
        return fresh + again

    def go(self, queue: Sequence[Stage]) -> bool:
        """Runs stages in turn. Returns whether each had its turn: False where time ran out."""
        begun = False
        for number, stage in enumerate(queue, start=1):
            started, left = self.clock(), self.deadline - self.clock()
            title = f"[{number}/{len(queue)}] {stage.name}, about {stage.minutes:g} min: {stage.proves}"
            if missing := stage.missing():
                print(title, flush=True)
                self._keep(stage, Outcome(NOT_RUN, f"not installed: {', '.join(missing)}"), started)
                continue
            # The first one begins in any case: a later call would have no more time for it.
            if begun and left < 60 * stage.least:
                return False
            print(title, flush=True)
            outcome = self._outcome(stage, left, alone=not begun)
            begun = True
            self._keep(stage, outcome, started)
            if outcome.status == UNFINISHED:
                return False
        return True

    def _outcome(self, stage: Stage, left: float, alone: bool) -> Outcome:
        """Runs a stage and reads what it left. One that hangs must not take the time of the others, the first time."""
        earlier = self.ledger.current(stage, self.environment)
        limit = 60 * max(2.0, 3 * stage.minutes)
        if stage.goes_on or (earlier is not None and earlier.status == TIMED_OUT):
            limit = left
        seconds = min(limit, left)
        log = self.folder / f"{stage.stem}.log"
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(f"{stage.stem}.*"):  # nothing of an earlier run may be read as this one's
            old.unlink()
        try:
            command = stage.command(self.folder, seconds / 60)
            code = self.run(command, log, seconds, dict(stage.variables))
            if code is not None:
                return stage.read(Ended(code, log.read_text(encoding="utf-8", errors="replace"), self.folder))
        except (OSError, ValueError) as error:  # it cannot start, or what it left cannot be read
            return Outcome(FAILED, f"{type(error).__name__}: {error}")
        if stage.goes_on:
            return Outcome(UNFINISHED, "stopped in time; a later call goes on")
        if seconds < left or alone:
            return Outcome(TIMED_OUT, f"had not ended after {seconds:.0f} s; {_tail(log)[:100]}")
        return Outcome(UNFINISHED, "time ran out; a later call begins anew")

    def _keep(self, stage: Stage, outcome: Outcome, started: float) -> None:
        seconds = round(self.clock() - started, 1)
        ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = Record(stage.name, outcome.status, outcome.detail, outcome.problems, seconds, ended, self.environment)
        self.ledger.add(record)
        print(f"      {outcome.status} after {seconds:.0f} s: {outcome.detail[:200]}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

WIDTH = 32  # of the names of stages
SHOWN = 3  # problems of a stage; its log has them all


def problem_lines(chosen: Iterable[Stage], ledger: Ledger, environment: dict[str, Any]) -> list[str]:
    """What is wrong, and where to read on."""
    lines = []
    for stage in chosen:
        record = ledger.current(stage, environment)
        if record is not None and record.problems:
            lines.append(f"{stage.name} (all of it: {ledger.path.parent / stage.stem}.log)")
            lines += [f"  {problem[:300]}" for problem in record.problems[:SHOWN]]
            lines += [f"  and {len(record.problems) - SHOWN} more"] if len(record.problems) > SHOWN else []
    return lines


def table(chosen: Iterable[Stage], ledger: Ledger, environment: dict[str, Any]) -> list[str]:
    """A line for each stage."""
    lines = []
    for stage in chosen:
        record = ledger.current(stage, environment)
        status, time_, detail = (
            ("not yet", "", "") if record is None else (record.status, f"{record.seconds:.0f} s", record.detail)
        )
        lines.append(f"{stage.name:<{WIDTH}}{status:<12}{time_:>7}  {detail[:90]}".rstrip())
    return lines


def list_stages(chosen: Iterable[Stage]) -> None:
    """Prints what would run."""
    for stage in chosen:
        kind = "proves" if stage.proof else "says"
        print(f"{stage.name:<{WIDTH}}{stage.minutes:>4g} min  {kind}: {stage.proves}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=8.5, metavar="N", help="of this call, default 8.5")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these, whether they passed or not")
    parser.add_argument(
        "--backend", choices=KERNELS, help="only what proves this one; with --reproduce: the one to ask"
    )
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="go on with what earlier calls left; so it does anyway")
    begin.add_argument(
        "--restart", action="store_true", help="run every stage again; an unfinished grid of this commit goes on"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="in place of benchmarks/results/<gpu>")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print the stages, and run none")
    instead.add_argument("--dry-run", action="store_true", help="print the commands, and run none")
    instead.add_argument("--verdict", action="store_true", help="print what the results prove, and run nothing")
    instead.add_argument("--reproduce", type=int, metavar="SEED", help="make one of the random calls again")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    options.stages = stages()
    if options.backend:
        options.stages = [stage for stage in options.stages if stage.proof and stage.about(options.backend)]
    if options.only:
        known = {stage.name: stage for stage in options.stages}
        if unknown := [name for name in options.only if name not in known]:
            parser.error(f"no stage is called {unknown[0]!r}; there are {', '.join(map(repr, known))}")
        options.stages = [stage for stage in options.stages if stage.name in options.only]
    return options


LEDGER = Path("validation") / "stages.json"  # in the folder of a GPU's results


def _print_findings(ledger: Ledger, environment: dict[str, Any]) -> bool:
    """Prints what the results prove of each backend, and which is faster. Returns whether every one is proven right."""
    backends = backends_on(environment)
    found = [verdict(each, stages(backends), ledger, environment, *commit_of_sources()) for each in backends]
    for each in found:
        print("", each, sep="\n")
    measured = [backend for backend in backends if backend not in UNMEASURED]
    print("", *who_is_faster(ledger.path.parent.parent / "standard.json", environment["arch"], measured), sep="\n")
    return not any(each.lacking for each in found)


def _print_verdicts(folders: Iterable[Path]) -> int:
    """For results that were brought here: judged by the sources that are here now."""
    ledgers = [ledger for ledger in map(Ledger.load, (folder / LEDGER for folder in folders)) if ledger.records]
    if not ledgers:
        print("there are no results of a validation", file=sys.stderr)
        return REFUSED
    proven = []
    for ledger in ledgers:
        print(ledger.path)
        proven.append(_print_findings(ledger, ledger.newest().environment | {"sources": sources_digest()}))
    return int(not all(proven))


def main(arguments: list[str] | None = None) -> int:
    """The exit code, as the head of this file tells it."""
    options = _parse(arguments)
    if options.list:
        list_stages(options.stages)
        return 0
    if options.dry_run:
        folder = (options.out or Path("RESULTS")) / LEDGER.parent
        for stage in options.stages:
            print(f"{stage.name}: {shlex.join(stage.command(folder, options.minutes))}")
        return 0
    if options.verdict:
        return _print_verdicts([options.out.resolve()] if options.out else sorted(ALL_RESULTS.glob("*/")))
    if not torch.cuda.is_available():
        print("torch sees no GPU, and only a GPU can validate anything", file=sys.stderr)
        return REFUSED
    if options.reproduce is not None:
        from gpu_checks import reproduce  # imports Triton

        return reproduce(options.reproduce, options.backend or "triton")

    os.environ["PATH"] += f"{os.pathsep}/usr/local/cuda/bin"  # where CUDA's tools are, if no shell said so
    device = torch.device("cuda")
    here = environment(device) | {"arch": DeviceTarget.of(device).arch, "sources": sources_digest()}
    serving = backends_on(here)
    chosen = [stage for stage in options.stages if any(map(stage.about, serving))]
    if not chosen:
        able = f"what can serve there is {', '.join(serving)}" if serving else "no kernel can serve there"
        print(f"nothing to do on {here['device']}, {here['arch']}: {able}", file=sys.stderr)
        return REFUSED
    path = (options.out or results_folder(here["device"])).resolve() / LEDGER
    ledger = Ledger(path) if options.restart else Ledger.load(path)
    validator = Validator(ledger, here, options.minutes)
    complete = validator.go(chosen if options.only else validator.pending(chosen))

    print("", *problem_lines(chosen, ledger, here), sep="\n")
    _print_findings(ledger, here)
    print("", *table(chosen, ledger, here), sep="\n")
    found = [ledger.current(stage, here) for stage in chosen]
    if any(record is not None and record.status in (FAILED, TIMED_OUT, NOT_RUN) for record in found):
        return 1
    if not complete:
        print("time ran out: the same command goes on")
        return OUT_OF_TIME
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stage's processes end with this one
    sys.exit(main())
