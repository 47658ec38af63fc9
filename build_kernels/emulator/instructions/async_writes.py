"""Writes of asynchronous operations to shared memory, and their signals to mbarriers."""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.execution.cta import Cta
from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.instructions.mbarrier import find
from build_kernels.emulator.lanes import Array, Ints
from build_kernels.emulator.memory.memory import BARRIER
from build_kernels.emulator.memory.windows import SHARED_RESERVED
from build_kernels.emulator.ordering.clocks import Clock
from build_kernels.emulator.ordering.mbarrier import Mbarrier


def write_shared(operation: Operation, cta: Cta, offsets: Ints, data: Array, state: Array) -> None:
    """Write bytes and their states to a CTA's shared memory, with all checks."""
    memory = cta.shared
    if cta.exited:
        operation.report(
            "exited-peer",
            f"{operation.what} writes to a CTA that has exited",
            address=memory.name,
        )
    if len(offsets) and not (
        SHARED_RESERVED <= int(offsets.min()) and int(offsets.max()) < cta.shared_end
    ):
        operation.report(
            "out-of-bounds",
            f"{operation.what} writes outside the CTA's shared memory",
            address=memory.describe(int(offsets.min())),
        )
        inside = (offsets >= SHARED_RESERVED) & (offsets < cta.shared_end)
        offsets, data, state = offsets[inside], data[inside], state[inside]
    if BARRIER in memory.state[offsets].tobytes():
        at = int(offsets[np.flatnonzero(memory.state[offsets] == BARRIER)[0]])
        operation.report(
            "mbarrier-as-data",
            f"{operation.what} overwrites a live mbarrier object",
            address=memory.describe(at),
        )
    memory.note_write(offsets, operation)
    memory.data[offsets] = data
    memory.state[offsets] = state


def touch_mbarrier(operation: Operation, barrier: Mbarrier, verb: str) -> None:
    """Note an operation on an mbarrier; report one whose CTA has exited."""
    barrier.touch(operation.cta, operation.slot.actor, operation.tick, operation.instruction)
    if barrier.cta.exited:
        operation.report(
            "exited-peer",
            f"{operation.what} {verb} on an mbarrier of a CTA that has exited",
            address=barrier.describe(),
        )


def signal(operation: Operation, barrier: Mbarrier | None, tx: int, clock: Clock) -> None:
    if barrier is None:
        return
    touch_mbarrier(operation, barrier, "completes")
    if barrier.cta.mbarriers.get(barrier.offset) is not barrier:
        operation.report(
            "barrier-uninitialised",
            f"the mbarrier was invalidated while {operation.what} was to complete on it",
            address=barrier.describe(),
        )
        return
    barrier.complete(tx, clock, operation)


def target_barrier(w: Warp, lane: int, where: int, *, proxied: bool) -> Mbarrier | None:
    """Return the mbarrier that an operation will complete on, checked at its issue."""
    barrier = find(w, where, lane, local=False)
    if barrier is None or not proxied:
        return barrier
    if not barrier.initialised_before(w.clocks[lane], w.actor + lane, proxied=True):
        w.report(
            "missing-proxy-fence",
            "no fence.mbarrier_init or fence.proxy.async makes the mbarrier's initialisation "
            "visible to the async proxy",
            lane=lane,
            address=barrier.describe(),
            other=barrier.init_instruction,
        )
    return barrier
