"""What is kept of a call: looked up by all that it depends on, forgotten when that changes, and no tensor in it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attend import flash_attention, functional, plans
from flash_attend.checks import Sizes, facts_of, layouts_of, normalise_inputs
from flash_attend.dispatch import override_backward
from flash_attend.evidence import Store, read_anew
from flash_attend.generation import renew
from flash_attend.operands import Layouts, Operands
from flash_attend.plans import CallPlan, plan_call, recorded_calls
from flash_attend.spec import CALLS_KEPT

Q, K = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 5, 8)
MASK = torch.rand(2, 5) < 0.7


def plan(q: Tensor = Q, k: Tensor = K, v: Tensor = K, mask: Tensor | None = None, **options) -> CallPlan:
    others = [options.pop(name, None) for name in ("bias", "alibi_slopes", "sinks")]
    usual = dict(causal=False, scale=None, dropout_p=0.0, deterministic=None, backend="auto")
    return plan_call(Operands(q, k, v, mask, None, *others), **{**usual, **options})


# ---------------------------------------------------------------------------------------------------------------------
# What it depends on
# ---------------------------------------------------------------------------------------------------------------------

CHANGES = {
    "q": dict(q=Q[:, :, :3]),
    "strides of q": dict(q=Q.transpose(1, 2).contiguous().transpose(1, 2)),
    "strides of k": dict(k=torch.randn(2, 2, 8, 5).mT),
    "rank of k and v": dict(k=K[:, 0], v=K[:, 0]),
    "v": dict(v=torch.randn(2, 2, 5, 16)),
    "dtype": dict(q=Q.double(), k=K.double(), v=K.double()),
    "device": dict(q=Q.to("meta"), k=K.to("meta"), v=K.to("meta")),
    "gradients": dict(q=Q.clone().requires_grad_()),
    "mask": dict(mask=MASK),
    "bias": dict(bias=torch.randn(4, 6, 5)),
    "strides of the bias": dict(bias=torch.randn(4, 5, 6).mT),
    "bias of one head": dict(bias=torch.randn(6, 5)),
    "a bias's gradient": dict(bias=torch.randn(4, 6, 5, requires_grad=True)),
    "slopes": dict(alibi_slopes=torch.rand(4)),
    "sinks": dict(sinks=torch.rand(4)),
    "window": dict(window=(2, 1)),
    "softcap": dict(softcap=2.0),
    "causal": dict(causal=True),
    "scale": dict(scale=1.0),
    "dropout": dict(dropout_p=0.5),
    "deterministic": dict(deterministic=True),
    "backend": dict(backend="math"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_is_for_one_kind_of_call(change: str) -> None:
    other = plan(**CHANGES[change])
    assert other is not plan()
    assert other is plan(**CHANGES[change])
    assert plan() is plan(q=Q.clone(), k=K.clone(), v=K.clone())


@contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def tf32():
    outer, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = outer


SETTINGS = {"deterministic": deterministic_algorithms, "tf32": tf32, "backward": lambda: override_backward("fused")}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_plan_is_for_what_torch_is_set_to(setting: str) -> None:
    before = plan()
    with SETTINGS[setting]():
        assert plan() is not before
    assert plan().spec == before.spec


def test_gradients_that_nobody_records_need_no_plan() -> None:
    leaf = Q.clone().requires_grad_()
    assert plan(q=leaf).differentiated
    with torch.no_grad():
        assert plan(q=leaf) is plan()


WRONG = {
    "causal": dict(causal=1),
    "scale": dict(scale=True),
    "dropout_p": dict(dropout_p=False),
    "deterministic": dict(deterministic=0),
    "return_lse": dict(return_lse=0),
    "q": dict(q=Q.to_sparse()),
    "k": dict(k=torch.nested.nested_tensor([*K])),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_equals_a_right_argument_is_no_right_argument(name: str) -> None:
    right = dict(causal=True, scale=1.0, dropout_p=0.0, deterministic=False, return_lse=False)
    given = dict(q=Q, k=K, v=K)
    flash_attention(*given.values(), **right)
    wrong = {**given, **right, **WRONG[name]}
    with pytest.raises(TypeError, match=f"^{name} must be"):
        flash_attention(wrong.pop("q"), wrong.pop("k"), wrong.pop("v"), **wrong)


# ---------------------------------------------------------------------------------------------------------------------
# What is found again without a look
# ---------------------------------------------------------------------------------------------------------------------

OF_SCORES = {
    "bias",
    "strides of the bias",
    "bias of one head",
    "a bias's gradient",
    "slopes",
    "sinks",
    "window",
    "softcap",
}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is looked at tensor by tensor, and option by option."""
    seen: list[object] = []
    monkeypatch.setattr(
        functional, "plan_call", lambda *given, **named: seen.append(given) or plan_call(*given, **named)
    )
    renew()
    return seen


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in OF_SCORES])
def test_calls_of_a_kind_are_looked_at_once(change: str, looks: list[object]) -> None:
    usual, other = dict(q=Q, k=K, v=K.clone()), {**dict(q=Q, k=K, v=K.clone()), **CHANGES[change]}
    other["v"] = other["v"].clone()  # no tensor comes twice
    for calls, given in enumerate((usual, other, other, usual, other)):
        flash_attention(given["q"], given["k"], given["v"], **{k: v for k, v in given.items() if k not in "qkv"})
        assert len(looks) == min(calls + 1, 2)


@pytest.mark.parametrize("setting", SETTINGS)
def test_calls_are_looked_at_again_where_torch_is_set_otherwise(setting: str, looks: list[object]) -> None:
    given = Q, K, K.clone()
    flash_attention(*given)
    with SETTINGS[setting]():
        flash_attention(*given)
    assert len(looks) == 2


def test_whoever_takes_part_is_seen_though_the_call_was_made_before(looks: list[object]) -> None:
    q, k, v = Q.clone().requires_grad_(), K, K.clone()
    plain = flash_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attention(q, k, v).dtype == torch.bfloat16
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        assert forward_ad.unpack_dual(flash_attention(dual, k, v)).tangent is not None
    mapped = torch.vmap(lambda x: flash_attention(x, k, v))(q[None])
    torch.testing.assert_close(mapped[0], plain)
    torch.testing.assert_close(flash_attention(torch._neg_view(-q), k, v), plain)
    with torch.no_grad():
        assert not flash_attention(q, k, v).requires_grad
    assert flash_attention(q, k, v).requires_grad


def test_backwards_that_were_run_before_are_still_differentiable() -> None:
    q, k, v = (x.double().requires_grad_() for x in (Q, K, K.clone()))
    for again in (False, True, False):
        out = flash_attention(q, k, v, mask=MASK)
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=again)
        assert grad.requires_grad == again
        if again:
            torch.autograd.grad(grad.square().sum(), (q, k, v))
    batched = torch.autograd.grad(
        flash_attention(q, k, v), q, torch.ones(3, *Q.shape, dtype=q.dtype), is_grads_batched=True
    )
    assert batched[0].shape == (3, *Q.shape)


def test_a_wrong_call_leaves_nothing() -> None:
    kept = plans._work_out.cache_info().currsize
    for _ in range(2):
        with pytest.raises(ValueError, match="must be equally long"):
            flash_attention(Q, K, K[:, :, 1:])
    assert plans._work_out.cache_info().currsize == kept


class Seen(TorchDispatchMode):
    """The operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_who_takes_part_is_asked_at_every_call() -> None:
    """A plan that is there does not hide a call from autocast, from a mode, from a transform or from a tracer."""
    plain = flash_attention(Q, K, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attention(Q, K, K).dtype == torch.bfloat16
    with Seen() as seen:
        flash_attention(Q, K, K)
    assert seen.names
    mapped = torch.vmap(lambda q: flash_attention(q, K, K))(torch.stack([Q, Q]))
    torch.testing.assert_close(mapped, torch.stack([plain, plain]))
    with pytest.raises(RuntimeError, match="cannot record"):
        torch.jit.trace(lambda q: flash_attention(q, K, K), Q, check_trace=False)
    assert flash_attention(Q, K, K).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# When it no longer holds
# ---------------------------------------------------------------------------------------------------------------------

REASONS: dict[str, Callable[[], object]] = {
    "renewed": renew,
    "evidence": lambda: Store.of(Q.device).forget("none"),
    "tuning": read_anew,
}


@pytest.mark.parametrize("reason", REASONS)
def test_plans_end_together(reason: str) -> None:
    before = plan(), plan(causal=True)
    REASONS[reason]()
    assert plan() is not before[0]
    assert plan(causal=True) is not before[1]


def test_what_was_worked_out_meanwhile_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may change what a plan goes by while it is made."""
    choose = plans.choose
    renew()
    monkeypatch.setattr(plans, "choose", lambda *given, **named: (renew(), choose(*given, **named))[1])
    stale = plan()
    monkeypatch.undo()
    assert plan() is not stale


def test_tiles_are_overridden_within_their_context() -> None:
    configs = pytest.importorskip("flash_attend.kernels.configs")
    tile = configs.Tile(16, 16, 4, 1)
    before = plan()
    with configs.override(configs.Tiles(tile, tile, tile)):
        within = plan()
        assert within is not before
    assert plan() is not within


def test_calls_are_recorded_though_they_have_plans() -> None:
    flash_attention(Q, K, K)
    with recorded_calls() as found:
        flash_attention(Q, K, K)
        flash_attention(Q, K, K)
    assert [spec.queries for spec, *_ in found] == [6]


# ---------------------------------------------------------------------------------------------------------------------
# What it holds
# ---------------------------------------------------------------------------------------------------------------------


def test_no_tensor_is_held() -> None:
    tensors = [torch.randn(1, 2, 7, 8, requires_grad=True) for _ in range(3)]
    mask = torch.ones(1, 7, dtype=torch.bool)
    out = flash_attention(*tensors, mask=mask, dropout_p=0.5)
    out.sum().backward()
    held = [weakref.ref(tensor) for tensor in (*tensors, mask, out)]
    del tensors, mask, out
    gc.collect()
    assert [ref() for ref in held] == [None] * 5


def test_so_many_are_kept() -> None:
    assert plans._work_out.cache_info().maxsize == CALLS_KEPT


def test_threads_share_plans() -> None:
    """Many at once, while what they go by changes: each answer is that of its own call."""
    inputs = [torch.randn(1, 2, 3 + n % 5, 8) for n in range(40)]
    expected = [flash_attention(x, x, x, causal=True) for x in inputs]

    def answer(x: Tensor) -> Tensor:
        renew()
        return flash_attention(x, x, x, causal=True)

    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(answer, inputs), expected, strict=True):
            assert torch.equal(found, wanted)


LAYOUTS = {
    "plain": dict(),
    "one head": dict(k=K[:, 0], v=K[:, 1]),
    "strided": dict(q=Q.mT.contiguous().mT, k=K[..., ::2].repeat_interleave(2, -1)),
    "key mask": dict(mask=MASK),
    "broadcast keys": dict(mask=torch.ones(2, 1, 6, 1, dtype=torch.bool)),
    "expanded": dict(mask=torch.ones(1, 1, 6, 5, dtype=torch.bool).expand(2, 4, 6, 5)),
    "dense": dict(mask=torch.ones(2, 4, 6, 5, dtype=torch.bool)),
    "no heads": dict(q=Q[:, :0]),
    "bias": dict(bias=torch.randn(4, 6, 5)),
    "bias of keys": dict(bias=torch.randn(2, 1, 1, 5)),
    "expanded bias": dict(bias=torch.randn(1, 4, 6, 1).expand(2, 4, 6, 5)),
    "slopes and sinks": dict(alibi_slopes=torch.rand(4), sinks=torch.rand(8)[::2]),
    "slopes of entries": dict(alibi_slopes=torch.rand(4, 2).t()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_those_of_the_operands(name: str) -> None:
    given = {**dict(q=Q, k=K, v=K, mask=None), **LAYOUTS[name]}
    operands, spec = normalise_inputs(**given)
    sizes = Sizes() if operands.mask is None else Sizes(tuple(operands.mask.shape[:3]))
    found, real = layouts_of(facts_of(Operands(**given)), spec, sizes), Layouts.of(operands)
    assert found.mask_sizes == real.mask_sizes
    assert found.dtypes == real.dtypes
    for ours, theirs, tensor in zip(
        (*found[:3], *found[4:8]), (*real[:3], *real[4:8]), (*operands[:4], *operands[5:8]), strict=True
    ):  # a stride that is never used may be any
        if tensor is not None:
            used = [size > 1 for size in tensor.shape]
            assert [s for s, use in zip(ours, used, strict=True) if use] == [
                s for s, use in zip(theirs, used, strict=True) if use
            ]
