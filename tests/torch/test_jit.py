"""torch.jit.trace and torch.jit.script refuse, and say what to use; for torch.fx an Attend is one node."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from complex_valued_transformer.attend import Attend as ClientAttend
from torch import Tensor, nn

from flash_attend import Attend, flash_attention, patch


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend(dropout=0.3, causal=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attend(q, k, v, mask=mask).sin()


QKV = torch.randn(3, 1, 2, 4, 8).unbind(0)


@pytest.mark.parametrize("traced", (Model().eval(), flash_attention), ids=("module", "function"))
def test_trace_is_refused_and_nothing_is_held(traced: nn.Module) -> None:
    """A trace would keep what holds for the lengths of its example, and give wrong values for others."""
    inputs = tuple(x.clone() for x in QKV)
    held = weakref.ref(inputs[0])
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace .* use torch\.export\.export or torch\.compile"):
        torch.jit.trace(traced, inputs)
    del inputs
    gc.collect()
    assert held() is None
    traced(*(x[:, :, :1] for x in QKV))  # nothing of the trace is left in what is kept of earlier calls


@pytest.mark.parametrize("module", (Attend(causal=True), Model()), ids=("Attend", "model"))
def test_script_is_refused(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile Attend; use torch\.export\.export or"):
        torch.jit.script(module)


@pytest.mark.parametrize("patched", (False, True), ids=("ours", "patched"))
def test_fx_takes_an_attend_as_one_node(patched: bool) -> None:
    """So its options and its dropout stay its own."""
    model = Model()
    if patched:
        model.attend = ClientAttend(dropout=0.2)
        patch(model, strict=True)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["attend"]
    mask = torch.rand(1, 4) < 0.5
    for train in (True, False):
        graph.train(train)
        model.train(train)
        for causal in (True, False):
            graph.attend.causal = model.attend.causal = causal
            for inputs in (QKV, (*QKV, mask)):
                torch.manual_seed(0)
                got = graph(*inputs)
                torch.manual_seed(0)
                assert torch.equal(got, model(*inputs))
