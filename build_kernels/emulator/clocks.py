"""Happens-before: vector clocks over threads and asynchronous agents.

A clock is an int32 array [4, size]. Component i says up to which tick of thread (or agent) i the
owner knows; the four rows say through what:

GENERIC  ordinary causality order (PTX ISA 8, "Memory Consistency Model")
ASYNC    what a fence.proxy.async has made visible to the async proxy (8.x "Proxies")
INIT     mbarrier initialisations published by fence.mbarrier_init
TENSOR   tcgen05 operations that a tcgen05.fence::before_thread_sync has handed over

Clocks are immutable once shared: a join makes a new array, so lanes and barriers share them.

A record is one int64 that names an access: tick, actor, scope and instruction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


def scope_of(one: int) -> int:
    return (one >> _INSTRUCTION_BITS) & 3


def instruction_of(one: int) -> int:
    return one & 0xFFFF


def join(left: Clock, right: Clock) -> Clock:
    """The least clock that knows what both know."""
    return left if left is right else np.maximum(left, right)


@dataclass
class Slot:
    """One component of the clocks, lent to one asynchronous operation at a time."""

    actor: int
    tick: int = 0
    operation: object | None = None


class ClockSpace:
    """Numbers the components: threads first, then agent slots, then one for the grid before.

    threads: thread slots; agents: how many asynchronous operations may be tracked at once.
    """

    def __init__(self, threads: int, agents: int) -> None:
        self.threads = threads
        self.size = threads + agents + 1
        self.predecessor = self.size - 1
        self._slots = [Slot(threads + i) for i in range(agents)]
        self._next = 0

    def zero(self) -> Clock:
        return np.zeros((ROWS, self.size), dtype=np.int32)

    def slot(self, actor: int) -> Slot:
        return self._slots[actor - self.threads]

    def lend(self) -> Slot | None:
        """The slot idle for longest, or None when every slot has an operation in flight."""
        for _ in range(len(self._slots)):
            slot = self._slots[self._next]
            self._next = (self._next + 1) % len(self._slots)
            if slot.operation is None or getattr(slot.operation, "done", True):
                slot.tick += 1
                return slot
        return None
