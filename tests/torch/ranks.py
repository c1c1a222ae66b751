"""Processes that belong to one another, and what two of them run: a test hands each a function by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from flash_attend import Attend, flash_attention
from flash_attend.ops import INPUTS

__all__ = ["RANKS", "SAME_SUMS", "Call", "Ranks", "attend", "attend_compiled", "refusal", "train"]

RANKS = 2
PATIENCE = timedelta(seconds=180)  # a rank that waits longer for the other one fails


class Ranks:
    """Processes of their own, started once, each with its rank."""

    def __init__(self, rendezvous: str, size: int = RANKS) -> None:
        context = get_context("forkserver")  # where the imports that all need are done once
        context.set_forkserver_preload(["flash_attend.context_parallel", "torch.distributed.tensor.debug"])
        self._processes = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_join, initargs=(rank, size, rendezvous))
            for rank in range(size)
        ]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returns."""
        futures = [process.submit(function, *arguments) for process in self._processes]
        return [future.result(timeout=PATIENCE.total_seconds()) for future in futures]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.submit(dist.destroy_process_group)
        for process in self._processes:
            process.shutdown()


def _join(rank: int, size: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=f"file://{rendezvous}", timeout=PATIENCE)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention and a projection, beside a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attend = Attend(causal=True)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x (b, n, dim)`, `mask (b, n)` -> `(b, n, dim)`."""
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.to_out(self.attend(q, k, v, mask=mask).transpose(1, 2).flatten(2))


class Layers(nn.Module):
    """A small model; the same weights each time."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(Layer(16, 2) for _ in range(2))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        self.to(dtype)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x (b, n, 16)`, `mask (b, n)` -> a loss, the mean over all that it holds."""
        for layer in self.layers:
            x = layer(x, mask)
        return x.square().mean()


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """What is trained on: `(x, mask)` for each step, four entries, one of them padded."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[2, 5:] = False
    return [(torch.randn(4, 9, 16, generator=generator, dtype=torch.float64).to(dtype), mask) for _ in range(3)]


def train(how: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The loss of each step and the parameters after the last, in float64. `how`: "alone", "ddp" or "fsdp"."""
    model = Layers(dtype)
    part = slice(None)
    if how != "alone":
        each = 4 // RANKS
        part = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        mesh = dist.init_device_mesh("cpu", (RANKS,))
        for layer in model.layers:
            dist.fsdp.fully_shard(layer, mesh=mesh)
        dist.fsdp.fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for x, mask in batches(dtype):
        loss = model(x[part], mask[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().double()
        if how != "alone":
            dist.all_reduce(total)
            total /= RANKS
        losses.append(total)
    parameters = [x.full_tensor() if how == "fsdp" else x for x in model.parameters()]
    return torch.stack(losses), [x.detach().double() for x in parameters]


# ---------------------------------------------------------------------------------------------------------- DTensors

Tensors = dict[str, Tensor]
SAME_SUMS = dict(rtol=1e-13, atol=1e-13)  # in float64, of numbers of order 1, summed in another order


@dataclass(frozen=True)
class Call:
    """A call of `flash_attention` on DTensors: sizes, and where each tensor lies on each dimension of the mesh."""

    q: list[Placement]
    kv: list[Placement]
    mask: list[Placement] | None = None
    mask_sizes: tuple[int, ...] = (4, 7)
    batch: int = 4
    heads: int = 4
    kv_heads: int | None = 4  # None: k and v have no dimension of heads
    mesh: tuple[int, ...] = (RANKS,)
    options: dict[str, Any] = field(default_factory=dict)
    bias: Sequence[Placement] | None = None  # of a bias of `bias_sizes`
    bias_sizes: tuple[int, ...] = (1, 4, 5, 7)
    sinks: Sequence[Placement] | None = None  # of sinks, and of slopes beside them
    queries: int = 5
    keys: int = 7

    @property
    def places(self) -> dict[str, list[Placement]]:
        """The placements by the tensor's name."""
        return {"q": self.q, "k": self.kv, "v": self.kv, "grad_out": self.q, "grad_lse": self.q, "mask": self.mask,
                "bias": self.bias, "sinks": self.sinks, "alibi_slopes": self.sinks}  # fmt: skip

    def tensors(self) -> Tensors:
        """The whole tensors, the same in every process."""
        generator = torch.Generator().manual_seed(0)

        def new(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        heads = () if self.kv_heads is None else (self.kv_heads,)
        tensors = {
            "q": new(self.batch, self.heads, self.queries, 8),
            "k": new(self.batch, *heads, self.keys, 8),
            "v": new(self.batch, *heads, self.keys, 6),
            "grad_out": new(self.batch, self.heads, self.queries, 6),
            "grad_lse": new(self.batch, self.heads, self.queries),
        }
        if self.mask is not None:
            tensors["mask"] = new(*self.mask_sizes) > -0.5
        if self.bias is not None:
            tensors["bias"] = new(*self.bias_sizes)
        if self.sinks is not None:
            tensors |= {"sinks": new(self.heads), "alibi_slopes": new(self.heads)}
        return tensors


def _distribute(call: Call, device: str, *, gradients: bool) -> dict[str, DTensor]:
    mesh = dist.init_device_mesh(device, call.mesh)
    return {
        # Each rank has the whole: it takes its part, and nothing is sent.
        name: distribute_tensor(tensor.to(device), mesh, call.places[name], src_data_rank=None)
        for name, tensor in call.tensors().items()
        if gradients or not name.startswith("grad")
    }


def attend(call: Call, device: str, backend: str) -> tuple[dict[str, list[Placement]], Tensors, dict[str, int]]:
    """What a rank has of the outputs and gradients, where they lie, and what was sent for them."""
    given = _distribute(call, device, gradients=True)
    with CommDebugMode() as sent:
        results = answer(given, backend=backend, **call.options)
    found = results["out"], results["lse"]
    assert found[0].shape == given["grad_out"].shape
    assert found[1].shape == given["grad_lse"].shape
    return (
        {name: list(x.placements) for name, x in results.items()},
        {name: x.detach().to_local().cpu() for name, x in results.items()},
        {str(operation): count for operation, count in sent.get_comm_counts().items()},
    )


def answer(given: Tensors, **options: Any) -> Tensors:
    """Out, lse and the gradients of the tensors of a call, plain or distributed."""
    leaves = {name: given[name].requires_grad_() for name in INPUTS if name in given}
    read = {name: x for name, x in given.items() if not name.startswith("grad")}
    out, lse = flash_attention(**read, return_lse=True, **options)
    grads = torch.autograd.grad((out, lse), [*leaves.values()], (given["grad_out"], given["grad_lse"]))
    return {"out": out, "lse": lse} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def attend_compiled(calls: Sequence[Call]) -> None:
    """Fails unless compiled calls, each in one graph, give a rank what the calls themselves give."""
    torch.compiler.reset()  # of what other tests have compiled, lengths would already be symbols
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")
    for call in calls:
        given = _distribute(call, "cpu", gradients=True)
        q, k, v = (given[name].requires_grad_() for name in "qkv")
        outs = [attend(q, k, v, mask=given.get("mask"), **call.options) for attend in (compiled, flash_attention)]
        assert outs[0].shape == outs[1].shape
        # torch 2.10 reads strides that are symbols from where the sizes are.
        assert outs[0].stride() == outs[1].stride() or torch.__version__ < "2.13"
        answers = [
            [x.to_local() for x in (out, *torch.autograd.grad(out, (q, k, v), given["grad_out"]))] for out in outs
        ]
        torch.testing.assert_close(*answers, **SAME_SUMS)


def refusal(call: Call, plain: str = "", cut: str = "") -> str:
    """What a rank is told of a call that is refused; the tensor named `plain` is no DTensor, and of the one named `cut`
    each rank holds less than its placement says."""
    given = _distribute(call, "cpu", gradients=False)
    if plain:
        given[plain] = given[plain].to_local()
    if cut:
        whole = given[cut]
        part, mesh, places = whole.to_local()[:1], whole.device_mesh, whole.placements
        given[cut] = DTensor.from_local(part, mesh, places, run_check=False, shape=whole.shape, stride=whole.stride())
    with CommDebugMode() as sent, pytest.raises((TypeError, ValueError)) as refused:
        flash_attention(**given, **call.options)
    assert not sent.get_total_counts()
    return f"{refused.type.__name__}: {refused.value}"
