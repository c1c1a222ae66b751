"""How fast a kernel's main loop can run on a part, told from its machine code: a model, no measurement.

A round of the loop is so many clocks of each unit of a multiprocessor. Where several blocks or warps take turns, the
busiest unit sets the pace; one alone would do its products, its softmax and its waits one after another. With `w` of
them the time of a round is `busiest + (serial - busiest) / w`.

It was held against public measurements (TFLOP/s measured, modelled): the forward of Triton's tutorial on an A100, head
dimension 64 and 128: 187 and 188, 189 and 196; on an H100, 128, 16k tokens: 487 and 491. The order of tiles holds, the
size is off by 15 to 20%. A spilled register counts as an access to shared memory, whose path it takes; that its load is
waited for is not counted. Bulk copies (TMA) count as traffic of the L2 cache alone.

Few queries against a long cache are bound by reading it, and `reading` counts that: what is asked for at a time over
the latency of memory, or the bandwidth if that is less, wave after wave of programs; what a program waits for before
its first block and after its last; and the launch that merges the parts. It was held against no measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flash_attend.kernels.configs import PARTS_PER_STEP
from flash_attend.kernels.sass import LoopWork

__all__ = [
    "PRODUCTS",
    "RATES",
    "Estimate",
    "Kernel",
    "Rates",
    "Reading",
    "blocks_per_multiprocessor",
    "estimate",
    "reading",
    "total_tflops",
]

SHARED_BYTES = 128  # a clock, through a multiprocessor's shared memory
SCHEDULERS = 4  # of a multiprocessor: each issues one instruction a clock
REGISTERS = 65536  # of a multiprocessor, handed out to warps in units of 256
THREADS = 2048
RESERVED_BYTES = 1024  # of shared memory, that each block takes for itself
BARRIER = 25  # clocks
ASYNCHRONOUS_START = 60  # clocks from the issue of asynchronous products, awaited together, to their first result


class Rates(NamedTuple):
    """What a multiprocessor does in a clock, and a whole part in a second."""

    multiply_adds: int  # of half-precision products of single warps; TF32 half of it
    asynchronous: int  # the same of products of four warps
    double: int  # of float64 products
    fma: int  # clocks that an instruction of a warp takes of a scheduler's pipe
    alu: int
    special: int
    l2_bytes: int  # from the L2 cache, for each multiprocessor
    load_latency: int  # clocks
    product_latency: int  # clocks from a product of a warp to the next one that adds to its result
    shared_memory: int  # bytes of a multiprocessor
    multiprocessors: int
    clocks: float  # a second, at which the data sheet's peak is given
    sustained: float  # share of it that the best matrix products reach under load
    bandwidth: float  # bytes a second of memory, by the data sheet


# Rates of instructions: CUDA C++ Programming Guide, "Throughput of native arithmetic instructions". Products: NVIDIA's
# white papers on the A100 (312 TFLOP/s) and the H100 (989); single warps reach 62% of it there (Luo et al. 2024,
# arXiv:2402.13499). Latencies: Sun et al. 2022 (arXiv:2206.02874), Luo et al. What the L2 cache gives, and the share of
# the peak that is sustained, are fitted to the public measurements above.
RATES = {
    "sm_80": Rates(1024, 0, 64, 2, 2, 8, 40, 300, 33, 167936, 108, 312e12 / (108 * 2 * 1024), 0.78, 2.039e12),
    "sm_90": Rates(1270, 2048, 128, 1, 2, 8, 30, 350, 33, 233472, 132, 989e12 / (132 * 2 * 2048), 0.80, 3.35e12),
}


COPIED = 0.92  # of the bandwidth: what a copy of large tensors reaches
MEMORY_LATENCY = 900  # clocks of a load while memory is busy: about twice that of an idle one (Luo et al.)
WAITS_BEFORE = 4  # for memory, one after another: a mask's bounds and its run, q, the first keys
WAITS_AFTER = 1
NEXT_LAUNCH = 1e-6  # seconds from the end of a launch to the first instruction of the next


class Kernel(NamedTuple):
    """A compiled kernel, as far as the model has to know it."""

    name: str  # one of `PRODUCTS`
    arch: str
    kind: str  # of its products, as `kind_of` says
    dim: int  # d = dv: what is asked for
    width: int  # what is computed: with padding
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int  # of a thread
    shared_bytes: int  # of a block
    serialized: bool = False  # the assembler makes each asynchronous product wait for the one before it
    share: float = 1.0  # of the columns of v that one launch of tangents serves


class Estimate(NamedTuple):
    """Clocks of a multiprocessor for a round of one block."""

    units: dict[str, float]  # clocks of each unit
    serial: float  # clocks of a round that shares the multiprocessor with nothing
    clocks: float
    redundancy: float  # multiply-adds done, as a multiple of those that the tile takes
    spill_share: float  # of the loop's instructions: those that access spilled registers
    tflops: float  # of useful work, by the whole part

    @property
    def bound(self) -> str:
        """The busiest unit."""
        return max(self.units, key=lambda unit: self.units[unit])

    @property
    def shared_ratio(self) -> float:
        """Clocks of shared memory for one of the tensor cores."""
        return self.units["shared memory"] / self.units["tensor"]


PRODUCTS = {
    "forward": 2, "backward_kv": 4, "backward_k": 3, "backward_v": 2, "backward_q": 3, "backward_fused": 5,
    "tangents": 6,
}  # fmt: skip
OVER_KEYS = ("forward", "backward_q", "tangents")  # what their loops are over
SPLIT = {"tf32x3": 3}  # products for one
ITEM_BYTES = {"half": 2, "double": 8}  # 4 else
DEPTH = {"half": 16, "double": 4}  # of a product of a warp, 8 else


def blocks_per_multiprocessor(kernel: Kernel) -> int:
    """How many blocks run on a multiprocessor at a time."""
    of_warp = -(-kernel.registers * 32 // 256) * 256
    by_registers = REGISTERS // SCHEDULERS // of_warp * SCHEDULERS // kernel.num_warps
    by_shared = RATES[kernel.arch].shared_memory // (kernel.shared_bytes + RESERVED_BYTES)
    return max(1, min(by_registers, by_shared, THREADS // (32 * kernel.num_warps)))


def estimate(loop: LoopWork, kernel: Kernel) -> Estimate:
    """How fast a kernel is whose main loop does this in a round."""
    rates = RATES[kernel.arch]
    units = _clocks_of_units(loop, kernel, rates)
    products = max(units["tensor"], units["shared memory"], _chain(loop, kernel, units["tensor"]))
    others = (loop.instructions - loop.products) * kernel.num_warps / SCHEDULERS
    softmax = max(others, units["fma"], units["alu"], units["special"])
    waits = loop.barriers * BARRIER + (2 * rates.load_latency if kernel.num_stages == 1 else 0)
    serial = products + softmax + waits
    busiest = max(units.values())
    takes_turns = blocks_per_multiprocessor(kernel) * (1 if loop.asynchronous else kernel.num_warps / SCHEDULERS)
    clocks = busiest + max(0.0, serial - busiest) / max(1.0, takes_turns)
    pairs = kernel.block_m * kernel.block_n
    of_scores = PRODUCTS[kernel.name] * (1 - kernel.share) / 2  # are computed by each launch
    taken = (PRODUCTS[kernel.name] * kernel.share + of_scores) * pairs * kernel.width * SPLIT.get(kernel.kind, 1)
    useful = 2 * PRODUCTS[kernel.name] * kernel.share * pairs * kernel.dim
    return Estimate(
        units,
        serial,
        clocks,
        multiply_adds(loop, kernel) / taken,
        loop.spills / loop.instructions,
        useful / clocks * rates.clocks * rates.multiprocessors * rates.sustained / 1e12,
    )


class Reading(NamedTuple):
    """How long a call takes that is bound by reading k and v."""

    programs: int  # each of as many blocks of keys
    splits: int  # parts of the keys, which another launch merges
    waves: int
    seconds: float
    share: float  # of the bandwidth of a copy, of the bytes of k and v


def reading(one: Estimate, kernel: Kernel, heads: int, keys: int, splits: int, rows: int) -> Reading:
    """The time of a forward that takes `one` round so: so many kv heads of all batch entries, of one tile each, against
    so many keys; `rows` are the queries of all heads."""
    rates = RATES[kernel.arch]
    latency = MEMORY_LATENCY / rates.clocks
    copy = COPIED * rates.bandwidth
    item = ITEM_BYTES.get(kernel.kind, 4)
    block_bytes = kernel.block_n * 2 * kernel.dim * item
    rounds = -(-keys // (splits * kernel.block_n))
    # A program asks for a block as many rounds before it needs it as there are buffers for.
    alone = max(one.serial, MEMORY_LATENCY / max(kernel.num_stages - 1, 1)) / rates.clocks
    busiest = max(one.units.values()) / rates.clocks
    programs, at_once = heads * splits, blocks_per_multiprocessor(kernel) * rates.multiprocessors
    seconds, left, waves = 0.0, programs, 0
    while left > 0:
        now = min(left, at_once)
        on_one = -(-now // rates.multiprocessors)
        a_round = max(alone, on_one * busiest, now * block_bytes / copy)
        seconds += rounds * a_round + (WAITS_BEFORE + WAITS_AFTER) * latency
        left, waves = left - now, waves + 1
    if splits > 1:
        of_parts = 2 * rows * splits * (kernel.dim + 2) * 4 / copy  # written and read
        steps = -(-splits // PARTS_PER_STEP)
        seconds += NEXT_LAUNCH + of_parts + (2 + steps) * latency
    return Reading(programs, splits, waves, seconds, heads * keys * 2 * kernel.dim * item / copy / seconds)


def total_tflops(estimates: Mapping[str, Estimate]) -> float:
    """Of a forward, one with tangents or a backward by these kernels. A backward is five products by convention,
    however many it does."""
    forwards = [PRODUCTS[name] for name in estimates if name in ("forward", "tangents")]
    useful = forwards[0] if forwards else PRODUCTS["backward_fused"]
    return useful / sum(PRODUCTS[name] / one.tflops for name, one in estimates.items())


def multiply_adds(loop: LoopWork, kernel: Kernel) -> float:
    """Of a round, by all warps of a block."""
    return loop.multiply_adds * kernel.num_warps + loop.asynchronous * kernel.num_warps / 4


def _clocks_of_units(loop: LoopWork, kernel: Kernel, rates: Rates) -> dict[str, float]:
    warps, groups = kernel.num_warps, kernel.num_warps / 4
    a_scheduler = warps / SCHEDULERS
    slower = 1 if kernel.kind == "half" else 2  # TF32
    own = rates.double if kernel.kind == "double" else rates.multiply_adds / slower
    tensor = loop.multiply_adds * warps / own
    if loop.asynchronous:
        tensor += loop.asynchronous * groups / (rates.asynchronous / slower)
    return {
        "tensor": tensor,
        "shared memory": (loop.shared_bytes * warps + loop.operand_bytes * groups) / SHARED_BYTES,
        "issue": loop.instructions * a_scheduler,
        "fma": loop.fma * rates.fma * a_scheduler,
        "alu": loop.alu * rates.alu * a_scheduler,
        "special": loop.special * rates.special * a_scheduler,
        "L2": _l2_bytes(kernel) / rates.l2_bytes,
    }


def _l2_bytes(kernel: Kernel) -> float:
    rows = kernel.block_n if kernel.name in OVER_KEYS else kernel.block_m
    tensors = 2 + 2 * kernel.share if kernel.name == "tangents" else 2
    loaded = rows * tensors * kernel.dim * ITEM_BYTES.get(kernel.kind, 4)
    # The gradient of q is added in float32, which reads and writes.
    return loaded + (rows * kernel.dim * 4 * 2 if kernel.name == "backward_fused" else 0)


def _chain(loop: LoopWork, kernel: Kernel, tensor: float) -> float:
    """Clocks of a round's products, each of which waits for the one before it."""
    if loop.asynchronous:
        return tensor + ASYNCHRONOUS_START * (loop.products if kernel.serialized else PRODUCTS[kernel.name])
    depth = {
        "forward": kernel.width + kernel.block_n,
        "backward_kv": 2 * kernel.width + 2 * kernel.block_m,
        "backward_k": 2 * kernel.width + kernel.block_m,
        "backward_v": kernel.width + kernel.block_m,
        "backward_q": 2 * kernel.width + kernel.block_n,
        "backward_fused": 2 * kernel.width + 2 * kernel.block_m + kernel.block_n,
        "tangents": 3 * kernel.width + 3 * kernel.block_n,
    }[kernel.name]
    steps = depth / DEPTH.get(kernel.kind, 8) * SPLIT.get(kernel.kind, 1)
    return steps * RATES[kernel.arch].product_latency
