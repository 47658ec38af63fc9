"""Asynchronous operations: agents that act at any legal moment after they were issued.

An operation keeps a snapshot of its issuer's clock, and acts later with that order alone. The
machine's schedule decides when; an operation with an `after` that is not done has to wait.
"""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.execution.cta import Cta, Touch
from build_kernels.emulator.execution.grid import Task
from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.findings import Reporter, Thread
from build_kernels.emulator.lanes import Ints, Mask
from build_kernels.emulator.memory.access_records import WEAK, actor_of, actors_of, pack, ticks_of
from build_kernels.emulator.memory.memory import READER_SLOTS, Memory
from build_kernels.emulator.ordering.clocks import ASYNC, GENERIC, TENSOR, Clock, Issue


class Operation(Task, Reporter):
    """One asynchronous operation, and its accesses to memory.

    what: its name in findings. pipe: the number of its in-order unit in the CTA, or -1; operations
    of one pipe act in issue order, so no two of them conflict. proxied: it goes through the async
    proxy, which needs a fence.proxy.async to see ordinary writes (PTX ISA, "Proxies").
    reduces: its writes commute with others of their kind. twin: see Issue.
    """

    what = "asynchronous operation"
    proxied = True
    reduces = False
    is_one = True

    def __init__(
        self,
        warp: Warp,
        lane: int,
        after: Task | None = None,
        pipe: int = -1,
        twin: object = None,
    ) -> None:
        self.grid = warp.grid
        self.log = warp.log
        self.warp = warp
        self.lane = lane
        self.cta: Cta = warp.cta
        self.instruction = warp.instruction
        self.clock: Clock = warp.clocks[lane]
        self.issuer = warp.actor + lane
        self.issue_tick = warp.tick
        warp.tick += 1
        self.pipe = pipe
        if pipe >= 0:
            after = self.grid.pipes.get((self.cta, pipe))
            self.grid.pipes[self.cta, pipe] = self
        super().__init__(self.grid.slot_for(self.cta, pipe), after)
        self.tick = self.slot.begin(
            Issue(self.thread(), self.issuer, self.issue_tick, warp, self.reduces, twin)
        )
        self.twin = twin
        self.reader_slot = self.slot.actor % READER_SLOTS

    def thread(self, lane: int | None = None) -> Thread:
        return Thread(cta=self.cta.index, warp=self.warp.index, lane=self.lane, agent=self.what)

    def touches(self, cta: Cta) -> None:
        """Note that this operation uses the CTA's memories."""
        cta.touched_by.append(Touch(self.slot.actor, self.tick, self.instruction, self.thread()))

    def completion(self) -> Clock:
        """Return the clock that the operation hands over when it completes.

        What the issuer did before is executed by then, which orders none of its accesses."""
        generic = self.clock[GENERIC].with_tick(self.slot.actor, self.tick)
        executed = self.clock[TENSOR].with_tick(self.issuer, self.issue_tick)
        return self.clock.replaced(GENERIC, generic).replaced(TENSOR, executed)

    def records(self, count: int) -> Ints:
        return pack(self.tick, self.slot.actor, WEAK, self.instruction.index)

    def ordered(self, records: Ints, written: bool) -> Mask:
        known, actors, ticks = self._known(records)
        if self.proxied and written:
            generic = (actors < self.grid.clocks.threads) & (records != 0)
            known &= ~generic | (self.clock[ASYNC].ticks(actors) >= ticks)
        return known

    def excused(self, record: int) -> bool:
        return (self.pipe >= 0 or self.reduces) and self.harmless(record)

    def excuses(self, records: Ints) -> bool:
        return False

    def harmless(self, record: int) -> bool:
        """Return whether a record is of an earlier operation of this pipe, or of a like reduction.

        Operations of a pipe that other threads issued need an order of their issues."""
        issue = self.grid.clocks.issue(record)
        if issue is None:
            return False
        if self.reduces and issue.reduces:
            return True
        return actor_of(record) == self.slot.actor and (
            issue.issuer == self.issuer
            or self.clock[GENERIC].tick(issue.issuer) >= issue.issue_tick
        )

    def conflict(self, memory: Memory, offset: int, record: int, what: str) -> None:
        kind, why = "race", f"{what} conflict with no order between the two"
        if self._known(np.array([record], dtype=np.int64))[0][0]:
            kind = "missing-proxy-fence"
            why = "the async proxy meets an ordinary write with no fence.proxy.async between"
        issue = self.grid.clocks.issue(record)
        twins = issue is not None and issue.twin is not None and issue.twin == self.twin
        if twins:
            why = "several lanes of a warp store the same bytes to the same place"
        instruction, thread = self.grid.author_of(record)
        self.report(
            kind,
            why,
            address=memory.describe(offset),
            other=instruction,
            other_thread=thread,
            by_the_letter=twins,
        )

    def _known(self, records: Ints) -> tuple[Mask, Ints, Ints]:
        """Return which records are ordered before in general, their actors and their ticks."""
        actors, ticks = actors_of(records), ticks_of(records)
        known: Mask = self.clock[GENERIC].ticks(actors) >= ticks
        known |= (actors == self.issuer) & (ticks <= self.issue_tick)
        known |= (actors == self.slot.actor) & (ticks == self.tick)
        return known, actors, ticks
