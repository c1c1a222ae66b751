"""Looks for a better tile for one kernel in one kind of call, and proposes a row for `kernels/configs.py`.

    python benchmarks/tune.py --kernel forward --dim 128 --mode causal               for the GPU at hand, and on it
    python benchmarks/tune.py --kernel forward --dim 128 --mode causal --arch sm_90  compiles only, measures nothing
    python benchmarks/tune.py --backend hopper_fused --kernel backward_fused --dim 128

Every tile of `SPACES` goes as far as it can: arithmetic throws out what can fit neither in registers nor in shared
memory; ahead-of-time compilation what spills, takes too much shared memory, misses the tensor cores or serializes its
products; the gate, on the GPU, what computes a wrong output or gradient; the clock decides among the rest.

What is timed is the one kernel: its launch is recorded within a whole call and repeated on the tensors of that call,
because a gain of 5% in one of four kernels drowns in the spread of all of them. A tile can cost elsewhere, though: the
blocks of a mask's schedule are as large as the largest tile of them all. So the winner must also not slow the whole
call, all kernels of forward and backward, beyond the spread. And it must compile in every case that its row serves.
Its speed there is not measured: tune a row for the case that matters most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cases import DTYPES, TOKENS, WIDTH, Case, Inputs, make_inputs
from flash_attend import flash_attention
from flash_attend.dispatch import BACKENDS, choose
from flash_attend.kernels import aot
from flash_attend.kernels.configs import (
    ARCHS,
    HOPPER_ROWS,
    ROWS,
    VARIANTS,
    Tile,
    Tiles,
    head_parts,
    mode_of,
    override,
    row_of,
    select_tiles,
)
from flash_attend.kernels.launch import Launch, launch, recorded_launches
from flash_attend.spec import AttentionSpec, MaskKind, kind_of
from flash_attend.target import DeviceTarget, interpreting
from gate import Check, Gate
from measure import (
    Function,
    Statistics,
    Stopwatch,
    clocks,
    device_name,
    environment,
    interleave,
    numerics,
    rounded,
    stopwatch_for,
    summarise,
    synchronize,
)
from results import ROOT as RESULTS
from results import results_folder, write_results

__all__ = ["Candidate", "Question", "Tuning", "main"]

ROOT = RESULTS.parent.parent

# The tiles that are looked at. Sides up to 128: positions have 32 bits, with room for one schedule block past the end.
# What is not named here is as in the current tile.
SPACE = dict(block_m=(16, 32, 64, 128), block_n=(16, 32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3, 4))
# Gluon kernels fix the side that their consumers share, their warps and their buffers.
SPACES: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("hopper", "forward"): dict(block_n=(32, 64, 128), ping_pong=(False, True)),
    ("hopper", "backward_kv"): dict(block_m=(32, 64, 128)),
    ("hopper", "backward_q"): dict(block_n=(32, 64, 128)),
    ("hopper", "backward_fused"): dict(block_m=(32, 64, 128)),
}

# How float32 products are computed where a case's dtype is one of these; the others have one way.
PRECISIONS = {"tf32": "tf32", "float32": "tf32x3"}
# The words of `--mode`, as `aot.Case.mode` has them, and what they make of a case.
MODES = {
    "key": dict(mask="right", valid=0.5),
    "dense": dict(mask="documents", valid=0.25),
    "causal": dict(causal=True),
    "dropout": dict(dropout_p=0.1),
    "grouped": {},  # four query heads to a key head
}
# The fields of `Tiles` that count for a backend, by whether its backward is fused; and the kernels that each may be the
# tile of, as aot.py names them: of those that a call launches, the first.
KERNELS = {False: ("forward", "backward_kv", "backward_q"), True: ("forward", "backward_fused")}
LAUNCHED = {
    "forward": ("hopper_forward", "forward"),
    "backward_kv": ("hopper_backward", "hopper_backward_wide", "backward_kv"),
    "backward_q": ("hopper_backward_q", "backward_q"),
    "backward_fused": ("hopper_backward_fused", "hopper_backward_wide_fused", "backward_fused"),
}
CONSUMERS = 2  # warpgroups that share the tile of a Gluon kernel
GLUON_WARPS = 12  # of a program, producers counted

ROUNDS, MILLISECONDS = 5, 50.0  # of every tile in turn, and about how long in a round
TURN = 4  # tiles that are timed in turn with the current one: each holds outputs and gradients of its own


# ---------------------------------------------------------------------------------------------------------------------
# What is asked, and what is known of each tile
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Which tile is best for one kernel, in one kind of call, on one part?"""

    arch: str  # of `aot.PARTS`
    kernel: str  # of `KERNELS`
    case: Case  # the call that is measured
    backend: str = "triton"

    @cached_property
    def spec(self) -> AttentionSpec:
        """The call as the kernels know it."""
        case = self.case
        kinds = {"none": MaskKind.NONE, "documents": MaskKind.DENSE}
        return AttentionSpec(
            batch=case.batch,
            heads=case.heads,
            kv_heads=case.kv_heads,
            queries=case.queries,
            keys=case.keys,
            head_dim=case.head_dim,
            value_dim=case.value_dim,
            mask=kinds.get(case.mask, MaskKind.KEY),
            causal=case.causal,
            scale=case.head_dim**-0.5,
            dropout_p=case.dropout_p,
            dtype=DTYPES[case.dtype][0],
            precision=PRECISIONS.get(case.dtype, "ieee"),
        )

    @property
    def target(self) -> DeviceTarget:
        return aot.PARTS[self.arch]

    @property
    def gluon(self) -> bool:
        """Whether the kernel is one for Hopper alone: the backends for Hopper launch others too."""
        return self.launched.startswith("hopper")

    @cached_property
    def tiles(self) -> Tiles:
        """What the table holds today: the row to beat."""
        return select_tiles(self.spec, self.target, self.backend)

    @property
    def current(self) -> Tile:
        return self._tile_of(self.tiles)

    @cached_property
    def launched(self) -> str:
        """The name of the kernel that has the tile in question, among those that the call launches."""
        names = {aot.kernel_name(one) for one in aot.record_call(self.spec, self.tiles, self.backend)}
        return next(name for name in LAUNCHED[self.kernel] if name in names)

    def tiles_with(self, tile: Tile, tiles: Tiles | None = None) -> Tiles:
        """The row (default: the current one) with another tile for the kernel in question."""
        return (tiles or self.tiles)._replace(**{self.kernel: tile})

    @property
    def mode(self) -> str:
        return aot.Case(self.arch, self.spec, self.tiles, self.backend).mode

    @property
    def name(self) -> str:
        """For a file: `sm_90-triton-forward-bfloat16-d128-key+causal-s4096`."""
        case = self.case
        dims = f"d{case.head_dim}" if case.head_dim == case.value_dim else f"d{case.head_dim}-dv{case.value_dim}"
        return f"{self.arch}-{self.backend}-{self.kernel}-{case.dtype}-{dims}-{self.mode}-s{case.queries}"

    @property
    def row(self) -> tuple:
        """The key of the proposed row: of `ROWS`, with a fourth part of `VARIANTS`, or ("sm_90", "hopper", d)."""
        return self._row_of(self.spec)

    def _row_of(self, spec: AttentionSpec) -> tuple:
        if self.gluon:  # a row for each head dim, which names the tiles of Gluon kernels alone
            return self.arch, "hopper", spec.head_dim
        mode = mode_of(spec)
        return (self.arch, *row_of(spec), *([mode] if mode else []))

    @property
    def whole_row(self) -> Tiles:
        """What the table holds today of all kernels, whether this backend launches them or not."""
        if self.gluon:
            return HOPPER_ROWS[self.spec.head_dim]
        if self.arch not in ARCHS:
            return self.tiles
        return VARIANTS.get(self.row) or ROWS[self.row[:3]]

    def served(self) -> list[aot.Case]:
        """The calls of the ahead-of-time table that the proposed row would serve, as this backend makes them.

        Of a row that is there today, those that have its tile; of a new variant, those in its mode.
        """
        hopper = self.backend.startswith("hopper")
        specs = dict.fromkeys(
            case.spec for case in aot.cases([self.arch]) if case.backend.startswith("hopper") == hopper
        )
        found = []
        for spec in specs:
            tiles = select_tiles(spec, self.target, self.backend)
            row, variant = self._row_of(spec), len(self.row) > 3
            if row[: len(self.row)] == self.row and (variant or self._tile_of(tiles) == self.current):
                found.append(aot.Case(self.arch, spec, tiles, self.backend))
        return found

    def _tile_of(self, tiles: Tiles) -> Tile:
        return getattr(tiles, self.kernel)

    def as_json(self) -> dict[str, Any]:
        return {
            "arch": self.arch,
            "backend": self.backend,
            "kernel": self.kernel,
            "dtype": self.case.dtype,
            "mode": self.mode,
            "call": self.case.name,
            "row": list(self.row),
            "tiles": {name: list(tile) for name, tile in self.tiles._asdict().items() if tile is not None},
        }


@dataclass(frozen=True)
class Candidate:
    """A tile, and what became of it so far. None: it has not come so far."""

    tile: Tile
    pruned: str = ""  # why arithmetic throws it out
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    problems: tuple[str, ...] | None = None  # what ahead-of-time compilation found
    error: str = ""  # what it raised on the device, or "wrong: ..."
    rel_error: float | None = None  # of output and gradients against float64, in the 2-norm
    samples: tuple[tuple[float, ...], ...] | None = None  # of the kernel, in milliseconds, by round
    current_samples: tuple[tuple[float, ...], ...] | None = None  # of the current tile, taken in the same turns
    refused: str = ""  # why it is not proposed though it is faster

    @property
    def survives(self) -> bool:
        """Whether it compiled, and well."""
        return self.problems == ()

    @property
    def measured(self) -> bool:
        return self.samples is not None

    def times(self) -> tuple[Statistics, Statistics]:
        """Of this tile and of the current one. Only where it is measured."""
        return summarise(self.samples), summarise(self.current_samples)

    def ratio(self) -> float:
        """Its time over that of the current tile."""
        own, current = self.times()
        return own.median / current.median

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(loaded: dict[str, Any]) -> Candidate:
        """The candidate that `as_json` gave."""
        values = dict(loaded, tile=Tile(*loaded["tile"]))
        if values["problems"] is not None:
            values["problems"] = tuple(values["problems"])
        for name in ("samples", "current_samples"):
            if values[name] is not None:
                values[name] = tuple(tuple(taken) for taken in values[name])
        return Candidate(**values)


def label(tile: Tile) -> str:
    """`128x64 w8 s3`: queries, keys, warps, stages, and the names of what else is on."""
    options = [name for name in Tile._field_defaults if getattr(tile, name)]
    return " ".join([f"{tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages}", *options])


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------

# Both bounds were at most what Triton 3.7.1 takes, in each of 260 compilations of all kernels and kinds for sm_80 and
# sm_90: what they throw out cannot work. The margins are for versions that do with less.
SHARED_MARGIN = 0.9  # of the bound on shared memory counts
LARGEST_SUMS = 255 - 48  # of a thread's 255 registers, what is no sum and no score took at least 57


def tile_sizes(question: Question, tile: Tile) -> tuple[int, int, int]:
    """Of one tile, in elements: the operands that stay, the operands that a step of the loop loads, and what is summed
    or scored in registers at once."""
    kind = kind_of(question.spec)
    d, dv = (sum(head_parts(dim, kind)) for dim in (question.spec.head_dim, question.spec.value_dim))
    queries, keys = tile.block_m, tile.block_n
    pairs = queries * keys
    return {
        "forward": (queries * d, keys * (d + dv), queries * dv + pairs),
        "backward_kv": (keys * (d + dv), queries * (d + dv), keys * (d + dv) + 2 * pairs),
        "backward_q": (queries * (d + dv), keys * (d + dv), queries * d + 2 * pairs),
        "backward_fused": (keys * (d + dv), queries * (d + dv), keys * (d + dv) + 2 * pairs),
    }[question.kernel]


def least_shared_bytes(question: Question, tile: Tile) -> int:
    """The operands that stay, and those of the steps that are under way while one computes.

    In the backward of wider dtypes no step counts: which operands are loaded ahead there is up to the compiler.
    """
    stay, loaded, _ = tile_sizes(question, tile)
    size = question.spec.dtype.itemsize
    pipelined = question.kernel == "forward" or size == 2
    return size * (stay + (tile.num_stages - 1) * loaded * pipelined)


def least_registers(question: Question, tile: Tile) -> int:
    """What each thread holds of the sums and the scores."""
    *_, summed = tile_sizes(question, tile)
    words = question.spec.accumulator_dtype.itemsize // 4
    return words * summed // (32 * tile.num_warps * (CONSUMERS if question.gluon else 1))


def why_pruned(question: Question, tile: Tile) -> str:
    """Why a tile cannot work, in one line that starts with what it lacks; empty where it may."""
    registers = least_registers(question, tile)
    if registers > LARGEST_SUMS:
        return f"registers: sums and scores alone take {registers} of a thread's 255"
    shared, limit = least_shared_bytes(question, tile), question.target.shared_memory
    if SHARED_MARGIN * shared > limit:
        return f"shared memory: at least {shared} bytes, the part has {limit}"
    return ""


def loaded_per_pair(question: Question, tile: Tile) -> float:
    """Bytes that the main loop loads for each pair of a query and a key."""
    _, loaded, _ = tile_sizes(question, tile)
    return question.spec.dtype.itemsize * loaded / (tile.block_m * tile.block_n)


def resident_warps(question: Question, candidate: Candidate) -> int:
    """Warps that a multiprocessor holds at once, by the registers and the shared memory that were compiled.

    It has 65536 registers, given out to a thread by eights, and 1 KB more shared memory than one block may use; every
    block takes 1 KB for the system (CUDA programming guide, compute capabilities 8.0 to 12.0).
    """
    warps = GLUON_WARPS if question.gluon else candidate.tile.num_warps
    by_registers = 65536 // (32 * warps * 8 * math.ceil(candidate.registers / 8))
    by_shared = (question.target.shared_memory + 1024) // (candidate.shared_bytes + 1024)
    return warps * min(by_registers, by_shared)


def enumerate_tiles(question: Question) -> list[Candidate]:
    """The current tile, then all of its space: those that load least for a pair first, and there the larger ones."""
    current = question.current
    named = SPACES["hopper", question.kernel] if question.gluon else SPACE
    choices = (named.get(name, (getattr(current, name),)) for name in Tile._fields)
    space = [Tile(*sizes) for sizes in itertools.product(*choices)]
    space.sort(key=lambda tile: (loaded_per_pair(question, tile), -tile.block_m * tile.block_n))
    rest = [Candidate(tile, why_pruned(question, tile)) for tile in space if tile != current]
    return [Candidate(current), *rest]


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------

PASSING = ("started", "clocks_before", "clocks_after", "proposal")  # what may differ between the parts of one run


class Tuning:
    """Every candidate of a question, and the file that is written anew as each of them gets further."""

    def __init__(self, question: Question, path: Path, header: dict[str, Any]) -> None:
        self.question, self.path = question, path
        self.header = header | {"question": question.as_json()}
        self.candidates = {candidate.tile: candidate for candidate in enumerate_tiles(question)}

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.candidates.values())

    def update(self, candidate: Candidate) -> None:
        """Keeps what became of a candidate, in the file too."""
        self.candidates[candidate.tile] = candidate
        self.save()

    def considered(self, limit: int | None) -> list[Candidate]:
        """The current tile and the first `limit` of the others that arithmetic leaves."""
        current, *rest = (candidate for candidate in self if not candidate.pruned)
        return [current, *rest[:limit]]

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        write_results(self.path, self.header, "candidates", (candidate.as_json() for candidate in self))

    def resume(self) -> None:
        """Takes over what the file holds. Raises `ValueError` where it holds the answers to another question, or those
        of another environment."""
        try:
            loaded = json.loads(self.path.read_text(encoding="utf-8"))
            header = loaded["header"]
            candidates = [Candidate.from_json(candidate) for candidate in loaded["candidates"]]
            names = (header.keys() | self.header.keys()) - set(PASSING)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} does not hold a tuning of this version: {error!r}") from error
        different = [
            f"{name}: {header.get(name)!r}, now {self.header.get(name)!r}"
            for name in sorted(names)
            if header.get(name) != self.header.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.path} was made of something else, and cannot be gone on with:\n" + "\n".join(different)
            )
        self.candidates |= {candidate.tile: candidate for candidate in candidates if candidate.tile in self.candidates}


# ---------------------------------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------------------------------


def compile_candidates(tuning: Tuning, limit: int | None, jobs: int | None) -> None:
    """Compiles what has not been, for the part of the question."""
    question = tuning.question
    waiting = [candidate for candidate in tuning.considered(limit) if candidate.problems is None]
    if not waiting:
        return
    tasks = [
        (
            aot.Case(question.arch, question.spec, question.tiles_with(candidate.tile), question.backend),
            (question.launched,),
        )
        for candidate in waiting
    ]
    for index, (report,) in aot.compile_tasks(tasks, jobs):
        tuning.update(
            replace(
                waiting[index],
                registers=report.registers,
                spill_bytes=report.spill_bytes,
                shared_bytes=report.shared_bytes,
                problems=tuple(report.problems()),
            )
        )


def problems_elsewhere(question: Question, tile: Tile, jobs: int | None) -> list[str]:
    """What is wrong with a tile in the other calls that its row serves."""
    tasks = [
        (replace(case, tiles=question.tiles_with(tile, case.tiles)), (question.launched,)) for case in question.served()
    ]
    found = sorted(aot.compile_tasks(tasks, jobs))
    return [f"{report.config}: {problem}" for _, (report,) in found for problem in report.problems()]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A row of tiles on the device: whether it is right, and what can be timed where it is."""

    check: Check
    kernel: Function  # the kernel in question, again and again on the same tensors
    call: Function  # every kernel of the forward and the backward, in their order


def repeat(launches: list[Launch]) -> None:
    """Runs recorded launches."""
    for one in launches:
        launch(one.prepared, *one.tensors)


def admit(question: Question, tiles: Tiles, inputs: Inputs, gate: Gate) -> Trial:
    """Checks a row of tiles by the public call, and records that call to repeat it. Whatever it raises goes through."""
    case = question.case

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with override(tiles):
            return flash_attention(
                q, k, v, mask=inputs.mask, causal=case.causal, dropout_p=case.dropout_p, backend=question.backend
            )

    check = gate.judge(attend, whole=True)
    leaves = inputs.q, inputs.k, inputs.v
    with recorded_launches() as launches:
        torch.autograd.grad(attend(*leaves), leaves, inputs.grad_out)
    repeat(launches)  # in order, once: the kernel's inputs are what the kernels before it wrote
    own = [one for one in launches if aot.kernel_name(one) == question.launched]
    return Trial(check, partial(repeat, own), partial(repeat, launches))


class Bench:
    """The device: what is right there, and how long it takes."""

    def __init__(self, question: Question, device: torch.device, stopwatch: Stopwatch) -> None:
        self.question, self.device, self.stopwatch = question, device, stopwatch
        self.inputs = make_inputs(question.case, device)
        self.gate = Gate(self.inputs)
        self.current = self.trial(question.current)
        if not self.current.check.passed:
            raise RuntimeError(f"the current tile {label(question.current)} is {self.current.check.error}")

    def trial(self, tile: Tile) -> Trial:
        """A tile in its row, checked."""
        with numerics(self.question.case.dtype):
            return admit(self.question, self.question.tiles_with(tile), self.inputs, self.gate)

    def in_turn(self, functions: dict[str, Function]) -> dict[str, tuple[tuple[float, ...], ...]]:
        """The samples of functions, interleaved."""
        taken = interleave(functions, self.stopwatch, rounds=ROUNDS, milliseconds=MILLISECONDS)
        return {name: tuple(tuple(map(rounded, taken)) for taken in samples) for name, samples in taken.items()}

    def measure(self, candidates: list[Candidate]) -> list[Candidate]:
        """Checks candidates and times those that are right, in turn with the current tile."""
        checked, trials = [], {}
        for candidate in candidates:
            try:
                trial = self.trial(candidate.tile)
                checked.append(replace(candidate, error=trial.check.error, rel_error=trial.check.rel_error))
                if trial.check.passed:
                    trials[label(candidate.tile)] = trial
            except Exception as error:  # whatever stops a tile is what its record says
                checked.append(replace(candidate, error=f"{type(error).__name__}: {error}"))
                self.current.kernel()
                synchronize(self.device)  # a device that is past use raises here, before it is held against others
        if not trials:
            return checked
        taken = self.in_turn({"current": self.current.kernel, **{name: trial.kernel for name, trial in trials.items()}})
        return [
            replace(candidate, samples=taken[label(candidate.tile)], current_samples=taken["current"])
            if label(candidate.tile) in trials
            else candidate
            for candidate in checked
        ]

    def compare_calls(self, tile: Tile) -> tuple[Statistics, Statistics]:
        """The whole call, forward and backward, with a tile and with the current one."""
        taken = self.in_turn({"tile": self.trial(tile).call, "current": self.current.call})
        return summarise(taken["tile"]), summarise(taken["current"])


def measure_candidates(tuning: Tuning, bench: Bench, limit: int | None) -> None:
    """Measures what compiled well and has not been measured."""
    current = tuning.question.current
    waiting = [
        candidate
        for candidate in tuning.considered(limit)
        if candidate.survives and not candidate.measured and not candidate.error and candidate.tile != current
    ]
    with tqdm(total=len(waiting), unit="tile", desc="measuring", file=sys.stderr, disable=None) as progress:
        for first in range(0, len(waiting), TURN):
            for candidate in bench.measure(waiting[first : first + TURN]):
                tuning.update(candidate)
                progress.update()


# ---------------------------------------------------------------------------------------------------------------------
# Proposing
# ---------------------------------------------------------------------------------------------------------------------


def spread(*statistics: Statistics) -> float:
    """The widest of the quartile ranges and of the ranges of the rounds, in milliseconds."""
    return max(max(one.iqr, max(one.rounds) - min(one.rounds)) for one in statistics)


def _tile_source(tile: Tile) -> str:
    """`Tile(128, 64, 8, 2)`, without what is as by default."""
    values = list(tile)
    while len(values) > len(Tile._fields) - len(Tile._field_defaults) and not values[-1]:
        values.pop()
    return f"Tile({', '.join(map(str, values))})"


def row_source(question: Question, tile: Tile) -> str:
    """The row with a tile, as configs.py has it."""
    key = f"({', '.join(json.dumps(part) for part in question.row)})"
    if question.gluon:
        key = str(question.spec.head_dim)
    elif question.kernel == "backward_fused":  # stands in a table of its own
        return f"    {key}: {_tile_source(tile)},"
    tiles = question.tiles_with(tile, question.whole_row)
    listed = ", ".join(_tile_source(each) for each in tiles if each is not None)
    source = f"    {key}: Tiles({listed}),"
    return source if len(source) <= 120 else f"    {key}: Tiles(\n        {listed}\n    ),"


def table_of(question: Question) -> str:
    """The name of the table that the row is for."""
    if question.gluon:
        return "HOPPER_ROWS"
    variant = len(question.row) > 3
    if question.kernel == "backward_fused":
        return "FUSED_VARIANTS" if variant else "FUSED"
    return "VARIANTS" if variant else "ROWS"


def measured_source(question: Question, path: Path) -> str:
    """The line of `MEASURED` for the row."""
    where = path.resolve()
    shown = where.relative_to(ROOT).as_posix() if where.is_relative_to(ROOT) else str(path)
    return f"    ({', '.join(json.dumps(part) for part in question.row)}): {json.dumps(shown)},"


def proposal_source(tuning: Tuning, candidate: Candidate, call: tuple[Statistics, Statistics]) -> str:
    """The row with its evidence above it, as it could stand in configs.py."""
    question, header = tuning.question, tuning.header
    own, current = candidate.times()
    commit = str(header["commit"])[:10] + (" with changes" if header["dirty"] else "")
    lines = [
        f"# {question.kernel} {label(candidate.tile)}: {own.median:.4g} ms, before ({label(question.current)}) "
        f"{current.median:.4g} ms, spread {spread(own, current):.2g} ms.",
        f"# Whole call: {call[0].median:.4g} ms, before {call[1].median:.4g} ms, spread {spread(*call):.2g} ms.",
        f"# {question.case.name} on {header['device']}, Triton {header['triton']}, torch {header['torch']},",
        f"# {header['started'][:10]}, commit {commit}.",
    ]
    return "\n".join([*("    " + line for line in lines), row_source(question, candidate.tile)])


def propose(
    tuning: Tuning,
    compare_calls: Callable[[Tile], tuple[Statistics, Statistics]],
    elsewhere: Callable[[Tile], list[str]],
) -> str:
    """The source of the fastest row that may stand in the table; empty where none is faster beyond the spread."""
    faster = sorted((candidate for candidate in tuning if candidate.measured), key=Candidate.ratio)
    for candidate in faster:
        own, current = candidate.times()
        if candidate.refused or current.median - own.median <= spread(own, current):
            continue
        if problems := elsewhere(candidate.tile):
            tuning.update(replace(candidate, refused="; ".join(problems)))
            continue
        whole, whole_before = call = compare_calls(candidate.tile)
        if whole.median - whole_before.median > spread(*call):
            slower = f"the whole call takes {whole.median:.4g} ms, before {whole_before.median:.4g} ms"
            tuning.update(replace(candidate, refused=slower))
            continue
        return proposal_source(tuning, candidate, call)
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def what_was_pruned(tuning: Tuning) -> str:
    """How far the candidates came, in one line."""
    counts = Counter(candidate.pruned.partition(":")[0] for candidate in tuning if candidate.pruned)
    pruned = ", ".join(f"{number} by {reason}" for reason, number in sorted(counts.items())) or "none"
    compiled = [candidate for candidate in tuning if candidate.problems is not None]
    survivors = sum(candidate.survives for candidate in compiled)
    return (
        f"{len(tuning.candidates)} tiles; thrown out by arithmetic: {pruned}; compiled: {len(compiled)}, of which "
        f"{survivors} without a problem"
    )


def table(tuning: Tuning) -> str:
    """What compiled, one line each: those measured by time, then the survivors, then the rest and why."""
    question = tuning.question
    compiled = [candidate for candidate in tuning if candidate.problems is not None]

    def order(candidate: Candidate) -> tuple:
        first = candidate.ratio() if candidate.measured else math.inf
        if not candidate.survives:
            return first, True, 0.0, 0
        return first, False, loaded_per_pair(question, candidate.tile), -resident_warps(question, candidate)

    lines = [f"{'tile':<16}{'registers':>10}{'shared':>9}{'warps':>7}{'B/pair':>8}{'ms':>10}{'of current':>12}"]
    for candidate in sorted(compiled, key=order):
        warps = str(resident_warps(question, candidate)) if candidate.survives else ""
        numbers = f"{candidate.registers:>10}{candidate.shared_bytes:>9}{warps:>7}"
        ms = f"{candidate.times()[0].median:>10.4g}{candidate.ratio():>12.3f}" if candidate.measured else " " * 22
        notes = ["the current tile"] if candidate.tile == question.current else []
        notes += [*candidate.problems, *filter(None, (candidate.error, candidate.refused))]
        loaded = f"{loaded_per_pair(question, candidate.tile):>8.3g}"
        lines.append(f"{label(candidate.tile):<16}{numbers}{loaded}{ms}  {'; '.join(notes)}".rstrip())
    return "\n".join(lines)


def make_question(options: argparse.Namespace, arch: str) -> Question:
    """The question that the options ask. Raises `ValueError` where there is no such call."""
    words = [word for word in options.mode.split("+") if word != "plain"]
    unknown = [word for word in words if word not in MODES]
    if unknown:
        raise ValueError(f"--mode is plain or words of {', '.join(MODES)} joined by +, got {options.mode!r}")
    backend = options.backend or ("triton_fused" if options.kernel == "backward_fused" else "triton")
    if options.kernel not in KERNELS[backend.endswith("_fused")]:
        raise ValueError(f"{backend} launches no {options.kernel}")
    if {"key", "dense"} <= set(words):
        raise ValueError("--mode: a mask is key or dense, not both")
    value_dim = options.dim if options.value_dim is None else options.value_dim
    for name, size in (("--dim", options.dim), ("--value-dim", value_dim), ("--length", options.length)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    ratio = 4 if "grouped" in words else 1
    heads = max(1, WIDTH // options.dim // ratio) * ratio
    rest = {name: value for word in words for name, value in MODES[word].items()}
    case = Case(
        batch=max(1, TOKENS // options.length),
        heads=heads,
        kv_heads=heads // ratio,
        queries=options.length,
        keys=options.length,
        head_dim=options.dim,
        value_dim=value_dim,
        dtype=options.dtype,
        **rest,
    )
    question = Question(arch, options.kernel, case, backend)
    choose(question.spec, question.target, backend)  # raises where the kernels do not serve the call
    if question.current is None:
        raise ValueError(f"the row of such calls has no tile for {options.kernel}")
    return question


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kernel", required=True, choices=LAUNCHED)
    parser.add_argument(
        "--backend",
        choices=[backend for backend in BACKENDS if backend != "math"],
        help="whose kernel; default triton, or triton_fused for backward_fused",
    )
    parser.add_argument("--dim", required=True, type=int, metavar="D", help="head dimension of q and k")
    parser.add_argument("--value-dim", type=int, metavar="DV", help="head dimension of v, default that of q and k")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="float32 is the accurate mode (3xTF32)")
    parser.add_argument(
        "--mode", default="plain", metavar="WORDS", help=f"plain, or of {', '.join(MODES)}, joined by +"
    )
    parser.add_argument("--length", type=int, default=4096, metavar="N", help="queries and keys, default 4096")
    parser.add_argument("--arch", choices=aot.PARTS, help="compile for this part, with no GPU, and measure nothing")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N tiles beside the current one")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that compile, default one for each core")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: benchmarks/results/<device>")
    parser.add_argument("--resume", action="store_true", help="go on with the file of an earlier run")
    options = parser.parse_args(arguments)
    for name, number in (("--limit", options.limit), ("--jobs", options.jobs)):
        if number is not None and number < 1:
            parser.error(f"{name} must be at least 1, got {number}")
    if interpreting():
        parser.error("TRITON_INTERPRET is set: nothing can be compiled in this process")
    options.device = torch.device("cpu")
    arch = options.arch
    if arch is None:
        if not torch.cuda.is_available():
            parser.error("torch sees no GPU; to compile without one, name the part: --arch " + " | ".join(aot.PARTS))
        options.device = torch.device("cuda", torch.cuda.current_device())
        arch = DeviceTarget.of(options.device).arch
        if arch not in aot.PARTS:
            parser.error(f"the GPU is {arch or 'none of NVIDIA'}; ahead of time is known {', '.join(aot.PARTS)}")
    try:
        options.question = make_question(options, arch)
    except ValueError as error:
        parser.error(str(error))
    folder = options.out or results_folder(options.arch or device_name(options.device))
    options.path = folder / f"tune-{options.question.name}.json"
    exists = options.path.exists()
    if exists and not options.resume:
        parser.error(f"{options.path} exists: --resume goes on with it, --out names another folder")
    if options.resume and not exists:
        parser.error(f"{options.path} is not there to resume")
    return options


def main(arguments: list[str] | None = None, stopwatch: Stopwatch | None = None) -> int:
    """0, or 130 after an interruption: what is known by then is in the file."""
    options = parse(arguments)
    question = options.question
    tuning = Tuning(question, options.path, environment(options.device))
    if options.resume:
        try:
            tuning.resume()
        except ValueError as error:
            raise SystemExit(str(error)) from None
    tuning.save()
    try:
        compile_candidates(tuning, options.limit, options.jobs)
        proposal = None if options.arch else find_row(tuning, options, stopwatch or stopwatch_for(options.device))
    except KeyboardInterrupt:
        print(f"interrupted: --resume goes on with {options.path}", file=sys.stderr)
        return 130
    print(f"{question.name} on Triton {tuning.header['triton']}: {what_was_pruned(tuning)}")
    print(table(tuning))
    if proposal is None:
        print(
            "Nothing was measured: survivors are in the order of what the main loop loads for a pair, and of the warps "
            "that a multiprocessor holds. That foretells no speed."
        )
    elif proposal:
        print(f"For {table_of(question)} in kernels/configs.py:\n{proposal}")
        print(f"And, once {options.path.name} is committed, for MEASURED:\n{measured_source(question, options.path)}")
        if question.arch not in ARCHS:
            print(f"{question.arch} takes the rows of sm_80 until the table has all of its own.")
    else:
        print("No row is proposed: none is faster beyond the spread and right in all that its row serves.")
    print(f"written: {options.path}")
    return 0


def find_row(tuning: Tuning, options: argparse.Namespace, stopwatch: Stopwatch) -> str:
    """Measures on the device, and keeps the proposal in the file too."""
    question = tuning.question
    tuning.header["clocks_before"] = clocks(options.device)
    bench = Bench(question, options.device, stopwatch)
    measure_candidates(tuning, bench, options.limit)
    proposal = propose(tuning, bench.compare_calls, lambda tile: problems_elsewhere(question, tile, options.jobs))
    tuning.header |= {"clocks_after": clocks(options.device), "proposal": proposal}
    tuning.save()
    return proposal


if __name__ == "__main__":
    sys.exit(main())
