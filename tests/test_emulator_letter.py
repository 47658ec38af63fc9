"""Findings by the letter of the ISA: told apart, switched off, and no cover for other faults."""

from __future__ import annotations

import numpy as np
import pytest
from test_emulator import SCHEDULES, run_threads
from test_emulator_protocol import mutate
from test_emulator_tensor import TCGEN05_MUTANTS, Operand, run_gemm, tcgen05_gemm, wgmma_gemm

A, B = Operand(64), Operand(16)


def classes(result) -> set[tuple[str, bool]]:
    return {(finding.kind, finding.by_the_letter) for finding in result.findings}


def blackwell(schedule, *names, **options):
    changes = [change for name in names for change in TCGEN05_MUTANTS[name][0]]
    text = mutate(tcgen05_gemm(A, B, 1, True), *changes)
    return run_gemm(text, A, B, 1, "sm_100a", True, schedule, **options)


LOADS = ["no wait::ld", "no fence after the wait"]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", LOADS)
def test_a_load_without_wait_or_fence_is_right_and_found_by_the_letter(name, schedule):
    result, expected = blackwell(schedule, name)
    assert classes(result) == {(TCGEN05_MUTANTS[name][1], True)}
    assert all("(by the letter)" in str(finding) for finding in result.findings)
    np.testing.assert_array_equal(result.memory["out"], expected)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_findings_by_the_letter_can_be_switched_off(schedule):
    result, expected = blackwell(schedule, *LOADS, by_the_letter=False)
    assert result.findings == ()
    np.testing.assert_array_equal(result.memory["out"], expected)


@pytest.mark.parametrize("by_the_letter", [True, False])
@pytest.mark.parametrize(
    "name", ["no wait for the multiplication", "dealloc before the others have read"]
)
def test_a_load_without_wait_hides_no_fault(name, by_the_letter):
    results = [
        blackwell(schedule, "no wait::ld", name, by_the_letter=by_the_letter)[0]
        for schedule in SCHEDULES
    ]
    assert any((TCGEN05_MUTANTS[name][1], False) in classes(result) for result in results)


FENCE = "    wgmma.fence.sync.aligned;"


@pytest.mark.parametrize(
    ("written", "by_the_letter"),
    [("mov.f32 %f3, 0f00000000;", True), ("add.f32 %f3, %f3, 0f00000000;", False)],
)
def test_a_constant_behind_the_wgmma_fence_is_found_by_the_letter(written, by_the_letter):
    text = mutate(wgmma_gemm(A, B, 1, True), (FENCE, f"{FENCE}\n    {written}"))
    result, _ = run_gemm(text, A, B, 1, "sm_90a", True, None)
    assert classes(result) == {("missing-wgmma-fence", by_the_letter)}


STORE = """
    .shared .align 128 .b32 tile[64];
    mov.u32 %r1, tile;
    shl.b32 %r2, %r0, 2;
    add.u32 %r2, %r2, %r1;
    st.shared.b32 [%r2], %r0;
    st.shared.b32 [%r2+128], %r0;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    ld.param.u64 %rd2, [out];
    SOURCE
    cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r1], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
"""


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("source", "by_the_letter"),
    [("", True), ("and.b32 %r3, %r0, 1; shl.b32 %r3, %r3, 7; add.u32 %r1, %r1, %r3;", False)],
)
def test_lanes_that_store_the_same_bytes_race_by_the_letter(source, by_the_letter, schedule):
    out, result = run_threads(STORE.replace("SOURCE", source), schedule=schedule)
    assert ("race", by_the_letter) in classes(result)
    assert by_the_letter == all(finding.by_the_letter for finding in result.findings)
    np.testing.assert_array_equal(out[:, 0], np.arange(32))
