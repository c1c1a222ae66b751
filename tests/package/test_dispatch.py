"""Which backend serves and why, from descriptions alone: no GPU, no tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flash_attend.dispatch import BACKENDS, UNMEASURED, BackendUnavailable, Plan, Verdict, choose, judge
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.validation import FASTER, VALIDATED, Calls, Measurement, Validation

ROOT = Path(__file__).resolve().parents[2]
SPEC = AttentionSpec(
    batch=2, heads=8, kv_heads=2, queries=100, keys=120, head_dim=64, value_dim=64, dtype=torch.float16, scale=0.125
)
H100 = DeviceTarget("cuda", "NVIDIA H100", (9, 0), shared_memory=232448, multiprocessors=132, triton="3.7.1")
CPU = DeviceTarget("cpu", triton="3.7.1")
INTERPRETER = replace(CPU, interpreted=True)

RUN = dict(gpu="NVIDIA H100", torch="2.13.0", triton="3.7.1", date="2026-01-31", commit="abc", results="results.json")
ROW = Validation(**RUN)
PROVEN = {("triton", arch): ROW for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")}
ALL_PROVEN = PROVEN | {(backend, "sm_90"): ROW for backend in ("hopper_fused", "hopper", "triton_fused")}


def faster(*backends: str, arch: str = "sm_90", **calls) -> dict[tuple[str, str], Measurement]:
    """A table in which backends were faster in calls like SPEC, but for what is changed."""
    row = Measurement(**RUN, calls=(Calls(**dict(kind="half", head_dim=64, value_dim=64, mask=MaskKind.NONE) | calls),))
    return {(backend, arch): row for backend in backends}


def verdict_of(backend: str, *asked, **tables) -> Verdict:
    return next(verdict for verdict in judge(*asked, **tables) if verdict.backend == backend)


REFUSALS = {
    "no_triton": (SPEC, replace(H100, triton=None), "Triton is not installed"),
    "no_triton_on_a_cpu": (SPEC, replace(CPU, triton=None), "Triton is not installed"),
    "old_triton": (SPEC, replace(H100, triton="3.5.1"), "Triton 3.5.1 is older than 3.6"),
    "very_old_triton": (SPEC, replace(H100, triton="2.3.0"), "Triton 2.3.0 is older than 3.6"),
    "old_triton_by_a_digit_more": (SPEC, replace(H100, triton="3.5.10"), "Triton 3.5.10 is older than 3.6"),
    "head_dim": (replace(SPEC, head_dim=320), H100, "d = 320 is beyond the kernels' 256"),
    "value_dim": (replace(SPEC, value_dim=257), H100, "dv = 257 is beyond the kernels' 256"),
    "head_dim_interpreted": (replace(SPEC, head_dim=257), INTERPRETER, "d = 257 is beyond the kernels' 256"),
    "sm_70": (SPEC, replace(H100, capability=(7, 0)), "compute capability 7.0 is below 8.0"),
    "sm_75": (SPEC, replace(H100, capability=(7, 5)), "compute capability 7.5 is below 8.0"),
    "sm_61": (SPEC, replace(H100, capability=(6, 1)), "compute capability 6.1 is below 8.0"),
    "cpu": (SPEC, CPU, "cpu tensors; the kernels need a CUDA device"),
    "mps": (SPEC, DeviceTarget("mps", triton="3.7.1"), "mps tensors; the kernels need a CUDA device"),
    "rocm": (SPEC, replace(H100, capability=None), "the device has no CUDA compute capability (ROCm is not supported)"),
    "accurate_d": (
        replace(SPEC, dtype=torch.float32, precision="tf32x3", head_dim=200),
        H100,
        "d = 200 is beyond the kernels' 128 in float32-accurate mode",
    ),
    "accurate_dv": (
        replace(SPEC, dtype=torch.float32, precision="tf32x3", value_dim=129),
        H100,
        "dv = 129 is beyond the kernels' 128 in float32-accurate mode",
    ),
    "double_d": (
        replace(SPEC, dtype=torch.float64, precision="ieee", head_dim=129),
        H100,
        "d = 129 is beyond the kernels' 128 in float64 mode",
    ),
    "mps_interpreted": (
        SPEC,
        DeviceTarget("mps", triton="3.7.1", interpreted=True),
        "the interpreter serves CPU and CUDA tensors, not mps",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    """No kernel can serve: "auto" takes the einsum path and says why, by name there is no fallback."""
    spec, target, reason = REFUSALS[name]
    *kernels, math = judge(spec, target, PROVEN)
    for verdict in kernels:
        assert (verdict.serves, verdict.by_default, verdict.reason) == (False, False, reason)
    assert (math.backend, math.serves, math.by_default) == ("math", True, True)

    names = "hopper_fused, hopper, triton_fused, triton"
    expected = f"{names}: {reason}; the einsum path serves every call"
    assert choose(spec, target, validated=PROVEN) == Plan("math", expected)
    assert choose(spec, target, "math", PROVEN).backend == "math"
    for backend in BACKENDS[:-1]:
        with pytest.raises(BackendUnavailable) as caught:
            choose(spec, target, backend, PROVEN)
        assert str(caught.value) == f"backend {backend!r} cannot serve this call: {reason}"


HOPPER_REFUSALS = {
    "sm_80": (SPEC, replace(H100, capability=(8, 0)), "the kernels are for sm_90, the part is sm_80"),
    "sm_100": (SPEC, replace(H100, capability=(10, 0)), "the kernels are for sm_90, the part is sm_100"),
    "float32": (replace(SPEC, dtype=torch.float32, precision="tf32"), H100, "float32 is not float16 or bfloat16"),
    "float64": (replace(SPEC, dtype=torch.float64), H100, "float64 is not float16 or bfloat16"),
    "d": (replace(SPEC, head_dim=96, value_dim=96), H100, "d = 96 and dv = 96 are not the same one of 64, 128, 256"),
    "dv": (replace(SPEC, value_dim=128), H100, "d = 64 and dv = 128 are not the same one of 64, 128, 256"),
    "dense": (replace(SPEC, mask=MaskKind.DENSE), H100, "the mask varies over queries"),
    "masks_in_a_group": (
        replace(SPEC, heads=4, kv_heads=2, mask=MaskKind.KEY, mask_per_head=True),
        H100,
        "query heads that share a kv head have key masks of their own",
    ),
    "dropout": (replace(SPEC, dropout_p=0.1), H100, "dropout is on"),
    "no_keys": (replace(SPEC, keys=0), H100, "there are no keys"),
    "interpreter": (SPEC, INTERPRETER, "Triton's interpreter runs no Gluon"),
}


@pytest.mark.parametrize("backend", ("hopper", "hopper_fused"))
@pytest.mark.parametrize("name", HOPPER_REFUSALS)
def test_what_the_kernels_for_hopper_do_not_serve_the_others_do(name: str, backend: str) -> None:
    spec, target, reason = HOPPER_REFUSALS[name]
    verdict = verdict_of(backend, spec, target, ALL_PROVEN)
    assert (verdict.serves, verdict.by_default, verdict.reason) == (False, False, reason)
    assert verdict_of("triton", spec, target).serves
    tables = dict(validated=ALL_PROVEN, faster=faster("hopper", "hopper_fused"))
    assert choose(spec, target, **tables).backend == ("math" if target.interpreted else "triton")
    with pytest.raises(BackendUnavailable) as caught:
        choose(spec, target, backend, **tables)
    assert str(caught.value) == f"backend {backend!r} cannot serve this call: {reason}"


@pytest.mark.parametrize(
    "changes",
    (
        dict(dtype=torch.bfloat16),
        dict(head_dim=128, value_dim=128),
        dict(head_dim=256, value_dim=256),
        dict(mask=MaskKind.KEY, mask_per_head=True, kv_heads=8, causal=True),
        dict(scale=-1.0),
        dict(batch=0),
        dict(queries=0),
    ),
    ids=str,
)
@pytest.mark.parametrize("backend", ("hopper", "hopper_fused"))
def test_the_kernels_for_hopper_are_a_default_only_where_they_are_right_and_faster(backend: str, changes: dict) -> None:
    spec = replace(SPEC, **changes)
    won = faster(backend, head_dim=spec.head_dim, value_dim=spec.value_dim, mask=spec.mask)
    unproven, unmeasured = dict(validated=PROVEN, faster=won), dict(validated=ALL_PROVEN, faster={})
    for tables, reason in (
        (unproven, "not validated on sm_90 yet; ask for it by name"),
        (unmeasured, "validated on sm_90, but not shown to be faster there in such calls; ask for it by name"),
    ):
        verdict = verdict_of(backend, spec, H100, **tables)
        assert (verdict.serves, verdict.by_default, verdict.reason) == (True, False, reason)
        assert choose(spec, H100, **tables).backend == "triton"
        assert choose(spec, H100, backend, **tables) == Plan(backend, "asked for by name")
    plan = choose(spec, H100, validated=ALL_PROVEN, faster=won)
    assert plan.backend == backend
    where = "validated on sm_90 (NVIDIA H100, Triton 3.7.1, 2026-01-31), and faster there (2026-01-31)"
    assert plan.reason.split("; ")[-1] == where


@pytest.mark.parametrize(
    ("changes", "holds"),
    (
        (dict(), True),
        (dict(dtype=torch.bfloat16), True),
        (dict(causal=True, dropout_p=0.1, queries=7, kv_heads=8, scale=2.0), True),
        (dict(dtype=torch.float32, precision="tf32"), False),
        (dict(dtype=torch.float64), False),
        (dict(head_dim=128), False),
        (dict(head_dim=40, value_dim=40), False),
        (dict(value_dim=128), False),
        (dict(mask=MaskKind.KEY), False),
        (dict(mask=MaskKind.DENSE), False),
    ),
    ids=str,
)
def test_a_measurement_holds_for_the_calls_that_were_measured(changes: dict, holds: bool) -> None:
    tables = dict(validated=ALL_PROVEN, faster=faster("triton_fused"))
    plan = choose(replace(SPEC, **changes), H100, **tables)
    assert plan.backend == ("triton_fused" if holds else "triton")


def test_the_first_that_is_right_and_faster_serves() -> None:
    everything = faster("hopper_fused", "hopper", "triton_fused")
    rights = dict(ALL_PROVEN)
    for backend in ("hopper_fused", "hopper", "triton_fused", "triton", "math"):
        assert choose(SPEC, H100, validated=rights, faster=everything).backend == backend
        rights.pop((backend, "sm_90"), None)


def test_the_plain_kernels_need_no_measurement() -> None:
    assert choose(SPEC, H100, validated=PROVEN, faster={}).backend == "triton"
    assert set(UNMEASURED) == {"triton", "math"}


@pytest.mark.parametrize("backend", ("hopper_fused", "triton_fused"))
def test_a_fused_backward_gives_way_to_deterministic_gradients(backend: str) -> None:
    spec = replace(SPEC, deterministic=True)
    reason = "deterministic gradients are asked for, and it adds up those of q in any order"
    tables = dict(validated=ALL_PROVEN, faster=faster(backend))
    assert choose(SPEC, H100, **tables).backend == backend
    verdict = verdict_of(backend, spec, H100, **tables)
    assert (verdict.serves, verdict.by_default, verdict.reason) == (False, False, reason)
    assert choose(spec, H100, **tables).backend == "triton"
    with pytest.raises(BackendUnavailable, match=reason):
        choose(spec, H100, backend)


@pytest.mark.parametrize("capability", ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)))
def test_a_part_is_a_default_only_where_it_was_validated(capability: tuple[int, int]) -> None:
    target = replace(H100, capability=capability, name="a part")
    arch = f"sm_{capability[0]}{capability[1]}"
    assert target.arch == arch

    triton = verdict_of("triton", SPEC, target, {})
    reason = f"not validated on {arch} yet; ask for it by name"
    assert (triton.serves, triton.by_default, triton.reason) == (True, False, reason)
    refused = "" if arch == "sm_90" else f"hopper_fused, hopper: the kernels are for sm_90, the part is {arch}; "
    names = "hopper_fused, hopper, triton_fused, triton" if arch == "sm_90" else "triton_fused, triton"
    expected = f"{refused}{names}: {reason}; the einsum path serves every call"
    assert choose(SPEC, target, validated={}) == Plan("math", expected)
    assert choose(SPEC, target, "triton", {}) == Plan("triton", "asked for by name")

    triton = verdict_of("triton", SPEC, target, PROVEN)
    right = f"validated on {arch} (NVIDIA H100, Triton 3.7.1, 2026-01-31)"
    assert (triton.serves, triton.by_default, triton.reason) == (True, True, right)
    names = names.removesuffix(", triton")
    assert choose(SPEC, target, validated=PROVEN) == Plan("triton", f"{refused}{names}: {reason}; {right}")
    assert choose(SPEC, target, "math", PROVEN) == Plan("math", "asked for by name")


def test_wide_heads_are_served_in_every_other_mode() -> None:
    for spec in (
        replace(SPEC, head_dim=256, value_dim=256, dtype=torch.bfloat16, precision="ieee"),
        replace(SPEC, head_dim=256, value_dim=256, dtype=torch.float32, precision="tf32"),
        replace(SPEC, head_dim=128, value_dim=128, dtype=torch.float32, precision="tf32x3"),
        replace(SPEC, head_dim=128, value_dim=128, dtype=torch.float64, precision="ieee"),
    ):
        assert choose(spec, H100, validated=PROVEN).backend == "triton"


def test_evidence_counts_for_its_own_part_and_backend_only() -> None:
    other_part = {("triton", "sm_80"): ROW}
    other_backend = {("hopper", "sm_90"): ROW}
    assert choose(SPEC, H100, validated=other_part).backend == "math"
    assert choose(replace(SPEC, dropout_p=0.1), H100, validated=other_backend).backend == "math"
    assert choose(SPEC, replace(H100, capability=(8, 0)), validated=other_part).backend == "triton"


@pytest.mark.parametrize(
    ("version", "by_default"),
    (("3.6.0", True), ("3.9.0", True), ("3.9.1+git", True), ("3.10.0", False), ("4.0", False)),
)
def test_triton_versions(version: str, by_default: bool) -> None:
    triton = verdict_of("triton", SPEC, replace(H100, triton=version), PROVEN)
    assert (triton.serves, triton.by_default) == (True, by_default)
    if not by_default:
        assert triton.reason == f"Triton {version} is newer than the tested 3.9; ask for it by name"


def test_a_triton_of_unknown_version_serves() -> None:
    assert choose(SPEC, replace(H100, triton="unknown"), validated=PROVEN).backend == "triton"


@pytest.mark.parametrize("device_type", ("cpu", "cuda"))
@pytest.mark.parametrize("backend", ("triton", "triton_fused"))
def test_the_interpreter_serves_by_name_only(backend: str, device_type: str) -> None:
    target = replace(INTERPRETER, device_type=device_type)
    verdict = verdict_of(backend, SPEC, target, ALL_PROVEN, faster(backend))
    assert (verdict.serves, verdict.by_default) == (True, False)
    assert "TRITON_INTERPRET=1" in verdict.reason
    assert choose(SPEC, target, validated=ALL_PROVEN, faster=faster(backend)).backend == "math"
    assert choose(SPEC, target, backend, ALL_PROVEN).backend == backend


@pytest.mark.parametrize(
    "changes",
    (
        dict(head_dim=256, value_dim=256),
        dict(head_dim=1, value_dim=1),
        dict(head_dim=40, value_dim=80),
        dict(dtype=torch.float64),
        dict(dtype=torch.bfloat16),
        dict(dtype=torch.float32, precision="tf32x3"),
        dict(mask=MaskKind.KEY),
        dict(mask=MaskKind.KEY, mask_per_head=True),
        dict(mask=MaskKind.DENSE, causal=True),
        dict(dropout_p=0.5),
        dict(deterministic=True),
        dict(scale=-1.0),
        dict(scale=0.0),
        dict(batch=0),
        dict(heads=0, kv_heads=0),
        dict(queries=0),
        dict(keys=0),
        dict(batch=100_000),
        dict(queries=1, keys=2**30),
    ),
    ids=str,
)
def test_everything_in_the_contract_is_served_by_the_kernels(changes: dict) -> None:
    spec = replace(SPEC, **changes)
    assert choose(spec, H100, validated=PROVEN).backend == "triton"
    assert choose(spec, CPU).backend == "math"


@pytest.mark.parametrize("name", ("cudnn", "", "Triton", "flash", None, 3))
def test_an_unknown_backend(name: object) -> None:
    names = "'auto', 'hopper_fused', 'hopper', 'triton_fused', 'triton', 'math'"
    with pytest.raises(ValueError, match=f"backend must be one of {names}, got ") as caught:
        choose(SPEC, H100, name)
    assert repr(name) in str(caught.value)
    assert not isinstance(caught.value, BackendUnavailable)


def test_a_refusal_is_a_value_error() -> None:
    assert issubclass(BackendUnavailable, ValueError)


def test_choosing_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answer every time, from the arguments alone: the machine is not looked at."""
    for name in ("is_available", "current_device", "get_device_properties", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("dispatch asked the machine"))
    before = dict(VALIDATED), dict(FASTER)
    plans = [choose(SPEC, H100, validated=ALL_PROVEN, faster=faster("hopper")) for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]
    assert before == (VALIDATED, FASTER)
    assert hash(SPEC) == hash(replace(SPEC))
    assert hash(H100) == hash(replace(H100))


def test_verdicts_come_in_the_order_in_which_auto_asks() -> None:
    assert BACKENDS == ("hopper_fused", "hopper", "triton_fused", "triton", "math")
    assert tuple(verdict.backend for verdict in judge(SPEC, H100)) == BACKENDS


def test_every_row_of_evidence_names_it() -> None:
    for (backend, arch), row in (*VALIDATED.items(), *FASTER.items()):
        assert backend in BACKENDS
        assert arch.startswith("sm_")
        assert all((row.gpu, row.torch, row.triton, row.date, row.commit, row.results))
        assert (ROOT / row.results).is_file()
    for (backend, _), row in FASTER.items():
        assert backend not in UNMEASURED
        assert row.calls
        assert len(set(row.calls)) == len(row.calls)


@pytest.mark.parametrize(
    ("changes", "limit", "wide"),
    (
        (dict(dtype=torch.float64, precision="ieee"), 64, "float64, ieee products"),
        (dict(dtype=torch.float32, precision="tf32x3"), 64, "float32, tf32x3 products"),
        (dict(dtype=torch.float32, precision="tf32"), 128, "float32, tf32 products"),
    ),
    ids=("float64", "float32", "tf32"),
)
def test_the_fused_backward_of_wide_operands_ends_earlier_with_dropout(changes: dict, limit: int, wide: str) -> None:
    served = replace(SPEC, dropout_p=0.1, head_dim=limit, value_dim=limit, **changes)
    assert choose(served, H100, "triton_fused").backend == "triton_fused"
    for dim in ("head_dim", "value_dim"):
        spec = replace(served, **{dim: limit + 1})
        with pytest.raises(BackendUnavailable) as caught:
            choose(spec, H100, "triton_fused")
        reason = f"d or dv = {limit + 1} is beyond the fused backward's {limit} with dropout ({wide})"
        assert reason in str(caught.value)
        assert choose(replace(spec, dropout_p=0.0), H100, "triton_fused").backend == "triton_fused"
