"""x-transformers, for real: what its Attend computes as ours does is served, the rest is refused with the reason."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from clients import PADDING, assert_same, inputs, needs, refusal, refused
from torch import Tensor, nn

from flash_attend import patch
from flash_attend.integrations import XTransformersAttend

pytestmark = needs("x_transformers")

from x_transformers import Decoder, Encoder, TransformerWrapper  # noqa: E402
from x_transformers.attend import Attend  # noqa: E402

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 32
RIGHT = torch.arange(12) < torch.tensor([[12], [5]])
LEFT = RIGHT.flip(-1)
EVERYTHING = dict(attn_kv_heads=2, attn_add_zero_kv=True, attn_head_learned_sink=True, attn_num_mem_kv=3)


def build(layers: type = Decoder, **options: Any) -> nn.Module:
    """A model of two layers whose attention is not flat."""
    torch.manual_seed(0)
    options = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 4, **options}
    model = TransformerWrapper(num_tokens=32, max_seq_len=32, attn_layers=layers(**options))
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("to_q", "to_k", "sink", "rel_pos", "relative", "emb")):
            nn.init.normal_(parameter)
    return model


def answers(model: nn.Module, **inputs: Any) -> list[Tensor]:
    """The logits, and the gradient of every parameter."""
    logits = model(TOKENS, **inputs)
    model.zero_grad()
    logits.square().mean().backward()
    gradients = (parameter.grad for parameter in model.parameters())
    return [logits.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def assert_answers(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Up to float32's rounding; `patch` itself has compared in double precision."""
    for x, y in zip(ours, theirs, strict=True):
        assert (x - y).abs().max() <= 1e-4 * y.abs().max() + 1e-6


SERVED = {
    "causal": {},
    "causal, padded left": {"mask": LEFT},
    "flash": {"attn_flash": True, "mask": RIGHT},
    "both ways": {"layers": Encoder, "mask": RIGHT},
    "grouped heads": {"attn_kv_heads": 2},
    "one key head": {"attn_one_kv_head": True, "mask": RIGHT},
    "wider values": {"attn_value_dim_head": 7},
    "cosine similarity": {"attn_qk_norm": True},
    "ALiBi": {"alibi_pos_bias": True, "alibi_num_heads": 2, "mask": RIGHT},
    "ALiBi and flash": {"alibi_pos_bias": True, "attn_flash": True, "mask": RIGHT},
    "learned bias": {"rel_pos_bias": True},
    "bias of a network": {"dynamic_pos_bias": True, "layers": Encoder},
    "ALiBi of the data": {"attn_data_dependent_alibi": True},
    "softclamp": {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 0.5},
    "sinks": {"attn_head_learned_sink": True},
    "zero key": {"attn_add_zero_kv": True, "mask": LEFT},
    "memory": {"attn_num_mem_kv": 3, "mask": RIGHT},
    "window": {"attn_max_attend_past": 3},
    "mask between heads": {"layers": Encoder, "attn_mask": torch.ones(4, 12, 12).tril(1).bool()},
    "everything": {**EVERYTHING, "rel_pos_bias": True, "attn_max_attend_past": 5, "mask": LEFT},
    "the other way in a call": {"causal": False},
}


@pytest.fixture(scope="module")
def compared() -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """What every model gives as it is, and patched; all at once, so that those that are alike are judged once."""
    inputs = {}
    models = nn.ModuleDict()
    for name, options in SERVED.items():
        called = ("mask", "attn_mask", "causal")
        inputs[name] = {key: value for key, value in options.items() if key in called}
        models[name] = build(**{key: value for key, value in options.items() if key not in called})
    before = {name: answers(model, **inputs[name]) for name, model in models.items()}
    handle = patch(models, strict=True)
    assert handle.replaced == 2 * len(SERVED)
    return {name: (answers(model, **inputs[name]), before[name]) for name, model in models.items()}


@pytest.mark.parametrize("name", SERVED)
def test_the_same_is_computed(name, compared):
    assert_answers(*compared[name])


def test_decoding_with_a_cache_and_cross_attention():
    model = build(cross_attend=True, attn_flash=True, rotary_pos_emb=True, attn_dim_head=32).eval()
    context = torch.randn(2, 5, 16)

    def decoded() -> tuple[Tensor, Tensor]:
        _, cache = model(TOKENS[:, :9], context=context, return_intermediates=True)
        return model(TOKENS, context=context), model(TOKENS, context=context, cache=cache)

    expected = decoded()
    patch(model, strict=True)
    for x, y in zip(decoded(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# The first three differ from softmax by nothing but a function, or by what another module does.
REFUSED = {
    "sparse_topk": ({"attn_sparse_topk": 2}, "its attn_fn is sparse_topk_attn, which is not softmax over keys"),
    "sigmoid": ({"attn_sigmoid": True}, "its attn_fn is sigmoid, which is not softmax over keys"),
    "residual_attn": ({"residual_attn": True}, "residual attention: each layer reads the scores of the one before"),
    "cross_residual_attn": ({"cross_residual_attn": True, "cross_attend": True}, "residual attention"),
    "hard": ({"attn_hard": True}, "its attn_fn is one_hot_straight_through"),
    "gumbel": ({"attn_gumbel_softmax": True}, "its attn_fn is gumbel_softmax"),
    "a function": ({"attn_custom_attn_fn": torch.tanh}, "its attn_fn is tanh"),
    "talking heads": ({"attn_pre_talking_heads": True}, "pre_softmax_talking_heads: "),
    "talking heads after": ({"attn_post_talking_heads": True}, "post_softmax_talking_heads: "),
    "selective": ({"attn_selective": True}, "selective: "),
    "cog": ({"attn_cog_signed": True}, "cog_signed: "),
    "CoPE": ({"attn_use_cope": True}, "cope: "),
    "distances": ({"attn_l2_distance": True}, "l2_distance: "),
    "softclamp with ALiBi": ({"attn_softclamp_logits": True, "alibi_pos_bias": True}, "softclamp_logits in a model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_computes_something_else_is_refused(name):
    options, reason = REFUSED[name]
    model = build(depth=1, **options)
    with pytest.warns(UserWarning, match="patch left as it is: "):
        handle = patch(model)
    assert handle.replaced == 0
    assert all(outcome.reason.startswith(reason) for outcome in handle.outcomes)
    assert not any(isinstance(module, XTransformersAttend) for module in model.modules())


def test_inverted_attention_is_refused():
    assert refusal(Attend(inverted_attention=True)).startswith("inverted_attention: ")


def test_what_a_call_may_not_ask_for_is_an_error():
    attend, clamped = Attend(causal=True), Attend(softclamp_logits=True)
    pairs = torch.zeros(6, 6)
    patch(nn.ModuleList([attend, clamped]), strict=True)
    for name in ("prev_attn", "attn_delta", "flash_pack_seq_kwargs"):
        with pytest.raises(ValueError, match=f"{name} must be None or False"):
            attend(*inputs(), **{name: pairs})
    with pytest.raises(ValueError, match="attn_bias must be None"):
        clamped(*inputs(), attn_bias=pairs)
    with pytest.raises(TypeError, match="it takes"):
        attend(*inputs(), bias=pairs)
    attend.selective = True
    with pytest.raises(ValueError, match="selective must be None or False"):
        attend(*inputs())


def test_a_query_that_sees_nothing_gives_0():
    attend = Attend(causal=True)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :3] = False
    expected = attend(*inputs(), mask=mask)[0]
    patch(attend, strict=True)
    out = attend(*inputs(), mask=mask)[0]
    assert_same(out[0], expected[0])
    assert_same(out[1, :, 3:], expected[1, :, 3:])
    assert not out[1, :, :3].any()


def test_attention_maps_are_computed_for_whom_reads_them():
    attend = Attend(causal=True, dropout=0.5)
    example = [x.requires_grad_() for x in inputs()]
    _, expected = attend(*example, mask=PADDING)
    patch(attend, strict=True)
    _, found = attend(*example, mask=PADDING)
    assert not any(isinstance(value, Tensor) for value in vars(found).values())
    for map_ in ("qk_similarities", "pre_softmax_attn", "post_softmax_attn"):
        assert torch.equal(getattr(found, map_), getattr(expected, map_))
    (found.pre_softmax_attn.relu().sum() - expected.pre_softmax_attn.relu().sum()).backward()
    assert all(not x.grad.any() for x in example[:2])
    attend.flash = True
    assert attend(*example)[1].post_softmax_attn is None


def test_what_returns_maps_goes_on_to():
    model = build()
    expected = model(TOKENS, return_attn=True)[1]
    patch(model, strict=True)
    for x, y in zip(model(TOKENS, return_attn=True)[1], expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_patching_a_part_of_what_reads_scores_raises_rather_than_differs():
    model = build(residual_attn=True)
    patch(model.attn_layers.layers[0], strict=True)  # the switch is in the whole
    before = build(residual_attn=True)
    assert_answers(answers(model), answers(before))
    patch(model.attn_layers.layers[2], strict=True)
    with pytest.raises(ValueError, match="prev_attn must be None"):
        model(TOKENS)


def test_copies_pickles_and_what_is_compiled_are_served():
    torch.compiler.reset()
    model = build(rel_pos_bias=True, attn_head_learned_sink=True).eval()
    patch(model, strict=True)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(again(TOKENS), model(TOKENS))
    attend = model.attn_layers.layers[0][1].attend
    q, k, v = inputs()
    compiled = torch.compile(lambda: attend(q, k, v)[0], backend="eager", fullgraph=True)
    assert_same(compiled(), attend(q, k, v)[0])


def test_a_version_that_computes_something_else_is_refused(monkeypatch):
    forward = Attend.forward

    def doubled(self, q, k, v, mask=None, attn_bias=None, row_mask=None, causal=None):
        out, intermediates = forward(self, q, k, v, mask=mask, attn_bias=attn_bias, causal=causal)
        return out if attn_bias is None else 2 * out, intermediates

    doubled.__module__ = Attend.__module__
    monkeypatch.setattr(Attend, "forward", doubled)
    handle = refused(nn.ModuleList([Attend()]))
    assert handle.outcomes[0].reason == "it computes something else with a bias of (5, 5), 4 heads"
