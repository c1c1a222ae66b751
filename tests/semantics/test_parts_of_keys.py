"""A backward that has a part of the keys, and the results over all: the parts' gradients add up to the whole's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, CHOOSY, EFFICIENT, Backend, call_for, skip_unless_interpretable
from flash_attend.backends import BACKENDS as SERVING
from flash_attend.checks import normalise_inputs
from flash_attend.target import DeviceTarget
from flash_attend.testing.calls import Case, check, run

CUT = 17  # of 43 keys


class InParts(torch.autograd.Function):
    """`(q, k, v, call, bias) -> (out, lse)`, of whose keys a backend sees the first CUT alone, and the rest alone."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        pieces = [SERVING[name].forward(operands, spec, tiles) for name, operands, spec, tiles in InParts.parts(*given)]
        lse = torch.logsumexp(torch.stack([lse for _, lse, _ in pieces]), dim=0)
        known = lse.masked_fill(lse == -torch.inf, 0.0)
        out = sum(out * (lse - known).exp()[..., None] for out, lse, _ in pieces).to(given[0].dtype)
        ctx.given = given
        ctx.save_for_backward(out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        backend, found = ctx.given[3], []
        grad_lse = None if backend.name == "sdpa" else grad_lse
        for name, operands, spec, tiles in InParts.parts(*ctx.given):
            needed = (True, True, True) if spec.bias is None else (True, True, True, False, False)
            part = SERVING[name].load().backward_of_part
            found.append(part(grad_out, grad_lse, operands, *ctx.saved_tensors, spec, tiles, needed)[:3])
        (q, k, v), (more_q, more_k, more_v) = found
        return q.double().add(more_q).to(q.dtype), torch.cat([k, more_k], 2), torch.cat([v, more_v], 2), None, None

    @staticmethod
    def parts(q: Tensor, k: Tensor, v: Tensor, backend: Backend, options: dict) -> list[tuple]:
        made = []
        for keys in (slice(0, CUT), slice(CUT, k.shape[-2])):
            cut = {name: x[..., keys] for name in ("mask", "bias") if (x := options.get(name)) is not None}
            with torch.no_grad():
                operands, spec = normalise_inputs(q, k[..., keys, :], v[..., keys, :], **{**options, **cut})
            tiles = SERVING[backend.name].tiles(spec, DeviceTarget.of(q.device), "separate")
            made.append((backend.name, operands, spec, tiles))
        return made


# Of the padded one's entries the second part hides one, and both hide the last. In the kernels float32 is APART.
PADDED = Case("padded", mask="dead_batch", batch=3, kv_heads=1, queries=20, dv=24)
SCORES = Case("scores", softcap=1.5, bias="1h1j", mask="bh1j", scale=-0.4, queries=20)


@pytest.mark.parametrize(("case", "dtype"), ((PADDED, torch.float16), (SCORES, torch.float32)))
@pytest.mark.parametrize("backend", (*BACKENDS, *CHOOSY, *EFFICIENT))
def test_parts_add_up_to_the_whole(backend: Backend, dtype: torch.dtype, case: Case) -> None:
    skip_unless_interpretable(backend, dtype)
    case = replace(case, dv=None) if backend.name == "sdpa" else case
    call = garbage = call_for(backend, case, dtype)
    if case.mask != "none" and call.mask.ndim == 2:  # what nobody sees may be anything
        hidden = ~call.mask.view(case.batch, 1, -1, 1)
        garbage = call.with_(k=call.k.masked_fill(hidden, torch.nan), v=call.v.masked_fill(hidden, torch.inf))

    def attend(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, backend: str, **options: Any) -> Any:
        return InParts.apply(q, k, v, served, options)

    served = backend
    check(run(garbage, backend.name, ("q", "k", "v"), attend), call)
