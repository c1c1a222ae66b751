"""The peers of the benchmarks compute what they are timed for, and say why where they cannot."""

from __future__ import annotations

import itertools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention

import peers
from cases import Case, Inputs, make_inputs
from flash_attend.dispatch import BackendUnavailable
from flash_attend.testing.budget import assert_within_budget
from flash_attend.testing.oracle import Answer, attention_oracle
from measure import numerics
from peers import PEERS, Attention, Peer, Unserved, peers_for

# The models' own Attends call what PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*sdp_kernel.*:FutureWarning")

CPU = torch.device("cpu")
SQUARE = Case(batch=3, heads=4, kv_heads=4, queries=24, keys=24, head_dim=8, value_dim=8, dtype="float32")
RIGHT, LEFT, HOLES = (replace(SQUARE, mask=mask, valid=0.5) for mask in ("right", "left", "holes"))
CROSS = replace(SQUARE, queries=9)
CASES = {
    "full": SQUARE,
    "causal": replace(SQUARE, causal=True),
    "right": RIGHT,
    "right causal": replace(RIGHT, causal=True),
    "left": LEFT,
    "left causal": replace(LEFT, causal=True),
    "holes": HOLES,
    "holes causal": replace(HOLES, causal=True),
    "documents": replace(SQUARE, mask="documents", valid=0.25),
    "documents causal": replace(SQUARE, mask="documents", valid=0.25, causal=True),
    "grouped": replace(SQUARE, kv_heads=2, causal=True),
    "grouped right": replace(RIGHT, kv_heads=1),
    "wide values": replace(SQUARE, value_dim=16),
    "cross": CROSS,
    "cross right": replace(CROSS, mask="right", valid=0.5),
    "cross causal": replace(CROSS, causal=True),
    "cross right causal": replace(CROSS, mask="right", valid=0.5, causal=True),
    "cross grouped causal": replace(CROSS, kv_heads=2, causal=True),
    "more queries": replace(SQUARE, keys=9),
    "more queries causal": replace(SQUARE, keys=9, causal=True),
    "decoding": replace(SQUARE, queries=1, causal=True),
    "decoding right": replace(RIGHT, queries=1, causal=True),
}

COMPLEX = "complex-valued-transformer"
UNSERVED = {
    ("sdpa flash", "wide values"): "no available kernel: Flash attention requires q,k,v to have the same last dim"
}
WRONG = {(COMPLEX, "more queries causal")}  # aligned at the top left: nothing here hides that


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors as small as these wait for a pool of threads longer than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def named(name: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == name)


def check(attention: Attention, inputs: Inputs, whole: bool = False) -> None:
    """Fails unless the output, and the gradients of inputs that need some, are within the error budget, in the rows
    that count or in all of them."""
    leaves = inputs.q, inputs.k, inputs.v
    options = dict(mask=inputs.mask, causal=inputs.case.causal, grad_out=inputs.grad_out)
    truth = attention_oracle(*leaves, **options)
    out = attention(*leaves)
    needed = inputs.q.requires_grad
    gradients = torch.autograd.grad(out, leaves, inputs.grad_out) if needed else (None, None, None)
    if not whole:
        out = torch.where(inputs.rows[:, None, :, None], out, truth.out.to(out.dtype))
    assert_within_budget(Answer(out.detach(), None, *gradients), truth, *leaves, **options)


def attend_by_sequence(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int, causal: bool
) -> Tensor:
    """What the kernels for packed sequences do: `q (t, h, d)`, `k (u, hk, d)`, `v (u, hk, dv)` -> `(t, h, dv)`."""
    for starts, longest, packed in ((starts_q, longest_q, q), (starts_k, longest_k, k), (starts_k, longest_k, v)):
        assert starts.dtype == torch.int32
        assert starts[0] == 0
        assert starts[-1] == len(packed)
        assert starts.diff().max() == longest
    outs = []
    for (a, b), (c, d) in zip(
        itertools.pairwise(starts_q.tolist()), itertools.pairwise(starts_k.tolist()), strict=True
    ):
        x, y, z = (t.transpose(0, 1) for t in (q[a:b], k[c:d], v[c:d]))  # (h, n, d)
        y, z = (t.repeat_interleave(len(x) // len(t), dim=0) for t in (y, z))
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a)) if causal else None
        outs.append(F.scaled_dot_product_attention(x[None], y[None], z[None], attn_mask=seen)[0].transpose(0, 1))
    return torch.cat(outs)


# ---------------------------------------------------------------------------------------------------------------------
# What runs on a CPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "name",
    ["flash_attend", "flash_attend math", "sdpa", "sdpa flash", "sdpa math", "sdpa efficient", COMPLEX],
)
def test_computes_what_the_oracle_computes(name: str, case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "_compiled", lambda function: function)
    if name == "sdpa efficient":  # which a CPU does not have; what is called for it can be checked
        monkeypatch.setattr(peers, "sdpa_kernel", lambda backend: torch.nn.attention.sdpa_kernel(SDPBackend.MATH))
    peer, inputs = named(name), make_inputs(CASES[case], CPU)
    if refusal := UNSERVED.get((name, case)):
        with pytest.raises(Unserved, match=refusal):
            peer.prepare(inputs)
    elif (name, case) in WRONG:
        with pytest.raises(AssertionError, match="out: largest error"):
            check(peer.prepare(inputs), inputs)
    else:
        check(peer.prepare(inputs), inputs, whole=peer.ours)


def test_every_backend_and_backward_of_ours_is_asked_for_by_name():
    inputs = make_inputs(SQUARE, CPU)
    ours = {peer.name.removeprefix("flash_attend").strip(): peer for peer in PEERS if peer.ours}
    kernels = [f"{name}{way}" for name in ("triton", "hopper") for way in ("", " fused")]
    assert [*ours] == ["", *kernels, "sdpa", "math"]
    for name in kernels:
        attention = ours[name].prepare(inputs)
        with pytest.raises(BackendUnavailable, match=f"backend '{name.split()[0]}' cannot serve"):  # nor does another
            attention(inputs.q, inputs.k, inputs.v)
    assert [ours[name].served(inputs).split(",")[0] for name in ("", "sdpa", "math")] == ["sdpa", "sdpa", "math"]


@pytest.mark.parametrize("name", ["flash_attend", "flash_attend math", "sdpa", "sdpa math", COMPLEX])
def test_drops_weights_where_the_case_says_so(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "_compiled", lambda function: function)
    for dropout_p, repeats in ((0.0, True), (0.5, False)):
        inputs = make_inputs(replace(CASES["right causal"], dropout_p=dropout_p), CPU)
        attention = named(name).prepare(inputs)
        outs = [attention(inputs.q, inputs.k, inputs.v) for _ in range(2)]
        assert torch.equal(*outs) == repeats


# ---------------------------------------------------------------------------------------------------------------------
# Why a kernel is not there
# ---------------------------------------------------------------------------------------------------------------------

DROPOUT = replace(RIGHT, dropout_p=0.5)


@pytest.mark.parametrize(
    ("name", "case", "refusal"),
    [
        ("sdpa flash", DROPOUT, r"^no available kernel: Both fused kernels do not support non-zero dropout\.$"),
        ("flex", DROPOUT, "no dropout"),
        ("flex + mask", SQUARE, "as for flex"),
        *((name, DROPOUT, "no dropout") for name in ("varlen", "flash-attention 4")),
        *((name, CASES["documents"], "not a dense mask") for name in ("varlen", "flash-attention 4", "naturalspeech2")),
        *((name, CASES["cross right causal"], "another alignment") for name in ("varlen", "flash-attention 4")),
    ],
)
@pytest.mark.usefixtures("flash_attention_4", "naturalspeech2")
def test_a_peer_says_what_it_does_not_serve(name: str, case: Case, refusal: str):
    with pytest.raises(Unserved, match=refusal):
        named(name).prepare(make_inputs(case, CPU))


def test_the_reason_is_not_that_other_kernels_are_off():
    place = " (Triggered internally at sdp_utils.cpp:1.)"
    messages = [
        "`torch.backends.cuda.sdp_kernel()` is deprecated.",
        "Memory efficient kernel not used because:" + place,
        "Memory Efficient attention has been runtime disabled." + place,
        "Flash attention kernel not used because:" + place,
        "Expected query, key and value to all be of dtype: {Half, BFloat16}.\nGot float instead." + place,
        "CuDNN attention kernel not used because:" + place,
        "cuDNN requires sm80." + place,
    ]

    def fail(told: list[str]) -> None:
        for message in told:
            warnings.warn(message, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    inputs = make_inputs(SQUARE, CPU)
    expected = (
        "^no available kernel: Expected query, key and value to all be of dtype: {Half, BFloat16}. Got float inst"
    )
    with pytest.raises(Unserved, match=expected):
        peers._with_kernel(lambda q, k, v: fail(messages), inputs)
    with pytest.raises(RuntimeError, match=r"No available kernel\. Aborting"):
        peers._with_kernel(lambda q, k, v: fail(messages[:4]), inputs)


def test_another_error_goes_through():
    inputs = make_inputs(SQUARE, CPU)
    with pytest.raises(RuntimeError, match="No viable backend"):  # PyTorch's own, on a CPU
        named("sdpa cudnn").prepare(inputs)

    def fail(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        peers._with_kernel(fail, inputs)


@pytest.mark.parametrize("name", ["flash_attend math", "sdpa math"])
def test_who_writes_all_scores_down_is_not_measured_with_too_many_on_a_gpu(name: str):
    def on_a_gpu(n: int) -> types.SimpleNamespace:
        case = replace(SQUARE, batch=1, heads=2**10, kv_heads=2**10, queries=n, keys=2**10)
        return types.SimpleNamespace(case=case, mask=None, q=types.SimpleNamespace(is_cuda=True))

    with pytest.raises(Unserved, match="writes down all 257 Mi scores; measured up to 256 Mi"):
        named(name).prepare(on_a_gpu(257))
    if name == "flash_attend math":  # the other looks for a kernel
        assert named(name).prepare(on_a_gpu(256))


# ---------------------------------------------------------------------------------------------------------------------
# Packed sequences: stand-ins with the signatures of the real functions
# ---------------------------------------------------------------------------------------------------------------------

PACKED = [name for name in CASES if not name.startswith("documents") and name != "cross right causal"]


def varlen_with_window(q, k, v, starts_q, starts_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert window_size in ((-1, -1), (-1, 0))
    return attend_by_sequence(q, k, v, starts_q, starts_k, max_q, max_k, window_size == (-1, 0))


def varlen_with_flag(q, k, v, starts_q, starts_k, max_q, max_k, is_causal=False):
    return attend_by_sequence(q, k, v, starts_q, starts_k, max_q, max_k, is_causal)


@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("function", [varlen_with_window, varlen_with_flag])
def test_varlen_computes_what_the_oracle_computes(function: Callable, case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "varlen_attn", function)
    inputs = make_inputs(CASES[case], CPU)
    check(named("varlen").prepare(inputs), inputs)


@pytest.fixture
def flash_attention_4(monkeypatch: pytest.MonkeyPatch) -> list:
    """A package flash_attn.cute, whose calls are listed."""
    calls = []

    def flash_attn_func(q, k, v, causal=False, deterministic=False):
        calls.append(("dense", deterministic))
        starts = [torch.arange(len(x) + 1, dtype=torch.int32) * x.shape[1] for x in (q, k)]
        packed = (x.flatten(0, 1) for x in (q, k, v))
        out = attend_by_sequence(*packed, *starts, q.shape[1], k.shape[1], causal)
        return out.unflatten(0, q.shape[:2]), None

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, deterministic=False
    ):
        calls.append(("packed", deterministic))
        return attend_by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal), None

    cute = types.ModuleType("flash_attn.cute")
    cute.flash_attn_func, cute.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package = types.ModuleType("flash_attn")
    package.cute = cute
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    return calls


@pytest.mark.parametrize("case", PACKED)
def test_flash_attention_4_computes_what_the_oracle_computes(case: str, flash_attention_4: list):
    inputs = make_inputs(CASES[case], CPU)
    attention = named("flash-attention 4").prepare(inputs)
    check(attention, inputs)
    with numerics("float32", deterministic=True):
        attention(inputs.q, inputs.k, inputs.v)
    form = "dense" if inputs.mask is None else "packed"
    assert flash_attention_4 == [(form, False), (form, True)]


def test_what_an_installed_package_lacks_is_no_refusal(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        named("flash-attention 4").prepare(make_inputs(SQUARE, CPU))


# ---------------------------------------------------------------------------------------------------------------------
# FlexAttention, which has no backward on a CPU; uncompiled
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", CASES)
def test_flex_computes_what_the_oracle_computes(case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "_compiled", lambda function: function)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    inputs = make_inputs(CASES[case], CPU)
    no_gradients = replace(inputs, **{name: getattr(inputs, name).detach() for name in "qkv"})
    check(named("flex").prepare(inputs), no_gradients)
    if inputs.mask is not None:
        check(named("flex + mask").prepare(inputs), no_gradients)


@pytest.mark.parametrize(("name", "prepared", "called"), [("flex", 1, 0), ("flex + mask", 0, 1)])
def test_a_block_mask_is_made_when_the_name_says(
    name: str, prepared: int, called: int, monkeypatch: pytest.MonkeyPatch
):
    made = []
    monkeypatch.setattr(peers, "_compiled", lambda function: function)
    monkeypatch.setattr(peers, "create_block_mask", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(peers, "flex_attention", lambda q, k, v, **options: q)
    inputs = make_inputs(CASES["right causal"], CPU)
    attention = named(name).prepare(inputs)
    assert len(made) == prepared
    for _ in range(2):
        attention(inputs.q, inputs.k, inputs.v)
    assert len(made) == prepared + 2 * called


# ---------------------------------------------------------------------------------------------------------------------
# The models' own
# ---------------------------------------------------------------------------------------------------------------------

STAND_IN = """
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

class Attend(nn.Module):
    def __init__(self, dropout=0., causal=False, use_flash=False):
        super().__init__()
        self.dropout, self.causal = dropout, causal
        assert use_flash

    def forward(self, q, k, v, mask=None):
        mask = None if mask is None else mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=self.causal)
"""


@pytest.fixture
def naturalspeech2(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A package of that name whose own module must not be run."""
    package = tmp_path / "naturalspeech2_pytorch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('audiolm_pytorch')\n")
    (package / "attend.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peers, "_load_attend", peers._load_attend.__wrapped__)  # nothing that another test loaded


@pytest.mark.parametrize("case", ["full", "causal", "right", "holes", "grouped", "grouped right", "wide values"])
@pytest.mark.usefixtures("naturalspeech2")
def test_naturalspeech2_is_called_as_its_model_calls_it(case: str):
    inputs = make_inputs(CASES[case], CPU)
    check(named("naturalspeech2").prepare(inputs), inputs)


def test_a_peer_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "_load_attend", peers._load_attend.__wrapped__)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    packages = {COMPLEX: "complex-valued-transformer", "naturalspeech2": "naturalspeech2-pytorch"}
    for name, package in (packages | {"flash-attention 4": "flash-attn-4"}).items():
        with pytest.raises(Unserved, match=f"^not installed: pip install {package}$"):
            named(name).prepare(make_inputs(SQUARE, CPU))


# ---------------------------------------------------------------------------------------------------------------------
# The choice of peers
# ---------------------------------------------------------------------------------------------------------------------


def test_the_peers_of_a_device():
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    on_a_cpu = ["flash_attend sdpa"]
    assert [peer.name for peer in PEERS if peer not in peers_for(PEERS, "cuda")] == on_a_cpu
    compiling = ["flex", "flex + mask"]
    assert [peer.name for peer in PEERS if peer not in peers_for(PEERS, "cuda", quick=True)] == on_a_cpu + compiling
    names = {peer.name for peer in peers_for(PEERS, "cpu")}
    sdpa, ours = {"sdpa", "sdpa flash", "sdpa math"}, {"flash_attend", "flash_attend sdpa", "flash_attend math"}
    assert names == sdpa | ours | {COMPLEX, "naturalspeech2"}
    asked_for = peers_for(PEERS, "cpu", ["sdpa*", "flex"])
    assert {peer.name for peer in asked_for} == sdpa | {"flex"}
    with pytest.raises(ValueError, match=r"no peer on cpu is named 'varlen'; there are 'flash_attend', "):
        peers_for(PEERS, "cpu", ["sdpa", "varlen"])
