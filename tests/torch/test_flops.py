"""`FlopCounterMode` counts our operators as it counts torch's own fused attention."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from backends import BACKENDS, SDPA_CPU, Backend
from flash_attend import flash_attention
from flash_attend.flops import COUNTER
from flash_attend.testing.calls import Case, make_call

KERNELS = [each for each in BACKENDS if each.values[0].name == "triton"]  # the einsum path is counted by its products


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Torch's counter as it is when it is imported after flash_attend."""
    monkeypatch.delitem(sys.modules, COUNTER, raising=False)
    return importlib.import_module(COUNTER)


@pytest.mark.parametrize("backend", (*KERNELS, pytest.param(SDPA_CPU, id=str(SDPA_CPU))))
def test_the_count_is_that_of_torchs_own_attention(backend: Backend, counter: ModuleType) -> None:
    """Of all pairs, whatever causality hides."""
    case = Case("grouped", heads=4, kv_heads=2, queries=9, keys=7, d=4, dv=4, causal=True, grads="out")
    call = make_call(case, torch.float32, backend.device)
    inputs = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    with counter.FlopCounterMode(display=False) as forward:
        out = flash_attention(*inputs, causal=True, backend=backend.name)
    with counter.FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, inputs, call.grad_out)
    shapes = (2, 4, 9, 4), (2, 4, 7, 4), (2, 4, 7, 4)  # torch 2.10 counts no grouped heads
    assert forward.get_total_flops() == counter.sdpa_flop_count(*shapes)
    assert backward.get_total_flops() == counter.sdpa_backward_flop_count(out.shape, *shapes)


def test_the_counter_may_be_imported_first() -> None:
    code = f"""
import {COUNTER} as counter
import flash_attend
print(sorted(name for name in map(str, counter.flop_registry) if name.startswith("flash_attend")))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "['flash_attend.backward', 'flash_attend.forward']\n"
