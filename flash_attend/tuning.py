"""What is fastest on a part, measured there: which backend, by which backward, with which tiles.

Each candidate takes turns with what serves without tuning, A B B A, in a process of its own, which may crash or hang.
It is measured only where it checks right. Figures are kept as they come: tuning goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from flash_attend.backends import BACKENDS, BackwardName
from flash_attend.evidence import Store, Tuned, name_of_tuned, read_anew
from flash_attend.isolation import Failed, Isolated
from flash_attend.plans import recorded_calls
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.timing import Call, Candidate, call_as_json
from flash_attend.variant import Kind, kind_of_call

__all__ = ["Call", "Candidate", "grid", "tune"]

LONGEST_PAIR = 300.0  # seconds for compiling and timing two candidates
MARGIN = 0.97  # of the usual one's time: what is not clearly faster changes nothing
TIME_PAIR = "flash_attend.timing:time_pair"


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
    pairs = sum(len(of) * len(candidates(of, DeviceTarget.of(device))) for (device, _), of in kinds.items())
    with tqdm(total=pairs, unit="pair", desc="tuning", file=sys.stderr, disable=None) as bar:
        for (device, kind), of_kind in kinds.items():
            won[f"{device} {name_of_tuned(kind)}"] = _tune_kind(device, kind, of_kind, end, bar)
    _follow()
    return won


def grid(
    dtypes: Iterable[str],
    dims: Iterable[tuple[int, int]],
    masks: Iterable[str],
    lengths: Iterable[tuple[int, int]],
    *,
    tokens: int = 16384,
    width: int = 2048,
) -> list[Call]:
    """Calls of batches of so many tokens, of models so wide. A mask is the name of a `MaskKind`, in lower case, with
    "-causal" behind it or not; lengths are those of queries and keys. Fewer queries than keys are those of decoding,
    which needs no gradients."""
    calls = []
    for dtype, (d, dv), mask, (queries, keys) in product(dtypes, dims, masks, lengths):
        batch, heads = max(1, tokens // keys), max(1, width // d)
        kind, _, causal = mask.partition("-")
        sizes = batch, heads, heads, queries, keys, d, dv, getattr(torch, dtype), MaskKind[kind.upper()]
        precision = "ieee"
        if dtype == "float32":
            precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
        spec = AttentionSpec(*sizes, causal=causal == "causal", scale=d**-0.5, precision=precision)
        calls.append(Call(spec, (queries >= keys,) * 3))
    return calls


def _gpus() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)]


def _follow() -> None:
    """Has the next call ask anew what is fastest."""
    read_anew()
    if configs := sys.modules.get("flash_attend.kernels.configs"):
        configs._look_up_tiles.cache_clear()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def candidates(calls: Sequence[Call], target: DeviceTarget) -> list[Candidate]:
    """The ways in which calls of a kind can be served, in the order in which "auto" asks, what needs tuning last."""
    gradients, specs = any(any(call.needed) for call in calls), [call.spec for call in calls]
    found: list[Candidate] = []
    for backend in sorted(BACKENDS.values(), key=lambda one: one.proof == "faster"):
        if any(backend.refuse(spec, target) for spec in specs) or backend.fault():
            continue
        backwards: list[BackwardName] = [backend.usual_backward]
        refuse = backend.refuse_fused
        if gradients and refuse is not None and not any(refuse(spec, target) for spec in specs):
            backwards.append("fused")
        for way in backwards:
            tiles = _tiles(specs[0], target, way, gradients) if backend.name == "triton" else [""]
            found += [Candidate(backend.name, way, text) for text in tiles]
    return found


def _tiles(spec: AttentionSpec, target: DeviceTarget, backward: BackwardName, gradients: bool) -> list[str]:
    """What is worth timing for calls of a kind, whatever their lengths: what the rules say, and others."""
    from flash_attend.kernels.configs import as_text, candidate_tiles

    first, *others = candidate_tiles(spec, replace(target, multiprocessors=0), backward)
    return ["", *(as_text(tiles) for tiles in others if gradients or tiles.forward != first.forward)]


def _tune_kind(device: torch.device, kind: Kind, calls: list[Call], end: float, bar: Any) -> str:
    """Measures what was not measured before, keeps it, and says what won."""
    store, target = Store.of(device), DeviceTarget.of(device)
    figures: list[dict[str, Any]] = (store.read(name_of_tuned(kind)) or {}).get("figures", [])
    done = {_key(figure): figure for figure in figures}
    ways = candidates(calls, target)
    with Isolated(TIME_PAIR) as process:
        for call in calls:
            reference = None
            for candidate in ways:
                first = reference or candidate  # the first that is right, beside itself
                request = dict(device=str(device), call=call_as_json(call), pair=[list(first), list(candidate)])
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
    if won is None:
        return "nothing was right" if figures else "there was no time"
    return f"{won['backend']}: {won['reason']}"


def _ask(process: Isolated, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(seconds=process.ask(request, LONGEST_PAIR))
    except Failed as failure:
        return dict(error=str(failure))


def _key(request: dict[str, Any]) -> str:
    return json.dumps([request["call"], request["pair"]])


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
        tuple((name, named[one].backward, named[one].tiles) for name, one in best.items()),
        f"measured here on {time.strftime('%Y-%m-%d')}: {faster}",
    )._asdict()


def _best(names: list[str], means: dict[str, float]) -> str:
    """The fastest of these, if it is clearly faster than the first, the usual one."""
    fastest = min(names, key=means.__getitem__)
    return fastest if means[fastest] < MARGIN * means[names[0]] else names[0]
