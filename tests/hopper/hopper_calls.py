"""What the tests of all kernels for Hopper share: their calls, a part that emulates them, and mistakes to be found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import log
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from flash_attend.backends import BackwardName
from flash_attend.checks import normalise_inputs
from flash_attend.kernels import launch as launching
from flash_attend.kernels.configs import Tiles, select_hopper_tiles
from flash_attend.kernels.hopper.backward import attention_backward
from flash_attend.kernels.hopper.forward import attention_forward
from flash_attend.kernels.launch import Launch, Prepared
from flash_attend.kernels.schedule import build_schedule
from flash_attend.kernels.statistics import Kept
from flash_attend.operands import Operands
from flash_attend.spec import AttentionSpec
from flash_attend.target import DeviceTarget
from flash_attend.testing import calls
from flash_attend.testing.calls import Call, bits_equal
from flash_attend.testing.oracle import Answer
from gluon_emulator import EmulationError, Mistake, emulate
from plain_schedule import block_states, lines_of

__all__ = [
    "H100",
    "RING_MISTAKES",
    "assert_found",
    "early",
    "not_waiting_for_copies",
    "on_h100",
    "poisoned",
    "run_backward",
    "run_forward",
    "same_bits",
    "skipping",
    "tiles_of",
    "without",
]

# With few multiprocessors a persistent program has several tiles.
H100 = DeviceTarget("cuda", "NVIDIA H100", (9, 0), shared_memory=232448, multiprocessors=3, triton="3.7.1")


def poisoned(call: Call) -> Call:
    """The same call with NaN and infinity wherever they must not matter: in hidden keys and in dead rows."""
    batch, _, queries, _ = call.q.shape
    keys = call.k.shape[-2]
    shown = torch.ones(batch, 1, 1, keys, dtype=torch.bool) if call.mask is None else call.mask.view(batch, 1, 1, keys)
    pairs = shown.expand(-1, -1, queries, -1)
    if call.causal:
        pairs = pairs & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    dead = ~pairs.any(3)
    hidden = ~shown.view(batch, 1, keys, 1)
    return call.with_(
        q=call.q.masked_fill(dead.unsqueeze(3), torch.nan),
        k=call.k.masked_fill(hidden, torch.nan),
        v=call.v.masked_fill(hidden, torch.inf),
        grad_out=call.grad_out.masked_fill(dead.unsqueeze(3), torch.nan),
        grad_lse=call.grad_lse.masked_fill(dead, torch.nan),
    )


# ---------------------------------------------------------------------------------------------------------------------
# A part that emulates
# ---------------------------------------------------------------------------------------------------------------------


def on_h100(part: DeviceTarget = H100):
    """Within this context every tensor is on that part, as far as the package asks."""
    return mock.patch.object(DeviceTarget, "of", staticmethod(lambda device: part))


@contextmanager
def emulated(part: DeviceTarget = H100, **options) -> Iterator[None]:
    """Within this context kernels in Gluon run in the emulator, on CPU tensors; what others do, is worked out here."""

    def run(prepared: Prepared, tensors: tuple[Tensor | None, ...], device: int) -> None:
        name = prepared.kernel.__name__
        if name in STAND_INS:
            STAND_INS[name](prepared, *tensors)
        else:
            for argument, tensor in zip(prepared.kernel.arg_names, tensors, strict=False):
                if argument in OUTPUTS:
                    tensor.fill_(torch.nan)
            emulate(Launch(prepared, tensors), **options)

    with on_h100(part), mock.patch.object(launching, "_run", run):
        yield


OUTPUTS = ("out_descriptor", "LSE", "grad_q_descriptor", "grad_k_descriptor", "grad_v_descriptor")


def _schedule(prepared: Prepared, mask: Tensor, visible: Tensor, lists: Tensor) -> None:
    shown = mask.bool().reshape(len(visible), -1)
    visible.zero_()[:, : shown.shape[1]] = shown
    lists.copy_(lines_of(block_states(shown[:, None], 1, prepared.choices["BLOCK"])[:, 0]))


def _delta(
    prepared: Prepared,
    out: Tensor,
    grad_out: Tensor,
    statistics: Tensor,
    grad_lse: Tensor | None,
    delta: Tensor,
    log2: Tensor,
    maximum: None,
) -> None:
    statistics = statistics.squeeze(3)
    queries, dead = statistics.shape[2], statistics == torch.inf
    sums = (out.float() * grad_out.float()).sum(3) - (0 if grad_lse is None else grad_lse)
    delta.zero_()[..., :queries] = sums.masked_fill(dead, 0)
    log2.fill_(torch.inf)[..., :queries] = statistics


STAND_INS = dict(key_schedule_kernel=_schedule, delta_kernel=_delta)
truth_of = lru_cache(maxsize=4)(calls.truth_of)


def tiles_of(
    call: Call, backward: BackwardName = "separate", part: DeviceTarget = H100
) -> tuple[Operands, AttentionSpec, Tiles]:
    """A call as the kernels take it."""
    (*tensors, _), spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    return Operands(*tensors, seed=None), spec, select_hopper_tiles(spec, part, backward)


def run_forward(call: Call, **options) -> Answer:
    """Out and lse of a call; `options` are those of `emulated`."""
    with emulated(**options):
        out, lse, _ = attention_forward(*tiles_of(call))
    return Answer(out, lse, None, None, None)


def run_backward(call: Call, backward: BackwardName = "fused", needed: str = "qkv", **options) -> Answer:
    """The needed gradients of a call; out and lse are the oracle's."""
    truth = truth_of(call)
    operands, spec, tiles = tiles_of(call, backward)
    log2 = (truth.lse / log(2)).masked_fill(truth.lse == -torch.inf, torch.inf).float().unsqueeze(3)
    with emulated(**options):
        dq, dk, dv = attention_backward(
            call.grad_out, call.grad_lse, operands, truth.out.to(spec.dtype), truth.lse.float(),
            Kept(log2, *build_schedule(operands.mask, spec, tiles)), spec, tiles, [name in needed for name in "qkv"],
        )  # fmt: skip
    like_inputs = (grad if grad is None else grad.view(x.shape) for grad, x in ((dk, call.k), (dv, call.v)))
    return Answer(None, None, dq, *like_inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------
# Each takes the place of a method or a function. The kernel must give something else then, or fail, under every
# schedule. A ring is named by the field of `Shared` that holds it, a partition by its function.


def same_bits(a: Answer, b: Answer) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("out", "lse", "dq", "dk", "dv")]
    return all(x is y is None or bits_equal(x, y) for x, y in pairs)


def assert_found(mistake: Mistake, run: Callable[..., Answer]) -> None:
    """Fails unless the mistake changes what a run gives, or is an error, under every schedule that is tried."""
    right = run()
    for seed in range(3):
        try:
            wrong = run(seed=seed, mistake=mistake)
        except EmulationError:
            continue
        assert not same_bits(wrong, right), f"not found with seed {seed}"


def without(*names: str) -> Mistake:
    """These functions, or methods, do nothing."""
    return {name: lambda right: lambda *arguments: None for name in names}


def _in(partition: str | None) -> bool:
    return partition in (None, threading.current_thread().name)


def skipping(method: str, ring: str | None = None, partition: str | None = None) -> Mistake:
    """A method of slots does nothing: those of any ring in any partition, or of these."""

    def instead(right: Callable) -> Callable:
        return lambda slot: None if ring in (None, slot.ring.name) and _in(partition) else right(slot)

    return {f"Slot.{method}": instead}


def early(ring: str, where: str, partition: str | None = None) -> Mistake:
    """A slot is given back where its reader next calls `where`, though it is not through with it."""
    taken = threading.local()

    def take(right: Callable) -> Callable:
        def at(self, step):
            slot = right(self, step)
            if self.name == ring and _in(partition):
                taken.slot = slot
            return slot

        return at

    def give_back(right: Callable) -> Callable:
        def instead(*arguments, **named):
            slot, taken.slot = getattr(taken, "slot", None), None
            if slot is not None:
                slot.right_release()
            return right(*arguments, **named)

        return instead

    return {"Ring.at": take, where: give_back, **skipping("release", ring, partition)}


def not_waiting_for_copies(partition: str) -> Mistake:
    """A partition goes on before what it copied, or added, to global memory is there."""
    return {
        "tma": lambda tma: SimpleNamespace(store_wait=lambda left: None if _in(partition) else tma.store_wait(left)),
    }


RING_MISTAKES: dict[str, Mistake] = {
    "a slot is filled before it is empty": skipping("await_empty"),
    "a copy brings more bytes than expected": {
        "Slot.expect": lambda right: lambda slot, nbytes: right(slot, nbytes // 2),
    },
    "the wrong phase is awaited": {
        "Slot.await_full": lambda right: lambda slot: right(type(slot)(slot.ring, slot.index, slot.turn + 1)),
    },
    "a slot is released before it is read": {
        "Slot.await_full": lambda right: lambda slot: (right(slot), slot.right_release()),
        **skipping("release"),
    },
    "no slot is released": skipping("release"),
    "a slot is released twice": {"Slot.release": lambda right: lambda slot: (right(slot), right(slot))},
    "stores are not fenced": without("fence_async_shared"),
}
