"""complex-valued-transformer's complete form, served as a whole: by parts of q, k and v instead of copies of them."""

from __future__ import annotations

import pytest
import torch
from complex_valued_transformer import ComplexMultiheadAttention
from complex_valued_transformer import complex_valued_transformer as client
from torch import Tensor, nn

from flash_attend import complex_attention, patch
from flash_attend.integrations.complex_valued import attend_whole
from flash_attend.testing.memory import peak_bytes

MASK = (torch.arange(12) < torch.tensor([[12], [7]]))[:, None, None]


def attention(complete: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return ComplexMultiheadAttention(16, causal=True, dim_head=4, heads=2, complete_complex=complete)


def results(module: nn.Module) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    x = torch.randn(2, 12, 16, dtype=torch.cfloat, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = module(x, mask=MASK)
    return [out, *torch.autograd.grad((out * out.conj()).real.sum(), [x, *module.parameters()])]


def test_it_computes_the_same_from_parts() -> None:
    """What the Attend is called with has the batch of the input, and single parts."""
    module = attention()
    before = results(module)
    inner = module.attend.keywords["attend"]
    shapes: list[tuple[int, ...]] = []
    inner.register_forward_pre_hook(lambda _, args: shapes.extend(x.shape for x in args))
    handle = patch(module, strict=True)
    torch.testing.assert_close(results(module), before, rtol=1e-4, atol=1e-5)
    assert shapes == [(2, 2, 12, 4)] * 12
    handle.restore()
    assert module.attend.func is client.complex_attention_complete
    assert all(map(torch.equal, results(module), before))


def test_each_of_several_patches_can_be_undone() -> None:
    module = attention()
    first, second = patch(module), patch(module, backend="math")
    assert [outcome.paths for outcome in second.outcomes] == [("attend.keywords['attend']",)]
    second.restore()
    assert module.attend.func is attend_whole
    first.restore()
    assert module.attend.func is client.complex_attention_complete


def test_the_real_form_needs_nothing_more() -> None:
    module = attention(complete=False)
    patch(module, strict=True)
    assert module.attend.func is client.complex_attention_real


def test_it_takes_a_third_of_the_memory() -> None:
    x = torch.randn(1, 192, 16, dtype=torch.cfloat)
    module = attention()
    own = peak_bytes(lambda: module(x), x.device)
    patch(module, strict=True)
    assert peak_bytes(lambda: module(x), x.device) < own / 3


# What the package says that it computes.
def equation(q: Tensor, k: Tensor, v: Tensor, attend: nn.Module, mask: Tensor | None = None) -> Tensor:
    def by_parts(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return attend(x, y, z, mask=mask)

    (a, b), (c, d), (e, f) = ((x.real, x.imag) for x in (q, k, v))
    real = by_parts(a, c, e) - by_parts(a, d, f) - by_parts(b, c, f) - by_parts(b, d, e)
    return torch.complex(real, by_parts(a, c, f) + by_parts(a, d, e) + by_parts(b, c, e) - by_parts(b, d, f))


def another(q: Tensor, k: Tensor, v: Tensor, attend: nn.Module, mask: Tensor | None = None) -> Tensor:
    return 2 * equation(q, k, v, attend, mask)


def test_a_version_that_computes_the_equation_is_served_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for function, served in ((equation, True), (another, False)):
        monkeypatch.setattr(client, "complex_attention_complete", function)
        module = attention()
        before = results(module)
        patch(module, strict=True)
        assert (module.attend.func is attend_whole) == served
        torch.testing.assert_close(results(module), before, rtol=1e-4, atol=1e-5)
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.cfloat) for _ in range(3))
    ours = complex_attention(q, k, v, complete=True)
    torch.testing.assert_close(equation(q, k, v, attended), ours, rtol=1e-4, atol=1e-5)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: None = None) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v
