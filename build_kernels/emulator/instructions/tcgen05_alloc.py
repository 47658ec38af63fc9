"""tcgen05.alloc, .dealloc, .relinquish_alloc_permit (PTX ISA, "Tensor Memory Allocation")."""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.access.state_spaces import locate
from build_kernels.emulator.access.tensor_access import TensorOperation
from build_kernels.emulator.execution.cta import Cta
from build_kernels.emulator.execution.interruption import Interruption, Wait
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.convergence import aligned
from build_kernels.emulator.instructions.decoding import Decoder, Decoding
from build_kernels.emulator.instructions.generic_access import write_bytes
from build_kernels.emulator.memory.access_records import actor_of, tick_of
from build_kernels.emulator.memory.memory import VALID
from build_kernels.emulator.memory.tensor_memory import COLUMNS, ROWS
from build_kernels.emulator.ordering.clocks import GENERIC

_SIZES = (32, 64, 128, 256, 512)


def allocate(d: Decoding) -> Run:
    group = d.cta_group()
    space = d.one_of("shared::cta") or ""
    d.need("b32")
    where = d.address(d.operands[0])
    count = d.source(d.operands[1], "u32")

    def run(w: Warp) -> Interruption:
        memory = w.cta.tensor_memory
        if w.fragment.token is not None:
            return finish(w, *w.fragment.token)
        w.poisoned("an operand of tcgen05.alloc", where.registers + count.registers)
        columns = int(count.get(w)[w.first_lane()])
        if columns not in _SIZES:
            w.report("tmem-allocation", f"{columns} columns: a power of two in 32..512")
            return None
        if memory.relinquished is not None:
            why = "the CTA has given up its right to allocate"
            w.report("tmem-allocation", why, other=memory.relinquished)
        anywhere = w.grid.schedule.policy == "random" and group == 1
        start = memory.allocate(columns, w.instruction, w.grid.random if anywhere else None)
        if start is None:
            return Wait(lambda: f"{columns} free columns of tensor memory")
        w.grid.events += 1
        w.cta.allocated += 1
        w.cta.allocation.notify()
        w.fragment.token = (start, w.cta.allocated)
        return finish(w, *w.fragment.token)

    def finish(w: Warp, start: int, number: int) -> Interruption:
        """Wait for the peer: the two CTAs of a pair allocate together; write the address."""
        for peer in w.cta.cluster.ctas[w.cta.rank & ~1 :][:2] if group == 2 else ():
            if peer.allocated < number:
                return Wait(lambda: "the other CTA of the pair to allocate", (peer.allocation,))
        w.fragment.token = None
        whole = w.bits
        w.activate(1 << w.first_lane())
        for place in locate(w, space, where.get(w), 4):
            data = np.array([start], dtype=np.uint32).view(np.uint8)[None, :]
            write_bytes(w, place, place.bytes(4), data, VALID, 0)
        w.activate(whole)
        return None

    return aligned(d, run)


def deallocate(d: Decoding) -> Run:
    group = d.cta_group()
    d.need("b32")
    where = d.source(d.operands[0], "u32")
    count = d.source(d.operands[1], "u32")

    def run(w: Warp) -> None:
        w.poisoned("an operand of tcgen05.dealloc", where.registers + count.registers)
        lane = w.first_lane()
        start, columns = int(where.get(w)[lane]), int(count.get(w)[lane])
        memory = w.cta.tensor_memory
        w.grid.events += 1
        found = memory.allocations.get(start)
        if found is None or found[0] != columns:
            w.report(
                "tmem-allocation",
                f"no allocation of {columns} columns at {start:#x} "
                f"(allocated: { ({at: n for at, (n, _) in memory.allocations.items()}) })",
            )
            return
        # CUTLASS's GEMMs order a pair's dealloc after the peer's accesses; its primitives examples
        # do not.
        for cta in w.cta.cluster.ctas[w.cta.rank & ~1 :][:2] if group == 2 else (w.cta,):
            _check_idle(w, cta, start, columns)
        memory.free(start, columns)

    return aligned(d, run)


def _check_idle(w: Warp, cta: Cta, start: int, columns: int) -> None:
    """Report accesses to these columns of a CTA that are not over, or not ordered before."""
    memory = cta.tensor_memory
    clock = w.joined(w.bits)[GENERIC]
    grid = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    for record in memory.cells.records(grid[:, start : start + columns].reshape(-1)):
        actor, tick = actor_of(int(record)), tick_of(int(record))
        if clock.tick(actor) < tick and w.tensor.tick(actor) < tick:
            instruction, thread = w.grid.author_of(int(record))
            why = "tensor memory is freed with no order after an access to it"
            peers = cta is not w.cta
            w.report("race", why, other=instruction, other_thread=thread, by_the_letter=peers)
    for operation in list(w.grid.pending):
        if isinstance(operation, TensorOperation) and operation.cta is cta:
            used = operation.cells % COLUMNS
            if ((used >= start) & (used < start + columns)).any():
                w.report(
                    "race",
                    f"tensor memory is freed while a {operation.what} still uses it",
                    other=operation.instruction,
                    other_thread=operation.thread(),
                    by_the_letter=cta is not w.cta,
                )


def relinquish(d: Decoding) -> Run:
    d.cta_group()

    def run(w: Warp) -> None:
        w.cta.tensor_memory.relinquished = w.instruction

    return aligned(d, run)


INSTRUCTIONS: dict[str, Decoder] = {
    "tcgen05.alloc": allocate,
    "tcgen05.dealloc": deallocate,
    "tcgen05.relinquish_alloc_permit": relinquish,
}
