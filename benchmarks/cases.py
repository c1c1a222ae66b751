"""The grid as data: which attention calls are measured, in which passes, and how their inputs are made.

Lengths are powers of two from 512 to 16k at 16k tokens a batch with `h * d = 2048`, the field's usual grid, and around
it what that grid leaves out: odd lengths, grouped heads, head dims that are no power of two, `dv` other than `d`, key
padding on either side and in holes, dense masks, dropout, cross-attention, decoding, float32. A CPU has a grid of its
own, from 128 to 4096 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from einops import rearrange
from torch import Tensor

from flash_attend.testing.oracle import visible_pairs

__all__ = ["DTYPES", "PASSES", "PRESETS", "Case", "Inputs", "make_inputs", "make_mask", "select_cases"]

# How a case names its dtype -> the tensors' dtype, and `torch.set_float32_matmul_precision` while it runs.
DTYPES = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "float64": (torch.float64, "highest"),
}

FORWARD, BACKWARD, BOTH, DETERMINISTIC = ("forward", "backward", "forward+backward", "deterministic backward")
# The passes, in units of a forward: a backward is five products for two (Dao et al. 2022).
PASSES = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5, DETERMINISTIC: 2.5}


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
    passes: tuple[str, ...] = tuple(PASSES)
    group: str = ""  # the section of the report
    preset: str = "standard"  # the smallest preset that holds it
    threads: int = 0  # of the CPU; 0 for all
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
    visible: int  # pairs of a query and a key that sees it, over batch and heads

    def tflops(self, name: str, milliseconds: float) -> float:
        """The rate of a pass by the field's convention: two products of a multiplication and an addition for each
        number of a pair. Of pairs that are visible alone, so that rates of masked and unmasked calls compare."""
        flops = PASSES[name] * 2 * self.visible * (self.case.head_dim + self.case.value_dim)
        return flops / milliseconds / 1e9


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
    pairs = visible_pairs(case.batch, 1, case.queries, case.keys, mask, case.causal, device)
    rows = pairs.any(dim=3).squeeze(1)
    if mask is not None and mask.ndim == 2 and case.queries == case.keys:
        rows &= mask  # a padded position is no query either
    grad_out = draw(case.heads, case.queries, case.value_dim) * rows[:, None, :, None]
    visible = int(pairs.sum()) * case.heads
    return Inputs(case, *(x.requires_grad_() for x in (q, k, v)), mask, grad_out, rows, visible)


# ---------------------------------------------------------------------------------------------------------------------
# The grid
# ---------------------------------------------------------------------------------------------------------------------

TOKENS = 16 * 1024
WIDTH = 2048  # h * d


def _case(length: int, dim: int, *, shorter: float = 1, wider: int = 1, ratio: int = 1, **rest) -> Case:
    """A case of so many keys; how many there are of them to a query, numbers of v to one of k, heads to a key head."""
    batch = rest.pop("batch", max(1, TOKENS // length))
    heads = rest.pop("heads", max(ratio, WIDTH // dim // ratio * ratio))
    return Case(batch, heads, round(length / shorter), length, dim, wider * dim, heads // ratio, **rest)


def _cases(group: str, lengths: list[int], dims: list[int], **axes) -> Iterator[Case]:
    """The cases of every combination; an axis is a list of values, or one value."""
    axes = dict(length=lengths, dim=dims) | axes
    for values in product(*(axis if isinstance(axis, list) else [axis] for axis in axes.values())):
        yield _case(group=group, **dict(zip(axes, values, strict=True)))


def _cuda() -> Iterator[Case]:
    """The grid of a GPU. Of cases of one name the first counts: what is quick or core stands before the rest."""
    quick, full, core, either = dict(preset="quick"), dict(preset="full"), dict(core=True), [False, True]
    causal, both, right = dict(causal=True), dict(causal=either), dict(mask="right", valid=0.5)
    yield from _cases("lengths", [1024], [64, 128], **causal, **quick, **core)
    yield from _cases("lengths", [8192], [64, 128], **causal, **quick)
    yield from _cases("lengths", [1024, 4096, 16384], [64, 128, 256], **both, **core)
    yield from _cases("lengths", [512, 2048, 8192], [64, 128, 256], **both)
    yield from _cases("odd lengths", [1000, 4097], [64, 128], **causal)
    yield from _cases("grouped heads", [4096], [128], ratio=8, **causal, **quick, **core)
    yield from _cases("grouped heads", [4096], [128], ratio=8, causal=False, **core)
    yield from _cases("grouped heads", [4096], [128], ratio=4, **both)
    yield from _cases("grouped heads", [4096], [64], ratio=[4, 8], **causal, **full)
    yield from _cases("head dims", [4096], [80, 96], **both)
    yield from _cases("head dims", [4096], [40, 160, 192], **both, **full)
    yield from _cases("dv = 2 d", [4096], [64], wider=2, **both, **core)
    yield from _cases("dv = 2 d", [4096], [32, 128], wider=2, **both)
    yield from _cases("cross-attention", [4096], [128], shorter=4, batch=8, **both)
    yield from _cases("cross-attention", [512], [128], shorter=1 / 8, batch=8)

    masks, shares = ["right", "left", "holes"], [0.25, 0.5, 0.75, 0.95]
    yield from _cases("key padding", [4096], [64], **both, **right, **quick, **core)
    yield from _cases("key padding", [4096], [64, 128], mask=masks, valid=0.5, **both, **core)
    yield from _cases("key padding", [4096], [64, 128], mask="right", valid=shares, **both)
    yield from _cases("key padding", [4096], [64, 128], mask=["left", "holes"], valid=shares, **both, **full)
    yield from _cases("key padding", [4096], [256], **both, **right)
    documents = dict(mask="documents", valid=0.25) | core
    yield from _cases("dense mask", [4096], [64, 128], **documents)
    yield from _cases("dense mask", [2048], [64, 128], **documents, **full)
    yield from _cases("dropout", [2048], [64], dropout_p=0.1, **causal, **right, **quick)
    yield from _cases("dropout", [2048], [128], dropout_p=0.1, **causal, **right)
    yield from _cases("dropout", [2048], [64, 128], dropout_p=0.1, **both)

    floats = dict(dtype=["tf32", "float32"])
    yield from _cases("float16", [4096], [64, 128], dtype="float16", **causal)
    yield from _cases("float32", [2048], [64], **causal, **floats, **right, **quick, **core)
    yield from _cases("float32", [2048], [128], **causal, **floats, **right, **core)
    yield from _cases("float32", [2048], [64, 128], **both, **floats)
    # What the models that the package patches call: naturalspeech2's float32, the complete complex form's dv = 2 d.
    for dim, wider in ((64, 1), (32, 2)):
        call = ("the seeds' shapes", [1024], [dim])
        sizes = dict(wider=wider, batch=16, heads=8)
        yield from _cases(*call, **sizes, dtype="float32", **causal, **right, **quick)
        yield from _cases(*call, **sizes, **both, **floats, **right)
        yield from _cases(*call, **sizes, **both, **floats)
    decoding = dict(passes=(FORWARD,), heads=32, ratio=4) | causal
    yield from _cases("decoding", [8192], [128], shorter=8192, batch=16, **decoding, **quick)
    yield from _cases("decoding", [32768], [128], shorter=32768, batch=4, **decoding)
    small = dict(batch=1, heads=8, passes=(FORWARD, BOTH))
    yield from _cases("small calls", [128], [64], **small, **causal, **quick, **core)
    yield from _cases("small calls", [128], [64], **small)


# What a CPU measures, of which the usual kinds more closely.
CPU_KINDS = {
    "no mask": {},
    "causal": dict(causal=True),
    "padding on the right": dict(mask="right", valid=0.5),
    "padding on the left": dict(mask="left", valid=0.5),
    "holes": dict(mask="holes", valid=0.75),
    "documents": dict(mask="documents", valid=0.25),
    "i < j causal": dict(causal=True, shorter=4),
    "grouped heads": dict(causal=True, ratio=4),
    "dv = 2 d": dict(causal=True, wider=2),
    "dropout": dict(causal=True, dropout_p=0.1),
}
USUAL_KINDS = ("no mask", "causal", "padding on the right")
LENGTHS, DIMS = [128, 512, 1024, 2048, 4096], [32, 64, 128]


def _cpu() -> Iterator[Case]:
    """Small enough for a laptop: what serves there beside what else runs there. The whole product takes hours. Of cases
    of one name the first counts."""
    passes, dtypes = dict(passes=(FORWARD, BOTH)), ["float32", "bfloat16"]
    for kind, call in CPU_KINDS.items():
        cases = partial(_cases, f"cpu: {kind}", batch=2, heads=4, dtype=dtypes, **call, **passes)
        yield from cases([512], [64], dtype="float32", preset="quick")
        if kind in USUAL_KINDS:
            yield from cases(LENGTHS, [64])
            yield from cases([512, 2048], DIMS)
            yield from cases([512, 2048], [64], threads=1)
        else:
            yield from cases([128, 512, 2048], [64])
        yield from cases(LENGTHS, DIMS, threads=[0, 1], preset="full")
    for padding in ({}, dict(mask="right", valid=0.625)):  # what `make demo` calls
        rest = dict(batch=4, heads=4, dtype="float32", causal=True, threads=1, preset="quick") | passes | padding
        yield from _cases("cpu: the demo's shapes", [192], [64], **rest)


GRIDS = {"cpu": _cpu, "cuda": _cuda}
PRESETS = ("quick", "standard", "full")


def select_cases(device: str, preset: str) -> list[Case]:
    """The cases of a preset on "cpu" or "cuda", larger ones including the smaller. On a GPU a quick run leaves out the
    backward by itself."""
    grid: dict[str, Case] = {}
    for case in GRIDS[device]():
        grid.setdefault(case.name, case)
    cases = [case for case in grid.values() if PRESETS.index(case.preset) <= PRESETS.index(preset)]
    if preset != "quick":
        return cases
    return [replace(case, passes=tuple(name for name in case.passes if name in (FORWARD, BOTH))) for case in cases]
