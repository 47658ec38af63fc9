"""Strong loads that find old values, and schedules that freeze a CTA."""

from __future__ import annotations

import numpy as np
import pytest
from test_emulator import SCHEDULES, kinds, run_threads

from build_kernels.emulator import DeviceArray, LaunchError, Schedule
from build_kernels.emulator.execution import machine

FROZEN = [Schedule(seed=seed, freezes=True) for seed in range(3)]

# CTA 0 stores 7, and CTA 1 reads it: CTA 0 is over when CTA 1 starts, if one is resident.
HAND_OVER = """
    ld.param.u64 %rd2, [flag];
    setp.ne.u32 %p1, %r0, 0;
    @%p1 exit;
    setp.ne.u32 %p2, %r255, 0;
    @%p2 bra SECOND;
    WRITE
    exit;
SECOND:
    READ
    st.global.u32 [%rd0], %r1;
"""
STORE, LOAD = "st.relaxed.gpu.global.u32 [%rd2], 7;", "ld.relaxed.gpu.global.u32 %r1, [%rd2];"
POLL = "POLL: LOAD setp.eq.u32 %p3, %r1, 0; @%p3 bra POLL;"


def hand_over(write, read, schedule):
    flag = DeviceArray(name="flag", data=np.zeros(2, np.uint32))
    out, result = run_threads(
        HAND_OVER.replace("WRITE", write).replace("READ", read).replace("LOAD", LOAD),
        grid=(2, 1, 1),
        extra=[flag],
        parameters=".param .u64 flag",
        schedule=schedule,
    )
    return out[32, 0], result


ALONE = [Schedule(policy=s.policy, seed=s.seed, resident_ctas=1) for s in SCHEDULES]


@pytest.mark.parametrize("schedule", [*ALONE, *FROZEN], ids=str)
def test_a_load_that_waits_for_nothing_finds_the_old_value_in_every_run(schedule):
    seen, result = hand_over(STORE, "LOAD", schedule)
    assert (seen, result.findings) == (0, ())


@pytest.mark.parametrize("schedule", [*ALONE, *SCHEDULES, *FROZEN], ids=str)
@pytest.mark.parametrize("write", [STORE, "atom.relaxed.gpu.global.add.u32 %r1, [%rd2], 7;"])
def test_a_poll_finds_the_new_value(write, schedule):
    seen, result = hand_over(write, POLL, schedule)
    assert (seen, result.findings) == (7, ())


@pytest.mark.parametrize("schedule", ALONE, ids=str)
def test_a_load_after_the_thread_knows_of_the_write_finds_it(schedule):
    """Of its own write; and of one that a release and an acquire order before it."""
    seen, _ = hand_over("", STORE + "LOAD", schedule)
    assert seen == 7
    release = "mov.u32 %r2, 1; st.release.gpu.global.u32 [%rd2+4], %r2;"
    acquire = "A: ld.acquire.gpu.global.u32 %r2, [%rd2+4]; setp.eq.u32 %p3, %r2, 0; @%p3 bra A;"
    seen, result = hand_over(STORE + release, acquire + "LOAD", schedule)
    assert (seen, result.findings) == (7, ())


@pytest.mark.parametrize("schedule", ALONE, ids=str)
def test_an_old_value_is_acquired_from_the_write_that_made_it(schedule):
    """The reader waits for 1 or more, and finds 1 after 2 was written."""
    write = "st.global.u32 [%rd2+4], 9; " + "".join(
        f"mov.u32 %r2, {n}; st.release.gpu.global.u32 [%rd2], %r2;" for n in (1, 2)
    )
    read = POLL.replace("LOAD", LOAD.replace("relaxed", "acquire"))
    seen, result = hand_over(write, read + "ld.global.u32 %r1, [%rd2+4];", schedule)
    assert (seen, result.findings) == (9, ())


def test_a_frozen_cta_is_held_up_until_the_rest_stands_still(monkeypatch):
    """Each of 4 CTAs adds 60 to a counter, in short turns; a frozen one adds its rest alone."""
    monkeypatch.setattr(machine, "QUANTUM", 8)
    body = """
        ld.param.u64 %rd2, [counter];
        setp.ne.u32 %p1, %r0, 0;
        @%p1 exit;
        mov.u32 %r1, 0;
    LOOP:
        atom.relaxed.gpu.global.add.u32 %r2, [%rd2], 1;
        add.u32 %r1, %r1, 1;
        setp.lt.u32 %p2, %r1, 60;
        @%p2 bra LOOP;
        st.global.u32 [%rd0], %r2;
    """

    def added_alone(schedule: Schedule) -> int:
        counter = DeviceArray(name="counter", data=np.zeros(1, np.uint32))
        parameters = ".param .u64 counter"
        out, result = run_threads(
            body, grid=(4, 1, 1), extra=[counter], parameters=parameters, schedule=schedule
        )
        assert result.findings == ()
        *_, others, last = sorted(out.reshape(4, 32)[:, 0].tolist())
        assert last == 4 * 60 - 1
        return last - others

    assert max(added_alone(Schedule(seed=seed, freezes=True)) for seed in range(4)) > 40
    assert max(added_alone(Schedule(seed=seed)) for seed in range(4)) < 20


def test_a_frozen_schedule_still_finds_a_deadlock(monkeypatch):
    monkeypatch.setattr(machine, "QUANTUM", 8)
    _, result = hand_over("", POLL, FROZEN[0])
    assert kinds(result) == {"deadlock"}


def test_only_random_schedules_freeze():
    with pytest.raises(LaunchError, match=r"freezes: the policy must be random \(got 'latest'\)"):
        Schedule(policy="latest", freezes=True)
