"""The emulator's hooks for faults: arrays torn between two loads, traps, and time that leaps."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
from test_emulator import SCHEDULES, kinds, module

from build_kernels.campaign.fault import Torn
from build_kernels.campaign.moments import CHILD_DIED, Tearing, tear_at_moments
from build_kernels.emulator import DeviceArray, Launch, LaunchError, Result, Schedule, emulate

# Each CTA stores the flag that it reads.
READ_FLAG = """
    mov.u32 %r0, %ctaid.x;
    ld.param.u64 %rd0, [out];
    ld.param.u64 %rd1, [flags];
    ld.global.b32 %r1, [%rd1+4];
    mul.wide.u32 %rd2, %r0, 4;
    add.u64 %rd0, %rd0, %rd2;
    st.global.b32 [%rd0], %r1;
"""
# Thread 0 spins until a word is set, or 10 s of %globaltimer are over.
BOUNDED_WAIT = """
    ld.param.u64 %rd1, [flags];
    mov.u64 %rd2, %globaltimer;
AGAIN:
    ld.relaxed.gpu.global.b32 %r1, [%rd1];
    mov.u64 %rd3, %globaltimer;
    sub.u64 %rd3, %rd3, %rd2;
    setp.gt.u64 %p1, %rd3, 10000000000;
    @%p1 trap;
    setp.eq.u32 %p2, %r1, 0;
    @%p2 bra AGAIN;
"""
PARAMETERS = ".param .u64 out, .param .u64 flags"


def run(body: str, *, schedule: Schedule | None = None, ctas: int = 4, on_load=None) -> Result:
    out = DeviceArray(name="out", data=np.full(ctas, 99, np.int32))
    flags = DeviceArray(name="flags", data=np.zeros(2, np.int32))
    ptx = module(body, parameters=PARAMETERS)
    launch = Launch(grid=(ctas, 1, 1), block=(1, 1, 1), arch="sm_90a")
    return emulate(ptx, launch, [out, flags], schedule or Schedule(seed=1), on_load=on_load)


def run_torn(tears: dict[int, dict[str, dict[int, int]]], schedule: Schedule | None = None):
    """Run READ_FLAG with these tears, each before the load of its number, from 0."""
    loads = []

    def on_load(array, offsets, depends):
        loads.append((array, offsets.tolist()))
        return tears.get(len(loads) - 1, {})

    result = run(READ_FLAG, schedule=schedule, on_load=on_load)
    assert loads == [("flags", [4, 5, 6, 7])] * 4
    return result


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("load", range(5))
def test_an_array_has_other_contents_from_a_load_on(load: int, schedule: Schedule) -> None:
    result = run_torn({load: {"flags": {1: 7}}}, schedule)
    assert result.findings == ()
    assert sorted(result.memory["out"]) == [0] * load + [7] * (4 - load)


def test_tears_follow_one_another_and_leave_other_elements() -> None:
    result = run_torn({1: {"flags": {1: -(2**31), 0: 5}}, 3: {"flags": {1: 1}}})
    assert sorted(result.memory["out"]) == [-(2**31), -(2**31), 0, 1]
    assert result.memory["flags"].tolist() == [5, 1]


def seen(torn: Torn, result: Result) -> list[str]:
    """Return what the CTAs read, as a problem."""
    return [str(result.memory["out"].tolist())]


def at_moments(judge, *moments: int, element: int = 1) -> Tearing:
    """Tear an element of the flags at these moments of READ_FLAG."""
    torn = Torn(rows=(), arrays={"flags": {element: 7}})
    tearing = Tearing(torn=torn, wanted=lambda moment: moment in moments, judge=judge)
    tear_at_moments(partial(run, READ_FLAG), {"it": tearing}, {"flags": 4})
    return tearing


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_launch_that_is_forked_at_a_load_is_the_one_that_is_torn_there(moment: int) -> None:
    tearing = at_moments(seen, moment)
    (whole,) = seen(tearing.torn, run_torn({moment: {"flags": {1: 7}}}))
    assert tearing.problems == [f"torn at moment {moment}, before a load of flags: {whole}"]
    assert (tearing.moments, tearing.runs) == (3, 1)


def test_the_first_problem_of_a_tear_is_its_last_and_loads_of_others_are_no_moments() -> None:
    assert at_moments(seen, 1, 2, 3).runs == 1
    assert at_moments(lambda torn, result: [], 1, 2, 3).runs == 3
    assert at_moments(seen, 1, 2, 3, element=0).moments == 0


def test_a_child_that_raises_or_dies_is_a_problem() -> None:
    def raises(torn: Torn, result: Result) -> list[str]:
        raise ValueError("no")

    problem = "torn at moment 2, before a load of flags: ValueError: no"
    assert at_moments(raises, 2).problems == [problem]
    dies = at_moments(lambda torn, result: os._exit(3), 2)
    assert dies.problems == [f"torn at moment 2, before a load of flags: {CHILD_DIED}"]


@pytest.mark.parametrize(
    ("tear", "problem"),
    [
        ({"mask": {0: 1}}, "'mask': the arrays are out, flags"),
        ({"flags": {2: 1}}, r"an element of 0..1 \(got 2\)"),
        ({"flags": {-1: 1}}, r"an element of 0..1 \(got -1\)"),
        ({"flags": {0: 2**31}}, "2147483648 does not fit int32"),
    ],
)
def test_a_tear_that_does_not_fit_is_refused(tear: dict[str, dict[int, int]], problem: str) -> None:
    with pytest.raises(LaunchError, match=problem):
        run_torn({0: tear})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_trap_ends_the_launch_of_every_thread(schedule: Schedule) -> None:
    first_traps = """
    mov.u32 %r0, %ctaid.x;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 trap;
    ld.param.u64 %rd1, [flags];
AGAIN:
    ld.relaxed.gpu.global.b32 %r1, [%rd1];
    bra AGAIN;
"""
    result = run(first_traps, schedule=schedule)
    assert result.trapped
    assert kinds(result) == {"trap"}
    assert result.memory["out"].tolist() == [99] * 4


@pytest.mark.quick(1)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_wait_with_a_bound_on_the_clock_ends_by_its_trap(schedule: Schedule) -> None:
    result = run(BOUNDED_WAIT, schedule=schedule)
    assert result.trapped
    assert kinds(result) == {"trap"}


@pytest.mark.quick(1)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_wait_that_is_served_never_reaches_its_bound(schedule: Schedule) -> None:
    """The last CTA computes for long before it sets the word that the others poll."""
    serves = """
    mov.u32 %r0, %ctaid.x;
    setp.ne.u32 %p3, %r0, 3;
    @%p3 bra WAIT;
    mov.u32 %r2, 0;
WORK:
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p4, %r2, 3000;
    @%p4 bra WORK;
    ld.param.u64 %rd1, [flags];
    st.relaxed.gpu.global.b32 [%rd1], 1;
    ret;
WAIT:
"""
    result = run(serves + BOUNDED_WAIT, schedule=schedule)
    assert not result.trapped
    assert result.findings == ()


@pytest.mark.slow
def test_an_endless_spin_that_looks_at_the_clock_is_a_deadlock() -> None:
    endless = "AGAIN:\n    mov.u64 %rd2, %globaltimer;\n    bra AGAIN;\n"
    result = run(endless, ctas=1)
    assert kinds(result) == {"deadlock"}
    assert not result.trapped
