"""Calls that nobody wrote down: hypothesis draws shapes, strides, masks, dtypes and options; every backend answers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from backends import BACKENDS, FUSED, Backend
from flash_attend.testing.calls import LAYOUTS, MASKS, Call, Case, assert_same_bits, check, make_call, run

EXAMPLES = {False: 150, True: 20}  # by whether the backend is interpreted

# Where all keys are alike, all roundings are, and no norm of an error is steady: test_semantics.py has such calls.
LAYOUT_NAMES = sorted(set(LAYOUTS) - {"broadcast_length"})

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@st.composite
def cases(draw: st.DrawFn, longest: int, widest: int) -> Case:
    """Any call that the contract allows, small."""
    group = draw(st.sampled_from((1, 1, 2, 3)))
    kv_heads = draw(st.integers(1, 2))
    d = draw(st.integers(1, widest))
    return Case(
        "drawn",
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * group,
        kv_heads=0 if kv_heads == 1 and draw(st.booleans()) else kv_heads,
        queries=draw(st.integers(0, longest)),
        keys=draw(st.integers(0, longest)),
        d=d,
        dv=draw(st.sampled_from((d, 2 * d, None)) | st.integers(1, widest)),
        mask=draw(st.sampled_from(sorted(MASKS))),
        causal=draw(st.booleans()),
        scale=draw(st.none() | st.sampled_from((0.0, -0.5, 1.0)) | st.floats(-2, 2, width=16)),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.0, 0.1, 0.6))),
        layout=draw(st.sampled_from(LAYOUT_NAMES)),
        grad_layout=draw(st.sampled_from(LAYOUT_NAMES)),
        grads=draw(st.sampled_from(("both", "both", "out", "lse"))),
    )


def _examples(backend: Backend, share: float = 1.0) -> settings:
    count = max(4, math.ceil(EXAMPLES[backend.interpreted] * share))
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


def _longest(backend: Backend) -> int:
    return 40 if backend.interpreted else 90


def _dtypes(backend: Backend) -> st.SearchStrategy[torch.dtype]:
    """Triton's interpreter computes bfloat16 wrongly."""
    return st.sampled_from([dtype for dtype in DTYPES if not (backend.interpreted and dtype == torch.bfloat16)])


each_backend = pytest.mark.parametrize("backend", BACKENDS)
seeds = st.integers(0, 2**16)


@pytest.mark.parametrize("backend", (*BACKENDS, *FUSED))
def test_any_call_is_within_the_error_budget(backend: Backend) -> None:
    @_examples(backend, 0.4 if backend.backward == "fused" else 1.0)
    @given(case=cases(_longest(backend), 48), dtype=_dtypes(backend), seed=seeds)
    def answers(case: Case, dtype: torch.dtype, seed: int) -> None:
        call = make_call(case, dtype, backend.device, seed)
        check(run(call, backend.name), call)

    answers()


@each_backend
def test_any_mask_at_all(backend: Backend) -> None:
    """Masks bit by bit rather than by name, so that hypothesis finds the rare shape of a tile."""

    @st.composite
    def masked(draw: st.DrawFn) -> tuple[Case, torch.Tensor]:
        b, h, i, j = (draw(st.integers(1, n)) for n in (2, 2, 36, 36))
        shape = tuple(draw(st.sampled_from((1, n))) for n in (b, h, i, j))
        causal = draw(st.booleans())
        # Long runs, as masks have them: hypothesis draws where each run ends.
        bits = torch.empty(math.prod(shape), dtype=torch.bool)
        at, value = 0, draw(st.booleans())
        while at < bits.numel():
            length = draw(st.integers(1, bits.numel()))
            bits[at : at + length] = value
            at, value = at + length, not value
        return Case("drawn", batch=b, heads=h, queries=i, keys=j, d=4, causal=causal), bits.view(shape)

    @_examples(backend, 0.5)
    @given(drawn=masked(), seed=seeds)
    def answers(drawn: tuple[Case, torch.Tensor], seed: int) -> None:
        case, mask = drawn
        call = make_call(case, torch.float32, backend.device, seed).with_(mask=mask.to(backend.device))
        check(run(call, backend.name), call)

    answers()


def _without_mask(call: Call) -> Call:
    return call.with_(mask=torch.ones(call.q.shape[0], call.k.shape[-2], dtype=torch.bool, device=call.q.device))


@each_backend
def test_the_order_of_keys_does_not_matter(backend: Backend) -> None:
    """Without causal, permuting keys, values and mask permutes dk and dv and leaves the rest within the budget."""

    @_examples(backend, 0.3)
    @given(
        keys=st.integers(1, _longest(backend)),
        mask=st.sampled_from(("none", "holes", "bh1j", "bhij", "pad_left")),
        seed=seeds,
    )
    def permuted(keys: int, mask: str, seed: int) -> None:
        call = make_call(Case("x", queries=20, keys=keys, d=8, mask=mask), torch.float32, backend.device, seed)
        order = torch.randperm(keys).to(backend.device)
        back = order.argsort()
        answer = run(
            call.with_(
                k=call.k[..., order, :],
                v=call.v[..., order, :],
                mask=None if call.mask is None else call.mask[..., order],
            ),
            backend.name,
        )
        restored = type(answer)(answer.out, answer.lse, answer.dq, answer.dk[..., back, :], answer.dv[..., back, :])
        check(restored, call)

    permuted()


@each_backend
def test_batches_do_not_see_each_other(backend: Backend) -> None:
    """What one batch holds changes no bit of what comes out of another. With NaN the einsum path takes guarded products
    for the whole call, which may round otherwise."""

    @_examples(backend, 0.3)
    @given(case=cases(_longest(backend), 16), seed=seeds, held=st.sampled_from((3.0, torch.nan)))
    def independent(case: Case, seed: int, held: float) -> None:
        assume(case.batch > 1)
        assume(case.layout != "broadcast_batch")
        call = make_call(case, torch.float32, backend.device, seed)
        changed = {name: getattr(call, name).clone() for name in "qkv"}
        for tensor in changed.values():
            tensor[-1] = held
        layout = {name: LAYOUTS[case.layout](tensor) for name, tensor in changed.items()}
        same_strides = {name: LAYOUTS[case.layout](getattr(call, name).clone()) for name in "qkv"}
        before, after = (run(call.with_(**tensors), backend.name) for tensors in (same_strides, layout))

        def others(answer):
            fields = (answer.out, answer.lse, answer.dq, answer.dk, answer.dv)
            return type(answer)(*(x[:-1] for x in fields))

        if backend.name == "math" and math.isnan(held):
            torch.testing.assert_close(vars(others(after)), vars(others(before)), rtol=1e-5, atol=1e-6)
        else:
            assert_same_bits(others(before), others(after))

    independent()


@each_backend
def test_padding_to_a_longer_length_changes_nothing(backend: Backend) -> None:
    """Keys beside the ones that count, full of NaN and masked away: the answer is that of the unpadded call."""

    @_examples(backend, 0.4)
    @given(
        keys=st.integers(1, _longest(backend)),
        left=st.integers(0, 40),
        right=st.integers(0, 40),
        causal=st.booleans(),
        dtype=_dtypes(backend),
        seed=seeds,
    )
    def padded(keys: int, left: int, right: int, causal: bool, dtype: torch.dtype, seed: int) -> None:
        # Causal counts from the last key: padding on the right would move the diagonal.
        right = 0 if causal else right
        case = Case("x", queries=min(keys, 30), keys=keys, d=8, causal=causal)
        call = make_call(case, dtype, backend.device, seed)

        def pad(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(x, (0, 0, left, right), value=torch.nan)

        mask = torch.zeros(case.batch, left + keys + right, dtype=torch.bool, device=backend.device)
        mask[:, left : left + keys] = True
        answer = run(call.with_(k=pad(call.k), v=pad(call.v), mask=mask), backend.name)
        middle = slice(left, left + keys)
        for gradient in (answer.dk, answer.dv):
            assert not gradient[:, :, :left].any()
            assert not gradient[:, :, left + keys :].any()
        cut = type(answer)(answer.out, answer.lse, answer.dq, answer.dk[:, :, middle], answer.dv[:, :, middle])
        check(cut, call)

    padded()


@each_backend
def test_a_mask_that_hides_nothing_is_no_mask(backend: Backend) -> None:
    @_examples(backend, 0.3)
    @given(case=cases(_longest(backend), 16), seed=seeds)
    def shown(case: Case, seed: int) -> None:
        call = make_call(case, torch.float32, backend.device, seed).with_(mask=None)
        answer = run(_without_mask(call), backend.name)
        check(answer, call)

    shown()
