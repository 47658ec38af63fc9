"""What agents do to shared memory: write it, and signal mbarriers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import Array, Warp
from build_kernels.emulator.instructions.mbarrier import find
from build_kernels.emulator.memory.memory import BARRIER, SHARED_RESERVED
from build_kernels.emulator.ordering.barriers import Mbarrier
from build_kernels.emulator.ordering.clocks import Clock, Ints

if TYPE_CHECKING:
    from build_kernels.emulator.execution.cta import Cta


def write_shared(operation: Operation, cta: Cta, offsets: Ints, data: Array, state: Array) -> None:
    """An agent's write to a CTA's shared memory."""
    memory = cta.shared
    if cta.exited:
        operation.machine.report(
            "exited-peer",
            f"{operation.what} writes to a CTA that has exited",
            operation=operation,
            address=memory.name,
        )
    if len(offsets) and not (
        SHARED_RESERVED <= int(offsets.min()) and int(offsets.max()) < cta.shared_end
    ):
        operation.machine.report(
            "out-of-bounds",
            f"{operation.what} writes outside the CTA's shared memory",
            operation=operation,
            address=memory.describe(int(offsets.min())),
        )
        inside = (offsets >= SHARED_RESERVED) & (offsets < cta.shared_end)
        offsets, data, state = offsets[inside], data[inside], state[inside]
    if (memory.state[offsets] == BARRIER).any():
        at = int(offsets[np.flatnonzero(memory.state[offsets] == BARRIER)[0]])
        operation.machine.report(
            "mbarrier-as-data",
            f"{operation.what} overwrites a live mbarrier object",
            operation=operation,
            address=memory.describe(at),
        )
    memory.note_write(offsets, operation)
    memory.data[offsets] = data
    memory.state[offsets] = state


def signal(operation: Operation, barrier: Mbarrier | None, tx: int, clock: Clock) -> None:
    """Take bytes off an mbarrier's tx-count."""
    if barrier is None:
        return
    if barrier.cta is not operation.cta:
        touch = (operation.slot.actor, operation.tick, operation.instruction)
        barrier.foreign_touches.append(touch)
    if barrier.cta.exited:
        operation.machine.report(
            "exited-peer",
            f"{operation.what} completes on an mbarrier of a CTA that has exited",
            operation=operation,
            address=barrier.describe(),
        )
    if barrier.cta.mbarriers.get(barrier.offset) is not barrier:
        operation.machine.report(
            "barrier-uninitialised",
            f"the mbarrier was invalidated while {operation.what} was to complete on it",
            operation=operation,
            address=barrier.describe(),
        )
        return
    barrier.complete(tx, clock, operation)


def target_barrier(w: Warp, lane: int, where: int, *, proxied: bool) -> Mbarrier | None:
    """The mbarrier an agent will complete on, checked as it is issued."""
    barrier = find(w, where, lane, local=False)
    if (
        barrier is not None
        and proxied
        and not barrier.knows_init(w.clocks[lane], w.actor + lane, proxied=True, remote=False)
    ):
        w.machine.report(
            "missing-proxy-fence",
            "no fence.mbarrier_init or fence.proxy.async makes the mbarrier's initialisation "
            "visible to the async proxy",
            warp=w,
            lane=lane,
            address=barrier.describe(),
            other=barrier.init_instruction,
        )
    return barrier
