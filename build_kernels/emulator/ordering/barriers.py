"""Barrier objects: mbarriers in shared memory, named barriers of a CTA, the cluster's barrier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from build_kernels.emulator.execution.warp import Signal, Warp, lanes_of
from build_kernels.emulator.ordering.clocks import ASYNC, GENERIC, INIT, Clock, join
from build_kernels.emulator.ptx.syntax import Instruction

if TYPE_CHECKING:
    from build_kernels.emulator.execution.cta import Cta
    from build_kernels.emulator.execution.machine import Machine
    from build_kernels.emulator.execution.operation import Operation

MAX_COUNT = (1 << 20) - 1


@dataclass(frozen=True, eq=False)
class Observation:
    """A wait that saw a phase end: which lanes, when, where."""

    warp: Warp
    bits: int
    tick: int
    instruction: Instruction


class Mbarrier:
    """An mbarrier object (PTX ISA, "Parallel Synchronization and Communication").

    A phase ends when no arrivals and no transaction bytes are pending. `phase` counts the
    phases that ended; `released` is what the arrivals of the last one handed over.
    """

    def __init__(self, machine: Machine, cta: Cta, offset: int, count: int, warp: Warp) -> None:
        self.machine = machine
        self.cta = cta
        self.offset = offset
        self.expected = count
        self.pending = count
        self.tx = 0
        self.phase = 0
        self.gathered: Clock = machine.clocks.zero()
        self.released: Clock = machine.clocks.zero()
        self.signal = Signal()
        self.observations: list[Observation] = []
        self.initialiser = warp.actor + warp.first_lane()
        self.init_tick = warp.tick
        self.init_instruction = warp.instruction
        self.foreign_touches: list[tuple[int, int, Instruction]] = []

    def describe(self) -> str:
        return f"mbarrier {self.cta.shared.describe(self.offset)}"

    def missing(self) -> str:
        """What the current phase waits for, for a reader."""
        return (
            f"phase {self.phase} of {self.describe()} ({self.pending} of {self.expected} arrivals "
            f"and {self.tx} bytes missing)"
        )

    def knows_init(self, clock: Clock, actor: int, *, proxied: bool, remote: bool) -> bool:
        """Is the initialisation ordered before an operation with this clock?"""
        if clock[INIT, self.initialiser] >= self.init_tick:
            return True
        if proxied:
            return bool(clock[ASYNC, self.initialiser] >= self.init_tick)
        if actor == self.initialiser and not remote:
            return True
        return bool(clock[GENERIC, self.initialiser] >= self.init_tick)

    def arrive(
        self,
        count: int,
        clock: Clock,
        *,
        warp: Warp | None = None,
        operation: Operation | None = None,
    ) -> None:
        self.machine.events += 1
        self.gathered = join(self.gathered, clock)
        self.pending -= count
        if self.pending < 0:
            self.machine.report(
                "barrier-overflow",
                f"more arrivals than the {self.expected} of a phase",
                warp=warp,
                operation=operation,
                address=self.describe(),
                other=self.init_instruction,
            )
            self.pending = 0
        self._advance(warp, operation)

    def expect(self, tx: int, warp: Warp) -> None:
        self.machine.events += 1
        self.tx += tx
        if abs(self.tx) > MAX_COUNT:
            self.machine.report(
                "tx-overflow",
                f"pending transaction bytes {self.tx} are outside +-{MAX_COUNT}",
                warp=warp,
                address=self.describe(),
            )
        self._advance(warp, None)

    def complete(self, tx: int, clock: Clock, operation: Operation) -> None:
        self.machine.events += 1
        self.gathered = join(self.gathered, clock)
        self.tx -= tx
        self._advance(None, operation)

    def _advance(self, warp: Warp | None, operation: Operation | None) -> None:
        if self.pending != 0 or self.tx != 0:
            return
        self._check_observers(warp, operation)
        self.phase += 1
        self.pending = self.expected
        self.released = self.gathered
        self.gathered = self.machine.clocks.zero()
        self.observations = []
        self.signal.notify()

    def _check_observers(self, warp: Warp | None, operation: Operation | None) -> None:
        """A phase may end only after every wait for the phase before it is over.

        Parity tells two phases apart, not three: a waiter that is not ordered before the end of
        the next phase may miss its own."""
        for seen in self.observations:
            actors = seen.warp.actors[lanes_of(seen.bits)]
            late = self.gathered[GENERIC][actors] < seen.tick
            if late.any():
                self.machine.report(
                    "phase-overrun",
                    f"phase {self.phase} ends with no order after a wait for phase "
                    f"{self.phase - 1}",
                    warp=warp,
                    operation=operation,
                    address=self.describe(),
                    other=seen.instruction,
                    other_thread=seen.warp.thread(
                        int(np.flatnonzero(lanes_of(seen.bits))[np.flatnonzero(late)[0]])
                    ),
                )
                return

    def passed(self, parity: int) -> bool:
        """Has the phase of this parity ended? (test_wait.parity)"""
        return (self.phase & 1) != (parity & 1)

    def observe(self, warp: Warp, bits: int, acquire: bool) -> None:
        """Lanes saw the last phase's end."""
        if acquire:
            warp.acquire(bits, self.released)
        if self.phase:
            self.observations.append(Observation(warp, bits, warp.tick, warp.instruction))
            warp.touch()


class NamedBarrier:
    """One of a CTA's 16 barriers (PTX ISA, "bar")."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.expected = 0
        self.arrived = 0
        self.generation = 0
        self.gathered: Clock = machine.clocks.zero()
        self.released: Clock = machine.clocks.zero()
        self.signal = Signal()
        self.opener: Instruction | None = None

    def arrive(self, warp: Warp, threads: int, expected: int, clock: Clock) -> int:
        """Returns the generation to wait for."""
        self.machine.events += 1
        if self.arrived == 0:
            self.expected, self.opener = expected, warp.instruction
        elif self.expected != expected:
            self.machine.report(
                "barrier-mismatch",
                f"expects {expected} threads where an earlier arrival expects {self.expected}",
                warp=warp,
                other=self.opener,
            )
        self.gathered = join(self.gathered, clock)
        self.arrived += threads
        mine = self.generation
        if self.arrived >= self.expected:
            if self.arrived > self.expected:
                self.machine.report(
                    "barrier-overflow",
                    f"{self.arrived} threads arrived where {self.expected} are expected",
                    warp=warp,
                    other=self.opener,
                )
            self.arrived = 0
            self.generation += 1
            self.released = self.gathered
            self.gathered = self.machine.clocks.zero()
            self.signal.notify()
        return mine


class ClusterBarrier:
    """barrier.cluster (PTX ISA): waits for all threads of the cluster that live."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.arrived = 0
        self.generation = 0
        self.gathered: Clock = machine.clocks.zero()
        self.released: Clock = machine.clocks.zero()
        self.signal = Signal()

    def arrive(self, threads: int, clock: Clock, living: int) -> int:
        self.machine.events += 1
        self.gathered = join(self.gathered, clock)
        self.arrived += threads
        mine = self.generation
        self.settle(living)
        return mine

    def settle(self, living: int) -> None:
        """Open when everyone alive has arrived."""
        if self.arrived and self.arrived >= living:
            self.arrived = 0
            self.generation += 1
            self.released = self.gathered
            self.gathered = self.machine.clocks.zero()
            self.signal.notify()
