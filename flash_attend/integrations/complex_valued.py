"""complex-valued-transformer's complete form as a whole. It copies q, k, v and the mask four times before it calls its
`Attend`; here the parts of q, k and v that it needs are handed to that one four times.

What the package computes (0.0.14) is not what it says, nor equation 3 of Yang et al. 2019 (arXiv:1910.10202), which
`complex_attention` has: it adds its eight attentions up in another order than it takes them apart. A model was trained
with it, so a patched one goes on with it; with a version that computes the equation, the equation is served.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn

from flash_attend.complex_valued import attend_completely, parts_of
from flash_attend.functional import flash_attention
from flash_attend.integrations.known import path_of
from flash_attend.integrations.served import serving_of

__all__ = ["give_back", "serve_whole"]

KIND = "complex_valued_transformer.complex_valued_transformer.ComplexMultiheadAttention"
FUNCTION = "complex_attention_complete"
Original = Callable[..., Tensor]
Form = Callable[[Callable[..., Tensor], Tensor, Tensor, Tensor], Tensor]


def as_written(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Equation 3 of Yang et al. 2019."""
    return attend_completely(attend, q, k, v)[0]


def as_computed(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What version 0.0.14 computes: the real part of the result sees the real part of k alone, the imaginary part the
    imaginary one, so that each of four attentions has a single part of values."""
    (q_re, q_im), (k_re, k_im), (v_re, v_im) = map(parts_of, (q, k, v))
    less, more = v_re - v_im, v_re + v_im
    real = attend(q_re, k_re, less) - attend(q_im, k_re, more)
    return torch.complex(real, attend(q_re, k_im, more) + attend(q_im, k_im, less))


def attend_whole(
    q: Tensor, k: Tensor, v: Tensor, attend: nn.Module, mask: Tensor | None = None, *, original: Original, form: Form
) -> Tensor:
    """In the place of the package's function, with its arguments; it itself while its `Attend` is not served."""
    if serving_of(attend) is None:
        return original(q, k, v, attend=attend, mask=mask)
    return form(functools.partial(attend, mask=mask), q, k, v)


def serve_whole(model: nn.Module) -> list[nn.Module]:
    """Has every complete form in `model` whose `Attend` is served computed without copies. Returns the modules that
    hold one so."""
    whole, form_of = [], functools.cache(_form_of)
    for module in model.modules():
        held = vars(module).get("attend")
        if path_of(type(module)) != KIND or not isinstance(held, functools.partial) or held.args:
            continue
        named, package = held.keywords, sys.modules.get(type(module).__module__)
        if [*named] == ["attend"] and held.func is getattr(package, FUNCTION, None) and serving_of(named["attend"]):
            if form := form_of(held.func):
                module.attend = functools.partial(attend_whole, **named, original=held.func, form=form)  # type: ignore[assignment]
                whole.append(module)
        elif held.func is attend_whole:
            whole.append(module)
    return whole


def give_back(modules: Iterable[nn.Module]) -> None:
    """Gives modules the package's function back, those whose `Attend` is not served any more."""
    for module in modules:
        held = vars(module).get("attend")
        if (
            isinstance(held, functools.partial)
            and held.func is attend_whole
            and not serving_of(held.keywords["attend"])
        ):
            module.attend = functools.partial(held.keywords["original"], attend=held.keywords["attend"])  # type: ignore[assignment]


def _form_of(original: Original) -> Form | None:
    """The form that gives what the package's function does; None where neither does."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return flash_attention(q, k, v, mask=mask, causal=True, backend="math")

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 4, dtype=torch.complex128, generator=generator, device="cpu") for _ in range(3))
    mask = (torch.arange(5, device="cpu") < torch.tensor([[5], [3]], device="cpu"))[:, None, None]
    for dtype in (torch.complex64, torch.complex128):  # the package takes one of them
        with suppress(Exception), torch.no_grad():
            given = q.to(dtype), k.to(dtype), v.to(dtype)
            theirs = original(*given, attend=attend, mask=mask)
            for form in (as_computed, as_written):
                if torch.allclose(form(functools.partial(attend, mask=mask), *given), theirs, rtol=1e-4, atol=1e-5):
                    return form
    return None
