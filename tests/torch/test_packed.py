"""Packed sequences inside PyTorch: compiled, as operators, differentiated twice, mapped over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap
from torch.utils._pytree import tree_map_only

from backends import BACKENDS, Backend
from flash_attend import flash_attention_packed
from flash_attend.checks import normalise_call
from flash_attend.dispatch import choose
from flash_attend.dropout import draw_seed
from flash_attend.operands import Operands
from flash_attend.ops import BACKWARD, FORWARD, options_of, with_gradients
from flash_attend.segments import segments_of
from flash_attend.target import DeviceTarget

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
PLACES = torch.tensor([0, 3, 3, 7, 8])


def inputs_of(t: int = 9, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v with a row behind the last sequence."""
    torch.manual_seed(0)
    shapes = (t, 4, 4), (t, 2, 4), (t, 2, 3)
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def attends(backend: Backend, **options) -> Callable[..., Tensor]:
    places = PLACES.to(backend.device)
    return lambda q, k, v: flash_attention_packed(
        q, k, v, places, places, 4, 4, causal=True, backend=backend.name, **options
    )


def test_a_second_graph_serves_all_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(flash_attention_packed, backend=counter, fullgraph=True)
    for longest in (5, 9, 33):
        places = torch.tensor([0, longest, longest, longest + 3])
        inputs = inputs_of(longest + 4)
        options = dict(causal=True, softcap=2.0, backend="math")
        found, wanted = (
            f(*inputs, places, places, longest, longest, **options) for f in (attend, flash_attention_packed)
        )
        torch.testing.assert_close(found, wanted)
        pairs = (torch.autograd.grad(out.square().sum(), inputs) for out in (found, wanted))
        torch.testing.assert_close(*pairs)
    assert counter.frame_count == 2


@on_every_backend
def test_the_fake_operators_say_what_the_real_ones_give(backend: Backend) -> None:
    q, k, v = (x.detach().transpose(0, 1)[None] for x in inputs_of(device=backend.device, dtype=torch.float32))
    places = PLACES.to(backend.device)
    given = Operands(q, k, v, sinks=q.new_zeros(4), segments=segments_of(places, places, 9, 9))
    operands, spec = normalise_call(given, True, None, 0.3, True)
    plan = choose(spec, DeviceTarget.of(q.device), backend.name)
    numbers, options = options_of(operands, spec, plan, return_lse=True)
    present = [x for x in operands._replace(seed=draw_seed(q.device)) if x is not None]
    options = options.replace("operands=q,k,v,sinks", "operands=q,k,v,seed,sinks")
    outputs = FORWARD(present, numbers, options)
    last = with_gradients(options, ["out", "lse"], ["q", "v", "sinks"])
    backward = [torch.ones_like(x) for x in outputs[:2]], present, outputs, numbers, last
    for operator, arguments in ((FORWARD, (present, numbers, options)), (BACKWARD, backward)):
        with FakeTensorMode() as mode:
            fake = operator(*tree_map_only(Tensor, mode.from_tensor, arguments))
        real = operator(*arguments)
        assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in real]


@on_every_backend
def test_derivatives_are_those_of_differences(backend: Backend) -> None:
    inputs = inputs_of(device=backend.device)
    attend = attends(backend, return_lse=True, sinks=torch.zeros(4, device=backend.device, dtype=torch.float64))
    alive = slice(0, 8)

    def of_alive(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(*inputs)
        return out, lse[:, alive]

    assert torch.autograd.gradcheck(of_alive, inputs, fast_mode=True)
    if not backend.interpreted:
        assert torch.autograd.gradgradcheck(of_alive, inputs, fast_mode=True)


@on_every_backend
def test_entries_that_are_mapped_over_are_calls_of_their_own(backend: Backend) -> None:
    q, k, v = (x.detach() for x in inputs_of(device=backend.device))
    attend, several = attends(backend), torch.stack((q, 2 * q))
    torch.testing.assert_close(
        vmap(attend, (0, None, None))(several, k, v), torch.stack([attend(one, k, v) for one in several])
    )
    if backend.interpreted:
        return

    def loss(q: Tensor) -> Tensor:
        return attend(q, k, v).square().sum()

    torch.testing.assert_close(vmap(grad(loss))(several), torch.stack([grad(loss)(one) for one in several]))


def test_results_may_be_changed_in_place() -> None:
    """As `test_gradients.py` has it."""
    for backend in ("math", "sdpa"):
        q, k, v = inputs_of()
        v = k if backend == "sdpa" else v
        out, lse = flash_attention_packed(q, k, v, PLACES, PLACES, 4, 4, return_lse=True, backend=backend)
        if backend == "math":
            (expected,) = torch.autograd.grad(2 * out.sum(), q, retain_graph=True)
        out.mul_(2.0)
        lse.add_(1.0)
        if backend == "math":
            torch.testing.assert_close(torch.autograd.grad(out.sum(), q), (expected,))
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
