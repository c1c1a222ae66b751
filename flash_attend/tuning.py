"""What is fastest on a part, measured there: which backend, by which backward, with which tiles.

Each candidate takes turns with what serves without tuning, A B B A, in a process of its own, which may crash or hang.
It is measured only where it checks right. Figures are kept as they come: tuning goes on where it was stopped.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from flash_attend import functional
from flash_attend.backends import BACKENDS, BackwardName
from flash_attend.check import checked
from flash_attend.dispatch import override_backward
from flash_attend.evidence import Store, Tuned, name_of_tuned
from flash_attend.functional import flash_attention, recorded_calls
from flash_attend.isolation import Failed, Isolated
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.variant import ALL, Kind, Variant, kind_of_call, variant_of

__all__ = ["Call", "Candidate", "grid", "tune"]

LONGEST_PAIR = 300.0  # seconds for compiling and timing two candidates
ROUNDS = 15  # of A B B A
MARGIN = 0.97  # of the usual one's time: what is not clearly faster changes nothing
TIME_PAIR = "flash_attend.tuning:time_pair"

Needed = tuple[bool, bool, bool]


class Call(NamedTuple):
    """A call that is to be fast."""

    spec: AttentionSpec
    needed: Needed = ALL  # which of q, k and v get a gradient; where none does, the forward alone is timed


class Candidate(NamedTuple):
    """One way to serve calls; in JSON a list."""

    backend: str
    backward: BackwardName
    tiles: str = ""  # as `configs.as_text` has them, of a backend that has some to choose from

    def __str__(self) -> str:
        return f"{self.backend} ({self.backward}{f', tiles {self.tiles}' if self.tiles else ''})"


def tune(calls: Callable[[], object] | Iterable[Call], *, minutes: float = 10.0) -> dict[str, str]:
    """Measures what is fastest for calls on the parts that they run on; `backend="auto"`, and the tiles of a backend
    that is asked for by name, go by it from then on, in this process and in others.

    Args:
        calls: a function that makes the calls once, eagerly, e.g. `lambda: model(batch).sum().backward()`; or `Call`s.
        minutes: when to stop. What was measured is kept: the same again goes on from there.

    Returns what won, by the kind of call. Programs that torch.compile made before are made anew.
    """
    devices = {DeviceTarget.of(device): device for device in _gpus()}
    if callable(calls):
        with recorded_calls() as found:
            calls()
        wanted = {(devices.get(target), Call(spec, needed)): None for spec, target, needed in found}
    else:
        given = list(calls)
        wanted = {(device, call): None for device in devices.values() for call in given}
    kinds: dict[tuple[torch.device, Kind], list[Call]] = {}
    for device, call in wanted:
        if device is not None:
            kinds.setdefault((device, Kind(*kind_of_call(call.spec))), []).append(call)
    end, won = time.monotonic() + 60 * minutes, {}
    with tqdm(unit="pair", desc="tuning", file=sys.stderr, disable=None) as bar:
        for (device, kind), of_kind in kinds.items():
            won[f"{device} {name_of_tuned(kind)}"] = _tune_kind(device, kind, of_kind, end, bar)
    _follow()
    return won


def grid(
    dtypes: Iterable[str],
    dims: Iterable[tuple[int, int]],
    masks: Iterable[str],
    lengths: Iterable[int],
    *,
    tokens: int = 16384,
    width: int = 2048,
) -> list[Call]:
    """Calls of self-attention, with gradients: batches of so many tokens, of models so wide. A mask is the name of a
    `MaskKind`, in lower case, with "-causal" behind it or not."""
    calls = []
    for dtype, (d, dv), mask, length in product(dtypes, dims, masks, lengths):
        batch, heads = max(1, tokens // length), max(1, width // d)
        kind, _, causal = mask.partition("-")
        sizes = batch, heads, heads, length, length, d, dv, getattr(torch, dtype), MaskKind[kind.upper()]
        precision = "ieee"
        if dtype == "float32":
            precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
        calls.append(Call(AttentionSpec(*sizes, causal=causal == "causal", scale=d**-0.5, precision=precision)))
    return calls


def _gpus() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)]


def _follow() -> None:
    """Has the next call ask anew what is fastest."""
    Store.forget_tuned()
    functional._choose_once.cache_clear()
    if configs := sys.modules.get("flash_attend.kernels.configs"):
        configs._look_up_tiles.cache_clear()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def candidates(call: Call, target: DeviceTarget) -> list[Candidate]:
    """The ways in which a call can be served, in the order in which "auto" asks, what needs tuning last."""
    found: list[Candidate] = []
    for backend in sorted(BACKENDS.values(), key=lambda one: one.proof == "faster"):
        if backend.refuse(call.spec, target) or backend.fault():
            continue
        backwards: list[BackwardName] = [backend.usual_backward]
        if any(call.needed) and backend.refuse_fused and not backend.refuse_fused(call.spec, target):
            backwards.append("fused")
        for way in backwards:
            tiles = _tiles(call, target, way) if backend.name == "triton" else [""]
            found += [Candidate(backend.name, way, text) for text in tiles]
    return found


def _tiles(call: Call, target: DeviceTarget, backward: BackwardName) -> list[str]:
    from flash_attend.kernels.configs import as_text, candidate_tiles

    return list(map(as_text, candidate_tiles(call.spec, target, backward)))


def _tune_kind(device: torch.device, kind: Kind, calls: list[Call], end: float, bar: Any) -> str:
    """Measures what was not measured before, keeps it, and says what won."""
    store, target = Store.of(device), DeviceTarget.of(device)
    figures: list[dict[str, Any]] = (store.read(name_of_tuned(kind)) or {}).get("figures", [])
    done = {_key(figure): figure for figure in figures}
    with Isolated(TIME_PAIR) as process:
        for call in calls:
            reference = None
            for candidate in candidates(call, target):
                first = reference or candidate  # the first that is right, beside itself
                request = dict(device=str(device), call=_call_as_json(call), pair=[list(first), list(candidate)])
                if _key(request) not in done:
                    if time.monotonic() >= end:
                        break
                    bar.set_postfix_str(str(candidate))
                    figure = {**request, **_ask(process, request)}
                    done[_key(request)] = figure
                    figures.append(figure)
                    store.write(name_of_tuned(kind), dict(figures=figures, won=_won(figures)))
                    bar.update()
                if "seconds" in done[_key(request)]:
                    reference = first
    won = _won(figures)
    return "nothing was right" if won is None else f"{won['backend']}: {won['reason']}"


def _ask(process: Isolated, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(seconds=process.ask(request, LONGEST_PAIR))
    except Failed as failure:
        return dict(error=str(failure))


def _key(request: dict[str, Any]) -> str:
    return repr([request["call"], request["pair"]])


def _won(figures: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fields of a `Tuned`, from the figures of a kind; None where nothing was right.

    What was wrong or failed for one call is out. Ratios of time are of the same reference, and averaged over calls.
    """
    failed = {repr(figure["pair"][1]) for figure in figures if "error" in figure}
    ratios: dict[str, list[float]] = {}
    named: dict[str, Candidate] = {}
    for figure in figures:
        name = repr(figure["pair"][1])
        if name not in failed:
            usual, other = figure["seconds"]
            ratios.setdefault(name, []).append(other / usual)
            named[name] = Candidate(*figure["pair"][1])
    calls = max(map(len, ratios.values()), default=0)
    means = {name: math.exp(statistics.fmean(map(math.log, of))) for name, of in ratios.items() if len(of) == calls}
    if not means:
        return None
    of_backends: dict[str, list[str]] = {}
    for name in means:
        of_backends.setdefault(named[name].backend, []).append(name)
    best = {backend: _best(names, means) for backend, names in of_backends.items()}
    first = _best(list(best.values()), means)
    usual, fastest = named[next(iter(means))], named[first]
    faster = f"{1 / means[first]:.2f} times as fast as {usual}" if fastest != usual else f"nothing faster than {usual}"
    return Tuned(
        fastest.backend,
        {name: named[one].backward for name, one in best.items()},
        {name: tiles for name, one in best.items() if (tiles := named[one].tiles)},
        f"measured here on {time.strftime('%Y-%m-%d')}: {faster}",
    )._asdict()


def _best(names: list[str], means: dict[str, float]) -> str:
    """The fastest of these, if it is clearly faster than the first, the usual one."""
    fastest = min(names, key=means.__getitem__)
    return fastest if means[fastest] < MARGIN * means[names[0]] else names[0]


# ---------------------------------------------------------------------------------------------------------------------
# In a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def time_pair(request: dict[str, Any]) -> list[float]:
    """Seconds of a call by each of two candidates, in turns. Raises `ValueError` where one is not right."""
    device, call = torch.device(request["device"]), _call_of_json(request["call"])
    pair = [Candidate(*one) for one in request["pair"]]
    for candidate in pair:
        if BACKENDS[candidate.backend].proof != "none":
            variant = Variant.read(variant_of(call.spec, *candidate[:2], call.needed, candidate.tiles))
            finding = checked(variant, device)
            if not finding.right:
                raise ValueError(finding.reason)
    run = make_run(call, device)
    clock = _on_the_gpu if device.type == "cuda" else _on_the_cpu
    return in_turns(*(partial(run, candidate) for candidate in pair), clock=clock)


def in_turns(
    first: Callable[[], object], second: Callable[[], object], *, clock: Callable[[Callable[[], object]], float]
) -> list[float]:
    """The median seconds of two calls, which are taken A B B A."""
    for call in (first, second) * 2:
        call()  # compiles, and fills caches
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for number in (0, 1, 1, 0):
            times[number].append(clock((first, second)[number]))
    return [statistics.median(of) for of in times]


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
    leaves = [tensor for tensor in (q, k, v) if tensor.requires_grad]

    def run(candidate: Candidate) -> None:
        with ExitStack() as stack:
            if candidate.backward != "einsum":
                stack.enter_context(override_backward(candidate.backward))
            if candidate.tiles:
                from flash_attend.kernels.configs import of_text, override

                stack.enter_context(override(of_text(candidate.tiles)))
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


def _call_as_json(call: Call) -> dict[str, Any]:
    dtype = str(call.spec.dtype).removeprefix("torch.")
    return asdict(call.spec) | dict(dtype=dtype, mask=int(call.spec.mask), needed=list(call.needed))


def _call_of_json(found: dict[str, Any]) -> Call:
    spec = found | dict(dtype=getattr(torch, found["dtype"]), mask=MaskKind(found["mask"]))
    needed = tuple(spec.pop("needed"))
    return Call(AttentionSpec(**spec), cast(Needed, needed))
