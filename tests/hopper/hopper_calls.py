"""What the tests of all kernels for Hopper share: their calls, a part to launch for, and mistakes to be found."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_attend.kernels.configs import Tiles
from flash_attend.kernels.hopper.ring import SLOTS
from flash_attend.kernels.hopper.versions import load_tile
from flash_attend.kernels.schedule import Schedule
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.testing.calls import Call, Case
from flash_attend.testing.oracle import Answer
from plain_schedule import block_states, lines_of

__all__ = [
    "CASES",
    "H100",
    "RING_MISTAKES",
    "await_all_but",
    "clear_nothing",
    "fill_schedule",
    "on",
    "prepared_rows",
]

# With few multiprocessors a persistent program has several tiles.
H100 = DeviceTarget("cuda", "NVIDIA H100", (9, 0), shared_memory=232448, multiprocessors=3, triton="3.7.1")

CASES = (
    Case("plain", 1, 2, queries=256, keys=384, d=128),
    Case("ragged", 2, 2, queries=130, keys=200, d=128),
    Case("one_block", 1, 2, queries=5, keys=7, d=64),
    Case("one_query", 1, 2, queries=1, keys=300, d=128, causal=True),
    Case("causal", 2, 2, queries=300, keys=300, d=64, causal=True),
    Case("causal_more_keys", 1, 3, queries=200, keys=450, d=128, causal=True),
    Case("causal_dead_rows", 1, 2, queries=450, keys=200, d=64, causal=True),
    Case("grouped", 2, 6, 2, queries=140, keys=260, d=64),
    Case("one_kv_head", 2, 3, 0, queries=140, keys=260, d=128, causal=True),
    Case("pad_right", 3, 2, queries=200, keys=700, d=64, mask="pad_right"),
    Case("pad_left", 3, 2, 1, queries=300, keys=500, d=128, mask="pad_left", causal=True),
    Case("pad_right_causal", 2, 2, queries=420, keys=420, d=64, mask="pad_right", causal=True),
    Case("holes", 2, 2, queries=140, keys=500, d=128, mask="holes"),
    Case("holes_causal", 2, 2, queries=300, keys=200, d=64, mask="holes", causal=True),
    Case("dead_batch", 2, 2, queries=140, keys=300, d=64, mask="dead_batch"),
    Case("all_hidden", 1, 2, queries=40, keys=300, d=64, mask="all_hidden", causal=True),
    Case("all_visible", 1, 2, queries=140, keys=300, d=64, mask="all_visible"),
    Case("mask_per_head", 2, 2, queries=140, keys=300, d=64, mask="bh1j"),
    Case("mask_of_heads", 2, 2, queries=140, keys=300, d=64, mask="1h1j", causal=True),
    Case("wide", 1, 2, queries=200, keys=200, d=256),
    Case("wide_causal_holes", 2, 2, queries=200, keys=300, d=256, mask="holes", causal=True),
    Case("negative_scale", 1, 2, queries=140, keys=300, d=64, scale=-0.2, causal=True),
    Case("scale_0", 1, 2, queries=140, keys=300, d=64, scale=0.0, causal=True),
    Case("heads_inside", 2, 2, queries=140, keys=300, d=64, layout="heads_inside"),
    Case("odd_strides", 2, 2, queries=140, keys=300, d=64, layout="sliced"),
    Case("broadcast_heads", 2, 2, queries=140, keys=300, d=64, layout="broadcast_heads"),
    Case("strided_last_dimension", 1, 2, queries=140, keys=300, d=64, layout="interleaved"),
)


def on(part: DeviceTarget):
    """Within this context every tensor is on that part, as far as the package asks."""
    return mock.patch.object(DeviceTarget, "of", staticmethod(lambda device: part))


def fill_schedule(schedule: Schedule, mask: Tensor | None, spec: AttentionSpec, tiles: Tiles) -> None:
    """Writes into a schedule what a kernel would have."""
    if spec.mask == MaskKind.KEY:
        rows = mask.reshape(-1, spec.keys)
        schedule.visible.zero_()[:, : spec.keys] = rows
        schedule.lists.copy_(lines_of(block_states(rows[:, None], 1, tiles.schedule_block[1])[:, 0]))


def prepared_rows(call: Call, truth: Answer) -> tuple[Tensor, Tensor]:
    """The LSE to the base 2 and the deltas as `prepare_statistics` gives them: of whole tiles of 128 queries."""
    delta = (truth.out.to(call.q.dtype).float() * call.grad_out.float()).sum(dim=3)
    if call.grad_lse is not None:
        delta -= call.grad_lse
    dead = truth.lse == -torch.inf
    missing = 0, -dead.shape[2] % 128
    lse_log2 = (truth.lse.float() / log(2)).masked_fill(dead, torch.inf)
    return pad(lse_log2, missing, value=torch.inf), pad(delta.masked_fill(dead, 0), missing)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------
# Functions to take the place of a kernel's. A kernel must give something else then, or fail, under every schedule.


def _await_nothing(barriers, ring, slot, turn):
    pass


def _fill_expecting_too_little(descriptor, coordinates, buffer, barriers, ring, slot, turn):
    full = barriers.index(ring + slot)
    mbarrier.wait(barriers.index(ring + SLOTS + slot), (turn & 1) ^ 1)
    mbarrier.expect(full, descriptor.block_type.nbytes // 2)
    load_tile(descriptor, coordinates, full, buffer.reshape(descriptor.block_type.shape))


def _await_with_the_wrong_phase(barriers, ring, slot, turn):
    mbarrier.wait(barriers.index(ring + slot), (turn & 1) ^ 1)


def _await_and_release(barriers, ring, slot, turn):
    mbarrier.wait(barriers.index(ring + slot), turn & 1)
    mbarrier.arrive(barriers.index(ring + SLOTS + slot), count=1)


def _release_nothing(barriers, ring, slot):
    pass


def _release_twice(barriers, ring, slot):
    mbarrier.arrive(barriers.index(ring + SLOTS + slot), count=2)


def await_all_but(left_out: int) -> Callable[..., None]:
    """An `await_full` that does not wait for one of the rings."""

    def await_full(barriers, ring, slot, turn):
        if ring != left_out:
            mbarrier.wait(barriers.index(ring + slot), turn & 1)

    return await_full


def clear_nothing(buffer, visible, first_key, barriers, CLEARED, cleared, CONSUMER):
    pass


def fence_nothing():
    pass


RING_MISTAKES = {
    "a slot is filled before it is empty": dict(await_empty=_await_nothing),
    "a copy brings more bytes than expected": dict(fill=_fill_expecting_too_little),
    "the wrong phase is awaited": dict(await_full=_await_with_the_wrong_phase),
    "a slot is released before it is read": dict(await_full=_await_and_release, release=_release_nothing),
    "no slot is released": dict(release=_release_nothing),
    "a slot is released twice": dict(release=_release_twice),
    "stores are not fenced": dict(fence_async_shared=fence_nothing),
}
