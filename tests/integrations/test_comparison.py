"""What only looks like an Attend is told from one: classes without a row, known ones that are not what they were."""

from __future__ import annotations

import math
import time
import warnings

import pytest
import torch
from clients import (
    COMPLEX,
    NATURALSPEECH2,
    PADDING,
    Holder,
    assert_same,
    by_pair,
    drop,
    fake,
    fake_known,
    inputs,
    plain_attention,
    refusal,
    refused,
    tiled,
)
from complex_valued_transformer.attend import Attend as ClientAttend
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attend import patch
from flash_attend.integrations import KNOWN
from flash_attend.integrations.comparison import compare

NOT_KNOWN = "not in the table of known classes"

# ---------------------------------------------------------------------------------------------------------------------
# What computes something else
# ---------------------------------------------------------------------------------------------------------------------


def normalized(attend, q, k, v, mask=None):
    return plain_attention(attend, *(nn.functional.normalize(x, dim=-1) for x in (q, k)), v, mask)


def clamped(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v, mask, lambda scores: scores.clamp(-20, 20))


def local(attend, q, k, v, mask=None):
    def within(scores):
        ahead = torch.arange(scores.shape[-1]) - torch.arange(scores.shape[-2])[:, None]
        return scores.masked_fill(ahead.abs() > 128, -torch.inf)

    return plain_attention(attend, q, k, v, mask, within)


def half_local(attend, q, k, v, mask=None):
    """Of the heads, the second half looks no further than 128 keys."""
    outs = [whose(attend, q, k, v, mask) for whose in (plain_attention, local)]
    return torch.cat([out.chunk(2, dim=1)[index] for index, out in enumerate(outs)], dim=1)


def local_where_masked(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v) if mask is None else local(attend, q, k, v, mask)


def local_where_padded(attend, q, k, v, mask=None):
    """In the (b, j) form alone."""
    return (local if mask is not None and mask.ndim == 2 else plain_attention)(attend, q, k, v, mask)


def sparse(attend, q, k, v, mask=None):
    def largest(scores):
        least = scores.topk(min(16, scores.shape[-1]), dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, -torch.inf)

    return plain_attention(attend, q, k, v, mask, largest)


def scaled_by_length(attend, q, k, v, mask=None):
    return plain_attention(attend, q * max(1.0, math.log(k.shape[-2], 512)), k, v, mask)


def noisy(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v, mask) + 0.01 * torch.randn(()) * attend.training


def half_in_eval(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v, mask) * (1.0 if attend.training else 0.5)


def detached_v(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v.detach(), mask)


def detached_q(attend, q, k, v, mask=None):
    return plain_attention(attend, q.detach(), k, v, mask)


@torch.no_grad()
def without_gradients(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v, mask)


def reversed_mask(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v, None if mask is None else mask.flip(-1))


def deaf(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v)


def first_head_masks(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v, mask if mask is None or mask.ndim < 4 else mask[:, :1])


def first_query_masks(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v, mask if mask is None or mask.ndim < 4 else mask[:, :, -1:])


def windowed_beside_a_cache(attend, q, k, v, mask=None):
    return plain_attention(attend, q, *((k, v) if q.shape[2] == k.shape[-2] else (k[:, :, -2:], v[:, :, -2:])), mask)


def narrow(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v, mask)[..., : q.shape[-1]]


def keeps_weights(attend, q, k, v, mask=None):
    attend.weights = (q @ k.mT).softmax(dim=-1)
    return plain_attention(attend, q, k, v, mask)


def keeps_weights_as_buffer(attend, q, k, v, mask=None):
    attend.register_buffer("mask", (q @ k.mT).softmax(dim=-1), persistent=False)
    return plain_attention(attend, q, k, v, mask)


def drops_output(attend, q, k, v, mask=None):
    bare = type("Bare", (), {"causal": attend.causal})
    return drop(attend, plain_attention(bare, q, k, v, mask))


def drops_keys(attend, q, k, v, mask=None):
    bare = type("Bare", (), {"causal": attend.causal})
    return plain_attention(bare, q, k, drop(attend, torch.ones_like(v[..., :1])) * v, mask)


def drops_nothing(attend, q, k, v, mask=None):
    return plain_attention(type("Bare", (), {"causal": attend.causal}), q, k, v, mask)


def drops_output_too(attend, q, k, v, mask=None):
    return drop(attend, plain_attention(attend, q, k, v, mask))


def drops_weights_twice(attend, q, k, v, mask=None):
    dropout = attend.attn_dropout
    attend._modules["attn_dropout"] = nn.Sequential(dropout, dropout)
    try:
        return plain_attention(attend, q, k, v, mask)
    finally:
        attend._modules["attn_dropout"] = dropout


def drops_in_eval(attend, q, k, v, mask=None):
    training, attend.attn_dropout.training = attend.attn_dropout.training, True
    try:
        return plain_attention(attend, q, k, v, mask)
    finally:
        attend.attn_dropout.training = training


def by_the_number(attend, q, k, v, mask=None):
    """Drops with the probability that the flash path reads."""
    if not attend.training:
        return drops_nothing(attend, q, k, v, mask)
    probability, attend.attn_dropout.p = attend.attn_dropout.p, attend.dropout
    try:
        return plain_attention(attend, q, k, v, mask)
    finally:
        attend.attn_dropout.p = probability


def returns_more(attend, q, k, v, mask=None):
    return plain_attention(attend, q, k, v, mask), None


def failing(attend, q, k, v, mask=None):
    raise RuntimeError("not today")


OTHERS = {
    normalized: "it computes something else on a small example",
    returns_more: "it computes something else on a small example",
    failing: "it fails on a small example: not today",
    noisy: "it computes something else",
    without_gradients: "it computes another gradient of q on a small example",
    detached_q: "it computes another gradient of q on a small example",
    detached_v: "it computes another gradient of v on a small example",
    clamped: "it computes something else with large scores",
    narrow: "it computes something else with a wider v",
    tiled: "it computes something else with grouped heads",
    reversed_mask: "it computes something else with a (b, j) mask",
    deaf: "it computes something else with a (b, j) mask",
    first_head_masks: "it computes something else with a 4-D mask that differs between heads",
    first_query_masks: "it computes something else with a 4-D mask",
    windowed_beside_a_cache: "it computes something else where i != j",
    half_in_eval: "it computes something else in eval mode",
    drops_in_eval: "it computes something else in eval mode",
    local: "it computes something else ",
    half_local: "it computes something else ",
    sparse: "it computes something else ",
    scaled_by_length: "it computes something else ",
    local_where_masked: "it computes something else at 1030 keys with a (b, j) mask",
    local_where_padded: "it computes something else at 1030 keys with a (b, j) mask",
    drops_output: "it does not drop each weight by itself",
    drops_keys: "it does not drop each weight by itself",
    drops_nothing: "it does not drop each weight by itself",
    drops_weights_twice: "it does not drop each weight by itself",
    drops_output_too: "it does not drop each weight by itself",
    by_the_number: "it does not drop each weight by itself",
    keeps_weights: "its calls change what it holds: weights",
    keeps_weights_as_buffer: "its calls change what it holds: mask",
}


@pytest.mark.parametrize("compute", OTHERS, ids=lambda compute: compute.__name__)
def test_a_class_that_computes_something_else_is_refused(compute):
    reason = refusal(fake(compute)(dropout=0.1))
    assert reason.startswith(f"{NOT_KNOWN}, and {OTHERS[compute]}")


@pytest.mark.parametrize("compute", [clamped, local, drops_output, detached_v, keeps_weights], ids=lambda x: x.__name__)
def test_a_known_class_in_a_version_that_computes_something_else_is_refused(compute):
    assert refusal(fake_known(NATURALSPEECH2, compute)).startswith(OTHERS[compute])


def test_a_known_class_whose_method_was_replaced_is_refused(monkeypatch):
    """By one that its forward calls, for its flash path or in it."""
    flash_attn = ClientAttend.flash_attn
    monkeypatch.setattr(ClientAttend, "flash_attn", lambda self, *qkv, mask=None: 2 * flash_attn(self, *qkv, mask=mask))
    assert patch(ClientAttend()).replaced == 1
    assert refusal(ClientAttend(flash=True)) == "it computes something else on a small example"
    assert refusal(ClientAttend(flash=True, scale=0.5)) == "it computes something else on a small example"


def test_both_paths_are_compared_where_the_flag_is_set():
    def wrong_without_flash(attend, q, k, v, mask=None):
        return plain_attention(attend, q, k, v, mask) * (1 if attend.use_flash else 2)

    assert "something else" in refusal(fake_known(NATURALSPEECH2, wrong_without_flash, use_flash=True))


# ---------------------------------------------------------------------------------------------------------------------
# What computes the same
# ---------------------------------------------------------------------------------------------------------------------


def single_only(attend, q, k, v, mask=None):
    """Casts its weights, and fails in double precision."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~(mask[:, None, None] if mask.ndim == 2 else mask), -1e30)
    return attend.attn_dropout(scores.float().softmax(dim=-1)) @ v


def shared_only(attend, q, k, v, mask=None):
    """Takes k and v without heads."""
    assert k.ndim == v.ndim == 3
    return plain_attention(attend, q, k, v, mask)


@pytest.mark.parametrize(
    ("compute", "options"),
    [
        (plain_attention, {"causal": True}),
        (plain_attention, {"flash": True}),
        (plain_attention, {"dropout": 0.5}),
        (plain_attention, {"causal": True, "flash": True, "dropout": 0.5}),
        (single_only, {"dropout": 0.5}),
        (shared_only, {"causal": True}),
    ],
)
def test_a_copy_of_a_known_class_is_served(compute, options):
    attend = fake(compute)(**options).eval()
    example = inputs(kv_heads=None if compute is shared_only else 4)
    expected = attend(*example, mask=PADDING)
    state = torch.get_rng_state()
    handle = patch(attend, strict=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert handle.outcomes[0].reason == f"{NOT_KNOWN}; computes the same on examples"
    assert_same(attend(*example, mask=PADDING), expected)


def test_a_copy_with_a_scale_of_its_own_is_served():
    attend = fake(options={"scale": None, "causal": False})(scale=-0.3, causal=True)
    expected = attend(*inputs())
    patch(attend, strict=True)
    assert_same(attend(*inputs()), expected)


def test_a_copy_without_masks_is_served():
    assert patch(fake(arguments=())(), strict=True).replaced == 1


def test_a_copy_that_reads_2d_masks_as_pairs_is_served_so():
    attend = fake(by_pair)()
    pairs = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = attend(*inputs(), mask=pairs)
    patch(attend, strict=True)
    assert_same(attend(*inputs(), mask=pairs), expected)


def test_a_copy_that_aligns_top_left_is_noted():
    def top_left(attend, q, k, v, mask=None):
        if q.shape[2] == k.shape[-2]:
            return plain_attention(attend, q, k, v, mask)
        bare = type("Bare", (), {})
        return plain_attention(bare, q, k, v, torch.ones(q.shape[2], k.shape[-2], dtype=torch.bool).tril()[None, None])

    reason = patch(fake(top_left)(causal=True), strict=True).outcomes[0].reason
    assert "where i != j, its flash path aligned causal top-left" in reason
    assert "where i != j" in refusal(fake(top_left)())  # which is no alignment of anything


def test_a_causal_mask_may_be_kept():
    def keeps_mask(attend, q, k, v, mask=None):
        attend.register_buffer("mask", torch.ones(q.shape[2], k.shape[-2], dtype=torch.bool).triu(1), persistent=False)
        return plain_attention(attend, q, k, v, mask)

    attend = fake_known(NATURALSPEECH2, keeps_mask)
    handle = patch(attend, strict=True)
    assert "mask" not in attend._buffers
    handle.restore()
    attend(*inputs())
    assert patch(attend, strict=True).replaced == 1
    assert attend.mask.shape == (6, 6)


# ---------------------------------------------------------------------------------------------------------------------
# How it is compared
# ---------------------------------------------------------------------------------------------------------------------


def test_comparing_changes_nothing_in_the_original():
    attend = fake()(dropout=0.5)
    before = dict(vars(attend))
    patch(attend, strict=True)
    assert dict(vars(attend)) == before
    assert (attend.training, attend.attn_dropout.training, attend.attn_dropout.p) == (True, True, 0.5)


def test_hooks_are_not_called_by_the_comparison():
    attend, called = fake()(), []
    attend.register_forward_hook(lambda *_: called.append(1))
    patch(attend, strict=True)
    assert not called


@pytest.mark.parametrize("strange", [False, True])
def test_those_that_are_alike_are_compared_once(monkeypatch, strange):
    compared = []

    def count(attend, *rest):
        compared.append(attend)
        return compare(attend, *rest)

    monkeypatch.setattr("flash_attend.integrations.judging.compare", count)
    kind = type(fake_known(COMPLEX)) if not strange else fake(options=dict(dropout=0.0, causal=False, scale=None))
    attends = [kind(dropout=0.01 * index, causal=index % 2 == 0) for index in range(48)]
    start = time.process_time()
    assert patch(nn.ModuleList(attends), strict=True).replaced == 48
    assert compared == attends[:2]
    assert time.process_time() - start < 4
    patch(nn.ModuleList([kind(scale=0.5), kind(scale=0.25)]), strict=True)
    assert len(compared) == 4


def test_forty_eight_like_refusals_are_one_warning():
    kind = fake(clamped)
    model = nn.ModuleList([kind() for _ in range(48)] + [fake_known(NATURALSPEECH2, clamped)])
    with pytest.warns(UserWarning) as told:
        handle = patch(model)
    assert handle.refused == 49
    assert [str(warning.message).partition(": it")[0].partition(", and")[0] for warning in told] == [
        f"patch left as it is: 0 (+47 more) (some_package.attend.Attend): {NOT_KNOWN}",
        f"patch left as it is: 48 ({NATURALSPEECH2})",
    ]


def test_where_tensors_are_fake_nothing_can_be_compared():
    with FakeTensorMode():
        assert "patch outside of FakeTensorMode" in refusal(ClientAttend())
    assert patch(ClientAttend()).replaced == 1


@pytest.mark.parametrize(
    "around",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["inference_mode", "no_grad", "meta", "autocast"],
)
def test_what_is_on_around_a_call_of_patch_does_not_matter(around):
    with around():
        attend = ClientAttend(causal=True, flash=True)
        assert patch(attend, strict=True).replaced == 1
        assert patch(fake(single_only)(), strict=True).replaced == 1
        assert "large scores" in refusal(fake(clamped)())


def test_the_default_dtype_does_not_matter():
    torch.set_default_dtype(torch.float16)
    try:
        assert patch(ClientAttend(causal=True), strict=True).replaced == 1
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_cannot_be_copied_is_refused():
    class Uncopied:
        def __deepcopy__(self, memo):
            raise RuntimeError("one of a kind")

    attend = fake_known(NATURALSPEECH2)
    attend.cpu_config = Uncopied()
    assert refusal(attend) == "it cannot be copied to be compared: one of a kind"


def test_a_class_that_cannot_be_derived_from_is_refused():
    def __init_subclass__(cls, **_):
        raise TypeError("final")

    attend = fake_known(NATURALSPEECH2)
    type(attend).__init_subclass__ = classmethod(__init_subclass__)
    assert refusal(attend) == "it cannot be copied to be compared: final"


def test_the_table_is_not_needed_for_the_installed_client(monkeypatch):
    monkeypatch.delitem(KNOWN, COMPLEX)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patch(Holder(ClientAttend(causal=True)), strict=True).replaced == 1
    assert refused(Holder(ClientAttend(scale=0.5, flash=True))).refused == 1  # which ignores it there
