"""Vector clocks over threads and asynchronous agents.

A clock is four rows of int32 [size]. Component i is the last tick of actor i that is ordered before
the clock's owner. The four rows are four kinds of order:

GENERIC  ordinary causality order (PTX ISA, "Memory Consistency Model")
ASYNC    writes that a fence.proxy.async made visible to the async proxy ("Proxies")
INIT     mbarrier initialisations that a fence.mbarrier_init published
TENSOR   tcgen05 operations that a tcgen05.fence::before_thread_sync handed over

Rows are never changed: a change makes a new one, so that lanes, barriers and clocks share them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.findings import Thread
from build_kernels.emulator.lanes import Ints
from build_kernels.emulator.memory.access_records import actor_of, tick_of

GENERIC, ASYNC, INIT, TENSOR = range(4)
ROWS = 4

Row = NDArray[np.int32]


class Clock(tuple[Row, Row, Row, Row]):
    """The rows GENERIC, ASYNC, INIT and TENSOR. Clocks are compared by identity."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    def replaced(self, row: int, new: Row) -> Clock:
        """Return the clock with another row."""
        return Clock((*self[:row], new, *self[row + 1 :]))

    def with_ticks(self, row: int, actors: int | slice | Ints, ticks: int | Row) -> Clock:
        """Return the clock with other ticks of some actors in one row."""
        new = self[row].copy()
        new[actors] = ticks
        return self.replaced(row, new)


def join(left: Clock, right: Clock) -> Clock:
    """Return the component-wise maximum of two clocks."""
    if left is right:
        return left
    return Clock(map(join_rows, left, right))


def join_rows(left: Row, right: Row) -> Row:
    """Return the component-wise maximum of two rows."""
    if left is right or not right.flags.writeable:
        return left  # rows that cannot be written are of zeros
    return right if not left.flags.writeable else np.maximum(left, right)


@dataclass(frozen=True)
class Issue:
    """The origin of an operation, kept for as long as its records may matter."""

    thread: Thread
    issuer: int
    issue_tick: int
    warp: object
    reduces: bool


_REMEMBERED = 32


@dataclass
class Slot:
    """One component of the clocks, lent to one asynchronous operation or one in-order pipe."""

    actor: int
    pipe: bool = False
    tick: int = 0
    busy: bool = False
    issues: dict[int, Issue] = field(default_factory=dict)

    def begin(self, issue: Issue) -> int:
        """Count one more operation and return its tick."""
        self.tick += 1
        self.issues[self.tick] = issue
        if not self.pipe:
            self.issues.pop(self.tick - _REMEMBERED, None)
        return self.tick


class ClockSpace:
    """Number the components: threads, in-order pipes, agents, and one for the grid before.

    threads: thread slots. pipes: units whose operations act in issue order, so that the order of
    one implies that of all before it. agents: maximum number of other operations in flight.
    """

    def __init__(self, threads: int, pipes: int, agents: int) -> None:
        self.threads = threads
        self.size = threads + pipes + agents + 1
        self.predecessor = self.size - 1
        self._slots = [Slot(threads + i, i < pipes) for i in range(pipes + agents)]
        self._agents = self._slots[pipes:]
        self._next = 0
        # Shared by all: it is as large as any clock, and each CTA starts with dozens of them.
        zeros = np.zeros(self.size, dtype=np.int32)
        zeros.flags.writeable = False
        self.zero = Clock([zeros] * ROWS)

    def pipe(self, number: int) -> Slot:
        return self._slots[number]

    def lend(self) -> Slot | None:
        """Return the agent slot idle for longest; None if each has an operation in flight."""
        for _ in range(len(self._agents)):
            slot = self._agents[self._next]
            self._next = (self._next + 1) % len(self._agents)
            if not slot.busy:
                return slot
        return None

    def issue(self, record: int) -> Issue | None:
        """Return the origin of the operation that left a record, if it is still remembered."""
        actor = actor_of(record)
        if not self.threads <= actor < self.predecessor:
            return None
        return self._slots[actor - self.threads].issues.get(tick_of(record))
