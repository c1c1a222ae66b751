"""torch.compile: no graph breaks, one graph for many lengths, and what is compiled computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from backends import BACKENDS, MATH_CPU, MATH_CUDA, TRITON_CUDA, Backend, skip_unless_served
from flash_attend import Attend, BackendUnavailable, flash_attention, functional
from flash_attend.ops import FORWARD, Options
from flash_attend.testing.calls import Case, check, make_call, run

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable, backend: str = "aot_eager") -> tuple[Callable, CompileCounterWithBackend]:
    """The function in one graph without breaks, traced forward and backward, and what counts its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True), counter


SMALL = dict(batch=2, heads=2, kv_heads=1, d=3, dv=5)
CASES = (
    Case("padded_causal_keys_of_one_head", **{**SMALL, "kv_heads": 0}, mask="pad_left", causal=True),
    Case("dense", **SMALL, mask="bhij", scale=-0.7, grads="out"),
    Case("dropout", **SMALL, mask="1h1j", dropout_p=0.3),
    Case("bias_sinks", **SMALL, bias="1h1j", sinks=True, mask="pad_left", causal=True),
    Case("window_softcap_alibi", **SMALL, window=(3, 1), softcap=1.5, alibi="h", bias="hij"),
)
EVERYTHING = Case("everything", **{**SMALL, "batch": 1}, mask="1hij", dropout_p=0.2)


def answer_lengths(case: Case, backend: Backend, lengths: list[tuple[int, int]]) -> int:
    """Compiles a case, checks it at all these numbers of queries and keys, and counts the compilations."""
    attend, counter = compiled(flash_attention)
    for queries, keys in lengths:
        call = make_call(Case(**{**vars(case), "queries": queries, "keys": keys}), torch.float32, backend.device)
        skip_unless_served(backend, call)
        check(run(call, backend.name, attend=attend), call)
    return counter.frame_count


@on_every_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_second_graph_serves_all_lengths(case: Case, backend: Backend) -> None:
    assert answer_lengths(case, backend, [(5, 8), (7, 13), (33, 34)]) == 2


@on_every_backend
def test_twenty_lengths_compile_twice(backend: Backend) -> None:
    """A quarter of them in the interpreter, where each takes a second."""
    lengths = [(2 + n, 5 + n) for n in range(0, 20, 4 if backend.interpreted else 1)]
    assert answer_lengths(EVERYTHING, backend, lengths) == 2


@on_every_backend
def test_lengths_marked_dynamic_compile_once(backend: Backend) -> None:
    attend, counter = compiled(flash_attention)
    for queries in (5, 9, 30):
        call = make_call(Case("x", **SMALL, queries=queries, keys=queries + 2), torch.float32, backend.device)
        for tensor in (call.q, call.k, call.v):
            torch._dynamo.mark_dynamic(tensor, 2)
        attend(call.q, call.k, call.v, backend=backend.name)
    assert counter.frame_count == 1


class Model(nn.Module):
    """What an Attend is in: projections before it, and heads that are merged after it."""

    def __init__(self, backend: Backend, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 24, device=backend.device)
        self.attend = Attend(causal=True, backend=backend.name, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v, mask=mask).transpose(1, 2).flatten(2)


@on_every_backend
def test_a_module_trains_in_one_graph(backend: Backend) -> None:
    """Its loss falls, and without dropout its output is that of the module itself."""
    model = Model(backend, dropout=0.1)
    step, counter = compiled(model)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for length in (12, 9, 12, 12):
        torch.manual_seed(length)
        x = torch.randn(2, length, 8).to(backend.device)
        loss = (step(x) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert counter.frame_count == 2
    model.eval()
    mask = torch.arange(12, device=backend.device) < torch.tensor([[12], [5]], device=backend.device)
    x = torch.randn(2, 12, 8, device=backend.device)
    assert torch.equal(step(x, mask), model(x, mask))


@pytest.mark.parametrize(
    "backend",
    (
        pytest.param(MATH_CPU, id=str(MATH_CPU)),
        pytest.param(MATH_CUDA, id=str(MATH_CUDA), marks=pytest.mark.gpu),
        pytest.param(TRITON_CUDA, id=str(TRITON_CUDA), marks=pytest.mark.gpu),
    ),
)
def test_inductor(backend: Backend) -> None:
    """What PyTorch compiles by default; its random numbers are not those of the eager operators."""
    attend = torch.compile(flash_attention, fullgraph=True)
    case = Case("x", **SMALL, queries=6, keys=9, mask="pad_left", causal=True)
    call = make_call(case, torch.float32, backend.device)
    check(run(call, backend.name, attend=attend), call)
    dropping = call.with_(dropout_p=0.4)
    first, again, other = (run(dropping.with_(torch_seed=s), backend.name, attend=attend).out for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("math", "triton"))
def test_cuda_graphs_that_the_compiler_makes(backend: str) -> None:
    attend = torch.compile(flash_attention, mode="reduce-overhead", fullgraph=True)
    call = make_call(Case("x", **SMALL, queries=6, keys=9, mask="pad_left", causal=True), torch.float32, "cuda")
    for _ in range(4):  # some to warm up, one that is captured, and replays
        torch.compiler.cudagraph_mark_step_begin()
        check(run(call, backend, attend=attend), call)


# ---------------------------------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------------------------------


@on_every_backend
def test_dropout_draws_anew_at_every_call_and_from_the_seed(backend: Backend) -> None:
    attend, _ = compiled(flash_attention)
    call = make_call(Case("x", **SMALL, queries=6, keys=9, dropout_p=0.5), torch.float32, backend.device)

    def twice(function: Callable) -> list[Tensor]:
        torch.manual_seed(3)
        return [function(call.q, call.k, call.v, dropout_p=0.5, backend=backend.name) for _ in range(2)]

    first, second = twice(attend)
    assert not torch.equal(first, second)
    for got, want in zip(twice(attend), twice(flash_attention), strict=True):
        assert torch.equal(got, want)


@on_every_backend
def test_a_graph_does_not_outlive_the_precision_that_it_was_made_for(backend: Backend) -> None:
    precisions = []

    def note(graph: torch.fx.GraphModule, _: list) -> Callable:
        precisions.extend(Options.read(node.args[2]).precision for node in graph.graph.nodes if node.target is FORWARD)
        return graph

    attend = torch.compile(flash_attention, backend=note, fullgraph=True)
    call = make_call(Case("x", **SMALL, queries=6, keys=9), torch.float32, backend.device)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium", "highest"):
            torch.set_float32_matmul_precision(precision)
            attend(call.q, call.k, call.v, backend=backend.name)
    finally:
        torch.set_float32_matmul_precision(before)
    assert precisions == ["tf32x3", "tf32"]


@on_every_backend
def test_a_graph_does_not_outlive_the_wish_for_determinism(backend: Backend) -> None:
    attend, counter = compiled(flash_attention)
    call = make_call(Case("x", **SMALL, queries=6, keys=9), torch.float32, backend.device)
    attend(call.q, call.k, call.v, backend=backend.name)
    torch.use_deterministic_algorithms(True)
    try:
        attend(call.q, call.k, call.v, backend=backend.name)
    finally:
        torch.use_deterministic_algorithms(False)
    assert counter.frame_count == 2


def test_the_warning_of_a_fallback_comes_while_compiling() -> None:
    def call(x: Tensor) -> Tensor:
        functional.warn_once("some reason that nobody has met before")
        return x + 1

    with pytest.warns(UserWarning, match="some reason"):
        compiled(call)[0](torch.zeros(1))


@pytest.mark.gpu
def test_auto_compiles_on_a_gpu_whatever_serves() -> None:
    attend, _ = compiled(flash_attention)
    call = make_call(Case("x", **SMALL, queries=6, keys=9, mask="pad_left"), torch.float32, "cuda")
    check(run(call, "auto", attend=attend), call)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "dtype": (dict(k=torch.zeros(2, 2, 7, 3, dtype=torch.float16)), TypeError, "k must have q's dtype"),
    "shape": (dict(k=torch.zeros(2, 2, 7, 4)), ValueError, "k must have q's last dimension d = 3"),
    "length": (dict(v=torch.zeros(2, 2, 8, 5)), ValueError, "k and v must be equally long"),
    "mask_dtype": (dict(mask=torch.zeros(2, 7)), TypeError, "mask must be bool"),
    "mask_shape": (dict(mask=torch.ones(2, 8, dtype=torch.bool)), ValueError, "a 2-D mask is key padding"),
    "no_tensor": (dict(q=[1.0]), TypeError, r"q must be a torch\.Tensor, got list"),
    "causal": (dict(causal=1), TypeError, "causal must be a bool"),
    "dropout": (dict(dropout_p=1.5), ValueError, "dropout_p must be in"),
    "scale": (dict(scale=float("nan")), ValueError, "scale must be finite"),
    "backend": (dict(backend="flash"), ValueError, "backend must be one of"),
    "unavailable": (dict(backend="triton"), BackendUnavailable, "cpu tensors; the kernels need a CUDA device"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_raises_what_it_raises_without_a_compiler(mistake: str) -> None:
    """With fullgraph=True the compiler gives up, and says the same in its own exception."""
    changes, kind, message = MISTAKES[mistake]
    tensors = dict(q=torch.zeros(2, 4, 5, 3), k=torch.zeros(2, 2, 7, 3), v=torch.zeros(2, 2, 7, 5))
    for attend in (flash_attention, torch.compile(flash_attention, backend="eager")):
        with pytest.raises(kind, match=message):
            attend(**{**tensors, **changes})
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(flash_attention, backend="eager", fullgraph=True)(**{**tensors, **changes})


# ---------------------------------------------------------------------------------------------------------------------
# Torch.func
# ---------------------------------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Callable], Callable]] = {
    "grad": lambda f: torch.func.grad(lambda q: f(q).sin().sum()),
    "vmap": torch.vmap,
    "jvp": lambda f: lambda q: torch.func.jvp(f, (q,), (q.cos(),))[1],
}


@on_every_backend
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_torch_func_makes_of_it_compiles(transform: str, backend: Backend) -> None:
    call = make_call(Case("x", **SMALL, queries=5, keys=7, mask="pad_left"), torch.float64, backend.device)
    q = torch.stack([call.q, call.q + 1]) if "vmap" in transform else call.q

    def attend(q: Tensor) -> Tensor:
        return flash_attention(q, call.k, call.v, mask=call.mask, backend=backend.name)

    transformed = TRANSFORMS[transform](attend)
    torch.testing.assert_close(compiled(transformed)[0](q), transformed(q), rtol=1e-12, atol=1e-14)
