"""tcgen05.commit and tcgen05.fence: order of tcgen05 operations and threads; the CTA pair."""

from __future__ import annotations

from collections.abc import Sequence

from build_kernels.emulator.execution.cta import Cta
from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.async_writes import target_barrier, touch_mbarrier
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, always
from build_kernels.emulator.lanes import numbers_of
from build_kernels.emulator.memory.windows import join_shared, split_shared
from build_kernels.emulator.ordering.clocks import TENSOR, Clock
from build_kernels.emulator.ordering.mbarrier import Mbarrier


def ctas_of(w: Warp, group: int) -> list[Cta]:
    """Return the CTAs of an operation: this one, or the pair (PTX ISA, "CTA pair")."""
    if group == 1:
        return [w.cta]
    peers = w.cta.cluster.ctas
    even = w.cta.rank & ~1
    if even + 1 >= len(peers):
        w.report("out-of-bounds", "cta_group::2 needs a pair of CTAs")
        return [w.cta]
    return [peers[even], peers[even + 1]]


class TensorCommit(Operation):
    """tcgen05.commit: arrives when all earlier tcgen05 operations of the thread are complete.

    It implies tcgen05.fence::before_thread_sync.
    """

    what = "tcgen05.commit"

    def __init__(self, warp: Warp, lane: int, barriers: Sequence[Mbarrier]) -> None:
        super().__init__(warp, lane, pipe=0)
        self.barriers = barriers

    def completion(self) -> Clock:
        clock = super().completion()
        return clock.replaced(TENSOR, clock[TENSOR].with_tick(self.slot.actor, self.tick))

    def perform(self) -> None:
        clock = self.completion()
        for barrier in self.barriers:
            touch_mbarrier(self, barrier, "arrives")
            barrier.arrive(1, clock, self)


def commit(d: Decoding) -> Run:
    group = d.cta_group()
    d.need("mbarrier::arrive::one")
    d.one_of("shared::cluster")
    multicast = d.take("multicast::cluster")
    d.need("b64")
    where = d.address(d.operands[0])
    mask = d.source(d.operands[1], "u16") if multicast else None
    if len(d.operands) != 1 + multicast:
        raise d.error("has the wrong number of operands")

    def run(w: Warp) -> None:
        w.poisoned("an operand of tcgen05.commit", where.registers)
        ctas_of(w, group)
        for lane in numbers_of(w.bits):
            places = [int(where.get(w)[lane])]
            if mask is not None:
                ranks, (_, offset) = int(mask.get(w)[lane]), split_shared(places[0])
                places = [join_shared(rank, offset) for rank in range(16) if ranks >> rank & 1]
            found = [target_barrier(w, lane, place, proxied=True) for place in places]
            barriers = [barrier for barrier in found if barrier is not None]
            w.grid.issue(TensorCommit(w, lane, barriers))

    return run


def before_sync(w: Warp) -> None:
    """Hand the warp's tcgen05 order to its lanes' clocks."""

    def change(clock: Clock) -> Clock:
        return clock.replaced(TENSOR, clock[TENSOR].joined(w.tensor))

    w.replace_clocks(w.bits, change)


def after_sync(w: Warp) -> None:
    """Take the tcgen05 order from the lanes' clocks."""
    w.tensor = w.tensor.joined(w.joined(w.bits)[TENSOR])


INSTRUCTIONS: dict[str, Decoder] = {
    "tcgen05.commit": commit,
    "tcgen05.fence::before_thread_sync": always(before_sync),
    "tcgen05.fence::after_thread_sync": always(after_sync),
}
