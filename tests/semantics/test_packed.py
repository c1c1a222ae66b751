"""`flash_attention_packed` on every backend: judged as one call whose mask lets each sequence see itself alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from backends import BACKENDS, FUSED, MATH_CPU, SDPA_CPU, TRITON_CUDA, Backend
from flash_attend import BackendUnavailable, cu_seqlens_of_documents, flash_attention, flash_attention_packed
from flash_attend.dropout import draw_seed
from flash_attend.testing.budget import Budget
from flash_attend.testing.calls import Case as DenseCase
from flash_attend.testing.calls import check, make_call
from flash_attend.testing.calls import run as run_call
from flash_attend.testing.oracle import Answer, attention_oracle
from flash_attend.testing.sequences import whole_call

Lengths = tuple[tuple[int, int], ...]
# Queries and keys of each sequence: as many, fewer and more than the other, none on either side or on both.
MIXED: Lengths = ((5, 7), (0, 4), (37, 37), (9, 0), (1, 60), (0, 0), (50, 33), (20, 20))
SHORT: Lengths = tuple((n % 4, n % 3) for n in range(20))


@dataclass(frozen=True)
class Case:
    """A packed call, described."""

    name: str
    lengths: Lengths = MIXED
    behind: tuple[int, int] = (0, 0)  # queries and keys behind the last sequence
    heads: int = 2
    kv_heads: int = 2
    d: int = 16
    dv: int = 16
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: str = ""
    sinks: bool = False
    dropout_p: float = 0.0
    index: torch.dtype = torch.int32  # of the places
    grads: str = "both"

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("plain"),
    Case("causal", causal=True, behind=(3, 2)),
    Case("window", window=(6, 3), index=torch.int64),
    Case("window_causal", window=(9, None), causal=True, kv_heads=1),
    Case("window_right", window=(None, 4)),
    Case("value_dim", d=8, dv=24, behind=(40, 0)),
    Case("negative_scale", scale=-0.4, behind=(0, 35)),
    Case("softcap", softcap=1.5, causal=True),
    Case("alibi", alibi="h", causal=True),
    Case("alibi_of_each", alibi="bh", behind=(2, 2)),
    Case("sinks", sinks=True, behind=(3, 0)),
    Case("dropout", dropout_p=0.3, heads=4),
    Case("everything", causal=True, window=(30, None), softcap=2.0, alibi="bh", sinks=True, dropout_p=0.2, heads=4),
    Case("one_sequence", lengths=((70, 70),), causal=True),
    Case("one_query_each", lengths=tuple((1, n) for n in (3, 40, 0, 1)), heads=4, kv_heads=1),
    Case("short", lengths=SHORT, causal=True),
    Case("only_lse", causal=True, grads="lse"),
    Case("no_sequences", lengths=(), behind=(5, 6), alibi="bh"),
    Case("nothing", lengths=((0, 0), (0, 0))),
)


@dataclass(frozen=True)
class Packed:
    """The tensors of a case, and its options."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: tuple[Tensor, Tensor]
    grad_out: Tensor | None  # (t, h, dv)
    grad_lse: Tensor | None  # (h, t)
    slopes: Tensor | None
    sinks: Tensor | None

    @property
    def longest(self) -> tuple[int, int]:
        return tuple(max((pair[side] for pair in self.case.lengths), default=0) for side in (0, 1))  # type: ignore[return-value]

    @property
    def options(self) -> dict[str, Any]:
        case = self.case
        names = ("causal", "window", "scale", "softcap", "dropout_p")
        return {name: getattr(case, name) for name in names} | dict(alibi_slopes=self.slopes)


def make(case: Case, dtype: torch.dtype, device: str = "cpu") -> Packed:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)

    lengths = torch.tensor(case.lengths, dtype=case.index).view(-1, 2)
    places = torch.nn.functional.pad(lengths.cumsum(0, dtype=case.index), (0, 0, 1, 0)).to(device)
    queries, keys = (int(places[-1, side]) + case.behind[side] for side in (0, 1))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    grad_out = draw(queries, case.heads, case.dv) if case.grads in ("both", "out") else None
    grad_lse = draw(case.heads, queries).to(accumulator) if case.grads in ("both", "lse") else None
    slopes_of = {"h": (case.heads,), "bh": (len(case.lengths), case.heads)}
    return Packed(
        case,
        draw(queries, case.heads, case.d),
        draw(keys, case.kv_heads, case.d),
        draw(keys, case.kv_heads, case.dv),
        (places[:, 0].contiguous(), places[:, 1].contiguous()),
        grad_out,
        grad_lse,
        torch.rand(slopes_of[case.alibi]).to(device, dtype) if case.alibi else None,
        draw(case.heads) if case.sinks else None,
    )


def run(packed: Packed, backend: str, **changes: Any) -> Answer:
    """What a backend makes of it, in the shapes of one call."""
    named = dict(q=packed.q, k=packed.k, v=packed.v, sinks=packed.sinks)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in named.items() if x is not None}
    q, k, v = (leaves[name] for name in "qkv")
    options = packed.options | dict(sinks=leaves.get("sinks")) | changes
    torch.manual_seed(7)
    out, lse = flash_attention_packed(
        q, k, v, *packed.cu_seqlens, *packed.longest, return_lse=True, backend=backend, **options
    )
    pairs = [(x, grad) for x, grad in ((out, packed.grad_out), (lse, packed.grad_lse)) if grad is not None]
    outputs, incoming = zip(*pairs, strict=True)
    wanted = [*leaves.values()]
    found = torch.autograd.grad(outputs, wanted, incoming, allow_unused=True, materialize_grads=True)
    grads = dict(zip(leaves, found, strict=True))
    of_qkv = (grads[name].transpose(0, 1)[None] for name in "qkv")
    return Answer(out.detach().transpose(0, 1)[None], lse.detach()[None], *of_qkv, dsinks=grads.get("sinks"))


def judge(packed: Packed) -> tuple[Answer, Budget]:
    """The oracle's answer to one call with a mask, and how far from it another may be."""
    case = packed.case
    q, k, v = (x.transpose(0, 1)[None] for x in (packed.q, packed.k, packed.v))
    torch.manual_seed(7)
    names = ("causal", "window", "alibi_slopes", "dropout_p")
    seed = draw_seed(q.device) if case.dropout_p else None
    call = whole_call(case.lengths, q, k, seed=seed, **{name: packed.options[name] for name in names})
    call |= dict(
        scale=case.scale, softcap=case.softcap, sinks=packed.sinks,
        grad_out=None if packed.grad_out is None else packed.grad_out.transpose(0, 1)[None],
        grad_lse=None if packed.grad_lse is None else packed.grad_lse[None],
    )  # fmt: skip
    truth = attention_oracle(q, k, v, **call)
    return truth, Budget(truth, q, k, v, **call)


def served(case: Case, backend: Backend) -> Case:
    """The case, or a skip where the backend does not serve it; to torch's own attention an LSE's gradient means the
    einsum path."""
    if backend.name == "sdpa":
        if case.softcap or case.sinks or case.dropout_p or case.d != case.dv:
            pytest.skip("reason: torch's own attention does not compute it")
        if case.grads == "both":
            case = replace(case, grads="out")
    return case


EVERYWHERE = (*BACKENDS, pytest.param(SDPA_CPU, id=str(SDPA_CPU)))
# What the interpreter, which takes seconds for each, runs of the cases; and of the fused backward, which is also that.
INTERPRETED = ("window", "value_dim", "everything", "one_query_each", "no_sequences")
INTERPRETED_FUSED = ("window_causal",)


@pytest.mark.parametrize("backend", (*EVERYWHERE, *FUSED))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_sequence_is_attended_to_as_if_it_were_alone(case: Case, backend: Backend) -> None:
    if backend.interpreted and case.name not in (INTERPRETED_FUSED if backend.backward == "fused" else INTERPRETED):
        pytest.skip("reason: other cases run the same code there")
    packed = make(served(case, backend), torch.float32, backend.device)
    judge(packed)[1].check(run(packed, backend.name))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("backend", (MATH_CPU, SDPA_CPU), ids=str)
def test_in_other_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    packed = make(replace(CASES[1], grads="out"), dtype)
    judge(packed)[1].check(run(packed, backend.name))


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_what_is_in_no_sequence_may_hold_anything(backend: Backend) -> None:
    """And so may keys of sequences without queries, and queries of sequences without keys."""
    packed = make(served(replace(CASES[1], behind=(40, 40)), backend), torch.float32, backend.device)
    alive, seen = (judge(packed)[1].pairs[0, 0].any(dim=dim) for dim in (1, 0))
    poisoned = {name: getattr(packed, name).clone() for name in ("q", "k", "v", "grad_out")}
    for name, tensor in poisoned.items():
        tensor[~(seen if name in "kv" else alive)] = torch.nan
    judge(packed)[1].check(run(replace(packed, **poisoned), backend.name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_that_of_a_padded_batch(backend: Backend) -> None:
    """Of sequences that are as long, packed and in a batch, with the same seed."""
    packed = make(Case("equal", lengths=((20, 33),) * 2, dropout_p=0.4), torch.float32, backend.device)
    torch.manual_seed(7)
    q, k, v = (x.unflatten(0, (2, -1)).transpose(1, 2) for x in (packed.q, packed.k, packed.v))
    padded = flash_attention(q, k, v, dropout_p=0.4, backend=backend.name)
    torch.testing.assert_close(run(packed, backend.name).out[0].unflatten(1, (2, -1)).transpose(0, 1), padded)


@pytest.mark.parametrize("backend", (MATH_CPU, SDPA_CPU, pytest.param(TRITON_CUDA, marks=pytest.mark.gpu)), ids=str)
def test_ten_thousand_short_sequences(backend: Backend) -> None:
    """Of 0 to 5 queries and keys, beside the same in a padded batch, whose mask has the causality."""
    torch.manual_seed(0)
    i, j = lengths = torch.randint(0, 6, (2, 10_000))
    cu_seqlens = [torch.nn.functional.pad(n.cumsum(0), (1, 0)).to(backend.device) for n in lengths]
    query, key = torch.arange(5)[:, None], torch.arange(5)
    mask = (query < i[:, None, None]) & (key < j[:, None, None]) & (key <= query + (j - i)[:, None, None])
    shown = [torch.arange(5) < n[:, None] for n in (i, j, j)]
    padded = [torch.randn(10_000, 5, 2, 8, dtype=torch.float64, requires_grad=True) for _ in shown]
    dense = flash_attention(*(x.transpose(1, 2) for x in padded), mask=mask[:, None], backend="math").transpose(1, 2)
    tensors = [x[rows].to(backend.device) for x, rows in zip(padded, shown, strict=True)]
    out = flash_attention_packed(*tensors, *cu_seqlens, 5, 5, causal=True, backend=backend.name)
    torch.testing.assert_close(out.cpu(), dense[shown[0]])
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(dense[shown[0]], padded, grad.cpu(), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out, padded, grad), wanted)


def jagged(tensor: Tensor, places: Tensor) -> Tensor:
    """`(t, h, d)` as a nested tensor `(b, h, i*, d)`, with its gradient."""
    return torch.nested.nested_tensor_from_jagged(tensor, places).transpose(1, 2)


def test_jagged_nested_tensors_are_packed() -> None:
    lengths = tuple((j, j) for _, j in MIXED)
    packed = make(Case("jagged", lengths=lengths, causal=True, kv_heads=1, dv=8, index=torch.int64), torch.float64)
    inputs = [x.clone().requires_grad_() for x in (packed.q, packed.k, packed.v)]
    q, k, v = (jagged(x, packed.cu_seqlens[0]) for x in inputs)
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert out.shape == (*q.shape[:3], 8) and lse.shape == q.shape[:3]
    assert (out + out).is_nested, "its lengths are those of q"
    whole = run(packed, "math")
    rows = out.transpose(1, 2).values()
    torch.testing.assert_close(rows, whole.out[0].transpose(0, 1))
    found = torch.autograd.grad((rows, lse.transpose(1, 2).values()), inputs, (packed.grad_out, packed.grad_lse.t()))
    torch.testing.assert_close(found, tuple(x[0].transpose(0, 1) for x in (whole.dq, whole.dk, whole.dv)))

    with pytest.raises(TypeError, match="mask must be None where q, k and v are nested"):
        flash_attention(q, k, v, mask=torch.ones(1, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="k and v must share their offsets"):
        flash_attention(q, k, jagged(packed.v, packed.cu_seqlens[0].clone()))
    with pytest.raises(ValueError, match="q must be ragged along its third dimension"):
        flash_attention(q.transpose(1, 2), k, v)


@pytest.mark.parametrize("backend", (MATH_CPU, SDPA_CPU), ids=str)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=7).map(tuple),
    behind=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.tuples(*[st.one_of(st.none(), st.integers(0, 9))] * 2)),
    alibi=st.sampled_from(("", "h", "bh")),
    kv_heads=st.sampled_from((1, 2)),
)
def test_any_packing(backend: Backend, **described: Any) -> None:
    packed = make(Case("drawn", d=4, dv=4, grads="out", **described), torch.float64)
    judge(packed)[1].check(run(packed, backend.name))


@pytest.mark.parametrize("backend", (MATH_CPU, SDPA_CPU), ids=str)
def test_documents_in_rows_are_packed_as_their_mask_has_them(backend: Backend) -> None:
    """The same ids in two rows are two documents; of sequences there are more than documents."""
    ids = torch.tensor([[7] * 20 + [0] + [3] * 19, [7] * 1 + [-1] * 39])
    cu_seqlens = cu_seqlens_of_documents(ids, most=7)
    assert cu_seqlens.tolist() == [0, 20, 21, 40, 41, 80, 80, 80]
    call = make_call(DenseCase("documents", queries=40, keys=40, causal=True), torch.float32, backend.device)
    call = call.with_(mask=ids[:, None, :, None] == ids[:, None, None, :], grad_lse=None)

    def attend(*tensors: Tensor, mask: Tensor, scale: float | None, dropout_p: float, **options: Any) -> Any:
        rows = [x.transpose(1, 2).flatten(0, 1) for x in tensors]
        out, lse = flash_attention_packed(*rows, cu_seqlens, cu_seqlens, 40, 40, **options)
        return out.unflatten(0, (2, 40)).transpose(1, 2), lse.unflatten(1, (2, 40)).transpose(0, 1)

    check(run_call(call, backend.name, attend=attend), call)


def test_documents_are_counted_on_the_device_or_where_they_can_be() -> None:
    ids = torch.tensor([[1, 1, 2], [2, 3, 3]])
    assert cu_seqlens_of_documents(ids).tolist() == [0, 2, 3, 4, 6]
    assert torch.func.vmap(cu_seqlens_of_documents)(ids[None]).tolist() == [[0, 2, 3, 4, 6, 6, 6]]
    assert cu_seqlens_of_documents(ids[:0]).tolist() == [0]
    for wrong, error, message in (
        ([[1]], TypeError, "document_ids must be a torch.Tensor, got list"),
        (ids.float(), TypeError, "document_ids must be integers, got torch.float32"),
        (ids[0], ValueError, r"document_ids must be \(b, i\), got \(3,\)"),
        (torch.tensor([[1, 2, 2], [5, 4, 5]]), ValueError, "tokens together, got 5 again in row 1"),
    ):
        with pytest.raises(error, match=message):
            cu_seqlens_of_documents(wrong)
    with pytest.raises(ValueError, match="most must be no less than the number of documents, 4, got 3"):
        cu_seqlens_of_documents(ids, most=3)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

Q, K, V = torch.zeros(6, 4, 8), torch.zeros(9, 2, 8), torch.zeros(9, 2, 5)
PLACES_Q, PLACES_K = torch.tensor([0, 2, 6]), torch.tensor([0, 9, 9])
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": (dict(q=Q[None]), ValueError, r"q must be \(t, h, d\), got 4 dimensions: \(1, 6, 4, 8\)"),
    "no_tensor": (dict(k=[1]), TypeError, "k must be a torch.Tensor, got list"),
    "nested": (dict(v=torch.nested.nested_tensor([V], layout=torch.jagged)), TypeError, "v must be a dense strided"),
    "dtype": (dict(k=K.double()), TypeError, "k must have q's dtype torch.float32, got torch.float64"),
    "heads": (dict(k=K[:, :0], v=V[:, :0]), ValueError, "must divide q's 4 heads, got 0"),
    "head_dim": (dict(k=K[..., :7]), ValueError, r"k must have q's last dimension d = 8, got \(9, 2, 7\)"),
    "keys": (dict(v=V[:8]), ValueError, "k and v must be equally long, got 9 keys and 8 values"),
    "places": (dict(cu_seqlens_q=[0, 6]), TypeError, "cu_seqlens_q must be a torch.Tensor, got list"),
    "places_dtype": (dict(cu_seqlens_k=PLACES_K.float()), TypeError, "cu_seqlens_k must be int32 or int64"),
    "places_rank": (dict(cu_seqlens_q=PLACES_Q[None]), ValueError, r"cu_seqlens_q must be \(b \+ 1,\), got \(1, 3\)"),
    "no_places": (dict(cu_seqlens_q=PLACES_Q[:0]), ValueError, r"cu_seqlens_q must be \(b \+ 1,\), got \(0,\)"),
    "counts": (dict(cu_seqlens_k=PLACES_K[:2]), ValueError, "must be of as many sequences, got 2 and 1"),
    "device": (dict(cu_seqlens_q=PLACES_Q.to("meta")), ValueError, "cu_seqlens_q must be on q's device cpu, got meta"),
    "not_from_0": (dict(cu_seqlens_q=torch.tensor([1, 2, 6])), ValueError, "cu_seqlens_q must begin with 0, got 1"),
    "decreasing": (dict(cu_seqlens_k=torch.tensor([0, 7, 3])), ValueError, r"must not decrease, got \[7, 3\]"),
    "past_the_end": (dict(cu_seqlens_q=torch.tensor([0, 2, 7])), ValueError, "must end by q's 6 rows, got 7"),
    "longest": (dict(max_k=8), ValueError, "max_k must be no less than the longest sequence, 9, got 8"),
    "longest_type": (dict(max_q=4.0), TypeError, "max_q must be an integer, got float 4.0"),
    "slopes": (
        dict(alibi_slopes=torch.ones(3, 4)),
        ValueError,
        r"\(h,\) = \(4,\) or \(b, h\) = \(2, 4\), got \(3, 4\)",
    ),
    "option": (dict(dropout_p=1.0), ValueError, "dropout_p must be in"),
    "backend": (dict(backend="sdpa", dropout_p=0.5), BackendUnavailable, "dropout is on"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_a_wrong_argument_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = dict(q=Q, k=K, v=V, cu_seqlens_q=PLACES_Q, cu_seqlens_k=PLACES_K, max_q=4, max_k=9)
    with pytest.raises(error, match=message):
        flash_attention_packed(**{**given, **change})
