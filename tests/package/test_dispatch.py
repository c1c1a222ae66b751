"""Which backend serves by which backward and why, from descriptions alone: no GPU, no tensors, nothing imported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_attend import backends
from flash_attend.backends import BACKENDS
from flash_attend.dispatch import BackendUnavailable, Knowledge, Verdict, choose, judge, override_backward
from flash_attend.evidence import Finding, Tuned
from flash_attend.kernels.configs import as_text, select_tiles
from flash_attend.spec import AttentionSpec, BiasKind, MaskKind
from flash_attend.target import DeviceTarget

SPEC = AttentionSpec(
    batch=2, heads=8, kv_heads=2, queries=100, keys=120, head_dim=64, value_dim=64, dtype=torch.float16, scale=0.125
)
GPU = torch.device("cuda", 0)
H100 = DeviceTarget("cuda", "NVIDIA H100", (9, 0), 232448, multiprocessors=132, triton="3.7.1", device=GPU)
CPU = DeviceTarget("cpu", triton="3.7.1")
INTERPRETER = replace(CPU, interpreted=True)
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

CHECKED, WRONG = Finding(True, "self-checked"), Finding(False, "its self-check failed here")


def knowing(right: Finding | dict | None = CHECKED, fastest: str = "", *fused: str) -> Knowledge:
    """A part where all variants, or those of backend and backward, were found to be so; and what was fastest there."""
    won = Tuned(fastest, tuple((name, "fused", "") for name in fused), "measured") if fastest else None
    found = (lambda variant: right.get(variant[:2])) if isinstance(right, dict) else (lambda variant: right)
    return Knowledge(lambda variant, device: found(variant), lambda kind, device: won)


RIGHT, UNKNOWN = knowing(), knowing(None)
WON = knowing(CHECKED, "hopper", "hopper", "triton")


@pytest.fixture(autouse=True)
def faults(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Why a backend cannot be imported: nothing is here."""
    found: dict[str, str] = {}
    monkeypatch.setattr(backends, "_try_import", lambda name: found.get(name, ""))
    return found


def chosen(*asked, **more) -> tuple[str, str]:
    plan = choose(*asked, **more)
    return plan.name, plan.backward


def verdict_of(backend: str, spec: AttentionSpec, target: DeviceTarget, knowledge: Knowledge) -> Verdict:
    return next(found for found in judge(spec, target, knowledge=knowledge) if found.backend == backend)


def refusal(spec: AttentionSpec, target: DeviceTarget, backend: str) -> str:
    with pytest.raises(BackendUnavailable) as caught:
        choose(spec, target, backend, knowledge=WON)
    start, _, reason = str(caught.value).partition(": ")
    assert start == f"backend {backend!r} cannot serve this call"
    return reason


ACCURATE = replace(SPEC, dtype=torch.float32, precision="tf32x3")
WIDE, INTERPRETED = "is beyond the kernels' 128", "the interpreter serves"
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
    "accurate_d": (replace(ACCURATE, head_dim=200), H100, f"d = 200 {WIDE} in float32-accurate mode"),
    "accurate_dv": (replace(ACCURATE, value_dim=129), H100, f"dv = 129 {WIDE} in float32-accurate mode"),
    "double_d": (replace(SPEC, dtype=torch.float64, head_dim=129), H100, f"d = 129 {WIDE} in float64 mode"),
    "mps_interpreted": (SPEC, replace(INTERPRETER, device_type="mps"), f"{INTERPRETED} CPU and CUDA tensors, not mps"),
    "absent": (SPEC, DeviceTarget("cuda", triton="3.7.1", absent=True), "this machine has no such CUDA device"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    """No kernel can serve: "auto" takes torch's or the einsum path and says why, by name there is no fallback."""
    spec, target, reason = REFUSALS[name]
    *kernels, sdpa, efficient, math = judge(spec, target, knowledge=WON)
    assert kernels == [Verdict(backend, False, False, reason) for backend in ("hopper", "triton")]
    assert math == Verdict("math", True, True, "it needs no evidence")
    plan = choose(spec, target, knowledge=WON)
    assert chosen(spec, target, "math") == ("math", "einsum")
    serves = next(verdict for verdict in (sdpa, efficient, math) if verdict.by_default)
    assert (plan.name, plan.backward) == (serves.backend, "einsum" if serves is math else "torch")
    assert plan.reason.startswith((f"hopper, triton: {reason}; ", f"hopper, triton, efficient: {reason}; "))
    assert plan.reason.endswith(f"; {serves.reason}")
    assert {refusal(spec, target, backend) for backend in ("hopper", "triton")} == {reason}


SDPA_REFUSALS = {
    "dropout": (replace(SPEC, dropout_p=0.1), CPU, "dropout is on"),
    "cuda": (SPEC, H100, "cuda tensors; it serves a CPU"),
    "mps": (SPEC, DeviceTarget("mps"), "mps tensors; it serves a CPU"),
}


@pytest.mark.parametrize("name", SDPA_REFUSALS)
def test_what_torch_s_attention_does_not_serve(name: str) -> None:
    spec, target, reason = SDPA_REFUSALS[name]
    assert verdict_of("sdpa", spec, target, UNKNOWN) == Verdict("sdpa", False, False, reason)
    assert refusal(spec, target, "sdpa") == reason


def test_torch_s_attention_takes_other_value_dims_without_gradients() -> None:
    """Filled up with zeros; its backward would take longer than the einsum path's. Who names it gets it."""
    spec = replace(SPEC, value_dim=128)
    reason = "d = 64 and dv = 128 differ, and its backward is no faster then; ask for it by name"
    assert verdict_of("sdpa", spec, CPU, UNKNOWN) == Verdict("sdpa", True, False, reason)
    assert choose(spec, CPU, needed=(False, False, False)).name == choose(spec, CPU, "sdpa").name == "sdpa"
    for needed in ((True, False, False), (False, False, True)):
        plan = choose(spec, CPU, needed=needed)
        assert plan.name == "math"
        assert reason in plan.reason


T4 = replace(H100, name="Tesla T4", capability=(7, 5))
MI300 = replace(H100, name="AMD Instinct MI300X", capability=None)
EFFICIENT_REFUSALS = {
    "cpu": (SPEC, CPU, "cpu tensors; it serves NVIDIA's and AMD's GPUs"),
    "mps": (SPEC, DeviceTarget("mps"), "mps tensors; it serves NVIDIA's and AMD's GPUs"),
    "absent": (SPEC, DeviceTarget("cuda", absent=True), "this machine has no such CUDA device"),
    "scores": (
        replace(SPEC, window=(9, None), softcap=1.0, sinks=True),
        T4,
        "it does not serve a window and softcap and sinks",
    ),
    "packed": (replace(SPEC, sequences=3), T4, "sequences are packed one after another"),
    "dropout": (replace(SPEC, dropout_p=0.1), T4, "dropout is on"),
    "float64": (replace(SPEC, dtype=torch.float64), T4, "float64 tensors"),
    "bfloat16": (replace(SPEC, dtype=torch.bfloat16), T4, "bfloat16 needs compute capability 8.0"),
    "deterministic": (
        replace(SPEC, deterministic=True),
        MI300,
        "deterministic gradients are asked for, which ROCm's build does not promise",
    ),
    "d": (replace(SPEC, head_dim=20), T4, "d = 20 is no multiple of 8, which it reads of float16 at a time"),
    "dv": (
        replace(SPEC, dtype=torch.float32, value_dim=50),
        T4,
        "dv = 50 is no multiple of 4, which it reads of float32 at a time",
    ),
    "no_keys": (replace(SPEC, keys=0), T4, "there are no keys"),
    "entries": (replace(SPEC, batch=65536), T4, "65536 entries are beyond its 65535"),
    "heads": (replace(SPEC, heads=70000), T4, "70000 heads are beyond its 65535"),
}


@pytest.mark.parametrize("name", EFFICIENT_REFUSALS)
def test_what_torch_s_attention_on_a_gpu_does_not_serve(name: str) -> None:
    spec, target, reason = EFFICIENT_REFUSALS[name]
    assert verdict_of("efficient", spec, target, UNKNOWN) == Verdict("efficient", False, False, reason)
    assert refusal(spec, target, "efficient") == reason


@pytest.mark.parametrize("target", (T4, MI300, replace(T4, triton=None), replace(T4, triton="4.0")), ids=str)
@pytest.mark.parametrize(
    "changes",
    (
        dict(),
        dict(dtype=torch.float32, precision="ieee", head_dim=300, value_dim=36),
        dict(mask=MaskKind.KEY, causal=True),
        dict(mask=MaskKind.DENSE, mask_per_head=True, scale=-1.0),
        dict(queries=1, keys=2**20),
    ),
    ids=str,
)
def test_parts_that_no_kernel_of_ours_is_for_get_torch_s(target: DeviceTarget, changes: dict) -> None:
    """Once it was right there, whatever Triton is there; a user is told of nothing that was expected."""
    spec = replace(SPEC, **changes)
    for known, reason in ((RIGHT, "self-checked"), (UNKNOWN, "not checked here yet: the first call does")):
        plan = choose(spec, target, knowledge=known)
        assert (plan.name, plan.backward, plan.warning) == ("efficient", "torch", "")
        assert plan.reason.endswith(reason)
    plan = choose(spec, target, knowledge=knowing(WRONG))
    assert plan.name == "math"
    assert plan.warning.startswith("flash_attend serves a CUDA call by its einsum path: hopper, triton: ")
    assert "efficient: its self-check failed here" in plan.warning


def test_torch_s_attention_where_our_kernels_should_serve_is_told() -> None:
    for target in (replace(H100, triton=None), replace(H100, triton="4.0")):
        plan = choose(SPEC, target, knowledge=RIGHT)
        assert plan.name == "efficient"
        assert plan.warning == f"flash_attend serves a CUDA call by PyTorch's attention: {plan.reason}"
    plan = choose(SPEC, H100, knowledge=knowing({("efficient", "torch"): CHECKED, ("triton", "separate"): WRONG}))
    assert plan.name == "efficient"
    assert plan.warning.endswith("please report it, with what `python -m flash_attend` prints")
    assert choose(SPEC, H100, knowledge=knowing(CHECKED, "efficient")).warning == ""  # measured faster


BIAS = BiasKind(False, True, True, True, torch.float16)
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
    "scores": (replace(SPEC, alibi=True, bias=BIAS), H100, "it does not serve a bias and ALiBi"),
    "softcap": (replace(SPEC, softcap=1.0), H100, "its backward has no registers for a softcap"),
    "wide_window": (
        replace(SPEC, head_dim=256, value_dim=256, mask=MaskKind.KEY, window=(9, None)),
        H100,
        "at d = 256 its backward has no registers for a key mask in a window",
    ),
    "no_keys": (replace(SPEC, keys=0), H100, "there are no keys"),
    "interpreter": (SPEC, INTERPRETER, "Triton's interpreter runs no Gluon"),
}


@pytest.mark.parametrize("name", HOPPER_REFUSALS)
def test_what_the_kernels_for_hopper_do_not_serve_the_others_do(name: str) -> None:
    spec, target, reason = HOPPER_REFUSALS[name]
    assert verdict_of("hopper", spec, target, WON) == Verdict("hopper", False, False, reason)
    assert refusal(spec, target, "hopper") == reason
    assert verdict_of("triton", spec, target, UNKNOWN).serves
    assert choose(spec, target, knowledge=WON).name == ("sdpa" if target.interpreted else "triton")


@pytest.mark.parametrize(
    "changes",
    (
        dict(dtype=torch.bfloat16),
        dict(head_dim=128, value_dim=128),
        dict(head_dim=256, value_dim=256),
        dict(mask=MaskKind.KEY, mask_per_head=True, kv_heads=8, causal=True),
        dict(scale=-1.0),
        dict(causal=True, window=(255, None), sinks=True),
        dict(batch=0),
        dict(queries=0),
    ),
    ids=str,
)
def test_the_kernels_for_hopper_are_a_default_only_where_they_are_right_and_faster(changes: dict) -> None:
    spec = replace(SPEC, **changes)
    slower = "not measured faster here (`python -m flash_attend tune` does); ask for it by name"
    for found in (RIGHT, knowing(CHECKED, "triton"), UNKNOWN):
        assert verdict_of("hopper", spec, H100, found) == Verdict("hopper", True, False, slower)
        assert choose(spec, H100, knowledge=found).name == "triton"
        assert choose(spec, H100, "hopper", knowledge=found).reason == "asked for by name"
    plan = choose(spec, H100, knowledge=knowing(CHECKED, "hopper"))
    assert (plan.name, plan.backward, plan.reason) == ("hopper", "separate", "self-checked, measured")
    plan = choose(spec, H100, knowledge=knowing({("hopper", "separate"): WRONG}, "hopper"))
    assert (plan.name, plan.reason) == (
        "triton",
        "hopper: its self-check failed here, measured; not checked here yet: the first call does",
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_a_part_is_a_default_only_where_it_was_right(arch: str) -> None:
    """On every part from compute capability 8.0 on; one that nobody looked at yet is asked by the first call."""
    target = replace(H100, capability=(int(arch[3:-1]), int(arch[-1])), name="a part")
    assert target.arch == arch
    for known, reason in ((RIGHT, "self-checked"), (UNKNOWN, "not checked here yet: the first call does")):
        assert verdict_of("triton", SPEC, target, known) == Verdict("triton", True, True, reason)
        plan = choose(SPEC, target, knowledge=known)
        assert (plan.name, plan.backward, plan.warning) == ("triton", "separate", "")
        assert choose(SPEC, target, "math", knowledge=known).reason == "asked for by name"

    wrong = knowing(WRONG)
    assert verdict_of("triton", SPEC, target, wrong) == Verdict("triton", True, False, "its self-check failed here")
    plan = choose(SPEC, target, knowledge=wrong)
    assert plan.name == "math"
    others = "triton, efficient: its self-check failed here; sdpa: cuda tensors; it serves a CPU"
    assert plan.reason.endswith(f"{others}; it needs no evidence")
    assert plan.warning == (
        f"flash_attend serves a CUDA call by its einsum path: {plan.reason};"
        " please report it, with what `python -m flash_attend` prints"
    )
    assert choose(SPEC, target, "triton", knowledge=wrong).reason == "asked for by name"


def test_what_was_fastest_is_asked_first() -> None:
    for fastest in ("hopper", "triton", "math"):
        plan = choose(SPEC, H100, knowledge=knowing(CHECKED, fastest))
        assert (plan.name, plan.warning) == (fastest, "")
        assert plan.reason.endswith(", measured")
    assert choose(SPEC, H100, knowledge=knowing(CHECKED, "gone")).name == "triton"
    plan = choose(
        SPEC, H100, knowledge=knowing({("triton", "separate"): CHECKED, ("hopper", "separate"): WRONG}, "hopper")
    )
    assert plan.warning == (
        "flash_attend serves a call by triton, because hopper: its self-check failed here;"
        " please report it, with what `python -m flash_attend` prints"
    )


def test_the_variant_that_is_asked_for_is_the_calls() -> None:
    """With the tiles that were measured fastest with its backward."""
    spec = replace(SPEC, mask=MaskKind.KEY, causal=True, scale=-1.0, queries=1)
    kind = "float16", "ieee", 64, 64, "key", True, False, True, "", False
    asked = []
    for backward in ("separate", "fused"):
        won = Tuned("triton", (("triton", backward, "measured"),), "")
        knowledge = Knowledge(
            lambda variant, device: asked.append((variant, device)), lambda kind, device, won=won: won
        )
        choose(spec, replace(H100, multiprocessors=0), "auto", (True, False, False), knowledge)
        variant = "triton", backward, kind, False, True, True, (True, False, False), "measured", False, ()
        assert asked == [(variant, GPU)]
        asked.clear()


def test_what_serves_a_short_call_is_what_is_checked() -> None:
    """Its tiles are others, which are compiled, and so checked, for themselves. Where lengths may be symbols there are
    none of them."""
    asked: list[str] = []
    knowledge = Knowledge(lambda variant, device: asked.append(variant[-3]), lambda kind, device: None)
    short, long = (replace(SPEC, queries=length, keys=length) for length in (256, 2**16))
    for spec, target in ((short, H100), (long, H100), (short, replace(H100, multiprocessors=0))):
        choose(spec, target, knowledge=knowledge)
    assert asked == [as_text(select_tiles(short, H100)), "", ""]
    assert select_tiles(short, H100) != select_tiles(long, H100)


def test_who_serves_forward_mode() -> None:
    """Hopper's kernels leave it to the others, whose variant is asked for; PyTorch's backward serves whoever pushes."""
    of_q, knowledge = (True, False, False), knowing(CHECKED, "hopper")
    assert choose(SPEC, H100, knowledge=knowledge).name == "hopper"
    plan = choose(SPEC, H100, knowledge=knowledge, tangents=of_q)
    assert (plan.name, plan.reason.partition(";")[0]) == ("triton", "hopper: it has no forward mode")
    assert choose(SPEC, H100, "hopper", tangents=of_q).name == "triton"
    served = [chosen(SPEC, CPU, backend, tangents=of_q) for backend in ("auto", "sdpa", "math")]
    assert served == [("sdpa", "torch"), ("sdpa", "torch"), ("math", "einsum")]
    assert [BACKENDS[name].tangents_by for name in BACKENDS] == ["triton", "", "math", "math", ""]
    wide = replace(SPEC, dtype=torch.float32, head_dim=256, precision="tf32")
    assert chosen(wide, H100, "triton", tangents=of_q) == ("math", "einsum")
    assert "beyond its 128 for tangents" in choose(wide, H100, knowledge=RIGHT, tangents=of_q).reason
    asked = []
    choose(SPEC, H100, knowledge=Knowledge(lambda *of: asked.append(of), lambda *of: None), tangents=of_q)
    assert [variant[-1] for variant, _ in asked] == [of_q]


@pytest.mark.parametrize(
    ("version", "by_default"),
    (("3.6.0", True), ("3.9.0", True), ("3.9.1+git", True), ("unknown", True), ("3.10.0", False), ("4.0", False)),
)
def test_triton_versions(version: str, by_default: bool) -> None:
    triton = verdict_of("triton", SPEC, replace(H100, triton=version), RIGHT)
    assert (triton.serves, triton.by_default) == (True, by_default)
    if not by_default:
        assert triton.reason == f"Triton {version} is newer than the tested 3.9; ask for it by name"


@pytest.mark.parametrize("device_type", ("cpu", "cuda"))
def test_the_interpreter_serves_by_name_only(device_type: str) -> None:
    target = replace(INTERPRETER, device_type=device_type)
    reason = "Triton's interpreter (TRITON_INTERPRET=1) is for tests; ask for it by name"
    assert verdict_of("triton", SPEC, target, RIGHT) == Verdict("triton", True, False, reason)
    assert choose(SPEC, target, knowledge=RIGHT).name == ("sdpa" if device_type == "cpu" else "efficient")
    plan = choose(SPEC, target, "triton", knowledge=RIGHT)
    expected = "triton", "separate", "the fused one was not measured faster in Triton's interpreter"
    assert (plan.name, plan.backward, plan.backward_reason) == expected


@pytest.mark.parametrize(
    "changes",
    (
        dict(head_dim=256, value_dim=256, dtype=torch.float32, precision="tf32"),
        dict(head_dim=128, value_dim=128, dtype=torch.float32, precision="tf32x3"),
        dict(head_dim=128, value_dim=128, dtype=torch.float64),
        dict(head_dim=256, value_dim=256, dtype=torch.bfloat16),
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
    assert choose(spec, H100, knowledge=RIGHT).name == "triton"
    assert choose(spec, CPU).name == ("math" if spec.dropout_p or spec.head_dim != spec.value_dim else "sdpa")


# ---------------------------------------------------------------------------------------------------------------------
# Which backward
# ---------------------------------------------------------------------------------------------------------------------

KERNELS = pytest.mark.parametrize("backend", ("hopper", "triton"))


@KERNELS
def test_the_fused_backward_serves_where_it_was_measured_faster(backend: str) -> None:
    other = "hopper" if backend == "triton" else "triton"
    for known in (knowing(CHECKED, backend), knowing(CHECKED, backend, other)):
        plan = choose(SPEC, H100, knowledge=known)
        assert (plan.name, plan.backward) == (backend, "separate")
        assert plan.backward_reason == "the fused one was not measured faster here"
    for name in ("auto", backend):
        plan = choose(SPEC, H100, name, knowledge=knowing(CHECKED, backend, backend))
        assert (plan.name, plan.backward, plan.backward_reason) == (backend, "fused", "measured")
    wrong = {(backend, "separate"): CHECKED, (backend, "fused"): WRONG}
    plan = choose(SPEC, H100, knowledge=knowing(wrong, backend, backend))
    assert (plan.name, plan.backward) == (backend, "separate")
    assert plan.backward_reason == "the fused one is not right: its self-check failed here"
    assert plan.warning.startswith(f"flash_attend serves a call by {backend}, because {backend}: the fused one is not")
    plan = choose(SPEC, H100, knowledge=knowing({(backend, "fused"): CHECKED}, backend, backend))
    assert (plan.backward, plan.reason.endswith("self-checked, measured")) == ("fused", True)  # of that one alone


@KERNELS
def test_deterministic_gradients_come_by_the_separate_backward(backend: str) -> None:
    """Whatever else asks for the fused one."""
    spec, reason = replace(SPEC, deterministic=True), "deterministic gradients are asked for, and it adds up those of q"
    for name in ("auto", backend):
        with override_backward("fused"):
            plan = choose(spec, H100, name, knowledge=knowing(CHECKED, backend, backend))
        assert (plan.name, plan.backward) == (backend, "separate")
        assert plan.backward_reason == f"fused is refused: {reason} in any order"


def test_an_override_holds_within_and_not_beyond() -> None:
    def ways() -> list[tuple[str, str]]:
        return [chosen(SPEC, H100, name, knowledge=WON) for name in ("hopper", "triton", "math")]

    served, forced = ([("hopper", way), ("triton", way), ("math", "einsum")] for way in ("fused", "separate"))
    assert ways() == served
    with override_backward("separate"):
        assert ways() == forced
        with pytest.raises(RuntimeError, match="inside"), override_backward("fused"):
            assert chosen(SPEC, H100, "triton", knowledge=RIGHT) == ("triton", "fused")
            assert choose(SPEC, INTERPRETER, "triton").backward_reason == "asked for by override_backward"
            raise RuntimeError("inside")
        assert ways() == forced
    assert ways() == served


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
    with override_backward("fused"):
        assert choose(served, H100, "triton", knowledge=RIGHT).backward == "fused"
        for dim in ("head_dim", "value_dim"):
            spec = replace(served, **{dim: limit + 1})
            plan = choose(spec, H100, "triton", knowledge=RIGHT)
            reason = f"d or dv = {limit + 1} is beyond its {limit} with dropout ({wide})"
            assert (plan.backward, plan.backward_reason) == ("separate", f"fused is refused: {reason}")
            assert choose(replace(spec, dropout_p=0.0), H100, "triton", knowledge=RIGHT).backward == "fused"
            assert choose(spec, INTERPRETER, "triton").backward == "fused"


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("cudnn", "", "Triton", "triton_fused", "hopper_fused", None, 3))
def test_an_unknown_backend(name: object) -> None:
    with pytest.raises(
        ValueError, match="backend must be one of 'auto', 'hopper', 'triton', 'sdpa', 'efficient', 'math', got "
    ) as caught:
        choose(SPEC, H100, name)
    assert repr(name) in str(caught.value)
    assert not isinstance(caught.value, BackendUnavailable)


def test_what_cannot_be_imported_does_not_serve(faults: dict[str, str]) -> None:
    faults["hopper"] = "broken"
    assert choose(SPEC, H100, knowledge=WON).name == "triton"
    faults["triton"] = "broken"
    assert choose(SPEC, H100, knowledge=WON).reason.startswith("hopper, triton: broken; ")
    for backend in faults:
        assert verdict_of(backend, SPEC, H100, WON) == Verdict(backend, False, False, "broken")
        assert refusal(SPEC, H100, backend) == "broken"


def test_what_auto_would_not_take_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_try_import", lambda name: "" if name == "sdpa" else pytest.fail(f"{name} imported"))
    assert choose(SPEC, CPU, knowledge=WON).name == choose(SPEC, INTERPRETER, knowledge=WON).name == "sdpa"
    monkeypatch.setattr(backends, "_try_import", lambda name: pytest.fail("imported") if name == "hopper" else "")
    assert choose(SPEC, H100, knowledge=RIGHT).name == "triton"


def test_looking_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answer every time, from the arguments alone: the machine is not looked at."""
    for name in ("is_available", "current_device", "get_device_properties", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("dispatch asked the machine"))
    assert len({choose(SPEC, H100, knowledge=WON) for _ in range(3)}) == 1
    assert (hash(SPEC), hash(H100)) == (hash(replace(SPEC)), hash(replace(H100)))
    assert issubclass(BackendUnavailable, ValueError)


def test_a_backend_by_name_is_not_checked() -> None:
    """Nor is one that needs no evidence: whoever names a backend gets it."""
    asks = Knowledge(lambda variant, device: pytest.fail("asked"), lambda kind, device: None)
    for name in BACKENDS:
        assert choose(SPEC, CPU if name == "sdpa" else H100, name, knowledge=asks).name == name
    assert choose(SPEC, CPU, knowledge=asks).name == "sdpa"


def test_verdicts_come_in_the_order_of_the_table() -> None:
    assert (
        [verdict.backend for verdict in judge(SPEC, CPU)]
        == list(BACKENDS)
        == ["hopper", "triton", "sdpa", "efficient", "math"]
    )
