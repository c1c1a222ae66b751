"""What the assembler made of a kernel's loops, read from the machine code: what runs while products are running."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import triton

__all__ = ["ProductLoop", "disassemble", "product_loops"]

LABEL = re.compile(r"^\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.+?)\s*;")
BRANCH = re.compile(r"BRA\b.*`\((\.L_x_\d+)\)")
PRODUCTS = ("HGMMA", "HMMA", "DMMA")  # of tensor cores
PRODUCT = "HGMMA"  # the asynchronous one
COMMITTED = "gsb0"  # the last product of a group names the counter that it is awaited by
AWAITED = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
EXPONENTIAL = "MUFU.EX2"
TRY = "SYNCS.PHASECHK"  # whether a barrier's phase is over
RETRY = 6  # instructions: from a try to the branch back
SPILLS = ("STL", "LDL")


class ProductLoop(NamedTuple):
    """An innermost loop with products."""

    instructions: int
    exponentials: int
    covered: int  # of the exponentials: those that run while a product does
    spills: int  # loads and stores of spilled registers


def disassemble(cubin: bytes) -> str:
    """Machine code as text, by the disassembler that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def product_loops(sass: str) -> list[ProductLoop]:
    """The innermost loops with products, the shortest first."""
    instructions, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.search(line):
            instructions.append(instruction[1])
            branch = BRANCH.match(instruction[1])
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(instructions)))
    innermost: list[tuple[int, int]] = []
    for start, end in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        has_products = any(instruction.startswith(PRODUCTS) for instruction in instructions[start:end])
        # A wait that has to be tried again is so elsewhere, and comes back from there: a loop only to look at.
        tries_again = any(instruction.startswith(TRY) for instruction in instructions[end - RETRY : end])
        if (
            has_products
            and not tries_again
            and all(end <= other or other_end <= start for other, other_end in innermost)
        ):
            innermost.append((start, end))
    return [_read_loop(instructions[start:end]) for start, end in innermost]


def _read_loop(body: Sequence[str]) -> ProductLoop:
    running = 0
    for _ in range(2):  # what runs at the loop's end still runs at its beginning
        covered = 0
        for instruction in body:
            if instruction.startswith(PRODUCT) and COMMITTED in instruction:
                running += 1
            elif awaited := AWAITED.match(instruction):
                running = min(running, int(awaited[1], 16))
            elif instruction.startswith(EXPONENTIAL):
                covered += running > 0
    return ProductLoop(
        len(body),
        sum(instruction.startswith(EXPONENTIAL) for instruction in body),
        covered,
        sum(instruction.startswith(SPILLS) for instruction in body),
    )
