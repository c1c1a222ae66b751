"""torch.export of a module that holds an Attend: one program for all lengths, which computes and learns the same."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim, ExportedProgram, export, load, save

from backends import BACKENDS, Backend
from flash_attend import Attend
from flash_attend.export import decompositions
from flash_attend.ops import FORWARD

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
strict_or_not = pytest.mark.parametrize("strict", (True, False), ids=("strict", "non_strict"))


class Model(nn.Module):
    """Self-attention with padding; four query heads read two key heads."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 24, device=backend.device)
        self.attend = Attend(dropout=0.1, causal=True, backend=backend.name).eval()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (8, 3)).transpose(1, 2).split([4, 2, 2], dim=1)
        return self.attend(q, k, v, mask=mask)


def inputs(length: int, backend: Backend) -> tuple[Tensor, Tensor]:
    torch.manual_seed(length)
    mask = torch.arange(length) < torch.tensor([[length], [length // 2 + 1]])
    return torch.randn(2, length, 8).to(backend.device), mask.to(backend.device)


def exported(model: Model, backend: Backend, strict: bool) -> ExportedProgram:
    length = {1: Dim("length", min=2, max=4096)}
    return export(model, inputs(6, backend), dynamic_shapes=(length, length), strict=strict)


@on_every_backend
@strict_or_not
def test_a_program_gives_the_same_outputs_at_every_length(backend: Backend, strict: bool) -> None:
    model = Model(backend)
    program = exported(model, backend, strict)
    assert [node.target for node in program.graph.nodes].count(FORWARD) == 1
    for length in (2, 6, 9, 40):
        x, mask = inputs(length, backend)
        assert torch.equal(program.module()(x, mask), model(x, mask))


@on_every_backend
def test_a_program_comes_back_from_a_file(backend: Backend) -> None:
    model = Model(backend)
    file = io.BytesIO()
    save(exported(model, backend, strict=False), file)
    file.seek(0)
    x, mask = inputs(11, backend)
    assert torch.equal(load(file).module()(x, mask), model(x, mask))


@on_every_backend
def test_a_program_learns_like_the_module(backend: Backend) -> None:
    """In float64, where the gradients of two ways to compute them agree to many digits."""
    model = Model(backend).double()
    x, mask = inputs(7, backend)
    length = {1: Dim("length", min=2, max=4096)}
    program = export(model, (x.double(), mask), dynamic_shapes=(length, length)).module()
    x, mask = inputs(10, backend)
    x = x.double().requires_grad_()
    (got,), (want,) = (torch.autograd.grad(f(x, mask).sin().sum(), x) for f in (program, model))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


@on_every_backend
def test_a_program_has_every_derivative_of_the_module(backend: Backend) -> None:
    """Its operators, alone in it, know torch.func, forward mode and second derivatives."""
    model = Model(backend).double()
    x, mask = inputs(5, backend)
    x = x.double()
    program = export(model, (x, mask)).module()

    def derivatives(module: nn.Module) -> dict[str, Tensor]:
        def loss(x: Tensor) -> Tensor:
            return module(x, mask).sin().sum()

        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(module(forward_ad.make_dual(x, x.cos()), mask)).tangent
        return {
            "second": torch.autograd.grad(first.sin().sum(), leaf)[0],
            "dual": dual,
            "jvp": torch.func.jvp(loss, (x,), (x.cos(),))[1],
            "grad": torch.func.grad(loss)(x),
            "vmap": torch.vmap(module)(torch.stack([x, x.cos()]), mask.expand(2, -1, -1)),
            "vmap_of_grad": torch.vmap(torch.func.grad(loss))(torch.stack([x, x.cos()])),
        }

    torch.testing.assert_close(derivatives(program), derivatives(model), rtol=1e-10, atol=1e-12)


ELSEWHERE = """
import sys, torch
sys.modules["flash_attend"] = None
program = torch.export.load(sys.argv[1])
for x, mask, want in torch.load(sys.argv[2]):
    got = program.module()(x, mask).masked_fill(~mask[:, None, :, None], 0.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
print("the same")
"""


@on_every_backend
def test_a_decomposed_program_needs_nothing_of_ours(backend: Backend, tmp_path: Path) -> None:
    """At lengths of one chunk of queries and of several, with NaN where the mask hides it from all."""
    model = Model(backend)
    program = exported(model, backend, strict=False).run_decompositions(decompositions())
    calls = []
    for length in (2, 6, 40, *[700] * (not backend.interpreted)):
        x, mask = inputs(length, backend)
        want = model(x, mask).detach().masked_fill(~mask[:, None, :, None], 0.0)
        calls.append((x.masked_fill(~mask[..., None], torch.nan), mask, want))
    save(program, tmp_path / "program.pt2")
    torch.save(calls, tmp_path / "calls.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "program.pt2"), str(tmp_path / "calls.pt")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "the same\n"
