"""`patch`: finds every `Attend` that a model holds, and puts ours in its place.

What is known about other people's classes is data: one `KnownAttend` a class, in `KNOWN`. To make another class known:

    from flash_attend.patch import KnownAttend, register

    register(KnownAttend("my_package.attend.Attend", options={"dropout", "causal", "flash"}))

A class named `Attend` that has no row is taken only if it has the form of the known ones and computes the same on small
examples; any other is left alone, with the reason in the report.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flash_attend.attend import Attend

__all__ = ["KNOWN", "KnownAttend", "Outcome", "PatchError", "PatchHandle", "patch", "register"]


class PatchError(ValueError):
    """`patch(..., strict=True)` found no `Attend`, or one that it refuses. The model is as it was."""


# ---------------------------------------------------------------------------------------------------------------------
# Variants of Attend for classes that read their arguments in another way
# ---------------------------------------------------------------------------------------------------------------------


class BroadcastMaskAttend(Attend):
    """Aligns a mask of fewer than four dimensions with the last ones of `(b, h, i, j)`, as tensors broadcast."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `Attend.forward`, except that a 2-D mask is `(i, j)` and not `(b, j)`."""
        if isinstance(mask, Tensor) and mask.ndim < 4:
            mask = mask[(None,) * (4 - mask.ndim)]
        return super().forward(q, k, v, mask=mask)


class TiledHeadsAttend(Attend):
    """Query head `n` reads key/value head `n % hk`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `Attend.forward`, with the other order of grouped heads."""
        heads, kv_heads = q.shape[1], k.shape[1]
        if k.ndim != 4 or kv_heads in (0, 1, heads) or heads % kv_heads:
            return super().forward(q, k, v, mask=mask)
        q = rearrange(q, "b (g hk) i d -> b (hk g) i d", hk=kv_heads)
        if mask is not None and mask.ndim == 4 and mask.shape[1] == heads:
            mask = rearrange(mask, "b (g hk) i j -> b (hk g) i j", hk=kv_heads)
        out = super().forward(q, k, v, mask=mask)
        return rearrange(out, "b (hk g) i dv -> b (g hk) i dv", hk=kv_heads)


class NoBiasAttend(Attend):
    """Takes the argument `attn_bias` of a class whose flash path allows nothing but None there."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, attn_bias: None = None) -> Tensor:
        """As `Attend.forward`; `attn_bias` must be None."""
        if attn_bias is not None:
            raise ValueError("attn_bias must be None: an additive bias is not supported")
        return super().forward(q, k, v, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownAttend:
    """What is known about one class of attention modules.

    `dropout`, `causal` and `scale` are read from the attributes of these names, where the class has them.
    """

    path: str  # "package.module.Class"
    options: Collection[str]  # the constructor parameters that this row accounts for; any other means refusal
    arguments: tuple[str, ...] = ("mask",)  # what forward takes after q, k and v
    flash: str = "flash"  # the attribute that chooses its flash path
    # Its flash path gives query x the keys y <= x whatever i and j are; the einsum path never does.
    top_left: bool = False
    flash_scale: str = ""  # what its flash path does with `scale`, where that is not what its einsum path does
    replacement: type[Attend] = Attend
    refuse: Callable[[nn.Module], str | None] = lambda attend: None  # the reason to leave an instance alone, or None
    read: str = ""  # the version that was read to write the row


KNOWN: dict[str, KnownAttend] = {}


def register(row: KnownAttend) -> KnownAttend:
    """Adds a row to `KNOWN`, or replaces the one of the same class."""
    if not isinstance(row, KnownAttend):
        raise TypeError(f"row must be a KnownAttend, got {type(row).__name__}")
    KNOWN[row.path] = row
    return row


def _refuse_x_transformers(attend: nn.Module) -> str:
    reason = "it returns (out, intermediates) and takes attn_bias, prev_attn and more; flash_attend returns out alone"
    unusual = _unusual_options(attend, {"dropout", "causal", "heads", "scale", "flash", "sdp_kwargs"})
    return reason + (f"; nor are these supported: {', '.join(unusual)}" if unusual else "")


def _refuse_bias(attend: nn.Module) -> str | None:
    if attend.flash:
        return None
    return "flash=False: its calls may carry attn_bias, an additive bias; only flash=True, which allows none, is served"


def _refuse_memories(attend: nn.Module) -> str | None:
    if not (attend.use_flash and attend.causal):
        return None
    return (
        "use_flash=True with causal=True: the model prepends keys, and there this class aligns its causal mask "
        "top-left; supported is bottom-right"
    )


for _row in (
    # What a class computes is what its einsum path computes; where its flash path differs, the row tells.
    KnownAttend(
        "complex_valued_transformer.attend.Attend",
        options={"dropout", "causal", "heads", "scale", "flash"},
        flash_scale="ignores it",
        replacement=BroadcastMaskAttend,
        read="0.0.14",
    ),
    KnownAttend(
        "naturalspeech2_pytorch.attend.Attend",
        options={"dropout", "causal", "use_flash"},
        flash="use_flash",
        top_left=True,
        read="0.1.8",
    ),
    KnownAttend(
        "bs_roformer.attend.Attend",
        options={"dropout", "flash", "scale"},
        arguments=(),
        read="1.2.4",
    ),
    KnownAttend(
        "voicebox_pytorch.attend.Attend",
        options={"dropout", "flash", "scale"},
        read="0.5.0",
    ),
    KnownAttend(
        "denoising_diffusion_pytorch.attend.Attend",
        options={"dropout", "flash", "scale"},
        arguments=(),
        flash_scale="applies scale * d ** -1.5",
        read="2.3.4",
    ),
    KnownAttend(
        "gigagan_pytorch.attend.Attend",
        options={"dropout", "flash"},
        arguments=(),
        read="0.3.0",
    ),
    KnownAttend(
        "iTransformer.attend.Attend",
        options={"dropout", "heads", "scale", "flash", "causal"},
        arguments=(),
        top_left=True,
        flash_scale="ignores it",
        read="0.8.1",
    ),
    KnownAttend(
        "classifier_free_guidance_pytorch.attend.Attend",
        options={"dropout", "causal", "flash"},
        top_left=True,
        read="0.7.1",
    ),
    KnownAttend(
        "spear_tts_pytorch.attend.Attend",
        options={"dropout", "causal", "flash"},
        replacement=TiledHeadsAttend,
        read="0.4.8",
    ),
    KnownAttend(
        "simple_hierarchical_transformer.attention.Attend",
        options={"causal", "use_flash_attn"},
        flash="use_flash_attn",
        top_left=True,
        read="0.4.0",
    ),
    KnownAttend(
        "palm_rlhf_pytorch.attention.Attention",
        options={"dropout", "causal", "use_flash_attn"},
        flash="use_flash_attn",
        top_left=True,
        read="0.8.0",
    ),
    KnownAttend(
        "soundstorm_pytorch.attend.Attend",
        options={"causal", "dropout", "flash"},
        arguments=("mask", "attn_bias"),
        top_left=True,
        replacement=NoBiasAttend,
        refuse=_refuse_bias,
        read="0.6.1",
    ),
    KnownAttend(
        "audiolm_pytorch.attend.Attend",
        options={"dropout", "causal", "flash"},
        arguments=("mask", "attn_bias"),
        top_left=True,
        replacement=NoBiasAttend,
        refuse=_refuse_bias,
        read="2.4.0",
    ),
    KnownAttend(
        "recurrent_memory_transformer_pytorch.attend.Attend",
        options={"dropout", "causal", "use_flash"},
        flash="use_flash",
        refuse=_refuse_memories,
        read="0.7.0",
    ),
    KnownAttend(
        "x_transformers.attend.Attend",
        options=(),
        refuse=_refuse_x_transformers,
        read="2.31.10",
    ),
):
    register(_row)


# ---------------------------------------------------------------------------------------------------------------------
# Slots: the places that hold a value, each able to hold another one
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """`container[key]`: an entry of a dict or a list, an attribute by its object's dict, a registered submodule."""

    path: str
    container: Any
    key: Any

    def get(self) -> Any:
        return self.container[self.key]

    def set(self, value: Any) -> None:
        self.container[self.key] = value


@dataclass(frozen=True)
class _Attribute:
    """A writable attribute that is no dict entry: a closure's cell, a function's defaults."""

    path: str
    owner: Any
    name: str

    def get(self) -> Any:
        return getattr(self.owner, self.name)

    def set(self, value: Any) -> None:
        setattr(self.owner, self.name, value)


@dataclass(frozen=True)
class _Partial:
    """`func` or `args` of a `functools.partial`, which shows them read-only but restores them as unpickling does."""

    path: str
    owner: functools.partial
    name: str

    def get(self) -> Any:
        return getattr(self.owner, self.name)

    def set(self, value: Any) -> None:
        state = {"func": self.owner.func, "args": self.owner.args, self.name: value}
        whole = (state["func"], state["args"], self.owner.keywords, vars(self.owner))
        self.owner.__setstate__(whole)  # type: ignore[attr-defined]  # typeshed leaves it out


@dataclass(frozen=True)
class _TupleItem:
    """An element of a tuple: another value means another tuple in the slot that holds it."""

    path: str
    parent: Any
    index: int

    def get(self) -> Any:
        return self.parent.get()[self.index]

    def set(self, value: Any) -> None:
        whole = self.parent.get()
        items = (*whole[: self.index], value, *whole[self.index + 1 :])
        # A named tuple is made from its fields, a plain one from an iterable.
        self.parent.set(type(whole)(*items) if hasattr(whole, "_fields") else type(whole)(items))


@dataclass(frozen=True)
class _MethodOwner:
    """The object that a bound method is bound to."""

    path: str
    parent: Any

    def get(self) -> Any:
        return self.parent.get().__self__

    def set(self, value: Any) -> None:
        self.parent.set(getattr(value, self.parent.get().__name__))


_Slot = _Item | _Attribute | _Partial | _TupleItem | _MethodOwner

# What nn.Module itself keeps in an instance: no place where a model keeps an Attend of its own.
_MODULE_STATE = frozenset(vars(nn.Module()))
_FOREIGN = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "einops"}


def _slots_of(value: Any, slot: _Slot | None, path: str) -> Iterator[_Slot]:
    """The slots directly inside a value; none for what is no container."""
    dot = f"{path}." if path else ""

    def attributes(names: Iterable[str]) -> Iterator[_Slot]:
        return (_Item(f"{dot}{name}", vars(value), name) for name in names if not _is_leaf(vars(value)[name]))

    if isinstance(value, nn.Module):
        if isinstance(value, torch.jit.ScriptModule):
            return
        yield from (_Item(f"{dot}{name}", value._modules, name) for name in value._modules)
        yield from attributes(name for name in vars(value) if name not in _MODULE_STATE)
    elif isinstance(value, dict):
        yield from (_Item(f"{path}[{key!r}]", value, key) for key, held in value.items() if not _is_leaf(held))
    elif isinstance(value, (list, deque)):
        yield from (_Item(f"{path}[{index}]", value, index) for index, held in enumerate(value) if not _is_leaf(held))
    elif isinstance(value, tuple):
        yield from (
            _TupleItem(f"{path}[{index}]", slot, index) for index, held in enumerate(value) if not _is_leaf(held)
        )
    elif isinstance(value, functools.partial):
        yield _Partial(f"{dot}func", value, "func")
        yield _Partial(f"{dot}args", value, "args")
        yield from (_Item(f"{dot}keywords[{key!r}]", value.keywords, key) for key in value.keywords)
    elif isinstance(value, types.MethodType):
        yield _MethodOwner(f"{dot}__self__", slot)
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield _Attribute(f"{dot}{name}", cell, "cell_contents")
        yield _Attribute(f"{dot}__defaults__", value, "__defaults__")
        yield _Attribute(f"{dot}__kwdefaults__", value, "__kwdefaults__")
        yield from attributes(vars(value))
    elif _is_helper(value):
        yield from attributes(vars(value))


def _is_leaf(value: Any) -> bool:
    """Told before a slot is made: a model may hold a vocabulary of a million words."""
    return value is None or isinstance(value, (str, bytes, int, float, complex, Tensor))


def _is_helper(value: Any) -> bool:
    """A plain object of the model's own making: a record, or something that is called.

    Others (trainers, loggers, data sets) are not entered: what they hold is not part of the model.
    """
    if isinstance(value, types.SimpleNamespace):
        return True
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    if type(value).__module__.partition(".")[0] in _FOREIGN:
        return False
    return callable(value) or dataclasses.is_dataclass(value)


def _read(slot: _Slot) -> Any:
    try:
        return slot.get()
    except ValueError:  # a closure's cell that is still empty
        return None


def _find(model: nn.Module) -> list[tuple[nn.Module, list[_Slot]]]:
    """Every attention module in or behind `model`, each once, with all the slots that hold it."""
    found: dict[int, tuple[nn.Module, list[_Slot]]] = {}
    # Values by identity, kept alive so that no identity is used twice. Tuples and bound methods are entered through
    # every slot that holds them, because a slot is all that can be changed about them.
    seen: dict[int, Any] = {id(model): model}
    pending = list(_slots_of(model, None, ""))[::-1]
    while pending:
        slot = pending.pop()
        value = _read(slot)
        if isinstance(value, nn.Module) and _is_attend(value):
            found.setdefault(id(value), (value, []))[1].append(slot)
            continue
        if not isinstance(value, (tuple, types.MethodType)):
            if id(value) in seen:
                continue
            seen[id(value)] = value
        pending += list(_slots_of(value, slot, slot.path))[::-1]
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------------------
# Judging one Attend
# ---------------------------------------------------------------------------------------------------------------------

_FLASH_NAMES = ("flash", "use_flash", "use_flash_attn")
_FORM_OPTIONS = frozenset({"dropout", "causal", "heads", "scale", *_FLASH_NAMES})
_CALLS = frozenset({"forward", "__call__", nn.Module.__call__.__name__})
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_TOP_LEFT_NOTE = "where i != j, its flash path aligned causal top-left; ours is bottom-right"


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_attend(module: nn.Module) -> bool:
    return any(kind is Attend or kind.__name__ == "Attend" or _path_of(kind) in KNOWN for kind in type(module).__mro__)


@dataclass(frozen=True)
class _Judgement:
    """A replacement and a note on it, or the reason why there is none."""

    replacement: Attend | None
    reason: str
    doubtful: bool = False  # the note is about calls that the model may well make: worth a warning


def _judge(attend: nn.Module, slots: Iterable[_Slot], make: Callable[..., Attend]) -> _Judgement:
    """Decides about one Attend. `make(kind, flash, **options)` builds a replacement."""
    kind = type(attend)
    row = KNOWN.get(_path_of(kind))
    reason = (
        (row.refuse(attend) if row else _refuse_stranger(attend))
        or _refuse_options(attend, row)
        or _refuse_changes(attend)
        or _refuse_slots(slots)
    )
    if reason:
        return _Judgement(None, reason)

    flash_name = row.flash if row else next((name for name in _FLASH_NAMES if hasattr(attend, name)), "flash")
    flash = bool(getattr(attend, flash_name, False))
    layer = getattr(attend, "attn_dropout", None)
    # The flash path reads the number, the einsum path the layer, which whoever walks over nn.Dropout may have changed.
    read = None if flash else layer
    options = {
        "dropout": getattr(attend, "dropout", 0.0) if read is None else read.p,
        "causal": getattr(attend, "causal", False),
        "scale": getattr(attend, "scale", None),
    }
    try:
        replacement = make(row.replacement if row else Attend, flash, **options)
    except (TypeError, ValueError) as error:
        return _Judgement(None, str(error))

    notes: list[str] = []
    doubtful = False
    if row is None:
        try:
            replacement, notes = _compare_stranger(attend, replacement, functools.partial(make, flash=flash, **options))
        except _Different as difference:
            return _Judgement(None, f"not in the table of known classes, and {difference}")
    elif flash:
        if row.top_left and replacement.causal:
            notes.append(_TOP_LEFT_NOTE)
        if row.flash_scale and replacement.scale is not None:
            notes.append(f"scale = {replacement.scale} applies from now on: its flash path {row.flash_scale}")
            doubtful = True
    # Not train(): the module and its layer may differ, and outside the module tree neither follows the model.
    replacement.training = attend.training
    replacement.attn_dropout.training = attend.training if read is None else read.training
    return _Judgement(replacement, "; ".join(notes), doubtful)


def _refuse_stranger(attend: nn.Module) -> str | None:
    """For a class without a row: whether it has the form of the known ones."""
    kind = type(attend)
    for base in kind.__mro__[1:]:
        if _path_of(base) in KNOWN:
            return f"it is a subclass of {_path_of(base)} and may compute something else; register() it if it does not"
    parameters = tuple(inspect.signature(kind.forward).parameters)[1:]
    if parameters not in (("q", "k", "v"), ("q", "k", "v", "mask")):
        unusual = _unusual_options(attend, _FORM_OPTIONS)
        return f"not in the table of known classes, and its forward takes ({', '.join(parameters)})" + (
            f"; it has {', '.join(unusual)}" if unusual else ""
        )
    return None


def _refuse_options(attend: nn.Module, row: KnownAttend | None) -> str | None:
    """Whether the constructor or forward of the installed version takes what the row does not account for."""
    accounted = frozenset(row.options) if row else _FORM_OPTIONS
    surplus = [name for name in _constructor(attend) if name not in accounted]
    if surplus:
        values = [f"{name}={getattr(attend, name)!r}" if hasattr(attend, name) else name for name in surplus]
        return f"option {', '.join(values)} is not supported; these are: {', '.join(sorted(accounted))}"
    if row and _arguments(attend) != row.arguments:
        known = ", ".join(["q", "k", "v", *row.arguments])
        return f"its forward takes ({', '.join(['q', 'k', 'v', *_arguments(attend)])}); supported is ({known})"
    return None


def _refuse_changes(attend: nn.Module) -> str | None:
    """Whether this instance is more than its class and its options."""
    kind, layer = type(attend), getattr(attend, "attn_dropout", None)
    if kind.forward.__module__ != kind.__module__:
        return f"its forward was replaced by one from {kind.forward.__module__}"
    overridden = [name for name in vars(attend) if inspect.isfunction(getattr(kind, name, None))]
    if overridden:
        return f"its {', '.join(overridden)} was replaced on this instance"
    hooks = [name.strip("_") for module in attend.modules() for name in _HOOKS if getattr(module, name)]
    if hooks:
        return f"it has hooks, which would be lost: {', '.join(hooks)}"
    children = [name for name, _ in attend.named_children() if name != "attn_dropout"]
    children += [name for name, _ in attend.named_parameters(recurse=False)]
    children += [name for name in attend._buffers if name not in attend._non_persistent_buffers_set]
    if children:
        return f"it holds {', '.join(children)}, which an Attend without weights cannot keep"
    if layer is not None and type(layer) is not nn.Dropout:
        return f"its attn_dropout is a {type(layer).__name__}; supported is nn.Dropout"
    if attend._compiled_call_impl is not None:
        return "it was compiled on its own; patch before compiling"
    return None


def _refuse_slots(slots: Iterable[_Slot]) -> str | None:
    for slot in slots:
        if slot.path.rpartition(".")[2] == "_orig_mod":
            return "it was compiled on its own; patch before compiling"
        if isinstance(slot, _MethodOwner) and (method := slot.parent.get().__name__) not in _CALLS:
            return f"{slot.parent.path} holds its method {method}, which a replacement does not have"
    return None


def _constructor(attend: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(type(attend).__init__).parameters.items())[1:])


def _arguments(attend: nn.Module) -> tuple[str, ...]:
    """What forward takes beyond self and the first three."""
    return tuple(inspect.signature(type(attend).forward).parameters)[4:]


def _unusual_options(attend: nn.Module, accounted: Collection[str]) -> list[str]:
    """The options that are set to something else than their default, and the submodules that others have made."""
    set_apart = []
    for name, parameter in _constructor(attend).items():
        value, off = getattr(attend, name, parameter.default), (None, False)
        same = value is parameter.default or (value in off and parameter.default in off) or value == parameter.default
        if name not in accounted and not same:
            set_apart.append(f"{name}={value!r}")
    held = [*attend.named_children(), *attend.named_parameters(recurse=False)]
    named = {text.partition("=")[0] for text in set_apart}
    return set_apart + [name for name, _ in held if name != "attn_dropout" and name not in named]


# ---------------------------------------------------------------------------------------------------------------------
# Comparing a class without a row with ours
# ---------------------------------------------------------------------------------------------------------------------


class _Different(Exception):
    """A class without a row does not compute what ours does; the message says where."""


def _compare_stranger(
    attend: nn.Module, replacement: Attend, make: Callable[[type[Attend]], Attend]
) -> tuple[Attend, list[str]]:
    """Runs a copy of `attend` and ours on small examples, on the CPU and without dropout.

    What the stranger cannot compute does not matter; what it computes otherwise raises `_Different`. Returns the
    replacement that reads masks as the stranger does, and notes.
    """
    try:
        stranger = copy.deepcopy(attend).cpu().eval()
    except Exception as error:  # whatever its author raises
        raise _Different(f"it cannot be copied to be compared: {error}") from error
    generator = torch.Generator().manual_seed(0)

    def example(queries: int, keys: int, kv_heads: int | None = 4) -> tuple[Tensor, Tensor, Tensor]:
        kv = (2, keys, 8) if kv_heads is None else (2, kv_heads, keys, 8)
        q, k, v = (torch.randn(size, generator=generator, device="cpu") for size in ((2, 4, queries, 8), kv, kv))
        return q, k, v

    def compare(what: str, inputs: tuple[Tensor, ...], mask: Tensor | None = None) -> bool:
        """Whether the stranger computes this at all."""
        answer = _answer(stranger, inputs, mask)
        if answer is not None and not _close(answer, _answer(replacement, inputs, mask)):
            raise _Different(f"it computes something else {what}")
        return answer is not None

    plain = example(5, 5)
    if not compare("on a small example", plain):
        raise _Different("it fails on a small example")
    compare("with large scores", (plain[0] * 30, *plain[1:]))  # these show what clamps scores
    compare("with k and v shared by all heads", example(5, 5, None))
    compare("with grouped heads", example(5, 5, 2))

    if "mask" in _arguments(attend):
        by_key = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool, device="cpu")
        by_pair = torch.ones(5, 5, dtype=torch.bool, device="cpu").tril(1)
        if not compare("with a (b, j) mask", plain, by_key) and _answer(stranger, plain, by_pair) is not None:
            replacement = make(BroadcastMaskAttend)
            compare("with an (i, j) mask", plain, by_pair)
        compare("with a 4-D mask", plain, by_key[:, None, None] & by_pair)

    notes = ["not in the table of known classes; computes the same on small examples"]
    for queries in (1, 3):
        inputs = example(queries, 5)
        top_left = torch.ones(queries, 5, dtype=torch.bool, device="cpu").tril()[None, None]
        aligned_top_left = _answer(Attend(scale=replacement.scale), inputs, top_left)
        answer = _answer(stranger, inputs, None)
        if replacement.causal and answer is not None and _close(answer, aligned_top_left):
            notes = [notes[0], _TOP_LEFT_NOTE]
        else:
            compare("where i != j", inputs)
    return replacement, notes


def _answer(module: nn.Module, inputs: tuple[Tensor, ...], mask: Tensor | None) -> Any:
    """What a module returns, without dropout; None where it raises."""
    state = {child: child.training for child in module.modules()}
    with torch.no_grad(), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flash paths call what torch has deprecated
        try:
            return module.eval()(*inputs) if mask is None else module.eval()(*inputs, mask=mask)
        except Exception:  # whatever its author raises
            return None
        finally:
            for child, training in state.items():
                child.training = training


def _close(theirs: Any, ours: Tensor) -> bool:
    """Far above what float32 rounds in these examples, far below any difference in meaning."""
    return isinstance(theirs, Tensor) and theirs.shape == ours.shape and torch.allclose(theirs, ours, 1e-3, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Patching
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of one Attend."""

    paths: tuple[str, ...]  # every place that holds it
    kind: str  # its class
    causal: Any
    dropout: Any
    scale: Any
    status: str  # "replaced", "refused" or "ours already"
    reason: str  # why it was refused, or a note


class PatchHandle:
    """What `patch` did; print it. `restore()` undoes it, and so does leaving a `with` block."""

    def __init__(self, outcomes: tuple[Outcome, ...], swaps: list[tuple[_Slot, nn.Module, Attend]]) -> None:
        self.outcomes = outcomes
        self._swaps = swaps

    @property
    def replaced(self) -> int:
        """How many Attends were replaced, each counted once however many places hold it."""
        return sum(outcome.status == "replaced" for outcome in self.outcomes)

    @property
    def refused(self) -> int:
        """How many were left as they are."""
        return sum(outcome.status == "refused" for outcome in self.outcomes)

    def restore(self) -> None:
        """Puts every original back where its replacement still is, with the replacement's train/eval state.

        A place that holds something else by now is left alone. A second call does nothing.
        """
        while self._swaps:
            slot, original, replacement = self._swaps.pop()
            original.training = replacement.training
            for child in original.children():
                child.training = replacement.attn_dropout.training
            # A causal mask that it keeps may be on the device where the model was before.
            for name in original._non_persistent_buffers_set:
                original._buffers[name] = None
            try:
                if slot.get() is replacement:
                    slot.set(original)
            except (AttributeError, IndexError, KeyError, TypeError):
                continue  # what held it has changed its form

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __str__(self) -> str:
        head = ("path", "class", "causal", "dropout", "scale", "status", "reason or note")
        rows: list[tuple[str, ...]] = [head]
        for outcome in self.outcomes:
            more = f" (+{len(outcome.paths) - 1} more)" if len(outcome.paths) > 1 else ""
            options = (outcome.causal, outcome.dropout, outcome.scale)
            rows.append((outcome.paths[0] + more, outcome.kind, *map(str, options), outcome.status, outcome.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.replaced} replaced, {self.refused} refused"])

    __repr__ = __str__


def patch(
    model: nn.Module,
    *,
    backend: str = "auto",
    keep_flash: bool = False,
    deterministic: bool | None = None,
    strict: bool = False,
) -> PatchHandle:
    """Replaces every lucidrains-style `Attend` in `model` by ours, in place.

    Submodules are found, and what is held outside the module tree too: plain attributes, lists, tuples, dicts,
    `functools.partial`, closures, defaults, bound methods, records and callable objects. One Attend that is held in
    many places gets one replacement. Causal, dropout, scale and the train/eval state of each are kept; one that
    `model.eval()` did not reach before is not reached afterwards either.

    Two things change, by contract: a query that sees no key gives 0 (in the originals the mean of all values), and keys
    that the mask hides from every query may hold NaN.

    Args:
        model: any module that holds the Attends; its state dict stays as it is.
        backend: "auto" or a backend by name, as in `flash_attention`, for all replacements.
        keep_flash: keep each one's flash flag, so that flash=False stays on the einsum path. By default the fastest
            backend serves whatever the flag was.
        deterministic: as in `Attend`.
        strict: raise `PatchError`, with the model as it was, if any is refused or none is found.

    Returns:
        A handle: `print(handle)` shows what was found and what became of it; `handle.restore()` undoes it.

    Raises:
        TypeError: `model` is no module, or is an Attend itself, which only its holder can replace.
        ValueError: an unknown backend.

    Warns:
        If nothing was found, or an Attend was refused, or one applies a scale that its flash path did not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if _is_attend(model):
        raise TypeError(
            f"model is itself an Attend ({_path_of(type(model))}): patch the module that holds it, or build a "
            "flash_attend.Attend"
        )
    for name, flag in (("keep_flash", keep_flash), ("strict", strict)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    Attend(backend=backend, deterministic=deterministic)  # raises for what is wrong whatever the model holds

    def make(kind: type[Attend], flash: bool, **options: Any) -> Attend:
        return kind(**options, flash=flash if keep_flash else None, backend=backend, deterministic=deterministic)

    outcomes, swaps, doubts = [], [], []
    for attend, slots in _find(model):
        if isinstance(attend, Attend):
            status, reason = "ours already", ""
        else:
            judgement = _judge(attend, slots, make)
            status, reason = "replaced" if judgement.replacement else "refused", judgement.reason
            if judgement.replacement:
                swaps += [(slot, attend, judgement.replacement) for slot in slots]
            if judgement.doubtful:
                doubts.append(f"{slots[0].path}: {reason}")
        shown = {name: getattr(attend, name, None) for name in ("causal", "dropout", "scale")}
        paths, kind = tuple(slot.path for slot in slots), _path_of(type(attend))
        outcomes.append(Outcome(paths, kind, status=status, reason=reason, **shown))

    refused = [outcome for outcome in outcomes if outcome.status == "refused"]
    if strict and not outcomes:
        raise PatchError(f"no Attend found in {type(model).__name__}")
    if strict and refused:
        raise PatchError("; ".join(f"{outcome.paths[0]} ({outcome.kind}): {outcome.reason}" for outcome in refused))

    handle = PatchHandle(tuple(outcomes), [])
    try:
        for slot, attend, replacement in swaps:
            slot.set(replacement)
            handle._swaps.append((slot, attend, replacement))
    except BaseException:
        handle.restore()
        raise

    if not outcomes:
        warnings.warn(f"patch found no Attend in {type(model).__name__}: nothing was changed", stacklevel=2)
    for outcome in refused:
        warnings.warn(f"patch left {outcome.paths[0]} ({outcome.kind}) as it is: {outcome.reason}", stacklevel=2)
    for doubt in doubts:
        warnings.warn(f"patch: {doubt}", stacklevel=2)
    return handle
