"""Matrix instructions: of a warp (`mma`, `ldmatrix`, `stmatrix`) and of four (`wgmma`).

Products are summed in float32 (float64) in the order that BLAS takes; the part has another order, and cuts sums off
where this rounds them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from emulator.faults import Unsupported
from emulator.fragments import Accumulator, GroupAccumulator, LeftOperand, RightOperand
from emulator.meaning import Fragment, Meaning, address, instruction, known, number
from emulator.syntax import Instruction, immediate

if TYPE_CHECKING:
    from emulator.machine import Machine, Mask

WARP = "Warp Level Matrix Instructions: {}"
GROUP = "Asynchronous Warpgroup Level Matrix Instructions: {}"

# Shape and type of the operands, and the kind of the sums.
SHAPES = {
    **{(shape, element): "f32" for shape in ("m16n8k8", "m16n8k16") for element in ("bf16", "f16")},
    **{(shape, "tf32"): "f32" for shape in ("m16n8k4", "m16n8k8")},
    **{(shape, "f64"): "f64" for shape in ("m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16")},
}


@instruction("mma.sync", section=WARP.format("mma"))
def _mma(item: Instruction) -> Meaning:
    known(item, ("sync", "aligned", "row", "col", *(x for pair in SHAPES for x in pair), "f32"))
    shape, orders, (d, a, b, c) = item.parts[3], item.parts[4:6], item.parts[6:10]
    kind = SHAPES.get((shape, a))
    if orders != ["row", "col"] or a != b or c != d or c != kind or item.predicate:
        raise Unsupported(item.op)
    d, left, right, c = item.arguments
    sums = Accumulator(kind)

    def compute(machine: Machine, mask: Mask, left: Array, right: Array, c: Array) -> Array:
        machine.whole_warps(mask)
        return np.matmul(left, right) + c

    sources = Fragment(left, LeftOperand(a)), Fragment(right, RightOperand(a)), Fragment(c, sums)
    return Meaning(compute, sources, Fragment(d, sums), acts=True)


def _matrices(item: Instruction) -> int:
    """How many matrices of 8 x 8 elements of 16 bits."""
    known(item, ("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"))
    if item.type != "b16":
        raise Unsupported(item.op)
    return next(int(part[1]) for part in item.parts if re.fullmatch(r"x[124]", part))


@instruction("ldmatrix", section=WARP)
def _ldmatrix(item: Instruction) -> Meaning:
    count, trans = _matrices(item), "trans" in item.modifiers
    base, offset = address(item.arguments[1])

    def compute(machine: Machine, mask: Mask, at: Array) -> Array | list[Array]:
        machine.whole_warps(mask)
        words = machine.shared.load_rows(at, offset, count, mask)  # [programs, warps, count, 8, 4]
        if trans:
            words = np.ascontiguousarray(words.view(np.uint16).swapaxes(3, 4)).view(np.uint32)
        matrices = [words[:, :, n].reshape(machine.shape) for n in range(count)]
        return matrices if count > 1 else matrices[0]

    return Meaning(compute, ((base, "u32"),), tuple((x, "u32") for x in item.arguments[0]), acts=True)


@instruction("stmatrix", section=WARP)
def _stmatrix(item: Instruction) -> Meaning:
    count, trans = _matrices(item), "trans" in item.modifiers
    base, offset = address(item.arguments[0])

    def compute(machine: Machine, mask: Mask, at: Array, *matrices: Array) -> None:
        machine.whole_warps(mask)
        words = np.stack([machine.lanes(x).reshape(*machine.lanes(x).shape[:2], 8, 4) for x in matrices], 2)
        if trans:
            words = np.ascontiguousarray(words.view(np.uint16).swapaxes(3, 4)).view(np.uint32)
        machine.shared.store_rows(at, offset, words, mask)

    assert len(item.arguments[1]) == count
    return Meaning(compute, ((base, "u32"), *((x, "u32") for x in item.arguments[1])), acts=True)


# ---------------------------------------------------------------------------------------------------------------------
# Products of four warps
# ---------------------------------------------------------------------------------------------------------------------


@instruction("wgmma.mma_async", section=GROUP)
def _wgmma(item: Instruction) -> Meaning:
    """D = A B, or A B + D where the predicate after them is true. B is in shared memory, A there or in registers."""
    columns, element = _wgmma_shape(item)
    d, left, right, scale, *rest = item.arguments
    signs, transposed = [number(x) for x in rest[:2]], [bool(number(x)) for x in rest[2:]]
    if signs != [1, 1]:
        raise Unsupported("a negative operand")
    if isinstance(left, tuple):
        transposed = [False, *(transposed or [False])]
        left_source = Fragment(left, LeftOperand(element))
    else:
        left_source = (left, "u64")
    trans_left, trans_right = transposed or (False, False)
    sums = GroupAccumulator()

    def compute(machine: Machine, mask: Mask, left: Array, right: Array, scale: Array, *d: Array) -> Array:
        products = machine.products
        if left.ndim == 2:
            left = products.operand(left, 64, element, trans_left, mask)
        else:  # each warp has 16 rows
            left = left.reshape(len(left), -1, 64, left.shape[3])
        right = products.operand(right, columns, element, trans_right, mask)
        product = np.matmul(left, right.swapaxes(2, 3))
        if not d:
            return product
        adds = np.broadcast_to(scale, machine.shape).reshape(len(left), -1, 128)[:, :, :1, None]
        return product + np.where(adds, d[0], np.float32(0))

    before = () if immediate(scale) == 0 else (Fragment(d, sums),)
    return Meaning(compute, (left_source, (right, "u64"), (scale, "pred"), *before), Fragment(d, sums), acts=True)


def _wgmma_shape(item: Instruction) -> tuple[int, str]:
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", item.parts[4])
    element = item.type
    depth = {"bf16": 16, "f16": 16, "tf32": 8}.get(element)
    if item.parts[5] != "f32" or item.parts[6] != element or int(shape[2]) != depth or item.predicate:
        raise Unsupported(item.op)
    return int(shape[1]), element


@instruction("wgmma.fence", section=GROUP)
def _wgmma_fence(item: Instruction) -> Meaning:
    """Orders what warps do to registers before the product that takes them: the machine asks whether it is there."""
    return Meaning(lambda machine, mask: machine.products.fence(mask), acts=True)


@instruction("wgmma.commit_group", section=GROUP)
def _wgmma_commit(item: Instruction) -> Meaning:
    return Meaning(lambda machine, mask: machine.products.commit(mask), acts=True)


@instruction("wgmma.wait_group", section=GROUP)
def _wgmma_wait(item: Instruction) -> Meaning:
    count = number(item.arguments[0])
    return Meaning(lambda machine, mask: machine.products.wait(count, mask), acts=True)
