"""Reading machine code: which loops count, and what runs under a product. The code here is written by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the module asks Triton for its disassembler")

from flash_attend.kernels.sass import ProductLoop, product_loops

QK = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], !UPT, gsb0"
PV = "HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR12], R88, gsb0"
PART_OF_PV = "HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR12], R88"  # of the same group, which another one ends
EXP, SPILL, RELOAD, ADD = "MUFU.EX2 R1, R1", "STL [R1], R2", "@P0 LDL R2, [R1]", "FADD R1, R1, R2"
TRY = "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3+URZ], R4"


def wait(outstanding: int) -> str:
    return f"WARPGROUP.DEPBAR.LE gsb0, {outstanding:#x}"


def code(*lines: str) -> str:
    """As nvdisasm prints it; a line that ends in a colon is a label."""
    numbered = enumerate(lines)
    return "\n".join(
        f".{x}" if x.endswith(":") else f"        /*{16 * n:04x}*/                   {x} ;" for n, x in numbered
    )


def branch(label: str) -> str:
    return f"@P1 BRA `(.{label})"


def test_what_runs_under_a_product_is_told_from_what_does_not() -> None:
    body = (EXP, QK, PART_OF_PV, PV, wait(1), EXP, EXP, ADD, wait(0), EXP)
    loop = code(ADD, "L_x_1:", *body, branch("L_x_1"), EXP)
    assert product_loops(loop) == [ProductLoop(instructions=11, exponentials=4, covered=2, spills=0)]


def test_a_product_runs_on_into_the_next_round() -> None:
    loop = code("L_x_1:", EXP, wait(0), EXP, PV, branch("L_x_1"))
    assert product_loops(loop) == [ProductLoop(5, exponentials=2, covered=1, spills=0)]


def test_spills_in_the_loop_count_and_others_do_not() -> None:
    loop = code(SPILL, "L_x_1:", PV, SPILL, ADD, RELOAD, branch("L_x_1"), RELOAD)
    assert product_loops(loop) == [ProductLoop(5, 0, 0, spills=2)]


def test_only_innermost_loops_with_products_count_the_shortest_first() -> None:
    inner, longer = ("L_x_2:", PV, branch("L_x_2")), ("L_x_3:", PV, ADD, branch("L_x_3"))
    without = ("L_x_4:", EXP, branch("L_x_4"))
    nest = code("L_x_1:", EXP, *longer, *inner, *without, branch("L_x_1"))
    assert [loop.instructions for loop in product_loops(nest)] == [2, 3]


def test_going_back_into_a_loop_after_another_try_is_no_loop() -> None:
    """The code behind the kernel's end, where a wait is tried again, comes back into the middle of the loop."""
    body = ("L_x_1:", EXP, TRY, branch("L_x_9"), "L_x_2:", PV, EXP, *[ADD] * 6, branch("L_x_1"))
    behind = ("EXIT", "L_x_9:", TRY, "@!P1 BRA `(.L_x_9)", "BRA `(.L_x_2)")
    assert [loop.instructions for loop in product_loops(code(*body, *behind))] == [12]
