"""Who is measured beside us, each called as its user calls it.

A peer prepares itself for a case once, as a user does who builds a module or compiles a function, and gives a function
of `q`, `k` and `v`. Whatever depends on a mask that came with the batch is done by that function, in every call, and so
is timed: masks are combined, sequences unpadded and padded again. What depends on lengths alone is made once.
Whatever a peer raises, here or in the call, becomes the error of its row.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from cases import Case, Inputs
from flash_attend import explain, flash_attention
from flash_attend.backends import BackwardName
from flash_attend.dispatch import override_backward

__all__ = ["PEERS", "Attention", "Packing", "Peer", "Unserved", "explicit_mask", "peers_for"]

# q (b, h, i, d), k (b, hk, j, d), v (b, hk, j, dv) -> out (b, h, i, dv); differentiable.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# Who writes all scores down is measured on a GPU up to so many of them, b * h * i * j: beyond, a call takes ten to a
# hundred times as long as that of anybody else, and they would take most of a run's time.
MOST_SCORES = 2**28
BOTH_DEVICES, GPU, CPU = ("cuda", "cpu"), ("cuda",), ("cpu",)
FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
CUDNN, MATH = SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH


class Unserved(Exception):
    """A peer cannot serve a case; the message says why, in one line."""


@dataclass(frozen=True)
class Peer:
    """One way to compute attention, or to train a model."""

    name: str
    about: str  # one line
    prepare: Callable[[Any], Any]  # `Inputs` -> `Attention`; raises `Unserved`, or what the peer itself raises
    devices: tuple[str, ...] = BOTH_DEVICES
    # Whether it compiles for seconds in each case: on a CPU and in a quick run it is there only where it is asked for
    # by name, in a standard run only in the grid's core.
    compiles: bool = False
    ours: bool = False  # held to the contract in every row and key; others only in `Inputs.rows`
    served: Callable[[Inputs], str] = lambda inputs: ""  # what computes it, of ours
    within: Callable[[], AbstractContextManager] = nullcontext  # it is prepared, checked and timed in this context


def _hides_future(case: Case) -> bool:
    """Whether causal hides anything: the one query of a decoding step sees every key."""
    return case.causal and case.queries > 1


def _with_four_dims(mask: Tensor) -> Tensor:
    """`(b, j)` -> `(b, 1, 1, j)`, a view; 4-D masks as they are."""
    return mask if mask.ndim == 4 else mask[:, None, None, :]


def explicit_mask(inputs: Inputs) -> Callable[[], Tensor | None]:
    """The mask that a user has to build for an attention which takes one mask and no other description.

    The function that comes back gives it for one call: bool, 4-D, broadcastable to `(b, h, i, j)`, True = may attend,
    or None where every query sees every key. The triangle is made here, once; it meets the batch's mask in every call.
    """
    case = inputs.case
    mask = None if inputs.mask is None else _with_four_dims(inputs.mask)
    if not _hides_future(case):
        return lambda: mask
    square = torch.ones(1, 1, case.queries, case.keys, dtype=torch.bool, device=inputs.q.device)
    triangle = square.tril(case.keys - case.queries)
    return lambda: triangle if mask is None else mask & triangle


def _refuse_many_scores(inputs: Inputs) -> None:
    case = inputs.case
    scores = case.batch * case.heads * case.queries * case.keys
    if inputs.q.is_cuda and scores > MOST_SCORES:
        raise Unserved(f"writes down all {scores / 2**20:.0f} Mi scores; measured up to {MOST_SCORES / 2**20:.0f} Mi")


class _KeepTokens(torch.autograd.Function):
    """Rows of a tensor. No row is taken twice, so the gradient is a copy and not a sum, as autograd would make it."""

    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = x.shape[0]
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, tokens, grad), None


class Packing(NamedTuple):
    """A batch of sequences behind one another, without their padding."""

    batch: int
    length: int  # of a padded sequence
    tokens: Tensor | None  # (t,): which of the (b n) tokens are kept; None: all of them
    starts: Tensor  # int32 (b + 1): where each sequence begins, and where the last one ends
    longest: int

    @staticmethod
    def of(mask: Tensor) -> Packing:
        """What a mask `(b, n)` keeps; the host waits for the device twice."""
        lengths = mask.sum(dim=1, dtype=torch.int32)
        starts = F.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
        return Packing(*mask.shape, mask.flatten().nonzero().squeeze(1), starts, lengths.max().item())

    def unpad(self, x: Tensor) -> Tensor:
        """`(b, h, n, d)` -> `(t, h, d)`."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.tokens is None else _KeepTokens.apply(x, self.tokens)

    def pad(self, x: Tensor) -> Tensor:
        """`(t, h, d)` -> `(b, h, n, d)`, 0 in the padding."""
        if self.tokens is not None:
            x = x.new_zeros(self.batch * self.length, *x.shape[1:]).index_copy_(0, self.tokens, x)
        return x.unflatten(0, (self.batch, self.length)).transpose(1, 2)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """`(b, hk, j, d)` -> `(b, h, j, d)`, for peers that know no grouped heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _ours(
    name: str, about: str, backend: str, backward: BackwardName | None = None, devices: tuple[str, ...] = BOTH_DEVICES
) -> Peer:
    """One of ours by this backend and, if it is told, this backward."""

    def options(inputs: Inputs) -> dict[str, Any]:
        case = inputs.case
        return dict(mask=inputs.mask, causal=case.causal, dropout_p=case.dropout_p, backend=backend)

    def prepare(inputs: Inputs) -> Attention:
        if backend == "math":
            _refuse_many_scores(inputs)
        return partial(flash_attention, **options(inputs))

    def served(inputs: Inputs) -> str:
        plan = explain(inputs.q, inputs.k, inputs.v, **options(inputs)).plan
        return f"{plan.name}, {plan.backward} backward" if plan else ""

    within = nullcontext if backward is None else partial(override_backward, backward)
    return Peer(name, about, prepare, devices, ours=True, served=served, within=within)


def _prepare_sdpa(backend: SDPBackend | None, inputs: Inputs) -> Attention:
    """PyTorch's own with one of its kernels forced, or with None the one that it chooses."""
    case = inputs.case
    if backend is MATH:
        _refuse_many_scores(inputs)
    build, is_causal = explicit_mask(inputs), False
    if inputs.mask is None and _hides_future(case):
        # For other lengths `is_causal` is aligned at the top left. Flash and memory-efficient know the alignment at the
        # bottom right; for the others PyTorch would write it out in every call.
        is_causal = case.queries == case.keys
        if case.queries < case.keys and backend not in (CUDNN, MATH):
            build = partial(causal_lower_right, case.queries, case.keys)
    repeats = backend is EFFICIENT  # knows no grouped heads
    options = dict(dropout_p=case.dropout_p, is_causal=is_causal)
    options["enable_gqa"] = case.heads != case.kv_heads and not repeats

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeats:
            k, v = _repeat_heads(k, case.heads), _repeat_heads(v, case.heads)
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=None if is_causal else build(), **options)

    return attend if backend is None else _with_kernel(attend, inputs)


def _with_kernel(attend: Attention, inputs: Inputs) -> Attention:
    """`attend`, if PyTorch has a kernel for it. Its error does not say why it has none: its warnings do, of which the
    first that is about the call, and not the choice of kernels, is told."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            attend(inputs.q, inputs.k, inputs.v)
        except RuntimeError as error:
            told = (" ".join(str(one.message).split()).partition(" (Triggered internally") for one in caught)
            reasons = (reason for reason, place, _ in told if place and "runtime disabled" not in reason)
            reason = next((reason for reason in reasons if not reason.endswith("not used because:")), "")
            if "No available kernel" not in str(error) or not reason:
                raise
            raise Unserved(f"no available kernel: {reason}") from error
    return attend


def _compiled(function: Callable) -> Callable:
    """`torch.compile` as for a program that has this one case."""
    # A backward that is timed by itself runs many times over what its forward kept.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False, fullgraph=True)


def _mask_mod(inputs: Inputs) -> Callable | None:
    """Who may see whom, as FlexAttention asks for it: pair by pair; None where everybody sees everybody."""
    case, mask, offset = inputs.case, inputs.mask, inputs.case.keys - inputs.case.queries
    parts = [lambda b, h, i, j: j <= i + offset] if _hides_future(case) else []
    if mask is not None:
        parts.append((lambda b, h, i, j: mask[b, j]) if mask.ndim == 2 else lambda b, h, i, j: mask[b, 0, i, j])
    return and_masks(*parts) if parts else None


def _prepare_flex(build_in_call: bool, inputs: Inputs) -> Attention:
    case, mask, device = inputs.case, inputs.mask, inputs.q.device
    if case.dropout_p:
        raise Unserved("FlexAttention has no dropout")
    if build_in_call and mask is None:
        raise Unserved("no mask comes with the batch: the BlockMask is made once, as for flex")
    mask_mod, grouped = _mask_mod(inputs), case.heads != case.kv_heads

    def build() -> BlockMask | None:
        if mask_mod is None:
            return None
        return create_block_mask(mask_mod, None if mask is None else case.batch, None, case.queries, case.keys, device)

    def attend(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None) -> Tensor:
        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=grouped)

    compiled = _compiled(attend)
    if not build_in_call:
        return partial(compiled, block_mask=build())
    compiled_build = _compiled(build)
    return lambda q, k, v: compiled(q, k, v, compiled_build())


def _prepare_packed(inputs: Inputs, call: Callable[[Tensor, Tensor, Tensor, Packing, Packing], Tensor]) -> Attention:
    """`call` takes `q (t, h, d)`, `k (u, hk, d)`, `v (u, hk, dv)` and how queries and keys are packed."""
    case, mask, device = inputs.case, inputs.mask, inputs.q.device
    if case.dropout_p:
        raise Unserved("has no dropout")
    if mask is not None and mask.ndim == 4:
        raise Unserved("takes sequences of different lengths, not a dense mask")
    if mask is not None and _hides_future(case) and case.queries != case.keys:
        raise Unserved("causal between sequences of which only one loses its padding is another alignment")
    everything = (torch.ones(case.batch, n, dtype=torch.bool, device=device) for n in (case.queries, case.keys))
    whole_q, whole_k = (Packing.of(tokens)._replace(tokens=None) for tokens in everything)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packing_k = whole_k if mask is None else Packing.of(mask)
        packing_q = packing_k if case.queries == case.keys else whole_q
        out = call(packing_q.unpad(q), packing_k.unpad(k), packing_k.unpad(v), packing_q, packing_k)
        return packing_q.pad(out)

    return attend


def _prepare_varlen(inputs: Inputs) -> Attention:
    case, options = inputs.case, {}
    known = inspect.signature(varlen_attn).parameters
    if _hides_future(case):
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:  # before that, grouped heads needed no word
        options["enable_gqa"] = case.heads != case.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor, queries: Packing, keys: Packing) -> Tensor:
        return varlen_attn(q, k, v, queries.starts, keys.starts, queries.longest, keys.longest, **options)

    return _prepare_packed(inputs, call)


def _prepare_flash_attention_4(inputs: Inputs) -> Attention:
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except ModuleNotFoundError as error:
        if error.name not in ("flash_attn", "flash_attn.cute"):
            raise
        raise Unserved("not installed: pip install flash-attn-4") from error
    case = inputs.case

    def options() -> dict[str, bool]:
        return dict(causal=_hides_future(case), deterministic=torch.are_deterministic_algorithms_enabled())

    def call(q: Tensor, k: Tensor, v: Tensor, queries: Packing, keys: Packing) -> Tensor:
        lengths = dict(max_seqlen_q=queries.longest, max_seqlen_k=keys.longest)
        starts = dict(cu_seqlens_q=queries.starts, cu_seqlens_k=keys.starts)
        return flash_attn_varlen_func(q, k, v, **starts, **lengths, **options())[0]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options())[0].transpose(1, 2)

    if inputs.mask is None and not case.dropout_p:
        return attend
    return _prepare_packed(inputs, call)


@cache
def _load_attend(package: str) -> ModuleType:
    """The module `attend` of a package, without what the package itself imports, much of which attention does not need.

    Raises `Unserved` where the package is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None:
        raise Unserved(f"not installed: pip install {package.replace('_', '-')}")
    (folder,) = found.submodule_search_locations
    spec = importlib.util.spec_from_file_location(f"{package}.attend", Path(folder) / "attend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _prepare_own(package: str, flash: str, mask_dims: int, inputs: Inputs) -> Attention:
    """The `Attend` of a model, with what it calls flash switched on; it takes masks of so many dimensions."""
    case, mask = inputs.case, inputs.mask
    attend = _load_attend(package).Attend(dropout=case.dropout_p, causal=case.causal, **{flash: True})
    attend.train(case.dropout_p > 0)
    if mask is not None and mask_dims == 4:
        mask = _with_four_dims(mask)
    if mask is not None and mask.ndim != mask_dims:
        raise Unserved("takes key padding (b, j), not a dense mask")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, _repeat_heads(k, case.heads), _repeat_heads(v, case.heads), mask=mask)

    return _with_kernel(call, inputs)


COMPLEX, NATURALSPEECH2 = "complex_valued_transformer", "naturalspeech2_pytorch"

# The first that a run holds stands for us.
PEERS = (
    _ours("flash_attend", "ours, by the backend that serves by default", "auto"),
    _ours("flash_attend triton", "our Triton kernels; the backward repeats bit by bit", "triton", "separate", GPU),
    _ours("flash_attend triton fused", "our Triton kernels, the backward in one pass", "triton", "fused", GPU),
    _ours("flash_attend hopper", "our Gluon kernels; the backward repeats bit by bit", "hopper", "separate", GPU),
    _ours("flash_attend hopper fused", "our Gluon kernels, the backward in one pass", "hopper", "fused", GPU),
    _ours("flash_attend sdpa", "PyTorch's fused attention, held to our rules", "sdpa", devices=CPU),
    _ours("flash_attend math", "our einsum path", "math"),
    Peer("sdpa", "PyTorch's own, by the kernel that it chooses", partial(_prepare_sdpa, None)),
    Peer("sdpa flash", "FlashAttention forced; takes no mask on a GPU", partial(_prepare_sdpa, FLASH)),
    Peer("sdpa cudnn", "cuDNN forced; masks combined in every call", partial(_prepare_sdpa, CUDNN), GPU),
    Peer("sdpa efficient", "the memory-efficient; grouped heads repeated", partial(_prepare_sdpa, EFFICIENT), GPU),
    Peer("sdpa math", "the unfused path forced", partial(_prepare_sdpa, MATH)),
    Peer("flex", "FlexAttention; its BlockMask made once, not counted", partial(_prepare_flex, False), compiles=True),
    Peer("flex + mask", "FlexAttention; its BlockMask made in every call", partial(_prepare_flex, True), compiles=True),
    Peer("varlen", "torch.nn.attention.varlen; unpads and pads in every call", _prepare_varlen, GPU),
    Peer("flash-attention 4", "flash_attn.cute; unpads as varlen does", _prepare_flash_attention_4, GPU),
    Peer("complex-valued-transformer", "its own Attend, flash=True", partial(_prepare_own, COMPLEX, "flash", 4)),
    Peer("naturalspeech2", "its own Attend, use_flash=True", partial(_prepare_own, NATURALSPEECH2, "use_flash", 2)),
)


def peers_for(peers: Sequence[Peer], device: str, patterns: Sequence[str] = (), *, quick: bool = False) -> list[Peer]:
    """Those of `peers` on "cpu" or "cuda" that a shell pattern names, or all but those that would compile for longer
    than they are measured.

    Raises `ValueError` for a pattern that names none.
    """
    there = [peer for peer in peers if device in peer.devices]
    if not patterns:
        return [peer for peer in there if not (peer.compiles and (quick or device == "cpu"))]
    names = [peer.name for peer in there]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"no peer on {device} is named {pattern!r}; there are {', '.join(map(repr, names))}")
    return [peer for peer in there if any(fnmatch.fnmatchcase(peer.name, pattern) for pattern in patterns)]
