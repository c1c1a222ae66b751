"""The example that trains on packed texts: it gives the losses of a padded batch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "packed.py"
SMALL = ["--device=cpu", "--texts=6", "--steps=3", "--longest=80", "--heads=2", "--d=8"]


def test_it_trains_as_a_padded_batch_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("packed", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(SMALL) == 0
    assert "the losses are the same" in capsys.readouterr().out

    attend = example.flash_attention_packed
    monkeypatch.setattr(example, "flash_attention_packed", lambda *of, causal: attend(*of))
    assert example.main(SMALL) == 1, "what comes later must not be seen"
