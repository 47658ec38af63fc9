"""The agents of bulk copies (TMA), and the bulk groups of stores.

A load writes shared memory, and then takes its bytes off an mbarrier's tx-count. A store is two
agents: one reads shared memory, and one writes global memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from build_kernels.emulator.access.state_spaces import reach
from build_kernels.emulator.execution.cta import Cta
from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import Warp
from build_kernels.emulator.instructions.async_writes import signal, target_barrier, write_shared
from build_kernels.emulator.lanes import Ints, Mask
from build_kernels.emulator.memory.memory import POISON, VALID, Memory
from build_kernels.emulator.memory.windows import join_shared, split_shared
from build_kernels.emulator.ordering.mbarrier import Mbarrier


class Target(NamedTuple):
    """One destination of a load: byte offsets in a CTA's shared memory, and an mbarrier."""

    cta: Cta
    offsets: Ints
    barrier: Mbarrier | None


class GlobalBytes(NamedTuple):
    """[bytes] offsets in a memory, and which of the bytes are inside the tensor."""

    memory: Memory
    offsets: Ints
    inside: Mask


class BulkLoad(Operation):
    """Copy global (or shared) memory to the shared memory of one or more CTAs."""

    what = "bulk copy"

    def __init__(
        self, warp: Warp, lane: int, origin: GlobalBytes, targets: Sequence[Target]
    ) -> None:
        super().__init__(warp, lane)
        self.origin = origin
        self.targets = targets
        for target in targets:
            self.touches(target.cta)

    def perform(self) -> None:
        memory, offsets, inside = self.origin
        inner = offsets[inside]
        memory.note_read(inner, self)
        data = np.zeros(len(offsets), dtype=np.uint8)
        state = np.full(len(offsets), VALID, dtype=np.uint8)
        data[inside] = memory.data[inner]
        state[inside] = np.where(memory.state[inner] == POISON, POISON, VALID)
        clock = self.completion()
        for target in self.targets:
            write_shared(self, target.cta, target.offsets, data, state)
            signal(self, target.barrier, len(target.offsets), clock)


class BulkStoreRead(Operation):
    """The half of a bulk store that reads shared memory."""

    what = "bulk store (read)"

    def __init__(self, warp: Warp, lane: int, offsets: Ints) -> None:
        super().__init__(warp, lane)
        self.offsets = offsets
        self.data = self.state = np.zeros(0, dtype=np.uint8)
        self.touches(self.cta)

    def perform(self) -> None:
        memory = self.cta.shared
        memory.note_read(self.offsets, self)
        self.data = memory.data[self.offsets]
        self.state = memory.state[self.offsets]


class BulkStoreWrite(Operation):
    """The half of a bulk store that writes global memory."""

    what = "bulk store (write)"

    def __init__(
        self, warp: Warp, lane: int, reader: BulkStoreRead, target: GlobalBytes, twin: object
    ) -> None:
        super().__init__(warp, lane, after=reader, twin=twin)
        self.reader = reader
        self.target = target

    def perform(self) -> None:
        memory, offsets, inside = self.target
        inner = offsets[inside]
        if memory.read_only:
            why = "a bulk store to memory that the launch declares read-only"
            address = memory.describe(int(inner[0]) if len(inner) else 0)
            self.report("read-only", why, address=address)
            return
        poison = self.reader.state[inside] == POISON
        if poison.any():
            first = int(self.reader.offsets[inside][np.flatnonzero(poison)[0]])
            self.report(
                "poison",
                "a value stored to global memory comes from memory that was never written",
                address=self.cta.shared.describe(first),
            )
        memory.note_write(inner, self)
        memory.data[inner] = self.reader.data[inside]
        memory.state[inner] = np.where(poison, POISON, VALID)


def groups_of_lane(w: Warp, lane: int) -> list[list[Operation]]:
    """Return the lane's bulk groups, each of its operations; the last one is open."""
    found: list[list[Operation]] = w.groups.setdefault(f"bulk {lane}", [[]])
    return found


def issue_store(
    w: Warp, lane: int, target: GlobalBytes, offsets: Ints, same: tuple[object, ...]
) -> None:
    """Issue a lane's store. same: equal for lanes that store the same bytes to the same place."""
    reader = BulkStoreRead(w, lane, offsets)
    writer = BulkStoreWrite(w, lane, reader, target, (w, w.grid.steps, w.budget, same))
    groups_of_lane(w, lane)[-1] += [reader, writer]
    w.grid.issue(reader)
    w.grid.issue(writer)


def load_target(
    w: Warp, lane: int, space: str, where: int, barrier: int, offsets: Ints, *, pair: bool = False
) -> list[Target]:
    """Return the one destination of a load, or none if the copy may not write there.

    pair: .cta_group::2, so the mbarrier may be in the other CTA of the pair."""
    peers = w.cta.cluster.ctas
    rank, _ = split_shared(where)
    if rank >= len(peers) or (space == "shared::cta" and rank != w.cta.rank):
        why = "the destination is not in a CTA that this copy may write"
        w.report("not-own-shared", why, lane=lane, address=f"shared {where:#x}")
        return []
    target = peers[rank]
    if target is not w.cta:
        reach(w, target, lane, False)
    found = target_barrier(w, lane, barrier, proxied=True)
    if found is not None and found.cta is not target and not pair:
        why = "data and mbarrier are in different CTAs"
        w.report("not-own-shared", why, lane=lane, address=found.describe())
    return [Target(target, offsets, found)]


def multicast_targets(
    w: Warp, lane: int, ranks: int, barrier: int, offsets: Ints, *, pair: bool = False
) -> list[Target]:
    """Return the destinations of a multicast, at the same offsets in each CTA of a rank mask.

    With .cta_group::2 (pair) the signal goes to the CTA of each pair whose rank has the parity of
    the mbarrier's (PTX ISA, "cp.async.bulk.tensor")."""
    peers = w.cta.cluster.ctas
    of_barrier, offset = split_shared(barrier)
    targets: list[Target] = []
    for rank in (rank for rank in range(16) if ranks >> rank & 1):
        if rank >= len(peers):
            w.report("out-of-bounds", f"multicast to rank {rank} of {len(peers)}", lane=lane)
            continue
        if rank != w.cta.rank and not reach(w, peers[rank], lane, False):
            continue
        signalled = (rank & ~1) | (of_barrier & 1) if pair else rank
        place = join_shared(signalled, offset)
        targets.append(Target(peers[rank], offsets, target_barrier(w, lane, place, proxied=True)))
    return targets
