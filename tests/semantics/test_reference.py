"""What only the einsum path can show: chunks of queries, their memory, second derivatives, where it accumulates."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flash_attend import dropout, reference
from flash_attend.checks import normalise_inputs
from flash_attend.operands import Operands

SEED = torch.tensor([2**35 + 11])

# What each regime makes of a call as small as these tests': three queries a chunk, kept or computed again.
REGIMES = {
    "whole": {},
    "chunks": dict(CACHED_SCORES=1, FEWEST_QUERIES=3),
    "recomputed_chunks": dict(HELD_SCORES=1, FEWEST_QUERIES=3),
}
each_regime = pytest.mark.parametrize("regime", REGIMES)
each_chunked_regime = pytest.mark.parametrize("regime", ["chunks", "recomputed_chunks"])


def use(monkeypatch: pytest.MonkeyPatch, regime: str) -> None:
    for name, value in REGIMES[regime].items():
        monkeypatch.setattr(reference, name, value)


def attend(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = True, **options) -> tuple[Tensor, Tensor | None]:
    operands, spec = normalise_inputs(q, k, v, **options)
    tensors = operands[:4]
    return reference.attention_reference(Operands(*tensors, SEED), spec, return_lse=return_lse)


def make_inputs(b, h, hk, i, j, d, dv, dtype=torch.float64, grad=True) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (b, h, i, d), (b, hk, j, d), (b, hk, j, dv)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes)


def make_mask(kind: str | None, b: int, h: int, i: int, j: int) -> Tensor | None:
    """Masks with dead rows, keys that nobody reads, and a batch that has its first keys hidden."""
    if kind is None:
        return None
    mask = torch.rand({"key": (b, 1, 1, j), "key_per_head": (b, h, 1, j), "dense": (b, h, i, j)}[kind]) < 0.6
    mask[0, ..., :2] = False
    mask[..., j // 2] = False
    if kind == "dense":
        mask[:, :, i // 3] = False
    return mask


def results(inputs: tuple[Tensor, ...], grad_out: Tensor, grad_lse: Tensor, **options) -> tuple[Tensor, ...]:
    out, lse = attend(*inputs, **options)
    return out, lse, *torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))


MASKED = [(mask, causal) for mask in (None, "key", "key_per_head", "dense") for causal in (False, True)]
each_mask = pytest.mark.parametrize(("mask", "causal"), MASKED)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------------------
# Chunks
# ---------------------------------------------------------------------------------------------------------------------


@each_chunked_regime
@each_mask
@pytest.mark.parametrize("lengths", [(10, 10), (7, 16), (17, 8)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_chunks_change_nothing(regime, mask, causal, lengths, dropout_p, monkeypatch):
    i, j = lengths
    inputs = make_inputs(2, 4, 2, i, j, 5, 3)
    options = dict(mask=make_mask(mask, 2, 4, i, j), causal=causal, dropout_p=dropout_p)
    grads = torch.randn(2, 4, i, 3).double(), torch.randn(2, 4, i).double()
    whole = results(inputs, *grads, **options)
    use(monkeypatch, regime)
    for got, want in zip(results(inputs, *grads, **options), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
        assert torch.equal(got == 0, want == 0)  # dead rows and unread keys, exactly


@each_regime
@pytest.mark.parametrize("mask", ["key_per_head", "dense"])
def test_garbage_stays_out_of_every_chunk(regime, mask, monkeypatch):
    use(monkeypatch, regime)
    q, k, v = make_inputs(2, 4, 2, 10, 10, 5, 3)
    mask = make_mask(mask, 2, 4, 10, 10)
    grads = torch.randn(2, 4, 10, 3).double(), torch.randn(2, 4, 10).double()
    read = mask.unflatten(1, (2, 2)).expand(2, 2, 2, 10, 10).tril().any(dim=3).any(dim=2)
    assert not read.all()
    clean = results((q, k, v), *grads, mask=mask, causal=True)
    for garbage in (torch.nan, torch.inf):
        dirty = [x.detach().masked_fill(~read[..., None], garbage).requires_grad_() for x in (k, v)]
        for got, want in zip(results((q, *dirty), *grads, mask=mask, causal=True), clean, strict=True):
            assert torch.equal(got, want)


@each_regime
@each_mask
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_gradients_that_are_written_out_are_those_of_autograd(regime, mask, causal, dropout_p, monkeypatch):
    """In every regime, with garbage in the keys that nobody reads, and where either incoming gradient is missing."""
    inputs = make_inputs(2, 4, 2, 11, 9, 5, 3)
    options = dict(mask=make_mask(mask, 2, 4, 11, 9), causal=causal, dropout_p=dropout_p)
    grads = torch.randn(2, 4, 11, 3).double(), torch.randn(2, 4, 11).double()
    of_out = results(inputs, grads[0], torch.zeros_like(grads[1]), **options)[2:]
    of_lse = results(inputs, torch.zeros_like(grads[0]), grads[1], **options)[2:]
    if mask is not None:
        unread = of_lse[1].eq(0).all(dim=-1, keepdim=True)
        assert unread.any()
        inputs = inputs[0], *(x.detach().masked_fill(unread, torch.nan) for x in inputs[1:])
    use(monkeypatch, regime)
    operands, spec = normalise_inputs(*inputs, **options)
    tensors = operands[:4]
    both = [a + b for a, b in zip(of_out, of_lse, strict=True)]
    for given, expected in (((grads[0], None), of_out), ((None, grads[1]), of_lse), (grads, both)):
        found = reference.attention_reference_gradients(*given, Operands(*tensors, SEED), spec)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
            assert torch.equal(got == 0, want == 0)  # dead rows and unread keys, exactly


def test_only_a_gradient_asks_for_a_second_computation(monkeypatch):
    calls = []

    def spy(function, *args, **kwargs):
        calls.append(args)
        return checkpoint(function, *args, **kwargs)

    checkpoint = reference.checkpoint
    monkeypatch.setattr(reference, "checkpoint", spy)
    inputs = make_inputs(1, 2, 2, 10, 10, 4, 4)
    attend(*inputs)
    use(monkeypatch, "chunks")
    attend(*inputs)
    use(monkeypatch, "recomputed_chunks")
    attend(*(x.detach() for x in inputs))
    with torch.no_grad():
        attend(*inputs)
    assert not calls
    attend(inputs[0].detach(), inputs[1].detach(), inputs[2])
    assert len(calls) == 4


def test_the_random_state_is_left_alone(monkeypatch):
    use(monkeypatch, "recomputed_chunks")
    inputs = make_inputs(1, 2, 2, 10, 10, 4, 4)
    state = torch.get_rng_state()
    attend(*inputs, dropout_p=0.5)[0].sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


class PeakMemory(TorchDispatchMode):
    """The most bytes that the tensors made under it held at one time, beside those that there were before."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.held, self.peak = 0, 0
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        return result

    def release(self, address: int, size: int) -> None:
        self.known.remove(address)
        self.held -= size


@pytest.mark.parametrize(("mask", "causal"), [(None, False), ("key", True), ("dense", True)])
@pytest.mark.parametrize("differentiated", ["out", "lse", "both"])
def test_chunks_hold_little_at_a_time(mask, causal, differentiated, monkeypatch):
    """Beside tensors of the inputs' size, a few arrays of one chunk: also where one of two results is left out."""
    monkeypatch.setattr(dropout, "LARGEST_PIECE", 2**10)
    monkeypatch.setattr(reference, "readable", lambda *tensors: True)  # as without the mode that counts bytes
    h, i, d = 2, 256, 8
    inputs = make_inputs(1, h, h, i, i, d, d, dtype=torch.float32)
    mask = make_mask(mask, 1, h, i, i)
    options = dict(mask=mask, causal=causal, dropout_p=0.1)

    def peak() -> int:
        with PeakMemory(*inputs, *([] if mask is None else [mask])) as memory:
            out, lse = attend(*inputs, **options)
            results = {"out": [out], "lse": [lse], "both": [out, lse]}[differentiated]
            grads = torch.autograd.grad(results, inputs, list(map(torch.ones_like, results)), allow_unused=True)
            assert any(grad is not None for grad in grads)
        return memory.peak

    whole = peak()
    held_scores = 2**13
    monkeypatch.setattr(reference, "HELD_SCORES", held_scores)
    monkeypatch.setattr(reference, "FEWEST_QUERIES", 1)
    limit = 12 * inputs[0].nbytes + 7 * held_scores * 4
    assert peak() < limit < whole / 4


MEMORY = """
import sys
import torch
from flash_attend.operands import Operands
from flash_attend.reference import attention_reference
from flash_attend.checks import normalise_inputs

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

def run(length):
    q, k, v = (torch.randn(1, 2, length, 64, requires_grad=True) for _ in range(3))
    mask = torch.arange(length)[None] < length - 5
    operands, spec = normalise_inputs(q, k, v, mask=mask, causal=True)
    tensors = operands[:4]
    out, lse = attention_reference(Operands(*tensors), spec, return_lse=True)
    out.square().sum().backward()
    return q.grad, k.grad, v.grad, q, k, v, out, lse

run(1024)  # thread pools, and libraries that load when they are needed
before = status("VmRSS")
kept = run(int(sys.argv[1]))
own = sum(tensor.untyped_storage().nbytes() for tensor in kept)
print(status("VmHWM") - before - own)
"""


OF_PROCESS = Path("/proc/self/status")


@pytest.mark.skipif(not OF_PROCESS.exists(), reason="reads the peak memory of a process from Linux's /proc")
def test_a_process_needs_no_array_of_all_scores():
    """The scores of two heads of 6144 x 6144 are 288 MB an array, and a backward without chunks holds four of them."""
    run = subprocess.run([sys.executable, "-c", MEMORY, "6144"], check=True, capture_output=True, text=True)
    assert int(run.stdout) < 2**30


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["whole", "recomputed_chunks"])
@pytest.mark.parametrize(("mask", "causal", "dropout_p"), [(*case, 0.0) for case in MASKED] + [("key", True, 0.4)])
def test_second_derivatives(regime, mask, causal, dropout_p, monkeypatch):
    use(monkeypatch, regime)
    b, h, hk, i, j = 1, 2, 1, 5, 4  # under causal the first query is dead
    inputs = make_inputs(b, h, hk, i, j, 2, 3)
    options = dict(mask=make_mask(mask, b, h, i, j), causal=causal, dropout_p=dropout_p)
    alive = attend(*inputs, **options)[1].isfinite().detach()
    assert alive.any()

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(*inputs, **options)
        return out, lse[alive]  # minus infinity has no differences

    assert torch.autograd.gradcheck(function, inputs, atol=1e-8, rtol=1e-6)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-7, rtol=1e-5, fast_mode=True)


@each_regime
@each_mask
def test_no_derivative_makes_a_nan_on_its_way(regime, mask, causal, monkeypatch):
    use(monkeypatch, regime)
    inputs = make_inputs(2, 2, 1, 9, 8, 4, 4, dtype=torch.float32)
    with torch.autograd.set_detect_anomaly(True):
        out, lse = attend(*inputs, mask=make_mask(mask, 2, 2, 9, 8), causal=causal, dropout_p=0.2)
        assert causal == lse.isinf().any() or mask == "dense"
        grads = torch.autograd.grad((out.square().sum(), lse.sum()), inputs, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_torch_func_differentiates_it():
    inputs = make_inputs(1, 2, 1, 5, 6, 4, 3, grad=False)
    options = dict(mask=make_mask("key", 1, 2, 5, 6), causal=True)
    leaves = [x.clone().requires_grad_() for x in inputs]
    attend(*leaves, **options)[0].square().sum().backward()
    grads = torch.func.grad(lambda *x: attend(*x, **options)[0].square().sum(), argnums=(0, 1, 2))(*inputs)
    for grad, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-13, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes
# ---------------------------------------------------------------------------------------------------------------------


@each_regime
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(regime, dtype, monkeypatch):
    """Rounding the inputs and the results is all that half precision does: the same bits as float32, rounded once."""
    use(monkeypatch, regime)
    half = make_inputs(2, 4, 2, 40, 70, 16, 24, dtype=dtype)
    full = [x.detach().float().requires_grad_() for x in half]
    grad_out, grad_lse = torch.randn(2, 4, 40, 24).to(dtype), torch.randn(2, 4, 40)
    options = dict(mask=make_mask("key", 2, 4, 40, 70), causal=True, dropout_p=0.25)
    got = results(half, grad_out, grad_lse, **options)
    want = results(full, grad_out.float(), grad_lse, **options)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype, dtype]
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other.to(one.dtype))


def test_scores_beyond_half_precision_are_no_infinity():
    q = torch.full((1, 1, 2, 64), 200.0, dtype=torch.float16)  # q k^T = 2.56e6, float16 ends at 65504
    k = torch.stack([q[0, 0, 0], q[0, 0, 0] / 2])[None, None]
    v = torch.tensor([[[[1.0], [2.0]]]], dtype=torch.float16)
    out, lse = attend(q, k, v, scale=1.0)
    assert (out == 1).all()
    assert (lse == 2.56e6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_takes_nothing_to_half_precision(dtype):
    inputs = make_inputs(1, 2, 2, 20, 20, 16, 16, dtype=dtype, grad=False)
    want = attend(*inputs, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(*inputs, causal=True)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_a_tensor_without_data_has_a_result_without_data():
    inputs = [x.to("meta") for x in make_inputs(2, 4, 2, 10, 12, 5, 3, dtype=torch.bfloat16, grad=False)]
    out, lse = attend(*inputs, mask=torch.ones(2, 12, dtype=torch.bool, device="meta"), causal=True)
    assert (out.shape, out.dtype) == ((2, 4, 10, 3), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 10), torch.float32)


def test_no_lse_where_none_is_asked_for():
    assert attend(*make_inputs(1, 1, 1, 4, 4, 2, 2), return_lse=False)[1] is None
