"""Old values that strong loads may still read (PTX ISA, "Coherence Order").

Nothing makes a strong write visible at once to a thread that it is not ordered before. So the first
load by such a thread finds the value before it: code that does not wait for the new one is wrong in
every run, whatever the schedule.
"""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.access.state_spaces import Place
from build_kernels.emulator.access.thread_access import ThreadAccess
from build_kernels.emulator.execution.cta import Released
from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.lanes import Array, Ints, Mask
from build_kernels.emulator.memory.memory import POISON

# The other stores are fast, so that a word that is waited for seldom hides one that is not.
SLOW = 1 / 4
SLOW_READS = 4


def remember(w: Warp, place: Place, offsets: Ints, unit: int) -> None:
    """Keep what the lanes are about to write over by a strong write; offsets: [lanes, bytes]."""
    memory, released = place.memory, w.grid.released
    old = memory.old_values()
    old.data[offsets], old.state[offsets] = memory.data[offsets], memory.state[offsets]
    old.reads[offsets] = 1
    random = w.grid.random
    if random.random() < SLOW:
        # All words of the store, half of them by a bit of the number, or one.
        words = offsets.reshape(-1, unit)
        number, bits = random.randrange(32), random.choice((0, 1, 2, 4, 8, 16, 31))
        same = np.arange(len(words)) & bits == number & bits
        old.reads[words[same]] = SLOW_READS
    if released:
        for offset in place.offsets.tolist():
            w.grid.released_before[memory, offset] = released.get((memory, offset))


def forget(place: Place, offsets: Ints) -> None:
    """Drop what the lanes write over by a weak write; offsets: [lanes, bytes]."""
    if place.memory.old is not None:
        place.memory.old.reads[offsets] = 0


def read_old(
    w: Warp, place: Place, offsets: Ints, found: Array, poison: Mask | None, unit: int
) -> tuple[Array, Mask | None, dict[int, Released | None]]:
    """Put old values in place of those that a strong load of [lanes, bytes] finds.

    Return them, which are poison, and what each lane acquires that reads an old first element."""
    memory = place.memory
    old = memory.old
    if old is None or not np.count_nonzero(old.reads[offsets]):
        return found, poison, {}
    access = ThreadAccess(w, place.lanes, offsets.shape[1])
    ordered = access.ordered(memory.last_writes(offsets.reshape(-1)), True)
    late = (old.reads[offsets] > 0) & ~ordered.reshape(offsets.shape)
    # A load of other bytes than the store's is of both values: it finds the new ones.
    elements: Mask = np.logical_and.reduce(late.reshape(len(late), -1, unit), axis=2)
    late = np.repeat(elements, unit, axis=1)
    if not late.any():
        return found, poison, {}
    old.reads[offsets[late]] -= 1
    found = np.where(late, old.data[offsets], found)
    bad = old.state[offsets] == POISON
    if poison is not None or (bad & late).any():
        kept = np.zeros(late.shape, dtype=bool) if poison is None else poison
        poison = np.where(late, bad, kept)
    lanes, starts = place.lanes[elements[:, 0]], place.offsets[elements[:, 0]]
    before = w.grid.released_before
    pairs = zip(lanes.tolist(), starts.tolist(), strict=True)
    return found, poison, {lane: before.get((memory, start)) for lane, start in pairs}
