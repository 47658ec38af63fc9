"""Bulk copies (TMA), tensor and linear, and their groups (PTX ISA, "cp.async.bulk").

Each is an agent: a load writes shared memory and then takes its bytes off an mbarrier's tx-count;
a store is two agents, one that reads shared memory and one that writes global memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.execution.operation import Group, Operation
from build_kernels.emulator.execution.warp import Outcome, Wait, Warp, indices_of, lanes_of
from build_kernels.emulator.instructions.operands import Context, Modifiers, address, source
from build_kernels.emulator.memory.memory import POISON, SHARED_RANK_SHIFT, VALID, Memory
from build_kernels.emulator.memory.state_spaces import check_dependent, locate, reach
from build_kernels.emulator.ordering.barriers import Mbarrier
from build_kernels.emulator.ordering.clocks import Ints
from build_kernels.emulator.ptx.syntax import Address, Instruction

if TYPE_CHECKING:
    from build_kernels.emulator.execution.cta import Cta
from build_kernels.emulator.execution.warp import Run
from build_kernels.emulator.instructions.async_writes import signal, target_barrier, write_shared

_LOW = (1 << SHARED_RANK_SHIFT) - 1


class BulkLoad(Operation):
    """Global (or shared) memory to the shared memory of one or more CTAs.

    pieces: for each destination its CTA, byte offsets and mbarrier.
    """

    what = "bulk copy"

    def __init__(
        self,
        warp: Warp,
        lane: int,
        origin: Memory,
        read: Ints,
        inside: NDArray[np.bool_],
        pieces: Sequence[tuple[Cta, Ints, Mbarrier | None]],
    ) -> None:
        super().__init__(warp, lane)
        self.origin = origin
        self.read = read
        self.inside = inside
        self.pieces = pieces
        for cta, _, _ in pieces:
            self.touches(cta)

    def perform(self) -> None:
        inner = self.read[self.inside]
        self.origin.note_read(inner, self)
        data = np.zeros(len(self.read), dtype=np.uint8)
        state = np.full(len(self.read), VALID, dtype=np.uint8)
        data[self.inside] = self.origin.data[inner]
        state[self.inside] = np.where(self.origin.state[inner] == POISON, POISON, VALID)
        clock = self.completion()
        for cta, offsets, barrier in self.pieces:
            write_shared(self, cta, offsets, data, state)
            signal(self, barrier, len(offsets), clock)


class BulkStoreRead(Operation):
    """The half of a bulk store that reads shared memory."""

    what = "bulk store (read)"

    def __init__(self, warp: Warp, lane: int, offsets: Ints) -> None:
        super().__init__(warp, lane)
        self.offsets = offsets
        self.data = np.zeros(0, dtype=np.uint8)
        self.state = self.data
        self.touches(self.cta)

    def perform(self) -> None:
        memory = self.cta.shared
        memory.note_read(self.offsets, self)
        self.data = memory.data[self.offsets]
        self.state = memory.state[self.offsets]


class BulkStoreWrite(Operation):
    """The half that writes global memory; inside: which of the bytes are in the tensor."""

    what = "bulk store (write)"

    def __init__(
        self,
        warp: Warp,
        lane: int,
        reader: BulkStoreRead,
        target: Memory,
        offsets: Ints,
        inside: NDArray[np.bool_],
    ) -> None:
        super().__init__(warp, lane, after=reader)
        self.reader = reader
        self.target = target
        self.offsets = offsets
        self.inside = inside

    def perform(self) -> None:
        inner = self.offsets[self.inside]
        state = self.reader.state[self.inside]
        if self.target.read_only:
            self.machine.report(
                "read-only",
                "a bulk store to memory that the launch declares read-only",
                operation=self,
                address=self.target.describe(int(inner[0]) if len(inner) else 0),
            )
            return
        poison = state == POISON
        if poison.any():
            self.machine.report(
                "poison",
                "a value stored to global memory comes from memory that was never written",
                operation=self,
                address=self.cta.shared.describe(
                    int(self.reader.offsets[self.inside][np.flatnonzero(poison)[0]])
                ),
            )
        self.target.note_write(inner, self)
        self.target.data[inner] = self.reader.data[self.inside]
        self.target.state[inner] = np.where(poison, POISON, VALID)


def copy(ins: Instruction, context: Context) -> Run:
    """Everything that starts with cp."""
    words = ins.words
    if words[:3] != ("cp", "async", "bulk"):
        raise ins.error("only cp.async.bulk copies are supported")
    if words[3] == "commit_group":
        Modifiers(ins, skip=4).done()
        return _commit
    if words[3] == "wait_group":
        return _wait_group(ins, context)
    if words[3] == "prefetch":
        return _prefetch(ins, context)
    if words[3] == "tensor":
        return _tensor(ins, context)
    return _linear(ins, context)


def _prefetch(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins, skip=4)
    mods.need("tensor")
    mods.need("1d", "2d", "3d", "4d", "5d")
    mods.need("L2")
    mods.need("global")
    mods.take("tile")
    mods.take("L2::cache_hint")
    mods.done()
    where = address(ins, ins.operands[0], context)

    def run(w: Warp) -> None:
        for lane in indices_of(w.bits):
            w.machine.tensor_map(w, int(where.get(w)[lane]), int(lane))

    return run


def _tensor(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins, skip=4)
    rank = int(mods.need("1d", "2d", "3d", "4d", "5d")[0])
    load = mods.left[0] != "global"
    space = mods.need("shared::cta", "shared::cluster")
    mods.need("global")
    mods.take("tile")
    mods.need("mbarrier::complete_tx::bytes" if load else "bulk_group")
    multicast = load and mods.take("multicast::cluster")
    group = mods.one_of("cta_group::1", "cta_group::2") if load else None
    policy = mods.take("L2::cache_hint")
    mods.done()
    operands = list(ins.operands)
    if len(operands) != (3 + multicast if load else 2) + policy:
        raise ins.error("has the wrong number of operands")
    mapped = operands[1] if load else operands[0]
    local = operands[0] if load else operands[1]
    if not isinstance(mapped, Address) or mapped.coordinates is None:
        raise ins.error("needs [tensor map, {coordinates}]")
    if len(mapped.coordinates) != rank:
        raise ins.error(f"needs {rank} coordinates (got {len(mapped.coordinates)})")
    tensor = address(ins, Address(mapped.base, mapped.offset), context)
    coordinates = [source(ins, each, "s32", context) for each in mapped.coordinates]
    shared = address(ins, local, context)
    barrier = address(ins, operands[2], context) if load else None
    mask = source(ins, operands[3], "u16", context) if multicast else None
    pair = group == "cta_group::2"
    checked = tuple(
        r
        for s in (tensor, shared, *coordinates, *((barrier,) if barrier else ()))
        for r in s.registers
    )

    def run(w: Warp) -> None:
        w.poisoned("an operand of a bulk copy", checked)
        for lane in (int(lane) for lane in indices_of(w.bits)):
            entry = w.machine.tensor_map(w, int(tensor.get(w)[lane]), lane)
            if entry is None:
                continue
            described, memory = entry
            if described.rank != rank:
                w.machine.report(
                    "tensor-map",
                    f"the tensor map has rank {described.rank}, the copy {rank}",
                    warp=w,
                    lane=lane,
                )
                continue
            if memory.dependent:
                check_dependent(w, memory)
            start = tuple(int(c.get(w)[lane]) for c in coordinates)
            elements, inside = described.global_bytes(start)
            unit = np.arange(described.element_bytes)
            read = (elements[:, None] + unit).reshape(-1)
            inside = np.repeat(inside, described.element_bytes)
            where = int(shared.get(w)[lane]) & 0xFFFFFFFF
            offset = where & _LOW
            if offset % 128:
                w.machine.report(
                    "misaligned",
                    "a box in shared memory needs 128-byte alignment",
                    warp=w,
                    lane=lane,
                    address=f"shared {where:#x}",
                )
            offsets = described.shared_bytes(offset)
            if barrier is None:
                _issue_store(w, lane, memory, read, inside, offsets)
                continue
            pieces = _pieces(
                w, lane, space, where, int(barrier.get(w)[lane]), offsets,
                int(mask.get(w)[lane]) if mask is not None else None, pair,
            )  # fmt: skip
            w.machine.issue(BulkLoad(w, lane, memory, read, inside, pieces))

    return run


def _pieces(
    w: Warp, lane: int, space: str, where: int, barrier: int, offsets: Ints, mask: int | None,
    pair: bool,
) -> list[tuple[Cta, Ints, Mbarrier | None]]:  # fmt: skip
    """Destinations of a load. A multicast writes and signals at the same offset in each CTA.

    With .cta_group::2 the signal goes to the CTA of each pair whose rank has the parity of the
    mbarrier's (PTX ISA, "cp.async.bulk.tensor")."""
    peers = w.cta.cluster.ctas
    at = barrier & 0xFFFFFFFF
    if mask is None:
        rank = where >> SHARED_RANK_SHIFT
        if rank >= len(peers) or (space == "shared::cta" and rank != w.cta.rank):
            w.machine.report(
                "not-own-shared",
                "the destination is not in a CTA that this copy may write",
                warp=w,
                lane=lane,
                address=f"shared {where:#x}",
            )
            return []
        target = peers[rank]
        if target is not w.cta:
            reach(w, target, lane, False)
        found = target_barrier(w, lane, at, proxied=True)
        if found is not None and found.cta is not target and not pair:
            w.machine.report(
                "not-own-shared",
                "data and mbarrier are in different CTAs",
                warp=w,
                lane=lane,
                address=found.describe(),
            )
        return [(target, offsets, found)]
    pieces: list[tuple[Cta, Ints, Mbarrier | None]] = []
    for rank in range(16):
        if not mask >> rank & 1:
            continue
        if rank >= len(peers):
            w.machine.report(
                "out-of-bounds", f"multicast to rank {rank} of {len(peers)}", warp=w, lane=lane
            )
            continue
        if rank != w.cta.rank and not reach(w, peers[rank], lane, False):
            continue
        signalled = (rank & ~1) | (at >> SHARED_RANK_SHIFT & 1) if pair else rank
        place = (signalled << SHARED_RANK_SHIFT) | (at & _LOW)
        pieces.append((peers[rank], offsets, target_barrier(w, lane, place, proxied=True)))
    return pieces


def _issue_store(
    w: Warp, lane: int, memory: Memory, target: Ints, inside: NDArray[np.bool_], offsets: Ints
) -> None:
    reader = BulkStoreRead(w, lane, offsets)
    writer = BulkStoreWrite(w, lane, reader, memory, target, inside)
    _open_group(w, lane).operations += [reader, writer]
    w.machine.issue(reader)
    w.machine.issue(writer)


def _linear(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins, skip=3)
    to = mods.left.pop(0)
    origin = mods.left.pop(0)
    load = to != "global"
    if (to, origin) not in (
        ("shared::cluster", "global"), ("shared::cta", "global"),
        ("shared::cluster", "shared::cta"), ("global", "shared::cta"),
    ):  # fmt: skip
        raise ins.error(f"no bulk copy from {origin} to {to}")
    mods.need("mbarrier::complete_tx::bytes" if load else "bulk_group")
    multicast = load and mods.take("multicast::cluster")
    policy = mods.take("L2::cache_hint")
    mods.done()
    if len(ins.operands) != (4 + multicast if load else 3) + policy:
        raise ins.error("has the wrong number of operands")
    target = address(ins, ins.operands[0], context)
    start = address(ins, ins.operands[1], context)
    size = source(ins, ins.operands[2], "u32", context)
    barrier = address(ins, ins.operands[3], context) if load else None
    mask = source(ins, ins.operands[4], "u16", context) if multicast else None

    def run(w: Warp) -> None:
        w.poisoned("an operand of a bulk copy", target.registers + start.registers + size.registers)
        whole = w.bits
        for lane in (int(lane) for lane in indices_of(whole)):
            length = int(size.get(w)[lane])
            places = [int(s.get(w)[lane]) for s in (target, start)]
            if length % 16 or length == 0 or any(place % 16 for place in places):
                w.machine.report(
                    "misaligned",
                    "a bulk copy takes addresses and a size that are multiples of 16",
                    warp=w,
                    lane=lane,
                )
                continue
            w.bits, w.active = 1 << lane, lanes_of(1 << lane)
            ramp = np.arange(length)
            inside = np.ones(length, dtype=bool)
            there = locate(w, "global" if not load else origin, (start if load else target).get(w),
                           length)  # fmt: skip
            w.bits, w.active = whole, lanes_of(whole)
            if not there:
                continue
            memory, offsets = there[0].memory, int(there[0].offsets[0]) + ramp
            if barrier is None:
                _issue_store(w, lane, memory, offsets, inside, (places[1] & _LOW) + ramp)
                continue
            where = places[0] & 0xFFFFFFFF
            pieces = _pieces(
                w, lane, to, where, int(barrier.get(w)[lane]), (where & _LOW) + ramp,
                int(mask.get(w)[lane]) if mask is not None else None, False,
            )  # fmt: skip
            w.machine.issue(BulkLoad(w, lane, memory, offsets, inside, pieces))

    return run


def _groups(w: Warp, lane: int) -> list[Group]:
    found: list[Group] = w.groups.setdefault(f"bulk {lane}", [Group()])
    return found


def _open_group(w: Warp, lane: int) -> Group:
    return _groups(w, lane)[-1]


def _commit(w: Warp) -> None:
    for lane in indices_of(w.bits):
        _groups(w, int(lane)).append(Group())


def _wait_group(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins, skip=4)
    reads_only = mods.take("read")
    mods.done()
    count = source(ins, ins.operands[0], "u32", context).constant
    if not isinstance(count, int):
        raise ins.error("needs a literal count")

    def run(w: Warp) -> Outcome:
        waited: list[tuple[int, Operation]] = []
        for lane in (int(lane) for lane in indices_of(w.bits)):
            groups = _groups(w, lane)[:-1]
            for group in groups[: max(len(groups) - count, 0)]:
                waited += [
                    (lane, operation)
                    for operation in group.operations
                    if not (reads_only and isinstance(operation, BulkStoreWrite))
                ]
        left = [operation for _, operation in waited if not operation.done]
        if left:
            return Wait(lambda: f"{len(left)} bulk stores", (left[0].signal,))
        for lane, operation in waited:
            w.learn(1 << lane, operation.slot.actor, operation.tick)
        if not reads_only:
            for lane in (int(lane) for lane in indices_of(w.bits)):
                groups = _groups(w, lane)
                del groups[: max(len(groups) - 1 - count, 0)]
        return None

    return run
