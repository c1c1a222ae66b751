"""What the first call costs: a fresh process with an empty compile cache, and one with the cache that it left behind.

Run by `run.py`; `python benchmarks/first_call.py CASE PEER` prints the seconds of one first forward and backward, from
tensors that are ready to a device that is done.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cases import FORWARD, PRESETS, Case, make_inputs, select_cases
from measure import numerics, synchronize
from peers import Peer, peers_for

__all__ = ["measure_first_calls"]

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "CUTE_DSL_CACHE_DIR")
LONGEST = 600  # seconds


def measure_first_calls(case: Case, peer: Peer, device: torch.device) -> tuple[float, float]:
    """Seconds of the first call with an empty compile cache, and with a filled one.

    Raises `RuntimeError` with the last line of what a process that fails has to say.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {name: str(Path(folder) / name.lower()) for name in CACHES}
        command = [sys.executable, __file__, case.name, peer.name, f"--device={device}"]
        return _seconds(command, environment), _seconds(command, environment)


def _seconds(command: list[str], environment: dict[str, str]) -> float:
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        raise RuntimeError(f"in a process of its own: {lines[-1]}")
    return float(ended.stdout.split()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", help="the name of a case, as run.py --list prints it")
    parser.add_argument("peer", help="the name of a peer")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    cases = {case.name: case for preset in PRESETS for case in select_cases(preset)}
    peers = {peer.name: peer for peer in peers_for(options.device, [options.peer])}
    for kind, name, known in (("case", options.case, cases), ("peer", options.peer, peers)):
        if name not in known:
            parser.error(f"no {kind} is called {name!r} on {options.device}")

    case, peer = cases[options.case], peers[options.peer]
    inputs = make_inputs(case, options.device)
    synchronize(options.device)
    with numerics(case.dtype):
        start = time.perf_counter()
        out = peer.prepare(inputs)(inputs.q, inputs.k, inputs.v)
        if case.passes != (FORWARD,):
            torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.grad_out)
        synchronize(options.device)
        print(time.perf_counter() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
