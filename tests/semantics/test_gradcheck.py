"""Gradients of out and of the LSE against finite differences, in float64, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, FUSED, Backend
from flash_attend import flash_attention
from flash_attend.testing.calls import Case, make_call
from flash_attend.testing.oracle import visible_pairs

SMALL = dict(batch=1, heads=2, queries=4, keys=5, d=3)

CASES = (
    Case("no_mask", **SMALL),
    Case("value_dim_differs", **{**SMALL, "dv": 5}),
    Case("twice_the_value_dim", **{**SMALL, "d": 2, "dv": 4, "causal": True}),
    Case("causal", **SMALL, causal=True),
    Case("causal_dead_rows", **{**SMALL, "queries": 6, "keys": 3}, causal=True),
    Case("padding", **{**SMALL, "batch": 2}, mask="pad_right"),
    Case("padding_causal_dead_rows", **{**SMALL, "batch": 2, "keys": 4}, mask="pad_left", causal=True),
    Case("dead_batch", **{**SMALL, "batch": 2}, mask="dead_batch"),
    Case("per_head_mask", **SMALL, mask="bh1j"),
    Case("dense_mask", **{**SMALL, "queries": 5}, mask="bhij"),
    Case("dense_mask_causal", **{**SMALL, "queries": 5}, mask="11ij", causal=True),
    Case("rows_off", **SMALL, mask="bhi1"),
    Case("grouped", **{**SMALL, "heads": 4, "kv_heads": 2}, causal=True),
    Case("grouped_per_head_mask", **{**SMALL, "heads": 4, "kv_heads": 2}, mask="1h1j"),
    Case("one_kv_head_3d", **{**SMALL, "kv_heads": 0}, mask="b11j", causal=True),
    Case("negative_scale", **SMALL, scale=-0.8, causal=True),
    Case("zero_scale", **SMALL, scale=0.0),
    Case("several_tiles", batch=1, heads=1, queries=18, keys=35, d=1, dv=1, causal=True, mask="holes"),
    Case("dropout", **SMALL, dropout_p=0.4),
    Case(
        "dropout_grouped_padding_causal",
        **{**SMALL, "heads": 4, "kv_heads": 2},
        dropout_p=0.3,
        mask="pad_left",
        causal=True,
    ),
    Case("dropout_dense_mask", **{**SMALL, "queries": 5}, dropout_p=0.3, mask="bhij"),
)


# The fused backward: dead rows, every way of hiding keys, and the signs of the scale.
FUSED_CASES = tuple(
    case
    for case in CASES
    if case.name
    in (
        "padding_causal_dead_rows",
        "grouped_per_head_mask",
        "dense_mask_causal",
        "negative_scale",
        "several_tiles",
        "dropout_grouped_padding_causal",
    )
)

# Under the interpreter the whole Jacobian of these, and of the others a random projection of it.
WHOLE = ("value_dim_differs", "causal_dead_rows", "dropout")


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
    pairs = visible_pairs(*call.q.shape[:3], call.k.shape[-2], call.mask, call.causal, call.q.device)
    alive = pairs.any(dim=3)
    assert alive.any()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(call.torch_seed)  # the same dropout in every evaluation
        out, lse = flash_attention(q, k, v, **call.options, return_lse=True, backend=backend.name)
        return out, lse[alive]  # minus infinity has no differences

    inputs = tuple(x.clone().requires_grad_() for x in (call.q, call.k, call.v))
    projected = backend.interpreted and case.name not in WHOLE
    tolerances = dict(atol=1e-8, rtol=1e-6, nondet_tol=between_runs)
    assert torch.autograd.gradcheck(attend, inputs, eps=1e-6, **tolerances, fast_mode=projected)
