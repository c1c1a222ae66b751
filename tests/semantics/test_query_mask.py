"""`query_mask`: rows that are no queries may hold anything, give what sees no key, and cost nothing."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from backends import BACKENDS, SDPA_CPU, TRITON_INTERPRETER, Backend, call_for
from flash_attend import Attend, explain, flash_attention, sdpa
from flash_attend.kernels import backward, forward
from flash_attend.kernels.configs import INTERPRETED
from flash_attend.testing.calls import Call, Case, check, make_call, run

# With a mask of its own, or with one tensor for queries and keys.
CASES = (
    (Case("no_mask", batch=3), False),
    (Case("no_mask_causal", causal=True), False),
    (Case("keys", mask="holes", heads=4, kv_heads=2, dv=24), False),
    (Case("keys_of_all", mask="111j", kv_heads=0, softcap=2.0), False),
    (Case("keys_causal", mask="pad_right", causal=True), False),
    (Case("together", batch=3, queries=43, mask="holes", sinks=True), True),
    (Case("together_causal", queries=43, mask="holes", causal=True, softcap=1.5, sinks=True), True),
    (Case("together_all_hidden", queries=43, mask="dead_batch", causal=True, layout="heads_inside"), True),
    (Case("window", queries=43, mask="pad_right", window=(9, 3)), True),
    (Case("alibi", queries=43, mask="pad_left", alibi="bh", causal=True), True),
    (Case("dropout", queries=43, mask="holes", dropout_p=0.3), True),
    (Case("by_heads", mask="bh1j"), False),
    (Case("pairs", mask="b1ij", bias="1hij"), False),
    (Case("no_queries", queries=0), False),
    (Case("no_entries", batch=0), False),
)
# Packed, hidden pair by pair, and both with garbage, forward and backward.
INTERPRETED_CASES = ("together_causal", "window")
EVERYWHERE = (*BACKENDS, pytest.param(SDPA_CPU, id=str(SDPA_CPU)))


def shown_queries(call: Call, together: bool) -> Tensor:
    """A query mask `(b, i)`: the tensor that the keys are hidden by, or runs and holes."""
    if together:
        assert call.mask is not None
        return call.mask
    b, _, i, _ = call.q.shape
    return ((torch.arange(i) + 5 * torch.arange(b)[:, None]) % 11 < 7).to(call.q.device)


def poisoned(call: Call, query_mask: Tensor) -> Call:
    """The call with NaN in rows that are no queries, and in what comes down to them."""
    hidden = ~query_mask[:, None]
    names = [name for name in ("q", "grad_out", "grad_lse") if getattr(call, name) is not None]
    tensors = {name: getattr(call, name) for name in names}
    return call.with_(**{
        name: x.masked_fill(hidden if name == "grad_lse" else hidden[..., None], torch.nan)
        for name, x in tensors.items()
    })  # fmt: skip


def hidden_by_pairs(call: Call, query_mask: Tensor) -> Call:
    """The same as a call whose mask hides the rows."""
    rows, mask = query_mask[:, None, :, None], call.mask
    if mask is not None:
        rows = rows & (mask[:, None, None] if mask.ndim == 2 else mask)
    return call.with_(mask=rows)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize(("case", "together"), CASES, ids=lambda x: x.name if isinstance(x, Case) else "")
def test_rows_that_are_no_queries_take_no_part(backend: Backend, case: Case, together: bool) -> None:
    if backend.interpreted and case.name not in INTERPRETED_CASES:
        pytest.skip("reason: other cases run the same code there")
    call = call_for(backend, case, backend.dtype)
    query_mask = shown_queries(call, together)
    attend = partial(flash_attention, query_mask=query_mask)
    answer = run(poisoned(call, query_mask), backend.name, attend=attend)
    check(answer, hidden_by_pairs(call, query_mask))


TILES = {
    "_tile": INTERPRETED.forward,
    "_key_value_tile": INTERPRETED.backward_kv,
    "_query_gradient_tile": INTERPRETED.backward_q,
}


ON_A_CPU = (SDPA_CPU, pytest.param(TRITON_INTERPRETER, marks=pytest.mark.interpreter))


@pytest.mark.parametrize("backend", ON_A_CPU, ids=str)
def test_rows_that_are_no_queries_cost_nothing(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU torch's kernels get real queries and visible keys alone; ours visit blocks that hold any alone."""
    done: Counter[str] = Counter()

    def count(module: Any, name: str, work: Any) -> None:
        compute = getattr(module, name)

        def counted(*args: Any, **named: Any) -> Any:
            done[name] += work(*args)
            return compute(*args, **named)

        monkeypatch.setattr(module, name, counted)

    lengths, heads = (70, 17, 0, 40), 1
    mask = torch.arange(80) < torch.tensor(lengths)[:, None]
    if backend.interpreted:
        for name in TILES:
            count(forward if name == "_tile" else backward, name, lambda *_: 1)
    else:
        count(sdpa, "FORWARD", lambda q, k, *_: q[..., 0].numel() * k.shape[2])
        count(sdpa, "BACKWARD", lambda _, q, k, *__: q[..., 0].numel() * k.shape[2])
    q, k, v = (torch.randn(4, heads, 80, 16, requires_grad=True) for _ in range(3))
    causal = backend.interpreted
    flash_attention(q, k, v, mask=mask, query_mask=mask, causal=causal, backend=backend.name).sum().backward()
    if not backend.interpreted:
        wanted = heads * sum(n * n for n in lengths)
        assert done == {"FORWARD": wanted, "BACKWARD": wanted}
        return
    for name, tile in TILES.items():
        pairs = [torch.ones(n, n, dtype=torch.bool).tril() for n in lengths]
        blocks = [block for one in pairs for rows in one.split(tile.block_m) for block in rows.split(tile.block_n, 1)]
        assert done[name] == heads * sum(bool(block.any()) for block in blocks) > 0, name


def test_a_module_takes_it_and_explain_tells_of_it() -> None:
    call = make_call(Case("x", queries=43, mask="pad_right"), torch.float32)
    mask = shown_queries(call, together=True)
    found = Attend(causal=True)(call.q, call.k, call.v, mask, query_mask=mask)
    wanted = flash_attention(call.q, call.k, call.v, mask=mask, query_mask=mask, causal=True)
    assert torch.equal(found, wanted) and (found.transpose(1, 2)[~mask] == 0).all()
    told = explain(call.q, call.k, call.v, mask=mask, query_mask=mask, dropout_p=0.5, backend="sdpa")
    assert "dropout" in told.refusal


def test_inside_compilers_and_transforms() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q: Tensor, mask: Tensor) -> Tensor:
        return flash_attention(q, q, q, mask=mask, query_mask=mask, causal=True, backend="math")

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for length in (5, 9, 33):
        q, mask = torch.randn(2, 3, length, 8, dtype=torch.float64), torch.rand(2, length) < 0.6
        torch.testing.assert_close(compiled(q, mask), attend(q, mask))
    assert counter.frame_count == 2
    several, masks = torch.stack((q, 2 * q)), torch.stack((mask, ~mask))
    wanted = torch.stack([attend(*entry) for entry in zip(several, masks, strict=True)])
    torch.testing.assert_close(torch.func.vmap(attend)(several, masks), wanted)


def test_derivatives_are_those_of_differences() -> None:
    """Of any order, in forward mode, and for many gradients at once."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    inputs = [torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    attend = partial(flash_attention, mask=mask, query_mask=mask, causal=True)
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attend, inputs, fast_mode=True)


Q = torch.zeros(2, 4, 6, 8)
GOOD = torch.ones(2, 6, dtype=torch.bool)
JAGGED = torch.nested.nested_tensor([torch.zeros(3, 4, 8)], layout=torch.jagged).transpose(1, 2)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no_tensor": (dict(query_mask=[True]), TypeError, "query_mask must be a torch.Tensor, got list"),
    "dtype": (dict(query_mask=GOOD.float()), TypeError, r"query_mask must be a dense tensor of bool .* torch.float32"),
    "shape": (dict(query_mask=GOOD[:, :5]), ValueError, r"query_mask must be \(b, i\) = \(2, 6\), got \(2, 5\)"),
    "rank": (dict(query_mask=GOOD[:, None]), ValueError, r"query_mask must be \(b, i\) = \(2, 6\), got \(2, 1, 6\)"),
    "device": (dict(query_mask=GOOD.to("meta")), ValueError, "query_mask must be on q's device cpu, got meta"),
    "nested": (dict(q=JAGGED), TypeError, "query_mask must be None where q, k and v are nested"),
    "another": (dict(k=Q[..., :7]), ValueError, r"k must have q's last dimension d = 8, got \(2, 4, 6, 7\)"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_a_wrong_argument_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flash_attention(**{**dict(q=Q, k=Q, v=Q, query_mask=GOOD), **change})
