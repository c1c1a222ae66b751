"""x-transformers' Attend, which many packages use: it returns the output and what it saw on the way.

Attention maps are for whoever reads them: they are computed then, by the original's einsum path, and not before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from flash_attend.integrations.known import KnownAttend, register
from flash_attend.integrations.lucidrains import TiledHeadsAttend

if TYPE_CHECKING:
    from flash_attend.integrations.search import Found

__all__ = ["XTransformersAttend"]

_MAPS = ("qk_similarities", "pre_softmax_attn", "post_softmax_attn")
_OTHERS = {
    "pre_softmax_talking_heads": "talking heads before softmax",
    "post_softmax_talking_heads": "talking heads after softmax",
    "pre_scale_post_talking_heads": "talking heads that scale weights",
    "cope": "CoPE, which adds to scores what the scores themselves decide",
    "selective": "selective attention, which takes scores off each other",
    "cog_signed": "cog attention, whose weights have signs",
    "l2_distance": "distances in place of products",
    "inverted_attention": "inverted attention, whose softmax runs over queries",
    "flash_pack_seq": "packed sequences by the flash-attn package",
}
_BIASES = ("rel_pos", "data_dependent_alibi", "rel_proj_pos_bias")  # what in a model hands biases to an Attend


class XTransformersAttend(TiledHeadsAttend):
    """Returns `(out, intermediates)`; query head `n` reads key/value head `n % hk`; its own softclamp and sinks."""

    _record: ClassVar[Any]  # what the original returns beside the output
    _record_later: ClassVar[Any]

    def _returned(self, out: Tensor, qkv: tuple[Tensor, ...], others: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self.flash:
            return out, self._record()
        record = self._record_later
        made: Any = record.__new__(record)
        made.attend, made.gradients, made.call = self, torch.is_grad_enabled(), (qkv, others, named)
        return out, made

    def _compute_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None = None,
        row_mask: Tensor | None = None,  # which the inverted form alone heeds
        **others: Any,
    ) -> Tensor:
        """As `ServedAttend`, with the options that only this class has."""
        attend: Any = self
        softcap = attend.logit_softclamp_value if attend.softclamp_logits else None
        if softcap is not None and bias is not None:
            raise ValueError(
                "attn_bias must be None where softclamp_logits is set: it is clamped there with the scores"
            )
        return super()._compute_attention(q, k, v, bias=bias, softcap=softcap, sinks=_sinks(attend, q), **others)

    @staticmethod
    def _class_contents(kind: type[nn.Module]) -> dict[str, Any]:
        record = sys.modules[kind.__module__].Intermediates
        return {"_record": record, "_record_later": _later(record)}

    @staticmethod
    def _output_of(returned: Any) -> Any:
        return returned[0] if isinstance(returned, tuple) else returned

    @staticmethod
    def _prepare_example(attend: Any) -> None:
        if attend.head_attn_sink is not None:
            sinks = torch.linspace(-1.0, 1.0, 4, dtype=torch.float32, device="cpu")
            attend.head_attn_sink = nn.Parameter(sinks)

    @staticmethod
    def _served_arguments(attend: Any, arguments: Collection[str]) -> Collection[str]:
        return [name for name in arguments if name != "attn_bias" or not attend.softclamp_logits]


def _sinks(attend: Any, q: Tensor) -> Tensor | None:
    """A logit for each head that takes part in the normaliser alone. A key and a value of zeros are one of 0."""
    learned = attend.head_attn_sink if attend.head_learned_sink else None
    if not attend.add_zero_kv:
        return learned
    return q.new_zeros(q.shape[1]) if learned is None else nn.functional.softplus(learned)


def _later(record: Any) -> Any:
    """A record like the original's, whose attention maps are computed when one of them is read."""

    def reader(name: str) -> property:
        def read(made: Any) -> Tensor:
            if made.maps is None:
                made.maps = _maps(made.attend, made.gradients, made.call)
            return made.maps[name]

        return property(read)

    return type(record.__name__, (record,), {"maps": None, "__module__": __name__, **{x: reader(x) for x in _MAPS}})


def _maps(attend: Any, gradients: bool, call: tuple[Any, ...]) -> dict[str, Tensor]:
    """By the original's forward, as it would have run when it was called."""
    qkv, others, named = call
    with torch.set_grad_enabled(gradients):
        _, intermediates = attend._flash_attend.kind.forward(attend, *qkv, *others, **named)
    return {name: getattr(intermediates, name) for name in _MAPS}


def _refuse(found: Found) -> str | None:
    attend: Any = found.attend
    for name, meaning in _OTHERS.items():
        if getattr(attend, name, None) not in (None, False):
            return f"{name}: {meaning}"
    if (reason := _not_softmax(attend.attn_fn)) is not None:
        return f"its attn_fn is {reason}, which is not softmax over keys"
    for owner in found.owners:
        if getattr(owner, "residual_attn", False) or getattr(owner, "cross_residual_attn", False):
            return "residual attention: each layer reads the scores of the one before"
        if attend.softclamp_logits and any(getattr(owner, name, None) is not None for name in _BIASES):
            return (
                "softclamp_logits in a model that adds a bias: it clamps their sum; flash_attend adds a bias after that"
            )
    return None


def _not_softmax(function: Any) -> str | None:
    """None for softmax over keys, else what it is."""
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        options = {**function.keywords, **options}
        if function.args:
            return repr(function)
        function = function.func
    name = getattr(function, "__name__", repr(function))
    if function is not nn.functional.softmax:
        return name
    wrong = options.pop("dim", None) != -1 or options.pop("dtype", None) not in (None, torch.float32) or options
    return f"{name} with other options" if wrong else None


register(
    KnownAttend(
        "x_transformers.attend.Attend",
        {
            *("dropout", "causal", "heads", "scale", "flash"),
            *("softclamp_logits", "logit_softclamp_value", "add_zero_kv", "head_learned_sink"),
        },
        arguments=("mask", "attn_bias", "row_mask", "causal"),
        flash_differs={"causal"},
        reading=XTransformersAttend,
        attributes={"attn_fn", "head_attn_sink", "sdp_context_manager"},
        refuse=_refuse,
        read="2.31.10",
    )
)
