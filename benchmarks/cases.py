"""The grid as data: which attention calls are measured, in which passes, and how their inputs are made.

Lengths are powers of two from 512 to 16k at 16k tokens a batch with `h * d = 2048`, the field's usual grid, and around
it what that grid leaves out: odd lengths, grouped heads, head dims that are no power of two, `dv` other than `d`, key
padding on either side and in holes, dense masks, dropout, cross-attention, decoding, float32. A CPU has a grid of its
own, from 128 to 4096 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["DTYPES", "PASSES", "PRESETS", "Case", "Inputs", "make_inputs", "make_mask", "select_cases"]

# How a case names its dtype -> the tensors' dtype, and `torch.set_float32_matmul_precision` while it runs.
DTYPES = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "float64": (torch.float64, "highest"),
}

FORWARD, BACKWARD, BOTH, DETERMINISTIC = PASSES = (
    "forward",
    "backward",
    "forward+backward",
    "deterministic backward",
)

MASKS = ("none", "right", "left", "holes", "documents")


@dataclass(frozen=True)
class Case:
    """One attention call, up to the values of its tensors."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    kv_heads: int
    dtype: str = "bfloat16"
    causal: bool = False
    mask: str = "none"  # key padding on the "right" or "left" or in "holes" (b, j); "documents" (b, 1, i, j)
    valid: float = 1.0  # of the keys, on average over the batch; of "documents": one over how many a sequence holds
    dropout_p: float = 0.0
    passes: tuple[str, ...] = PASSES
    group: str = ""  # the section of the report
    preset: str = "standard"  # the smallest preset that holds it
    threads: int = 0  # of the CPU; 0 for all
    overhead: bool = False  # also measure the first call of a process
    core: bool = False  # in a standard run the only cases of the peers that compile anew for each

    @property
    def name(self) -> str:
        """Says all that decides the work, and is unique in the grid: results are filed and picked by it."""
        length = f"s{self.queries}" if self.queries == self.keys else f"i{self.queries} j{self.keys}"
        heads = f"h{self.heads}" if self.heads == self.kv_heads else f"h{self.heads}/{self.kv_heads}"
        dim = f"d{self.head_dim}" if self.head_dim == self.value_dim else f"d{self.head_dim}/{self.value_dim}"
        words = [self.dtype, f"b{self.batch}", heads, length, dim]
        words += [] if self.mask_words == "none" else [self.mask_words]
        words += [f"dropout{self.dropout_p:g}"] if self.dropout_p else []
        words += [f"{self.threads} thread"] if self.threads else []
        return " ".join(words)

    @property
    def mask_words(self) -> str:
        """ "none", or who may attend: "causal", "right50", "causal right50"."""
        words = ["causal"] * self.causal
        words += [] if self.mask == "none" else [f"{self.mask}{self.valid * 100:.0f}"]
        return " ".join(words) or "none"

    @property
    def shape(self) -> tuple[int, ...]:
        """`(b, h, hk, i, j, d, dv)`."""
        return self.batch, self.heads, self.kv_heads, self.queries, self.keys, self.head_dim, self.value_dim


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. `q`, `k`, `v` are leaves, views `(b, h, n, d)` of storage `(b, n, h, d)` as models make
    them."""

    case: Case
    q: Tensor  # (b, h, i, d)
    k: Tensor  # (b, hk, j, d)
    v: Tensor  # (b, hk, j, dv)
    mask: Tensor | None  # bool (b, j) or (b, 1, i, j)
    grad_out: Tensor  # (b, h, i, dv), 0 where a query sees no key or is padding itself: no loss reads those rows
    rows: Tensor  # bool (b, i): the queries that count, which see a key and are not padding


def make_mask(case: Case, device: torch.device, generator: torch.Generator) -> Tensor | None:
    """The mask of a case, True = may attend: `(b, j)`, `(b, 1, i, j)` for "documents", or None."""
    if case.mask == "none":
        return None
    batch, queries, keys = case.batch, case.queries, case.keys
    position = torch.arange(keys, device=device)
    if case.mask == "holes":  # every block has some: nothing can be skipped, and nothing goes unmasked
        return torch.rand(batch, keys, device=device, generator=generator) < case.valid
    if case.mask == "documents":  # sequences packed from documents of random lengths, none of which sees another
        if queries != keys:
            raise ValueError(f"documents attend to themselves, got i = {queries} and j = {keys}")
        cuts = torch.rand(batch, round(1 / case.valid) - 1, device=device, generator=generator) * keys
        document = torch.searchsorted(cuts.sort(dim=1).values, position.float().repeat(batch, 1))
        return rearrange(document, "b i -> b 1 i 1") == rearrange(document, "b j -> b 1 1 j")
    # Lengths spread evenly around the mean, as far as half the way to empty or full.
    spread = min(case.valid, 1 - case.valid) / 2
    shares = torch.linspace(case.valid - spread, case.valid + spread, batch + 2, device=device)[1:-1]
    lengths = (shares * keys).round().long().clamp(min=1)[:, None]
    return position < lengths if case.mask == "right" else position >= keys - lengths


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Normal random tensors (zeros would let a GPU clock higher than real data does), the same for every peer."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, _ = DTYPES[case.dtype]

    def draw(heads: int, length: int, dim: int) -> Tensor:
        stored = torch.randn(case.batch, length, heads, dim, device=device, dtype=dtype, generator=generator)
        return rearrange(stored, "b n h d -> b h n d")

    q = draw(case.heads, case.queries, case.head_dim)
    k = draw(case.kv_heads, case.keys, case.head_dim)
    v = draw(case.kv_heads, case.keys, case.value_dim)
    mask = make_mask(case, device, generator)
    rows = torch.ones(case.batch, case.queries, dtype=torch.bool, device=device)
    if mask is not None and mask.ndim == 2:
        if case.queries == case.keys:
            rows &= mask
        if case.causal:
            seen = mask.cumsum(dim=1) > 0
            last = torch.arange(case.queries, device=device) + case.keys - case.queries
            rows &= seen[:, last.clamp(min=0)]
    if case.causal:
        rows &= torch.arange(case.queries, device=device) >= case.queries - case.keys
    grad_out = draw(case.heads, case.queries, case.value_dim) * rows[:, None, :, None]
    return Inputs(case, *(x.requires_grad_() for x in (q, k, v)), mask, grad_out, rows)


# ---------------------------------------------------------------------------------------------------------------------
# The grid
# ---------------------------------------------------------------------------------------------------------------------

TOKENS = 16 * 1024
WIDTH = 2048  # h * d


def _case(length: int, dim: int, *, keys: int = 0, value_dim: int = 0, ratio: int = 1, **rest) -> Case:
    """A case of the usual size: `ratio` query heads to a key head."""
    heads = rest.pop("heads", 0) or max(ratio, WIDTH // dim // ratio * ratio)
    return Case(
        batch=rest.pop("batch", 0) or max(1, TOKENS // length),
        heads=heads,
        kv_heads=heads // ratio,
        queries=length,
        keys=keys or length,
        head_dim=dim,
        value_dim=value_dim or dim,
        **rest,
    )


def _product(group: str, lengths: Sequence[int], dims: Sequence[int], **axes: Sequence) -> Iterator[Case]:
    """The cases of every combination."""
    for length, dim, *values in product(lengths, dims, *axes.values()):
        yield _case(length, dim, group=group, **dict(zip(axes, values, strict=True)))


def _cuda() -> Iterator[Case]:
    """The grid of a GPU. Of cases of one name the first counts: what is quick or core stands before the rest."""
    quick, full, core, either = dict(preset=["quick"]), dict(preset=["full"]), dict(core=[True]), [False, True]
    right, grouped = dict(mask=["right"], valid=[0.5]), "grouped heads"
    yield from _product("lengths", [1024], [64, 128], causal=[True], **quick, **core)
    yield from _product("lengths", [8192], [64, 128], causal=[True], **quick)
    yield from _product("lengths", [1024, 4096, 16384], [64, 128, 256], causal=either, **core)
    yield from _product("lengths", [512, 2048, 8192], [64, 128, 256], causal=either)
    yield from _product("odd lengths", [1000, 4097], [64, 128], causal=[True])
    yield from _product(grouped, [4096], [128], ratio=[8], causal=[True], **quick, **core)
    yield from _product(grouped, [4096], [128], ratio=[8], causal=[False], **core)
    yield from _product(grouped, [4096], [128], ratio=[4], causal=either)
    yield from _product(grouped, [4096], [64], ratio=[4, 8], causal=[True], **full)
    yield from _product("head dims", [4096], [80, 96], causal=either)
    yield from _product("head dims", [4096], [40, 160, 192], causal=either, **full)
    for dim in (32, 64, 128):
        yield from _product("dv = 2 d", [4096], [dim], value_dim=[2 * dim], causal=either, core=[dim == 64])
    yield from _product("cross-attention", [1024], [128], keys=[4096], batch=[8], causal=either)
    yield from _product("cross-attention", [4096], [128], keys=[512], batch=[8])

    padding, shares = "key padding", [0.25, 0.5, 0.75, 0.95]
    yield from _product(padding, [4096], [64], causal=either, **right, **quick, **core)
    yield from _product(padding, [4096], [64, 128], mask=["right", "left", "holes"], valid=[0.5], causal=either, **core)
    yield from _product(padding, [4096], [64, 128], mask=["right"], valid=shares, causal=either)
    yield from _product(padding, [4096], [64, 128], mask=["left", "holes"], valid=shares, causal=either, **full)
    yield from _product(padding, [4096], [256], causal=either, **right)
    documents = dict(mask=["documents"], valid=[0.25]) | core
    yield from _product("dense mask", [4096], [64, 128], **documents)
    yield from _product("dense mask", [2048], [64, 128], **documents, **full)
    yield from _product("dropout", [2048], [64], dropout_p=[0.1], causal=[True], **right, **quick)
    yield from _product("dropout", [2048], [128], dropout_p=[0.1], causal=[True], **right)
    yield from _product("dropout", [2048], [64, 128], dropout_p=[0.1], causal=either)

    floats = dict(dtype=["tf32", "float32"])
    yield from _product("float16", [4096], [64, 128], dtype=["float16"], causal=[True])
    yield from _product("float32", [2048], [64], causal=[True], **floats, **right, **quick, **core)
    yield from _product("float32", [2048], [128], causal=[True], **floats, **right, **core)
    yield from _product("float32", [2048], [64, 128], causal=either, **floats)
    # What the models that the package patches call: naturalspeech2's float32, the complete complex form's dv = 2 d.
    for dim, value_dim in ((64, 64), (32, 64)):
        sizes = dict(value_dim=[value_dim], batch=[16], heads=[8])
        exact = dict(dtype=["float32"], preset=["quick"])
        yield from _product("the seeds' shapes", [1024], [dim], causal=[True], **sizes, **exact, **right)
        yield from _product("the seeds' shapes", [1024], [dim], causal=either, **sizes, **floats, **right)
        yield from _product("the seeds' shapes", [1024], [dim], causal=either, **sizes, **floats)
    for keys, preset in ((8192, "quick"), (32768, "standard")):
        sizes = dict(keys=keys, batch=16 * 8192 // keys, heads=32, ratio=4)
        yield _case(1, 128, causal=True, passes=(FORWARD,), group="decoding", preset=preset, **sizes)
    for causal, preset in ((True, "quick"), (False, "standard")):
        rest = dict(batch=1, heads=8, passes=(FORWARD, BOTH), overhead=causal, core=causal)
        yield _case(128, 64, causal=causal, group="small calls", preset=preset, **rest)


# What a CPU measures, of which the usual kinds more closely.
CPU_KINDS = {
    "no mask": {},
    "causal": dict(causal=True),
    "padding on the right": dict(mask="right", valid=0.5),
    "padding on the left": dict(mask="left", valid=0.5),
    "holes": dict(mask="holes", valid=0.75),
    "documents": dict(mask="documents", valid=0.25),
    "i < j causal": dict(causal=True),
    "grouped heads": dict(causal=True, ratio=4),
    "dv = 2 d": dict(causal=True),
    "dropout": dict(causal=True, dropout_p=0.1),
}
USUAL_KINDS = ("no mask", "causal", "padding on the right")
LENGTHS, DIMS = (128, 512, 1024, 2048, 4096), (32, 64, 128)


def _cpu() -> Iterator[Case]:
    """Small enough for a laptop: what serves there beside what else runs there. The whole product takes hours. Of cases
    of one name the first counts."""
    for kind in CPU_KINDS:
        yield from _cpu_product("quick", kind, [512], [64], [0], ["float32"])
        if kind in USUAL_KINDS:
            yield from _cpu_product("standard", kind, LENGTHS, [64])
            yield from _cpu_product("standard", kind, [512, 2048], DIMS)
            yield from _cpu_product("standard", kind, [512, 2048], [64], [1])
        else:
            yield from _cpu_product("standard", kind, [128, 512, 2048], [64])
        yield from _cpu_product("full", kind, LENGTHS, DIMS, [0, 1])
    for padding in ({}, dict(mask="right", valid=0.625)):  # what `make demo` calls
        rest = dict(batch=4, heads=4, dtype="float32", causal=True, threads=1, passes=(FORWARD, BOTH))
        yield _case(192, 64, group="cpu: the demo's shapes", preset="quick", **rest, **padding)


def _cpu_product(preset: str, kind: str, lengths, dims, threads=(0,), dtypes=("float32", "bfloat16")) -> Iterator[Case]:
    for length, dim, number, dtype in product(lengths, dims, threads, dtypes):
        queries = length // 4 if kind == "i < j causal" else length
        value_dim = 2 * dim if kind == "dv = 2 d" else dim
        rest = CPU_KINDS[kind] | dict(batch=2, heads=4, dtype=dtype, threads=number, passes=(FORWARD, BOTH))
        overhead = (preset, kind, length) == ("standard", "causal", 128)
        rest |= dict(group=f"cpu: {kind}", preset=preset, overhead=overhead)
        yield _case(queries, dim, keys=length, value_dim=value_dim, **rest)


GRIDS = {"cpu": _cpu, "cuda": _cuda}
PRESETS = ("quick", "standard", "full")


def select_cases(device: str, preset: str, only: str = "") -> list[Case]:
    """The cases of a preset, larger ones including the smaller, that contain all words of `only` in group and name.
    `device` is "cpu" or "cuda". On a GPU a quick run leaves out the backward by itself.
    """
    rank = PRESETS.index(preset)
    grid: dict[str, Case] = {}
    for case in GRIDS[device]():
        grid.setdefault(case.name, case)
    cases = (case for case in grid.values() if PRESETS.index(case.preset) <= rank)
    if preset == "quick":
        cases = (replace(case, passes=tuple(name for name in case.passes if name in (FORWARD, BOTH))) for case in cases)
    return [case for case in cases if all(word in f"{case.group}: {case.name}" for word in only.split())]
