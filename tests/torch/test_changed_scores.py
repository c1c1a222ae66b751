"""Models with a learned bias, sinks, slopes, a window and a softcap, inside what PyTorch does with models."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export, load, save
from torch.utils.checkpoint import checkpoint

from backends import BACKENDS, CHOOSY, Backend, skip_unless_served
from flash_attend import Attend, explain, flash_attention
from flash_attend.testing.calls import Case, check, make_call, run

HEADS, LONGEST = 2, 64


class Model(nn.Module):
    """Self-attention with a table of relative positions, ALiBi, sinks, a window and a softcap."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 24)
        self.table = nn.Parameter(torch.randn(HEADS, 2 * LONGEST - 1))
        self.plain = backend.name == "sdpa"  # PyTorch's attention has neither sinks nor softcaps
        self.sinks = None if self.plain else nn.Parameter(torch.randn(HEADS))
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]))
        self.attend = Attend(causal=True, window=(5, None), softcap=None if self.plain else 2.0, backend=backend.name)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, 4)).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1], device=x.device)
        bias = self.table[:, place[:, None] - place + LONGEST - 1]
        out = self.attend(q, k, v, mask, bias, alibi_slopes=self.slopes, sinks=self.sinks)
        return out.transpose(1, 2).flatten(2)


def inputs(length: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(length)
    return torch.randn(2, length, 8), torch.arange(length) < torch.tensor([[length], [length // 2 + 1]])


def trained(model: nn.Module, forward, length: int = 9) -> list[Tensor]:
    """Its output, and the gradients of all its parameters."""
    x, mask = inputs(length)
    out = forward(x, mask)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), [*model.parameters()])]


on_cpu = pytest.mark.parametrize("backend", [one for one in (*BACKENDS, *CHOOSY) if one.values[0].device == "cpu"])


@pytest.fixture
def model(backend: Backend) -> Model:
    case = Case("model", heads=HEADS, queries=9, keys=9, d=4, bias="hij", window=(5, None), causal=True, alibi="h")
    skip_unless_served(backend, make_call(case, torch.float32))
    if backend.name != "sdpa":
        skip_unless_served(backend, make_call(Case("x", sinks=True, softcap=1.0), torch.float32))
    return Model(backend)


@on_cpu
def test_exported_with_any_length(model: Model, backend: Backend) -> None:
    """Windows that hide nothing of the example's lengths too."""
    length = {1: Dim("length", min=2, max=LONGEST)}
    file = io.BytesIO()
    save(export(model, inputs(4), dynamic_shapes=(length, length)), file)
    file.seek(0)
    program = load(file).module()
    for n in (2, 5, 6, 9, 40):
        torch.testing.assert_close(program(*inputs(n)), model(*inputs(n)))


@on_cpu
def test_compiled_and_checkpointed(model: Model, backend: Backend) -> None:
    plain = trained(model, model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ways = {
        "compiled": compiled,
        "reentrant": lambda x, mask: checkpoint(model, x.requires_grad_(), mask, use_reentrant=True),
        "not reentrant": lambda x, mask: checkpoint(model, x, mask, use_reentrant=False),
    }
    for forward in ways.values():
        if forward is ways["reentrant"]:  # which knows no autograd.grad
            x, mask = inputs(9)
            model.zero_grad()
            forward(x, mask).sin().sum().backward()
            found = [plain[0], *[parameter.grad for parameter in model.parameters()]]
        else:
            found = trained(model, forward)
        torch.testing.assert_close(found, plain)


@on_cpu
def test_copied_and_pickled(model: Model, backend: Backend) -> None:
    plain = trained(model, model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, trained(again, again), plain))
    assert not model.attend.state_dict()


def test_for_fx_an_attend_is_one_node() -> None:
    model = Model(BACKENDS[0].values[0])
    q = torch.randn(2, HEADS, 5, 4)
    bias = torch.randn(5, 5)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = model.attend

        def forward(self, q: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
            return self.attend(q, q, q, attn_bias=bias, sinks=sinks)

    small = Small()
    graph = torch.fx.symbolic_trace(small)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["attend"]
    assert torch.equal(graph(q, bias, model.sinks), small(q, bias, model.sinks))


def test_autocast_leaves_what_is_in_float32() -> None:
    """A bias, slopes and sinks in float32 are added as they are; in another half precision they go to autocast's."""
    call = make_call(Case("x", bias="hij", alibi="h", sinks=True), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = run(call, "math")
        mixed = flash_attention(call.q, call.k, call.v, bias=call.bias.half(), sinks=call.sinks.half())
    assert (answer.out.dtype, answer.dbias.dtype, answer.dsinks.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    halves = {name: getattr(call, name).bfloat16() for name in ("q", "k", "v")}
    cast = call.with_(**halves, grad_out=call.grad_out.bfloat16())
    found = run(cast, "math")
    check(found, cast)
    assert torch.equal(answer.out, found.out)
    biased = dict(bias=call.bias.half().bfloat16(), sinks=call.sinks.half().bfloat16())
    assert torch.equal(mixed, flash_attention(**halves, **biased))


def test_explain_tells_of_them() -> None:
    q = torch.randn(1, 2, 3, 8)
    told = str(explain(q, q, q, softcap=1.0, sinks=torch.zeros(2)))
    assert "math serves" in told
    assert "sdpa       no       it does not serve softcap and sinks" in told
    assert "sdpa serves" in str(explain(q, q, q, bias=torch.zeros(3, 3), window=(1, 0)))
