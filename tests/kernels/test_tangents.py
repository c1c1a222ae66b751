"""Out, LSE and their tangents from one kernel: every option, any set of tangents, and what must not show."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from flash_attend.checks import normalise_inputs
from flash_attend.kernels.configs import Tile, Tiles
from flash_attend.kernels.tangents import attention_tangents
from flash_attend.operands import Tangents
from flash_attend.segments import segments_of
from flash_attend.testing.budget import Budget
from flash_attend.testing.calls import LAYOUTS, Call, Case, budget_of, make_call, with_tangents
from flash_attend.testing.calls import push as push_by
from flash_attend.testing.oracle import Answer, attention_oracle
from flash_attend.testing.sequences import whole_call

DEVICES = (pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
on_every_device = pytest.mark.parametrize("device", DEVICES)
TILES = Tiles(Tile(32, 32, 4, 2, descriptors=True), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2))


def push(call: Call, tiles: Tiles = TILES) -> Answer:
    return push_by(call, "triton", lambda spec: tiles)


PLAIN = Case("plain", batch=1, heads=2, queries=37, keys=43, d=16, grads="none")
ALL = replace(
    PLAIN, name="everything", kv_heads=1, bias="1hij", window=(20, 9), softcap=1.5, alibi="h", mask="holes", sinks=True,
    dropout_p=0.25,
)  # fmt: skip
CASES = (
    (replace(PLAIN, name="padded causal", batch=2, kv_heads=1, dv=24, mask="pad_left", causal=True), torch.float16),
    (replace(PLAIN, name="dense", mask="bhij", scale=-0.3, dropout_p=0.2, grads="both"), torch.float32),
    (replace(PLAIN, name="two parts", d=40, dv=72, queries=50, keys=20, causal=True, heads=1), torch.float16),
    (replace(PLAIN, name="scale 0", scale=0.0, heads=1, bias="hiding", mask="bhij"), torch.float32),
    (replace(PLAIN, name="hidden by a bias", bias="hiding", sinks=True, bias_in_float32=True), torch.float16),
    (replace(PLAIN, name="no keys", keys=0, sinks=True), torch.float32),
    (ALL, torch.float32),
)


@on_every_device
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=[str(case) for case, _ in CASES])
def test_right(device: str, case: Case, dtype: torch.dtype) -> None:
    call = with_tangents(make_call(case, dtype, device))
    budget_of(call).check(push(call))


@on_every_device
def test_columns_of_v_apart(device: str) -> None:
    call = with_tangents(make_call(replace(PLAIN, heads=1, dv=40, sinks=True, layout="sliced"), torch.float32, device))
    budget_of(call).check(push(call, TILES._replace(forward=TILES.forward._replace(apart=True))))


@on_every_device
@pytest.mark.parametrize("names", (("q",), ("k",), ("v",), ("bias",), ("sinks",), ("k", "v")), ids="".join)
def test_any_set_of_tangents(device: str, names: tuple[str, ...]) -> None:
    case = replace(ALL, heads=1, kv_heads=None, dropout_p=0.0, keys=35)
    call = with_tangents(make_call(case, torch.float64, device), names)
    budget_of(call).check(push(call))


@on_every_device
def test_tangents_in_any_layout(device: str) -> None:
    call = with_tangents(make_call(replace(PLAIN, bias="1hij", sinks=True, causal=True), torch.float32, device))
    layouts = dict(q="sliced", k="broadcast_heads", v="interleaved", bias="transposed", sinks="contiguous")
    tangents = {name: LAYOUTS[layout](call.tangents[name]) for name, layout in layouts.items()}
    call = call.with_(tangents=tangents)
    budget_of(call).check(push(call))


@on_every_device
def test_what_takes_no_part_may_be_anything(device: str) -> None:
    """NaN in hidden keys, in dead queries, and where a bias hides: in operands, and in their tangents."""
    case = replace(PLAIN, mask="pad_left", causal=True, bias="hiding", bias_in_float32=True, batch=2)
    call = with_tangents(make_call(case, torch.float32, device))
    budget = budget_of(call)
    dead, unseen = ~budget.alive.unsqueeze(3), ~budget.pairs.any(2).unsqueeze(3)
    assert dead.any()
    assert unseen.any()
    silent = dict(q=dead, k=unseen, v=unseen, bias=call.bias == -torch.inf)
    tangents = {name: x.masked_fill(silent[name], torch.nan) for name, x in call.tangents.items()}
    operands = {name: getattr(call, name).masked_fill(silent[name], torch.nan) for name in "qkv"}
    budget.check(push(call.with_(tangents=tangents, **operands)))


@on_every_device
def test_packed_sequences(device: str) -> None:
    lengths = ((20, 33), (0, 5), (6, 0), (40, 11))
    case = replace(PLAIN, heads=2, kv_heads=1, queries=70, keys=52, causal=True)
    call = with_tangents(make_call(case, torch.float32, device))
    operands, spec = normalise_inputs(call.q, call.k, call.v, causal=True)
    places = [torch.tensor([*accumulate(n, initial=0)], device=device) for n in zip(*lengths, strict=True)]
    operands = operands._replace(segments=segments_of(*places, 70, 52))
    spec = replace(spec, sequences=len(lengths))
    out, lse, *tangents, _ = attention_tangents(operands, Tangents(**call.tangents), spec, TILES)
    whole = whole_call(lengths, call.q, call.k, causal=True)
    whole = dict(mask=whole["mask"], tangents=call.tangents)
    truth = attention_oracle(call.q, call.k, call.v, **whole)
    budget = Budget(truth, call.q, call.k, call.v, **whole)
    budget.check(Answer(out, lse, None, None, None, out_tangent=tangents[0], lse_tangent=tangents[1]))
