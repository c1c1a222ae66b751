"""Other people's Attends, as far as their interface and their meaning go, and calls of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flash_attend
from flash_attend.integrations import KNOWN, PatchHandle, patch, served

COMPLEX = "complex_valued_transformer.attend.Attend"
NATURALSPEECH2 = "naturalspeech2_pytorch.attend.Attend"
X_TRANSFORMERS = "x_transformers.attend.Attend"
STRANGER = "some_package.attend.Attend"


def needs(package: str) -> list[pytest.MarkDecorator]:
    """The marks of tests of a package; where it is missing, those of its module are skipped."""
    pytest.importorskip(package, reason=f"{package} is missing: `make test-clients` installs it and runs these tests")
    return [pytest.mark.clients]


def plain_attention(
    attend: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    change: Callable = lambda scores: scores,
    attn_bias: Tensor | float = 0.0,
) -> Tensor:
    """Attention with whole score matrices, in the dtype of the inputs; a 2-D mask is key padding."""
    k, v = (x[:, None] if x.ndim == 3 else x for x in (k, v))
    scale = getattr(attend, "scale", None)
    scores = change(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale))
    scores = scores + attn_bias
    queries, keys = scores.shape[-2:]
    if mask is not None:
        scores = scores.masked_fill(~(mask[:, None, None, :] if mask.ndim == 2 else mask), -torch.inf)
    if getattr(attend, "causal", False):
        future = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        scores = scores.masked_fill(future, -torch.inf)
    return drop(attend, scores.softmax(dim=-1)) @ v


def drop(attend: Any, weights: Tensor) -> Tensor:
    """Dropout as the originals do it: by the number on the flash path, else by the layer."""
    if not hasattr(attend, "attn_dropout"):
        return weights
    flash = any(getattr(attend, name, False) for name in ("flash", "use_flash", "use_flash_attn"))
    return nn.functional.dropout(weights, attend.dropout, attend.training) if flash else attend.attn_dropout(weights)


def by_pair(attend, q, k, v, mask=None, **rest):
    """Reads a 2-D mask as (i, j)."""
    return plain_attention(attend, q, k, v, None if mask is None else mask.expand(*q.shape[:3], k.shape[-2]))


def tiled(attend, q, k, v, mask=None, **rest):
    """Query head n reads key head n % hk."""
    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))
    return plain_attention(attend, q, k, v, mask)


def fake(
    compute: Callable[..., Any] = plain_attention,
    path: str = STRANGER,
    options: dict[str, Any] | None = None,
    arguments: tuple[str, ...] | dict[str, Any] = ("mask",),
) -> type[nn.Module]:
    """A class with the path, the constructor parameters and forward's arguments that are given. It counts calls."""
    arguments = arguments if isinstance(arguments, dict) else dict.fromkeys(arguments)
    options = {"dropout": 0.0, "causal": False, "flash": False} if options is None else options
    module, _, name = path.rpartition(".")

    def __init__(self, **given):
        nn.Module.__init__(self)
        for option in options:
            setattr(self, option, given.get(option, options[option]))
        if "dropout" in options:
            self.attn_dropout = nn.Dropout(self.dropout)

    def forward(self, q, k, v, **others):
        kind.calls += 1
        return compute(self, q, k, v, **{name: value for name, value in others.items() if value is not None})

    keyword, either = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    __init__.__signature__ = inspect.Signature(
        [itself, *(inspect.Parameter(option, keyword, default=value) for option, value in options.items())]
    )
    forward.__signature__ = inspect.Signature(
        [itself.replace(kind=either)]
        + [inspect.Parameter(argument, either) for argument in "qkv"]
        + [inspect.Parameter(argument, either, default=default) for argument, default in arguments.items()]
    )
    forward.__module__ = module
    contents = {"__init__": __init__, "forward": forward, "__module__": module, "calls": 0}
    kind = type(name, (nn.Module,), contents)
    return kind


def fake_known(path: str = NATURALSPEECH2, compute: Callable[..., Any] | None = None, **options: Any) -> nn.Module:
    """An instance of a fake of a known class, with the interface and the meaning that its row describes."""
    row = KNOWN[path]
    defaults = {"dropout": 0.0, "causal": False, "heads": None, "scale": None, row.flash: False}
    meaning = {"BroadcastMaskAttend": by_pair, "TiledHeadsAttend": tiled}.get(row.reading.__name__, plain_attention)
    kind = fake(compute or meaning, path, {name: defaults[name] for name in row.options}, row.arguments)
    return kind(**options)


class Holder(nn.Module):
    """Calls what it holds as `attend`."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, *inputs, **masks):
        """Attends."""
        return self.attend(*inputs, **masks)


def inputs(heads: int = 4, kv_heads: int | None = 4, queries: int = 6, keys: int = 6) -> tuple[Tensor, ...]:
    """Random `q (2, h, i, 8)`, `k` and `v`."""
    generator = torch.Generator().manual_seed(0)
    kv = (2, keys, 8) if kv_heads is None else (2, kv_heads, keys, 8)
    return tuple(torch.randn(size, generator=generator) for size in ((2, heads, queries, 8), kv, kv))


PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)


def assert_same(answer: Tensor, expected: Tensor) -> None:
    """Up to float32's rounding."""
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)


def refused(model: nn.Module, **options: Any) -> PatchHandle:
    """What `patch` says of a model whose only Attend it refuses, which must change nothing."""
    before = {module: (type(module), dict(vars(module))) for module in model.modules()}
    with pytest.warns(UserWarning, match="patch left as it is: "):
        handle = patch(model, **options)
    assert (handle.replaced, handle.refused) == (0, 1)
    assert {module: (type(module), dict(vars(module))) for module in model.modules()} == before
    return handle


def refusal(attend: nn.Module, **options: Any) -> str:
    """The reason why an Attend is refused."""
    return refused(Holder(attend), **options).outcomes[0].reason


def serve_by(monkeypatch: pytest.MonkeyPatch, attention: Callable[..., Tensor]) -> None:
    """Has every Attend computed by `attention` once it is patched: what `patch` compares is ours."""
    right = served.flash_attention

    def patch_first(*model, **options):
        monkeypatch.setattr(served, "flash_attention", right)
        handle = patch(*model, **options)
        monkeypatch.setattr(served, "flash_attention", attention)
        return handle

    monkeypatch.setattr(flash_attend, "patch", patch_first)
