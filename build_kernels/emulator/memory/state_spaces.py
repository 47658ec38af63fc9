"""Where addresses lead: state spaces, windows of generic addresses, peers of the cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from build_kernels.emulator.execution.warp import Warp, indices_of
from build_kernels.emulator.memory.memory import (
    LOCAL_WINDOW,
    PARAMETER_WINDOW,
    SHARED_RANK_SHIFT,
    SHARED_RESERVED,
    SHARED_WINDOW,
    WINDOW_MASK,
    Memory,
)
from build_kernels.emulator.ordering.clocks import GENERIC, Ints

if TYPE_CHECKING:
    from build_kernels.emulator.execution.cta import Cta


SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const")


@dataclass(frozen=True)
class Place:
    """Where some lanes' addresses lead: one memory, an offset for each lane."""

    memory: Memory
    lanes: Ints
    offsets: Ints
    peer: Cta | None = None

    def bytes(self, size: int) -> Ints:
        """[lanes, size] offsets of the touched bytes."""
        return self.offsets[:, None] + np.arange(size)


def locate(w: Warp, space: str, addresses: Ints, size: int) -> list[Place]:
    """Resolve the active lanes' addresses; what leads nowhere is reported and left out."""
    lanes = indices_of(w.bits)
    found = addresses[lanes]
    if size & (size - 1) == 0 and (found & (size - 1)).any():
        at = int(np.flatnonzero(found & (size - 1))[0])
        w.machine.report(
            "misaligned",
            f"an access of {size} bytes at an address that is no multiple of it",
            warp=w,
            lane=int(lanes[at]),
            address=f"{int(found[at]):#x}",
        )
    if not space:
        return _generic(w, lanes, found, size)
    if space == "global" or space == "const":
        return _global(w, lanes, found, size)
    if space.startswith("shared"):
        return _shared(w, lanes, found, size, own=space != "shared::cluster")
    if space == "local":
        return _local(w, lanes, found, size)
    return _within(w, w.machine.parameters, lanes, found, size)


def _local(w: Warp, lanes: Ints, found: Ints, size: int) -> list[Place]:
    each = w.machine.local_bytes
    inside = (found >= 0) & (found + size <= each)
    # Out of a thread's own part is out of the memory.
    offsets = np.where(inside, lanes * each + found, -1)
    return _within(w, w.machine.local(w), lanes, offsets, size)


def _within(w: Warp, memory: Memory, lanes: Ints, offsets: Ints, size: int) -> list[Place]:
    """One place, of the lanes whose bytes lie in the memory; the others are reported."""
    inside = (offsets >= 0) & (offsets + size <= memory.size)
    if not inside.all():
        at = int(np.flatnonzero(~inside)[0])
        w.machine.report(
            "out-of-bounds",
            f"an access of {size} bytes outside the {memory.name}",
            warp=w,
            lane=int(lanes[at]),
        )
    return [Place(memory, lanes[inside], offsets[inside])] if inside.any() else []


def _generic(w: Warp, lanes: Ints, found: Ints, size: int) -> list[Place]:
    windows = found & WINDOW_MASK
    places = []
    for window in np.unique(windows):
        mine = windows == window
        inner = found[mine] & ~np.int64(WINDOW_MASK)
        if window == SHARED_WINDOW:
            places += _shared(w, lanes[mine], inner, size, own=False)
        elif window == LOCAL_WINDOW:
            places += _local(w, lanes[mine], inner, size)
        elif window == PARAMETER_WINDOW:
            places += _within(w, w.machine.parameters, lanes[mine], inner, size)
        else:
            places += _global(w, lanes[mine], found[mine], size)
    return places


def _global(w: Warp, lanes: Ints, found: Ints, size: int) -> list[Place]:
    places = []
    while len(lanes):
        memory = w.machine.memory.find(int(found[0]))
        if memory is None:
            memory = w.machine.memory.arrays[0] if w.machine.memory.arrays else None
        start = memory.base if memory else 0
        end = start + memory.size if memory else 0
        inside = (found >= start) & (found + size <= end)
        if memory is None or not inside[0]:
            near = memory.describe(int(found[0]) - start) if memory else f"{int(found[0]):#x}"
            w.machine.report(
                "out-of-bounds",
                f"an access of {size} bytes outside every argument array"
                + (f" ({memory.name} has {memory.size})" if memory else ""),
                warp=w,
                lane=int(lanes[0]),
                address=near,
            )
            lanes, found = lanes[1:], found[1:]
            continue
        if memory.dependent:
            check_dependent(w, memory)
        places.append(Place(memory, lanes[inside], found[inside] - start))
        lanes, found = lanes[~inside], found[~inside]
    return places


def check_dependent(w: Warp, memory: Memory) -> None:
    """Data of the grid before this one may be touched only behind griddepcontrol.wait."""
    for clock, bits in w.groups_of(w.bits):
        if not clock[GENERIC, w.machine.clocks.predecessor]:
            w.machine.report(
                "missing-griddepcontrol-wait",
                f"{memory.name} belongs to the grid before, and no griddepcontrol.wait is "
                "ordered before this",
                warp=w,
                lane=int(indices_of(bits)[0]),
            )
            return


def _shared(w: Warp, lanes: Ints, found: Ints, size: int, own: bool) -> list[Place]:
    ranks = found >> SHARED_RANK_SHIFT
    offsets = found & ((1 << SHARED_RANK_SHIFT) - 1)
    places = []
    for rank in np.unique(ranks) if (ranks != ranks[0]).any() else ranks[:1]:
        mine = ranks == rank
        peers = w.cta.cluster.ctas
        good = mine & (offsets >= SHARED_RESERVED) & (offsets + size <= w.cta.shared_end)
        if not 0 <= rank < len(peers):
            good = np.zeros_like(mine)
        if (mine & ~good).any():
            bad = int(np.flatnonzero(mine & ~good)[0])
            w.machine.report(
                "out-of-bounds",
                f"an access of {size} bytes outside the CTA's shared memory "
                f"({SHARED_RESERVED:#x}..{w.cta.shared_end:#x})",
                warp=w,
                lane=int(lanes[bad]),
                address=f"shared {int(found[bad]):#x}",
            )
        if not good.any():
            continue
        peer = peers[int(rank)]
        if peer is not w.cta and not reach(w, peer, int(lanes[good][0]), own):
            continue
        places.append(
            Place(peer.shared, lanes[good], offsets[good], None if peer is w.cta else peer)
        )
    return places


def reach(w: Warp, peer: Cta, lane: int, own: bool) -> bool:
    """Check an access to a peer CTA's shared memory; False when it is gone."""
    where = f"shared memory of cta {peer.index}"
    if own:
        w.machine.report(
            "not-own-shared",
            "a .shared::cta address leads to another CTA",
            warp=w,
            lane=lane,
            address=where,
        )
    if peer.exited:
        w.machine.report("exited-peer", "the CTA has exited", warp=w, lane=lane, address=where)
        return False
    if not w.machine.started(w, peer, lane):
        w.machine.report(
            "peer-not-started",
            "nothing orders the start of the peer CTA before this (no cluster barrier)",
            warp=w,
            lane=lane,
            address=where,
        )
    return True
