"""Which backend serves and why, from descriptions alone: no GPU, no tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_attend.dispatch import BACKENDS, BackendUnavailable, Plan, choose, judge
from flash_attend.spec import AttentionSpec, MaskKind
from flash_attend.target import DeviceTarget
from flash_attend.validation import VALIDATED, Validation

SPEC = AttentionSpec(
    batch=2, heads=8, kv_heads=2, queries=100, keys=120, head_dim=64, value_dim=64, dtype=torch.float16, scale=0.125
)
H100 = DeviceTarget("cuda", "NVIDIA H100", (9, 0), shared_memory=232448, multiprocessors=132, triton="3.7.1")
CPU = DeviceTarget("cpu", triton="3.7.1")
INTERPRETER = replace(CPU, interpreted=True)

ROW = Validation("NVIDIA H100", torch="2.13.0", triton="3.7.1", date="2026-01-31", commit="abc", results="results.json")
PROVEN = {("triton", arch): ROW for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")}

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
    """The kernels cannot serve: "auto" takes the einsum path and says why, by name there is no fallback."""
    spec, target, reason = REFUSALS[name]
    hopper, triton, math = judge(spec, target, PROVEN)
    assert (hopper.serves, hopper.by_default, hopper.reason) == (False, False, reason), "its backward is the kernels'"
    assert (triton.backend, triton.serves, triton.by_default, triton.reason) == ("triton", False, False, reason)
    assert (math.backend, math.serves, math.by_default) == ("math", True, True)

    assert choose(spec, target, validated=PROVEN) == Plan(
        "math", f"hopper: {reason}; triton: {reason}; the einsum path serves every call"
    )
    assert choose(spec, target, "math", PROVEN).backend == "math"
    with pytest.raises(BackendUnavailable) as caught:
        choose(spec, target, "triton", PROVEN)
    assert str(caught.value) == f"backend 'triton' cannot serve this call: {reason}"


HOPPER_REFUSALS = {
    "sm_80": (SPEC, replace(H100, capability=(8, 0)), "the kernels are for sm_90, the part is sm_80"),
    "sm_100": (SPEC, replace(H100, capability=(10, 0)), "the kernels are for sm_90, the part is sm_100"),
    "float32": (replace(SPEC, dtype=torch.float32, precision="tf32"), H100, "float32 is not float16 or bfloat16"),
    "float64": (replace(SPEC, dtype=torch.float64), H100, "float64 is not float16 or bfloat16"),
    "d": (replace(SPEC, head_dim=96, value_dim=96), H100, "d = 96 and dv = 96 are not the same one of 64, 128, 256"),
    "dv": (replace(SPEC, value_dim=128), H100, "d = 64 and dv = 128 are not the same one of 64, 128, 256"),
    "dense": (replace(SPEC, mask=MaskKind.DENSE), H100, "the mask varies over queries"),
    "dropout": (replace(SPEC, dropout_p=0.1), H100, "dropout is on"),
    "no_keys": (replace(SPEC, keys=0), H100, "there are no keys"),
    "interpreter": (SPEC, INTERPRETER, "Triton's interpreter runs no Gluon"),
}
ALL_PROVEN = PROVEN | {("hopper", "sm_90"): ROW}


@pytest.mark.parametrize("name", HOPPER_REFUSALS)
def test_what_the_kernels_for_hopper_do_not_serve_the_others_do(name: str) -> None:
    spec, target, reason = HOPPER_REFUSALS[name]
    hopper, triton, _ = judge(spec, target, ALL_PROVEN)
    assert (hopper.backend, hopper.serves, hopper.by_default, hopper.reason) == ("hopper", False, False, reason)
    assert triton.serves
    assert choose(spec, target, validated=ALL_PROVEN).backend == ("math" if target.interpreted else "triton")
    with pytest.raises(BackendUnavailable) as caught:
        choose(spec, target, "hopper", ALL_PROVEN)
    assert str(caught.value) == f"backend 'hopper' cannot serve this call: {reason}"


@pytest.mark.parametrize(
    "changes",
    (
        dict(dtype=torch.bfloat16),
        dict(head_dim=128, value_dim=128),
        dict(head_dim=256, value_dim=256),
        dict(mask=MaskKind.KEY, mask_per_head=True, causal=True),
        dict(scale=-1.0),
        dict(batch=0),
        dict(queries=0),
    ),
    ids=str,
)
def test_the_kernels_for_hopper_are_a_default_only_where_they_were_validated(changes: dict) -> None:
    spec = replace(SPEC, **changes)
    hopper, *_ = judge(spec, H100, PROVEN)
    reason = 'not validated on sm_90 yet; ask for it with backend="hopper"'
    assert (hopper.serves, hopper.by_default, hopper.reason) == (True, False, reason)
    assert choose(spec, H100, validated=PROVEN).backend == "triton"
    assert choose(spec, H100, "hopper", PROVEN) == Plan("hopper", "asked for by name")
    proven = choose(spec, H100, validated=ALL_PROVEN)
    assert proven == Plan("hopper", "validated on sm_90 (NVIDIA H100, Triton 3.7.1, 2026-01-31)")


@pytest.mark.parametrize("capability", ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)))
def test_a_part_is_a_default_only_where_it_was_validated(capability: tuple[int, int]) -> None:
    target = replace(H100, capability=capability, name="a part")
    arch = f"sm_{capability[0]}{capability[1]}"
    assert target.arch == arch

    hopper, triton, _ = judge(SPEC, target, {})
    reason = f'not validated on {arch} yet; ask for it with backend="triton"'
    assert (triton.serves, triton.by_default, triton.reason) == (True, False, reason)
    passed_over = f"hopper: {hopper.reason}; triton: {reason}"
    assert choose(SPEC, target, validated={}) == Plan("math", f"{passed_over}; the einsum path serves every call")
    assert choose(SPEC, target, "triton", {}) == Plan("triton", "asked for by name")

    _, triton, _ = judge(SPEC, target, PROVEN)
    reason = f"validated on {arch} (NVIDIA H100, Triton 3.7.1, 2026-01-31)"
    assert (triton.serves, triton.by_default, triton.reason) == (True, True, reason)
    assert choose(SPEC, target, validated=PROVEN) == Plan("triton", f"hopper: {hopper.reason}; {reason}")
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
    _, triton, _ = judge(SPEC, replace(H100, triton=version), PROVEN)
    assert (triton.serves, triton.by_default) == (True, by_default)
    if not by_default:
        assert triton.reason == f"Triton {version} is newer than the tested 3.9; ask by name"


def test_a_triton_of_unknown_version_serves() -> None:
    assert choose(SPEC, replace(H100, triton="unknown"), validated=PROVEN).backend == "triton"


@pytest.mark.parametrize("device_type", ("cpu", "cuda"))
def test_the_interpreter_serves_by_name_only(device_type: str) -> None:
    target = replace(INTERPRETER, device_type=device_type)
    _, triton, _ = judge(SPEC, target, PROVEN)
    assert (triton.serves, triton.by_default) == (True, False)
    assert "TRITON_INTERPRET=1" in triton.reason
    assert choose(SPEC, target, validated=PROVEN).backend == "math"
    assert choose(SPEC, target, "triton", PROVEN).backend == "triton"


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
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'hopper', 'triton', 'math', got ") as caught:
        choose(SPEC, H100, name)
    assert repr(name) in str(caught.value)
    assert not isinstance(caught.value, BackendUnavailable)


def test_a_refusal_is_a_value_error() -> None:
    assert issubclass(BackendUnavailable, ValueError)


def test_choosing_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answer every time, from the arguments alone: the machine is not looked at."""
    for name in ("is_available", "current_device", "get_device_properties", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("dispatch asked the machine"))
    before = dict(VALIDATED)
    plans = [choose(SPEC, H100, validated=PROVEN) for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]
    assert before == VALIDATED
    assert hash(SPEC) == hash(replace(SPEC))
    assert hash(H100) == hash(replace(H100))


def test_verdicts_come_fastest_first() -> None:
    assert tuple(verdict.backend for verdict in judge(SPEC, H100)) == BACKENDS


def test_every_validated_row_names_its_evidence() -> None:
    for (backend, arch), row in VALIDATED.items():
        assert backend in BACKENDS
        assert arch.startswith("sm_")
        assert all((row.gpu, row.torch, row.triton, row.date, row.commit, row.results))
