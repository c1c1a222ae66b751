"""Compiles the kernels of every config row for real parts, without one: registers, spills, shared memory, instructions.

    python -m flash_attend.kernels.aot [--json] [--common | --subset] [--arch sm_80 sm_90 ...] [--only TEXT] [--jobs N]
    python -m flash_attend.kernels.aot --estimate [--markdown | --window KEYS [--length N] | --cache MB] [--only TEXT]

What is compiled is what a call would compile: the launchers run on meta tensors, their launches are recorded, and
Triton itself specializes and compiles them for a driver that names the part and has no device behind it.

The exit code is 1 if any kernel of a checked part spills more in its main loop than 2% of its instructions, exceeds the
part's shared memory, lacks tensor-core instructions, has its asynchronous products serialized by the assembler,
computes a product twice, or takes 1.3 times as long for shared memory as for its products. What goes beyond that,
because the model of estimate.py finds nothing faster, is listed in reports.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from flash_attend.backends import BACKENDS, BackwardName
from flash_attend.kernels.configs import HOPPER_ROWS, ROWS, Tiles, choices_for, row_of, select_tangent_tiles
from flash_attend.kernels.estimate import PRODUCTS, RATES, Estimate, Kernel, estimate
from flash_attend.kernels.launch import Launch, recorded_launches
from flash_attend.kernels.reports import LOOPS, MULTIPLYING, PARTS, Report, as_json, as_table
from flash_attend.kernels.sass import disassemble, loop_works, product_loops
from flash_attend.operands import Operands, Tangents
from flash_attend.spec import DEAD_SEGMENTS, AttentionSpec, BiasKind, MaskKind, kind_of
from flash_attend.target import interpreting

__all__ = [
    "PARTS",
    "Case",
    "Part",
    "Report",
    "cases",
    "compile_all",
    "compile_case",
    "compile_launch",
    "compile_tasks",
    "compiled_for",
    "is_serialized",
    "kernel_name",
    "record_call",
    "spec_of",
    "with_log",
]

CHECKED = ("sm_80", "sm_90")  # parts whose rates are known
TENSOR_CORE = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.")  # in PTX
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SERIALIZED = re.compile(r"C75\d\d|serializ", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """One call to compile for one part: all its kernels."""

    arch: str
    spec: AttentionSpec
    tiles: Tiles
    backend: str = "triton"
    backward: BackwardName = "separate"
    tangents: bool = False  # of all operands, in place of a backward

    @classmethod
    def of(cls, arch: str, spec: AttentionSpec, backend: str = "triton", backward: BackwardName = "separate") -> Case:
        """With the tiles that a call takes there."""
        return cls(arch, spec, BACKENDS[backend].tiles(spec, PARTS[arch], backward), backend, backward)

    @classmethod
    def with_tangents(cls, arch: str, spec: AttentionSpec) -> Case:
        """With the tiles that a call of which tangents are taken has there."""
        return cls(arch, spec, select_tangent_tiles(spec, PARTS[arch]), tangents=True)

    def launches(self) -> list[Launch]:
        """Every launch that it makes, on meta tensors."""
        return record_call(self.spec, self.tiles, self.backend, tangents=self.tangents)

    @property
    def is_split(self) -> bool:
        """Whether its forward splits the keys over programs, which is bound by memory."""
        return self.tiles.forward.programs > 0

    @property
    def mode(self) -> str:
        spec = self.spec
        words = [{MaskKind.NONE: "", MaskKind.KEY: "key", MaskKind.DENSE: "dense"}[spec.mask]]
        words += ["causal"] * spec.causal + ["dropout"] * (spec.dropout_p > 0) + ["grouped"] * (spec.group > 1)
        words += ["window"] * (spec.window != (None, None)) + ["softcap"] * (spec.softcap > 0)
        words += ["alibi"] * spec.alibi + ["bias"] * (spec.bias is not None) + ["sinks"] * spec.sinks
        words += ["split"] * self.is_split + ["sequences"] * (spec.sequences is not None)
        return "+".join(filter(None, words)) or "plain"


class Part:
    """As much of a Triton driver as compiling takes. Triton keeps its variants by device: a part is its own device."""

    def __init__(self, arch: str) -> None:
        major, minor = PARTS[arch].capability
        self.capability = 10 * major + minor

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def compiled_for(arch: str, driver_of: type[Part] = Part) -> Iterator[None]:
    """Within this context Triton compiles for a part that need not be there."""
    driver = triton.runtime.driver
    outer = driver._active
    driver.set_active(driver_of(arch))
    try:
        yield
    finally:
        driver._active = outer


def record_call(spec: AttentionSpec, tiles: Tiles, backend: str = "triton", *, tangents: bool = False) -> list[Launch]:
    """Every launch that a forward and backward of this spec would make, or a forward with tangents, on meta tensors."""
    with torch.device("meta"):
        q = torch.empty(spec.batch, spec.heads, spec.queries, spec.head_dim, dtype=spec.dtype)
        k = torch.empty(spec.batch, spec.kv_heads, spec.keys, spec.head_dim, dtype=spec.dtype)
        v = torch.empty(spec.batch, spec.kv_heads, spec.keys, spec.value_dim, dtype=spec.dtype)
        mask = None
        if spec.mask != MaskKind.NONE:
            rows = spec.queries if spec.mask == MaskKind.DENSE else 1
            heads = spec.heads if spec.mask_per_head else 1
            mask = torch.empty(spec.batch, heads, rows, spec.keys, dtype=torch.bool)
        seed = torch.empty(1, dtype=torch.int64) if spec.dropout_p > 0 else None
        bias = None
        if spec.bias is not None:
            sizes = (spec.batch, spec.heads, spec.queries, spec.keys)
            varies = zip(sizes, spec.bias[:4], strict=True)
            bias = torch.empty([size if does else 1 for size, does in varies], dtype=spec.bias.dtype)
        slopes = torch.empty(1, spec.heads) if spec.alibi else None
        sinks = torch.empty(spec.heads) if spec.sinks else None
        others = () if bias is sinks is None else (bias is not None, sinks is not None)
        with recorded_launches() as launches:
            functions = BACKENDS[backend].load()
            segments = None
            if spec.sequences is not None:
                segments = torch.empty(spec.sequences + DEAD_SEGMENTS, 4, dtype=torch.int32)
            operands = Operands(q, k, v, mask, seed, bias, slopes, sinks, segments)
            if tangents:
                functions.tangents(operands, Tangents(q, k, v, bias, sinks), spec, tiles)
                return launches
            out, lse, kept = functions.forward(operands, spec, tiles)
            grad_out, needed = torch.empty_like(out), (True, True, True, *others)
            functions.backward(grad_out, None, operands, out, lse, kept, spec, tiles, needed)
    return launches


def compile_launch(launch: Launch):
    """Compiles a recorded launch for the part of the surrounding `compiled_for`, and gives Triton's compiled kernel."""
    prepared = launch.prepared
    return prepared.kernel.warmup(
        *prepared.hand_over(launch.tensors),
        *prepared.numbers,
        **prepared.choices,
        **prepared.options,
        grid=(prepared.programs,),
    )


def kernel_name(launch: Launch) -> str:
    """The kernel's name in the table; a fused backward has one of its own, and so has the gradient of k or v alone."""
    name = launch.prepared.kernel.__name__.removesuffix("_kernel")
    if _is_fused(launch):
        return "backward_fused" if name == "backward_kv" else f"{name}_fused"
    if name == "backward_kv":
        return name.replace("kv", "k" * launch.prepared.choices["NEEDS_K"] + "v" * launch.prepared.choices["NEEDS_V"])
    return name


def _is_fused(launch: Launch) -> bool:
    """Whether it is of the kernel that makes all gradients."""
    tensors = dict(zip(launch.prepared.kernel.arg_names, launch.tensors, strict=False))
    fused = launch.prepared.kernel.__name__ == "backward_kv_kernel" and tensors["GRAD_Q"] is not None
    return fused or bool(launch.prepared.choices.get("FUSED"))


def _config_of(launch: Launch, case: Case) -> str:
    prepared, spec = launch.prepared, case.spec
    dtype = str(spec.dtype).removeprefix("torch.") + (f"/{spec.precision}" if spec.dtype == torch.float32 else "")
    stages = f" s{prepared.num_stages}" if "STAGES" in prepared.choices else ""
    blocks = [str(prepared.choices[name]) for name in ("BLOCK_M", "BLOCK_N") if "BLOCK_N" in prepared.choices]
    tile = f" {'x'.join(blocks)} w{prepared.num_warps}{stages}" if blocks else ""
    return f"{dtype} d{spec.head_dim} dv{spec.value_dim} {case.mode}{tile}"


def _variant_of(launch: Launch) -> tuple:
    """What it has compiled, on a part."""
    prepared = launch.prepared
    dtypes = tuple(None if tensor is None else tensor.dtype for tensor in launch.tensors)
    return prepared.kernel.__name__, dtypes, str(prepared.choices), prepared.num_warps


def compile_case(case: Case, kernels: Iterable[str] | None = None) -> list[Report]:
    """Compiles the kernels of a case (all, or those named) and reads what the assembler said of them."""
    reports, compiled_already = [], set()
    for launch in case.launches():
        name, variant = kernel_name(launch), _variant_of(launch)
        if (kernels is not None and name not in kernels) or variant in compiled_already:
            continue
        compiled_already.add(variant)
        usual = case.spec.dropout_p == 0 and case.spec.mask != MaskKind.DENSE and case.spec.plain_scores
        report = Report(
            name, case.arch, _config_of(launch, case), 0, 0, 0, 0, triton.__version__,
            head_dim=case.spec.head_dim, row=(name, case.arch, *row_of(case.spec)), heavy=not usual or case.is_split,
        )  # fmt: skip
        try:
            launch.prepared.kernel.device_caches.clear()  # what this process has compiled before leaves no log
            with compiled_for(case.arch):
                compiled, log = with_log(lambda launch=launch: compile_launch(launch))
        except Exception as error:  # whatever stops a compiler is a finding about one row, not the end of the table
            text = str(error).strip().splitlines() or [""]
            reports.append(replace(report, error=f"{type(error).__name__}: {text[-1][:200]}"))
            continue
        spilled = spilled_bytes(log)
        # Of a plain kernel the modes differ in what spills, and in nothing else that is looked for in its loops.
        sass = disassemble(compiled.asm["cubin"]) if name in MULTIPLYING and (name in LOOPS or spilled or usual) else ""
        registers, serialized = int(REGISTERS.search(log).group(1)), is_serialized(log)
        reports.append(
            replace(
                report,
                registers=registers,
                spill_bytes=spilled,
                shared_bytes=compiled.metadata.shared,
                tensor_core_instructions=len(TENSOR_CORE.findall(compiled.asm["ptx"])),
                serialized=serialized,
                loops=tuple(product_loops(sass)),
                estimate=_estimate_of(case, launch, sass, registers, compiled.metadata.shared, serialized),
            )
        )
    return reports


def with_log(compile: Callable[[], Any]) -> tuple[Any, str]:
    """What a compilation gives, and what the assembler said."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = compile()
    return compiled, log.getvalue()


def spilled_bytes(log: str) -> int:
    """Stored and loaded, by the assembler's log."""
    return sum(int(stored) + int(loaded) for stored, loaded in SPILLS.findall(log))


def is_serialized(log: str) -> bool:
    """Whether the assembler says that it let asynchronous products wait for each other."""
    return bool(SERIALIZED.search(log))


def _estimate_of(
    case: Case, launch: Launch, sass: str, registers: int, shared_bytes: int, serialized: bool
) -> Estimate | None:
    """Of the main loop, which comes first: over blocks that need no mask."""
    name, spec, prepared = kernel_name(launch), case.spec, launch.prepared
    if not sass or name not in PRODUCTS or case.arch not in RATES or spec.head_dim != spec.value_dim:
        return None
    choices = prepared.choices
    kernel = Kernel(
        name, case.arch, kind_of(spec), spec.head_dim, choices["HEAD0"] + choices["HEAD1"], choices["BLOCK_M"],
        choices["BLOCK_N"], prepared.num_warps, prepared.num_stages, registers, shared_bytes, serialized,
        choices["VALUE_DIM"] / spec.value_dim,
    )  # fmt: skip
    works = loop_works(sass)
    return estimate(works[0], kernel) if works else None


# The modes that cost most registers come first; together they reach every branch of the kernels.
MODES = (
    dict(mask=MaskKind.KEY, causal=True),
    dict(mask=MaskKind.KEY, causal=True, dropout_p=0.1, kv_heads=2, mask_per_head=True),
    dict(mask=MaskKind.DENSE, kv_heads=2),
    dict(mask=MaskKind.DENSE, dropout_p=0.1, kv_heads=2),
    dict(),
)
# Windows and what changes scores, under causality: of half precision at these widths, the last one of every kind at 64.
CHANGED_WIDTHS = (64, 128)
CHANGED_MODES = (
    dict(causal=True, window=(255, None)),
    dict(causal=True, window=(255, None), softcap=30.0),
    dict(causal=True, alibi=True, sinks=True),
    dict(bias=(False, True, True, True)),
    dict(
        mask=MaskKind.KEY, causal=True, window=(255, None), softcap=30.0, alibi=True, sinks=True,
        bias=(False, True, True, True),
    ),
)  # fmt: skip
HOPPER_MODES = (
    dict(mask=MaskKind.KEY, causal=True),
    dict(mask=MaskKind.KEY),
    dict(causal=True),
    dict(),
    dict(mask=MaskKind.KEY, causal=True, window=(255, None)),
    dict(window=(255, 63), sinks=True),
    dict(causal=True, window=(255, None)),
)
# What each kind of rows is for, by one of its dtypes, and how many of the modes it is compiled in.
KINDS = {
    "half": (dict(dtype=torch.bfloat16), 5),
    "tf32": (dict(dtype=torch.float32, precision="tf32"), 3),
    "tf32x3": (dict(dtype=torch.float32, precision="tf32x3"), 3),
    "double": (dict(dtype=torch.float64), 3),
}
# Head dims in other parts, and dv != d, that share a row of the kind "half" with those as wide as the row.
OTHER_DIMS = {64: ((40, 40), (32, 64)), 96: ((80, 80),), 128: ((64, 128),), 192: ((160, 160), (192, 128))}
ALL, COMMON, SUBSET = "all", "common", "subset"  # how many of the calls are compiled
# Of each kind, where they are not all: 96, in two parts, is what other Tritons are tried on.
WIDTHS: dict[str, dict[str, tuple[int, ...]]] = {
    ALL: {},
    COMMON: {"half": (64, 128, 256), "tf32": (64,), "tf32x3": (64,), "double": (64,)},
    SUBSET: {"half": (96,), "tf32": (), "tf32x3": (), "double": ()},
}
TANGENT_WIDTHS = {COMMON: (64,), SUBSET: (96,)}  # where tangents are taken, of half precision
HEAVY_WIDTHS = (64,)  # of half precision, where COMMON has dropout and a dense mask too
# Of few queries, whose keys are split: their heads are packed. The backward is that of other calls.
SPLIT_MODE = dict(mask=MaskKind.KEY, causal=True, batch=1, heads=32, kv_heads=8, queries=4, keys=2**14)
# Of sequences that are packed, of half precision in ALL: the last at the widths of `CHANGED_MODES` alone.
PACKED_MODES = (
    dict(batch=1, sequences=16, queries=16_000, keys=16_000, causal=True),
    dict(
        batch=1, sequences=16, queries=16_000, keys=16_000, causal=True, window=(255, None), softcap=30.0, alibi=True,
        sinks=True, dropout_p=0.1, kv_heads=2,
    ),
)  # fmt: skip
OF_SPLIT = ("forward", "merge")
# Of a forward with tangents of all its operands: the first of every row, the others of half precision.
TANGENT_MODES = (MODES[0], MODES[3], CHANGED_MODES[-1])
COMPILED = ("triton", "hopper")  # each with both of its backwards


def cases(archs: Iterable[str], scope: str = ALL) -> Iterator[Case]:
    """The calls that together compile every config row of these parts, or those of a smaller scope.

    COMMON: half precision at three widths in the mode that costs most, and at one of them with dropout and with changed
    scores too; other kinds in that mode at one; the kernels for Hopper with a key mask and causality. SUBSET: for the
    last of the parts, a width of half precision, and of the kernels for Hopper all.
    """
    for arch in [*archs][-1:] if scope == SUBSET else archs:
        for kind, width in sorted({(kind, width) for _, kind, width in ROWS}):
            if width not in WIDTHS[scope].get(kind, (width,)):
                continue
            dtype, n_modes = KINDS[kind]
            heavy_too = scope == COMMON and kind == "half" and width in HEAVY_WIDTHS
            modes = MODES[:n_modes] if scope == ALL else MODES[: 4 if heavy_too else 1 : 3]
            calls = [((width, width), mode) for mode in modes]
            if kind == "half" and scope == ALL:
                calls += [(dims, MODES[0]) for dims in OTHER_DIMS.get(width, ())]
            split = [((width, width), SPLIT_MODE)] * (scope == ALL)
            packed = _packed_calls(kind, width, scope)
            for dims, mode in (*calls, *_changed_calls(kind, width, scope), *packed, *split):
                yield Case.of(arch, spec_of(dims, **dtype, **mode))
            # The fused backward takes longest to compile: with its second tile only in the modes that take that.
            calls = [call for call in calls if call[1] is MODES[0]] + packed[:1]
            calls += [((width, width), mode) for mode in MODES[1:4] if scope == ALL]
            for dims, mode in calls:
                spec = spec_of(dims, **dtype, **mode)
                own = mode is MODES[0] or mode in PACKED_MODES or len(choices_for(spec, PARTS[arch]).backward_fused) > 1
                if own and not BACKENDS["triton"].refuse_fused(spec, PARTS[arch]):
                    yield Case.of(arch, spec, backward="fused")
            for mode in _tangent_modes(kind, width, scope):
                spec = spec_of((width, width), **dtype, **mode)
                if not BACKENDS["triton"].refuse_tangents(spec, PARTS[arch]):
                    yield Case.with_tangents(arch, spec)
    if "sm_90" in archs:
        yield from _hopper_cases(scope)


def _changed_calls(kind: str, width: int, scope: str) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """Of `CHANGED_MODES`, those that a kind of this width is compiled in; of COMMON, one, of half precision."""
    modes: tuple[dict[str, Any], ...] = ()
    if kind == "half" and width in CHANGED_WIDTHS and scope == ALL:
        modes = CHANGED_MODES
    elif width == 64 and (scope == ALL or (scope == COMMON and kind == "half")):
        modes = CHANGED_MODES[-1:]
    return [((width, width), mode) for mode in modes]


def _packed_calls(kind: str, width: int, scope: str) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """Of `PACKED_MODES`, those that a kind of this width is compiled in."""
    if kind != "half" or scope != ALL:
        return []
    return [((width, width), mode) for mode in PACKED_MODES[: 2 if width in CHANGED_WIDTHS else 1]]


def _tangent_modes(kind: str, width: int, scope: str) -> tuple[dict[str, Any], ...]:
    """Of `TANGENT_MODES`, those that a kind of this width is compiled in."""
    if scope == ALL:
        return TANGENT_MODES if kind == "half" and width in CHANGED_WIDTHS else TANGENT_MODES[:1]
    return TANGENT_MODES[:1] if kind == "half" and width in TANGENT_WIDTHS[scope] else ()


def spec_of(dims: tuple[int, int], **mode: Any) -> AttentionSpec:
    """A call with the head dimensions d and dv, in one of the modes. A bias has q's dtype."""
    head_dim, value_dim = dims
    if "bias" in mode:
        mode["bias"] = BiasKind(*mode["bias"], mode["dtype"])
    rest = dict(batch=16, heads=8, kv_heads=8, queries=1000, keys=1000, scale=0.1) | mode
    return AttentionSpec(head_dim=head_dim, value_dim=value_dim, **rest)


def _hopper_cases(scope: str) -> Iterator[Case]:
    modes = HOPPER_MODES if scope == ALL else HOPPER_MODES[:1]
    backwards: tuple[BackwardName, ...] = ("separate", "fused")
    for dim, backward, mode in product(HOPPER_ROWS, backwards, modes):
        spec, hopper = spec_of((dim, dim), dtype=torch.bfloat16, **mode), BACKENDS["hopper"]
        refuse = hopper.refuse_fused if backward == "fused" else hopper.refuse
        if not (hopper.refuse(spec, PARTS["sm_90"]) or refuse(spec, PARTS["sm_90"])):
            yield Case.of("sm_90", spec, "hopper", backward)


def _tasks(archs: Iterable[str], scope: str, only: str, backends: Container[str]) -> list[tuple[Case, tuple[str, ...]]]:
    """What to compile: cases, and of each the kernels that no earlier case compiles just the same."""
    seen = set()
    tasks = []
    for case in cases(archs, scope):
        if case.backend not in backends:
            continue
        fresh = []
        for launch in case.launches():
            identity, name = (case.arch, *_variant_of(launch)), kernel_name(launch)
            elsewhere = (
                case.backward == "fused" and not _is_fused(launch),
                case.is_split and name not in OF_SPLIT,
                case.tangents and name != "tangents",
            )
            if any(elsewhere):
                continue  # as in the call that is not fused, not split, without tangents
            if identity not in seen and only in f"{name} {case.arch} {_config_of(launch, case)}":
                seen.add(identity)
                fresh.append(name)
        if fresh:
            tasks.append((case, tuple(fresh)))
    return tasks


def compile_tasks(
    tasks: Sequence[tuple[Any, ...]], jobs: int | None = None, compile: Callable[..., Any] = compile_case
) -> Iterator[tuple[int, Any]]:
    """`compile` of every task in processes of their own, with a progress bar on stderr: indices and what it gives, as
    they come."""
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(
            jobs or os.cpu_count(), mp_context=get_context("spawn"), initializer=_prepare_worker, initargs=(cache,)
        ) as pool,
        tqdm(total=len(tasks), unit="call", desc="compiling", file=sys.stderr, disable=None) as progress,
    ):
        futures = {pool.submit(compile, *task): index for index, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
                progress.update()
        finally:
            pool.shutdown(cancel_futures=True)  # whoever stops reading waits for no more than what has begun


def compile_all(
    archs: Iterable[str],
    *,
    scope: str = ALL,
    only: str = "",
    backends: Container[str] = COMPILED,
    jobs: int | None = None,
) -> list[Report]:
    """Compiles the config rows of these parts, as far as the scope goes."""
    reports = dict(compile_tasks(_tasks(archs, scope, only, backends), jobs))
    return [report for index in sorted(reports) for report in reports[index]]


def _prepare_worker(cache: str) -> None:
    # Triton reads these at every compilation: compile even what is cached, and print the assembler's log.
    os.environ.update(TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1", TRITON_CACHE_DIR=cache)
    torch.set_num_threads(1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flash_attend.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument(
        "--common",
        action="store_const",
        const=COMMON,
        default=ALL,
        dest="scope",
        help="half precision in one mode or two, two widths of the rest",
    )
    scope.add_argument("--subset", action="store_const", const=SUBSET, dest="scope", help="one part, a few head widths")
    parser.add_argument(
        "--backend", nargs="+", choices=COMPILED, default=COMPILED, metavar="NAME", help=", ".join(COMPILED)
    )
    parser.add_argument(
        "--arch", nargs="+", choices=PARTS, default=list(CHECKED), metavar="ARCH", help=", ".join(PARTS)
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only kernels whose line contains TEXT")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes, default one for each core")
    parser.add_argument(
        "--allow-spills", nargs="+", choices=COMPILED, default=(), metavar="NAME",
        help="do not fail on spills and slow loops of these backends: they are checked on one Triton version",
    )  # fmt: skip
    parser.add_argument(
        "--estimate", action="store_true", help="print the model's TFLOP/s beside FlexAttention's instead"
    )
    parser.add_argument("--markdown", action="store_true", help="of the estimates: a table for docs/estimates.md")
    parser.add_argument("--window", type=int, metavar="KEYS", help="of the estimates: causal calls with such a window")
    parser.add_argument("--length", type=int, default=16384, metavar="N", help="of these calls: queries and keys")
    parser.add_argument("--cache", type=int, metavar="MB", help="of the estimates: one query against such a cache")
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if interpreting():
        parser.error("TRITON_INTERPRET is set: nothing can be compiled in this process")
    if options.estimate:
        from flash_attend.kernels.comparison import print_decoding, print_estimates, print_windowed

        if options.cache is not None:
            return print_decoding(options.arch, options.jobs, options.cache)
        if options.window is not None:
            return print_windowed(options.arch, options.only, options.jobs, options.window, options.length)
        return print_estimates(options.arch, options.only, options.jobs, options.markdown)
    reports = compile_all(
        options.arch, scope=options.scope, only=options.only, backends=options.backend, jobs=options.jobs
    )
    if not reports:
        parser.error(f"nothing matches {options.only!r}")
    print(as_json(reports) if options.json else as_table(reports))
    failed = [report for report in reports if report.problems_but(options.allow_spills)]
    spilled = sum(report.spill_bytes > 0 for report in reports)
    summary = f"{len(reports)} kernels on Triton {triton.__version__}, {spilled} with spills, {len(failed)} failed"
    print(summary, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
