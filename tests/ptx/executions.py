"""Calls of the package whose kernels are executed: as data, and how to execute and judge one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from emulator.driver import Launched, Runner, executed
from emulator.machine import Options
from flash_attend import flash_attention, flash_attention_packed
from flash_attend.kernels.configs import HOPPER_ROWS, Tile, Tiles, override, select_tangent_tiles
from flash_attend.target import DeviceTarget
from flash_attend.testing.budget import Budget
from flash_attend.testing.calls import Call, Case, budget_of, make_call, push, with_tangents
from flash_attend.testing.calls import run as run_publicly
from flash_attend.testing.oracle import Answer, visible_pairs
from flash_attend.testing.sequences import whole_call

__all__ = ["EXECUTIONS", "Execution", "Result", "budget_for", "call_of", "execute", "judge", "poisoned"]

DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "tf32x3": torch.float32,
    "fp64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Execution:
    """One call, forward and backward, on one part; or with tangents."""

    arch: str
    backend: str
    backward: Literal["separate", "fused", "tangents"]
    dtype: str
    case: Case
    options: Options = field(default_factory=Options)
    multiprocessors: int | None = None  # that persistent programs share: fewer than tiles give each several
    tiles: str = ""  # others than the usual ones, by their name in `TILES`
    fast: bool = False  # in `make test`
    lengths: tuple[tuple[int, int], ...] = ()  # of sequences that are packed in the batch entry, unless there are none

    @property
    def name(self) -> str:
        words = [self.arch, self.backend, *[self.backward] * (self.backward != "separate")]
        words += [self.dtype, f"d{self.case.d}", self.case.name]
        words += [self.tiles] if self.tiles else []
        defaults = Options()
        words += [f"{x}" for x in (self.options.copies,) if x != defaults.copies]
        words += [self.options.order] if self.options.order else []
        words += [f"seed{self.options.seed}"] if self.options.seed else []
        words += [f"on{self.multiprocessors}"] if self.multiprocessors else []
        return " ".join(words)


@dataclass(frozen=True)
class Result:
    """What came of it: shares of the budget, and of what launches."""

    shares: dict[str, float]
    launches: list[Launched]
    seconds: float


# ---------------------------------------------------------------------------------------------------------------------
# The calls
# ---------------------------------------------------------------------------------------------------------------------


MODES = {
    "plain": dict(batch=1, heads=2),
    "causal": dict(batch=1, heads=2, causal=True),
    "key": dict(batch=3, heads=1, mask="holes"),
    "key causal": dict(batch=2, heads=1, mask="holes", causal=True, layout="heads_inside"),
    "dense": dict(batch=1, heads=2, mask="bhij"),
    "staircase": dict(batch=1, heads=1, mask="staircase", causal=True),
    "dropout": dict(batch=1, heads=2, dropout_p=0.25, causal=True),
    "dense dropout": dict(batch=1, heads=2, kv_heads=1, mask="bhij", dropout_p=0.25),
    "grouped": dict(batch=1, heads=4, kv_heads=2, mask="bh1j", scale=-0.11),
    "narrow v": dict(batch=1, heads=1, mask="pad_left", grads="out"),
    "sliced": dict(batch=1, heads=1, layout="sliced", grad_layout="sliced"),
    "expanded": dict(batch=2, heads=2, layout="broadcast_heads", causal=True),
    "window": dict(batch=1, heads=2, window=(200, None), causal=True),
    "window key": dict(batch=3, heads=1, window=(150, 40), mask="holes"),
    "window dense": dict(batch=1, heads=1, window=(150, 40), mask="bhij"),
    "narrow window": dict(batch=1, heads=2, window=(30, 20)),
    "softcap": dict(batch=1, heads=2, softcap=1.5, causal=True),
    "alibi sinks": dict(batch=2, heads=2, kv_heads=1, alibi="bh", sinks=True, causal=True),
    "bias": dict(batch=2, heads=2, keys=328, bias="1hij"),
    "bias hiding": dict(batch=1, heads=2, bias="hiding", causal=True),
    "everything": dict(
        batch=2, heads=2, kv_heads=1, bias="1hij", bias_in_float32=True, window=(150, 40), softcap=1.5, alibi="h",
        mask="holes", dropout_p=0.25,
    ),
}  # fmt: skip
DIMS = {
    "bf16": (64, 128, 80, 192, 256), "fp16": (64, 80), "tf32": (64, 128, 256), "tf32x3": (64, 128), "fp64": (64, 128),
}  # fmt: skip
FUSED_MODES = ("key causal", "dense dropout", "bias hiding", "everything")
# In every dtype; the others in bfloat16, at 64 and 128.
COMMON_MODES = ("key causal", "dense dropout", "grouped", "narrow v", "dropout", "everything")


# With tangents: of half precision at these widths in all of these modes, of every other kind in the last one alone.
TANGENT_WIDTHS = (64, 80, 128)
TANGENT_DIMS = {"tf32": (64, 128), "tf32x3": (64,), "fp64": (64,)}  # that are served
TANGENT_MODES = ("key causal", "dense dropout", "grouped", "bias hiding", "everything")


def _lengths(dtype: str, d: int, arch: str) -> tuple[int, int]:
    """Queries and keys: one and a half tiles of the one, two and a half of the other, and some more."""
    if dtype in ("bf16", "fp16"):
        return (189, 325) if d <= 128 else (93, 165)
    if dtype == "tf32" and d <= 128:
        return (189, 325) if arch == "sm_90" else (93, 85)
    return (45, 85)


def _case(mode: str, dtype: str, d: int, arch: str) -> Case:
    queries, keys = _lengths(dtype, d, arch)
    narrow = {"dv": d // 2} if mode == "narrow v" else {}
    return Case(mode, **{"queries": queries, "keys": keys, "d": d, **MODES[mode], **narrow})


# Full and cut tiles, sequences without queries and without keys, and queries and keys in none.
LENGTHS = ((150, 170), (0, 9), (5, 0), (20, 140))
PACKED = Case(
    "packed", batch=1, heads=4, kv_heads=2, queries=189, keys=325, layout="heads_inside", causal=True, softcap=5.0,
    sinks=True,
)  # fmt: skip


def _of_triton() -> Iterator[Execution]:
    for arch in ("sm_80", "sm_90"):
        for d, backward in product((64, 128), ("separate", "fused")):
            yield Execution(arch, "triton", backward, "bf16", replace(PACKED, d=d), lengths=LENGTHS)
        for dtype, dims in DIMS.items():
            for d in dims:
                modes = MODES if dtype == "bf16" and d in (64, 128) else COMMON_MODES
                for mode in modes:
                    yield Execution(arch, "triton", "separate", dtype, _case(mode, dtype, d, arch))
                    if mode in FUSED_MODES and (dtype in ("bf16", "fp16") or d == 64):
                        yield Execution(arch, "triton", "fused", dtype, _case(mode, dtype, d, arch))
        for dtype, dims in (DIMS | TANGENT_DIMS).items():
            for d in dims:
                usual = dtype == "bf16" and d in TANGENT_WIDTHS
                for mode in TANGENT_MODES if usual else TANGENT_MODES[-1:]:
                    yield Execution(arch, "triton", "tangents", dtype, _case(mode, dtype, d, arch))
        for copies in ("early", "random"):
            case = _case("key causal", "bf16", 64, arch)
            yield Execution(arch, "triton", "separate", "bf16", case, Options(copies, "random", 1))
        for d in (64, 128, 256):
            # A grid that is small for a part, and calls of one query, have tiles of their own.
            yield Execution(
                arch, "triton", "separate", "bf16", _case("key causal", "bf16", d, arch), multiprocessors=99
            )
            if arch == "sm_80" and d <= 128:  # whose tiles have 256 queries, more than the others' calls
                two = Case("two tiles", batch=1, heads=1, queries=285, keys=149, d=d, mask="bhij", causal=True)
                yield Execution(arch, "triton", "separate", "tf32", two)
            decode = Case("decode", batch=2, heads=8, kv_heads=2, queries=1, keys=333, d=d, mask="holes")
            yield Execution(arch, "triton", "separate", "bf16", decode)
            # On a part that calls of few queries leave idle, keys are split; the first two have their heads packed.
            few = replace(decode, name="few queries", queries=3, keys=460, causal=True, softcap=5.0, sinks=True)
            apart = replace(few, name="few queries apart", kv_heads=8, batch=1, mask="none", window=(200, 0), alibi="h")
            for case in (replace(decode, keys=460), few, apart):
                yield Execution(arch, "triton", "separate", "bf16", case, multiprocessors=16)


HOPPER_MODES = {
    "plain": dict(heads=2),
    "causal": dict(heads=1, causal=True),
    "key": dict(batch=2, mask="holes"),
    "key causal": dict(batch=2, mask="holes", causal=True),
    "grouped": dict(heads=2, kv_heads=1, causal=True, scale=-0.11),
    "dead rows": dict(heads=1, causal=True, queries=330, keys=150),
    "sliced": dict(heads=1, layout="sliced", causal=True),
    "window": dict(heads=2, kv_heads=1, window=(60, 40), queries=250, keys=290),
    "window more keys": dict(window=(90, None), queries=130, keys=430),
    "sinks": dict(heads=2, causal=True, sinks=True),
}
# At 64 and 256, where the kernels differ most.
MORE_HOPPER_MODES = {
    "mask per head": dict(heads=2, mask="bh1j", layout="heads_inside"),
    "key dead rows": dict(batch=2, mask="pad_left", causal=True, queries=330, keys=150),
    "one query": dict(batch=2, mask="pad_left", causal=True, queries=1),
    "scale 0": dict(scale=0.0, causal=True),
    "low scores": dict(batch=2, mask="pad_left", scale=8.0),
    "only lse": dict(grads="lse", layout="broadcast_heads", heads=2),
}
# Tiles that a call for Hopper may have beside the usual ones.
TILES: dict[str, Callable[[Tiles], Tiles]] = {
    "in turns": lambda tiles: tiles._replace(forward=tiles.forward._replace(ping_pong=True)),
    "deep rings": lambda tiles: tiles._replace(backward_q=tiles.backward_q._replace(num_stages=3)),
    "small blocks": lambda tiles: tiles._replace(forward=Tile(128, 64, 4, 2), backward_q=Tile(128, 64, 4, 2)),
}


def _of_gluon() -> Iterator[Execution]:
    for d in (64, 128, 256):
        lengths = dict(queries=150, keys=330) if d < 256 else dict(queries=100, keys=170)
        for name, options in {**HOPPER_MODES, **(MORE_HOPPER_MODES if d != 128 else {})}.items():
            case = Case(name, **{"batch": 1, "heads": 1, "d": d, **lengths, **options})
            for backward in ("separate", "fused"):
                yield Execution("sm_90", "hopper", backward, "bf16", case, Options(seed=len(name)))
        if d < 256:  # in one pass, and at 256, such calls are refused
            case = Case("window key", 2, 1, d=d, **lengths, mask="holes", window=(130, None), causal=True)
            yield Execution("sm_90", "hopper", "separate", "bf16", case, Options(seed=3))
        case = Case("key causal", batch=2, heads=1, d=d, **lengths, mask="holes", causal=True)
        for backward in ("separate", "fused"):
            yield Execution("sm_90", "hopper", backward, "fp16", case, Options("early", seed=1))
            for seed, copies in enumerate(("late", "early", "random", "random"), 1):
                yield Execution("sm_90", "hopper", backward, "bf16", case, Options(copies, seed=seed), 2)
        for seed in (1, 2):
            yield Execution("sm_90", "hopper", "separate", "bf16", case, Options("random", seed=seed), 2, "in turns")


def _for_mutants() -> Iterator[Execution]:
    """Calls in which every ring of buffers goes round; some of the blocks are full, some are cut by causality, some
    have hidden keys, and the first rows are dead. Programs of the forward for Hopper have several tiles."""
    for arch in ("sm_80", "sm_90"):
        case = Case("several runs", 3, 1, queries=120, keys=600, d=64, mask="pad_left", causal=True)
        yield Execution(arch, "triton", "separate", "bf16", case)
    case = Case("whole blocks", 1, 1, queries=128, keys=256, d=64)  # none of them masked
    yield Execution("sm_90", "triton", "separate", "bf16", case)
    for d, keys in ((64, 200), (256, 150)):
        case = Case("several tiles", 2, 2, 1, queries=200, keys=keys, d=d, mask="pad_left", causal=True)
        yield Execution("sm_90", "hopper", "fused", "bf16", case, Options(seed=1), 1)
        runs = Case("runs of keys", 3, 1, queries=200, keys=keys, d=d, mask="all_visible", causal=True)
        for backward in ("separate", "fused"):
            yield Execution("sm_90", "hopper", backward, "bf16", runs, Options(seed=1))
        case = replace(case, heads=1, kv_heads=1, keys=400)
        yield Execution("sm_90", "hopper", "separate", "bf16", case, Options(seed=1), 1)
        for tiles in TILES if d == 64 else ("in turns",):
            yield Execution("sm_90", "hopper", "separate", "bf16", case, Options(seed=1), 1, tiles)
        case = replace(case, name="many blocks", queries=200 if d == 64 else 130, keys=700 if d == 64 else 350)
        yield Execution("sm_90", "hopper", "separate", "bf16", case, Options(seed=1), 1)


# What `make test` has time for: together they have every kernel, every dtype and every kind of mask. Compiling takes
# more than half of the time where nothing is cached: those for Hopper share what is compiled.
FAST = (
    "sm_80 triton fused bf16 d64 dense dropout",
    "sm_80 triton bf16 d64 key causal random random seed1",
    "sm_80 triton bf16 d64 everything",
    "sm_80 triton bf16 d128 grouped",
    "sm_80 triton bf16 d80 narrow v",
    "sm_80 triton bf16 d256 dropout",
    "sm_80 triton fused fp16 d80 key causal",
    "sm_80 triton fused tf32 d64 dense dropout",
    "sm_80 triton fused tf32x3 d64 key causal",
    "sm_80 triton fused fp64 d64 key causal",
    "sm_90 triton fused bf16 d64 key causal",
    "sm_90 triton bf16 d64 window key",
    "sm_90 triton bf16 d256 key causal",
    "sm_90 triton tf32 d64 grouped",
    "sm_90 triton bf16 d64 few queries on16",
    "sm_90 triton bf16 d64 packed",
    "sm_80 triton tangents bf16 d64 bias hiding",
    "sm_90 triton tangents bf16 d64 key causal",
    "sm_90 hopper bf16 d64 key causal random seed3 on2",
    "sm_90 hopper bf16 d64 key dead rows seed13",
    "sm_90 hopper bf16 d64 one query seed9",
    "sm_90 hopper bf16 d64 key causal in turns random seed1 on2",
    "sm_90 hopper fused bf16 d64 key dead rows seed13",
    "sm_90 hopper fused bf16 d64 key causal early seed2 on2",
    "sm_90 hopper fused bf16 d64 low scores seed10",
    "sm_90 hopper bf16 d128 grouped seed7",
    "sm_90 hopper fused bf16 d128 key causal early seed2 on2",
    "sm_90 hopper bf16 d256 key dead rows seed13",
    "sm_90 hopper fused bf16 d256 key causal random seed3 on2",
)


def _all() -> dict[str, Execution]:
    found = {execution.name: execution for execution in (*_of_triton(), *_of_gluon(), *_for_mutants())}
    for name in FAST:
        found[name] = replace(found[name], fast=True)
    return found


EXECUTIONS = _all()  # by their names


# ---------------------------------------------------------------------------------------------------------------------
# To execute one, and to judge
# ---------------------------------------------------------------------------------------------------------------------


def call_of(execution: Execution) -> Call:
    """The call of a case; of a mask with holes, the last batch has nothing visible."""
    call = make_call(execution.case, DTYPES[execution.dtype])
    if execution.backward == "tangents":
        call = with_tangents(call.with_(grad_out=None, grad_lse=None))
    if execution.lengths:
        mask = whole_call(execution.lengths, call.q, call.k, causal=call.causal)["mask"]
        return call.with_(mask=mask, causal=False)
    if execution.case.mask == "holes":
        call.mask[-1] = False
    if execution.case.name in ("several tiles", "many blocks", "several runs"):  # in two blocks of a tile
        call.mask[-1, -10:-5] = False
    if execution.case.name == "several runs":  # of full blocks: two, one, and none under dead rows
        call.mask[0, 200] = False
        call.mask[1, 100:] = True
        call.mask[-1, :495] = False
    if execution.case.name == "runs of keys":
        # The first ones of a tile are shown and others hidden, the other way round, and all of them shown.
        call.mask[0, 40:45] = False
        call.mask[1, :40] = False
    if execution.case.name == "low scores":  # a hidden key that comes as zeros has a score far above the others
        call = call.with_(q=call.q.abs(), k=-call.k.abs())
    return call


def poisoned(call: Call) -> Call:
    """The same call with NaN and infinity wherever they must not matter: in keys that nobody sees and in dead rows."""
    (batch, heads, queries, _), (kv_heads, keys) = call.q.shape, call.k.shape[1:3]
    pairs = visible_pairs(
        batch, heads, queries, keys, call.mask, call.causal, call.q.device, window=call.window, bias=call.bias
    )
    hidden = ~pairs.view(batch, kv_heads, heads // kv_heads, queries, keys).any(3).any(2).unsqueeze(3)
    dead = ~pairs.any(3)

    def fill(x: Tensor | None, where: Tensor, value: float) -> Tensor | None:
        if x is None or not where.any():
            return x
        x = x.clone() if 0 not in x.stride() else x.contiguous()
        return x.masked_fill_(where, value)

    silent = dict(q=dead.unsqueeze(3), k=hidden, v=hidden, bias=None if call.bias is None else call.bias == -torch.inf)
    tangents = call.tangents and {
        name: fill(x, silent[name], torch.nan) if name in silent else x for name, x in call.tangents.items()
    }
    return call.with_(
        tangents=tangents,
        q=fill(call.q, dead.unsqueeze(3), torch.nan),
        k=fill(call.k, hidden, torch.nan),
        v=fill(call.v, hidden, torch.inf),
        grad_out=fill(call.grad_out, dead.unsqueeze(3), torch.nan),
        grad_lse=fill(call.grad_lse, dead, torch.nan),
    )


def budget_for(execution: Execution, call: Call) -> Budget:
    """That of the tests."""
    return budget_of(call, tf32=execution.dtype == "tf32")


def execute(execution: Execution, call: Call, runner: Runner | None = None) -> tuple[Answer, Runner]:
    """The answer of a call through the public function."""
    runner = runner or Runner(execution.arch, execution.options)
    before = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, before)
        torch.set_float32_matmul_precision("high" if execution.dtype == "tf32" else "highest")
        if execution.tiles:
            usual = HOPPER_ROWS[execution.case.d]
            usual = usual if execution.backward == "fused" else usual._replace(backward_fused=None)
            stack.enter_context(override(TILES[execution.tiles](usual)))
        # With a single multiprocessor no grid is small: the tiles are those of long calls.
        single = 1 if execution.backend == "triton" else None
        stack.enter_context(executed(runner, execution.multiprocessors or single))
        if execution.backward == "tangents":
            part = DeviceTarget.of(call.q.device)
            return push(call, execution.backend, lambda spec: select_tangent_tiles(spec, part)), runner
        attend = partial(_attend_packed, execution) if execution.lengths else flash_attention
        return run_publicly(call, execution.backend, attend=attend, backward=execution.backward), runner


def _attend_packed(execution: Execution, *inputs: Tensor, mask: Tensor, causal: bool, **options: Any) -> tuple:
    """What a call whose mask keeps sequences apart is, with these packed, in its shapes."""
    places = [torch.tensor([0, *lengths]).cumsum(0) for lengths in zip(*execution.lengths, strict=True)]
    longest = [max(lengths) for lengths in zip(*execution.lengths, strict=True)]
    rows = [x[0].transpose(0, 1) for x in inputs]
    out, lse = flash_attention_packed(*rows, *places, *longest, causal=execution.case.causal, **options)
    return out.transpose(0, 1)[None], lse[None]


def judge(execution: Execution, runner: Runner | None = None) -> Result:
    """Fails unless an execution ends, and within the error budget."""
    start = time.process_time()
    call = call_of(execution)
    answer, runner = execute(execution, poisoned(call), runner)
    shares = budget_for(execution, call).check(answer)
    return Result(shares, runner.launches, time.process_time() - start)
