"""Branches, barriers, warps: who goes where, who waits for whom, and what lanes tell each other."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from emulator.faults import Unsupported
from emulator.kinds import kind_of
from emulator.meaning import Meaning, address, instruction, known, number, same
from emulator.syntax import Instruction, immediate

if TYPE_CHECKING:
    from emulator.machine import Machine, Mask

CONTROL = "Control Flow Instructions: {}"
PARALLEL = "Parallel Synchronization and Communication Instructions: {}"
WHOLE_WARP = (-1, 0xFFFFFFFF)


# ---------------------------------------------------------------------------------------------------------------------
# Branches
# ---------------------------------------------------------------------------------------------------------------------


@instruction("bra", section=CONTROL)
def _bra(item: Instruction) -> Meaning:
    return Meaning(same, ends="branch", targets=(item.arguments[0],))


@instruction("brx.idx", section=CONTROL)
def _brx(item: Instruction) -> Meaning:
    index, table = item.arguments
    return Meaning(same, ((index, "u32"),), ends="choice", targets=(table,))


@instruction("ret", "exit", section=CONTROL)
def _ret(item: Instruction) -> Meaning:
    return Meaning(same, ends="exit")


# ---------------------------------------------------------------------------------------------------------------------
# Barriers
# ---------------------------------------------------------------------------------------------------------------------


@instruction("bar.sync", "barrier.sync", section=PARALLEL)
def _bar(item: Instruction) -> Meaning:
    """Of all threads of a program, or of so many."""
    if item.predicate:
        raise Unsupported("under a predicate")
    return Meaning(same, tuple((operand, "u32") for operand in item.arguments), ends="barrier")


@instruction("bar.warp.sync", section=PARALLEL)
def _bar_warp(item: Instruction) -> Meaning:
    _whole_warp(item.arguments[0])
    return Meaning(lambda machine, mask: machine.sync_warps(mask), acts=True)


def _whole_warp(members: str) -> None:
    if immediate(members) not in WHOLE_WARP:
        raise Unsupported("a part of a warp")


@instruction("elect.sync", section=PARALLEL)
def _elect(item: Instruction) -> Meaning:
    """The first lane, and whether a lane is that one."""
    _whole_warp(item.arguments[1])

    def compute(machine: Machine, mask: Mask) -> tuple[Array, Array]:
        machine.whole_warps(mask)
        return np.zeros((1, 1), np.uint32), machine.special["%laneid"] == 0

    lane, elected = item.arguments[0].split("|")
    return Meaning(compute, (), ((lane, "u32"), (elected, "pred")), acts=True)


@instruction("fence.proxy.async", section=PARALLEL.format("fence"))
def _fence_async(item: Instruction) -> Meaning:
    return Meaning(lambda machine, mask: machine.fence_async(mask), acts=True)


@instruction("fence.mbarrier_init", section=PARALLEL.format("fence"))
def _fence_init(item: Instruction) -> Meaning:
    return Meaning(lambda machine, mask: machine.barriers.fence(machine.warps_of(mask)), acts=True)


@instruction("fence", "membar", section=PARALLEL)
def _fence(item: Instruction) -> Meaning:
    """Orders accesses to global memory, which the machine takes as they come."""
    known(item, ("acq_rel", "sc", "cta", "gpu", "sys", "cluster", "gl"))
    return Meaning(lambda machine, mask: None, acts=True)


@instruction("setmaxnreg", section="Miscellaneous Instructions: {}")
def _setmaxnreg(item: Instruction) -> Meaning:
    """How many registers each thread of four warps has; more only when others have given back as many."""
    if item.parts[1] == "inc":
        return Meaning(same, ((item.arguments[0], "u32"),), ends="registers")
    count = number(item.arguments[0])
    return Meaning(lambda machine, mask: machine.give_registers(count, mask), acts=True)


# ---------------------------------------------------------------------------------------------------------------------
# Lanes
# ---------------------------------------------------------------------------------------------------------------------


@instruction("shfl.sync", section="Data Movement and Conversion Instructions: shfl.sync")
def _shfl(item: Instruction) -> Meaning:
    mode = item.parts[2]
    to, value, by, clamp, members = item.arguments
    _whole_warp(members)
    results = [register for register in to.split("|") if register != "_"]
    if len(results) > 1:
        raise Unsupported("the predicate of a shuffle")
    if immediate(by) is not None and immediate(clamp) is not None:
        sources = shuffle_sources(mode, number(by), number(clamp))
        return Meaning(partial(_shuffle, sources), ((value, "u32"),), ((results[0], "u32"),), acts=True)
    operands = ((value, "u32"), (by, "u32"), (clamp, "u32"))
    return Meaning(partial(_shuffle_by, mode), operands, ((results[0], "u32"),), acts=True)


def _shuffle(sources: Array, machine: Machine, mask: Mask, value: Array) -> Array:
    machine.whole_warps(mask)
    if value.shape[1] == 1:
        return value
    return value.reshape(len(value), -1, 32)[:, :, sources].reshape(value.shape)


def _shuffle_by(mode: str, machine: Machine, mask: Mask, value: Array, by: Array, clamp: Array) -> Array:
    machine.whole_warps(mask)
    value, by, clamp = (machine.lanes(x) for x in (value, by, clamp))
    return np.take_along_axis(value, shuffle_sources(mode, by, clamp), 2).reshape(machine.shape)


def shuffle_sources(mode: str, by: int | Array, clamp: int | Array) -> Array:
    """The lane that each lane reads; `by` and `clamp` may be arrays over lanes."""
    lane = np.arange(32)
    by, clamp = np.asarray(by).astype(np.int64) & 31, np.asarray(clamp).astype(np.int64)
    segment, limit = (clamp >> 8) & 31, clamp & 31
    lowest, last = lane & segment, (lane & segment) | (limit & ~segment)
    source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | (by & ~segment)}[mode]
    valid = source >= last if mode == "up" else source <= last
    return np.where(valid, source, lane)


REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


@instruction("redux.sync", section=PARALLEL)
def _redux(item: Instruction) -> Meaning:
    known(item, ("sync", *REDUCTIONS))
    reduction, kind = REDUCTIONS[item.parts[2]], kind_of(item.type)
    to, value, members = item.arguments

    def compute(machine: Machine, mask: Mask, value: Array, members: Array) -> Array:
        machine.whole_warps(mask)
        if (members != 0xFFFFFFFF).any() and (mask is None or (members != 0xFFFFFFFF)[mask].any()):
            raise Unsupported("a reduction of a part of a warp")
        return np.repeat(reduction.reduce(machine.lanes(value), axis=2, dtype=value.dtype), 32, axis=1)

    return Meaning(compute, ((value, kind), (members, "u32")), ((to, kind),), acts=True)


# ---------------------------------------------------------------------------------------------------------------------
# mbarriers
# ---------------------------------------------------------------------------------------------------------------------


@instruction("mbarrier.init", section=PARALLEL)
def _init(item: Instruction) -> Meaning:
    base, offset = address(item.arguments[0])
    count = number(item.arguments[1])
    return Meaning(
        lambda machine, mask, at: machine.barriers.init(machine.each(mask, at, offset), count),
        ((base, "u32"),),
        acts=True,
    )


@instruction("mbarrier.inval", section=PARALLEL)
def _inval(item: Instruction) -> Meaning:
    base, offset = address(item.arguments[0])
    return Meaning(
        lambda machine, mask, at: machine.barriers.invalidate(machine.each(mask, at, offset)),
        ((base, "u32"),),
        acts=True,
    )


@instruction("mbarrier.arrive", section=PARALLEL)
def _arrive(item: Instruction) -> Meaning:
    """Arrivals, or one arrival after which so many bytes more are expected."""
    state, to, *amount = item.arguments
    if state != "_":
        raise Unsupported("the state of an mbarrier")
    base, offset = address(to)
    amount = number(amount[0]) if amount else 1
    count, expected = (1, amount) if "expect_tx" in item.modifiers else (amount, 0)
    return Meaning(
        lambda machine, mask, at: machine.barriers.arrive(machine.each(mask, at, offset), count, expected),
        ((base, "u32"),),
        acts=True,
    )


@instruction("mbarrier.try_wait", "mbarrier.test_wait", section=PARALLEL)
def _try_wait(item: Instruction) -> Meaning:
    if "parity" not in item.modifiers:
        raise Unsupported("a wait for a state")
    to, of, parity, *_ = item.arguments
    base, offset = address(of)

    def compute(machine: Machine, mask: Mask, at: Array, parity: Array) -> Array:
        done = np.zeros(machine.shape, bool)
        for row, warp, lanes, place, phase in machine.each_warp(mask, at + np.uint32(offset), parity & np.uint32(1)):
            done[row, lanes] = machine.barriers.complete(row, warp, place, phase)
        return done

    return Meaning(compute, ((base, "u32"), (parity, "u32")), ((to, "pred"),), acts=True)
