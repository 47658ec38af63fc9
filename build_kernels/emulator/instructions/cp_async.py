"""cp.async without .bulk: each thread copies 4, 8 or 16 bytes (PTX ISA, "cp.async")."""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.access.state_spaces import locate
from build_kernels.emulator.execution.interruption import Interruption, Wait
from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.async_writes import touch_mbarrier, write_shared
from build_kernels.emulator.instructions.bulk_operations import GlobalBytes
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, always
from build_kernels.emulator.instructions.mbarrier import by_address, find
from build_kernels.emulator.lanes import Ints, numbers_of
from build_kernels.emulator.memory.memory import POISON, VALID
from build_kernels.emulator.memory.windows import SHARED_ADDRESS, split_shared
from build_kernels.emulator.ordering.clocks import GENERIC
from build_kernels.emulator.ordering.mbarrier import Mbarrier


class Copy(Operation):
    """One lane's copy from global to shared memory; the bytes beyond its source are 0."""

    what = "cp.async"
    proxied = False

    def __init__(
        self,
        warp: Warp,
        lane: int,
        origin: GlobalBytes | None,
        offsets: Ints,
        after: Operation | None,
    ) -> None:
        super().__init__(warp, lane, after=after)
        self.origin = origin
        self.offsets = offsets
        self.touches(self.cta)

    def perform(self) -> None:
        data = np.zeros(len(self.offsets), dtype=np.uint8)
        state = np.full(len(self.offsets), VALID, dtype=np.uint8)
        if self.origin is not None:
            memory, offsets, inside = self.origin
            memory.note_read(offsets[inside], self)
            data[inside] = memory.data[offsets[inside]]
            state[inside] = np.where(memory.state[offsets[inside]] == POISON, POISON, VALID)
        write_shared(self, self.cta, self.offsets, data, state)


class Arrival(Operation):
    """The arrival on an mbarrier that follows all copies which the lane issued before."""

    what = "cp.async.mbarrier.arrive"
    proxied = False

    def __init__(self, warp: Warp, lane: int, barrier: Mbarrier, copies: list[Operation]) -> None:
        super().__init__(warp, lane, after=copies[-1] if copies else None)
        self.barrier = barrier
        self.copies = copies
        self.touches(self.cta)

    def perform(self) -> None:
        clock = self.completion()
        generic = clock[GENERIC]
        for copy in self.copies:
            generic = generic.with_tick(copy.slot.actor, copy.tick)
        touch_mbarrier(self, self.barrier, "arrives")
        self.barrier.arrive(1, clock.replaced(GENERIC, generic), self)


def groups_of_lane(w: Warp, lane: int) -> list[list[Operation]]:
    """Return the lane's groups of copies; the last one is open."""
    found: list[list[Operation]] = w.groups.setdefault(f"cp.async {lane}", [[]])
    return found


def copies_of_lane(w: Warp, lane: int) -> list[Operation]:
    """Return the copies that the lane has not waited for."""
    return [copy for group in groups_of_lane(w, lane) for copy in group]


def copy(d: Decoding) -> Run:
    """Decode a copy; those of one lane act in turn, which PTX does not promise."""
    whole = d.need("ca", "cg") == "cg"
    d.need("shared", "shared::cta")
    d.need("global")
    hinted = d.cache_hints()
    target, start = d.address(d.operands[0]), d.address(d.operands[1])
    size = d.source(d.operands[2], "u32").constant
    if not isinstance(size, int) or size not in ((16,) if whole else (4, 8, 16)):
        raise d.error(f"copies 16 bytes{'' if whole else ', 8 or 4'} (got {size})")
    limited = len(d.operands) == 4 + hinted
    if not limited and len(d.operands) != 3 + hinted:
        raise d.error("has the wrong number of operands")
    source_size = d.source(d.operands[3], "u32") if limited else None
    registers = target.registers + start.registers
    registers += source_size.registers if source_size else ()

    def run(w: Warp) -> None:
        w.poisoned("an operand of cp.async", registers)
        every = w.bits
        for lane in numbers_of(every):
            where = int(target.get(w)[lane]) & SHARED_ADDRESS
            if where % size:
                why = f"a copy of {size} bytes to an address that is no multiple of it"
                w.report("misaligned", why, lane=lane, address=f"shared {where:#x}")
                continue
            taken = size if source_size is None else min(int(source_size.get(w)[lane]), size)
            w.activate(1 << lane)
            places = locate(w, "global", start.get(w), taken) if taken else []
            w.activate(every)
            if taken and not places:
                continue
            origin = None
            if places:
                offsets = int(places[0].offsets[0]) + np.arange(size)
                origin = GlobalBytes(places[0].memory, offsets, np.arange(size) < taken)
            before = copies_of_lane(w, lane)
            _, offset = split_shared(where)
            made = Copy(w, lane, origin, offset + np.arange(size), before[-1] if before else None)
            groups_of_lane(w, lane)[-1].append(made)
            w.grid.issue(made)

    return run


def commit_group(w: Warp) -> None:
    for lane in numbers_of(w.bits):
        groups_of_lane(w, lane).append([])


def wait_group(d: Decoding) -> Run:
    everything = d.name == "cp.async.wait_all"
    count = 0 if everything else d.source(d.operands[0], "u32").constant
    if not isinstance(count, int):
        raise d.error("needs a literal count")
    keep = 0 if everything else 1 + count  # the open group, and those that need not be over

    def run(w: Warp) -> Interruption:
        over = {}
        for lane in numbers_of(w.bits):
            groups = groups_of_lane(w, lane)
            over[lane] = groups[: max(len(groups) - keep, 0)]
        left = [each for groups in over.values() for group in groups for each in group]
        left = [each for each in left if not each.done]
        if left:
            return Wait(lambda: f"{len(left)} copies of cp.async", (left[0].signal,))
        for lane, groups in over.items():
            for each in (each for group in groups for each in group):
                w.order_after(1 << lane, each.slot.actor, each.tick)
            del groups_of_lane(w, lane)[: len(groups)]
            if everything:
                groups_of_lane(w, lane).append([])
        return None

    return run


def arrive(d: Decoding) -> Run:
    counted = d.take("noinc")
    d.one_of("shared", "shared::cta")
    d.need("b64")
    where = d.address(d.operands[0])

    def run(w: Warp) -> None:
        for place, bits in by_address(w, where):
            for lane in numbers_of(bits):
                barrier = find(w, place, lane, local=True)
                if barrier is None:
                    continue
                barrier.pending += not counted
                w.grid.issue(Arrival(w, lane, barrier, copies_of_lane(w, lane)))

    return run


INSTRUCTIONS: dict[str, Decoder] = {
    "cp.async": copy,
    "cp.async.commit_group": always(commit_group),
    **dict.fromkeys(("cp.async.wait_group", "cp.async.wait_all"), wait_group),
    "cp.async.mbarrier.arrive": arrive,
}
