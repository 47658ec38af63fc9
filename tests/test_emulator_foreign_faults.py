"""Faults in NVIDIA's GEMMs: each is found, or does no harm for a reason that is given.

Needs what `test_emulator_tutorials` needs. The figures: python -m pytest -rP on this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from foreign_cases import GEMMS
from foreign_faults import Fault, picked
from foreign_gemms import EXAMPLES, Gemm, capture, device_arrays, launch_of, loaded
from test_emulator_tutorials import SCHEDULES

from build_kernels.emulator import Finding, Result, Schedule, emulate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not EXAMPLES, reason="CUTLASS_EXAMPLES does not name NVIDIA/cutlass's CuTeDSL examples"
    ),
]

# With more blocks of K than stages, so that every ring turns.
SIZES = {
    "tutorial 0": (128, 256, 512),
    "tutorial 1": (256, 256, 576),
    "tutorial 5": (512, 128, 768),
    "dense, TMA store": (128, 128, 512, 1),
    "dense, multicast": (256, 128, 640, 1),
    "dense, M 64": (64, 64, 896, 1),
    "persistent, TMA store": (256, 128, 256, 1),
    "persistent, pair": (256, 256, 512, 1),
    "dynamic": (256, 128, 512, 1),
    "hopper": (64, 64, 1024, 1),
    "hopper, multicast": (128, 64, 1024, 1),
    "hopper persistent, multicast": (256, 128, 640, 1),
}
GEMMS_WITH_FAULTS = [
    replace(gemm, size=SIZES[gemm.name], arguments=gemm.arguments.replace("c, 2,", "c, 1,"))
    for gemm in GEMMS
    if gemm.name in SIZES
]

DRAIN = "a producer's last waits: the next one is for a later commit"
OTHER_WARP = "another warp does the same, and a barrier follows"
LATER_FENCE = "another fence follows, before the first use"
NOT_REUSED = "no later store of the tile reuses the buffer, and a wait for all follows"
BOTH_RANKS = "two lanes arrive at the two CTAs: they take each other's"
FRESH = "at first every stage is empty"
# Changes of more than a value that do no harm, by kernel: the fault -> why.
HARMLESS = {
    "tutorial 0": {
        "arrival dropped 0": "its mbarrier is for a second tile, and there is none",
        "roles taken for each other 3": OTHER_WARP,
    },
    "tutorial 1": {
        "mbarrier fence dropped 2": "a commit that the peer waits for follows the init",
    },
    "tutorial 5": {
        "wait dropped 13": DRAIN,
        "mbarrier fence dropped 1": LATER_FENCE,
        "CTA y taken for x 1": "the coordinates are those of no tile: nothing was cancelled",
    },
    "dense, TMA store": {"wait dropped 8": DRAIN, "bulk wait dropped 3": NOT_REUSED},
    "dense, multicast": {"bar.sync dropped 5": "another one follows before tcgen05.dealloc"},
    "dense, M 64": {
        "wait dropped 12": DRAIN,
        "offset dropped 28": DRAIN,
        "bar.sync dropped 3": "another one follows before tcgen05.dealloc",
        "bulk wait dropped 0": NOT_REUSED,
        "roles taken for each other 4": OTHER_WARP,
    },
    "persistent, TMA store": {
        "wait dropped 5": DRAIN,
        "phase never turned 16": "both accumulators have one tile each",
        "roles taken for each other 1": OTHER_WARP,
    },
    "persistent, pair": {
        "wait dropped 6": DRAIN,
        "mbarrier fence dropped 0": LATER_FENCE,
        "turn one early 0": "another warp prefetches the tensor maps",
        "turn one late 0": "no warp prefetches the tensor maps",
    },
    "dynamic": {"wait dropped 5": DRAIN},
    "hopper": {
        "wait dropped 0": FRESH,
        "bulk commit dropped 0": "the next commit takes the store into its group",
        "bulk wait dropped 0": NOT_REUSED,
        "wgmma zeroes 0": "the first multiplication does not accumulate",
    },
    "hopper, multicast": {
        "bar.sync dropped 1": NOT_REUSED,
        "rank of the other CTA 0": BOTH_RANKS,
        "wgmma fence dropped 1": "accumulators of one shape need no fence between them",
    },
    "hopper persistent, multicast": {
        "rank of the other CTA 0": BOTH_RANKS,
        "wgmma fence dropped 0": "found in the kernel as it is: it zeroes behind the fence",
    },
}
HARMLESS_KINDS = {"permit kept": "it lets other CTAs allocate, and none waits"}
# The emulator asks no proxy fence between a read and a later write by the async proxy.
NOT_FOUND = {"tutorial 5": {"proxy fence dropped 1"}}


def runs(gemm: Gemm, line: list[str], ptx: str) -> Iterator[tuple[Result, bool]]:
    """Yield the result of every schedule, and whether the product is right."""
    for schedule in SCHEDULES:
        yield run(gemm, line, ptx, schedule)


def run(gemm: Gemm, line: list[str], ptx: str, schedule: Schedule) -> tuple[Result, bool]:
    arrays, product = device_arrays(gemm)
    launch, arguments = launch_of(gemm, line, arrays)
    result = emulate(ptx, launch, arguments, schedule)
    order = gemm.tensors()[2][2]
    return result, np.array_equal(loaded(result.memory["c"], gemm.c, order), product)


def places(findings: tuple[Finding, ...]) -> set[tuple[str, int]]:
    return {(each.kind, each.line) for each in findings}


def computes_the_same(gemm: Gemm, line: list[str], fault: Fault) -> bool:
    """Return whether the changed instruction gives the old value wherever it is executed."""
    both = fault.comparison()
    return both is not None and not any(result.trapped for result, _ in runs(gemm, line, both))


@pytest.mark.parametrize(
    "seed", range(len(GEMMS_WITH_FAULTS)), ids=lambda i: GEMMS_WITH_FAULTS[i].name
)
def test_a_fault_in_a_foreign_gemm_is_found(seed, tmp_path):
    gemm = GEMMS_WITH_FAULTS[seed]
    ptx, line = capture(gemm, tmp_path)
    before = set().union(*(places(result.findings) for result, _ in runs(gemm, line, ptx)))
    faults = picked(ptx, seed)
    survivors, same = set(), set()
    for fault in faults:
        if any(
            not right or places(result.findings) - before
            for result, right in runs(gemm, line, fault.ptx)
        ):
            continue
        (same if computes_the_same(gemm, line, fault) else survivors).add(fault.name)
    print(f"{gemm.name}: {len(faults)} faults, {len(same)} compute the same, {survivors} survive")
    expected = {fault.name for fault in faults if fault.kind in HARMLESS_KINDS}
    expected |= {*HARMLESS[gemm.name], *NOT_FOUND.get(gemm.name, ())}
    assert survivors == expected
