"""Calls of the package, compiled for sm_80 and sm_90 and executed: every answer within the error budget."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from executions import EXECUTIONS, judge

pytestmark = pytest.mark.ptx


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if execution.fast else pytest.mark.proof) for name, execution in EXECUTIONS.items()],
)
def test_right(name: str) -> None:
    judge(EXECUTIONS[name])
