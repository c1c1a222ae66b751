"""Small programs of PTX, for tests: text around a body, arrays as its tensors."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy import ndarray as Array

from emulator import memory as global_memory
from emulator import shared as shared_memory
from emulator.bulk import TensorMap
from emulator.machine import Machine, Options
from emulator.memory import GlobalMemory
from emulator.syntax import parse
from emulator.translate import Program

__all__ = ["MAP", "run", "text_of"]

HEAD = """
.visible .entry program(
{parameters}
)
.reqntid {threads}
.maxnreg {registers}
{{
.reg .pred %p<20>;
.reg .b16 %rs<40>;
.reg .b32 %r<300>;
.reg .b64 %rd<40>;
mov.u32 %r0, %tid.x;
{addresses}
"""
MAP = 0x30_0000_0000  # the address of the tensor map, of the first array, if there is one


def text_of(body: str, arrays: Sequence[Array], threads: int = 32, registers: int = 128) -> str:
    """`%r0` is the thread, `%rd0`, `%rd1`, ... where the arrays begin, `%rd10`, ... the thread's own elements."""
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 array{n}" for n in range(len(arrays)))
    addresses = "\n".join(
        f"ld.param.b64 %rd{n}, [array{n}];\nmad.wide.u32 %rd{10 + n}, %r0, {array.itemsize}, %rd{n};"
        for n, array in enumerate(arrays)
    )
    head = HEAD.format(parameters=parameters, threads=threads, addresses=addresses, registers=registers)
    return f"{head}{body}\nret;\n}}\n"


def run(
    body: str,
    *arrays: Array,
    threads: int = 32,
    programs: int = 1,
    shared: int = 4096,
    registers: int = 128,
    box: tuple[int, ...] | None = None,
    swizzle: int = 0,
    options: Options = Options(),  # noqa: B008
) -> list[Array]:
    """What the arrays hold afterwards. With a `box`, `MAP` is a tensor map of the first one."""
    kernel = parse(text_of(body, arrays, threads, registers))
    memory = GlobalMemory()
    regions = [memory.place(f"array{n}", array.nbytes, 0) for n, array in enumerate(arrays)]
    memory.build()
    for array, region in zip(arrays, regions, strict=True):
        raw = np.ascontiguousarray(array).view(np.uint8).ravel()
        memory.fill(region, raw, np.arange(0, array.nbytes, array.itemsize), array.itemsize)
    parameters = {f"array{n}": struct.pack("<Q", global_memory.BASE + region.start) for n, region in enumerate(regions)}
    maps = {}
    if box is not None:
        first = arrays[0]
        maps[MAP] = TensorMap("array0", regions[0].start, first.shape, first.strides, box, first.itemsize, swizzle)
    program = Program(kernel, {"global_smem": shared_memory.BASE, "map": MAP})
    Machine(
        program, memory, parameters, shared, programs, np.arange(programs), maps=maps, options=options
    ).run()  # fmt: skip
    return [
        memory.bytes[region.start : region.start + region.size].view(array.dtype).reshape(array.shape).copy()
        for array, region in zip(arrays, regions, strict=True)
    ]
