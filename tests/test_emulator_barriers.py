"""Barriers of threads: blocks of any size, lanes that part, threads that exit."""

from __future__ import annotations

import numpy as np
import pytest
from test_emulator import SCHEDULES, kinds, run_threads

STORE = "st.global.b32 [%rd0], %r0;"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("barrier", ["barrier.sync 0;", "barrier.sync.aligned 0;"])
@pytest.mark.parametrize("threads", [8, 40, 64])
def test_a_barrier_of_a_block_that_is_no_multiple_of_a_warp_opens(schedule, barrier, threads):
    out, result = run_threads(barrier + STORE, threads=threads, schedule=schedule)
    assert result.findings == ()
    np.testing.assert_array_equal(out[:, 0], np.arange(threads))


EVEN_AND_ODD = """
    and.b32 %r1, %r0, 1;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra EVEN;
    barrier.sync 0;
    bra DONE;
EVEN:
    barrier.sync 0;
DONE:
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warp_has_arrived_when_the_last_of_its_lanes_has(schedule):
    out, result = run_threads(EVEN_AND_ODD + STORE, threads=40, schedule=schedule)
    assert result.findings == ()
    np.testing.assert_array_equal(out[:, 0], np.arange(40))


LEAVE = "setp.{} %p1, %r0, {}; @%p1 exit;"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("who", [("ge.u32", 32), ("lt.u32", 20), ("eq.u32", 39)])
def test_threads_that_exit_are_not_waited_for(schedule, who):
    body = LEAVE.format(*who) + "barrier.sync 0;" + STORE
    _, result = run_threads(body, threads=40, schedule=schedule)
    assert result.findings == ()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_barrier_does_not_count_a_warp_that_has_yet_to_come(schedule):
    body = """
        .shared .align 4 .b32 word;
        setp.lt.u32 %p1, %r0, 32;
        @%p1 bra READ;
        st.shared.b32 [word], 7;
        barrier.sync 0;
        exit;
    READ:
        barrier.sync 0;
        ld.shared.b32 %r0, [word];
    """
    out, result = run_threads(body + STORE, threads=33, schedule=schedule)
    assert result.findings == ()
    np.testing.assert_array_equal(out[:32, 0], 7)


CLUSTER = {"grid": (2, 1, 1), "cluster": (2, 1, 1)}
# Three of CTA 0's four warps arrive and exit at once. CTA 1's first one arrives after a long time.
ARRIVE_AND_EXIT = """
    .shared .align 4 .b32 word;
    mov.u32 %r1, %cluster_ctarank;
    setp.eq.u32 %p2, %r1, 1;
    setp.lt.u32 %p3, %r0, 32;
    @%p2 bra WRITER;
    barrier.cluster.arrive;
    @!%p3 exit;
    barrier.cluster.wait;
    mov.u32 %r2, word;
    mapa.shared::cluster.u32 %r3, %r2, 1;
    ld.shared::cluster.b32 %r0, [%r3];
    barrier.cluster.arrive;
    st.global.b32 [%rd0], %r0;
    exit;
WRITER:
    @!%p3 bra ARRIVES;
    mov.u32 %r4, 0;
LOOP:
    add.u32 %r4, %r4, 1;
    setp.lt.u32 %p4, %r4, 900;
    @%p4 bra LOOP;
    st.shared.b32 [word], 7;
ARRIVES:
    barrier.cluster.arrive;
    barrier.cluster.wait;
    barrier.cluster.arrive;
    barrier.cluster.wait;
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_cluster_barrier_counts_no_thread_that_arrived_and_exited_twice(schedule):
    out, result = run_threads(ARRIVE_AND_EXIT, threads=128, schedule=schedule, **CLUSTER)
    assert result.findings == ()
    np.testing.assert_array_equal(out[:32, 0], 7)


def test_the_cluster_barrier_does_not_open_without_a_thread_that_lives():
    body = """
        mov.u32 %r1, %cluster_ctarank;
        setp.eq.u32 %p2, %r1, 1;
        @%p2 bra NEVER;
        barrier.cluster.arrive;
        barrier.cluster.wait;
        exit;
    NEVER:
        barrier.sync 1, 64;
    """
    _, result = run_threads(body, threads=32, **CLUSTER)
    assert kinds(result) == {"deadlock"}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lanes_of_a_warp_may_be_a_generation_of_the_cluster_barrier_apart(schedule):
    body = """
        setp.lt.u32 %p1, %r0, 16;
        barrier.cluster.arrive;
        @%p1 bra FIRST;
        barrier.cluster.wait;
        barrier.cluster.arrive;
        barrier.cluster.wait;
        bra DONE;
    FIRST:
        barrier.cluster.wait;
        barrier.cluster.arrive;
        barrier.cluster.wait;
    DONE:
    """
    _, result = run_threads(body + STORE, threads=32, schedule=schedule, **CLUSTER)
    assert result.findings == ()


@pytest.mark.parametrize(("count", "expected"), [(32, set()), (31, {"arrivals-leftover"})])
def test_arrivals_that_end_no_phase_are_found_at_exit(count, expected):
    body = f"""
        .shared .align 8 .b64 bars[1];
        mov.u32 %r1, bars;
        setp.ne.u32 %p1, %r0, 0;
        @%p1 bra READY;
        mbarrier.init.shared.b64 [%r1], {count};
    READY:
        bar.sync 0;
        mbarrier.arrive.shared.b64 %rd9, [%r1];
    WAITS:
        mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0;
        @!%p3 bra WAITS;
    """
    _, result = run_threads(body + STORE)
    assert kinds(result) == expected
