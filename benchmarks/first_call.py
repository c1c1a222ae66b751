"""What the first call costs: a fresh process with an empty compile cache, and one with the cache that it left behind.

Run by `run.py`; `python benchmarks/first_call.py DEVICE CASE PEER` prints the seconds of one first forward and
backward, from tensors that are ready to a device that is done.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cases import Case, make_inputs, select_cases
from measure import numerics, synchronize
from peers import PEERS, Peer, peers_for

__all__ = ["measure_first_calls"]

CACHES = (
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_CACHE_PATH",
    "CUTE_DSL_CACHE_DIR",
    "FLASH_ATTEND_CACHE",
)
LONGEST = 600  # seconds


def measure_first_calls(case: Case, peer: Peer, device: torch.device) -> tuple[float, float]:
    """Seconds of the first call with an empty compile cache, and with a filled one.

    Raises `RuntimeError` with the last line of what a process that fails has to say.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {name: str(Path(folder) / name.lower()) for name in CACHES}
        command = [sys.executable, __file__, str(device), case.name, peer.name]
        return _seconds(command, environment), _seconds(command, environment)


def _seconds(command: list[str], environment: dict[str, str]) -> float:
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        raise RuntimeError(f"in a process of its own: {lines[-1]}")
    return float(ended.stdout.split()[-1])


def main(device_name: str, case_name: str, peer_name: str) -> None:
    """Prints the seconds of one case and peer, by their names."""
    device = torch.device(device_name)
    case = next(case for case in select_cases(device.type, "full") if case.name == case_name)
    (peer,) = peers_for(PEERS, device.type, [peer_name])
    inputs = make_inputs(case, device)
    synchronize(device)
    with numerics(case.dtype, threads=case.threads), peer.within():
        start = time.perf_counter()
        out = peer.prepare(inputs)(inputs.q, inputs.k, inputs.v)
        torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.grad_out)
        synchronize(device)
        print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
