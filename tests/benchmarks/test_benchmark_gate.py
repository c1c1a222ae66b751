"""The gate: it lets right implementations through and no other, and says what is wrong."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import gate
from cases import FORWARD, Case, make_inputs
from flash_attend import flash_attention
from gate import Gate

CPU = torch.device("cpu")
CASE = Case(batch=2, heads=4, kv_heads=2, queries=24, keys=24, head_dim=16, value_dim=16, dtype="float32", causal=True)
PADDED = replace(CASE, mask="right", valid=0.5)


def ours(case, inputs):
    """The call that the case describes."""
    return partial(flash_attention, mask=inputs.mask, causal=case.causal, dropout_p=case.dropout_p, backend="math")


@pytest.mark.parametrize(
    "case",
    [CASE, PADDED, replace(PADDED, mask="holes"), replace(CASE, mask="documents", valid=0.5),
     replace(CASE, dropout_p=0.2), replace(CASE, queries=40), replace(CASE, dtype="bfloat16")],
    ids=lambda case: case.name,
)  # fmt: skip
def test_a_right_implementation_passes(case):
    inputs = make_inputs(case, CPU)
    check = Gate(inputs).judge(ours(case, inputs), whole=True)
    assert not check.error
    assert check.checked == "4 of 4 slices" and 0 < check.budget_used <= 1 and 0 < check.rel_error < 1e-2


WRONG = {
    "scale": lambda q, k, v: flash_attention(q, k, v, causal=True, scale=0.3),
    "mask": lambda q, k, v: flash_attention(q, k, v),
    "precision": lambda q, k, v: flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True).float(),
    "gradient": lambda q, k, v: flash_attention(q, k.detach() + 0 * k, v, causal=True),
    "NaN": lambda q, k, v: flash_attention(q, k, v, causal=True) * torch.nan,
    "shape": lambda q, k, v: flash_attention(q, k, v, causal=True)[:, :, :-1],
    "dtype": lambda q, k, v: flash_attention(q, k, v, causal=True).double(),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_implementation_does_not(name):
    inputs = make_inputs(CASE, CPU)
    if name == "shape":
        with pytest.raises(RuntimeError, match="grad"):  # torch itself refuses grad_out's shape: the peer's error
            Gate(inputs).judge(WRONG[name], whole=False)
        inputs = make_inputs(replace(CASE, passes=(FORWARD,)), CPU)
    check = Gate(inputs).judge(WRONG[name], whole=False)
    assert check.error.startswith("wrong: ") and check.budget_used is None


def test_rows_that_nobody_reads_are_judged_only_where_asked():
    inputs = make_inputs(PADDED, CPU)

    def garbage_in_padding(q, k, v):
        out = flash_attention(q, k, v, mask=inputs.mask, causal=True)
        return torch.where(inputs.rows[:, None, :, None], out, torch.nan)

    judge = Gate(inputs).judge
    assert not judge(garbage_in_padding, whole=False).error
    assert judge(garbage_in_padding, whole=True).error


def test_dropout_is_judged_by_what_it_keeps():
    case = replace(CASE, dropout_p=0.2)
    inputs = make_inputs(case, CPU)

    def other_dropout(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, dropout_p=0.2)

    assert Gate(inputs).judge(other_dropout, whole=False).error


@pytest.mark.parametrize(("error", "everywhere"), [(1e-3, False), (torch.inf, True)])
def test_large_calls_are_checked_in_slices_and_for_infinity_everywhere(monkeypatch, error, everywhere):
    monkeypatch.setitem(gate.PAIRS, "cpu", 0)
    inputs = make_inputs(CASE, CPU)
    large = Gate(inputs)
    check = large.judge(ours(CASE, inputs), whole=True)
    assert not check.error and check.checked == "3 of 4 slices"
    checked = set(large.budgets)
    assert len(checked) == 3
    for batch, kv_head in itertools.product(range(2), range(2)):

        def wrong(q, k, v, batch=batch, head=2 * kv_head):
            out = flash_attention(q, k, v, causal=True)
            errors = torch.zeros_like(out)
            errors[batch, head] = error
            return out + errors

        seen = everywhere or (batch, kv_head) in checked
        assert bool(large.judge(wrong, whole=True).error) == seen


def test_what_an_implementation_raises_goes_through():
    def fails(q, k, v):
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        Gate(make_inputs(CASE, CPU)).judge(fails, whole=False)


def test_without_gradients_where_only_the_forward_is_measured():
    inputs = make_inputs(replace(CASE, passes=(FORWARD,)), CPU)

    def no_backward(q, k, v):
        return flash_attention(q, k, v, causal=True).detach()

    assert not Gate(inputs).judge(no_backward, whole=True).error
