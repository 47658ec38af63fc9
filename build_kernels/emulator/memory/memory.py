"""Byte-addressed memories with a state and access records per byte."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.lanes import Ints, Mask, all_of
from build_kernels.emulator.memory.access_records import actors_of

Bytes = NDArray[np.uint8]

POISON, VALID, BARRIER = range(3)
POISON_BYTE = 0xFF  # a NaN in every floating-point type
READER_SLOTS = 4

GLOBAL_BASE = 0x7F00_0000_0000
GLOBAL_GAP = 1 << 16  # bytes after each array of global memory that belong to none


class Access(Protocol):
    """Decide which earlier accesses are ordered before this one, and report the others."""

    reader_slot: int
    is_one: bool  # the bytes are of one actor, so that equal records are ordered alike

    def records(self, count: int) -> Ints:
        """Return the records to leave: one per touched byte, or one for all of them."""
        ...

    def ordered(self, records: Ints, written: bool) -> Mask:
        """Return which records, of writes or else of reads, are ordered before this access."""
        ...

    def excused(self, record: int) -> bool:
        """Return whether a record that is not ordered before is no conflict."""
        ...

    def excuses(self, records: Ints) -> bool:
        """Return whether it is plain that each of these, or 0 for none, is excused."""
        ...

    def conflict(self, memory: Memory, offset: int, record: int, what: str) -> None:
        """Report one unordered pair. what: "read-write", "write-read" or "write-write"."""
        ...


class OldValues:
    """The bytes and states before the last strong write of each, and how many loads find them."""

    def __init__(self, size: int) -> None:
        self.data = np.zeros(size, dtype=np.uint8)
        self.state = np.zeros(size, dtype=np.uint8)
        self.reads = np.zeros(size, dtype=np.uint8)


class Memory:
    """Hold bytes, the state of each, and records of the accesses to each.

    name: for findings. initial: contents, valid from the start; else `size` bytes of poison.
    tracked: keep access records; read-only memory needs none. always_valid: no byte is ever poison
    or an mbarrier. dependent: the grid before this one may still write it. foreign: threads of a
    CTA that does not own it have records here. old: see access/staleness; None before the first
    strong write. on_load: called before each read, with the offsets of the bytes and the access; it
    may change `data`.
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
        self.foreign = False
        self.always_valid = read_only and initial is not None
        self.old: OldValues | None = None
        self.on_load: Callable[[Ints, Access], None] | None = None
        if initial is None:
            self.data = np.full(size, POISON_BYTE, dtype=np.uint8)
            self.state = np.zeros(size, dtype=np.uint8)
        else:
            self.data = initial.copy()
            self.state = np.full(size, VALID, dtype=np.uint8)
        # Records of each byte's last write, and of the reads since: one row per reader slot, made
        # when first used. Readers share slots by a hash. Of two unordered readers of a byte in
        # one slot, only the later is remembered.
        self._writes: Ints | None = None
        self._reads: list[Ints | None] = [None] * READER_SLOTS

    def old_values(self) -> OldValues:
        """Return the values before strong writes, with room for them from the first one on."""
        if self.old is None:
            self.old = OldValues(self.size)
        return self.old

    def last_writes(self, offsets: Ints) -> Ints:
        """Return the record of each byte's last write."""
        return np.zeros(len(offsets), np.int64) if self._writes is None else self._writes[offsets]

    def describe(self, offset: int) -> str:
        if self.base:
            return f"{self.name}+{offset:#x} ({self.base + offset:#x})"
        return f"{self.name}+{offset:#x}"

    def note_read(self, offsets: Ints, access: Access) -> None:
        """Check and record a read of the bytes at `offsets` (flat), before the bytes are read."""
        if self.on_load is not None:
            self.on_load(offsets, access)
        if not self.tracked:
            return
        if self._writes is not None:
            self._check(self._writes, offsets, access, "write-read")
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
        self._check(self._writes, offsets, access, "write-write")
        for row in self._reads:
            if row is not None:
                self._check(row, offsets, access, "read-write")
                row[offsets] = 0
        self._writes[offsets] = access.records(len(offsets))

    def _check(self, row: Ints, offsets: Ints, access: Access, what: str) -> None:
        """Report the first byte of each record that conflicts with the access."""
        before = row[offsets]
        if access.is_one and len(before) > 1 and all_of(before == before[0]):
            before = before[:1]
        if not np.count_nonzero(before) or access.excuses(before):
            return
        ordered = access.ordered(before, what != "read-write")
        if all_of(ordered):
            return
        late = np.flatnonzero(~ordered)
        excused = {one: access.excused(one) for one in set(before[late].tolist())}
        late = late[[not excused[one] for one in before[late].tolist()]]
        # Each of them: one by the letter of the ISA must not hide another.
        for one in dict.fromkeys(before[late].tolist()):
            first = int(late[np.flatnonzero(before[late] == one)[0]])
            access.conflict(self, int(offsets[first]), one, what)

    def records(self, where: Ints | slice) -> Ints:
        """Return the distinct records at these offsets."""
        found = [row[where] for row in (self._writes, *self._reads) if row is not None]
        found = [np.unique(part[part != 0]) for part in found]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)

    def foreign_records(self, first: int, last: int) -> Ints:
        """Return the distinct records of actors outside [first, last)."""
        records = self.records(slice(None))
        actors = actors_of(records)
        return records[(actors < first) | (actors >= last)]


class GlobalMemory:
    """Place arrays with a gap after each, and find the array of an address."""

    def __init__(self) -> None:
        self.arrays: list[Memory] = []
        self._starts: list[int] = []
        self._next = GLOBAL_BASE

    def place(self, memory: Memory, alignment: int = 256) -> None:
        self._next = -(-self._next // alignment) * alignment
        memory.base = self._next
        self._next += memory.size + GLOBAL_GAP
        self.arrays.append(memory)
        self._starts.append(memory.base)

    def find(self, address: int) -> Memory | None:
        """Return the array that holds the address or ends before it; None below all arrays."""
        at = bisect_right(self._starts, address) - 1
        return self.arrays[at] if at >= 0 else None
