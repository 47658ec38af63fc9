"""Happens-before: vector clocks over threads and asynchronous agents.

A clock is an int32 array [4, size]. Component i says up to which tick of thread (or agent) i the
owner knows; the four rows say through what:

GENERIC  ordinary causality order (PTX ISA, "Memory Consistency Model")
ASYNC    what a fence.proxy.async has made visible to the async proxy (8.x "Proxies")
INIT     mbarrier initialisations published by fence.mbarrier_init
TENSOR   tcgen05 operations that a tcgen05.fence::before_thread_sync has handed over

Clocks are immutable once shared: a join makes a new array, so lanes and barriers share them.

A record is one int64 that names an access: tick, actor, scope and instruction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.findings import Thread

GENERIC, ASYNC, INIT, TENSOR = range(4)
ROWS = 4

Clock = NDArray[np.int32]
Ints = NDArray[np.int64]

# Scopes of strong operations, in a record's two bits; 0 is a weak access.
WEAK, CTA_SCOPE, CLUSTER_SCOPE, GPU_SCOPE = range(4)

_INSTRUCTION_BITS, _SCOPE_BITS, _ACTOR_BITS = 16, 2, 22
_ACTOR_AT = _INSTRUCTION_BITS + _SCOPE_BITS
_TICK_AT = _ACTOR_AT + _ACTOR_BITS
_ACTOR_MASK = (1 << _ACTOR_BITS) - 1


def record(tick: int, actor: int | Ints, scope: int, instruction: int) -> Ints:
    """Pack an access (or one for each actor) into int64."""
    actors = np.asarray(actor, dtype=np.int64)
    return (
        (actors << _ACTOR_AT)
        | (tick << _TICK_AT)
        | (scope << _INSTRUCTION_BITS)
        | np.int64(instruction)
    )


def actors_of(records: Ints) -> Ints:
    return (records >> _ACTOR_AT) & _ACTOR_MASK


def ticks_of(records: Ints) -> Ints:
    return records >> _TICK_AT


def scopes_of(records: Ints) -> Ints:
    return (records >> _INSTRUCTION_BITS) & 3


def actor_of(one: int) -> int:
    return (one >> _ACTOR_AT) & _ACTOR_MASK


def tick_of(one: int) -> int:
    return one >> _TICK_AT


def scope_of(one: int) -> int:
    return (one >> _INSTRUCTION_BITS) & 3


def instruction_of(one: int) -> int:
    return one & 0xFFFF


def join(left: Clock, right: Clock) -> Clock:
    """The least clock that knows what both know."""
    return left if left is right else np.maximum(left, right)


@dataclass(frozen=True)
class Issue:
    """What is remembered of an operation for as long as its records may matter."""

    thread: Thread
    issuer: int
    issue_tick: int
    warp: object
    reduces: bool


_REMEMBERED = 32


@dataclass
class Slot:
    """One component of the clocks, lent to one asynchronous operation, or one in-order pipe."""

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
    """Numbers the components: threads, in-order pipes, agents, and one for the grid before.

    threads: thread slots; pipes: units whose operations act in issue order, so that knowing of
    one implies all before it; agents: how many other operations may be in flight at once.
    """

    def __init__(self, threads: int, pipes: int, agents: int) -> None:
        self.threads = threads
        self.size = threads + pipes + agents + 1
        self.predecessor = self.size - 1
        self._slots = [Slot(threads + i, i < pipes) for i in range(pipes + agents)]
        self._agents = self._slots[pipes:]
        self._next = 0
        # One for all: it is as large as any clock, and each CTA starts with dozens of them.
        self._zero = np.zeros((ROWS, self.size), dtype=np.int32)
        self._zero.flags.writeable = False

    def zero(self) -> Clock:
        return self._zero

    def slot(self, actor: int) -> Slot:
        return self._slots[actor - self.threads]

    def pipe(self, number: int) -> Slot:
        return self._slots[number]

    def lend(self) -> Slot | None:
        """The agent slot idle for longest, or None when every one has an operation in flight."""
        for _ in range(len(self._agents)):
            slot = self._agents[self._next]
            self._next = (self._next + 1) % len(self._agents)
            if not slot.busy:
                return slot
        return None

    def issue(self, record: int) -> Issue | None:
        """The operation that left a record, if it was one and is still remembered."""
        actor = actor_of(record)
        if not self.threads <= actor < self.predecessor:
            return None
        return self.slot(actor).issues.get(tick_of(record))
