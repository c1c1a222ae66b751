"""Mistakes put into the PTX, one at a time, to see that they are found.

A mistake changes one line that is executed. It is found where the machine finds fault, or where what the kernel writes
is clearly something else. Of each kind there is a table of those that are not found, with the reason why nothing comes
of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emulator.driver import Runner, compile_for, execute, program_of
from emulator.faults import Fault, Unsupported
from emulator.machine import Options
from executions import EXECUTIONS, Execution, call_of, poisoned
from executions import execute as execute_call
from flash_attend.kernels.launch import Launch

__all__ = [
    "HARMLESS", "MISTAKES", "SOMEWHERE", "SUBJECTS", "Outcome", "Recording", "Subject", "missed", "outcomes",
    "recorded",
]  # fmt: skip

Replacement = str | Callable[[re.Match], str]


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


# name -> what a line has, and what takes its place
MISTAKES: dict[str, tuple[str, Replacement]] = {
    # Barriers
    "barrier dropped": (r"^\tbar\.sync \t0;", ""),
    "barrier of some warps dropped": (r"^\s*bar(rier)?\.sync\s+(\d+, \d+|1);", ""),
    "lanes do not wait": (r"^\s*bar\.warp\.sync\s+-1;", ""),
    # Waits and commits of copies by threads
    "wait for one group less": (r"cp\.async\.wait_group\s+(\d+);", _count_up(1, 1)),
    "commit dropped": (r"^\tcp\.async\.commit_group;", ""),
    "copy to 16 bytes beside": (r"cp\.async\.c[ag]\.shared\.global \[ %r\d+ \+ (\d+) \]", _count_up(1, 16)),
    # Arrivals, phases, bytes
    "arrival dropped": (r"^\s*@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", ""),
    "arrival twice": (r"(@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];)", r"\1\n\1"),
    "arrival elsewhere": (r"(mbarrier\.arrive\.shared::cta\.b64 _, \[)(%r\d+)(\];)", r"\1\2+8\3"),
    "wait dropped": (r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, [^;]+;", "setp.eq.b32 complete, 0, 0;"),
    "wait for the other phase": (
        r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, \[%r\d+\], )(%r\d+);", r"xor.b32 \2, \2, 1;\n\1\2;"
    ),
    "16 bytes more expected": (r"expect_tx\.shared::cta\.b64 _, \[%r\d+\], (\d+);", _count_up(1, 16)),
    "initialized for one arrival more": (r"mbarrier\.init\.shared::cta\.b64 \[%r\d+\], (\d+);", _count_up(1, 1)),
    # Fences, products, bulk copies
    "fence dropped": (r"^\s*fence\.proxy\.async\S*;", ""),
    "products waited for later": (r"wgmma\.wait_group\.sync\.aligned (\d);", _count_up(1, 1)),
    "products not committed": (r"^\s*wgmma\.commit_group\.sync\.aligned;", ""),
    "copy out not waited for": (r"cp\.async\.bulk\.wait_group\.read\s+(\d+);", _count_up(1, 1)),
    "coordinates swapped": (r"bulk\.tensor\S* \[[^\]]*\], \[%rd\d+, \{%r\d+, (%r\d+), (%r\d+)", _swap(1, 2)),
    # Operands
    "halves of A swapped": (r"mma\.sync\S* \{[^}]*\}, \{ (\S+), (\S+), ", _swap(1, 2)),
    "halves of B swapped": (r"mma\.sync\S* \{[^}]*\}, \{[^}]*\}, \{ (\S+), (\S+) \}", _swap(1, 2)),
    "transposition dropped": (r"(ldmatrix\S*)\.trans\.shared", r"\1.shared"),
    "transposition added": (r"(ldmatrix\S*x4)\.shared", r"\1.trans.shared"),
    "descriptor advanced too far": (r"add\.s64\s+%rd\d+, %rd\d+, (4611686293305294850);", _count_up(1, 2)),
    "operand of four warps transposed": (r"(wgmma\.mma_async[^;]*, 1, 1, [01], )0;", r"\g<1>1;"),
    "sums of four warps begin anew": (r"(wgmma\.mma_async[^;]*, )%p\d+(, 1, 1[^;]*;)", r"\g<1>0\2"),
    # Bounds, addresses, lanes
    "load without its predicate": (r"@%p\d+ ld\.global", "ld.global"),
    "store without its predicate": (r"@%p\d+ st\.global", "st.global"),
    "shared memory 16 bytes beside": (r"\[%r\d+\+(\d+)\]", _count_up(1, 16)),
    "bound off by one": (r"setp\.lt\.s32", "setp.le.s32"),
    "shuffle over another lane": (r"shfl\.sync\.bfly\.b32 \t\S+ \S+ (\d+), 31", _count_up(1, 4)),
    "no shuffle": (r"shfl\.sync\.bfly\.b32 \t(\S+), (\S+), \d+, 31, -1;", r"mov.b32 \1, \2;"),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A kernel of an execution."""

    execution: str
    kernel: str
    fast: bool = False  # in `make test`, in fewer places

    @property
    def name(self) -> str:
        return f"{self.kernel} of {self.execution}"


SUBJECTS = (
    Subject("sm_80 triton bf16 d64 causal", "forward_kernel", fast=True),
    Subject("sm_80 triton bf16 d64 causal", "backward_kv_kernel"),
    Subject("sm_80 triton bf16 d64 causal", "backward_q_kernel"),
    Subject("sm_90 triton bf16 d64 causal", "forward_kernel"),
    Subject("sm_90 hopper bf16 d64 several tiles seed1 on1", "hopper_forward_kernel"),
    Subject("sm_90 hopper bf16 d64 several tiles seed1 on1", "hopper_backward_q_kernel"),
    Subject("sm_90 hopper fused bf16 d64 several tiles seed1 on1", "hopper_backward_kernel"),
    Subject("sm_90 hopper fused bf16 d256 several tiles seed1 on1", "hopper_backward_wide_kernel"),
)

# Mistakes that are no mistakes in some places: of these one of several has to be found, of the others each.
SOMEWHERE = {
    "initialized for one arrival more": "where no phase of it is awaited in this call",
    "barrier dropped": "where another one, or the first access, orders the same",
    "wait for one group less": "where nobody reads what comes",
    "commit dropped": "where the next group, which then holds both, is waited for at the same point",
    "arrival dropped": "at the end, where nobody fills the slot again",
    "arrival elsewhere": "at the end, where nobody fills the slot again",
    "arrival twice": "at the end, or where the other consumer was there before",
    "wait dropped": "where what was awaited before tells the same: q is given back after the gradient of out",
    "wait for the other phase": "where what was awaited before tells the same",
    "fence dropped": "where no warp has stored since the one before",
    "coordinates swapped": "where both are 0 in this call",
    "load without its predicate": "where all rows exist in this call, or what is read beyond them is hidden",
    "store without its predicate": "where all rows exist in this call",
    "bound off by one": "where no row of this call stands at the bound",
    "shuffle over another lane": "where all lanes have the same",
    "no shuffle": "where all lanes have the same",
}
# Mistakes of which nothing comes in a whole kernel.
ONLY_BARRIERS = "what lanes exchange lies between barriers of whole programs or partitions"
NO_DEAD_ROWS = "it takes a maximum over lanes that have 0 alike: no row of this call is dead"
HARMLESS: dict[tuple[str, str], str] = {
    ("hopper_forward_kernel", "lanes do not wait"): ONLY_BARRIERS,
    ("hopper_backward_kernel", "lanes do not wait"): ONLY_BARRIERS,
    ("hopper_backward_q_kernel", "lanes do not wait"): ONLY_BARRIERS,
    ("hopper_backward_wide_kernel", "lanes do not wait"): ONLY_BARRIERS,
    ("backward_kv_kernel", "shuffle over another lane"): NO_DEAD_ROWS,
    ("backward_kv_kernel", "no shuffle"): NO_DEAD_ROWS,
}


@dataclass
class Recording:
    """A launch that can be repeated, and what it wrote."""

    compiled: object
    launch: Launch
    before: list[Tensor | None]
    after: list[Tensor | None]
    text: str
    lines: set[int]  # that were executed
    options: Options


@dataclass
class _Recorder(Runner):
    kernel: str = ""
    recording: Recording | None = field(default=None, init=False)

    def run(self, prepared, tensors, device) -> None:
        if self.recording or prepared.kernel.__name__ != self.kernel:
            super().run(prepared, tensors, device)
            return
        before = [None if x is None else x.clone() for x in tensors]
        super().run(prepared, tensors, device)
        launch = Launch(prepared, tensors)
        self.recording = Recording(
            compile_for(self.arch, launch), launch, before, [None if x is None else x.clone() for x in tensors],
            self.launches[-1].text, self.launches[-1].lines, self.options,
        )  # fmt: skip


def recorded(subject: Subject) -> Recording:
    execution: Execution = EXECUTIONS[subject.execution]
    recorder = _Recorder(execution.arch, execution.options, kernel=subject.kernel)
    execute_call(execution, poisoned(call_of(execution)), recorder)
    assert recorder.recording is not None, f"{subject.kernel} is not launched"
    return recorder.recording


def places_of(recording: Recording, mistake: str, most: int) -> list[re.Match]:
    """Executed places of a mistake: so many, from the first to the last."""
    pattern, _ = MISTAKES[mistake]
    found = [
        match
        for match in re.finditer(pattern, recording.text, re.MULTILINE)
        if _line(recording, match) in recording.lines
    ]
    if len(found) <= most:
        return found
    return [found[n * (len(found) - 1) // max(most - 1, 1)] for n in range(most)]


def _line(recording: Recording, match: re.Match) -> int:
    start = match.start() + len(match[0]) - len(match[0].lstrip())
    return recording.text.count("\n", 0, start) + 1


@dataclass(frozen=True)
class Outcome:
    """What became of one mistake."""

    line: int
    found: str  # "fault", "result", or nothing
    message: str = ""


def attempt(recording: Recording, mistake: str, match: re.Match) -> Outcome:
    _, replacement = MISTAKES[mistake]
    new = match.expand(replacement) if isinstance(replacement, str) else replacement(match)
    text = recording.text[: match.start()] + new + recording.text[match.end() :]
    line = _line(recording, match)
    tensors = tuple(None if x is None else x.clone() for x in recording.before)
    launch = Launch(recording.launch.prepared, tensors)
    try:
        execute(recording.compiled, launch, program_of(text), recording.options)
    except (Fault, Unsupported) as fault:
        return Outcome(line, "fault", str(fault).split("\n")[0])
    differs = any(_differs(got, want) for got, want in zip(tensors, recording.after, strict=True))
    return Outcome(line, "result" if differs else "")


def _differs(got: Tensor | None, want: Tensor | None) -> bool:
    """By more than the order of a sum comes to: a fiftieth of the largest number, or in what is none."""
    if got is None or want is None or not want.numel():
        return False
    if not want.is_floating_point():
        return not torch.equal(got, want)
    got, want = got.double(), want.double()
    numbers = want.isfinite()
    if not torch.equal(got.isfinite(), numbers) or not torch.equal(got.isnan(), want.isnan()):
        return True
    largest = want[numbers].abs().max().item() if numbers.any() else 0.0
    return bool(((got - want)[numbers].abs() > 0.02 * largest).any())


def outcomes(recording: Recording, mistake: str, most: int) -> list[Outcome]:
    """Of a mistake in several places, four times as many where some of them are harmless."""
    places = places_of(recording, mistake, 4 * most if mistake in SOMEWHERE else most)
    return [attempt(recording, mistake, match) for match in places]


def missed(subject: Subject, mistake: str, found: list[Outcome]) -> list[int]:
    """The lines of mistakes that should have been found and were not."""
    lines = [outcome.line for outcome in found if not outcome.found]
    excused = (subject.kernel, mistake) in HARMLESS or (mistake in SOMEWHERE and len(lines) < len(found))
    return [] if excused else lines
