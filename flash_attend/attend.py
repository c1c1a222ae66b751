"""`Attend`: the module that models hold, and one functional call."""

from __future__ import annotations

import math
import numbers
from typing import NoReturn

from torch import Tensor, nn
from torch.fx import Proxy

from flash_attend.dispatch import check_backend
from flash_attend.functional import flash_attention

__all__ = ["Attend"]


class Attend(nn.Module):
    """Exact attention in place of a lucidrains-style `Attend`: no parameters, no buffers, an empty state dict.

    Takes the constructor arguments of complex-valued-transformer's class (`dropout, causal, heads, scale, flash`) and
    those of naturalspeech2-pytorch's (`dropout, causal, use_flash`), by position or by keyword.

    Args:
        dropout: probability in [0, 1) of dropping a weight; only while training.
        causal: query `x` sees key `y` iff `y <= x + (j - i)`: the last query sees the last key.
        use_flash: naturalspeech2-pytorch's name of `flash`.
        flash: None or True for the fastest backend that can serve a call, False for the einsum path ("math").
        heads: accepted because callers pass it, and unused: q says how many heads there are.
        scale: factor on the scores, a finite number; default `d ** -0.5`.
        backend: "auto" or a backend by name, as in `flash_attention`; one asked for by name never falls back.
        deterministic: bitwise repeatable gradients; default `torch.are_deterministic_algorithms_enabled()`.

    `dropout`, `causal`, `scale`, `flash`, `backend` and `deterministic` may be assigned later and hold from the next
    call on. `dropout` is the probability of the submodule `attn_dropout`, whose train/eval state decides whether
    anything is dropped, so that code which walks over a model's `nn.Dropout` modules reaches this one too.

    Raises:
        TypeError, ValueError: an argument is wrong, or two contradict each other.
    """

    def __init__(
        self,
        dropout: float = 0.0,
        causal: bool = False,
        use_flash: bool | None = None,
        *,
        flash: bool | None = None,
        heads: int | None = None,
        scale: float | None = None,
        backend: str = "auto",
        deterministic: bool | None = None,
    ) -> None:
        super().__init__()
        for name, flag in (("use_flash", use_flash), ("flash", flash), ("deterministic", deterministic)):
            if flag is not None and not isinstance(flag, bool):
                raise TypeError(f"{name} must be True, False or None, got {flag!r}")
        if not isinstance(causal, bool):
            raise TypeError(f"causal must be True or False, got {causal!r}")
        if flash is not None and use_flash is not None and flash != use_flash:
            raise ValueError(f"flash and use_flash are two names of one flag, got flash={flash}, use_flash={use_flash}")
        if heads is not None and (isinstance(heads, bool) or not isinstance(heads, numbers.Integral)):
            raise TypeError(f"heads must be an integer or None, got {heads!r}")
        if heads is not None and heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        check_backend(backend)

        self.flash = flash is not False and use_flash is not False
        if not self.flash and backend not in ("auto", "math"):
            raise ValueError(f"flash=False asks for the einsum path, backend={backend!r} for another one")

        self.attn_dropout = nn.Dropout(_probability(dropout))
        self.causal = causal
        self.heads = None if heads is None else int(heads)
        self.scale = None if scale is None else _finite("scale", scale)
        self.backend = backend
        self.deterministic = deterministic

    @property
    def dropout(self) -> float:
        """The probability of dropping a weight."""
        return self.attn_dropout.p

    @dropout.setter
    def dropout(self, probability: float) -> None:
        self.attn_dropout.p = _probability(probability)

    @property
    def use_flash(self) -> bool:
        """naturalspeech2-pytorch's name of `flash`."""
        return self.flash

    @use_flash.setter
    def use_flash(self, flash: bool) -> None:
        self.flash = flash

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            q: `(b, h, i, d)`.
            k: `(b, hk, j, d)` or `(b, j, d)`; `hk` divides `h`.
            v: `(b, hk, j, dv)` or `(b, j, dv)`.
            mask: bool, True = may attend: `(b, j)` for key padding, or 4-D and broadcastable to `(b, h, i, j)`.

        Returns:
            `(b, h, i, dv)` in q's dtype, or in autocast's where it is on. A query that sees no key gives 0.

        Raises:
            TypeError, ValueError: as `flash_attention`.
        """
        if isinstance(q, Proxy):  # torch.fx records a call of this module, which keeps its options and its dropout
            return q.tracer.create_proxy("call_module", q.tracer.path_of_module(self), (q, k, v, mask), {})
        return flash_attention(
            q,
            k,
            v,
            mask=mask,
            causal=self.causal,
            scale=self.scale,
            dropout_p=self.dropout if self.attn_dropout.training else 0.0,
            deterministic=self.deterministic,
            backend="math" if self.flash is False else self.backend,
        )

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}; use torch.export.export or torch.compile"
        )

    def extra_repr(self) -> str:
        """What is not at its default; the dropout is shown by its submodule."""
        parts = [f"causal={self.causal}"]
        parts += [f"{name}={value}" for name in ("heads", "scale") if (value := getattr(self, name)) is not None]
        parts += ["flash=False"] if self.flash is False else []
        parts += [] if self.backend == "auto" else [f"backend={self.backend!r}"]
        parts += [] if self.deterministic is None else [f"deterministic={self.deterministic}"]
        return ", ".join(parts)


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a Python number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _probability(dropout: object) -> float:
    dropout = _finite("dropout", dropout)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    return dropout
