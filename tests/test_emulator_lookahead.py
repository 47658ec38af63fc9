"""The look ahead of a load: what it takes for two runs to be the same, whatever the load reads."""

from __future__ import annotations

import numpy as np
import pytest
from test_emulator import module

from build_kernels.emulator import DeviceArray, Launch, Schedule, emulate

LOAD = """
    mov.u32 %r0, %tid.x;
    ld.param.u64 %rd0, [out];
    ld.param.u64 %rd1, [flags];
    mul.wide.u32 %rd2, %r0, 4;
    add.u64 %rd0, %rd0, %rd2;
    mov.b32 %r9, 0;
"""
PARAMETERS = ".param .u64 out, .param .u64 flags"


def depends(body: str, *, new: int = 6) -> bool:
    """Return whether the launch depends on the first load of flags[0], 4 before and `new` after."""
    seen = []

    def on_load(array, offsets, depends):
        if array == "flags" and not seen:
            seen.append(depends({"flags": {0: new}}))
        return {}

    out = DeviceArray(name="out", data=np.full(32, 99, np.int32))
    flags = DeviceArray(name="flags", data=np.array([4, 0], np.int32), read_only=True)
    launch = Launch(grid=(1, 1, 1), block=(32, 1, 1), arch="sm_90a")
    ptx = module(LOAD + body, parameters=PARAMETERS)
    result = emulate(ptx, launch, [out, flags], Schedule(seed=1), on_load=on_load)
    assert result.findings == ()
    return seen[0]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # It is compared with numbers that are on one side of both contents, or between them.
        ("setp.lt.u32 %p1, %r1, 9; @%p1 mov.b32 %r9, 1; st.global.b32 [%rd0], %r9;", False),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 mov.b32 %r9, 1; st.global.b32 [%rd0], %r9;", True),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 bra ON; trap; ON: st.global.b32 [%rd0], %r9;", False),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bra ON; mov.b32 %r9, 1; ON: bar.sync 0;", True),
        # It is stored, or an address, or read by other lanes, or never.
        ("st.global.b32 [%rd0], %r1;", True),
        ("sub.u32 %r2, %r1, 4; mul.wide.u32 %rd3, %r2, 4; add.u64 %rd3, %rd1, %rd3;"
         "ld.global.b32 %r2, [%rd3];", True),
        ("shfl.sync.idx.b32 %r2, %r1, 0, 31, -1; st.global.b32 [%rd0], %r2;", True),
        ("and.b32 %r2, %r1, 1; shfl.sync.idx.b32 %r2, %r2, 0, 31, -1; st.global.b32 [%rd0], %r2;",
         False),
        ("bar.sync 0; st.global.b32 [%rd0], %r9;", False),
        # It is overwritten; or not in every lane; or selected, by what is not known or is.
        ("bar.sync 0; mov.b32 %r1, 3; st.global.b32 [%rd0], %r1;", False),
        ("setp.lt.u32 %p1, %r0, 9; @%p1 mov.b32 %r1, 3; st.global.b32 [%rd0], %r1;", True),
        ("ld.global.b32 %r3, [%rd1+4]; setp.eq.u32 %p1, %r3, 7; selp.b32 %r1, %r1, 1, %p1;"
         "st.global.b32 [%rd0], %r1;", True),
        ("setp.eq.u32 %p1, %r9, 7; selp.b32 %r1, %r1, 1, %p1; st.global.b32 [%rd0], %r1;", False),
        # A loop of as many rounds.
        ("AGAIN: sub.u32 %r1, %r1, 1; setp.ne.u32 %p1, %r1, 0; @%p1 bra AGAIN;", True),
    ],
)  # fmt: skip
def test_a_launch_depends_on_what_leaves_its_registers(body: str, expected: bool) -> None:
    assert depends("ld.global.b32 %r1, [%rd1];" + body) is expected


def test_lanes_that_loaded_join_the_others() -> None:
    """Nine lanes load, and the others wait for them; then a ballot tells the lanes apart."""
    body = """
    mov.b32 %r1, 0;
    setp.ge.u32 %p1, %r0, 9;
    @%p1 bra ON;
    ld.global.b32 %r1, [%rd1];
ON: setp.gt.u32 %p2, %r1, LIMIT;
    vote.sync.ballot.b32 %r2, %p2, -1;
    st.global.b32 [%rd0], %r2;
"""
    assert not depends(body.replace("LIMIT", "3"))
    assert depends(body.replace("LIMIT", "5"))


def test_equal_contents_and_a_strong_load() -> None:
    stored = "st.global.b32 [%rd0], %r1;"
    assert not depends("ld.global.b32 %r1, [%rd1];" + stored, new=4)
    assert depends("ld.relaxed.gpu.global.b32 %r1, [%rd1];", new=4)
