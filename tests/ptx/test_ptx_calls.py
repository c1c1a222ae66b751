"""Calls of the package, compiled for sm_80 and sm_90 and executed: every answer within the error budget."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from emulator import bulk
from emulator.driver import Runner
from executions import EXECUTIONS, call_of, execute, judge

pytestmark = pytest.mark.ptx


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if execution.fast else pytest.mark.proof) for name, execution in EXECUTIONS.items()],
)
def test_right(name: str) -> None:
    judge(EXECUTIONS[name])


# ---------------------------------------------------------------------------------------------------------------------
# Operands in TF32
# ---------------------------------------------------------------------------------------------------------------------

HALF_A_UNIT = re.compile(r"fma\.rn\.f32 \t(%r\d+), %r\d+, 0f3A000000, (%r\d+);")
BY_DESCRIPTORS = "sm_90 triton tf32 d64 key causal"
BY_POINTERS = "sm_80 triton tf32 d64 key causal"


def cut_off(kernel: str, text: str) -> str:
    """A kernel that does not round."""
    changed, count = HALF_A_UNIT.subn(r"mov.b32 \1, \2;", text)
    assert count or "mma" not in text, f"{kernel} rounds nothing"
    return changed


def test_operands_that_are_cut_off_leave_the_budget() -> None:
    with pytest.raises(AssertionError, match="of the budget"):
        judge(EXECUTIONS[BY_POINTERS], Runner("sm_80", edit=cut_off))


@pytest.mark.proof
def test_operands_that_bulk_copies_do_not_round_leave_the_budget() -> None:
    with (
        mock.patch.object(bulk, "rounded_to_tf32", lambda bits: bits),
        pytest.raises(AssertionError, match="of the budget"),
    ):
        judge(EXECUTIONS[BY_DESCRIPTORS])


def test_rounding_keeps_a_nan_whose_bits_are_all_ones() -> None:
    """In integers half a unit more would make it 0."""
    execution = EXECUTIONS[BY_POINTERS]
    call = call_of(execution).with_(mask=None)
    call.k[0, 0, 3, 5] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    answer, _ = execute(execution, call)
    sees_it = torch.arange(call.q.shape[2]) >= 3 + call.q.shape[2] - call.k.shape[2]
    assert torch.equal(answer.out[0, 0].isnan().all(1), sees_it)
    assert not answer.out[1].isnan().any()
