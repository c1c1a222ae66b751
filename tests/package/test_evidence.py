"""What is known of a part, on disks that fail, in files that are damaged, and in processes that race or die."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flash_attend import check, evidence, marks
from flash_attend.evidence import Finding, Store, _store, name_of_tuned
from flash_attend.target import DeviceTarget
from flash_attend.variant import Variant
from parts import CPU, PART, VARIANT

RIGHT, WRONG = Finding(True, "self-checked"), Finding(False, "dq is wrong")
FORWARD_ONLY = VARIANT._replace(needed=(False, False, False))
HERE = {"name": "a part", "torch": torch.__version__}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, HERE)


def anew(store: Store) -> Store:
    """As another process has it."""
    return Store(store.folder, store.part)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------------------------


def test_a_finding_is_kept_for_other_processes(store: Store) -> None:
    assert store.finding(VARIANT) is None
    store.keep(VARIANT, WRONG, seconds=2.5)
    assert store.finding(VARIANT) == anew(store).finding(VARIANT) == WRONG
    assert anew(store).findings() == {VARIANT: WRONG}
    assert files(store.folder) == ["triton-separate-float32-tf32x3-d8-dv8-gradients-qkv.json"]
    store.keep(VARIANT, RIGHT)  # without details: for this process
    assert (store.finding(VARIANT), anew(store).finding(VARIANT)) == (RIGHT, WRONG)
    store.forget(VARIANT)
    assert store.finding(VARIANT) is anew(store).finding(VARIANT) is None


def test_all_gradients_tell_of_those_that_the_same_kernels_compute(store: Store) -> None:
    store.keep(VARIANT, RIGHT, seconds=1)
    for needed, found in (((False,) * 3, RIGHT), ((True, False, False), RIGHT), ((True, True, False), None)):
        assert anew(store).finding(VARIANT._replace(needed=needed)) == found
    store.keep(VARIANT, WRONG, seconds=1)  # of which kernel is not known
    assert anew(store).finding(FORWARD_ONLY) is None


@pytest.mark.parametrize(
    "spoil",
    (
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\x00" * 100,
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: json.dumps({**json.loads(text), "format": 2}),
        lambda text: json.dumps({**json.loads(text), "part": {"name": "another"}}),
        lambda text: json.dumps({**json.loads(text), "name": "another"}),
        lambda text: json.dumps({**json.loads(text), "right": "yes"}),
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "reason"}),
    ),
)
def test_a_file_that_cannot_be_relied_on_counts_as_missing(store: Store, spoil: Callable[[str], str]) -> None:
    store.keep(VARIANT, RIGHT, seconds=1)
    (path,) = store.folder.iterdir()
    path.write_text(spoil(path.read_text()))
    assert anew(store).finding(VARIANT) is None
    store.keep(VARIANT, RIGHT, seconds=1)
    assert anew(store).finding(VARIANT) == RIGHT


def test_what_was_fastest_is_read_whole_or_not(store: Store) -> None:
    won = dict(backend="triton", ways=[["triton", "fused", ""]], reason="measured")
    for found, tuned in (
        (won, True),
        ({"backend": "triton"}, False),
        ("triton", False),
        ({**won, "ways": [["triton"]]}, False),
        ({**won, "backend": ["triton"]}, False),
    ):
        store.write(name_of_tuned(VARIANT.kind), dict(won=found))
        assert (anew(store).tuned(VARIANT.kind) is not None) == tuned


def test_parts_drivers_versions_and_kernels_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {_store(tmp_path, PART).folder, _store(tmp_path, replace(PART, triton="3.8.0")).folder}
    changes = (torch, "__version__", "2.99"), (evidence, "driver_version", lambda: "580"), (
        evidence, "_digest_of_kernels", lambda: "other"
    )  # fmt: skip
    for place, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            _store.cache_clear()
            evidence._part_of.cache_clear()
            folders.add(_store(tmp_path, PART).folder)
    _store.cache_clear()
    evidence._part_of.cache_clear()
    assert len(folders) == 5
    assert not list(tmp_path.iterdir())


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert evidence._root() == Path(os.environ["FLASH_ATTEND_CACHE"])
    monkeypatch.setenv("FLASH_ATTEND_CACHE", "~/kept")
    assert evidence._root() == Path.home() / "kept"
    monkeypatch.delenv("FLASH_ATTEND_CACHE")
    assert evidence._root() == Path("/xdg/flash_attend")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert evidence._root() == Path.home() / ".cache/flash_attend"


def test_a_warm_store_answers_within_milliseconds(store: Store) -> None:
    variants = [VARIANT._replace(kind=VARIANT.kind._replace(head_dim=d)) for d in range(1, 21)]
    for variant in variants:
        store.keep(variant, RIGHT, seconds=1)
    seconds = []
    other = anew(store)
    for variant in variants:
        start = time.perf_counter()
        assert other.finding(variant) == RIGHT
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 5e-3


# ---------------------------------------------------------------------------------------------------------------------
# Disks that fail
# ---------------------------------------------------------------------------------------------------------------------


def full(*given: object, **named: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_where_no_folder_can_be_made_findings_live_as_long_as_the_process(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    store = Store(tmp_path / "taken" / "folder", HERE)
    with store.checking(VARIANT) as refusal:
        assert refusal == ""
        store.keep(VARIANT, RIGHT, seconds=1)
    assert store.finding(VARIANT) == RIGHT
    assert anew(store).finding(VARIANT) is None
    assert store.findings() == store.reasons_of_tuned() == {}


@pytest.mark.parametrize("place", ("json.dump", "os.replace"))
def test_a_full_disk_leaves_what_there_was(store: Store, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    store.keep(VARIANT, WRONG, seconds=1)
    before = files(store.folder)
    monkeypatch.setattr(f"flash_attend.evidence.{place}", full)
    store.keep(VARIANT, RIGHT, seconds=1)
    assert (store.finding(VARIANT), anew(store).finding(VARIANT)) == (RIGHT, WRONG)
    assert files(store.folder) == before


@pytest.mark.parametrize("name", ("os.pwrite", "fcntl.flock", "fcntl"))
def test_a_check_goes_on_where_it_cannot_be_marked(store: Store, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On a full disk, on a file system without locks, on Windows: there a mark would say nothing."""
    monkeypatch.setattr(f"flash_attend.marks.{name}", full if "." in name else None)
    for _ in range(2):
        with pytest.raises(SystemExit), store.checking(VARIANT) as refusal:
            assert refusal == ""
            raise SystemExit
    assert store.died() == {}


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def in_a_process(work: Callable[[], object]) -> int | None:
    process = FORK.Process(target=work)
    process.start()
    process.join(30)
    return process.exitcode


def test_a_mark_that_is_no_text_is_one(store: Store) -> None:
    mark = store._path(str(VARIANT)).with_suffix(evidence.MARK)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_bytes(b"\xff\xfe")
    assert store.died() == {}
    with store.checking(VARIANT) as refusal:
        assert "died or was ended in its check" in refusal
    with store.checking(VARIANT, anew=True) as refusal:
        assert refusal == ""


def test_who_died_in_a_check_left_a_mark(store: Store) -> None:
    def die() -> None:
        with store.checking(VARIANT):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(die) == -signal.SIGKILL
    for _ in range(2):
        with store.checking(VARIANT) as refusal:
            assert "died or was ended in its check; `python -m flash_attend check` tries it again" in refusal
            assert refusal.startswith("process ")
    (died,) = store.died().items()
    assert died[0] == VARIANT
    assert refusal.startswith(died[1])
    with store.checking(FORWARD_ONLY) as refusal:
        assert refusal == ""
    with store.checking(VARIANT, anew=True) as refusal:
        assert refusal == ""
        assert store.died() == {}  # but lives
    with store.checking(VARIANT) as refusal:
        assert refusal == ""


def test_who_raised_in_a_check_left_none(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), store.checking(VARIANT):
        raise KeyboardInterrupt
    with store.checking(VARIANT) as refusal:
        assert refusal == ""


def test_a_living_process_is_waited_for_and_not_taken_for_dead(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "LONGEST_WAIT", 0.1)
    with store.checking(VARIANT), store.checking(VARIANT) as refusal:
        assert refusal == "another process has been checking it for 0 seconds"
    with store.checking(VARIANT) as refusal:
        assert refusal == ""


def test_of_eight_processes_one_checks_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTEND_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr(DeviceTarget, "of", staticmethod(lambda device: PART))
    checks, answers, start = tmp_path / "checks", tmp_path / "answers", FORK.Barrier(8)

    def note(path: Path, text: str) -> None:
        with path.open("a") as file:
            file.write(text + "\n")

    def judge(variant: Variant, device: torch.device) -> tuple[Finding, bool]:
        note(checks, str(os.getpid()))
        time.sleep(0.3)
        return RIGHT, True

    def rank() -> None:
        start.wait()
        note(answers, check.checked(tuple(VARIANT), CPU).reason)

    monkeypatch.setattr(check, "_judge", judge)
    ranks = [FORK.Process(target=rank) for _ in range(8)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks] == [0] * 8
    assert len(checks.read_text().split()) == 1
    assert answers.read_text().split() == ["self-checked"] * 8
