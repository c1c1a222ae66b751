"""Wrong arguments: an exception that names the argument, what came and what was expected, before anything runs."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attend import explain, flash_attention, functional

B, H, HK, QUERIES, KEYS, D, DV = 2, 4, 2, 5, 7, 8, 6


class NothingRuns(TorchDispatchMode):
    """Refuses every operator except views and questions: whatever allocates or launches something ends here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.is_view or func.namespace == "prim", f"{func} ran before the arguments were checked"
        return func(*args, **(kwargs or {}))


def _good() -> dict[str, Any]:
    return dict(
        q=torch.randn(B, H, QUERIES, D),
        k=torch.randn(B, HK, KEYS, D),
        v=torch.randn(B, HK, KEYS, DV),
        mask=torch.ones(B, KEYS, dtype=torch.bool),
    )


def _sparse(*shape: int) -> Tensor:
    return torch.zeros(shape).to_sparse()


def _nested() -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(3, H, D), torch.zeros(QUERIES, H, D)], layout=torch.jagged)


# name: (what to change in a good call, exception, what its message must contain)
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    # no tensors
    "q_list": (dict(q=[[1.0]]), TypeError, ("q must be a torch.Tensor", "list")),
    "k_none": (dict(k=None), TypeError, ("k must be a torch.Tensor", "NoneType")),
    "v_number": (dict(v=3.0), TypeError, ("v must be a torch.Tensor", "float")),
    "mask_list": (dict(mask=[True]), TypeError, ("mask must be a torch.Tensor", "list")),
    "mask_true": (dict(mask=True), TypeError, ("mask must be a torch.Tensor", "bool")),
    # rank
    "q_3d": (
        dict(q=torch.randn(B, QUERIES, D)),
        ValueError,
        ("q must be (b, h, i, d)", "3 dimensions", f"({B}, {QUERIES}, {D})"),
    ),
    "q_5d": (dict(q=torch.randn(1, B, H, QUERIES, D)), ValueError, ("q must be (b, h, i, d)", "5 dimensions")),
    "k_2d": (
        dict(k=torch.randn(KEYS, D)),
        ValueError,
        ("k must be (b, hk, j, d) or (b, j, d)", "2 dimensions", f"({KEYS}, {D})"),
    ),
    "k_5d": (dict(k=torch.randn(1, B, HK, KEYS, D)), ValueError, ("k must be", "5 dimensions")),
    "v_2d": (dict(v=torch.randn(KEYS, DV)), ValueError, ("v must be (b, hk, j, dv) or (b, j, dv)", "2 dimensions")),
    "v_0d": (dict(v=torch.tensor(1.0)), ValueError, ("v must be", "0 dimensions")),
    "mask_1d": (
        dict(mask=torch.ones(KEYS, dtype=torch.bool)),
        ValueError,
        ("mask must be (b, j)", "1 dimensions", f"({KEYS},)"),
    ),
    "mask_3d": (
        dict(mask=torch.ones(B, QUERIES, KEYS, dtype=torch.bool)),
        ValueError,
        ("mask must be (b, j)", "3 dimensions"),
    ),
    "mask_5d": (
        dict(mask=torch.ones(1, 1, 1, 1, KEYS, dtype=torch.bool)),
        ValueError,
        ("mask must be", "5 dimensions"),
    ),
    # dtype
    "q_int": (
        dict(q=torch.ones(B, H, QUERIES, D, dtype=torch.int64)),
        TypeError,
        ("q must be float16, bfloat16", "torch.int64"),
    ),
    "k_int": (dict(k=torch.ones(B, HK, KEYS, D, dtype=torch.int32)), TypeError, ("k must be float16", "torch.int32")),
    "v_bool": (dict(v=torch.ones(B, HK, KEYS, DV, dtype=torch.bool)), TypeError, ("v must be float16", "torch.bool")),
    "q_complex": (
        dict(q=torch.ones(B, H, QUERIES, D, dtype=torch.complex64)),
        TypeError,
        ("q must be", "torch.complex64", "view_as_real"),
    ),
    "v_complex": (
        dict(v=torch.ones(B, HK, KEYS, DV, dtype=torch.complex128)),
        TypeError,
        ("v must be", "torch.complex128", "view_as_real"),
    ),
    "q_float8": (
        dict(q=torch.ones(B, H, QUERIES, D).to(torch.float8_e4m3fn)),
        TypeError,
        ("q must be", "float8_e4m3fn"),
    ),
    "k_other_dtype": (
        dict(k=torch.randn(B, HK, KEYS, D).half()),
        TypeError,
        ("k must have q's dtype torch.float32", "torch.float16"),
    ),
    "v_other_dtype": (
        dict(v=torch.randn(B, HK, KEYS, DV).double()),
        TypeError,
        ("v must have q's dtype torch.float32", "float64"),
    ),
    "mask_float": (dict(mask=torch.ones(B, KEYS)), TypeError, ("mask must be bool", "torch.float32")),
    "mask_int": (dict(mask=torch.ones(B, KEYS, dtype=torch.int64)), TypeError, ("mask must be bool", "torch.int64")),
    "mask_uint8": (dict(mask=torch.ones(B, KEYS, dtype=torch.uint8)), TypeError, ("mask must be bool", "torch.uint8")),
    # layout
    "q_sparse": (dict(q=_sparse(B, H, QUERIES, D)), TypeError, ("q must be a dense strided tensor", "sparse_coo")),
    "v_sparse": (dict(v=_sparse(B, HK, KEYS, DV)), TypeError, ("v must be a dense strided tensor", "sparse_coo")),
    "q_nested": (dict(q=_nested()), TypeError, ("q must be a dense strided tensor",)),
    "mask_sparse": (
        dict(mask=torch.ones(B, KEYS, dtype=torch.bool).to_sparse()),
        TypeError,
        ("mask must be a dense strided tensor", "sparse_coo"),
    ),
    # device
    "k_device": (
        dict(k=torch.empty(B, HK, KEYS, D, device="meta")),
        ValueError,
        ("k must be on q's device cpu", "meta"),
    ),
    "v_device": (
        dict(v=torch.empty(B, HK, KEYS, DV, device="meta")),
        ValueError,
        ("v must be on q's device cpu", "meta"),
    ),
    "mask_device": (
        dict(mask=torch.empty(B, KEYS, dtype=torch.bool, device="meta")),
        ValueError,
        ("mask must be on q's device cpu", "meta"),
    ),
    "q_device": (
        dict(q=torch.empty(B, H, QUERIES, D, device="meta")),
        ValueError,
        ("k must be on q's device meta", "cpu"),
    ),
    # shape
    "k_batch": (
        dict(k=torch.randn(3, HK, KEYS, D)),
        ValueError,
        (f"k must have q's batch size {B}", f"(3, {HK}, {KEYS}, {D})"),
    ),
    "k_batch_1": (
        dict(k=torch.randn(1, HK, KEYS, D)),
        ValueError,
        (f"k must have q's batch size {B}", f"(1, {HK}, {KEYS}, {D})"),
    ),
    "v_batch": (dict(v=torch.randn(3, HK, KEYS, DV)), ValueError, (f"v must have q's batch size {B}", "(3, ")),
    "k_3d_batch": (
        dict(k=torch.randn(3, KEYS, D), v=torch.randn(3, KEYS, DV)),
        ValueError,
        ("k must have q's batch size",),
    ),
    "k_head_dim": (dict(k=torch.randn(B, HK, KEYS, D + 1)), ValueError, (f"d = {D}", f"({B}, {HK}, {KEYS}, {D + 1})")),
    "k_and_v_lengths": (
        dict(v=torch.randn(B, HK, KEYS + 2, DV)),
        ValueError,
        ("k and v", f"{KEYS} keys", f"{KEYS + 2} values"),
    ),
    "k_and_v_heads": (
        dict(v=torch.randn(B, H, KEYS, DV)),
        ValueError,
        ("k and v", "same number of heads", f"got {HK} and {H}"),
    ),
    "k_3d_v_4d": (dict(k=torch.randn(B, KEYS, D)), ValueError, ("k and v", "same number of heads", f"got 1 and {HK}")),
    "heads_do_not_divide": (
        dict(k=torch.randn(B, 3, KEYS, D), v=torch.randn(B, 3, KEYS, DV)),
        ValueError,
        ("k/v heads", f"q's {H} heads", "got 3"),
    ),
    "more_kv_heads": (
        dict(k=torch.randn(B, 8, KEYS, D), v=torch.randn(B, 8, KEYS, DV)),
        ValueError,
        ("k/v heads", f"q's {H} heads", "got 8"),
    ),
    "no_kv_heads": (
        dict(k=torch.randn(B, 0, KEYS, D), v=torch.randn(B, 0, KEYS, DV)),
        ValueError,
        ("k/v heads", f"q's {H} heads", "got 0"),
    ),
    "no_head_dim": (
        dict(q=torch.randn(B, H, QUERIES, 0), k=torch.randn(B, HK, KEYS, 0)),
        ValueError,
        ("d and dv must be at least 1", "d = 0"),
    ),
    "no_value_dim": (dict(v=torch.randn(B, HK, KEYS, 0)), ValueError, ("d and dv must be at least 1", "dv = 0")),
    "mask_transposed": (
        dict(mask=torch.ones(KEYS, B, dtype=torch.bool)),
        ValueError,
        (f"key padding (b, j) = ({B}, {KEYS})", f"({KEYS}, {B})"),
    ),
    "mask_i_by_j": (
        dict(mask=torch.ones(QUERIES, KEYS, dtype=torch.bool)),
        ValueError,
        (f"({B}, {KEYS})", f"({QUERIES}, {KEYS})", "mask[None, None]"),
    ),
    "mask_2d_does_not_broadcast": (
        dict(mask=torch.ones(1, KEYS, dtype=torch.bool)),
        ValueError,
        (f"({B}, {KEYS})", f"(1, {KEYS})"),
    ),
    "mask_batch": (
        dict(mask=torch.ones(3, 1, 1, KEYS, dtype=torch.bool)),
        ValueError,
        (f"({B}, {H}, {QUERIES}, {KEYS})", f"(3, 1, 1, {KEYS})", "b is 3"),
    ),
    "mask_kv_heads": (dict(mask=torch.ones(B, HK, 1, KEYS, dtype=torch.bool)), ValueError, ("mask", f"h is {HK}")),
    "mask_queries": (
        dict(mask=torch.ones(B, H, QUERIES + 1, KEYS, dtype=torch.bool)),
        ValueError,
        ("mask", f"i is {QUERIES + 1}"),
    ),
    "mask_keys": (
        dict(mask=torch.ones(B, H, QUERIES, KEYS - 1, dtype=torch.bool)),
        ValueError,
        ("mask", f"j is {KEYS - 1}"),
    ),
    "mask_empty": (dict(mask=torch.ones(B, H, QUERIES, 0, dtype=torch.bool)), ValueError, ("mask", "j is 0")),
    # options
    "dropout_one": (dict(dropout_p=1.0), ValueError, ("dropout_p must be in [0, 1)", "1.0")),
    "dropout_negative": (dict(dropout_p=-0.1), ValueError, ("dropout_p must be in [0, 1)", "-0.1")),
    "dropout_two": (dict(dropout_p=2), ValueError, ("dropout_p must be in [0, 1)", "2")),
    "dropout_nan": (dict(dropout_p=math.nan), ValueError, ("dropout_p must be finite", "nan")),
    "dropout_tensor": (dict(dropout_p=torch.tensor(0.1)), TypeError, ("dropout_p must be a Python number", "Tensor")),
    "dropout_text": (dict(dropout_p="0.1"), TypeError, ("dropout_p must be a Python number", "str")),
    "dropout_none": (dict(dropout_p=None), TypeError, ("dropout_p must be a Python number", "NoneType")),
    "dropout_bool": (dict(dropout_p=False), TypeError, ("dropout_p must be a Python number", "bool")),
    "scale_inf": (dict(scale=math.inf), ValueError, ("scale must be finite", "inf")),
    "scale_nan": (dict(scale=math.nan), ValueError, ("scale must be finite", "nan")),
    "scale_text": (dict(scale="1"), TypeError, ("scale must be a Python number", "str")),
    "scale_tensor": (dict(scale=torch.tensor(1.0)), TypeError, ("scale must be a Python number", "Tensor")),
    "scale_complex": (dict(scale=1j), TypeError, ("scale must be a Python number", "complex")),
    "causal_int": (dict(causal=1), TypeError, ("causal must be a bool", "int")),
    "causal_none": (dict(causal=None), TypeError, ("causal must be a bool", "NoneType")),
    "deterministic_text": (dict(deterministic="yes"), TypeError, ("deterministic must be a bool", "str")),
    "backend_unknown": (
        dict(backend="cudnn"),
        ValueError,
        ("backend must be one of", "'auto', 'hopper', 'triton', 'math'", "'cudnn'"),
    ),
    "backend_none": (dict(backend=None), ValueError, ("backend must be one of", "None")),
    "backend_list": (dict(backend=["math"]), ValueError, ("backend must be one of", "['math']")),
}


@pytest.mark.parametrize("function", (flash_attention, explain), ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name: str, function, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, exception, fragments = MISTAKES[name]
    arguments = {**_good(), **changes}
    for reached in ("attention_reference", "draw_seed"):
        monkeypatch.setattr(functional, reached, lambda *_, **__: pytest.fail("the call was served"))
    with NothingRuns(), pytest.raises(exception) as caught:
        function(**arguments)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, f"{message!r} does not say {fragment!r}"
    assert isinstance(caught.value, TypeError) == (exception is TypeError)


@pytest.mark.parametrize("name", ("q", "k"))
def test_lengths_beyond_what_the_kernels_count(name: str) -> None:
    """32-bit positions: a length near 2**31 is refused. The tensors are one element each, seen over and over."""
    arguments = _good()
    length = 2**31 - 1
    if name == "q":
        arguments["q"] = torch.zeros(1, 1, 1, 1).expand(B, H, length, D)
    else:
        arguments["k"] = torch.zeros(1, 1, 1, 1).expand(B, HK, length, D)
        arguments["v"] = torch.zeros(1, 1, 1, 1).expand(B, HK, length, DV)
        arguments["mask"] = None
    with NothingRuns(), pytest.raises(ValueError, match=rf"{name} is {length} long, the limit is \d+"):
        flash_attention(**arguments)


def test_the_good_call_is_good() -> None:
    """Everything above is one change away from a call that is served; `explain` runs nothing even then."""
    good = _good()
    assert flash_attention(**good).shape == (B, H, QUERIES, DV)
    with NothingRuns():
        explain(**good)
    with NothingRuns(), pytest.raises(AssertionError, match="ran before the arguments were checked"):
        flash_attention(**good)


def test_options_are_keyword_only() -> None:
    good = _good()
    with pytest.raises(TypeError, match=re.escape("positional argument")):
        flash_attention(good["q"], good["k"], good["v"], good["mask"])
