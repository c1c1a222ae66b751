"""Decoding with grouped heads: the heads of a group are taken as the queries of one, and nobody can tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_attend.checks import normalise_inputs
from flash_attend.kernels.configs import Tile, Tiles
from flash_attend.kernels.forward import attention_forward
from flash_attend.kernels.launch import Launch, recorded_launches
from flash_attend.kernels.operands import packed_group, strides_as_queries
from flash_attend.operands import Operands
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.testing.calls import Case, check, make_call, run

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
SPEC = AttentionSpec(
    batch=2, heads=6, kv_heads=2, queries=1, keys=75, head_dim=16, value_dim=24, dtype=torch.float16, scale=0.25
)
TILE = Tile(32, 64, 4, 1)
ONE_QUERY = Case("decode", batch=2, heads=6, kv_heads=2, queries=1, keys=75, dv=24)
CASES = (
    ONE_QUERY,
    replace(ONE_QUERY, name="causal_padded", mask="pad_right", causal=True),
    replace(ONE_QUERY, name="one_kv_head", kv_heads=0, mask="dead_batch"),
    replace(ONE_QUERY, name="heads_inside", mask="holes", layout="heads_inside"),
    replace(ONE_QUERY, name="broadcast", layout="broadcast_heads"),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_query_and_grouped_heads(device: str, case: Case) -> None:
    call = make_call(case, torch.float32, device)
    check(run(call, "triton"), call)


@pytest.mark.parametrize(
    ("change", "packs"),
    (
        (dict(), True),
        (dict(causal=True), True),
        (dict(mask=MaskKind.KEY), True),
        (dict(mask=MaskKind.KEY, mask_per_head=True), False),
        (dict(dropout_p=0.1), False),
        (dict(queries=2), False),
        (dict(kv_heads=6), False),
    ),
)
def test_what_is_packed(change: dict, packs: bool) -> None:
    spec = replace(SPEC, **change)
    packed = packed_group(spec)
    assert (packed is not None) == packs
    if packed is not None:
        assert packed == replace(spec, heads=2, queries=3, causal=False)
        assert packed.group == 1


def test_strides_as_queries() -> None:
    inside = torch.randn(2, 1, 6, 16).transpose(1, 2)
    for x in (torch.randn(2, 6, 1, 16), inside, torch.randn(2, 1, 1, 16).expand(2, 6, 1, 16)):
        packed = x.as_strided((2, 2, 3, 16), strides_as_queries(x.stride(), 3))
        for head in range(6):
            assert torch.equal(packed[:, head // 3, head % 3], x[:, head, 0])


def launch_of(spec: AttentionSpec) -> Launch:
    q, k, v = (
        torch.empty(spec.batch, heads, length, dim, dtype=spec.dtype, device="meta")
        for heads, length, dim in (
            (spec.heads, spec.queries, spec.head_dim),
            (spec.kv_heads, spec.keys, spec.head_dim),
            (spec.kv_heads, spec.keys, spec.value_dim),
        )
    )
    (*inputs, _, _, _, _), spec = normalise_inputs(q, k, v, causal=spec.causal)
    with recorded_launches() as launches:
        attention_forward(Operands(*inputs), spec, Tiles(TILE, TILE, TILE))
    return launches[0]


@pytest.mark.parametrize("causal", (False, True))
def test_a_program_for_each_key_value_head(causal: bool) -> None:
    spec = replace(SPEC, causal=causal)
    packed = launch_of(spec)
    assert packed.prepared.programs == spec.batch * spec.kv_heads
    assert packed.prepared.choices == launch_of(SPEC).prepared.choices
    assert launch_of(replace(spec, queries=2)).prepared.programs == spec.batch * spec.heads
    assert launch_of(replace(spec, heads=2 * 33)).prepared.programs == spec.batch * spec.kv_heads * 2
