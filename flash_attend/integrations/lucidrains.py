"""What is known about other people's classes: one `KnownAttend` a class, in `KNOWN`. To make another class known:

    from flash_attend.integrations import KnownAttend, register

    register(KnownAttend("my_package.attend.Attend", options={"dropout", "causal", "flash"}))

A row says what a class accounts for and how it reads its arguments. Whether the installed version computes what the row
promises is compared whenever a model is patched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from flash_attend.integrations.served import ServedAttend

__all__ = ["KNOWN", "BroadcastMaskAttend", "KnownAttend", "NoBiasAttend", "TiledHeadsAttend", "path_of", "register"]


# ---------------------------------------------------------------------------------------------------------------------
# Classes that read their arguments in another way
# ---------------------------------------------------------------------------------------------------------------------


class BroadcastMaskAttend(ServedAttend):
    """Aligns a mask of fewer than four dimensions with the last ones of `(b, h, i, j)`, as tensors broadcast."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `ServedAttend.forward`, except that a 2-D mask is `(i, j)` and not `(b, j)`."""
        if isinstance(mask, Tensor) and mask.ndim < 4:
            mask = mask[(None,) * (4 - mask.ndim)]
        return super().forward(q, k, v, mask=mask)


class TiledHeadsAttend(ServedAttend):
    """Query head `n` reads key/value head `n % hk`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `ServedAttend.forward`, with the other order of grouped heads."""
        heads, kv_heads = q.shape[1], k.shape[1]
        if k.ndim != 4 or kv_heads in (0, 1, heads) or heads % kv_heads:
            return super().forward(q, k, v, mask=mask)
        q = rearrange(q, "b (g hk) i d -> b (hk g) i d", hk=kv_heads)
        if mask is not None and mask.ndim == 4 and mask.shape[1] == heads:
            mask = rearrange(mask, "b (g hk) i j -> b (hk g) i j", hk=kv_heads)
        out = super().forward(q, k, v, mask=mask)
        return rearrange(out, "b (hk g) i dv -> b (g hk) i dv", hk=kv_heads)


class NoBiasAttend(ServedAttend):
    """Takes the argument `attn_bias` of a class whose flash path allows nothing but None there."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, attn_bias: None = None) -> Tensor:
        """As `ServedAttend.forward`; `attn_bias` must be None."""
        if attn_bias is not None:
            raise ValueError("attn_bias must be None: an additive bias is not supported")
        return super().forward(q, k, v, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownAttend:
    """What is known about one class of attention modules.

    `dropout`, `causal` and `scale` are read from the attributes of these names, where the class has them.
    """

    path: str  # "package.module.Class"
    options: Collection[str]  # the constructor parameters that this row accounts for; any other means refusal
    arguments: tuple[str, ...] = ("mask",)  # what forward takes after q, k and v
    flash: str = "flash"  # the attribute that chooses its flash path
    flash_scale: str = ""  # what its flash path does with `scale`, where that is not what its einsum path does
    reading: type[ServedAttend] = ServedAttend
    attributes: Collection[str] = ()  # what its instances hold beside the usual, without a say in what they compute
    refuse: Callable[[nn.Module], str | None] = lambda attend: None  # the reason to leave an instance alone, or None
    read: str = ""  # the version that was read to write the row


KNOWN: dict[str, KnownAttend] = {}


def register(row: KnownAttend) -> KnownAttend:
    """Adds a row to `KNOWN`, or replaces the one of the same class."""
    if not isinstance(row, KnownAttend):
        raise TypeError(f"row must be a KnownAttend, got {type(row).__name__}")
    KNOWN[row.path] = row
    return row


def path_of(kind: type) -> str:
    """What `KnownAttend.path` says of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _refuse_x_transformers(attend: nn.Module) -> str:
    reason = "it returns (out, intermediates) and takes attn_bias, prev_attn and more; flash_attend returns out alone"
    implemented = {"dropout", "causal", "heads", "scale", "flash", "sdp_kwargs"}
    unusual = []
    for name, parameter in list(inspect.signature(type(attend).__init__).parameters.items())[1:]:
        value = getattr(attend, name, parameter.default)
        if name not in implemented and value != parameter.default and (value or parameter.default):
            unusual.append(f"{name}={value!r}")
    unusual += [name for name, _ in attend.named_children() if name != "attn_dropout"]
    return reason + (f"; nor are these supported: {', '.join(unusual)}" if unusual else "")


def _refuse_bias(attend: nn.Module) -> str | None:
    if attend.flash:
        return None
    return "flash=False: its calls may carry attn_bias, an additive bias; only flash=True, which allows none, is served"


def _refuse_memories(attend: nn.Module) -> str | None:
    if not (attend.use_flash and attend.causal):
        return None
    return (
        "use_flash=True with causal=True: the model prepends keys, and there this class aligns its causal mask "
        "top-left; supported is bottom-right"
    )


for _row in (
    # What a class computes is what its einsum path computes; where its flash path differs, the row tells.
    KnownAttend(
        "complex_valued_transformer.attend.Attend",
        {"dropout", "causal", "heads", "scale", "flash"},
        flash_scale="ignores it",
        reading=BroadcastMaskAttend,
        read="0.0.14",
    ),
    KnownAttend(
        "naturalspeech2_pytorch.attend.Attend", {"dropout", "causal", "use_flash"}, flash="use_flash", read="0.1.8"
    ),
    KnownAttend("bs_roformer.attend.Attend", {"dropout", "flash", "scale"}, arguments=(), read="1.2.4"),
    KnownAttend("voicebox_pytorch.attend.Attend", {"dropout", "flash", "scale"}, read="0.5.0"),
    KnownAttend(
        "denoising_diffusion_pytorch.attend.Attend",
        {"dropout", "flash", "scale"},
        arguments=(),
        flash_scale="applies scale * d ** -1.5",
        read="2.3.4",
    ),
    KnownAttend("gigagan_pytorch.attend.Attend", {"dropout", "flash"}, arguments=(), read="0.3.0"),
    KnownAttend(
        "iTransformer.attend.Attend",
        {"dropout", "heads", "scale", "flash", "causal"},
        arguments=(),
        flash_scale="ignores it",
        read="0.8.1",
    ),
    KnownAttend("classifier_free_guidance_pytorch.attend.Attend", {"dropout", "causal", "flash"}, read="0.7.1"),
    KnownAttend(
        "spear_tts_pytorch.attend.Attend", {"dropout", "causal", "flash"}, reading=TiledHeadsAttend, read="0.4.8"
    ),
    KnownAttend(
        "simple_hierarchical_transformer.attention.Attend",
        {"causal", "use_flash_attn"},
        flash="use_flash_attn",
        read="0.4.0",
    ),
    KnownAttend(
        "palm_rlhf_pytorch.attention.Attention",
        {"dropout", "causal", "use_flash_attn"},
        flash="use_flash_attn",
        read="0.8.0",
    ),
    KnownAttend(
        "soundstorm_pytorch.attend.Attend",
        {"causal", "dropout", "flash"},
        arguments=("mask", "attn_bias"),
        reading=NoBiasAttend,
        refuse=_refuse_bias,
        read="0.6.1",
    ),
    KnownAttend(
        "audiolm_pytorch.attend.Attend",
        {"dropout", "causal", "flash"},
        arguments=("mask", "attn_bias"),
        reading=NoBiasAttend,
        refuse=_refuse_bias,
        read="2.4.0",
    ),
    KnownAttend(
        "recurrent_memory_transformer_pytorch.attend.Attend",
        {"dropout", "causal", "use_flash"},
        flash="use_flash",
        refuse=_refuse_memories,
        read="0.7.0",
    ),
    KnownAttend("x_transformers.attend.Attend", (), refuse=_refuse_x_transformers, read="2.31.10"),
):
    register(_row)
