"""PyTorch's attention on a GPU beyond what every backend is tested for, by what efficient_kernel.py plays of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import efficient_kernel
from efficient_kernel import PART, played
from flash_attend import efficient, evidence, explain, flash_attention
from flash_attend.check import check as check_variant
from flash_attend.evidence import Store, _store
from flash_attend.target import DeviceTarget
from flash_attend.testing.calls import Case, assert_same_bits, check, make_call, run
from flash_attend.variant import ALL, Kind, Variant

SMALL = Case("small", heads=4, kv_heads=2, queries=40, keys=50, d=16, dv=8, grads="out")
CASES = (
    SMALL,
    replace(SMALL, name="padded", mask="holes"),
    replace(SMALL, name="padded_causal", mask="pad_left", causal=True, queries=60),
    replace(SMALL, name="dense", mask="bhij", scale=-0.3),
)
each_case = pytest.mark.parametrize("case", CASES, ids=str)
T4 = replace(PART, name="Tesla T4", capability=(7, 5))
MI300 = replace(PART, name="AMD Instinct MI300X", capability=None)
HERE = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_a_part(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[None]:
    monkeypatch.setenv("FLASH_ATTEND_CACHE", str(tmp_path))
    _store.cache_clear()
    with played():
        yield
    _store.cache_clear()


def spied(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[tuple, dict[str, Any]]]:
    """What an operator is given from now on."""
    found, operator = [], getattr(efficient, name)
    monkeypatch.setattr(
        efficient, name, lambda *args, **kwargs: found.append((args, kwargs)) or operator(*args, **kwargs)
    )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Who takes it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", (T4, MI300), ids=lambda part: part.name)
@each_case
def test_auto_takes_it_where_it_is_right(part: DeviceTarget, case: Case) -> None:
    """And so does what `explain` says; the first call of a variant has it checked."""
    with played(part):
        call = make_call(case, torch.float16, "cpu")
        check(run(call, "auto"), call)
        leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
        told = explain(*leaves, **call.options)
        assert told.plan is not None
        assert (told.plan.name, told.advice) == ("efficient", "")
        assert told.plan.reason.partition("self-checked: ")[1]


def _in_base_2(out: Tensor, lse: Tensor, *others: Any) -> tuple:
    return out, lse / 0.6931, *others


def _transposed_causality(q: Tensor, *rest: Any, **options: Any) -> tuple:
    """Counted from the first query, as an operator without the other way would."""
    *before, sees, gives_lse = rest
    pairs = torch.ones(q.shape[1], rest[0].shape[1], dtype=torch.bool).tril().logical_not()
    bias = q.new_zeros(pairs.shape).masked_fill(pairs, -torch.inf) if sees else None
    bias = None if bias is None else torch.nn.functional.pad(bias, (0, -bias.shape[1] % 16))[:, : bias.shape[1]]
    before[2] = before[2] if bias is None else bias.expand(q.shape[0], q.shape[2], -1, -1)
    return efficient_kernel.forward(q, *before, 0, gives_lse, **options)


@pytest.mark.parametrize(
    ("fault", "causal"),
    (
        (lambda *args, **options: _in_base_2(*efficient_kernel.forward(*args, **options)), False),
        (_transposed_causality, True),
    ),
    ids=("another LSE", "another causality"),
)
def test_what_gives_something_else_does_not_serve(
    fault: Callable, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another build's operators might."""
    call = make_call(replace(SMALL, causal=causal), torch.float32, "cpu")
    with played(T4), pytest.warns(UserWarning, match="efficient: its self-check failed here"):
        monkeypatch.setattr(efficient, "FORWARD", fault)
        check(run(call, "auto"), call)
        leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
        assert explain(*leaves, **call.options).plan.name == "math"


def test_a_checked_variant_is_kept_until_what_it_is_given_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant(
        "efficient", "torch", Kind("float16", "ieee", 16, 16, "key", True, False), False, True, False, ALL
    )
    assert check_variant(variant, HERE).right
    _store.cache_clear()
    assert Store.of(HERE).finding(variant) is not None
    read, digest = Path.read_bytes, evidence._digest_of_kernels.__wrapped__
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "efficient.py"))
    monkeypatch.setattr(evidence, "_digest_of_kernels", digest)
    monkeypatch.setattr(evidence, "_part_of", evidence._part_of.__wrapped__)
    _store.cache_clear()
    assert Store.of(HERE).finding(variant) is None


# ---------------------------------------------------------------------------------------------------------------------
# What the operators are given
# ---------------------------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("layout", ("contiguous", "heads_inside", "sliced", "interleaved", "broadcast_heads"))
def test_layouts(case: Case, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel can read is not copied."""
    forwards = spied(monkeypatch, "FORWARD")
    call = make_call(replace(case, layout=layout, grad_layout=layout, mask="none"), torch.float16, "cpu")
    check(run(call, "efficient"), call)
    ((q, *_), _) = forwards[0]
    as_it_is = layout not in ("sliced", "interleaved") and call.scale is None
    assert (q.data_ptr() == call.q.data_ptr()) == (as_it_is and not case.causal)


def test_a_key_mask_takes_no_array_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards, backwards = (spied(monkeypatch, name) for name in ("FORWARD", "BACKWARD"))
    call = make_call(replace(SMALL, mask="holes", causal=True, queries=50), torch.float32, "cpu")
    run(call, "efficient")
    assert [len(found) for found in (forwards, backwards)] == [1, 1]
    for (args, _), at in zip((forwards[0], backwards[0]), (3, 4), strict=True):
        assert args[at].untyped_storage().nbytes() == 2 * 64 * 4
        assert args[at].shape == (2, 4, 50, 50)


@pytest.mark.parametrize(("part", "deterministic", "splits"), ((T4, False, None), (T4, True, 1), (MI300, False, None)))
def test_deterministic_gradients_are_summed_in_one_order(
    part: DeviceTarget, deterministic: bool, splits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with played(part):
        backwards = spied(monkeypatch, "BACKWARD")
        call = make_call(SMALL, torch.float32, "cpu")
        q = call.q.clone().requires_grad_()
        flash_attention(q, call.k, call.v, deterministic=deterministic, backend="efficient").sum().backward()
        assert [options["num_splits_key"] for _, options in backwards] == [splits]


class NoWaiting(TorchDispatchMode):
    """Fails where the host reads a number of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        assert func is not torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


@each_case
def test_nothing_waits_for_the_device(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(case, torch.float32, "cpu")
    run(call, "efficient")
    for name in ("forward", "backward"):  # which play the device
        play = getattr(efficient_kernel, name)

        def unseen(*args: Any, play: Callable = play, **options: Any) -> Any:
            with torch.utils._python_dispatch._disable_current_modes():
                return play(*args, **options)

        monkeypatch.setattr(efficient, name.upper(), unseen)
    with NoWaiting():
        run(call, "efficient")


# ---------------------------------------------------------------------------------------------------------------------
# How it composes
# ---------------------------------------------------------------------------------------------------------------------


@each_case
def test_results_may_be_changed_in_place(case: Case) -> None:
    call = make_call(case, torch.float32, "cpu")
    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
    for result in flash_attention(*leaves, **call.options, return_lse=True, backend="efficient"):
        before = result.detach().clone()
        result += 1
        torch.testing.assert_close(result, before + 1)


def test_compiled() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(flash_attention, backend=counter, fullgraph=True)
    for queries in (40, 50, 70):
        call = make_call(replace(CASES[2], queries=queries), torch.float32, "cpu")
        check(run(call, "efficient", attend=attend), call)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@each_case
def test_loss_of_the_lse_and_second_derivatives_go_by_the_einsum_path(case: Case) -> None:
    call = make_call(replace(case, grads="both"), torch.float32, "cpu")
    check(run(call, "efficient"), call)

    def second(backend: str) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
        out = flash_attention(*leaves, **call.options, backend=backend)
        first = torch.autograd.grad(out, leaves, call.grad_out, create_graph=True)
        return torch.autograd.grad(sum(x.sin().sum() for x in first), leaves)

    for got, want in zip(second("efficient"), second("math"), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_vmap_and_forward_mode() -> None:
    call = make_call(replace(SMALL, kv_heads=4, causal=True), torch.float32, "cpu")
    q = torch.stack([call.q, 2 * call.q])

    def attend(q: Tensor, backend: str = "efficient") -> Tensor:
        return flash_attention(q, call.k, call.v, causal=True, backend=backend)

    torch.testing.assert_close(torch.vmap(attend)(q), torch.stack([attend(x) for x in q]))
    pushed = torch.func.jvp(attend, (call.q,), (call.q,))
    wanted = torch.func.jvp(lambda q: attend(q, "math"), (call.q,), (call.q,))
    torch.testing.assert_close(pushed, wanted, atol=1e-5, rtol=1e-5)


@each_case
def test_what_comes_down_to_what_takes_no_part_is_of_no_account(case: Case) -> None:
    """NaN in the gradients of queries that see nothing, in themselves, and in keys that nobody sees."""
    call = make_call(case, torch.float32, "cpu")
    clean, (b, _, i, j) = run(call, "efficient"), (*call.q.shape[:3], call.k.shape[2])
    visible = torch.ones(b, call.q.shape[1], i, j, dtype=torch.bool)
    if call.mask is not None:
        visible = visible & (call.mask if call.mask.ndim == 4 else call.mask[:, None, None])
    visible = visible.tril(j - i) if call.causal else visible
    dead, unread = ~visible.any(dim=3), ~visible.any(dim=2).view(b, 2, -1, j).any(dim=2)
    assert call.grad_out is not None
    spoilt = call.with_(
        q=call.q.masked_fill(dead[..., None], torch.nan),
        k=call.k.masked_fill(unread[..., None], torch.nan),
        v=call.v.masked_fill(unread[..., None], torch.inf),
        grad_out=call.grad_out.masked_fill(dead[..., None], torch.nan),
    )
    assert_same_bits(run(spoilt, "efficient"), clean)
