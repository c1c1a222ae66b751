"""What torch's own kernel on a CPU does not do by itself, beyond what every backend is tested for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attend import flash_attention, parts, sdpa
from flash_attend.checks import normalise_inputs
from flash_attend.generation import renew
from flash_attend.testing.calls import Call, Case, check, make_call, run
from flash_attend.testing.oracle import Answer

SMALL = Case("small", heads=4, kv_heads=2, queries=40, keys=50, d=16, grads="out")
MASKS = ("none", "pad_left", "holes", "b1ij")

each_mask = pytest.mark.parametrize("mask", MASKS)
causal_or_not = pytest.mark.parametrize("causal", (False, True))


@pytest.fixture
def as_if_long(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it calls of some ten keys are split as those of thousands are."""

    def forget() -> None:
        parts._without_mask.cache_clear()
        renew()

    with monkeypatch.context() as patch:
        patch.setattr(parts, "ONE_CALL", 0)
        patch.setattr(parts, "ROWS", 16)
        forget()
        yield
    forget()


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("mask", (*MASKS, "pad_right"))
@causal_or_not
@pytest.mark.parametrize(("queries", "keys"), ((60, 60), (40, 50), (50, 40)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_long_calls(as_if_long: None, mask: str, causal: bool, queries: int, keys: int, dtype: torch.dtype) -> None:
    """Entries are computed apart, and visible keys are gathered."""
    case = replace(SMALL, mask=mask, causal=causal, queries=queries, keys=keys, batch=3)
    call = make_call(case, dtype, "cpu")
    check(run(call, "sdpa"), call)


HALVES = (torch.bfloat16, torch.float16)


def without_lse(call: Call) -> Answer:
    """What comes of a call of which no gradient is asked for and no LSE."""
    with torch.no_grad():
        out = flash_attention(call.q, call.k, call.v, **call.options, backend="sdpa")
    return Answer(out, None, None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", (*MASKS, "pad_right"))
@causal_or_not
@pytest.mark.parametrize(("queries", "keys"), ((60, 60), (40, 50), (50, 40)))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("long", (False, True), ids=("small", "long"))
def test_half_precision_of_which_nobody_reads_the_lse(
    mask: str, causal: bool, queries: int, keys: int, dtype: torch.dtype, long: bool, request: pytest.FixtureRequest
) -> None:
    """It goes to torch's kernel as it is."""
    if long:
        request.getfixturevalue("as_if_long")
    case = replace(SMALL, mask=mask, causal=causal, queries=queries, keys=keys, batch=3)
    call = make_call(case, dtype, "cpu")
    check(without_lse(call), call)
    if call.mask is not None and call.mask.ndim == 2:
        hidden = ~call.mask[:, None, :, None]
        check(
            without_lse(call.with_(k=call.k.masked_fill(hidden, torch.nan), v=call.v.masked_fill(hidden, torch.inf))),
            call,
        )


def test_half_precision_is_not_copied_where_nobody_reads_the_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes, kernel = [], sdpa.FORWARD

    def spy(q: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        dtypes.append(q.dtype)
        return kernel(q, *rest, **options)

    monkeypatch.setattr(sdpa, "FORWARD", spy)
    q = torch.randn(2, 4, 60, 16, dtype=torch.float16)
    flash_attention(q, q, q, backend="sdpa")
    flash_attention(q.requires_grad_(), q, q, backend="sdpa")
    flash_attention(q.detach(), q, q, backend="sdpa", return_lse=True)
    exact = torch.float16 if sdpa._multiplies(torch.float16) else torch.float32
    assert dtypes == [torch.float16, exact, exact]

    q = torch.randn(2, 4, 60, 16, dtype=torch.float16)
    with monkeypatch.context() as patch:  # worked out once, and then called with nothing in between
        patch.setattr(sdpa, "_attend", lambda *_, **__: pytest.fail("it was not planned"))
        renew()
        flash_attention(q, q, q, backend="sdpa")
    renew()


def test_how_long_calls_are_split(as_if_long: None) -> None:
    q, holes = torch.zeros(3, 2, 60, 16), (torch.arange(60) % 3 > 0).repeat(3, 1)
    padded = torch.arange(60) < torch.tensor([[20], [40], [40]])
    several = holes.clone()
    several[1] = False

    def found(mask: Tensor | None, causal: bool = False) -> list[tuple]:
        operands, spec = normalise_inputs(q, q, q, mask=mask, causal=causal)
        return [(group.entries, len(group.parts), group.picked) for group in parts.split(operands.mask, spec)]

    assert found(None) == found(torch.ones(3, 60, dtype=torch.bool)) == [((0, 3), 1, None)]
    assert found(None, causal=True) == [((0, 3), 1, None)]
    assert found(padded) == [((0, 1), 1, None), ((1, 3), 1, None)]
    ((entries, calls, picked),) = found(holes)
    assert (entries, calls, picked.tolist()) == ((0, 3), 1, holes[0].nonzero().flatten().tolist())
    assert [entries for entries, *_ in found(several)] == [(0, 1), (2, 3)]


def documents(*lengths: list[int], dead: int = 0) -> Tensor:
    """The mask of documents one after another in each entry, whose last queries see nothing: `(b, 1, n, n)`."""
    found = [torch.block_diag(*[torch.ones(n, n, dtype=torch.bool) for n in entry]) for entry in lengths]
    mask = torch.stack(found)[:, None]
    mask[:, :, mask.shape[2] - dead :] = False
    return mask


@pytest.mark.parametrize("options", ({}, dict(causal=True), dict(window=(30, 20))), ids=str)
@pytest.mark.parametrize("dead", (0, 20))
@pytest.mark.parametrize("one_call", (0, 2**12, parts.ONE_CALL), ids=("cut", "joined", "whole"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_documents(
    options: dict[str, Any], dead: int, one_call: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no query of a document may see is garbage in one of them."""
    monkeypatch.setattr(parts, "ONE_CALL", one_call)
    case = replace(SMALL, queries=160, keys=160, batch=3)
    call = make_call(case, dtype, "cpu")
    for mask in (documents([50, 3, 87, 20], [1, 159], [160], dead=dead), documents([70, 60, 30], dead=dead)):
        whole = call.with_(mask=mask.expand(-1, 1, 160, 160), **options)
        check(run(whole, "sdpa"), whole)


def test_documents_are_computed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the ranges that their queries see; short ones together, and what changes with each query by runs of them."""
    monkeypatch.setattr(parts, "ONE_CALL", 2**13)
    q = torch.zeros(2, 2, 160, 16)

    def found(mask: Tensor, **options: Any) -> list[tuple]:
        operands, spec = normalise_inputs(q, q, q, mask=mask, **options)
        return [(group.entries, [tuple(part) for part in group.parts]) for group in parts.split(operands.mask, spec)]

    alike, first, second = (0, 2), ((0, 90), (0, 90), False, False), ((90, 160), (90, 160), False, False)
    assert found(documents([90, 70])) == found(documents([90, 70], [90, 70])) == [(alike, [first, second])]
    assert found(documents([90, 70], dead=10)) == [(alike, [first, ((90, 150), (90, 160), False, False)])]
    apart = [((0, 1), [first, second]), ((1, 2), [((0, 160), (0, 160), False, False)])]
    assert found(documents([90, 70], [160])) == apart
    strided = documents([90, 70], [160]).mT.contiguous().mT
    assert found(strided) == found(documents([90, 70], [160])[..., :160:1].clone()) == apart
    short = ((0, 7), (0, 7), False, True), ((7, 90), (7, 90), False, False)
    assert found(documents([1, 2, 1, 3, 83, 70])) == [(alike, [*short, second])]
    assert [part[2] for part in found(documents([90, 70]), causal=True)[0][1]] == [True, True]
    assert len(found(torch.rand(2, 1, 160, 160) < 0.5)[0][1]) == 2, "runs of up to 128 queries"


@each_mask
@causal_or_not
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("scale", (1e6, 1e9, -1e9))
def test_scores_beyond_the_precision_of_their_lse(mask: str, causal: bool, dtype: torch.dtype, scale: float) -> None:
    """Their exponentials less the LSE overflow; what is merged of two parts has shares that add up to 1."""
    call = make_call(replace(SMALL, mask=mask, causal=causal), dtype, "cpu")
    call = call.with_(scale=scale if dtype == torch.float32 else scale * 1e9)
    check(run(call, "sdpa"), call)
    alike = call.with_(q=call.q.abs(), k=call.k[:, :, :1].abs().expand_as(call.k))
    check(run(alike, "sdpa"), alike)


@each_mask
@pytest.mark.parametrize("keys", (40, 50))
@pytest.mark.parametrize("scale", (1e-39, 1e-46, -1e-46, 1e-300, -5e-324))
def test_scales_that_are_0_in_the_accumulator(mask: str, keys: int, scale: float) -> None:
    """Minus infinity times such a scale is NaN."""
    case = replace(SMALL, mask=mask, causal=True, keys=keys)
    call = make_call(case, torch.float32, "cpu").with_(scale=scale)
    found, wanted = run(call, "sdpa"), run(call.with_(scale=0.0), "sdpa")
    for name in ("out", "lse", "dv"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-6, atol=1e-6)
    assert max(found.dq.abs().max(), found.dk.abs().max()) <= 1e3 * abs(scale)


@each_mask
@causal_or_not
def test_the_default_device_is_of_no_account(mask: str, causal: bool) -> None:
    call = make_call(replace(SMALL, mask=mask, causal=causal), torch.float32, "cpu")

    def found() -> tuple[Tensor, ...]:
        leaves = leaves_of(call.q, call.k, call.v)
        out = flash_attention(*leaves, **call.options, backend="sdpa")
        return out.detach(), *torch.autograd.grad(out, leaves, call.grad_out)

    wanted = found()
    with torch.device("meta"):
        got = found()
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize(
    ("shown", "causal", "read", "masked"),
    (
        ((0, 50), False, 50, False),
        ((0, 50), True, 50, False),
        ((0, 16), False, 16, False),
        ((16, 32), False, 16, False),
        ((3, 20), False, 32, True),
        ((20, 36), False, 32, True),
        ((0, 16), True, 16, True),
        ((0, 49), True, 50, True),
    ),
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_small_calls_read_what_is_shown(
    shown: tuple[int, int], causal: bool, read: int, masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And have no mask where it hides none of that; in one piece, forward and backward."""
    seen, kernel = set(), sdpa.FORWARD

    def spy(q: Tensor, k: Tensor, *rest: Any, attn_mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        seen.add((k.shape[2], attn_mask is not None))
        return kernel(q, k, *rest, attn_mask=attn_mask, **options)

    call = make_call(replace(SMALL, queries=50, causal=causal), dtype, "cpu")
    place = torch.arange(50)
    call = call.with_(mask=((place >= shown[0]) & (place < shown[1])).repeat(call.q.shape[0], 1))
    with monkeypatch.context() as patch:
        patch.setattr(sdpa, "FORWARD", spy)
        patch.setattr(sdpa, "attention_backward", lambda *_, **__: pytest.fail("it was not planned"))
        renew()
        check(run(call, "sdpa"), call)
    renew()
    assert seen == {(read, masked)}


@causal_or_not
@pytest.mark.parametrize("shown", (16, 20, 50))
def test_nan_that_comes_down_to_a_small_call(shown: int, causal: bool) -> None:
    """It is in the gradients of what its queries see, and in no others."""
    call = make_call(replace(SMALL, queries=50, causal=causal), torch.float32, "cpu")
    assert call.grad_out is not None
    call = call.with_(mask=(torch.arange(50) < shown).repeat(call.q.shape[0], 1))
    call.grad_out[0, 1, 3] = 0.0
    without = run(call, "sdpa")
    call.grad_out[0, 1, 3] = torch.nan
    found, touched = run(call, "sdpa"), torch.zeros(50, dtype=torch.bool)
    touched[: min(4 if causal else 50, shown)] = True
    for name, rows in dict(dq=torch.arange(50) == 3, dk=touched, dv=touched).items():
        grad, clean = getattr(found, name), getattr(without, name)
        nan = grad.isnan().all(dim=3)
        assert torch.equal(nan[0, 1 if name == "dq" else 0], rows) and nan.sum() == rows.sum()
        torch.testing.assert_close(grad[~nan], clean[~nan])


@pytest.mark.parametrize("queries", (50, 300))
@pytest.mark.parametrize("garbage", (3e38, torch.inf, torch.nan), ids=str)
@pytest.mark.parametrize("of", ("k", "v"))
def test_what_causality_hides_may_be_any_number(of: str, garbage: float, queries: int) -> None:
    """Also the largest, whose products with a gradient are infinite: earlier queries do not notice."""
    call = make_call(replace(SMALL, queries=queries, keys=queries, causal=True), torch.float32, "cpu")
    spoilt = getattr(call, of).clone()
    spoilt[0, 1, 40] = garbage
    found, clean = run(call.with_(**{of: spoilt}), "sdpa"), run(call, "sdpa")
    for name in ("out", "dq"):
        torch.testing.assert_close(getattr(found, name)[:, :, :40], getattr(clean, name)[:, :, :40])


@pytest.mark.parametrize("queries", (50, 300))
@pytest.mark.parametrize("mask", ("none", "pad_right", "b1ij"))
def test_one_infinite_number_that_is_hidden(mask: str, queries: int) -> None:
    """A score of -inf for whoever sees it, which no LSE tells; the gradient of q is 0 times it."""
    call = make_call(replace(SMALL, queries=queries, keys=queries, causal=True, mask=mask), torch.float32, "cpu")
    call = call.with_(q=torch.cat([call.q[..., :5], -call.q[..., 5:6].abs(), call.q[..., 6:]], dim=3))
    spoilt = call.k.clone()
    spoilt[0, 1, 40, 5] = torch.inf
    found, clean = run(call.with_(k=spoilt), "sdpa"), run(call, "sdpa")
    for name in ("out", "dq"):
        torch.testing.assert_close(getattr(found, name)[:, :, :40], getattr(clean, name)[:, :, :40])


@each_mask
@causal_or_not
def test_results_may_be_changed_in_place(mask: str, causal: bool) -> None:
    """None of them is a view, which autograd lets nobody change that a function of its gave out."""
    call = make_call(replace(SMALL, mask=mask, causal=causal, queries=150), torch.float32, "cpu")
    spoilt = call.k.clone()
    spoilt[0, 0, 30] = torch.nan
    for k in (call.k, spoilt):
        for return_lse in (False, True):
            leaves = leaves_of(call.q, k, call.v)
            found = flash_attention(*leaves, **call.options, return_lse=return_lse, backend="sdpa")
            for result in found if return_lse else (found,):
                before = result.detach().clone()
                result += 1
                torch.testing.assert_close(result, before + 1, equal_nan=True)


@each_mask
@causal_or_not
def test_hooks_may_give_saved_tensors_other_strides(mask: str, causal: bool) -> None:
    call = make_call(replace(SMALL, mask=mask, causal=causal), torch.float32, "cpu")

    def attend(*args, **options) -> tuple[Tensor, Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.mT.contiguous().mT):
            return flash_attention(*args, **options)

    check(run(call, "sdpa", attend=attend), call)


ADDED = (
    Case("bias", bias="1hij"),
    Case("bias_causal", bias="hiding", causal=True),
    Case("bias_of_keys", bias="bh1j", mask="holes"),
    Case("alibi", alibi="bh", mask="pad_left"),
    Case("alibi_holes", alibi="h", mask="holes", causal=True),
    Case("window", window=(20, 30)),
    Case("window_holes", window=(20, 30), mask="holes"),
    Case("window_holes_left", window=(20, None), mask="holes", bias="11ij", scale=-0.3),
    Case("window_padded_causal", window=(9, None), causal=True, mask="pad_left"),
    Case("window_dense", window=(20, 20), alibi="h", mask="b1ij"),
)


@pytest.mark.parametrize("one_call", (0, parts.ONE_CALL), ids=("gathered", "hidden"))
@pytest.mark.parametrize("case", ADDED, ids=str)
def test_biases_and_windows_go_by_torchs_kernel(case: Case, one_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In runs of queries, forward and backward; the gradient of a bias alone goes by the einsum path."""
    monkeypatch.setattr(parts, "ONE_CALL", one_call)
    call = make_call(replace(case, queries=200, keys=230, d=16, heads=4, kv_heads=2, grads="out"), torch.float32, "cpu")
    with monkeypatch.context() as patch:
        for name in ("attention_reference", "attention_reference_gradients"):
            patch.setattr(sdpa, name, lambda *_, **__: pytest.fail("the einsum path was taken"))
        check(run(call, "sdpa", needs="qkv"), call)
    if call.bias is not None:
        check(run(call, "sdpa"), call)
    half = make_call(replace(case, queries=200, keys=230, d=16, heads=4, kv_heads=2), torch.bfloat16, "cpu")
    check(without_lse(half), half)


def test_the_work_of_a_window_is_linear_in_it() -> None:
    def area(length: int) -> int:
        q = torch.empty(1, 1, length, 8)
        spec = normalise_inputs(q, q, q, window=(100, 50))[1]
        return sum(
            (last - first) * (end - begin)
            for group in parts.split(None, spec)
            for (first, last), (begin, end), *_ in group.parts
        )

    for length in (1024, 8192):
        assert area(length) <= length * (100 + 50 + parts.ROWS)
