"""State spaces: the memories that addresses lead to (PTX ISA, "State Spaces")."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from build_kernels.emulator.execution.cta import Cta
from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.lanes import ALL, LANES, Ints, indices_of
from build_kernels.emulator.launch.tensor_map import TensorMap
from build_kernels.emulator.memory.memory import Memory
from build_kernels.emulator.memory.windows import (
    LOCAL_WINDOW,
    PARAMETER_WINDOW,
    SHARED_OFFSET,
    SHARED_RANK_SHIFT,
    SHARED_RESERVED,
    SHARED_WINDOW,
    WINDOW_MASK,
)
from build_kernels.emulator.ordering.clocks import GENERIC, INIT, Clock

SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const")


class Place(NamedTuple):
    """The memory that some lanes' addresses lead to, and an offset per lane."""

    memory: Memory
    lanes: Ints
    offsets: Ints
    peer: Cta | None = None

    def bytes(self, size: int) -> Ints:
        """Return [lanes, size] offsets of the touched bytes."""
        return self.offsets[:, None] + _ramp(size)


@lru_cache(maxsize=64)
def _ramp(size: int) -> Ints:
    return np.arange(size)


def locate(w: Warp, space: str, addresses: Ints, size: int) -> list[Place]:
    """Resolve the active lanes' addresses; report and leave out those that lead nowhere."""
    lanes = indices_of(w.bits)
    found = addresses if w.bits == ALL else addresses[lanes]
    if size & (size - 1) == 0 and np.bitwise_or.reduce(found) & (size - 1):
        at = int(np.flatnonzero(found & (size - 1))[0])
        w.report(
            "misaligned",
            f"an access of {size} bytes at an address that is no multiple of it",
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
    return _within(w, w.grid.parameters, lanes, found, size)


def _local(w: Warp, lanes: Ints, found: Ints, size: int) -> list[Place]:
    each = w.grid.layout.local_bytes
    if w.local is None:
        w.local = Memory("local memory", max(each, 1) * LANES, tracked=False)
    inside = (found >= 0) & (found + size <= each)
    # Outside a thread's own part counts as outside the memory.
    offsets = np.where(inside, lanes * each + found, -1)
    return _within(w, w.local, lanes, offsets, size)


def _within(w: Warp, memory: Memory, lanes: Ints, offsets: Ints, size: int) -> list[Place]:
    """Return the place of the lanes whose bytes lie in the memory; report the others."""
    inside = (offsets >= 0) & (offsets + size <= memory.size)
    if not inside.all():
        at = int(np.flatnonzero(~inside)[0])
        w.report(
            "out-of-bounds",
            f"an access of {size} bytes outside the {memory.name}",
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
            places += _within(w, w.grid.parameters, lanes[mine], inner, size)
        else:
            places += _global(w, lanes[mine], found[mine], size)
    return places


def _global(w: Warp, lanes: Ints, found: Ints, size: int) -> list[Place]:
    places: list[Place] = []
    addresses = found.tolist()
    low, high = min(addresses), max(addresses)
    memory = w.grid.memory.find(low)
    if memory is not None and high + size <= memory.base + memory.size:
        if memory.dependent:
            check_dependent(w, memory)
        return [Place(memory, lanes, found - memory.base)]
    while len(lanes):
        memory = w.grid.memory.find(int(found[0]))
        if memory is None and w.grid.memory.arrays:
            memory = w.grid.memory.arrays[0]
        start = memory.base if memory else 0
        end = start + memory.size if memory else 0
        inside = (found >= start) & (found + size <= end)
        if memory is None or not inside[0]:
            near = memory.describe(int(found[0]) - start) if memory else f"{int(found[0]):#x}"
            w.report(
                "out-of-bounds",
                f"an access of {size} bytes outside every argument array"
                + (f" ({memory.name} has {memory.size})" if memory else ""),
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
    """Report a use of the grid before's data that no griddepcontrol.wait is ordered before."""
    for clock, bits in w.groups_of(w.bits):
        if not clock[GENERIC].tick(w.grid.clocks.predecessor):
            w.report(
                "missing-griddepcontrol-wait",
                f"{memory.name} belongs to the grid before, and no griddepcontrol.wait is "
                "ordered before this",
                lane=int(indices_of(bits)[0]),
            )
            return


def _shared(w: Warp, lanes: Ints, found: Ints, size: int, own: bool) -> list[Place]:
    addresses = found.tolist()
    low, high = min(addresses), max(addresses)
    if low >> SHARED_RANK_SHIFT == w.cta.rank == high >> SHARED_RANK_SHIFT:
        offset = w.cta.shared_base
        if low - offset >= SHARED_RESERVED and high - offset + size <= w.cta.shared_end:
            return [Place(w.cta.shared, lanes, found - offset)]
    ranks = found >> SHARED_RANK_SHIFT
    offsets = found & SHARED_OFFSET
    places = []
    for rank in np.unique(ranks) if (ranks != ranks[0]).any() else ranks[:1]:
        mine = ranks == rank
        peers = w.cta.cluster.ctas
        good = mine & (offsets >= SHARED_RESERVED) & (offsets + size <= w.cta.shared_end)
        if not 0 <= rank < len(peers):
            good = np.zeros_like(mine)
        if (mine & ~good).any():
            bad = int(np.flatnonzero(mine & ~good)[0])
            w.report(
                "out-of-bounds",
                f"an access of {size} bytes outside the CTA's shared memory "
                f"({SHARED_RESERVED:#x}..{w.cta.shared_end:#x})",
                lane=int(lanes[bad]),
                address=f"shared {int(found[bad]):#x}",
            )
        if not good.any():
            continue
        peer = peers[int(rank)]
        if peer is not w.cta and not reach(w, peer, int(lanes[good][0]), own):
            continue
        other = None if peer is w.cta else peer
        places.append(Place(peer.shared, lanes[good], offsets[good], other))
    return places


def reach(w: Warp, peer: Cta, lane: int, own: bool) -> bool:
    """Check an access to a peer CTA's shared memory; False if the peer has exited."""
    where = f"shared memory of cta {peer.index}"
    if own:
        why = "a .shared::cta address leads to another CTA"
        w.report("not-own-shared", why, lane=lane, address=where)
    if peer.exited:
        w.report("exited-peer", "the CTA has exited", lane=lane, address=where)
        return False
    if not has_started(peer, w.clocks[lane]):
        why = "nothing orders the start of the peer CTA before this (no cluster barrier)"
        w.report("peer-not-started", why, lane=lane, address=where)
    return True


def has_started(peer: Cta, clock: Clock) -> bool:
    """Return whether the start of the peer CTA is ordered before a lane with this clock."""
    first = peer.first_tick
    span = peer.first_actor, peer.last_actor
    return clock[GENERIC].latest(*span) >= first or clock[INIT].latest(*span) >= first


def find_tensor_map(w: Warp, address: int, lane: int) -> tuple[TensorMap, Memory] | None:
    """Return the tensor map at a generic address in parameter space, or report that none is."""
    found = None
    if address & WINDOW_MASK == PARAMETER_WINDOW:
        found = w.grid.tensor_maps.get(address & ~WINDOW_MASK)
    if found is None:
        w.report("tensor-map", "no tensor map lies here", lane=lane, address=f"{address:#x}")
    return found
