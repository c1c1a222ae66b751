"""Gradients of out and of the LSE against finite differences, in float64, on every backend."""

from __future__ import annotations

import pytest
import torch

from backends import BACKENDS, FUSED, Backend, skip_unless_served
from flash_attend.testing.calls import Case, function_of, make_call


def _small(name: str, **changes: object) -> Case:
    return Case(name, **{**dict(batch=1, heads=2, queries=4, keys=5, d=3), **changes})


CASES = (
    _small("no_mask"),
    _small("value_dim_differs", dv=5),
    _small("twice_the_value_dim", d=2, dv=4, causal=True),
    _small("causal", causal=True),
    _small("causal_dead_rows", queries=6, keys=3, causal=True),
    _small("padding", batch=2, mask="pad_right"),
    _small("padding_causal_dead_rows", batch=2, keys=4, mask="pad_left", causal=True),
    _small("dead_batch", batch=2, mask="dead_batch"),
    _small("per_head_mask", mask="bh1j"),
    _small("dense_mask", queries=5, mask="bhij"),
    _small("dense_mask_causal", queries=5, mask="11ij", causal=True),
    _small("rows_off", mask="bhi1"),
    _small("grouped", heads=4, kv_heads=2, causal=True),
    _small("grouped_per_head_mask", heads=4, kv_heads=2, mask="1h1j"),
    _small("one_kv_head_3d", kv_heads=0, mask="b11j", causal=True),
    _small("negative_scale", scale=-0.8, causal=True),
    _small("zero_scale", scale=0.0),
    _small("several_tiles", heads=1, queries=18, keys=35, d=1, dv=1, causal=True, mask="holes"),
    _small("dropout", dropout_p=0.4),
    _small("dropout_grouped_padding_causal", heads=4, kv_heads=2, dropout_p=0.3, mask="pad_left", causal=True),
    _small("dropout_dense_mask", queries=5, dropout_p=0.3, mask="bhij"),
    _small("bias", bias="1hij", batch=2),
    _small("bias_of_keys_dropout", bias="b11j", batch=2, dropout_p=0.3, mask="pad_left"),
    _small("softcap", softcap=1.5, causal=True),
    _small("sinks_dead_rows", sinks=True, causal=True, queries=6, keys=3),
    _small("window_alibi", window=(2, 1), alibi="h", queries=6, keys=9),
    _small("all_of_scores", bias="11ij", window=(3, None), softcap=1.0, alibi="bh", sinks=True, mask="bh1j", batch=2),
)

# The fused backward: dead rows, every way of hiding keys, and the signs of the scale.
OF_FUSED = (
    *("padding_causal_dead_rows", "grouped_per_head_mask", "dense_mask_causal", "negative_scale", "several_tiles"),
    *("dropout_grouped_padding_causal", "all_of_scores"),
)
FUSED_CASES = tuple(case for case in CASES if case.name in OF_FUSED)

# Under the interpreter the whole Jacobian of these, and of the others a random projection of it.
WHOLE = ("dropout",)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(backend: Backend, case: Case) -> None:
    _check_gradients(backend, case)


# It adds in any order: how far apart two runs may be.
REORDERED = 1e-13


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_gradcheck_of_the_fused_backward(backend: Backend, case: Case) -> None:
    _check_gradients(backend, case, REORDERED)


def _check_gradients(backend: Backend, case: Case, between_runs: float = 0.0) -> None:
    call = make_call(case, torch.float64, backend.device)
    skip_unless_served(backend, call)
    attend, inputs = function_of(call, backend.name)
    projected = backend.interpreted and case.name not in WHOLE
    tolerances = dict(atol=1e-8, rtol=1e-6, nondet_tol=between_runs)
    assert torch.autograd.gradcheck(attend, inputs, eps=1e-6, **tolerances, fast_mode=projected)
