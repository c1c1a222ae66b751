"""Derivatives that are pushed forward: every way to ask for them, beside torch's own of the einsum path as a whole."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, linearize, vmap

from backends import BACKENDS, CHOOSY, Backend, skip_unless_interpretable
from flash_attend import complex_attention, flash_attention, flash_attention_packed, ops
from flash_attend.checks import normalise_inputs
from flash_attend.ops import Options
from flash_attend.reference import attention_reference
from flash_attend.testing.calls import Case, make_call

on_every_backend = pytest.mark.parametrize("backend", (*BACKENDS, *CHOOSY[:1]))

Attend = Callable[..., tuple[Tensor, Tensor]]
Mode = Callable[[Attend, dict[str, Tensor], dict[str, Tensor]], tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]

CASE = Case(
    "x", batch=1, heads=2, kv_heads=1, queries=4, keys=5, d=2, mask="pad_left", bias="1hij", window=(3, 1), alibi="h"
)


def call_on(backend: Backend) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What has tangents, and the options of a call with dead rows."""
    call = make_call(CASE, torch.float64, backend.device)
    call.mask[:, :3] = False
    options = call.options
    return dict(q=call.q, k=call.k, v=call.v, bias=options.pop("bias")), options


def tangents_of(given: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn_like(x) for name, x in given.items()}


def ours(backend: Backend, options: dict[str, Any]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flash_attention(q, k, v, bias=bias, **options, return_lse=True, backend=backend.name)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    return attend


def of_torch(options: dict[str, Any]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        operands, spec = normalise_inputs(q, k, v, bias=bias, **options)
        out, lse = attention_reference(operands, spec, return_lse=True)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    return attend


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What operators did: forward or backward, and with the tangents of what."""
    found: list[str] = []

    def noted(name: str, run: Callable) -> Callable:
        def note(*arguments: Any) -> list[Tensor]:
            found.append(" ".join((name, *Options.read(arguments[-1]).tangents)))
            return run(*arguments)

        return note

    for name in ("forward", "backward"):
        monkeypatch.setattr(ops, name, noted(name, getattr(ops, name)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Every way
# ---------------------------------------------------------------------------------------------------------------------


def by_jvp(attend: Attend, given: dict[str, Tensor], tangents: dict[str, Tensor]) -> tuple:
    """Outputs and their tangents, by torch.func."""
    return jvp(attend, tuple(given.values()), tuple(tangents.values()))


def by_duals(attend: Attend, given: dict[str, Tensor], tangents: dict[str, Tensor]) -> tuple:
    """The same by dual numbers."""
    with forward_ad.dual_level():
        moved = {name: forward_ad.make_dual(given[name], x) for name, x in tangents.items()}
        pairs = [forward_ad.unpack_dual(x) for x in attend(**{**given, **moved})]
    return tuple(zip(*pairs, strict=True))


def total(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return outputs[0].sin().sum() + outputs[1].cos().sum()


# Losses on outputs and their tangents, as MeanFlow has it, and others.
LOSSES: dict[str, Callable[[tuple, tuple], Tensor]] = {
    "out": lambda outputs, moved: sum((x * y.detach()).sum() for x, y in zip(outputs, moved, strict=True)),
    "tangents": lambda outputs, moved: total(moved),
    "both": lambda outputs, moved: total(outputs) + total(moved),
}


def leaves_of(given: dict[str, Tensor], tangents: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return tuple({name: x.clone().requires_grad_() for name, x in each.items()} for each in (given, tangents))


def gradients(mode: Mode, loss: str, attend: Attend, given: dict, tangents: dict, **how: Any) -> tuple[Tensor, ...]:
    """By torch's engine, of what is given and of the tangents."""
    leaves = leaves_of(given, tangents)
    inputs = [*leaves[0].values(), *leaves[1].values()]
    return torch.autograd.grad(LOSSES[loss](*mode(attend, *leaves)), inputs, **how, materialize_grads=True)


def gradients_for_many(mode: Mode, attend: Attend, given: dict, tangents: dict) -> tuple[Tensor, ...]:
    leaves = leaves_of(given, tangents)
    (out, _), (moved, _) = mode(attend, *leaves)
    grads = [torch.stack([x.detach(), x.detach().cos()]) for x in (out, moved)]
    return torch.autograd.grad((out, moved), leaves[0].values(), grads, is_grads_batched=True)


def gradients_of_a_penalty(mode: Mode, attend: Attend, given: dict, tangents: dict) -> tuple[Tensor, ...]:
    """On the gradients of a loss on tangents."""
    leaves = leaves_of(given, tangents)
    inputs = [*leaves[0].values(), *leaves[1].values()]
    first = torch.autograd.grad(LOSSES["both"](*mode(attend, *leaves)), inputs, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)


def ways(attend: Attend, mode: Mode, given: dict[str, Tensor], tangents: dict[str, Tensor]) -> dict[str, Callable]:
    q, k, v, bias = inputs = tuple(given.values())
    moved = tuple(tangents.values())
    many = [torch.stack([x, x.cos()]) for x in moved]
    mapped = [torch.stack([x, x.sin()]) for x in inputs]
    call = attend, given, tangents

    def moving(*x: Tensor) -> Tensor:
        return total(jvp(attend, x[:4], x[4:])[1])

    return {
        "jvp": lambda: by_jvp(*call),
        "jvp_of_one": lambda: jvp(lambda k: attend(q, k, v, bias), (k,), moved[1:2]),
        "dual_numbers": lambda: mode(*call),
        "no_grad": lambda: torch.no_grad()(mode)(*call),
        "linearize": lambda: linearize(attend, *inputs)[1](*moved),
        "jacfwd": lambda: jacfwd(lambda q: attend(q, k, v, bias)[0])(q),
        "vmap_over_tangents": lambda: vmap(lambda *moved: jvp(attend, inputs, moved)[1])(*many),
        "vmap_over_all": lambda: vmap(lambda *both: jvp(attend, both[:4], both[4:]))(*mapped, *many),
        "jvp_of_vmap": lambda: jvp(
            vmap(lambda q, v: attend(q, k, v, bias)), (mapped[0], mapped[2]), (many[0], many[2])
        ),
        "jvp_of_jvp": lambda: jvp(lambda *x: jvp(attend, x, moved)[1], inputs, moved),
        "jvp_of_grad": lambda: jvp(grad(lambda *x: total(attend(*x)), (0, 1, 2, 3)), inputs, moved),
        "hessian": lambda: hessian(lambda k: total(attend(q, k, v, bias)))(k),
        "grad_of_jvp": lambda: grad(moving, (0, 1, 2, 3, 4, 5, 6, 7))(*inputs, *moved),
        "grad_of_grad_of_jvp": lambda: grad(lambda q: grad(moving, 1)(q, *inputs[1:], *moved).square().sum())(q),
        "grad_of_vmap": lambda: grad(lambda k: total(vmap(lambda *x: jvp(attend, (q, k, v, bias), x)[1])(*many)))(k),
        **{f"loss_on_{loss}": lambda loss=loss: gradients(mode, loss, *call) for loss in LOSSES},
        "loss_of_jvp": lambda: gradients(by_jvp, "both", *call),
        "gradients_for_many": lambda: gradients_for_many(mode, *call),
        "gradients_of_a_penalty": lambda: gradients_of_a_penalty(by_jvp, *call),
    }


NAMES = "q k v bias"
EVERY = f"forward {NAMES}"
# What operators do, where they do all of it.
SERVED = {
    "jvp": [EVERY],
    "jvp_of_one": ["forward k"],
    "dual_numbers": [EVERY],
    "no_grad": [EVERY],
    "linearize": [EVERY, EVERY],
    "jacfwd": ["forward q"],
    "vmap_over_tangents": [EVERY],
    "vmap_over_all": [EVERY],
    "jvp_of_vmap": ["forward q v"],
    "grad_of_jvp": [EVERY, f"backward {NAMES}"],
    "grad_of_vmap": [EVERY, f"backward {NAMES}"],
    "loss_on_out": [EVERY, "backward"],
    "loss_on_tangents": [EVERY, f"backward {NAMES}"],
    "loss_on_both": [EVERY, f"backward {NAMES}"],
    "loss_of_jvp": [EVERY, f"backward {NAMES}"],
}


WAYS = tuple(ways(*[lambda: None] * 2, *[dict.fromkeys(NAMES.split(), torch.zeros(1))] * 2))


SLOW = ("jacfwd", "linearize")  # in the interpreter


def _params() -> list:
    pairs = product((*BACKENDS, *CHOOSY[:1]), WAYS)
    kept = [(each, way) for each, way in pairs if not each.values[0].interpreted or way not in SLOW]
    return [pytest.param(*each.values, way, marks=each.marks, id=f"{each.id}-{way}") for each, way in kept]


@pytest.mark.parametrize(("backend", "way"), _params())
def test_every_way(backend: Backend, way: str, served: list[str]) -> None:
    """The same, and by one operator that pushes all tangents, wherever there is one."""
    given, options = call_on(backend)
    tangents = tangents_of(given)
    # Torch fails to differentiate its logsumexp of dual numbers backward.
    want = ways(of_torch(options), by_jvp, given, tangents)[way]()
    got = ways(ours(backend, options), by_duals, given, tangents)[way]()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    assert any(x.abs().max() > 0.01 for x in torch.utils._pytree.tree_leaves(got))
    if way in SERVED:
        assert served == SERVED[way]


@pytest.mark.parametrize(
    ("mode", "loss", "backward"),
    ((by_jvp, "both", f"backward {NAMES}"), (by_duals, "out", "backward")),
    ids=("jvp", "dual_numbers"),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_compiles(backend: Backend, mode: Mode, loss: str, backward: str, served: list[str]) -> None:
    """In one graph, forward and backward."""
    torch._dynamo.reset()
    given, options = call_on(backend)
    tangents = tangents_of(given)
    leaves = leaves_of(given, tangents)

    def step(*leaves: dict[str, Tensor]) -> Tensor:
        return LOSSES[loss](*mode(ours(backend, options), *leaves))

    value = torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves)
    got = torch.autograd.grad(value, [*leaves[0].values(), *leaves[1].values()], materialize_grads=True)
    want = gradients(by_jvp, loss, of_torch(options), given, tangents)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    assert served == [EVERY, backward]


# ---------------------------------------------------------------------------------------------------------------------
# What else there is in a call
# ---------------------------------------------------------------------------------------------------------------------


@on_every_backend
def test_each_packed_sequence_moves_as_if_it_were_alone(backend: Backend) -> None:
    """One of them without keys, and rows that are in none."""
    torch.manual_seed(0)
    lengths, spare = [(3, 5), (4, 0), (3, 5), (2, 2)], 1
    queries, keys = (sum(each) + spare for each in zip(*lengths, strict=True))
    shapes = (queries, 2, 4), (keys, 1, 4), (keys, 1, 4)
    inputs, moved = (tuple(torch.randn(x).double().to(backend.device) for x in shapes) for _ in range(2))
    ends = [torch.tensor((0, *x)).cumsum(0).to(backend.device) for x in zip(*lengths, strict=True)]

    def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attention_packed(q, k, v, *ends, 4, 5, causal=True, return_lse=True, backend=backend.name)

    (out, lse), (of_out, of_lse) = jvp(packed, inputs, moved)
    leaf = inputs[1].clone().requires_grad_()
    grad_k = torch.autograd.grad(jvp(packed, (inputs[0], leaf, inputs[2]), moved)[1][0].square().sum(), leaf)[0]
    for index in range(len(lengths)):
        (first, last), (begin, end) = ((x[index], x[index + 1]) for x in ends)
        own = [(first, last), (begin, end), (begin, end)]
        alone, alone_moved = (
            tuple(x[slice(*cut)].transpose(0, 1)[None] for x, cut in zip(each, own, strict=True))
            for each in ((inputs[0], leaf, inputs[2]), moved)
        )
        results, of_results = jvp(
            lambda q, k, v: flash_attention(q, k, v, causal=True, return_lse=True, backend="math"), alone, alone_moved
        )
        for got, want in zip((out, of_out), (results[0], of_results[0]), strict=True):
            torch.testing.assert_close(got[first:last].transpose(0, 1)[None], want, rtol=1e-11, atol=1e-12)
        for got, want in zip((lse, of_lse), (results[1], of_results[1]), strict=True):
            torch.testing.assert_close(got[None, :, first:last], want, rtol=1e-11, atol=1e-12)
        if end > begin:
            want = torch.autograd.grad(of_results[0].square().sum(), leaf, retain_graph=True)[0]
            torch.testing.assert_close(grad_k[begin:end], want[begin:end], rtol=1e-11, atol=1e-12)
    assert not of_out[queries - spare :].any()
    assert not grad_k[keys - spare :].any()


@on_every_backend
@pytest.mark.parametrize("randomness", ("different", "same"))
def test_dropout_keeps_the_weights_of_out_for_its_tangent(randomness: str, backend: Backend) -> None:
    """Out is linear in v: along v its tangent is out itself."""
    given, _ = call_on(backend)

    def attend(v: Tensor) -> Tensor:
        return flash_attention(given["q"], given["k"], v, dropout_p=0.4, backend=backend.name)

    if backend.name == "sdpa":
        pytest.skip("reason: dropout is on")
    v = given["v"]
    torch.testing.assert_close(*jvp(attend, (v,), (v,)), rtol=1e-12, atol=1e-13)
    both = vmap(lambda moved: jvp(attend, (v,), (moved,)), randomness=randomness)(torch.stack([v, v]))
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-13)
    assert torch.equal(*both[0]) == (randomness == "same")


@on_every_backend
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision(dtype: torch.dtype, backend: Backend) -> None:
    """Tangents in the dtypes of out and lse, next to the same in float64; and as autocast casts both."""
    skip_unless_interpretable(backend, dtype)
    given, options = call_on(backend)
    tangents = tangents_of(given)
    options["alibi_slopes"] = options["alibi_slopes"].float()
    half, moved = ({name: x.to(dtype) for name, x in each.items()} for each in (given, tangents))
    want = by_jvp(of_torch(options), *({name: x.double() for name, x in each.items()} for each in (half, moved)))
    got = by_jvp(ours(backend, options), half, moved)
    assert [x.dtype for each in got for x in each] == [dtype, torch.float32] * 2
    torch.testing.assert_close(
        got, want, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps, check_dtype=False
    )
    single = [{name: x.float() for name, x in each.items()} for each in (half, moved)]
    with torch.autocast(backend.device, dtype=dtype):
        cast = by_jvp(ours(backend, options), *single)
    assert cast[1][0].dtype == dtype


def test_complex_tensors() -> None:
    torch.manual_seed(0)
    inputs, moved = ([torch.randn(1, 2, 4, 3, dtype=torch.complex128) for _ in range(3)] for _ in range(2))

    def attend(*x: Tensor) -> Tensor:
        return complex_attention(*x, causal=True)

    out, of_out = jvp(attend, tuple(inputs), tuple(moved))
    step = 1e-6
    ahead, behind = (attend(*(x + sign * step * y for x, y in zip(inputs, moved, strict=True))) for sign in (1, -1))
    torch.testing.assert_close(of_out, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(out, attend(*inputs))


@on_every_backend
def test_slopes_have_no_tangent(backend: Backend) -> None:
    given, options = call_on(backend)
    slopes = options.pop("alibi_slopes")
    with pytest.raises(ValueError, match="alibi_slopes must not have a tangent"):
        jvp(lambda x: ours(backend, {**options, "alibi_slopes": x})(**given), (slopes,), (slopes,))
