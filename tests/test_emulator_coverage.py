"""The coverage recorder: a block and a value that no run reaches are missing, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from test_emulator import module

from build_kernels.binaries.ptx.parser import parse
from build_kernels.emulator import DeviceArray, Launch, Schedule, emulate
from build_kernels.emulator.coverage import Coverage

# %p1 is true in every lane and %p2 in some; the block at OFF is for threads from 32 on. Nothing
# leads to the write of %r5.
BODY = """
    ld.param.u64 %rd0, [out];
    mov.u32 %r0, %tid.x;
    setp.lt.u32 %p1, %r0, 1000;
    setp.gt.u32 %p2, %r0, 7;
    selp.b32 %r1, 1, 0, %p1;
    selp.b32 %r2, 10, 20, %p2;
    add.u32 %r3, %r1, %r2;
    @!%p2 add.u32 %r3, %r3, 100;
    @!%p1 add.u32 %r3, %r3, 1;
    setp.gt.u32 %p3, %r0, 31;
    @%p3 bra OFF;
    mul.wide.u32 %rd1, %r0, 4;
    add.u64 %rd2, %rd0, %rd1;
    st.global.u32 [%rd2], %r3;
    bra END;
    mov.u32 %r5, 1;
OFF:
    mov.u32 %r4, 1;
    setp.eq.u32 %p4, %r4, %r0;
    @%p4 mov.u32 %r4, 2;
END:
"""
TEXT = module(BODY)


def run(coverage: Coverage | None, threads: int, ptx: str = TEXT) -> np.ndarray:
    out = DeviceArray(name="out", data=np.zeros(64, np.uint32))
    launch = Launch(grid=(1, 1, 1), block=(threads, 1, 1), arch="sm_90a")
    result = emulate(ptx, launch, [out], Schedule(), coverage=coverage)
    assert result.findings == ()
    return result.memory["out"]


def missing(coverage: Coverage) -> list[tuple[str, str, str]]:
    code = coverage.kernel.instructions
    return [(place.kind, outcome, code[place.index].text) for place, outcome in coverage.missing()]


def test_the_instructions_of_the_blocks_that_ran() -> None:
    coverage = Coverage(parse(TEXT))
    run(coverage, 32)
    code = coverage.kernel.instructions
    left_out = [each.text for i, each in enumerate(code) if i not in coverage.instructions]
    assert left_out == [
        "mov.u32 %r5, 1;",
        *("mov.u32 %r4, 1;", "setp.eq.u32 %p4, %r4, %r0;", "@%p4 mov.u32 %r4, 2;"),
    ]


def test_an_unreached_block_and_a_predicate_that_is_always_true_are_missing() -> None:
    coverage = Coverage(parse(TEXT))
    run(coverage, 32)
    assert missing(coverage) == [
        ("predicate", "false", "setp.lt.u32 %p1, %r0, 1000;"),
        ("select", "false", "selp.b32 %r1, 1, 0, %p1;"),
        ("guard", "true", "@!%p1 add.u32 %r3, %r3, 1;"),
        ("predicate", "true", "setp.gt.u32 %p3, %r0, 31;"),
        ("guard", "true", "@%p3 bra OFF;"),
        ("block", "ran", "mov.u32 %r4, 1;"),
        ("predicate", "true", "setp.eq.u32 %p4, %r4, %r0;"),
        ("predicate", "false", "setp.eq.u32 %p4, %r4, %r0;"),
        ("guard", "true", "@%p4 mov.u32 %r4, 2;"),
        ("guard", "false", "@%p4 mov.u32 %r4, 2;"),
    ]
    assert coverage.counts() == {
        "block": (3, 4),
        "predicate": (1, 4),
        "select": (1, 2),
        "guard": (1, 4),
    }


def test_launches_add_up() -> None:
    coverage = Coverage(parse(TEXT))
    run(coverage, 32)
    run(coverage, 64)
    assert [outcome for _, outcome, _ in missing(coverage)] == 2 * ["false"] + 3 * ["true"]


def test_the_values_of_lanes_that_do_not_execute_count_for_nothing() -> None:
    text = module("""
    ld.param.u64 %rd0, [out];
    mov.u32 %r0, %tid.x;
    setp.lt.u32 %p1, %r0, 4;
    @%p1 setp.lt.u32 %p2, %r0, 8;
    setp.lt.u32 %p3, %r0, 4;
    @!%p3 bra END;
    selp.b32 %r1, 1, 0, %p1;
    selp.b32 %r2, 1, 0, %p2;
    st.global.u32 [%rd0], 1;
END:
""")
    coverage = Coverage(parse(text))
    out = DeviceArray(name="out", data=np.zeros(64, np.uint32))
    launch = Launch(grid=(1, 1, 1), block=(32, 1, 1), arch="sm_90a")
    emulate(text, launch, [out], coverage=coverage)
    assert [row[:2] for row in missing(coverage)] == [
        ("predicate", "false"),
        ("select", "false"),
        ("select", "false"),
    ]


def test_a_watched_run_is_the_run() -> None:
    assert (run(Coverage(parse(TEXT)), 64) == run(None, 64)).all()


def test_nothing_is_watched_any_more_when_everything_was_seen() -> None:
    text = module("ld.param.u64 %rd0, [out];\nst.global.u32 [%rd0], 1;")
    coverage = Coverage(parse(text))
    run(coverage, 1, text)
    assert coverage.missing() == []
    code: tuple = ()
    assert coverage.watch(parse(text), code) == []


def test_a_constant_and_a_predicate_that_nothing_reads_are_no_places() -> None:
    text = module("""
    mov.pred %p1, 1;
    setp.eq.u32 %p2, 1, 1;
    mov.u32 %r0, %tid.x;
    setp.eq.u32 %p3, %r0, 1;
    @%p1 mov.u32 %r1, 1;
    @%p2 mov.u32 %r1, 1;
""")
    assert Coverage(parse(text)).counts()["predicate"] == (0, 0)


def test_another_text_is_refused() -> None:
    with pytest.raises(ValueError, match="another text"):
        run(Coverage(parse(TEXT)), 32, TEXT.replace("1000", "2000"))
