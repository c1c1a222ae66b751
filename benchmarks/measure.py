"""The one way in which this project takes times: interleaved, in rounds, with the spread, beside the ceilings.

On a GPU a sample is the time between two CUDA events around one call, after the L2 cache was flushed
(`triton.testing.do_bench`). Peers take turns, A B B A, so that a clock which drifts treats them alike. Kernels alone
are timed in the same way as replays of a CUDA graph. On a CPU a sample is wall-clock time.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.utils.deterministic

from cases import DTYPES
from flash_attend.target import triton_version

__all__ = [
    "CpuStopwatch",
    "CudaStopwatch",
    "Statistics",
    "Stopwatch",
    "captured",
    "ceilings",
    "clocks",
    "device_name",
    "environment",
    "first_line",
    "host_microseconds",
    "interleave",
    "numerics",
    "peak_bytes",
    "rounded",
    "stopwatch_for",
    "summarise",
    "synchronize",
]

ROOT = Path(__file__).resolve().parent.parent
MOST_SAMPLES = 25  # in a round: more say nothing new about the median, and every sample is kept
Function = Callable[[], object]


class Stopwatch(Protocol):
    """Takes times on one device."""

    def sample(self, function: Function, milliseconds: float) -> list[float]:
        """The times of single calls, in milliseconds, for about so long; at least one, after a warm-up."""


class CudaStopwatch:
    """Device time, by CUDA events."""

    def sample(self, function: Function, milliseconds: float) -> list[float]:
        from triton.testing import do_bench

        return do_bench(function, warmup=milliseconds / 4, rep=milliseconds, return_mode="all")


class CpuStopwatch:
    """Wall-clock time."""

    def sample(self, function: Function, milliseconds: float) -> list[float]:
        once = timeit.timeit(function, number=1)
        number = max(1, int(milliseconds / 1e3 / once))
        return [1e3 * seconds for seconds in timeit.repeat(function, number=1, repeat=number)]


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The stopwatch of a device, which becomes the current one: events are recorded there."""
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"times are taken on CUDA devices and CPUs, got {device}")
    if device.type == "cpu":
        return CpuStopwatch()
    torch.cuda.set_device(device)
    return CudaStopwatch()


def interleave(
    functions: dict[str, Function], stopwatch: Stopwatch, *, rounds: int, milliseconds: float
) -> dict[str, list[list[float]]]:
    """Samples of every function by round, in milliseconds; a round of one function lasts at most about so long.

    Every other round goes backwards through the functions: A B B A.
    """
    lasting = {
        name: min(milliseconds, MOST_SAMPLES * statistics.median(stopwatch.sample(function, 0.0)))
        for name, function in functions.items()
    }
    samples = {name: [] for name in functions}
    for index in range(rounds):
        for name in list(functions)[:: -1 if index % 2 else 1]:
            samples[name].append(stopwatch.sample(functions[name], lasting[name]))
    return samples


@dataclass(frozen=True)
class Statistics:
    """Of the samples of all rounds together, in milliseconds."""

    median: float
    iqr: float  # between the quartiles
    rounds: tuple[float, ...]  # the median of each round: their spread is what a repetition would show


def rounded(value: float) -> float:
    """As many digits as a time has that say something: results are kept in text."""
    return float(f"{value:.5g}")


def first_line(error: BaseException) -> str:
    """What an error is called, and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}".removesuffix(": ")


def summarise(samples: list[list[float]]) -> Statistics:
    """Median, spread and the rounds' medians of samples by round."""
    together = [sample for taken in samples for sample in taken]
    low, _, high = statistics.quantiles(together, n=4, method="inclusive") if len(together) > 1 else (0, 0, 0)
    return Statistics(statistics.median(together), high - low, tuple(map(statistics.median, samples)))


# ---------------------------------------------------------------------------------------------------------------------
# Beside the time of a call
# ---------------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def numerics(dtype: str, deterministic: bool = False) -> Iterator[None]:
    """Within this context float32 products and determinism are what a case and a pass ask for.

    `dtype` is a key of `cases.DTYPES`. Torch's own filling of new tensors, which goes with determinism and which no
    result depends on, stays off: it would be timed.
    """
    precision = torch.get_float32_matmul_precision()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_float32_matmul_precision(DTYPES[dtype][1])
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.set_float32_matmul_precision(precision)


def peak_bytes(function: Function, device: torch.device) -> int | None:
    """What one call allocates at its highest, beyond what is allocated before it; None where there is no count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def captured(make: Callable[[], Function]) -> Function:
    """The replay of a CUDA graph that holds one call of the function which `make` returns.

    `make` is called on the stream of the capture: a backward runs where its forward ran. Raises what torch raises for a
    function that cannot be captured, such as one that waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = make()
        for _ in range(3):  # compile, and fill the allocator
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = function()  # its memory belongs to the graph for as long as somebody holds it
    return partial(_replay, graph, kept)


def _replay(graph: torch.cuda.CUDAGraph, kept: object) -> None:
    graph.replay()


def host_microseconds(function: Function, device: torch.device, calls: int = 100, repeats: int = 5) -> float | None:
    """What the host spends on a call, in microseconds, without waiting for the device; None on a CPU, where it is all.

    The least of the repeats: whatever else the host does only adds. For small calls: behind large ones the queue of
    launches fills up, and the host waits.
    """
    if device.type != "cuda":
        return None
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        taken.append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize(device)
    return 1e6 * min(taken)


# ---------------------------------------------------------------------------------------------------------------------
# Where, and what it can do
# ---------------------------------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """What the device calls itself; "cpu" for all CPUs."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _nvidia_smi(device: torch.device, *names: str) -> dict[str, str]:
    if device.type != "cuda":
        return {}
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    printed = _run("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    values = (printed or "").split(", ")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature of a GPU at this moment, with their units; empty elsewhere."""
    return _nvidia_smi(device, "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def _commit() -> tuple[str, bool | None]:
    """The commit, and whether files that git knows differ from it (None where only the commit's name is known).

    A copy without its history is told by `FLASH_ATTEND_COMMIT`.
    """
    commit = _run("git", "rev-parse", "HEAD")
    if commit is None:
        return os.environ.get("FLASH_ATTEND_COMMIT", "unknown"), None
    changed = _run("git", "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return commit, bool(changed)


def environment(device: torch.device) -> dict[str, Any]:
    """The header of a file of results: where and with what it was measured."""
    commit, dirty = _commit()
    return {
        "device": device_name(device),
        "driver": _nvidia_smi(device, "driver_version").get("driver_version"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "host": _host_name(),
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _host_name() -> str:
    """What kind of CPU the host has: the machine's own name says nothing to anybody else."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} x {next(models, platform.machine())}"


def ceilings(device: torch.device, stopwatch: Stopwatch, milliseconds: float = 100.0) -> dict[str, Any]:
    """What this device does at best, measured now: matrix products by dtype in TFLOP/s, a copy in GB/s.

    The copy counts the bytes read and the bytes written. Random data: a GPU clocks higher on zeros.
    """
    side, numbers = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    tflops = {}
    for name in DTYPES if device.type == "cuda" else ("float32",):
        with numerics(name):
            a, b = (torch.randn(side, side, device=device, dtype=DTYPES[name][0]) for _ in range(2))
            tflops[name] = 2e-9 * side**3 / statistics.median(stopwatch.sample(partial(torch.mm, a, b), milliseconds))
    source = torch.randn(numbers, device=device)
    copied = torch.empty_like(source)
    taken = statistics.median(stopwatch.sample(partial(copied.copy_, source), milliseconds))
    return {"tflops": tflops, "copy_gbps": 2e-6 * source.nbytes / taken}
