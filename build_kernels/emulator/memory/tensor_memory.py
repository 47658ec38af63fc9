"""Tensor memory (TMEM): cells, allocation, and the order of accesses (PTX ISA, "Tensor Memory").

128 lanes of 512 columns of 32 bits; an address is lane << 16 | column. Warp w of a CTA reaches
lanes 32 (w mod 4) .. + 31 only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import Array
from build_kernels.emulator.findings import Thread
from build_kernels.emulator.memory.memory import Memory
from build_kernels.emulator.ordering.clocks import (
    GENERIC,
    Ints,
    actor_of,
    actors_of,
    instruction_of,
    tick_of,
    ticks_of,
)
from build_kernels.emulator.ptx.syntax import Instruction

if TYPE_CHECKING:
    from build_kernels.emulator.execution.cta import Cta


ROWS, COLUMNS = 128, 512

SMALLEST = 32


class TensorCells(Memory):
    """State and access records of TMEM cells; `values` holds the 32-bit contents."""

    def __init__(self, name: str) -> None:
        super().__init__(name, ROWS * COLUMNS)
        self.values = np.full(ROWS * COLUMNS, 0xFFFFFFFF, dtype=np.uint32)

    def describe(self, offset: int) -> str:
        return f"{self.name} lane {offset // COLUMNS} column {offset % COLUMNS}"


class TensorMemory:
    """One CTA's tensor memory; the cells come into being with the first allocation."""

    def __init__(self, cta: Cta) -> None:
        self.cta = cta
        self.allocations: dict[int, tuple[int, Instruction]] = {}
        self.owned = np.zeros(COLUMNS, dtype=bool)
        self.relinquished: Instruction | None = None
        self._cells: TensorCells | None = None

    @property
    def cells(self) -> TensorCells:
        if self._cells is None:
            self._cells = TensorCells(f"tensor memory of cta {self.cta.index}")
        return self._cells

    def free_start(self, columns: int, anywhere: bool) -> int | None:
        """A start for an allocation; `anywhere`: a random one of those that are free."""
        starts = [
            at
            for at in range(0, COLUMNS - columns + 1, SMALLEST)
            if not self.owned[at : at + columns].any()
        ]
        if not starts:
            return None
        return self.cta.machine.random.choice(starts) if anywhere else starts[0]

    def check_exit(self, thread: Thread) -> None:
        for start, (columns, instruction) in self.allocations.items():
            self.cta.machine.report(
                "tmem-leak",
                f"{columns} columns at {start} are still allocated at exit",
                instruction=instruction,
                thread=thread,
            )

    def inside(self, operation: Operation, cells: Ints) -> bool:
        """Are all cells in allocated columns? Reported when not."""
        columns = cells % COLUMNS
        bad = ~self.owned[columns]
        if not bad.any():
            return True
        at = int(cells[np.flatnonzero(bad)[0]])
        operation.machine.report(
            "tmem-unallocated",
            f"{operation.what} touches a column that is not allocated",
            operation=operation,
            address=self.cells.describe(at),
        )
        return False


class TensorAccess:
    """An operation's access to TMEM cells.

    tcgen05 operations are ordered across threads by tcgen05.fence::before_thread_sync, a
    synchronisation, and tcgen05.fence::after_thread_sync; within a thread by waits alone
    (PTX ISA, "Memory Consistency Model of tcgen05")."""

    def __init__(self, operation: Operation, tensor: Array) -> None:
        self.operation = operation
        self.tensor = tensor
        self.reader_slot = operation.reader_slot

    def records(self, count: int) -> Ints:
        return self.operation.records(count)

    def unordered(self, records: Ints, written: bool) -> Ints | None:
        if not records.any():
            return None
        operation = self.operation
        actors, ticks = actors_of(records), ticks_of(records)
        known = self.tensor[actors] >= ticks
        known |= (actors == operation.slot.actor) & (ticks == operation.tick)
        if known.all():
            return None
        bad = np.flatnonzero(~known)
        distinct, which = np.unique(records[bad], return_inverse=True)
        verdicts = np.array([self._ordered(int(one)) for one in distinct], dtype=bool)
        bad = bad[~verdicts[which]]
        return bad if len(bad) else None

    def _ordered(self, one: int) -> bool:
        operation = self.operation
        if operation.harmless(one):
            return True
        issue = operation.machine.clocks.issue(one)
        if issue is None or issue.warp is not operation.warp:
            return False
        actor, tick = actor_of(one), tick_of(one)
        return bool(operation.clock[GENERIC, actor] >= tick)

    def conflict(self, memory: Memory, offset: int, other: int, what: str) -> None:
        operation = self.operation
        machine = operation.machine
        actor, tick = actor_of(other), tick_of(other)
        kind, why = "race", f"{what} conflict with no order between the two"
        if operation.clock[GENERIC, actor] >= tick:
            kind = "missing-tcgen05-fence"
            why = (
                "ordered by a synchronisation, but without tcgen05.fence::before_thread_sync "
                "and ::after_thread_sync around it"
            )
        machine.report(
            kind,
            why,
            operation=operation,
            address=memory.describe(offset),
            other=machine.kernel.instructions[instruction_of(other)],
            other_thread=machine.actor_thread(other),
        )
