"""The identity of a warp's lanes, and the vector clock of each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from build_kernels.binaries.ptx.syntax import Instruction
from build_kernels.emulator.findings import FindingLog, Reporter, Thread
from build_kernels.emulator.lanes import (
    ALL,
    LANE_INDEX,
    LANES,
    lanes_of,
    lowest,
    numbers_of,
)
from build_kernels.emulator.memory.access_records import WEAK, pack
from build_kernels.emulator.ordering.clocks import GENERIC, INIT, TENSOR, Clock, ClockSpace, join


class WarpClocks(Reporter):
    """Name the lanes of a warp in findings, and order each lane after other actors.

    index: the warp's number in its CTA. actor: the actor of lane 0. first_tick: the CTA's start;
    the lanes' accesses have later ticks. instruction, bits: the present one and its lanes.
    """

    def __init__(
        self,
        log: FindingLog,
        space: ClockSpace,
        cta: tuple[int, int, int],
        index: int,
        actor: int,
        first_tick: int,
        bits: int,
        instruction: Instruction,
    ) -> None:
        self.log = log
        self.index = index
        self.actor = actor
        self.actors = actor + LANE_INDEX.astype(np.int64)
        self.bits = bits
        self.instruction = instruction
        self.first_tick = first_tick
        self.tick = first_tick + 1
        self._zero = space.zero
        self.clocks: list[Clock] = [space.zero] * LANES
        self._shared: Clock | None = space.zero  # the clock of every lane, if it is one
        # Per lane: the clock and the scope of its last fence.
        self.fenced: list[Clock | None] = [None] * LANES
        self.fence_scope = [WEAK] * LANES
        # Per actor: the last tcgen05 operation that the warp may follow without a fence.
        self.tensor = space.zero[TENSOR]
        self._cta = cta
        self._settled = 0
        self._started = 0  # lanes whose clocks have their own start in INIT
        self.first_records = pack(0, self.actors, WEAK, 0)

    def thread(self, lane: int | None = None) -> Thread:
        return Thread(cta=self._cta, warp=self.index, lane=lane)

    def first_lane(self) -> int:
        return lowest(self.bits)

    def groups_of(self, bits: int) -> list[tuple[Clock, int]]:
        """Return the distinct clocks of these lanes, with the lanes that share each."""
        if self._shared is not None:
            return [(self._shared, bits)]
        found: dict[Clock, int] = {}
        for lane in numbers_of(bits):
            clock = self.clocks[lane]
            found[clock] = found.get(clock, 0) | 1 << lane
        return list(found.items())

    def joined(self, bits: int) -> Clock:
        """Return the join of these lanes' clocks."""
        groups = self.groups_of(bits)
        clock = groups[0][0]
        for other, _ in groups[1:]:
            clock = join(clock, other)
        return clock

    def publish(self, bits: int, release: bool = True) -> Clock:
        """Return the clock that a release by these lanes hands over, and start a new tick.

        A relaxed operation hands over only the release of an earlier fence of the lane, and the
        mbarrier initialisations that a fence.mbarrier_init covered."""
        joined = self.joined(bits)
        mine = self.actors if bits == ALL else self.actors[lanes_of(bits)]
        if release:
            clock = joined.replaced(GENERIC, joined[GENERIC].with_ticks(mine, self.tick))
        else:
            clock = self._zero.replaced(INIT, joined[INIT])
            for lane in numbers_of(bits):
                fenced = self.fenced[lane]
                if fenced is not None:
                    clock = join(clock, fenced)
        if bits & ~self._started:
            started = np.maximum(clock[INIT].ticks(mine), self.first_tick)
            clock = clock.replaced(INIT, clock[INIT].with_ticks(mine, started))
        self.tick += 1
        self._settled = 0
        return clock

    def acquire(self, bits: int, incoming: Clock, within: Clock | None = None) -> None:
        """Join a clock into those of these lanes. within: a clock that it already includes."""
        for clock, lanes in self.groups_of(bits):
            self._set(lanes, incoming if clock is within else join(clock, incoming))
        self._settled = 0

    def order_after(self, bits: int, actor: int, tick: int) -> None:
        """Order these lanes after an agent's operation."""
        for clock, lanes in self.groups_of(bits):
            generic = clock[GENERIC]
            if generic.tick(actor) < tick:
                self._set(lanes, clock.replaced(GENERIC, generic.with_tick(actor, tick)))
        self._settled = 0

    def replace_clocks(self, bits: int, change: Callable[[Clock], Clock]) -> None:
        """Replace each of these lanes' clocks by what `change` makes of it."""
        for clock, lanes in self.groups_of(bits):
            self._set(lanes, change(clock))
        self._settled = 0

    def converge(self, bits: int) -> None:
        """Order everything that these lanes did before everything that they do next.

        PTX promises that for bar.warp.sync only. Every .sync collective is taken so, because code
        everywhere relies on it (elect.sync, then one lane signals for the warp)."""
        if bits & ~self._settled == 0:
            return
        self._set(bits, self.publish(bits))
        self._settled = bits
        self._started |= bits

    def touch(self) -> None:
        """Note that an access was recorded at the present tick."""
        self._settled = 0

    def _set(self, bits: int, clock: Clock) -> None:
        if bits == ALL:
            self.clocks = [clock] * LANES
            self._shared = clock
            return
        self._shared = None
        for lane in numbers_of(bits):
            self.clocks[lane] = clock
