"""The kernels for Hopper from outside: which of them a call launches, and what they compute on a GPU.

What is compiled of them is executed in `tests/ptx`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from flash_attend import BackendUnavailable
from flash_attend.backends import BackwardName
from flash_attend.checks import normalise_inputs
from flash_attend.dispatch import choose
from flash_attend.kernels.aot import PARTS
from flash_attend.kernels.configs import select_hopper_tiles
from flash_attend.kernels.hopper.forward import attention_forward
from flash_attend.kernels.launch import Launch, recorded_launches
from flash_attend.operands import Operands
from flash_attend.ops import FORWARD, options_of
from flash_attend.target import DeviceTarget
from flash_attend.testing.calls import Call, Case, check, make_call, run

H100 = PARTS["sm_90"]
BACKWARDS: tuple[BackwardName, ...] = ("fused", "separate")
# For the kernels that go over keys, and for those that go over queries.
CASES = (
    Case("plain", 1, 2, queries=256, keys=384, d=128),
    Case("ragged", 2, 2, queries=130, keys=200, d=128),
    Case("one_block", 1, 2, queries=5, keys=7, d=64),
    Case("one_query", 1, 2, queries=1, keys=300, d=128, causal=True),
    Case("causal", 2, 2, queries=300, keys=300, d=64, causal=True),
    Case("causal_more_keys", 1, 3, queries=200, keys=450, d=128, causal=True),
    Case("causal_dead_rows", 1, 2, queries=450, keys=200, d=64, causal=True),
    Case("grouped", 2, 6, 2, queries=140, keys=260, d=64),
    Case("one_kv_head", 2, 3, 0, queries=140, keys=260, d=128, causal=True),
    Case("pad_right", 3, 2, queries=200, keys=700, d=64, mask="pad_right"),
    Case("pad_left", 3, 2, 1, queries=300, keys=500, d=128, mask="pad_left", causal=True),
    Case("pad_right_causal", 2, 2, queries=420, keys=420, d=64, mask="pad_right", causal=True),
    Case("holes", 2, 2, queries=140, keys=500, d=128, mask="holes"),
    Case("holes_causal", 2, 2, queries=300, keys=200, d=64, mask="holes", causal=True),
    Case("dead_batch", 2, 2, queries=140, keys=300, d=64, mask="dead_batch"),
    Case("all_hidden", 1, 2, queries=40, keys=300, d=64, mask="all_hidden", causal=True),
    Case("all_visible", 1, 2, queries=140, keys=300, d=64, mask="all_visible"),
    Case("mask_per_head", 2, 2, queries=140, keys=300, d=64, mask="bh1j"),
    Case("mask_of_heads", 2, 2, queries=140, keys=300, d=64, mask="1h1j", causal=True),
    Case("wide", 1, 2, queries=200, keys=200, d=256),
    Case("wide_causal_holes", 2, 2, queries=200, keys=300, d=256, mask="holes", causal=True),
    Case("negative_scale", 1, 2, queries=140, keys=300, d=64, scale=-0.2, causal=True),
    Case("scale_0", 1, 2, queries=140, keys=300, d=64, scale=0.0, causal=True),
    Case("heads_inside", 2, 2, queries=140, keys=300, d=64, layout="heads_inside"),
    Case("odd_strides", 2, 2, queries=140, keys=300, d=64, layout="sliced"),
    Case("broadcast_heads", 2, 2, queries=140, keys=300, d=64, layout="broadcast_heads"),
    Case("strided_last_dimension", 1, 2, queries=140, keys=300, d=64, layout="interleaved"),
    Case("window", 1, 2, queries=500, keys=500, d=64, window=(100, 30)),
    Case("window_causal_sinks", 2, 4, 2, queries=500, keys=600, d=128, window=(100, None), causal=True, sinks=True),
    Case("window_holes", 2, 2, queries=300, keys=500, d=64, window=(4, 3), mask="holes"),
    Case("window_pad_left_causal", 3, 2, queries=300, keys=300, d=128, window=(40, None), mask="pad_left", causal=True),
    Case("window_left_alone", 1, 2, queries=130, keys=600, d=256, window=(60, None)),
    Case("window_right_alone", 1, 2, queries=600, keys=130, d=64, window=(None, 60), mask="pad_right"),
    Case("window_of_one", 1, 1, queries=300, keys=280, d=128, window=(0, 0), mask="holes"),
    Case("sinks_dead_batch", 2, 2, queries=140, keys=300, d=64, mask="dead_batch", sinks=True, bias_in_float32=True),
)
KEY_CASES = (
    Case("plain", 1, 2, queries=256, keys=256, d=128),
    Case("ragged", 2, 1, queries=130, keys=200, d=128),
    Case("ragged_64", 1, 2, queries=200, keys=130, d=64),
    Case("one_block", 1, 2, queries=5, keys=7, d=64),
    Case("one_query", 1, 2, queries=1, keys=300, d=128, causal=True),
    Case("causal", 1, 2, queries=300, keys=300, d=64, causal=True),
    Case("causal_more_keys", 1, 2, queries=200, keys=350, d=128, causal=True),
    Case("causal_dead_rows", 1, 1, queries=450, keys=200, d=64, causal=True),
    Case("causal_dead_blocks", 1, 1, queries=330, keys=100, d=128, causal=True),
    Case("grouped", 2, 6, 2, queries=140, keys=140, d=64),
    Case("grouped_causal", 1, 4, 2, queries=200, keys=140, d=128, causal=True),
    Case("one_kv_head", 1, 3, 0, queries=140, keys=260, d=128, causal=True),
    Case("pad_right", 2, 1, queries=200, keys=500, d=64, mask="pad_right"),
    Case("pad_left", 2, 2, 1, queries=200, keys=300, d=128, mask="pad_left", causal=True),
    Case("pad_right_causal", 2, 1, queries=320, keys=320, d=64, mask="pad_right", causal=True),
    Case("pad_left_more_queries", 2, 1, queries=250, keys=200, d=64, mask="pad_left", causal=True),
    Case("holes", 2, 1, queries=140, keys=400, d=128, mask="holes"),
    Case("holes_causal", 2, 1, queries=300, keys=200, d=64, mask="holes", causal=True),
    Case("dead_batch", 2, 2, queries=140, keys=200, d=64, mask="dead_batch"),
    Case("all_hidden", 1, 2, queries=40, keys=300, d=64, mask="all_hidden", causal=True),
    Case("all_visible", 1, 2, queries=140, keys=200, d=64, mask="all_visible"),
    Case("mask_per_head", 2, 2, queries=140, keys=200, d=64, mask="bh1j"),
    Case("mask_of_heads", 2, 2, queries=140, keys=200, d=64, mask="1h1j", causal=True),
    Case("negative_scale", 1, 2, queries=140, keys=200, d=64, scale=-0.2, causal=True),
    Case("negative_scale_ragged", 1, 1, queries=140, keys=200, d=128, scale=-2.0),
    Case("scale_0", 1, 2, queries=140, keys=200, d=64, scale=0.0, causal=True),
    Case("scale_large", 1, 1, queries=140, keys=200, d=64, scale=4.0, mask="pad_right"),
    Case("only_out", 1, 1, queries=140, keys=140, d=64, grads="out"),
    Case("only_lse", 1, 1, queries=140, keys=140, d=64, grads="lse"),
    Case("heads_inside", 2, 2, queries=140, keys=140, d=64, layout="heads_inside"),
    Case("odd_strides", 1, 2, queries=140, keys=140, d=64, layout="sliced", grad_layout="interleaved"),
    Case("broadcast_heads", 1, 2, queries=140, keys=140, d=64, layout="broadcast_heads", grad_layout="broadcast_last"),
    Case("wide", 1, 1, queries=100, keys=70, d=256),
    Case("wide_causal_grouped", 1, 4, 2, queries=140, keys=150, d=256, causal=True),
    Case("wide_more_queries", 1, 1, queries=200, keys=70, d=256, causal=True),
    Case("wide_pad_left_causal", 2, 1, queries=100, keys=200, d=256, mask="pad_left", causal=True),
    Case("wide_holes_grouped", 2, 2, 1, queries=100, keys=150, d=256, mask="holes"),
    Case("wide_dead_batch", 2, 1, queries=70, keys=100, d=256, mask="dead_batch"),
    Case("wide_mask_per_head", 2, 2, queries=70, keys=100, d=256, mask="bh1j"),
    Case("wide_negative_scale", 1, 1, queries=140, keys=100, d=256, scale=-0.2, causal=True),
    Case("wide_scale_0", 1, 1, queries=100, keys=70, d=256, scale=0.0, causal=True),
)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", (*CASES, *KEY_CASES), ids=str)
def test_right_on_a_gpu(case: Case, dtype: torch.dtype, backward: BackwardName) -> None:
    call = make_call(case, dtype, "cuda")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("reason: the kernels are for sm_90, and the GPU is another one")
    check(run(call, "hopper", backward=backward), call)


# Launches


@contextmanager
def on_h100(part: DeviceTarget = H100) -> Iterator[list[Launch]]:
    """Within this context every tensor is on that part, as far as the package asks, and launches are collected."""
    with mock.patch.object(DeviceTarget, "of", staticmethod(lambda device: part)), recorded_launches() as launches:
        yield launches


def launched(call: Call, backward: BackwardName, needs: str = "qkv") -> list[str]:
    with on_h100() as launches:
        answer = run(call, "hopper", needs, backward=backward)
    assert [name for name in "qkv" if getattr(answer, f"d{name}") is not None] == list(needs)
    return [launch.prepared.kernel.__name__.removesuffix("_kernel") for launch in launches]


def test_which_kernels_a_public_call_runs() -> None:
    call = make_call(Case("public", 1, 2, queries=140, keys=300, d=64, mask="pad_right", causal=True), torch.float16)
    wide = make_call(Case("public", 1, 2, queries=140, keys=300, d=256), torch.float16)
    before = ["hopper_forward", "delta"]
    assert launched(call, "fused") == ["key_schedule", *before, "hopper_backward"]
    assert launched(call, "separate") == ["key_schedule", *before, "hopper_backward", "hopper_backward_q"]
    assert launched(wide, "fused") == [*before, "hopper_backward_wide"]
    assert launched(wide, "separate") == [*before, "hopper_backward_wide", "hopper_backward_q"]
    for backward in BACKWARDS:
        assert launched(wide, backward, "q") == [*before, "hopper_backward_q"]
        assert launched(wide, backward, "k") == [*before, "hopper_backward_wide"]
        assert launched(call, backward, "kv")[-1] == "hopper_backward"


@pytest.mark.parametrize("multiprocessors", (1, 3, 132))
def test_persistent_programs_are_as_many_as_have_room(multiprocessors: int) -> None:
    call = make_call(Case("tiles", 2, 4, 2, queries=300, keys=140, d=64, causal=True), torch.bfloat16)
    with on_h100(replace(H100, multiprocessors=multiprocessors)) as launches:
        run(call, "hopper", "")
    (forward,) = launches
    assert forward.prepared.programs == min(multiprocessors, 2 * 4 * 3)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("sizes", ((0, 2, 5), (2, 0, 5), (2, 2, 0)))
def test_nothing_is_launched_for_nothing(sizes: tuple[int, int, int], backward: BackwardName) -> None:
    batch, heads, queries = sizes
    call = make_call(Case("empty", batch, heads, queries=queries, keys=7, d=64), torch.bfloat16)
    with on_h100() as launches:
        answer = run(call, "hopper", backward=backward)
    assert not launches
    assert answer.out.shape == answer.dq.shape == call.q.shape
    assert not answer.dk.any()
    assert not answer.dv.any()


def test_as_an_operator_it_is_the_same_launch() -> None:
    call = make_call(Case("operator", 1, 2, queries=140, keys=300, d=64, mask="pad_right"), torch.float16)
    operands, spec = normalise_inputs(call.q, call.k, call.v, **call.options)
    tensors = operands[:4]
    tensors, tiles = Operands(*tensors, seed=None), select_hopper_tiles(spec, H100)
    with on_h100() as launches:
        numbers, options = options_of(tensors, spec, choose(spec, H100, "hopper"), return_lse=True)
        FORWARD([x for x in tensors if x is not None], numbers, options)
        attention_forward(tensors, spec, tiles)
    as_operator, directly = (launch.prepared for launch in launches if "forward" in launch.prepared.kernel.__name__)
    assert as_operator is directly


def test_a_call_that_it_cannot_serve_is_refused_with_the_reason() -> None:
    call = make_call(Case("refused", 1, 2, queries=14, keys=30, d=80), torch.float16)
    with on_h100(), pytest.raises(BackendUnavailable, match="d = 80 and dv = 80 are not the same one of 64, 128, 256"):
        run(call, "hopper")
