"""What a call is turned into: views of what came, and one frozen description."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from flash_attend.checks import normalise_inputs
from flash_attend.spec import AttentionSpec, MaskKind

B, H, QUERIES, KEYS, D, DV = 2, 4, 5, 7, 8, 6


def _normalise(kv_heads: int | None = H, dtype: torch.dtype = torch.float32, **options):
    middle = () if kv_heads is None else (kv_heads,)
    q, k, v = (
        torch.randn(B, H, QUERIES, D).to(dtype),
        torch.randn(B, *middle, KEYS, D).to(dtype),
        torch.randn(B, *middle, KEYS, DV).to(dtype),
    )
    return (q, k, v), normalise_inputs(q, k, v, **options)


def _bool(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.5


def test_the_description_of_a_plain_call() -> None:
    _, ((*_, mask, _), spec) = _normalise()
    assert mask is None
    assert spec == AttentionSpec(
        batch=B, heads=H, kv_heads=H, queries=QUERIES, keys=KEYS, head_dim=D, value_dim=DV, dtype=torch.float32,
        mask=MaskKind.NONE, mask_per_head=False, causal=False, scale=D**-0.5, dropout_p=0.0, deterministic=False,
        precision="tf32x3",
    )  # fmt: skip
    assert (spec.group, spec.offset) == (1, KEYS - QUERIES)


def test_tensors_come_back_as_views() -> None:
    came, ((*back, _, _), spec) = _normalise(kv_heads=None)
    assert [x.data_ptr() for x in back] == [x.data_ptr() for x in came]
    assert [tuple(x.shape) for x in back] == [(B, H, QUERIES, D), (B, 1, KEYS, D), (B, 1, KEYS, DV)]
    assert (spec.kv_heads, spec.group) == (1, H)


def test_strides_are_kept() -> None:
    q = torch.randn(B, QUERIES, H, D, 2)[..., 0].transpose(1, 2)
    k, v = torch.randn(B, 1, KEYS, D).expand(B, H, KEYS, D), torch.randn(B, H, DV, KEYS).mT
    back = normalise_inputs(q, k, v)[0][:3]
    assert [x.stride() for x in back] == [q.stride(), k.stride(), v.stride()]
    assert [x.data_ptr() for x in back] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]


# given, (kind, differs between heads, the shape and the strides it comes back with)
KEY, DENSE = MaskKind.KEY, MaskKind.DENSE
MASKS = {
    "(b, j)": (_bool(B, KEYS), KEY, False, (B, 1, 1, KEYS), (KEYS, None, None, 1)),
    "(b, 1, 1, j)": (_bool(B, 1, 1, KEYS), KEY, False, (B, 1, 1, KEYS), (KEYS, None, None, 1)),
    "(1, h, 1, j)": (_bool(1, H, 1, KEYS), KEY, True, (1, H, 1, KEYS), (None, KEYS, None, 1)),
    "(b, h, 1, j)": (_bool(B, H, 1, KEYS), KEY, True, (B, H, 1, KEYS), (H * KEYS, KEYS, None, 1)),
    "(1, 1, 1, j)": (_bool(1, 1, 1, KEYS), KEY, False, (1, 1, 1, KEYS), (None, None, None, 1)),
    "(1, 1, 1, 1)": (_bool(1, 1, 1, 1), KEY, False, (1, 1, 1, KEYS), (None, None, None, 0)),
    "(b, 1, 1, 1)": (_bool(B, 1, 1, 1), KEY, False, (B, 1, 1, KEYS), (1, None, None, 0)),
    "(1, 1, i, j)": (_bool(1, 1, QUERIES, KEYS), DENSE, False, (1, 1, QUERIES, KEYS), (None, None, KEYS, 1)),
    "(b, 1, i, j)": (_bool(B, 1, QUERIES, KEYS), DENSE, False, (B, 1, QUERIES, KEYS), (QUERIES * KEYS, None, KEYS, 1)),
    "(b, h, i, j)": (
        _bool(B, H, QUERIES, KEYS),
        DENSE,
        True,
        (B, H, QUERIES, KEYS),
        (H * QUERIES * KEYS, QUERIES * KEYS, KEYS, 1),
    ),
    "(b, h, i, 1)": (_bool(B, H, QUERIES, 1), DENSE, True, (B, H, QUERIES, KEYS), (H * QUERIES, QUERIES, 1, 0)),
    "(1, 1, i, 1)": (_bool(1, 1, QUERIES, 1), DENSE, False, (1, 1, QUERIES, KEYS), (None, None, 1, 0)),
    "(j, b).t()": (_bool(KEYS, B).t(), KEY, False, (B, 1, 1, KEYS), (1, None, None, B)),
    "expanded over h and i": (
        _bool(B, 1, 1, KEYS).expand(B, H, QUERIES, KEYS),
        KEY,
        False,
        (B, 1, 1, KEYS),
        (KEYS, None, None, 1),
    ),
    "expanded over b": (
        _bool(1, H, QUERIES, KEYS).expand(B, H, QUERIES, KEYS),
        DENSE,
        True,
        (1, H, QUERIES, KEYS),
        (None, QUERIES * KEYS, KEYS, 1),
    ),
    "expanded over h": (
        _bool(B, 1, QUERIES, KEYS).expand(B, H, QUERIES, KEYS),
        DENSE,
        False,
        (B, 1, QUERIES, KEYS),
        (QUERIES * KEYS, None, KEYS, 1),
    ),
    "expanded over i": (
        _bool(B, H, 1, KEYS).expand(B, H, QUERIES, KEYS),
        KEY,
        True,
        (B, H, 1, KEYS),
        (H * KEYS, KEYS, None, 1),
    ),
    "expanded over all": (
        _bool(1, 1, 1, 1).expand(B, H, QUERIES, KEYS),
        KEY,
        False,
        (1, 1, 1, KEYS),
        (None, None, None, 0),
    ),
    "transposed": (
        _bool(B, H, KEYS, QUERIES).mT,
        DENSE,
        True,
        (B, H, QUERIES, KEYS),
        (H * QUERIES * KEYS, QUERIES * KEYS, 1, QUERIES),
    ),
    "a slice": (
        _bool(B, H, QUERIES, 2 * KEYS)[..., ::2],
        DENSE,
        True,
        (B, H, QUERIES, KEYS),
        (2 * H * QUERIES * KEYS, 2 * QUERIES * KEYS, 2 * KEYS, 2),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_read_where_they_lie(name: str) -> None:
    given, kind, per_head, shape, strides = MASKS[name]
    _, ((*_, mask, _), spec) = _normalise(mask=given)
    assert (spec.mask, spec.mask_per_head) == (kind, per_head)
    assert mask.dtype == torch.bool
    assert tuple(mask.shape) == shape
    # Where a dimension has one element its stride says nothing.
    assert tuple(None if wanted is None else s for s, wanted in zip(mask.stride(), strides, strict=True)) == strides
    assert mask.data_ptr() == given.data_ptr()
    assert mask.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    full = (given[:, None, None, :] if given.ndim == 2 else given).expand(B, H, QUERIES, KEYS)
    assert torch.equal(mask.expand(B, H, QUERIES, KEYS), full)


def test_a_mask_of_one_head_and_one_query_is_no_key_mask_by_accident() -> None:
    """With a single query every mask is the same for all queries, which is the cheaper kind."""
    q, k, v = torch.randn(B, 1, 1, D), torch.randn(B, 1, KEYS, D), torch.randn(B, 1, KEYS, DV)
    (*_, mask, _), spec = normalise_inputs(q, k, v, mask=_bool(B, 1, 1, KEYS))
    assert (spec.mask, spec.mask_per_head, tuple(mask.shape)) == (MaskKind.KEY, False, (B, 1, 1, KEYS))


def test_deterministic_follows_torch_unless_said() -> None:
    assert not _normalise()[1][-1].deterministic
    assert _normalise(deterministic=True)[1][-1].deterministic
    torch.use_deterministic_algorithms(True)
    try:
        assert _normalise()[1][-1].deterministic
        assert not _normalise(deterministic=False)[1][-1].deterministic
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("given", "scale"), ((None, D**-0.5), (0, 0.0), (-2, -2.0), (1.5, 1.5)))
def test_scale(given: float | None, scale: float) -> None:
    found = _normalise(scale=given)[1][-1].scale
    assert found == scale
    assert isinstance(found, float)


def test_dropout_zero_as_an_int() -> None:
    assert _normalise(dropout_p=0)[1][-1].dropout_p == 0.0


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_accumulator(dtype: torch.dtype) -> None:
    spec = _normalise(dtype=dtype)[1][-1]
    assert spec.accumulator_dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("kv_heads", "group"), ((4, 1), (2, 2), (1, 4), (None, 4)))
def test_groups(kv_heads: int | None, group: int) -> None:
    assert _normalise(kv_heads=kv_heads)[1][-1].group == group


def test_no_heads() -> None:
    spec = normalise_inputs(torch.randn(B, 0, QUERIES, D), torch.randn(B, 0, KEYS, D), torch.randn(B, 0, KEYS, DV))[-1]
    assert (spec.heads, spec.kv_heads, spec.group) == (0, 0, 0)


def test_a_description_is_frozen_and_hashable() -> None:
    spec = _normalise()[1][-1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.batch = 3
    assert len({spec, dataclasses.replace(spec)}) == 1


# What is worked out for a call is looked up by its spec: specs that differ and hash alike would be compared each time.
CHANGES = (
    dict(batch=3),
    dict(keys=8),
    dict(dtype=torch.float64),
    dict(mask=MaskKind.KEY),
    dict(mask=MaskKind.KEY, mask_per_head=True),
    dict(causal=True),
    dict(scale=0.5),
    dict(dropout_p=0.1),
    dict(deterministic=True),
)


def test_specs_hash_as_they_compare() -> None:
    spec = AttentionSpec(2, 4, 4, 5, 7, 8, 8, torch.float32)
    assert hash(spec) == hash(dataclasses.replace(spec)) == hash(pickle.loads(pickle.dumps(spec)))
    assert len({hash(dataclasses.replace(spec, **change)) for change in ({}, *CHANGES)}) == 1 + len(CHANGES)
