"""Byte-addressed memories that remember what was written, by whom, and what was never written."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.clocks import Ints, actors_of

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
        self._writes: Ints | None = None
        self._reads: Ints | None = None

    @property
    def writes(self) -> Ints:
        """[size] record of each byte's last write; 0 for none."""
        if self._writes is None:
            self._writes = np.zeros(self.size, dtype=np.int64)
        return self._writes

    @property
    def reads(self) -> Ints:
        """[READER_SLOTS, size] records of reads since the last write.

        Readers share slots by a hash of the reader: of two unordered readers of a byte in one
        slot only the later is remembered."""
        if self._reads is None:
            self._reads = np.zeros((READER_SLOTS, self.size), dtype=np.int64)
        return self._reads

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
        self.reads[access.reader_slot, offsets] = access.records(len(offsets))

    def note_write(self, offsets: Ints, access: Access) -> None:
        """Check and record a write of the bytes at `offsets` (flat)."""
        if not self.tracked:
            return
        before = self.writes[offsets]
        bad = access.unordered(before, True)
        if bad is not None:
            at = int(bad[0])
            access.conflict(self, int(offsets[at]), int(before[at]), "write-write")
        if self._reads is not None:
            for row in range(READER_SLOTS):
                before = self._reads[row, offsets]
                bad = access.unordered(before, False)
                if bad is not None:
                    at = int(bad[0])
                    access.conflict(self, int(offsets[at]), int(before[at]), "read-write")
                self._reads[row, offsets] = 0
        self.writes[offsets] = access.records(len(offsets))

    def foreign_records(self, first: int, last: int) -> Ints:
        """Distinct records left by actors outside [first, last)."""
        found = [
            np.unique(part)
            for part in ([self._writes] if self._writes is not None else [])
            + (list(self._reads) if self._reads is not None else [])
        ]
        if not found:
            return np.zeros(0, dtype=np.int64)
        records = np.unique(np.concatenate(found))
        from_actor = actors_of(records)
        return records[(records != 0) & ((from_actor < first) | (from_actor >= last))]


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
