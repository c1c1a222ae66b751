"""Mistakes put into the compiled kernels, each of which is found, or is known to be harmless."""

from __future__ import annotations

from functools import lru_cache

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from mutants import HARMLESS, MISTAKES, SUBJECTS, Recording, Subject, attempt, places_of, recorded

pytestmark = pytest.mark.ptx

recording_of = lru_cache(maxsize=1)(recorded)


def _some(recording: Recording, mistake: str, most: int) -> list:
    return [attempt(recording, mistake, match) for match in places_of(recording, mistake, most)]


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize(
    ("subject", "most"),
    [pytest.param(subject, 1, id=subject.name) for subject in SUBJECTS if subject.fast]
    + [pytest.param(subject, 3, id=f"{subject.name}, more", marks=pytest.mark.proof) for subject in SUBJECTS],
)
def test_found(subject: Subject, most: int, mistake: str) -> None:
    outcomes = _some(recording_of(subject), mistake, most)
    missed = [outcome.line for outcome in outcomes if not outcome.found]
    assert not missed or (subject.kernel, mistake) in HARMLESS, f"not found in lines {missed} of the PTX"


def test_every_mistake_has_a_place_and_every_reason_a_mistake() -> None:
    kernels = {subject.kernel for subject in SUBJECTS}
    assert all(kernel in kernels and mistake in MISTAKES for kernel, mistake in HARMLESS)
