"""Tensor memory (TMEM): cells and allocation (PTX ISA, "Tensor Memory").

128 lanes of 512 columns of 32 bits; an address is lane << 16 | column. Warp w of a CTA reaches
lanes 32 (w mod 4) .. + 31 only.
"""

from __future__ import annotations

import random

import numpy as np

from build_kernels.binaries.ptx.syntax import Instruction
from build_kernels.emulator.findings import Reporter
from build_kernels.emulator.lanes import Ints
from build_kernels.emulator.memory.memory import POISON, Memory

ROWS, COLUMNS = 128, 512
SMALLEST = 32  # columns that can be allocated
POISON_WORD = 0xFFFFFFFF


class TensorCells(Memory):
    """State and access records of TMEM cells; `values` holds the 32-bit contents."""

    def __init__(self, name: str) -> None:
        super().__init__(name, ROWS * COLUMNS)
        self.values = np.full(ROWS * COLUMNS, POISON_WORD, dtype=np.uint32)

    def describe(self, offset: int) -> str:
        return f"{self.name} lane {offset // COLUMNS} column {offset % COLUMNS}"

    def poison(self, start: int, columns: int) -> None:
        """Make columns as if they were never written."""
        for cells, value in ((self.state, POISON), (self.values, POISON_WORD)):
            cells.reshape(ROWS, COLUMNS)[:, start : start + columns] = value


class TensorMemory:
    """One CTA's tensor memory; its cells are made at their first use.

    allocations: start -> (columns, the tcgen05.alloc). relinquished: the instruction that gave up
    the CTA's right to allocate.
    """

    def __init__(self, name: str) -> None:
        self.allocations: dict[int, tuple[int, Instruction]] = {}
        self.relinquished: Instruction | None = None
        self._owned = np.zeros(COLUMNS, dtype=bool)
        self._name = name
        self._cells: TensorCells | None = None

    @property
    def cells(self) -> TensorCells:
        if self._cells is None:
            self._cells = TensorCells(self._name)
        return self._cells

    def allocate(
        self, columns: int, instruction: Instruction, choice: random.Random | None
    ) -> int | None:
        """Allocate columns at the first free start, or a random one; None if there is none."""
        starts = [
            at
            for at in range(0, COLUMNS - columns + 1, SMALLEST)
            if not self._owned[at : at + columns].any()
        ]
        if not starts:
            return None
        start = starts[0] if choice is None else choice.choice(starts)
        self.allocations[start] = (columns, instruction)
        self._owned[start : start + columns] = True
        return start

    def free(self, start: int, columns: int) -> None:
        """End an allocation, and poison its cells."""
        del self.allocations[start]
        self._owned[start : start + columns] = False
        self.cells.poison(start, columns)

    def check_allocated(self, cells: Ints, what: str, by: Reporter) -> None:
        """Report cells outside allocated columns."""
        bad = ~self._owned[cells % COLUMNS]
        if bad.any():
            by.report(
                "tmem-unallocated",
                f"{what} touches a column that is not allocated",
                address=self.cells.describe(int(cells[np.flatnonzero(bad)[0]])),
            )
