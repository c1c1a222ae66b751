"""Forward mode by the einsum path, a chunk at a time, beside torch's own derivatives of the whole; and its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flash_attend import reference
from flash_attend.checks import normalise_inputs
from flash_attend.operands import Operands, Tangents
from flash_attend.reference import attention_reference
from flash_attend.spec import AttentionSpec
from flash_attend.tangents import attend_tangents, attend_tangents_gradients
from flash_attend.testing.calls import Case, make_call

SMALL = dict(batch=2, heads=4, kv_heads=2, queries=7, keys=9, d=3, dv=5)
EVERYTHING = Case(
    "everything", **SMALL, mask="bh1j", bias="hiding", window=(3, 2), softcap=1.1, alibi="bh", sinks=True, dropout_p=0.3
)
CASES = (
    Case("causal_dead_rows", **{**SMALL, "queries": 9, "keys": 6}, causal=True, scale=-0.7),
    Case("padded_causal", **SMALL, mask="pad_left", causal=True),
    Case("dense_dropout", **SMALL, mask="bhij", dropout_p=0.4),
    Case("dead_batch_softcap_of_one_bias", **SMALL, mask="dead_batch", softcap=2.0, bias="1111"),
    Case("keys_of_each_head_bias_of_keys_sinks", **SMALL, mask="1h1j", causal=True, bias="1h1j", sinks=True),
    EVERYTHING,
)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(params=("whole", "chunks"))
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "chunks":  # of three queries
        monkeypatch.setattr(reference, "CACHED_SCORES", 1)
        monkeypatch.setattr(reference, "FEWEST_QUERIES", 3)


def operands_of(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Operands, AttentionSpec]:
    call = make_call(case, dtype)
    others = dict(bias=call.bias, window=call.window, softcap=call.softcap, sinks=call.sinks)
    options = dict(mask=call.mask, causal=call.causal, scale=call.scale, dropout_p=call.dropout_p, **others)
    operands, spec = normalise_inputs(call.q, call.k, call.v, alibi_slopes=call.alibi_slopes, **options)
    return operands._replace(seed=torch.tensor([2**35 + 11])), spec


def inputs_of(operands: Operands) -> dict[str, Tensor]:
    return {name: x for name in Tangents._fields if (x := getattr(operands, name)) is not None}


def of_torch(operands: Operands, tangents: Tangents, spec: AttentionSpec) -> tuple[Tensor, ...]:
    """The same by torch's forward mode, through every operator of the einsum path."""
    moved = {name: x for name, x in tangents._asdict().items() if x is not None}

    def attend(moved: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out, lse = attention_reference(operands._replace(**moved), spec, return_lse=True)
        return out, lse

    (out, lse), (of_out, of_lse) = torch.func.jvp(
        attend, ({name: getattr(operands, name) for name in moved},), (moved,)
    )
    return out, lse, of_out, of_lse.masked_fill(lse.isneginf(), 0.0)


def check(operands: Operands, tangents: dict[str, Tensor], spec: AttentionSpec) -> None:
    """Results, and the gradients of a loss on any of them, by the operands and by the tangents."""
    given = {name: x.clone().requires_grad_() for name, x in inputs_of(operands).items()}
    moved = {name: x.clone().requires_grad_() for name, x in tangents.items()}
    want = of_torch(operands._replace(**given), Tangents(**moved), spec)
    got = attend_tangents(operands, Tangents(**tangents), spec)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    dead = got[1].isneginf()
    assert not (got[2][dead].any() or got[3][dead].any())

    grads = [torch.randn_like(x).masked_fill(x.isinf(), 0.0) for x in got]
    leaves = {**given, **{f"{name}_tangent": x for name, x in moved.items()}}
    names = [*Tangents._fields, *(f"{name}_tangent" for name in Tangents._fields)]
    for missing in ((), (0, 1), (2, 3), (1, 2)):
        present = [None if number in missing else grad for number, grad in enumerate(grads)]
        whole = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(got, present, strict=True)]
        expected = torch.autograd.grad(want, leaves.values(), whole, retain_graph=True)
        found = attend_tangents_gradients(*present, operands, Tangents(**tangents), spec)
        by_name = {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}
        torch.testing.assert_close(by_name, dict(zip(leaves, expected, strict=True)), rtol=1e-11, atol=1e-12)


@each_case
def test_everything_moves(case: Case, regime: None) -> None:
    operands, spec = operands_of(case)
    check(operands, {name: torch.randn_like(x) for name, x in inputs_of(operands).items()}, spec)


@pytest.mark.parametrize("name", Tangents._fields)
def test_one_operand_moves(name: str, regime: None) -> None:
    operands, spec = operands_of(EVERYTHING)
    check(operands, {name: torch.randn_like(getattr(operands, name))}, spec)


def test_what_is_hidden_stays_out(regime: None) -> None:
    """NaN in a key that nobody sees, in queries that see none and in what is added to hidden pairs; a key that some see
    shows in those alone."""
    operands, spec = operands_of(Case("x", **SMALL, mask="bhij", bias="bhij", sinks=True))
    tangents = Tangents(**{name: torch.randn_like(x) for name, x in inputs_of(operands).items()})
    visible = operands.mask.clone()
    visible[..., 4] = False
    operands = operands._replace(mask=visible)
    clean = attend_tangents(operands, tangents, spec)
    grads = [torch.randn_like(x) for x in clean]
    clean_gradients = attend_tangents_gradients(*grads, operands, tangents, spec)

    dead = ~visible.any(dim=3, keepdim=True)
    assert dead.any()

    def spoil(x: Operands | Tangents, key: int) -> Operands | Tangents:
        k, v = x.k.clone(), x.v.clone()
        k[:, :, key] = v[:, :, key] = torch.nan
        return x._replace(q=x.q.masked_fill(dead, torch.nan), k=k, v=v)

    unread = spoil(operands, 4), spoil(tangents, 4)._replace(bias=tangents.bias.masked_fill(~visible, torch.nan))
    for got, want in zip(attend_tangents(*unread, spec), clean, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    for got, want in zip(attend_tangents_gradients(*grads, *unread, spec), clean_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)

    seen = visible[..., 6]
    assert seen.any() and not seen.all()
    for got, want in zip(attend_tangents(operands, spoil(tangents, 6), spec)[2:], clean[2:], strict=True):
        assert got[seen].isnan().all()
        torch.testing.assert_close(got[~seen], want[~seen], rtol=1e-12, atol=1e-13)


MEMORY = """
import sys
import torch
from flash_attend import reference
from flash_attend.checks import normalise_inputs
from flash_attend.operands import Tangents
from flash_attend.tangents import attend_tangents, attend_tangents_gradients

reference.CACHED_SCORES //= 4

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

def run(length):
    q, k, v, *tangents = (torch.randn(1, 1, length, 32) for _ in range(6))
    mask = torch.arange(length)[None] < length - 5
    call = normalise_inputs(q, k, v, mask=mask, causal=True)
    results = attend_tangents(call[0], Tangents(*tangents), call[1])
    grads = attend_tangents_gradients(*results, call[0], Tangents(*tangents), call[1])
    return q, k, v, *tangents, *results, *grads

run(1024)  # thread pools, and libraries that load when they are needed
before = status("VmRSS")
own = sum(tensor.untyped_storage().nbytes() for tensor in run(int(sys.argv[1])) if tensor is not None)
print(status("VmHWM") - before - own)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from Linux's /proc")
def test_a_process_needs_no_array_of_all_scores() -> None:
    """The scores of 4096 x 4096 are 64 MB an array, of which torch holds five in forward mode, nine with a loss on a
    tangent. Beyond inputs and outputs, forward and backward."""
    run = subprocess.run([sys.executable, "-c", MEMORY, "4096"], check=True, capture_output=True, text=True)
    assert int(run.stdout) < 0.125 * 2**30
