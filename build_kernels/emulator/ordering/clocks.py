"""Vector clocks over threads and asynchronous agents.

A clock is four rows of `size` components. Component i is the last tick of actor i that is ordered
before the clock's owner. The four rows are four kinds of order:

GENERIC  ordinary causality order (PTX ISA, "Memory Consistency Model")
ASYNC    writes that a fence.proxy.async made visible to the async proxy ("Proxies")
INIT     mbarrier initialisations that a fence.mbarrier_init published
TENSOR   tcgen05 operations that a tcgen05.fence::before_thread_sync handed over; of a thread, the
         tick up to which it has executed, which orders no access

Rows and their parts are never changed: a change makes new ones, so that all others are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.findings import Thread
from build_kernels.emulator.lanes import Ints, all_of
from build_kernels.emulator.memory.access_records import actor_of, tick_of

GENERIC, ASYNC, INIT, TENSOR = range(4)
ROWS = 4

PART_BITS = 10
PART = 1 << PART_BITS  # components: the threads of a few CTAs

Ticks = NDArray[np.int32]
_ZEROS: Ticks = np.zeros(PART, dtype=np.int32)


class Row:
    """One row: parts of PART components, which rows share as long as they are the same."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[Ticks]) -> None:
        self._parts = parts

    def tick(self, actor: int) -> int:
        """Return the component of an actor."""
        return int(self._parts[actor >> PART_BITS][actor & PART - 1])

    def ticks(self, actors: Ints) -> Ticks:
        """Return the components of actors."""
        which, within = actors >> PART_BITS, actors & PART - 1
        first = which[0] if len(which) else 0
        if all_of(which == first):
            return self._parts[first][within]
        found = np.empty(len(actors), dtype=np.int32)
        for part in set(which.tolist()):
            mine = which == part
            found[mine] = self._parts[part][within[mine]]
        return found

    def latest(self, first: int, end: int) -> int:
        """Return the greatest component of the actors [first, end)."""
        most = 0
        while first < end:
            part, start = first >> PART_BITS, first & PART - 1
            most = max(most, int(self._parts[part][start : start + end - first].max()))
            first += PART - start
        return most

    def with_ticks(self, actors: Ints, ticks: int | Ticks) -> Row:
        """Return the row with other components of some actors, which lie in one part."""
        at = int(actors[0]) >> PART_BITS
        part = self._parts[at].copy()
        part[actors & PART - 1] = ticks
        return Row((*self._parts[:at], part, *self._parts[at + 1 :]))

    def with_tick(self, actor: int, tick: int) -> Row:
        """Return the row with another component."""
        at = actor >> PART_BITS
        part = self._parts[at].copy()
        part[actor & PART - 1] = tick
        return Row((*self._parts[:at], part, *self._parts[at + 1 :]))

    def joined(self, other: Row) -> Row:
        """Return the component-wise maximum."""
        if self is other:
            return self
        pairs = zip(self._parts, other._parts, strict=True)
        return Row(
            [
                a if a is b or b is _ZEROS else b if a is _ZEROS else np.maximum(a, b)
                for a, b in pairs
            ]
        )


class Clock(tuple[Row, Row, Row, Row]):
    """The rows GENERIC, ASYNC, INIT and TENSOR. Clocks are compared by identity."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    def replaced(self, row: int, new: Row) -> Clock:
        """Return the clock with another row."""
        return Clock((*self[:row], new, *self[row + 1 :]))


def join(left: Clock, right: Clock) -> Clock:
    """Return the component-wise maximum of two clocks."""
    if left is right:
        return left
    return Clock([a.joined(b) for a, b in zip(left, right, strict=True)])


@dataclass(frozen=True)
class Issue:
    """The origin of an operation, kept for as long as its records may matter.

    twin: equal for operations that do the same to the same bytes, issued by one instruction.
    """

    thread: Thread
    issuer: int
    issue_tick: int
    warp: object
    reduces: bool
    twin: object = None


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
        self.zero = Clock([Row([_ZEROS] * (-(-self.size // PART)))] * ROWS)

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
