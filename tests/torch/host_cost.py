"""What a call costs the host beside PyTorch's own: microseconds, on a machine without a GPU.

    python tests/torch/host_cost.py [--modes plain causal ...] [--rounds N]

Up to the CUDA driver's launch and without it the call is a real one, `flash_attention(..., backend="triton")` on small
CPU tensors, for a part that is only named: Triton compiles the kernels for it, and their arguments go to a launcher
that does nothing. `F.scaled_dot_product_attention` stands beside it, on tensors so small that its arithmetic is next to
nothing. The modes that begin with "cpu" are whole small calls on the CPU, of the same tensors for both.

Every number is the median over rounds, which take the stages in turn, with the interquartile range. It is time on the
processor, so that whatever else the machine does counts as little as it can.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from tqdm import tqdm

from flash_attend import flash_attention
from flash_attend.generation import renew
from flash_attend.kernels import aot
from flash_attend.target import DeviceTarget

ARCH = "sm_90"
PART = aot.PARTS[ARCH]
SHAPE = (2, 4, 64, 64)  # (b, h, n, d): of no account, nothing is computed
TINY = (1, 1, 1, 8)  # for PyTorch's own attention, which does compute
SMALL = (1, 8, 64, 64)  # on a CPU, for both
KINDS = {"plain": {}, "key mask": dict(mask=True), "causal": dict(causal=True), "dropout": dict(dropout_p=0.1)}
MODES = [*KINDS, *(f"cpu {kind}" for kind in KINDS)]
STAGES = ("sdpa without gradients", "without gradients", "sdpa", "forward", "sdpa with gradients", "with gradients")
CALLS = 20  # of one stage, before the next one's turn


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
        renew()
        yield
    renew()


def stages(mode: str) -> dict[str, Callable[[], object]]:
    """The stages of a mode, to be called on the part or, those of a CPU's mode, off it."""
    on_cpu = mode.startswith("cpu ")
    shape, theirs = (SMALL, SMALL) if on_cpu else (SHAPE, TINY)
    dtype = torch.float32 if on_cpu else torch.float16
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
    tiny = [torch.randn(theirs, requires_grad=True) for _ in range(3)]
    options, same = dict(KINDS[mode.removeprefix("cpu ")]), {}
    if options.pop("mask", False):
        options["mask"] = torch.ones(shape[0], shape[2], dtype=torch.bool)
        same["attn_mask"] = torch.ones(theirs[0], 1, 1, theirs[2], dtype=torch.bool)
    names = {"causal": "is_causal", "dropout_p": "dropout_p"}
    same |= {names[name]: value for name, value in options.items() if name in names}
    sdpa = partial(F.scaled_dot_product_attention, *tiny, **same)
    call = partial(flash_attention, q, k, v, backend="auto" if on_cpu else "triton", **options)
    return {
        "sdpa without gradients": torch.no_grad()(sdpa),
        "without gradients": torch.no_grad()(call),
        "sdpa": sdpa,
        "forward": call,
        "sdpa with gradients": lambda: torch.autograd.grad(sdpa(), tiny, tiny[0].detach()),
        "with gradients": lambda: torch.autograd.grad(call(), (q, k, v), v.detach()),
    }


def measure(modes: list[str], rounds: int) -> pd.DataFrame:
    """Times every stage of these modes, the stages of a mode in turn; in microseconds."""
    rows = []
    for mode in tqdm(modes, unit="mode", desc="timing", file=sys.stderr, disable=None):
        with nullcontext() if mode.startswith("cpu ") else on_the_part():
            timers = {
                stage: Timer("call()", timer=time.process_time, globals=dict(call=call))
                for stage, call in stages(mode).items()
            }
            times: dict[str, list[float]] = {stage: [] for stage in timers}
            for number in range(rounds + 1):
                for stage, timer in timers.items():
                    seconds = timer.timeit(CALLS).mean
                    if number:  # the first round compiles and fills every cache
                        times[stage].append(1e6 * seconds)
        for stage, found in times.items():
            low, median, high = statistics.quantiles(found, n=4)
            rows.append(dict(mode=mode, stage=stage, median_us=median, iqr_us=high - low))
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: all")
    parser.add_argument("--rounds", type=int, default=100, metavar="N", help="turns of each stage, default 100")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    torch.set_num_threads(1)
    rows = measure(options.modes, options.rounds)
    cells = rows["median_us"].map("{:.1f}".format) + rows["iqr_us"].map(" ({:.1f})".format)
    table = rows.assign(cell=cells).pivot(index="stage", columns="mode", values="cell")
    print("microseconds a call: median (interquartile range)")
    print(table.loc[list(STAGES), options.modes].to_string())


if __name__ == "__main__":
    main()
