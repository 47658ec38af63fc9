"""Instructions that the project's own kernels do not use, and foreign ones do."""

from __future__ import annotations

import numpy as np
import pytest
from test_emulator import SCHEDULES, kinds, module, run_threads

from build_kernels.emulator import DeviceArray, Launch, PtxError, Schedule, emulate


def pair(low: float, high: float) -> int:
    return int(np.array([low, high], np.float32).view(np.uint64)[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("add.rn.f32x2 %rd2, %rd3, %rd4;", (4.5, 1.0)),
        ("sub.rn.f32x2 %rd2, %rd3, %rd4;", (-1.5, -5.0)),
        ("mul.rn.ftz.f32x2 %rd2, %rd3, %rd4;", (4.5, -6.0)),
        ("fma.rn.f32x2 %rd2, %rd3, %rd4, %rd4;", (7.5, -3.0)),
    ],
)
def test_packed_f32(text, expected):
    body = f"mov.b64 %rd3, {pair(1.5, -2)}; mov.b64 %rd4, {pair(3, 3)}; {text}"
    store = "st.global.b64 [%rd0], %rd2;"
    out, result = run_threads(body + store, dtype=np.uint64, target="sm_100a")
    assert result.findings == ()
    assert tuple(out[0].view(np.float32)) == expected
    with pytest.raises(PtxError, match="f32x2 exists on sm_100"):
        run_threads(body + store, dtype=np.uint64, target="sm_90a")


def test_b128_registers_hold_any_bits():
    body = """
        .reg .b128 %q;
        mov.b64 %rd2, 0xfff8000000000001;
        mov.b64 %rd3, 0x7ff4000000000002;
        mov.b128 %q, {%rd2, %rd3};
        mov.b128 {%rd4, %rd5}, %q;
        st.global.v2.b64 [%rd0], {%rd4, %rd5};
    """
    out, result = run_threads(body, dtype=np.uint64, per_thread=2)
    assert result.findings == ()
    assert out[0].tolist() == [0xFFF8000000000001, 0x7FF4000000000002]


# Lane t's register i holds elements 2 (t mod 4) and the next of row t / 4 of matrix i.
STMATRIX = """
    .shared .align 128 .b8 tile[512];
    mov.u32 %r1, tile;
    shl.b32 %r2, %r0, 4;
    add.u32 %r2, %r2, %r1;
    shl.b32 %r3, %r0, 1;
    mul.lo.u32 %r4, %r3, 0x10001;
    add.u32 %r4, %r4, 0x10000;
    add.u32 %r5, %r4, 0x400040;
    add.u32 %r6, %r5, 0x400040;
    add.u32 %r7, %r6, 0x400040;
    stmatrix.sync.aligned.m8n8.xCOUNT.TRANS shared.b16 [%r2], {REGISTERS};
    MEET
    shl.b32 %r8, %r0, 4;
    add.u32 %r8, %r8, %r1;
    setp.lt.u32 %p1, %r0, LANES;
    @!%p1 exit;
    ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r8];
    st.global.v4.b32 [%rd0], {%r10, %r11, %r12, %r13};
"""


def stmatrix(count, trans, meet="bar.warp.sync -1;", schedule=None):
    text = STMATRIX.replace("COUNT", str(count)).replace("LANES", str(8 * count))
    text = text.replace("TRANS ", "trans." if trans else "").replace("MEET", meet)
    text = text.replace("REGISTERS", ", ".join(f"%r{4 + i}" for i in range(count)))
    out, result = run_threads(text, per_thread=4, schedule=schedule)
    return out[: 8 * count].view(np.uint16).reshape(count, 8, 8), result


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, trans, schedule):
    out, result = stmatrix(count, trans, schedule=schedule)
    assert result.findings == ()
    expected = np.arange(64).reshape(8, 8) + 64 * np.arange(count)[:, None, None]
    np.testing.assert_array_equal(out, expected.transpose(0, 2, 1) if trans else expected)


def test_stmatrix_orders_no_memory():
    """A lane reads the row whose address it gave. Its neighbour's needs a barrier."""
    _, result = stmatrix(4, False, meet="xor.b32 %r0, %r0, 1;")
    assert kinds(result) == {"race"}


# Lane t's row holds 16-bit elements 8 t and the next. Only the rows that are loaded are written.
LDMATRIX = """
    .shared .align 128 .b8 tile[512];
    mov.u32 %r1, tile;
    shl.b32 %r2, %r0, 4;
    add.u32 %r2, %r2, %r1;
    shl.b32 %r3, %r0, 3;
    mad.lo.u32 %r4, %r3, 0x10001, 0x10000;
    add.u32 %r5, %r4, 0x20002;
    add.u32 %r6, %r5, 0x20002;
    add.u32 %r7, %r6, 0x20002;
    setp.lt.u32 %p1, %r0, LANES;
    @%p1 st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7};
    MEET
    ldmatrix.sync.aligned.m8n8.xCOUNT.TRANS shared.b16 {REGISTERS}, [%r2];
STORES
"""


def ldmatrix(count, trans, meet="bar.warp.sync -1;", schedule=None):
    text = LDMATRIX.replace("COUNT", str(count)).replace("LANES", str(8 * count))
    text = text.replace("TRANS ", "trans." if trans else "").replace("MEET", meet)
    text = text.replace("REGISTERS", ", ".join(f"%r{10 + i}" for i in range(count)))
    stores = "".join(f"    st.global.b32 [%rd0+{4 * i}], %r{10 + i};\n" for i in range(count))
    return run_threads(text.replace("STORES", stores), per_thread=count, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans, schedule):
    out, result = ldmatrix(count, trans, schedule=schedule)
    assert result.findings == ()
    matrices = np.arange(64 * count).reshape(count, 8, 8)
    expected = matrices.transpose(0, 2, 1) if trans else matrices
    # [matrix, lane, element]: lane t has the elements 2 (t mod 4) and the next of row t / 4.
    np.testing.assert_array_equal(
        out.view(np.uint16).reshape(32, count, 2).transpose(1, 0, 2),
        expected.reshape(count, 32, 2),
    )


def test_ldmatrix_orders_no_memory():
    """A lane reads the row whose address it gives. Its neighbour's needs a barrier."""
    assert ldmatrix(4, False, meet="")[1].findings == ()
    assert kinds(ldmatrix(4, False, meet="xor.b32 %r2, %r2, 16;")[1]) == {"race"}


def test_ldmatrix_of_rows_that_were_never_written_is_poison():
    _, result = ldmatrix(4, False, meet="bar.warp.sync -1; xor.b32 %r2, %r2, 256;")
    assert result.findings == ()
    _, result = ldmatrix(2, False, meet="bar.warp.sync -1; xor.b32 %r2, %r2, 256;")
    assert kinds(result) == {"poison"}


# Each CTA adds 1 to its place, then to those of the clusters that it cancels.
CANCEL = """
    .reg .b128 %q;
    .shared .align 16 .b8 response[16];
    .shared .align 8 .b64 bar[1];
    ld.param.u64 %rd2, [out];
    setp.ne.u32 %p1, %r0, 0;
    @%p1 exit;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, bar;
    mov.u32 %r3, response;
    mov.u32 %r4, 0;
    mbarrier.init.shared.b64 [%r2], 1;
    fence.mbarrier_init.release.cluster;
WORK:
    mul.wide.u32 %rd3, %r1, 4;
    add.u64 %rd3, %rd2, %rd3;
    red.relaxed.gpu.global.add.u32 [%rd3], 1;
    mbarrier.arrive.expect_tx.shared.b64 %rd4, [%r2], 16;
    TRY_CANCEL.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r3], [%r2];
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p2, [%r2], %r4;
    @!%p2 bra WAIT;
    xor.b32 %r4, %r4, 1;
    ld.shared.v2.b64 {%rd5, %rd6}, [%r3];
    fence.proxy.async.shared::cta;
    mov.b128 %q, {%rd5, %rd6};
    clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p3, %q;
    clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r1, %q;
    @%p3 bra WORK;
""".replace("TRY_CANCEL", "clusterlaunchcontrol.try_cancel")


def cancel(schedule, text=CANCEL):
    out = DeviceArray(name="out", data=np.zeros(8, np.uint32))
    prologue = "mov.u32 %r0, %tid.x;"
    launch = Launch(grid=(8, 1, 1), block=(32, 1, 1), arch="sm_100a")
    return emulate(module(prologue + text, target="sm_100a"), launch, [out], schedule)


@pytest.mark.parametrize("resident", [1, 3, 64])
@pytest.mark.parametrize("policy", ["earliest", "latest", "random"])
def test_cluster_launch_control_does_each_cluster_once(policy, resident):
    result = cancel(Schedule(policy=policy, resident_ctas=resident))
    assert result.findings == ()
    assert result.memory["out"].tolist() == [1] * 8


def test_the_place_of_no_cluster_is_poison():
    result = cancel(Schedule(policy="latest"), CANCEL + "st.global.u32 [%rd2], %r1;")
    assert "poison" in kinds(result)


def test_mapa_to_no_cta_is_a_fault_at_its_use_only():
    body = """
        .shared .align 8 .b32 word[2];
        mov.u32 %r1, word;
        mapa.shared::cluster.u32 %r2, %r1, %r0;
        setp.lt.u32 %p1, %r0, LIMIT;
        @%p1 st.shared::cluster.u32 [%r2], %r0;
    """
    assert run_threads(body.replace("LIMIT", "1"))[1].findings == ()
    assert "poison" in kinds(run_threads(body.replace("LIMIT", "2"))[1])


ALLOCATE = """
    .shared .align 4 .b32 slot[1];
    mov.u32 %r1, %cluster_ctarank;
    setp.eq.u32 %p1, %r1, 1;
    @LEAVE exit;
    tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [slot], 64;
    bar.warp.sync -1;
    ld.shared.b32 %r2, [slot];
    tcgen05.dealloc.cta_group::2.sync.aligned.b32 %r2, 64;
"""


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("leave", "expected"), [("!%p2", set()), ("%p1", {"deadlock"})])
def test_the_ctas_of_a_pair_allocate_together(leave, expected, schedule):
    text = "setp.eq.u32 %p2, 0, 0;" + ALLOCATE.replace("LEAVE", leave)
    pair = {"grid": (2, 1, 1), "cluster": (2, 1, 1)}
    _, result = run_threads(text, target="sm_100a", schedule=schedule, **pair)
    assert kinds(result) == expected


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("reduction", "kind", "expected"),
    [("popc.u32", "r", 40), ("and.pred", "p", 0), ("or.pred", "p", 1)],
)
def test_a_barrier_reduces_the_predicates_of_its_threads(reduction, kind, expected, schedule):
    write = "mov.u32 %r1, %r2;" if kind == "r" else "selp.u32 %r1, 1, 0, %p2;"
    body = f"""
        setp.lt.u32 %p1, %r0, 40;
        barrier.red.or.pred %p3, 1, 64, %p1;
        barrier.cta.red.{reduction} %{kind}2, 1, 64, %p1;
        {write}
        @!%p3 trap;
        st.global.u32 [%rd0], %r1;
    """
    out, result = run_threads(body, threads=64, schedule=schedule)
    assert result.findings == ()
    assert (out == expected).all()


def test_a_bulk_prefetch_moves_nothing():
    out, result = run_threads(
        "cp.async.bulk.prefetch.L2.global [%rd0], 16; st.global.u32 [%rd0], 7;"
    )
    assert result.findings == ()
    assert (out == 7).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_lanes_that_initialise_one_mbarrier_are_reported(schedule):
    body = """
        .shared .align 8 .b64 bar;
        LEADER mbarrier.init.shared.b64 [bar], 1;
        st.global.u32 [%rd0], 7;
    """
    leader = "setp.eq.u32 %p1, %r0, 0; @%p1"
    assert run_threads(body.replace("LEADER", leader), schedule=schedule)[1].findings == ()
    _, result = run_threads(body.replace("LEADER", ""), schedule=schedule)
    assert kinds(result) == {"barrier-reinitialised"}


# Each thread copies 16 bytes and reads those of the thread before.
COPIES = """
    .shared .align 16 .b8 tile[1024];
    .shared .align 8 .b64 bar;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra READY;
    mbarrier.init.shared.b64 [bar], 64;
READY:
    bar.sync 0;
    ld.param.u64 %rd2, [x];
    shl.b32 %r1, %r0, 4;
    cvt.u64.u32 %rd3, %r1;
    add.u64 %rd2, %rd2, %rd3;
    mov.u32 %r2, tile;
    add.u32 %r3, %r2, %r1;
    cp.async.cg.shared.global [%r3], [%rd2], 16LIMIT;
    WAIT
    add.u32 %r4, %r1, 1008;
    and.b32 %r4, %r4, 1023;
    add.u32 %r4, %r4, %r2;
    ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r4];
    st.global.v4.b32 [%rd0], {%r10, %r11, %r12, %r13};
"""
GROUP = "cp.async.commit_group; cp.async.wait_group 0;"
ALL_COPIES = "cp.async.wait_all;"
ARRIVAL = "mbarrier.arrive.shared.b64 _, [bar];"
ARRIVAL_OF_COPIES = "cp.async.mbarrier.arrive.noinc.shared.b64 [bar];"
ARRIVAL_BESIDE_COPIES = "cp.async.mbarrier.arrive.shared.b64 [bar];" + ARRIVAL
SPIN = "SPIN: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0; @!%p2 bra SPIN;"


def copied(wait, limit="", schedule=None):
    data = np.arange(256, dtype=np.uint32) + 1
    x = DeviceArray(name="x", data=data, read_only=True)
    text = COPIES.replace("WAIT", wait).replace("LIMIT", limit)
    out, result = run_threads(
        text, threads=64, per_thread=4, extra=[x], parameters=".param .u64 x", schedule=schedule
    )
    return np.roll(out.reshape(64, 4), -1, axis=0), data.reshape(64, 4), result


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    "wait",
    [
        GROUP + "bar.sync 0;",
        ALL_COPIES + "bar.sync 0;",
        ARRIVAL_OF_COPIES + SPIN,
        ARRIVAL_BESIDE_COPIES + SPIN,
    ],
)
def test_threads_copy_to_shared_memory(wait, schedule):
    out, data, result = copied(wait, schedule=schedule)
    assert result.findings == ()
    np.testing.assert_array_equal(out, data)


def test_the_bytes_beyond_the_source_are_zero():
    out, data, result = copied(GROUP + "bar.sync 0;", ", 8")
    assert result.findings == ()
    np.testing.assert_array_equal(out, data * [1, 1, 0, 0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    "wait",
    [
        "bar.sync 0;",
        "cp.async.wait_group 0; bar.sync 0;",
        "cp.async.commit_group; cp.async.wait_group 1; bar.sync 0;",
        GROUP,
        ARRIVAL + SPIN,
    ],
)
def test_a_copy_that_is_not_waited_for_is_found(wait, schedule):
    assert "race" in kinds(copied(wait, schedule=schedule)[2])
