"""The throughput model: what it makes of loops that were compiled once, and of a loop written by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="machine code is read by the disassembler that Triton brings")

from flash_attend.kernels.estimate import (
    COPIED,
    NEXT_LAUNCH,
    RATES,
    Kernel,
    blocks_per_multiprocessor,
    estimate,
    reading,
    total_tflops,
)
from flash_attend.kernels.sass import LoopWork, loop_works
from test_sass import ADD, EXP, PV, QK, SPILL, branch, code

ON_A100 = Kernel("forward", "sm_80", "half", 64, 64, 128, 64, 4, 3, registers=255, shared_bytes=49152)
# Kernels that Triton 3.7.1 compiled: what their loops do, and TFLOP/s, the busiest unit and redundancy by the script
# that was held against the public measurements.
COMPILED = [
    (ON_A100, LoopWork(659, 128, 262144, 0, 27008, 0, 226, 137, 68, 2, 0), 188.65, "tensor", 1),
    (
        Kernel("forward", "sm_80", "half", 256, 256, 128, 64, 8, 1, 255, 131072),
        LoopWork(1201, 256, 524288, 0, 123776, 0, 308, 160, 48, 10, 15),
        109.47,
        "shared memory",
        1,
    ),
    (
        Kernel("backward_q", "sm_90", "half", 64, 64, 128, 64, 4, 2, 255, 65568),
        LoopWork(446, 24, 0, 1572864, 0, 81920, 201, 48, 64, 3, 0),
        527.7,
        "tensor",
        1,
    ),
    (
        Kernel("backward_kv", "sm_90", "half", 192, 192, 64, 64, 8, 1, 255, 98304),
        LoopWork(674, 64, 0, 2359296, 10368, 172032, 117, 153, 32, 3, 33),
        227.97,
        "shared memory",
        1.5,
    ),
    (
        Kernel("backward_fused", "sm_80", "half", 64, 64, 64, 128, 8, 2, 255, 66048),
        LoopWork(644, 192, 393216, 0, 72320, 0, 122, 57, 32, 4, 0),
        124.05,
        "shared memory",
        1.2,
    ),
    (
        Kernel("forward", "sm_80", "tf32x3", 64, 64, 32, 32, 4, 2, 207, 40960),
        LoopWork(635, 96, 98304, 0, 40320, 0, 119, 246, 12, 8, 0),
        19.12,
        "shared memory",
        1,
    ),
]


@pytest.mark.parametrize(("kernel", "loop", "tflops", "bound", "redundancy"), COMPILED)
def test_compiled_loops(kernel: Kernel, loop: LoopWork, tflops: float, bound: str, redundancy: float) -> None:
    found = estimate(loop, kernel)
    assert found.tflops == pytest.approx(tflops, rel=1e-3)
    assert (found.bound, found.redundancy) == (bound, redundancy)


def test_spills_cost_shared_memory() -> None:
    """Of 4 warps, 128 accesses of 128 bytes each in a round, at 128 bytes a clock."""
    _, loop, *_ = COMPILED[0]
    spilling = estimate(loop._replace(shared_bytes=loop.shared_bytes + 128 * 128, spills=128), ON_A100)
    without = estimate(loop, ON_A100)
    assert spilling.units["shared memory"] == without.units["shared memory"] + 512
    assert spilling.bound == "shared memory"
    assert spilling.tflops < without.tflops


def test_serialized_products_wait_for_each_other() -> None:
    kernel, loop, *_ = COMPILED[2]
    without, serialized = (estimate(loop, kernel._replace(serialized=wait)) for wait in (False, True))
    assert serialized.serial == without.serial + 60 * (24 - 3), "of 24 instructions three are awaited else"
    assert serialized.clocks > without.clocks


def test_padding_counts_as_time_and_not_as_work() -> None:
    _, loop, *_ = COMPILED[0]
    narrow = estimate(loop, ON_A100._replace(dim=48))
    assert narrow.redundancy == 1
    assert narrow.tflops == pytest.approx(0.75 * estimate(loop, ON_A100).tflops)


def test_a_launch_for_half_of_the_values_counts_the_scores_again() -> None:
    """Three of the six products are of scores, which each of two launches does whole, and halves of the others."""
    kernel = ON_A100._replace(name="tangents")
    of_warp = 128 * 64 * 64 // 4
    whole = estimate(LoopWork(9, 1, 6 * of_warp, 0, 0, 0, 0, 0, 0, 0, 0), kernel)
    half = estimate(LoopWork(9, 1, 9 * of_warp // 2, 0, 0, 0, 0, 0, 0, 0, 0), kernel._replace(share=0.5))
    assert whole.redundancy == half.redundancy == 1
    assert half.units["tensor"] == pytest.approx(0.75 * whole.units["tensor"])
    assert half.units["L2"] == pytest.approx(0.75 * whole.units["L2"])
    assert half.tflops * half.clocks == pytest.approx(0.5 * whole.tflops * whole.clocks)
    assert total_tflops({"tangents": whole}) == pytest.approx(whole.tflops)


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        (dict(), 2),  # by registers
        (dict(registers=128), 3),  # by shared memory
        (dict(registers=32, shared_bytes=0), 16),  # by threads
        (dict(num_warps=8), 1),
        (dict(registers=255, num_warps=16), 1),  # never none, whatever the count says
    ],
)
def test_blocks_of_a_multiprocessor(change: dict, blocks: int) -> None:
    assert blocks_per_multiprocessor(ON_A100._replace(**change)) == blocks


LINES = (
    "HMMA.16816.F32.BF16 R4, R8, R12, R4", "HMMA.1688.F32.TF32 R4, R8, R12, R4", "DMMA.884 R4, R8, R12, R4",
    "LDSM.16.M88.4 R4, [R8]", "LDS.128 R4, [R8]", "LDS R4, [R8]", "LDGSTS.E.BYPASS.128 [R4], [R8.64]",
    "SHFL.BFLY PT, R4, R5, 0x1, 0x1f", "FFMA R4, R5, R6, R7", "FMNMX R4, R5, R6, !PT", "BAR.SYNC 0x0", EXP, ADD, SPILL,
)  # fmt: skip


def test_what_a_loop_has_to_do_is_read_from_machine_code() -> None:
    longer = code("L_x_1:", *LINES, branch("L_x_1"), "L_x_2:", QK, PV, branch("L_x_2"))
    of_warps, of_groups = loop_works(longer)
    assert of_warps == LoopWork(
        instructions=15,
        products=3,
        multiply_adds=16 * 8 * (16 + 8) + 8 * 8 * 4,
        asynchronous=0,
        shared_bytes=512 + 512 + 128 + 512 + 128 + 128,
        operand_bytes=0,
        fma=2,
        alu=1,
        special=1,
        barriers=1,
        spills=1,
    )
    assert (of_groups.multiply_adds, of_groups.asynchronous) == (0, 2 * 64 * 128 * 16)
    assert of_groups.operand_bytes == (64 + 128 + 128) * 16 * 2, "the weights of the second product are in registers"


# What Triton 3.7.1 compiles for one query of 128 numbers: 16 x 64, of which a multiprocessor runs two.
OF_A_CACHE = Kernel("forward", "sm_90", "half", 128, 128, 16, 64, 4, 2, registers=183, shared_bytes=38912)
ROUND = LoopWork(480, 64, 131072, 0, 24000, 0, 80, 60, 12, 4, 0)


def test_reading_a_cache() -> None:
    """At best at the speed of a copy, and slower by what a launch waits for at its ends; too few programs at a time
    have too little under way, and more than fit take another wave."""
    one, rates = estimate(ROUND, OF_A_CACHE), RATES["sm_90"]
    keys, heads = 2**16, 8  # 256 MB
    at_best = 2**28 / (COPIED * rates.bandwidth)
    split = reading(one, OF_A_CACHE, heads, keys, 33, 32)
    assert (split.programs, split.waves) == (264, 1)
    assert 0.85 < split.share < 1
    assert split.share == pytest.approx(at_best / split.seconds)
    whole = reading(one, OF_A_CACHE, heads, keys, 1, 32)
    assert whole.share < 0.2, "8 programs leave most multiprocessors idle"
    assert whole.seconds > keys / 64 * one.serial / rates.clocks
    waves = reading(one, OF_A_CACHE, heads, keys, 34, 32)
    assert waves.waves == 2
    assert waves.seconds > split.seconds
    longer = reading(one, OF_A_CACHE, heads, 16 * keys, 33, 32)
    assert longer.share > split.share, "what is waited for at the ends counts less"
    merged, unmerged = (reading(one, OF_A_CACHE, 264 // splits, 128 * splits, splits, 32) for splits in (2, 1))
    assert merged.seconds - unmerged.seconds > NEXT_LAUNCH
