"""Attention of complex tensors, by real attentions over the same memory.

A complex tensor is a real one with one more dimension of size 2, whose elements are neighbours. With that dimension
flattened into the last, the product of two rows is the real part of their inner product, and a weighted sum of rows is
that of complex numbers: one real attention with `2 d` and `2 dv`.

The complete form has a softmax for each pair of parts, of q's part x with k's part y (0 the real one, 1 the imaginary
one). With `P[x, y] = softmax(q_x k_y^T * scale)` it is

    out = sum over x and y of 1j ** (x + y) * P[x, y] v

which written out is equation 3 of Yang et al. 2019 (arXiv:1910.10202). The four read v, the mask and all else as they
are; q and k are brought into parts once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, Literal, overload

import torch
from torch import Tensor

from flash_attend.checks import check_complex
from flash_attend.functional import flash_attention
from flash_attend.options import check_flag
from flash_attend.reference import no_autocast
from flash_attend.spec import Window

__all__ = ["attend_completely", "complex_attention", "parts_of"]


@overload
def complex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    complete: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def complex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    complete: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
    deterministic: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def complex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    complete: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of complex tensors, in the real or in the complete form of complex-valued-transformer.

    The real form is `softmax(Re(q k^H) * scale) v`. The complete form (Yang et al. 2019, arXiv:1910.10202, equation 3)
    has a softmax of its own for each pair of a part of q with a part of k:

        out = (P_rr - P_ii) v + 1j * (P_ri + P_ir) v,   P_xy = softmax(q_x k_y^T * scale)

    Args:
        q: `(b, h, i, d)`; complex64 or complex128.
        k: `(b, hk, j, d)` or `(b, j, d)`; `hk` divides `h`, and query head `n` reads key head `n // (h // hk)`.
        v: `(b, hk, j, dv)` or `(b, j, dv)`; `dv` may differ from `d`.
        complete: the complete form instead of the real one.
        mask, bias, causal, window, softcap, alibi_slopes, sinks: as `flash_attention` has them, real and bool tensors;
            in the complete form the same for each of the four.
        scale: factor on the scores, any finite number. Default: `(2 * d) ** -0.5`, since scores sum `2 * d` products of
            real numbers; `d ** -0.5` in the complete form.
        dropout_p: probability in [0, 1) of dropping a normalised weight; in the complete form for each of the four by
            itself.
        return_lse: also return the natural-log sum of exponentials of the scores, differentiable.
        deterministic, backend: as in `flash_attention`, for the real attentions.

    Returns:
        `out (b, h, i, dv)` in q's dtype, or `(out, lse)` with lse `(b, h, i)`, in the complete form `(b, h, 2, 2, i)`
        by the part of q and that of k, the real one first; float32 (float64 for complex128). A query that sees no key
        has output 0, lse -inf and gradient 0.

    Nothing is copied for the real form whose rows are contiguous, and once q and k for the complete form. Derivatives
    are PyTorch's for complex numbers, of any order, as those of `flash_attention`. Autocast has no complex dtype and
    leaves a call alone.

    Raises:
        TypeError, ValueError: as `flash_attention`.
    """
    complete, return_lse = check_flag("complete", complete), check_flag("return_lse", return_lse)
    check_complex(q, k, v)
    options: dict[str, Any] = dict(
        mask=mask,
        bias=bias,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        deterministic=deterministic,
        backend=backend,
    )
    attend = partial(flash_attention, return_lse=return_lse, **options)
    with no_autocast(q.device):
        found = (attend_completely if complete else _attend)(attend, q, k, v)
    return (found[0], found[1]) if return_lse else found[0]


def _attend(attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out, *lse = _listed(attend(_as_real(q), _as_real(k), _as_real(v)))
    return _as_complex(out), *lse


def attend_completely(attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The complete form by a real attention, which returns `out` or `(out, lse)`: what it returns, in a tuple."""
    values = _as_real(v)
    outs, *lse = zip(*[_listed(attend(x, y, values)) for x, y in product(parts_of(q), parts_of(k))], strict=True)
    rr, ri, ir, ii = (out.unflatten(-1, (-1, 2)) for out in outs)
    # Of real numbers: where one of them is infinite, complex arithmetic makes NaN of both parts.
    plain, turned = (rr - ii).unbind(-1), (ri + ir).unbind(-1)
    out = torch.complex(plain[0] - turned[1], plain[1] + turned[0])
    return out, *[torch.stack(each, dim=2).unflatten(2, (2, 2)) for each in lse]


def _listed(found: Tensor | tuple[Tensor, Tensor]) -> Sequence[Tensor]:
    return [found] if isinstance(found, Tensor) else found


def _as_real(tensor: Tensor) -> Tensor:
    """`(..., d)` complex -> `(..., 2 d)` real: a view where rows are contiguous."""
    return torch.view_as_real(tensor.resolve_conj()).flatten(-2)


def _as_complex(tensor: Tensor) -> Tensor:
    """`(..., 2 d)` real -> `(..., d)` complex."""
    return torch.view_as_complex(tensor.unflatten(-1, (-1, 2)))


def parts_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """The real and the imaginary part, each with contiguous rows, which every backend reads as they are."""
    return torch.view_as_real(tensor.resolve_conj()).movedim(-1, 0).contiguous().unbind()
