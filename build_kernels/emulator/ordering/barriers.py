"""Signals that wake warps, and barriers that count threads: named ones, and the cluster's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from build_kernels.binaries.ptx.syntax import Instruction
from build_kernels.emulator.lanes import LANES
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
    """One of a CTA's 16 barriers (PTX ISA, "bar").

    It counts whole warps: one has arrived when all its living lanes have. living: the lanes of each
    warp of the CTA that have not exited. voted: true predicates and votes of the last generation,
    for barrier.red.
    """

    def __init__(self, zero: Clock, living: Mapping[WarpClocks, int]) -> None:
        super().__init__(zero)
        self.expected = 0
        self.opener: Instruction | None = None
        self._living = living
        self._lanes: dict[WarpClocks, int] = {}  # of warps that have not arrived as a whole
        self._warps: set[WarpClocks] = set()  # those that have
        self._all = False  # an arrival named no count, so that every living warp must arrive
        self.voted = self._votes = (0, 0)

    def vote(self, true: int, votes: int) -> None:
        """Add the predicates of threads that arrive."""
        self._votes = (self._votes[0] + true, self._votes[1] + votes)

    def arrive(self, warp: WarpClocks, expected: int, clock: Clock, *, all_threads: bool) -> int:
        """Count a warp's lanes; return the generation to wait for.

        expected: a count of threads, that of the CTA's if all of them must arrive."""
        if not self._warps and not self._lanes:
            self.expected, self.opener = expected, warp.instruction
        elif self.expected != expected:
            warp.report(
                "barrier-mismatch",
                f"expects {expected} threads, but an earlier arrival expects {self.expected}",
                other=self.opener,
            )
        self._all |= all_threads
        self._lanes[warp] = self._lanes.get(warp, 0) | warp.bits
        mine = self._gather(0, clock)
        self.settle()
        return mine

    def settle(self) -> None:
        """Count the warps that have arrived by now, and open if they suffice."""
        if not self._lanes and not self._warps:
            return
        for warp, lanes in list(self._lanes.items()):
            if self._living.get(warp, 0) & ~lanes:
                continue
            del self._lanes[warp]
            self._warps.add(warp)
            self.arrived += LANES
            if self.arrived > self.expected:
                warp.report(
                    "barrier-overflow",
                    f"{self.arrived} threads arrived, but {self.expected} are expected",
                    other=self.opener,
                )
        if not self._warps:
            return
        if self.arrived >= self.expected or (self._all and self._living.keys() <= self._warps):
            self._warps.clear()
            self._all = False
            self.voted, self._votes = self._votes, (0, 0)
            self._open()


class ClusterBarrier(ThreadBarrier):
    """barrier.cluster (PTX ISA): opens when all living threads of the cluster arrived.

    arrived: living threads.
    """

    def arrive(self, threads: int, clock: Clock, living: int) -> int:
        """Count threads; return the generation to wait for."""
        mine = self._gather(threads, clock)
        self.settle(living)
        return mine

    def leave(self, arrived: int, living: int) -> None:
        """Go on without threads that exited. arrived: how many of them had arrived."""
        self.arrived -= arrived
        self.settle(living)

    def settle(self, living: int) -> None:
        """Open if every living thread has arrived."""
        if self.arrived and self.arrived >= living:
            self._open()
