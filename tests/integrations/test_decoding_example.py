"""The example that decodes with a static cache: it runs compiled, and gives what whole sequences give."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "decoding.py"
SMALL = ["--device=cpu", "--compiler=aot_eager", "--batch=3", "--steps=6", "--prompt=9", "--cache=32"]


def test_it_decodes_what_whole_sequences_give(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("decoding", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert example.main(SMALL) == 0
    assert capsys.readouterr().out.startswith("18 tokens")

    attend = example.flash_attention
    monkeypatch.setattr(example, "flash_attention", lambda *of, mask=None, **how: attend(*of, **how))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert example.main(SMALL) == 1, "without the mask a step reads what is not filled"
