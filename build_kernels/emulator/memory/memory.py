"""Byte-addressed memories that remember what was written, by whom, and what was never written."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.ordering.clocks import Ints, actors_of

Bytes = NDArray[np.uint8]

POISON, VALID, BARRIER = range(3)
POISON_BYTE = 0xFF  # a NaN in every floating-point type
READER_SLOTS = 4


class Access(Protocol):
    """Who touches memory: decides what is ordered before it, and reports what is not."""

    reader_slot: int

    def records(self, count: int) -> Ints:
        """The record to leave, one for each of `count` touched bytes (or a scalar array)."""
        ...

    def unordered(self, records: Ints, written: bool) -> Ints | None:
        """Positions in `records` that are not ordered before this access; None when all are.

        written: the records are of writes (else of reads)."""
        ...

    def conflict(self, memory: Memory, offset: int, other: int, what: str) -> None:
        """Report one unordered pair. what: "read-write", "write-read" or "write-write"."""
        ...


class Memory:
    """An array of bytes with a state and access records for each byte.

    name: for reports. initial: contents, valid from the start; else `size` bytes of poison.
    tracked: keep access records (not for memory that nobody may write).
    """

    def __init__(
        self,
        name: str,
        size: int,
        *,
        initial: Bytes | None = None,
        base: int = 0,
        tracked: bool = True,
        read_only: bool = False,
        dependent: bool = False,
    ) -> None:
        self.name = name
        self.size = size
        self.base = base
        self.read_only = read_only
        self.dependent = dependent
        self.tracked = tracked and not read_only
        if initial is None:
            self.data = np.full(size, POISON_BYTE, dtype=np.uint8)
            self.state = np.zeros(size, dtype=np.uint8)
        else:
            self.data = initial.copy()
            self.state = np.full(size, VALID, dtype=np.uint8)
        # Records of each byte's last write, and of reads since: a row for each reader slot, made
        # when first used. Readers share slots by a hash of the reader; of two unordered readers
        # of a byte in one slot only the later is remembered.
        self._writes: Ints | None = None
        self._reads: list[Ints | None] = [None] * READER_SLOTS

    def describe(self, offset: int) -> str:
        if self.base:
            return f"{self.name}+{offset:#x} ({self.base + offset:#x})"
        return f"{self.name}+{offset:#x}"

    def note_read(self, offsets: Ints, access: Access) -> None:
        """Check and record a read of the bytes at `offsets` (flat)."""
        if not self.tracked:
            return
        if self._writes is not None:
            before = self._writes[offsets]
            bad = access.unordered(before, True)
            if bad is not None:
                at = int(bad[0])
                access.conflict(self, int(offsets[at]), int(before[at]), "write-read")
        row = self._reads[access.reader_slot]
        if row is None:
            row = self._reads[access.reader_slot] = np.zeros(self.size, dtype=np.int64)
        row[offsets] = access.records(len(offsets))

    def note_write(self, offsets: Ints, access: Access) -> None:
        """Check and record a write of the bytes at `offsets` (flat)."""
        if not self.tracked:
            return
        if self._writes is None:
            self._writes = np.zeros(self.size, dtype=np.int64)
        self._check(self._writes, offsets, access, True)
        for row in self._reads:
            if row is not None:
                self._check(row, offsets, access, False)
                row[offsets] = 0
        self._writes[offsets] = access.records(len(offsets))

    def _check(self, row: Ints, offsets: Ints, access: Access, written: bool) -> None:
        before = row[offsets]
        bad = access.unordered(before, written)
        if bad is not None:
            at = int(bad[0])
            what = "write-write" if written else "read-write"
            access.conflict(self, int(offsets[at]), int(before[at]), what)

    def records(self, where: Ints | slice) -> Ints:
        """The distinct records left at these offsets."""
        found = [row[where] for row in (self._writes, *self._reads) if row is not None]
        found = [np.unique(part[part != 0]) for part in found]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)

    def foreign_records(self, first: int, last: int) -> Ints:
        """Distinct records left by actors outside [first, last)."""
        records = self.records(slice(None))
        actors = actors_of(records)
        return records[(actors < first) | (actors >= last)]


SHARED_WINDOW = 0x0001_0000_0000_0000
LOCAL_WINDOW = 0x0002_0000_0000_0000
PARAMETER_WINDOW = 0x0004_0000_0000_0000
WINDOW_MASK = 0x00FF_0000_0000_0000
GLOBAL_BASE = 0x7F00_0000_0000
SHARED_RESERVED = 1024  # the driver keeps the first KiB of shared memory for itself
SHARED_RANK_SHIFT = 24  # a shared::cluster address: rank of the CTA << 24 | offset
SHARED_CAPACITY = 228 * 1024


class GlobalMemory:
    """The arrays of a launch at addresses of their own, with a gap after each."""

    def __init__(self) -> None:
        self.arrays: list[Memory] = []
        self._starts: Ints = np.zeros(0, dtype=np.int64)
        self._next = GLOBAL_BASE

    def place(self, memory: Memory, alignment: int = 256) -> None:
        self._next = -(-self._next // alignment) * alignment
        memory.base = self._next
        self._next += memory.size + (1 << 16)
        self.arrays.append(memory)
        self._starts = np.array([array.base for array in self.arrays], dtype=np.int64)

    def find(self, address: int) -> Memory | None:
        """The array that holds the address, or the one it has run past, or None."""
        at = int(np.searchsorted(self._starts, address, side="right")) - 1
        return self.arrays[at] if at >= 0 else None
