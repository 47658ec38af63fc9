"""Asynchronous operations: agents that finish at any legal moment after they were issued.

An operation takes a snapshot of what its issuer knows, and acts later with only that knowledge.
The machine's schedule decides when; an operation whose `after` is not done yet has to wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from build_kernels.emulator.execution.warp import Signal, Warp
from build_kernels.emulator.findings import Thread
from build_kernels.emulator.memory.memory import READER_SLOTS, Memory
from build_kernels.emulator.ordering.clocks import (
    ASYNC,
    GENERIC,
    WEAK,
    Clock,
    Ints,
    Issue,
    Slot,
    actor_of,
    actors_of,
    instruction_of,
    record,
    ticks_of,
)
from build_kernels.emulator.ptx.syntax import Instruction

if TYPE_CHECKING:
    from build_kernels.emulator.execution.cta import Cta


@dataclass(frozen=True)
class Touch:
    """That an operation used a CTA's memories."""

    actor: int
    tick: int
    instruction: Instruction
    thread: Thread


class Operation:
    """One asynchronous operation.

    what: for reports. pipe: the number of the CTA's in-order unit that it belongs to, or -1;
    operations of one pipe act in issue order, so that a conflict between them is none.
    proxied: it goes through the async proxy, where ordinary writes are seen only behind a
    fence.proxy.async (PTX ISA, "Proxies"). reduces: its writes commute with their like.
    """

    what = "asynchronous operation"
    proxied = True
    reduces = False

    def __init__(
        self, warp: Warp, lane: int, after: Operation | None = None, pipe: int = -1
    ) -> None:
        self.machine = warp.machine
        self.warp = warp
        self.lane = lane
        self.cta: Cta = warp.cta
        self.instruction = warp.instruction
        self.clock: Clock = warp.clocks[lane]
        self.issuer = warp.actor + lane
        self.issue_tick = warp.tick
        warp.tick += 1
        warp.touch()
        self.done = False
        self.signal = Signal()
        self.pipe = pipe
        if pipe >= 0:
            after = self.cta.pipes.get(pipe)
            self.cta.pipes[pipe] = self
        self.after = after
        self.followers: list[Operation] = []
        self.slot: Slot = self.machine.slot_for(self)
        self.tick = self.slot.begin(
            Issue(self.thread(), self.issuer, self.issue_tick, warp, self.reduces)
        )
        self.reader_slot = self.slot.actor % READER_SLOTS

    def finish(self) -> None:
        """Act now, after whatever has to come first."""
        if self.done:
            return
        if self.after is not None:
            self.after.finish()
        self.perform()
        self.done = True
        self.after = None
        self.machine.finished(self)
        self.signal.notify()

    def perform(self) -> None:
        raise NotImplementedError

    def thread(self) -> Thread:
        return Thread(cta=self.cta.index, warp=self.warp.index, lane=self.lane, agent=self.what)

    def touches(self, cta: Cta) -> None:
        """Say that this operation uses the CTA's memories."""
        cta.touched_by.append(Touch(self.slot.actor, self.tick, self.instruction, self.thread()))

    def completion(self) -> Clock:
        """What knowing of this operation's completion implies."""
        clock = self.clock.copy()
        clock[GENERIC, self.slot.actor] = self.tick
        return clock

    # ---- Access ----

    def records(self, count: int) -> Ints:
        return record(self.tick, self.slot.actor, WEAK, self.instruction.index)

    def _known(self, records: Ints) -> tuple[np.ndarray, Ints, Ints]:
        actors, ticks = actors_of(records), ticks_of(records)
        known = self.clock[GENERIC][actors] >= ticks
        known |= (actors == self.issuer) & (ticks <= self.issue_tick)
        known |= (actors == self.slot.actor) & (ticks == self.tick)
        return known, actors, ticks

    def unordered(self, records: Ints, written: bool) -> Ints | None:
        if not records.any():
            return None
        known, actors, ticks = self._known(records)
        if self.proxied and written:
            generic = (actors < self.machine.clocks.threads) & (records != 0)
            known &= ~generic | (self.clock[ASYNC][actors] >= ticks)
        if known.all():
            return None
        bad = [int(i) for i in np.flatnonzero(~known)]
        if self.pipe >= 0 or self.reduces:
            bad = [i for i in bad if not self.harmless(int(records[i]))]
        return np.array(bad, dtype=np.int64) if bad else None

    def harmless(self, other: int) -> bool:
        """Is the other an earlier operation of this pipe, or a reduction like this one?

        Operations of a pipe that other threads issued need an order of their issues."""
        issue = self.machine.clocks.issue(other)
        if issue is None:
            return False
        if self.reduces and issue.reduces:
            return True
        return actor_of(other) == self.slot.actor and (
            issue.issuer == self.issuer
            or bool(self.clock[GENERIC, issue.issuer] >= issue.issue_tick)
        )

    def conflict(self, memory: Memory, offset: int, other: int, what: str) -> None:
        one = np.array([other], dtype=np.int64)
        kind, why = "race", f"{what} conflict with no order between the two"
        if self._known(one)[0][0]:
            kind = "missing-proxy-fence"
            why = "the async proxy meets an ordinary write with no fence.proxy.async between"
        self.machine.report(
            kind,
            why,
            operation=self,
            address=memory.describe(offset),
            other=self.machine.kernel.instructions[instruction_of(other)],
            other_thread=self.machine.actor_thread(other),
        )


class Group:
    """Operations committed together; `waited` makes its completion known to the waiter."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    @property
    def done(self) -> bool:
        return all(operation.done for operation in self.operations)
