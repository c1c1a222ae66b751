"""torch.onnx.export of a module that holds an Attend: one ONNX program for all lengths, run by onnxruntime."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from flash_attend import Attend
from flash_attend.export import decompositions

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]


class Model(nn.Module):
    """Self-attention with padding; four query heads read two key heads."""

    def __init__(self, changed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 24)
        options: dict[str, Any] = dict(window=(3, 2), softcap=1.5) if changed else dict(causal=True)
        self.attend = Attend(dropout=0.1, **options)
        self.slopes, self.sinks = torch.rand(4), torch.randn(4)
        self.changed = changed

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (8, 3)).transpose(1, 2).split([4, 2, 2], dim=1)
        changes = dict(attn_bias=x[:, None, :, :1], alibi_slopes=self.slopes, sinks=self.sinks) if self.changed else {}
        return self.attend(q, k, v, mask=mask, **changes)


def inputs(length: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(length)
    return torch.randn(2, length, 8), torch.arange(length) < torch.tensor([[length], [length // 2 + 1]])


@pytest.mark.parametrize("way", ("module", "module_with_changed_scores", "decomposed_program"))
def test_onnxruntime_gives_the_same_at_every_length(way: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip(reason="onnxruntime is missing: `make test-clients` installs it and runs these tests")
    import onnxruntime

    model, length = Model(way == "module_with_changed_scores").eval(), {1: Dim("length", min=2, max=4096)}
    if way == "decomposed_program":
        program = export(model, inputs(6), dynamic_shapes=(length, length)).run_decompositions(decompositions())
        onnx = torch.onnx.export(program, dynamo=True, verbose=False)
    else:
        onnx = torch.onnx.export(model, inputs(6), dynamic_shapes=(length, length), dynamo=True, verbose=False)
    onnx.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    for size in (2, 6, 9, 40, 200):
        x, mask = inputs(size)
        (got,) = session.run(None, dict(zip(names, (x.numpy(), mask.numpy()), strict=True)))
        torch.testing.assert_close(torch.from_numpy(got), model(x, mask), rtol=1e-4, atol=1e-5)


def test_a_backend_by_name_is_not_replaced() -> None:
    """Its operator stays, of which ONNX knows nothing."""
    if importlib.util.find_spec("onnxscript") is None:
        pytest.skip(reason="onnxscript is missing: `make test-clients` installs it and runs these tests")
    model = Model(False).eval()
    model.attend.backend = "sdpa"
    with pytest.raises(Exception, match=r"No ONNX function found for .*flash_attend\.forward"):
        torch.onnx.export(model, inputs(6), dynamo=True, verbose=False)
