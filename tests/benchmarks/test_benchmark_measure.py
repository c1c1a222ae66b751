"""Timing, with a clock of our own: turns, statistics, and where it was."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from functools import partial

import pytest
import torch
import torch.utils.deterministic

import measure
from flash_attend.testing.memory import peak_bytes
from measure import SAMPLERS, interleave, numerics, summarise

CPU = torch.device("cpu")


def test_peers_take_turns_forwards_and_backwards():
    turns = []

    def sample(function, milliseconds):
        taken = function()
        turns.append(taken)
        return [taken] * max(1, int(milliseconds / taken))

    samplers = {
        name: partial(sample, lambda taken=taken: taken) for name, taken in (("a", 1.0), ("b", 2.0), ("c", 4.0))
    }
    samples = interleave(samplers, rounds=4, milliseconds=10.0)
    order = "".join({1.0: "a", 2.0: "b", 4.0: "c"}[taken] for taken in turns)
    assert order == "abc" + "abc" + "cba" + "abc" + "cba", "once to learn how long a call takes, then A B B A"
    assert samples == {"a": [[1.0] * 10] * 4, "b": [[2.0] * 5] * 4, "c": [[4.0] * 2] * 4}
    far = interleave({name: partial(sample, lambda x=x: x) for name, x in (("a", 1.0), ("b", 9.0))}, 3, 10.0)
    assert far == {"a": [[1.0] * 10] * 3, "b": [[9.0]]}, "who is far behind takes one turn"
    short = interleave({"a": partial(sample, lambda: 0.125)}, rounds=2, milliseconds=1000.0)
    assert [len(taken) for taken in short["a"]] == [measure.MOST_SAMPLES] * 2


def test_statistics_are_of_all_samples_together():
    found = summarise([[1.0, 2.0, 3.0], [4.0, 5.0], [6.0, 7.0, 8.0, 9.0]])
    quartiles = statistics.quantiles(range(1, 10), n=4, method="inclusive")
    assert (found["ms_median"], found["ms_iqr"]) == (5.0, quartiles[2] - quartiles[0])
    assert found["ms_rounds"] == [2.0, 4.5, 7.5] and found["samples"][1] == [4.0, 5.0]
    assert summarise([[3.0]])["ms_iqr"] == 0.0 and summarise([[1.0] * 9 + [100.0]])["ms_median"] == 1.0


def test_a_cpu_is_timed_in_milliseconds():
    calls = []
    taken = SAMPLERS["cpu"](lambda: calls.append(time.sleep(0.004)), 20.0)
    assert 1 <= len(taken) <= 5 and len(calls) == len(taken) + 1, "the first is a warm-up"
    assert min(taken) >= 4.0 and statistics.median(taken) < 400.0


def test_numerics_are_set_and_given_back():
    def state():
        return (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.get_num_threads(),
        )

    before = state()
    with pytest.raises(RuntimeError), numerics("tf32", deterministic=True, threads=1):
        assert state() == ("high", True, False, 1)
        with numerics("float32"):
            assert state() == ("highest", False, True, 1)
        assert state() == ("high", True, False, 1)
        raise RuntimeError
    assert state() == before


def test_the_peak_of_a_cpu_is_what_is_held_at_once():
    kept = torch.ones(1000)

    def call():
        for _ in range(3):
            first = torch.empty(1000)
            second = torch.empty(500)
            del first, second
        return kept + 1

    assert peak_bytes(call, CPU) == pytest.approx(6000, abs=256)
    assert peak_bytes(lambda: None, CPU) == 0


def test_the_environment_says_where_and_with_what(monkeypatch):
    header = measure.environment(CPU)
    assert header["device"] == "cpu" and header["torch"] == torch.__version__
    assert {"driver", "cuda", "triton", "python", "host", "threads", "commit", "dirty", "started"} <= header.keys()
    assert len(header["commit"]) == 40 or header["commit"] == "unknown"

    def no_git(*command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", no_git)
    monkeypatch.setitem(os.environ, "FLASH_ATTEND_COMMIT", "abc123")
    header = measure.environment(CPU)
    assert (header["commit"], header["dirty"]) == ("abc123", None)
