"""clusterlaunchcontrol: take the place of a cluster that has not started (PTX ISA, sm_100)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.async_writes import signal, write_shared
from build_kernels.emulator.instructions.bulk_operations import (
    Target,
    load_target,
    multicast_targets,
)
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, items
from build_kernels.emulator.lanes import Array, numbers_of
from build_kernels.emulator.memory.memory import VALID
from build_kernels.emulator.memory.windows import SHARED_ADDRESS, split_shared

RESPONSE = 16  # bytes: x, y and z of the cluster's first CTA, and 1 if it was cancelled
REFUSED = 0.1  # chance that a request fails although clusters wait, under random schedules
_AXES = ("x", "y", "z")


class Cancel(Operation):
    """Cancel a cluster that waits for a place, and write the response to each target."""

    what = "clusterlaunchcontrol.try_cancel"

    def __init__(self, warp: Warp, lane: int, targets: Sequence[Target]) -> None:
        super().__init__(warp, lane)
        self.targets = targets
        for target in targets:
            self.touches(target.cta)

    def perform(self) -> None:
        grid = self.grid
        refused = grid.schedule.policy == "random" and grid.random.random() < REFUSED
        cancelled = bool(grid.waiting) and not refused
        words = (*grid.waiting.popleft(), 1) if cancelled else (0, 0, 0, 0)
        data = np.array(words, dtype=np.uint32).view(np.uint8)
        clock = self.completion()
        for target in self.targets:
            state = np.full(RESPONSE, VALID, dtype=np.uint8)
            write_shared(self, target.cta, target.offsets, data, state)
            signal(self, target.barrier, RESPONSE, clock)


def try_cancel(d: Decoding) -> Run:
    d.need("async")
    d.one_of("shared::cta")
    d.need("mbarrier::complete_tx::bytes")
    multicast = d.take("multicast::cluster::all")
    d.need("b128")
    where, barrier = d.address(d.operands[0]), d.address(d.operands[1])

    def run(w: Warp) -> None:
        w.poisoned("an operand of try_cancel", where.registers + barrier.registers)
        for lane in numbers_of(w.bits):
            place, at = int(where.get(w)[lane]) & SHARED_ADDRESS, int(barrier.get(w)[lane])
            if place % RESPONSE:
                w.report("misaligned", "a response needs 16-byte alignment", lane=lane)
                continue
            offsets = split_shared(place)[1] + np.arange(RESPONSE)
            if multicast:
                ranks = (1 << len(w.cta.cluster.ctas)) - 1
                targets = multicast_targets(w, lane, ranks, at, offsets)
            else:
                targets = load_target(w, lane, "shared::cta", place, at, offsets)
            w.grid.issue(Cancel(w, lane, targets))

    return run


def query_cancel(d: Decoding) -> Run:
    """Decode the reading of a response; the CTA's place is poison if none was cancelled."""
    d.need("b128")
    axes: dict[str, tuple[int, ...]] = {"get_first_ctaid": (0, 1, 2)}
    axes |= {f"get_first_ctaid::{axis}": (i,) for i, axis in enumerate(_AXES)}
    what = d.need("is_canceled", *axes)
    response = d.source(d.operands[1], "b128")

    def words(w: Warp) -> Array:
        return response.get(w).view(np.uint32).reshape(-1, 4)

    if what == "is_canceled":
        d.need("pred")
        write = d.destination(d.operands[0], "pred")
        return lambda w: write(w, words(w)[:, 3] != 0, w.taint(response.registers))
    if len(axes[what]) > 1:
        d.need("v4")
    d.need("b32")
    writes = [d.destination(each, "b32") for each in items(d.operands[0])]

    def run(w: Warp) -> None:
        taint = w.taint(response.registers)
        none = words(w)[:, 3] == 0
        if none.any():
            taint = none if taint is None else none | taint
        for write, axis in zip(writes, axes[what], strict=False):
            write(w, words(w)[:, axis].copy(), taint)

    return run


INSTRUCTIONS: dict[str, Decoder] = {
    "clusterlaunchcontrol.try_cancel": try_cancel,
    "clusterlaunchcontrol.query_cancel": query_cancel,
}
