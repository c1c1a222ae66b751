"""The validation of a GPU, without one: its stages and their order, what it reads, what it calls proven."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpu_checks
import validate
from cases import DTYPES
from flash_attend.checks import normalise_inputs
from flash_attend.dispatch import LARGEST_ACCURATE_HEAD_DIM
from flash_attend.kernels import aot
from flash_attend.kernels.configs import select_tiles
from flash_attend.spec import MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.testing.calls import LAYOUTS, MASKS, Case, make_call
from flash_attend.testing.calls import run as run_call
from flash_attend.validation import Calls, Measurement, Validation
from measure import numerics
from results import Results, Row
from validate import FAILED, NOT_RUN, PASSED, TIMED_OUT, TO_JUDGE, UNFINISHED, Ended, Ledger, Outcome, Stage, Validator

ROOT = Path(__file__).resolve().parents[2]
HERE = dict(
    device="Some GPU", arch="sm_90", driver="1", cuda="13.0", torch="2.11.0", triton="3.6.0", python="3.12", sources="a"
)

# ---------------------------------------------------------------------------------------------------------------------
# Planning, resuming
# ---------------------------------------------------------------------------------------------------------------------


def stage(name: str, minutes: float = 1.0, **more) -> Stage:
    return Stage(name, f"that {name} works", minutes, lambda folder, left: [name], validate.read_log, **more)


class Machine:
    """Runs fake stages on a clock of its own: each takes its minutes, and ends with a code (None: it hangs)."""

    def __init__(self, minutes: dict[str, float], codes: dict[str, int | None] | None = None) -> None:
        self.minutes, self.codes = minutes, codes or {}
        self.seconds, self.ran = 0.0, []

    def clock(self) -> float:
        return self.seconds

    def run(self, command, log, seconds, variables) -> int | None:
        (name,) = command
        self.ran.append(name)
        needed, code = 60 * self.minutes.get(name, 1.0), self.codes.get(name, 0)
        self.seconds += seconds if code is None else min(needed, seconds)
        log.write_text(f"{name} says\nFAILED: something\n" if code else f"{name} is done\n", encoding="utf-8")
        return None if code is None or needed > seconds else code


@pytest.fixture
def call(tmp_path):
    """One call of the script with fake stages: what ran, and whether each had its turn."""

    def call(stages, machine, minutes=8.5, environment=HERE):
        ledger = Ledger.load(tmp_path / "validation" / "stages.json")
        validator = Validator(ledger, environment, minutes, machine.run, machine.clock)
        begun = len(machine.ran)
        complete = validator.go(validator.pending(stages))
        statuses = {name: record.status for name, record in Ledger.load(ledger.path).records.items()}
        return machine.ran[begun:], complete, statuses

    return call


def test_calls_go_on_until_every_stage_has_passed(call):
    stages = [stage(name, 3) for name in "abcd"]
    machine = Machine(dict.fromkeys("abcd", 3.0))
    assert call(stages, machine) == (["a", "b"], False, dict.fromkeys("ab", PASSED))  # 2.5 of 8.5 minutes are left
    assert call(stages, machine) == (["c", "d"], True, dict.fromkeys("abcd", PASSED))
    assert call(stages, machine) == ([], True, dict.fromkeys("abcd", PASSED))


@pytest.mark.parametrize("name", validate.SAME)
def test_another_environment_or_other_sources_begin_anew(call, name):
    machine = Machine({})
    call([stage("a")], machine)
    assert call([stage("a")], machine)[0] == []
    assert call([stage("a")], machine, environment=HERE | {name: "another"})[0] == ["a"]


def test_what_failed_is_run_again_after_everything_else(call):
    stages = [stage(name, 4) for name in "abc"]
    machine = Machine(dict.fromkeys("abc", 4.0), {"a": 1})
    assert call(stages, machine) == (["a", "b"], False, {"a": FAILED, "b": PASSED})
    assert call(stages, machine)[0] == ["c", "a"]
    machine.codes = {}
    assert call(stages, machine) == (["a"], True, dict.fromkeys("abc", PASSED))


def test_a_stage_that_hangs_leaves_time_to_the_others(call):
    stages = [stage("hangs"), stage("b")]
    machine = Machine({}, {"hangs": None})
    assert call(stages, machine) == (["hangs", "b"], True, {"hangs": TIMED_OUT, "b": PASSED})
    assert machine.seconds == 60 * (3 + 1)
    call(stages, machine)
    assert machine.seconds == 60 * (3 + 1 + 8.5)  # alone: perhaps it was only slower than estimated


def test_a_stage_that_time_ran_out_for_comes_first_the_next_time(call):
    stages = [stage("a", 4), stage("slow", 4), stage("c")]
    machine = Machine({"a": 4.0, "slow": 6.0})
    assert call(stages, machine) == (["a", "slow"], False, {"a": PASSED, "slow": UNFINISHED})
    assert call(stages, machine) == (["slow", "c"], True, {"a": PASSED, "slow": PASSED, "c": PASSED})


def test_the_first_stage_begins_however_little_time_there_is(call):
    machine = Machine({"a": 5.0})
    assert call([stage("a", 5), stage("b")], machine, minutes=2) == (["a"], False, {"a": TIMED_OUT})


def test_what_can_be_gone_on_with_is_never_called_slow(call):
    stages = [stage("grid", 60, goes_on=True), stage("b")]
    machine = Machine({"grid": 60.0})
    assert call(stages, machine) == (["grid"], False, {"grid": UNFINISHED})
    machine.minutes["grid"] = 2
    assert call(stages, machine)[0] == ["grid", "b"]


def test_what_is_missing_is_said_and_the_others_run(call, tmp_path):
    stages = [stage("a", needs=("no_such_package_anywhere", "json")), stage("b")]
    machine = Machine({})
    assert call(stages, machine) == (["b"], True, {"a": NOT_RUN, "b": PASSED})
    record = Ledger.load(tmp_path / "validation" / "stages.json").records["a"]
    assert record.detail == "not installed: no_such_package_anywhere"


def test_a_stage_whose_files_cannot_be_read_fails(call):
    def unreadable(ended):
        raise ValueError("no results of this version")

    stages = [replace(stage("a"), read=unreadable), stage("b")]
    assert call(stages, Machine({}))[1:] == (True, {"a": FAILED, "b": PASSED})


def test_files_of_an_earlier_run_are_gone(call, tmp_path):
    stale = tmp_path / "validation" / "a.xml"
    stale.parent.mkdir()
    stale.write_text("<testsuites/>", encoding="utf-8")
    call([stage("a")], Machine({}))
    assert not stale.exists()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("parent", ("subprocess.Popen(child).wait()", "subprocess.Popen(child)"), ids=("hangs", "ends"))
def test_no_child_outlives_its_stage(parent, tmp_path):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = f"import subprocess, sys, time; child = [sys.executable, '-c', {child!r}]; {parent}; time.sleep(1)"
    log = tmp_path / "log"
    start = time.monotonic()
    ended = validate.run_process([sys.executable, "-c", code], log, 1.5 if "wait" in parent else 60.0, {})
    assert time.monotonic() - start < 15
    assert ended == (None if "wait" in parent else 0)
    pid = int(log.read_text(encoding="utf-8"))
    stop = time.monotonic() + 10
    while not is_gone(pid) and time.monotonic() < stop:
        time.sleep(0.05)
    assert is_gone(pid)


def test_a_process_gets_its_variables_and_no_interpreter(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; print(os.environ['WANTED'], os.environ.get('TRITON_INTERPRET'))"
    assert validate.run_process([sys.executable, "-c", code], tmp_path / "log", 60.0, {"WANTED": "yes"}) == 0
    assert (tmp_path / "log").read_text(encoding="utf-8") == "yes None\n"


# ---------------------------------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------------------------------


def keyword(name: str) -> str:
    """What pytest calls a keyword of an expression, as a name of Python."""
    return name.replace("-", "_")


def test_every_gpu_test_is_in_a_stage():
    """Whatever the words of the expressions say of a test, a part of its file selects it, of somebody's tests."""
    claims = {keyword(word) for claim in validate.CLAIMS.values() for word in re.findall(r"[a-z][\w-]+", claim)}
    claims -= {"not", "or"}
    for truths in product((False, True), repeat=len(claims)):
        words = dict(zip(sorted(claims), truths, strict=True))
        assert any(eval(keyword(claim), words) for claim in validate.CLAIMS.values())
    for claim, expression in validate.CLAIMS.items():
        parts = [part for part in validate.TESTS if part.claim == claim]
        files = {part.file for part in parts}
        (rest,) = (part for part in parts if not part.file)
        where, *ignored = validate._selection(rest, validate.TESTS)
        assert where == "tests"
        assert {f"--ignore={file}" for file in files - {""}} == {each for each in ignored if "--ignore" in each}
        for file in files - {""}:
            selections = [validate._selection(part, validate.TESTS) for part in parts if part.file == file]
            assert all(selection[0] == file for selection in selections)
            expressions = [selection[-1] for selection in selections]
            assert all(f"({expression})" in each for each in expressions)
            words = set(re.findall(r"\b[a-z][\w-]+", " ".join(expressions))) - {"and", "or", "not"}
            mine = sorted(words - set(re.findall(r"[a-z][\w-]+", " ".join(validate.CLAIMS.values()))))
            source = (ROOT / file).read_text(encoding="utf-8")
            assert all(word in source for word in mine)
            claimed = {keyword(word): expression.startswith("not") == 0 for word in words - set(mine)}
            for truths in product((False, True), repeat=len(mine)):
                known = claimed | dict(zip(mine, truths, strict=True))
                assert any(eval(keyword(each), known) for each in expressions)


def test_tests_are_claimed_by_the_names_that_they_have():
    from calls import Backend

    for name in ("triton_fused", "hopper", "hopper_fused"):
        assert validate.CLAIMS[name] == str(Backend(name, "cuda"))
    assert list(ROOT.glob(f"tests/{validate.CLAIMS['Gluon']}*.py"))
    assert set(validate.PROVEN_BY) == set(validate.CLAIMS)
    assert {backend for proven in validate.PROVEN_BY.values() for backend in proven} == set(validate.KERNELS)


def test_pytest_understands_the_expressions(tmp_path):
    """Each test is somebody's, by its file or by the backend in its name, and no other's."""
    tests = {
        "test_hopper_forward.py": "@pytest.mark.parametrize('x', ['a'])\ndef test_a(x): ...\n",
        "test_x.py": "@pytest.mark.parametrize('x', ['math-cuda', 'triton-cuda', 'triton_fused-cuda', 'hopper-cuda', "
        "'hopper_fused-cuda'])\ndef test_b(x): ...\ndef test_c(): ...\n",
    }
    for name, source in tests.items():
        (tmp_path / name).write_text(f"import pytest\n{source}", encoding="utf-8")
    code = (
        "import pytest, sys\n"
        "for expression in sys.argv[1:]:\n"
        "    print('by', expression)\n"
        "    pytest.main(['-q', '-p', 'no:cacheprovider', '--collect-only', '-k', expression])\n"
    )
    command = [sys.executable, "-c", code, *validate.CLAIMS.values()]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    found = {}
    for line in ended.stdout.splitlines():
        if line.startswith("by "):
            claim = next(claim for claim, expression in validate.CLAIMS.items() if line == f"by {expression}")
        elif "::" in line:
            found.setdefault(claim, []).append(line.split("::")[1])
    assert found == {
        "triton": ["test_b[math-cuda]", "test_b[triton-cuda]", "test_c"],
        "triton_fused": ["test_b[triton_fused-cuda]"],
        "hopper": ["test_b[hopper-cuda]"],
        "hopper_fused": ["test_b[hopper_fused-cuda]"],
        "Gluon": ["test_a[a]"],
    }


def test_stages_have_names_of_their_own_and_fit_in_a_call():
    stages = validate.stages()
    assert len({each.stem for each in stages}) == len(stages)
    assert all(each.least <= 8 for each in stages)
    assert [each.name for each in stages if not each.proof] == [
        "racecheck: hopper",
        "racecheck: hopper_fused",
        "benchmarks: quick",
        "training steps",
        "benchmarks: standard",
    ]


def test_every_backend_has_every_kind_of_proof():
    kinds = {"random 0-99", "random 100-199", "memcheck", "racecheck", "repeats"}
    for backend in validate.KERNELS:
        own = [each for each in validate.stages() if each.backends and each.about(backend)]
        wanted = kinds | ({"twins"} if backend.startswith("hopper") else set())
        assert {each.name.partition(":")[0] for each in own} == wanted | {"tests"}
        for each in own:
            command = each.command(Path("folder"), 5.0)
            assert "--backend" not in command or command[command.index("--backend") + 1] == backend


def test_a_part_has_the_stages_of_those_that_can_serve_there():
    assert validate.KERNELS == ("triton", "triton_fused", "hopper", "hopper_fused")
    assert validate.backends_on(HERE) == validate.KERNELS
    for arch in ("sm_80", "sm_89", "sm_100", "sm_120"):
        assert validate.backends_on(HERE | {"arch": arch}) == ("triton", "triton_fused")
    for change in (dict(triton="3.5.0"), dict(triton=None), dict(arch="sm_75"), dict(arch=None)):
        assert validate.backends_on(HERE | change) == ()
    everywhere = validate.stages(("triton", "triton_fused"))
    assert not any("hopper" in each.name or "Gluon" in each.name for each in everywhere)
    assert len(everywhere) < len(validate.stages())


def test_every_kernel_is_shown_to_the_sanitizer():
    """Of every kernel that the ahead-of-time check compiles for a backend."""
    target = aot.PARTS["sm_90"]

    def kernels(specs, backend):
        return {
            launch.prepared.kernel.__name__
            for spec in specs
            for launch in aot.record_call(spec, select_tiles(spec, target, backend), backend)
        }

    compiled = {}
    for case in aot.cases(["sm_90"]):
        compiled.setdefault(case.backend, []).append(case.spec)
    assert {"triton", "hopper"} <= set(compiled)
    for backend, specs in compiled.items():
        sanitized = [gpu_checks.spec_of(case, dtype) for case, dtype in gpu_checks.sanitized_calls(backend)]
        assert kernels(sanitized, backend) >= kernels(specs, backend)
    assert {dtype for _, dtype in gpu_checks.sanitized_calls("triton")} == set(DTYPES)


@pytest.mark.parametrize(
    ("header", "option"),
    ((dict(complete=False), "--resume"), (dict(complete=False, commit="b"), "--restart"), ({}, "")),
)
def test_an_unfinished_grid_is_gone_on_with_where_that_is_allowed(tmp_path, monkeypatch, header, option):
    here = dict(device="Some GPU", commit="a")
    monkeypatch.setattr(validate, "environment", lambda device: here)
    asked = dict(preset="standard", only="", peers=[])
    Results(tmp_path / "standard.json", here | asked | dict(complete=True) | header).save()
    command = validate._grid_command(tmp_path / "validation", 6.0, preset="standard")
    assert [each for each in command if each in ("--resume", "--restart")] == [option] * bool(option)
    assert command[command.index("--minutes") + 1] == "4.0"


# ---------------------------------------------------------------------------------------------------------------------
# What processes leave
# ---------------------------------------------------------------------------------------------------------------------

JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="pytest" errors="{errors}" failures="{failures}" tests="3">
<testcase classname="tests.test_gpu" name="test_a[x]" time="1.2" />
<testcase classname="tests.test_gpu" name="test_b" time="0.1">{b}</testcase>
<testcase classname="tests.test_gpu" name="test_c" time="0.1">{c}</testcase>
</testsuite></testsuites>
"""
FAILURE = '<failure message="AssertionError: dq: largest error 3e-2&#10;second line">trace</failure>'
ERROR = '<error message="failed on setup with &quot;CUDA error&quot;">trace</error>'
SKIPPED = '<skipped type="pytest.skip" message="needs 60 GiB">where</skipped>'


@pytest.mark.parametrize(
    ("b", "c", "code", "may_skip", "status", "detail", "problems"),
    (
        ("", "", 0, True, PASSED, "3 tests ran, 0 failed, 0 skipped", ()),
        ("", SKIPPED, 0, True, PASSED, "2 tests ran, 0 failed, 1 skipped", ()),
        ("", SKIPPED, 0, False, FAILED, "2 tests ran, 0 failed, 1 skipped", ("skipped: test_c: needs 60 GiB",)),
        (
            FAILURE,
            ERROR,
            1,
            True,
            FAILED,
            "3 tests ran, 2 failed, 0 skipped",
            ("test_b: AssertionError: dq: largest error 3e-2", 'test_c: failed on setup with "CUDA error"'),
        ),
        ("", "", 2, True, FAILED, "3 tests ran, 0 failed, 0 skipped", ("pytest ended with exit code 2",)),
    ),
)
def test_pytest_is_read_by_its_xml(tmp_path, b, c, code, may_skip, status, detail, problems):
    (tmp_path / "t.xml").write_text(JUNIT.format(b=b, c=c, errors=0, failures=0), encoding="utf-8")
    outcome = validate.read_pytest(Ended(code, "", tmp_path), junit="t.xml", may_skip=may_skip)
    assert outcome == Outcome(status, detail, problems)


@pytest.mark.parametrize("left", (None, "<testsuites><testsu", "<testsuites/>"))
def test_pytest_without_a_test_that_ran_proves_nothing(tmp_path, left):
    if left is not None:
        (tmp_path / "t.xml").write_text(left, encoding="utf-8")
    outcome = validate.read_pytest(Ended(0, "killed\n", tmp_path), junit="t.xml")
    assert outcome.status == FAILED
    assert outcome.problems


def test_the_xml_of_this_pytest_is_understood(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "def test_a(): assert 1 + 1 == 3, 'wrong sum'\n"
        "@pytest.mark.skip(reason='why')\n"
        "def test_b(): ...\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=t.xml", "test_x.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    outcome = validate.read_pytest(Ended(ended.returncode, ended.stdout, tmp_path), junit="t.xml")
    assert (outcome.status, outcome.detail) == (FAILED, "1 tests ran, 1 failed, 1 skipped")
    assert outcome.problems[0].startswith("test_a: AssertionError: wrong sum")


RAN = "13 calls ran: delta_kernel, forward_kernel\n"
CLEAN = f"========= COMPUTE-SANITIZER\n{RAN}========= ERROR SUMMARY: 0 errors\n"
FOUND = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _overrunning_kernel+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f2a4c000fa0 is out of bounds
=========     and is 3,489 bytes after the nearest allocation at 0x7f2a4c000000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernelEx [0x2e2a5f] in libcuda.so.1
=========
========= Target application returned an error
========= ERROR SUMMARY: 1 error
"""
RACE_FREE = (
    f"========= COMPUTE-SANITIZER\n{RAN}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
)
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at 0x1d0 in forward_kernel
=========     and Read access at 0x2f0 in forward_kernel [16384 hazards]
=========
13 calls ran: forward_kernel
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
RuntimeError: CUDA error: unknown error
"""


@pytest.mark.parametrize(
    ("tool", "log", "code", "status", "says"),
    (
        ("memcheck", CLEAN, 0, PASSED, "ERROR SUMMARY: 0 errors; 13 calls ran: delta_kernel, forward_kernel"),
        ("racecheck", RACE_FREE, 0, PASSED, "RACECHECK SUMMARY: 0 hazards; 13 calls ran: delta_kernel, forward_kernel"),
        ("memcheck", FOUND, 99, FAILED, "Invalid __global__ write of size 4 bytes at _overrunning_kernel+0x90"),
        ("memcheck", CLEAN, 1, FAILED, "exit code 1"),
        ("memcheck", CLEAN.replace(RAN, ""), 0, FAILED, "the calls did not all run"),
        ("racecheck", RACE, 99, FAILED, "Error: Race reported between Write access at 0x1d0 in forward_kernel"),
        ("memcheck", REFUSED, 1, FAILED, "Error: Device not supported."),
        ("racecheck", CLEAN, 0, FAILED, "ERROR SUMMARY: 0 errors"),  # the summary of another tool
        ("memcheck", "", 127, FAILED, "no output"),
    ),
)
def test_a_sanitizer_is_read_by_its_summary(tmp_path, tool, log, code, status, says):
    outcome = validate.read_sanitizer(Ended(code, log, tmp_path), tool=tool)
    assert outcome.status == status
    told = outcome.detail if status == PASSED else outcome.problems[0]
    assert says in told


def test_a_planted_fault_must_be_found(tmp_path):
    found = validate.read_sanitizer(Ended(99, FOUND, tmp_path), tool="memcheck", finds=True)
    missed = validate.read_sanitizer(Ended(0, CLEAN, tmp_path), tool="memcheck", finds=True)
    assert (found.status, missed.status) == (PASSED, FAILED)
    assert validate.read_sanitizer(Ended(1, REFUSED, tmp_path), tool="memcheck", finds=True).status == FAILED


@pytest.mark.parametrize(
    ("log", "code", "status", "problems"),
    (
        (RACE_FREE, 0, PASSED, 0),
        (RACE, 99, TO_JUDGE, 1),
        (RACE.replace("13 calls ran", "ended"), 99, FAILED, 1),  # the calls did not all run
        (REFUSED, 1, FAILED, 1),
    ),
)
def test_what_a_tool_finds_that_does_not_know_better_is_for_a_reader(tmp_path, log, code, status, problems):
    outcome = validate.read_sanitizer(Ended(code, log, tmp_path), tool="racecheck", certain=False)
    assert (outcome.status, len(outcome.problems)) == (status, problems)


def test_a_log_is_read_by_its_exit_code_and_last_line(tmp_path):
    assert validate.read_log(Ended(0, "a\nall is well\n\n", tmp_path)) == Outcome(PASSED, "all is well")
    failed = validate.read_log(Ended(1, "FAILED: this\nFAILED: that\n2 failures\n", tmp_path))
    assert failed == Outcome(FAILED, "exit code 1: 2 failures", ("this", "that"))
    assert validate.read_log(Ended(0, "FAILED: this\nfine\n", tmp_path)).status == FAILED
    assert validate.read_log(Ended(-11, "", tmp_path)).problems == ("no output",)


@pytest.mark.parametrize(("complete", "status"), ((True, PASSED), (False, UNFINISHED)))
def test_a_grid_is_read_by_its_results(tmp_path, complete, status):
    results = Results(tmp_path / "quick.json", {"complete": complete})
    results.add(Row("c", "g", "forward", "float16", "none", (1,), "timed", ms_median=1.0))
    results.add(Row("c", "g", "forward", "float16", "none", (1,), "unserved", error="cannot"))
    results.save()
    read = validate.read_grid(Ended(0, "", tmp_path / "validation"), file="quick.json")
    assert read == Outcome(status, "2 rows, 1 with a time")
    wrong = "table\nflash_attend is WRONG: c, forward: wrong: dq has NaN\n"
    read = validate.read_grid(Ended(1, wrong, tmp_path / "validation"), file="quick.json")
    assert (read.status, read.problems) == (FAILED, ("flash_attend is WRONG: c, forward: wrong: dq has NaN",))


# ---------------------------------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------------------------------

PROOFS = [stage("a"), stage("b", backends=("triton",)), stage("g", backends=("hopper", "hopper_fused"))]
STAGES = [*PROOFS, stage("race", backends=("hopper",), proof=False), stage("fast", proof=False)]


def ledger_with(tmp_path, **changed: dict) -> Ledger:
    """All proofs passed here, but for what is changed."""
    ledger = Ledger(tmp_path / "stages.json")
    for index, each in enumerate(PROOFS):
        record = validate.Record(each.name, PASSED, "fine", (), 1.0, f"2026-01-0{index + 1}T10:00:00+00:00", HERE)
        if changed.get(each.name) != {}:
            ledger.add(replace(record, **changed.get(each.name, {})))
    return ledger


@pytest.mark.parametrize(("backend", "date"), (("triton", "2026-01-02"), ("hopper_fused", "2026-01-03")))
def test_a_row_where_every_proof_passed(tmp_path, backend, date):
    found = validate.verdict(backend, STAGES, ledger_with(tmp_path), HERE, "c0ffee")
    assert not found.lacking
    assert str(found).startswith(f"{backend}: validated; the row for VALIDATED in flash_attend/validation.py:\n")
    ((key, row),) = eval(f"{{{found.row}}}", {"Validation": Validation}).items()
    assert key == (backend, "sm_90")
    results = str(tmp_path / "stages.json")
    assert row == Validation("Some GPU", "2.11.0", "3.6.0", date, "c0ffee", results)


@pytest.mark.parametrize(
    ("changed", "says"),
    (
        (dict(b={}), "b: has not run"),
        (dict(b=dict(status=FAILED, detail="3 failed")), "b: FAILED: 3 failed"),
        (dict(b=dict(status=TIMED_OUT)), "b: TIMED OUT"),
        (dict(b=dict(status=UNFINISHED)), "b: unfinished"),
        (dict(b=dict(status=NOT_RUN, detail="not installed: x")), "b: NOT RUN: not installed: x"),
        (dict(b=dict(environment=HERE | {"sources": "old"})), "b: passed with sources old, now a"),
        (dict(a=dict(environment=HERE | {"device": "B"})), "a: passed with device B, now Some GPU"),
    ),
)
def test_no_row_where_anything_is_lacking(tmp_path, changed, says):
    found = validate.verdict("triton", STAGES, ledger_with(tmp_path, **changed), HERE, "c0ffee")
    assert found.row == ""
    assert len(found.lacking) == 1
    assert found.lacking[0].startswith(says)
    assert says in str(found)


@pytest.mark.parametrize(
    ("name", "proven"),
    (("a", set()), ("b", {"triton_fused", "hopper", "hopper_fused"}), ("g", {"triton", "triton_fused"})),
)
def test_what_fails_for_one_backend_says_nothing_of_the_others(tmp_path, name, proven):
    ledger = ledger_with(tmp_path, **{name: dict(status=FAILED)})
    found = {each for each in validate.KERNELS if validate.verdict(each, STAGES, ledger, HERE, "c0ffee").row}
    assert found == proven


def test_what_a_reader_has_to_judge_is_told_and_takes_no_row_away(tmp_path):
    ledger = ledger_with(tmp_path)
    record = ledger.records["a"]
    ledger.add(replace(record, stage="race", status=TO_JUDGE, detail="3 hazards"))
    found = validate.verdict("hopper", STAGES, ledger, HERE, "c0ffee")
    assert found.row
    assert str(found).endswith("\nbut first judge for yourself:\n  race: 3 hazards")
    assert validate.verdict("triton", STAGES, ledger, HERE, "c0ffee").to_judge == ()
    ledger.add(replace(record, stage="race", status=FAILED))
    assert validate.verdict("hopper", STAGES, ledger, HERE, "c0ffee").row


def test_no_row_for_sources_that_are_not_a_commits(tmp_path):
    unclear = "not as committed: kernels/forward.py"
    found = validate.verdict("triton", STAGES, ledger_with(tmp_path), HERE, "c0ffee", unclear)
    assert (found.row, found.lacking) == ("", (unclear,))


def test_measurements_alone_prove_nothing(tmp_path):
    assert validate.verdict("triton", STAGES[-2:], ledger_with(tmp_path), HERE, "c0ffee").lacking


# ---------------------------------------------------------------------------------------------------------------------
# Which backend is faster
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def grid(tmp_path):
    """Results of the standard grid in which "hopper" takes four fifths of the time of "triton"."""

    def grid(**header) -> Path:
        measured = HERE | dict(complete=True, dirty=False, commit="c0ffee", started="2026-02-03T04:05:06+00:00")
        results = Results(tmp_path / "standard.json", measured | header)
        shape = (4, 16, 16, 4096, 4096, 128, 128)
        for peer, ms in (("flash_attend", 1.0), ("flash_attend hopper", 0.8)):
            results.add(Row("c", "g", "forward+backward", "bfloat16", "causal", shape, peer, ms_median=ms))
        results.save()
        return results.path

    return grid


def test_the_grid_tells_who_is_faster_with_the_row_for_the_table(grid):
    path = grid()
    lines = validate.who_is_faster(path, "sm_90", ("triton_fused", "hopper"))
    assert lines[:3] == [
        "triton_fused: measured beside nobody",
        "hopper, beside the backends after it:",
        "  faster  half, d 128, dv 128, mask none: 1 win, 0 even, 0 loss; at worst 1.25x of flash_attend, c, "
        "forward+backward",
    ]
    assert lines[3] == "the row for FASTER in flash_attend/validation.py:"
    names = dict(Measurement=Measurement, Calls=Calls, MaskKind=MaskKind)
    ((key, row),) = eval(f"{{{lines[4]}}}", names).items()
    assert key == ("hopper", "sm_90")
    calls = (Calls("half", 128, 128, MaskKind.NONE),)
    assert row == Measurement("Some GPU", "2.11.0", "3.6.0", "2026-02-03", "c0ffee", str(path), calls)


@pytest.mark.parametrize(
    ("header", "says"),
    (
        (dict(complete=False), "is not complete"),
        (dict(dirty=True), "was not measured on a commit without changes"),
        (dict(commit="unknown", dirty=None), "was not measured on a commit without changes"),
    ),
)
def test_a_grid_that_cannot_be_evidence_says_why(grid, header, says):
    (line,) = validate.who_is_faster(grid(**header), "sm_90", ("hopper",))
    assert line.endswith(says)


def test_without_a_grid_nobody_is_faster(tmp_path):
    lines = validate.who_is_faster(tmp_path / "standard.json", "sm_90", ("hopper",))
    assert lines == ["which backend is faster where: the standard grid has not run"]


@pytest.fixture
def checkout(tmp_path):
    """A repository with one of each file that counts, committed."""
    for name in (
        "flash_attend/spec.py",
        "flash_attend/validation.py",
        "kernels/hopper/forward.py",
        "flash_attend/testing/oracle.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("read\n", encoding="utf-8")

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "core.hooksPath="]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    return tmp_path


def test_sources_as_they_were_committed(checkout):
    commit, unclear = validate.commit_of_sources(checkout)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert unclear == ""


@pytest.mark.parametrize("name", ("kernels/hopper/forward.py", "flash_attend/spec.py", "tests/new.py"))
def test_a_changed_or_new_source_is_told_and_changes_the_digest(checkout, name):
    before = validate.sources_digest(checkout)
    (checkout / name).write_text("x = 2\n", encoding="utf-8")
    assert validate.sources_digest(checkout) != before
    assert validate.commit_of_sources(checkout)[1] == f"not as committed: {name}"


@pytest.mark.parametrize("name", ("README.md", "flash_attend/validation.py", "results.json"))
def test_what_proves_nothing_changes_nothing(checkout, name):
    before = validate.sources_digest(checkout)
    (checkout / name).write_text("other\n", encoding="utf-8")
    assert validate.sources_digest(checkout) == before
    assert validate.commit_of_sources(checkout)[1] == ""


def test_without_git_no_commit_is_known(tmp_path):
    commit, unclear = validate.commit_of_sources(tmp_path)
    assert commit == ""
    assert "--verdict" in unclear


# ---------------------------------------------------------------------------------------------------------------------
# Random calls
# ---------------------------------------------------------------------------------------------------------------------


def test_the_random_calls_reach_what_they_are_for():
    drawn = [gpu_checks.draw_call(seed, "triton") for seed in range(validate.RANDOM_CALLS)]
    for seed, (case, dtype) in enumerate(drawn[:10]):  # the same every time, and for all that serve everything
        for backend in ("triton", "triton_fused"):
            if gpu_checks.serves(backend, case, dtype):
                assert gpu_checks.draw_call(seed, backend) == (case, dtype)
    cases = [case for case, _ in drawn]
    assert {dtype for _, dtype in drawn} == set(DTYPES)
    assert {case.mask for case in cases} == set(MASKS)
    for name in ("layout", "grad_layout"):
        assert {getattr(case, name) for case in cases} == set(LAYOUTS) - {"broadcast_length"}
    for dims in ([case.d for case in cases], [case.dv for case in cases]):
        assert min(dims) < 16
        assert max(dims) == 256
        assert len(set(dims)) > 40
        assert all(1 <= dim <= 256 for dim in dims)
    accurate = [max(case.d, case.dv) for case, dtype in drawn if dtype in ("float32", "float64")]
    assert max(accurate) == LARGEST_ACCURATE_HEAD_DIM  # the kernels refuse larger ones
    assert {case.grads for case in cases} == {"both", "out", "lse"}
    assert {case.causal for case in cases} == {False, True}
    assert len({case.dropout_p for case in cases}) == 3
    assert any(case.dv != case.d for case in cases)
    assert any(case.heads > max(case.kv_heads, 1) for case in cases)
    assert any(case.kv_heads == 0 for case in cases)
    assert min(case.queries for case in cases) < 16
    assert max(case.keys for case in cases) > 700
    assert any(case.causal and case.queries > case.keys for case in cases)


def test_the_random_calls_for_hopper_are_those_that_it_serves():
    drawn = [gpu_checks.draw_call(seed, "hopper") for seed in range(validate.RANDOM_CALLS)]
    assert all(gpu_checks.serves("hopper", *each) for each in drawn[::10])
    assert [gpu_checks.draw_call(seed, "hopper_fused") for seed in range(10)] == drawn[:10]
    cases = [case for case, _ in drawn]
    assert {dtype for _, dtype in drawn} == {"float16", "bfloat16"}
    assert {case.d for case in cases} == {case.dv for case in cases} == {64, 128, 256}
    assert {"none", "pad_left", "pad_right", "holes", "dead_batch", "all_hidden", "bh1j"} <= {c.mask for c in cases}
    assert {case.layout for case in cases} == set(LAYOUTS) - {"broadcast_length"}
    assert {case.causal for case in cases} == {False, True}
    assert {case.scale for case in cases} == {None, -0.3, 1 / 8, 0.0}
    assert any(case.heads > max(case.kv_heads, 1) for case in cases)
    assert any(case.causal and case.queries > case.keys for case in cases)
    assert max(case.keys for case in cases) > 700


def test_a_call_is_described_as_the_dispatcher_knows_it():
    """Without its tensors, which are only as large as numbers on no device."""
    for seed in (3, 12, 57):
        case, dtype = gpu_checks.draw_call(seed, "triton")
        with numerics(dtype):
            call = make_call(case, DTYPES[dtype][0])
            *_, spec = normalise_inputs(call.q, call.k, call.v, **call.options)
        assert gpu_checks.spec_of(case, dtype) == spec
    assert gpu_checks.spec_of(case, dtype, deterministic=True).deterministic


@pytest.mark.parametrize("backend", validate.KERNELS)
def test_every_backend_has_calls_to_repeat_and_to_compare(backend):
    def chosen(cases):
        return [case for case in cases if gpu_checks.serves(backend, case, "float16")]

    assert {case.d for case in chosen(gpu_checks.REPEATED)} >= {64, 128, 256}
    assert any(case.mask != "none" and case.causal for case in chosen(gpu_checks.REPEATED))
    assert len(chosen(replace(case, d=128) for case in gpu_checks.TWINS)) == len(gpu_checks.TWINS)
    repeatable = gpu_checks.serves(backend, gpu_checks.REPEATED[0], "float16", deterministic=True)
    assert repeatable == (not backend.endswith("_fused"))


@pytest.mark.parametrize("seed", (7, 26, 36, 40, 68))
def test_a_random_call_is_judged(seed):
    row = gpu_checks.judge_seed(seed, "math", "cpu")
    assert row["error"] == ""
    assert set(row["used"]) == {"out", "lse", "dq", "dk", "dv"}
    assert all(0 <= share <= 1 for share in row["used"].values())


def test_a_wrong_answer_is_reported_with_its_seed(monkeypatch, capsys):
    def wrong(call, backend):
        answer = run_call(call, backend)
        return replace(answer, dk=answer.dk * 1.1)

    monkeypatch.setattr(gpu_checks, "run", wrong)
    row = gpu_checks.judge_seed(7, "math", "cpu")
    assert row["error"].startswith("AssertionError: dk: largest error")
    assert gpu_checks.reproduce(7, "math", "cpu") == 1
    assert "FAILED: seed 7: AssertionError: dk" in capsys.readouterr().out
    assert gpu_checks.summarise_random([row], "hopper") == 1
    *_, failure, summary = capsys.readouterr().out.splitlines()
    again = "FAILED: python benchmarks/validate.py --reproduce 7 --backend hopper: "
    assert failure.startswith(f"{again}AssertionError: dk: largest error")
    assert summary.startswith("0 of 1 right")


def test_a_process_of_random_calls_that_dies_takes_one_call_with_it():
    """Seed 3 ends its process in silence, seed 4 with an error that it reports; every other one has its turn."""
    code = """
import json, os, sys
for seed in map(int, sys.argv[1:]):
    if seed == 3:
        sys.exit("Segmentation fault")
    error = "AcceleratorError" if seed == 4 else ""
    print(json.dumps(dict(seed=seed, call="", used={"out": seed / 10}, error=error)), flush=True)
    if error:
        sys.exit(1)
"""
    rows = gpu_checks.run_shares(
        range(7), 2, "triton", lambda seeds, backend: [sys.executable, "-c", code, *map(str, seeds)]
    )
    assert [row["seed"] for row in rows] == list(range(7))
    assert {row["seed"]: row["error"] for row in rows if row["error"]} == {
        3: "the process ended with 1: Segmentation fault",
        4: "AcceleratorError",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Repeats and twins, by the einsum path in the place of kernels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch):
    """Makes the checks run small calls on a CPU, and gives each answer to a function of (answer, backend, number)."""

    def pretend(change=lambda answer, backend, number: answer, kernels=lambda backend: {f"{backend}_kernel"}):
        small = Case("small", batch=1, heads=1, queries=6, keys=9, d=64, mask="pad_left", causal=True)
        made = []

        def run(call, backend, needs="qkv"):
            made.append(backend)
            return change(run_call(call, "math", needs), backend, len(made))

        monkeypatch.setattr(gpu_checks, "TWINS", (small,))
        monkeypatch.setattr(gpu_checks, "REPEATED", (small,))
        monkeypatch.setattr(gpu_checks, "REPEATS", 3)
        places = {"cuda": "cpu", "meta": "meta"}
        monkeypatch.setattr(gpu_checks, "make_call", lambda case, dtype, device: make_call(case, dtype, places[device]))
        monkeypatch.setattr(gpu_checks, "run", run)
        monkeypatch.setattr(gpu_checks, "_kernels_of", lambda call, backend: kernels(backend))
        busy = SimpleNamespace(query=lambda: False)
        monkeypatch.setattr(gpu_checks, "Load", lambda: SimpleNamespace(add=lambda: busy))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        return made

    return pretend


def scaled(name, factor, backends=validate.KERNELS, since=0):
    """Changes a result of some backends from a call on."""

    def change(answer, backend, number):
        if backend not in backends or number < since or getattr(answer, name) is None:
            return answer
        return replace(answer, **{name: getattr(answer, name) * factor})

    return change


def test_twins_that_are_both_right(pretend, capsys):
    made = pretend()
    assert gpu_checks.compare_twins("hopper_fused") == 0
    assert set(made) == {"hopper_fused", "triton_fused"}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 * 2 + 1  # three head dims in two dtypes, and the summary
    assert re.match(r"small, d 64, float16: hopper_fused out 0\.\d\d lse .*; triton_fused out 0\.\d\d lse", printed[0])
    assert printed[-1].endswith("kernels of hopper_fused alone: hopper_fused_kernel")


@pytest.mark.parametrize("wrong", ("hopper", "triton"))
def test_a_twin_that_is_wrong(pretend, capsys, wrong):
    pretend(scaled("dk", 1.1, (wrong,)))
    assert gpu_checks.compare_twins("hopper") == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED: ")]
    assert len(failures) == 6
    assert all(f", {wrong}: AssertionError: dk: largest error" in line for line in failures)


def test_twins_that_are_the_same_kernels_show_nothing(pretend, capsys):
    pretend(kernels=lambda backend: {"forward_kernel"})
    assert gpu_checks.compare_twins("hopper") == 1
    assert "FAILED: hopper launched the kernels of triton and no others" in capsys.readouterr().out


CLOSE, FAR = 1 + 2**-10, 1.1  # another rounding in half precision, and another result


@pytest.mark.parametrize(
    ("backend", "change", "wrong"),
    (
        ("hopper", None, ""),
        ("triton_fused", None, ""),
        ("hopper_fused", scaled("dq", CLOSE, since=3), ""),
        ("hopper_fused", scaled("dq", FAR, since=3), "dq: largest error"),
        ("triton_fused", scaled("out", CLOSE, since=3), "out: "),
        ("hopper", scaled("dq", CLOSE, since=7), "dq: "),
        ("triton", scaled("lse", CLOSE, since=3), "lse: "),
    ),
)
def test_repeats_are_the_same_as_far_as_is_promised(pretend, capsys, backend, change, wrong):
    pretend(*filter(None, [change]))
    assert gpu_checks.repeat_calls(backend) == bool(wrong)
    *failures, summary = capsys.readouterr().out.splitlines()
    assert bool(failures) == bool(wrong)
    assert all(line.startswith("FAILED: small, ") and wrong in line for line in failures)
    assert re.match(r"\d+ failures; \d+ of \d+ calls ran while another stream was busy", summary)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_lists_and_tells_without_a_gpu(capsys):
    assert validate.main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(validate.stages())
    assert validate.main(["--dry-run", "--only", "racecheck: hopper"]) == 0
    assert "compute-sanitizer --tool racecheck" in capsys.readouterr().out
    assert validate.main(["--list", "--backend", "hopper"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert all(" proves: " in line for line in listed)
    assert not any(": triton" in line for line in listed)
    with pytest.raises(SystemExit):
        validate.main(["--only", "nothing of the kind"])
    assert "no stage is called 'nothing of the kind'" in capsys.readouterr().err


def test_the_command_refuses_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert validate.main(["--out", str(tmp_path)]) == validate.REFUSED
    assert validate.main(["--reproduce", "3"]) == validate.REFUSED
    assert capsys.readouterr().err.count("torch sees no GPU") == 2
    assert gpu_checks.main(["sanitized", "--backend", "triton"]) == validate.REFUSED
    assert validate.main(["--verdict", "--out", str(tmp_path)]) == validate.REFUSED
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command with a GPU that is not there, and real processes for stages; its exit code."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which the command adds to
    here = {name: value for name, value in HERE.items() if name not in ("arch", "sources")}
    monkeypatch.setattr(validate, "environment", lambda device: here)
    monkeypatch.setattr(DeviceTarget, "of", staticmethod(lambda device: SimpleNamespace(arch="sm_90")))
    monkeypatch.setattr(validate, "commit_of_sources", lambda: ("c0ffee", ""))

    def command(codes: dict[str, str], *options: str, backends: tuple[str, ...] = ()) -> int:
        stages = [
            replace(
                stage(name), command=lambda folder, left, code=code: [sys.executable, "-c", code], backends=backends
            )
            for name, code in codes.items()
        ]
        monkeypatch.setattr(validate, "stages", lambda backends=(): stages)
        return validate.main(["--out", str(tmp_path), *options])

    return command


def test_the_command_ends_with_a_table_and_a_verdict(command, tmp_path, capfd):
    codes = {"right": "print('fine')", "wrong": "print('FAILED: dq'); exit(1)"}
    assert command(codes) == 1
    printed = capfd.readouterr().out
    assert "wrong: FAILED: exit code 1" in printed
    assert str(tmp_path / "validation" / "wrong.log") in printed
    assert "  dq\n" in printed
    assert [line.split()[:2] for line in printed.splitlines()[-2:]] == [["right", "passed"], ["wrong", "FAILED"]]

    codes["wrong"] = "print('mended')"
    assert command(codes) == 0
    printed = capfd.readouterr().out
    assert "[1/1] wrong" in printed
    assert 'Validation(\n        gpu="Some GPU",' in printed
    assert command(codes, "--only", "right") == 0
    assert "[1/1] right" in capfd.readouterr().out
    # Brought elsewhere, the same results say the same.
    assert command(codes, "--verdict") == 0
    assert 'commit="c0ffee"' in capfd.readouterr().out


def test_the_command_says_when_time_ran_out(command, capfd):
    codes = {"a": "print(1)", "b": "print(2)"}
    assert command(codes, "--minutes", "0.5") == validate.OUT_OF_TIME
    assert capfd.readouterr().out.splitlines()[-1] == "time ran out: the same command goes on"
    assert command(codes, "--minutes", "0.5") == 0
    assert command(codes, "--restart") == 0
    assert "[1/2] a" in capfd.readouterr().out


def test_the_command_refuses_what_cannot_serve_here(command, monkeypatch, tmp_path, capfd):
    for arch, says in (
        ("sm_80", "what can serve there is triton, triton_fused"),
        ("sm_75", "no kernel can serve there"),
    ):
        monkeypatch.setattr(DeviceTarget, "of", staticmethod(lambda device, arch=arch: SimpleNamespace(arch=arch)))
        assert command({"a": "print(1)"}, backends=("hopper",)) == validate.REFUSED
        assert capfd.readouterr().err == f"nothing to do on Some GPU, {arch}: {says}\n"
    assert list(tmp_path.iterdir()) == []
