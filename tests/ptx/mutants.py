"""Mistakes put into the PTX, one at a time, to see that they are found.

Each is made once in every statement of a kernel's source that has it. It is found where the machine finds fault, or
where what the kernel writes is clearly something else. `harmless.py` says where nothing comes of one, and why.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
import triton
from torch import Tensor

import flash_attend.kernels
from emulator.driver import Runner, compile_for, execute, program_of
from emulator.faults import Fault, Unsupported
from emulator.machine import Options
from emulator.syntax import FILE
from executions import EXECUTIONS, call_of, poisoned
from executions import execute as execute_call
from flash_attend.kernels.launch import Launch
from mistakes import MISTAKES

__all__ = [
    "SUBJECTS",
    "Outcome",
    "Place",
    "Recording",
    "Subject",
    "attempt",
    "execute_text",
    "places_of",
    "recorded",
    "source_of",
]


SEEDS = 3  # that decide about turns: some mistakes matter in some orders


@dataclass(frozen=True)
class Subject:
    """A kernel of an execution."""

    execution: str
    kernel: str
    only: str = ""  # "mistake: place", a regular expression: where this one differs from another subject
    fast: bool = False  # in `make test`, each mistake in one place

    def __str__(self) -> str:
        return f"{self.kernel} of {self.execution}"


SUBJECTS = (
    Subject("sm_80 triton bf16 d64 several runs", "forward_kernel", fast=True),
    # There a head has nothing visible.
    Subject("sm_80 triton bf16 d64 key causal", "forward_kernel", r"^(load|bound) .*first_key: "),
    # There a tile has one masked block.
    Subject("sm_80 triton bf16 d64 plain", "forward_kernel", r"^bound .*masked_count"),
    Subject("sm_80 triton bf16 d64 plain", "backward_q_kernel", r"^bound .*masked_count"),
    Subject("sm_80 triton bf16 d64 several runs", "backward_kv_kernel"),
    Subject("sm_80 triton bf16 d64 several runs", "backward_q_kernel"),
    Subject("sm_90 triton bf16 d64 several runs", "forward_kernel"),
    Subject("sm_90 triton bf16 d64 whole blocks", "forward_kernel", "^products .*: "),
    Subject("sm_90 triton bf16 d64 plain", "forward_kernel", r"^bound .*masked_count"),
    Subject("sm_90 hopper bf16 d64 several tiles seed1 on1", "hopper_forward_kernel", fast=True),
    Subject(
        "sm_90 hopper bf16 d64 several tiles in turns seed1 on1", "hopper_forward_kernel", r": .*Turns\.", fast=True
    ),
    Subject("sm_90 hopper bf16 d64 many blocks seed1 on1", "hopper_backward_q_kernel"),
    # There a tile has one masked block and a full one.
    Subject("sm_90 hopper bf16 d64 runs of keys seed1", "hopper_backward_q_kernel", r"^bound .*(masked_count|n_full)"),
    # There v has one slot.
    Subject(
        "sm_90 hopper bf16 d256 many blocks seed1 on1",
        "hopper_backward_q_kernel",
        r"shared\.v|v\.(release|await)|_masked_block: grad_weights = warp|_step: grad_weights = warp",
    ),
    Subject("sm_90 hopper fused bf16 d64 several tiles seed1 on1", "hopper_backward_kernel"),
    Subject("sm_90 hopper bf16 d64 many blocks seed1 on1", "hopper_backward_kernel", "nothing hidden|copy out"),
    # There the keys of a tile's first warp are shown and others are not, or the other way round.
    Subject("sm_90 hopper fused bf16 d64 runs of keys seed1", "hopper_backward_kernel", "^no shuffle"),
    Subject("sm_90 hopper fused bf16 d256 several tiles seed1 on1", "hopper_backward_wide_kernel"),
    Subject("sm_90 hopper fused bf16 d256 runs of keys seed1", "hopper_backward_wide_kernel", "^no shuffle: .*any_key"),
    # With the gradient of q in the same pass its consumers keep step, and nothing comes of some mistakes.
    Subject("sm_90 hopper bf16 d256 many blocks seed1 on1", "hopper_backward_wide_kernel", "nothing hidden|unused"),
)


# ---------------------------------------------------------------------------------------------------------------------
# A launch to repeat
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Recording:
    """A launch that can be repeated, and what it wrote."""

    subject: Subject
    compiled: object
    launch: Launch
    before: list[Tensor | None]
    after: list[Tensor | None]
    text: str
    lines: set[int]  # that were executed
    options: Options

    @property
    def partitions(self) -> bool:
        """Whether warps have programs of their own, in random turns."""
        return program_of(self.text).specialized


@dataclass
class _Recorder(Runner):
    subject: Subject | None = None
    recording: Recording | None = field(default=None, init=False)

    def run(self, prepared, tensors, device, aligned) -> None:
        if self.recording or prepared.kernel.__name__ != self.subject.kernel:
            super().run(prepared, tensors, device, aligned)
            return
        before = [None if x is None else x.clone() for x in tensors]
        super().run(prepared, tensors, device, aligned)
        launch = Launch(prepared, tensors)
        after = [None if x is None else x.clone() for x in tensors]
        text, lines = self.launches[-1].text, self.launches[-1].lines
        compiled = compile_for(self.arch, launch)
        self.recording = Recording(self.subject, compiled, launch, before, after, text, lines, self.options)


def recorded(subject: Subject) -> Recording:
    execution = EXECUTIONS[subject.execution]
    recorder = _Recorder(execution.arch, execution.options, subject=subject)
    execute_call(execution, poisoned(call_of(execution)), recorder)
    assert recorder.recording is not None, f"{subject.kernel} is not launched"
    return recorder.recording


# ---------------------------------------------------------------------------------------------------------------------
# Where a mistake can be made
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A statement of the source, and where in the PTX, all of it executed, a mistake can be made of what it became."""

    where: str  # "function: statement", from the partition's own inwards
    matches: tuple[re.Match, ...]


def places_of(recording: Recording, mistake: str) -> list[Place]:
    files = {Path(path).name: source_of(path) for _, path in FILE.findall(recording.text)}
    sources = {item.line: item.source for item in program_of(recording.text).kernel.instructions}
    found: dict[str, list[re.Match]] = {}
    for match in re.finditer(MISTAKES[mistake].pattern, recording.text, re.MULTILINE):
        if line := _executed_line(recording, match):
            where = _where(sources[line], files)
            if re.search(recording.subject.only, f"{mistake}: {where}"):
                found.setdefault(where, []).append(match)
    return [Place(where, tuple(matches)) for where, matches in found.items()]


def _executed_line(recording: Recording, match: re.Match) -> int | None:
    """The first line of a match that was executed, if one was."""
    first = recording.text.count("\n", 0, match.start()) + 1
    lines = range(first, first + match[0].count("\n") + 1)
    return next((line for line in lines if line in recording.lines), None)


def source_of(path: str) -> Path:
    """A file that PTX names, where it is now: Triton keeps what it compiled of the same text in another folder."""
    parts = Path(path).parts
    ends = (Path(*parts[start:]) for start in range(1, len(parts)))  # the longest first
    folders = (Path(flash_attend.kernels.__file__).parent.parent, Path(triton.__file__).parent.parent)
    return next(found for end in ends for folder in folders if (found := folder / end).exists())


def _where(source: str, files: dict[str, Path]) -> str:
    """`ring.py:134:20 @[ forward.py:173:8 @[ forward.py:210 ] ]`, in words, without a partition's own place."""
    frames = [(files[name], int(row)) for name, row in re.findall(r"([\w.]+):(\d+)", source)[::-1]]
    words = [_statement(*frame) for frame in frames]
    return " > ".join(word for word in words if word) or "the kernel"


@lru_cache(maxsize=4096)
def _statement(path: Path, row: int) -> str:
    """The innermost function around a line, and the line; nothing for the line that a function begins with."""
    text, functions = _functions(path)
    around = [(first, name) for first, last, name in functions if first <= row <= last]
    first, name = max(around, default=(0, "?"))
    return "" if row == first else f"{name}: {text[row - 1].strip()}"


@lru_cache(maxsize=64)
def _functions(path: Path) -> tuple[list[str], list[tuple[int, int, str]]]:
    """A file's lines, and first line, last line and name of each of its functions and methods."""
    text = path.read_text()
    found = []
    for node in ast.walk(ast.parse(text)):
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                found.append((child.lineno, child.end_lineno, f"{prefix}{child.name}"))
    return text.splitlines(), found


# ---------------------------------------------------------------------------------------------------------------------
# To make one
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a mistake."""

    where: str
    found: str  # "fault", "result", or nothing
    message: str = ""


def attempt(recording: Recording, mistake: str, place: Place) -> Outcome:
    """A mistake in all of a place at once, or in the first line of it and, where nothing comes of that, in the last:
    the first may be before a loop, and the last in it."""
    ends = dict.fromkeys((place.matches[0], place.matches[-1]))
    for matches in [place.matches] if MISTAKES[mistake].everywhere else [(match,) for match in ends]:
        outcome = _attempt(recording, mistake, place.where, matches)
        if outcome.found:
            break
    return outcome


def _attempt(recording: Recording, mistake: str, where: str, matches: tuple[re.Match, ...]) -> Outcome:
    pieces, last = [], 0
    for match in matches:
        pieces += [recording.text[last : match.start()], MISTAKES[mistake].made(match)]
        last = match.end()
    text = "".join([*pieces, recording.text[last:]])
    for seed in range(SEEDS):
        options = replace(recording.options, seed=recording.options.seed + seed)
        try:
            tensors = execute_text(recording, text, options)
        except (Fault, Unsupported) as fault:
            return Outcome(where, "fault", str(fault).split("\n")[0])
        if any(_differs(got, want) for got, want in zip(tensors, recording.after, strict=True)):
            return Outcome(where, "result")
        if not recording.partitions:  # threads take turns in one order
            break
    return Outcome(where, "")


def execute_text(recording: Recording, text: str, options: Options | None = None) -> tuple[Tensor | None, ...]:
    """The launch's tensors after it was repeated with this PTX."""
    tensors = tuple(None if x is None else x.clone() for x in recording.before)
    launch = Launch(recording.launch.prepared, tensors)
    execute(recording.compiled, launch, program_of.__wrapped__(text), options or recording.options)
    return tensors


def _differs(got: Tensor | None, want: Tensor | None) -> bool:
    """By more than the order of a sum comes to: a fiftieth of the largest number of a row, or in what is none. In rows
    that are almost 0, of a twentieth of the largest number of all."""
    if got is None or want is None or not want.numel():
        return False
    if not want.is_floating_point():
        return not torch.equal(got, want)
    got, want = got.double(), want.double()
    numbers = want.isfinite()
    if not torch.equal(got.isfinite(), numbers) or not torch.equal(got.isnan(), want.isnan()):
        return True
    sizes = want.where(numbers, 0.0).abs()
    largest = sizes.amax(-1, keepdim=True).clamp(min=0.05 * sizes.max().item())
    return bool(((got - want).where(numbers, 0.0).abs() > 0.02 * largest).any())
