"""Where a model keeps its Attends: as submodules, and in whatever else it holds."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from flash_attend.integrations.known import KNOWN, path_of

__all__ = ["MODULE_STATE", "Found", "attention_like", "find"]

# What nn.Module itself keeps in an instance: no place where a model keeps an Attend of its own.
MODULE_STATE = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
_LEAVES = (type(None), str, bytes, int, float, complex, Tensor)
_FOREIGN = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "einops"}


# A module, and its own owners.
_Owners: TypeAlias = "tuple[nn.Module, _Owners] | None"


@dataclass
class Found:
    """One Attend, and every place that holds it."""

    attend: nn.Module
    paths: list[str] = field(default_factory=list)
    owners: list[nn.Module] = field(default_factory=list)  # on the ways to it, from each place outwards
    methods: dict[str, str] = field(default_factory=dict)  # of its bound methods that are held, by their path


def find(model: nn.Module) -> list[Found]:
    """Every attention module in or behind `model`, each once. A value is entered once, however many places hold it."""
    found: dict[int, Found] = {}
    seen: dict[int, Any] = {}  # by identity, and kept alive, so that no identity is used twice
    pending: list[tuple[str, Any, _Owners]] = [("", model, None)]
    while pending:
        path, value, owners = pending.pop()
        if _is_attend(value):
            it = found.setdefault(id(value), Found(value))
            it.paths.append(path or "(the model itself)")
            it.owners += _listed(owners)
        elif id(value) not in seen:
            seen[id(value)] = value
            if type(value) is types.MethodType and _is_attend(bound := cast(Any, value.__self__)):
                name = getattr(value.__func__, "__name__", "")
                found.setdefault(id(bound), Found(bound)).methods[path] = name
            if nn.Module in type(value).__mro__:
                owners = (value, owners)
            pending += [(place, held, owners) for place, held in list(_inside(path, value))[::-1]]
    return list(found.values())


def attention_like(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The submodules that are attention by their class's name, with their paths; not what lies inside of them."""
    seen: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}." if outer else "") for outer, _ in seen)
        if not inside and re.search("attention|attn", type(module).__name__, re.IGNORECASE):
            seen.append((path, module))
    return seen


def _listed(owners: _Owners) -> Iterator[nn.Module]:
    while owners is not None:
        module, owners = owners
        yield module


def _is_attend(value: Any) -> bool:
    bases = type(value).__mro__
    return nn.Module in bases and any(base.__name__ == "Attend" or path_of(base) in KNOWN for base in bases)


def _inside(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds directly, with its path; nothing for what is no container.

    Goes by types, and by the containers' own methods: a subclass may do anything in those that it overrides.
    """
    kind = type(value)
    dot = f"{path}." if path else ""
    if issubclass(kind, nn.Module):
        if not issubclass(kind, torch.jit.ScriptModule):
            held = _contents(value)
            yield from _named(dot, held.get("_modules", {}))
            own = (name for name in held if name not in MODULE_STATE and not name.startswith("_torchdynamo"))
            yield from _named(dot, {name: held[name] for name in own})
    elif issubclass(kind, dict):
        yield from _indexed(path, dict.items(value))
    elif issubclass(kind, (list, tuple, deque)):
        base = next(base for base in (list, tuple, deque) if issubclass(kind, base))
        yield from _indexed(path, enumerate(base.__iter__(value)))
    elif issubclass(kind, functools.partial):
        yield f"{dot}func", value.func
        yield from _indexed(f"{dot}args", enumerate(value.args))
        yield from _indexed(f"{dot}keywords", value.keywords.items())
    elif kind is types.MethodType:
        yield f"{dot}__self__", value.__self__
    elif kind is types.FunctionType:
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from _named(dot, {name: _filling(cell) for name, cell in cells})
        yield f"{dot}__defaults__", value.__defaults__
        yield f"{dot}__kwdefaults__", value.__kwdefaults__
        yield from _named(dot, vars(value))
    elif _is_helper(kind):
        yield from _named(dot, _contents(value))


def _named(dot: str, held: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{dot}{name}", value) for name, value in held.items() if not issubclass(type(value), _LEAVES))


def _indexed(path: str, held: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    # Leaves are left out before a path is made: a model may hold a vocabulary of a million words.
    return ((f"{path}[{key!r}]", value) for key, value in held if not issubclass(type(value), _LEAVES))


def _contents(value: Any) -> dict[str, Any]:
    try:
        return vars(value)
    except Exception:  # it has none, or a `__dict__` of its own making
        return {}


def _filling(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is still empty
        return None


def _is_helper(kind: type) -> bool:
    """Whether instances are plain objects of the model's own making: records, or something that is called.

    Others (trainers, loggers, data sets) are not entered: what they hold is not part of the model.
    """
    if kind is types.SimpleNamespace:
        return True
    if issubclass(kind, type) or kind.__module__.partition(".")[0] in _FOREIGN:
        return False
    return any("__call__" in vars(base) for base in kind.__mro__) or dataclasses.is_dataclass(kind)
