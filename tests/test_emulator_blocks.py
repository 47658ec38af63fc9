"""Blocks: instructions that run as one function do what they do one by one."""

from __future__ import annotations

import numpy as np
import pytest
from test_emulator import SCHEDULES, kinds, run_threads

from build_kernels.emulator import Schedule
from build_kernels.emulator.instructions import block, table

# Lanes take two ways, by a loop of as many rounds as the lane, before the last results.
STEPS = """
    mov.b32 %r1, 7;
    mov.u32 %r9, %laneid;
LOOP:
    add.s32 %r1, %r1, %r9;
    shl.b32 %r2, %r1, 3;
    xor.b32 %r1, %r2, 99;
    setp.lt.s32 %p1|%p2, %r1, %r9;
    selp.b32 %r3, %r1, %r2, %p1;
    mul.wide.s32 %rd4, %r3, -5;
    mov.b64 {%r4, %r5}, %rd4;
    cvt.s64.s32 %rd5, %r5;
    add.s64 %rd4, %rd4, %rd5;
    sub.u32 %r9, %r9, 1;
    setp.gt.s32 %p3, %r9, 0;
    @%p3 bra LOOP;
    shfl.sync.bfly.b32 %r6, %r4, 5, 31, -1;
    vote.sync.ballot.b32 %r7, !%p2, -1;
    add.s32 %r8, %r6, %r7;
    st.global.v4.b32 [%rd0], {%r8, %r1, %r4, %r5};
"""
# Of the sums, one lane's is poison, and only those that it enters.
POISON = """
    setp.ne.u32 %p1, %r0, 9;
    @%p1 mov.b32 %r1, 5;
    mov.b32 %r2, 6;
    add.u32 %r3, %r1, %r2;
    selp.b32 %r4, %r3, %r2, %p1;
    add.u32 %r5, %r2, %r2;
    st.global.b32 [%rd0], STORED;
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("threads", [32, 64, 20])
def test_a_block_does_what_its_instructions_do(
    threads: int, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"threads": threads, "per_thread": 4, "schedule": schedule}
    made = []
    compiled = block._compile
    monkeypatch.setattr(block, "_compile", lambda parts: made.append(parts) or compiled(parts))
    table._decode_all.cache_clear()
    fast, of_fast = run_threads(STEPS, **options)
    assert made
    monkeypatch.setattr(table, "blocks_of", lambda runs, instructions: [None] * len(runs))
    table._decode_all.cache_clear()
    slow, of_slow = run_threads(STEPS, **options)
    table._decode_all.cache_clear()
    np.testing.assert_array_equal(fast, slow)
    assert [f.kind for f in of_fast.findings] == [f.kind for f in of_slow.findings]
    assert of_fast.steps == of_slow.steps


@pytest.mark.parametrize(("stored", "found"), [("%r3", {"poison"}), ("%r4", set()), ("%r5", set())])
def test_a_block_hands_poison_on(stored: str, found: set[str]) -> None:
    assert kinds(run_threads(POISON.replace("STORED", stored))[1]) == found
