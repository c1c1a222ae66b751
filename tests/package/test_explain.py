"""What a user is told: `explain`, and the one warning when a CUDA call falls back."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flash_attend import BackendUnavailable, backends, dispatch, explain, flash_attention, functional
from flash_attend.checks import normalise_inputs
from flash_attend.evidence import Finding, Store, Tuned, name_of_tuned, read_anew
from flash_attend.generation import renew
from flash_attend.target import DeviceTarget
from flash_attend.variant import Kind, Variant, kind_of_call, variant_of

HERE = torch.device("cpu")  # where the tensors lie
H100 = DeviceTarget("cuda", "NVIDIA H100", (9, 0), 232448, multiprocessors=132, triton="3.7.1", device=HERE)
T4 = DeviceTarget("cuda", "Tesla T4", (7, 5), shared_memory=65536, multiprocessors=40, triton="3.7.1", device=HERE)


def _tensors(d: int = 8, dv: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(1, 2, 3, d), torch.randn(1, 2, 4, d), torch.randn(1, 2, 4, dv)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """Makes every tensor look as if it were on the given device."""

    def set_target(target: DeviceTarget) -> None:
        monkeypatch.setattr(DeviceTarget, "of", staticmethod(lambda device: target))
        renew()

    yield set_target
    monkeypatch.undo()
    renew()


@pytest.fixture(autouse=True)
def nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_try_import", lambda name: "")


def lines_of(**options) -> list[str]:
    return str(explain(*_tensors(), **options)).splitlines()


def test_one_line_for_every_backend(on) -> None:
    on(DeviceTarget("cpu", triton="3.7.1"))
    assert lines_of() == [
        "on cpu: sdpa serves",
        "  backward: torch, it has no other",
        "  forward mode: math, sdpa: it has no forward mode",
        "  hopper     no       cpu tensors; the kernels need a CUDA device",
        "  triton     no       cpu tensors; the kernels need a CUDA device",
        "  sdpa       yes      it needs no evidence",
        "  efficient  no       cpu tensors; it serves NVIDIA's and AMD's GPUs",
        "  math       yes      it needs no evidence",
    ]


def test_gradients_of_a_bias_on_a_cpu(on) -> None:
    on(DeviceTarget("cpu", triton="3.7.1"))
    bias = torch.zeros(1, 1, 3, 4)
    assert lines_of(bias=bias)[1] == "  backward: torch, it has no other"
    expected = "  backward: torch, it has none for a bias: all gradients by the einsum path"
    assert lines_of(bias=bias.requires_grad_())[1] == expected


def test_what_a_part_has_shown(on, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Told as it stands: nothing is checked for it, and nothing written."""
    monkeypatch.setenv("FLASH_ATTEND_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "_found_out", lambda variant, device: pytest.fail("checked"))
    on(replace(H100, multiprocessors=0))  # whose tiles are the same at any length
    no_hopper = "  hopper     no       float32 is not float16 or bfloat16"
    rest = [
        "  sdpa       no       cuda tensors; it serves a CPU",
        "  efficient  yes      not checked here yet: the first call does",
        "  math       yes      it needs no evidence",
    ]
    separate = "  backward: separate, the fused one was not measured faster here"
    unknown = "  triton     yes      not checked here yet: the first call does"
    assert lines_of() == ["on NVIDIA H100: triton serves", separate, no_hopper, unknown, *rest]
    assert not list(tmp_path.iterdir())

    (*tensors,), store = _tensors(), Store.of(HERE)
    _, spec = normalise_inputs(*tensors)
    right = Variant.read(variant_of(spec, "triton", "separate", (False, False, False)))
    store.keep(right, Finding(True, "self-checked: fine"))
    yes = "  triton     yes      self-checked: fine"
    assert lines_of() == ["on NVIDIA H100: triton serves", separate, no_hopper, yes, *rest]

    fused = Tuned("triton", (("triton", "fused", ""),), "measured fastest")
    store.write(name_of_tuned(Kind(*kind_of_call(spec))), dict(won=fused._asdict()))
    read_anew()
    assert lines_of()[1] == "  backward: fused, measured fastest"
    refused = "  backward: separate, fused is refused: deterministic gradients are asked for, and it adds up those of q"
    assert lines_of(deterministic=True)[1] == f"{refused} in any order"

    for backward in ("separate", "fused"):
        store.keep(right._replace(backward=backward), Finding(False, "its self-check failed here"))
    by_name = "  triton     by name  its self-check failed here, measured fastest"
    lines = lines_of()
    assert lines[0] == "on NVIDIA H100: efficient serves"
    assert by_name in lines


def test_a_backend_by_name_that_cannot_serve_is_told_not_raised(on) -> None:
    on(T4)
    found = explain(*_tensors(), backend="triton")
    assert found.plan is None
    assert found.refusal == "triton cannot serve: compute capability 7.5 is below 8.0"
    assert str(found).splitlines()[0] == "on Tesla T4: triton cannot serve: compute capability 7.5 is below 8.0"
    with pytest.raises(BackendUnavailable, match=r"compute capability 7\.5 is below 8\.0"):
        flash_attention(*_tensors(), backend="triton")


def _gpu(name: str, *capability: int) -> DeviceTarget:
    return replace(H100, name=name, capability=capability or None)


@pytest.mark.parametrize(
    ("target", "serves", "advised"),
    [
        (DeviceTarget("cpu", triton="3.7.1"), "sdpa", False),
        (_gpu("Tesla T4", 7, 5), "efficient", False),
        (_gpu("Tesla V100-SXM2-16GB", 7, 0), "efficient", False),
        (_gpu("NVIDIA A10", 8, 6), "triton", False),
        (_gpu("NVIDIA GeForce RTX 4090", 8, 9), "triton", False),
        (_gpu("NVIDIA A100-SXM4-80GB", 8, 0), "triton", False),
        (_gpu("NVIDIA H100 80GB HBM3", 9, 0), "triton", False),
        (_gpu("NVIDIA B200", 10, 0), "triton", False),
        (_gpu("AMD Instinct MI300X"), "efficient", False),
        (DeviceTarget("mps"), "math", True),
    ],
    ids=lambda value: value.name or value.device_type if isinstance(value, DeviceTarget) else None,
)
def test_every_kind_of_part_is_told_what_serves(on, target: DeviceTarget, serves: str, advised: bool) -> None:
    """The table of the README; where nothing but einsum serves there is one sentence of advice."""
    on(target)
    found = explain(*_tensors())
    assert found.plan.name == serves
    assert str(found).count("advice: nothing faster than einsum is here") == advised


def test_a_head_dim_beyond_the_kernels(on) -> None:
    on(H100)
    assert "d = 320 is beyond the kernels' 256" in str(explain(*_tensors(d=320)))
    assert "dv = 257 is beyond the kernels' 256" in str(explain(*_tensors(dv=257)))


def test_repr_is_what_print_shows() -> None:
    found = explain(*_tensors())
    assert repr(found) == str(found)
    assert [verdict.backend for verdict in found.verdicts] == ["hopper", "triton", "sdpa", "efficient", "math"]


def test_takes_the_arguments_of_flash_attention() -> None:
    assert inspect.signature(explain).parameters == inspect.signature(flash_attention).parameters
    mask = torch.ones(1, 4, dtype=torch.bool)
    options = dict(
        mask=mask, causal=True, scale=0.5, dropout_p=0.1, return_lse=True, deterministic=True, backend="math"
    )
    assert explain(*_tensors(), **options).plan.reason == "asked for by name"


def test_draws_nothing_from_the_generator() -> None:
    tensors = _tensors()
    state = torch.get_rng_state()
    explain(*tensors, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def fresh_warnings():
    functional._warn.cache_clear()
    yield
    functional._warn.cache_clear()


def _collect(calls: list[dict], d: int = 6) -> list[warnings.WarningMessage]:
    tensors = _tensors(d=d)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for options in calls:
            flash_attention(*tensors, **options)
    return caught


def test_a_cuda_fallback_warns_once_for_every_reason(on, fresh_warnings: None) -> None:
    on(T4)
    caught = _collect([{}, {}, {"causal": True}])
    assert [str(warning.message) for warning in caught] == [
        "flash_attend serves a CUDA call by its einsum path: "
        "hopper, triton: compute capability 7.5 is below 8.0; sdpa: cuda tensors; it serves a CPU; "
        "efficient: d = 6 is no multiple of 4, which it reads of float32 at a time; it needs no evidence"
    ]
    assert caught[0].filename == __file__  # it points at the caller
    assert len(_collect([{}, {}], d=302)) == 1  # another reason
    assert not _collect([{}])


def test_no_warning_where_the_einsum_path_was_asked_for(on, fresh_warnings: None) -> None:
    on(T4)
    assert not _collect([{"backend": "math"}])


def test_no_warning_on_a_cpu(fresh_warnings: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_attention(*_tensors())
