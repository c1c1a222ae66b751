"""The self-check where it belongs: what is right checks right, and a call notices nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flash_attend import check, explain, flash_attention
from flash_attend.target import DeviceTarget
from parts import forget

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("FLASH_ATTEND_CACHE", str(tmp_path))
    forget()
    yield
    forget()


@pytest.mark.parametrize("products", check.PRODUCTS, ids=" ".join)
def test_every_variant_at_64_checks_right(products: tuple[str, str]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    variants = [one for one in check.servable(DeviceTarget.of(device)) if one.kind[:3] == (*products, 64)]
    findings = [check.check(variant, device) for variant in variants]
    assert findings
    assert [finding.reason for finding in findings if not finding.right] == []


def test_auto_takes_the_kernels_and_nothing_else_changes() -> None:
    q = torch.randn(2, 4, 100, 64, dtype=torch.float16, device="cuda", requires_grad=True)
    state, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        flash_attention(q, q, q, causal=True).sum().backward()
    torch.cuda.synchronize()
    assert explain(q, q, q, causal=True).plan.name == "triton"
    assert torch.equal(torch.cuda.get_rng_state(), state)
    q.grad = None
    assert torch.cuda.memory_allocated() == allocated


def test_an_unknown_variant_is_not_captured() -> None:
    q = torch.randn(1, 1, 64, 64, dtype=torch.float16, device="cuda")
    with pytest.raises(RuntimeError, match="call it once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        flash_attention(q, q, q)
    flash_attention(q, q, q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attention(q, q, q)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.allclose(out, flash_attention(q, q, q, backend="math"), atol=5e-3)
