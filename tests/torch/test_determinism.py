"""Gradients that are asked to be repeatable are the same bits every time, however they are asked, by the separate
backward where the fused one would serve."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from backends import BACKENDS, FUSED, Backend
from flash_attend import explain, flash_attention
from flash_attend.testing.calls import Case, assert_same_bits, make_call, run

CASES = (
    Case("grouped_padded_causal", batch=1, heads=2, kv_heads=1, queries=37, keys=43, mask="pad_left", causal=True),
    Case("dense_dropout", batch=1, heads=1, queries=37, keys=43, mask="b1ij", dropout_p=0.3),
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("switch", ("option", "torch"))
def test_twenty_runs_give_the_same_bits(switch: str, case: Case, backend: Backend) -> None:
    """Fewer in the interpreter, which runs one program after another anyway."""
    call = make_call(case, torch.float32, backend.device)
    attend = partial(flash_attention, deterministic=True if switch == "option" else None)
    torch.use_deterministic_algorithms(switch == "torch")
    try:
        first = run(call, backend.name, attend=attend)
        for _ in range(2 if backend.interpreted else 20):
            assert_same_bits(run(call, backend.name, attend=attend), first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("switch", ("option", "torch"))
def test_the_separate_backward_serves_in_place_of_the_fused_one(switch: str, backend: Backend) -> None:
    call = make_call(CASES[0], torch.float32, backend.device)
    options = dict(**call.options, deterministic=True if switch == "option" else None)
    assert explain(call.q, call.k, call.v, **call.options, backend=backend.name).plan.backward == "fused"
    torch.use_deterministic_algorithms(switch == "torch")
    try:
        plan = explain(call.q, call.k, call.v, **options, backend=backend.name).plan
        assert plan.backward == "separate"
        assert "deterministic gradients are asked for" in plan.backward_reason
        attend = partial(flash_attention, deterministic=options["deterministic"])
        first = run(call, backend.name, attend=attend)
        assert_same_bits(run(call, backend.name, attend=attend, backward="separate"), first)
    finally:
        torch.use_deterministic_algorithms(False)
