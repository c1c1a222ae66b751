"""`python -m flash_attend`: what a bug report needs to say about the machine, and what backends are chosen by."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess

import torch

from flash_attend import __version__
from flash_attend.backends import BACKENDS
from flash_attend.dispatch import choose, judge
from flash_attend.explanation import Explanation
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.validation import EVIDENCE, EvidenceTable

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


def report(evidence: EvidenceTable = EVIDENCE) -> str:
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
        plan = choose(REPRESENTATIVE, target, evidence=evidence)
        verdicts = judge(REPRESENTATIVE, target, evidence)
        lines.append(f"{device}: {Explanation(plan, '', verdicts, target)}")

    archs = sorted({arch for device in devices if (arch := DeviceTarget.of(device).arch) is not None})
    lines += ["", "shown on a GPU", *_describe_evidence(evidence, archs)]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    cpu = DeviceTarget.of(torch.device("cpu"))
    triton = cpu.triton or "not installed"
    if cpu.triton and (fault := BACKENDS["triton"].fault()):
        triton += f", but {fault}"
    if cpu.interpreted:
        triton += " (interpreting: TRITON_INTERPRET is set)"
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


def _describe_evidence(evidence: EvidenceTable, here: list[str]) -> list[str]:
    if not evidence:
        return ["  nothing yet, on any part"]
    lines = []
    for (backend, backward, arch), found in sorted(evidence.items()):
        shown = "right and faster" if found.faster else "right"
        facts = f"{found.gpu}, Triton {found.triton}, {found.date}, {found.results}"
        lines.append(f"  {backend} with its {backward} backward on {arch}: {shown} ({facts})")
    shown_on = {arch for _, _, arch in evidence}
    return lines + [f"  nothing on {arch}, which is here" for arch in here if arch not in shown_on]


def main() -> None:
    """Prints the report."""
    print(report())


if __name__ == "__main__":
    main()
