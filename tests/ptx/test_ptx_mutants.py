"""Mistakes put into the compiled kernels, each of which is found, or is known to be harmless."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

import triton

from emulator.groups import GroupProducts
from emulator.machine import Mask
from flash_attend.kernels import launch
from harmless import HARMLESS, reason_for
from mistakes import MISTAKES
from mutants import SUBJECTS, Subject, attempt, execute_text, places_of, recorded, source_of

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


def test_consumers_issue_their_products_in_turns() -> None:
    """Nothing comes of another order but waiting."""
    subject = next(subject for subject in SUBJECTS if "in turns" in subject.execution)
    recording = recording_of(subject)
    mistake = MISTAKES["wait dropped"]
    others = recording.text
    for place in places_of(recording, "wait dropped"):
        for match in place.matches:
            others = others.replace(match[0], mistake.made(match))

    def order(text: str) -> list[int]:
        """Which consumer issues the products that are scores, in order: four of so many registers each."""
        issued, issue = [], GroupProducts.issue

        def record(products: GroupProducts, registers: np.ndarray, mask: Mask) -> None:
            if len(registers) == 64:
                issued.extend(np.nonzero(products.machine.groups_of(mask))[1].tolist())
            issue(products, registers, mask)

        with mock.patch.object(GroupProducts, "issue", record):
            execute_text(recording, text)
        return issued[::4]

    found = order(recording.text)
    assert found == [0, 1] * (len(found) // 2)
    assert order(others) != found


def test_the_reasons_are_about_mistakes_that_there_are() -> None:
    for row in HARMLESS:
        assert any(re.fullmatch(row.mistakes, mistake) for mistake in MISTAKES), row
        assert any(re.search(row.subjects, str(subject)) for subject in SUBJECTS), row


def test_a_source_is_found_where_it_is_now() -> None:
    """What Triton compiled in another folder it gives out again for the same text."""
    here = source_of("/elsewhere/kernels/hopper/forward.py")
    assert here == Path(launch.__file__).parent / "hopper" / "forward.py" and here.exists()
    assert source_of("/elsewhere/triton/language/standard.py") == Path(triton.language.standard.__file__)
