"""The table of instructions: by name, the section of the PTX ISA that says what it does, and how it is read.

A name covers all forms that begin with it, unless a longer name does: `cp.async.wait_group 1` is `cp.async.wait_group`.
Reading an instruction gives its `Meaning`: a function of arrays, the operands that it takes and the registers that its
results go to. Sections are named by their titles: their numbers move from version to version (9.7.x in all of them).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from emulator.faults import Unsupported
from emulator.syntax import Argument, Instruction, immediate

__all__ = [
    "TABLE",
    "Entry",
    "Fragment",
    "Layout",
    "Meaning",
    "address",
    "instruction",
    "known",
    "lookup",
    "meaning_of",
    "number",
    "same",
    "tensor_address",
]


class Layout(Protocol):
    """How the registers of a warp, or of four, make up a matrix."""

    kind: str  # of the registers

    def join(self, shape: tuple[int, int], registers: tuple[np.ndarray, ...]) -> np.ndarray: ...

    def part(self, matrix: np.ndarray, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Fragment:
    """Registers that are one operand, or one result: a matrix."""

    registers: tuple[str, ...]
    layout: Layout


Source = tuple[str, str] | Fragment  # an operand and its kind


def same(value: np.ndarray) -> np.ndarray:
    """A result that is its operand."""
    return value


@dataclass(frozen=True)
class Meaning:
    """What an instruction computes, from what, and where that goes.

    `compute` takes the operands' arrays, after the machine and the mask of the threads that take part if it `acts` on
    the machine. It gives an array for one result, a sequence for several, a matrix for a fragment.
    """

    compute: Callable[..., Any]
    sources: tuple[Source, ...] = ()
    results: tuple[tuple[str, str], ...] | Fragment = ()
    acts: bool = False
    ends: str = ""  # a block: "branch", "choice", "exit", "barrier", "registers"
    targets: tuple[str, ...] = ()  # labels that it may lead to, or that of their table

    @property
    def read(self) -> Iterator[str]:
        for source in self.sources:
            yield from source.registers if isinstance(source, Fragment) else [source[0].removeprefix("!")]

    @property
    def written(self) -> list[str]:
        if isinstance(self.results, Fragment):
            return list(self.results.registers)
        return [register for register, _ in self.results]


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    section: str
    read: Callable[[Instruction], Meaning]


TABLE: dict[str, Entry] = {}


def instruction(*names: str, section: str) -> Callable:
    """Puts a reader into the table. `{}` in the section stands for the name."""

    def enter(read: Callable[[Instruction], Meaning]) -> Callable[[Instruction], Meaning]:
        for name in names:
            assert name not in TABLE, f"{name} is there twice"
            TABLE[name] = Entry(section.replace("{}", name), read)
        return read

    return enter


def lookup(op: str) -> Entry:
    """The row of an instruction: that of the longest name that it begins with."""
    parts = op.split(".")
    for length in range(len(parts), 0, -1):
        if entry := TABLE.get(".".join(parts[:length])):
            return entry
    raise Unsupported(op)


def meaning_of(item: Instruction) -> Meaning:
    """An instruction's meaning, read once."""
    found = item.__dict__.get("meaning")
    if found is None:
        try:
            found = item.__dict__["meaning"] = lookup(item.op).read(item)
        except Unsupported as error:
            raise Unsupported(f"{error} in `{item.text}` (line {item.line})") from None
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What readers share
# ---------------------------------------------------------------------------------------------------------------------


def known(item: Instruction, allowed: Iterable[str]) -> None:
    """Refuses a form that the machine does not know: a modifier beyond these, but for the type at the end."""
    for modifier in item.modifiers[:-1]:
        if modifier not in allowed:
            raise Unsupported(f".{modifier}")


def number(argument: Argument) -> int:
    """An operand that must be a number."""
    value = immediate(argument)
    if value is None:
        raise Unsupported(f"{argument}, which is no number")
    return value


ADDRESS = re.compile(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def address(text: Argument) -> tuple[str, int]:
    """`[%r1 + 16]`: the operand that it begins with, and the bytes beyond."""
    match = ADDRESS.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise Unsupported(f"address {text}")
    return match[1], int(match[2] or "0", 0)


TENSOR_ADDRESS = re.compile(r"\[\s*([^\s,]+)\s*,\s*\{([^}]*)\}\s*\]")


def tensor_address(text: Argument) -> tuple[str, list[str]]:
    """`[%rd1, {%r1, %r2}]`: a tensor map and the coordinates, the innermost first."""
    match = TENSOR_ADDRESS.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise Unsupported(f"address {text}")
    return match[1], [coordinate.strip() for coordinate in match[2].split(",")]
