"""Signals that wake warps, and barriers that count threads: named ones, and the cluster's."""

from __future__ import annotations

from typing import Protocol

from build_kernels.binaries.ptx.syntax import Instruction
from build_kernels.emulator.ordering.clocks import Clock, join
from build_kernels.emulator.ordering.warp_clocks import WarpClocks


class Waiter(Protocol):
    """A warp that a signal can wake."""

    def wake(self) -> None:
        """Make the waiter runnable."""
        ...


class Signal:
    """An event that warps wait for."""

    def __init__(self) -> None:
        self.waiters: dict[Waiter, None] = {}  # in order, for the same run from the same seed

    def notify(self) -> None:
        for waiter in self.waiters:
            waiter.wake()
        self.waiters.clear()


class ThreadBarrier:
    """Count arrivals; each generation hands the join of its arrivals' clocks over."""

    def __init__(self, zero: Clock) -> None:
        self.arrived = 0
        self.generation = 0
        self.gathered = self.released = self._zero = zero
        self.signal = Signal()

    def _gather(self, threads: int, clock: Clock) -> int:
        self.gathered = join(self.gathered, clock)
        self.arrived += threads
        return self.generation

    def _open(self) -> None:
        self.arrived = 0
        self.generation += 1
        self.released = self.gathered
        self.gathered = self._zero
        self.signal.notify()


class NamedBarrier(ThreadBarrier):
    """One of a CTA's 16 barriers (PTX ISA, "bar")."""

    def __init__(self, zero: Clock) -> None:
        super().__init__(zero)
        self.expected = 0
        self.opener: Instruction | None = None

    def arrive(self, warp: WarpClocks, threads: int, expected: int, clock: Clock) -> int:
        """Count a warp's threads; return the generation to wait for."""
        if self.arrived == 0:
            self.expected, self.opener = expected, warp.instruction
        elif self.expected != expected:
            warp.report(
                "barrier-mismatch",
                f"expects {expected} threads, but an earlier arrival expects {self.expected}",
                other=self.opener,
            )
        mine = self._gather(threads, clock)
        if self.arrived > self.expected:
            warp.report(
                "barrier-overflow",
                f"{self.arrived} threads arrived, but {self.expected} are expected",
                other=self.opener,
            )
        if self.arrived >= self.expected:
            self._open()
        return mine


class ClusterBarrier(ThreadBarrier):
    """barrier.cluster (PTX ISA): opens when all living threads of the cluster arrived."""

    def arrive(self, threads: int, clock: Clock, living: int) -> int:
        """Count threads; return the generation to wait for."""
        mine = self._gather(threads, clock)
        self.settle(living)
        return mine

    def settle(self, living: int) -> None:
        """Open if every living thread has arrived."""
        if self.arrived and self.arrived >= living:
            self._open()
