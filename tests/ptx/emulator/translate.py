"""A kernel as Python functions, one for each block, on arrays [programs, threads].

`block(R, machine, mask)`: R holds the registers between blocks, by number, as unsigned bits or predicates; mask says
which threads are there, None for all. Where a warp's or four warps' registers are a matrix, they stay one until
somebody asks for one of them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from emulator import arithmetic, copying, movement, products, synchronization  # noqa: F401  # the rows of the table
from emulator.faults import Unsupported
from emulator.flow import END, Block, blocks_of
from emulator.kinds import DTYPES, constant, is_float, raw, size_of, widened
from emulator.meaning import Fragment, Layout, Meaning, meaning_of, same
from emulator.syntax import Instruction, Kernel, immediate

__all__ = ["Program"]

SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid")
PRODUCT = "wgmma.mma_async"
WAITS = ("mbarrier.try_wait", "mbarrier.test_wait")
POISON = {"pred": False, "u16": 0xDEAD, "u32": 0xFFFFDEAD, "u64": 0xFFFFDEADDEADDEAD}  # in float32 and float64 a NaN


class Program:
    """What can be executed of a kernel."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int]) -> None:
        self.kernel, self.symbols = kernel, symbols
        self.blocks = blocks_of(kernel)
        self.rank = {block.label: n for n, block in enumerate(self.blocks)} | {END: len(self.blocks)}
        self.slots = {register: n for n, register in enumerate(kernel.registers)}
        self.poison = [constant(POISON[kind], kind) for kind in kernel.registers.values()]
        self.sums = sums_of_groups(kernel)
        self.specialized = any(meaning_of(item).ends == "choice" for item in kernel.instructions)
        # Blocks that ask whether a phase of an mbarrier is complete: one that leads to itself waits for that.
        self.waits = [any(item.op.startswith(WAITS) for item in block.code) for block in self.blocks]
        self.names: dict[str, Any] = {"np": np, **{kind: dtype for kind, dtype in DTYPES.items()}}
        self._named: dict[Any, str] = {}
        self.origins: list[Instruction | None] = [None]  # of the lines of the source
        self.file = f"<{kernel.name} {id(self)}>"
        # Written when they are first executed: half of a kernel may never be.
        self.functions: list[Callable] = [partial(self._first, n) for n in range(len(self.blocks))]

    def name(self, thing: Any, prefix: str, key: Any = None) -> str:
        """A name of the generated code for a thing that is no text."""
        key = (prefix, thing if key is None else key)
        if key not in self._named:
            self._named[key] = f"{prefix}{len(self._named)}"
            self.names[self._named[key]] = thing
        return self._named[key]

    def constant(self, value: float | bool, kind: str) -> str:
        array = constant(value, kind)
        return self.name(array, "K", (array.tobytes(), kind))

    def _first(self, n: int, *arguments: Any) -> tuple:
        """Writes and executes a block."""
        above = "\n" * (len(self.origins) - 1)  # so that lines are places in `origins`
        lines = _BlockWriter(self, self.blocks[n]).write(f"block{n}")
        exec(compile(above + "\n".join(lines), self.file, "exec"), self.names)
        self.functions[n] = self.names[f"block{n}"]
        return self.functions[n](*arguments)

    def instruction_at(self, line: int) -> Instruction | None:
        """The instruction that a line of the generated code stands for."""
        return self.origins[line] if line < len(self.origins) else None


def sums_of_groups(kernel: Kernel) -> dict[str, int]:
    """The registers that products of four warps write, and those that these are moved to, numbered."""
    found = {x for item in kernel.instructions if item.op.startswith("wgmma.mma") for x in meaning_of(item).written}
    moves = [
        item.arguments for item in kernel.instructions if item.parts[0] == "mov" and meaning_of(item).compute is same
    ]
    grows = True
    while grows:
        fresh = {to for to, of in moves if of in found} - found
        found |= fresh
        grows = bool(fresh)
    return {register: n for n, register in enumerate(sorted(found))}


class _BlockWriter:
    """Writes the function of one block."""

    def __init__(self, program: Program, block: Block) -> None:
        self.program, self.block = program, block
        self.kinds = program.kernel.registers
        self.lines: list[str] = []
        self.values: dict[str, dict[str, str]] = {}  # register -> kind -> variable
        self.parts: dict[str, tuple[str, int, Layout]] = {}  # register -> a matrix and its place there
        self.joined: dict[Any, str] = {}
        self.version: dict[str, int] = {}
        self.fenced = False  # registers for products of four warps, in this block, but for
        self.unfenced: set[str] = set()  # those that were written since
        self.checked: set[int] = set()  # sums of four warps that are known to have been waited for
        self.variables = 0
        self.instruction: Instruction | None = None

    def write(self, name: str) -> list[str]:
        self._line(f"def {name}(R, machine, mask):", 0)
        ending = self.block.last
        for item in self.block.code:
            if item is not ending:
                self.instruction = item
                self._instruction(item, meaning_of(item))
        ways = self._ways(ending)
        self._keep()
        self._line(f"return {ways}")
        return self.lines

    def _line(self, text: str, indent: int = 1) -> None:
        self.lines.append("    " * indent + text)
        self.program.origins.append(self.instruction)

    def _new(self, expression: str, prefix: str = "v") -> str:
        self.variables += 1
        self._line(f"{prefix}{self.variables} = {expression}")
        return f"{prefix}{self.variables}"

    # Instructions ----------------------------------------------------------------------------------------------------

    def _instruction(self, item: Instruction, meaning: Meaning) -> None:
        if meaning.compute is same and not item.predicate and self._alias(meaning):
            return
        arguments = [self._source(source) for source in meaning.sources]
        self._check_fence(item, meaning)
        self._check_sums(meaning, product=item.op.startswith(PRODUCT))
        if meaning.acts:
            arguments = ["machine", self._mask(item), *arguments]
        if item.op.startswith(PRODUCT):
            numbers = np.array([self.program.sums[register] for register in meaning.written])
            self._line(f"machine.products.issue({self.program.name(numbers, 'S', tuple(numbers))}, mask)")
        call = f"{self.program.name(meaning.compute, 'F')}({', '.join(arguments)})"
        if isinstance(meaning.results, Fragment):
            matrix = self._new(call, "m")
            for n, register in enumerate(meaning.results.registers):
                self._forget(register)
                self.parts[register] = (matrix, n, meaning.results.layout)
        elif not meaning.results:
            self._line(call)
        else:
            value = self._new(call)
            several = len(meaning.results) > 1
            for n, (register, kind) in enumerate(meaning.results):
                self._set(register, kind, f"{value}[{n}]" if several else value)

    def _check_sums(self, meaning: Meaning, product: bool) -> None:
        """Sums of four warps are touched after they were waited for, but by the next product that adds to them."""
        sums = meaning.results if product else None
        touched = set() if product else set(meaning.written)
        for source in meaning.sources:
            if isinstance(source, Fragment):
                touched |= set() if sums and source.registers == sums.registers else set(source.registers)
            else:
                touched.add(source[0])
        numbers = {self.program.sums[x] for x in touched if x in self.program.sums} - self.checked
        if numbers:
            self._line(f"machine.products.check({sorted(numbers)}, mask)")
        self.checked = set() if meaning.acts else self.checked | numbers

    def _check_fence(self, item: Instruction, meaning: Meaning) -> None:
        """What ordinary instructions write to registers is fenced before a product of four warps takes it."""
        if item.op.startswith("wgmma.fence"):
            self.fenced, self.unfenced = True, set()
        elif item.op.startswith(PRODUCT):
            operands = [x for x in (*meaning.sources, meaning.results) if isinstance(x, Fragment)]
            registers = {register for operand in operands for register in operand.registers}
            if self.program.specialized and (not self.fenced or registers & self.unfenced):
                self._line("machine.products.unfenced()")
        else:
            self.unfenced |= set(meaning.written)

    def _alias(self, meaning: Meaning) -> bool:
        """A move from register to register: both stand for the same values."""
        ((source, _),), ((to, _),) = meaning.sources, meaning.results
        if source not in self.kinds or self.kinds[source] != self.kinds[to]:
            return False
        if source not in self.parts:
            self._read(source, self.kinds[source])
        values, part = dict(self.values.get(source, {})), self.parts.get(source)
        if source in self.program.sums:
            self._line(f"machine.products.move({self.program.sums[source]}, {self.program.sums[to]}, mask)")
        self._forget(to)
        self.values[to] = values
        if part:
            self.parts[to] = part
        return True

    def _mask(self, item: Instruction) -> str:
        if not item.predicate:
            return "mask"
        return self._joined(
            ("mask", item.negated, *self._key(item.predicate)), f"machine.both(mask, {self._predicate(item)})"
        )

    def _predicate(self, item: Instruction) -> str:
        variable = self._read(item.predicate, "pred")
        return f"~{variable}" if item.negated else variable

    # Operands --------------------------------------------------------------------------------------------------------

    def _source(self, source: tuple[str, str] | Fragment) -> str:
        if isinstance(source, Fragment):
            return self._fragment(source)
        operand, kind = source
        return f"~{self._read(operand[1:], kind)}" if operand.startswith("!") else self._read(operand, kind)

    def _read(self, operand: str, kind: str) -> str:
        """A variable with an operand as an array of this kind."""
        if operand in self.kinds:
            return self._register(operand, kind)
        if SPECIAL.fullmatch(operand):
            return self._joined(("special", operand, kind), f"machine.special[{operand!r}].astype({kind}, copy=False)")
        if operand in self.program.symbols:
            return self.program.constant(self.program.symbols[operand], kind)
        if operand[:2] in ("0f", "0d"):
            form = {"0f": ">f", "0d": ">d"}[operand[:2]]
            bits = bytes.fromhex(operand[2:])
            return self.program.constant(struct.unpack(form, bits)[0] if is_float(kind) else int.from_bytes(bits), kind)
        value = immediate(operand)
        if value is None:
            raise Unsupported(f"operand {operand} in `{self.instruction.text}`")
        return self.program.constant(bool(value) if kind == "pred" else value, kind)

    def _register(self, register: str, kind: str) -> str:
        values = self.values.setdefault(register, {})
        if kind in values:
            return values[kind]
        if register in self.parts:
            matrix, index, layout = self.parts[register]
            home = layout.kind
            if home not in values:
                values[home] = self._new(f"{self.program.name(layout, 'L')}.part({matrix}, {index})")
        elif not values:  # from an earlier block
            values[self.kinds[register]] = self._new(f"R[{self.program.slots[register]}]")
        if kind not in values:
            home = next(iter(values))
            if size_of(kind) > size_of(home) or "pred" in (kind, home):
                raise Unsupported(f"{register}, {home}, as {kind} in `{self.instruction.text}`")
            narrow = f".astype({raw(size_of(kind))})" if size_of(kind) < size_of(home) else ""
            values[kind] = self._new(f"{values[home]}{narrow}.view({kind})")
        return values[kind]

    def _fragment(self, fragment: Fragment) -> str:
        parts = [self.parts.get(register) for register in fragment.registers]
        whole = parts[0] and parts[0][0]
        if whole and parts == [(whole, n, fragment.layout) for n in range(len(parts))]:
            return whole
        layout = self.program.name(fragment.layout, "L")
        values = ", ".join(self._read(register, fragment.layout.kind) for register in fragment.registers)
        key = (layout, *map(self._key, fragment.registers))
        return self._joined(key, f"{layout}.join(machine.shape, ({values},))")

    def _key(self, register: str) -> tuple[str, int]:
        return register, self.version.get(register, 0)

    def _joined(self, key: Any, expression: str) -> str:
        """A variable for what was computed from the same operands before."""
        if key not in self.joined:
            self.joined[key] = self._new(expression)
        return self.joined[key]

    # Results ---------------------------------------------------------------------------------------------------------

    def _forget(self, register: str) -> None:
        self.values.pop(register, None)
        self.parts.pop(register, None)
        self.version[register] = self.version.get(register, 0) + 1

    def _set(self, register: str, kind: str, expression: str) -> None:
        """Writes a register, where the predicate is true; a wider one with the sign of the kind."""
        if register == "_":
            return
        size = size_of(self.kinds[register])
        if size > size_of(kind):
            kind = widened(kind, size) if not is_float(kind) else kind
            expression = f"{expression}.astype({kind})"
        if self.instruction.predicate:
            old, predicate = self._read(register, kind), self._predicate(self.instruction)
            expression = f"np.where({predicate}, {expression}, {old})"
        variable = expression if expression.isidentifier() else self._new(expression)
        self._forget(register)
        self.values[register] = {kind: variable}

    def _keep(self) -> None:
        """Writes back what is read after this block."""
        for register in sorted(self.block.writes & self.block.live_out):
            if register in self.kinds:
                slot, value = self.program.slots[register], self._read(register, self.kinds[register])
                self._line(f"R[{slot}] = {value} if mask is None else np.where(mask, {value}, R[{slot}])")

    # Ways on ---------------------------------------------------------------------------------------------------------

    def _ways(self, ending: Instruction | None) -> str:
        """Where it goes on: an expression for what the machine takes."""
        rank = self.program.rank
        following = rank.get(self.block.follows)
        if ending is None:
            return f"('go', {following})"
        self.instruction = ending
        meaning = meaning_of(ending)
        operands = [self._source(source) for source in meaning.sources]
        if meaning.ends in ("barrier", "registers"):
            return f"('{meaning.ends}', {following}, {', '.join(operands)})"
        if meaning.ends == "choice":
            targets = [rank[label] for label in self.program.kernel.tables[meaning.targets[0]]]
            return f"('choice', np.array({targets}), {operands[0]})"
        target = rank[END if meaning.ends == "exit" else meaning.targets[0]]
        if not ending.predicate:
            return f"('go', {target})"
        return f"('branch', {target}, {following}, {self._predicate(ending)})"
