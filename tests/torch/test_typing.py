"""What a type checker sees of the public names. `make lint` checks this file; here it runs."""

from __future__ import annotations

import inspect
from importlib.resources import files
from typing import get_type_hints

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import flash_attend
from flash_attend import Attend, explain, flash_attention, patch
from flash_attend.dispatch import Plan
from flash_attend.integrations import PatchHandle


def test_what_comes_back() -> None:
    q = torch.zeros(1, 2, 3, 4)
    assert_type(flash_attention(q, q, q), Tensor)
    assert_type(flash_attention(q, q, q, causal=True, return_lse=False), Tensor)
    assert_type(flash_attention(q, q, q, return_lse=True), tuple[Tensor, Tensor])
    assert_type(Attend(causal=True).forward(q, q, q, mask=None), Tensor)
    assert_type(explain(q, q, q).plan, Plan | None)
    with patch(nn.ModuleList([nn.Sequential(Attend())])) as handle:
        assert_type(handle, PatchHandle)


def test_what_is_refused() -> None:
    """Each `ignore` stands for an error that the checker reports; it also reports one that stands for none."""
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(TypeError):
        flash_attention(q, q, q, causal="yes")  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        flash_attention(q, q, q, None)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        Attend(dropout="0.1")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        patch("model")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", flash_attend.__all__)
def test_every_public_name_is_typed(name: str) -> None:
    found = getattr(flash_attend, name)
    functions = (
        [found]
        if inspect.isfunction(found)
        else [
            function
            for attribute, function in vars(found).items()
            if inspect.isfunction(function) and (attribute == "__init__" or not attribute.startswith("_"))
        ]
    )
    for function in functions:
        hints = get_type_hints(function)
        named = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
        assert {*named, "return"} <= hints.keys(), function.__qualname__


def test_checkers_are_told() -> None:
    assert files("flash_attend").joinpath("py.typed").is_file()
