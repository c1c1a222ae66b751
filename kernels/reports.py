"""What the compiler made of a kernel, whether that may be chosen, and how it is told."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from dataclasses import dataclass, fields

import triton

from flash_attend.kernels.estimate import PRODUCTS, Estimate
from flash_attend.kernels.hopper.partitions import CONSUMERS
from flash_attend.kernels.sass import ProductLoop
from flash_attend.target import DeviceTarget

__all__ = ["LOOPS", "MULTIPLYING", "PARTS", "Report", "as_json", "as_table"]

# Shared memory that one block may use, in bytes, from NVIDIA's CUDA programming guide (table of compute capabilities).
PARTS = {
    "sm_80": DeviceTarget("cuda", "A100", (8, 0), 166912, 108, triton.__version__),
    "sm_86": DeviceTarget("cuda", "A10, RTX 3090", (8, 6), 101376, 82, triton.__version__),
    "sm_89": DeviceTarget("cuda", "L40S, RTX 4090", (8, 9), 101376, 142, triton.__version__),
    "sm_90": DeviceTarget("cuda", "H100, H200", (9, 0), 232448, 132, triton.__version__),
    "sm_100": DeviceTarget("cuda", "B200", (10, 0), 232448, 148, triton.__version__),
    "sm_120": DeviceTarget("cuda", "RTX 5090", (12, 0), 101376, 170, triton.__version__),
}
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
    ("backward_kv", "sm_80", "half", 128): dict(spills=0.04),
    ("backward_k", "sm_80", "half", 192): dict(shared=1.55),
    ("backward_v", "sm_80", "half", 192): dict(shared=1.45),
    ("backward_kv", "sm_80", "half", 256): dict(shared=1.7),
    ("backward_q", "sm_80", "half", 128): dict(spills=0.07),
    ("backward_q", "sm_80", "half", 192): dict(shared=1.55),
    ("backward_q", "sm_80", "half", 256): dict(spills=0.14, shared=1.45),
    ("backward_k", "sm_80", "tf32", 256): dict(spills=0.11),
    ("backward_kv", "sm_90", "half", 64): dict(shared=1.45),
    ("backward_kv", "sm_90", "half", 96): dict(spills=0.06, shared=1.35),
    ("backward_kv", "sm_90", "half", 128): dict(spills=0.11),
    ("backward_k", "sm_90", "half", 256): dict(spills=0.06, shared=1.5),
    ("backward_v", "sm_90", "half", 256): dict(spills=0.05, shared=1.4),
    ("backward_kv", "sm_90", "tf32x3", 128): dict(spills=0.11),
    ("tangents", "sm_80", "half", 192): dict(spills=0.03),
    ("tangents", "sm_80", "half", 256): dict(spills=0.03),
    ("tangents", "sm_80", "tf32", 128): dict(spills=0.12),
    ("tangents", "sm_90", "half", 192): dict(shared=1.45),
    ("tangents", "sm_90", "half", 256): dict(spills=0.03),
    # Larger tiles have their products serialized.
    ("forward", "sm_90", "tf32", 256): dict(shared=3.0),
    ("backward_k", "sm_90", "tf32", 256): dict(spills=0.11, shared=3.1),
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
OF_VERSION = ("spills", "multiplies", "waits")  # how problems begin that other versions of Triton may have


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
    # With dropout or a dense mask, whose numbers and bits take registers; of few queries, which is bound by memory.
    heavy: bool = False
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

    def problems_but(self, allowed: Container[str]) -> list[str]:
        """Its problems, but for what versions of Triton differ in, where its backend is one of those whose kernels
        may."""
        backend = "hopper" if self.kernel.startswith("hopper_") else "triton"
        return [x for x in self.problems() if backend not in allowed or not x.startswith(OF_VERSION)]


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
