"""Products over visible pairs alone: whatever a hidden pair holds, NaN and infinity included, is left out of the sums
and of every derivative. In a plain product the weight 0 of a hidden pair does not do that: 0 * NaN is NaN.

Each of the two products is what the other's derivative consists of, so that both can be differentiated any number of
times, in either mode. They take several plain products' time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attend.tracing import allow_forward_mode, applied, tangent_of

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
    product: Callable[[Tensor, Tensor, Tensor], Tensor]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @classmethod
    def pushed_forward(cls, ctx: Any, of_first: Tensor, of_second: Tensor) -> Tensor:
        """The sum of the products in which one of the two is replaced by its tangent."""
        first, second, visible = (tangent_of(x)[0] for x in ctx.saved_tensors)
        # Torch turns forward mode off for this, all of it: also one that is outside of the one that asks.
        with allow_forward_mode(True):
            return cls.product(of_first, second, visible) + cls.product(first, of_second, visible)

    @classmethod
    def mapped_over(cls, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        """The product with what is mapped over in front of all else, along which whatever is not is broadcast."""
        pairs_of = zip(inputs, in_dims, strict=True)
        inputs = tuple(x[None] if dim is None else x.movedim(dim, 0) for x, dim in pairs_of)
        rank = max(x.ndim for x in inputs)
        return cls.product(*(x.reshape(x.shape[0], *[1] * (rank - x.ndim), *x.shape[1:]) for x in inputs)), 0


class _Pairs(_Product):
    product = staticmethod(pairs)

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
        return _Pairs.pushed_forward(ctx, x_tangent, y_tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Tensor) -> tuple[Tensor, int]:
        return _Pairs.mapped_over(in_dims, *inputs)


class _Contract(_Product):
    product = staticmethod(contract)

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
        return _Contract.pushed_forward(ctx, weights_tangent, y_tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Tensor) -> tuple[Tensor, int]:
        return _Contract.mapped_over(in_dims, *inputs)
