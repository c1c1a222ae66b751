"""Options of any kind, given or assigned later: taken where their meaning is plain, else an exception that names the
option, what came and what was expected. One table serves `flash_attention`, `explain` and `Attend`."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backends import BACKENDS, Backend
from flash_attend import Attend, explain, flash_attention
from flash_attend.testing.calls import bits_equal
from nothing_runs import NothingRuns

Q, K, V = (torch.randn(1, 2, length, 8) for length in (3, 5, 5))

# What came -> the value of Python's own that it stands for, or the exception and what it says of what came.
NO_NUMBERS = {
    "text": ("0.3", "str '0.3'"),
    "bytes": (b"0.3", "bytes"),
    "complex": (1j, "complex"),
    "numpy_complex": (np.complex64(1), "complex64"),
    "decimal": (Decimal("0.3"), "Decimal"),
    "list": ([0.3], "list"),
    "array": (np.array([0.3]), "ndarray"),
    "array_of_none": (np.array(None), "ndarray"),
    "tensor": (torch.tensor(0.3), "Tensor"),
    "tensor_on_meta": (torch.empty((), device="meta"), "Tensor"),
    "parameter": (nn.Parameter(torch.ones(())), "Parameter"),
    "uninitialized": (nn.UninitializedParameter(), "UninitializedParameter"),
    "module": (nn.Identity(), ""),
    "function": (len, "builtin_function_or_method"),
}
NUMBERS: dict[str, tuple[Any, Any]] = {
    **{f"float{bits}": (np.dtype(f"float{bits}").type(0.25), 0.25) for bits in (16, 32, 64)},
    "long_double": (np.longdouble(0.25), 0.25),
    "array_0d": (np.array(0.25), 0.25),
    "fraction": (Fraction(1, 4), 0.25),
    "numpy_int": (np.int64(0), 0.0),
    "int": (0, 0.0),
    "inexact": (np.float32(0.3), float(np.float32(0.3))),
    **{
        name: (value, (TypeError, f"must be a Python number, got {told}")) for name, (value, told) in NO_NUMBERS.items()
    },
    "bool": (True, (TypeError, "must be a Python number, got bool True")),
    "numpy_bool": (np.True_, (TypeError, "must be a Python number, got bool")),
    "nan": (float("nan"), (ValueError, "must be finite, got float nan")),
    "infinite": (float("inf"), (ValueError, "must be finite, got float inf")),
    "numpy_nan": (np.float16("nan"), (ValueError, "must be finite, got float nan")),
    "minus_infinite": (np.float32("-inf"), (ValueError, "must be finite, got float -inf")),
    "huge": (10**400, (ValueError, "must be finite, got int of 1329 bits")),
    "too_long_to_print": (-(10**5000), (ValueError, "must be finite, got int of 16610 bits")),
}
SCALES = {**NUMBERS, "none": (None, None), "negative": (-2, -2.0)}
PROBABILITIES = {
    **NUMBERS,
    "none": (None, (TypeError, "must be a Python number, got NoneType")),
    "one": (1, (ValueError, r"must be in \[0, 1\), got 1.0")),
    "negative": (np.float32(-0.5), (ValueError, r"must be in \[0, 1\), got -0.5")),
    "rounded_to_one": (Fraction(10**20 - 1, 10**20), (ValueError, r"must be in \[0, 1\), got 1.0")),
}
NO_FLAGS = {
    "zero": (0, "int 0"),
    "one": (1, "int 1"),
    "float": (1.0, "float 1.0"),
    "numpy_int": (np.int64(1), "int64"),
    "huge": (10**5000, "int of 16610 bits"),
    "array": (np.array([True]), "ndarray"),
    "tensor": (torch.tensor(True), "Tensor"),
    "text": ("no", "str 'no'"),
    **{name: NO_NUMBERS[name] for name in ("tensor_on_meta", "parameter", "uninitialized", "module", "function")},
}
FLAGS: dict[str, tuple[Any, Any]] = {
    "true": (True, True),
    "false": (False, False),
    "numpy_true": (np.True_, True),
    "numpy_false": (np.bool_(False), False),
    "array_0d": (np.array(True), True),
    **{name: (value, (TypeError, f"must be a bool, got {told}")) for name, (value, told) in NO_FLAGS.items()},
}
SURE_FLAGS = {**FLAGS, "none": (None, (TypeError, "must be a bool, got NoneType"))}
HEADS = {
    "none": (None, None),
    "int": (8, 8),
    "numpy_int": (np.int32(8), 8),
    "array_0d": (np.array(8), 8),
    "float": (8.0, (TypeError, "must be an integer, got float 8.0")),
    "bool": (True, (TypeError, "must be an integer, got bool True")),
    "text": ("8", (TypeError, "must be an integer, got str '8'")),
    "tensor": (torch.tensor(8), (TypeError, "must be an integer, got Tensor")),
    "zero": (0, (ValueError, "must be at least 1, got int 0")),
    "too_long_to_print": (-(10**5000), (ValueError, "must be at least 1, got int of 16610 bits")),
}
BACKEND_NAMES = {
    "name": ("math", "math"),
    "numpy_text": (np.str_("math"), "math"),
    **{
        kind: (value, (ValueError, "must be one of 'auto', .*'efficient', 'math', got "))
        for kind, value in (
            ("unknown", "cudnn"),
            ("none", None),
            ("bool", True),
            ("list", ["math"]),
            ("bytes", b"math"),
            ("array", np.array(["math", "triton"])),
            ("tensor", torch.tensor(1)),
            ("module", nn.Identity()),
        )
    },
}

SOFTCAPS = {
    **{name: row for name, row in NUMBERS.items() if name not in ("numpy_int", "int")},
    "none": (None, None),
    "zero": (0, (ValueError, "must be above 0, or None for none, got 0.0")),
    "negative": (np.float32(-0.5), (ValueError, "must be above 0, or None for none, got -0.5")),
}
WINDOWS: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "number": (3, (TypeError, r"must be a pair \(left, right\), got int 3")),
    "three": ((1, 2, 3), (TypeError, r"must be a pair \(left, right\), got tuple")),
    "array": (np.array([1, 2]), (TypeError, r"must be a pair \(left, right\), got ndarray")),
    "tensor": (torch.tensor([1, 2]), (TypeError, r"must be a pair \(left, right\), got Tensor")),
    "float": ((3.0, 1), (TypeError, "must have integers, or None for no limit, as its ends, got float 3.0")),
    "bool": ((None, True), (TypeError, "must have integers, or None for no limit, as its ends, got bool True")),
    "nan": ((float("nan"), 0), (TypeError, "must have integers, or None for no limit, as its ends, got float nan")),
    "infinite": ((-1, -1), (ValueError, "must have ends of at least 0, or None for no limit, got int -1")),
    "too_long_to_print": ((0, -(10**5000)), (ValueError, "must have ends of at least 0, .* got int of 16610 bits")),
}

OF_CALLS = {
    "causal": SURE_FLAGS,
    "scale": SCALES,
    "softcap": SOFTCAPS,
    "window": WINDOWS,
    "dropout_p": PROBABILITIES,
    "return_lse": SURE_FLAGS,
    "deterministic": {**FLAGS, "none": (None, None)},
    "backend": BACKEND_NAMES,
}
OF_ATTEND = {
    "causal": SURE_FLAGS,
    "scale": SCALES,
    "softcap": SOFTCAPS,
    "window": WINDOWS,
    "dropout": PROBABILITIES,
    "flash": {**FLAGS, "none": (None, True)},
    "use_flash": {**FLAGS, "none": (None, True)},
    "deterministic": {**FLAGS, "none": (None, None)},
    "backend": BACKEND_NAMES,
    "heads": HEADS,
}


def _rows(options: dict[str, dict[str, tuple[Any, Any]]], refused: bool) -> pytest.MarkDecorator:
    rows = [
        pytest.param(name, value, wanted, id=f"{name}-{kind}")
        for name, kinds in options.items()
        for kind, (value, wanted) in kinds.items()
        if isinstance(wanted, tuple) == refused
    ]
    return pytest.mark.parametrize(("name", "value", "wanted"), rows)


def _construct(name: str, value: object) -> Attend:
    return Attend(**{name: value})


def _assign(name: str, value: object) -> Attend:
    attend = Attend()
    setattr(attend, name, value)
    return attend


each_way = pytest.mark.parametrize("make", (_construct, _assign))


@pytest.mark.parametrize("function", (flash_attention, explain), ids=lambda function: function.__name__)
@_rows(OF_CALLS, refused=True)
def test_a_call_refuses_an_option(function: Callable, name: str, value: object, wanted: tuple) -> None:
    with NothingRuns(), pytest.raises(wanted[0], match=f"^{name} {wanted[1]}"):
        function(Q, K, V, **{name: value})


@pytest.mark.parametrize("backend", BACKENDS)
@_rows({name: kinds for name, kinds in OF_CALLS.items() if name != "backend"}, refused=False)
def test_a_call_takes_an_option_as_python_s_own(backend: Backend, name: str, value: object, wanted: object) -> None:
    q, k, v = (x.to(backend.device) for x in (Q, K, V))

    def call(given: object) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        found = flash_attention(q, k, v, backend=backend.name, **{name: given})
        return found if isinstance(found, tuple) else (found,)

    assert explain(q, k, v, backend=backend.name, **{name: value}).plan
    assert all(map(bits_equal, call(value), call(wanted))), name
    assert len(call(value)) == len(call(wanted))


@pytest.mark.parametrize("given", ((1, 2), [1, None], (np.int64(1), np.array(2)), (10**30, 0)))
def test_windows_are_kept_as_python_s_own(given: Any) -> None:
    wanted = tuple(end if end is None else int(end) for end in given)
    attend = Attend(window=given)
    assert attend.window == wanted
    assert [type(end) for end in attend.window] == [type(end) for end in wanted]
    assert torch.equal(attend(Q, K, V), flash_attention(Q, K, V, window=wanted))


@each_way
@_rows(OF_ATTEND, refused=True)
def test_attend_refuses_an_option(make: Callable, name: str, value: object, wanted: tuple) -> None:
    with pytest.raises(wanted[0], match=f"^{name} {wanted[1]}"):
        make(name, value)


@each_way
@_rows(OF_ATTEND, refused=False)
def test_attend_keeps_an_option_as_python_s_own(make: Callable, name: str, value: object, wanted: object) -> None:
    attend = make(name, value)
    kept = getattr(attend, name)
    assert kept == wanted
    assert isinstance(kept, type(wanted))
    assert attend(Q, K, V).shape == (1, 2, 3, 8)


def test_a_refused_value_changes_nothing() -> None:
    attend = Attend(0.5, causal=True, scale=2.0)
    for name, wrong in (("dropout", 1), ("dropout", nn.Dropout(0.9)), ("causal", 0), ("flash", 0), ("scale", "1")):
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
            setattr(attend, name, wrong)
    assert (attend.dropout, attend.causal, attend.flash, attend.scale) == (0.5, True, True, 2.0)
    assert [name for name, _ in attend.named_modules()] == ["", "attn_dropout"]


@pytest.mark.parametrize("flash", (False, np.False_))
def test_contradictions(flash: bool) -> None:
    for first, second in ((flash, True), (True, flash)):
        with pytest.raises(ValueError, match=f"^flash and use_flash .* got flash={first}, use_flash={second}"):
            Attend(flash=first, use_flash=second)
    with pytest.raises(ValueError, match=r"^flash=False .* backend='triton'"):
        Attend(flash=flash, backend="triton")
    attend = Attend(backend="triton")
    attend.flash = flash
    with pytest.raises(ValueError, match=r"^flash=False .* backend='triton'"):
        attend(Q, K, V)
    attend.backend = "math"
    assert torch.equal(attend(Q, K, V), Attend(backend="math")(Q, K, V))


# ---------------------------------------------------------------------------------------------------------------------
# The submodule that stands for dropout
# ---------------------------------------------------------------------------------------------------------------------


class OwnDropout(nn.Dropout):
    """What other libraries replace dropout by."""


@pytest.mark.parametrize(("layer", "p"), ((nn.Identity(), 0.0), (nn.Dropout(0.25), 0.25), (OwnDropout(0.5), 0.5)))
def test_attn_dropout_may_be_replaced(layer: nn.Module, p: float) -> None:
    attend = Attend(0.9).train()
    attend.attn_dropout = layer.train()
    assert attend.dropout == p
    torch.manual_seed(1)
    out = attend(Q, K, V)
    torch.manual_seed(1)
    assert torch.equal(out, flash_attention(Q, K, V, dropout_p=p))
    assert torch.equal(attend.eval()(Q, K, V), flash_attention(Q, K, V))
    attend.dropout = 0.75
    assert (attend.attn_dropout.p, attend.attn_dropout.training) == (0.75, False)


@pytest.mark.parametrize(
    ("layer", "error", "told"),
    (
        (nn.Linear(2, 2), TypeError, "attn_dropout must be an nn.Dropout, or an nn.Identity for none, got Linear"),
        (nn.Dropout2d(0.1), TypeError, "attn_dropout must be .* got Dropout2d"),
        (None, TypeError, "attn_dropout must be .* got NoneType"),
        (0.5, TypeError, "attn_dropout must be .* got float"),
        (nn.Dropout(1.0), ValueError, r"attn_dropout.p must be in \[0, 1\), got 1.0"),
    ),
)
def test_attn_dropout_may_not_be_anything(layer: object, error: type[Exception], told: str) -> None:
    attend = Attend(0.5)
    with pytest.raises(error, match=f"^{told}"):
        attend.attn_dropout = layer
    assert attend.dropout == 0.5
    if isinstance(layer, nn.Module):  # past every check but that of the call
        attend.add_module("attn_dropout", layer)
        for training in (True, False):
            with pytest.raises(error, match=f"^{told}"):
                attend.train(training)(Q, K, V)


def test_dropout_is_no_submodule() -> None:
    for make in (_construct, _assign):
        with pytest.raises(TypeError, match=r"^dropout must be a Python number, got Dropout.*attn_dropout"):
            make("dropout", nn.Dropout(0.9))


# ---------------------------------------------------------------------------------------------------------------------
# Under a compiler
# ---------------------------------------------------------------------------------------------------------------------


def test_numpy_s_options_under_a_compiler() -> None:
    """`Attend` has them as Python's own; to a function they are arrays, of which no graph is made."""
    attend = Attend(causal=np.True_, scale=np.float32(0.25))
    wanted = flash_attention(Q, K, V, causal=True, scale=0.25)
    assert torch.equal(torch.compile(attend, backend="eager", fullgraph=True)(Q, K, V), wanted)

    def call(q: Tensor, scale: object, causal: object) -> Tensor:
        return flash_attention(q, K, V, scale=scale, causal=causal)

    compiled = torch.compile(call, backend="eager")
    for scale in (0.25, 0.5):  # as a constant of a graph the second would be the first
        found = compiled(Q, np.float32(scale), np.True_)
        assert torch.equal(found, flash_attention(Q, K, V, causal=True, scale=scale))
    with pytest.raises(ValueError, match=r"^scale must be finite"):
        compiled(Q, 10**400, True)
    for scale, causal in ((np.float32(0.25), True), (np.array(0.25), True), (0.25, np.True_)):
        torch.compiler.reset()
        with pytest.raises(Exception, match="pass Python's own"):
            torch.compile(call, backend="eager", fullgraph=True)(Q, scale, causal)
