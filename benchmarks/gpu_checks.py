"""What `validate.py` proves beside the test suite: random calls, the same bits under load, and calls for a sanitizer.

    python benchmarks/gpu_checks.py environment
    python benchmarks/gpu_checks.py random --backend triton --first 0 --count 100 --out FILE.json
    python benchmarks/gpu_checks.py repeats --backend triton
    python benchmarks/gpu_checks.py twins --backend hopper
    compute-sanitizer python benchmarks/gpu_checks.py sanitized --backend triton      (or: overrun, which must be found)

Each check is about one backend, and makes those of its calls that the dispatcher lets this backend serve. It prints
`FAILED: ...` for what is wrong, and a summary in its last line; the exit code is 1 if anything is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from cases import DTYPES
from flash_attend.__main__ import REPRESENTATIVE, report
from flash_attend.checks import normalise_inputs
from flash_attend.dispatch import (
    BACKENDS,
    LARGEST_ACCURATE_HEAD_DIM,
    LARGEST_HEAD_DIM,
    BackendUnavailable,
    choose,
)
from flash_attend.kernels.launch import recorded_launches
from flash_attend.spec import AttentionSpec
from flash_attend.target import DeviceTarget
from flash_attend.testing.calls import LAYOUTS, MASKS, Call, Case, assert_same_bits, budget_of, check, make_call, run
from flash_attend.testing.oracle import Answer
from measure import device_name, first_line, numerics
from results import write_results

__all__ = ["PACKAGES", "SANITIZED", "draw_call", "judge_seed", "reproduce", "run_shares", "serves", "spec_of"]

FAILED = "FAILED: "

# What the stages need beside torch and Triton, as they are imported, and the name to install each by.
PACKAGES = {
    "pytest": "pytest",
    "xdist": "pytest-xdist",
    "hypothesis": "hypothesis",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "complex_valued_transformer": "complex-valued-transformer",
}


def report_environment() -> int:
    """Prints what a reader of the results has to know; 1 where the kernels do not serve a usual call."""
    print(report())
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        print(subprocess.run([tool], capture_output=True, text=True, timeout=60).stdout)
    for distribution in PACKAGES.values():
        try:
            found = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        print(f"{distribution:<28}{found}")
    print(f"{'compute-sanitizer':<28}{shutil.which('compute-sanitizer') or 'not installed'}")
    try:
        choose(REPRESENTATIVE, DeviceTarget.of(torch.device("cuda")), "triton")
    except ValueError as refusal:
        print(f"{FAILED}{refusal}")
        return 1
    print(f"{device_name(torch.device('cuda'))}, torch {torch.__version__}, Triton {triton.__version__}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Which calls are for which backend
# ---------------------------------------------------------------------------------------------------------------------

# A part on which every backend serves something: what is drawn for a backend must not depend on where it is drawn.
EVERYTHING = DeviceTarget("cuda", capability=(9, 0), triton=triton.__version__)


def spec_of(case: Case, dtype: str, deterministic: bool = False) -> AttentionSpec:
    """A call as the dispatcher knows it. `dtype` is a key of `cases.DTYPES`."""
    with numerics(dtype, deterministic), torch.device("meta"):
        call = make_call(case, DTYPES[dtype][0], "meta")
        return normalise_inputs(call.q, call.k, call.v, **call.options)[-1]


def serves(backend: str, case: Case, dtype: str, deterministic: bool = False) -> bool:
    """Whether a backend serves a call, on a part that it is for."""
    try:
        choose(spec_of(case, dtype, deterministic), EVERYTHING, backend)
    except BackendUnavailable:
        return False
    return True


@cache
def _repertoire(backend: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
    """The dtypes, the masks and the head dims that a backend serves, each for itself."""
    usual = Case("usual", batch=1, heads=1, queries=2, keys=3, d=64)
    dtypes = tuple(dtype for dtype in DTYPES if serves(backend, usual, dtype))
    masks = tuple(mask for mask in sorted(MASKS) if serves(backend, replace(usual, mask=mask), "float16"))
    dims = range(1, LARGEST_HEAD_DIM + 1)
    return dtypes, masks, tuple(dim for dim in dims if serves(backend, replace(usual, d=dim), "float16"))


# ---------------------------------------------------------------------------------------------------------------------
# Random calls
# ---------------------------------------------------------------------------------------------------------------------

# Where all keys are alike, all roundings are, and no norm of an error is steady: the test suite has such calls.
LAYOUT_NAMES = sorted(set(LAYOUTS) - {"broadcast_length"})


def draw_call(seed: int, backend: str) -> tuple[Case, str]:
    """A call that a backend serves, and how `cases.DTYPES` names its dtype: a pure function of seed and backend.

    Dtypes take turns, and so do the masks of each dtype, so that few seeds already meet all of them.
    """
    chance = random.Random(seed)
    dtypes, masks, dims = _repertoire(backend)
    dtype = dtypes[seed % len(dtypes)]
    mask = masks[seed // len(dtypes) % len(masks)]
    while True:
        case = _draw_case(chance, f"seed {seed}", dtype, mask, dims)
        if serves(backend, case, dtype):
            return case, dtype


def _draw_case(chance: random.Random, name: str, dtype: str, mask: str, dims: Sequence[int]) -> Case:
    accurate = dtype in ("float32", "float64")
    # The budget is what PyTorch's own products err by, and of small or odd ones TF32 computes none.
    shortest, step = (64, 8) if dtype == "tf32" else (1, 1)

    def length() -> int:
        return max(shortest, chance.choice((chance.randint(0, 40), chance.randint(1, 300), chance.randint(200, 900))))

    def dim() -> int:
        largest = LARGEST_ACCURATE_HEAD_DIM if accurate else LARGEST_HEAD_DIM
        usual = (16, 32, 40, 64, 64, 80, 96, 128, 128, 160, 192, 256)
        drawn = chance.choice((chance.choice(usual), chance.randint(1, largest)))
        return min(each for each in dims if each >= min(largest, -(-drawn // step) * step))

    kv_heads, group = chance.randint(1, 3), chance.choice((1, 1, 2, 4))
    d = dim()
    return Case(
        name,
        batch=chance.randint(1, 3),
        heads=kv_heads * group,
        kv_heads=0 if kv_heads == 1 and chance.random() < 0.5 else kv_heads,
        queries=length(),
        keys=length(),
        d=d,
        dv=chance.choice((d, d, dim())),
        mask=mask,
        causal=chance.random() < 0.5,
        scale=chance.choice((None, None, None, -0.3, 1 / 8, 0.0)),
        dropout_p=chance.choice((0.0, 0.0, 0.1, 0.5)),
        layout=chance.choice(LAYOUT_NAMES),
        grad_layout=chance.choice(LAYOUT_NAMES),
        grads=chance.choice(("both", "both", "out", "lse")),
    )


def _in_words(case: Case, dtype: str) -> str:
    """Everything about a call that is not as usual."""
    usual = Case("")
    names = ("batch", "heads", "kv_heads", "queries", "keys", "d", "dv")
    options = ("mask", "causal", "scale", "dropout_p", "layout", "grad_layout", "grads")
    told = [f"{name}={getattr(case, name)}" for name in names]
    told += [f"{name}={getattr(case, name)}" for name in options if getattr(case, name) != getattr(usual, name)]
    return " ".join([dtype, *told])


def judge_seed(seed: int, backend: str, device: str) -> dict[str, Any]:
    """Makes the call of a seed and judges output, LSE and gradients: what `run_shares` keeps of it.

    `used` is the share of the error budget that each result took, `error` what is wrong, empty where nothing is.
    Whatever but a wrong result is raised by the call goes through.
    """
    case, dtype = draw_call(seed, backend)
    row: dict[str, Any] = dict(seed=seed, call=_in_words(case, dtype), used={}, error="")
    with numerics(dtype):
        call = make_call(case, DTYPES[dtype][0], device, seed)
        try:
            row["used"] = check(run(call, backend), call)
        except AssertionError as wrong:
            row["error"] = first_line(wrong)
    return row


def reproduce(seed: int, backend: str, device: str = "cuda") -> int:
    """Makes the call of one seed and prints what was found; 1 if it is wrong. Errors go through, with their trace."""
    row = judge_seed(seed, backend, device)
    print(row["call"])
    print("shares of the error budget:", ", ".join(f"{name} {share:.2f}" for name, share in row["used"].items()))
    if row["error"]:
        print(f"{FAILED}seed {seed}: {row['error']}")
    return int(bool(row["error"]))


def judge_seeds(seeds: Sequence[int], backend: str) -> int:
    """Prints a line of JSON for each seed. Ends at the first error that is raised: a fault on the device spoils what
    comes after it."""
    for seed in seeds:
        try:
            row = judge_seed(seed, backend, "cuda")
        except Exception as error:
            row = dict(seed=seed, call=_in_words(*draw_call(seed, backend)), used={}, error=first_line(error))
            print(json.dumps(row), flush=True)
            return 1
        print(json.dumps(row), flush=True)
    return 0


def _share_command(seeds: Sequence[int], backend: str) -> list[str]:
    return [sys.executable, __file__, "seeds", "--backend", backend, *map(str, seeds)]


def _run_share(
    seeds: Sequence[int], backend: str, command: Callable[[Sequence[int], str], list[str]]
) -> Iterator[dict[str, Any]]:
    """The rows of some seeds, from as many processes in a row as it takes: one that ends early has a successor."""
    waiting = list(seeds)
    while waiting:
        process = subprocess.Popen(command(waiting, backend), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, complaint = process.communicate()
        rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        yield from rows
        waiting = waiting[len(rows) :]
        if waiting and (process.returncode == 0 or not (rows and rows[-1]["error"])):
            said = next(reversed(complaint.strip().splitlines()), "")
            error = f"the process ended with {process.returncode}: {said}"
            yield dict(seed=waiting[0], call=_in_words(*draw_call(waiting[0], backend)), used={}, error=error)
            waiting = waiting[1:]


def run_shares(
    seeds: Sequence[int], jobs: int, backend: str, command: Callable[[Sequence[int], str], list[str]] = _share_command
) -> list[dict[str, Any]]:
    """The rows of all seeds, in order, computed by so many processes at a time: most of the time is compilation."""

    def share(first: int) -> list[dict[str, Any]]:
        rows = []
        for row in _run_share(seeds[first::jobs], backend, command):
            print(f"seed {row['seed']}: {row['error'] or 'right'}", flush=True)
            rows.append(row)
        return rows

    with ThreadPoolExecutor(jobs) as pool:
        found = [row for rows in pool.map(share, range(min(jobs, len(seeds)))) for row in rows]
    return sorted(found, key=lambda row: row["seed"])


def summarise_random(rows: Sequence[dict[str, Any]], backend: str) -> int:
    """Prints the largest share of the budget of each result, and every failure with how to see it again."""
    wrong = [row for row in rows if row["error"]]
    for row in wrong:
        again = f"python benchmarks/validate.py --reproduce {row['seed']} --backend {backend}"
        print(f"{FAILED}{again}: {row['error']} ({row['call']})")
    names = dict.fromkeys(name for row in rows for name in row["used"])
    shares = {name: max(row["used"].get(name, 0.0) for row in rows) for name in names}
    told = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    print(f"{len(rows) - len(wrong)} of {len(rows)} right; largest share of the budget: {told}")
    return int(bool(wrong))


# ---------------------------------------------------------------------------------------------------------------------
# The same bits, while another stream keeps the device busy
# ---------------------------------------------------------------------------------------------------------------------

REPEATS = 50
REPEATED = (
    Case("plain", heads=4, queries=512, keys=512, d=64),
    Case("causal", heads=4, queries=1024, keys=1024, d=128, causal=True),
    Case("grouped and padded", heads=8, kv_heads=2, queries=300, keys=700, d=64, mask="holes", causal=True),
    Case("dense", queries=500, keys=500, d=80, mask="bhij"),
    Case("dropout", queries=500, keys=500, d=64, dropout_p=0.3, causal=True),
    Case("wide", heads=4, queries=500, keys=600, d=256, causal=True),
)


class Load:
    """Work on a stream of its own: products for the multiprocessors, copies for the memory."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.a, self.b, self.product = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        torch.cuda.synchronize()

    def add(self) -> torch.cuda.Event:
        """Queues some tens of milliseconds of work; the event is its end."""
        with torch.cuda.stream(self.stream):
            for _ in range(8):
                torch.mm(self.a, self.b, out=self.product)
                self.b.copy_(self.a)
            return self.stream.record_event()


def repeat_calls(backend: str) -> int:
    """Prints what is not the same every time: the forward as it is, the whole call when it is to be deterministic.

    Where it cannot be, its gradients have to be within the error budget every time.
    """
    # cuBLAS is deterministic only with a workspace of its own, which it must know when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    load = Load()
    failures = overlapping = total = 0
    for case in REPEATED:
        for dtype in ("float16", "bfloat16", "float32"):
            if not serves(backend, case, dtype):
                continue
            repeatable = serves(backend, case, dtype, deterministic=True)
            for deterministic in (False, True) if repeatable else (False,):
                with numerics(dtype, deterministic):
                    call = make_call(case, DTYPES[dtype][0], "cuda")
                    budget = None if repeatable else budget_of(call)
                    needs = "qkv" if deterministic or budget else ""
                    first = _forward_alone(run(call, backend, needs)) if budget else run(call, backend, needs)
                    try:
                        for _ in range(REPEATS):
                            loaded = load.add()
                            again = run(call, backend, needs)
                            torch.cuda.current_stream().synchronize()
                            overlapping += not loaded.query()
                            total += 1
                            if budget:
                                budget.check(again)
                                again = _forward_alone(again)
                            assert_same_bits(again, first)
                    except AssertionError as wrong:
                        failures += 1
                        what = "forward and backward" if needs else "forward"
                        print(f"{FAILED}{case}, {dtype}, {what}: {first_line(wrong)}")
                    torch.cuda.synchronize()
    if overlapping < total / 2 or not total:
        failures += 1
        print(f"{FAILED}only {overlapping} of {total} calls ran beside other work, so little was shown")
    print(f"{failures} failures; {overlapping} of {total} calls ran while another stream was busy")
    return int(bool(failures))


def _forward_alone(answer: Answer) -> Answer:
    return replace(answer, dq=None, dk=None, dv=None)


# ---------------------------------------------------------------------------------------------------------------------
# A kernel for one part beside the one for all of them
# ---------------------------------------------------------------------------------------------------------------------

# Long enough that every program has many blocks and, where programs are persistent, several tiles.
TWINS = (
    Case("plain", batch=2, heads=4, queries=2048, keys=2048),
    Case("causal", batch=2, heads=4, queries=2048, keys=2048, causal=True),
    Case("ragged", batch=1, heads=4, queries=1999, keys=2111, causal=True),
    Case("dead rows", batch=1, heads=4, queries=1500, keys=700, causal=True),
    Case("grouped", batch=1, heads=8, kv_heads=2, queries=1024, keys=2048, causal=True),
    Case("padded", batch=3, heads=2, queries=2048, keys=2048, mask="pad_right", causal=True),
    Case("padded left", batch=3, heads=2, queries=1024, keys=2048, mask="pad_left"),
    Case("holes", batch=2, heads=4, kv_heads=2, queries=1500, keys=1500, mask="holes", causal=True),
)


def _kernels_of(call: Call, backend: str) -> set[str]:
    """The names of the kernels that a call would launch."""
    with recorded_launches() as launches:
        run(call, backend)
    return {launch.prepared.kernel.__name__ for launch in launches}


def compare_twins(backend: str) -> int:
    """Makes the same calls by Gluon kernels and by the plain ones, and prints how much of the error budget each of them
    used: 1 where one is wrong, or where no kernel was another."""
    twin = backend.replace("hopper", "triton")
    failures, own, most = 0, set(), 0.0
    for case in TWINS:
        for dim in (64, 128, 256):
            for dtype in ("float16", "bfloat16"):
                wide = replace(case, d=dim)
                if not serves(backend, wide, dtype):
                    continue
                call = make_call(wide, DTYPES[dtype][0], "cuda")
                budget, told = budget_of(call), {}
                for name in (backend, twin):
                    try:
                        used = budget.check(run(call, name))
                        told[name] = " ".join(f"{result} {share:.2f}" for result, share in used.items())
                        most = max(most, *used.values())
                    except AssertionError as wrong:
                        failures += 1
                        told[name] = "WRONG"
                        print(f"{FAILED}{case}, d {dim}, {dtype}, {name}: {first_line(wrong)}")
                print(f"{case}, d {dim}, {dtype}: " + "; ".join(f"{name} {text}" for name, text in told.items()))
                own |= _kernels_of(call, backend) - _kernels_of(call, twin)
    if not own:
        failures += 1
        print(f"{FAILED}{backend} launched the kernels of {twin} and no others")
    print(
        f"{failures} failures; at most {most:.2f} of the budget; kernels of {backend} alone: {', '.join(sorted(own))}"
    )
    return int(bool(failures))


# ---------------------------------------------------------------------------------------------------------------------
# For compute-sanitizer
# ---------------------------------------------------------------------------------------------------------------------

# Small: a sanitizer slows a kernel down a hundredfold. Together they launch every kernel, in each kind of product, with
# edge tiles and full ones, one and two parts of a head dimension.
SANITIZED = (
    (Case("plain", batch=1, heads=1, queries=70, keys=150, d=64), "float16"),
    (Case("causal", batch=1, heads=2, queries=150, keys=150, d=64, causal=True), "bfloat16"),
    (Case("padded", heads=2, kv_heads=1, queries=70, keys=150, d=64, mask="holes", causal=True), "float16"),
    (Case("dense", heads=1, queries=70, keys=150, d=64, mask="bhij"), "bfloat16"),
    (Case("dense dropout", heads=1, queries=70, keys=150, d=64, mask="bhij", dropout_p=0.2), "float16"),
    (Case("padded dropout", heads=1, queries=70, keys=150, d=128, mask="pad_left", dropout_p=0.2), "bfloat16"),
    (Case("two parts", batch=1, heads=1, queries=70, keys=90, d=80, dv=40, causal=True), "float16"),
    (Case("d128", batch=1, heads=1, queries=140, keys=140, d=128, causal=True), "bfloat16"),
    (Case("d128 padded", heads=2, kv_heads=1, queries=140, keys=300, d=128, mask="holes"), "float16"),
    (Case("d256", batch=1, heads=1, queries=70, keys=70, d=256, causal=True), "float16"),
    (Case("d256 padded", heads=1, queries=140, keys=150, d=256, mask="pad_left", causal=True), "bfloat16"),
    (Case("strided", batch=1, heads=2, queries=70, keys=90, d=33, layout="interleaved", mask="strided"), "float16"),
    (Case("tf32", heads=1, queries=70, keys=90, d=64, mask="pad_right", causal=True), "tf32"),
    (Case("accurate", heads=1, queries=70, keys=90, d=128, mask="pad_right", causal=True), "float32"),
    (Case("double", heads=1, queries=40, keys=50, d=64, mask="pad_right", causal=True), "float64"),
)


def sanitized_calls(backend: str) -> list[tuple[Case, str]]:
    """Those of `SANITIZED` that a backend serves."""
    return [(case, dtype) for case, dtype in SANITIZED if serves(backend, case, dtype)]


def run_sanitized(backend: str) -> int:
    """Makes the small calls. Their results are judged elsewhere: here a sanitizer watches."""
    kernels: set[str] = set()
    chosen = sanitized_calls(backend)
    for case, dtype in chosen:
        with numerics(dtype):
            call = make_call(case, DTYPES[dtype][0], "cuda")
            names = _kernels_of(call, backend)
            print(f"{case} {dtype}: {', '.join(sorted(names))}", flush=True)
            run(call, backend)
            torch.cuda.synchronize()
            kernels |= names
    print(f"{len(chosen)} calls ran: {', '.join(sorted(kernels))}")
    return 0


@triton.jit
def _overrunning_kernel(pointer, distance):
    tl.store(pointer + distance, 1.0)


def overrun() -> int:
    """Writes past the end of a tensor: a sanitizer that does not see this sees nothing."""
    tensor = torch.zeros(1, device="cuda")
    _overrunning_kernel[(1,)](tensor, 1000)
    torch.cuda.synchronize()
    print("wrote past the end of a tensor")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    checks = parser.add_subparsers(dest="check", required=True)
    plain = {"environment": report_environment, "overrun": overrun}
    about = {"repeats": repeat_calls, "twins": compare_twins, "sanitized": run_sanitized}
    for name, function in (plain | about).items():
        checks.add_parser(name, help=next(iter((function.__doc__ or "").splitlines())))
    seeds = checks.add_parser("seeds", help="random calls by seed, one after the other, a line of JSON each")
    seeds.add_argument("seeds", nargs="+", type=int)
    calls = checks.add_parser("random", help="random calls, many at a time")
    calls.add_argument("--first", type=int, required=True, metavar="SEED")
    calls.add_argument("--count", type=int, required=True)
    calls.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    calls.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    for name in (*about, "seeds", "random"):
        backends = [backend for backend in BACKENDS if backend.startswith("hopper") or name != "twins"]
        checks.choices[name].add_argument("--backend", required=True, choices=backends)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch sees no GPU, and these checks need one", file=sys.stderr)
        return 2
    if options.check in plain:
        return plain[options.check]()
    if options.check == "seeds":
        return judge_seeds(options.seeds, options.backend)
    if options.check == "random":
        rows = run_shares(range(options.first, options.first + options.count), options.jobs, options.backend)
        write_results(options.out, {"device": device_name(torch.device("cuda"))}, "rows", rows)
        return summarise_random(rows, options.backend)
    return about[options.check](options.backend)


if __name__ == "__main__":
    sys.exit(main())
