"""Autocast: q, k and v go to its dtype once, before anything is computed; float64 is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from backends import BACKENDS, Backend
from flash_attend import Attend, explain, flash_attention
from flash_attend.testing.calls import Case, assert_same_bits, check, make_call, run

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)

CASE = Case("x", heads=4, kv_heads=2, queries=6, keys=9, d=4, dv=8, mask="pad_left", causal=True)
HALF = torch.float16  # Triton's interpreter computes bfloat16 wrongly


def autocast(backend: Backend, enabled: bool = True) -> torch.autocast:
    return torch.autocast(backend.device, dtype=HALF, enabled=enabled)


def attend_under_autocast(backend: Backend) -> Callable:
    def attend(*args, **options) -> tuple[Tensor, Tensor]:
        with autocast(backend):
            return flash_attention(*args, **options)

    return attend


@on_every_backend
def test_it_is_the_call_on_inputs_that_were_cast(backend: Backend) -> None:
    call = make_call(CASE, torch.float32, backend.device)
    cast = call.with_(**{name: getattr(call, name).to(HALF) for name in ("q", "k", "v", "grad_out")})
    answer = run(call.with_(grad_out=cast.grad_out), backend.name, attend=attend_under_autocast(backend))
    assert answer.out.dtype == HALF
    assert answer.lse.dtype == answer.dq.dtype == answer.dk.dtype == answer.dv.dtype == torch.float32
    expected = run(cast, backend.name)
    check(expected, cast)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(answer, name), getattr(expected, name).to(getattr(answer, name).dtype)), name


@on_every_backend
def test_mixed_dtypes_work(backend: Backend) -> None:
    """A model that normalises q and k leaves them in float32 beside a v in half precision."""
    call = make_call(CASE, torch.float32, backend.device)
    q, k, v = call.q, call.k.bfloat16(), call.v.to(HALF)
    with autocast(backend):
        out = flash_attention(q, k, v, **call.options, backend=backend.name)
        module = Attend(causal=True, backend=backend.name)(q, k, v, mask=call.mask)
    expected = flash_attention(q.to(HALF), k.to(HALF), v, **call.options, backend=backend.name)
    assert torch.equal(out, expected)
    assert torch.equal(module, expected)
    with pytest.raises(TypeError, match="k must have q's dtype"):
        flash_attention(q, k, v, **call.options, backend=backend.name)


@on_every_backend
def test_float64_is_left_alone_as_torch_leaves_it(backend: Backend) -> None:
    call = make_call(CASE, torch.float64, backend.device)
    assert_same_bits(run(call, backend.name, attend=attend_under_autocast(backend)), run(call, backend.name))
    with autocast(backend):
        assert scaled_dot_product_attention(call.q, call.q, call.q).dtype == torch.float64
        with pytest.raises(TypeError, match="v must have q's dtype"):
            flash_attention(call.q, call.k, call.v.float(), backend=backend.name)


@on_every_backend
def test_a_region_without_autocast_inside_one_with(backend: Backend) -> None:
    call = make_call(CASE, torch.float32, backend.device)
    with autocast(backend), autocast(backend, enabled=False):
        out = flash_attention(call.q, call.k, call.v, **call.options, backend=backend.name)
    assert torch.equal(out, flash_attention(call.q, call.k, call.v, **call.options, backend=backend.name))


@on_every_backend
def test_compiled(backend: Backend) -> None:
    torch._dynamo.reset()
    call = make_call(CASE, torch.float32, backend.device)
    attend = torch.compile(flash_attention, backend="aot_eager", fullgraph=True)
    with autocast(backend):
        compiled = attend(call.q, call.k.to(HALF), call.v, **call.options, backend=backend.name)
        eager = flash_attention(call.q, call.k.to(HALF), call.v, **call.options, backend=backend.name)
    assert compiled.dtype == HALF
    assert torch.equal(compiled, eager)


def test_explain_sees_what_is_served() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with torch.autocast("cpu", dtype=HALF):
        assert explain(q, q.bfloat16(), q.to(HALF)).plan.name == "sdpa"
