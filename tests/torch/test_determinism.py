"""Gradients that are asked to be repeatable are the same bits every time, however they are asked; or they are refused,
where nobody can promise that."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from backends import BACKENDS, FUSED, Backend
from flash_attend import flash_attention
from flash_attend.dispatch import BackendUnavailable
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
def test_the_fused_backward_is_refused(switch: str, backend: Backend) -> None:
    call = make_call(Case("plain"), torch.float32, backend.device)
    torch.use_deterministic_algorithms(switch == "torch")
    try:
        with pytest.raises(BackendUnavailable, match="it adds up those of q in any order"):
            flash_attention(
                call.q, call.k, call.v, deterministic=True if switch == "option" else None, backend=backend.name
            )
    finally:
        torch.use_deterministic_algorithms(False)
