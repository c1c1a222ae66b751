"""Kinds of mistakes that are put into PTX: what a line has, and what takes its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["MISTAKES", "Mistake"]

Replacement = str | Callable[[re.Match], str]

ARRIVAL = r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];"
WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete"
NOTHING = r"(?:0fFF800000|0f00000000|0x0000|0)"  # what hidden numbers become


@dataclass(frozen=True)
class Mistake:
    """A change of one line; `everywhere`: of all lines that one statement of the source became, in both consumers."""

    pattern: str
    replacement: Replacement
    everywhere: bool = False

    def made(self, match: re.Match) -> str:
        return match.expand(self.replacement) if isinstance(self.replacement, str) else self.replacement(match)


def _count_up(group: int, by: int) -> Callable[[re.Match], str]:
    """The match with one of its groups, a number, raised."""

    def replace(match: re.Match) -> str:
        first, last = (match.start(group) - match.start(), match.end(group) - match.start())
        return f"{match[0][:first]}{int(match[group]) + by}{match[0][last:]}"

    return replace


def _swap(one: int, other: int) -> Callable[[re.Match], str]:
    """The match with two of its groups in each other's place."""

    def replace(match: re.Match) -> str:
        a, b, c, d = (x - match.start() for x in (*match.span(one), *match.span(other)))
        return f"{match[0][:a]}{match[other]}{match[0][b:c]}{match[one]}{match[0][d:]}"

    return replace


MISTAKES: dict[str, Mistake] = {
    # Barriers
    "barrier dropped": Mistake(r"^\tbar\.sync \t0;", ""),
    "barrier of some warps dropped": Mistake(r"^\s*bar(rier)?\.sync\s+(\d+, \d+|1);", ""),
    "lanes do not wait": Mistake(r"^\s*bar\.warp\.sync\s+-1;", ""),
    # Waits and commits of copies by threads
    "wait for one group less": Mistake(r"cp\.async\.wait_group\s+(\d+);", _count_up(1, 1)),
    "commit dropped": Mistake(r"^\tcp\.async\.commit_group;", ""),
    "copy to 16 bytes beside": Mistake(r"cp\.async\.c[ag]\.shared\.global \[ %r\d+ \+ (\d+) \]", _count_up(1, 16)),
    # Arrivals, phases, bytes
    "arrival dropped": Mistake(rf"^\s*{ARRIVAL}", ""),
    "arrival twice": Mistake(rf"({ARRIVAL})", r"\1\n\1"),
    "arrival elsewhere": Mistake(r"(mbarrier\.arrive\.shared::cta\.b64 _, \[)(%r\d+)(\];)", r"\1\2+8\3"),
    "arrival before the products are through": Mistake(
        rf"(wgmma\.wait_group[^;]*;)((?:(?!wgmma|mbarrier)[\s\S])*?{ARRIVAL})", r"\2\n\1"
    ),
    "wait dropped": Mistake(rf"{WAIT}, [^;]+;", "setp.eq.b32 complete, 0, 0;"),
    "wait for the other phase": Mistake(
        rf"waitLoop:\s*({WAIT}, \[%r\d+\], )(%r\d+);",
        r".reg .b32 other;\nxor.b32 other, \2, 1;\nwaitLoop:\n\1other;",
    ),
    "16 bytes more expected": Mistake(r"expect_tx\.shared::cta\.b64 _, \[%r\d+\], (\d+);", _count_up(1, 16)),
    "16 bytes fewer expected": Mistake(r"expect_tx\.shared::cta\.b64 _, \[%r\d+\], (\d+);", _count_up(1, -16)),
    "initialized for one arrival more": Mistake(r"mbarrier\.init\.shared::cta\.b64 \[%r\d+\], (\d+);", _count_up(1, 1)),
    "one slot for two": Mistake(r"and\.b32(\s+%r\d+, %r\d+, )1;", r"and.b32\g<1>0;", everywhere=True),
    # Fences, products, bulk copies
    "fence dropped": Mistake(r"^\s*fence\.proxy\.async\S*;", ""),
    "registers not fenced": Mistake(r"^\s*wgmma\.fence\.sync\.aligned;", ""),
    "products waited for later": Mistake(r"wgmma\.wait_group\.sync\.aligned (\d);", _count_up(1, 1)),
    "products not committed": Mistake(r"^\s*wgmma\.commit_group\.sync\.aligned;", ""),
    "copy out not waited for": Mistake(r"cp\.async\.bulk\.wait_group\.read\s+(\d+);", _count_up(1, 1)),
    "coordinates swapped": Mistake(r"bulk\.tensor\S* \[[^\]]*\], \[%rd\d+, \{%r\d+, (%r\d+), (%r\d+)", _swap(1, 2)),
    "copy begun one element later": Mistake(
        r"(@%p\d+ cp\.async\.bulk\.tensor\S*tx::bytes \[%r\d+\], \[%rd\d+, \{)(%r\d+)", r"add.s32 \2, \2, 1;\n\1\2"
    ),
    # Operands
    "halves of A swapped": Mistake(r"mma\.sync\S* \{[^}]*\}, \{ (\S+), (\S+), ", _swap(1, 2)),
    "halves of B swapped": Mistake(r"mma\.sync\S* \{[^}]*\}, \{[^}]*\}, \{ (\S+), (\S+) \}", _swap(1, 2)),
    "transposition dropped": Mistake(r"(ldmatrix\S*)\.trans\.shared", r"\1.shared"),
    "transposition added": Mistake(r"(ldmatrix\S*x4)\.shared", r"\1.trans.shared"),
    "descriptor advanced too far": Mistake(r"add\.s64\s+%rd\d+, %rd\d+, (4611686293305294850);", _count_up(1, 2)),
    "operand of four warps transposed": Mistake(r"(wgmma\.mma_async[^;]*, 1, 1, [01], )0;", r"\g<1>1;"),
    "sums of four warps begin anew": Mistake(r"(wgmma\.mma_async[^;]*, )%p\d+(, 1, 1[^;]*;)", r"\g<1>0\2"),
    # What is hidden, and where live rows begin
    "nothing hidden": Mistake(
        rf"selp\.(f32|b16)\s+(\S+), (?:{NOTHING}, (%\S+)|(%\S+), {NOTHING}), %p\d+;",
        lambda match: f"mov.{match[1].replace('f', 'b')} {match[2]}, {match[3] or match[4]};", everywhere=True,
    ),
    "maximum dropped": Mistake(r"max\.s32(\s+%r\d+, )%r\d+, 0;", r"mov.b32\g<1>0;", everywhere=True),
    # Bounds, addresses, lanes
    "load without its predicate": Mistake(r"@%p\d+ ld\.global", "ld.global", everywhere=True),
    "store without its predicate": Mistake(r"@%p\d+ st\.global", "st.global", everywhere=True),
    "shared memory 16 bytes beside": Mistake(r"\[%r\d+\+(\d+)\]", _count_up(1, 16)),
    "bound off by one": Mistake(r"setp\.lt\.s32", "setp.le.s32", everywhere=True),
    "shuffle over another lane": Mistake(r"shfl\.sync\.bfly\.b32 \t\S+ \S+ (\d+), 31", _count_up(1, 4)),
    "no shuffle": Mistake(r"shfl\.sync\.bfly\.b32 \t(\S+), (\S+), \d+, 31, -1;", r"mov.b32 \1, \2;", everywhere=True),
}  # fmt: skip
