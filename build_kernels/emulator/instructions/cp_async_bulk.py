"""cp.async.bulk: linear copies, boxes of a tensor map, and groups (PTX ISA, "cp.async.bulk")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from build_kernels.binaries.ptx.syntax import Address, Operand
from build_kernels.emulator.access.state_spaces import check_dependent, find_tensor_map, locate
from build_kernels.emulator.execution.interruption import Interruption, Wait
from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.bulk_operations import (
    BulkLoad,
    BulkStoreWrite,
    GlobalBytes,
    groups_of_lane,
    issue_store,
    load_target,
    multicast_targets,
)
from build_kernels.emulator.instructions.decoding import (
    Decoder,
    Decoding,
    Source,
    always,
    registers_of,
)
from build_kernels.emulator.lanes import Ints, numbers_of
from build_kernels.emulator.launch.tensor_map import TensorMap
from build_kernels.emulator.memory.memory import Memory
from build_kernels.emulator.memory.windows import SHARED_ADDRESS, split_shared

_DIRECTIONS = (
    ("shared::cluster", "global"), ("shared::cta", "global"),
    ("shared::cluster", "shared::cta"), ("global", "shared::cta"),
)  # fmt: skip


def linear_copy(d: Decoding) -> Run:
    to, origin = d.left.pop(0), d.left.pop(0)
    load = to != "global"
    if (to, origin) not in _DIRECTIONS:
        raise d.error(f"no bulk copy from {origin} to {to}")
    d.need("mbarrier::complete_tx::bytes" if load else "bulk_group")
    multicast = load and d.take("multicast::cluster")
    policy = d.take("L2::cache_hint")
    if len(d.operands) != (4 + multicast if load else 3) + policy:
        raise d.error("has the wrong number of operands")
    target = d.address(d.operands[0])
    start = d.address(d.operands[1])
    size = d.source(d.operands[2], "u32")
    barrier = d.address(d.operands[3]) if load else None
    mask = d.source(d.operands[4], "u16") if multicast else None
    space, outer = (origin, start) if load else (to, target)

    def run(w: Warp) -> None:
        w.poisoned("an operand of a bulk copy", target.registers + start.registers + size.registers)
        for lane in numbers_of(w.bits):
            length = int(size.get(w)[lane])
            where, read = int(target.get(w)[lane]), int(start.get(w)[lane])
            if length % 16 or length == 0 or where % 16 or read % 16:
                why = "a bulk copy takes addresses and a size that are multiples of 16"
                w.report("misaligned", why, lane=lane)
                continue
            far = _far_end(w, lane, space, outer.get(w), length)
            if far is None:
                continue
            _, offset = split_shared(where if load else read)
            offsets = offset + np.arange(length)
            if barrier is None:
                issue_store(w, lane, far, offsets, (where, read, length))
                continue
            at = int(barrier.get(w)[lane])
            if mask is None:
                targets = load_target(w, lane, to, where & SHARED_ADDRESS, at, offsets)
            else:
                targets = multicast_targets(w, lane, int(mask.get(w)[lane]), at, offsets)
            w.grid.issue(BulkLoad(w, lane, far, targets))

    return run


def _far_end(w: Warp, lane: int, space: str, addresses: Ints, length: int) -> GlobalBytes | None:
    """Locate the bytes of one lane's copy outside the shared memory that it reads or writes."""
    whole = w.bits
    w.activate(1 << lane)
    places = locate(w, space, addresses, length)
    w.activate(whole)
    if not places:
        return None
    offsets = int(places[0].offsets[0]) + np.arange(length)
    return GlobalBytes(places[0].memory, offsets, np.ones(length, dtype=bool))


def commit_group(w: Warp) -> None:
    for lane in numbers_of(w.bits):
        groups_of_lane(w, lane).append([])


def wait_group(d: Decoding) -> Run:
    reads_only = d.take("read")
    count = d.source(d.operands[0], "u32").constant
    if not isinstance(count, int):
        raise d.error("needs a literal count")
    keep = 1 + count  # the open group, and those that need not be over

    def run(w: Warp) -> Interruption:
        waited: list[tuple[int, Operation]] = []
        for lane in numbers_of(w.bits):
            groups = groups_of_lane(w, lane)
            for group in groups[: max(len(groups) - keep, 0)]:
                waited += [
                    (lane, operation)
                    for operation in group
                    if not (reads_only and isinstance(operation, BulkStoreWrite))
                ]
        left = [operation for _, operation in waited if not operation.done]
        if left:
            return Wait(lambda: f"{len(left)} bulk stores", (left[0].signal,))
        for lane, operation in waited:
            w.order_after(1 << lane, operation.slot.actor, operation.tick)
        if not reads_only:
            for lane in numbers_of(w.bits):
                groups = groups_of_lane(w, lane)
                del groups[: max(len(groups) - keep, 0)]
        return None

    return run


@dataclass(frozen=True, kw_only=True)
class TensorCopy:
    """A decoded copy; `barrier` is None for a store, `mask` None without a multicast."""

    tensor: Source
    coordinates: tuple[Source, ...]
    shared: Source
    space: str
    barrier: Source | None
    mask: Source | None
    pair: bool

    def issue(self, w: Warp, lane: int) -> None:
        entry = find_tensor_map(w, int(self.tensor.get(w)[lane]), lane)
        if entry is None:
            return
        described, memory = entry
        rank = len(self.coordinates)
        if described.rank != rank:
            why = f"the tensor map has rank {described.rank}, the copy {rank}"
            w.report("tensor-map", why, lane=lane)
            return
        if memory.dependent:
            check_dependent(w, memory)
        box = self._box(w, lane, described, memory)
        where = int(self.shared.get(w)[lane]) & SHARED_ADDRESS
        _, offset = split_shared(where)
        if offset % 128:
            why = "a box in shared memory needs 128-byte alignment"
            w.report("misaligned", why, lane=lane, address=f"shared {where:#x}")
        offsets = described.shared_bytes(offset)
        if self.barrier is None:
            issue_store(w, lane, box, offsets, (memory, *self._start(w, lane), offset))
            return
        at = int(self.barrier.get(w)[lane])
        if self.mask is None:
            targets = load_target(w, lane, self.space, where, at, offsets, pair=self.pair)
        else:
            ranks = int(self.mask.get(w)[lane])
            targets = multicast_targets(w, lane, ranks, at, offsets, pair=self.pair)
        w.grid.issue(BulkLoad(w, lane, box, targets))

    def _start(self, w: Warp, lane: int) -> tuple[int, ...]:
        return tuple(int(c.get(w)[lane]) for c in self.coordinates)

    def _box(self, w: Warp, lane: int, described: TensorMap, memory: Memory) -> GlobalBytes:
        elements, inside = described.global_bytes(self._start(w, lane))
        size = described.element_bytes
        offsets = (elements[:, None] + np.arange(size)).reshape(-1)
        return GlobalBytes(memory, offsets, np.repeat(inside, size))


def tensor_copy(d: Decoding) -> Run:
    rank = int(d.need("1d", "2d", "3d", "4d", "5d")[0])
    load = d.left[0] != "global"
    space = d.need("shared::cta", "shared::cluster")
    d.need("global")
    d.take("tile")
    d.need("mbarrier::complete_tx::bytes" if load else "bulk_group")
    multicast = load and d.take("multicast::cluster")
    pair = load and d.one_of("cta_group::1", "cta_group::2") == "cta_group::2"
    policy = d.take("L2::cache_hint")
    operands = d.operands
    if len(operands) != (3 + multicast if load else 2) + policy:
        raise d.error("has the wrong number of operands")
    shared, mapped = operands[:2] if load else operands[1::-1]
    tensor, coordinates = _tensor(d, mapped, rank)
    copy = TensorCopy(
        tensor=tensor,
        coordinates=coordinates,
        shared=d.address(shared),
        space=space,
        barrier=d.address(operands[2]) if load else None,
        mask=d.source(operands[3], "u16") if multicast else None,
        pair=pair,
    )
    barriers = () if copy.barrier is None else (copy.barrier,)
    checked = registers_of((copy.tensor, copy.shared, *copy.coordinates, *barriers))

    def run(w: Warp) -> None:
        w.poisoned("an operand of a bulk copy", checked)
        for lane in numbers_of(w.bits):
            copy.issue(w, lane)

    return run


def _tensor(d: Decoding, mapped: Operand, rank: int) -> tuple[Source, tuple[Source, ...]]:
    if not isinstance(mapped, Address) or mapped.coordinates is None:
        raise d.error("needs [tensor map, {coordinates}]")
    if len(mapped.coordinates) != rank:
        raise d.error(f"needs {rank} coordinates (got {len(mapped.coordinates)})")
    tensor = d.address(Address(mapped.base, mapped.offset))
    return tensor, tuple(d.source(each, "s32") for each in mapped.coordinates)


INSTRUCTIONS: dict[str, Decoder] = {
    "cp.async.bulk": linear_copy,
    "cp.async.bulk.commit_group": always(commit_group),
    "cp.async.bulk.wait_group": wait_group,
    "cp.async.bulk.tensor": tensor_copy,
}
