"""What only a GPU shows: large shapes, 64-bit addresses, streams and graphs, memory, and the same bits every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends import KERNELS_ON_A_GPU, Backend, call_for
from flash_attend import cu_seqlens_of_documents, flash_attention, flash_attention_packed
from flash_attend.checks import normalise_inputs
from flash_attend.kernels.configs import key_splits, select_tangent_tiles, select_tiles
from flash_attend.target import DeviceTarget
from flash_attend.testing.calls import (
    Call,
    Case,
    assert_same_bits,
    bits_equal,
    budget_of,
    check,
    make_call,
    push,
    run,
    with_tangents,
)
from flash_attend.testing.oracle import Answer

pytestmark = pytest.mark.gpu

EACH = pytest.mark.parametrize("backend", KERNELS_ON_A_GPU, ids=str)
HALF = pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))

GIB = 2**30


def _needs_memory(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free / GIB:.1f}")


@pytest.fixture(autouse=True)
def _hand_back_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Lengths
# ---------------------------------------------------------------------------------------------------------------------

LONG = (
    Case("d64", batch=1, heads=2, queries=2048, keys=2048, d=64),
    Case("d64_causal", batch=1, heads=2, queries=2048, keys=2048, d=64, causal=True),
    Case("d128_causal", batch=1, heads=2, queries=2048, keys=2048, d=128, causal=True),
    Case("d256_causal", batch=1, heads=1, queries=2048, keys=2048, d=256, causal=True),
    Case("d80_odd_lengths", batch=1, heads=2, queries=2047, keys=2051, d=80, causal=True),
    Case("d64_padded_causal", batch=2, heads=1, queries=2048, keys=2048, d=64, mask="pad_right", causal=True),
    Case("d64_left_padded_causal", batch=2, heads=1, queries=2048, keys=2048, d=64, mask="pad_left", causal=True),
    Case("d64_holes", batch=2, heads=1, queries=1500, keys=3000, d=64, mask="holes"),
    Case("d40_dv80_dense", batch=1, heads=1, queries=2000, keys=2000, d=40, dv=80, mask="bhij"),
    Case("d64_staircase_causal", batch=1, heads=1, queries=2048, keys=2048, d=64, mask="staircase", causal=True),
    Case("d64_band", batch=1, heads=1, queries=4000, keys=4000, d=64, mask="band"),
    Case("d128_gqa_causal", batch=1, heads=4, kv_heads=1, queries=1024, keys=4096, d=128, causal=True),
    Case("d64_decode", batch=2, heads=4, kv_heads=2, queries=1, keys=4096, d=64, mask="pad_left", causal=True),
    Case("d64_dropout_causal", batch=1, heads=2, queries=1024, keys=1024, d=64, dropout_p=0.2, causal=True),
    Case("d160", batch=1, heads=1, queries=1024, keys=1024, d=160),
    Case("d192_dv128_causal", batch=1, heads=1, queries=1024, keys=1024, d=192, dv=128, causal=True),
)


@HALF
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_calls_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    call = make_call(case, dtype, "cuda")
    check(run(call, "triton"), call)


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_calls_in_float32(case: Case) -> None:
    call = make_call(case, torch.float32, "cuda")
    check(run(call, "triton"), call)


@HALF
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_calls_with_tangents(case: Case, dtype: torch.dtype) -> None:
    call, target = with_tangents(make_call(case, dtype, "cuda")), DeviceTarget.of(torch.device("cuda"))
    answers = [push(call, "triton", lambda spec: select_tangent_tiles(spec, target)) for _ in range(2)]
    budget_of(call).check(answers[0])
    assert all(bits_equal(*(getattr(x, name) for x in answers)) for name in ("out_tangent", "lse_tangent"))


# ---------------------------------------------------------------------------------------------------------------------
# Addresses
# ---------------------------------------------------------------------------------------------------------------------


def _slice(call: Call, answer, batches: slice, heads: slice):
    """A call and its answer, cut to some heads: heads are independent of each other."""
    cut = {name: getattr(call, name)[batches, heads] for name in ("q", "k", "v", "grad_out", "grad_lse")}
    return call.with_(**cut), type(answer)(
        *(getattr(answer, n)[batches, heads] for n in ("out", "lse", "dq", "dk", "dv"))
    )


def test_tensors_past_two_to_the_31_elements() -> None:
    """1056 x 128 heads of 128 x 128: the last heads begin past the reach of 32-bit element offsets."""
    _needs_memory(60)
    b, h, n, d = 1056, 128, 128, 128
    assert b * h * n * d > 2**31
    torch.manual_seed(0)
    tensors = [torch.randn(b, h, n, d, device="cuda", dtype=torch.float16) for _ in range(4)]
    grad_lse = torch.randn(b, h, n, device="cuda")
    call = Call(*tensors[:3], None, tensors[3], grad_lse, causal=True)
    answer = run(call, "triton")
    for batch in (0, b // 2, b - 1):
        part, part_answer = _slice(call, answer, slice(batch, batch + 1), slice(0, 4))
        check(part_answer, part)
    part, part_answer = _slice(call, answer, slice(b - 1, b), slice(h - 4, h))
    check(part_answer, part)


def test_packed_sequences_past_two_to_the_31_elements() -> None:
    """The same tokens as 1056 sequences one after another, of 128 heads: the last ones begin past that reach."""
    _needs_memory(60)
    sequences, h, n, d = 1056, 128, 128, 128
    assert sequences * n * h * d > 2**31
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(sequences * n, h, d, device="cuda", dtype=torch.float16) for _ in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    cu_seqlens = torch.arange(0, sequences * n + 1, n, device="cuda", dtype=torch.int32)
    out, lse = flash_attention_packed(
        q, k, v, cu_seqlens, cu_seqlens, n, n, causal=True, return_lse=True, backend="triton"
    )
    grads = torch.autograd.grad(out, (q, k, v), grad)
    for sequence in (0, sequences // 2, sequences - 1):
        rows, heads = slice(sequence * n, (sequence + 1) * n), slice(h - 4, h)
        of_q, of_k, of_v, of_out, of_grad, *of_grads = (
            x.detach()[rows, heads].transpose(0, 1)[None] for x in (q, k, v, out, grad, *grads)
        )
        part = Call(of_q, of_k, of_v, None, of_grad, None, causal=True)
        check(Answer(of_out, lse.detach()[None, heads, rows], *of_grads), part)


def test_rows_past_two_to_the_31_elements_apart() -> None:
    """Keys and values are columns of one wide buffer: the last row of a single head lies past 2**31 elements."""
    _needs_memory(20)
    keys, width, d = 40_000, 60_000, 64
    assert keys * width > 2**31
    buffer = torch.empty(keys, width, device="cuda", dtype=torch.float16)
    buffer[:, : 2 * d].normal_()
    call = make_call(Case("x", batch=1, heads=1, queries=70, keys=1, d=d), torch.float16, "cuda")
    call = call.with_(k=buffer[None, None, :, :d], v=buffer[None, None, :, d : 2 * d])
    check(run(call, "triton"), call)


def test_a_mask_past_two_to_the_31_elements() -> None:
    """A dense mask of 46,400 x 46,400. Gradients come down to the last queries only, so that an oracle can follow."""
    _needs_memory(30)
    n, d, rows = 46_400, 16, 64
    assert n * n > 2**31
    torch.manual_seed(0)
    mask = torch.empty(1, 1, n, n, dtype=torch.bool, device="cuda")
    for start in range(0, n, 4096):
        mask[:, :, start : start + 4096] = torch.rand(mask[:, :, start : start + 4096].shape, device="cuda") < 0.5
    call = make_call(Case("x", batch=1, heads=1, queries=n, keys=n, d=d), torch.float32, "cuda").with_(mask=mask)
    call.grad_out[:, :, :-rows] = 0
    call.grad_lse[:, :, :-rows] = 0
    answer = run(call, "triton")
    assert not answer.dq[:, :, :-rows].any()
    last = {name: getattr(call, name)[:, :, -rows:] for name in ("q", "grad_out", "grad_lse", "mask")}
    part = call.with_(**last)
    check(type(answer)(*(x[:, :, -rows:] for x in (answer.out, answer.lse, answer.dq)), answer.dk, answer.dv), part)


# ---------------------------------------------------------------------------------------------------------------------
# Streams and graphs
# ---------------------------------------------------------------------------------------------------------------------

BUSY = Case("busy", heads=4, kv_heads=2, queries=200, keys=260, d=64, mask="holes", causal=True)


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _assert_alike(answer: Answer, expected: Answer, call: Call, backend: Backend) -> None:
    """The same bits; where the gradient of q is added up in any order, one that is right."""
    if backend.backward == "fused":
        check(answer, call)
        answer, expected = replace(answer, dq=None), replace(expected, dq=None)
    assert_same_bits(answer, expected)


@EACH
@pytest.mark.parametrize(
    "case",
    (
        BUSY,
        Case("plain", d=64),
        Case("dropout", d=64, dropout_p=0.2, mask="pad_right"),
        Case("dense", d=64, mask="bhij", causal=True),
        Case("strided", d=40, layout="interleaved", mask="strided"),
    ),
    ids=str,
)
def test_the_host_never_waits_for_the_device(case: Case, backend: Backend) -> None:
    call = call_for(backend, case, torch.float16)
    run(call, backend.name)  # compiles
    with _no_synchronisation():
        answer = run(call, backend.name)
    check(answer, call)


def _capture(call: Call, backend: str) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A CUDA graph of one forward and backward, and the tensors that its replays write."""
    leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]

    def step() -> tuple[Tensor, ...]:
        out, lse = flash_attention(*leaves, **call.options, return_lse=True, backend=backend)
        return out, lse, *torch.autograd.grad((out, lse), leaves, (call.grad_out, call.grad_lse))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@EACH
def test_a_captured_call_answers_what_its_inputs_hold(backend: Backend) -> None:
    call = call_for(backend, BUSY, torch.float16)
    graph, results = _capture(call, backend.name)
    other = make_call(BUSY, torch.float16, "cuda", seed=1)
    for name in ("q", "k", "v", "mask", "grad_out", "grad_lse"):
        getattr(call, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize()
    captured = Answer(*(x.detach() for x in results))
    _assert_alike(captured, run(other, backend.name), other, backend)


@pytest.mark.parametrize("queries", (1, 3))
def test_a_captured_step_of_decoding_reads_what_the_cache_holds(queries: int) -> None:
    """Its keys are split over programs, those that each row has; the same bits at every replay."""
    case = Case("x", 3, 8, 2, queries, 5000, d=128, mask="pad_right", causal=True, sinks=True, softcap=20.0)
    call = make_call(case, torch.float16, "cuda")
    _, spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    forward = select_tiles(spec, DeviceTarget.of(call.q.device)).forward
    assert key_splits(spec, forward) > 1

    def step() -> Answer:
        out, lse = flash_attention(call.q, call.k, call.v, **call.options, return_lse=True, backend="triton")
        return Answer(out, lse, None, None, None)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in (1, 2):
        other = make_call(case, torch.float16, "cuda", seed=seed)
        for name in ("q", "k", "v", "sinks"):
            getattr(call, name).copy_(getattr(other, name))
        call.mask.copy_(other.mask.flip(0))  # rows of other lengths
        graph.replay()
        check(results, call)
        first = Answer(results.out.clone(), results.lse.clone(), None, None, None)
        graph.replay()
        assert_same_bits(results, first)


def test_a_captured_dropout_draws_anew_at_every_replay() -> None:
    call = make_call(Case("x", queries=256, keys=256, d=64, dropout_p=0.5, causal=True), torch.float16, "cuda")
    graph, results = _capture(call, "triton")
    torch.manual_seed(11)
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        seen.append([x.clone() for x in results])
    for first in range(3):
        for second in range(first):
            assert torch.equal(seen[first][1], seen[second][1])  # the LSE
            for which in (0, 2, 3, 4):
                assert not torch.equal(seen[first][which], seen[second][which])
    # And again from the same seed.
    torch.manual_seed(11)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(results, seen[0], strict=True))


def _packed_step(cu_seqlens: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """A forward and backward of packed sequences, with as many queries as keys."""
    options = dict(causal=True, return_lse=True, deterministic=True, backend="triton")
    out, lse = flash_attention_packed(*tensors, cu_seqlens, cu_seqlens, 100, 100, **options)
    return out, lse, *torch.autograd.grad(out, tensors, torch.ones_like(out))


def test_the_host_never_reads_lengths() -> None:
    """Of packed sequences, documents, and queries that are padding; the second time none of it is at hand."""
    tensors = [torch.randn(200, 4, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3)]
    q, k, v = (x.detach().unflatten(0, (2, 100)).transpose(1, 2) for x in tensors)
    mask = torch.arange(100, device="cuda") < torch.tensor([[100], [30]], device="cuda")
    for context in (nullcontext, _no_synchronisation):
        with context():
            _packed_step(cu_seqlens_of_documents(mask.int(), most=5), *tensors)
            own = mask.clone()
            flash_attention(q, k, v, mask=own, query_mask=own, causal=True, backend="triton")


def test_a_captured_packed_call_reads_lengths_anew() -> None:
    """Though tables of the same lengths were kept before, and are after."""
    tensors = [torch.randn(200, 4, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3)]
    cu_seqlens = torch.tensor([0, 100, 150, 160], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _packed_step(cu_seqlens, *tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _packed_step(cu_seqlens, *tensors)
    for places in ([0, 30, 130, 200], [0, 0, 60, 61]):
        cu_seqlens.copy_(torch.tensor(places))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(results, _packed_step(cu_seqlens, *tensors), rtol=0, atol=0)


@EACH
def test_on_a_side_stream(backend: Backend) -> None:
    call = call_for(backend, BUSY, torch.float16)
    expected = run(call, backend.name)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # whatever ran on the default stream instead would be early
        q = call.q * 1
        answer = run(call.with_(q=q), backend.name)
    side.synchronize()
    _assert_alike(answer, expected, call, backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one() -> None:
    call = make_call(BUSY, torch.float16, "cuda:1")
    assert torch.cuda.current_device() == 0
    check(run(call, "triton"), call)


# ---------------------------------------------------------------------------------------------------------------------
# Determinism and memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    (
        BUSY,
        Case("causal", heads=4, queries=1024, keys=1024, d=64, causal=True),
        Case("gqa", heads=8, kv_heads=1, queries=300, keys=700, d=128),
        Case("dense", queries=500, keys=500, d=64, mask="bhij"),
        Case("dropout", queries=500, keys=500, d=64, dropout_p=0.3, causal=True),
    ),
    ids=str,
)
@HALF
def test_fifty_repeats_give_the_same_bits(case: Case, dtype: torch.dtype) -> None:
    call = make_call(case, dtype, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first = run(call, "triton")
        for _ in range(50):
            assert_same_bits(run(call, "triton"), first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mask", ("none", "pad_right", "b11j"))
def test_memory_beside_inputs_and_outputs(mask: str) -> None:
    """Key padding costs O(b j): there is no array of (i, j), nor a copy of an input."""
    case = Case("x", batch=2, heads=4, queries=8192, keys=8192, d=64, mask=mask, causal=True)
    call = make_call(case, torch.float16, "cuda")
    run(call, "triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answer = run(call, "triton")
    torch.cuda.synchronize()
    results = sum(x.numel() * x.element_size() for x in (answer.out, answer.lse, answer.dq, answer.dk, answer.dv))
    rows = 3 * case.batch * case.heads * case.queries * 4  # delta, the scaled LSE, and one more for rounding
    extra = torch.cuda.max_memory_allocated() - before - results
    assert extra <= rows + 16 * case.batch * case.keys + 2**20


@pytest.mark.parametrize("d", (128, 256))
def test_float64_at_large_head_dims(d: int) -> None:
    call = make_call(Case("x", batch=1, heads=2, queries=140, keys=150, d=d, causal=True), torch.float64, "cuda")
    check(run(call, "triton"), call)
