"""What processes that share sequences run: `test_context_parallel.py` hands each a function of this file by name."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from complex_valued_transformer.attend import Attend as SomebodysAttend
from torch import Tensor, nn

from flash_attend import Attend, flash_attention, messages, patch, ring
from flash_attend.context_parallel import (
    ContextParallel,
    context_parallel_attention,
    sequence_positions,
    shard_sequence,
    unshard_sequence,
)

SAME_SUMS = dict(rtol=1e-12, atol=1e-12)  # in float64, of numbers of order 1, summed in another order


@cache
def group_of(ranks: int) -> dist.ProcessGroup:
    """The first so many processes."""
    pair = dist.new_group([0, 1])
    return pair if ranks == 2 else dist.group.WORLD


def make_groups() -> None:
    """What all processes have to do together before some of them use it."""
    group_of(2)


# ---------------------------------------------------------------------------------------------------------------------
# What one process computes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call on whole sequences."""

    options: dict[str, Any]
    queries: int = 16
    keys: int = 16
    kv_heads: int = 4
    value_dim: int = 8
    mask: str = ""  # "keys", "heads"
    alibi: bool = False
    sinks: bool = False
    backend: str = "auto"

    def tensors(self) -> dict[str, Tensor]:
        """The same in every process. The padding holds NaN, and the first entry's first keys are among it: under
        causality its first queries see nothing."""
        generator = torch.Generator().manual_seed(0)

        def new(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        given = dict(
            q=new(2, 4, self.queries, 8),
            k=new(2, self.kv_heads, self.keys, 8),
            v=new(2, self.kv_heads, self.keys, self.value_dim),
            grad_out=new(2, 4, self.queries, self.value_dim),
            grad_lse=new(2, 4, self.queries),
        )
        if self.mask == "heads":
            given["mask"] = torch.rand(2, 4, 1, self.keys, generator=generator) > 0.3
        if self.mask == "keys":
            mask = torch.rand(2, self.keys, generator=generator) > 0.3
            mask[0, : self.keys // 2 + 1], mask[1, self.keys // 3 :] = False, False
            given["mask"] = mask
            for name in "kv":
                given[name].masked_fill_(~mask[:, None, :, None], torch.nan)
        if self.alibi:
            given["alibi_slopes"] = torch.tensor([0.5, 0.25, 0.1, -0.05], dtype=torch.float64)
        if self.sinks:
            given["sinks"] = torch.tensor([0.1, -1.0, 2.0, 0.0], dtype=torch.float64)
        return given


CASES = {
    "plain": Case({}),
    "causal": Case(dict(causal=True), kv_heads=2),
    "window": Case(dict(causal=True, window=(5, None), scale=-0.3), value_dim=6),
    "both sides": Case(dict(window=(3, 2))),
    "softcap": Case(dict(softcap=2.0, scale=0.5), sinks=True),
    "alibi": Case({}, alibi=True),
    "alibi, causal": Case(dict(causal=True, window=(9, 0)), alibi=True, kv_heads=1, backend="math"),
    "padded": Case({}, mask="heads", sinks=True),
    "padded, causal": Case(dict(causal=True), mask="keys"),
    "more keys": Case(dict(causal=True), queries=8, alibi=True, mask="keys"),
    "more queries": Case(dict(causal=True, window=(4, None)), queries=24, sinks=True),
    "more queries, both sides": Case(dict(window=(4, 3)), queries=24, alibi=True),
    "dropout": Case(dict(causal=True, dropout_p=0.3), alibi=True, mask="keys"),
    "dropout, more queries": Case(dict(dropout_p=0.2), queries=24, kv_heads=2),
}


def answer(attend: Any, given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Out, lse and the gradients, of both and of out alone."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("q", "k", "v", "sinks") if name in given}
    others = {name: given[name] for name in ("mask", "alibi_slopes") if name in given}
    torch.manual_seed(5)  # of which dropout draws its own
    out, lse = attend(**leaves, **others, return_lse=True, **options)
    inputs, grad_out = [*leaves.values()], given["grad_out"]
    grads = torch.autograd.grad((out, lse), inputs, (grad_out, given["grad_lse"]), retain_graph=True)
    alone = torch.autograd.grad(out, inputs, grad_out)
    found = {"out": out.detach(), "lse": lse.detach()}
    found |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found | {f"d{name} of out": grad for name, grad in zip(leaves, alone, strict=True)}


def cut(tensors: dict[str, Tensor], group: dist.ProcessGroup, layout: str) -> dict[str, Tensor]:
    """This rank's shards: of all that has positions."""
    dims = {"mask": -1, "alibi_slopes": None, "sinks": None}
    return {
        name: x if (dim := dims.get(name.removeprefix("d").split()[0], 2)) is None
        else shard_sequence(x, group, layout, dim=dim)
        for name, x in tensors.items()
    }  # fmt: skip


def equals_one_process(ranks: int, layout: str, way: str, names: list[str]) -> None:
    """Fails unless this rank's part of every case is what one process has, gradients included."""
    group = group_of(ranks)
    if dist.get_rank() >= ranks:
        return
    for name in names:
        case = CASES[name]
        whole, options = case.tensors(), {**case.options, "backend": case.backend}
        expected = cut(answer(flash_attention, whole, **options), group, layout)
        shared = dict(group=group, layout=layout, way=way)
        found = answer(context_parallel_attention, cut(whole, group, layout), **shared, **options)
        for part, value in found.items():
            if part.startswith("dsinks"):
                dist.all_reduce(value, group=group)
            where = f"{name}, {part}, rank {dist.get_rank()} of {ranks}: "
            torch.testing.assert_close(value, expected[part], **SAME_SUMS, msg=where.__add__)
    assert torch._C._distributed_c10d._get_work_registry_size() == 0  # nothing is left that nobody waited for


# ---------------------------------------------------------------------------------------------------------------------
# What is sent, and when
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def watched_messages() -> Iterator[list[tuple[str, int]]]:
    """What happens within this context: messages sent, by their bytes, and blocks attended to."""
    events: list[tuple[str, int]] = []
    post, attend, exchange = dist.batch_isend_irecv, ring._Part.of, messages._exchanged

    def posted(operations: list[dist.P2POp]) -> Any:
        events.append(("sent", sum(x.tensor.nbytes for x in operations if x.op is dist.isend)))
        return post(operations)

    def attended(*arguments: Any) -> Any:
        events.append(("attended", 0))
        return attend(*arguments)

    def exchanged(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
        events.append(("sent", sent.nbytes // group.size() * (group.size() - 1)))
        return exchange(sent, group)

    with (
        mock.patch.object(dist, "batch_isend_irecv", posted),
        mock.patch.object(ring._Part, "of", attended),
        mock.patch.object(messages, "_exchanged", exchanged),
    ):
        yield events


def sent_by(case: Case, layout: str, way: str) -> tuple[list, list, int]:
    """What this rank of four does in a forward and in a backward, and the bytes that the former leaves for the latter
    beside q, k, v and out."""
    group, kept = group_of(4), {}
    given = cut(case.tensors(), group, layout)
    q, k, v = (given[name].requires_grad_() for name in "qkv")

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    options = dict(mask=given.get("mask"), group=group, layout=layout, way=way, **case.options)
    context_parallel_attention(q, k, v, **options)  # ranks agree on it
    with watched_messages() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = context_parallel_attention(q, k, v, **options)
    with watched_messages() as backward:
        first = torch.autograd.grad(out, (q, k, v), given["grad_out"], retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), given["grad_out"])
    assert all(map(torch.equal, first, second)), "gradients do not repeat"
    return forward, backward, sum(kept.values()) - sum(x.nbytes for x in (q, k, v, out))


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def refusals() -> list[str]:
    """What this rank of two is told of calls that the ranks mean differently, or that cannot be."""
    group, rank = group_of(2), dist.get_rank()
    if rank > 1:
        return []
    q = torch.randn(1, 2, 4, 8)
    odd = q[:, :, :3]
    calls = [
        dict(q=q if rank else odd),
        dict(k=q if rank else odd, v=q if rank else odd),
        dict(causal=bool(rank)),
        dict(scale=0.5 + rank),
        dict(layout=("contiguous", "balanced")[rank]),
        dict(way=("ring", "heads")[rank]),
        dict(way="heads", softcap=1.0 + rank),
        dict(q=odd, layout="balanced"),
        dict(way="heads", k=q[:, :1], v=q[:, :1]),
        dict(way="heads", dropout_p=0.5),
        dict(mask=torch.ones(1, 1, 4, 4, dtype=torch.bool)),
        dict(layout="zigzag"),
        dict(way="star"),
        dict(group="world"),
        dict(mask=torch.ones(1, 5, dtype=torch.bool)),
    ]
    told = []
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as refused:
            context_parallel_attention(**dict(dict(q=q, k=q, v=q, group=group), **call))
        told.append(f"{refused.type.__name__}: {refused.value}")
    return told


def missing() -> str:
    """What a rank is told when another one does not come, by a group that waits for a second."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    q = torch.randn(1, 2, 4, 8)
    if dist.get_rank() > 1:
        return ""
    context_parallel_attention(q, q, q, group=group)
    if dist.get_rank() == 1:
        return ""
    with pytest.raises(RuntimeError) as refused:
        context_parallel_attention(q, q, q, group=group)
    return str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# A training
# ---------------------------------------------------------------------------------------------------------------------


def trains_the_example(script: str) -> None:
    """Fails unless the losses of the example's training on two processes are those of its training on one."""
    if dist.get_rank() > 1:
        return
    spec = importlib.util.spec_from_file_location("example", script)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    settings = argparse.Namespace(length=24, steps=3)
    shared = ContextParallel(group_of(2), example.LAYOUT, "ring")
    alone, together = example.train(settings), example.train(settings, shared)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Inside PyTorch
# ---------------------------------------------------------------------------------------------------------------------


def whole_again(layout: str) -> None:
    """Fails unless shards and the whole are made of each other, gradients included, by what positions say."""
    group = group_of(4)
    whole = torch.arange(2 * 8 * 3, dtype=torch.float64).view(2, 8, 3)
    shard = shard_sequence(whole, group, layout, dim=1).requires_grad_()
    assert torch.equal(shard, whole[:, sequence_positions(8, group, layout)])
    again = unshard_sequence(shard, group, layout, dim=-2)
    assert torch.equal(again, whole)
    (grad,) = torch.autograd.grad(again, shard, whole)
    assert torch.equal(grad, 4 * shard)  # every rank has it
    with pytest.raises(ValueError, match="a balanced sequence must have a multiple of 8 positions on 4 ranks, got 12"):
        shard_sequence(torch.ones(12), group, "balanced", dim=0)


def compiles(way: str) -> None:
    """Fails unless a compiled call of all processes, in one graph, gives what the call itself gives."""
    torch.compiler.reset()
    compiled = torch.compile(context_parallel_attention, fullgraph=True, backend="aot_eager")
    group = dist.group.WORLD
    given = cut(CASES["padded, causal"].tensors(), group, "balanced")
    options = dict(group=group, layout="balanced", way=way, causal=True)
    expected = answer(context_parallel_attention, given, **options)
    for name, x in answer(compiled, given, **options).items():
        torch.testing.assert_close(x, expected[name], **SAME_SUMS)


def attends_as_a_module() -> None:
    """Fails unless `Attend` and a patched model take shards, a copy and a pickle of theirs too."""
    group = group_of(2)
    if dist.get_rank() > 1:
        return
    whole = CASES["causal"].tensors()
    given = cut(whole, group, "balanced")
    expected = cut({"out": flash_attention(whole["q"], whole["k"], whole["v"], causal=True)}, group, "balanced")["out"]
    attend = Attend(causal=True, context_parallel=ContextParallel(group, "balanced"))
    theirs = nn.Sequential(SomebodysAttend(causal=True, flash=True, heads=4))
    patch(theirs, context_parallel=ContextParallel(group, "balanced"))
    for module in (attend, copy.deepcopy(attend), pickle.loads(pickle.dumps(attend)), theirs[0]):
        torch.testing.assert_close(module(given["q"], given["k"], given["v"]), expected, **SAME_SUMS)
    with pytest.raises(ValueError, match="bias must be None where ranks share the sequences"):
        attend(given["q"], given["k"], given["v"], attn_bias=torch.zeros(1, dtype=torch.float64))
    with pytest.raises(TypeError, match="context_parallel must be a ProcessGroup or a ContextParallel, got str"):
        Attend(context_parallel="world")
    assert Attend(context_parallel=group).context_parallel == ContextParallel(group)
