"""How a time is taken, and where: interleaved, in rounds, with the spread.

On a GPU a sample is the time between two CUDA events around one call, after the L2 cache was flushed
(`triton.testing.do_bench`). Peers take turns, A B B A, so that a drifting clock treats them alike. On a CPU a sample
is wall-clock time.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from cases import DTYPES
from flash_attend.target import triton_version

ROOT = Path(__file__).resolve().parent.parent
MOST_SAMPLES = 25  # in a round: more say nothing new about the median, and every sample is kept
LONG_CALL = 0.05  # seconds on a CPU
FAR_BEHIND = 8  # times the fastest's time: whoever takes so long takes one turn, which decides as much as more do
Function = Callable[[], object]
# Takes times of single calls, in milliseconds, for about so many milliseconds; at least one, after a warm-up.
Sampler = Callable[[Function, float], list[float]]


def _sample_on_cuda(function: Function, milliseconds: float) -> list[float]:
    from triton.testing import do_bench

    return do_bench(function, warmup=milliseconds / 4, rep=milliseconds, return_mode="all")


def _sample_on_cpu(function: Function, milliseconds: float) -> list[float]:
    once = timeit.timeit(function, number=1)
    if once > LONG_CALL:  # needs no warm-up
        return [1e3 * once]
    number = max(1, int(milliseconds / 1e3 / once))
    return [1e3 * seconds for seconds in timeit.repeat(function, number=1, repeat=number)]


SAMPLERS: dict[str, Sampler] = {"cuda": _sample_on_cuda, "cpu": _sample_on_cpu}


def interleave(samplers: Mapping[Any, Callable[[float], list[float]]], rounds: int, milliseconds: float) -> dict:
    """The samples of every sampler, which takes times for so many milliseconds, by round; a turn lasts at most about so
    many.

    Every other round goes backwards through the samplers: A B B A.
    """
    single = {key: statistics.median(take(0.0)) for key, take in samplers.items()}
    samples: dict[Any, list[list[float]]] = {key: [] for key in samplers}
    for index in range(rounds):
        for key in list(samplers)[:: -1 if index % 2 else 1]:
            if not index or single[key] <= FAR_BEHIND * min(single.values()):
                samples[key].append(samplers[key](min(milliseconds, MOST_SAMPLES * single[key])))
    return samples


def summarise(samples: list[list[float]]) -> dict[str, Any]:
    """The fields of a row that samples give; the spread of the rounds' medians is what a repetition would show.

    All have as many digits as say something: results are kept in text."""
    together = [sample for taken in samples for sample in taken]
    low, _, high = statistics.quantiles(together, n=4, method="inclusive") if len(together) > 1 else (0, 0, 0)
    return dict(
        ms_median=rounded(statistics.median(together)),
        ms_iqr=rounded(high - low),
        ms_rounds=[rounded(statistics.median(taken)) for taken in samples],
        samples=[[rounded(sample) for sample in taken] for taken in samples],
    )


def rounded(value: float) -> float:
    """Five digits."""
    return float(f"{value:.5g}")


def first_line(error: BaseException) -> str:
    """What an error is called, and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}".removesuffix(": ")


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def numerics(dtype: str, deterministic: bool = False, threads: int = 0) -> Iterator[None]:
    """Within this context float32 products, determinism and the CPU's threads are what a case and a pass ask for.

    `dtype` is a key of `cases.DTYPES`; 0 threads are those there were.
    """
    had = (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )
    try:
        _set_numerics(DTYPES[dtype][1], deterministic, threads or torch.get_num_threads())
        yield
    finally:
        _set_numerics(*had)


def _set_numerics(precision: str, deterministic: bool, threads: int) -> None:
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    # Torch's own filling of new tensors goes with determinism; no result depends on it, and it would be timed.
    torch.utils.deterministic.fill_uninitialized_memory = not deterministic


def _run(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _ask_gpu(device: torch.device, *names: str) -> dict[str, str]:
    """What nvidia-smi says of a GPU."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    printed = _run("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    return dict(zip(names, printed.split(", "), strict=False))


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature of a GPU at this moment, with their units; of a CPU, how busy the machine is."""
    if device.type == "cpu":
        return {"load average": f"{os.getloadavg()[0]:.2f}"}
    return _ask_gpu(device, "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def environment(device: torch.device) -> dict[str, Any]:
    """The header of a file of results: where and with what it was measured.

    `dirty` says whether files that git knows differ from the commit. A copy without its history is told its commit by
    `FLASH_ATTEND_COMMIT`.
    """
    on_gpu, commit = device.type == "cuda", _run("git", "rev-parse", "HEAD")
    changed = _run("git", "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    processor = _run("sed", "-n", "s/^model name.*: //p;T;q", "/proc/cpuinfo") or platform.machine()
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "driver": _ask_gpu(device, "driver_version")["driver_version"] if on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "host": f"{os.cpu_count()} x {processor}",
        "threads": torch.get_num_threads(),
        "commit": commit or os.environ.get("FLASH_ATTEND_COMMIT", "unknown"),
        "dirty": bool(changed) if commit else None,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
