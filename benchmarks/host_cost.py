"""What a call costs the host, up to the CUDA driver's launch and without it: microseconds, on a machine without a GPU.

    python benchmarks/host_cost.py [--json] [--modes plain causal ...] [--rounds N]

The call is a real one, `flash_attention(..., backend="triton")` on small CPU tensors, for a part that is only named:
Triton compiles the kernels for it, finds them again at each call and hands their arguments to a launcher that does
nothing. `F.scaled_dot_product_attention` stands beside it, on tensors so small that its arithmetic is next to nothing.

Every number is the median over rounds, which take the stages in turn, with the interquartile range. It is time on the
processor, so that whatever else the machine does counts as little as it can.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from tqdm import tqdm

from flash_attend import flash_attention, functional
from flash_attend.checks import normalise_inputs
from flash_attend.kernels import aot, backward, forward, schedule
from flash_attend.kernels.configs import Tiles, select_tiles
from flash_attend.kernels.launch import Launch, launch, recorded_launches
from flash_attend.operands import Operands
from flash_attend.spec import AttentionSpec
from flash_attend.target import DeviceTarget

ARCH = "sm_90"
PART = aot.PARTS[ARCH]
SHAPE = (2, 4, 64, 64)  # (b, h, n, d): of no account, nothing is computed
TINY = (1, 1, 1, 8)  # for PyTorch's own attention, which does compute
MODES = {"plain": {}, "key mask": dict(mask=True), "causal": dict(causal=True), "dropout": dict(dropout_p=0.1)}
CALLS = 20  # of one stage, before the next one's turn

STAGES = {
    "sdpa": "PyTorch's own call, forward",
    "forward": "our call, forward",
    "checks": "of it: the arguments are checked and described",
    "dispatch": "of it: the backend and its tiles are chosen",
    "preparation": "of it: outputs, schedule, layouts and arguments",
    "launches": "of it: from a kernel and its arguments to the launcher",
    "without gradients": "our call, forward, under torch.no_grad()",
    "sdpa with gradients": "PyTorch's own call, forward and backward",
    "with gradients": "our call, forward and backward",
    "backward preparation": "of it: gradients, layouts and arguments",
    "backward launches": "of it: from a kernel and its arguments to the launcher",
}


@dataclass(frozen=True)
class Row:
    """The cost of one stage in one mode."""

    mode: str
    stage: str
    median_us: float
    iqr_us: float


class Deviceless(aot.Part):
    """A part with as much of a driver as launching takes, and a launcher that does nothing."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: dict(max_shared_mem=PART.shared_memory),
        load_binary=lambda *binary: (object(), object(), 0, 0, 1024),  # module, function, registers, spills, threads
    )

    @staticmethod
    def launcher_cls(source, metadata) -> Callable:
        return lambda *arguments: None


@contextmanager
def on_the_part() -> Iterator[None]:
    """Within this context CPU tensors are served as if they lay on the part."""
    with aot.compiled_for(ARCH, Deviceless), mock.patch.object(DeviceTarget, "of", lambda device: PART):
        yield


@contextmanager
def without_launches() -> Iterator[None]:
    """Within this context the launchers prepare and launch nothing."""
    with ExitStack() as stack:
        for module in (forward, backward, schedule):
            stack.enter_context(mock.patch.object(module, "launch", lambda *arguments, **options: None))
        yield


def replay(launches: list[Launch]) -> None:
    for one in launches:
        launch(one.prepared, *one.tensors)


def dispatched(spec: AttentionSpec, device: torch.device) -> Tiles | None:
    """As a call does it: the plan is looked up."""
    target = DeviceTarget.of(device)
    plan = functional._choose_once(spec, target, "triton", (True, True, True), None)
    return plan.backend.tiles(spec, target, plan.backward)


def stages(mode: str) -> dict[str, Callable[[], object]]:
    """What is timed in a mode; to be called on the part, the preparations without launches."""
    q, k, v = (torch.zeros(SHAPE, dtype=torch.float16, requires_grad=True) for _ in range(3))
    tiny = [torch.zeros(TINY, requires_grad=True) for _ in range(3)]
    options, same = dict(MODES[mode]), {}
    if options.pop("mask", False):
        options["mask"] = torch.ones(SHAPE[0], SHAPE[2], dtype=torch.bool)
        same["attn_mask"] = torch.ones(1, 1, 1, TINY[2], dtype=torch.bool)
    same |= {theirs: options[ours] for ours, theirs in (("causal", "is_causal"), ("dropout_p",) * 2) if ours in options}
    sdpa = partial(F.scaled_dot_product_attention, *tiny, **same)
    call = partial(flash_attention, q, k, v, backend="triton", **options)

    (*inputs, mask, _), spec = normalise_inputs(q.detach(), k.detach(), v.detach(), **options)
    tiles = select_tiles(spec, PART)
    seed = torch.zeros(1, dtype=torch.int64) if spec.dropout_p else None
    operands = Operands(*inputs, mask, seed)
    prepare = partial(forward.attention_forward, operands, spec, tiles)
    with recorded_launches() as of_forward:
        out, lse, schedule = prepare()
    needed = (True, True, True)
    prepare_backward = partial(
        backward.attention_backward, out, None, operands, out, lse, schedule, spec, tiles, needed
    )
    with recorded_launches() as of_backward:
        prepare_backward()
    return {
        "sdpa": sdpa,
        "forward": call,
        "checks": partial(normalise_inputs, q, k, v, **options),
        "dispatch": partial(dispatched, spec, q.device),
        "preparation": prepare,
        "launches": partial(replay, of_forward),
        "without gradients": torch.no_grad()(call),
        "sdpa with gradients": lambda: torch.autograd.grad(sdpa(), tiny, tiny[0].detach()),
        "with gradients": lambda: torch.autograd.grad(call(), (q, k, v), out),
        "backward preparation": prepare_backward,
        "backward launches": partial(replay, of_backward),
    }


def measure(modes: list[str], rounds: int) -> list[Row]:
    """Times every stage of these modes, the stages of a mode in turn."""
    rows = []
    for mode in tqdm(modes, unit="mode", desc="timing", file=sys.stderr, disable=None):
        with on_the_part():
            timers = {
                stage: Timer("call()", timer=time.process_time, globals=dict(call=call))
                for stage, call in stages(mode).items()
            }
            times: dict[str, list[float]] = {stage: [] for stage in timers}
            for number in range(rounds + 1):
                for stage, timer in timers.items():
                    with without_launches() if "preparation" in stage else nullcontext():
                        seconds = timer.timeit(CALLS).mean
                    if number:  # the first round compiles and fills every cache
                        times[stage].append(1e6 * seconds)
        for stage, found in times.items():
            low, median, high = statistics.quantiles(found, n=4)
            rows.append(Row(mode, stage, median, high - low))
    return rows


def as_table(rows: list[Row]) -> str:
    """The rows for people: a line for each stage, a column for each mode."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    cells = {(row.stage, row.mode): f"{row.median_us:.1f} ({row.iqr_us:.1f})" for row in rows}
    lines = [f"{'microseconds a call: median (interquartile range)':<82}" + "".join(f"{mode:>16}" for mode in modes)]
    for stage, meaning in STAGES.items():
        lines.append(f"{stage:<22}{meaning:<60}" + "".join(f"{cells[stage, mode]:>16}" for mode in modes))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--rounds", type=int, default=100, metavar="N", help="turns of each stage, default 100")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    torch.set_num_threads(1)
    rows = measure(options.modes, options.rounds)
    print(json.dumps([asdict(row) for row in rows], indent=1) if options.json else as_table(rows))


if __name__ == "__main__":
    main()
