"""Every Attend is found wherever a model keeps it, in a time that is linear in what the model holds."""

from __future__ import annotations

import functools
import time
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clients import Holder, assert_same, fake_known, inputs
from torch import nn

from flash_attend import patch
from flash_attend.integrations.search import find

Pair = namedtuple("Pair", ["attend", "other"])


@dataclass
class Record:
    """Holds an Attend."""

    attend: Any


@dataclass(frozen=True)
class FrozenRecord:
    """Holds an Attend for good."""

    attend: Any


class Helper:
    """Not a module, but called like one."""

    def __init__(self, attend: nn.Module) -> None:
        self.inner = {"attend": attend}

    def __call__(self, *inputs):
        return self.inner["attend"](*inputs)


def call_with(q, k, v, *, attend):
    return attend(q, k, v)


def call_first(attend, q, k, v):
    return attend(q, k, v)


def closure(attend):
    return lambda q, k, v: attend(q, k, v)


def default(attend):
    return lambda q, k, v, attend=attend: attend(q, k, v)


def keyword_default(attend):
    return lambda q, k, v, *, attend=attend: attend(q, k, v)


def function_attribute(attend):
    def inner(q, k, v):
        return inner.attend(q, k, v)

    inner.attend = attend
    return inner


def cyclic(attend):
    itself = {"attend": attend}
    itself["again"] = [itself]
    return itself


class Sealed(dict):
    """Lets nobody look in by its own methods."""

    def refuse(self, *_):
        raise RuntimeError("sealed")

    items = values = keys = __iter__ = __len__ = refuse


class SealedTuple(tuple):
    """Takes two arguments, and lets nobody look in."""

    def __new__(cls, first, second):
        return super().__new__(cls, (first, second))

    def __iter__(self):
        raise RuntimeError("sealed")

    __len__ = __iter__


# What the model holds, and how it gets from there to a call.
PLACES = {
    "submodule": (lambda attend: attend, lambda held: held),
    "ModuleList": (lambda attend: nn.ModuleList([nn.Identity(), attend]), lambda held: held[1]),
    "ModuleDict": (lambda attend: nn.ModuleDict({"a": attend}), lambda held: held["a"]),
    "nested modules": (lambda attend: nn.ModuleList([Holder(Holder(attend))]), lambda held: held[0]),
    "list": (lambda attend: [None, attend], lambda held: held[1]),
    "dict": (lambda attend: {"a": [attend]}, lambda held: held["a"][0]),
    "OrderedDict": (lambda attend: OrderedDict(a=attend), lambda held: held["a"]),
    "defaultdict": (lambda attend: defaultdict(list, a=[attend]), lambda held: held["a"][0]),
    "deque": (lambda attend: deque([attend]), lambda held: held[0]),
    "tuple": (lambda attend: (1, attend, "x"), lambda held: held[1]),
    "nested tuples": (lambda attend: ((attend, 0), [(0, (attend,))]), lambda held: held[1][0][1][0]),
    "named tuple": (lambda attend: Pair(attend, 1), lambda held: held.attend),
    "sealed dict": (lambda attend: Sealed(a=attend), lambda held: held["a"]),
    "sealed tuple": (lambda attend: SealedTuple(attend, 1), lambda held: held[0]),
    "partial, keyword": (lambda attend: functools.partial(call_with, attend=attend), lambda held: held),
    "partial, argument": (lambda attend: functools.partial(call_first, attend), lambda held: held),
    "partial, function": (lambda attend: functools.partial(attend, mask=None), lambda held: held),
    "nested partials": (
        lambda attend: functools.partial(call_first, functools.partial(call_with, attend=attend)),
        lambda held: held,
    ),
    "closure": (closure, lambda held: held),
    "closure in a partial": (lambda attend: functools.partial(call_first, closure(attend)), lambda held: held),
    "default": (default, lambda held: held),
    "keyword default": (keyword_default, lambda held: held),
    "function attribute": (function_attribute, lambda held: held),
    "bound call": (lambda attend: (attend.__call__,), lambda held: held[0]),
    "method of another module": (lambda attend: Holder(attend).forward, lambda held: held),
    "compiled": (lambda attend: torch.compile(attend, backend="eager"), lambda held: held),
    "record": (Record, lambda held: held.attend),
    "frozen record": (FrozenRecord, lambda held: held.attend),
    "namespace": (lambda attend: SimpleNamespace(a=attend), lambda held: held.a),
    "callable helper": (Helper, lambda held: held),
    "cycle": (cyclic, lambda held: held["again"][0]["attend"]),
}


@pytest.fixture(scope="module")
def served() -> tuple[nn.Module, torch.Tensor]:
    """One Attend that is served for all tests, and what it computed before."""
    attend = fake_known(causal=True)
    expected = attend(*inputs())
    patch(attend)
    return attend, expected


@pytest.mark.parametrize("place", PLACES)
def test_is_found_wherever_it_is_held(place, served):
    attend, expected = served
    put, take = PLACES[place]
    model = nn.Module()
    model.held = put(attend)
    (found,) = find(model)
    assert found.attend is attend
    assert all(path.startswith("held") for path in found.paths)
    assert "forward" not in found.methods.values()
    calls = type(attend).calls
    assert_same(take(model.held)(*inputs()), expected)
    assert type(attend).calls == calls


def test_all_that_a_container_holds_is_found():
    first, second = fake_known(), fake_known()
    model = nn.Module()
    model.held = held = functools.partial(call_first, first, 1, attend=second)
    vars(model)["hidden"] = first
    assert [(found.attend, found.paths) for found in find(model)] == [
        (first, ["held.args[0]", "hidden"]),
        (second, ["held.keywords['attend']"]),
    ]
    assert model.held is held


def test_every_place_of_one_attend_is_told():
    attend = fake_known()
    model = nn.ModuleList([Holder(attend), Holder(attend)])
    model.spare = functools.partial(call_with, attend=attend)
    handle = patch(model)
    assert handle.replaced == 1
    assert handle.outcomes[0].paths == ("0.attend", "1.attend", "spare.keywords['attend']")
    assert "0.attend (+2 more)" in str(handle)


def test_what_is_shared_is_entered_once():
    """Sixty tuples, each of which holds the one before twice: 2 ** 60 ways to the Attend."""
    attend = fake_known()
    shared: Any = (attend,)
    for _ in range(60):
        shared = (shared, shared)
    model = nn.Module()
    model.a, model.b = shared, [shared, shared]
    start = time.perf_counter()
    (found,) = find(model)
    assert time.perf_counter() - start < 1
    assert found.attend is attend


def test_a_long_vocabulary_costs_little():
    model = Holder(fake_known())
    model.words = {f"word {index}": index for index in range(1_000_000)}
    start = time.perf_counter()
    assert len(find(model)) == 1
    assert time.perf_counter() - start < 2


def test_objects_that_are_no_part_of_a_model_are_not_entered():
    class Trainer:
        def __init__(self) -> None:
            self.other_model = Holder(fake_known())

    model = Holder(fake_known())
    model.trainer = Trainer()
    model.kind = Holder
    assert [found.paths for found in find(model)] == [["attend"]]


class Odd:
    """Raises wherever it is looked at."""

    def refuse(self, *_):
        raise RuntimeError("odd")

    __class__ = property(refuse)
    __dict__ = property(refuse)
    __len__ = __iter__ = __bool__ = __eq__ = __call__ = refuse
    __hash__ = None


def test_odd_objects_are_no_obstacle():
    def outer():
        def inner():
            return later

        yield inner
        later = 1

    model = Holder(fake_known())
    vars(model).update(odd=Odd(), several=[Odd()], bare=nn.Module.__new__(nn.Module), unfinished=next(outer()))
    assert [found.paths for found in find(model)] == [["attend"]]
