"""How many floating-point operations the operators stand for, told to `torch.utils.flop_counter`.

Counted as torch counts its own fused attention: every query with every key, hidden or not, a multiply-add as two. So
two models with the same shapes count alike, whatever their masks. The einsum path, where no compiler sees it, is
counted by the products that it is made of.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from flash_attend.ops import Options

__all__ = ["count_flops"]

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def forward_flops(operands: Sequence[Shape], numbers: Any, options: str, **kwargs: Any) -> int:
    """`q k^T` and the sums of v; q, k and v are the first operands, in the shapes of `Operands`. In forward mode each
    tangent's products are beside them, and the sums of v by the tangents of weights."""
    of_scores, of_v, of_weights = _moved(options)
    return _products(operands, 1 + of_scores, 1 + of_v + of_weights)


def backward_flops(
    grads: Sequence[Shape], operands: Sequence[Shape], outputs: Any, numbers: Any, options: str, **kwargs: Any
) -> int:
    """The scores again, and two products for each of the forward's, whichever gradients are needed. Where there are
    tangents, the products that `flash_attend.tangents` makes."""
    of_scores, of_v, of_weights = _moved(options)
    again = bool(Options.read(options).tangents)
    return _products(operands, 3 + 3 * of_scores, 2 + again + 2 * of_v + of_weights)


def _moved(options: str) -> tuple[int, int, int]:
    """How many of q and k have a tangent, how many of v, and of the weights."""
    moved = set(Options.read(options).tangents)
    return len(moved & {"q", "k"}), len(moved & {"v"}), int(not moved <= {"v"})


def _products(operands: Sequence[Shape], of_scores: int, of_values: int) -> int:
    (batch, heads, queries, head_dim), (_, _, keys, _), (*_, value_dim) = operands[:3]
    return 2 * batch * heads * queries * keys * (of_scores * head_dim + of_values * value_dim)


def count_flops() -> None:
    """Registers the formulas: at once, or when somebody imports torch's counter, which takes a fifth of a second that
    nobody else should pay for. To be called once in a process."""
    if COUNTER in sys.modules:
        _register()
    sys.meta_path.insert(0, _Watch())


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.flash_attend.forward)(forward_flops)
    register_flop_formula(torch.ops.flash_attend.backward)(backward_flops)


class _Watch(MetaPathFinder):
    """Finds torch's counter as the other finders do, and has the formulas registered when it has been loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
