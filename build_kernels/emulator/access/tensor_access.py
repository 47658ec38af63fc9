"""Operations on tensor memory, and their checked accesses to its cells."""

from __future__ import annotations

from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.lanes import Ints, Mask
from build_kernels.emulator.memory.access_records import actor_of, actors_of, tick_of, ticks_of
from build_kernels.emulator.memory.memory import Memory
from build_kernels.emulator.ordering.clocks import GENERIC


class TensorOperation(Operation):
    """An operation on cells of tensor memory.

    tensor: the tcgen05 operations that it may follow without a fence, by actor.
    """

    def __init__(self, warp: Warp, lane: int, cells: Ints, pipe: int = -1) -> None:
        super().__init__(warp, lane, pipe=pipe)
        self.cells = cells
        self.tensor = warp.tensor


class TensorAccess:
    """An operation's access to TMEM cells.

    tcgen05 operations are ordered across threads by tcgen05.fence::before_thread_sync, a
    synchronisation, and tcgen05.fence::after_thread_sync; within a thread by waits alone
    (PTX ISA, "Memory Consistency Model of tcgen05")."""

    is_one = True

    def __init__(self, operation: TensorOperation) -> None:
        self.operation = operation
        self.reader_slot = operation.reader_slot

    def records(self, count: int) -> Ints:
        return self.operation.records(count)

    def ordered(self, records: Ints, written: bool) -> Mask:
        operation = self.operation
        actors, ticks = actors_of(records), ticks_of(records)
        known: Mask = operation.tensor.ticks(actors) >= ticks
        known |= (actors == operation.slot.actor) & (ticks == operation.tick)
        return known

    def excused(self, record: int) -> bool:
        """Return whether a record is harmless, or of this warp and complete before."""
        operation = self.operation
        if operation.harmless(record):
            return True
        issue = operation.grid.clocks.issue(record)
        if issue is None or issue.warp is not operation.warp:
            return False
        return operation.clock[GENERIC].tick(actor_of(record)) >= tick_of(record)

    def excuses(self, records: Ints) -> bool:
        return False

    def conflict(self, memory: Memory, offset: int, record: int, what: str) -> None:
        operation = self.operation
        kind, why = "race", f"{what} conflict with no order between the two"
        instruction, thread = operation.grid.author_of(record)
        known = operation.clock[GENERIC].tick(actor_of(record)) >= tick_of(record)
        if known:
            kind = "missing-tcgen05-fence"
            why = (
                "ordered by a synchronisation, but without tcgen05.fence::before_thread_sync "
                "and ::after_thread_sync around it"
            )
        # An ordered tcgen05.ld has read: the scoreboard holds what uses its registers.
        load = "tcgen05.ld."
        operation.report(
            kind,
            why,
            address=memory.describe(offset),
            other=instruction,
            other_thread=thread,
            by_the_letter=known
            and load
            in (instruction.opcode[: len(load)], operation.instruction.opcode[: len(load)]),
        )
