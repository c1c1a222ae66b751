"""The short examples: each runs, and fails where what it shows is not so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example_of(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_quickstart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = example_of("quickstart")
    small = ["--device=cpu", "--length=40"]
    assert example.main(small) == 0
    told = capsys.readouterr().out
    assert told.startswith("on cpu: sdpa serves")
    assert "ours " in told
    attend = example.flash_attention
    monkeypatch.setattr(example, "flash_attention", lambda *of, mask, **how: attend(*of, **how))
    assert example.main(small) == 1, "without the mask"


def test_decoding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = example_of("decoding")
    small = ["--device=cpu", "--compiler=aot_eager", "--batch=3", "--steps=6", "--prompt=9", "--cache=32"]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert example.main(small) == 0
    assert capsys.readouterr().out.startswith("18 tokens")

    attend = example.flash_attention
    monkeypatch.setattr(example, "flash_attention", lambda *of, mask=None, **how: attend(*of, **how))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert example.main(small) == 1, "without the mask a step reads what is not filled"


def test_language_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = example_of("language_model")
    small = ["--device=cpu", "--batch=2", "--length=24", "--steps=2"]
    assert example.main(small) == 0
    assert "2 replaced, 0 refused" in capsys.readouterr().out

    patch = example.patch

    def patch_wrongly(model: torch.nn.Module):
        report = patch(model)
        for module in model.modules():
            if hasattr(module, "scale"):
                module.scale = 0.1
        return report

    monkeypatch.setattr(example, "patch", patch_wrongly)
    assert example.main(small) == 1, "with another scale"


def test_huggingface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = example_of("huggingface")
    small = ["--device=cpu", "--batch=2", "--tokens=12", "--new=4"]
    assert example.main(small) == 0
    assert capsys.readouterr().out.count("the same tokens") == 3

    attend = example.huggingface.flash_attention
    monkeypatch.setattr(example.huggingface, "flash_attention", lambda *of, mask, **how: attend(*of, **how))
    assert example.main(small) == 1, "without the padding's mask"
    assert "other tokens" in capsys.readouterr().out


def test_packed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = example_of("packed")
    small = ["--device=cpu", "--texts=6", "--steps=3", "--longest=80", "--heads=2", "--d=8"]
    assert example.main(small) == 0
    assert "the losses are the same" in capsys.readouterr().out

    attend = example.flash_attention_packed
    monkeypatch.setattr(example, "flash_attention_packed", lambda *of, causal: attend(*of))
    assert example.main(small) == 1, "what comes later must not be seen"


def test_mean_flow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = example_of("mean_flow")
    small = ["--device=cpu", "--batch=2", "--length=96", "--steps=1"]
    assert example.main(small) == 0
    told = capsys.readouterr().out
    assert told.endswith("the losses are the same\n")
    by_einsum, ours = (float(line.split(" MB")[0].split()[-1]) for line in told.splitlines()[:2])
    assert ours < by_einsum

    attend = example.flash_attention
    monkeypatch.setattr(example, "flash_attention", lambda *of, mask: attend(*of))
    assert example.main(small) == 1, "without the mask"
