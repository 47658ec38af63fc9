"""Accesses of a warp's lanes through the generic proxy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from build_kernels.emulator.execution.warp import LANES, Warp, lanes_of
from build_kernels.emulator.memory.memory import READER_SLOTS, Memory
from build_kernels.emulator.ordering.clocks import (
    CLUSTER_SCOPE,
    CTA_SCOPE,
    GENERIC,
    GPU_SCOPE,
    WEAK,
    Ints,
    actor_of,
    actors_of,
    instruction_of,
    record,
    scope_of,
    scopes_of,
    ticks_of,
)


@dataclass(eq=False)
class ThreadAccess:
    """An access by lanes of a warp through the generic proxy.

    lanes: the lane of each touched byte; scope: 0 for weak, else the scope of a strong one."""

    warp: Warp
    lanes: Ints
    scope: int = WEAK
    reader_slot: int = field(init=False)

    def __post_init__(self) -> None:
        self.reader_slot = self.warp.actor // LANES % READER_SLOTS
        self.warp.touch()

    def records(self, count: int) -> Ints:
        warp = self.warp
        actors = warp.actor + self.lanes
        return record(warp.tick, actors, self.scope, warp.instruction.index)

    def unordered(self, records: Ints, written: bool) -> Ints | None:
        if not records.any():
            return None
        warp = self.warp
        actors, ticks = actors_of(records), ticks_of(records)
        groups = warp.groups_of(warp.bits)
        if len(groups) == 1:
            known = groups[0][0][GENERIC][actors] >= ticks
        else:
            known = np.zeros(len(records), dtype=bool)
            for clock, bits in groups:
                mine = lanes_of(bits)[self.lanes]
                known[mine] = clock[GENERIC][actors[mine]] >= ticks[mine]
        known |= (actors == warp.actor + self.lanes) & (ticks >= warp.first_tick)
        if known.all():
            return None
        bad = np.flatnonzero(~known)
        if self.scope:
            # With both scopes the GPU's, they are morally strong whoever the other is.
            both = np.minimum(scopes_of(records[bad]), self.scope)
            bad = bad[both != GPU_SCOPE]
            bad = bad[[not self._morally_strong(int(records[i])) for i in bad]]
        return bad if len(bad) else None

    def _morally_strong(self, other: int) -> bool:
        """PTX ISA, "Morally strong operations": both strong, each scope includes the other."""
        scope = min(scope_of(other), self.scope)
        if scope == WEAK:
            return False
        actor = actor_of(other)
        cta = self.warp.machine.cta_of(actor)
        if scope == CTA_SCOPE:
            return cta is self.warp.cta
        if scope == CLUSTER_SCOPE:
            return cta is not None and cta.cluster is self.warp.cta.cluster
        return True

    def conflict(self, memory: Memory, offset: int, other: int, what: str) -> None:
        machine = self.warp.machine
        lane = int(self.lanes[0]) if len(self.lanes) else None
        machine.report(
            "race",
            f"{what} conflict with no order between the two",
            warp=self.warp,
            lane=lane,
            address=memory.describe(offset),
            other=machine.kernel.instructions[instruction_of(other)],
            other_thread=machine.actor_thread(other),
        )
