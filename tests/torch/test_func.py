"""torch.func and forward mode: vmap over anything, and every derivative that PyTorch can take of the einsum path."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress, product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from backends import BACKENDS, CHOOSY, Backend, skip_unless_served
from flash_attend import Attend, flash_attention
from flash_attend.testing.calls import Call

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)

SIZE = 2  # of the dimension that is mapped over
NAMES = ("q", "k", "v", "mask")
MAPPED = [mapped for mapped in product((False, True), repeat=4) if any(mapped)]


def tensors(backend: Backend, mask: str = "key", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and mask of `SIZE` calls, grouped heads with dead rows among them, stacked in front."""
    torch.manual_seed(0)
    shapes = (2, 2, 3, 2), (2, 1, 5, 2), (2, 1, 5, 3)
    q, k, v = (torch.randn(SIZE, *shape, dtype=torch.float64).to(backend.device, dtype) for shape in shapes)
    shape = {"key": (2, 5), "shared": (1, 1, 1, 5), "dense": (2, 1, 3, 5), "per_head": (1, 2, 3, 5)}[mask]
    visible = torch.rand(SIZE, *shape) < 0.6
    visible[..., 0, :] = mask == "shared"
    return [q, k, v, visible.to(backend.device)]


def attention(backend: Backend, **options) -> Callable:
    """`(q, k, v, mask) -> (out, lse)`; an lse of minus infinity, which has no difference to itself, as 0."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, lse = flash_attention(q, k, v, mask=mask, return_lse=True, backend=backend.name, **options)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    return attend


def loss_of(attend: Callable) -> Callable:
    def loss(*inputs: Tensor) -> Tensor:
        out, lse = attend(*inputs)
        return out.sin().sum() + lse.cos().sum()

    return loss


def assert_equal(got: object, want: object) -> None:
    """To what float64 leaves of different orders of summation."""
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def names_of(mapped: tuple[bool, ...]) -> str:
    return "+".join(compress(NAMES, mapped))


# ---------------------------------------------------------------------------------------------------------------------
# Vmap
# ---------------------------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("mapped", MAPPED, ids=names_of)
def test_vmap_over_any_of_q_k_v_and_mask(backend: Backend, mapped: tuple[bool, ...]) -> None:
    stacked = tensors(backend)
    inputs = [x if is_mapped else x[0] for x, is_mapped in zip(stacked, mapped, strict=True)]
    in_dims = tuple(0 if is_mapped else None for is_mapped in mapped)
    attend = attention(backend)
    each = [attend(*(x[n] if m else x for x, m in zip(inputs, mapped, strict=True))) for n in range(SIZE)]
    assert_equal(torch.vmap(attend, in_dims)(*inputs), tuple(map(torch.stack, zip(*each, strict=True))))


@on_every_backend
@pytest.mark.parametrize("mask", ("shared", "per_head"))
def test_gradients_inside_and_outside_of_vmap(backend: Backend, mask: str) -> None:
    """Of samples with k and v in common: each one's own, and the sum of all."""
    q, k, v, masks = tensors(backend, mask)
    inputs, in_dims = (q, k[0], v[0], masks if mask != "shared" else masks[0]), (0, None, None, 0)
    in_dims = in_dims if mask != "shared" else (0, None, None, None)
    loss = loss_of(attention(backend))
    samples = [(q[n], k[0], v[0], masks[n] if mask != "shared" else masks[0]) for n in range(SIZE)]
    each = [torch.func.grad(loss, (0, 1, 2))(*sample) for sample in samples]
    per_sample = tuple(map(torch.stack, zip(*each, strict=True)))
    assert_equal(torch.vmap(torch.func.grad(loss, (0, 1, 2)), in_dims)(*inputs), per_sample)
    total = torch.func.grad(lambda *inputs: torch.vmap(loss, in_dims)(*inputs).sum(), (0, 1, 2))(*inputs)
    assert_equal(total, (per_sample[0], per_sample[1].sum(0), per_sample[2].sum(0)))


@on_every_backend
def test_vmap_over_other_dimensions_and_inside_itself(backend: Backend) -> None:
    q, k, v, mask = tensors(backend)
    attend = attention(backend, causal=True)
    expected = torch.vmap(attend)(q, k, v, mask)
    moved = q.movedim(0, -1), k.movedim(0, 2), v, mask.movedim(0, 1)
    assert_equal(torch.vmap(attend, (-1, 2, 0, 1), out_dims=1)(*moved), tuple(x.transpose(0, 1) for x in expected))
    both = torch.vmap(torch.vmap(attend, (None, 0, 0, 0)), (0, None, None, None))(q, k, v, mask)
    assert_equal(tuple(x.diagonal().movedim(-1, 0) for x in both), expected)


@pytest.mark.parametrize("backend", (*BACKENDS, *CHOOSY[:1]))
@pytest.mark.parametrize(
    ("mapped", "of_batch"),
    (
        ("q", 1),
        ("q", 2),
        ("bias", 2),
        ("q bias", 1),
        ("sinks", 1),
        ("alibi_slopes", 2),
        ("q bias sinks alibi_slopes", 2),
    ),
)
def test_vmap_over_what_changes_scores(backend: Backend, mapped: str, of_batch: int) -> None:
    """Outputs, each entry's own gradients, and those of the sum of all."""
    q, k, v, _ = tensors(backend)
    v = v[..., :2]  # PyTorch's attention takes no other value dimension
    whole = dict(q=q, bias=torch.randn(SIZE, of_batch, 2, 3, 5), alibi_slopes=torch.rand(SIZE, of_batch, 2))
    if backend.name != "sdpa" or "sinks" in mapped:
        whole["sinks"] = torch.randn(SIZE, 2)
    whole = {name: x.to(q) for name, x in whole.items()}
    firsts = {name: x[0] for name, x in whole.items()}
    skip_unless_served(backend, Call(k=k[0], v=v[0], mask=None, grad_out=None, grad_lse=None, **firsts))
    dims = {name: 0 if name in mapped.split() else None for name in whole}
    inputs = {name: x if dims[name] == 0 else firsts[name] for name, x in whole.items()}
    samples = [{name: x if dims[name] is None else x[n] for name, x in inputs.items()} for n in range(SIZE)]

    def attend(inputs: dict[str, Tensor]) -> Tensor:
        return flash_attention(**inputs, k=k[0], v=v[0], window=(3, 1), backend=backend.name)

    def gradients(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        slopes = inputs["alibi_slopes"]
        others = {name: x for name, x in inputs.items() if name != "alibi_slopes"}
        return torch.func.grad(lambda others: attend({**others, "alibi_slopes": slopes}).sin().sum())(others)

    def total(others: dict[str, Tensor]) -> Tensor:
        return torch.vmap(attend, (dims,))({**inputs, **others}).sin().sum()

    assert_equal(torch.vmap(attend, (dims,))(inputs), torch.stack([*map(attend, samples)]))
    each = [*map(gradients, samples)]
    stacked = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    assert_equal(torch.vmap(gradients, (dims,))(inputs), stacked)
    summed = torch.func.grad(total)({name: x for name, x in inputs.items() if name != "alibi_slopes"})
    assert_equal(summed, {name: x if dims[name] == 0 else x.sum(0) for name, x in stacked.items()})


@on_every_backend
@pytest.mark.parametrize("options", ({}, {"dropout_p": 0.4}), ids=("plain", "dropout"))
def test_vmap_over_no_entries(options: dict, backend: Backend) -> None:
    """Empty results of the shapes that there would be, of gradients too."""
    q, k, v, mask = (x[:0] for x in tensors(backend))
    attend = attention(backend, **options)
    for randomness in ("same", "different"):
        out, lse = torch.vmap(attend, randomness=randomness)(q, k, v, mask)
        assert (out.shape, lse.shape) == ((0, 2, 2, 3, 3), (0, 2, 2, 3))
        grads = torch.vmap(torch.func.grad(loss_of(attend), (0, 1, 2)), randomness=randomness)(q, k, v, mask)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@on_every_backend
def test_dropout_under_vmap(backend: Backend) -> None:
    """Different weights for each entry, the same ones, or an error, as torch's own random functions have it."""
    q, k, v, _ = (x[:1].expand_as(x) for x in tensors(backend, dtype=torch.float32))

    def attend(q: Tensor) -> Tensor:
        return Attend(dropout=0.5, backend=backend.name)(q, k[0], v[0])

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(attend)(q)
    for randomness, alike in (("different", False), ("same", True)):
        mapped = torch.vmap(attend, randomness=randomness)
        torch.manual_seed(5)
        first = mapped(q)
        assert all(torch.equal(first[0], other) == alike for other in first[1:])
        assert not torch.equal(first, mapped(q))
        torch.manual_seed(5)
        assert torch.equal(first, mapped(q))


@on_every_backend
@pytest.mark.parametrize("randomness", ("different", "same"))
def test_gradients_of_dropout_under_vmap(backend: Backend, randomness: str) -> None:
    """Attention is linear in v: the gradient of a sum with respect to v, times v, is that sum."""
    q, k, v, _ = tensors(backend)

    def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, dropout_p=0.4, backend=backend.name).sum()

    mapped = torch.vmap(torch.func.grad_and_value(total, 2), randomness=randomness)
    grads, values = mapped(q, k, v)
    assert_equal((grads * v).flatten(1).sum(1), values)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives
# ---------------------------------------------------------------------------------------------------------------------


def derivatives(attend: Callable, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """What there is to be compared between a backend and the einsum path."""
    inputs = q, k, v
    loss = loss_of(attend)
    torch.manual_seed(1)
    tangents = tuple(map(torch.randn_like, inputs))
    cotangents = tuple(map(torch.randn_like, attend(*inputs)))

    def dual() -> tuple[Tensor, ...]:
        with forward_ad.dual_level():
            outputs = attend(q, forward_ad.make_dual(k, tangents[1]), v)
            return tuple(forward_ad.unpack_dual(x).tangent for x in outputs)

    return {
        "grad": lambda: torch.func.grad(loss, (0, 1, 2))(*inputs),
        "vjp": lambda: torch.func.vjp(attend, *inputs)[1](cotangents),
        "jvp": lambda: torch.func.jvp(attend, inputs, tangents),
        "dual_numbers": dual,
        "jvp_of_grad": lambda: torch.func.jvp(torch.func.grad(loss, (0, 1, 2)), inputs, tangents)[1],
        "jvp_of_vjp": lambda: torch.func.jvp(torch.func.vjp(attend, *inputs)[1], (cotangents,), (cotangents,))[1],
        "grad_of_jvp": lambda: torch.func.grad(lambda q: torch.func.jvp(loss, (q, k, v), tangents)[1])(q),
        "grad_of_grad": lambda: torch.func.grad(lambda k: torch.func.grad(loss)(q, k, v).sin().sum())(k),
        "jacrev": lambda: torch.func.jacrev(lambda q: attend(q, k, v)[0])(q),
        "jacfwd": lambda: torch.func.jacfwd(lambda q: attend(q, k, v)[0])(q),
        "hessian": lambda: torch.func.hessian(lambda q: loss(q, k, v))(q),
    }


DERIVATIVES = tuple(derivatives(lambda *inputs: inputs, *[torch.zeros(1)] * 3))


@on_every_backend
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_are_those_of_the_einsum_path(backend: Backend, name: str) -> None:
    """Which `test_double_backward.py` and `test_gradcheck.py` compare with differences."""
    q, k, v, mask = (x[0, :1] for x in tensors(backend, "dense"))

    def through(name: str) -> Callable:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = flash_attention(q, k, v, mask=mask, causal=True, return_lse=True, backend=name)
            return out, lse.masked_fill(lse.isneginf(), 0.0)

        return attend

    got, want = (derivatives(through(which), q, k, v)[name]() for which in (backend.name, "math"))
    assert_equal(got, want)
    assert any(x.abs().max() > 0.01 for x in torch.utils._pytree.tree_leaves(got))
