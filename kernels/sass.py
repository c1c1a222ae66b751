"""What the assembler made of a kernel's loops, read from the machine code: what runs while products are running, and
what each unit of a multiprocessor has to do."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import triton

__all__ = ["LoopWork", "ProductLoop", "disassemble", "loop_works", "product_loops"]

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
SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")  # of an asynchronous product: rows, columns, depth
DEPTHS = {"16816": 16, "1688": 8, "1684": 4}  # of a product of 16 rows and 8 columns; DMMA.884 has 8 x 8 x 4
FROM_REGISTERS = re.compile(r"R\d+, R\d+, gdesc")  # the first operand of an asynchronous product
WIDTH = re.compile(r"\.(128|64)\b")  # bits that a load or store takes of each thread, 32 by default
# By the pipe that issues them, as far as loops of attention have them.
FMA = frozenset(("FFMA", "FADD", "FMUL", "IMAD", "FFMA2", "FADD2", "FMUL2"))
ALU = frozenset((
    "BMSK", "CS2R", "F2FP", "FMNMX", "FMNMX3", "FSEL", "FSETP", "HADD2", "HFMA2", "HMUL2", "IABS", "IADD", "IADD3",
    "IMNMX", "ISETP", "LEA", "LOP", "LOP3", "MOV", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF", "VIADD",
    "VIADDMNMX", "VIMNMX", "VOTE",
))  # fmt: skip


class ProductLoop(NamedTuple):
    """An innermost loop with products."""

    instructions: int
    exponentials: int
    covered: int  # of the exponentials: those that run while a product does
    spills: int  # loads and stores of spilled registers


class LoopWork(NamedTuple):
    """What a round of a loop costs each warp, and four warps together where they multiply together."""

    instructions: int
    products: int  # instructions of tensor cores
    multiply_adds: int  # of products that a warp does by itself
    asynchronous: int  # multiply-adds of products that four warps do together
    shared_bytes: int  # that a warp moves through shared memory, spilled registers included
    operand_bytes: int  # that asynchronous products of four warps read there
    fma: int  # instructions of the pipe for multiply-adds
    alu: int  # of that for integers, comparisons and conversions
    special: int  # of that for exponentials
    barriers: int
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
    return [_read_loop(body) for body in sorted(_innermost_loops(sass), key=len)]


def loop_works(sass: str) -> list[LoopWork]:
    """What the innermost loops with products have to do, in the order of the code."""
    return [_work_of(body) for body in _innermost_loops(sass)]


def _innermost_loops(sass: str) -> list[list[str]]:
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
    return [instructions[start:end] for start, end in sorted(innermost)]


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


def _work_of(body: Sequence[str]) -> LoopWork:
    names = [instruction.split()[0] for instruction in body]
    bases = [name.partition(".")[0] for name in names]
    spills = sum(base in SPILLS for base in bases)
    return LoopWork(
        instructions=len(body),
        products=sum(base in PRODUCTS for base in bases),
        multiply_adds=sum(map(_multiply_adds, names)),
        asynchronous=sum(rows * columns * depth for rows, columns, depth in map(_shape, names)),
        shared_bytes=sum(map(_shared_bytes, names)),
        operand_bytes=sum(map(_operand_bytes, body)),
        fma=sum(base in FMA for base in bases),
        alu=sum(base in ALU for base in bases),
        special=bases.count("MUFU"),
        barriers=bases.count("BAR"),
        spills=spills,
    )


def _shape(name: str) -> tuple[int, int, int]:
    """Of an asynchronous product; zeros of anything else."""
    shape = SHAPE.search(name) if name.startswith(PRODUCT) else None
    return (int(shape[1]), int(shape[2]), int(shape[3])) if shape else (0, 0, 0)


def _multiply_adds(name: str) -> int:
    base, _, rest = name.partition(".")
    shape = rest.partition(".")[0]
    if base == "HMMA" or (base == "DMMA" and shape in DEPTHS):
        return 16 * 8 * DEPTHS[shape]
    return 8 * 8 * 4 if base == "DMMA" else 0


def _shared_bytes(name: str) -> int:
    """What 32 threads move through shared memory, or through the cache that is the same memory."""
    base = name.partition(".")[0]
    if base in ("LDSM", "STSM"):  # matrices of 128 bytes
        return 128 * (4 if ".4" in name else 2 if ".2" in name else 1)
    if base in ("LDS", "STS", "LDGSTS"):
        width = WIDTH.search(name)
        return 4 * int(width[1] if width else 32)
    return 128 if base in ("SHFL", *SPILLS) else 0


def _operand_bytes(instruction: str) -> int:
    rows, columns, depth = _shape(instruction.split()[0])
    itemsize = 4 if ".TF32" in instruction else 2
    return (columns + (0 if FROM_REGISTERS.search(instruction) else rows)) * depth * itemsize
