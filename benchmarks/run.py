"""Measures flash_attend beside its peers on this machine, and writes a table, JSON, a markdown report and plots.

    python benchmarks/run.py                 the standard grid (on a CPU: a small one)
    python benchmarks/run.py --quick         a few cases, without the peers that are slow to start
    python benchmarks/run.py --only 'key padding: d64 causal' --peers flash_attend 'sdpa*'

No time is taken of a result that is wrong: output and gradients of every peer are first checked against float64. What a
peer cannot do is a row too, with its error. An interrupted run keeps what it measured, and `--resume` goes on.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import report
from cases import BOTH, DETERMINISTIC, FORWARD, Case, Inputs, make_inputs, select_cases
from first_call import measure_first_calls
from gate import Check, Gate
from measure import (
    Function,
    Stopwatch,
    captured,
    ceilings,
    clocks,
    device_name,
    environment,
    first_line,
    host_microseconds,
    interleave,
    numerics,
    peak_bytes,
    rounded,
    stopwatch_for,
    summarise,
    synchronize,
)
from peers import Peer, Unserved, peers_for
from results import Results, Row, results_folder
from work import Work, work_of

__all__ = ["Bench", "main"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """How long and how often."""

    rounds: int
    milliseconds: float  # of one peer in one round, at most about
    thorough: bool = True  # also time CUDA graphs and, on a GPU, everybody's first calls
    every_case: bool = True  # peers that compile anew for each case take part in all cases and passes


PLANS = {
    "cpu": Plan(3, 60.0, thorough=False),
    "quick": Plan(3, 20.0, thorough=False),
    "standard": Plan(5, 50.0, every_case=False),
    "full": Plan(7, 50.0),
}


@dataclass(frozen=True)
class Candidate:
    """A peer at one case: what it computes with, and whether it may be timed."""

    peer: Peer
    attend: Attention | None
    check: Check  # its error is also what the peer raised


def make_pass(name: str, attend: Attention, inputs: Inputs) -> Function:
    """One pass of a call as a function without arguments; for a backward alone the forward runs here, once."""
    leaves = inputs.q, inputs.k, inputs.v
    if name == FORWARD:
        return torch.no_grad()(partial(attend, *leaves))
    if name == BOTH:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, inputs.grad_out)
    return partial(torch.autograd.grad, attend(*leaves), leaves, inputs.grad_out, retain_graph=True)


def admit(peer: Peer, inputs: Inputs, gate: Callable[[bool], Gate]) -> Candidate:
    """Prepares a peer and checks what it computes, by a gate with or without dropout.

    What a peer's own dropout keeps is not known: it is judged without.
    """
    dropout = inputs.case.dropout_p > 0
    try:
        attend = peer.prepare(inputs)
        if peer.judged_whole or not dropout:
            return Candidate(peer, attend, gate(dropout).judge(attend, whole=peer.judged_whole))
        plain = gate(False)
        check = plain.judge(peer.prepare(plain.inputs), whole=False)
        return Candidate(peer, attend, replace(check, checked=f"{check.checked}, without dropout"))
    except Exception as error:  # whatever stops a peer is what its rows say
        synchronize(inputs.q.device)  # unless it took the device with it, which ends the run
        return Candidate(peer, None, Check(None, None, "", _reason(error)))


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, Unserved) else first_line(error)


class Bench:
    """A run: every case, and in it every peer, right first and then timed in turn."""

    def __init__(
        self, results: Results, device: torch.device, peers: list[Peer], plan: Plan, stopwatch: Stopwatch
    ) -> None:
        self.results, self.device, self.peers, self.plan, self.stopwatch = results, device, peers, plan, stopwatch

    def missing(self, case: Case) -> list[tuple[str, Peer]]:
        """The passes and peers of a case that have no row yet."""
        wanted = ((name, peer) for name in case.passes for peer in self.peers if self._takes_part(peer, case, name))
        return [(name, peer) for name, peer in wanted if (case.name, name, peer.name) not in self.results]

    def _takes_part(self, peer: Peer, case: Case, name: str) -> bool:
        """Whoever compiles anew for each case, and for deterministic passes once more, does it only for the core."""
        return self.plan.every_case or peer.compiles != "each case" or (case.core and name != DETERMINISTIC)

    def measure(self, case: Case, progress: Callable[[int, str], object]) -> None:
        """Adds the rows of a case that are missing; `progress` hears how many rows came, and what comes next."""
        missing = self.missing(case)
        inputs = make_inputs(case, self.device)
        work = work_of(inputs)

        @cache
        def gate(dropout: bool) -> Gate:
            try:
                return Gate(inputs if dropout else replace(inputs, case=replace(case, dropout_p=0.0)))
            except torch.OutOfMemoryError as error:
                raise RuntimeError("not checked, and so not timed: the check does not fit into memory") from error

        for deterministic in (False, True):
            turn = [name for name in case.passes if (name == DETERMINISTIC) == deterministic]
            peers = [peer for peer in self.peers if any((name, peer) in missing for name in turn)]
            with numerics(case.dtype, deterministic):
                candidates = []
                for peer in peers:
                    progress(0, f"{case.name}: checking {peer.name}")
                    candidates.append(admit(peer, inputs, gate))
                for name in turn:
                    progress(0, f"{case.name}: {name}")
                    wanted = [candidate for candidate in candidates if (name, candidate.peer) in missing]
                    self._measure_pass(name, inputs, work[name], wanted)
                    progress(len(wanted), case.name)

    def _measure_pass(self, name: str, inputs: Inputs, work: Work, candidates: list[Candidate]) -> None:
        """Adds the rows of one pass of a case: candidates one by one, then all that can run in turn."""
        case = inputs.case
        rows: dict[str, Row] = {}
        functions: dict[str, Function] = {}
        for candidate in candidates:
            peer, check = candidate.peer, candidate.check
            row = Row(
                case=case.name,
                group=case.group,
                pass_=name,
                dtype=case.dtype,
                mask=case.mask_words,
                shape=case.shape,
                peer=peer.name,
                rel_error=check.rel_error,
                budget_used=check.budget_used,
                checked=check.checked,
                error=check.error,
            )
            if not row.error:
                try:
                    make = partial(make_pass, name, candidate.attend, inputs)
                    functions[peer.name] = function = make()
                    row = replace(row, **self._measure_beside(case, peer, name, function, make))
                except Exception as error:
                    synchronize(self.device)
                    functions.pop(peer.name, None)
                    row = replace(row, error=_reason(error))
            rows[peer.name] = row
        try:
            samples = interleave(
                functions, self.stopwatch, rounds=self.plan.rounds, milliseconds=self.plan.milliseconds
            )
        except torch.OutOfMemoryError as error:  # each of them ran alone
            rows |= {name: replace(rows[name], error=f"beside the others: {_reason(error)}") for name in functions}
            samples = {}
        for peer_name, taken in samples.items():
            rows[peer_name] = replace(rows[peer_name], **self._numbers(case, work, taken))
        for row in rows.values():
            self.results.add(row)

    def _numbers(self, case: Case, work: Work, taken: list[list[float]]) -> dict[str, Any]:
        """What the samples of a pass say."""
        found = summarise(taken)
        limits = self.results.header["ceilings"]
        ceiling = limits["tflops"].get(case.dtype)
        least = None if ceiling is None else work.least_milliseconds(ceiling, limits["copy_gbps"])
        return dict(
            ms_median=rounded(found.median),
            ms_iqr=rounded(found.iqr),
            ms_rounds=tuple(map(rounded, found.rounds)),
            tflops=rounded(work.tflops(found.median)),
            ceiling_share=None if least is None else rounded(least / found.median),
            samples=tuple(tuple(map(rounded, samples)) for samples in taken),
        )

    def _measure_beside(
        self, case: Case, peer: Peer, name: str, function: Function, make: Callable[[], Function]
    ) -> dict[str, Any]:
        """What is measured of a pass beside its time."""
        function()  # compiles, and fills the allocator
        numbers = {"peak_bytes": peak_bytes(function, self.device)}
        if self.plan.thorough and self.device.type == "cuda":
            try:
                times = self.stopwatch.sample(captured(make), self.plan.milliseconds)
                numbers["ms_kernels"] = rounded(summarise([times]).median)
            except RuntimeError:  # what waits for the device cannot be captured, and has no such time
                synchronize(self.device)
        if case.overhead:
            host_us = host_microseconds(function, self.device)
            numbers["host_us"] = None if host_us is None else rounded(host_us)
            if name == BOTH and (peer.judged_whole or self.plan.thorough):
                numbers["first_call_s"] = tuple(map(rounded, measure_first_calls(case, peer, self.device)))
        return numbers


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="preset", action="store_const", const="quick", help="the fewest cases")
    size.add_argument("--full", dest="preset", action="store_const", const="full", help="every case, more rounds")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose group and name contain all the words")
    parser.add_argument("--peers", nargs="+", default=[], metavar="PATTERN", help="peers whose name matches, with * ?")
    parser.add_argument("--list", action="store_true", help="print the cases and the peers, and measure nothing")
    parser.add_argument("--device", type=torch.device, help="default: the GPU if there is one")
    parser.add_argument("--rounds", type=int, help="turns of every peer, default by the grid's size")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no case after so many; --resume goes on")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/<device>/<grid>.json"
    )
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="go on with an unfinished run of this file")
    begin.add_argument("--restart", action="store_true", help="drop an unfinished run of this file")
    options = parser.parse_args(arguments)
    if options.device is None:
        options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device.type not in ("cuda", "cpu"):
        parser.error(f"--device must be a CUDA device or cpu, got {options.device}")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.device.type == "cpu" and options.preset:
        parser.error(f"--{options.preset} is for GPUs; on a CPU there is one small grid")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.out is not None and options.out.suffix != ".json":
        parser.error(f"--out must be the path of a .json file, got {options.out}")
    options.preset = options.preset or ("standard" if options.device.type == "cuda" else "cpu")
    options.cases = select_cases(options.preset, options.only)
    if not options.cases:
        parser.error(f"no case of the {options.preset} grid contains {options.only!r}; --list prints them")
    try:
        options.chosen_peers = peers_for(options.device, options.peers, quick=options.preset == "quick")
    except ValueError as error:
        parser.error(str(error))
    return options


def list_everything(options: argparse.Namespace) -> None:
    """Prints what would be measured."""
    print(f"{len(options.cases)} cases of the {options.preset} grid:")
    for group, cases in groupby(options.cases, key=lambda case: case.group):
        print(f"  {group}")
        for case in cases:
            print(f"    {case.name:<58}{', '.join(case.passes)}")
    print("peers:")
    for peer in options.chosen_peers:
        print(f"  {peer.name:<28}{peer.about}")


def open_results(options: argparse.Namespace, path: Path) -> Results:
    """A new file of results, or the unfinished one to go on with."""
    asked = {"preset": options.preset, "only": options.only, "peers": options.peers}
    header = environment(options.device) | asked | {"complete": False}
    if path.exists():
        earlier = Results.load(path)
        unfinished = not earlier.header["complete"]
        if unfinished and options.resume:
            if differences := earlier.differences(header):
                raise SystemExit(
                    f"{path} was measured elsewhere, and cannot be gone on with:\n" + "\n".join(differences)
                )
            return earlier
        if unfinished and not options.restart:
            raise SystemExit(f"{path} holds an unfinished run: --resume goes on, --restart drops it")
    if options.resume:
        raise SystemExit(f"there is no unfinished run at {path}")
    return Results(path, header)


def run(options: argparse.Namespace, results: Results, bench: Bench) -> bool:
    """Measures what is missing. Returns whether nothing is missing any more; an interruption goes through, saved."""
    results.header["ceilings"] = ceilings(options.device, bench.stopwatch)
    results.header["clocks_before"] = clocks(options.device)
    stop = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    cases = [case for case in options.cases if bench.missing(case)]
    total = sum(len(bench.missing(case)) for case in cases)
    try:
        with tqdm(total=total, unit="row", smoothing=0.1, file=sys.stderr, disable=None) as bar:

            def progress(rows: int, text: str) -> None:
                bar.set_postfix_str(text, refresh=not rows)
                bar.update(rows)

            for case in cases:
                if stop is not None and time.monotonic() > stop:
                    return False
                bench.measure(case, progress)
                results.save()
                gc.collect()
                torch.cuda.empty_cache()
        results.header["complete"] = True
        return True
    finally:
        results.header["ended"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        results.header["clocks_after"] = clocks(options.device)
        results.save()


def main(arguments: list[str] | None = None, stopwatch: Stopwatch | None = None) -> int:
    """0, or 1 where a result of flash_attend's own is wrong, or 130 after an interruption."""
    options = parse(arguments)
    if options.list:
        list_everything(options)
        return 0
    # cuBLAS is deterministic only with a workspace of its own, which it must know when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    warnings.filterwarnings("ignore", message=".*sdp_kernel.*")  # what the models' own flash paths call is deprecated
    path = options.out or results_folder(device_name(options.device)) / f"{options.preset}.json"
    results = open_results(options, path)
    if options.device.type == "cpu":
        print("no GPU: a small grid on the CPU, where flash_attend's einsum path serves and its kernels do not run")
    plan = PLANS[options.preset]
    plan = plan if options.rounds is None else replace(plan, rounds=options.rounds)
    bench = Bench(results, options.device, options.chosen_peers, plan, stopwatch or stopwatch_for(options.device))
    interrupted = False
    try:
        if not run(options, results, bench):
            print(f"stopped after {options.minutes:g} minutes: --resume goes on", file=sys.stderr)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: --resume goes on", file=sys.stderr)

    print(report.terminal_table(results))
    written = report.write(results)
    print("written:", *(f"  {file}" for file in (path, *written)), sep="\n")
    ours = {peer.name for peer in options.chosen_peers if peer.judged_whole}
    wrong = [row for row in results if row.peer in ours and row.error.startswith("wrong")]
    for row in wrong:
        print(f"{row.peer} is WRONG: {row.case}, {row.pass_}: {row.error}", file=sys.stderr)
    return 130 if interrupted else 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
