"""Our attention in the place of torch's own function, for code inside a context and inside a module."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as imported
from torch.utils.checkpoint import checkpoint

from flash_attend import patch_sdpa, replace_sdpa
from flash_attend.integrations import pytorch


class Attention(nn.Module):
    """As timm and diffusers write it."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.project, self.again = nn.Linear(16, 48), again

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Recomputing(nn.Module):
    """Computes its attention again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attention, x, use_reentrant=False)


def of_layer(layer: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        out = layer(x, **options) if isinstance(layer, nn.TransformerEncoderLayer) else layer(x, x, **options)
        return out

    return call


torch.manual_seed(0)
PADDED = torch.arange(6) >= torch.tensor([[6], [4]])
FUTURE = torch.ones(6, 6, dtype=torch.bool).triu(1)
MULTI = nn.MultiheadAttention(16, 2, batch_first=True)
ENCODER = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
DECODER = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "by attribute": (lambda x: F.scaled_dot_product_attention(x, x, x), 1),
    "by name": (lambda x: imported(x, x, x), 1),
    "by torch's private name": (lambda x: torch._C._nn.scaled_dot_product_attention(x, x, x, is_causal=True), 1),
    "in a module": (Attention(), 1),
    "MultiheadAttention": (lambda x: MULTI(x, x, x, need_weights=False)[0], 1),
    "MultiheadAttention, masks": (
        lambda x: MULTI(x, x, x, need_weights=False, key_padding_mask=PADDED, attn_mask=FUTURE)[0],
        1,
    ),
    "MultiheadAttention, weights": (lambda x: MULTI(x, x, x)[1], 0),
    "TransformerEncoderLayer": (lambda x: ENCODER(x, src_mask=FUTURE, is_causal=True), 1),
    "TransformerEncoderLayer, padded": (lambda x: ENCODER(x, src_key_padding_mask=PADDED), 1),
    "TransformerDecoderLayer": (lambda x: DECODER(x, x, tgt_mask=FUTURE, tgt_is_causal=True), 2),
}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends of the calls that ours was asked for."""
    calls: list[str] = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(options["backend"])
        return attend(*args, **options)

    attend = pytorch.scaled_dot_product_attention
    monkeypatch.setattr(pytorch, "scaled_dot_product_attention", counted)
    return calls


@pytest.fixture(autouse=True)
def _each_warning_again() -> Iterator[None]:
    pytorch._warn.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def example(seed: int = 0) -> Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def results(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Its output, and the gradient of what it takes."""
    x = example()
    out = call(x)
    return out, torch.autograd.grad(out, x, torch.linspace(-1, 1, out.numel()).reshape(out.shape))[0]


@pytest.mark.parametrize(("call", "count"), CALLS.values(), ids=CALLS)
def test_calls_are_reached(call: Callable[[Tensor], Tensor], count: int, served: list[str]) -> None:
    theirs = results(call)
    assert served == []
    with replace_sdpa():
        ours = results(call)
    assert served == ["auto"] * count
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_torchs_fast_path_in_eval_is_left(served: list[str]) -> None:
    encoder = nn.TransformerEncoder(copy.deepcopy(ENCODER), 2).eval()
    x = example().detach()
    with torch.no_grad():
        theirs = encoder(x)
        with replace_sdpa():
            ours = encoder(x)
    assert served == ["auto"] * 2
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_served_goes_to_torch_with_one_warning(served: list[str]) -> None:
    q = example().detach()[:, None]
    with warnings.catch_warnings(action="ignore"):  # a prototype, says torch
        nested = torch.nested.nested_tensor([torch.randn(2, n, 8) for n in (3, 5)])
    # q, k and v, options, what the warning says
    calls = [
        ((q, q, q), dict(dropout_p=1.0), r"dropout_p must be in \[0, 1\), got 1.0"),
        ((nested, nested, nested), {}, "query must be a dense strided tensor"),
        (
            (q.expand(2, 4, 6, 16), q.expand(2, 2, 6, 16), q),
            dict(enable_gqa=True),
            "key and value must have the same number",
        ),
    ]
    for tensors, options, told in calls:
        theirs = F.scaled_dot_product_attention(*tensors, **options)
        with replace_sdpa():
            with pytest.warns(UserWarning, match=f"torch's own .* has served a call: .*{told}"):
                ours = F.scaled_dot_product_attention(*tensors, **options)
            F.scaled_dot_product_attention(*tensors, **options)  # silently
        pairs = zip(ours.unbind(), theirs.unbind(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_what_torch_refuses_raises_torchs_own_error(served: list[str]) -> None:
    q = example()[:, None]
    with replace_sdpa(), pytest.raises(RuntimeError, match="same dtype"):
        F.scaled_dot_product_attention(q, q.half(), q)
    with replace_sdpa(), pytest.raises(TypeError, match="unexpected"):
        F.scaled_dot_product_attention(q, q, q, unknown=True)


def test_a_gpu_without_kernels_of_ours_is_left_to_torch(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch, "kept_by_torch", lambda device: f"nothing for {device}")
    q = example().detach()[:, None]
    with replace_sdpa(), pytest.warns(UserWarning, match="nothing for cpu"):
        F.scaled_dot_product_attention(q, q, q)
    assert served == []
    with replace_sdpa("math"):
        F.scaled_dot_product_attention(q, q, q)
    assert served == ["math"], "a backend that is asked for by name serves"


def test_a_backend_by_name_raises_what_it_cannot_serve() -> None:
    q = example()[:, None]
    with replace_sdpa("sdpa"), pytest.raises(ValueError, match="backend 'sdpa' cannot serve"):
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    with pytest.raises(ValueError, match="backend must be one of"):
        replace_sdpa("flash")


def test_contexts_nest_and_end(served: list[str]) -> None:
    def call() -> None:
        x = example()[:, None]
        F.scaled_dot_product_attention(x, x, x)

    with replace_sdpa("math"):
        call()
        with replace_sdpa("sdpa"):
            call()
            MULTI(example(), example(), example(), need_weights=False)
        with pytest.raises(KeyError), replace_sdpa():
            raise KeyError
        call()
    call()
    assert served == ["math", "sdpa", "sdpa", "math"]


def test_other_threads_are_left_alone(served: list[str]) -> None:
    x = example().detach()[:, None]
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(10)
        F.scaled_dot_product_attention(x, x, x)
        with replace_sdpa("math"):
            F.scaled_dot_product_attention(x, x, x)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with replace_sdpa("sdpa"):
        inside.set()
        assert done.wait(10)
        F.scaled_dot_product_attention(x, x, x)
    thread.join()
    assert served == ["math", "sdpa"]


@pytest.mark.parametrize(("where", "layer"), (("inside", ENCODER), ("outside", Attention()), ("module", Attention())))
def test_compiled(where: str, layer: nn.Module) -> None:
    """One graph, in which our operators stand, whether it is entered by what is compiled, around it, or by a module."""
    model = copy.deepcopy(layer)
    theirs = results(model)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(graph)
        return graph.forward

    def entered(x: Tensor) -> Tensor:
        with replace_sdpa():
            return model(x)

    torch.compiler.reset()
    if where == "module":
        patch_sdpa(model)
    compiled = torch.compile(entered if where == "inside" else model, fullgraph=True, backend=keep)
    if where == "outside":
        results(compiled)
        with replace_sdpa():
            ours = results(compiled)
        results(compiled)
        assert len(graphs) == 2, "one for each, and a guard between them"
    else:
        ours = results(compiled)
    assert ["flash_attend" in str(graph.graph) for graph in graphs] == [False, True][-len(graphs) :]
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_served_is_compiled_as_torchs_own() -> None:
    def entered(q: Tensor) -> Tensor:
        with replace_sdpa():
            return F.scaled_dot_product_attention(q, q, q, dropout_p=1.0)

    torch.compiler.reset()
    with pytest.warns(UserWarning, match=r"has served a call: dropout_p must be in \[0, 1\)"):
        out = torch.compile(entered, fullgraph=True, backend="eager")(example()[:, None])
    assert (out == 0).all()


def test_one_module(served: list[str]) -> None:
    model, other = nn.Sequential(Attention(), nn.Linear(16, 16), Attention()), Attention()
    state, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    theirs = results(model)
    handle = patch_sdpa(model, backend="math")
    assert list(model.state_dict()) == state
    assert isinstance(model[0], Attention)
    assert type(model[0]).__name__ == "Attention"
    assert type(model[1]) is nn.Linear
    results(other)
    assert served == []
    for patched in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        served.clear()
        for x, y in zip(results(patched), theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        assert served == ["math"] * 2
    with patch_sdpa(model[2]):
        served.clear()
        results(model)
        assert served == ["math", "auto"]
    handle.restore()
    assert [type(module) for module in model.modules()] == kinds
    served.clear()
    results(model)
    assert served == []


def test_a_module_that_a_checkpoint_calls_again(served: list[str]) -> None:
    model = Recomputing()
    theirs = results(model)
    patch_sdpa(model)
    for x, y in zip(results(model), theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert served == ["auto"] * 2, "in the forward and again in the backward, outside of the model's own call"


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        patch_sdpa(example)
    with pytest.raises(ValueError, match="backend must be one of"):
        patch_sdpa(nn.Linear(2, 2), backend="flash")
