"""Hugging Face's transformers: `attn_implementation="attend"`, once `register()` was called.

Models ask a mask interface for a mask, mostly once in a forward, and then an attention interface for every layer. What
transformers gives its own kernels is a mask `(b, 1, i, j)`; ours stays `(b, j)` wherever it says no more than that. Its
shape says under which causality and window it stands, so that no layer has to guess:

    None           nothing is hidden but by causality, if the layer is causal: as it is for torch's attention
    (b, kind, j)   keys that are hidden from every query, beside what the kind hides; of stride 0 along `kind`
    (b, 1, i, j)   all that is hidden, causality too: of one query, that is no more than `(b, j)`

With a kind, the last query sees the last of `j` keys: a static cache is cut to as many as are filled.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import prepare_padding_mask, sdpa_mask

from flash_attend.dispatch import check_backend
from flash_attend.functional import flash_attention
from flash_attend.packed import flash_attention_packed
from flash_attend.spec import Window
from flash_attend.tracing import constant_when_compiled

__all__ = ["register"]

# Parts of names by which transformers finds implementations of its own.
_TAKEN = ("flash", "sdpa", "flex_attention", "paged", "eager", "/")
# Arguments of layers whose attention is another one: sinks of each query, choices of keys, pages of a cache.
_UNSERVED = ("sinks", "indices", "block_indices", "block_table")


# Kinds of masks `(b, kind, j)`: what they hide beside the keys that they hide from every query.
PADDED = 1  # nothing
CAUSAL = 2
WINDOW = 3  # what is not causal, or not within the `sliding_window` of the layer's config
BOTH_SIDES = 4  # what is not within as many keys, on both sides

_NAMES: set[str] = set()  # that are registered


def register(name: str = "attend", *, backend: str = "auto", deterministic: bool | None = None) -> None:
    """Makes `attn_implementation=name` of transformers' models our attention.

        register()
        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="attend")
        model.set_attn_implementation("attend")  # of one that is there

    A model with attention modules that never ask for the implementation is refused when it is built or set: it would
    read our masks in its own way.

    Args:
        name: under which it is registered; not one that contains a name of transformers' own ("flash", "sdpa").
        backend: as in `flash_attention`.
        deterministic: as in `flash_attention`.
    """
    check_backend(backend)
    if taken := [part for part in _TAKEN if part in name]:
        raise ValueError(f"name must not contain {taken[0]!r}, by which transformers finds its own, got {name!r}")
    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError("transformers is too old: its mask interface does not tell lengths and offsets")
    AttentionInterface.register(name, functools.partial(_attend, backend=backend, deterministic=deterministic))
    AttentionMaskInterface.register(name, _mask)
    _NAMES.add(name)
    _guard()


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> Tensor | None:
    """The mask of a forward.

    Where transformers allows a mask to be left out, it is a plain one: causal or not, perhaps in a window or in chunks.
    Where it does not, the mask was changed (packed sequences, prefixes, images), or somebody will read it in full; and
    where a static cache is filled to, in a compiled step, only the device knows.
    """
    if attention_mask is not None and attention_mask.ndim == 3:  # ours already: `generate` has asked for it before
        return attention_mask
    kind = None
    if (allow_is_causal_skip or allow_is_bidirectional_skip) and not isinstance(q_offset, Tensor):
        filled = q_offset + q_length - kv_offset
        keys = filled if allow_is_causal_skip else kv_length
        kind = _kind(allow_is_causal_skip, filled, kv_length, keys, local_size, config)
    if kind is None:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            device=device,
            **others,
        )
    if attention_mask is not None:
        shown_keys = prepare_padding_mask(attention_mask, kv_length, kv_offset)[:, kv_offset : kv_offset + keys]
    elif keys == kv_length and kind in (PADDED, CAUSAL):
        return None
    else:
        shown_keys = torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch_size, keys)
    return shown_keys[:, None].expand(-1, kind, -1)


def _kind(causal: bool, filled: int, kv_length: int, keys: int, local_size: int | None, config: Any) -> int | None:
    """The kind of a plain mask; None for what has to be written out. The last of `filled` keys is the last query's."""
    if causal and filled > kv_length:
        return None
    if local_size is None or keys <= local_size:
        return CAUSAL if causal else PADDED
    in_chunks = getattr(config, "attention_chunk_size", None) == local_size
    if in_chunks or getattr(config, "sliding_window", None) != local_size:
        return None
    if causal:
        return WINDOW
    return BOTH_SIDES if filled == kv_length else None


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """Who sees whom, in the words of `flash_attention`."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = False
    window: Window | None = None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    *,
    backend: str,
    deterministic: bool | None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention of a layer: `(b, h, i, d)`, `(b, hk, j, d)` and `(b, hk, j, dv)` to `(b, i, h, dv)`."""
    _check_others(others)
    options: dict[str, Any] = dict(
        scale=scaling, softcap=softcap, sinks=s_aux, dropout_p=dropout, deterministic=deterministic, backend=backend
    )
    by_layer = _by_layer(module, is_causal, sliding_window)
    if cu_seq_lens_q is not None and query.shape[2] == key.shape[2]:
        if position_bias is None and (attention_mask is None or _tells_window(module, sliding_window)):
            options |= dict(causal=by_layer.causal, window=by_layer.window)
            return _attend_packed(query, key, value, cu_seq_lens_q, others, **options), None
        if attention_mask is None:
            raise ValueError("position_bias is not served where sequences are packed, and no mask keeps them apart")
    seen = by_layer if attention_mask is None else _read(attention_mask, module)
    if attention_mask is not None and attention_mask.ndim == 3 and attention_mask.shape[2] < key.shape[2]:
        keys = attention_mask.shape[2]
        key, value = key[:, :, :keys], value[:, :, :keys]
        position_bias = None if position_bias is None else position_bias[..., :keys]
    if position_bias is not None:
        seen = seen._replace(bias=position_bias if seen.bias is None else seen.bias + position_bias)
    out = flash_attention(query, key, value, **seen._asdict(), **options)
    return out.transpose(1, 2).contiguous(), None


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens_q: Tensor, others: dict[str, Any], **options: Any
) -> Tensor:
    """The attention of sequences that are one row, `(1, h, t, d)` to `(1, t, h, dv)`."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    # A length that only the device knows is no longer than all of them.
    max_q, max_k = (
        length if isinstance(length := others.get(name), int) else q.shape[0]
        for name in ("max_length_q", "max_length_k")
    )
    return flash_attention_packed(q, k, v, cu_seq_lens_q, others["cu_seq_lens_k"], max_q, max_k, **options)[None]


def _by_layer(module: nn.Module, is_causal: bool | None, sliding_window: int | None) -> _Seen:
    """What a layer says of itself: a `sliding_window` counts the query in, on either side."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return _Seen(causal=causal, window=None if sliding_window is None else (sliding_window - 1, sliding_window - 1))


def _tells_window(module: nn.Module, sliding_window: int | None) -> bool:
    """Whether a layer without a window says that it has none: some models leave it to the mask."""
    return sliding_window is not None or getattr(getattr(module, "config", None), "sliding_window", None) is None


def _read(attention_mask: Tensor, module: nn.Module) -> _Seen:
    """A mask of ours or of a model's own."""
    if attention_mask.dtype == torch.bool:
        if attention_mask.ndim == 4:
            return _Seen(mask=attention_mask)
        if attention_mask.ndim == 3:
            kind, mask = attention_mask.shape[1], attention_mask[:, 0]
            if kind in (PADDED, CAUSAL):
                return _Seen(mask=mask, causal=kind == CAUSAL)
            size: Any = module.config.sliding_window  # type: ignore[union-attr]
            return _Seen(mask=mask, causal=kind == WINDOW, window=(size - 1, 0) if kind == WINDOW else (size, size))
    elif attention_mask.is_floating_point() and attention_mask.ndim == 4:
        # What lies at the lowest number is hidden, not merely unlikely; all else is a bias. It is not looked whether
        # there is any, which would wait for the device.
        hidden = attention_mask <= torch.finfo(attention_mask.dtype).min
        return _Seen(bias=attention_mask.masked_fill(hidden, -torch.inf))
    raise ValueError(
        "attention_mask must be one that transformers made for this implementation, or 4-D, bool or floating-point, got"
        f" {attention_mask.dtype} {tuple(attention_mask.shape)}"
    )


def _check_others(others: dict[str, Any]) -> None:
    """Raises for arguments that ask for another attention than is computed here."""
    for name in _UNSERVED:
        if others.get(name) is not None:
            raise ValueError(f"{name} is not served: the layer asks for another attention than masks and biases make")
    if others.get("output_attentions"):
        _warn_of_weights()


@constant_when_compiled
@functools.cache
def _warn_of_weights() -> None:
    warnings.warn("output_attentions=True gives no weights here, which are never in memory: use eager", stacklevel=3)


# ---------------------------------------------------------------------------------------------------------------------
# Models that never ask
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _guard() -> None:
    """Has every model checked that is built or set from now on."""
    build, change = PreTrainedModel.post_init, PreTrainedModel.set_attn_implementation

    @functools.wraps(build)
    def post_init(self: PreTrainedModel) -> None:
        build(self)
        _check(self)

    @functools.wraps(change)
    def set_attn_implementation(
        self: PreTrainedModel, attn_implementation: str | dict, *args: Any, **kwargs: Any
    ) -> None:
        models = [module for module in self.modules() if isinstance(module, PreTrainedModel)]
        before = [model.config._attn_implementation for model in models]
        change(self, attn_implementation, *args, **kwargs)
        try:
            for model in models:
                _check(model, asked=attn_implementation)
        except ValueError:
            for model, implementation in zip(models, before, strict=True):
                model.config._attn_implementation_internal = implementation
            raise

    PreTrainedModel.post_init, PreTrainedModel.set_attn_implementation = post_init, set_attn_implementation


def _check(model: Any, asked: str | dict = "") -> None:
    """Raises `ValueError` if a model, without the models inside it, has attention that never asks for ours."""
    name = asked if isinstance(asked, str) and asked in _NAMES else model.config._attn_implementation
    if name not in _NAMES:
        return
    pending, own = list(model.children()), set[str]()
    while pending:
        module = pending.pop()
        if not isinstance(module, PreTrainedModel):
            pending += module.children()
            kind: type = type(module)
            if _attends_by_itself(kind):
                own.add(type(module).__name__)
    if own:
        raise ValueError(
            f"attn_implementation={name!r} cannot serve {type(model).__name__}: {', '.join(sorted(own))} computes"
            " attention by itself and never asks transformers' AttentionInterface"
        )


@functools.cache
def _attends_by_itself(kind: type) -> bool:
    """Whether a class weighs values by a softmax of products, and does not know the interface: by its source."""
    if not re.search("Atten|Attn", kind.__name__) or kind.__module__.startswith("torch."):
        return False
    defining = next(base for base in kind.__mro__ if "forward" in vars(base))
    try:
        source = inspect.getsource(defining)
    except (OSError, TypeError):
        return False
    if "ALL_ATTENTION_FUNCTIONS" in source or "attention_interface" in source:
        return False
    weighs = re.search(r"softmax\(", source) and re.search(r"matmul\(|bmm\(|einsum\(| @ ", source)
    return bool(weighs) or "scaled_dot_product_attention(" in source
