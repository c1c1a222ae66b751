"""Timing, with a clock of our own: turns, statistics, and what stands beside a time."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import time

import pytest
import torch
import torch.utils.deterministic

import measure
from measure import CpuStopwatch, Statistics, interleave, numerics, summarise

CPU = torch.device("cpu")


class FakeStopwatch:
    """Every call takes as long as its function returns; remembers whose turn it was, and for how long."""

    def __init__(self) -> None:
        self.turns: list[tuple[object, float]] = []

    def sample(self, function, milliseconds):
        taken = function()
        self.turns.append((function, milliseconds))
        return [taken] * max(1, int(milliseconds / taken))


def test_peers_take_turns_forwards_and_backwards():
    stopwatch = FakeStopwatch()
    functions = {name: (lambda taken=taken: taken) for name, taken in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    samples = interleave(functions, stopwatch, rounds=4, milliseconds=10.0)
    names = {function: name for name, function in functions.items()}
    order = "".join(names[function] for function, _ in stopwatch.turns)
    assert order == "abc" + "abc" + "cba" + "abc" + "cba", "once to learn how long a call takes, then A B B A"
    assert samples == {"a": [[1.0] * 10] * 4, "b": [[2.0] * 5] * 4, "c": [[4.0] * 2] * 4}


def test_a_round_of_small_calls_ends_early():
    stopwatch = FakeStopwatch()
    samples = interleave({"a": lambda: 0.125}, stopwatch, rounds=2, milliseconds=1000.0)
    assert [len(taken) for taken in samples["a"]] == [measure.MOST_SAMPLES] * 2


def test_statistics_are_of_all_samples_together():
    found = summarise([[1.0, 2.0, 3.0], [4.0, 5.0], [6.0, 7.0, 8.0, 9.0]])
    assert found == Statistics(median=5.0, iqr=4.0, rounds=(2.0, 4.5, 7.5))
    quartiles = statistics.quantiles(range(1, 10), n=4, method="inclusive")
    assert found.iqr == quartiles[2] - quartiles[0]
    assert summarise([[3.0]]) == Statistics(3.0, 0.0, (3.0,))


def test_a_slow_sample_moves_the_median_little():
    assert summarise([[1.0] * 9 + [100.0]]).median == 1.0


def test_the_cpu_stopwatch_tells_milliseconds():
    calls = itertools.count()

    def sleep():
        next(calls)
        time.sleep(0.004)

    taken = CpuStopwatch().sample(sleep, 20.0)
    assert 1 <= len(taken) <= 5 and next(calls) == len(taken) + 1
    assert min(taken) >= 4.0 and statistics.median(taken) < 400.0


def test_numerics_are_set_and_given_back():
    def state():
        return (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before = state()
    with numerics("tf32", deterministic=True):
        assert state() == ("high", True, False)
        with numerics("float32"):
            assert state() == ("highest", False, False)
        assert state() == ("high", True, False)
    assert state() == before
    with pytest.raises(RuntimeError), numerics("tf32", deterministic=True):
        raise RuntimeError
    assert state() == before


def test_only_gpus_and_cpus_are_timed():
    with pytest.raises(ValueError, match="meta"):
        measure.stopwatch_for(torch.device("meta"))


def test_what_only_a_gpu_can_tell_is_none_on_a_cpu():
    assert measure.peak_bytes(lambda: torch.empty(10), CPU) is None
    assert measure.host_microseconds(lambda: None, CPU) is None
    assert measure.clocks(CPU) == {}


def test_the_environment_says_where_and_with_what():
    header = measure.environment(CPU)
    assert header["device"] == "cpu" and header["torch"] == torch.__version__
    assert {"driver", "cuda", "triton", "python", "host", "commit", "dirty", "started"} <= header.keys()
    assert len(header["commit"]) == 40 or header["commit"] == "unknown"


def test_a_copy_without_history_is_told_its_commit(monkeypatch):
    def no_git(*command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", no_git)
    monkeypatch.setitem(os.environ, "FLASH_ATTEND_COMMIT", "abc123")
    header = measure.environment(CPU)
    assert (header["commit"], header["dirty"]) == ("abc123", None)


def test_ceilings_follow_from_the_times():
    class Steady:
        def sample(self, function, milliseconds):
            function()
            return [3.0, 2.0, 1.0]

    found = measure.ceilings(CPU, Steady())
    assert found["tflops"] == {"float32": pytest.approx(2 * 1024**3 / 2e-3 / 1e12)}
    assert found["copy_gbps"] == pytest.approx(2 * 4 * 2**24 / 2e-3 / 1e9)
