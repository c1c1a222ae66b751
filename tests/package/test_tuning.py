"""What is measured fastest is taken, with a fake clock and on a part that is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flash_attend
from flash_attend import __main__ as command
from flash_attend import explain, flash_attention, timing, tuning
from flash_attend.evidence import Tuned, name_of_tuned
from flash_attend.isolation import Failed
from flash_attend.kernels.configs import ONE_QUERY, Tile, Tiles, as_text, tiles_of
from flash_attend.timing import Call, Candidate, call_as_json, call_of_json, in_turns, time_pair
from flash_attend.tuning import grid, tune
from parts import CPU, PART, VARIANT, forget, serve_as_triton, store, with_fault

CALL = grid(["float32"], [(8, 8)], ["none"], [(16, 16)], tokens=16, width=16)[0]
TILES = as_text(Tiles(Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(64, 32, 4, 1)))
MATH, USUAL, FUSED, OTHER = (
    Candidate("math", "einsum"),
    Candidate("triton", "separate"),
    Candidate("triton", "fused"),
    Candidate("triton", "separate", TILES),
)


@pytest.fixture(autouse=True)
def on_the_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("FLASH_ATTEND_CACHE", str(tmp_path))
    forget()
    serve_as_triton(with_fault("none"), monkeypatch.setattr, monkeypatch.setitem)
    monkeypatch.setattr(tuning, "_gpus", lambda: [CPU])
    monkeypatch.setattr(tuning, "candidates", lambda calls, target: [USUAL, OTHER, FUSED, MATH])
    yield
    forget()


class Part:
    """Answers for the process that times pairs; a time is a number, a text what went wrong."""

    def __init__(self, times: dict[Candidate, float | str]) -> None:
        self.times, self.asked = times, []

    def __call__(self, process: object, request: dict[str, Any]) -> dict[str, Any]:
        pair = [Candidate(*one) for one in request["pair"]]
        self.asked.append(tuple(pair))
        for one in pair:
            if isinstance(self.times[one], str):
                return dict(error=self.times[one])
        return dict(seconds=[self.times[one] for one in pair])


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict], Part]:
    def make(times: dict[Candidate, float | str]) -> Part:
        found = Part(times)
        monkeypatch.setattr(tuning, "_ask", found)
        return found

    return make


def won() -> tuple[str, tuple]:
    """The backend, and how each is fastest."""
    found = store().tuned(VARIANT.kind)
    assert found is not None
    return found.backend, found.ways


@pytest.mark.parametrize(
    ("times", "backend", "backward", "tiles"),
    (
        ({USUAL: 1.0, OTHER: 2.0, FUSED: 2.0, MATH: 2.0}, "triton", "separate", ""),
        ({USUAL: 1.0, OTHER: 0.98, FUSED: 0.99, MATH: 0.98}, "triton", "separate", ""),  # not clearly faster
        ({USUAL: 1.0, OTHER: 0.9, FUSED: 0.95, MATH: 2.0}, "triton", "separate", TILES),
        ({USUAL: 1.0, OTHER: 0.9, FUSED: 0.8, MATH: 2.0}, "triton", "fused", ""),
        ({USUAL: 1.0, OTHER: 0.9, FUSED: 0.8, MATH: 0.5}, "math", "fused", ""),
        ({USUAL: 1.0, OTHER: 0.5, FUSED: "died", MATH: 2.0}, "triton", "separate", TILES),
        ({USUAL: "wrong", OTHER: 1.0, FUSED: 2.0, MATH: 2.0}, "triton", "separate", TILES),
    ),
)
def test_the_fastest_that_is_right_wins(part: Callable, times: dict, backend: str, backward: str, tiles: str) -> None:
    part(times)
    (said,) = tune([CALL]).values()
    assert said.startswith(f"{backend}: measured here on ")
    assert won() == (backend, (("triton", backward, tiles), tuple(MATH)))


def test_where_nothing_is_right_nothing_wins(part: Callable) -> None:
    part(dict.fromkeys((USUAL, OTHER, FUSED, MATH), "wrong"))
    assert list(tune([CALL]).values()) == ["nothing was right"]
    assert store().tuned(VARIANT.kind) is None


def test_a_kinds_calls_decide_together(part: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is faster for one call and slower for the other by more is not taken."""
    found = part({})
    lengths = {16: {USUAL: 1.0, OTHER: 0.8, FUSED: 2.0, MATH: 2.0}, 32: {USUAL: 1.0, OTHER: 1.5, FUSED: 0.4, MATH: 2.0}}

    def by_length(process: object, request: dict[str, Any]) -> dict[str, Any]:
        found.times = lengths[request["call"]["queries"]]
        return found(process, request)

    monkeypatch.setattr(tuning, "_ask", by_length)
    tune([CALL, CALL._replace(spec=replace(CALL.spec, queries=32))])
    assert won() == ("triton", (tuple(FUSED), tuple(MATH)))


def test_tuning_goes_on_where_it_was_stopped(part: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a fake clock: every pair takes a minute."""
    found = part({USUAL: 1.0, OTHER: 0.5, FUSED: 0.8, MATH: 2.0})
    now = [0.0]

    def minute(process: object, request: dict[str, Any]) -> dict[str, Any]:
        now[0] += 60
        return found(process, request)

    monkeypatch.setattr(tuning, "_ask", minute)
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])
    assert list(tune([CALL], minutes=0).values()) == ["there was no time"]
    tune([CALL], minutes=2)
    assert found.asked == [(USUAL, USUAL), (USUAL, OTHER)]
    assert won() == ("triton", (tuple(OTHER),))
    forget()
    tune([CALL], minutes=2)
    assert found.asked[2:] == [(USUAL, FUSED), (USUAL, MATH)]
    tune([CALL], minutes=2)
    assert len(found.asked) == 4
    assert won() == ("triton", (tuple(OTHER), tuple(MATH)))


def test_the_next_call_follows(part: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a restart; a backend that is asked for by name takes its backward, too."""
    q = torch.randn(1, 2, 16, 8)
    flash_attention(q, q, q)
    assert explain(q, q, q).plan.name == "triton"
    separate, fused = Candidate("triton", "separate"), Candidate("triton", "fused")  # what serves here has no tiles
    monkeypatch.setattr(tuning, "candidates", lambda calls, target: [separate, fused, MATH])
    part({separate: 1.0, fused: 0.8, MATH: 0.5})
    flash_attend.tune(lambda: flash_attention(q, q, q))
    assert explain(q, q, q).plan.name == "math"
    assert explain(q, q, q, backend="triton").plan.backward == "fused"
    assert "2.00 times as fast as triton (separate)" in str(explain(q, q, q))
    flash_attention(q, q, q)


def test_calls_are_taken_from_whoever_makes_them(part: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(tuning, "_tune_kind", lambda device, kind, calls, end, bar: found.append((kind, calls)) or "")
    q = torch.randn(1, 2, 16, 8, requires_grad=True)

    def step() -> None:
        for _ in range(2):
            flash_attention(q, q, q)
            flash_attention(q.detach()[:, :, :4], q, q, causal=True)

    step()  # what was decided before is seen all the same
    tune(step)
    (plain, (one,)), (causal, (other,)) = found
    assert (plain.causal, one.spec.queries, one.needed) == (False, 16, (True,) * 3)
    assert (causal.causal, other.spec.queries, other.needed) == (True, 4, (False, True, True))


def test_two_calls_take_turns() -> None:
    said: list[str] = []
    times = iter([0.0] * 4 + [1.0, 5.0, 7.0, 3.0] * timing.ROUNDS)
    found = in_turns(*(lambda name=name: said.append(name) or next(times) for name in "AB"))
    assert "".join(said) == "ABAB" + "ABBA" * timing.ROUNDS
    assert found == [2.0, 6.0]


@pytest.mark.parametrize("mask", ("none-causal", "key", "dense-causal"))
def test_a_pair_is_timed(monkeypatch: pytest.MonkeyPatch, mask: str) -> None:
    """For real, with gradients and without; one that is wrong is not timed."""
    monkeypatch.setattr(timing, "ROUNDS", 1)
    (call,) = grid(["float32"], [(8, 16)], [mask], [(24, 24)], tokens=48, width=16)
    for needed in ((True,) * 3, (False,) * 3):
        given = call_as_json(Call(call.spec, needed))
        assert call_of_json(given) == Call(call.spec, needed)
        request = dict(device="cpu", call=given, pair=[["triton", "separate", ""], list(MATH)])
        assert all(seconds > 0 for seconds in time_pair(request))
    serve_as_triton(with_fault("wrong"), monkeypatch.setattr, monkeypatch.setitem)
    store().folder.rename(store().folder.with_name("other"))
    forget()
    with pytest.raises(ValueError, match="its self-check failed here"):
        time_pair(request)


def test_the_command(part: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main(["tune"]) == 0
    assert "there is no GPU" in capsys.readouterr().out
    monkeypatch.setattr(command, "_gpus", lambda: [CPU])
    part({USUAL: 1.0, OTHER: 0.5, FUSED: 0.8, MATH: 2.0})
    options = ["--dtype", "float32", "--d", "8", "--mask", "none", "key", "--length", "16", "--tokens", "16"]
    assert command.main(["tune", *options, "--minutes", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"cpu {name_of_tuned(VARIANT.kind)}: triton: measured here on ")
    assert lines[0].endswith("2.00 times as fast as triton (separate)")
    assert len(lines) == 2
    assert len(store().reasons_of_tuned()) == 2


def test_candidates_are_what_a_part_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="tiles are the kernels'")
    monkeypatch.undo()
    hopper = replace(PART, capability=(9, 0))
    call, short, one = grid(["bfloat16"], [(64, 64)], ["key-causal"], [(2048, 2048), (64, 64), (1, 2048)])
    found = tuning.candidates([call], hopper)
    ways = list(dict.fromkeys((one.backend, one.backward) for one in found))
    kernels, torchs = [("triton", "separate"), ("triton", "fused")], [("efficient", "torch"), ("math", "einsum")]
    assert ways == [*kernels, *torchs, ("hopper", "separate"), ("hopper", "fused")]
    assert len(set(found)) == len(found) > 10
    assert tuning.candidates([call, short], hopper) == found, "whatever the lengths: a kind's calls decide together"
    assert not [way for way in tuning.candidates([call], PART) if way.backend == "hopper"]
    assert one.needed == (False,) * 3
    decoding = tuning.candidates([one], PART)
    assert [way.backward for way in decoding] == ["separate"] * len(ONE_QUERY) + ["torch", "einsum"]
    forwards = [tiles_of(way.tiles, one.spec, PART, "separate").forward for way in decoding[:-2]]
    assert tuple(forwards) == ONE_QUERY


def test_tiles_that_cannot_be_read_are_told_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what serves is what would serve without them, which is not called wrong."""
    q = torch.randn(1, 2, 16, 8)
    for damaged in (
        "[[128",
        "[[128, 64, 4]]",
        "7",
        "[" * 100_000,
        '[["a", 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], null]',
    ):
        forget()
        store().write(
            name_of_tuned(VARIANT.kind), dict(won=Tuned("math", (("triton", "separate", damaged),), "")._asdict())
        )
        with pytest.warns(UserWarning, match="ignores what was tuned in .*: not the tiles of a call") as caught:
            for length in (8, 16):
                flash_attention(*[q[:, :, :length].requires_grad_()] * 3)
        assert len(caught) == 1
        assert explain(q, q, q).plan.name == "triton"
        assert all(finding.right for finding in store().findings().values())


def test_failures_are_figures() -> None:
    class Process:
        def ask(self, request: object, limit: float) -> list[float]:
            raise Failed("no answer within 1 seconds")

    assert tuning._ask(Process(), {}) == dict(error="no answer within 1 seconds")
