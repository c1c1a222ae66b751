"""What is known of a device, and what becomes of a call for one that this machine lacks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attend import Attend, BackendUnavailable, backends, check, explain, flash_attention, target
from flash_attend.evidence import Finding, Store, Tuned, read_anew
from flash_attend.target import DeviceTarget, release
from flash_attend.tracing import constant_when_compiled


@pytest.fixture
def described_anew() -> Iterator[None]:
    target._describe.cache_clear()
    yield
    target._describe.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Tensors without data, for devices that are not here
# ---------------------------------------------------------------------------------------------------------------------

# Under FakeTensorMode, as torch's own attention has it, any device will do.
on_no_device = pytest.mark.parametrize("device", ("cuda", "cuda:99"))


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def qkv(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (1, 4, 64, 32), (1, 2, 48, 32), (1, 2, 48, 16)
    return tuple(torch.empty(shape, device=device, dtype=dtype) for shape in shapes)


@on_no_device
@pytest.mark.parametrize("backend", ("auto", "math"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_a_fake_call_gives_shapes(fake: None, device: str, backend: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(device, dtype)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    mask = torch.empty(1, 48, device=device, dtype=torch.bool)
    for options in (dict(), dict(causal=True, dropout_p=0.1), dict(mask=mask, scale=0.5)):
        out, lse = flash_attention(q, k, v, **options, return_lse=True, backend=backend)
        assert (out.shape, out.device, out.dtype) == (expected.shape, expected.device, dtype)
        assert (lse.shape, lse.device) == (out.shape[:3], out.device)
        assert flash_attention(q, k, v, **options, backend=backend).shape == out.shape
        assert explain(q, k, v, **options, backend=backend).plan.name == "math"


@on_no_device
def test_a_fake_call_is_traced(fake: None, device: str) -> None:
    q, k, v = qkv(device)
    compiled = torch.compile(Attend(causal=True), backend="eager", fullgraph=True)
    assert compiled(q, k, v).shape == (1, 4, 64, 16)
    (out,) = torch.export.export(Attend(causal=True), (q, k, v)).graph.output_node().args[0]
    assert out.meta["val"].shape == (1, 4, 64, 16)


def test_the_kernels_are_refused_for_a_device_that_is_not_here(fake: None) -> None:
    for backend in ("triton", "hopper"):
        with pytest.raises(BackendUnavailable, match="this machine has no such CUDA device"):
            flash_attention(*qkv("cuda:99", torch.bfloat16), backend=backend)


# ---------------------------------------------------------------------------------------------------------------------
# Devices
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hip", "capability", "arch"), ((None, (9, 0), "sm_90"), ("6.2", None, None)))
def test_a_gpu_is_described_by_its_properties(hip, capability, arch, described_anew, monkeypatch) -> None:
    properties = SimpleNamespace(
        name="a GPU", major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448
    )
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = DeviceTarget.of(torch.device("cuda"))
    assert found is DeviceTarget.of(torch.device("cuda", 1))
    assert (found.name, found.capability, found.arch, found.absent) == ("a GPU", capability, arch, False)
    assert (found.multiprocessors, found.shared_memory) == (132, 232448)
    assert DeviceTarget.of(torch.device("cuda", 2)) == DeviceTarget(
        "cuda", triton=found.triton, interpreted=found.interpreted, absent=True
    )


def test_the_current_gpu_of_a_machine_without_one(described_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert DeviceTarget.of(torch.device("cuda")).absent


def test_a_release() -> None:
    versions = dict.fromkeys(("3.7.1", "3.7", "3.7.0+git0123"), (3, 7)) | {"unknown": None, "": None, "3": None}
    assert {version: release(version) for version in versions} == versions


@pytest.mark.parametrize("backend", ("auto", "triton"))
def test_a_compiler_takes_what_is_known_of_a_part_for_constants(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is made while a call is traced, and stands in the graph; an unknown variant is checked meanwhile, once,
    though lengths and head dimensions are symbols."""
    device, asked = torch.device("cpu"), []
    part = DeviceTarget("cuda", "a part", (9, 0), triton="3.7.1", device=device)
    monkeypatch.setattr(DeviceTarget, "of", staticmethod(constant_when_compiled(lambda device: part)))
    monkeypatch.setattr(backends, "_try_import", lambda name: "")
    fused = Tuned("triton", (("triton", "fused", ""),), "measured")
    monkeypatch.setattr(Store, "tuned", lambda store, kind: fused)
    read_anew()
    monkeypatch.setattr(check, "check", lambda variant, device: asked.append(variant) or Finding(True, "fine"))
    graphs = []
    attend = torch.compile(
        flash_attention,
        fullgraph=True,
        dynamic=True,
        backend=lambda graph, inputs: graphs.append(graph) or (lambda *given: given[:1]),
    )
    pytest.importorskip("triton", reason="the shapes of a schedule are the kernels'")
    attend(*qkv("cpu"), backend=backend)
    (call,) = (node for node in graphs[0].graph.nodes if "flash_attend" in str(node.target))
    assert "triton" in str(call.args)
    assert "fused" in str(call.args)
    assert [variant.backward for variant in asked] == ["fused"] * (backend == "auto")  # by name nothing is checked
    assert all(type(variant.kind.head_dim) is int for variant in asked)
    read_anew()
