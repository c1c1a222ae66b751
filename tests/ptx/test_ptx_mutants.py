"""Mistakes put into the compiled kernels, each of which is found, or is known to be harmless."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from harmless import HARMLESS, reason_for
from mistakes import MISTAKES
from mutants import SUBJECTS, Subject, attempt, places_of, recorded

pytestmark = pytest.mark.ptx

recording_of = lru_cache(maxsize=1)(recorded)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("subject", [subject for subject in SUBJECTS if subject.fast], ids=str)
def test_found(subject: Subject, mistake: str) -> None:
    """In the first place where something comes of it; `make proof` looks at all of them."""
    recording = recording_of(subject)
    places = [x for x in places_of(recording, mistake) if not reason_for(subject, mistake, x.where)]
    for place in places[:1]:
        assert attempt(recording, mistake, place).found, f"not found in {place.where}"


def test_the_reasons_are_about_mistakes_that_there_are() -> None:
    for row in HARMLESS:
        assert any(re.fullmatch(row.mistakes, mistake) for mistake in MISTAKES), row
        assert any(re.search(row.subjects, str(subject)) for subject in SUBJECTS), row
