"""PTX text as a list of instructions and labels.

What a program of Triton's has, and no more: one entry, no functions, no variables. Registers and labels that an inline
block declares get names of their own.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from emulator.faults import Unsupported
from emulator.kinds import kind_of, raw, size_of

__all__ = ["Argument", "Instruction", "Kernel", "immediate", "parse"]

Argument = str | tuple[str, ...]

ENTRY = re.compile(r"\.visible\s+\.entry\s+([\w$]+)\(([^)]*)\)([^{]*)\{")
FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
TOKEN = re.compile(
    r"""
    \s+
    | \.loc\s+(?P<file>\d+)\s+(?P<row>\d+)[^\n/]*(?://[ \t]*(?P<chain>[^\n]*))?
    | //[^\n]*
    | (?P<open>\{) | (?P<close>\})
    | (?P<label>[$\w]+):(?!:)
    | (?P<statement>[^;]+);
    """,
    re.VERBOSE,
)
STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
NAME = re.compile(r"(?<![\w%$.])[A-Za-z_%$][\w$]*")
IMMEDIATE = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?")


@dataclass(eq=False)
class Instruction:
    """`op arguments`, under a predicate or not."""

    op: str
    arguments: tuple[Argument, ...]
    predicate: str | None = None  # a register
    negated: bool = False
    text: str = ""
    line: int = 0  # of the PTX
    source: str = ""  # the line of Python that it comes from

    @cached_property
    def parts(self) -> list[str]:
        return self.op.split(".")

    @property
    def modifiers(self) -> list[str]:
        return self.parts[1:]

    @property
    def type(self) -> str:
        return self.parts[-1]


@dataclass
class Kernel:
    """An entry: its parameters, its registers and its code."""

    name: str
    parameters: list[tuple[str, int]]  # name and size in bytes
    threads: int  # of a program
    most_registers: int | None  # that a thread may have, where the text says it
    registers: dict[str, str] = field(default_factory=dict)  # and their kinds: pred, u16, u32, u64
    code: list[Instruction | str] = field(default_factory=list)  # instructions and labels
    tables: dict[str, list[str]] = field(default_factory=dict)  # labels by the label of their table

    @property
    def instructions(self) -> Iterator[Instruction]:
        return (item for item in self.code if isinstance(item, Instruction))


def immediate(text: Argument) -> int | None:
    """The number that an operand is, if it is one."""
    return int(text.rstrip("U"), 0) if isinstance(text, str) and IMMEDIATE.fullmatch(text) else None


def parse(text: str) -> Kernel:
    entries = list(ENTRY.finditer(text))
    if len(entries) != 1 or re.search(r"^\s*\.func|\bcall\b", text, re.MULTILINE):
        raise Unsupported("a program of several functions")
    name, parameters, directives = entries[0].groups()
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    registers = re.search(r"\.maxnreg\s+(\d+)", directives)
    kernel = Kernel(
        name,
        [_parameter(line) for line in parameters.split(",") if line.strip()],
        int(threads.group(1)),
        int(registers.group(1)) if registers else None,
    )
    _Reader(text, kernel).read(entries[0].end())
    return kernel


def _parameter(line: str) -> tuple[str, int]:
    """`.param .u64 .ptr .global .align 1 name`, or `.param .align 64 .b8 name[128]`."""
    array = re.search(r"([\w$]+)\[(\d+)\]$", line.strip())
    if array:
        return array.group(1), int(array.group(2))
    words = line.split()
    return words[-1], size_of(kind_of(words[1].lstrip(".")))


class _Reader:
    """Reads the body of a kernel, statement by statement."""

    def __init__(self, text: str, kernel: Kernel) -> None:
        self.text, self.kernel = text, kernel
        self.files = {number: path.rsplit("/", 1)[-1] for number, path in FILE.findall(text)}
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.scopes: list[dict[str, str]] = [{}]
        self.renamed = 0
        self.source = ""

    def read(self, position: int) -> None:
        while self.scopes:
            match = TOKEN.match(self.text, position)
            if match is None:
                raise Unsupported(f"text that is no statement: {self.text[position : position + 40]!r}")
            self._take(match)
            position = match.end()

    def _take(self, match: re.Match) -> None:
        kind = match.lastgroup
        if kind == "open":
            self.scopes.append({})
        elif kind == "close":
            self.scopes.pop()
        elif kind == "label":
            inside = len(self.scopes) > 1
            self.kernel.code.append(self._declare(match["label"]) if inside else match["label"])
        elif kind == "statement":
            self._statement(match["statement"], bisect.bisect(self.newlines, match.start()) + 1)
        elif match["file"]:
            self.source = (match["chain"] or f"{self.files.get(match['file'], '?')}:{match['row']}").strip()

    def _declare(self, name: str) -> str:
        self.renamed += 1
        self.scopes[-1][name] = f"{name}@{self.renamed}"
        return self.scopes[-1][name]

    def _resolve(self, text: str) -> str:
        def known(match: re.Match) -> str:
            return next((scope[match[0]] for scope in reversed(self.scopes) if match[0] in scope), match[0])

        return NAME.sub(known, text)

    def _statement(self, text: str, line: int) -> None:
        text = " ".join(re.sub(r"//[^\n]*", "", text).split())
        if text.startswith(".reg"):
            self._registers(*re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups())
        elif text.startswith(".branchtargets"):
            label = self.kernel.code.pop()
            self.kernel.tables[label] = [piece.strip() for piece in text.removeprefix(".branchtargets").split(",")]
        elif text.startswith(".pragma"):
            pass
        else:
            match = STATEMENT.match(text)
            if match is None:
                raise Unsupported(text)
            negated, predicate, op, rest = match.groups()
            arguments = tuple(_arguments(self._resolve(rest)))
            predicate = predicate and self._resolve(predicate)
            instruction = Instruction(op, arguments, predicate, negated == "!", text, line, self.source)
            self.kernel.code.append(instruction)

    def _registers(self, kind: str, names: str) -> None:
        kind = kind if kind == "pred" else raw(size_of(kind_of(kind)))
        for name in names.split(","):
            numbered = re.fullmatch(r"\s*(%?\w+)<(\d+)>\s*", name)
            if numbered:
                self.kernel.registers |= {f"{numbered[1]}{n}": kind for n in range(int(numbered[2]))}
            else:
                self.kernel.registers[self._declare(name.strip())] = kind


def _arguments(text: str) -> Iterator[Argument]:
    """`%r1, {%r2, %r3}, [%r4+8]`, piece by piece; what is in braces as a tuple."""
    depth, start = 0, 0
    for position, char in enumerate(text + ","):
        if char == "," and depth == 0:
            piece = text[start:position].strip()
            start = position + 1
            if piece.startswith("{"):
                yield tuple(part.strip() for part in piece[1:-1].split(","))
            elif piece:
                yield piece
        else:
            depth += (char in "{[(") - (char in "}])")
