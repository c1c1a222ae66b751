"""How far from the oracle a backend may be: twice as far as PyTorch's own eager path in the same dtype.

The eager path is `F.scaled_dot_product_attention` with `SDPBackend.MATH` and an explicit mask, next to a plain
`logsumexp` for the LSE. It knows no dead rows, so there it sees every key and is told to ignore what comes back.

Errors are measured as the largest absolute one and as the root mean square over a whole tensor. Where the eager path is
exact or nearly so (one key, one element) twice its error means nothing, so there is a floor beside it: the roundings
that no algorithm avoids, applied to the terms that a result is summed from. A term's size is that of its factors, and
terms add up as independent errors do, by their squares, but for the one number that all terms of a row share, and for
terms that are all alike, whose sum is the result. For `dq`, say:

    delta[x]^2 = sum_e (do[x, e] out[x, e])^2 + dlse[x]^2
    magnitude(dq[x, c])^2 = scale^2 * (sum_y p[x, y]^2 * (sum_e (do[x, e] v[y, e])^2 + delta[x]^2) * k[y, c]^2
                                       + delta[x]^2 * (sum_y p[x, y] k[y, c])^2) + dq[x, c]^2

The gradient of a bias sums what stands before k, without the scale, over what the bias is broadcast along, and that of
a sink its weight times delta. With tangents of the inputs, where s' is that of a score:

    s'[x, y]^2 = scale^2 * sum_c ((q'[x, c] k[y, c])^2 + (q[x, c] k'[y, c])^2) + bias'[x, y]^2
    magnitude(lse'[x])^2 = sum_y (p[x, y] s'[x, y])^2 + lse'[x]^2
    magnitude(out'[x, e])^2 = sum_y p[x, y]^2 * ((s'[x, y] v[y, e])^2 + v'[y, e]^2)
                              + magnitude(lse'[x])^2 * out[x, e]^2 + out'[x, e]^2

A softcap's slope, `1 - tanh^2`, is a difference of terms of size 1: in the terms of gradients and tangents it stands
for 1, whatever is left of it.

    floor = (eps(dtype) / 2 + eps(accumulator) * (1 + largest score + sqrt(number of terms) / 4)) * magnitude

eps(dtype) / 2 is the worst that one rounding of an operand or of the result does. The rest is what the exponential and
the sums do in the accumulator's dtype (float32 for half precision): a score's rounding grows with the score, and that
of a sum, which walks at random, with the root of its length. In float64 the oracle's own roundings count too: there the
floor is 8 times that. The largest error is one element's luck, so it gets the whole floor; the root mean square is a
steady thing and gets half of it, or nothing with `strict=True`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attend.testing.oracle import Answer, changed_scores, pushed_through, visible_pairs

__all__ = ["Budget", "TF32Products", "assert_within_budget", "eager_answer"]

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks", "out_tangent", "lse_tangent")
SUMMED = ("lse", "lse_tangent")  # in the accumulator's dtype, of what no product takes
DEAD = {"out": 0.0, "lse": -torch.inf, "out_tangent": 0.0, "lse_tangent": 0.0}  # what a row is that sees nothing
TF32_EPS = 2.0**-10  # the spacing of what a product of float32 takes in TF32


class TF32Products(TorchDispatchMode):
    """Within this context products of float32 take their operands in TF32, rounded to nearest, on every device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and args[0].dtype == torch.float32:
            args = tuple(((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in args)
        return function(*args, **(kwargs or {}))


def eager_answer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    tangents: Mapping[str, Tensor] | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Answer:
    """What PyTorch's eager path makes of the call, in the dtype of the inputs. With dropout, or scores that are
    changed, or sinks, it is written out, in the accumulator's dtype, as torch's own is inside.

    `pairs (b, h, i, j)` is who sees whom. Rows that see nobody are computed as if they saw everybody, and carry no
    gradient: compare them not at all.
    """
    alive = pairs.any(dim=3)
    pairs = pairs | ~alive.unsqueeze(3)
    given = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    leaves = {
        name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in given.items() if x is not None
    }
    attend = partial(
        _eager, pairs=pairs, scale=scale, dropout_p=dropout_p, keep=keep, softcap=softcap, alibi_slopes=alibi_slopes
    )
    pushed = {} if tangents is None else pushed_through(attend, leaves, tangents)
    for leaf in leaves.values():
        leaf.requires_grad_()
    out, lse = attend(leaves)
    losses = []  # sums, because gradients that are handed over import a second's worth of sympy
    for output, gradient in ((out, grad_out), (lse, grad_lse)):
        if gradient is not None:
            losses.append(
                (output * torch.where(alive.unsqueeze(3) if gradient.ndim == 4 else alive, gradient, 0)).sum()
            )
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if losses:
        found = torch.autograd.grad(losses, [*leaves.values()], allow_unused=True, materialize_grads=True)
    gradients = {f"d{name}": grad for name, grad in zip(leaves, found, strict=True)}
    return Answer(out.detach(), lse.detach(), **gradients, **pushed)


def _eager(
    leaves: Mapping[str, Tensor],
    pairs: Tensor,
    scale: float,
    dropout_p: float,
    keep: Tensor | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Out and LSE of operands by their names."""
    q, k, v = (leaves[name] for name in "qkv")
    bias, sinks = leaves.get("bias"), leaves.get("sinks")
    k, v = (x.unsqueeze(1) if x.ndim == 3 else x for x in (k, v))
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))

    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(accumulator) @ k.to(accumulator).mT * scale
    # What -inf hides is hidden as a pair, and rows that see nobody need something else to see.
    added = None if bias is None else bias.masked_fill(bias == -torch.inf, 0.0)
    scores = changed_scores(scores, bias=added, softcap=softcap, alibi_slopes=alibi_slopes)
    scores = scores.masked_fill(~pairs, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(accumulator).view(-1, 1, 1).expand(*scores.shape[:3], 1)], dim=3)
    lse = scores.logsumexp(dim=3)
    if dropout_p > 0 or softcap is not None or not (bias is alibi_slopes is sinks is None):
        weights = scores.softmax(dim=3)[..., : k.shape[2]]
        weights = weights if keep is None else weights * keep / (1 - dropout_p)
        return (weights @ v.to(accumulator)).to(q.dtype), lse
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=scale), lse


def _magnitudes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Tensor,
    truth: Answer,
    *,
    scale: float,
    dropout_p: float,
    keep: Tensor | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    tangents: Mapping[str, Tensor] | None,
    softcap: float | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[dict[str, Tensor], float]:
    """The size of the terms behind every element of every result (see the head of this file), and the largest score."""
    alive = pairs.any(dim=3)
    k_shape, v_shape = k.shape, v.shape
    q, k, v = (x.detach().double() for x in (q, k, v))
    k4, v4 = (x.unsqueeze(1) if x.ndim == 3 else x for x in (k, v))
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k4.shape[1:3]
    group = heads // max(kv_heads, 1)
    seen = pairs.view(batch, kv_heads, group, queries, keys).any(dim=3).any(dim=2)
    q = torch.where(alive.unsqueeze(3), q, 0)
    k4, v4 = (torch.where(seen.unsqueeze(3), x, 0) for x in (k4, v4))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k4, v4))
    products = torch.where(pairs, q @ k.mT * scale, 0)
    capped = changed_scores(products, bias=None, softcap=softcap, alibi_slopes=None)
    scores = torch.where(pairs, changed_scores(capped, bias=bias, softcap=None, alibi_slopes=alibi_slopes), 0)
    added, slope2 = (scores - capped) * pairs, 1.0 if softcap is None else (1 - (capped / softcap).square()).square()
    largest_score = (capped.abs() + added.abs()).max().item() if scores.numel() else 0.0
    p = torch.where(pairs, scores - torch.where(alive, truth.lse, 0).unsqueeze(3), -torch.inf).exp()
    p2 = p.square()
    kept2 = p2 if keep is None else p2 * keep / (1 - dropout_p) ** 2

    sums = {"out": kept2 @ v.square()}
    score2 = (scale**2 * (q.square() @ k.square().mT) * slope2 + added.square()) * pairs
    # exp and log of the accumulator: an LSE near 0 is still made of terms of size 1.
    sums["lse"] = 1 + (score2.amax(dim=3) if keys else torch.zeros_like(truth.lse))
    do = q.new_zeros(batch, heads, queries, v.shape[3]) if grad_out is None else grad_out.double()
    dlse = q.new_zeros(batch, heads, queries) if grad_lse is None else grad_lse.double()
    do2 = torch.where(alive.unsqueeze(3), do, 0).square()
    dlse2 = torch.where(alive, dlse, 0).square()
    delta2 = ((do2 * truth.out.square()).sum(dim=3) + dlse2).unsqueeze(3)
    of_scores2 = kept2 * (do2 @ v.square().mT) + p2 * delta2
    ds2 = scale**2 * of_scores2
    sums["dq"] = ds2 @ k.square() + scale**2 * delta2 * (p @ k).square()
    if bias is not None:
        sums["dbias"] = of_scores2.sum_to_size(_whole_shape(bias)).view(bias.shape)
    if sinks is not None:
        p_sink2 = torch.where(alive, sinks.double().view(-1, 1) - truth.lse, -torch.inf).exp().square()
        sums["dsinks"] = (p_sink2 * delta2.squeeze(3)).sum(dim=(0, 2))
    if tangents is not None:
        of = {name: x.double() for name, x in tangents.items()}
        for name in {"k", "v"} & of.keys():
            of_heads = of[name].unsqueeze(1) if of[name].ndim == 3 else of[name]
            of[name] = torch.where(seen.unsqueeze(3), of_heads, 0).repeat_interleave(group, dim=1)
        of |= {"q": torch.where(alive.unsqueeze(3), of["q"], 0)} if "q" in of else {}
        of |= {"bias": torch.where(pairs, of["bias"], 0)} if "bias" in of else {}
        squares = {name: x.square() for name, x in of.items()}
        change2 = torch.zeros_like(p2)
        if "q" in of:
            change2 += scale**2 * squares["q"] @ k.square().mT
        if "k" in of:
            change2 += scale**2 * q.square() @ squares["k"].mT
        change2 += squares.get("bias", 0.0)
        sums["lse_tangent"] = (p2 * change2).sum(dim=3)
        if "sinks" in of:
            sums["lse_tangent"] += p_sink2 * squares["sinks"].view(-1, 1)
        shared2 = sums["lse_tangent"] + truth.lse_tangent.square()  # type: ignore[union-attr]
        sums["out_tangent"] = (kept2 * change2) @ v.square() + shared2.unsqueeze(3) * truth.out.square()
        if "v" in of:
            sums["out_tangent"] += kept2 @ squares["v"]

    def by_kv_head(x: Tensor) -> Tensor:
        return x.view(batch, kv_heads, group, *x.shape[2:]).sum(dim=2)

    sums["dk"] = by_kv_head(ds2.mT @ q.square()).view(k_shape)
    sums["dv"] = by_kv_head(kept2.mT @ do2).view(v_shape)
    # Terms that are all alike err alike, and then the result's own size is what they err by.
    results = {name: getattr(truth, name) for name in sums} | {"lse": torch.where(alive, truth.lse, 0)}
    there = {name: result for name, result in results.items() if result is not None}
    return {name: (sums[name] + result.square()).sqrt() for name, result in there.items()}, largest_score


def _whole_shape(bias: Tensor) -> tuple[int, ...]:
    """The shape of a bias with all four dimensions."""
    return (1,) * (4 - bias.ndim) + tuple(bias.shape)


def _require(holds: bool | Tensor, message: str) -> None:
    """`assert`, which stays where Python is told to leave those out: every variant's self-check goes by it."""
    if not holds:
        raise AssertionError(message)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


NORMS = (_largest, _rms)


def _zero_by_contract(name: str, pairs: Tensor, gradient: Tensor) -> Tensor:
    """Where a gradient is 0 by contract: rows that see nobody, keys that nobody sees. Bool, no last dimension."""
    if name == "dq":
        return ~pairs.any(dim=3)
    if name == "dbias":
        return (pairs.float().sum_to_size(_whole_shape(gradient)) == 0).view(gradient.shape)
    if name == "dsinks":
        return (~pairs.any(dim=3)).all(dim=2).all(dim=0)
    hidden = ~pairs.any(dim=2)  # (b, h, j)
    if gradient.ndim == 3:
        return hidden.all(dim=1)
    kv_heads = gradient.shape[1]
    return hidden.view(hidden.shape[0], kv_heads, hidden.shape[1] // max(kv_heads, 1), hidden.shape[2]).all(dim=2)


class Budget:
    """How far from `truth` every result of one call may be: computed once, for any number of answers."""

    def __init__(
        self,
        truth: Answer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        keep: Tensor | None = None,
        grad_out: Tensor | None = None,
        grad_lse: Tensor | None = None,
        tangents: Mapping[str, Tensor] | None = None,
        tf32: bool = False,
        bias: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """`tf32`: products of float32 take their operands in TF32, rounded to nearest. Those of the eager path do, on a
        CPU too, and whatever cuBLAS would do with small ones."""
        batch, heads, queries, _ = q.shape
        keys = k.shape[-2]
        scale = q.shape[3] ** -0.5 if scale is None else scale
        self.truth, self.dtype = truth, q.dtype
        self.accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.pairs = visible_pairs(batch, heads, queries, keys, mask, causal, q.device, window=window, bias=bias)
        self.alive = self.pairs.any(dim=3)
        common: dict[str, Any] = dict(scale=scale, dropout_p=dropout_p, keep=keep, grad_out=grad_out, grad_lse=grad_lse)
        common |= dict(softcap=softcap, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, tangents=tangents)
        self.exact_dtypes = dict.fromkeys(NAMES, q.dtype) | dict.fromkeys(SUMMED, self.accumulator)
        self.exact_dtypes |= {f"d{name}": x.dtype for name, x in (("bias", bias), ("sinks", sinks)) if x is not None}
        with TF32Products() if tf32 else nullcontext():
            eager = eager_answer(q, k, v, self.pairs, **common)
        magnitudes, largest_score = _magnitudes(q, k, v, self.pairs, truth, **common)

        row_terms, column_terms = keys, queries * (heads // max(k.shape[1] if k.ndim == 4 else 1, 1))
        terms = dict.fromkeys((*DEAD, "dq"), row_terms) | dict(dk=column_terms, dv=column_terms)
        terms["dsinks"] = batch * queries
        terms["dbias"] = 1 if bias is None else self.pairs.numel() // max(bias.numel(), 1)
        self.eager_errors: dict[str, tuple[float, float]] = {}  # of the eager path, in the two norms
        self.floors: dict[str, tuple[float, float]] = {}
        for name in NAMES:
            want = getattr(truth, name)
            if want is None:
                continue
            reference, magnitude = getattr(eager, name).double(), magnitudes[name]
            if name in DEAD:
                want, reference, magnitude = (x[self.alive] for x in (want, reference, magnitude))
            eps = torch.finfo(self.accumulator).eps * (1 + largest_score + terms[name] ** 0.5 / 4)
            if name not in SUMMED:
                eps += (TF32_EPS if tf32 else torch.finfo(q.dtype).eps) / 2
            eps *= 8 if self.accumulator == torch.float64 else 1
            self.eager_errors[name] = _largest(reference - want), _rms(reference - want)
            self.floors[name] = eps * _largest(magnitude), eps * _rms(magnitude)

    def check(self, answer: Answer, *, strict: bool = False) -> dict[str, float]:
        """Fails unless every result that `answer` holds is within the budget.

        Exact where the contract is exact: dead rows are 0 and -inf, their dq is 0, and unseen keys have dk and dv of 0.
        Returns how much of its budget each result used, the worse of the two norms.
        """
        used: dict[str, float] = {}
        for name in NAMES:
            got, want = getattr(answer, name), getattr(self.truth, name)
            if got is None:
                continue
            _require(got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
            _require(got.dtype == self.exact_dtypes[name], f"{name}: {got.dtype}, expected {self.exact_dtypes[name]}")
            got = got.double()
            if name in DEAD:
                _require((got[~self.alive] == DEAD[name]).all(), f"{name} of a dead row is not {DEAD[name]}")
                got, want = got[self.alive], want[self.alive]
            else:
                silent = _zero_by_contract(name, self.pairs, got)
                _require((got[silent] == 0).all(), f"{name} leaks into a dead row or a hidden key")
            _require(not got.isnan().any(), f"{name} has NaN")

            shares = (1.0, 0.0 if strict else 0.5)  # of the floor, for the two norms
            rules = zip(NORMS, shares, self.eager_errors[name], self.floors[name], strict=True)
            for norm, of_floor, eager_error, floor in rules:
                error, limit = norm(got - want), 2 * eager_error + of_floor * floor
                share = error / limit if limit else float(error > 0)
                _require(
                    error <= limit,
                    f"{name}: {norm.__name__[1:]} error {error:.3e} against float64, allowed {limit:.3e} "
                    f"(eager makes {eager_error:.3e}; {share:.2f} of the budget)",
                )
                used[name] = max(used.get(name, 0.0), share)
        return used


def assert_within_budget(
    answer: Answer, truth: Answer, q: Tensor, k: Tensor, v: Tensor, *, strict: bool = False, **call: Any
) -> dict[str, float]:
    """`Budget(truth, q, k, v, **call).check(answer, strict=strict)`, for a single answer."""
    return Budget(truth, q, k, v, **call).check(answer, strict=strict)
