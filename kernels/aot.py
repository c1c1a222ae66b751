"""Compiles the kernels of every config row for real parts, without one: registers, spills, shared memory, instructions.

    python -m flash_attend.kernels.aot [--json] [--common | --subset] [--arch sm_80 sm_90 ...] [--only TEXT] [--jobs N]
    python -m flash_attend.kernels.aot --estimate [--markdown | --window KEYS [--length N]] [--only TEXT] [--jobs N]

What is compiled is what a call would compile: the launchers run on meta tensors, their launches are recorded, and
Triton itself specializes and compiles them for a driver that names the part and has no device behind it.

The exit code is 1 if any kernel of a checked part spills more in its main loop than 2% of its instructions, exceeds the
part's shared memory, lacks tensor-core instructions, has its asynchronous products serialized by the assembler,
computes a product twice, or takes 1.3 times as long for shared memory as for its products. What goes beyond that,
because the model of estimate.py finds nothing faster, is listed in `BEYOND`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from flash_attend.backends import BACKENDS, BackwardName
from flash_attend.kernels.configs import HOPPER_ROWS, ROWS, Tiles, choices_for, row_of
from flash_attend.kernels.estimate import PRODUCTS, RATES, Estimate, Kernel, estimate
from flash_attend.kernels.hopper.partitions import CONSUMERS
from flash_attend.kernels.launch import Launch, recorded_launches
from flash_attend.kernels.sass import ProductLoop, disassemble, loop_works, product_loops
from flash_attend.operands import Operands
from flash_attend.spec import AttentionSpec, BiasKind, MaskKind, kind_of
from flash_attend.target import DeviceTarget, interpreting

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

# Shared memory that one block may use, in bytes, from NVIDIA's CUDA programming guide (table of compute capabilities).
PARTS = {
    "sm_80": DeviceTarget("cuda", "A100", (8, 0), 166912, 108, triton.__version__),
    "sm_86": DeviceTarget("cuda", "A10, RTX 3090", (8, 6), 101376, 82, triton.__version__),
    "sm_89": DeviceTarget("cuda", "L40S, RTX 4090", (8, 9), 101376, 142, triton.__version__),
    "sm_90": DeviceTarget("cuda", "H100, H200", (9, 0), 232448, 132, triton.__version__),
    "sm_100": DeviceTarget("cuda", "B200", (10, 0), 232448, 148, triton.__version__),
    "sm_120": DeviceTarget("cuda", "RTX 5090", (12, 0), 101376, 170, triton.__version__),
}
CHECKED = ("sm_80", "sm_90")  # parts whose rates are known
TENSOR_CORE = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.")  # in PTX
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
# The loops with products of the kernels for Hopper. The two shortest are the main ones, one for each consumer; others
# are over masked blocks.
LOOPS = {
    "hopper_forward": 4,
    "hopper_backward": 2,
    "hopper_backward_fused": 2,
    "hopper_backward_q": 4,
    "hopper_backward_wide": 2,
    "hopper_backward_wide_fused": 2,
}
MULTIPLYING = (*PRODUCTS, *LOOPS)
# Bytes that kernels for Hopper may spill outside of their main loops: where a tile begins and ends.
EDGE_SPILLS = {
    "hopper_forward": 256,
    "hopper_backward": 16,
    "hopper_backward_fused": 384,
    "hopper_backward_q": 128,
    "hopper_backward_wide_fused": 36,  # on Triton 3.6, 32 on 3.7
}
# Of plain kernels' main loops: the share of instructions that access spilled registers, a larger one with dropout or a
# dense mask, whose instructions are more; multiply-adds for each that is needed; clocks of shared memory for
# each of tensor cores.
LARGEST_SPILL_SHARE, LARGEST_IF_HEAVY, LARGEST_REDUNDANCY, LARGEST_SHARED_RATIO = 0.02, 0.1, 1.0, 1.3
# Operands of float32 are twice as wide, and in accurate products there are two of each: tiles that fit have fewer rows.
FLOAT32_SPILL_SHARE, FLOAT32_SHARED_RATIO = {"tf32": 0.08, "tf32x3": 0.1}, 2.6
# What goes beyond, by the kernel and its row, and how far: the model finds nothing faster. From 192 on no tile that
# fits on sm_80 has as many rows as its products have columns, and weights go through shared memory.
BEYOND: dict[tuple[str, str, str, int], dict[str, float]] = {
    ("forward", "sm_80", "half", 96): dict(spills=0.04),
    ("forward", "sm_80", "half", 192): dict(shared=1.5),
    ("forward", "sm_80", "half", 256): dict(spills=0.05, shared=1.5),
    ("backward_kv", "sm_80", "half", 96): dict(shared=1.45),
    ("backward_k", "sm_80", "half", 192): dict(shared=1.55),
    ("backward_v", "sm_80", "half", 192): dict(shared=1.45),
    ("backward_kv", "sm_80", "half", 256): dict(shared=1.7),
    ("backward_q", "sm_80", "half", 128): dict(spills=0.05),
    ("backward_q", "sm_80", "half", 192): dict(shared=1.55),
    ("backward_q", "sm_80", "half", 256): dict(spills=0.14, shared=1.45),
    ("backward_kv", "sm_90", "half", 64): dict(shared=1.45),
    ("backward_kv", "sm_90", "half", 128): dict(spills=0.11),
    ("backward_kv", "sm_90", "tf32x3", 128): dict(spills=0.11),
    # Larger tiles have their products serialized.
    ("forward", "sm_90", "tf32", 256): dict(shared=3.0),
    ("backward_k", "sm_90", "tf32", 256): dict(shared=3.1),
    ("backward_v", "sm_90", "tf32", 256): dict(shared=2.7),
    ("backward_q", "sm_90", "tf32", 256): dict(shared=3.2),
}
# Accesses to spilled registers in a main loop, by the kernel and the head dimension. At 64 a block of scores has 128
# queries, and all 240 registers are full: one round has up to 11 of them, of some 800 instructions. 64 queries would
# need none, but twice the barriers and waits for the same work. At 256 it is one, of some 400, on Triton 3.6 alone.
MAIN_LOOP_SPILLS = {("hopper_backward_fused", 64): 12, ("hopper_backward_wide_fused", 256): 1}
# Exponentials of the main loops that no product of the same consumer runs beside. At head dimension 256 one of the two
# consumers has a product less than the other, and time to spare.
BARE_EXPONENTIALS = {"hopper_backward_wide": 32, "hopper_backward_wide_fused": 32}
SERIALIZED = re.compile(r"C75\d\d|serializ", re.IGNORECASE)


OF_VERSION = ("spills", "multiplies", "waits")  # how problems begin that other versions of Triton may have


@dataclass(frozen=True)
class Case:
    """One call to compile for one part: all its kernels."""

    arch: str
    spec: AttentionSpec
    tiles: Tiles
    backend: str = "triton"
    backward: BackwardName = "separate"

    @classmethod
    def of(cls, arch: str, spec: AttentionSpec, backend: str = "triton", backward: BackwardName = "separate") -> Case:
        """With the tiles that a call takes there."""
        return cls(arch, spec, BACKENDS[backend].tiles(spec, PARTS[arch], backward), backend, backward)

    @property
    def mode(self) -> str:
        spec = self.spec
        words = [{MaskKind.NONE: "", MaskKind.KEY: "key", MaskKind.DENSE: "dense"}[spec.mask]]
        words += ["causal"] * spec.causal + ["dropout"] * (spec.dropout_p > 0) + ["grouped"] * (spec.group > 1)
        words += ["window"] * (spec.window != (None, None)) + ["softcap"] * (spec.softcap > 0)
        words += ["alibi"] * spec.alibi + ["bias"] * (spec.bias is not None) + ["sinks"] * spec.sinks
        return "+".join(filter(None, words)) or "plain"


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel."""

    kernel: str
    arch: str
    config: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    triton: str
    serialized: bool = False
    error: str = ""
    loops: tuple[ProductLoop, ...] = ()  # the shortest first; of plain kernels where they spill
    head_dim: int = 0
    row: tuple[str, str, str, int] | None = None  # the kernel, the part, and the row of the tile table
    heavy: bool = False  # with dropout or a dense mask, whose numbers and bits take registers
    estimate: Estimate | None = None  # of plain kernels where d = dv, on parts whose rates are known

    def problems(self) -> list[str]:
        """Why this kernel must not be chosen, if it must not."""
        if self.error:
            return [self.error]
        limit = PARTS[self.arch].shared_memory
        found = []
        if self.kernel in LOOPS and self.spill_bytes > EDGE_SPILLS.get(self.kernel, 0):
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > limit:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, the part has {limit}")
        if not self.tensor_core_instructions and self.kernel in MULTIPLYING:
            found.append("has no tensor-core instructions")
        if self.serialized:
            found.append("has its asynchronous products serialized")
        if self.kernel in LOOPS:
            found += self._loop_problems()
        if self.estimate is not None:
            found += self._estimate_problems(self.estimate)
        return found

    def _estimate_problems(self, estimate: Estimate) -> list[str]:
        """What is wrong with the main loop of a plain kernel. The fused backward serves where it was measured, and
        float64 for `gradcheck`: of these only what they spill."""
        found = []
        kind = self.row[2] if self.row else "half"
        allowed = BEYOND.get(self.row, {}) if self.row else {}
        usual = LARGEST_IF_HEAVY if self.heavy else FLOAT32_SPILL_SHARE.get(kind, LARGEST_SPILL_SHARE)
        if estimate.spill_share > max(allowed.get("spills", 0), usual):
            found.append(f"spills: {estimate.spill_share:.1%} of its main loop")
        if self.heavy or self.kernel == "backward_fused" or kind == "double":
            return found
        if estimate.redundancy > LARGEST_REDUNDANCY + 0.01:
            found.append(f"multiplies {estimate.redundancy:.2f} times as often as it has to")
        usual = FLOAT32_SHARED_RATIO if kind in FLOAT32_SPILL_SHARE else LARGEST_SHARED_RATIO
        if estimate.shared_ratio > max(allowed.get("shared", 0), usual):
            found.append(f"waits for shared memory {estimate.shared_ratio:.2f} times as long as for products")
        return found

    def _loop_problems(self) -> list[str]:
        """What is wrong with the main loops of a kernel for Hopper, the two shortest: one for each consumer."""
        found = []
        if len(self.loops) != LOOPS[self.kernel]:
            found.append(f"has {len(self.loops)} loops with products, not {LOOPS[self.kernel]}")
        main = self.loops[: CONSUMERS.value]
        bare = sum(loop.exponentials - loop.covered for loop in main)
        if bare > BARE_EXPONENTIALS.get(self.kernel, 0) or not all(loop.exponentials for loop in main):
            found.append(f"takes {bare} exponentials of its main loops while no product runs")
        allowed = MAIN_LOOP_SPILLS.get((self.kernel, self.head_dim), 0)
        if any(loop.spills > allowed for loop in main):
            found.append("spills in a main loop")
        return found


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


def record_call(spec: AttentionSpec, tiles: Tiles, backend: str = "triton") -> list[Launch]:
    """Every launch that a forward and backward of this spec would make, on meta tensors."""
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
            operands = Operands(q, k, v, mask, seed, bias, slopes, sinks)
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


def compile_case(case: Case, kernels: Iterable[str] | None = None) -> list[Report]:
    """Compiles the kernels of a case (all, or those named) and reads what the assembler said of them."""
    reports = []
    for launch in record_call(case.spec, case.tiles, case.backend):
        name = kernel_name(launch)
        if kernels is not None and name not in kernels:
            continue
        usual = case.spec.dropout_p == 0 and case.spec.mask != MaskKind.DENSE and case.spec.plain_scores
        report = Report(
            name, case.arch, _config_of(launch, case), 0, 0, 0, 0, triton.__version__,
            head_dim=case.spec.head_dim, row=(name, case.arch, *row_of(case.spec)), heavy=not usual,
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
HOPPER_MODES = (dict(mask=MaskKind.KEY, causal=True), dict(mask=MaskKind.KEY), dict(causal=True), dict())
# What each kind of rows is for, by one of its dtypes, and how many of the modes it is compiled in.
KINDS = {
    "half": (dict(dtype=torch.bfloat16), 5),
    "tf32": (dict(dtype=torch.float32, precision="tf32"), 3),
    "tf32x3": (dict(dtype=torch.float32, precision="tf32x3"), 3),
    "double": (dict(dtype=torch.float64), 3),
}
# Head dims in other parts, and dv != d, that share a row of the kind "half" with those as wide as the row.
OTHER_DIMS = {64: ((40, 40), (32, 64)), 96: ((80, 80),), 128: ((64, 128),), 192: ((160, 160), (192, 128))}
SUBSET_WIDTHS = {"half": 96}  # which is in two parts; others of 64
ALL, COMMON, SUBSET = "all", "common", "subset"  # how many of the calls are compiled
COMPILED = ("triton", "hopper")  # each with both of its backwards


def cases(archs: Iterable[str], scope: str = ALL) -> Iterator[Case]:
    """The calls that together compile every config row of these parts, or those of a smaller scope.

    COMMON: half precision in the two modes that cost most, with dropout and without; others, and the fused backward, in
    the first mode alone; with changed scores, one; the kernels for Hopper with a key mask and causality, and without
    both. SUBSET: a width of
    each kind in the first mode, and of the kernels for Hopper all.
    """
    for arch in archs:
        for kind, width in sorted({(kind, width) for _, kind, width in ROWS}):
            if scope == SUBSET and width != SUBSET_WIDTHS.get(kind, 64):
                continue
            dtype, n_modes = KINDS[kind]
            common = MODES[:4:3] if kind == "half" else MODES[:1]
            modes = {ALL: MODES[:n_modes], COMMON: common, SUBSET: MODES[:1]}[scope]
            calls = [((width, width), mode) for mode in modes]
            if kind == "half" and scope == ALL:
                calls += [(dims, MODES[0]) for dims in OTHER_DIMS.get(width, ())]
            for dims, mode in (*calls, *_changed_calls(kind, width, scope)):
                yield Case.of(arch, spec_of(dims, **dtype, **mode))
            # The fused backward takes longest to compile: with its second tile only in the modes that take that.
            calls = [call for call in calls if call[1] is MODES[0]]
            calls += [((width, width), mode) for mode in MODES[1:4] if scope == ALL]
            for dims, mode in calls:
                spec = spec_of(dims, **dtype, **mode)
                own = mode is MODES[0] or len(choices_for(spec, PARTS[arch]).backward_fused) > 1
                if own and not BACKENDS["triton"].refuse_fused(spec, PARTS[arch]):
                    yield Case.of(arch, spec, backward="fused")
    if "sm_90" in archs:
        yield from _hopper_cases(scope)


def _changed_calls(kind: str, width: int, scope: str) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """Of `CHANGED_MODES`, those that a kind of this width is compiled in; of COMMON, one of half precision."""
    if kind == "half" and scope == ALL and width in CHANGED_WIDTHS:
        modes = CHANGED_MODES
    elif width == 64 and (scope == ALL or (scope == COMMON and kind == "half")):
        modes = CHANGED_MODES[-1:]
    else:
        modes = ()
    return [((width, width), mode) for mode in modes]


def spec_of(dims: tuple[int, int], **mode: Any) -> AttentionSpec:
    """A call with the head dimensions d and dv, in one of the modes. A bias has q's dtype."""
    head_dim, value_dim = dims
    if "bias" in mode:
        mode["bias"] = BiasKind(*mode["bias"], mode["dtype"])
    rest = dict(batch=16, heads=8, kv_heads=8, queries=1000, keys=1000, scale=0.1) | mode
    return AttentionSpec(head_dim=head_dim, value_dim=value_dim, **rest)


def _hopper_cases(scope: str) -> Iterator[Case]:
    modes = {ALL: HOPPER_MODES, COMMON: HOPPER_MODES[::3], SUBSET: HOPPER_MODES[:1]}[scope]
    backwards: tuple[BackwardName, ...] = ("separate", "fused")
    for dim, backward, mode in product(HOPPER_ROWS, backwards, modes):
        yield Case.of("sm_90", spec_of((dim, dim), dtype=torch.bfloat16, **mode), "hopper", backward)


def _tasks(archs: Iterable[str], scope: str, only: str, backends: Container[str]) -> list[tuple[Case, tuple[str, ...]]]:
    """What to compile: cases, and of each the kernels that no earlier case compiles just the same."""
    seen = set()
    tasks = []
    for case in cases(archs, scope):
        if case.backend not in backends:
            continue
        fresh = []
        for launch in record_call(case.spec, case.tiles, case.backend):
            prepared = launch.prepared
            dtypes = tuple(None if tensor is None else tensor.dtype for tensor in launch.tensors)
            identity = (case.arch, prepared.kernel.__name__, dtypes, str(prepared.choices), prepared.num_warps)
            name = kernel_name(launch)
            if case.backward == "fused" and not _is_fused(launch):
                continue  # as in the call that is not fused
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


UNPRINTED = ("serialized", "error", "loops", "head_dim", "row", "heavy", "estimate")


def as_json(reports: Iterable[Report]) -> str:
    """The table as a list of objects."""
    keys = [field.name for field in fields(Report) if field.name not in UNPRINTED]
    return json.dumps(
        [{**{key: getattr(report, key) for key in keys}, "problems": report.problems()} for report in reports], indent=1
    )


def as_table(reports: Iterable[Report]) -> str:
    """The table for people, one line a kernel."""
    lines = [f"{'kernel':<28}{'arch':<8}{'config':<62}{'regs':>5}{'spilled':>9}{'shared':>8}{'tensor':>8}"]
    for report in reports:
        numbers = f"{report.registers:>5}{report.spill_bytes:>9}{report.shared_bytes:>8}"
        problems = "; ".join(report.problems())
        lines.append(
            f"{report.kernel:<28}{report.arch:<8}{report.config:<62}{numbers}{report.tensor_core_instructions:>8}"
            + (f"  {problems}" if problems else "")
        )
    return "\n".join(lines)


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
        help="half precision in two modes, the rest in one",
    )
    scope.add_argument(
        "--subset", action="store_const", const=SUBSET, dest="scope", help="one head width of each kind, one mode"
    )
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
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if interpreting():
        parser.error("TRITON_INTERPRET is set: nothing can be compiled in this process")
    if options.estimate:
        from flash_attend.kernels.comparison import print_estimates, print_windowed

        if options.window is not None:
            return print_windowed(options.arch, options.only, options.jobs, options.window, options.length)
        return print_estimates(options.arch, options.only, options.jobs, options.markdown)
    reports = compile_all(
        options.arch, scope=options.scope, only=options.only, backends=options.backend, jobs=options.jobs
    )
    if not reports:
        parser.error(f"nothing matches {options.only!r}")
    print(as_json(reports) if options.json else as_table(reports))
    failed = [report for report in reports if _beyond_spills(report, options.allow_spills)]
    spilled = sum(report.spill_bytes > 0 for report in reports)
    summary = f"{len(reports)} kernels on Triton {triton.__version__}, {spilled} with spills, {len(failed)} failed"
    print(summary, file=sys.stderr)
    return 1 if failed else 0


def _beyond_spills(report: Report, allowed: Container[str]) -> list[str]:
    """Its problems, but for what versions of Triton differ in, where its backend is one of those whose kernels may."""
    backend = "hopper" if report.kernel.startswith("hopper_") else "triton"
    return [x for x in report.problems() if backend not in allowed or not x.startswith(OF_VERSION)]


if __name__ == "__main__":
    sys.exit(main())
