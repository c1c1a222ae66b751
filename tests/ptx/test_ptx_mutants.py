"""Mistakes put into the compiled kernels, each of which is found, or is known to be harmless."""

from __future__ import annotations

from functools import lru_cache

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from mutants import HARMLESS, MISTAKES, SOMEWHERE, SUBJECTS, Subject, missed, outcomes, recorded

pytestmark = pytest.mark.ptx

recording_of = lru_cache(maxsize=1)(recorded)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize(
    ("subject", "most"),
    [pytest.param(subject, 1, id=subject.name) for subject in SUBJECTS if subject.fast]
    + [pytest.param(subject, 3, id=f"{subject.name}, more", marks=pytest.mark.proof) for subject in SUBJECTS],
)
def test_found(subject: Subject, most: int, mistake: str) -> None:
    lines = missed(subject, mistake, outcomes(recording_of(subject), mistake, most))
    assert not lines, f"not found in lines {lines} of the PTX"


def test_the_tables_know_each_other() -> None:
    kernels = {subject.kernel for subject in SUBJECTS}
    assert SOMEWHERE.keys() <= MISTAKES.keys()
    assert all(kernel in kernels and mistake in MISTAKES for kernel, mistake in HARMLESS)
