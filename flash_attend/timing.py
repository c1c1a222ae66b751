"""How long a call takes by each of two candidates, which take turns: for a process of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flash_attend.backends import BACKENDS, BackwardName
from flash_attend.check import checked
from flash_attend.dispatch import override_backward
from flash_attend.functional import flash_attention
from flash_attend.spec import AttentionSpec, BiasKind, MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.variant import ALL, variant_of

__all__ = ["Call", "Candidate", "call_as_json", "in_turns", "time_pair"]

ROUNDS = 15  # of A B B A

Needed = tuple[bool, ...]


class Call(NamedTuple):
    """A call that is to be fast."""

    spec: AttentionSpec
    # Which of q, k and v get a gradient and, where there is either, the bias and the sinks; where none does, the
    # forward alone is timed.
    needed: Needed = ALL


class Candidate(NamedTuple):
    """One way to serve calls; in JSON a list."""

    backend: str
    backward: BackwardName
    tiles: str = ""  # as `configs.as_text` has them, of a backend that has some to choose from; empty: by the rules

    def __str__(self) -> str:
        return f"{self.backend} ({self.backward}{f', tiles {self.tiles}' if self.tiles else ''})"


def call_as_json(call: Call) -> dict[str, Any]:
    dtype = str(call.spec.dtype).removeprefix("torch.")
    bias = None if call.spec.bias is None else [*call.spec.bias[:4], str(call.spec.bias.dtype).removeprefix("torch.")]
    lists = dict(window=list(call.spec.window), bias=bias, needed=list(call.needed))
    return asdict(call.spec) | dict(dtype=dtype, mask=int(call.spec.mask), **lists)


def call_of_json(found: dict[str, Any]) -> Call:
    spec = found | dict(dtype=getattr(torch, found["dtype"]), mask=MaskKind(found["mask"]))
    spec["window"] = tuple(found.get("window", (None, None)))
    if (bias := found.get("bias")) is not None:
        batch, heads, queries, keys, dtype = bias
        spec["bias"] = BiasKind(batch, heads, queries, keys, getattr(torch, dtype))
    needed = tuple(spec.pop("needed"))
    return Call(AttentionSpec(**spec), cast(Needed, needed))


def time_pair(request: dict[str, Any]) -> list[float]:
    """Seconds of a call by each of two candidates, in turns. Raises `ValueError` where one is not right."""
    device, call = torch.device(request["device"]), call_of_json(request["call"])
    pair = [_with_tiles(Candidate(*one), call.spec, device) for one in request["pair"]]
    for candidate in pair:
        if BACKENDS[candidate.backend].proof != "none":
            finding = checked(variant_of(call.spec, *candidate[:2], call.needed, candidate.tiles), device)
            if not finding.right:
                raise ValueError(finding.reason)
    run = make_run(call, device)
    clock = _on_the_gpu if device.type == "cuda" else _on_the_cpu

    def take(candidate: Candidate) -> float:
        with _served_by(candidate):
            run(candidate)  # makes the call's plan, which the other's turn took away
            return clock(partial(run, candidate))

    return in_turns(*(partial(take, candidate) for candidate in pair))


def in_turns(first: Callable[[], float], second: Callable[[], float]) -> list[float]:
    """The median seconds of two, each of which takes its own time, in turns: A B B A."""
    for take in (first, second) * 2:
        take()  # compiles, and fills caches
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for number in (0, 1, 1, 0):
            times[number].append((first, second)[number]())
    return [statistics.median(of) for of in times]


def _with_tiles(candidate: Candidate, spec: AttentionSpec, device: torch.device) -> Candidate:
    """A candidate with the tiles that it has for a call, where its backend has some to choose from."""
    if candidate.backend != "triton":
        return candidate
    from flash_attend.kernels.configs import as_text, tiles_of

    tiles = tiles_of(candidate.tiles, spec, DeviceTarget.of(device), candidate.backward)
    return candidate._replace(tiles=as_text(tiles))


@contextmanager
def _served_by(candidate: Candidate) -> Iterator[None]:
    """Within this context calls of a candidate's backend go by its backward, with its tiles."""
    with ExitStack() as stack:
        if candidate.backward != "einsum":
            stack.enter_context(override_backward(candidate.backward))
        if candidate.tiles:
            from flash_attend.kernels.configs import of_text, override

            stack.enter_context(override(of_text(candidate.tiles)))
        yield


def _on_the_gpu(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _on_the_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def make_run(call: Call, device: torch.device) -> Callable[[Candidate], None]:
    """Serves a call, on tensors that are made once, by a candidate."""
    spec, needed = call
    if spec.dtype == torch.float32:  # in a process of its own, whatever was set where the call was made
        torch.set_float32_matmul_precision("high" if spec.precision == "tf32" else "highest")
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int, length: int, dim: int, need: bool = False) -> Tensor:
        made = torch.randn(spec.batch, heads, length, dim, generator=generator, dtype=torch.float32, device=device)
        return made.to(spec.dtype).requires_grad_(need)

    q = draw(spec.heads, spec.queries, spec.head_dim, needed[0])
    k = draw(spec.kv_heads, spec.keys, spec.head_dim, needed[1])
    v = draw(spec.kv_heads, spec.keys, spec.value_dim, needed[2])
    grad_out = draw(spec.heads, spec.queries, spec.value_dim)
    options: dict[str, Any] = dict(
        mask=_mask(spec, device), causal=spec.causal, scale=spec.scale, dropout_p=spec.dropout_p
    )
    options |= dict(window=spec.window, softcap=spec.softcap or None)
    if spec.alibi:
        options["alibi_slopes"] = torch.rand(spec.heads, generator=generator, device=device)
    others = needed[3:] or (False, False)
    if spec.bias is not None:
        sizes = (spec.batch, spec.heads, spec.queries, spec.keys)
        shape = [size if varies else 1 for size, varies in zip(sizes, spec.bias[:4], strict=True)]
        made = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        options["bias"] = made.to(spec.bias.dtype).requires_grad_(others[0])
    if spec.sinks:
        options["sinks"] = torch.randn(spec.heads, generator=generator, device=device).requires_grad_(others[1])
    inputs = (q, k, v, options.get("bias"), options.get("sinks"))
    leaves = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]

    def run(candidate: Candidate) -> None:
        out = flash_attention(q, k, v, **options, backend=candidate.backend)
        if leaves:
            torch.autograd.grad(out, leaves, grad_out)

    return run


def _mask(spec: AttentionSpec, device: torch.device) -> Tensor | None:
    """Padding of up to half of the keys, alike for every head; a dense mask hides a quarter of the pairs beside it."""
    if spec.mask == MaskKind.NONE:
        return None
    heads, rows = spec.heads if spec.mask_per_head else 1, spec.queries if spec.mask == MaskKind.DENSE else 1
    entry, row, key = (torch.arange(n, device=device) for n in (spec.batch, rows, spec.keys))
    lengths = spec.keys - (entry * (spec.keys // 2)) // max(spec.batch - 1, 1)
    visible = (key < lengths[:, None])[:, None, None].expand(-1, heads, rows, -1)
    return (visible & ((row[:, None] + key) % 4 > 0) if rows > 1 else visible).contiguous()
