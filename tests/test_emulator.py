"""The emulator's interface: what it refuses, instructions one by one, and its schedules.

`run_threads` and `module` are used by the other test_emulator_* files as well."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from build_kernels.emulator import (
    DeviceArray,
    Launch,
    LaunchError,
    PtxError,
    Result,
    Schedule,
    TensorMap,
    emulate,
)

REGISTERS = """
    .reg .pred %p<64>;
    .reg .b16 %rs<64>;
    .reg .b32 %r<256>;
    .reg .f32 %f<64>;
    .reg .b64 %rd<128>;
    .reg .f64 %fd<16>;
"""
SCHEDULES = [
    Schedule(policy="earliest"),
    Schedule(policy="latest"),
    *(Schedule(policy="random", seed=seed) for seed in range(3)),
]


def module(body, *, parameters=".param .u64 out", target="sm_90a", directives="", globals_=""):
    """A PTX module with one kernel `k` around the body."""
    return f"""
.version 8.8
.target {target}
.address_size 64
{globals_}
.visible .entry k({parameters})
{directives}
{{
{REGISTERS}
{body}
    ret;
}}
"""


def kinds(result: Result) -> set[str]:
    return {finding.kind for finding in result.findings}


def run_threads(
    body, *, threads=32, dtype=np.uint32, per_thread=1, extra=(), parameters="", target="sm_90a",
    schedule=None, globals_="", **launch,
):  # fmt: skip
    """Run the body; `%rd0` holds the address of the thread's own place in `out`.

    Returns (out [all threads, per_thread], result)."""
    grid = launch.pop("grid", (1, 1, 1))
    count = threads * math.prod(grid)
    out = DeviceArray(name="out", data=np.zeros((count, per_thread), dtype), initialised=False)
    prologue = f"""
    ld.param.u64 %rd0, [out];
    cvta.to.global.u64 %rd0, %rd0;
    mov.u32 %r0, %tid.x;
    mov.u32 %r255, %ctaid.x;
    mad.lo.u32 %r254, %r255, {threads}, %r0;
    mul.wide.u32 %rd1, %r254, {out.data.itemsize * per_thread};
    add.u64 %rd0, %rd0, %rd1;
"""
    ptx = module(
        prologue + body,
        parameters=".param .u64 out" + (", " + parameters if parameters else ""),
        target=target,
        globals_=globals_,
    )
    result = emulate(
        ptx,
        Launch(grid=grid, block=(threads, 1, 1), arch=target, **launch),
        [out, *extra],
        schedule,
    )
    return result.memory["out"], result


def one_lane(expression, *, dtype=np.uint32):
    """The value in register `%r1` (or `%rd2` for 64 bits) after the expression, in lane 0."""
    wide = np.dtype(dtype).itemsize == 8
    store = "st.global.b64 [%rd0], %rd2;" if wide else "st.global.b32 [%rd0], %r1;"
    out, result = run_threads(expression + store, dtype=dtype)
    assert result.findings == ()
    return out[0, 0]


def bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


# ---- instructions ----

INTEGER = [
    ("add.s32 %r1, 7, -9;", -2),
    ("sub.u32 %r1, 3, 5;", -2),
    ("mul.lo.s32 %r1, 100000, 100000;", 100000 * 100000),
    ("mov.u32 %r2, 0x80000001; mul.hi.u32 %r1, %r2, 6;", (0x80000001 * 6) >> 32),
    ("mov.u32 %r2, 0x80000001; mul.hi.s32 %r1, %r2, 6;", ((0x80000001 - 2**32) * 6) >> 32),
    ("mad.lo.s32 %r1, -3, 5, 100;", 85),
    ("div.s32 %r1, -7, 2;", -3),
    ("rem.s32 %r1, -7, 2;", -1),
    ("div.u32 %r1, 7, 2;", 3),
    ("min.s32 %r1, -1, 1;", -1),
    ("min.u32 %r1, -1, 1;", 1),
    ("max.s32 %r1, -1, 1;", 1),
    ("abs.s32 %r1, -5;", 5),
    ("neg.s32 %r1, 5;", -5),
    ("shl.b32 %r1, 1, 33;", 0),
    ("shr.u32 %r1, -1, 28;", 15),
    ("shr.s32 %r1, -16, 2;", -4),
    ("shr.s32 %r1, -16, 99;", -1),
    ("shf.l.wrap.b32 %r1, 0x80000000, 1, 1;", 3),
    ("shf.r.clamp.b32 %r1, 5, 9, 32;", 9),
    ("lop3.b32 %r1, 0xF0, 0xCC, 0xAA, 0x96;", 0xF0 ^ 0xCC ^ 0xAA),
    ("bfe.u32 %r1, 0x12345678, 8, 12;", 0x456),
    ("bfe.s32 %r1, 0x00000F00, 8, 4;", -1),
    ("bfi.b32 %r1, 0xAB, 0, 8, 8;", 0xAB00),
    ("prmt.b32 %r1, 0x33221100, 0x77665544, 0x7531;", 0x77553311),
    ("prmt.b32 %r1, 0x00000080, 0, 0x0008;", 0x808080FF),
    ("popc.b32 %r1, 0xF0F0;", 8),
    ("clz.b32 %r1, 1;", 31),
    ("brev.b32 %r1, 1;", 0x80000000),
    ("bfind.u32 %r1, 0x100;", 8),
    ("bfind.shiftamt.u32 %r1, 0x100;", 23),
    ("setp.lt.s32 %p1, -1, 1; selp.b32 %r1, 10, 20, %p1;", 10),
    ("setp.lt.u32 %p1, -1, 1; selp.b32 %r1, 10, 20, %p1;", 20),
    ("setp.eq.s32 %p2, 1, 1; setp.lt.and.s32 %p1|%p3, 1, 2, !%p2; selp.b32 %r1, 1, 0, %p1;", 0),
    ("mov.b64 %rd5, {1, 2}; mov.b64 {_, %r1}, %rd5;", 2),
    ("cvt.s32.f32 %r1, 0f00000000;", None),
    ("cvt.rzi.s32.f32 %r1, 0fC0300000;", -2),
    ("cvt.rni.s32.f32 %r1, 0f40200000;", 2),
    ("cvt.rzi.u32.f32 %r1, 0fBF800000;", 0),
    ("cvt.sat.u8.u32 %r1, 300;", 255),
    ("mov.b16 %rs1, 0xFFFE; cvt.s32.s16 %r1, %rs1;", -2),
]


@pytest.mark.parametrize(("text", "expected"), INTEGER, ids=[text for text, _ in INTEGER])
def test_integer_instructions(text, expected):
    if expected is None:
        with pytest.raises(PtxError, match=r"needs \.rni"):
            one_lane(text)
        return
    assert one_lane(text) == np.uint32(expected & 0xFFFFFFFF)


FLOAT = [
    ("add.f32 %r1, 0f3F800000, 0f40000000;", 3.0),
    ("add.rz.f32 %r1, 0f3F800000, 0f33800000;", 1.0),
    ("add.rp.f32 %r1, 0f3F800000, 0f30000000;", float(np.nextafter(np.float32(1), np.float32(2)))),
    ("fma.rn.f32 %r1, 0f3F800001, 0f3F800001, 0fBF800002;", 2.0**-46),
    ("fma.rm.f32 %r1, 0f3F800000, 0f3F800000, 0fB0000000;",
     float(np.nextafter(np.float32(1), np.float32(0)))),
    ("div.rn.f32 %r1, 0f3F800000, 0f40400000;", float(np.float32(1) / np.float32(3))),
    ("sqrt.rn.f32 %r1, 0f40000000;", float(np.sqrt(np.float32(2)))),
    ("ex2.approx.ftz.f32 %r1, 0f40400000;", 8.0),
    ("lg2.approx.f32 %r1, 0f41000000;", 3.0),
    ("rcp.rn.f32 %r1, 0f40800000;", 0.25),
    ("max.f32 %r1, 0f7FC00000, 0f3F800000;", 1.0),
    ("max.NaN.f32 %r1, 0f7FC00000, 0f3F800000;", math.nan),
    ("min.f32 %r1, 0f80000000, 0f00000000;", -0.0),
    ("max.f32 %r1, 0f80000000, 0f00000000;", 0.0),
    ("mul.ftz.f32 %r1, 0f00400000, 0f3F800000;", 0.0),
    ("mul.f32 %r1, 0f7F800000, 0f00000000;", math.nan),
    ("cvt.rn.f32.s32 %r1, 16777217;", 16777216.0),
    ("cvt.rp.f32.s32 %r1, 16777217;", 16777218.0),
    ("cvt.sat.f32.f32 %r1, 0f40000000;", 1.0),
    ("cvt.rni.f32.f32 %r1, 0f40200000;", 2.0),
    ("abs.f32 %r1, 0fBF800000;", 1.0),
    ("copysign.f32 %r1, 0fBF800000, 0f40000000;", -2.0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), FLOAT, ids=[text for text, _ in FLOAT])
def test_float_instructions(text, expected):
    want = 0x7FFFFFFF if math.isnan(expected) else bits(expected)
    assert hex(one_lane(text)) == hex(want)


def test_a_gpus_own_results_for_approximate_instructions():
    out = DeviceArray(name="out", data=np.zeros(1, np.float32))
    body = """
    ld.param.u64 %rd0, [out];
    ex2.approx.ftz.f32 %f1, 0f40400000;
    rcp.approx.ftz.f32 %f2, %f1;
    st.global.f32 [%rd0], %f2;
"""
    asked = []

    def measured(values):
        asked.append(values[0])
        return np.nextafter(np.exp2(values), np.float32(np.inf))

    result = emulate(
        module(body),
        Launch(grid=(1, 1, 1), block=(1, 1, 1), arch="sm_90a"),
        [out],
        approximate={"ex2.approx.ftz.f32": measured},
    )
    assert asked == [3.0]
    assert result.memory["out"][0] == np.float32(1) / np.nextafter(np.float32(8), np.float32(9))


def test_packed_halves():
    assert one_lane("cvt.rn.bf16x2.f32 %r1, 0f3F800000, 0f40000000;") == 0x3F804000
    assert one_lane("cvt.rn.f16x2.f32 %r1, 0f3F800000, 0f40000000;") == 0x3C004000
    # Ties go to even: 1 + 2^-8 lies between two bfloat16.
    assert one_lane("cvt.rn.bf16x2.f32 %r1, 0f3F808000, 0f3F818000;") == 0x3F803F82
    assert one_lane("add.rn.bf16x2 %r1, 0x3F803F80, 0x3F803F80;") == 0x40004000
    assert one_lane("mov.b16 %rs1, 0x4000; cvt.f32.bf16 %r1, %rs1;") == bits(2.0)


def test_wide_and_double():
    assert one_lane("mul.wide.s32 %rd2, -2, 3;", dtype=np.int64) == -6
    assert one_lane("mad.wide.u32 %rd2, -1, 2, 5;", dtype=np.int64) == 2 * 0xFFFFFFFF + 5
    text = "mov.u64 %rd3, -1; mul.hi.u64 %rd2, %rd3, %rd3;"
    assert one_lane(text, dtype=np.uint64) == 2**64 - 2
    # (1 + 2^-52)^2 - 1 in one rounding keeps the 2^-104 that a separate product loses.
    text = "fma.rn.f64 %rd2, 0d3FF0000000000001, 0d3FF0000000000001, 0dBFF0000000000000;"
    assert one_lane(text, dtype=np.float64) == 2**-51 + 2**-104


def test_fused_multiply_add_rounds_once():
    """Against exact rational arithmetic, on operands that make double rounding visible."""
    from fractions import Fraction

    rng = np.random.default_rng(1)
    a, b, c = (rng.integers(0x3F000000, 0x41000000, 32, dtype=np.uint32) for _ in range(3))
    array = DeviceArray(name="in", data=np.stack([a, b, c | np.uint32(1 << 31)]), read_only=True)
    body = """
    ld.param.u64 %rd2, [in];
    mul.wide.u32 %rd3, %r0, 4;
    add.u64 %rd2, %rd2, %rd3;
    ld.global.f32 %f1, [%rd2];
    ld.global.f32 %f2, [%rd2+128];
    ld.global.f32 %f3, [%rd2+256];
    fma.rn.f32 %f4, %f1, %f2, %f3;
    st.global.f32 [%rd0], %f4;
"""
    out, result = run_threads(body, dtype=np.float32, extra=[array], parameters=".param .u64 in")
    assert result.findings == ()
    for lane in range(32):
        x, y, z = (Fraction(float(v[lane].view(np.float32))) for v in array.data)
        exact = x * y + z
        got = out[lane, 0]
        error = abs(Fraction(float(got)) - exact)
        for other in (np.nextafter(got, np.float32(9)), np.nextafter(got, np.float32(-9))):
            assert error <= abs(Fraction(float(other)) - exact)


# ---- warp collectives and divergence ----


def test_shuffle_vote_match_redux_elect():
    body = """
    shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;
    shfl.sync.up.b32 %r2|%p1, %r0, 2, 0, -1;
    selp.b32 %r3, 1, 0, %p1;
    shfl.sync.idx.b32 %r4, %r0, 3, 0x181F, -1;
    and.b32 %r5, %r0, 1;
    setp.eq.u32 %p2, %r5, 1;
    vote.sync.ballot.b32 %r6, %p2, -1;
    redux.sync.max.u32 %r7, %r0, -1;
    redux.sync.add.s32 %r8, %r0, -1;
    shr.u32 %r9, %r0, 3;
    match.any.sync.b32 %r10, %r9, -1;
    elect.sync %r11|%p3, -1;
    selp.b32 %r12, 1, 0, %p3;
    st.global.v4.b32 [%rd0], {%r1, %r2, %r3, %r4};
    st.global.v4.b32 [%rd0+16], {%r6, %r7, %r8, %r10};
    st.global.v2.b32 [%rd0+32], {%r11, %r12};
"""
    out, result = run_threads(body, per_thread=12)
    assert result.findings == ()
    lane = np.arange(32)
    np.testing.assert_array_equal(out[:, 0], lane ^ 1)
    np.testing.assert_array_equal(out[:, 1], np.where(lane < 2, lane, lane - 2))
    np.testing.assert_array_equal(out[:, 2], lane >= 2)
    np.testing.assert_array_equal(out[:, 3], lane // 8 * 8 + 3)
    assert set(out[:, 4]) == {0xAAAAAAAA}
    assert set(out[:, 5]) == {31}
    assert set(out[:, 6]) == {31 * 16}
    np.testing.assert_array_equal(out[:, 7], 0xFF << (lane // 8 * 8))
    assert set(out[:, 8]) == {0}
    np.testing.assert_array_equal(out[:, 9], lane == 0)


def test_loop_trip_counts_diverge_and_reconverge():
    body = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
LOOP:
    add.u32 %r1, %r1, %r2;
    add.u32 %r2, %r2, 1;
    setp.le.u32 %p1, %r2, %r0;
    @%p1 bra LOOP;
    redux.sync.add.u32 %r3, %r1, -1;
    st.global.v2.b32 [%rd0], {%r1, %r3};
"""
    out, result = run_threads(body, per_thread=2)
    assert result.findings == ()
    expected = np.array([n * (n + 1) // 2 for n in range(32)])
    np.testing.assert_array_equal(out[:, 0], expected)
    assert set(out[:, 1]) == {expected.sum()}


def test_a_collective_that_not_all_lanes_reach_is_a_deadlock():
    body = """
    setp.lt.u32 %p1, %r0, 16;
    @%p1 bra LOW;
    bar.warp.sync -1;
    bra DONE;
LOW:
    bar.warp.sync -1;
DONE:
    st.global.b32 [%rd0], %r0;
"""
    _, result = run_threads(body)
    assert kinds(result) == {"deadlock"}
    assert "converge" in result.findings[0].message


def test_reading_a_lane_outside_the_mask():
    body = """
    setp.lt.u32 %p1, %r0, 16;
    mov.u32 %r1, 0;
    @!%p1 bra DONE;
    shfl.sync.idx.b32 %r1, %r0, 20, 31, 0xFFFF;
DONE:
    st.global.b32 [%rd0], %r1;
"""
    _, result = run_threads(body)
    assert kinds(result) == {"inactive-lane"}


# ---- memory ----


def test_atomics_and_generic_addresses():
    array = DeviceArray(name="counter", data=np.zeros(4, np.uint32))
    body = """
    ld.param.u64 %rd2, [counter];
    atom.global.add.u32 %r1, [%rd2], 2;
    atom.inc.u32 %r2, [%rd2+4], 5;
    red.global.max.u32 [%rd2+8], %r0;
    atom.global.cas.b32 %r3, [%rd2+12], 0, 7;
    st.global.b32 [%rd0], %r1;
"""
    out, result = run_threads(
        body, extra=[array], parameters=".param .u64 counter", schedule=Schedule(seed=4)
    )
    assert result.findings == ()
    assert sorted(out[:, 0]) == list(range(0, 64, 2))
    np.testing.assert_array_equal(result.memory["counter"], [64, 32 % 6, 31, 7])


def test_local_memory_is_private_to_the_thread():
    body = """
    .local .align 8 .b8 depot[16];
    mov.b64 %rd5, depot;
    cvta.local.u64 %rd6, %rd5;
    st.local.b32 [%rd5+4], %r0;
    ld.b32 %r1, [%rd6+4];
    st.global.b32 [%rd0], %r1;
"""
    out, result = run_threads(body)
    assert result.findings == ()
    np.testing.assert_array_equal(out[:, 0], np.arange(32))


def test_local_and_parameter_accesses_out_of_bounds():
    depot = ".local .align 8 .b8 depot[16]; mov.b64 %rd5, depot; "
    _, result = run_threads(depot + "st.local.b32 [%rd5+16], %r0;")
    assert kinds(result) == {"out-of-bounds"}
    _, result = run_threads("ld.param.b64 %rd5, [out+64];")
    assert kinds(result) == {"out-of-bounds"}


def test_constant_tables():
    body = """
    and.b32 %r1, %r0, 3;
    mul.wide.u32 %rd2, %r1, 4;
    mov.u64 %rd3, table;
    add.u64 %rd3, %rd3, %rd2;
    ld.global.b32 %r2, [%rd3];
    st.global.b32 [%rd0], %r2;
"""
    out, result = run_threads(body, globals_=".global .align 4 .u32 table[4] = {10, 20, 30, 0x28};")
    assert result.findings == ()
    np.testing.assert_array_equal(out[:, 0], np.tile([10, 20, 30, 40], 8))


FAULTS = {
    "out-of-bounds": "st.global.b32 [%rd0+4096], %r0;",
    "misaligned": "st.global.b16 [%rd0+1], 0;",
    "poison": "add.u32 %r1, %r9, 1; st.global.b32 [%rd0], %r1;",
    "read-only": "ld.param.u64 %rd2, [table]; st.global.b32 [%rd2], %r0;",
    "missing-griddepcontrol-wait": "ld.param.u64 %rd2, [before]; ld.global.b32 %r1, [%rd2];",
    "race": "ld.param.u64 %rd2, [out]; st.global.b32 [%rd2], %r0;",
    "trap": "trap;",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_of_memory_accesses(kind):
    table = DeviceArray(name="table", data=np.zeros(1, np.uint32), read_only=True)
    before = DeviceArray(name="before", data=np.zeros(1, np.uint32), dependent=True)
    _, result = run_threads(
        FAULTS[kind], extra=[table, before], parameters=".param .u64 table, .param .u64 before"
    )
    assert kinds(result) == {kind}
    finding = result.findings[0]
    assert finding.line > 0
    assert finding.text
    assert finding.thread is not None
    assert finding.thread.cta == (0, 0, 0)


def test_poison_reports_branches_and_addresses():
    branch = "setp.eq.u32 %p1, %r9, 1; @%p1 bra NEXT; mov.u32 %r1, 1; NEXT: mov.u32 %r1, 1;"
    _, result = run_threads(branch)
    assert kinds(result) == {"poison"}
    assert "predicate" in result.findings[0].message
    _, result = run_threads("add.u64 %rd5, %rd0, %rd9; ld.global.b32 %r1, [%rd5];")
    assert "poison" in kinds(result)


def test_poison_that_is_not_used_is_no_finding():
    body = """
    mov.u32 %r2, 5;
    setp.ge.u32 %p1, %r0, 0;
    selp.b32 %r1, %r2, %r9, %p1;
    st.global.b32 [%rd0], %r1;
"""
    _, result = run_threads(body)
    assert result.findings == ()


def test_waiting_for_the_grid_before_makes_its_data_readable():
    before = DeviceArray(name="before", data=np.full(1, 9, np.uint32), dependent=True)
    body = """
    griddepcontrol.wait;
    griddepcontrol.launch_dependents;
    ld.param.u64 %rd2, [before];
    ld.global.b32 %r1, [%rd2];
    st.global.b32 [%rd0], %r1;
"""
    out, result = run_threads(body, extra=[before], parameters=".param .u64 before")
    assert result.findings == ()
    assert set(out[:, 0]) == {9}


# ---- what is refused ----


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.b32 %r1, %r2;", r"PTX line \d+: unknown instruction frobnicate"),
        ("add.wobble.s32 %r1, %r0, 1;", r"PTX line \d+: unknown modifier .wobble"),
        ("add.s32 %r1, %r0;", "takes 3 operands"),
        ("mov.u32 %r1, %nosuch;", "unknown special register"),
        ("mov.u32 %r1, nosuch;", "unknown symbol nosuch"),
        ("bra NOWHERE;", "no label 'NOWHERE'"),
        ("add.s32 %rs1, %r0, 1;", "written as .s32"),
        ("ld.global.b64 %r1, [%rd0];", "written as .b64"),
        ("tcgen05.wait::ld.sync.aligned;", "does not exist on sm_90a"),
        ("cp.reduce.async.bulk [%rd0], [%r1], 16;", "supported are cp.async, "),
        ("fence.proxy.alias;", "needs one of the modifiers"),
    ],
)
def test_what_is_not_understood_names_the_line(body, message):
    with pytest.raises(PtxError, match=message):
        run_threads(body)


def launch(**changes):
    return Launch(**{"grid": (1, 1, 1), "block": (32, 1, 1), "arch": "sm_90a", **changes})


OUT = DeviceArray(name="out", data=np.zeros(32, np.uint32))
EMPTY = module("", directives=".reqntid 32, 1, 1")


@pytest.mark.parametrize(
    ("ptx", "make", "message"),
    [
        (EMPTY, lambda: (launch(arch="sm_100a"), [OUT]), "PTX is for .target sm_90a"),
        (EMPTY, lambda: (launch(block=(64, 1, 1)), [OUT]), r"\.reqntid \(32, 1, 1\)"),
        (
            module("", directives=".maxntid 32"),
            lambda: (launch(block=(64, 1, 1)), [OUT]),
            ".maxntid",
        ),
        (
            module("", directives=".reqnctapercluster 2, 1, 1"),
            lambda: (launch(), [OUT]),
            ".reqnctapercluster",
        ),
        (EMPTY, lambda: (launch(grid=(3, 1, 1), cluster=(2, 1, 1)), [OUT]), "multiple of the"),
        (EMPTY, lambda: (launch(cluster=(32, 1, 1), grid=(32, 1, 1)), [OUT]), "at most 16 CTAs"),
        (EMPTY, lambda: (launch(dynamic_shared_bytes=1 << 20), [OUT]), "dynamic_shared_bytes"),
        (EMPTY, lambda: (launch(grid=(0, 1, 1)), [OUT]), "3 ints >= 1"),
        (EMPTY, lambda: (launch(), []), "takes 1 arguments"),
        (EMPTY, lambda: (launch(), [1.5]), "a float for a .u64"),
        (EMPTY, lambda: (launch(), [1 << 64]), "does not fit 64 bits"),
        (EMPTY, lambda: (launch(), [np.int32(1)]), "has 8 bytes"),
        (EMPTY, lambda: (launch(), ["text"]), "expected an int"),
        (
            EMPTY,
            lambda: (launch(), [DeviceArray(name="a", data=OUT.data, minimum_bytes=256)]),
            "needs 256 bytes",
        ),
        (EMPTY, lambda: (launch(kernel="other"), [OUT]), "no .entry 'other'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(ptx, make, message):
    with pytest.raises((LaunchError, PtxError), match=message):
        emulate(ptx, *make())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (64, 65)}, "reach byte"),
        ({"box": (128, 8)}, "wider than the 128B swizzle"),
        ({"box": (4, 8)}, "no multiple of 16"),
        ({"box": (64, 257)}, r"expected 1\.\.256"),
        ({"strides": (120,)}, "multiples of 16"),
        ({"element_type": "float4"}, "element_type"),
        ({"swizzle": "256B"}, "swizzle"),
        ({"strides": ()}, "rank - 1 strides"),
    ],
)
def test_a_tensor_map_that_cannot_be_encoded_is_refused(changes, message):
    array = DeviceArray(name="a", data=np.zeros((64, 64), np.uint16))
    fields = {
        "array": array, "element_type": "bfloat16", "dims": (64, 64), "strides": (128,),
        "box": (64, 8), "swizzle": "128B",
    }  # fmt: skip
    ptx = module("", parameters=".param .align 64 .b8 map[128]")
    emulate(ptx, launch(), [TensorMap(**fields)])
    with pytest.raises(LaunchError, match=message):
        emulate(ptx, launch(), [TensorMap(**{**fields, **changes})])


def test_a_bad_schedule_is_refused():
    with pytest.raises(LaunchError, match="policy"):
        Schedule(policy="fastest")
    with pytest.raises(LaunchError, match="resident_ctas"):
        Schedule(resident_ctas=0)


def test_more_ctas_than_are_resident():
    """Later CTAs take the places of earlier ones, and their accesses are still told apart."""
    body = "st.global.b32 [%rd0], %r254;"
    out, result = run_threads(body, grid=(7, 1, 1), schedule=Schedule(resident_ctas=2))
    assert result.findings == ()
    np.testing.assert_array_equal(out[:, 0], np.arange(7 * 32))
    body = "setp.ne.u32 %p0, %r0, 0; ld.param.u64 %rd2, [out]; @!%p0 st.global.b32 [%rd2], %r255;"
    _, result = run_threads(body, grid=(4, 1, 1), schedule=Schedule(resident_ctas=1))
    assert kinds(result) == {"race"}


def test_a_seed_fixes_the_run():
    body = """
    ld.param.u64 %rd2, [counter];
    atom.global.add.u32 %r1, [%rd2], 1;
    st.global.b32 [%rd0], %r1;
"""

    def order(seed):
        counter = DeviceArray(name="counter", data=np.zeros(1, np.uint32))
        out, _ = run_threads(
            body, threads=128, extra=[counter], parameters=".param .u64 counter",
            schedule=Schedule(seed=seed),
        )  # fmt: skip
        return out[:, 0].tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)


# ---- dynamic shared memory ----

WRITES_BYTE_1023 = """
    mov.b32 %r1, pool;
    shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;
    add.s32 %r3, %r2, 1000;
    {access}
"""


@pytest.mark.parametrize(
    ("access", "needed"),
    [
        ("st.shared.u32 [%r3+20], %r0;", 1024),
        ("st.shared.v2.u32 [%r3+16], {%r0, %r0};", 1024),
        ("mbarrier.init.shared.b64 [%r3+16], 1;", 1024),
        # Reached or not: nobody gives so little to a kernel that has such an instruction.
        ("@%p1 bra OVER; st.shared.u8 [pool+1023], %r0; OVER:", 1024),
        # Through a register that is written twice nothing is known.
        ("mov.b32 %r4, %r3; setp.eq.u32 %p1, %r0, 99; @%p1 add.s32 %r4, %r4, 9000;", 0),
    ],
)
def test_less_dynamic_shared_memory_than_is_addressed_is_refused(access: str, needed: int) -> None:
    body = WRITES_BYTE_1023.replace("{access}", "setp.ne.u32 %p1, %r0, 99; " + access)
    module_text = ".extern .shared .align 16 .b8 pool[];"

    def run(size: int) -> Result:
        _, result = run_threads(body, threads=1, globals_=module_text, dynamic_shared_bytes=size)
        return result

    run(needed)
    if needed:
        with pytest.raises(LaunchError, match=rf"dynamic_shared_bytes: PTX line \d+ .* {needed} "):
            run(needed - 1)
