"""`python -m flash_attend`: what a bug report needs to say about the machine, and what backends are chosen by."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Mapping

import torch

from flash_attend import __version__
from flash_attend.dispatch import choose, judge
from flash_attend.functional import Explanation
from flash_attend.kernels.configs import MEASURED, rows_of
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.validation import FASTER, VALIDATED, Measurement, Run, Validation

__all__ = ["main", "report"]

# A call of the kind the kernels are for; another one can be judged differently, which is what `explain` is for.
REPRESENTATIVE = AttentionSpec(
    batch=2,
    heads=8,
    kv_heads=8,
    queries=1024,
    keys=1024,
    head_dim=64,
    value_dim=64,
    dtype=torch.float16,
    mask=MaskKind.KEY,
    causal=True,
    scale=64**-0.5,
)
REPRESENTATIVE_IN_WORDS = "float16, b 2, h 8, i = j = 1024, d = dv = 64, causal with key padding"


def report(
    validated: Mapping[tuple[str, str], Validation] = VALIDATED,
    faster: Mapping[tuple[str, str], Measurement] = FASTER,
    measured: Mapping[tuple[str | int, ...], str] = MEASURED,
) -> str:
    """The whole report, one fact a line."""
    lines = [f"{name:<13} {value}" for name, value in _versions().items()]
    devices = [torch.device("cpu")]
    if not torch.cuda.is_available():
        lines.append(f"{'GPU':<13} none")
    else:
        for index in range(torch.cuda.device_count()):
            devices.append(torch.device("cuda", index))
            lines.append(f"{f'GPU {index}':<13} {_describe_gpu(devices[-1])}")

    lines += ["", f"backends for {REPRESENTATIVE_IN_WORDS}"]
    for device in devices:
        target = DeviceTarget.of(device)
        plan = choose(REPRESENTATIVE, target, validated=validated, faster=faster)
        verdicts = judge(REPRESENTATIVE, target, validated, faster)
        lines.append(f"{device}: {Explanation(plan, '', verdicts, target)}")

    archs = sorted({arch for device in devices if (arch := DeviceTarget.of(device).arch) is not None})
    lines += ["", "shown right on a GPU", *_describe_runs(validated, archs)]
    lines += ["", "shown faster on a GPU than the backends after it", *_describe_runs(faster, archs)]
    lines += ["", "tiles", *(_describe_tiles(arch, measured) for arch in archs or ("sm_80", "sm_90"))]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    cpu = DeviceTarget.of(torch.device("cpu"))
    if cpu.triton is None:
        triton = "not installed"
    else:
        triton = cpu.triton + (" (interpreting: TRITON_INTERPRET is set)" if cpu.interpreted else "")
    return {
        "flash_attend": __version__,
        "torch": torch.__version__,
        "triton": triton,
        "einops": importlib.metadata.version("einops"),
        "CUDA of torch": torch.version.cuda or "none",
        "driver": _driver_version(),
        "Python": platform.python_version(),
        "platform": platform.platform(),
    }


def _driver_version() -> str:
    """The NVIDIA driver's version. torch knows only which CUDA version the driver serves."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown (no nvidia-smi)"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} from nvidia-smi)"
    return answer[0] if answer else "unknown (nvidia-smi names none)"


def _describe_gpu(device: torch.device) -> str:
    target = DeviceTarget.of(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    facts = [
        target.name,
        target.arch or "no CUDA compute capability",
        f"{memory / 2**30:.1f} GiB",
        f"{target.multiprocessors} SMs",
        f"{target.shared_memory} bytes of shared memory a block",
    ]
    return ", ".join(facts)


def _describe_runs(runs: Mapping[tuple[str, str], Run], here: list[str]) -> list[str]:
    """A line for each run, and for each kind of calls that it was about."""
    if not runs:
        return ["  nothing yet, on any part"]
    lines = []
    for (backend, arch), run in sorted(runs.items()):
        facts = [run.gpu, f"torch {run.torch}", f"Triton {run.triton}", run.date, f"commit {run.commit}", run.results]
        lines.append(f"  {backend} on {arch}: {', '.join(facts)}")
        if isinstance(run, Measurement):
            lines += [f"    {calls}" for calls in run.calls]
    lines += [f"  nothing on {arch}, which is here" for arch in here if arch not in {arch for _, arch in runs}]
    return lines


def _describe_tiles(arch: str, measured: Mapping[tuple[str | int, ...], str]) -> str:
    rows = rows_of(arch)
    if not rows:
        return f"  {arch}: has no rows of its own, takes those of sm_80"
    found = {key: measured[key] for key in rows if key in measured}
    return "\n".join(
        [
            f"  {arch}: {len(found)} of {len(rows)} rows measured there, the others chosen by what compiles well",
            *(f"    {', '.join(map(str, key[1:]))}: {results}" for key, results in found.items()),
        ]
    )


def main() -> None:
    """Prints the report."""
    print(report())


if __name__ == "__main__":
    main()
