"""`Attend`: both seeds' signatures, and one functional call. What its options may be is in test_options.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import flash_attend.attend
from flash_attend import Attend, BackendUnavailable, flash_attention


def inputs(heads: int = 4, kv_heads: int = 4, queries: int = 6, keys: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 16)
    return tuple(torch.randn(size, generator=generator) for size in sizes)


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The keyword arguments of every functional call that an Attend makes."""
    seen = []

    def record(q, k, v, **keywords):
        seen.append(keywords)
        return flash_attention(q, k, v, **keywords)

    monkeypatch.setattr(flash_attend.attend, "flash_attention", record)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# Construction
# ---------------------------------------------------------------------------------------------------------------------

UNSET = dict.fromkeys(("query_mask", "bias", "window", "softcap", "alibi_slopes", "sinks"))

OPTIONS = ("dropout", "causal", "flash", "use_flash", "heads", "scale", "backend", "deterministic")


@pytest.mark.parametrize(
    ("attend", "options"),
    [
        (Attend(), (0.0, False, True, True, None, None, "auto", None)),
        # complex-valued-transformer
        (Attend(dropout=0.1, causal=True, heads=8, scale=0.5), (0.1, True, True, True, 8, 0.5, "auto", None)),
        # naturalspeech2-pytorch
        (Attend(0.1, True, False), (0.1, True, False, False, None, None, "auto", None)),
        (Attend(causal=True, dropout=0.2, use_flash=True), (0.2, True, True, True, None, None, "auto", None)),
        # both names of the flag, where they agree
        (Attend(flash=False, use_flash=False), (0.0, False, False, False, None, None, "auto", None)),
        (Attend(flash=True, use_flash=True), (0.0, False, True, True, None, None, "auto", None)),
    ],
)
def test_takes_the_arguments_of_both(attend, options):
    assert tuple(getattr(attend, name) for name in OPTIONS) == options
    assert attend.training


def test_options_after_the_third_go_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        Attend(0.0, False, None, True)


def test_repr_shows_what_is_set():
    shown = repr(Attend(0.1, True, False, heads=4, scale=0.3, backend="math", deterministic=True))
    for part in ("causal=True", "heads=4", "scale=0.3", "flash=False", "backend='math'", "deterministic=True", "p=0.1"):
        assert part in shown
    assert "flash" not in repr(Attend())
    assert "scale" not in repr(Attend())


# ---------------------------------------------------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------------------------------------------------


def test_is_one_functional_call(calls):
    q, k, v = inputs()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    options = dict(causal=True, scale=0.3, deterministic=True, backend="math")
    out = Attend(**options)(q, k, v, mask)
    assert torch.equal(out, flash_attention(q, k, v, mask=mask, causal=True, scale=0.3, backend="math"))
    assert calls == [{**UNSET, "mask": mask, "dropout_p": 0.0, **options}]
    assert calls[0]["mask"] is mask


def test_what_changes_scores_reaches_the_call(calls):
    q, k, v = inputs()
    given = dict(attn_bias=torch.randn(4, 6, 6), alibi_slopes=torch.rand(4), sinks=torch.randn(4))
    attend = Attend(window=(3, 2), softcap=5)
    out = attend(q, k, v, None, **given)
    assert calls[0]["bias"] is given["attn_bias"]
    bias, *rest = given.values()
    assert torch.equal(
        out,
        flash_attention(
            q, k, v, bias=bias, window=(3, 2), softcap=5.0, **dict(zip(("alibi_slopes", "sinks"), rest, strict=True))
        ),
    )
    assert "window=(3, 2), softcap=5.0" in repr(attend)
    assert torch.equal(attend(q, k, v, None, bias), Attend(window=[3, 2], softcap=5.0)(q, k, v, attn_bias=bias))
    attend.window = attend.softcap = None
    assert torch.equal(attend(q, k, v), Attend()(q, k, v))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(attn_bias=torch.zeros(3, 6, 6)), r"^attn_bias \(3, 6, 6\) does not broadcast to .*: h is 3"),
        (dict(attn_bias=0.0), "^attn_bias must be a torch.Tensor, got float 0.0"),
        (dict(sinks=torch.zeros(3)), r"^sinks must be \(h,\) = \(4,\), got \(3,\)"),
        (dict(alibi_slopes=torch.zeros(4, 2)), r"^alibi_slopes must be \(h,\) = \(4,\) or"),
    ],
)
def test_errors_name_the_argument(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Attend()(*inputs(), **wrong)


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({}, "auto"),
        ({"flash": True}, "auto"),
        ({"use_flash": True, "backend": "math"}, "math"),
        ({"flash": False}, "math"),
    ],
)
def test_flag_chooses_the_backend(calls, options, backend):
    Attend(**options)(*inputs())
    assert calls[0]["backend"] == backend


def test_a_backend_asked_for_by_name_never_falls_back():
    with pytest.raises(BackendUnavailable, match="'triton' cannot serve"):
        Attend(backend="triton")(*inputs())


def test_options_are_live(calls):
    attend = Attend(0.5, causal=True).train()
    attend.dropout, attend.causal, attend.scale, attend.deterministic = 0.25, False, 2.0, False
    attend.use_flash = False
    attend(*inputs())
    options = {"causal": False, "scale": 2.0, "dropout_p": 0.25, "deterministic": False}
    assert calls == [{**UNSET, "mask": None, **options, "backend": "math"}]
    attend.flash = None
    attend(*inputs())
    assert calls[1]["backend"] == "auto"


@pytest.mark.parametrize("kv", ["(b, j, d)", "(b, 2, j, d)"])
def test_shared_and_grouped_heads(kv):
    q, k, v = inputs(kv_heads=2)
    if kv == "(b, j, d)":
        k, v = k[:, 0], v[:, 0]
        repeated = (x[:, None].expand(-1, 4, -1, -1) for x in (k, v))
    else:
        repeated = (x.repeat_interleave(2, dim=1) for x in (k, v))
    torch.testing.assert_close(Attend()(q, k, v), Attend()(q, *repeated), rtol=0, atol=1e-6)


def test_heads_is_accepted_and_unused():
    q, k, v = inputs(heads=4)
    assert torch.equal(Attend(heads=8)(q, k, v), Attend()(q, k, v))


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------


def test_drops_only_while_training_as_the_seed_has_it():
    q, k, v = inputs()
    attend = Attend(0.5).train()
    full = Attend()(q, k, v)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attend(q, k, v))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.allclose(outs[0], full)
    assert torch.equal(attend.eval()(q, k, v), full)


def test_code_that_walks_over_dropout_layers_reaches_it(calls):
    model = nn.Sequential(Attend(0.5)).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.25
            layer.train()  # dropout at inference, for Monte Carlo estimates
    model[0](*inputs())
    assert model[0].dropout == calls[0]["dropout_p"] == 0.25


# ---------------------------------------------------------------------------------------------------------------------
# Autocast
# ---------------------------------------------------------------------------------------------------------------------


def test_autocast_casts_as_it_does_for_torch():
    q, k, v = inputs()
    v = v[..., :8].bfloat16()  # a model that normalises q and k leaves them in float32 beside this
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = Attend()(q, k, v)
        theirs = nn.functional.scaled_dot_product_attention(q, k, v)
    assert out.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(out, Attend()(q.bfloat16(), k.bfloat16(), v))


def test_autocast_leaves_float64_alone():
    q, k, v = (x.double() for x in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = Attend()(q, k, v)
    assert torch.equal(out, Attend()(q, k, v))


def test_without_autocast_mixed_dtypes_are_an_error():
    q, k, v = inputs()
    with pytest.raises(TypeError, match="v must have q's dtype"):
        Attend()(q, k, v.bfloat16())
