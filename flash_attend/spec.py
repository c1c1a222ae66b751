"""One frozen description of an attention call.

Dimension letters, used in every docstring of the package:

    b - batch        h - query heads     hk - key/value heads (hk divides h)
    i - queries      j - keys            d  - key dimension    dv - value dimension
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple, Protocol

import torch

__all__ = [
    "CALLS_KEPT",
    "DEAD_SEGMENTS",
    "LARGEST_LENGTH",
    "PACKED_ROWS",
    "AttentionSpec",
    "BiasKind",
    "MaskKind",
    "Window",
    "bias_kind",
    "canonical",
    "describe",
    "kind_of",
]

Window = tuple[int | None, int | None]  # how many keys a query sees before its own and after it; None: all of them

CALLS_KEPT = 512  # of how many different calls (shapes, layouts, options) what was worked out is kept
LARGEST_LENGTH = 2**31 - 1 - 8192  # positions are 32-bit in the kernels, with room for tiles past the end

DEAD_SEGMENTS = 2  # what segments have beside sequences: the queries, and the keys, that are in none
PACKED_ROWS = 64  # queries times heads of a group: what is no more is rows of one tile


class MaskKind(IntEnum):
    """What a mask varies over, which decides the work it costs."""

    NONE = 0
    KEY = 1  # the same for every query of a head: key padding, `(b, j)` or `(b|1, h|1, 1, j)`
    DENSE = 2  # varies over queries


class BiasKind(NamedTuple):
    """Which of its dimensions a bias varies over (along the others it is broadcast), and its dtype."""

    batch: bool
    heads: bool
    queries: bool
    keys: bool
    dtype: torch.dtype  # q's, or float32


@dataclass(frozen=True)
class AttentionSpec:
    """Everything that decides how a call is served, without the tensors themselves."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    mask: MaskKind = MaskKind.NONE
    mask_per_head: bool = False  # the mask differs between query heads
    causal: bool = False
    scale: float = 1.0
    dropout_p: float = 0.0
    deterministic: bool = False
    precision: str = "ieee"  # of float32 products: "tf32", "tf32x3" (float32-accurate); "ieee" for other dtypes
    # Query `x` sees key `y` iff `x + offset - left <= y <= x + offset + right`. A right end of 0 is `causal`, whose own
    # right end is None here, and so is an end that hides nothing of these lengths: each meaning has one spec.
    window: Window = (None, None)
    softcap: float = 0.0  # scores `s` become `softcap * tanh(s / softcap)`; 0 for none
    bias: BiasKind | None = None
    alibi: bool = False  # each head's slope times the distance is taken off its scores
    sinks: bool = False  # each head has a logit that takes part in the normaliser alone
    # How many sequences a batch of one holds, one after another, each of which sees itself alone; else None. `queries`
    # and `keys` are then those of all, and positions are counted within a sequence.
    sequences: int | None = None
    # Where the first query and the first key stand in the sequences of which dropout counts positions, where these are
    # parts of longer ones.
    origin: tuple[int, int] | None = None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Taken once: launches are looked up by their spec. Of numbers alone, which hash alike in every process."""
        sizes = (self.batch, self.heads, self.kv_heads, self.queries, self.keys, self.head_dim, self.value_dim)
        mode = (int(self.mask), self.mask_per_head, self.causal, self.scale, self.dropout_p, self.deterministic)
        bias = None if self.bias is None else (*self.bias[:4], self.bias.dtype.itemsize)
        scores = (self.window, self.softcap, bias, self.alibi, self.sinks, self.sequences, self.origin)
        return hash((sizes, mode, self.dtype.itemsize, scores))

    @property
    def group(self) -> int:
        """How many query heads read one key/value head."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def packed(self) -> bool:
        """Whether kernels take the query heads of a group as rows of one tile, which reads k and v once: where there
        are few queries, and nothing but slopes and sinks differs between the heads."""
        by_head = self.mask_per_head or self.dropout_p > 0 or (self.bias is not None and self.bias.heads)
        few = self.sequences is None and (self.queries == 1 or self.queries * self.group <= PACKED_ROWS)
        return self.group > 1 and few and self.mask != MaskKind.DENSE and not by_head

    @property
    def one_query(self) -> bool:
        """Whether there is a single query, as in decoding, and it is known to be one sequence's."""
        return self.sequences is None and bool(self.queries == 1)

    @property
    def offset(self) -> int:
        """Under `causal`, query `x` sees key `y` iff `y <= x + offset` (the last query sees the last key)."""
        return self.keys - self.queries

    @property
    def options(self) -> tuple[bool, float, float, bool, str, Window, float]:
        """What the tensors of a call do not say, in the order in which `describe` takes it."""
        flags = self.causal, self.scale, self.dropout_p, self.deterministic
        return *flags, self.precision, self.window, self.softcap

    @property
    def plain_scores(self) -> bool:
        """Whether scores are products under a scale, and the softmax is over them alone."""
        return not (self.adds_to_scores or self.softcap or self.sinks)

    @property
    def adds_to_scores(self) -> bool:
        """Whether a bias or ALiBi is added to the scores."""
        return self.bias is not None or self.alibi

    @property
    def banded(self) -> bool:
        """Whether what a query sees depends on its place, whatever the mask."""
        return self.causal or self.window != (None, None)

    @property
    def right_end(self) -> int | None:
        """How many keys behind its own a query sees at most; None for all of them."""
        return 0 if self.causal else self.window[1]

    @property
    def symbolic(self) -> bool:
        """Whether lengths are a tracer's symbols, of which nothing may be asked that does not hold for all lengths."""
        return not (type(self.batch) is type(self.queries) is type(self.keys) is int)

    def keys_seen(self, first: int, last: int) -> tuple[int, int]:
        """The range of keys beyond which causality and the window hide all from the queries from `first` to `last`."""
        if self.symbolic:
            return 0, self.keys
        left, right = self.window[0], self.right_end
        end = self.keys if right is None else min(max(last + self.offset + right, 0), self.keys)
        begin = 0 if left is None else min(max(first + self.offset - left, 0), end)
        return begin, end

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """The dtype of the softmax statistics, of the LSE and of every sum."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def canonical(causal: bool, window: Window, queries: int, keys: int) -> tuple[bool, Window]:
    """The same causality and window in the words of `AttentionSpec`. Of lengths that may be a compiler's symbols
    nothing is asked."""
    left, right = window
    if not torch.compiler.is_compiling():
        left = None if left is None or left >= keys - 1 else left
        right = None if right is None or right >= queries - 1 else right
    if causal or right == 0:
        return True, (left, None)
    return False, (left, right)


def kind_of(spec: AttentionSpec) -> str:
    """How a call's products are computed: "half", "tf32", "tf32x3" or "double"."""
    return {torch.float32: spec.precision, torch.float64: "double"}.get(spec.dtype, "half")


class _Shaped(Protocol):
    """A tensor, or what is known of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


def describe(
    q: _Shaped,
    k: _Shaped,
    v: _Shaped,
    mask: _Shaped | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    deterministic: bool,
    precision: str,
    window: Window = (None, None),
    softcap: float = 0.0,
    *,
    bias: _Shaped | None = None,
    alibi: bool = False,
    sinks: bool = False,
    segments: _Shaped | None = None,
) -> AttentionSpec:
    """The spec of operands, in the shapes of `Operands`, and of the `options` of a call. Nothing is checked."""
    batch, heads, queries, head_dim = q.shape
    kind = MaskKind.NONE if mask is None else MaskKind.KEY if mask.shape[2] == 1 else MaskKind.DENSE
    return AttentionSpec(
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        queries=queries,
        keys=k.shape[2],
        head_dim=head_dim,
        value_dim=v.shape[3],
        dtype=q.dtype,
        mask=kind,
        mask_per_head=mask is not None and bool(mask.shape[1] > 1),
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        deterministic=deterministic,
        precision=precision,
        window=window,
        softcap=softcap,
        bias=None if bias is None else bias_kind(bias),
        alibi=alibi,
        sinks=sinks,
        sequences=None if segments is None else segments.shape[0] - DEAD_SEGMENTS,
    )


def bias_kind(bias: _Shaped) -> BiasKind:
    """What a bias `(b|1, h|1, i|1, j|1)` varies over."""
    batch, heads, queries, keys = (bool(size != 1) for size in bias.shape)
    return BiasKind(batch, heads, queries, keys, bias.dtype)
