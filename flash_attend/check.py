"""Before a variant first serves by default on a part, it computes one small call there, and is held to the einsum path
in float64 by the error budget.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from flash_attend.backends import BACKENDS, BackwardName
from flash_attend.evidence import Finding, Store, tuned_tiles
from flash_attend.small_call import SmallCall, budget_of, small_call, spec_of, truth_of
from flash_attend.spec import AttentionSpec
from flash_attend.target import DeviceTarget
from flash_attend.testing.oracle import Answer
from flash_attend.tracing import allow_forward_mode, constant_when_compiled
from flash_attend.variant import ALL, NONE, Kind, Variant

__all__ = ["PRODUCTS", "answer", "check", "checked", "servable"]

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
    if _capturing(device):
        raise RuntimeError(f"a CUDA graph is being captured, and {variant} was not checked here: call it once before")
    with _one_at_a_time:
        return store.finding(variant) or check(variant, device)


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
            with allow_forward_mode(False):  # it is on in all threads
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
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)), _waiting_allowed():
        return _compare(variant, device)  # which has read its results when it returns


@contextmanager
def _waiting_allowed() -> Iterator[None]:
    """Within this context the host may wait for the device: a mode of the whole process says whether it may."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _compare(variant: Variant, device: torch.device) -> tuple[Finding, bool]:
    spec = spec_of(variant)
    tiles = _tiles_of(variant, spec, device)
    call = small_call(variant, getattr(tiles, "crossed_block", (64, 64)), device)
    with torch.no_grad():
        truth = truth_of(call)
    budget = budget_of(call, truth)
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
    target = DeviceTarget.of_any_length(device)
    backend = BACKENDS[variant.backend]
    tiles = backend.tangent_tiles if variant.tangents else backend.tiles
    return tiles(spec, target, cast(BackwardName, variant.backward))


def _answer(variant: Variant, call: SmallCall, tiles: Any) -> Answer:
    """What the variant computes, on operands with NaN."""
    backend = BACKENDS[variant.backend]
    pushed: tuple[Tensor | None, ...] = (None, None)
    if variant.tangents:
        out, lse, *pushed, kept = backend.tangents(call.poisoned, call.poisoned_tangents, call.spec, tiles)
    else:
        out, lse, kept = backend.forward(call.poisoned, call.spec, tiles)
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if any(variant.needed):
        saved = call.poisoned, out, lse, kept, call.spec, tiles
        gradients = backend.backward(call.grad_out, None, *saved, variant.needed)
    return replace(Answer(out, lse, *gradients), out_tangent=pushed[0], lse_tangent=pushed[1])


# ---------------------------------------------------------------------------------------------------------------------
# For `python -m flash_attend check`
# ---------------------------------------------------------------------------------------------------------------------

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
PRODUCTS = (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "tf32x3"), ("float64", "ieee"))
MASKS = (("none", False), ("key", False), ("key", True), ("dense", False))
# Of causal calls without a mask: what models have.
SCORES = ("left", "softcap", "left+softcap", "alibi", "left+sinks", "bias-1hij-{dtype}")


def answer(request: list) -> list:
    """`check`, anew, as a process of its own is asked for it: by a device's name and a variant's fields."""
    device, fields = request
    return list(check(Variant.read(fields), torch.device(device), anew=True))


def servable(target: DeviceTarget) -> list[Variant]:
    """The variants that need a check on a part, at head dimensions that are common."""
    found = []
    flags = product(PRODUCTS, HEAD_DIMS, MASKS, (False, True), (False, True), (False, True))
    for products, dim, (mask, per_head), causal, dropout, grouped in flags:
        kind = Kind(*products, dim, dim, mask, causal, dropout, one_query=False)
        for backend in BACKENDS.values():
            backwards = [backend.usual_backward, *["fused"] * (backend.refuse_fused is not None)]
            tiles = partial(tuned_tiles, backend.name, kind, target)
            of_call = kind, per_head, grouped, False, ALL
            variants = [Variant(backend.name, way, *of_call, tiles(way)) for way in backwards]
            found += [one for one in variants if backend.proof != "none" and not _refused(one, target)]
    found += [
        one
        for products, dim, changes in product(PRODUCTS, HEAD_DIMS, SCORES)
        for one in _of_changes(
            Kind(*products, dim, dim, "none", True, False, scores=changes.format(dtype=products[0])), target
        )
    ]
    found += [
        one
        for products, dim, causal, dropout in product(PRODUCTS, HEAD_DIMS, (False, True), (False, True))
        for one in _of_changes(Kind(*products, dim, dim, "none", causal, dropout, sequences=True), target)
    ]
    found += [
        one
        for products, dim, mask, causal in product(PRODUCTS, HEAD_DIMS, ("none", "key"), (False, True))
        for one in _with_tangents(Kind(*products, dim, dim, mask, causal, False), target)
    ]
    return sorted(found, key=lambda one: (one.backend, one.backward, PRODUCTS.index(one.kind[:2])))


def _of_changes(kind: Kind, target: DeviceTarget) -> list[Variant]:
    """The variants of a kind whose scores are changed, or whose sequences are packed, on a part."""
    others = "bias" in kind.scores, "sinks" in kind.scores
    needed = (*ALL, *others) if any(others) else ALL
    found = []
    for backend in BACKENDS.values():
        for way in (backend.usual_backward, *["fused"] * (backend.refuse_fused is not None)):
            variant = Variant(backend.name, way, kind, False, False, False, needed)
            found += [variant] if backend.proof != "none" and not _refused(variant, target) else []
    return found


def _with_tangents(kind: Kind, target: DeviceTarget) -> list[Variant]:
    """The variants of a kind of which tangents of q, k and v are taken, on a part."""
    found = []
    for backend in BACKENDS.values():
        variant = Variant(backend.name, backend.usual_backward, kind, False, False, False, NONE, tangents=ALL)
        if backend.proof != "none" and not _refused(variant, target) and not backend.tangents_by:
            found.append(variant)
    return found


def _refused(variant: Variant, target: DeviceTarget) -> str:
    backend, spec = BACKENDS[variant.backend], spec_of(variant)
    refused = backend.refuse(spec, target)
    fused = backend.refuse_fused if variant.backward == "fused" else None
    if variant.tangents:
        refused = refused or backend.refuse_tangents(spec, target)
    return refused or (fused(spec, target) if fused else "")
