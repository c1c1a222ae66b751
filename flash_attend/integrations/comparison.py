"""Whether an Attend computes what ours does: a copy of it beside the same copy served by us, on examples on the CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator
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


class Different(Exception):
    """What is compared does not compute what ours does; the message says where."""


class _Fails(Different):
    """It computes nothing at all."""


def compare(
    attend: nn.Module, serving: Serving, changes: Iterable[dict[str, Any]], flash_differs: Collection[str] = ()
) -> str:
    """Compares outputs and gradients, in training without dropout, then dropout by itself, and what is left behind.

    What it cannot compute does not matter, as long as it computes the plainest example. Each of `changes` is a set of
    attributes to compare with, the first as it is; nor does it matter if it computes nothing after another. In what its
    flash path differs, it is not compared there. Returns a note on how it aligns `causal`.

    Raises `Different`.
    """
    if type(torch.empty(0, device="cpu")) is not Tensor:
        raise Different("it cannot be compared where tensors are fake: patch outside of FakeTensorMode")
    notes: set[str] = set()
    with _undisturbed():
        for change in changes:
            try:
                pair = _Pair(attend, serving, change)
            except _Fails:
                if not notes:
                    raise
                continue
            differs = flash_differs if getattr(pair.theirs, serving.flash, False) else ()
            pair.heeds = {*serving.arguments, "dropout", "2-D masks"} - {*serving.surplus, *differs}
            pair.compare_short()
            pair.compare_changed_scores()
            notes.add(pair.compare_alignment())
            pair.compare_eval()
            pair.compare_long()
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
                serving.reading._prepare_example(module)
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
        self.heeds: set[str] = set()  # arguments that are compared, "dropout", "2-D masks"
        self.choose_form()

    def choose_form(self) -> None:
        """Finds a form of inputs that theirs takes."""
        for self.dtype in (torch.float64, torch.float32):
            each = self.agree("on a small example", self.draw(5, 5, 4))
            shared = self.agree("with k and v shared by all heads", self.draw(5, 5, None))
            if each or shared:
                self.grouped = 4 if each else None
                return
        raise _Fails(f"it fails on a small example: {self.error}")

    def draw(self, queries: int, keys: int, kv_heads: int | None, batch: int = 2, heads: int = 4) -> list[Tensor]:
        """Random `q (b, h, i, 8)`, `k` and `v`."""
        kv = (batch, keys, 8) if kv_heads is None else (batch, kv_heads, keys, 8)
        shapes = ((batch, heads, queries, 8), kv, kv)
        return [torch.randn(shape, generator=self.generator, dtype=self.dtype, device="cpu") for shape in shapes]

    def agree(self, where: str, inputs: list[Tensor], gradients: bool = True, **arguments: Any) -> bool:
        """Whether theirs computes this at all. Raises `Different` if ours computes something else."""
        try:
            theirs = self.results(self.theirs, inputs, gradients, arguments)
        except Exception as error:  # whatever its author raises
            self.error = error
            return False
        try:
            ours = self.results(self.ours, inputs, gradients, arguments)
        except (TypeError, ValueError) as error:
            raise Different(f"it computes what flash_attend refuses {where}: {error}") from error
        for what, x in theirs.items():
            if not _close(x, ours.get(what)):
                raise Different(f"it computes {what} {where}")
        return True

    def results(
        self, module: nn.Module, inputs: list[Tensor], gradients: bool, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """The output, and the gradients of q, k, v, a bias and what the module holds."""
        # Copies, since a module may write into what it is given.
        given: dict[str, Any] = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()
        }
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        leaves = {"q": q, "k": k, "v": v, **dict(module.named_parameters())}
        for name in ("attn_bias", "bias"):
            if name in given:
                leaves[name] = given[name].requires_grad_()
        with torch.set_grad_enabled(gradients):
            out = self.serving.reading._output_of(module(q, k, v, **given))
        results = {"something else": out}
        if gradients and isinstance(out, Tensor):
            names = leaves if out.requires_grad else ()
            generator = torch.Generator().manual_seed(0)
            grad_out = torch.randn(out.shape, generator=generator, dtype=out.dtype, device="cpu")
            needed = [leaves[name] for name in names]
            found = names and torch.autograd.grad(out, needed, grad_out, allow_unused=True, materialize_grads=True)
            results |= {f"another gradient of {name}": None for name in leaves}
            results |= {f"another gradient of {name}": x for name, x in zip(names, found, strict=True)}
        return results

    def output(self, module: nn.Module, *inputs: Tensor) -> Any:
        """Of a plain call."""
        return self.serving.reading._output_of(module(*inputs))

    def compare_short(self) -> None:
        """Scores, heads, dimensions and masks, on five keys."""
        q, k, v = plain = self.draw(5, 5, self.grouped)
        # These show what clamps scores. Thirty times what they usually are, whatever its own scale is.
        large = 30 * q.shape[-1] ** -0.5 / abs(getattr(self.ours, "scale", None) or q.shape[-1] ** -0.5)
        self.agree("with large scores", [large * q, k, v])
        self.agree("with a wider v", [q, k, torch.cat((v, v + 1), dim=-1)])
        self.agree("with grouped heads", self.draw(5, 5, 2))
        for causal in (False, True) if "causal" in self.heeds else ():
            self.agree(f"where a call asks for causal={causal}", plain, causal=causal)
        if "mask" not in self.heeds:
            return
        by_key = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool, device="cpu")
        by_pair = torch.ones(5, 5, dtype=torch.bool, device="cpu").tril(1)
        by_head = torch.rand(2, 4, 5, 5, generator=self.generator, device="cpu") < 0.5
        by_head[..., 0] = True  # a query that sees nothing is another matter
        if "2-D masks" in self.heeds:
            self.agree("with a (b, j) mask", plain, mask=by_key)
            self.agree("with an (i, j) mask", plain, mask=by_pair)
        self.agree("with a 4-D mask", plain, mask=by_key[:, None, None] & by_pair)
        self.agree("with a 4-D mask that differs between heads", plain, mask=by_head)

    def compare_changed_scores(self) -> None:
        """With a bias of each shape, on five keys, with a mask too."""
        mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device="cpu").tril(2)
        masks: list[dict[str, Any]] = [{}, {"mask": mask}] if "mask" in self.heeds else [{}]
        for name in {"attn_bias", "bias"} & self.heeds:
            for shape, kv_heads in (((5, 5), 4), ((4, 5, 5), 4), ((2, 4, 5, 5), 4), ((2, 1, 1, 5), 4), ((4, 5, 5), 2)):
                bias = torch.randn(shape, generator=self.generator, dtype=self.dtype, device="cpu")
                inputs = self.draw(5, 5, self.grouped and kv_heads)
                for masked in masks:
                    where = f"with a bias of {shape}, {kv_heads} heads{' and a mask' if masked else ''}"
                    arguments = {**masked, name: bias}
                    self.agree(where, inputs, **arguments)

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
                if not getattr(self.ours, "causal", False) or not _close(self.output(self.theirs, *inputs), aligned):
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

    def compare_long(self) -> None:
        """About a thousand keys, with a mask too."""
        heads = 4 if dict(self.theirs.named_parameters()) else 2  # what is learned may be learned by head
        inputs = self.draw(_LONG, _LONG, self.grouped and heads, batch=1, heads=heads)
        self.agree(f"at {_LONG} keys", inputs)
        if "mask" not in self.heeds:
            return
        by_key = torch.arange(_LONG, device="cpu")[None] < 700
        masks = {"a 4-D mask": by_key[:, None, None]}
        if "2-D masks" in self.heeds:
            masks = {"a (b, j) mask": by_key, **masks}
        # One of them, and outputs alone, which take a third of the time.
        any(self.agree(f"at {_LONG} keys with {which}", inputs, gradients=False, mask=x) for which, x in masks.items())

    def compare_dropout(self) -> None:
        """Over values of 1 and equal scores, what comes out counts the weights that were kept.

        Relative to what comes out where none are dropped: something else may take part in the normaliser.
        """
        if "dropout" not in self.heeds:
            return
        for module in (self.theirs, self.ours):
            _set_dropout(module, 0.2, 0.3)
        probability, _ = dropout_in_force(self.ours, self.serving.flash)
        if probability == 0:
            return
        keys = 200
        q, k, v = self.draw(keys, keys, self.grouped)
        try:
            out = self.output(self.theirs, 0 * q, k, torch.ones_like(v))
        except Exception as error:  # whatever its author raises
            raise Different(f"it fails with dropout: {error}") from error
        of_all = self.output(self.ours.eval(), 0 * q, k, torch.ones_like(v))
        self.ours.train()
        visible = torch.tensor([[keys - getattr(self.ours, "causal", False)], [keys]], device="cpu")
        kept = (out / of_all)[:, :, -2:] * (1 - probability) * visible  # (b, h, 2, dv)
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


def _close(theirs: Any, ours: Any) -> bool:
    """Far above what float32 rounds in these examples, far below any difference in meaning."""
    if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor) or theirs.shape != ours.shape:
        return False
    return bool(((theirs - ours).abs().max() <= 1e-4 * ours.abs().max().clamp(min=1e-3)).item())
