"""The ahead-of-time check itself: what it compiles, what it reads, and that it can fail."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="compiling needs Triton")

from flash_attend.dispatch import choose, override_backward
from flash_attend.kernels import aot
from flash_attend.kernels.configs import (
    DROPOUT,
    FAMILIES,
    HOPPER_ROWS,
    ROWS,
    TANGENT_ROWS,
    Tile,
    Tiles,
    row_of,
    select_tangent_tiles,
    select_tiles,
    tile_of,
)
from flash_attend.kernels.estimate import Estimate
from flash_attend.kernels.sass import ProductLoop
from flash_attend.spec import AttentionSpec, MaskKind

SPEC = AttentionSpec(
    batch=2, heads=4, kv_heads=4, queries=300, keys=300, head_dim=64, value_dim=64, dtype=torch.bfloat16, scale=0.1
)
GOOD = aot.Report(
    kernel="forward",
    arch="sm_80",
    config="bfloat16 d64",
    registers=200,
    spill_bytes=0,
    shared_bytes=1024,
    tensor_core_instructions=8,
    triton="3.7.1",
)
LOOP = ProductLoop(instructions=480, exponentials=66, covered=66, spills=0)
EDGE = ProductLoop(instructions=860, exponentials=66, covered=64, spills=3)


FAST = Estimate({"tensor": 100, "shared memory": 130}, 200, 150, 1.0, 0.0, 190.0)
SLOW = FAST._replace(spill_share=0.3)


@pytest.fixture
def ready_to_compile(tmp_path, monkeypatch):
    for name, value in dict(ALWAYS_COMPILE="1", DUMP_PTXAS_LOG="1", CACHE_DIR=str(tmp_path)).items():
        monkeypatch.setenv(f"TRITON_{name}", value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(), None),
        (dict(spill_bytes=2500), None),
        (dict(estimate=FAST), None),
        (dict(estimate=FAST._replace(spill_share=0.02)), None),
        (dict(estimate=FAST._replace(spill_share=0.021)), "spills: 2.1% of its main loop"),
        (dict(estimate=FAST._replace(redundancy=1.5)), "multiplies 1.50 times as often as it has to"),
        (
            dict(estimate=FAST._replace(units={"tensor": 100, "shared memory": 131})),
            "waits for shared memory 1.31 times as long as for products",
        ),
        (dict(estimate=SLOW), "spills: 30.0% of its main loop"),
        (dict(estimate=FAST._replace(spill_share=0.13), row=("backward_q", "sm_80", "half", 256)), None),
        (dict(estimate=FAST._replace(spill_share=0.09, redundancy=2), heavy=True), None),
        (dict(estimate=FAST._replace(spill_share=0.11), heavy=True), "spills: 11.0% of its main loop"),
        (dict(estimate=FAST._replace(redundancy=2), kernel="backward_fused"), None),
        (dict(shared_bytes=166913), "needs 166913 bytes of shared memory, the part has 166912"),
        (dict(tensor_core_instructions=0), "has no tensor-core instructions"),
        (dict(tensor_core_instructions=0, kernel="delta"), None),
        (dict(serialized=True), "has its asynchronous products serialized"),
        (dict(error="CompilationError: no"), "CompilationError: no"),
    ],
)
def test_problems(change, problem):
    assert replace(GOOD, **change).problems() == ([] if problem is None else [problem])


def test_every_row_is_compiled():
    """What serves of each row, with dropout too, stands behind some case of its family."""
    for arch in ("sm_80", "sm_86", "sm_90"):
        plain = [case for case in aot.cases([arch]) if case.backend == "triton"]
        compiled = {(row_of(case.spec), case.spec.dropout_p > 0, case.tiles) for case in plain}
        for (family, kind, width), row in ROWS.items():
            if family != FAMILIES.get(arch, "sm_80"):
                continue
            tiles = Tiles(*(tiles[0] for tiles in row))
            assert ((kind, width), False, tiles) in compiled
            assert ((kind, width), False, tiles._replace(backward_fused=None)) in compiled
            own = tiles._replace(
                **{name: tile_of(text) for name, text in DROPOUT.get((family, kind, width), {}).items()}
            )
            assert ((kind, width), True, own._replace(backward_fused=None)) in compiled


def test_the_tiles_that_serve_the_fused_backward_are_compiled():
    for arch in ("sm_80", "sm_86", "sm_90"):
        cases = [case for case in aot.cases([arch]) if (case.backend, case.backward) == ("triton", "fused")]
        compiled = {(row_of(case.spec), case.tiles.backward_fused) for case in cases}
        for (family, kind, width), row in ROWS.items():
            if family == FAMILIES.get(arch, "sm_80"):
                assert {((kind, width), row.backward_fused[end]) for end in (0, -1)} <= compiled


def test_every_tile_for_tangents_is_compiled():
    for arch in ("sm_80", "sm_86", "sm_90"):
        cases = [case for case in aot.cases([arch]) if case.tangents]
        compiled = {(row_of(case.spec), case.tiles.forward) for case in cases}
        assert {row for row, _ in compiled} == {row[1:] for row in TANGENT_ROWS}
        family = FAMILIES.get(arch, "sm_80")
        own = {((kind, width), tile_of(text)) for (of, kind, width), text in TANGENT_ROWS.items() if of == family}
        assert own <= compiled
    for scope in (aot.COMMON, aot.SUBSET):
        assert any(case.tangents for case in aot.cases(aot.CHECKED, scope))


def test_smaller_scopes_have_every_kind_or_every_kernel_for_hopper():
    def compiled(scope, backend):
        return {case for case in aot.cases(aot.CHECKED, scope) if case.backend == backend}

    def rows(scope):
        return {(case.arch, *row_of(case.spec)) for case in compiled(scope, "triton")}

    assert compiled(aot.COMMON, "triton") < compiled(aot.ALL, "triton")
    assert rows(aot.COMMON) | rows(aot.SUBSET) < rows(aot.ALL)
    assert {row[:2] for row in rows(aot.COMMON)} == set(product(aot.CHECKED, aot.KINDS))
    assert rows(aot.SUBSET) == {("sm_90", "half", 96)}
    for scope in (aot.COMMON, aot.SUBSET):
        cases = {(case.backward, case.spec.head_dim, case.mode) for case in compiled(scope, "hopper")}
        assert cases == set(product(("separate", "fused"), HOPPER_ROWS, {"key+causal"}))


@pytest.mark.parametrize("backward", ["separate", "fused"])
def test_every_kernel_for_hopper_is_compiled_in_every_mode(backward):
    cases = [case for case in aot.cases(["sm_80", "sm_90"]) if (case.backend, case.backward) == ("hopper", backward)]
    compiled = {(case.arch, case.spec.head_dim, case.spec.mask, case.spec.causal) for case in cases}
    modes = product(HOPPER_ROWS, (MaskKind.NONE, MaskKind.KEY), (False, True))
    assert compiled == {("sm_90", *mode) for mode in modes}
    assert {(case.spec.window != (None, None), case.spec.sinks) for case in cases} >= {(False, False), (True, True)}
    for case in cases:
        with override_backward(backward):
            assert choose(case.spec, aot.PARTS["sm_90"], "hopper").backward == backward


def test_cases_take_the_tiles_that_a_call_would_take():
    for case in aot.cases(["sm_90"], aot.SUBSET):
        if case.tangents:
            assert case.tiles == select_tangent_tiles(case.spec, aot.PARTS["sm_90"])
            continue
        with override_backward(case.backward):
            plan = choose(case.spec, aot.PARTS["sm_90"], case.backend)
        assert case.tiles is plan.backend.tiles(case.spec, aot.PARTS["sm_90"], plan.backward)


def test_a_call_launches_every_kernel_of_its_mask():
    tiles = select_tiles(SPEC, aot.PARTS["sm_80"])
    names = {
        kind: [launch.prepared.kernel.__name__ for launch in aot.record_call(replace(SPEC, mask=kind), tiles)]
        for kind in MaskKind
    }
    attention = ["forward_kernel", "delta_kernel", "backward_kv_kernel", "backward_q_kernel"]
    assert names[MaskKind.NONE] == attention
    assert names[MaskKind.KEY] == ["key_schedule_kernel", *attention]
    assert sorted(names[MaskKind.DENSE]) == sorted(["dense_schedule_kernel", "line_kernel", "line_kernel", *attention])


def test_the_fused_backward_takes_the_place_of_two_kernels():
    tiles = select_tiles(SPEC, aot.PARTS["sm_80"], "fused")
    names = [aot.kernel_name(launch) for launch in aot.record_call(SPEC, tiles)]
    assert names == ["forward", "delta", "backward_fused"]


HOPPER = replace(GOOD, kernel="hopper_forward", arch="sm_90", loops=(LOOP, LOOP, EDGE, EDGE))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(), None),
        (dict(spill_bytes=256), None),
        (dict(spill_bytes=257), "spills 257 bytes"),
        (dict(shared_bytes=232449), "needs 232449 bytes of shared memory, the part has 232448"),
        (dict(tensor_core_instructions=0), "has no tensor-core instructions"),
        (dict(serialized=True), "has its asynchronous products serialized"),
        (dict(loops=(LOOP, LOOP, EDGE)), "has 3 loops with products, not 4"),
        (
            dict(loops=(LOOP, EDGE._replace(spills=0), EDGE, EDGE)),
            "takes 2 exponentials of its main loops while no product runs",
        ),
        (dict(loops=(LOOP, LOOP._replace(spills=1), EDGE, EDGE)), "spills in a main loop"),
    ],
)
def test_problems_of_the_forward_for_hopper(change, problem):
    assert replace(HOPPER, **change).problems() == ([] if problem is None else [problem])


BACKWARD = replace(HOPPER, kernel="hopper_backward_fused", head_dim=64, loops=(LOOP, LOOP))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(), None),
        (dict(spill_bytes=384), None),
        (dict(spill_bytes=385), "spills 385 bytes"),
        (dict(kernel="hopper_backward", spill_bytes=17), "spills 17 bytes"),
        (dict(loops=(LOOP, LOOP, LOOP)), "has 3 loops with products, not 2"),
        (dict(loops=(LOOP, LOOP._replace(spills=12))), None),
        (dict(loops=(LOOP, LOOP._replace(spills=13))), "spills in a main loop"),
        (dict(head_dim=128, loops=(LOOP, LOOP._replace(spills=1))), "spills in a main loop"),
        (dict(kernel="hopper_backward", loops=(LOOP, LOOP._replace(spills=1))), "spills in a main loop"),
        (dict(kernel="hopper_backward_wide", spill_bytes=0, loops=(LOOP._replace(covered=34), LOOP)), None),
        (
            dict(kernel="hopper_backward_wide", spill_bytes=0, loops=(LOOP._replace(covered=33), LOOP)),
            "takes 33 exponentials of its main loops while no product runs",
        ),
        (dict(kernel="hopper_backward_q", spill_bytes=128, loops=(LOOP, LOOP, EDGE, EDGE)), None),
    ],
)
def test_problems_of_the_backward_for_hopper(change, problem):
    assert replace(BACKWARD, **change).problems() == ([] if problem is None else [problem])


def test_the_forward_for_hopper_compiles_well_in_turns(ready_to_compile):
    """On whichever of the supported Tritons is here. The table has the other one, and the backward."""
    case = next(case for case in aot.cases(["sm_90"], aot.SUBSET) if case.backend == "hopper")
    tiles = case.tiles._replace(forward=case.tiles.forward._replace(ping_pong=True))
    (report,) = aot.compile_case(replace(case, tiles=tiles), ["hopper_forward"])
    assert not report.problems()
    assert [loop.exponentials for loop in report.loops[:2]] == [66, 66]  # 64 of a row's weights, two of corrections


@pytest.mark.parametrize("arch", sorted(aot.PARTS.keys() - {*aot.CHECKED, "sm_86"}))
def test_compiles_for_every_other_part(arch, ready_to_compile):
    """Within their shared memory, those too that share the rows of others."""
    case = aot.Case.of(arch, replace(SPEC, batch=64, mask=MaskKind.KEY, causal=True))
    reports = aot.compile_case(case, ["forward", "backward_q"])
    assert [report.kernel for report in reports] == ["forward", "backward_q"]
    for report in reports:
        assert report.arch == arch
        assert report.registers > 32
        assert not report.problems()


def test_a_tile_that_is_too_large_is_found(ready_to_compile):
    huge = Tile(64, 64, 4, 4)
    spec = replace(SPEC, head_dim=256, value_dim=256, dtype=torch.bfloat16)
    (report,) = aot.compile_case(aot.Case("sm_80", spec, Tiles(huge, huge, huge)), ["forward"])
    assert report.spill_bytes > 100
    assert report.shared_bytes > aot.PARTS["sm_80"].shared_memory
    assert len(report.problems()) == 2
    assert any(problem.startswith("spills: ") for problem in report.problems())


def test_what_does_not_compile_is_reported(ready_to_compile):
    odd = Tile(48, 64, 4, 2)  # no power of two
    (report,) = aot.compile_case(aot.Case("sm_80", SPEC, Tiles(odd, odd, odd)), ["forward"])
    assert report.error
    assert report.problems() == [report.error]


def test_json(capsys):
    only = "forward sm_80 bfloat16 d64 dv64 key+causal 128"
    assert aot.main(["--json", "--arch", "sm_80", "--common", "--only", only, "--jobs", "1"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    keys = "kernel arch config registers spill_bytes shared_bytes tensor_core_instructions triton problems"
    assert list(row) == keys.split()
    assert (row["kernel"], row["arch"], row["problems"]) == ("forward", "sm_80", [])
    assert row["spill_bytes"] < 100, "outside of its main loop, where a few are free"
    assert row["tensor_core_instructions"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subset", "--only", "no such kernel"], "nothing matches"),
        (["--arch", "sm_75"], "invalid choice"),
        (["--jobs", "0"], "at least 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        aot.main(arguments)
    assert message in capsys.readouterr().err
