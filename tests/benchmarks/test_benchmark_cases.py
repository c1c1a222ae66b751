"""The benchmark's grid: names that file results, masks that are what they say, work that is counted right."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from cases import BACKWARD, BOTH, DETERMINISTIC, FORWARD, PRESETS, Case, make_inputs, make_mask, select_cases

CPU = torch.device("cpu")
SMALL = Case(batch=3, heads=4, kv_heads=2, queries=37, keys=37, head_dim=8, value_dim=12, dtype="float32")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_hold_each_other_and_names_are_unique(device):
    grids = [[case.name for case in select_cases(device, preset)] for preset in PRESETS]
    assert all(len(set(names)) == len(names) > 10 for names in grids)
    quick, standard, full = map(set, grids)
    assert quick < standard < full
    assert all(set(case.passes) <= {FORWARD, BOTH} for case in select_cases(device, "quick"))


def test_the_grid_of_a_gpu_has_what_people_ask_for():
    grid = select_cases("cuda", "full")

    def some(**wanted) -> bool:
        return any(all(getattr(case, name) == value for name, value in wanted.items()) for case in grid)

    for head_dim in (64, 128, 256):
        for batch, length in ((32, 512), (1, 16384)):
            for causal in (False, True):
                wanted = dict(batch=batch, queries=length, keys=length, heads=2048 // head_dim, causal=causal)
                assert some(head_dim=head_dim, dtype="bfloat16", **wanted)
    for mask in ("right", "left", "holes"):
        for valid in (0.25, 0.5, 0.75, 0.95):
            assert some(mask=mask, valid=valid, causal=True) and some(mask=mask, valid=valid, causal=False)
    assert all(some(queries=length) for length in (1000, 4097)) and all(some(head_dim=dim) for dim in (80, 96))
    assert all(some(dtype=dtype) for dtype in ("float16", "float32", "tf32"))
    assert some(mask="documents") and some(dropout_p=0.1) and some(queries=1)
    assert {case.heads // case.kv_heads for case in grid} >= {1, 4, 8}
    assert any(case.value_dim == 2 * case.head_dim for case in grid)
    assert any(case.queries != case.keys and case.queries > 1 for case in grid)


def test_the_grid_of_a_cpu_is_a_whole_product_and_the_demos_shapes():
    grid = select_cases("cpu", "full")
    kinds = {case.group for case in grid} - {"cpu: the demo's shapes"}
    found = {(case.group, case.keys, case.head_dim, case.dtype, case.threads) for case in grid}
    lengths, dims = (128, 512, 1024, 2048, 4096), (32, 64, 128)
    axes = itertools.product(kinds, lengths, dims, ("float32", "bfloat16"), (0, 1))
    assert len(kinds) == 10 and found >= set(axes) and len(grid) == len(kinds) * 60 + 2
    masks = {case.mask_words for case in grid}
    assert masks == {"none", "causal", "right50", "left50", "holes75", "documents25", "causal right62"}
    standard = select_cases("cpu", "standard")
    assert {case.group for case in standard} == {case.group for case in grid}
    assert max(case.keys for case in select_cases("cpu", "quick")) == 512


@pytest.mark.parametrize("valid", [0.25, 0.5, 0.75, 0.95])
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_padding_has_as_many_valid_keys_as_it_says(kind, valid):
    case = replace(SMALL, batch=8, queries=1000, keys=1000, mask=kind, valid=valid)
    mask = make_mask(case, CPU, torch.Generator().manual_seed(0))
    assert mask.shape == (8, 1000) and mask.any(dim=1).all()
    assert mask.float().mean().item() == pytest.approx(valid, abs=0.02 if kind == "holes" else 0.002)
    if kind != "holes":
        lengths = mask.sum(dim=1)
        assert len(lengths.unique()) == 8, "the lengths of a batch differ"
        position = torch.arange(1000)
        expected = position < lengths[:, None] if kind == "right" else position >= 1000 - lengths[:, None]
        assert mask.equal(expected)


def test_documents_see_themselves_and_no_other():
    case = replace(SMALL, queries=200, keys=200, mask="documents", valid=0.25)
    mask = make_mask(case, CPU, torch.Generator().manual_seed(0))
    assert mask.shape == (3, 1, 200, 200) and mask.equal(mask.mT)
    assert mask.diagonal(dim1=2, dim2=3).all()
    starts = (~mask[:, 0].diagonal(offset=1, dim1=1, dim2=2)).sum(dim=1)
    assert starts.tolist() == [3, 3, 3], "four documents a sequence"
    assert (mask.float() @ mask.float() > 0).equal(mask), "blocks on the diagonal"


def test_documents_need_as_many_queries_as_keys():
    with pytest.raises(ValueError, match="i = 5"):
        make_mask(replace(SMALL, queries=5, mask="documents", valid=0.5), CPU, torch.Generator())


@pytest.mark.parametrize("mask", ["none", "right", "left", "holes", "documents"])
def test_visible_pairs_and_rows_are_those_that_a_plain_count_finds(mask):
    for queries, causal in itertools.product((13,) if mask == "documents" else (13, 5, 17), (False, True)):
        case = replace(SMALL, queries=queries, keys=13, causal=causal, mask=mask, valid=0.5)
        inputs = make_inputs(case, CPU)
        dense = torch.ones(3, 1, 1, 13, dtype=torch.bool) if inputs.mask is None else inputs.mask
        dense = (dense[:, None, None] if dense.ndim == 2 else dense).expand(3, 1, queries, 13)[:, 0].tolist()
        seen = [
            [[dense[b][i][j] and (not causal or j <= i + 13 - queries) for j in range(13)] for i in range(queries)]
            for b in range(3)
        ]
        assert inputs.visible == 4 * sum(sum(map(sum, rows)) for rows in seen)
        rows = torch.tensor([[any(row) for row in rows] for rows in seen])
        if inputs.mask is not None and inputs.mask.ndim == 2 and queries == 13:
            rows &= inputs.mask  # a padded position is no query either
        assert inputs.rows.equal(rows)
        assert not inputs.grad_out[~rows[:, None].expand(-1, 4, -1)].any()


def test_tensors_are_laid_out_as_models_make_them():
    inputs = make_inputs(SMALL, CPU)
    assert inputs.q.shape == (3, 4, 37, 8) and inputs.k.shape == (3, 2, 37, 8) and inputs.v.shape == (3, 2, 37, 12)
    assert inputs.q.transpose(1, 2).is_contiguous() and inputs.q.is_leaf and inputs.q.requires_grad
    assert inputs.q.equal(make_inputs(SMALL, CPU).q), "the same for every peer and every run"


def test_rates_of_a_call_counted_by_hand():
    case = Case(batch=2, heads=4, kv_heads=2, queries=3, keys=3, head_dim=8, value_dim=16, causal=True)
    inputs, pairs = make_inputs(case, CPU), 2 * 4 * (1 + 2 + 3)
    forward = 2 * pairs * 8 + 2 * pairs * 16  # q k^T, and weights times v
    assert inputs.tflops(FORWARD, 1.0) == pytest.approx(forward / 1e-3 / 1e12)
    assert inputs.tflops(BACKWARD, 2.0) == inputs.tflops(DETERMINISTIC, 2.0) == pytest.approx(2.5 * forward / 2e9)
    assert inputs.tflops(BOTH, 7.0) == pytest.approx(inputs.tflops(FORWARD, 2.0))
