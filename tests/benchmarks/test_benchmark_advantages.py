"""Where one of our backends counts as faster than another: by made-up runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import advantages
from advantages import Advantage, calls_of, row_source
from cases import BACKWARD, BOTH, DETERMINISTIC, DTYPES, FORWARD, PRESETS, Case, make_inputs, select_cases
from flash_attend.checks import normalise_inputs
from flash_attend.dispatch import BACKENDS
from flash_attend.spec import MaskKind, kind_of
from flash_attend.validation import Calls, Measurement
from measure import numerics
from results import Results, Row
from verdicts import OURS

CASE = Case(4, 16, 4096, 4096, 128, 128, 16, causal=True, group="lengths")
SHORT = replace(CASE, batch=32, queries=512, keys=512)
CALLS = Calls("half", 128, 128, MaskKind.NONE)
PEERS = {backend: peer for peer, backend in OURS.items()}


def row(backend: str, ms: float | None = 1.0, *, case: Case = CASE, pass_: str = BOTH, error: str = "") -> Row:
    """A time whose rounds spread by 2%, or an error."""
    rounds = () if ms is None else (0.99 * ms, ms, 1.01 * ms)
    return Row(
        case.name,
        case.group,
        pass_,
        case.dtype,
        case.mask_words,
        case.shape,
        PEERS.get(backend, backend),
        ms_median=ms,
        ms_rounds=rounds,
        error=error,
    )


def found(backend: str, *rows: Row) -> list[Advantage]:
    results = Results(Path("standard.json"), {})
    for each in rows:
        results.add(each)
    return advantages.advantages(results, backend)


def only(backend: str, *rows: Row) -> Advantage:
    (advantage,) = found(backend, *rows)
    return advantage


@pytest.mark.parametrize(("ms", "faster"), ((0.8, True), (0.97, True), (0.985, False), (1.0, False), (1.04, False)))
def test_a_win_is_beyond_the_spread(ms: float, faster: bool) -> None:
    advantage = only("hopper", row("hopper", ms), row("triton", 1.0))
    assert advantage.calls == CALLS
    assert advantage.found == faster


@pytest.mark.parametrize(
    ("times", "faster"),
    (
        ((0.8, 1.0), True),  # a win and an even one
        ((0.8, 1.04), False),  # as many losses as wins
        ((0.8, 0.8, 1.04), True),
        ((0.8, 0.8, 1.06), False),  # one case takes too much longer, however many are won
    ),
)
def test_every_case_of_the_kind_counts(times: tuple[float, ...], faster: bool) -> None:
    cases = [replace(CASE, queries=512 * 2**n, keys=512 * 2**n) for n in range(len(times))]
    rows = [row("hopper", ms, case=case) for ms, case in zip(times, cases, strict=True)]
    advantage = only("hopper", *rows, *(row("triton", case=case) for case in cases))
    assert len(advantage.comparisons) == len(times)
    assert advantage.found == faster
    assert f"at worst {1 / max(times):.2f}x of flash_attend, " in str(advantage)


def test_what_spreads_far_is_no_loss() -> None:
    """As short calls do, where the host decides: the medians of the rounds overlap."""
    slow = replace(row("hopper", 1.2, case=SHORT), ms_rounds=(0.9, 1.2, 1.4))
    advantage = only("hopper", row("hopper", 0.8), slow, row("triton"), row("triton", case=SHORT))
    assert advantage.worst.ratio < advantages.WORST
    assert advantage.found


def test_the_rival_is_the_fastest_of_those_after_it() -> None:
    rows = [row("hopper_fused", 0.5), row("hopper", 0.7), row("triton_fused", 0.6), row("triton"), row("math", 9.0)]
    rows += [row("sdpa", 0.1)]  # no backend of ours
    for backend, rival, wins in (
        ("hopper_fused", "triton_fused", True),
        ("hopper", "triton_fused", False),
        ("triton_fused", "triton", True),
        ("triton", "math", True),
    ):
        advantage = only(backend, *rows)
        assert advantage.comparisons[0].best.peer == PEERS[rival]
        assert advantage.found == wins
    assert found("math", *rows) == []


def test_a_wrong_result_neither_wins_nor_is_a_rival() -> None:
    wrong = "wrong: dq has NaN"
    fast = row("hopper", 0.1, case=SHORT, error=wrong)
    advantage = only("hopper", row("hopper", 0.8), fast, row("triton"), row("triton", case=SHORT))
    assert not advantage.found
    assert str(advantage) == f"half, d 128, dv 128, mask none: {SHORT.name}, {BOTH}: {wrong}"
    rival = row("triton", 0.1, error=wrong)
    assert only("hopper", row("hopper", 0.8), rival, row("math", 1.0)).found


def test_a_refusal_says_nothing_and_any_other_error_spoils() -> None:
    refused = "BackendUnavailable: backend 'hopper' cannot serve this call: dropout is on"
    dropout = replace(CASE, dropout_p=0.1)
    rows = [row("hopper", 0.8), row("triton"), row("triton", case=dropout)]
    assert only("hopper", *rows, row("hopper", None, case=dropout, error=refused)).found
    assert not only("hopper", *rows, row("hopper", None, case=dropout, error="OutOfMemoryError")).found
    assert found("hopper", row("hopper", None, error=refused), row("triton")) == []


def test_the_refusal_of_a_backend_begins_as_it_is_known_by() -> None:
    from flash_attend import BackendUnavailable
    from measure import first_line

    assert first_line(BackendUnavailable("backend 'hopper' cannot")).startswith(advantages.REFUSAL)


def test_what_is_not_told_apart_by_the_dispatcher_does_not_count() -> None:
    rows = [row("hopper", 9.0, pass_=pass_) for pass_ in (BACKWARD, DETERMINISTIC)]
    rows += [row("triton", pass_=pass_) for pass_ in (BACKWARD, DETERMINISTIC, BOTH)]
    assert only("hopper", row("hopper", 0.8), *rows).found
    assert found("hopper", *rows) == []
    assert found("hopper", row("hopper", 0.8)) == []  # beside nobody


def test_kinds_of_calls_are_judged_apart() -> None:
    padded = replace(CASE, mask="right", valid=0.5)
    wide = replace(CASE, head_dim=256, value_dim=256)
    times = {CASE: 0.8, padded: 1.2, wide: 0.7}
    rows = [row("hopper", ms, case=case, pass_=pass_) for case, ms in times.items() for pass_ in (FORWARD, BOTH)]
    rows += [row("triton", case=case, pass_=pass_) for case in times for pass_ in (FORWARD, BOTH)]
    faster = {advantage.calls: advantage.found for advantage in found("hopper", *rows)}
    assert faster == {
        CALLS: True,
        Calls("half", 128, 128, MaskKind.KEY): False,
        Calls("half", 256, 256, MaskKind.NONE): True,
    }


def test_a_row_is_about_the_calls_that_the_dispatcher_knows_it_by() -> None:
    """Every kind of case in the grid, small, as the public call describes it."""
    kinds = {}
    for case in select_cases(PRESETS[-1]):
        kinds.setdefault(calls_of(row("triton", case=case)), case)
    assert {calls.mask for calls in kinds} == set(MaskKind)
    assert {case.dtype for case in kinds.values()} <= set(DTYPES)
    for calls, case in kinds.items():
        small = replace(case, batch=1, queries=min(case.queries, 8), keys=8)
        inputs = make_inputs(small, torch.device("cpu"))
        with numerics(case.dtype):
            *_, spec = normalise_inputs(inputs.q, inputs.k, inputs.v, mask=inputs.mask, causal=case.causal)
        assert calls.hold(spec), (calls, kind_of(spec))


def test_the_row_is_what_the_table_takes() -> None:
    facts = dict(gpu="Some GPU", torch="2", triton="3", date="2026-01-02", commit="abc", results="standard.json")
    rows = [row("hopper", 0.8), row("triton"), row("triton_fused", 0.9)]
    source = row_source("hopper", "sm_90", facts, found("hopper", *rows))
    names = dict(Measurement=Measurement, Calls=Calls, MaskKind=MaskKind)
    assert eval(f"{{{source}}}", names) == {("hopper", "sm_90"): Measurement(**facts, calls=(CALLS,))}
    assert row_source("hopper", "sm_90", facts, []) == ""
    assert row_source("triton", "sm_90", facts, found("triton", row("triton"), row("math", 2.0))) == ""
    assert set(PEERS) == set(BACKENDS)
