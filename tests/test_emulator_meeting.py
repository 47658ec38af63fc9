"""Lanes of a warp that meet: bar.warp.sync alone orders their memory accesses."""

from __future__ import annotations

import numpy as np
import pytest
from test_emulator import SCHEDULES, kinds, run_threads

# Each lane stores its number, and reads that of the next lane.
NEIGHBOUR = """
    .shared .align 4 .b32 words[32];
    mov.u32 %r1, words;
    shl.b32 %r2, %r0, 2;
    add.u32 %r2, %r2, %r1;
    st.shared.b32 [%r2], %r0;
    MEET
    xor.b32 %r3, %r0, 1;
    shl.b32 %r3, %r3, 2;
    add.u32 %r3, %r3, %r1;
    ld.shared.b32 %r4, [%r3];
    st.global.b32 [%rd0], %r4;
"""
COLLECTIVES = [
    "",
    "elect.sync %r9|%p1, -1;",
    "shfl.sync.idx.b32 %r9, %r0, 0, 31, -1;",
    "vote.sync.any.pred %p1, %p1, -1;",
    "redux.sync.add.u32 %r9, %r0, -1;",
    "match.any.sync.b32 %r9, %r0, -1;",
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("meet", COLLECTIVES)
def test_a_collective_orders_no_memory(meet, schedule):
    meet = "setp.eq.u32 %p1, %r0, 0;" + meet
    _, result = run_threads(NEIGHBOUR.replace("MEET", meet), schedule=schedule)
    assert kinds(result) == {"race"}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("meet", ["bar.warp.sync -1;", "bar.sync 0;", "barrier.sync 0;"])
def test_a_barrier_orders_memory(meet, schedule):
    out, result = run_threads(NEIGHBOUR.replace("MEET", meet), schedule=schedule)
    assert result.findings == ()
    np.testing.assert_array_equal(out[:, 0], np.arange(32) ^ 1)


# Warp 1 waits for two phases. One lane of it signals that the whole warp has seen the first.
SEEN = """
    .shared .align 8 .b64 bars[2];
    mov.u32 %r1, bars;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra READY;
    mbarrier.init.shared.b64 [%r1], 1;
    mbarrier.init.shared.b64 [%r1+8], 1;
READY:
    bar.sync 0;
    setp.ge.u32 %p2, %r0, 32;
    @%p2 bra WAITS;
    @%p1 exit;
    mbarrier.arrive.shared.b64 %rd9, [%r1];
BACK:
    mbarrier.try_wait.parity.shared.b64 %p3, [%r1+8], 0;
    @!%p3 bra BACK;
    mbarrier.arrive.shared.b64 %rd9, [%r1];
    exit;
WAITS:
    mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0;
    @!%p3 bra WAITS;
    MEET
    setp.eq.u32 %p5, %r0, 32;
    @%p5 mbarrier.arrive.shared.b64 %rd9, [%r1+8];
AGAIN:
    mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 1;
    @!%p3 bra AGAIN;
"""


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("meet", "expected"),
    [
        ("", {"phase-overrun"}),
        ("elect.sync %r9|%p4, -1;", set()),
        ("bar.warp.sync -1;", set()),
        # Lanes 0 and 1 meet, and lanes 2 to 31: lane 0 knows of itself and of lane 1 alone.
        ("setp.lt.u32 %p6, %r0, 34; @%p6 bar.warp.sync 3; @!%p6 bar.warp.sync 0xfffffffc;",
         {"phase-overrun"}),
    ],
)  # fmt: skip
def test_lanes_that_meet_know_that_their_waits_are_over(meet, expected, schedule):
    _, result = run_threads(SEEN.replace("MEET", meet), threads=64, schedule=schedule)
    assert kinds(result) - {"deadlock"} == expected
