"""What is compiled once, and so checked once: a variant of a backend's kernels."""

from __future__ import annotations

from operator import index
from typing import NamedTuple

from flash_attend.spec import AttentionSpec

__all__ = ["ALL", "NONE", "Kind", "Variant", "kind_of_call", "variant_of"]

ALL = (True, True, True)  # gradients, or tangents, of q, k and v
NONE = (False, False, False)


class Kind(NamedTuple):
    """A kind of calls: what the tiles of a kernel depend on."""

    dtype: str
    precision: str
    head_dim: int
    value_dim: int
    mask: str  # the name of a `MaskKind`, in lower case
    causal: bool
    dropout: bool
    one_query: bool = False  # decoding
    scores: str = ""  # what changes them, and a window's edges: words with "+" between them, as `_changes` has them
    sequences: bool = False  # packed one after another

    def __str__(self) -> str:
        words = [self.dtype, self.precision * (self.precision != "ieee"), f"d{self.head_dim}", f"dv{self.value_dim}"]
        words += [self.mask * (self.mask != "none"), "causal" * self.causal, "dropout" * self.dropout]
        words += ["one-query" * self.one_query, "sequences" * self.sequences]
        return " ".join(filter(None, [*words, *self.scores.split("+")]))


class Variant(NamedTuple):
    """What is compiled once: lengths, strides and the scale's size are run-time values."""

    backend: str
    backward: str
    kind: Kind
    mask_per_head: bool
    grouped: bool
    negative_scale: bool
    # Which of q, k and v need a gradient and, where there is either, the bias and the sinks; where none does, the
    # backward is not run.
    needed: tuple[bool, ...]
    # As `kernels.configs.as_text` has those that were measured fastest, or that the rules give calls too short
    # to fill a part; empty for what they give others.
    tiles: str = ""
    packed: bool = False  # `AttentionSpec.packed` of more than one query
    tangents: tuple[bool, ...] = ()  # in forward mode: which of q, k, v, the bias and the sinks have one

    @staticmethod
    def read(fields: tuple) -> Variant:
        """The variant of `variant_of`, or from JSON."""
        backend, backward, kind, per_head, grouped, negative, needed, tiles, packed, tangents = fields
        flags = per_head, grouped, negative
        return Variant(backend, backward, Kind(*kind), *flags, tuple(needed), tiles, packed, tuple(tangents))

    def __str__(self) -> str:
        gradients, tangents = _named(self.needed), _named(self.tangents)
        words = [self.backend, self.backward, str(self.kind)]
        words += ["per-head" * self.mask_per_head, "grouped" * self.grouped, "negative-scale" * self.negative_scale]
        words += ["packed" * self.packed]
        words += [f"gradients-{gradients}" if gradients else "forward-only", f"tangents-{tangents}" * bool(tangents)]
        words += [f"tiles {self.tiles}" * bool(self.tiles)]
        return " ".join(filter(None, words))


def _named(which: tuple[bool, ...]) -> str:
    """Those of q, k, v, the bias and the sinks, as one word."""
    return "".join(name for name, there in zip(("q", "k", "v", "-bias", "-sinks"), which, strict=False) if there)


# While a call is traced, a compiler hands only constants, and tuples of them, to what it runs for real.


def kind_of_call(spec: AttentionSpec) -> tuple:
    """The fields of a call's `Kind`."""
    mask = "none" if spec.mask == 0 else "key" if spec.mask == 1 else "dense"
    dtype, dims = str(spec.dtype).removeprefix("torch."), (index(spec.head_dim), index(spec.value_dim))
    decided = spec.dropout_p > 0, spec.one_query
    packed = spec.sequences is not None
    return dtype, spec.precision, *dims, mask, spec.causal, *map(_decided, decided), _changes(spec), packed


def _changes(spec: AttentionSpec) -> str:
    """What changes a call's scores, and the edges of its window."""
    left, right = spec.window
    words = ["left"] * (left is not None) + ["right"] * (right is not None)
    words += ["softcap"] * (spec.softcap > 0) + ["alibi"] * spec.alibi + ["sinks"] * spec.sinks
    if spec.bias is not None:
        form = "".join(letter if varies else "1" for letter, varies in zip("bhij", spec.bias[:4], strict=True))
        words.append(f"bias-{form}-{str(spec.bias.dtype).removeprefix('torch.')}")
    return "+".join(words)


def variant_of(
    spec: AttentionSpec,
    backend: str,
    backward: str,
    needed: tuple[bool, ...],
    tiles: str = "",
    tangents: tuple[bool, ...] = (),
) -> tuple:
    """The fields of the `Variant` that serves a call."""
    flags = spec.mask_per_head, spec.heads != spec.kv_heads, spec.scale < 0
    packed = spec.packed and spec.queries > 1
    return backend, backward, kind_of_call(spec), *map(_decided, flags), needed, tiles, _decided(packed), tangents


def _decided(condition: bool) -> bool:
    """A condition of symbols as a constant, which holds for whatever the compiled program serves."""
    if condition:  # noqa: SIM103  a branch is what decides
        return True
    return False
