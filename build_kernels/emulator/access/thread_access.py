"""Checked accesses of a warp's lanes through the generic proxy."""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.lanes import LANES, Ints, Mask, all_of, lanes_of
from build_kernels.emulator.memory.access_records import (
    GPU_SCOPE,
    SCOPE_FIELD,
    WEAK,
    actor_of,
    actors_of,
    pack,
    scope_of,
    ticks_of,
)
from build_kernels.emulator.memory.memory import READER_SLOTS, Memory
from build_kernels.emulator.ordering.clocks import GENERIC


class ThreadAccess:
    """An access by lanes of a warp through the generic proxy.

    lanes: of the warp, in order; each touches `size` bytes. scope: WEAK, or the scope of a strong
    access.
    """

    is_one = False

    def __init__(self, warp: Warp, lanes: Ints, size: int, scope: int = WEAK) -> None:
        self.warp = warp
        self.lanes = lanes
        self.size = size
        self.scope = scope
        self.reader_slot = warp.actor // LANES % READER_SLOTS

    def records(self, count: int) -> Ints:
        warp = self.warp
        same = int(pack(warp.tick, 0, self.scope, warp.instruction.index))
        return (warp.first_records[self.lanes] + same).repeat(self.size)

    def ordered(self, records: Ints, written: bool) -> Mask:
        warp = self.warp
        actors, ticks = actors_of(records), ticks_of(records)
        groups = warp.groups_of(warp.bits)
        known: Mask
        if len(groups) == 1:
            known = groups[0][0][GENERIC].ticks(actors) >= ticks
            if all_of(known):
                return known
            lanes = self.lanes.repeat(self.size)
        else:
            lanes = self.lanes.repeat(self.size)
            known = np.zeros(len(records), dtype=bool)
            for clock, bits in groups:
                mine = lanes_of(bits)[lanes]
                known[mine] = clock[GENERIC].ticks(actors[mine]) >= ticks[mine]
        known |= (actors == warp.actor + lanes) & (ticks >= warp.first_tick)
        return known

    def excused(self, record: int) -> bool:
        """Return whether both are strong and each scope includes the other ("Morally strong")."""
        scope = min(scope_of(record), self.scope)
        if scope in (WEAK, GPU_SCOPE):
            return scope == GPU_SCOPE
        cta = self.warp.grid.cta_of(actor_of(record))
        return cta is not None and self.warp.cta.shares(scope, cta)

    def excuses(self, records: Ints) -> bool:
        # Polls, of words that other threads of the GPU store, are most of the strong accesses.
        if self.scope != GPU_SCOPE:
            return False
        return all_of((records & SCOPE_FIELD == SCOPE_FIELD) | (records == 0))

    def conflict(self, memory: Memory, offset: int, record: int, what: str) -> None:
        instruction, thread = self.warp.grid.author_of(record)
        self.warp.report(
            "race",
            f"{what} conflict with no order between the two",
            lane=int(self.lanes[0]) if len(self.lanes) else None,
            address=memory.describe(offset),
            other=instruction,
            other_thread=thread,
        )
