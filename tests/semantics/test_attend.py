"""`Attend`: both seeds' signatures, and one functional call."""

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


def test_takes_the_arguments_of_complex_valued_transformer():
    attend = Attend(dropout=0.1, causal=True, heads=8, scale=0.5, flash=True)
    assert (attend.dropout, attend.causal, attend.heads, attend.scale, attend.flash) == (0.1, True, 8, 0.5, True)


def test_takes_the_arguments_of_naturalspeech2_by_position():
    attend = Attend(0.1, True, False)
    assert (attend.dropout, attend.causal, attend.use_flash, attend.flash) == (0.1, True, False, False)


def test_takes_the_arguments_of_naturalspeech2_by_keyword():
    attend = Attend(causal=True, dropout=0.2, use_flash=True)
    assert (attend.dropout, attend.causal, attend.use_flash) == (0.2, True, True)


def test_defaults():
    attend = Attend()
    assert (attend.dropout, attend.causal, attend.scale, attend.flash) == (0.0, False, None, True)
    assert (attend.heads, attend.backend, attend.deterministic) == (None, "auto", None)
    assert attend.training


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
        ({"dropout": float("nan")}, ValueError, "dropout must be finite, got nan"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a Python number, got '0.1'"),
        ({"dropout": True}, TypeError, "dropout must be a Python number, got True"),
        ({"dropout": torch.tensor(0.1)}, TypeError, "dropout must be a Python number, got tensor"),
        ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
        ({"causal": None}, TypeError, "causal must be True or False, got None"),
        ({"flash": 1}, TypeError, "^flash must be True, False or None, got 1"),
        ({"use_flash": "yes"}, TypeError, "use_flash must be True, False or None, got 'yes'"),
        ({"flash": True, "use_flash": False}, ValueError, "got flash=True, use_flash=False"),
        ({"flash": False, "use_flash": True}, ValueError, "got flash=False, use_flash=True"),
        ({"heads": 8.0}, TypeError, "heads must be an integer or None, got 8.0"),
        ({"heads": True}, TypeError, "heads must be an integer or None, got True"),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ({"scale": "1"}, TypeError, "scale must be a Python number, got '1'"),
        ({"scale": nn.Parameter(torch.ones(()))}, TypeError, "scale must be a Python number, got Parameter"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of 'auto', .*, 'triton', 'math', got 'cudnn'"),
        ({"backend": None}, ValueError, "backend must be one of .*, got None"),
        ({"flash": False, "backend": "triton"}, ValueError, "flash=False .* backend='triton'"),
        ({"deterministic": 1}, TypeError, "deterministic must be True, False or None, got 1"),
    ],
)
def test_refuses_wrong_options(options, error, told):
    with pytest.raises(error, match=told):
        Attend(**options)


def test_agreeing_names_of_the_flag_are_allowed():
    assert Attend(flash=False, use_flash=False).flash is False
    assert Attend(flash=True, use_flash=True).flash is True


def test_options_after_the_third_go_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        Attend(0.0, False, None, True)


# ---------------------------------------------------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------------------------------------------------


def test_is_one_functional_call(calls):
    q, k, v = inputs()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    out = Attend(causal=True, scale=0.3, deterministic=True, backend="math")(q, k, v, mask)
    expected = flash_attention(q, k, v, mask=mask, causal=True, scale=0.3, backend="math")
    assert torch.equal(out, expected)
    assert len(calls) == 1
    assert calls[0]["mask"] is mask
    assert {name: calls[0][name] for name in ("causal", "scale", "dropout_p", "deterministic", "backend")} == {
        "causal": True,
        "scale": 0.3,
        "dropout_p": 0.0,
        "deterministic": True,
        "backend": "math",
    }


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
    assert calls[0] == {
        "mask": None,
        "causal": False,
        "scale": 2.0,
        "dropout_p": 0.25,
        "deterministic": False,
        "backend": "math",
    }
    attend.flash = None
    attend(*inputs())
    assert calls[1]["backend"] == "auto"


def test_assigning_a_wrong_dropout_is_refused():
    attend = Attend(0.5)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        attend.dropout = 1
    assert attend.dropout == 0.5


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


def test_drops_only_while_training():
    q, k, v = inputs()
    attend = Attend(0.5)
    full = Attend()(q, k, v)
    assert not torch.allclose(attend.train()(q, k, v), full)
    assert torch.equal(attend.eval()(q, k, v), full)


def test_seed_reproduces_the_dropout():
    q, k, v = inputs()
    attend = Attend(0.5).train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attend(q, k, v))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_code_that_walks_over_dropout_layers_reaches_it(calls):
    model = nn.Sequential(Attend(0.5)).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.25
            layer.train()  # dropout at inference, for Monte Carlo estimates
    model[0](*inputs())
    assert model[0].dropout == 0.25
    assert calls[0]["dropout_p"] == 0.25


# ---------------------------------------------------------------------------------------------------------------------
# What it shows
# ---------------------------------------------------------------------------------------------------------------------


def test_repr_shows_what_is_set():
    shown = repr(Attend(0.1, True, False, heads=4, scale=0.3, backend="math", deterministic=True))
    for part in ("causal=True", "heads=4", "scale=0.3", "flash=False", "backend='math'", "deterministic=True", "p=0.1"):
        assert part in shown
    assert "flash" not in repr(Attend())
    assert "scale" not in repr(Attend())


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


@pytest.mark.parametrize("wrong", [None, [1.0], 3])
def test_what_is_no_tensor_is_named(wrong):
    q, _, v = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"k must be a torch\.Tensor"):
        Attend()(q, wrong, v)
