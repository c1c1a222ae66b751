"""Somebody else's Attend, computed by `flash_attention`: the same object with the same contents, of another class."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.fx import Proxy

from flash_attend.attend import record_call
from flash_attend.functional import flash_attention

__all__ = ["ServedAttend", "Service", "Serving", "dropout_in_force", "is_neutral", "served_class", "serving_of"]


@dataclass(frozen=True, eq=False)
class Service:
    """What one call of `patch` asks for. Two with the same fields are two: a handle withdraws no other's."""

    backend: str = "auto"
    keep_flash: bool = False
    deterministic: bool | None = None
    context_parallel: Any = None

    def asks_the_same(self, other: Service) -> bool:
        """Whether nothing would change if the other one took its place."""
        return vars(self) == vars(other)


class Serving(NamedTuple):
    """How Attends are served. The class that they get keeps it, so that they themselves hold nothing new."""

    kind: type[nn.Module]  # the class that they had
    reading: type[ServedAttend]  # how the arguments of a call are read
    flash: str  # the attribute that chooses the original's flash path
    services: tuple[Service, ...]  # of the calls of `patch` that were not undone; the last one is in force
    arguments: tuple[str, ...] = ("mask",)  # what a call may carry after q, k and v, in the original's order
    surplus: tuple[str, ...] = ()  # those of them that have to be None or False
    unset: tuple[str, ...] = ()  # attributes of the instance that have to stay None or False


class ServedAttend(nn.Module):
    """Comes before an Attend's own class: its options, read at every call, with our computation."""

    _flash_attend: ClassVar[Serving]  # looked up by this name, which survives a reload of the package

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *others: Any, **named: Any) -> Any:
        """As the original's: what it takes, in the same order and under the same names, and what it returns."""
        if isinstance(q, Proxy):
            return record_call(self, q, k, v, *others, **named)
        out = self._compute_attention(q, k, v, **self._read_arguments(others, named))
        return self._returned(out, (q, k, v), others, named)

    def _returned(self, out: Tensor, qkv: tuple[Tensor, ...], others: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What the original's forward returns, of which `_output_of` is the output."""
        return out

    def _read_arguments(self, others: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """What a call carries after q, k and v, by the names that `_compute_attention` has for it."""
        serving = self._flash_attend
        given = dict(zip(serving.arguments, others, strict=False))
        if len(others) > len(given) or any(name in given or name not in serving.arguments for name in named):
            takes = ", ".join(("q", "k", "v", *serving.arguments))
            raise TypeError(f"it takes ({takes}), got {len(others)} positional ones after v, and {', '.join(named)}")
        given.update(named)
        for name in serving.surplus:
            _require_neutral(name, given.pop(name, None))
        for name in serving.unset:
            _require_neutral(name, getattr(self, name, None))
        return {"bias" if name == "attn_bias" else name: value for name, value in given.items()}

    def _compute_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Any:
        """As `flash_attend.flash_attention`, with the options that this instance has now."""
        serving = self._flash_attend
        service = serving.services[-1]
        by_einsum = service.keep_flash and not getattr(self, serving.flash, False)
        probability, training = dropout_in_force(self, serving.flash)
        attend = flash_attention if service.context_parallel is None else service.context_parallel.attend
        return attend(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            causal=getattr(self, "causal", False) if causal is None else causal,
            scale=getattr(self, "scale", None),
            softcap=softcap,
            sinks=sinks,
            dropout_p=probability if training else 0.0,
            deterministic=service.deterministic,
            backend="math" if by_einsum else service.backend,
        )

    @staticmethod
    def _output_of(returned: Any) -> Any:
        """The output, in what the original's forward returns."""
        return returned

    @staticmethod
    def _prepare_example(attend: nn.Module) -> None:
        """Gives a copy that is to be compared, with four heads, what depends on their number."""

    @staticmethod
    def _class_contents(kind: type[nn.Module]) -> dict[str, Any]:
        """What the class of those that are served needs beside this one and theirs."""
        return {}

    @staticmethod
    def _served_arguments(attend: nn.Module, arguments: Collection[str]) -> Collection[str]:
        """Those of a call's arguments that are served for this instance."""
        return arguments

    def extra_repr(self) -> str:
        """What the original shows, and by which backend it is served."""
        shown = [
            text for text in (super().extra_repr(), f"backend={self._flash_attend.services[-1].backend!r}") if text
        ]
        return ", ".join(shown)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class is made at run time, under no name by which a pickle could find it.
        made: Any = super().__reduce_ex__(max(protocol, 2))
        return (_rebuild, (self._flash_attend,), *made[2:])


def is_neutral(value: Any) -> bool:
    """Whether an option or an argument asks for nothing."""
    return value is None or value is False


def _require_neutral(name: str, value: Any) -> None:
    if not is_neutral(value):
        raise ValueError(f"{name} must be None or False: flash_attend does not compute what it asks for")


def dropout_in_force(attend: nn.Module, flash: str) -> tuple[float, bool]:
    """The probability of dropping a weight, and whether weights are dropped now.

    The originals' flash path reads the number, their einsum path the layer, which whoever walks over a model's
    `nn.Dropout` modules may have changed.
    """
    layer = getattr(attend, "attn_dropout", None)
    if layer is None or getattr(attend, flash, False):
        return getattr(attend, "dropout", 0.0), attend.training
    if isinstance(layer, nn.Identity):
        return 0.0, False
    if not isinstance(layer, nn.Dropout):
        raise TypeError(f"attn_dropout must be an nn.Dropout, got {type(layer).__name__}")
    return layer.p, layer.training


def serving_of(attend: nn.Module) -> Serving | None:
    """How an Attend is served; None if it is not, or if its class was derived from a served one since."""
    return vars(type(attend)).get("_flash_attend")


@functools.lru_cache(maxsize=256)
def served_class(serving: Serving) -> type[nn.Module]:
    """The class of the Attends that are served so; their original one where no service is left."""
    if not serving.services:
        return serving.kind
    kind = serving.kind
    contents = {"_flash_attend": serving, "__module__": __name__, "__doc__": serving.reading.__doc__}
    contents |= serving.reading._class_contents(kind)
    return type(f"Served{kind.__name__}", (serving.reading, kind), contents)


def _rebuild(serving: Serving) -> nn.Module:
    """An instance without contents, for copies and pickles."""
    kind = served_class(serving)
    return kind.__new__(kind)
