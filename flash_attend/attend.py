"""`Attend`: the module that models hold, and one functional call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.fx import Proxy

from flash_attend.dispatch import check_backend
from flash_attend.functional import flash_attention
from flash_attend.options import (
    check_count,
    check_flag,
    check_number,
    check_positive,
    check_probability,
    check_window,
    optional,
)
from flash_attend.spec import Window

__all__ = ["Attend", "record_call"]


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
        window: `(left, right)`, integers or None for no limit: query `x` sees key `y` iff
            `x + (j - i) - left <= y <= x + (j - i) + right`. With `causal`, right counts as 0.
        softcap: a positive number `c`: scores `s` become `c * tanh(s / c)`.
        backend: "auto" or a backend by name, as in `flash_attention`; one asked for by name never falls back.
        deterministic: bitwise repeatable gradients; default `torch.are_deterministic_algorithms_enabled()`.
        context_parallel: the `ProcessGroup` whose ranks share the sequences, or a `ContextParallel` that says how: each
            call then takes this rank's shards, as `context_parallel_attention` does.

    Every option may be assigned later, is checked then as here, and holds from the next call on; numbers and flags of
    numpy's become Python's. `dropout` is the probability of the submodule `attn_dropout`, an `nn.Dropout` or, for none,
    an `nn.Identity`, whose train/eval state decides whether anything is dropped, so that code which walks over a
    model's `nn.Dropout` modules reaches this one too. Of that submodule nothing else is used: it is never called.

    Raises:
        TypeError, ValueError: an option is wrong, or two contradict each other.
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
        window: Window | None = None,
        softcap: float | None = None,
        backend: str = "auto",
        deterministic: bool | None = None,
        context_parallel: Any = None,
    ) -> None:
        super().__init__()
        names = {"flash": flash, "use_flash": use_flash}
        asked = {check_flag(name, flag) for name, flag in names.items() if flag is not None}
        if len(asked) > 1:
            raise ValueError(f"flash and use_flash are two names of one flag, got flash={flash}, use_flash={use_flash}")
        self.attn_dropout = nn.Dropout(_check_dropout("dropout", dropout))
        self.causal = causal
        self.flash = asked != {False}
        self.heads = heads
        self.scale = scale
        self.window = window
        self.softcap = softcap
        self.backend = backend
        self.deterministic = deterministic
        self.context_parallel = context_parallel
        self._asked_backend()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHECKS:
            value = _CHECKS[name](name, value)
        super().__setattr__(name, value)

    @property
    def dropout(self) -> float:
        """The probability of dropping a weight."""
        return _probability_of("attn_dropout", self.attn_dropout)

    @dropout.setter
    def dropout(self, probability: float) -> None:
        if isinstance(self.attn_dropout, nn.Dropout):
            self.attn_dropout.p = probability
        else:
            self.attn_dropout = nn.Dropout(probability).train(self.attn_dropout.training)

    @property
    def use_flash(self) -> bool:
        """naturalspeech2-pytorch's name of `flash`."""
        return self.flash

    @use_flash.setter
    def use_flash(self, flash: bool) -> None:
        self.flash = flash

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        *,
        query_mask: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            q: `(b, h, i, d)`.
            k: `(b, hk, j, d)` or `(b, j, d)`; `hk` divides `h`.
            v: `(b, hk, j, dv)` or `(b, j, dv)`.
            mask: bool, True = may attend: `(b, j)` for key padding, or 4-D and broadcastable to `(b, h, i, j)`.
            query_mask: bool, `(b, i)`, True = a query, as in `flash_attention`: other rows cost nothing, and give 0.
            attn_bias: added to the scores: q's dtype or float32, of any shape that broadcasts to `(b, h, i, j)`;
                differentiable. Where it is -inf the pair is hidden.
            alibi_slopes: `(h,)` or `(b, h)`: `slope * abs(y - x - (j - i))` is taken off the score of query `x` and key
                `y`.
            sinks: `(h,)`, logits that take part in the normaliser alone; differentiable.

        Returns:
            `(b, h, i, dv)` in q's dtype, or in autocast's where it is on. A query that sees no key gives 0.

        Raises:
            TypeError, ValueError: as `flash_attention`.
        """
        if isinstance(q, Proxy):
            others = dict(attn_bias=attn_bias, query_mask=query_mask, alibi_slopes=alibi_slopes, sinks=sinks)
            given = {name: tensor for name, tensor in others.items() if tensor is not None}
            return record_call(self, q, k, v, mask, **given)
        layer = self.attn_dropout
        dropout_p = _probability_of("attn_dropout", layer)
        attend: Any = flash_attention if self.context_parallel is None else self.context_parallel.attend
        try:
            return attend(
                q,
                k,
                v,
                mask=mask,
                query_mask=query_mask,
                bias=attn_bias,
                causal=self.causal,
                window=self.window,
                scale=self.scale,
                softcap=self.softcap,
                alibi_slopes=alibi_slopes,
                sinks=sinks,
                dropout_p=dropout_p if layer.training else 0.0,
                deterministic=self.deterministic,
                backend=self._asked_backend(),
            )
        except (TypeError, ValueError) as error:
            if attn_bias is None or not str(error).startswith("bias "):
                raise
            raise type(error)(f"attn_{error}") from error  # as it is called here

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}; use torch.export.export or torch.compile"
        )

    def _asked_backend(self) -> str:
        if self.flash:
            return self.backend
        if self.backend not in ("auto", "math"):
            raise ValueError(f"flash=False asks for the einsum path, backend={self.backend!r} for another one")
        return "math"

    def extra_repr(self) -> str:
        """What is not at its default; the dropout is shown by its submodule."""
        defaults = {
            "heads": None,
            "scale": None,
            "window": None,
            "softcap": None,
            "flash": True,
            "backend": "auto",
            "deterministic": None,
            "context_parallel": None,
        }
        told = [
            f"{name}={getattr(self, name)!r}" for name, default in defaults.items() if getattr(self, name) != default
        ]
        return ", ".join([f"causal={self.causal}", *told])


def record_call(module: nn.Module, q: Any, *others: Any, **named: Any) -> Any:
    """Has torch.fx, which traces with `q`, record a call of a module, which keeps its options and its dropout."""
    return q.tracer.create_proxy("call_module", q.tracer.path_of_module(module), (q, *others), named)


def _probability_of(name: str, layer: object) -> float:
    """What a submodule that stands for dropout drops."""
    if isinstance(layer, nn.Dropout):
        return check_probability(f"{name}.p", layer.p)
    if isinstance(layer, nn.Identity):
        return 0.0
    raise TypeError(f"{name} must be an nn.Dropout, or an nn.Identity for none, got {type(layer).__name__}")


def _check_layer(name: str, layer: object) -> object:
    _probability_of(name, layer)
    return layer


def _check_dropout(name: str, dropout: object) -> float:
    if isinstance(dropout, nn.Module):
        raise TypeError(f"{name} must be a Python number, got {dropout}; the submodule's name is attn_dropout")
    return check_probability(name, dropout)


def _check_flash(name: str, flash: object) -> bool:
    return flash is None or check_flag(name, flash)


def _check_backend(_: str, backend: str) -> str:
    check_backend(backend)
    return backend


def _check_context_parallel(name: str, value: object) -> object:
    if value is None:
        return None
    from flash_attend.context_parallel import ContextParallel  # imports what is said to other ranks

    return ContextParallel.of(name, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "attn_dropout": _check_layer,
    "dropout": _check_dropout,
    "causal": check_flag,
    "flash": _check_flash,
    "use_flash": _check_flash,
    "heads": optional(check_count),
    "scale": optional(check_number),
    "window": optional(check_window),
    "softcap": optional(check_positive),
    "backend": _check_backend,
    "deterministic": optional(check_flag),
    "context_parallel": _check_context_parallel,
}
