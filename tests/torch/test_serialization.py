"""Modules that hold an `Attend` are copied, saved, loaded and sent to other processes as they were before."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from complex_valued_transformer import ComplexTransformer
from torch import Tensor, nn

from flash_attend import Attend, patch

pytestmark = pytest.mark.filterwarnings("ignore:.*sdp_kernel.*")  # what the client's flash path calls


def by_pickle(protocol: int) -> Callable[[Any], Any]:
    return lambda module: pickle.loads(pickle.dumps(module, protocol))


def save_and_load(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle{protocol}": by_pickle(protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)},
    "torch.save": save_and_load,
}
OPTIONS = {
    "defaults": {},
    "all": dict(dropout=0.25, causal=True, heads=4, scale=0.5, backend="math", deterministic=True),
    "einsum": dict(flash=False),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


class Block(nn.Module):
    """One layer of attention, with its heads merged and projected."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(16, 48, bias=False)
        self.norm = nn.BatchNorm1d(16)  # has buffers
        self.attend = attend
        self.to_out = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(b, n, 16)` -> the same."""
        x = self.norm(x.mT).mT
        q, k, v = self.to_qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.to_out(self.attend(q, k, v, mask=mask).transpose(1, 2).flatten(2))


def answers(module: nn.Module) -> tuple[Tensor, Tensor]:
    """What a block gives, and the gradient of its input; the same draws of dropout each time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 16, generator=generator).requires_grad_()
    torch.manual_seed(1)
    out = module(x, mask=torch.tensor([[True] * 7, [True] * 4 + [False] * 3]))
    return out, *torch.autograd.grad(out.square().sum(), x)


def assert_same(module: nn.Module, other: nn.Module) -> None:
    for ours, theirs in zip(answers(module), answers(other), strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_attend_keeps_everything(way: Callable, options: dict[str, Any]) -> None:
    attend = Attend(**options).eval()
    attend.attn_dropout.train()
    again = way(attend)
    assert type(again) is Attend
    assert (again.training, again.attn_dropout.training) == (False, True)
    for name in ("dropout", "causal", "heads", "scale", "flash", "backend", "deterministic"):
        assert getattr(again, name) == getattr(attend, name)
    assert repr(again) == repr(attend)


@each_way
def test_a_module_that_holds_one(way: Callable) -> None:
    block = Block(Attend(causal=True, dropout=0.3))
    answers(block)  # with whatever a call leaves behind
    assert_same(way(block), block)


def test_a_deep_copy_is_apart() -> None:
    block = Block(Attend(causal=True))
    again = copy.deepcopy(block)
    again.attend.causal = False
    again.attend.dropout = 0.5
    assert block.attend.causal
    assert block.attend.dropout == 0.0


def test_loading_without_trusting_the_file() -> None:
    """A whole module in a file is code: torch loads it only if its classes are named."""
    file = io.BytesIO()
    attend = Attend(causal=True, dropout=0.3)
    torch.save(attend, file)
    file.seek(0)
    with torch.serialization.safe_globals([Attend, nn.Dropout]):
        again = torch.load(file, weights_only=True)
    assert repr(again) == repr(attend)


def test_sent_to_a_process_that_is_started_afresh() -> None:
    q, k, v = torch.randn(3, 2, 2, 7, 8)
    calls = [
        (Attend(causal=True, scale=0.3), (q, k, v, torch.rand(2, 7) > 0.3)),
        (patched_client()[0].requires_grad_(False).eval(), (torch.randint(0, 32, (1, 9)),)),
    ]
    # With another number of threads, sums would run in another order.
    threads = dict(initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **threads) as pool:
        for module, inputs in calls:
            assert torch.equal(pool.submit(module, *inputs).result(timeout=120), module(*inputs))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def test_no_keys_of_its_own() -> None:
    block = Block(Attend(dropout=0.1, causal=True))
    answers(block)
    assert not block.attend.state_dict()
    assert not any("attend" in key for key in block.state_dict())
    assert not [*block.attend.parameters(), *block.attend.buffers()]
    assert block.attend.load_state_dict({}, strict=True).missing_keys == []


def test_a_checkpoint_of_the_replaced_module_loads() -> None:
    class Seed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn_dropout = nn.Dropout(0.1)
            self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool), persistent=False)

    checkpoint = nn.ModuleDict({"proj": nn.Linear(2, 2), "attend": Seed()}).state_dict()
    ours = nn.ModuleDict({"proj": nn.Linear(2, 2), "attend": Attend(0.1)})
    ours.load_state_dict(checkpoint, strict=True)
    assert torch.equal(ours["proj"].weight, checkpoint["proj.weight"])


def client() -> nn.Module:
    torch.manual_seed(0)
    return ComplexTransformer(dim=16, depth=2, num_tokens=32, causal=True, heads=2, dim_head=8)


def patched_client() -> tuple[nn.Module, Any]:
    model = client()
    return model, patch(model)


def test_a_patched_model_loads_its_old_checkpoint() -> None:
    model = client()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    old = save_and_load(model.state_dict())

    patched, handle = patched_client()
    assert handle.replaced
    assert patched.state_dict().keys() == old.keys()
    patched.load_state_dict(old, strict=True)
    tokens = torch.randint(0, 32, (1, 9))
    torch.testing.assert_close(patched(tokens), model(tokens))

    again = client()
    again.load_state_dict(save_and_load(patched.state_dict()), strict=True)
    assert torch.equal(again(tokens), model(tokens))


def test_an_optimizer_goes_on_across_a_patch() -> None:
    """Its state is by parameter, and the parameters stay."""
    model = client()
    optimizer = torch.optim.Adam(model.parameters())
    before = list(model.parameters())
    patch(model)
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    optimizer.load_state_dict(save_and_load(optimizer.state_dict()))
