"""The backends that the tests run on, for `parametrize`; conftest.py skips those that a process cannot run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from flash_attend import explain
from flash_attend.backends import BackwardName
from flash_attend.ops import INPUTS
from flash_attend.testing.calls import Call, Case, make_call

__all__ = [
    "BACKENDS",
    "CHOOSY",
    "EFFICIENT",
    "FUSED",
    "KERNELS_ON_A_GPU",
    "Backend",
    "call_for",
    "refusal_of",
    "skip_unless_interpretable",
    "skip_unless_served",
]


@dataclass(frozen=True)
class Backend:
    """A backend on a kind of device, and the backward that a test which is given it runs with (see conftest.py)."""

    name: str
    device: str
    interpreted: bool = False
    backward: BackwardName = "separate"
    choosy: bool = False  # does not serve all calls: tests make theirs by `call_for`
    played: bool = False  # by what efficient_kernel.py has for it
    dtype: torch.dtype = torch.float32  # of calls which could have any

    def __str__(self) -> str:
        where = "interpreter" if self.interpreted else "played" if self.played else self.device
        return f"{self.name}-{where}" + ("-fused" if self.backward == "fused" else "")


MATH_CPU = Backend("math", "cpu")
SDPA_CPU = Backend("sdpa", "cpu", choosy=True)
EFFICIENT_PLAYED = Backend("efficient", "cpu", choosy=True, played=True)
TRITON_INTERPRETER = Backend("triton", "cpu", interpreted=True)
MATH_CUDA = Backend("math", "cuda")
TRITON_CUDA = Backend("triton", "cuda")
EFFICIENT_CUDA = Backend("efficient", "cuda", choosy=True)
HOPPER_CUDA = Backend("hopper", "cuda", choosy=True, dtype=torch.float16)
TRITON_FUSED_INTERPRETER = replace(TRITON_INTERPRETER, backward="fused")
TRITON_FUSED_CUDA = replace(TRITON_CUDA, backward="fused")
HOPPER_FUSED_CUDA = replace(HOPPER_CUDA, backward="fused")

# For `parametrize`: conftest.py skips those that a process cannot run.
BACKENDS = (
    pytest.param(MATH_CPU, id=str(MATH_CPU)),
    pytest.param(TRITON_INTERPRETER, id=str(TRITON_INTERPRETER), marks=pytest.mark.interpreter),
    pytest.param(MATH_CUDA, id=str(MATH_CUDA), marks=pytest.mark.gpu),
    pytest.param(TRITON_CUDA, id=str(TRITON_CUDA), marks=pytest.mark.gpu),
)
# The same kernels but for one in the backward: only gradients can differ, and not what decides between backends.
FUSED = (
    pytest.param(TRITON_FUSED_INTERPRETER, id=str(TRITON_FUSED_INTERPRETER), marks=pytest.mark.interpreter),
    pytest.param(TRITON_FUSED_CUDA, id=str(TRITON_FUSED_CUDA), marks=pytest.mark.gpu),
)
CHOOSY = (
    pytest.param(SDPA_CPU, id=str(SDPA_CPU)),
    pytest.param(HOPPER_CUDA, id=str(HOPPER_CUDA), marks=pytest.mark.gpu),
    pytest.param(HOPPER_FUSED_CUDA, id=str(HOPPER_FUSED_CUDA), marks=pytest.mark.gpu),
)
# Choosy too, and it serves no change of scores.
EFFICIENT = (
    pytest.param(EFFICIENT_PLAYED, id=str(EFFICIENT_PLAYED)),
    pytest.param(EFFICIENT_CUDA, id=str(EFFICIENT_CUDA), marks=pytest.mark.gpu),
)
KERNELS_ON_A_GPU = (TRITON_CUDA, TRITON_FUSED_CUDA, HOPPER_CUDA, HOPPER_FUSED_CUDA)


def skip_unless_interpretable(backend: Backend, dtype: torch.dtype) -> None:
    """Triton's interpreter computes bfloat16 on its bit patterns: it is silently wrong there, so nothing is learnt."""
    if backend.interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")


def call_for(backend: Backend, case: Case, dtype: torch.dtype, seed: int = 0) -> Call:
    """A case's call on the device of a backend, or a skip where a choosy one does not serve it, with the dispatcher's
    reason. Hopper's kernels take a head dim of 64 for the usual one, which they do not serve; torch's attentions take
    the gradient of out alone, because where an LSE has one the einsum path computes it."""
    if backend.name == "hopper" and case.d == Case.d:
        case = replace(case, d=64)
    if backend.name in ("sdpa", "efficient") and case.grads == "both":
        case = replace(case, grads="out")
    call = make_call(case, dtype, backend.device, seed)
    skip_unless_served(backend, call)
    return call


def skip_unless_served(backend: Backend, call: Call) -> None:
    """Skips what a choosy backend does not serve, with the dispatcher's reason."""
    if backend.choosy and (refusal := refusal_of(backend, call)):
        pytest.skip(f"reason: {refusal}")


def refusal_of(backend: Backend, call: Call) -> str:
    """Why a backend does not serve a call with all its gradients; empty where it does."""
    given = {name: x for name in INPUTS if (x := getattr(call, name)) is not None}
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    return explain(**{**call.options, **leaves}, backend=backend.name).refusal


def skip_unless_quick(backend: Backend, dtype: torch.dtype) -> None:
    """For tests of many calls, of which half precision learns nothing more in the interpreter."""
    if backend.interpreted and dtype != torch.float32:
        pytest.skip(reason="half precision runs the same code on a GPU; here it is slow, and bfloat16 wrong")
