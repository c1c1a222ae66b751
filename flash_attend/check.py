"""Before a variant first serves by default on a part, it computes one small call there, and is held to the einsum path
in float64 by the error budget.

Lengths are run-time values of the kernels: what is compiled for the small call is what the call needs that asked. The
call has full tiles and cut ones both ways, queries that see no key, and NaN in hidden keys.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from flash_attend.backends import BACKENDS, BackwardName
from flash_attend.dropout import keep_mask
from flash_attend.evidence import Finding, Store, tuned_tiles
from flash_attend.operands import Operands
from flash_attend.reference import attention_reference, attention_reference_gradients
from flash_attend.spec import AttentionSpec, MaskKind, describe
from flash_attend.target import DeviceTarget
from flash_attend.testing.budget import Budget, TF32Products
from flash_attend.testing.oracle import Answer
from flash_attend.tracing import constant_when_compiled
from flash_attend.variant import ALL, Kind, Variant

__all__ = ["PRODUCTS", "SmallCall", "answer", "check", "checked", "servable", "small_call"]

DROPOUT_P = 0.25
SEED = 20_260_131
TF32_EPS = 2.0**-10  # the spacing of what a product of float32 takes in TF32
HIDDEN = 7  # keys at the end that a mask hides from everybody

T = TypeVar("T")
_one_at_a_time = threading.Lock()


@constant_when_compiled  # so that a compiler's trace has it run, for real
def checked(fields: tuple, device: torch.device) -> Finding:
    """What is known of the variant with these fields on the part of a device; what nobody knows yet is found out.

    Raises `RuntimeError` while a CUDA graph is captured, where nothing can be found out.
    """
    store, variant = Store.of(device), Variant.read(fields)
    if found := store.finding(variant):
        return found
    if os.environ.get("FLASH_ATTEND_CHECK") == "0":
        return Finding(True, "trusted unchecked, because FLASH_ATTEND_CHECK is 0")
    if _capturing(device):
        raise RuntimeError(f"a CUDA graph is being captured, and {variant} was not checked here: call it once before")
    with _one_at_a_time:
        return store.finding(variant) or check(variant, device)


def answer(request: list) -> list:
    """`check`, anew, as a process of its own is asked for it: by a device's name and a variant's fields."""
    device, fields = request
    return list(check(Variant.read(fields), torch.device(device), anew=True))


HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
PRODUCTS = (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "tf32x3"), ("float64", "ieee"))


def servable(target: DeviceTarget) -> list[Variant]:
    """The variants that need a check on a part, at head dimensions that are common."""
    found = []
    flags = product(PRODUCTS, HEAD_DIMS, MASKS, (False, True), (False, True), (False, True))
    for products, dim, (mask, per_head), causal, dropout, grouped in flags:
        kind = Kind(*products, dim, dim, mask, causal, dropout)
        for backend in BACKENDS.values():
            backwards = [backend.usual_backward, *["fused"] * (backend.refuse_fused is not None)]
            tiles = partial(tuned_tiles, backend.name, kind, target)
            variants = [
                Variant(backend.name, way, kind, per_head, grouped, False, False, ALL, tiles(way)) for way in backwards
            ]
            found += [one for one in variants if backend.proof != "none" and not _refused(one, target)]
    return sorted(found, key=lambda one: (one.backend, one.backward, PRODUCTS.index(one.kind[:2])))


MASKS = (("none", False), ("key", False), ("key", True), ("dense", False))


def _refused(variant: Variant, target: DeviceTarget) -> str:
    backend, spec = BACKENDS[variant.backend], _spec_of(variant)
    refused = backend.refuse(spec, target)
    fused = backend.refuse_fused if variant.backward == "fused" else None
    return refused or (fused(spec, target) if fused else "")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check(variant: Variant, device: torch.device, *, anew: bool = False) -> Finding:
    """Checks a variant and keeps what comes of it; while another process checks it, waits for that one's finding.

    `anew` does not ask what was found before, nor whether a process died.
    """
    store = Store.of(device)
    with store.checking(variant, anew=anew) as refusal:
        if anew:
            store.forget(variant)
        elif found := store.finding(variant):
            return found
        if refusal:
            finding, lasting = Finding(False, refusal), False
        else:
            start = time.perf_counter()
            finding, lasting = _judge(variant, device)
        details = dict(seconds=time.perf_counter() - start, date=time.strftime("%Y-%m-%d")) if lasting else {}
        store.keep(variant, finding, **details)
    return finding


def _judge(variant: Variant, device: torch.device) -> tuple[Finding, bool]:
    """The finding of a check, and whether it says something of the variant: memory may lack for other reasons."""
    try:
        return _in_a_thread(lambda: _on_the_device(variant, device))
    except Exception as error:  # whatever it is, there is another backend
        lasting = isinstance(error, _Fault)
        error = error.__cause__ if lasting else error  # type: ignore[assignment]
        found = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return Finding(False, f"its self-check failed here: {found} ({variant})"), lasting


class _Fault(Exception):
    """What the kernels themselves raised, which is its cause."""


def _in_a_thread(function: Callable[[], T]) -> T:
    """What a function gives in a thread of its own, where no mode, transform or stream of the caller's is on."""
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="flash_attend check", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]


def _on_the_device(variant: Variant, device: torch.device) -> tuple[Finding, bool]:
    if device.type != "cuda":
        return _compare(variant, device)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        return _compare(variant, device)  # which has read its results when it returns


# ---------------------------------------------------------------------------------------------------------------------
# The call and its judge
# ---------------------------------------------------------------------------------------------------------------------


class SmallCall(NamedTuple):
    """A call that a variant serves."""

    operands: Operands  # clean
    poisoned: Operands  # NaN in keys that nobody sees
    spec: AttentionSpec
    grad_out: Tensor


def _compare(variant: Variant, device: torch.device) -> tuple[Finding, bool]:
    spec = _spec_of(variant)
    tiles = _tiles_of(variant, spec, device)
    call = small_call(variant, getattr(tiles, "schedule_block", (64, 64)), device)
    with torch.no_grad():
        truth = _truth(call)
    budget = _budget(call, truth)
    try:
        with torch.no_grad():
            answer = _answer(variant, call, tiles)
        used = budget.check(answer)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _Fault from error
    worst = max(used, key=used.__getitem__)
    return Finding(True, f"self-checked: {worst} used {used[worst]:.2f} of its error budget ({variant})"), True


def _tiles_of(variant: Variant, spec: AttentionSpec, device: torch.device) -> Any:
    if variant.tiles:
        from flash_attend.kernels.configs import of_text

        return of_text(variant.tiles)
    target = replace(DeviceTarget.of(device), multiprocessors=0)  # the tiles of long calls
    return BACKENDS[variant.backend].tiles(spec, target, cast(BackwardName, variant.backward))


def _spec_of(variant: Variant) -> AttentionSpec:
    """The spec of a variant's small call, but for its lengths."""
    kind = variant.kind
    return AttentionSpec(
        *(3 if kind.mask != "none" else 1, 4 if variant.grouped else 2, 2, 1 if variant.one_query else 2, 1),
        *(kind.head_dim, kind.value_dim),
        getattr(torch, kind.dtype),
        mask=MaskKind[kind.mask.upper()],
        mask_per_head=variant.mask_per_head,
        causal=kind.causal,
        scale=kind.head_dim**-0.5 * (-1 if variant.negative_scale else 1),
        dropout_p=DROPOUT_P if kind.dropout else 0.0,
        precision=kind.precision,
    )


def small_call(variant: Variant, block: tuple[int, int], device: torch.device) -> SmallCall:
    """A call of a variant whose tiles have at most so many queries and keys: the same numbers each time."""
    edge, kind = max(block), variant.kind
    keys = 2 * edge + edge // 2 + 5
    # Without a mask only causality leaves queries with nothing to see, where they outnumber the keys.
    queries = 3 * edge + 9 if kind.causal and kind.mask == "none" else edge + edge // 2 - 3
    queries = 1 if variant.one_query else queries
    spec = replace(_spec_of(variant), queries=queries, keys=keys)

    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device, spec.dtype)

    q = draw(spec.batch, spec.heads, queries, spec.head_dim)
    k = draw(spec.batch, spec.kv_heads, keys, spec.head_dim)
    v = draw(spec.batch, spec.kv_heads, keys, spec.value_dim)
    mask = _mask(spec, device)
    seed = torch.tensor([SEED], device=device) if spec.dropout_p else None
    clean = poisoned = Operands(q, k, v, mask, seed)
    if mask is not None:
        hidden = ~mask.flatten(1, 2).any(dim=1)[:, None, :, None]  # (b, 1, j, 1)
        poisoned = clean._replace(k=k.masked_fill(hidden, torch.nan), v=v.masked_fill(hidden, torch.nan))
    assert describe(q, k, v, mask, *spec.options) == spec
    return SmallCall(clean, poisoned, spec, draw(spec.batch, spec.heads, queries, spec.value_dim))


def _mask(spec: AttentionSpec, device: torch.device) -> Tensor | None:
    """`(3, h|1, i|1, j)`: one batch entry with full tiles, one with holes everywhere, one that sees nothing."""
    if spec.mask == MaskKind.NONE:
        return None
    heads, rows = spec.heads if spec.mask_per_head else 1, spec.queries if spec.mask == MaskKind.DENSE else 1
    entry = torch.arange(3, device=device).view(3, 1, 1, 1)
    head, row, key = (torch.arange(n, device=device) for n in (heads, rows, spec.keys))
    place = key + 5 * row[:, None] + 3 * head[:, None, None]  # (h|1, i|1, j)
    whole = (head == 0)[:, None, None] | (place % 64 > 2)
    visible = ((entry == 0) & whole) | ((entry == 1) & (place % 7 > 2))
    dead = (row < 3)[:, None] if rows > 1 else False
    return visible & (key < spec.keys - HIDDEN) & ~torch.as_tensor(dead, device=device)


def _truth(call: SmallCall) -> Answer:
    q, k, v, mask, seed = call.operands
    spec = replace(call.spec, dtype=torch.float64, precision="ieee")
    operands = Operands(q.double(), k.double(), v.double(), mask, seed)
    out, lse = attention_reference(operands, spec, return_lse=True)
    assert lse is not None
    return Answer(out, lse, *attention_reference_gradients(call.grad_out.double(), None, operands, spec))


def _budget(call: SmallCall, truth: Answer) -> Budget:
    (q, k, v, mask, seed), spec = call.operands, call.spec
    in_tf32 = spec.precision == "tf32"
    with TF32Products() if in_tf32 else nullcontext():  # cuBLAS may take small ones as they are
        return Budget(
            truth,
            q,
            k,
            v,
            mask=mask,
            causal=spec.causal,
            scale=spec.scale,
            dropout_p=spec.dropout_p,
            keep=None if seed is None else keep_mask(seed, spec, 0, spec.queries),
            grad_out=call.grad_out,
            product_eps=TF32_EPS if in_tf32 else 0.0,
        )


def _answer(variant: Variant, call: SmallCall, tiles: Any) -> Answer:
    """What the variant computes, on operands with NaN."""
    backend = BACKENDS[variant.backend]
    out, lse, schedule = backend.forward(call.poisoned, call.spec, tiles)
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if any(variant.needed):
        saved = call.poisoned, out, lse, schedule, call.spec, tiles
        gradients = backend.backward(call.grad_out, None, *saved, variant.needed)
    return Answer(out, lse, *gradients)
