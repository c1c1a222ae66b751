"""Few queries against many keys: the heads of a group share a tile, the keys are split over programs, and nobody can
tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from flash_attend import ops
from flash_attend.backends import BACKENDS
from flash_attend.checks import normalise_inputs
from flash_attend.dispatch import Plan
from flash_attend.evidence import Finding
from flash_attend.kernels.aot import KINDS, PARTS, record_call
from flash_attend.kernels.configs import (
    Tile,
    Tiles,
    as_text,
    candidate_tiles,
    key_splits,
    override,
    select_tiles,
    tiles_of,
)
from flash_attend.kernels.launch import Launch, recorded_launches
from flash_attend.operands import Operands
from flash_attend.ops import options_of
from flash_attend.small_call import small_call
from flash_attend.spec import PACKED_ROWS, AttentionSpec, BiasKind, MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.testing.calls import Call, Case, assert_same_bits, check, make_call, run
from flash_attend.variant import ALL, Variant, variant_of

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
SPEC = AttentionSpec(
    batch=2, heads=8, kv_heads=2, queries=1, keys=4096, head_dim=64, value_dim=64, dtype=torch.float16, scale=0.125
)
H100 = PARTS["sm_90"]


def tiles(programs: int) -> Tiles:
    """Small ones, of which two cross the queries of four heads; the schedule's blocks hold two blocks of keys."""
    return Tiles(Tile(16, 16, 4, 2, programs=programs), Tile(16, 32, 4, 2), Tile(16, 16, 4, 2))


@contextmanager
def split(call: Call, splits: int) -> Iterator[None]:
    """Within this context the keys of a call are split over so many programs, as far as they go."""
    _, spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    of_call = next(n for n in range(1, 1000) if key_splits(spec, tiles(n).forward) > 1) // 2 if splits > 1 else 1
    assert key_splits(spec, tiles(splits * of_call).forward) == splits
    with override(tiles(splits * of_call)):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# What comes of it
# ---------------------------------------------------------------------------------------------------------------------

ONE = Case("one query", batch=1, heads=4, kv_heads=2, queries=1, keys=300, dv=24)
FEW = replace(ONE, queries=3, keys=150)
CASES = (
    (ONE, 7),
    (replace(ONE, name="lengths, sinks", batch=3, kv_heads=1, keys=90, mask="dead_batch", sinks=True), 2),
    (replace(ONE, name="window beyond the mask", keys=220, mask="pad_right", batch=2, causal=True, window=(60, 0)), 1),
    (replace(FEW, name="causal", causal=True, layout="heads_inside", softcap=2.0), 4),
    (replace(FEW, name="holes", mask="holes", causal=True, window=(70, None), alibi="bh", sinks=True, softcap=3.0), 2),
    (replace(FEW, name="dead rows", queries=9, keys=70, mask="pad_left", causal=True, bias="b1ij"), 2),
    (replace(FEW, name="heads apart", kv_heads=4, heads=4, bias="1hij", alibi="h", dropout_p=0.2), 3),
    (replace(FEW, name="dense", queries=4, keys=100, mask="bhij", causal=True), 3),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "splits"), CASES, ids=[str(case) for case, _ in CASES])
def test_right(device: str, case: Case, splits: int) -> None:
    call = make_call(case, torch.float32, device)
    with split(call, splits):
        check(run(call, "triton", needs=()), call)


@pytest.mark.parametrize("device", DEVICES)
def test_every_length_and_the_same_bits_again(device: str) -> None:
    """With key padding, which cuts every part somewhere; one query of a cache with nothing in it too."""
    for keys in (0, 1, 31, 32, 33, 64, 97, 131):
        call = make_call(Case("x", 1, 4, 1, 1, keys, mask="pad_left", sinks=True), torch.float16, device)
        with override(tiles(3)):
            answer = run(call, "triton", needs=())
            check(answer, call)
    with override(tiles(3)):
        assert_same_bits(run(call, "triton", needs=()), answer)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_come_from_the_ordinary_kernels(device: str) -> None:
    """A call of which the forward was split leaves them what they read of each query."""
    call = make_call(replace(FEW, keys=70, causal=True, mask="pad_left", sinks=True), torch.float32, device)
    with split(call, 2):
        check(run(call, "triton"), call)


@pytest.mark.parametrize("device", DEVICES)
def test_a_query_whose_bias_hides_all_is_dead_and_one_of_minus_infinity_is_not(device: str) -> None:
    call = make_call(Case("x", 1, 2, 1, 3, 70, bias="11ij", mask="pad_left"), torch.float32, device)
    call.bias[..., 1, :] = -torch.inf
    call.q[:, :, 2] = -torch.inf
    with split(call.with_(k=call.k.abs()), 2):
        answer = run(call.with_(k=call.k.abs()), "triton", needs=())
    assert answer.out[:, :, 0].isfinite().all()
    assert not answer.out[:, :, 1].any()
    assert answer.out[:, :, 2].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_visible_and_not_finite_shows(device: str) -> None:
    call = make_call(Case("x", 1, 2, 1, 2, 70, causal=True), torch.float32, device)
    call.v[:, :, -1, 3] = torch.nan  # which the last query alone sees
    call.k[:, :, 5, 0] = torch.nan
    with split(call, 2):
        answer = run(call, "triton", needs=())
    assert answer.out.isnan().all()
    call.k[:, :, 5, 0] = 0.0
    with split(call, 2):
        answer = run(call, "triton", needs=())
    assert answer.out[:, :, 1, 3].isnan().all()
    assert answer.out[..., 4:].isfinite().all()
    assert answer.lse.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# What is packed, and what is split
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "packs"),
    (
        (dict(), True),
        (dict(causal=True, window=(5, None), softcap=3.0, alibi=True, sinks=True), True),
        (dict(mask=MaskKind.KEY), True),
        (dict(bias=BiasKind(True, False, True, True, torch.float16)), True),
        (dict(queries=PACKED_ROWS // 4), True),
        (dict(heads=400), True),
        (dict(queries=PACKED_ROWS // 4 + 1), False),
        (dict(bias=BiasKind(False, True, False, True, torch.float16)), False),
        (dict(mask=MaskKind.KEY, mask_per_head=True), False),
        (dict(mask=MaskKind.DENSE, queries=2), False),
        (dict(dropout_p=0.1), False),
        (dict(kv_heads=8), False),
    ),
)
def test_what_is_packed(change: dict, packs: bool) -> None:
    assert replace(SPEC, **change).packed == packs


def launches_of(spec: AttentionSpec) -> list[Launch]:
    found = record_call(spec, select_tiles(spec, H100))
    return [launch for launch in found if launch.prepared.kernel.__name__ in ("forward_kernel", "merge_kernel")]


def test_a_program_for_each_key_value_head_and_part() -> None:
    for queries, causal in ((1, False), (1, True), (3, True)):
        forward, merge = launches_of(replace(SPEC, queries=queries, causal=causal))
        assert forward.prepared.programs == 2 * 2 * 32
        assert merge.prepared.programs == 2 * 8 * queries
        assert forward.prepared.choices["CAUSAL"] == (queries > 1), "a single query sees all"
    assert launches_of(replace(SPEC, causal=True))[0].prepared.choices == launches_of(SPEC)[0].prepared.choices
    (whole,) = launches_of(replace(SPEC, batch=256))
    assert whole.prepared.programs == 256 * 2


def test_no_length_is_compiled_anew() -> None:
    choices = [[launch.prepared.choices for launch in launches_of(replace(SPEC, keys=keys))] for keys in (999, 50000)]
    assert choices[0] == choices[1]


@pytest.mark.parametrize(
    ("change", "splits"),
    (
        (dict(), 32),  # of two blocks of 64 keys
        (dict(keys=255), 1),
        (dict(keys=256), 2),
        (dict(keys=2**20), 66),
        (dict(batch=50, keys=2**20), 2),
        (dict(batch=1000), 1),
        (dict(keys=2**20, causal=True, window=(1023, None)), 8),  # a window has no more
        (dict(queries=16), 32),
        (dict(queries=17), 16),  # of each head's own
        (dict(queries=65), 1),
        (dict(dtype=torch.float32, precision="tf32"), 64),
    ),
)
def test_how_many_parts(change: dict, splits: int) -> None:
    """By the multiprocessors and the length, and one where that many programs are there anyway."""
    spec = replace(SPEC, **change)
    forward = select_tiles(spec, H100).forward
    assert key_splits(spec, forward) == splits
    assert (forward.programs > 0) == (splits > 1)
    assert select_tiles(spec, replace(H100, multiprocessors=0)).forward.programs == 0
    if splits > 1:
        rows = spec.queries * (spec.group if spec.packed else 1)
        assert rows <= forward.block_m < max(2 * rows, 17)


@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_checked_is_split(arch: str, kind: str) -> None:
    """By each tile that tuning may find fastest, of one query and of few, in a window too."""
    dtype, part = KINDS[kind][0], PARTS[arch]
    spec = replace(SPEC, **{"precision": "ieee"} | dtype)
    for change in (dict(), dict(queries=3, causal=True), dict(causal=True, window=(999, None), mask=MaskKind.KEY)):
        asked = replace(spec, **change)
        for candidate in candidate_tiles(asked, part):
            tiles = tiles_of(as_text(candidate), asked, part, "separate")
            variant = Variant.read(variant_of(asked, "triton", "separate", ALL, as_text(tiles)))
            call = small_call(variant, tiles.crossed_block, torch.device("cpu"))
            assert key_splits(asked, tiles.forward) > 1, str(variant)
            assert key_splits(call.spec, tiles.forward) > 1, str(variant)
            assert call.spec.packed


def test_a_compiled_program_splits_keys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator, which knows lengths when it runs, once the variant was found right: with the schedule that the
    compiler was told."""
    q, k = torch.empty(2, 8, 1, 64, dtype=torch.float16), torch.empty(2, 2, 4096, 64, dtype=torch.float16)
    operands = Operands(q, k, k, torch.ones(2, 1, 1, 4096, dtype=torch.bool))
    _, spec = normalise_inputs(q, k, k, mask=operands.mask)
    monkeypatch.setattr(DeviceTarget, "of", lambda device: H100)
    plan = Plan(BACKENDS["triton"], "separate", "", "")
    numbers, options = options_of(operands, spec, plan, return_lse=True)
    tensors = [tensor for tensor in operands if tensor is not None]
    for verdict, programs in ((Finding(True, ""), 2 * 2 * 32), (Finding(False, ""), 2 * 2)):
        monkeypatch.setattr("flash_attend.dispatch.known", lambda variant, device, verdict=verdict: verdict)
        with recorded_launches() as launches:
            found = ops.forward(tensors, numbers, options)
        (forward,) = [one for one in launches if one.prepared.kernel.__name__ == "forward_kernel"]
        assert forward.prepared.programs == programs
        told = ops.like_forward(tensors, numbers, options)
        assert [x.shape for x in found] == [x.shape for x in told]
