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

from backends import BACKENDS, Backend, skip_unless_served
from flash_attend import flash_attention
from flash_attend.checks import normalise_inputs
from flash_attend.dispatch import choose
from flash_attend.dropout import draw_seed
from flash_attend.ops import BACKWARD, FORWARD, Options, options_of, spec_of, with_gradients
from flash_attend.target import DeviceTarget
from flash_attend.testing.calls import Case, assert_same_bits, check, make_call, run

SMALL = dict(heads=2, kv_heads=1, queries=5, keys=7, d=3, dv=4)
CASES = (
    Case("padded_per_head", **SMALL, mask="1h1j", causal=True),
    Case("dense_mask_dropout", **SMALL, mask="b1ij", dropout_p=0.3),
    Case("changed_scores", **SMALL, bias="1hij", window=(3, 2), softcap=1.5, alibi="h", sinks=True),
)

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def memory_is_filled() -> Iterator[None]:
    """What a schedule leaves unwritten is the same at every call: opcheck compares all of it."""
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


def arguments_of(case: Case, backend: Backend, dtype: torch.dtype = torch.float32) -> tuple[tuple, tuple]:
    """Of the forward, and of a backward that needs the gradients of q and v."""
    call = make_call(case, dtype, backend.device)
    skip_unless_served(backend, call)
    operands, spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    q = operands.q
    operands = operands._replace(seed=draw_seed(q.device) if case.dropout_p else None)
    plan = choose(spec, DeviceTarget.of(q.device), backend.name)
    numbers, options = options_of(operands, spec, plan, return_lse=True)
    present = [x for x in operands if x is not None]
    outputs = FORWARD(present, numbers, options)
    grads = {name: grad for name, grad in (("out", call.grad_out), ("lse", call.grad_lse)) if grad is not None}
    last = with_gradients(options, [*grads], ["q", "v", *(["bias", "sinks"] if case.sinks else [])])
    return (present, numbers, options), ([*grads.values()], present, outputs, numbers, last)


def requiring_gradients(arguments: tuple, tensors: int) -> tuple:
    """The arguments, whose first lists hold what is differentiated."""
    lists = [[x.detach().requires_grad_(x.is_floating_point()) for x in each] for each in arguments[:tensors]]
    return *lists, *arguments[tensors:]


@on_every_backend
@pytest.mark.usefixtures("memory_is_filled")
def test_opcheck(backend: Backend) -> None:
    first, last = arguments_of(CASES[1], backend)  # which has all operands
    opcheck(FORWARD, requiring_gradients(first, 1))
    opcheck(BACKWARD, last)
    # All but the tracing of second derivatives with symbolic lengths, which takes half a minute.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(BACKWARD, requiring_gradients(last, 2), test_utils=tests)


def layout_of(x: Tensor) -> object:
    return x.shape, x.stride(), x.dtype, x.device.type


@on_every_backend
@pytest.mark.parametrize(
    ("layout", "dtype", "mask", "grads"),
    (
        ("contiguous", torch.float16, "bhij", "out"),
        ("heads_inside", torch.float64, "pad_left", "both"),
        ("interleaved", torch.float16, "pad_left", "both"),
        ("broadcast_batch", torch.float64, "bhij", "out"),
    ),
)
def test_the_fake_operators_say_what_the_real_ones_give(
    layout: str, dtype: torch.dtype, mask: str, grads: str, backend: Backend
) -> None:
    case = Case("x", **{**SMALL, "kv_heads": 2}, mask=mask, layout=layout, grad_layout=layout, grads=grads)
    plain = arguments_of(case, backend, dtype)
    negated = tree_map_only(Tensor, lambda x: torch._neg_view(x) if x.is_floating_point() else x, plain)
    for operator, *given in zip((FORWARD, BACKWARD), plain, negated, strict=True):
        for arguments in given:
            with FakeTensorMode() as mode:
                fake = operator(*tree_map_only(Tensor, mode.from_tensor, arguments))
            assert [*map(layout_of, fake)] == [*map(layout_of, operator(*arguments))]


@each_case
def test_options_say_what_the_tensors_do_not(case: Case) -> None:
    """With the tensors and the numbers they give the description of the call again, and it is checked no more."""
    call = make_call(case, torch.float32)
    for options in (call.options, {**call.options, "scale": -1e-300, "deterministic": True}):
        operands, spec = normalise_inputs(call.q, call.k, call.v, **options)
        plan = choose(spec, DeviceTarget.of(operands.q.device), "math")
        numbers, text = options_of(operands, spec, plan, return_lse=True)
        read = Options.read(with_gradients(text, ["lse"], ["q", "v"]))
        assert spec_of(operands, numbers, read) == spec
        assert (read.backend, read.backward, read.return_lse) == ("math", "einsum", True)
        present = tuple(name for name, x in operands._asdict().items() if x is not None)
        assert (read.operands, read.grads, read.needed) == (present, ("lse",), ("q", "v"))


class Seen(TorchDispatchMode):
    """Notes which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@on_every_backend
@each_case
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


# ---------------------------------------------------------------------------------------------------------------------
# Importing
# ---------------------------------------------------------------------------------------------------------------------


def said_by(code: str) -> str:
    """What a program prints, in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_neither_an_import_nor_a_call_brings_triton_or_a_compiler() -> None:
    """Importing DTensor, say, takes as long as importing the package."""
    heavy = {"triton", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.utils.flop_counter"}
    code = f"""
import torch, sys
old = {{*sys.modules}}
import flash_attend
print({heavy} & ({{*sys.modules}} - old))
x = torch.ones(1, 1, 2, 4)
flash_attend.Attend()(x, x, x)
print({heavy} & ({{*sys.modules}} - old))
"""
    assert said_by(code) == "set()\nset()\n"


AGAIN = """
import importlib, sys, torch, flash_attend, flash_attend.ops

q = torch.randn(1, 2, 3, 4, requires_grad=True)
old = flash_attend.Attend(causal=True)

def works(attend):
    (plain,) = torch.autograd.grad(attend(q, q, q).sin().sum(), q)
    for transform in (torch.func.grad, lambda f: torch.compile(torch.func.grad(f), backend="eager")):
        torch.testing.assert_close(transform(lambda q: attend(q, q, q).sin().sum())(q), plain)
    torch._dynamo.reset()
    (compiled,) = torch.autograd.grad(torch.compile(attend, backend="aot_eager")(q, q, q).sin().sum(), q)
    torch.testing.assert_close(compiled, plain)
    assert torch.vmap(attend)(q[None], q[None], q[None]).shape == (1, 1, 2, 3, 4)

works(old)
for again in ("reloaded", "imported again"):
    if again == "reloaded":
        for name in ("ops", "autograd", "functional", "attend"):
            importlib.reload(sys.modules["flash_attend." + name])
    else:
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attend"]:
            del sys.modules[name]
    import flash_attend
    new = importlib.import_module("flash_attend.attend").Attend(causal=True)
    assert type(new) is not type(old)
    works(new)
    works(old)
    print(again)
"""


def test_the_package_may_be_imported_more_than_once() -> None:
    assert said_by(AGAIN) == "reloaded\nimported again\n"
