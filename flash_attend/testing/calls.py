"""The calls that every backend has to answer: shapes, masks and memory layouts as data, and how to make and run one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flash_attend import flash_attention
from flash_attend.backends import BACKENDS, BackwardName
from flash_attend.checks import normalise_inputs
from flash_attend.dispatch import override_backward
from flash_attend.dropout import draw_seed, keep_mask
from flash_attend.operands import Tangents
from flash_attend.ops import INPUTS
from flash_attend.spec import AttentionSpec
from flash_attend.testing.budget import Budget
from flash_attend.testing.oracle import Answer, attention_oracle

__all__ = [
    "BIASES",
    "LAYOUTS",
    "MASKS",
    "Call",
    "Case",
    "assert_same_bits",
    "bits_equal",
    "budget_of",
    "check",
    "function_of",
    "make_call",
    "push",
    "run",
    "truth_of",
    "with_tangents",
]


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------

Shape = tuple[int, int, int, int]  # (b, h, i, j)


def _random(*shape: int, share: float = 0.6) -> Tensor:
    return torch.rand(shape) < share


def _lengths(batch: int, keys: int) -> Tensor:
    """A number of valid keys for every batch: all of them first, fewer from batch to batch, at least one."""
    return torch.tensor([max(1, keys - (keys * 2 * n) // (3 * max(batch - 1, 1))) for n in range(batch)]).view(batch, 1)


def _pad_right(shape: Shape) -> Tensor:
    b, _, _, j = shape
    return torch.arange(j) < _lengths(b, j)


def _pad_left(shape: Shape) -> Tensor:
    b, _, _, j = shape
    return torch.arange(j) >= j - _lengths(b, j)


def _holes(shape: Shape) -> Tensor:
    b, _, _, j = shape
    positions = torch.arange(j)
    # Runs of seven hidden keys, shifted from batch to batch, and a scatter of single ones.
    return (((positions + 5 * torch.arange(b).view(b, 1)) // 7) % 3 != 1) & _random(b, j, share=0.9)


def _dead_batch(shape: Shape) -> Tensor:
    mask = _pad_right(shape)
    mask[-1] = False
    return mask


def _band(shape: Shape) -> Tensor:
    """A dense mask that leaves whole tiles empty: every query sees the five keys around its own share of the way."""
    _, _, i, j = shape
    centre = torch.arange(i).view(i, 1) * j // max(i, 1)
    return ((torch.arange(j) - centre).abs() <= 2)[None, None]


def _staircase(shape: Shape) -> Tensor:
    """A dense mask with tiles that are full, cut and empty: blocks of 24 queries see every earlier block of 20 keys."""
    _, _, i, j = shape
    return (torch.arange(i).view(i, 1) // 24 >= torch.arange(j) // 20)[None, None]


def _dense(shape: Shape) -> Tensor:
    mask = _random(*shape)
    mask[..., : min(shape[2], 3), :] = False  # a few dead rows
    return mask


def _strided(shape: Shape) -> Tensor:
    b, h, i, j = shape
    return _random(j + 1, i, 2 * b, h + 1)[1:, :, ::2, 1:].permute(2, 3, 1, 0)


MASKS: dict[str, Callable[[Shape], Tensor | None]] = {
    "none": lambda s: None,
    "pad_right": _pad_right,
    "pad_left": _pad_left,
    "holes": _holes,
    "dead_batch": _dead_batch,
    "all_hidden": lambda s: torch.zeros(s[0], s[3], dtype=torch.bool),
    "all_visible": lambda s: torch.ones(s[0], s[3], dtype=torch.bool),
    "b11j": lambda s: _random(s[0], 1, 1, s[3]),
    "1h1j": lambda s: _random(1, s[1], 1, s[3]),
    "bh1j": lambda s: _random(s[0], s[1], 1, s[3]),
    "111j": lambda s: _random(1, 1, 1, s[3]),
    "1111": lambda s: torch.ones(1, 1, 1, 1, dtype=torch.bool),
    "b111": lambda s: (torch.arange(s[0]) % 2 == 0).view(-1, 1, 1, 1),
    "bhi1": lambda s: _random(s[0], s[1], s[2], 1),
    "11ij": lambda s: _random(1, 1, s[2], s[3]),
    "b1ij": lambda s: _random(s[0], 1, s[2], s[3]),
    "1hij": lambda s: _random(1, s[1], s[2], s[3]),
    "bhij": _dense,
    "band": _band,
    "staircase": _staircase,
    "strided": _strided,
    "key_expanded": lambda s: _random(s[0], 1, 1, s[3]).expand(s),
    "key_strided": lambda s: _random(s[3], s[0]).t(),
    "dense_expanded": lambda s: _random(s[0], 1, s[2], s[3]).expand(s),
    "rows_expanded": lambda s: _random(1, 1, s[2], 1).expand(s),
}

# ---------------------------------------------------------------------------------------------------------------------
# What changes scores
# ---------------------------------------------------------------------------------------------------------------------


def _hiding(shape: Shape) -> Tensor:
    """A bias that hides a third of all pairs, and whole rows and columns among them."""
    bias = torch.randn(shape, dtype=torch.float64).masked_fill(~_random(*shape), -torch.inf)
    bias[..., : min(shape[2], 2), :] = -torch.inf
    bias[..., shape[3] // 2 :][..., :1] = -torch.inf
    return bias


# By the dimensions that they vary over, as letters; 1 where they are broadcast.
_BIAS_FORMS = ("bhij", "1hij", "b1ij", "11ij", "bh1j", "b11j", "1h1j", "bhi1", "1h11", "1111", "hij", "ij", "j")
BIASES: dict[str, Callable[[Shape], Tensor | None]] = {
    "none": lambda s: None,
    **{form: lambda s, form=form: torch.randn(_sizes(form, s), dtype=torch.float64) for form in _BIAS_FORMS},  # type: ignore[misc]
    "hiding": _hiding,
    "hiding_keys": lambda s: _hiding((s[0], 1, 1, s[3]))[..., : s[3]],
    "hiding_queries": lambda s: _hiding((1, s[1], s[2], 1)) if s[2] else torch.zeros(1, s[1], 0, 1).double(),
    "strided": lambda s: torch.randn(s[3], s[1], s[2] + 1, 2 * s[0]).double()[..., 1:, ::2].permute(3, 1, 2, 0),
    "expanded": lambda s: torch.randn(1, s[1], s[2], s[3], dtype=torch.float64).expand(s),
}


def _sizes(form: str, shape: Shape) -> tuple[int, ...]:
    return tuple(dict(zip("bhij", shape, strict=True)).get(letter, 1) for letter in form)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def _interleaved(x: Tensor) -> Tensor:
    """The real halves of complex numbers, as `torch.view_as_real` shows them: a strided last dimension."""
    buffer = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype, device=x.device)
    buffer[..., 0] = x
    return buffer[..., 0]


def _sliced(x: Tensor) -> Tensor:
    """Odd offsets and strides: no row starts where a vector load may."""
    buffer = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    buffer[..., 1:-2] = x
    return buffer[..., 1:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "heads_inside": lambda x: x.transpose(1, -2).contiguous().transpose(1, -2),  # (b, n, h, d) in memory
    "sliced": _sliced,
    "interleaved": _interleaved,
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch_inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "broadcast_batch": lambda x: x[:1].expand_as(x),
    "broadcast_heads": lambda x: x[:, :1].expand_as(x),
    "broadcast_length": lambda x: x[..., :1, :].expand_as(x),
    "broadcast_last": lambda x: x[..., :1].expand_as(x),
}

# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One attention call, described. `kv_heads=0` stands for 3-D k and v."""

    name: str
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    queries: int = 37
    keys: int = 43
    d: int = 16
    dv: int | None = None
    mask: str = "none"
    causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    grads: str = "both"  # which of out and lse the loss is made of
    bias: str = "none"
    bias_in_float32: bool = False  # else in q's dtype; slopes and sinks too
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi: str = "none"  # the dimensions that slopes have: "h" or "bh"
    sinks: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Call:
    """The tensors and the options of a call, and what comes down to its backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    grad_out: Tensor | None
    grad_lse: Tensor | None
    causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    bias: Tensor | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    tangents: dict[str, Tensor] | None = None  # of those of `INPUTS` that have one
    torch_seed: int = 1234  # dropout draws its own seed from torch's generator, set to this before every run

    @property
    def options(self) -> dict[str, Any]:
        names = ("bias", "window", "softcap", "alibi_slopes", "sinks")
        asked = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dict(mask=self.mask, causal=self.causal, scale=self.scale, dropout_p=self.dropout_p, **asked)

    def with_(self, **changes: Any) -> Call:
        return replace(self, **changes)


def make_call(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Call:
    """Draws the tensors of a case: the same numbers on every device, rounded to the dtype."""
    torch.manual_seed(seed)
    b, h, i, j, d = case.batch, case.heads, case.queries, case.keys, case.d
    dv = d if case.dv is None else case.dv
    kv_heads = h if case.kv_heads is None else case.kv_heads
    middle = (kv_heads,) if kv_heads or not h else ()

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)

    q, k, v = (LAYOUTS[case.layout](x) for x in (draw(b, h, i, d), draw(b, *middle, j, d), draw(b, *middle, j, dv)))
    grad_out = LAYOUTS[case.grad_layout](draw(b, h, i, dv))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    grad_lse = torch.randn(b, h, i, dtype=torch.float64).to(device, accumulator)
    mask = MASKS[case.mask]((b, h, i, j))
    bias = BIASES[case.bias]((b, h, i, j))
    own = torch.float32 if case.bias_in_float32 else dtype
    slopes = None if case.alibi == "none" else torch.rand(_sizes(case.alibi, (b, h, i, j)), dtype=torch.float64)
    return Call(
        q,
        k,
        v,
        mask if mask is None else _to(mask, device, torch.bool),
        grad_out if case.grads in ("both", "out") else None,
        grad_lse if case.grads in ("both", "lse") else None,
        causal=case.causal,
        scale=case.scale,
        dropout_p=case.dropout_p,
        bias=bias if bias is None else _to(bias, device, own),
        window=case.window,
        softcap=case.softcap,
        alibi_slopes=slopes if slopes is None else slopes.to(device, own),
        sinks=torch.randn(h, dtype=torch.float64).to(device, own) if case.sinks else None,
    )


def _to(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """Moves a mask or a bias and keeps its strides (`Tensor.to` makes an expanded one dense)."""
    if tensor.device.type == device and tensor.dtype == dtype:
        return tensor
    small = tensor
    for dim in range(tensor.ndim):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            small = small.narrow(dim, 0, 1)
    return small.to(device, dtype).expand(tensor.shape)


def run(
    call: Call,
    backend: str,
    needs: Collection[str] = INPUTS,
    attend: Callable = flash_attention,
    backward: BackwardName | None = None,
) -> Answer:
    """Answers a call through the public function, or what was made of it, with the gradients of the inputs named in
    `needs`, by the backward that is named."""
    given = {name: x for name in INPUTS if (x := getattr(call, name)) is not None}
    leaves = {name: x.detach().requires_grad_(name in needs) for name, x in given.items()}
    options = {**call.options, **{name: leaf for name, leaf in leaves.items() if name not in "qkv"}}
    torch.manual_seed(call.torch_seed)
    with override_backward(backward) if backward else nullcontext():
        out, lse = attend(*(leaves[name] for name in "qkv"), **options, return_lse=True, backend=backend)
    # The LSE does not depend on v: where v alone needs a gradient, a backend may say so.
    pairs = [(x, g) for x, g in ((out, call.grad_out), (lse, call.grad_lse)) if g is not None and x.requires_grad]
    wanted = {name: leaf for name, leaf in leaves.items() if name in needs}
    if pairs:
        outputs, incoming = zip(*pairs, strict=True)
        found = list(
            torch.autograd.grad(outputs, list(wanted.values()), incoming, allow_unused=True, materialize_grads=True)
        )
    else:
        found = [torch.zeros_like(leaf) for leaf in wanted.values()]
    gradients = dict(zip(wanted, found, strict=True))
    return Answer(out.detach(), lse.detach(), *map(gradients.get, INPUTS))


def with_tangents(call: Call, names: Collection[str] = INPUTS) -> Call:
    """The same call with tangents of those of its inputs: the same numbers on every device."""
    generator = torch.Generator().manual_seed(3)
    given = {name: x for name in names if (x := getattr(call, name)) is not None}
    drawn = {name: torch.randn(x.shape, generator=generator, dtype=torch.float64) for name, x in given.items()}
    return call.with_(tangents={name: x.to(given[name]) for name, x in drawn.items()})


def push(call: Call, backend: str, tiles_of: Callable[[AttentionSpec], Any]) -> Answer:
    """Answers a call with tangents by what a backend runs for them, and with the gradients by its backward, where the
    loss is made of anything."""
    operands, spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    torch.manual_seed(call.torch_seed)
    if call.dropout_p:
        operands = operands._replace(seed=draw_seed(call.q.device))
    functions, tiles = BACKENDS[backend].load(), tiles_of(spec)
    assert call.tangents is not None
    assert functions.tangents is not None
    out, lse, *pushed, kept = functions.tangents(operands, Tangents(**call.tangents), spec, tiles)
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if not (call.grad_out is call.grad_lse is None):
        needed = (True,) * (3 if call.bias is call.sinks is None else 5)
        gradients = functions.backward(call.grad_out, call.grad_lse, operands, out, lse, kept, spec, tiles, needed)
    found = {f"d{name}": gradient for name, gradient in zip(INPUTS, gradients, strict=False)}
    return Answer(out, lse, **found, out_tangent=pushed[0], lse_tangent=pushed[1])


def function_of(call: Call, backend: str) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
    """A call as a function of all that there are gradients of, which drops the same weights each time; and those
    inputs, which need them. Its LSE is that of the queries that see something: -inf has no differences."""
    given = {name: x.clone().requires_grad_() for name in INPUTS if (x := getattr(call, name)) is not None}
    alive = budget_of(call).alive
    assert alive.any()

    def attend(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(call.torch_seed)
        read = {**call.options, **dict(zip(given, inputs, strict=True))}
        out, lse = flash_attention(**read, return_lse=True, backend=backend)
        return out, lse[alive]

    return attend, tuple(given.values())


def keep_of(call: Call) -> Tensor | None:
    """The keep mask `(b, h, i, j)` that a run of this call will use, from the seed that it will draw."""
    if not call.dropout_p:
        return None
    _, spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    torch.manual_seed(call.torch_seed)
    return keep_mask(draw_seed(call.q.device), spec, 0, spec.queries)


def truth_of(call: Call) -> Answer:
    """The oracle's answer to a call."""
    return attention_oracle(
        call.q, call.k, call.v, **call.options, keep=keep_of(call), grad_out=call.grad_out, grad_lse=call.grad_lse,
        tangents=call.tangents,
    )  # fmt: skip


def budget_of(call: Call, truth: Answer | None = None, *, tf32: bool = False) -> Budget:
    """How far from the oracle's answer to a call any other answer may be; `tf32` as `Budget` has it."""
    truth = truth_of(call) if truth is None else truth
    return Budget(
        truth, call.q, call.k, call.v, **call.options,
        keep=keep_of(call), grad_out=call.grad_out, grad_lse=call.grad_lse, tangents=call.tangents, tf32=tf32,
    )  # fmt: skip


def check(answer: Answer, call: Call, truth: Answer | None = None, *, strict: bool = False) -> dict[str, float]:
    """Fails unless the answer is right, dead rows and hidden keys exactly so, the rest within the error budget."""
    return budget_of(call, truth).check(answer, strict=strict)


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN payloads and signs of zero included."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
    )


def assert_same_bits(a: Answer, b: Answer) -> None:
    """Fails unless two answers are bitwise the same in everything that they hold."""
    for name in ("out", "lse", *(f"d{name}" for name in INPUTS)):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), f"{name}: only one answer has it"
        if x is not None:
            assert bits_equal(x, y), f"{name}: {int((x != y).sum())} of {x.numel()} elements differ"
