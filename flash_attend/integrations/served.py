"""Somebody else's Attend, computed by `flash_attention`: the same object with the same contents, of another class."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.fx import Proxy

from flash_attend.attend import record_call
from flash_attend.functional import flash_attention

__all__ = ["ServedAttend", "Service", "Serving", "dropout_in_force", "served_class", "serving_of"]


@dataclass(frozen=True, eq=False)
class Service:
    """What one call of `patch` asks for. Two with the same fields are two: a handle withdraws no other's."""

    backend: str = "auto"
    keep_flash: bool = False
    deterministic: bool | None = None

    def asks_the_same(self, other: Service) -> bool:
        """Whether nothing would change if the other one took its place."""
        return dataclasses.astuple(self) == dataclasses.astuple(other)


class Serving(NamedTuple):
    """How Attends are served. The class that they get keeps it, so that they themselves hold nothing new."""

    kind: type[nn.Module]  # the class that they had
    reading: type[ServedAttend]  # how the arguments of a call are read
    flash: str  # the attribute that chooses the original's flash path
    services: tuple[Service, ...]  # of the calls of `patch` that were not undone; the last one is in force


class ServedAttend(nn.Module):
    """Comes before an Attend's own class: its options, read at every call, with our computation."""

    _flash_attend: ClassVar[Serving]  # looked up by this name, which survives a reload of the package

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `flash_attend.Attend.forward`."""
        if isinstance(q, Proxy):
            return record_call(self, q, k, v, **({} if mask is None else {"mask": mask}))
        serving = self._flash_attend
        service = serving.services[-1]
        by_einsum = service.keep_flash and not getattr(self, serving.flash, False)
        probability, training = dropout_in_force(self, serving.flash)
        return flash_attention(
            q,
            k,
            v,
            mask=mask,
            causal=getattr(self, "causal", False),
            scale=getattr(self, "scale", None),
            dropout_p=probability if training else 0.0,
            deterministic=service.deterministic,
            backend="math" if by_einsum else service.backend,
        )

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
    return type(f"Served{kind.__name__}", (serving.reading, kind), contents)


def _rebuild(serving: Serving) -> nn.Module:
    """An instance without contents, for copies and pickles."""
    kind = served_class(serving)
    return kind.__new__(kind)
