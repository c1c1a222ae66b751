"""Whether an Attend computes what ours does: a copy of it beside the same copy served by us, on examples on the CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flash_attend.functional import flash_attention
from flash_attend.integrations.served import Service, Serving, dropout_in_force, served_class

__all__ = ["TOP_LEFT_NOTE", "Different", "compare"]

TOP_LEFT_NOTE = "where i != j, its flash path aligned causal top-left; ours is bottom-right"

_BY_EINSUM = (Service(backend="math"),)
_LONG = 1030  # past windows, selections and rules of length that do nothing on a short sequence
_RESULTS = ("something else", *(f"another gradient of {name}" for name in "qkv"))


class Different(Exception):
    """What is compared does not compute what ours does; the message says where."""


def compare(attend: nn.Module, serving: Serving, changes: Iterable[dict[str, Any]], masked: bool) -> str:
    """Compares outputs and gradients, in training without dropout, then dropout by itself, and what is left behind.

    What it cannot compute does not matter, as long as it computes the plainest example. Each of `changes` is a set of
    attributes to compare with; `masked` tells whether there are masks. Returns a note on how it aligns `causal`.

    Raises `Different`.
    """
    if type(torch.empty(0, device="cpu")) is not Tensor:
        raise Different("it cannot be compared where tensors are fake: patch outside of FakeTensorMode")
    notes = set()
    with _undisturbed():
        for change in changes:
            pair = _Pair(attend, serving, change)
            pair.compare_short(masked)
            notes.add(pair.compare_alignment())
            pair.compare_eval()
            pair.compare_long(masked)
            pair.compare_dropout()
            pair.compare_contents()
    return max(notes)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever a caller has turned on does not reach the examples, and what they draw is not missed by anyone."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # flash paths call what torch has deprecated
        torch.default_generator.manual_seed(0)
        yield


class _Pair:
    """Theirs and ours, in training, without dropout."""

    def __init__(self, attend: nn.Module, serving: Serving, change: dict[str, Any]) -> None:
        self.serving = serving._replace(services=_BY_EINSUM)
        try:
            self.theirs, self.ours = _copy(attend), _copy(attend)
            self.theirs.__class__ = serving.kind
            self.ours.__class__ = served_class(self.serving)
            for module in (self.theirs, self.ours):
                module.train()
                _set_dropout(module, 0.0, 0.0)
                for name, value in change.items():
                    setattr(module, name, value)
        except Exception as error:  # whatever its author raises
            raise Different(f"it cannot be copied to be compared: {error}") from error
        self.before = _contents(self.theirs)
        self.generator = torch.Generator().manual_seed(0)
        # Double precision, in which nothing hides and torch reduces no products; some can only do single.
        self.dtype = torch.float64
        self.grouped: int | None = None  # heads of k and v; None where they have no heads
        self.choose_form()

    def choose_form(self) -> None:
        """Finds a form of inputs that theirs takes."""
        for self.dtype in (torch.float64, torch.float32):
            each = self.agree("on a small example", self.draw(5, 5, 4))
            shared = self.agree("with k and v shared by all heads", self.draw(5, 5, None))
            if each or shared:
                self.grouped = 4 if each else None
                return
        raise Different(f"it fails on a small example: {self.error}")

    def draw(self, queries: int, keys: int, kv_heads: int | None, batch: int = 2, heads: int = 4) -> list[Tensor]:
        """Random `q (b, h, i, 8)`, `k` and `v`."""
        kv = (batch, keys, 8) if kv_heads is None else (batch, kv_heads, keys, 8)
        shapes = ((batch, heads, queries, 8), kv, kv)
        return [torch.randn(shape, generator=self.generator, dtype=self.dtype, device="cpu") for shape in shapes]

    def agree(self, where: str, inputs: list[Tensor], mask: Tensor | None = None, gradients: bool = True) -> bool:
        """Whether theirs computes this at all. Raises `Different` if ours computes something else."""
        try:
            theirs = _results(self.theirs, inputs, mask, gradients)
        except Exception as error:  # whatever its author raises
            self.error = error
            return False
        try:
            ours = _results(self.ours, inputs, mask, gradients)
        except (TypeError, ValueError) as error:
            raise Different(f"it computes what flash_attend refuses {where}: {error}") from error
        for what, x, y in zip(_RESULTS[: len(theirs)], theirs, ours, strict=True):
            if not _close(x, y):
                raise Different(f"it computes {what} {where}")
        return True

    def compare_short(self, masked: bool) -> None:
        """Scores, heads, dimensions and masks, on five keys."""
        q, k, v = plain = self.draw(5, 5, self.grouped)
        self.agree("with large scores", [30 * q, k, v])  # these show what clamps scores
        self.agree("with a wider v", [q, k, torch.cat((v, v + 1), dim=-1)])
        self.agree("with grouped heads", self.draw(5, 5, 2))
        if not masked:
            return
        by_key = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool, device="cpu")
        by_pair = torch.ones(5, 5, dtype=torch.bool, device="cpu").tril(1)
        by_head = torch.rand(2, 4, 5, 5, generator=self.generator, device="cpu") < 0.5
        by_head[..., 0] = True  # a query that sees nothing is another matter
        self.agree("with a (b, j) mask", plain, by_key)
        self.agree("with an (i, j) mask", plain, by_pair)
        self.agree("with a 4-D mask", plain, by_key[:, None, None] & by_pair)
        self.agree("with a 4-D mask that differs between heads", plain, by_head)

    def compare_alignment(self) -> str:
        """Fewer queries than keys: a flash path may align `causal` otherwise, which is noted."""
        note = ""
        for queries, keys in ((1, 5), (3, 5), (3, _LONG)):
            inputs = self.draw(queries, keys, self.grouped)
            try:
                self.agree("where i != j", inputs)
            except Different:
                seen = torch.ones(queries, keys, dtype=torch.bool, device="cpu").tril()[None, None]
                aligned = flash_attention(*inputs, mask=seen, scale=getattr(self.ours, "scale", None), backend="math")
                if not getattr(self.ours, "causal", False) or not _close(self.theirs(*inputs), aligned):
                    raise
                note = TOP_LEFT_NOTE
        return note

    def compare_eval(self) -> None:
        """Nothing is dropped, and nothing else computed."""
        for module in (self.theirs, self.ours):
            _set_dropout(module.eval(), 0.5, 0.5)
        self.agree("in eval mode", self.draw(5, 5, self.grouped))
        for module in (self.theirs, self.ours):
            _set_dropout(module.train(), 0.0, 0.0)

    def compare_long(self, masked: bool) -> None:
        """About a thousand keys, with a mask too."""
        inputs = self.draw(_LONG, _LONG, self.grouped and 2, batch=1, heads=2)
        self.agree(f"at {_LONG} keys", inputs)
        by_key = torch.arange(_LONG, device="cpu")[None] < 700
        # Outputs alone, which take a third of the time.
        if masked and not self.agree(f"at {_LONG} keys with a (b, j) mask", inputs, by_key, gradients=False):
            self.agree(f"at {_LONG} keys with a 4-D mask", inputs, by_key[:, None, None], gradients=False)

    def compare_dropout(self) -> None:
        """Over values of 1 and equal scores, what comes out counts the weights that were kept."""
        for module in (self.theirs, self.ours):
            _set_dropout(module, 0.2, 0.3)
        probability, _ = dropout_in_force(self.ours, self.serving.flash)
        if probability == 0:
            return
        keys = 200
        q, k, v = self.draw(keys, keys, self.grouped)
        try:
            out = self.theirs(0 * q, k, torch.ones_like(v))[:, :, -2:]
        except Exception as error:  # whatever its author raises
            raise Different(f"it fails with dropout: {error}") from error
        visible = torch.tensor([[keys - getattr(self.ours, "causal", False)], [keys]], device="cpu")
        kept = out * (1 - probability) * visible  # (b, h, 2, dv)
        rounded = kept.round()
        whole = torch.allclose(kept, rounded, rtol=0, atol=1e-2) and bool((rounded == rounded[..., :1]).all())
        if not whole or (rounded[:, :, 0] - rounded[:, :, 1]).abs().max() <= 1:  # the two may differ by the last key
            raise Different("it does not drop each weight by itself, with the probability that ours does")

    def compare_contents(self) -> None:
        """A call leaves nothing behind that somebody may read later."""
        after = _contents(self.theirs)
        changed = [name for name in {*self.before, *after} if self.before.get(name) is not after.get(name)]
        # A causal mask may be kept for the next call.
        mask = self.theirs._buffers.get("mask")
        kept = sorted(name for name in changed if name != "mask" or mask is None or mask.dtype != torch.bool)
        if kept:
            raise Different(f"its calls change what it holds: {', '.join(kept)}")


def _copy(attend: nn.Module) -> nn.Module:
    """A copy on the CPU without the hooks, which may hold anything."""
    bare = copy.copy(attend)
    for name, value in vars(bare).items():
        if "_hooks" in name:
            vars(bare)[name] = type(value)()
    return copy.deepcopy(bare).cpu()


def _set_dropout(attend: nn.Module, number: float, probability: float) -> None:
    if "dropout" in vars(attend):
        attend.dropout = number  # type: ignore[assignment]  # mypy takes a module for holding tensors and modules
    if isinstance(layer := getattr(attend, "attn_dropout", None), nn.Dropout):
        layer.p = probability


def _contents(attend: nn.Module) -> dict[str, Any]:
    """What a module holds, by name."""
    plain = {name: value for name, value in vars(attend).items() if name not in ("training", "dropout")}
    return {**plain, **attend._buffers, **attend._parameters, **attend._modules}


def _results(module: nn.Module, inputs: list[Tensor], mask: Tensor | None, gradients: bool) -> tuple[Any, ...]:
    """The output, and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.set_grad_enabled(gradients):
        out = module(*leaves) if mask is None else module(*leaves, mask=mask.clone())
    if not gradients:
        return (out,)
    if not isinstance(out, Tensor) or not out.requires_grad:
        return out, None, None, None
    generator = torch.Generator().manual_seed(0)
    grad_out = torch.randn(out.shape, generator=generator, dtype=out.dtype, device="cpu")
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out, allow_unused=True, materialize_grads=True)


def _close(theirs: Any, ours: Tensor) -> bool:
    """Far above what float32 rounds in these examples, far below any difference in meaning."""
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    return bool(((theirs - ours).abs().max() <= 1e-4 * ours.abs().max().clamp(min=1e-3)).item())
