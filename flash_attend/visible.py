"""Products over visible pairs alone: whatever a hidden pair holds, NaN and infinity included, is left out of the sums
and of every derivative. In a plain product the weight 0 of a hidden pair does not do that: 0 * NaN is NaN.

Each of the two products is what the other's derivative consists of, so that both can be differentiated any number of
times, in either mode. They take several plain products' time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attend.tracing import applied

__all__ = ["contract", "pairs"]


def pairs(x: Tensor, y: Tensor, visible: Tensor) -> Tensor:
    """`sum_c x[i, c] y[j, c]` where a pair is visible, else 0: `(..., i, d), (..., j, d) -> (..., i, j)`.

    `visible`, bool, broadcasts to the result.
    """
    return applied(_Pairs, x, y, visible)


def contract(weights: Tensor, y: Tensor, visible: Tensor) -> Tensor:
    """`sum_j weights[i, j] y[j, c]` over the visible pairs: `(..., i, j), (..., j, d) -> (..., i, d)`."""
    return applied(_Contract, weights, y, visible)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class _Pairs(_Product):
    @staticmethod
    def forward(x: Tensor, y: Tensor, visible: Tensor) -> Tensor:
        return torch.where(visible, x @ y.mT, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y, visible = ctx.saved_tensors
        need_x, need_y, _ = ctx.needs_input_grad
        of_x = contract(grad, y, visible) if need_x else None
        return of_x, contract(grad.mT, x, visible.mT) if need_y else None, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, y_tangent: Tensor, _: None) -> Tensor:
        x, y, visible = ctx.saved_tensors
        return pairs(x_tangent, y, visible) + pairs(x, y_tangent, visible)


class _Contract(_Product):
    @staticmethod
    def forward(weights: Tensor, y: Tensor, visible: Tensor) -> Tensor:
        seen = visible.expand_as(weights)
        weights, infinite = torch.where(seen, weights, 0.0), y.isinf()
        # A sum has an infinity where a weight that is not 0 meets one, and is NaN where any weight meets NaN, or 0
        # meets an infinity, or infinities of both signs meet.
        signs, signs_of_y, ones = weights.sign(), torch.where(infinite, y, 0.0).sign(), seen.to(y.dtype)
        net, met = signs @ signs_of_y, signs.abs() @ signs_of_y.abs()
        undefined = ones @ y.isnan().to(y.dtype) + (ones - signs.abs()) @ infinite.to(y.dtype)
        total = weights @ torch.where(y.isfinite(), y, 0.0)
        total = torch.where(met > 0, torch.where(net.abs() == met, net * torch.inf, torch.nan) + total, total)
        return torch.where(undefined > 0, torch.nan, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weights, y, visible = ctx.saved_tensors
        need_weights, need_y, _ = ctx.needs_input_grad
        of_weights = pairs(grad, y, visible) if need_weights else None
        return of_weights, contract(weights.mT, grad, visible.mT) if need_y else None, None

    @staticmethod
    def jvp(ctx: Any, weights_tangent: Tensor, y_tangent: Tensor, _: None) -> Tensor:
        weights, y, visible = ctx.saved_tensors
        return contract(weights_tangent, y, visible) + contract(weights, y_tangent, visible)
