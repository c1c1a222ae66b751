"""Activation checkpointing: what is computed again drops the same weights, and gives the same gradients bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backends import BACKENDS, Backend
from flash_attend import Attend

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
reentrant_or_not = pytest.mark.parametrize("reentrant", (True, False), ids=("reentrant", "non_reentrant"))


class Layer(nn.Module):
    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24, device=backend.device)
        self.attend = Attend(dropout=0.3, causal=True, backend=backend.name)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.attend(q, k, v, mask=mask).transpose(1, 2).flatten(2)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def results(backend: Backend, reentrant: bool | None = None, compiler: str | None = None) -> list[Tensor]:
    """The output of two layers and all gradients, with each layer checkpointed unless `reentrant` is None."""
    torch.manual_seed(0)
    layers = [Layer(backend), Layer(backend)]
    x = torch.randn(2, 6, 8).to(backend.device).requires_grad_()
    mask = torch.arange(6, device=backend.device) < torch.tensor([[6], [4]], device=backend.device)

    def forward(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x, mask) if reentrant is None else checkpoint(layer, x, mask, use_reentrant=reentrant)
        return x

    torch.manual_seed(1)
    out = (torch.compile(forward, backend=compiler, fullgraph=True) if compiler else forward)(x)
    torch.manual_seed(2)  # whatever else has drawn numbers by then
    out.sin().sum().backward()
    return [out.detach(), x.grad, *(parameter.grad for layer in layers for parameter in layer.parameters())]


@on_every_backend
@reentrant_or_not
@pytest.mark.usefixtures("deterministic")
def test_gradients_are_those_of_the_plain_run(backend: Backend, reentrant: bool) -> None:
    plain, checkpointed = results(backend), results(backend, reentrant)
    assert all(map(torch.equal, checkpointed, plain))


@on_every_backend
@pytest.mark.usefixtures("deterministic")
def test_compiled(backend: Backend) -> None:
    torch._dynamo.reset()
    plain = results(backend, compiler="aot_eager")
    torch._dynamo.reset()
    checkpointed = results(backend, reentrant=False, compiler="aot_eager")
    assert torch.equal(plain[0], results(backend)[0])
    assert all(map(torch.equal, checkpointed, plain))
