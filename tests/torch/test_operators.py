"""The operators that compilers, transforms and modes see: as PyTorch wants them, and the same as what is launched
directly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from backends import BACKENDS, Backend
from flash_attend import flash_attention
from flash_attend.checks import normalise_inputs
from flash_attend.dropout import draw_seed
from flash_attend.operators import BACKWARD, FORWARD
from flash_attend.testing.calls import Case, assert_same_bits, check, make_call, run

SMALL = dict(heads=2, kv_heads=1, queries=5, keys=7, d=3, dv=4)
CASES = (
    Case("padded_per_head", **SMALL, mask="1h1j", causal=True),
    Case("dense_mask_dropout", **SMALL, mask="b1ij", dropout_p=0.3),
)

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def memory_is_filled() -> Iterator[None]:
    """What a schedule leaves unwritten is the same at every call: opcheck compares all of it."""
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


def forward_arguments(case: Case, backend: Backend, requires_grad: bool = False) -> tuple:
    call = make_call(case, torch.float32, backend.device)
    (q, k, v, mask, _), spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    seed = draw_seed(q.device) if case.dropout_p else None
    inputs = (x.requires_grad_(requires_grad) for x in (q, k, v))
    return *inputs, mask, seed, *spec.options, backend.name, True


def backward_arguments(case: Case, backend: Backend, requires_grad: bool = False) -> tuple:
    arguments = forward_arguments(case, backend)
    out, lse, schedule = FORWARD(*arguments)
    grads = torch.randn_like(out), torch.randn_like(lse)
    differentiable = (x.requires_grad_(requires_grad) for x in (*grads, *arguments[:3]))
    return [True, False, True], *differentiable, *arguments[3:5], out, lse, schedule, *arguments[5:-1]


@on_every_backend
@pytest.mark.usefixtures("memory_is_filled")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_the_forward(case: Case, backend: Backend) -> None:
    opcheck(FORWARD, forward_arguments(case, backend, requires_grad=True))


@on_every_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_the_backward(case: Case, backend: Backend) -> None:
    opcheck(BACKWARD, backward_arguments(case, backend))


@on_every_backend
def test_opcheck_of_the_backward_where_it_is_differentiated(backend: Backend) -> None:
    """All but the tracing of second derivatives with symbolic lengths, which takes half a minute."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(BACKWARD, backward_arguments(CASES[0], backend, requires_grad=True), test_utils=tests)


def layout_of(x: object) -> object:
    return (x.shape, x.stride(), x.dtype, x.device.type) if isinstance(x, Tensor) else x


@on_every_backend
@pytest.mark.parametrize("layout", ("contiguous", "heads_inside", "interleaved", "broadcast_batch"))
def test_the_fake_operators_say_what_the_real_ones_give(layout: str, backend: Backend) -> None:
    for dtype in (torch.float16, torch.float64):
        case = Case(layout, heads=2, queries=5, keys=7, d=3, dv=4, mask="bhij", layout=layout, grad_layout=layout)
        call = make_call(case, dtype, backend.device)
        (q, k, v, mask, _), spec = normalise_inputs(call.q, call.k, call.v, **call.options)
        arguments = (q, k, v, mask, None, *spec.options, backend.name, True)
        out, lse, schedule = results = FORWARD(*arguments)
        last = ([True] * 3, call.grad_out, None, q, k, v, mask, None, out, lse, schedule, *spec.options, backend.name)
        grads = BACKWARD(*last)
        with FakeTensorMode() as mode:
            fake, fake_last = tree_map_only(Tensor, mode.from_tensor, (arguments, last))
            assert tree_map_only(Tensor, layout_of, FORWARD(*fake)) == tree_map_only(Tensor, layout_of, results)
            assert tree_map_only(Tensor, layout_of, BACKWARD(*fake_last)) == tree_map_only(Tensor, layout_of, grads)


class Seen(TorchDispatchMode):
    """Notes which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@on_every_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_dispatch_mode_sees_one_operator_for_the_kernels(case: Case, backend: Backend) -> None:
    """And the result is that of the direct launch, bit for bit. Of the einsum path it sees the parts."""
    call = make_call(case, torch.float32, backend.device)
    direct = run(call, backend.name)
    with Seen() as seen:
        answer = run(call, backend.name)
    ours = {name for name in seen.names if name.startswith("flash_attend::")}
    assert ours == ({"flash_attend::forward", "flash_attend::backward"} if backend.name == "triton" else set())
    assert_same_bits(answer, direct)
    check(answer, call)


@on_every_backend
def test_fake_tensors_go_through(backend: Backend) -> None:
    call = make_call(CASES[0], torch.float16, backend.device)
    with FakeTensorMode() as mode:
        q, k, v, mask = (mode.from_tensor(x) for x in (call.q, call.k, call.v, call.mask))
        q.requires_grad_()
        out, lse = flash_attention(q, k, v, mask=mask, causal=True, return_lse=True, backend=backend.name)
        (grad,) = torch.autograd.grad(out.sum() + lse.sum(), q)
    assert (out.shape, out.dtype) == (call.grad_out.shape, torch.float16)
    assert (lse.shape, lse.dtype) == (call.grad_lse.shape, torch.float32)
    assert (grad.shape, grad.dtype) == (call.q.shape, torch.float16)


def test_importing_brings_neither_triton_nor_a_compiler() -> None:
    heavy = {"triton", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
    code = f"import torch, sys; old = {{*sys.modules}}; import flash_attend; print({heavy} & ({{*sys.modules}} - old))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
