"""The classes that are known: the installed client for real, the others by fakes with their interface."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator

import complex_valued_transformer.complex_valued_transformer as client
import pytest
import torch
from clients import (
    COMPLEX,
    NATURALSPEECH2,
    PADDING,
    X_TRANSFORMERS,
    Holder,
    assert_same,
    by_pair,
    fake,
    fake_known,
    inputs,
    plain_attention,
    refusal,
    tiled,
)
from complex_valued_transformer.attend import Attend as ClientAttend
from torch import Tensor, nn

from flash_attend import patch
from flash_attend.integrations import KNOWN, BroadcastMaskAttend, KnownAttend, ServedAttend, register

pytestmark = pytest.mark.filterwarnings("ignore:.*sdp_kernel.*")  # what the client's flash path calls


# ---------------------------------------------------------------------------------------------------------------------
# The real client
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_client(monkeypatch) -> Callable[..., nn.Module]:
    """Makes a small complex-valued transformer in double precision, where a difference in meaning cannot hide."""
    monkeypatch.setattr(client, "cfloat", torch.complex128)  # what the client builds with, and asserts

    def make(flash: bool, complete: bool = False) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"num_tokens": 32, "dim": 16, "depth": 2, "heads": 2, "dim_head": 4}
        model = client.ComplexTransformer(**sizes, causal=True, flash_attn=flash, complete_complex=complete)
        for norm in (module for module in model.modules() if isinstance(module, client.ComplexRMSNorm)):
            nn.init.constant_(norm.gamma, 16)  # gives the attention weight in what comes out
        return model.double()

    return make


def answers(model: nn.Module, mask: Tensor | None) -> list[Tensor]:
    """The logits and the gradient of every parameter."""
    tokens = torch.arange(24).reshape(2, 12) * 7 % 32
    logits = model(tokens, mask=mask)
    model.zero_grad()
    (logits.real.square().mean() + logits.imag.mean()).backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def held(model: nn.Module) -> list[nn.Module]:
    """The Attends, which the client keeps in partials."""
    return [layer[1].attend.keywords["attend"] for layer in model.layers]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "right padding"])
@pytest.mark.parametrize("complete", [False, True], ids=["real form", "complete form"])
@pytest.mark.parametrize("flash", [False, True], ids=["einsum", "flash"])
def test_the_real_client_computes_the_same(real_client, flash, complete, padded, mode):
    model = real_client(flash, complete).train(mode == "train")
    mask = (torch.arange(12) < torch.tensor([[12], [5]]))[:, None, None, :] if padded else None
    before = answers(model, mask)
    attends = held(model)
    handle = patch(model, strict=True)
    assert [outcome.paths for outcome in handle.outcomes] == [
        ("layers.0.1.attend.keywords['attend']",),
        ("layers.1.1.attend.keywords['attend']",),
    ]
    assert held(model) == attends
    assert all(isinstance(attend, ServedAttend) and isinstance(attend, ClientAttend) for attend in attends)
    for x, y in zip(answers(model, mask), before, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
    handle.restore()
    assert {type(attend) for attend in attends} == {ClientAttend}
    for x, y in zip(answers(model, mask), before, strict=True):
        assert torch.equal(x, y)


def test_the_real_client_notices_a_different_attend(real_client):
    model = real_client(False)
    before = answers(model, None)
    patch(model)
    for attend in held(model):
        attend.causal = False
    assert max((x - y).abs().max().item() for x, y in zip(answers(model, None), before, strict=True)) > 1e-3


def test_the_real_client_can_be_saved_and_copied_after_patching(real_client):
    model = real_client(True)
    checkpoint = model.state_dict()
    patch(model)
    assert model.state_dict().keys() == checkpoint.keys()
    model.load_state_dict(checkpoint, strict=True)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for x, y in zip(answers(again, None), answers(model, None), strict=True):
        assert torch.equal(x, y)


def test_the_real_class_reads_a_2d_mask_as_pairs():
    attend = ClientAttend()
    pairs = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = attend(*inputs(), mask=pairs)
    patch(attend, strict=True)
    assert_same(attend(*inputs(), mask=pairs), expected)


# ---------------------------------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------------------------------

WITH_BIAS = [path for path, row in KNOWN.items() if "attn_bias" in row.arguments and path != X_TRANSFORMERS]


@pytest.mark.parametrize("path", [path for path in KNOWN if path != X_TRANSFORMERS])
def test_known_classes_are_served(path):
    row = KNOWN[path]
    options = {"dropout": 0.25, "causal": True, "scale": 0.4, "heads": 4}
    attend = fake_known(path, **{name: value for name, value in options.items() if name in row.options}).eval()
    given = (
        {"mask": PADDING[:, None, None] if row.reading is BroadcastMaskAttend else PADDING}
        if "mask" in row.arguments
        else {}
    )
    given |= {"attn_bias": torch.randn(4, 6, 6)} if "attn_bias" in row.arguments else {}
    expected = attend(*inputs(), **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = patch(attend, strict=True)
    (outcome,) = handle.outcomes
    assert (outcome.kind, outcome.status, outcome.reason) == (path, "replaced", "")
    calls = type(attend).calls
    assert_same(attend(*inputs(), **given), expected)
    assert type(attend).calls == calls
    handle.restore()
    assert torch.equal(attend(*inputs(), **given), expected)


def test_every_row_says_which_version_was_read():
    assert all(row.read for row in KNOWN.values())


def test_grouped_heads_keep_their_order():
    q, k, v = inputs(heads=6, kv_heads=2)
    per_head = torch.rand(2, 6, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    per_head[..., 0] = True
    attend = fake_known("spear_tts_pytorch.attend.Attend", causal=True)
    expected = [tiled(attend, q, k, v, mask=mask) for mask in (PADDING, per_head)]
    patch(attend, strict=True)
    assert_same(attend(q, k, v, mask=PADDING), expected[0])
    assert_same(attend(q, k, v, mask=per_head), expected[1])


@pytest.mark.parametrize("path", WITH_BIAS)
def test_a_bias_gets_its_gradient(path):
    """By position, too, on a class whose flash path takes none."""

    def none_by_flash(attend, q, k, v, mask=None, attn_bias=0.0):
        assert not attend.flash or attn_bias == 0.0
        return plain_attention(attend, q, k, v, mask, attn_bias=attn_bias)

    attend = fake_known(path, none_by_flash, flash=True)
    bias = torch.randn(4, 6, 6, requires_grad=True)
    out = plain_attention(attend, *inputs(), mask=PADDING, attn_bias=bias)
    (expected,) = torch.autograd.grad(out.square().sum(), bias)
    patch(attend, strict=True)
    (gradient,) = torch.autograd.grad(attend(*inputs(), PADDING, bias).square().sum(), bias)
    assert_same(gradient, expected)


def test_recurrent_memory_with_flash_and_causal_is_refused():
    attend = fake_known("recurrent_memory_transformer_pytorch.attend.Attend", use_flash=True, causal=True)
    assert "use_flash=True with causal=True" in refusal(attend)


def top_left_by_flash(attend, q, k, v, mask=None):
    """Aligns causal top-left on the flash path, and takes one mask at most there, as PyTorch's kernels do."""
    if not (getattr(attend, "use_flash", False) and attend.causal):
        return plain_attention(attend, q, k, v, mask)
    assert mask is None
    return nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, dropout_p=attend.dropout if attend.training else 0.0
    )


def test_top_left_alignment_is_noted():
    note = "where i != j, its flash path aligned causal top-left; ours is bottom-right"
    for options, reason in (
        ({"use_flash": True, "causal": True}, note),
        ({"use_flash": True}, ""),
        ({"causal": True}, ""),
    ):
        attend = fake_known(NATURALSPEECH2, top_left_by_flash, **options)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert patch(attend, strict=True).outcomes[0].reason == reason
        shown = f"patch served with a change: (the model itself) ({NATURALSPEECH2}): {reason}"
        assert [str(warning.message) for warning in told] == ([shown] if reason else [])


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (COMPLEX, "its flash path ignores it"),
        ("iTransformer.attend.Attend", "its flash path ignores it"),
        ("denoising_diffusion_pytorch.attend.Attend", r"its flash path applies scale * d ** -1.5"),
    ],
)
def test_a_scale_that_the_flash_path_mistreats_is_applied_with_a_warning(path, told):
    def mistreats(attend, q, k, v, mask=None):
        factor = 1.0 if "ignores" in told else (attend.scale or q.shape[-1]) / q.shape[-1]
        if not attend.flash:
            return compute(attend, q, k, v, mask)
        attend.scale, scale = None, attend.scale
        try:
            return compute(attend, q * factor, k, v, mask)
        finally:
            attend.scale = scale

    compute = by_pair if path == COMPLEX else plain_attention
    model = nn.ModuleList([fake_known(path, mistreats, scale=0.5, flash=True)])
    model.append(copy.deepcopy(model[0]))
    expected = plain_attention(model[0].eval(), *inputs())
    with pytest.warns(UserWarning) as told_once:
        handle = patch(model, strict=True)
    reason = f"scale = 0.5 applies from now on: {told}"
    assert [str(warning.message) for warning in told_once] == [
        f"patch served with a change: 0 (+1 more) ({path}): {reason}"
    ]
    assert handle.outcomes[0].reason == reason
    assert_same(model[0](*inputs()), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(fake_known(path, mistreats, flash=True), strict=True)
        patch(fake_known(path, mistreats, scale=0.5), strict=True)


def test_an_attend_that_its_module_does_not_call_is_told():
    model = Holder(fake_known("bs_roformer.attend.Attend"))
    model.pope_embed = None
    assert patch(model, strict=True).outcomes[0].reason == ""
    model = Holder(fake_known("bs_roformer.attend.Attend"))
    model.pope_embed = nn.Identity()
    with pytest.warns(UserWarning, match="it is not called while the module that holds it has a pope_embed"):
        patch(model, strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Other rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def renamed() -> Iterator[type[nn.Module]]:
    """A class with another name, which holds something of its own and takes one argument more."""
    path = "another_package.layers.Renamed"
    kind = fake(path=path, options={"causal": False}, arguments=("mask", "rotary"))

    def __init__(self, causal: bool = False) -> None:
        nn.Module.__init__(self)
        self.causal = causal
        self.register_buffer("table", torch.ones(3), persistent=False)

    kind.__init__ = __init__
    yield kind
    KNOWN.pop(path, None)


def test_a_class_can_be_registered(renamed):
    with pytest.warns(UserWarning, match="found no Attend"):
        patch(Holder(renamed()))
    path, attend = "another_package.layers.Renamed", renamed(causal=True)
    row = KnownAttend(path, options={"causal"}, arguments=("mask", "rotary"))
    assert register(row) is row
    assert "it holds table" in refusal(attend)
    register(KnownAttend(path, options={"causal"}, arguments=("mask", "rotary"), attributes={"table"}))
    expected = attend(*inputs())
    handle = patch(attend, strict=True)
    assert_same(attend(*inputs()), expected)
    handle.restore()
    assert torch.equal(attend.table, torch.ones(3))  # which the original may go on to use
    assert torch.equal(attend(*inputs()), expected)


def test_registering_something_else_is_refused():
    with pytest.raises(TypeError, match="row must be a KnownAttend, got str"):
        register("some_package.attend.Attend")
