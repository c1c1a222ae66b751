"""What options may be: a value of the kind that one takes, as Python's own, or an exception that names the option, what
came and what was expected."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "check_count",
    "check_flag",
    "check_length",
    "check_number",
    "check_positive",
    "check_probability",
    "check_window",
    "optional",
    "shown",
]

LARGEST_FLOAT = sys.float_info.max
_T = TypeVar("_T")


def check_flag(name: str, value: object) -> bool:
    """`value`, a bool of Python's or of numpy's, as Python's. Raises `TypeError` for anything else, 0 and 1 too."""
    if value is True or value is False:
        return value
    flag = _unwrapped(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be a bool, got {shown(value)}")
    return flag


def check_number(name: str, value: object) -> float:
    """`value`, any real number but a bool or a tensor (which would have to be read, and would lose its gradient), as a
    float. Raises `TypeError` for anything else, and `ValueError` where it is not finite."""
    number: Any = value if type(value) is float else _unwrapped(value)
    if isinstance(number, bool) or not isinstance(number, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a Python number, got {shown(value)}")
    # Neither infinite, nor NaN, nor an int beyond floats; in words that a compiler follows where it is a symbol.
    if not -LARGEST_FLOAT <= number <= LARGEST_FLOAT:  # type: ignore[operator]
        raise ValueError(f"{name} must be finite, got {shown(number)}")
    return float(number)


def check_probability(name: str, value: object) -> float:
    """`value` as `check_number`, in [0, 1)."""
    if type(value) is float and 0.0 <= value < 1.0:
        return value
    probability = check_number(name, value)
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {probability}")
    return probability


def check_positive(name: str, value: object) -> float:
    """`value` as `check_number`, above 0."""
    number = check_number(name, value)
    if number <= 0.0:
        raise ValueError(f"{name} must be above 0, or None for none, got {number}")
    return number


def check_window(name: str, value: object) -> tuple[int | None, int | None]:
    """`value`, a pair `(left, right)` of integers of at least 0, or None for no limit on that side, as Python's."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (left, right), got {shown(value)}")
    left, right = (_check_end(name, end) for end in value)
    return left, right


def _check_end(name: str, value: object) -> int | None:
    end = value if value is None or type(value) is int else _unwrapped(value)
    if end is None:
        return None
    if isinstance(end, bool) or not isinstance(end, (int, numbers.Integral)):
        raise TypeError(f"{name} must have integers, or None for no limit, as its ends, got {shown(value)}")
    if end < 0:
        raise ValueError(f"{name} must have ends of at least 0, or None for no limit, got {shown(value)}")
    return int(end)


def check_count(name: str, value: object) -> int:
    """`value`, an integer of at least 1 but no bool, as Python's."""
    count = _unwrapped(value)
    if isinstance(count, bool) or not isinstance(count, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {shown(value)}")
    return int(count)


def check_length(name: str, value: object) -> int:
    """`value`, an integer of at least 0 but no bool, as Python's; a compiler's symbol as it is."""
    length = _unwrapped(value)
    if isinstance(length, bool) or not isinstance(length, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if length < 0:
        raise ValueError(f"{name} must be at least 0, got {shown(value)}")
    return length  # type: ignore[return-value]


def optional(check: Callable[[str, object], _T]) -> Callable[[str, object], _T | None]:
    """`check` for an option that may also be None."""
    return lambda name, value: None if value is None else check(name, value)


def _unwrapped(value: Any) -> object:
    """Python's own number for a scalar or a 0-dim array of another library; whatever else, a tensor too, as it is."""
    if isinstance(value, (bool, int, float, Tensor)) or getattr(value, "shape", None) != ():
        return value
    if torch.compiler.is_compiling():  # which then leaves the call to Python, unless a full graph was asked for
        raise TypeError("torch.compile takes numpy's scalars for tensors, of unknown values: pass Python's own")
    return value.item()


def shown(value: object) -> str:
    """What came, for a message: its type, and a short value."""
    kind = type(value).__name__
    if isinstance(value, int) and value.bit_length() > 64:
        return f"{kind} of {value.bit_length()} bits"
    return f"{kind} {value!r}"[:80] if isinstance(value, (bool, int, float, str)) else kind
