"""Estimates: our kernels beside FlexAttention's and jvp_flash_attention's, what windows save, and how fast few queries
read a cache."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from flash_attend.kernels.aot import KINDS, Case, compile_case, compile_tasks, spec_of
from flash_attend.kernels.configs import Tiles, key_splits
from flash_attend.kernels.estimate import PRODUCTS, RATES, Estimate, Kernel, Reading, reading, total_tflops
from flash_attend.spec import MaskKind

__all__ = ["Row", "blocks_visited", "print_decoding", "print_estimates", "print_windowed", "rows"]

# Not part of the package: peers need more than we do.
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PEERS = {"forward": "flex_templates", "backward": "flex_templates", "tangents": "jvp_kernels"}  # by the direction
DIMS = (64, 96, 128, 192, 256)
KERNELS = {
    "forward": ("forward",),
    "backward": ("backward_kv", "backward_k", "backward_v", "backward_q"),
    "tangents": ("tangents",),
}
LEAST_SHARE = 0.85  # of the speed of a copy, at which a cache of 256 MB is to be read
HEADER = ("call", "tiles", "TFLOP/s", "spills", "the peer's tiles", "TFLOP/s", "spills", "ratio")


@dataclass(frozen=True)
class Row:
    """A causal call, d = dv, in one direction on one part; "tangents" are a forward with those of q, k and v."""

    arch: str
    kind: str
    dim: int
    direction: str

    def __str__(self) -> str:
        return f"{self.direction} {self.arch} {self.kind} d{self.dim}"


@dataclass(frozen=True)
class Side:
    """What one of the two makes of a row; nothing where its kernels do not compile or do not fit."""

    tiles: str
    estimates: dict[str, Estimate]

    @property
    def tflops(self) -> float:
        """Of a forward, of one with tangents, or of a backward: five products, of which two kernels do seven."""
        return total_tflops(self.estimates) if self.estimates else 0.0

    @property
    def spills(self) -> str:
        """Share of the main loops' instructions."""
        return "/".join(f"{one.spill_share:.0%}" for one in self.estimates.values())


def rows(archs: Iterable[str]) -> list[Row]:
    """All rows of the table, on parts whose rates are known."""
    known = [arch for arch in archs if arch in RATES]
    return [Row(*row) for row in product(known, ("half", "tf32"), DIMS, KERNELS)]


def measure(row: Row, peer: bool) -> Side:
    """Compiles one side of a row and reads it."""
    try:
        return _measure_peer(row) if peer else _measure_ours(row)
    except MemoryError as error:
        return Side(f"does not fit: {error}", {})
    except Exception as error:  # a finding about one row, not the end of the table
        text = str(error).strip().splitlines() or [""]
        return Side(f"{type(error).__name__}: {text[-1][:120]}", {})


def _measure_ours(row: Row) -> Side:
    call, _ = KINDS[row.kind]
    of = Case.with_tangents if row.direction == "tangents" else Case.of
    reports = compile_case(of(row.arch, spec_of((row.dim, row.dim), causal=True, **call)), KERNELS[row.direction])
    if errors := [report.error for report in reports if report.error]:
        return Side(errors[0], {})
    tiles = ", ".join(" ".join(report.config.split()[-3:]) for report in reports)
    return Side(tiles, {report.kernel: report.estimate for report in reports if report.estimate})


def _measure_peer(row: Row) -> Side:
    name = PEERS[row.direction]
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Side(*module.peer_estimates(row.direction, row.arch, row.kind, row.dim))


def compare(chosen: list[Row], jobs: int | None = None) -> Iterator[tuple[Row, Side, Side]]:
    """Both sides of rows, in their order."""
    tasks = [(row, peer) for row in chosen for peer in (False, True)]
    sides = dict(compile_tasks(tasks, jobs, measure))
    for index, row in enumerate(chosen):
        yield row, sides[2 * index], sides[2 * index + 1]


def blocks_visited(length: int, window: int | None, block_m: int, block_n: int) -> int:
    """How many tiles of a causal call of so many queries and keys hold a pair that a window, of so many keys before
    each query's own, lets meet."""
    total = 0
    for first in range(0, length, block_m):
        last = min(first + block_m, length) - 1
        begin = 0 if window is None else max(first - window, 0) // block_n
        total += last // block_n + 1 - begin
    return total


def _measure_window(row: Row, length: int, window: int | None) -> tuple[int, float]:
    """The tiles that the kernels of a row visit in one head, and how many microseconds of a whole part that takes."""
    call, _ = KINDS[row.kind]
    shape = dict(queries=length, keys=length, causal=True, window=(window, None))
    case = Case.of(row.arch, spec_of((row.dim, row.dim), **shape, **call))
    tiles, seconds = 0, 0.0
    for report in compile_case(case, KERNELS[row.direction]):
        if report.estimate is None:
            raise RuntimeError(report.error or f"{report.kernel}: there is no estimate")
        tile = getattr(case.tiles, report.kernel if report.kernel in Tiles._fields else "backward_kv")
        visited = blocks_visited(length, window, tile.block_m, tile.block_n)
        useful = 2 * PRODUCTS[report.kernel] * tile.block_m * tile.block_n * row.dim
        tiles, seconds = tiles + visited, seconds + visited * useful / (report.estimate.tflops * 1e12)
    return tiles, 1e6 * seconds


def print_windowed(archs: Iterable[str], only: str, jobs: int | None, window: int, length: int) -> int:
    """The rows whose names contain `only`, causal and with a window beside it: tiles visited, and time for a head."""
    chosen = [row for row in rows(archs) if only in str(row) and row.direction != "tangents"]
    tasks = [(row, length, reach) for row in chosen for reach in (None, window)]
    found = dict(compile_tasks(tasks, jobs, _measure_window))
    title = f"a head of {length} positions"
    print(f"{title:<36}{'tiles':>9}{'us':>9}{'windowed':>10}{'us':>9}{'ratio':>7}")
    for index, row in enumerate(chosen):
        (tiles, time), (fewer, shorter) = found[2 * index], found[2 * index + 1]
        print(f"{row!s:<36}{tiles:>9}{time:>9.1f}{fewer:>10}{shorter:>9.1f}{time / shorter:>7.1f}")
    return 0


DECODING = list(product((64, 128, 256), (1, 32)))  # head dimensions and batches


def _measure_decoding(arch: str, dim: int, batch: int, megabytes: int) -> tuple[str, int, Reading]:
    """The tile and the keys of calls of one query with 32 heads, 8 of k and v, against so long a cache, padded; and how
    long they take."""
    call, _ = KINDS["half"]
    shape = dict(batch=batch, heads=32, kv_heads=8, queries=1, keys=megabytes * 2**20 // (batch * 8 * 4 * dim))
    case = Case.of(arch, spec_of((dim, dim), mask=MaskKind.KEY, **shape, **call))
    (report,) = compile_case(case, ("forward",))
    if report.estimate is None:
        raise RuntimeError(report.error or "there is no estimate")
    tile, spec = case.tiles.forward, case.spec
    kernel = Kernel(
        "forward", arch, "half", dim, dim, tile.block_m, tile.block_n, tile.num_warps, tile.num_stages,
        report.registers, report.shared_bytes,
    )  # fmt: skip
    splits, rows = key_splits(spec, tile), spec.batch * spec.heads
    found = reading(report.estimate, kernel, spec.batch * spec.kv_heads, spec.keys, splits, rows)
    return " ".join(report.config.split()[-3:]), spec.keys, found


def print_decoding(archs: Iterable[str], jobs: int | None, megabytes: int) -> int:
    """Calls of one query against a cache of so many MB, in markdown. The exit code is 1 unless all of them read it at
    85% of the speed of a copy."""
    chosen = [(arch, *of) for arch in archs if arch in RATES for of in DECODING]
    found = dict(compile_tasks([(*row, megabytes) for row in chosen], jobs, _measure_decoding))
    print("| part | d | b | keys | tile | splits | programs | us | of a copy |")
    print("| --- " * 9 + "|")
    for index, (arch, dim, batch) in enumerate(chosen):
        tile, keys, one = found[index]
        time = f"{1e6 * one.seconds:.0f}"
        print(
            f"| {arch} | {dim} | {batch} | {keys} | {tile} | {one.splits} | {one.programs} | {time} | {one.share:.0%} |"
        )
    return 1 if any(one.share < LEAST_SHARE for _, _, one in found.values()) else 0


def _cells(row: Row, ours: Side, peer: Side) -> tuple[str, ...]:
    ratio = f"{ours.tflops / peer.tflops:.2f}" if peer.tflops else ""
    of_sides = [(side.tiles, f"{side.tflops:.0f}", side.spills) for side in (ours, peer)]
    return (str(row), *of_sides[0], *of_sides[1], ratio)


def print_estimates(archs: Iterable[str], only: str, jobs: int | None, markdown: bool) -> int:
    """The table of the rows whose names contain `only`. The exit code is 1 unless ours is ahead in each."""
    chosen = [row for row in rows(archs) if only in str(row)]
    if not BENCHMARKS.exists():
        print(f"{BENCHMARKS} is not here: estimates need a checkout of the repository", file=sys.stderr)
        return 2
    found = list(compare(chosen, jobs))
    table = [HEADER, *(_cells(*one) for one in found)]
    if markdown:
        lines = ["| " + " | ".join(cells) + " |" for cells in table]
        lines.insert(1, "| --- " * len(HEADER) + "|")
    else:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
    print("\n".join(lines))
    behind = sum(ours.tflops <= peer.tflops for _, ours, peer in found)
    print(f"{len(found)} rows, ours behind in {behind}", file=sys.stderr)
    return 1 if behind else 0
