"""What the machine finds: programs that are wrong in one thing each, beside the same ones without the mistake."""

from __future__ import annotations

import numpy as np
import pytest
from numpy import ndarray as Array

from emulator.faults import Fault, Unsupported
from emulator.groups import operand_places
from emulator.machine import Options
from emulator.shared import BASE
from programs import MAP, run

pytestmark = pytest.mark.ptx

WORDS = np.arange(1, 129, dtype=np.uint32)
NAN = 0xFFFFFFFF


def out(count: int = 128) -> Array:
    return np.zeros(count, np.uint32)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    (
        ("ld.global.b32 %r1, [%rd10+4];", "load of 4 bytes at 0 bytes past the end of array0"),
        ("ld.global.b32 %r1, [%rd0+-4];", "load of 4 bytes at 4 bytes before array0"),
        ("st.global.b32 [%rd10+512], %r0;", "store of 4 bytes"),
        ("ld.global.b32 %r1, [%rd0+2];", "not aligned to 4"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd10];", "not aligned to 16"),
        ("red.global.add.f32 [%rd10+4], 0f00000000;", "addition of 4 bytes"),
        ("mov.b32 %r1, global_smem;\nld.shared.b32 %r2, [%r1+4096];", "byte 4096 of 4096 of shared memory"),
        ("mov.b32 %r1, global_smem;\nst.shared.b32 [%r1+-4], %r2;", "byte -4 of 4096"),
        ("mov.b32 %r1, global_smem;\nst.shared.v2.b32 [%r1+4], {%r2, %r2};", "store of 8 bytes at byte 4"),
        (
            "mov.b32 %r1, global_smem;\ncp.async.cg.shared.global [ %r1 + 0 ], [ %rd0 + 512 ], 0x10;",
            "copy of 16 bytes at 0 bytes past the end",
        ),
        ("st.global.b32 [%rd0], %r0;", "lanes store different values to one place"),
    ),
)
def test_accesses_that_are_out_of_bounds(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(body, WORDS, threads=128)


def test_a_predicate_keeps_an_access_within_bounds() -> None:
    body = "setp.lt.s32 %p1, %r0, 100;\n@%p1 ld.global.b32 %r1, [%rd10+112];\n@%p1 st.global.b32 [%rd11], %r1;"
    np.testing.assert_array_equal(run(body, WORDS, out(), threads=128)[1][:100], WORDS[28:128])


def test_the_fault_names_the_instruction_its_place_and_its_section() -> None:
    body = ".loc 1 7 3 // kernel.py:7:3\nld.global.b32 %r1, [%rd10+512];"
    with pytest.raises(
        Fault, match=r"`ld.global.b32 %r1, \[%rd10\+512\]`, line \d+ of program's PTX, from kernel.py:7:3 .*: ld\)"
    ):
        run(body, WORDS, threads=128)


def test_shared_memory_is_full_of_nan() -> None:
    body = "mov.b32 %r1, global_smem;\nld.shared.b32 %r2, [%r1+8];\nst.global.b32 [%rd10], %r2;"
    assert (run(body, out(), threads=128)[0] == NAN).all()


@pytest.mark.parametrize(
    "body", ("st.global.b32 [%rd10], 1;", "st.global.b32 [%rd10], 1;\nld.global.b32 %r1, [%rd10];")
)
def test_programs_that_write_to_one_place(body: str) -> None:
    run(body, out(), threads=128)
    with pytest.raises(Fault, match="another program of the launch"):
        run(body, out(), threads=128, programs=2)


# ---------------------------------------------------------------------------------------------------------------------
# Races and barriers
# ---------------------------------------------------------------------------------------------------------------------

EXCHANGE = """
shl.b32 %r1, %r0, 2;
add.s32 %r1, %r1, global_smem;
st.shared.b32 [%r1], %r0;
{barrier}
xor.b32 %r2, %r0, 64;
shl.b32 %r2, %r2, 2;
add.s32 %r2, %r2, global_smem;
ld.shared.b32 %r3, [%r2];
{after}
st.global.b32 [%rd10], %r3;
"""


@pytest.mark.parametrize("order", ("lockstep", "random"))
def test_a_barrier_orders_a_store_and_a_load(order: str) -> None:
    options = Options(order=order)
    for barrier in ("bar.sync 0;", "barrier.sync.aligned 0, 128;"):
        (found,) = run(EXCHANGE.format(barrier=barrier, after=""), out(), threads=128, options=options)
        np.testing.assert_array_equal(found, np.arange(128) ^ 64)
    with pytest.raises(Fault, match=r"race: read of byte \d+ of shared memory by warp \d, written by warp"):
        run(EXCHANGE.format(barrier="", after=""), out(), threads=128, options=options)


def test_what_was_read_may_be_overwritten_after_a_barrier_only() -> None:
    store = "st.shared.b32 [%r1], 5;"
    run(EXCHANGE.format(barrier="bar.sync 0;", after=f"bar.sync 0;\n{store}"), out(), threads=128)
    with pytest.raises(Fault, match="race: write of byte"):
        run(EXCHANGE.format(barrier="bar.sync 0;", after=store), out(), threads=128)


def test_a_barrier_of_others_orders_nothing() -> None:
    """Warps 0 and 1 meet, and 2 and 3; what is exchanged is between the pairs."""
    barrier = "shr.u32 %r8, %r0, 6;\nadd.s32 %r8, %r8, 1;\nbarrier.sync %r8, 64;"
    with pytest.raises(Fault, match="race"):
        run(EXCHANGE.format(barrier=barrier, after=""), out(), threads=128)


def test_lanes_of_a_warp_wait_for_each_other() -> None:
    body = EXCHANGE.replace("%r0, 64;", "%r0, 8;")
    for barrier in ("bar.warp.sync -1;", "bar.sync 0;"):
        (found,) = run(body.format(barrier=barrier, after=""), out(), threads=128)
        np.testing.assert_array_equal(found, np.arange(128) ^ 8)
    with pytest.raises(Fault, match="written by another of its lanes with no"):
        run(body.format(barrier="", after=""), out(), threads=128)
    (found,) = run(EXCHANGE.replace("%r0, 64;", "%r0, 0;").format(barrier="", after=""), out(), threads=128)
    np.testing.assert_array_equal(found, np.arange(128))


@pytest.mark.parametrize(
    ("body", "message"),
    (
        ("setp.lt.s32 %p1, %r0, 64;\n@%p1 bra $L;\nbar.sync 0;\n$L:\nret;", "deadlock: .*warp 2 at barrier 0"),
        ("setp.lt.s32 %p1, %r0, 16;\n@%p1 bra $L;\nbar.sync 0;\n$L:\nret;", "a part of one"),
        ("barrier.sync.aligned 1, 64;", "128 threads at barrier 1, which is for 64"),
        (
            "setp.lt.s32 %p1, %r0, 16;\n@%p1 bra $L;\nshfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;\n$L:\nret;",
            "a part of one",
        ),
    ),
)
def test_who_does_not_come(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(body, WORDS, threads=128)


def test_lanes_that_part_meet_again() -> None:
    """A loop that each lane leaves when it likes, and after it an instruction for whole warps."""
    body = """
    mov.b32 %r1, 0;
    $LOOP:
    add.s32 %r1, %r1, 1;
    setp.lt.s32 %p1, %r1, %r0;
    @%p1 bra $LOOP;
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    st.global.b32 [%rd10], %r2;
    """
    (found,) = run(body, out(), threads=128)
    np.testing.assert_array_equal(found, np.maximum(np.arange(128) ^ 1, 1))


def test_a_branch_by_a_table() -> None:
    body = """
    and.b32 %r1, %r0, 64;
    shr.u32 %r1, %r1, 6;
    $TABLE: .branchtargets $A, $B;
    brx.idx %r1, $TABLE;
    $A:
    mov.b32 %r2, 10;
    bra.uni $END;
    $B:
    mov.b32 %r2, 20;
    $END:
    st.global.b32 [%rd10], %r2;
    exit;
    """
    (found,) = run(body, out(), threads=128)
    np.testing.assert_array_equal(found, np.where(np.arange(128) < 64, 10, 20))


# ---------------------------------------------------------------------------------------------------------------------
# Copies of threads
# ---------------------------------------------------------------------------------------------------------------------

COPY = """
shl.b32 %r1, %r0, 2;
add.s32 %r1, %r1, global_smem;
cp.async.ca.shared.global [ %r1 + 0 ], [ %rd10 + 0 ], 0x4;
cp.async.commit_group;
cp.async.ca.shared.global [ %r1 + 1024 ], [ %rd10 + 0 ], 0x4;
{commit}
cp.async.wait_group {left};
bar.sync 0;
xor.b32 %r2, %r1, 256;
ld.shared.b32 %r3, [%r2{at}];
st.global.b32 [%rd11], %r3;
cp.async.wait_all;
"""


@pytest.mark.parametrize("copies", ("late", "early", "random"))
def test_copies_must_be_waited_for(copies: str) -> None:
    def copied(**how) -> Array:
        commit = how.pop("commit", "cp.async.commit_group;")
        return run(COPY.format(commit=commit, **how), WORDS, out(), threads=128, options=Options(copies))[1]

    other = WORDS[np.arange(128) ^ 64]
    np.testing.assert_array_equal(copied(left=1, at=""), other)
    np.testing.assert_array_equal(copied(left=0, at="+1024"), other)
    for wrong in (dict(left=1, at="+1024"), dict(left=2, at=""), dict(left=0, at="+1024", commit="")):
        with pytest.raises(Fault, match="into which an asynchronous copy is in flight"):
            copied(**wrong)


def test_who_copies_says_how_many_bytes_are_read() -> None:
    """All or none; the register of a thread that does not copy may hold anything."""
    body = """
    setp.lt.s32 %p1, %r0, 64;
    shl.b32 %r1, %r0, 2;
    add.s32 %r1, %r1, global_smem;
    st.shared.b32 [%r1], 0;
    @%p1 and.b32 %r2, %r0, 1;
    @%p1 mul.lo.s32 %r2, %r2, {size};
    @%p1 cp.async.ca.shared.global [ %r1 + 0 ], [ %rd10 + 0 ], 0x4, %r2;
    cp.async.wait_all;
    ld.shared.b32 %r3, [%r1];
    st.global.b32 [%rd11], %r3;
    """
    thread = np.arange(128)
    found = run(body.format(size=4), WORDS, out(), threads=128)[1]
    np.testing.assert_array_equal(found, np.where((thread < 64) & (thread % 2 == 1), WORDS, 0))
    with pytest.raises(Fault, match="a copy of a part of its bytes"):
        run(body.format(size=2), WORDS, out(), threads=128)


# ---------------------------------------------------------------------------------------------------------------------
# mbarriers and bulk copies
# ---------------------------------------------------------------------------------------------------------------------

BULK = f"""
setp.eq.s32 %p1, %r0, 0;
mov.b32 %r1, global_smem;
mov.b64 %rd5, {MAP};
@%p1 mbarrier.init.shared::cta.b64 [%r1+2048], {{count}};
{{fence}}
{{meet}}
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+2048], {{bytes}};
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
    [%r1], [%rd5, {{{{{{column}}, {{row}}}}}}], [%r1+2048];
{{wait}}
shl.b32 %r2, %r0, 2;
add.s32 %r2, %r2, %r1;
ld.shared.b32 %r3, [%r2];
st.global.b32 [%rd11], %r3;
{{end}}
"""
WAIT = "$WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1+2048], {phase};\n@!%p2 bra $WAIT;"
RIGHT = dict(
    count=1,
    fence="fence.proxy.async.shared::cta;",
    meet="bar.sync 0;",
    bytes=512,
    column=0,
    row=0,
    wait=WAIT.format(phase=0),
    end="",
)
TABLE_OF_WORDS = WORDS.reshape(4, 32)
CHOICE = (
    "mov.b32 %r90, 0;\n$T: .branchtargets $NEXT;\nbrx.idx %r90, $T;\n$NEXT:\n"  # as kernels with partitions have it
)


def bulk(copies: str = "late", seed: int = 0, **changes) -> Array:
    body = CHOICE + BULK.format(**RIGHT | changes)
    return run(body, TABLE_OF_WORDS, out(), threads=128, box=(4, 32), options=Options(copies, seed=seed))[1]


@pytest.mark.parametrize("copies", ("late", "early", "random"))
def test_bulk_copies(copies: str) -> None:
    for seed in range(5):
        np.testing.assert_array_equal(bulk(copies, seed), WORDS)
        np.testing.assert_array_equal(bulk(copies, seed, row=2)[:64], WORDS[64:])
        assert (bulk(copies, seed, row=2)[64:] == 0).all(), "beyond the end of a tensor there are zeros"
        assert (bulk(copies, seed, row=-3)[:96] == 0).all()


UNORDERED = "into which an asynchronous copy is in flight|written by a bulk copy"
MISTAKES = {
    "is not waited for": (dict(wait=""), UNORDERED),
    "the wrong phase is awaited": (dict(wait=WAIT.format(phase=1)), f"{UNORDERED}|deadlock"),
    "the phase after is awaited": (
        dict(wait=WAIT.format(phase=0) + WAIT.replace("$WAIT", "$W2").format(phase=1)), "deadlock"
    ),
    "a copy begins between multiples of 16 bytes": (dict(column=3), "is no multiple of 16 bytes"),
    "too many bytes are expected": (dict(bytes=528), "deadlock"),
    "too few bytes are expected": (dict(bytes=496), "deadlock"),
    "more arrivals are expected": (dict(count=2), "deadlock"),
    "more arrivals than expected": (
        dict(end="mbarrier.arrive.shared::cta.b64 _, [%r1+2048], 2;"), "more arrivals than an mbarrier expects"
    ),
    "no fence after the initialization": (dict(fence=""), "initialized without a fence since"),
    "no barrier after the initialization": (dict(meet=""), "whose initialization is not ordered before|no mbarrier"),
    "no mbarrier": (dict(wait=WAIT.format(phase=0).replace("2048", "2056")), "no mbarrier at byte 2056"),
    "invalidated too early": (
        dict(wait="@%p1 mbarrier.inval.shared::cta.b64 [%r1+2048];" + WAIT.format(phase=0)),
        "invalidated while a copy to it is in flight|no mbarrier",
    ),
    "invalidated while others may wait": (
        dict(end="@%p1 mbarrier.inval.shared::cta.b64 [%r1+2048];"), "nothing that orders its uses|no mbarrier"
    ),
    "initialized twice": (
        dict(end="@%p1 mbarrier.init.shared::cta.b64 [%r1+2048], 1;"), "initialized where there is one"
    ),
    "initialized where others read": (
        dict(end="@%p1 mbarrier.init.shared::cta.b64 [%r1+128], 1;"), "race: write of byte 128|race: read of byte"
    ),
}  # fmt: skip


@pytest.mark.parametrize("copies", ("late", "early", "random"))
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_with_mbarriers(name: str, copies: str) -> None:
    changes, message = MISTAKES[name]
    for seed in range(3):
        with pytest.raises(Fault, match=message):
            bulk(copies, seed, **changes)


def test_an_mbarrier_takes_the_place_of_what_was_read_and_of_another() -> None:
    reuse = """
    bar.sync 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r1+128], 1;
    @%p1 mbarrier.inval.shared::cta.b64 [%r1+2048];
    @%p1 mbarrier.init.shared::cta.b64 [%r1+2048], 1;
    """
    np.testing.assert_array_equal(bulk(end=reuse), WORDS)


@pytest.mark.parametrize("copies", ("late", "early", "random"))
def test_a_bulk_copy_says_nothing_of_another(copies: str) -> None:
    """Two copies on two mbarriers: who has waited for the second does not know of the first."""
    second = """
    @%p1 mbarrier.init.shared::cta.b64 [%r1+2064], 1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+2064], 512;
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1+512], [%rd5, {0, 0}], [%r1+2064];
    """
    other = RIGHT["wait"].replace("2048", "2064")
    both = other + RIGHT["wait"].replace("$WAIT", "$OTHER")
    np.testing.assert_array_equal(bulk(copies, wait=second + both), WORDS)
    with pytest.raises(Fault, match=f"{UNORDERED}|in flight when the programs end"):
        bulk(copies, wait=second + other)


def test_other_fences_and_waits() -> None:
    np.testing.assert_array_equal(bulk(fence="fence.mbarrier_init.release.cluster;"), WORDS)
    np.testing.assert_array_equal(bulk(wait=RIGHT["wait"].replace("mbarrier.try_wait", "mbarrier.test_wait")), WORDS)
    with pytest.raises(Fault, match="without a fence since"):
        bulk(fence="membar.cta;")


STORE = f"""
shl.b32 %r2, %r0, 2;
add.s32 %r2, %r2, global_smem;
st.shared.b32 [%r2], %r0;
{{fence}}
bar.sync 0;
setp.eq.s32 %p1, %r0, 0;
mov.b32 %r1, global_smem;
mov.b64 %rd5, {MAP};
@%p1 {{copy}} [%rd5, {{{{0, 1}}}}], [%r1];
{{commit}}
{{wait}}
bar.sync 0;
st.shared.b32 [%r2], 7;
"""
STORE_RIGHT = dict(
    fence="fence.proxy.async.shared::cta;",
    copy="cp.async.bulk.tensor.2d.global.shared::cta.bulk_group",
    commit="cp.async.bulk.commit_group;",
    wait="cp.async.bulk.wait_group.read 0;",
)


def stored(**changes) -> Array:
    return run(STORE.format(**STORE_RIGHT | changes), TABLE_OF_WORDS, threads=128, box=(4, 32))[0]


def test_bulk_copies_to_memory() -> None:
    want = TABLE_OF_WORDS.copy()
    want[1:] = np.arange(96).reshape(3, 32)
    np.testing.assert_array_equal(stored(), want)
    floats = np.zeros((4, 32), np.float32)
    body = STORE.format(**STORE_RIGHT | dict(copy="cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group"))
    body = body.replace("st.shared.b32 [%r2], %r0;", "st.shared.b32 [%r2], 0f40000000;")
    (found,) = run(body, floats, threads=128, box=(4, 32), programs=3)
    assert found.tolist() == [[0.0] * 32] + 3 * [[6.0] * 32]


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        (dict(fence=""), "stored without a fence since"),
        (dict(wait=""), "which is still being read"),
        (dict(wait="cp.async.bulk.wait_group.read 1;"), "which is still being read"),
        (dict(commit=""), "which is still being read"),
    ),
)
def test_mistakes_with_copies_to_memory(changes: dict[str, str], message: str) -> None:
    with pytest.raises(Fault, match=message):
        stored(**changes)


# ---------------------------------------------------------------------------------------------------------------------
# Products of four warps
# ---------------------------------------------------------------------------------------------------------------------


def descriptor(start: int, stride: int, mode: int, leading: int = 16) -> int:
    return (BASE + start) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def test_operands_lie_as_bulk_copies_leave_them() -> None:
    """Rows of 128 bytes whose chunks of 16 bytes change places: eight rows are 1024 bytes."""
    places = operand_places(descriptor(2048, 1024, 1), 64, 2, False)
    for row, k in ((0, 0), (1, 0), (3, 9), (9, 15), (63, 8)):
        chunk = (k // 8) ^ (row % 8)
        assert places[row, k] == 2048 + 128 * row + 16 * chunk + 2 * (k % 8)
    with pytest.raises(Unsupported, match="without swizzle"):
        operand_places(descriptor(0, 1024, 0), 64, 2, False)


GROUP = """
shl.b32 %r2, %r0, 7;
add.s32 %r2, %r2, global_smem;
mov.b32 %r3, 0x3F803F80;
{stores}
fence.proxy.async.shared::cta;
bar.sync 0;
mov.b64 %rd5, {left};
mov.b64 %rd6, {right};
{before}
{fence}
{behind}
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{ %r10, %r11, %r12, %r13 }}, {operand}, %rd6, 0, 1, 1{trans};
wgmma.commit_group.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{ %r10, %r11, %r12, %r13 }}, {operand}, %rd6, 1, 1, 1{trans};
wgmma.commit_group.sync.aligned;
{early}
wgmma.wait_group.sync.aligned {left_over};
{late}
st.global.b32 [%rd10], %r10;
"""


def product(
    early: str = "",
    late: str = "",
    left_over: int = 0,
    registers: bool = False,
    before: str = "",
    fence: str = "wgmma.fence.sync.aligned;",
    behind: str = "",
    partitions: bool = True,
) -> Array:
    stores = "\n".join(f"st.shared.b32 [%r2+{4 * n}], %r3;" for n in range(32))
    body = CHOICE * partitions + GROUP.format(
        before=before, fence=fence, behind=behind, early=early, late=late, left_over=left_over,
        stores=stores, left=descriptor(0, 1024, 1), right=descriptor(8192, 1024, 1),
        operand="{ %r3, %r3, %r3, %r3 }" if registers else "%rd5",
        trans=", 0" if registers else ", 0, 0",
    )  # fmt: skip
    return run(body, np.zeros(128, np.float32), threads=128, shared=16384)[0]


@pytest.mark.parametrize("registers", (False, True))
def test_products_of_four_warps(registers: bool) -> None:
    assert (product(registers=registers) == 32).all()


@pytest.mark.parametrize("write", ("mov.b32 %r10, 0;", "mov.b32 %r3, 0x3F803F80;"))
def test_registers_are_fenced_before_the_product_that_takes_them(write: str) -> None:
    product(before=write, registers=True)
    for wrong in (dict(fence=""), dict(behind=write)):
        with pytest.raises(Fault, match=r"without a wgmma\.fence since"):
            product(registers=True, **wrong)


def test_without_partitions_a_fence_comes_after_the_last_wait() -> None:
    """There Triton leaves out the one after the last write to a register."""
    again = GROUP[GROUP.index("wgmma.mma") : GROUP.index("{early}")].format(operand="%rd5", trans=", 0, 0")
    again += "wgmma.wait_group.sync.aligned 0;"
    product(partitions=False, behind="mov.b32 %r10, 0;", late=f"wgmma.fence.sync.aligned;\n{again}")
    for wrong in (dict(fence=""), dict(late=again)):
        with pytest.raises(Fault, match=r"without a wgmma\.fence since"):
            product(partitions=False, **wrong)


STORE_TO_OPERAND = "st.shared.b32 [%r2+64], 0;"


def test_operands_must_not_be_written_before_the_product_is_waited_for() -> None:
    # A wait orders what its own warp reads; the others' reads, only a barrier after it.
    product(late=f"bar.sync 0;\n{STORE_TO_OPERAND}")
    for wrong in (
        dict(early=STORE_TO_OPERAND),
        dict(late=STORE_TO_OPERAND),
        dict(late=f"bar.sync 0;\n{STORE_TO_OPERAND}", left_over=1),
    ):
        with pytest.raises(Fault, match="race: write"):
            product(**wrong)


@pytest.mark.parametrize("touch", ("add.f32 %r20, %r10, %r10;", "mov.b32 %r13, 0f00000000;", "mov.b32 %r20, %r11;"))
def test_sums_must_not_be_touched_before_the_product_is_waited_for(touch: str) -> None:
    """A move stands for no access, as the assembler leaves none of it, but for its copy's."""
    product(late=touch)
    use = "" if touch.endswith(("%r10;", "00;")) else "add.f32 %r21, %r20, %r20;"
    with pytest.raises(Fault, match="touched before it is waited for"):
        product(early=f"{touch}\n{use}")
    with pytest.raises(Fault, match="touched before it is waited for"):
        product(late=f"{touch}\n{use}", left_over=1)


# ---------------------------------------------------------------------------------------------------------------------
# Registers
# ---------------------------------------------------------------------------------------------------------------------

REGISTERS = """
setp.lt.s32 %p1, %r0, 128;
@%p1 bra $FIRST;
setmaxnreg.dec.sync.aligned.u32 {second};
bra.uni $END;
$FIRST:
setmaxnreg.inc.sync.aligned.u32 {first};
$END:
ret;
"""


def test_registers_are_taken_from_those_that_others_gave_back() -> None:
    run(REGISTERS.format(first=168, second=88), WORDS, threads=256, registers=128)
    with pytest.raises(Fault, match="deadlock"):
        run(REGISTERS.format(first=176, second=88), WORDS, threads=256, registers=128)
