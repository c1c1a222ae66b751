"""The table of estimates: which rows it has, how both sides are told, and a kernel of FlexAttention's."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("triton", reason="compiling needs Triton")

from flash_attend.kernels import comparison
from flash_attend.kernels.comparison import (
    Row,
    Side,
    blocks_visited,
    print_decoding,
    print_estimates,
    print_windowed,
    rows,
)
from flash_attend.kernels.estimate import Estimate, Reading, total_tflops


def estimated(tflops: float, spills: float = 0.0) -> Estimate:
    return Estimate({"tensor": 1.0}, 1.0, 1.0, 1.0, spills, tflops)


OURS = Side("32x128 w4 s2, 128x32 w4 s2", {"backward_kv": estimated(200.0, 0.01), "backward_q": estimated(150.0)})
PEER = Side("64x64x64x64 w4 s2", {"backward_kv": estimated(100.0), "backward_q": estimated(100.0, 0.2)})
NONE = Side("MemoryError: too large", {})


def test_rows_are_of_parts_whose_rates_are_known() -> None:
    assert len(rows(["sm_80", "sm_89", "sm_90"])) == 2 * 2 * 5 * 3
    assert str(rows(["sm_90"])[1]) == "backward sm_90 half d64"
    assert rows(["sm_120"]) == []


def test_a_backward_counts_five_products_whatever_it_does() -> None:
    assert OURS.tflops == pytest.approx(5 / (4 / 200 + 3 / 150))
    apart = {"backward_k": estimated(300.0), "backward_v": estimated(200.0), "backward_q": estimated(150.0)}
    assert total_tflops(apart) == pytest.approx(5 / (3 / 300 + 2 / 200 + 3 / 150))
    assert total_tflops({"forward": estimated(180.0)}) == pytest.approx(180)


def test_a_window_visits_as_many_tiles_however_long_the_sequence_is() -> None:
    assert blocks_visited(1024, None, 128, 64) == sum(2 * (tile + 1) for tile in range(8))
    assert blocks_visited(1024, 2000, 128, 64) == blocks_visited(1024, None, 128, 64)
    assert blocks_visited(1024, 128, 128, 64) == 2 + 7 * 4
    assert blocks_visited(16384, 256, 128, 64) / 16384 == pytest.approx(6 / 128, rel=0.02)


def test_a_windowed_call_is_estimated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def compile_tasks(tasks, jobs, measure):
        return enumerate([(100, 8.0), (25, 2.0)])

    monkeypatch.setattr(comparison, "compile_tasks", compile_tasks)
    assert print_windowed(["sm_80"], "forward sm_80 half d64", 1, 256, 4096) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-5:] == ["100", "8.0", "25", "2.0", "4.0"]


def test_reading_a_cache_is_estimated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for share, code in ((0.9, 0), (0.8, 1)):
        found = [("16x64 w4 s2", 4096, Reading(264, 33, 1, 9e-5, 0.9))] * 5 + [("x", 1, Reading(1, 1, 1, 1.0, share))]

        def compile_tasks(tasks, jobs, measure, found=found):
            assert tasks[1] == ("sm_90", 64, 32, 256)
            return enumerate(found)

        monkeypatch.setattr(comparison, "compile_tasks", compile_tasks)
        assert print_decoding(["sm_90", "sm_120"], 1, 256) == code
        header, rule, row, *others = capsys.readouterr().out.splitlines()
        assert header.count("|") == rule.count("|") == row.count("|")
        assert row == "| sm_90 | 64 | 1 | 4096 | 16x64 w4 s2 | 33 | 264 | 90 | 90% |"
        assert len(others) == 5


@pytest.mark.parametrize(("peer", "code", "told"), [(PEER, 0, "1.75"), (NONE, 0, "too large"), (OURS, 1, "1.00")])
def test_the_table_and_its_exit_code(
    peer: Side, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_tasks(tasks, jobs, compile):
        assert [peer for _, peer in tasks] == [False, True]
        return [(1, peer), (0, OURS)]  # in any order

    monkeypatch.setattr(comparison, "compile_tasks", compile_tasks)
    assert print_estimates(["sm_80"], "backward sm_80 half d64", 1, markdown=True) == code
    header, rule, row = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == row.count("|")
    assert row.startswith("| backward sm_80 half d64 | 32x128 w4 s2, 128x32 w4 s2 | 125 | 1%/0% |")
    assert told in row


def test_without_the_peer_there_is_no_table(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(comparison, "BENCHMARKS", tmp_path / "benchmarks")
    assert print_estimates(["sm_80"], "", 1, markdown=False) == 2


def test_a_peer_that_is_not_installed_or_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of jvp_flash_attention, which nothing else here needs."""
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", None)
    assert "jvp_flash_attention" in comparison.measure(Row("sm_80", "half", 64, "tangents"), peer=True).tiles
    assert "d must be one of 16, 32, 64" in comparison.measure(Row("sm_80", "half", 96, "tangents"), peer=True).tiles


def test_a_kernel_of_flex_attention_compiles_and_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name, value in dict(ALWAYS_COMPILE="1", DUMP_PTXAS_LOG="1", CACHE_DIR=str(tmp_path)).items():
        monkeypatch.setenv(f"TRITON_{name}", value)
    side = comparison.measure(Row("sm_80", "half", 64, "forward"), peer=True)
    assert side.tiles == "128x64 w4 s3"
    assert side.estimates["forward"].redundancy == 1
    assert side.tflops == pytest.approx(179, rel=0.02)
