"""Measures flash_attend beside its peers on this machine, and writes a table, JSON, a markdown report and plots.

    python benchmarks/run.py                         the standard grid of this device
    python benchmarks/run.py --quick                 a few cases, without the peers that are slow to start
    python benchmarks/run.py --training              whole training steps
    python benchmarks/run.py --device cpu --minutes 20
    python benchmarks/run.py --only 'key padding: d64 causal' --peers flash_attend 'sdpa*'

No time is taken of a result that is wrong: output and gradients of every peer are first checked against float64. What a
peer cannot do is a row too, with its error. An interrupted run keeps what it measured, and the same command goes on.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cache, partial
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path

import torch
from tqdm import tqdm

import measure
import results as reporting
from cases import BOTH, DETERMINISTIC, FORWARD, Case, make_inputs, select_cases
from flash_attend.testing.memory import peak_bytes
from gate import Check, Gate
from measure import Function, Sampler
from peers import PEERS, Attention, Peer, Unserved, peers_for
from results import Results, results_folder
from train_step import ARMS, STEP, Training, Workload, workloads

__all__ = ["Bench", "main"]

PLANS = {"quick": (3, 20.0), "standard": (5, 50.0), "full": (7, 50.0)}  # rounds, and milliseconds of a peer in each


class Call:
    """An attention call at work: what every peer computes it with, once it is right."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.inputs = case, make_inputs(case, device)
        self.attends: dict[str, Attention] = {}
        self.gate = cache(self._gate)

    def admit(self, peer: Peer) -> Check:
        """Prepares a peer and checks what it computes.

        What a peer's own dropout keeps is not known: it is judged without.
        """
        self.attends[peer.name] = attend = peer.prepare(self.inputs)
        if peer.ours or not self.case.dropout_p:
            return self.gate(self.case.dropout_p).judge(attend, whole=peer.ours)
        gate = self.gate(0.0)
        check = gate.judge(peer.prepare(gate.inputs), whole=False)
        return replace(check, checked=f"{check.checked}, without dropout")

    def _gate(self, dropout_p: float) -> Gate:
        try:
            return Gate(replace(self.inputs, case=replace(self.case, dropout_p=dropout_p)))
        except torch.OutOfMemoryError as error:
            raise RuntimeError("not checked, and so not timed: the check does not fit into memory") from error

    def function(self, peer: Peer, name: str) -> Function:
        """One pass as a function without arguments; for a backward alone the forward runs here, once."""
        attend, leaves = self.attends[peer.name], (self.inputs.q, self.inputs.k, self.inputs.v)
        if name == FORWARD:
            return torch.no_grad()(partial(attend, *leaves))
        if name == BOTH:
            return lambda: torch.autograd.grad(attend(*leaves), leaves, self.inputs.grad_out)
        return partial(torch.autograd.grad, attend(*leaves), leaves, self.inputs.grad_out, retain_graph=True)

    def rates(self, name: str, milliseconds: float) -> dict[str, float]:
        """The fields of a row that follow from its time."""
        return {"tflops": self.inputs.tflops(name, milliseconds)}


class Bench:
    """A run: every case, and in it every peer, right first and then timed in turn."""

    def __init__(self, results: Results, device: torch.device, preset: str, peers: list[Peer], sample: Sampler) -> None:
        self.results, self.device, self.preset, self.peers, self.sample = results, device, preset, peers, sample

    def missing(self, case: Case | Workload) -> list[tuple[str, Peer]]:
        """The passes and peers of a case that have no row yet.

        Who compiles anew for each case, and for deterministic passes once more, may do it in a standard run only for
        the grid's core.
        """
        return [
            (name, peer)
            for name, peer in product(case.passes, self.peers)
            if self.preset != "standard" or not peer.compiles or (case.core and name != DETERMINISTIC)
            if (case.name, name, peer.name) not in self.results.rows
        ]

    def measure(self, case: Case | Workload, progress: Callable[[str], object]) -> None:
        """Adds the rows of a case that are missing; `progress` hears what comes next."""
        trial = Training(case, self.device) if isinstance(case, Workload) else Call(case, self.device)
        admit = cache(partial(self._admit, trial))
        for name, rows in groupby(self.missing(case), key=itemgetter(0)):
            deterministic, checks = name == DETERMINISTIC, {}
            with measure.numerics(case.dtype, deterministic, case.threads):
                for _, peer in rows:
                    progress(f"{case.name}: checking {peer.name}")
                    checks[peer] = admit(peer, deterministic)
                progress(f"{case.name}: {name}")
                self._measure_pass(trial, name, checks)

    def _admit(self, trial: Call | Training, peer: Peer, deterministic: bool) -> Check:
        """Once for all passes that are deterministic, and once for all others."""
        try:
            with peer.within():
                return trial.admit(peer)
        except Exception as error:  # whatever stops a peer is what its rows say
            return Check(error=self._reason(error))

    def _reason(self, error: Exception) -> str:
        """What stopped a peer, unless it took the device with it, which ends the run."""
        measure.synchronize(self.device)
        return str(error) if isinstance(error, Unserved) else measure.first_line(error)

    def _measure_pass(self, trial: Call | Training, name: str, checks: dict[Peer, Check]) -> None:
        """Adds the rows of one pass: what is beside the time one by one, then the times, in turn."""
        case, rows = trial.case, {}
        told = {"case": case.name, "pass": name, "group": case.group, "dtype": case.dtype}
        told |= {"mask": case.mask_words, "shape": list(case.shape)}
        samplers: dict[Peer, Callable[[float], list[float]]] = {}
        for peer, check in checks.items():
            rows[peer] = told | dict(peer=peer.name, ours=peer.ours) | asdict(check)
            if check.error:
                continue
            try:
                with peer.within():
                    function = trial.function(peer, name)
                    function()  # compiles, and fills the allocator
                    rows[peer] |= dict(served=peer.served(trial.inputs), peak_bytes=peak_bytes(function, self.device))
                samplers[peer] = partial(self._sample, peer, function)
            except Exception as error:
                rows[peer]["error"] = self._reason(error)
        try:
            for peer, taken in measure.interleave(samplers, *PLANS[self.preset]).items():
                found = measure.summarise(taken)
                rows[peer] |= found | trial.rates(name, found["ms_median"])
        except torch.OutOfMemoryError as error:  # each of them ran alone
            for peer in samplers:
                rows[peer]["error"] = f"beside the others: {self._reason(error)}"
        for row in rows.values():
            self.results.add(**row)

    def _sample(self, peer: Peer, function: Function, milliseconds: float) -> list[float]:
        with peer.within():
            return self.sample(function, milliseconds)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for preset, text in (("quick", "the fewest cases"), ("full", "every case, more rounds; on a CPU for hours")):
        chosen = dict(dest="preset", action="store_const", const=preset, default="standard")
        parser.add_argument(f"--{preset}", **chosen, help=text)
    parser.add_argument("--training", action="store_true", help="whole training steps")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose group and name contain all the words")
    parser.add_argument("--peers", nargs="+", default=[], metavar="PATTERN", help="peers whose name matches, with * ?")
    parser.add_argument("--list", action="store_true", help="print the cases and the peers, and measure nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    minutes = dict(type=float, metavar="N", default=float("inf"))
    parser.add_argument("--minutes", **minutes, help="begin no case after so many; the same again goes on")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/<device>/")
    options = parser.parse_args(arguments)
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none")
    if options.out is not None and options.out.suffix != ".json":
        parser.error(f"--out must be the path of a .json file, got {options.out}")
    options.device = torch.device(kind)
    known, cases = (ARMS, workloads(kind)) if options.training else (PEERS, select_cases(kind, options.preset))
    words = options.only.split()
    options.cases = [case for case in cases if all(word in f"{case.group}: {case.name}" for word in words)]
    if not options.cases:
        parser.error(f"no case of the {options.preset} grid on {kind} contains {options.only!r}; --list prints them")
    try:
        options.chosen = peers_for(known, kind, options.peers, quick=options.preset == "quick")
    except ValueError as error:
        parser.error(str(error))
    name = "-".join([options.preset, *["training"] * options.training])
    options.out = options.out or results_folder(measure.environment(options.device)["device"]) / f"{name}.json"
    return options


def list_everything(options: argparse.Namespace) -> None:
    """Prints what would be measured."""
    print(f"{len(options.cases)} cases of the {options.preset} grid:")
    for group, cases in groupby(options.cases, key=lambda case: case.group):
        print(f"  {group}", *(f"    {case.name:<58}{', '.join(case.passes)}" for case in cases), sep="\n")
    print("peers:", *(f"  {peer.name:<28}{peer.about}" for peer in options.chosen), sep="\n")


def open_results(options: argparse.Namespace) -> Results:
    """A new file of results, or an unfinished one to go on with."""
    asked = {name: getattr(options, name) for name in ("preset", "training", "only", "peers")}
    header = measure.environment(options.device) | asked | {"complete": False}
    if not options.out.exists() or (earlier := Results.load(options.out)).header["complete"]:
        return Results(options.out, header)
    if differences := earlier.differences(header):
        told = "holds an unfinished run that was measured elsewhere: delete it, or go on there"
        raise SystemExit(f"{options.out} {told}; {'; '.join(differences)}")
    return earlier


def run(options: argparse.Namespace, results: Results, bench: Bench) -> None:
    """Measures what is missing, until it is complete or out of time; an interruption goes through, saved."""
    results.header["clocks_before"] = measure.clocks(options.device)
    stop = time.monotonic() + 60 * options.minutes
    try:
        cases = tqdm([case for case in options.cases if bench.missing(case)], unit="case", disable=None)
        for case in cases:
            if time.monotonic() > stop:
                cases.close()
                print(f"stopped after {options.minutes:g} minutes: the same again goes on", file=sys.stderr)
                return
            bench.measure(case, cases.set_postfix_str)
            results.save()
            gc.collect()
            torch.cuda.empty_cache()
            torch.compiler.reset()  # what was compiled for one case would make the next one's calls slower
        results.header["complete"] = True
    finally:
        results.header["ended"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        results.header["clocks_after"] = measure.clocks(options.device)
        results.save()


def main(arguments: list[str] | None = None, sample: Sampler | None = None) -> int:
    """0, or 1 where a result of ours is wrong or a model cannot be patched, or 130 after an interruption."""
    options = parse(arguments)
    if options.list:
        list_everything(options)
        return 0
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # keeps the profiler's own log off the screen
    # cuBLAS is deterministic only with a workspace of its own, which it must know when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    warnings.filterwarnings("ignore", message=".*sdp_kernel.*")  # what the models' own flash paths call is deprecated
    results = open_results(options)
    sample = sample or measure.SAMPLERS[options.device.type]
    bench = Bench(results, options.device, options.preset, options.chosen, sample)
    interrupted = False
    try:
        run(options, results, bench)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: the same again goes on", file=sys.stderr)
    print(reporting.terminal(results))
    print("written:", *(f"  {file}" for file in (results.path, *reporting.write(results))), sep="\n")
    # A call that one of ours does not serve is a row like any other; a model that we cannot patch is a defect.
    ours = [row for row in results if row["ours"] and row["error"]]
    failed = [row for row in ours if row["error"].startswith("wrong") or row["pass"] == STEP]
    for row in failed:
        print(f"{row['peer']} FAILED: {row['case']}, {row['pass']}: {row['error']}", file=sys.stderr)
    return 130 if interrupted else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
