"""What is padded stays out: NaN and Inf in keys that nobody sees, and in memory that nobody wrote, change no bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends import BACKENDS, CHOOSY, EFFICIENT, FUSED, Backend, call_for, skip_unless_interpretable, skip_unless_quick
from flash_attend.testing.calls import Call, Case, assert_same_bits, check, make_call, run, truth_of
from flash_attend.testing.oracle import Answer, visible_pairs

GARBAGE = (torch.nan, torch.inf, -torch.inf)

# Every one of these masks hides some keys from every query of every head that reads them.
HIDING = (
    Case("pad_right", mask="pad_right"),
    Case("pad_left", mask="pad_left"),
    Case("holes", mask="holes"),
    Case("holes_many_tiles", mask="holes", heads=1, queries=30, keys=150),
    Case("dead_batch", mask="dead_batch"),
    Case("all_hidden", mask="all_hidden"),
    Case("pad_right_causal", mask="pad_right", causal=True),
    Case("pad_left_causal", mask="pad_left", causal=True, queries=43),
    Case("holes_causal_more_queries", mask="holes", causal=True, queries=70),
    Case("1h1j_gqa", mask="1h1j", heads=4, kv_heads=2),
    Case("bh1j_gqa_causal", mask="bh1j", heads=4, kv_heads=2, causal=True),
    Case("bh1j_mqa_3d", mask="bh1j", heads=3, kv_heads=0),
    Case("key_expanded", mask="key_expanded"),
    Case("holes_dropout", mask="holes", dropout_p=0.3),
    Case("holes_d40_dv80", mask="holes", d=40, dv=80),
)

DENSE = (
    Case("dense"),
    Case("dense_causal", causal=True, queries=43),
    Case("dense_gqa", heads=4, kv_heads=2),
    Case("dense_many_tiles_causal", heads=1, queries=90, keys=90, causal=True),
)

# The fused backward multiplies with k, where keys are hidden from all heads, from one of a group, and pair by pair.
FUSED_HIDING = (
    Case("holes", batch=1, heads=1, mask="holes", scale=-0.3),
    Case("bh1j_gqa_causal", batch=1, heads=2, kv_heads=1, mask="bh1j", causal=True),
)
FUSED_DENSE = Case("dense_gqa", batch=1, heads=2, kv_heads=1)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _hidden_keys(call: Call) -> Tensor:
    """`(b, hk, j)`: the keys that no query of any head in the group sees."""
    b, h, i, _ = call.q.shape
    j = call.k.shape[-2]
    kv_heads = call.k.shape[1] if call.k.ndim == 4 else 1
    pairs = visible_pairs(b, h, i, j, call.mask, call.causal, call.q.device)
    return ~pairs.view(b, kv_heads, h // kv_heads, i, j).any(dim=3).any(dim=2)


def _fill(x: Tensor, where: Tensor, value: float | None) -> Tensor:
    """Writes `value` where asked; None writes a mixture of NaN, Inf, -Inf and 0, element by element."""
    if value is None:
        mixture = torch.tensor([*GARBAGE, 0.0], dtype=x.dtype, device=x.device)
        return torch.where(where, mixture[torch.arange(x.numel(), device=x.device).view(x.shape) % 4], x)
    return x.masked_fill(where, value)


def _kinds_of_garbage(backend: Backend) -> tuple[float | None, ...]:
    """Each kind by itself and all of them mixed; the mixture alone where a run takes long."""
    return (None,) if backend.interpreted else (*GARBAGE, None)


def _with_keys(call: Call, hidden: Tensor, value: float | None) -> Call:
    where = (hidden if call.k.ndim == 4 else hidden[:, 0]).unsqueeze(-1)
    return call.with_(k=_fill(call.k, where, value), v=_fill(call.v, where, value))


def _dense_with_hidden_keys(case: Case, dtype: torch.dtype, device: str) -> Call:
    call = make_call(case, dtype, device)
    b, h, i, j = *call.q.shape[:3], call.k.shape[2]
    mask = torch.rand(b, h, i, j) < 0.6
    mask[..., 5:9] = False  # four keys in the middle, hidden from all
    mask[0, :, :, j // 2 :] = False  # and in one batch the second half
    return call.with_(mask=mask.to(device))


def _assert_garbage_stays_out(backend: Backend, call: Call) -> None:
    hidden = _hidden_keys(call)
    assert hidden.any()
    clean_call = _with_keys(call, hidden, 0.0)
    clean = run(clean_call, backend.name)
    check(clean, clean_call)
    for value in _kinds_of_garbage(backend):
        _assert_unchanged(backend, run(_with_keys(call, hidden, value), backend.name), clean, clean_call)


def _assert_unchanged(backend: Backend, answer: Answer, clean: Answer, clean_call: Call) -> None:
    """Fails if a bit has changed; where a gradient is summed up in any order, if it is wrong."""
    if backend.backward == "fused":
        check(answer, clean_call)
        answer, clean = replace(answer, dq=None), replace(clean, dq=None)
    assert_same_bits(answer, clean)


@pytest.mark.parametrize("backend", (*BACKENDS, *CHOOSY[:2], *EFFICIENT))
@pytest.mark.parametrize("case", HIDING, ids=str)
def test_garbage_in_keys_that_a_key_mask_hides(backend: Backend, case: Case) -> None:
    _assert_garbage_stays_out(backend, call_for(backend, case, backend.dtype))


@each_backend
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_garbage_in_keys_that_a_dense_mask_hides_from_every_query(backend: Backend, case: Case) -> None:
    _assert_garbage_stays_out(backend, _dense_with_hidden_keys(case, torch.float32, backend.device))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("case", (*FUSED_HIDING, FUSED_DENSE), ids=str)
def test_garbage_stays_out_of_the_fused_backward(backend: Backend, case: Case) -> None:
    make = _dense_with_hidden_keys if case is FUSED_DENSE else make_call
    _assert_garbage_stays_out(backend, make(case, torch.float32, backend.device))


@each_backend
@each_dtype
@pytest.mark.parametrize("case", (HIDING[3], HIDING[6], HIDING[10]), ids=str)
def test_garbage_in_every_dtype(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    skip_unless_interpretable(backend, dtype)
    _assert_garbage_stays_out(backend, make_call(case, dtype, backend.device))


@each_backend
def test_garbage_in_keys_that_causal_and_a_dense_mask_hide_together(backend: Backend) -> None:
    """Neither hides the last keys alone: the mask shows them to early queries only, and causal to late ones only."""
    call = make_call(Case("both", queries=40, keys=40, causal=True), torch.float32, backend.device)
    mask = torch.ones(40, 40, dtype=torch.bool)
    mask[25:, 25:] = False
    call = call.with_(mask=mask[None, None].to(backend.device))
    assert _hidden_keys(call)[..., 25:].all()
    _assert_garbage_stays_out(backend, call)


DEAD_ROWS = (
    Case("causal_more_queries", causal=True, queries=70, keys=30),
    Case("dead_batch", mask="dead_batch"),
    Case("pad_left_causal", mask="pad_left", causal=True, queries=50, keys=50),
    Case("rows_off", mask="bhi1"),
    Case("rows_off_gqa", mask="bhi1", heads=4, kv_heads=2, causal=True, queries=43),
    Case("dense", mask="bhij"),
    Case("dense_dropout", mask="bhij", dropout_p=0.4),
)


@each_backend
@pytest.mark.parametrize("case", DEAD_ROWS, ids=str)
def test_dead_rows_take_no_part(backend: Backend, case: Case) -> None:
    """NaN and Inf in the queries that see nothing, and in the gradients that come down to them, change no bit."""
    _assert_dead_rows_take_no_part(backend, case)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mask", ("none", "bhi1"))
def test_dead_rows_take_no_part_in_the_fused_backward(backend: Backend, mask: str) -> None:
    case = Case("dead", batch=1, heads=2, kv_heads=1, mask=mask, causal=True, queries=50, keys=30)
    _assert_dead_rows_take_no_part(backend, case)


def _assert_dead_rows_take_no_part(backend: Backend, case: Case) -> None:
    call = make_call(case, torch.float32, backend.device)
    b, h, i, _ = call.q.shape
    dead = ~visible_pairs(b, h, i, call.k.shape[-2], call.mask, call.causal, call.q.device).any(dim=3)
    assert dead.any()
    assert not dead.all()

    def with_rows(value: float | None) -> Call:
        rows = dead.unsqueeze(3)
        q, grad_out = (_fill(x, rows, value) for x in (call.q, call.grad_out))
        return call.with_(q=q, grad_out=grad_out, grad_lse=_fill(call.grad_lse, dead, value))

    clean = run(with_rows(0.0), backend.name)
    check(clean, with_rows(0.0))
    assert (clean.dq[dead] == 0).all()
    for value in _kinds_of_garbage(backend):
        _assert_unchanged(backend, run(with_rows(value), backend.name), clean, with_rows(0.0))


@each_backend
@each_dtype
def test_dead_rows_and_hidden_keys_full_of_nan_at_once(backend: Backend, dtype: torch.dtype) -> None:
    skip_unless_interpretable(backend, dtype)
    call = make_call(
        Case("x", mask="pad_left", causal=True, queries=60, keys=60, heads=4, kv_heads=2), dtype, backend.device
    )
    hidden = _hidden_keys(call)
    dead = ~visible_pairs(2, 4, 60, 60, call.mask, True, call.q.device).any(dim=3)

    def filled(value: float) -> Call:
        rows = dead.unsqueeze(3)
        filled = _with_keys(call, hidden, value)
        return filled.with_(
            q=_fill(call.q, rows, value),
            grad_out=_fill(call.grad_out, rows, value),
            grad_lse=_fill(call.grad_lse, dead, value),
        )

    assert_same_bits(run(filled(torch.nan), backend.name), run(filled(0.0), backend.name))


@each_backend
def test_garbage_that_somebody_sees_is_seen(backend: Backend) -> None:
    """The contract keeps padding out, and nothing else: a NaN in a visible value has to come out."""
    call = make_call(Case("x", mask="pad_right"), torch.float32, backend.device)
    v = call.v.clone()
    v[0, 0, 3, 5] = torch.nan
    answer = run(call.with_(v=v), backend.name)
    assert answer.out[0, 0, :, 5].isnan().all()
    assert not answer.out[0, 1].isnan().any()
    assert not answer.out[1].isnan().any()


# ---------------------------------------------------------------------------------------------------------------------
# Unwritten memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory that `torch.empty` and its relatives hand out is full of NaN (integers: of a large number).

    Returns a list that grows by one for every allocation, so that a test can tell that there were some.
    """
    allocations: list[int] = []

    def poisoning(allocate):
        def wrapped(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            allocations.append(tensor.numel())
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype == torch.bool:
                tensor.fill_(True)
            else:
                tensor.fill_(torch.iinfo(tensor.dtype).max // 3)
            return tensor

        return wrapped

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
    return allocations


POISONED = (
    Case("no_mask"),
    Case("causal_more_queries", causal=True, queries=70, keys=30),
    Case("pad_left_causal", mask="pad_left", causal=True, queries=50, keys=50),
    Case("holes_gqa", mask="holes", heads=4, kv_heads=2, causal=True),
    Case("dead_batch", mask="dead_batch"),
    Case("all_hidden", mask="all_hidden"),
    Case("dense", mask="bhij", d=24, dv=40),
    Case("dense_staircase", mask="staircase", heads=1, queries=90, keys=90),
    Case("rows_off", mask="bhi1", heads=4, kv_heads=2),
    Case("no_keys", keys=0),
    Case("no_queries", queries=0),
    Case("dropout", dropout_p=0.3, mask="pad_right"),
    Case("only_lse", grads="lse", causal=True, queries=60, keys=30),
    Case("mqa_3d_strided", kv_heads=0, heads=3, layout="interleaved", mask="b11j", d=20, dv=7),
)


@each_backend
@each_dtype
@pytest.mark.parametrize("case", POISONED, ids=str)
def test_poisoned_allocations(backend: Backend, case: Case, dtype: torch.dtype, poisoned: list[int]) -> None:
    skip_unless_quick(backend, dtype)
    call = make_call(case, dtype, backend.device)
    truth = truth_of(call)
    poisoned.clear()
    answer = run(call, backend.name)
    assert poisoned or backend.name == "math"  # the einsum path allocates inside torch's operators
    check(answer, call, truth)
