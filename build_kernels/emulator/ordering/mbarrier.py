"""The mbarrier object (PTX ISA, "Parallel Synchronization and Communication")."""

from __future__ import annotations

from typing import Protocol

from build_kernels.binaries.ptx.syntax import Instruction
from build_kernels.emulator.findings import Reporter
from build_kernels.emulator.memory.memory import Memory
from build_kernels.emulator.ordering.barriers import Signal
from build_kernels.emulator.ordering.clocks import ASYNC, GENERIC, INIT, Clock, join
from build_kernels.emulator.ordering.warp_clocks import Observation, WarpClocks

MAX_COUNT = (1 << 20) - 1


class Home(Protocol):
    """The CTA whose shared memory holds an mbarrier."""

    shared: Memory
    mbarriers: dict[int, Mbarrier]
    exited: bool


class Mbarrier:
    """Count arrivals and transaction bytes; a phase ends when none of either is pending.

    phase: the number of phases that ended. released: the clock of the last one's arrivals.
    foreign_touches: (actor, tick, instruction) of operations by other CTAs.
    """

    def __init__(self, cta: Home, offset: int, count: int, warp: WarpClocks, zero: Clock) -> None:
        self.cta = cta
        self.offset = offset
        self.expected = count
        self.pending = count
        self.tx = 0
        self.phase = 0
        self.gathered = self.released = self._zero = zero
        self.signal = Signal()
        self.observations: list[Observation] = []
        self.initialiser = warp.actor + warp.first_lane()
        self.init_tick = warp.tick
        self.init_instruction = warp.instruction
        self.foreign_touches: list[tuple[int, int, Instruction]] = []

    def describe(self) -> str:
        return f"mbarrier {self.cta.shared.describe(self.offset)}"

    def touch(self, cta: object, actor: int, tick: int, instruction: Instruction) -> None:
        """Note an operation on the mbarrier if it comes from another CTA."""
        if cta is not self.cta:
            self.foreign_touches.append((actor, tick, instruction))

    def missing(self) -> str:
        """Describe the arrivals and bytes that the present phase waits for."""
        return (
            f"phase {self.phase} of {self.describe()} ({self.pending} of {self.expected} arrivals "
            f"and {self.tx} bytes missing)"
        )

    def initialised_before(
        self, clock: Clock, actor: int, *, proxied: bool, remote: bool = False
    ) -> bool:
        """Return whether the initialisation is ordered before an operation with this clock."""
        if clock[INIT].tick(self.initialiser) >= self.init_tick:
            return True
        if proxied:
            return clock[ASYNC].tick(self.initialiser) >= self.init_tick
        if actor == self.initialiser and not remote:
            return True
        return clock[GENERIC].tick(self.initialiser) >= self.init_tick

    def arrive(self, count: int, clock: Clock, by: Reporter) -> None:
        """Take `count` arrivals off the pending ones."""
        self.gathered = join(self.gathered, clock)
        self.pending -= count
        if self.pending < 0:
            by.report(
                "barrier-overflow",
                f"more arrivals than the {self.expected} of a phase",
                address=self.describe(),
                other=self.init_instruction,
            )
            self.pending = 0
        self._advance(by)

    def expect(self, tx: int, by: Reporter) -> None:
        """Add to the pending transaction bytes."""
        self.tx += tx
        if abs(self.tx) > MAX_COUNT:
            by.report(
                "tx-overflow",
                f"pending transaction bytes {self.tx} are outside +-{MAX_COUNT}",
                address=self.describe(),
            )
        self._advance(by)

    def complete(self, tx: int, clock: Clock, by: Reporter) -> None:
        self.gathered = join(self.gathered, clock)
        self.tx -= tx
        self._advance(by)

    def _advance(self, by: Reporter) -> None:
        if self.pending != 0 or self.tx != 0:
            return
        self._check_observers(by)
        self.phase += 1
        self.pending = self.expected
        self.released = self.gathered
        self.gathered = self._zero
        for seen in self.observations:
            seen.warp.observed.pop(seen, None)
        self.observations = []
        self.signal.notify()

    def _check_observers(self, by: Reporter) -> None:
        """Report a phase that ends before every wait for the last phase is over.

        Parity tells two phases apart, not three: a waiter that is not ordered before the end of
        the next phase may miss its own."""
        for seen in self.observations:
            lane = seen.missing(self.gathered)
            if lane is not None:
                by.report(
                    "phase-overrun",
                    f"phase {self.phase} ends with no order after a wait for phase "
                    f"{self.phase - 1}",
                    address=self.describe(),
                    other=seen.instruction,
                    other_thread=seen.warp.thread(lane),
                )
                return

    def passed(self, parity: int) -> bool:
        """Return whether the phase of this parity has ended (test_wait.parity)."""
        return (self.phase & 1) != (parity & 1)

    def observe(self, warp: WarpClocks, bits: int, acquire: bool) -> None:
        """Note that lanes saw the last phase's end."""
        if acquire:
            warp.acquire(bits, self.released)
        if self.phase:
            self.observations.append(warp.observe(bits))
