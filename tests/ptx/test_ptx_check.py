"""A variant checks itself on its compiled code: in bfloat16, too, which only that shows without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from emulator.driver import Runner, executed
from flash_attend import check
from flash_attend.variant import ALL, NONE, Kind, Variant

pytestmark = pytest.mark.ptx

VARIANT = Variant("triton", "separate", Kind("bfloat16", "ieee", 64, 64, "none", *[False] * 3), *[False] * 3, NONE)
TANGENTS = VARIANT._replace(kind=VARIANT.kind._replace(mask="key", causal=True), tangents=ALL)
TF32 = VARIANT._replace(kind=VARIANT.kind._replace(dtype="float32", precision="tf32"))


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASH_ATTEND_CACHE", str(tmp_path))


def checked(arch: str, variant: Variant, **edit) -> check.Finding:
    with executed(Runner(arch, **edit)):
        return check.check(variant, torch.device("cpu"), anew=True)


@pytest.mark.parametrize(
    ("arch", "variant"),
    (
        ("sm_80", VARIANT),
        pytest.param("sm_90", VARIANT, marks=pytest.mark.proof),
        pytest.param("sm_80", TF32, marks=pytest.mark.proof),
        pytest.param("sm_90", TANGENTS, marks=pytest.mark.proof),
    ),
    ids=str,
)
def test_what_is_compiled_checks_right(arch: str, variant: Variant) -> None:
    finding = checked(arch, variant)
    assert finding.right, finding.reason


@pytest.mark.proof
@pytest.mark.parametrize("products", check.PRODUCTS[:-1], ids=" ".join)
@pytest.mark.parametrize("mask", ("none", "key", "dense"))
def test_what_is_compiled_checks_right_with_gradients(products: tuple[str, str], mask: str) -> None:
    kind = VARIANT.kind._replace(dtype=products[0], precision=products[1], mask=mask, causal=True)
    finding = checked("sm_80", VARIANT._replace(kind=kind, grouped=True, needed=ALL))
    assert finding.right, finding.reason


def test_a_mistake_of_the_compiler_is_found() -> None:
    finding = checked("sm_80", VARIANT, edit=lambda kernel, text: text.replace("max.f32", "min.f32"))
    assert not finding.right
    assert "its self-check failed here" in finding.reason
