"""Our attention in the place of torch's own function: for the code inside a context, or inside a module.

A mode of torch functions sees the call itself, whoever imported the function under whichever name, in the thread that
entered it alone; `torch.compile` traces it.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flash_attend.dispatch import check_backend
from flash_attend.explanation import kept_by_torch
from flash_attend.functional import NO_JIT_TRACE
from flash_attend.scaled_dot_product import scaled_dot_product_attention
from flash_attend.tracing import constant_when_compiled, jit_traced, modes_of_functions

__all__ = ["SDPAPatch", "patch_sdpa", "replace_sdpa"]


class replace_sdpa(TorchFunctionMode):
    """A context in which `torch.nn.functional.scaled_dot_product_attention` is computed by `flash_attention`.

        with replace_sdpa():
            model(batch)

    It holds in the thread that enters it, for whatever calls the function by whichever name: diffusers, timm,
    `nn.TransformerEncoderLayer`, `nn.MultiheadAttention` with `need_weights=False`. A call that cannot be served goes
    to torch's own function, with one warning for each reason: nested tensors, `dropout_p=1`, torch.jit.trace, a GPU
    that no kernel here is for. Activation checkpoints compute again in the backward pass, which then has to be inside
    too.

    A query that sees no key gives 0. Each function of torch that is called inside takes a microsecond longer.

    Args:
        backend: as in `flash_attention`; what one asked for by name cannot serve raises.
    """

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        check_backend(backend)
        self.backend = backend

    def __torch_function__(
        self, func: Callable, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(self.backend, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention(*args, **kwargs)
        if type(func) is types.FunctionType and getattr(Tensor, func.__name__, None) is func:
            # A tensor's method in Python: a compiler that is shown the function follows it inside, and gives up.
            return getattr(args[0], func.__name__)(*args[1:], **kwargs)
        return func(*args, **kwargs)


def _attend(backend: str, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Ours where it can serve, or else torch's."""
    reason = NO_JIT_TRACE if jit_traced() else kept_by_torch(query.device) if backend == "auto" else ""
    if not reason:
        try:
            return scaled_dot_product_attention(query, *args, **kwargs, backend=backend)
        except (TypeError, ValueError) as error:  # before anything was computed
            if backend != "auto":
                raise
            reason = str(error)
    out = F.scaled_dot_product_attention(query, *args, **kwargs)
    _warn_once(f"torch's own scaled_dot_product_attention has served a call: {reason}")
    return out


@constant_when_compiled  # so that the compiler warns, and does not compile a warning
def _warn_once(warning: str) -> None:
    _warn(warning)


@functools.cache
def _warn(warning: str) -> None:
    warnings.warn(warning, stacklevel=5)


# Torch shows a mode this function as a whole, and what is inside it to nobody: the same code, which asks for no mode.
_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)

# ---------------------------------------------------------------------------------------------------------------------
# In one module
# ---------------------------------------------------------------------------------------------------------------------

_ATTENDING = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class _Serving(NamedTuple):
    """How a module is served; its class keeps it."""

    kind: type  # the class that it had
    backend: str


class _Served(nn.Module):
    """Comes before a module's own class."""

    _flash_attend_sdpa: ClassVar[_Serving]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        backend = self._flash_attend_sdpa.backend
        inside = any([type(mode) is replace_sdpa and mode.backend == backend for mode in modes_of_functions()])
        with nullcontext() if inside else replace_sdpa(backend):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class is made at run time, under no name by which a pickle could find it.
        made: Any = super().__reduce_ex__(max(protocol, 2))
        return (_rebuild, tuple(self._flash_attend_sdpa), *made[2:])


@functools.lru_cache(maxsize=1024)
def _served(kind: type, backend: str) -> type[nn.Module]:
    contents = {"_flash_attend_sdpa": _Serving(kind, backend), "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_Served, kind), contents)


def _rebuild(kind: type, backend: str) -> nn.Module:
    """An instance without contents, for copies and pickles."""
    served = _served(kind, backend)
    return served.__new__(served)


class SDPAPatch:
    """What `patch_sdpa` did; `restore()` undoes it, and so does leaving a `with` block."""

    def __init__(self, before: list[tuple[nn.Module, type[nn.Module]]]) -> None:
        self._changed = [(module, kind, type(module)) for module, kind in before]

    def restore(self) -> None:
        """Gives every module the class back that it had, unless somebody else has changed it since."""
        for module, before, after in self._changed:
            if type(module) is after:
                module.__class__ = before

    def __enter__(self) -> SDPAPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def patch_sdpa(model: nn.Module, *, backend: str = "auto") -> SDPAPatch:
    """Has every call of torch's `scaled_dot_product_attention` inside `model` computed by ours, as in `replace_sdpa`.

    The model and its submodules stay the objects that they are: their classes change, to some derived from their own
    and of the same name. Each enters the context by itself, so that one which an activation checkpoint calls again in
    the backward pass is served there too; so are replicas in other threads, copies and pickles.

    Returns:
        A handle: `handle.restore()` undoes it, and so does leaving a `with` block.

    Raises:
        TypeError: `model` is no module. ValueError: an unknown backend.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_backend(backend)
    before = [(module, type(module)) for module in model.modules() if module is model or _may_attend(module)]
    for module, kind in before:
        serving: _Serving | None = vars(kind).get("_flash_attend_sdpa")
        own: type = serving.kind if serving else kind
        module.__class__ = _served(own, backend)
    return SDPAPatch(before)


def _may_attend(module: nn.Module) -> bool:
    """Whether a module's forward may call the function: torch's own ones mostly do not."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return isinstance(module, _ATTENDING) or not type(module).__module__.startswith("torch.")
