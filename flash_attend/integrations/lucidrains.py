"""The Attends of lucidrains' packages, one row of the table each, and the ways in which they read their arguments.

What a class computes is what its einsum path computes; where its flash path differs, the row tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from einops import rearrange
from torch import Tensor

from flash_attend.integrations.known import KnownAttend, register
from flash_attend.integrations.served import ServedAttend

if TYPE_CHECKING:
    from flash_attend.integrations.search import Found

__all__ = ["BroadcastMaskAttend", "TiledHeadsAttend"]


class BroadcastMaskAttend(ServedAttend):
    """Aligns a mask of fewer than four dimensions with the last ones of `(b, h, i, j)`, as tensors broadcast."""

    def _compute_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **others: Any
    ) -> Tensor:
        """As `ServedAttend`, except that a 2-D mask is `(i, j)` and not `(b, j)`."""
        if isinstance(mask, Tensor) and mask.ndim < 4:
            mask = mask[(None,) * (4 - mask.ndim)]
        return super()._compute_attention(q, k, v, mask=mask, **others)


class TiledHeadsAttend(ServedAttend):
    """Query head `n` reads key/value head `n % hk`."""

    def _compute_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """As `ServedAttend`, with the other order of grouped heads."""
        heads, kv_heads = q.shape[1], k.shape[1]
        if k.ndim != 4 or kv_heads in (0, 1, heads) or heads % kv_heads:
            return super()._compute_attention(q, k, v, mask=mask, bias=bias, sinks=sinks, **others)

        def grouped(pairs: Tensor | None) -> Tensor | None:
            if pairs is None or pairs.ndim < 3 or pairs.shape[-3] != heads:
                return pairs
            return rearrange(pairs, "... (g hk) i j -> ... (hk g) i j", hk=kv_heads)

        q = rearrange(q, "b (g hk) i d -> b (hk g) i d", hk=kv_heads)
        sinks = None if sinks is None else rearrange(sinks, "(g hk) -> (hk g)", hk=kv_heads)
        out = super()._compute_attention(q, k, v, mask=grouped(mask), bias=grouped(bias), sinks=sinks, **others)
        return rearrange(out, "b (hk g) i dv -> b (g hk) i dv", hk=kv_heads)


def _refuse_memories(found: Found) -> str | None:
    if not (found.attend.use_flash and found.attend.causal):
        return None
    return (
        "use_flash=True with causal=True: the model prepends keys, and there this class aligns its causal mask "
        "top-left; supported is bottom-right"
    )


def _doubt_pope(found: Found) -> str | None:
    if all(getattr(owner, "pope_embed", None) is None for owner in found.owners):
        return None
    return "it is not called while the module that holds it has a pope_embed: that computes attention by itself"


for _row in (
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
    KnownAttend(
        "bs_roformer.attend.Attend", {"dropout", "flash", "scale"}, arguments=(), doubt=_doubt_pope, read="1.2.4"
    ),
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
        read="0.6.1",
    ),
    KnownAttend(
        "audiolm_pytorch.attend.Attend",
        {"dropout", "causal", "flash"},
        arguments=("mask", "attn_bias"),
        read="2.4.0",
    ),
    KnownAttend(
        "recurrent_memory_transformer_pytorch.attend.Attend",
        {"dropout", "causal", "use_flash"},
        flash="use_flash",
        refuse=_refuse_memories,
        read="0.7.0",
    ),
    KnownAttend(
        "muse_maskgit_pytorch.attend.Attend",
        {"scale", "dropout", "flash"},
        flash_differs={"dropout", "2-D masks"},
        reading=BroadcastMaskAttend,
        read="0.3.5",
    ),
    # Its einsum path takes a mask and does nothing with it.
    KnownAttend("MEGABYTE_pytorch.attend.Attend", {"causal", "dropout", "flash"}, arguments=(), read="0.3.6"),
):
    register(_row)
