"""The identity of a warp's lanes, and the vector clock of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from build_kernels.binaries.ptx.syntax import Instruction
from build_kernels.emulator.findings import FindingLog, Reporter, Thread
from build_kernels.emulator.lanes import (
    ALL,
    LANE_INDEX,
    LANES,
    Ints,
    indices_of,
    lanes_of,
    lowest,
    numbers_of,
)
from build_kernels.emulator.memory.access_records import WEAK, pack
from build_kernels.emulator.ordering.clocks import (
    GENERIC,
    INIT,
    TENSOR,
    Clock,
    ClockSpace,
    Ticks,
    join,
)


def _executed(clock: Clock, actors: Ints) -> Ticks:
    """Return the ticks up to which threads have executed before an event with this clock."""
    return np.maximum(clock[GENERIC].ticks(actors), clock[TENSOR].ticks(actors))


@dataclass(frozen=True, eq=False)
class Observation:
    """A wait that saw an mbarrier's phase end: its lanes, tick and instruction.

    meetings: lanes that met after it, and when.
    """

    warp: WarpClocks
    bits: int
    tick: int
    instruction: Instruction
    meetings: list[tuple[int, int]] = field(default_factory=list)

    def missing(self, clock: Clock) -> int | None:
        """Return a lane whose wait need not be over when an event with this order happens."""
        lanes = indices_of(self.bits)
        late = _executed(clock, self.warp.actors[lanes]) < self.tick
        if not late.any():
            return None
        missing = sum(1 << int(lane) for lane in lanes[late])
        for bits, tick in self.meetings:
            if (_executed(clock, self.warp.actors[lanes_of(bits)]) >= tick).any():
                missing &= ~bits
        return lowest(missing) if missing else None


class WarpClocks(Reporter):
    """Name the lanes of a warp in findings, and order each lane after other actors.

    index: the warp's number in its CTA. actor: the actor of lane 0. first_tick: the CTA's start;
    the lanes' accesses have later ticks. instruction, bits: the present one and its lanes.
    observed: the waits that some of their lanes may still be at, for all that the others can tell.
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
        self.observed: dict[Observation, None] = {}
        self._cta = cta
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
        return clock

    def acquire(self, bits: int, incoming: Clock, within: Clock | None = None) -> None:
        """Join a clock into those of these lanes. within: a clock that it already includes."""
        for clock, lanes in self.groups_of(bits):
            self._set(lanes, incoming if clock is within else join(clock, incoming))

    def order_after(self, bits: int, actor: int, tick: int) -> None:
        """Order these lanes after an agent's operation."""
        for clock, lanes in self.groups_of(bits):
            generic = clock[GENERIC]
            if generic.tick(actor) < tick:
                self._set(lanes, clock.replaced(GENERIC, generic.with_tick(actor, tick)))

    def replace_clocks(self, bits: int, change: Callable[[Clock], Clock]) -> None:
        """Replace each of these lanes' clocks by what `change` makes of it."""
        for clock, lanes in self.groups_of(bits):
            self._set(lanes, change(clock))

    def converge(self, bits: int) -> None:
        """Order everything that these lanes did before everything that they do next."""
        self._set(bits, self.publish(bits))
        self._started |= bits

    def observe(self, bits: int) -> Observation:
        """Return a wait of these lanes that is over, which their next meetings hand on."""
        seen = Observation(self, bits, self.tick, self.instruction)
        if bits & (bits - 1):
            self.observed[seen] = None
        return seen

    def meet(self, bits: int) -> None:
        """Note that these lanes execute one instruction together: their waits are over.

        That orders no memory, but it holds for what each of them does next."""
        for seen in list(self.observed):
            if seen.bits & bits:
                seen.meetings.append((bits, self.tick))
            if not seen.bits & ~bits:
                del self.observed[seen]

    def _set(self, bits: int, clock: Clock) -> None:
        if bits == ALL:
            self.clocks = [clock] * LANES
            self._shared = clock
            return
        self._shared = None
        for lane in numbers_of(bits):
            self.clocks[lane] = clock
