"""Wrong tensors: an exception that names the argument, what came and what was expected, before anything runs. Wrong
options are in test_options.py."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backends import BACKENDS, Backend
from flash_attend import Attend, explain, flash_attention
from nothing_runs import NothingRuns

B, H, HK, QUERIES, KEYS, D, DV = 2, 4, 2, 5, 7, 8, 6
GOOD = {
    "q": torch.randn(B, H, QUERIES, D),
    "k": torch.randn(B, HK, KEYS, D),
    "v": torch.randn(B, HK, KEYS, DV),
    "mask": torch.ones(B, KEYS, dtype=torch.bool),
}

# What a call may have beside them.
OTHERS = {
    "bias": torch.randn(H, QUERIES, KEYS),
    "alibi_slopes": torch.rand(B, H),
    "sinks": torch.randn(H),
}


def _bool(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def _kv(batch: int, *middle: int) -> dict[str, Tensor]:
    return {"k": torch.randn(batch, *middle, D), "v": torch.randn(batch, *middle, DV)}


# name: (what to change in a good call, what the message must contain)
VALUES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # rank
    "q_3d": (dict(q=torch.randn(B, 5, D)), ("q must be (b, h, i, d)", "3 dimensions", f"({B}, 5, {D})")),
    "q_5d": (dict(q=torch.randn(1, B, H, 5, D)), ("q must be (b, h, i, d)", "5 dimensions")),
    "k_2d": (dict(k=torch.randn(7, D)), ("k must be (b, hk, j, d) or (b, j, d)", "2 dimensions", f"(7, {D})")),
    "k_5d": (dict(k=torch.randn(1, B, HK, KEYS, D)), ("k must be", "5 dimensions")),
    "v_2d": (dict(v=torch.randn(KEYS, DV)), ("v must be (b, hk, j, dv) or (b, j, dv)", "2 dimensions")),
    "v_0d": (dict(v=torch.tensor(1.0)), ("v must be", "0 dimensions")),
    "mask_0d": (dict(mask=torch.tensor(True)), ("mask must be (b, j)", "0 dimensions")),
    "mask_1d": (dict(mask=_bool(KEYS)), ("mask must be (b, j)", "1 dimensions", f"({KEYS},)")),
    "mask_3d": (dict(mask=_bool(B, QUERIES, KEYS)), ("mask must be (b, j)", "3 dimensions")),
    "mask_5d": (dict(mask=_bool(1, 1, 1, 1, KEYS)), ("mask must be", "5 dimensions")),
    # device
    **{
        f"{name}_device": (
            {name: GOOD[name].to("meta")},
            ("k must be on q's device meta", "cpu") if name == "q" else (f"{name} must be on q's device cpu", "meta"),
        )
        for name in GOOD
    },
    # shape
    "k_batch": (dict(k=torch.randn(3, HK, 7, D)), (f"k must have q's batch size {B}", f"(3, {HK}, 7, {D})")),
    "k_batch_1": (dict(k=torch.randn(1, HK, 7, D)), (f"k must have q's batch size {B}", f"(1, {HK}, 7, {D})")),
    "v_batch": (dict(v=torch.randn(3, HK, KEYS, DV)), (f"v must have q's batch size {B}", "(3, ")),
    "k_3d_batch": (_kv(3, KEYS), ("k must have q's batch size",)),
    "k_head_dim": (dict(k=torch.randn(B, HK, 7, D + 1)), (f"d = {D}", f"({B}, {HK}, 7, {D + 1})")),
    "k_and_v_lengths": (dict(v=torch.randn(B, HK, 9, DV)), ("k and v", "7 keys", "9 values")),
    "k_and_v_heads": (dict(v=torch.randn(B, H, 7, DV)), ("k and v", "same number of heads", f"got {HK} and {H}")),
    "k_3d_v_4d": (dict(k=torch.randn(B, 7, D)), ("k and v", "same number of heads", f"got 1 and {HK}")),
    **{f"{heads}_kv_heads": (_kv(B, heads, 7), ("k/v heads", f"q's {H} heads", f"got {heads}")) for heads in (0, 3, 8)},
    "no_head_dim": (
        dict(q=torch.randn(B, H, 5, 0), k=torch.randn(B, HK, 7, 0)),
        ("d and dv must be at least 1", "d = 0"),
    ),
    "no_value_dim": (dict(v=torch.randn(B, HK, KEYS, 0)), ("d and dv must be at least 1", "dv = 0")),
    "mask_transposed": (dict(mask=_bool(KEYS, B)), (f"key padding (b, j) = ({B}, {KEYS})", f"({KEYS}, {B})")),
    "mask_i_by_j": (dict(mask=_bool(5, KEYS)), (f"({B}, {KEYS})", f"(5, {KEYS})", "mask[None, None]")),
    "mask_2d_does_not_broadcast": (dict(mask=_bool(1, KEYS)), (f"({B}, {KEYS})", f"(1, {KEYS})")),
    "mask_batch": (
        dict(mask=_bool(3, 1, 1, KEYS)),
        (f"({B}, {H}, {QUERIES}, {KEYS})", f"(3, 1, 1, {KEYS})", "b is 3"),
    ),
    "mask_kv_heads": (dict(mask=_bool(B, HK, 1, KEYS)), ("mask", f"h is {HK}")),
    "mask_queries": (dict(mask=_bool(B, H, QUERIES + 1, KEYS)), ("mask", f"i is {QUERIES + 1}")),
    "mask_keys": (dict(mask=_bool(B, H, QUERIES, KEYS - 1)), ("mask", f"j is {KEYS - 1}")),
    "mask_empty": (dict(mask=_bool(B, H, QUERIES, 0)), ("mask", "j is 0")),
    **{
        f"{name}_device": ({name: x.to("meta")}, (f"{name} must be on q's device cpu", "meta"))
        for name, x in OTHERS.items()
    },
    "bias_5d": (dict(bias=torch.zeros(1, 1, 1, 1, 1)), ("bias must broadcast to (b, h, i, j)", "5 dimensions")),
    "bias_heads": (dict(bias=torch.zeros(HK, 1, 1)), (f"({B}, {H}, {QUERIES}, {KEYS})", f"({HK}, 1, 1)", "h is 2")),
    "bias_keys": (dict(bias=torch.zeros(KEYS - 1)), ("bias (6,) does not broadcast", "j is 6")),
    "bias_queries": (dict(bias=torch.zeros(KEYS, KEYS)), ("bias", "i is 7")),
    "bias_batch": (dict(bias=torch.zeros(3, 1, 1, 1)), ("bias", "b is 3")),
    "slopes_heads": (
        dict(alibi_slopes=torch.zeros(HK)),
        ("alibi_slopes must be (h,) = (4,) or (b, h) = (2, 4)", "(2,)"),
    ),
    "slopes_batch": (dict(alibi_slopes=torch.zeros(3, H)), ("alibi_slopes must be", "got (3, 4)")),
    "slopes_3d": (dict(alibi_slopes=torch.zeros(B, H, 1)), ("alibi_slopes must be", "got (2, 4, 1)")),
    "slopes_gradient": (
        dict(alibi_slopes=torch.zeros(H, requires_grad=True)),
        ("alibi_slopes must not require a gradient",),
    ),
    "sinks_heads": (dict(sinks=torch.zeros(HK)), ("sinks must be (h,) = (4,)", "got (2,)")),
    "sinks_batch": (dict(sinks=torch.zeros(B, H)), ("sinks must be (h,) = (4,)", "got (2, 4)")),
    "sinks_0d": (dict(sinks=torch.zeros(())), ("sinks must be (h,) = (4,)", "got ()")),
}


class OwnTensor(Tensor):
    pass


def _kinds(name: str) -> dict[str, tuple[object, tuple[str, ...]]]:
    """What is no tensor of a kind that attention reads, in the place of a good one."""
    good = {**GOOD, **OTHERS}[name]
    dense = f"{name} must be a dense strided tensor"
    nested = [good[:1], good] if name in OTHERS else [good[0], good[1, ..., :3]]
    numbers = "mask must be bool" if name == "mask" else f"{name} must be float16, bfloat16"
    if name in OTHERS:
        numbers = f"{name} must have q's dtype torch."
    kinds: dict[str, tuple[object, tuple[str, ...]]] = {
        "list": ([[1.0]], (f"{name} must be a torch.Tensor", "list")),
        "number": (3.0, (f"{name} must be a torch.Tensor", "float 3.0")),
        "true": (True, (f"{name} must be a torch.Tensor", "bool True")),
        "array": (np.ones(good.shape), (f"{name} must be a torch.Tensor", "ndarray")),
        "shape": (good.shape, (f"{name} must be a torch.Tensor", "Size")),
        "uninitialized_parameter": (nn.UninitializedParameter(), (dense, "UninitializedParameter")),
        "uninitialized_buffer": (nn.UninitializedBuffer(), (dense, "UninitializedBuffer")),
        "sparse": (good.to_sparse(), (dense, "sparse_coo")),
        "sparse_rows": (torch.ones(2, 2, dtype=good.dtype).to_sparse_csr(), (dense, "sparse_csr")),
        "nested_strided": (torch.nested.nested_tensor(nested), (dense, "nested Tensor")),
        "nested_jagged": (torch.nested.nested_tensor(nested, layout=torch.jagged), (dense, "nested NestedTensor")),
        "mkldnn": (good.float().to_mkldnn(), (dense, "_mkldnn")),
        "quantized": (torch.quantize_per_tensor(good.float(), 0.1, 0, torch.quint8), (numbers, "torch.quint8")),
        **{str(x): (good.to(x), (numbers, str(x))) for x in (torch.int64, torch.uint8, torch.int32)},
        "torch.float8_e4m3fn": (good.float().to(torch.float8_e4m3fn), (numbers, "float8_e4m3fn")),
    }
    if name == "mask":
        return {**kinds, "float": (good.float(), (numbers, "torch.float32"))}
    if name in OTHERS:
        others = (torch.float16, torch.float64, torch.complex64, torch.bool)
        kinds |= {str(dtype): (good.to(dtype), (numbers, f", or float32, got {dtype}")) for dtype in others}
        few = ("number", "sparse", "torch.int64", "torch.float16")
        return kinds if name == "bias" else {kind: kinds[kind] for kind in few}
    kinds["none"] = (None, (f"{name} must be a torch.Tensor", "NoneType"))
    kinds["bool"] = (good.bool(), (numbers, "torch.bool"))
    for dtype in (torch.complex64, torch.complex128):
        kinds[str(dtype)] = (good.to(dtype), (f"{name} must be", str(dtype), "view_as_real", "complex_attention"))
    if name != "q":
        for dtype in (torch.float16, torch.float64):
            kinds[str(dtype)] = (good.to(dtype), (f"{name} must have q's dtype torch.float32", str(dtype)))
    return kinds


KINDS = {f"{name}_{kind}": ({name: x}, told) for name in (*GOOD, *OTHERS) for kind, (x, told) in _kinds(name).items()}
MISTAKES = [
    pytest.param(changes, error, told, id=name)
    for table, error in ((VALUES, ValueError), (KINDS, TypeError))
    for name, (changes, told) in table.items()
]


@pytest.mark.parametrize("function", (flash_attention, explain), ids=lambda f: f.__name__)
@pytest.mark.parametrize(("changes", "error", "told"), MISTAKES)
def test_mistake(changes: dict[str, Any], error: type[Exception], told: tuple[str, ...], function) -> None:
    with NothingRuns(), pytest.raises((TypeError, ValueError)) as caught:
        function(**{**GOOD, **changes})
    assert isinstance(caught.value, error)
    for fragment in told:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("backend", ("auto", "math", "triton"))
@pytest.mark.parametrize("name", [name for name in KINDS if not name.endswith(("float16", "float64", "fn"))])
def test_a_wrong_kind_under_autocast_and_from_attend(name: str, backend: str) -> None:
    """Whichever backend is asked for, and where dtypes that differ would be made one."""
    changes, told = KINDS[name]
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError) as caught:
        Attend(backend=backend)(**{**GOOD, **{name.replace("bias", "attn_bias"): x for name, x in changes.items()}})
    assert told[0] in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", (nn.Parameter, lambda x: x.as_subclass(OwnTensor), lambda x: x.requires_grad_()))
def test_tensors_of_every_class_are_read(backend: Backend, kind) -> None:
    good = {name: x.to(backend.device) for name, x in GOOD.items()}
    found = flash_attention(**{name: kind(good[name].clone()) for name in "qkv"}, mask=good["mask"])
    torch.testing.assert_close(found.detach().as_subclass(Tensor), flash_attention(**good))  # which another may serve


@pytest.mark.parametrize("name", ("q", "k"))
def test_lengths_beyond_what_the_kernels_count(name: str) -> None:
    """32-bit positions: a length near 2**31 is refused. The tensors are one element each, seen over and over."""
    one, length = torch.zeros(1, 1, 1, 1), 2**31 - 1
    long = {"q": one.expand(B, H, length, D)}
    if name == "k":
        long = {"k": one.expand(B, HK, length, D), "v": one.expand(B, HK, length, DV), "mask": None}
    with NothingRuns(), pytest.raises(ValueError, match=rf"{name} is {length} long, the limit is \d+"):
        flash_attention(**{**GOOD, **long})


def test_the_good_call_is_good() -> None:
    """Everything above is one change away from a call that is served; `explain` runs nothing even then."""
    assert flash_attention(**GOOD).shape == (B, H, QUERIES, DV)
    assert flash_attention(**GOOD, **OTHERS).shape == (B, H, QUERIES, DV)
    with NothingRuns():
        explain(**GOOD)
    with NothingRuns(), pytest.raises(AssertionError, match="ran before the arguments were checked"):
        flash_attention(**GOOD)


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError, match=re.escape("positional argument")):
        flash_attention(*GOOD.values())
