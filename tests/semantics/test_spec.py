"""What a call is turned into: views of what came, and one frozen description."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch import Tensor

from flash_attend.checks import normalise_inputs
from flash_attend.operands import Operands
from flash_attend.spec import AttentionSpec, BiasKind, MaskKind, describe

B, H, QUERIES, KEYS, D, DV = 2, 4, 5, 7, 8, 6


def _normalise(
    kv_heads: int | None = H, dtype: torch.dtype = torch.float32, **options
) -> tuple[list[Tensor], Operands, AttentionSpec]:
    """What is given, and what comes of it."""
    middle = () if kv_heads is None else (kv_heads,)
    shapes = (B, H, QUERIES, D), (B, *middle, KEYS, D), (B, *middle, KEYS, DV)
    given = [torch.randn(shape).to(dtype) for shape in shapes]
    return given, *normalise_inputs(*given, **options)


def _bool(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.5


def test_the_description_of_a_plain_call() -> None:
    _, operands, spec = _normalise()
    assert (operands.mask, operands.seed) == (None, None)
    assert spec == AttentionSpec(
        batch=B, heads=H, kv_heads=H, queries=QUERIES, keys=KEYS, head_dim=D, value_dim=DV, dtype=torch.float32,
        mask=MaskKind.NONE, mask_per_head=False, causal=False, scale=D**-0.5, dropout_p=0.0, deterministic=False,
        precision="tf32x3",
    )  # fmt: skip
    assert spec.offset == KEYS - QUERIES


def test_tensors_come_back_as_views_with_their_strides() -> None:
    q = torch.randn(B, QUERIES, H, D, 2)[..., 0].transpose(1, 2)
    k, v = torch.randn(B, 1, KEYS, D).expand(B, H, KEYS, D), torch.randn(B, H, DV, KEYS).mT
    for given in ((q, k, v), (q, k[:, 0], v[:, 0])):
        back = normalise_inputs(*given)[0][:3]
        assert [x.data_ptr() for x in back] == [x.data_ptr() for x in given]
        assert [x[:, 0].stride() for x in back] == [x[:, 0].stride() for x in (q, k, v)]
        heads = 1 if given[1].ndim == 3 else H
        assert [tuple(x.shape) for x in back] == [(B, H, QUERIES, D), (B, heads, KEYS, D), (B, heads, KEYS, DV)]


# given, for b 2, h 4, i 5 and j 7: (kind, differs between heads, the shape and the strides it comes back with, where
# the stride of a dimension that has one element says nothing)
KEY, DENSE = MaskKind.KEY, MaskKind.DENSE
MASKS = {
    "(b, j)": (_bool(2, 7), KEY, False, (2, 1, 1, 7), (7, None, None, 1)),
    "(b, 1, 1, j)": (_bool(2, 1, 1, 7), KEY, False, (2, 1, 1, 7), (7, None, None, 1)),
    "(1, h, 1, j)": (_bool(1, 4, 1, 7), KEY, True, (1, 4, 1, 7), (None, 7, None, 1)),
    "(b, h, 1, j)": (_bool(2, 4, 1, 7), KEY, True, (2, 4, 1, 7), (28, 7, None, 1)),
    "(1, 1, 1, j)": (_bool(1, 1, 1, 7), KEY, False, (1, 1, 1, 7), (None, None, None, 1)),
    "(1, 1, 1, 1)": (_bool(1, 1, 1, 1), KEY, False, (1, 1, 1, 7), (None, None, None, 0)),
    "(b, 1, 1, 1)": (_bool(2, 1, 1, 1), KEY, False, (2, 1, 1, 7), (1, None, None, 0)),
    "(1, 1, i, j)": (_bool(1, 1, 5, 7), DENSE, False, (1, 1, 5, 7), (None, None, 7, 1)),
    "(b, 1, i, j)": (_bool(2, 1, 5, 7), DENSE, False, (2, 1, 5, 7), (35, None, 7, 1)),
    "(b, h, i, j)": (_bool(2, 4, 5, 7), DENSE, True, (2, 4, 5, 7), (140, 35, 7, 1)),
    "(b, h, i, 1)": (_bool(2, 4, 5, 1), DENSE, True, (2, 4, 5, 7), (20, 5, 1, 0)),
    "(1, 1, i, 1)": (_bool(1, 1, 5, 1), DENSE, False, (1, 1, 5, 7), (None, None, 1, 0)),
    "(j, b).t()": (_bool(7, 2).t(), KEY, False, (2, 1, 1, 7), (1, None, None, 2)),
    "expanded over h and i": (_bool(2, 1, 1, 7).expand(2, 4, 5, 7), KEY, False, (2, 1, 1, 7), (7, None, None, 1)),
    "expanded over b": (_bool(1, 4, 5, 7).expand(2, 4, 5, 7), DENSE, True, (1, 4, 5, 7), (None, 35, 7, 1)),
    "expanded over h": (_bool(2, 1, 5, 7).expand(2, 4, 5, 7), DENSE, False, (2, 1, 5, 7), (35, None, 7, 1)),
    "expanded over i": (_bool(2, 4, 1, 7).expand(2, 4, 5, 7), KEY, True, (2, 4, 1, 7), (28, 7, None, 1)),
    "expanded over all": (_bool(1, 1, 1, 1).expand(2, 4, 5, 7), KEY, False, (1, 1, 1, 7), (None, None, None, 0)),
    "transposed": (_bool(2, 4, 7, 5).mT, DENSE, True, (2, 4, 5, 7), (140, 35, 1, 5)),
    "a slice": (_bool(2, 4, 5, 14)[..., ::2], DENSE, True, (2, 4, 5, 7), (280, 70, 14, 2)),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_read_where_they_lie(name: str) -> None:
    given, kind, per_head, shape, strides = MASKS[name]
    _, (_, _, _, mask, *_), spec = _normalise(mask=given)
    assert (spec.mask, spec.mask_per_head, mask.dtype, tuple(mask.shape)) == (kind, per_head, torch.bool, shape)
    assert tuple(None if wanted is None else s for s, wanted in zip(mask.stride(), strides, strict=True)) == strides
    assert mask.data_ptr() == given.data_ptr()
    assert mask.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    full = (given[:, None, None, :] if given.ndim == 2 else given).expand(B, H, QUERIES, KEYS)
    assert torch.equal(mask.expand(B, H, QUERIES, KEYS), full)


def test_a_mask_of_one_head_and_one_query_is_no_key_mask_by_accident() -> None:
    """With a single query every mask is the same for all queries, which is the cheaper kind."""
    q, k, v = torch.randn(B, 1, 1, D), torch.randn(B, 1, KEYS, D), torch.randn(B, 1, KEYS, DV)
    (_, _, _, mask, *_), spec = normalise_inputs(q, k, v, mask=_bool(B, 1, 1, KEYS))
    assert (spec.mask, spec.mask_per_head, tuple(mask.shape)) == (MaskKind.KEY, False, (B, 1, 1, KEYS))


# given, for b 2, h 4, i 5 and j 7: what it varies over, and the shape and the strides it comes back with; those of one
# whose gradient is needed, whose elements are all its own.
BIASES = {
    "(b, h, i, j)": (torch.randn(2, 4, 5, 7), "bhij", (2, 4, 5, 7), (140, 35, 7, 1)),
    "(h, i, j)": (torch.randn(4, 5, 7), "hij", (1, 4, 5, 7), (None, 35, 7, 1)),
    "(i, j)": (torch.randn(5, 7), "ij", (1, 1, 5, 7), (None, None, 7, 1)),
    "(j)": (torch.randn(7), "j", (1, 1, 1, 7), (None, None, None, 1)),
    "()": (torch.randn(()), "", (1, 1, 1, 1), (None,) * 4),
    "(b, 1, i, 1)": (torch.randn(2, 1, 5, 1), "bi", (2, 1, 5, 1), (5, None, 1, None)),
    "transposed": (torch.randn(4, 7, 5).mT, "hij", (1, 4, 5, 7), (None, 35, 1, 5)),
    "expanded": (torch.randn(1, 4, 1, 7).expand(2, 4, 5, 7), "hj", (1, 4, 1, 7), (None, 7, None, 1)),
    "expanded, with a gradient": (
        torch.randn(1, 4, 1, 7).expand(2, 4, 5, 7).requires_grad_(), "bhij", (2, 4, 5, 7), (0, 7, 0, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASES)
def test_biases_are_read_where_they_lie(name: str) -> None:
    given, letters, shape, strides = BIASES[name]
    _, operands, spec = _normalise(bias=given)
    assert (spec.bias[:4], spec.bias.dtype) == (tuple(letter in letters for letter in "bhij"), torch.float32)
    bias = operands.bias
    assert tuple(bias.shape) == shape
    assert tuple(None if wanted is None else s for s, wanted in zip(bias.stride(), strides, strict=True)) == strides
    assert bias.data_ptr() == given.data_ptr()
    assert torch.equal(bias.expand(B, H, QUERIES, KEYS), given.expand(B, H, QUERIES, KEYS))


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(
    ("given", "wanted"),  # of 5 queries and 7 keys: the window, and whether it is causal
    [
        (None, ((None, None), False)),
        ((6, 4), ((None, None), False)),
        ((5, 3), ((5, 3), False)),
        ((0, 0), ((0, None), True)),
        ((10**30, 0), ((None, None), True)),
        ((None, 3), ((None, 3), False)),
        ((2, None), ((2, None), False)),
    ],
)
def test_a_meaning_has_one_description(given: tuple | None, wanted: tuple, causal: bool) -> None:
    """An end that hides nothing is none, a right end of 0 is causality, and causality's own right end is 0."""
    spec = _normalise(window=given, causal=causal)[-1]
    (left, right), of_window = wanted
    assert (spec.window, spec.causal) == ((left, None if causal else right), causal or of_window)


@pytest.mark.parametrize(
    ("options", "field", "wanted"),
    [
        (dict(softcap=2), "softcap", 2.0),
        (dict(alibi_slopes=torch.rand(4)), "alibi", True),
        (dict(sinks=torch.rand(4)), "sinks", True),
        *((dict(scale=given), "scale", scale) for given, scale in ((None, D**-0.5), (0, 0.0), (-2, -2.0), (1.5, 1.5))),
        (dict(dropout_p=0), "dropout_p", 0.0),
        *((dict(kv_heads=heads), "group", group) for heads, group in ((4, 1), (2, 2), (1, 4), (None, 4))),
        *((dict(dtype=x), "accumulator_dtype", torch.float32) for x in (torch.float16, torch.bfloat16, torch.float32)),
        (dict(dtype=torch.float64), "accumulator_dtype", torch.float64),
    ],
)
def test_what_is_said_of_a_call(options: dict, field: str, wanted: object) -> None:
    found = getattr(_normalise(**options)[-1], field)
    assert found == wanted
    assert type(found) is type(wanted)


def test_deterministic_follows_torch_unless_said() -> None:
    for said in (False, True):
        torch.use_deterministic_algorithms(said)
        try:
            found = [_normalise(deterministic=given)[-1].deterministic for given in (None, False, True)]
        finally:
            torch.use_deterministic_algorithms(False)
        assert found == [said, False, True]


@pytest.mark.parametrize("kv_heads", (None, 0, 1, 3))
def test_no_heads(kv_heads: int | None) -> None:
    middle = () if kv_heads is None else (kv_heads,)
    q, k, v = torch.randn(B, 0, QUERIES, D), torch.randn(B, *middle, KEYS, D), torch.randn(B, *middle, KEYS, DV)
    (_, k, v, *_), spec = normalise_inputs(q, k, v)
    assert (spec.heads, spec.kv_heads, spec.group, k.shape, v.shape) == (0, 0, 0, (B, 0, KEYS, D), (B, 0, KEYS, DV))


@pytest.mark.parametrize("name", (None, *MASKS))
def test_operands_and_options_describe_the_call(name: str | None) -> None:
    """Whatever became of the strides of the operands since."""
    options = dict(causal=True, scale=-0.5, dropout_p=0.25, deterministic=True, mask=name and MASKS[name][0])
    _, operands, spec = _normalise(kv_heads=2, **options)
    contiguous = (x if x is None else x.contiguous() for x in operands[:4])
    assert describe(*operands[:4], *spec.options) == spec == describe(*contiguous, *spec.options)


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
    dict(window=(3, None)),
    dict(window=(None, 3)),
    dict(softcap=2.0),
    dict(bias=BiasKind(True, True, True, True, torch.float32)),
    dict(bias=BiasKind(False, True, True, True, torch.float32)),
    dict(bias=BiasKind(True, True, True, True, torch.float16)),
    dict(alibi=True),
    dict(sinks=True),
)


def test_specs_are_frozen_and_hash_as_they_compare() -> None:
    spec = AttentionSpec(2, 4, 4, 5, 7, 8, 8, torch.float32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.batch = 3
    assert len({spec, dataclasses.replace(spec)}) == 1
    assert hash(spec) == hash(dataclasses.replace(spec)) == hash(pickle.loads(pickle.dumps(spec)))
    assert len({hash(dataclasses.replace(spec, **change)) for change in ({}, *CHANGES)}) == 1 + len(CHANGES)
