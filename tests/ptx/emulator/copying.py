"""Asynchronous copies: by threads (`cp.async`), and in bulk through tensor maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numpy import ndarray as Array

from emulator.faults import Unsupported
from emulator.meaning import Meaning, address, instruction, known, number, tensor_address
from emulator.syntax import Instruction

if TYPE_CHECKING:
    from emulator.machine import Machine, Mask

COPIES = "Data Movement and Conversion Instructions: {}"


@instruction("cp.async.ca", "cp.async.cg", section=COPIES.format("cp.async"))
def _cp_async(item: Instruction) -> Meaning:
    """4, 8 or 16 bytes of global memory, or zeros where none of them are to be read."""
    known(item, ("async", "ca", "cg", "shared", "shared::cta", "L2::128B", "L2::cache_hint"))
    to, of, size, *read = item.arguments
    (to, to_offset), (of, of_offset), size = address(to), address(of), number(size)
    if size not in (4, 8, 16) or ("cg" in item.modifiers and size != 16):
        raise Unsupported(f"a copy of {size} bytes")

    def compute(machine: Machine, mask: Mask, to: Array, of: Array, *read: Array) -> None:
        machine.copies.start(to, to_offset, of, of_offset, size, read[0] if read else None, mask)

    return Meaning(compute, ((to, "u32"), (of, "u64"), *((x, "u32") for x in read[:1])), acts=True)


@instruction("cp.async.commit_group", section=COPIES)
def _commit(item: Instruction) -> Meaning:
    return Meaning(lambda machine, mask: machine.copies.commit(mask), acts=True)


@instruction("cp.async.wait_group", section=COPIES.format("cp.async.wait_group / cp.async.wait_all"))
def _wait_group(item: Instruction) -> Meaning:
    count = number(item.arguments[0])
    return Meaning(lambda machine, mask: machine.copies.wait(count, mask), acts=True)


@instruction("cp.async.wait_all", section=COPIES.format("cp.async.wait_group / cp.async.wait_all"))
def _wait_all(item: Instruction) -> Meaning:
    def compute(machine: Machine, mask: Mask) -> None:
        machine.copies.commit(mask)
        machine.copies.wait(0, mask)

    return Meaning(compute, acts=True)


@instruction("cp.async.bulk.tensor", section=COPIES)
def _bulk_tensor(item: Instruction) -> Meaning:
    """A box of a tensor to shared memory, which completes on an mbarrier, or from there, which belongs to a group."""
    if "shared::cta" not in item.modifiers or "tile" in item.modifiers or "multicast::cluster" in item.modifiers:
        raise Unsupported(item.op)
    if item.modifiers.index("shared::cta") > item.modifiers.index("global"):
        return _bulk_store(item, add=False)
    to, of, barrier = item.arguments
    (to, to_offset), (described, coordinates), (barrier, barrier_offset) = (
        address(to), tensor_address(of), address(barrier),
    )  # fmt: skip

    def compute(machine: Machine, mask: Mask, to: Array, described: Array, barrier: Array, *at: Array) -> None:
        for row, thread, place, of, wait, *position in machine.each(mask, to, 0, described, barrier, *at):
            machine.bulk.load(row, thread // 32, place + to_offset, of, position, wait + barrier_offset)

    sources = ((to, "u32"), (described, "u64"), (barrier, "u32"), *((x, "s32") for x in coordinates))
    return Meaning(compute, sources, acts=True)


@instruction("cp.reduce.async.bulk.tensor", section=COPIES)
def _bulk_add(item: Instruction) -> Meaning:
    if "add" not in item.modifiers:
        raise Unsupported(item.op)
    return _bulk_store(item, add=True)


def _bulk_store(item: Instruction, add: bool) -> Meaning:
    to, of = item.arguments
    (described, coordinates), (of, offset) = tensor_address(to), address(of)

    def compute(machine: Machine, mask: Mask, of: Array, described: Array, *at: Array) -> None:
        for row, thread, place, to, *position in machine.each(mask, of, offset, described, *at):
            machine.bulk.store(row, thread // 32, place, to, position, add)

    return Meaning(compute, ((of, "u32"), (described, "u64"), *((x, "s32") for x in coordinates)), acts=True)


@instruction("cp.async.bulk.commit_group", section=COPIES)
def _bulk_commit(item: Instruction) -> Meaning:
    return Meaning(lambda machine, mask: machine.bulk.commit(machine.warps_of(mask)), acts=True)


@instruction("cp.async.bulk.wait_group", section=COPIES)
def _bulk_wait(item: Instruction) -> Meaning:
    count = number(item.arguments[0])
    return Meaning(lambda machine, mask: machine.bulk.wait(count, machine.warps_of(mask)), acts=True)
