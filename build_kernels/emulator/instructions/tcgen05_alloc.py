"""tcgen05.alloc, .dealloc and .relinquish_alloc_permit (PTX ISA, "Tensor Memory Allocation")."""

from __future__ import annotations

import numpy as np

from build_kernels.emulator.execution.warp import Outcome, Run, Wait, Warp, lanes_of
from build_kernels.emulator.instructions.collectives import aligned
from build_kernels.emulator.instructions.operands import Context, Modifiers, address, source
from build_kernels.emulator.memory.memory import POISON, VALID
from build_kernels.emulator.memory.tensor_memory import COLUMNS, ROWS, TensorMemory
from build_kernels.emulator.ordering.clocks import (
    GENERIC,
    actor_of,
    instruction_of,
    tick_of,
)
from build_kernels.emulator.ptx.syntax import Instruction


def _group(mods: Modifiers) -> int:
    return int(mods.need("cta_group::1", "cta_group::2")[-1])


def sync_aligned(mods: Modifiers) -> None:
    mods.need("sync")
    mods.need("aligned")


def allocate(ins: Instruction, context: Context) -> Run:
    """tcgen05.alloc: the whole warp; the address goes to shared memory."""
    from build_kernels.emulator.instructions.ld_st import write_bytes
    from build_kernels.emulator.memory.state_spaces import locate

    mods = Modifiers(ins, skip=2)
    group = _group(mods)
    sync_aligned(mods)
    space = mods.one_of("shared::cta") or ""
    mods.need("b32")
    mods.done()
    where = address(ins, ins.operands[0], context)
    count = source(ins, ins.operands[1], "u32", context)

    def run(w: Warp) -> Outcome:
        if (wait := aligned(w)) is not None:
            return wait
        w.poisoned("an operand of tcgen05.alloc", where.registers + count.registers)
        memory = w.cta.tensor_memory
        columns = int(count.get(w)[w.first_lane()])
        if columns not in (32, 64, 128, 256, 512):
            w.machine.report(
                "tmem-allocation", f"{columns} columns: a power of two in 32..512", warp=w
            )
            return None
        if memory.relinquished is not None:
            w.machine.report(
                "tmem-allocation",
                "the CTA has given up its right to allocate",
                warp=w,
                other=memory.relinquished,
            )
        anywhere = w.machine.schedule.policy == "random" and group == 1
        start = memory.free_start(columns, anywhere)
        if start is None:
            return Wait(lambda: f"{columns} free columns of tensor memory")
        memory.allocations[start] = (columns, w.instruction)
        memory.owned[start : start + columns] = True
        w.machine.events += 1
        whole, lane = w.bits, w.first_lane()
        w.bits, w.active = 1 << lane, lanes_of(1 << lane)
        for place in locate(w, space, where.get(w), 4):
            data = np.array([start], dtype=np.uint32).view(np.uint8)[None, :]
            write_bytes(w, place, place.bytes(4), data, VALID, 0)
        w.bits, w.active = whole, lanes_of(whole)
        return None

    return run


def deallocate(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins, skip=2)
    _group(mods)
    sync_aligned(mods)
    mods.need("b32")
    mods.done()
    where = source(ins, ins.operands[0], "u32", context)
    count = source(ins, ins.operands[1], "u32", context)

    def run(w: Warp) -> Outcome:
        if (wait := aligned(w)) is not None:
            return wait
        w.poisoned("an operand of tcgen05.dealloc", where.registers + count.registers)
        lane = w.first_lane()
        start, columns = int(where.get(w)[lane]), int(count.get(w)[lane])
        memory = w.cta.tensor_memory
        w.machine.events += 1
        found = memory.allocations.get(start)
        if found is None or found[0] != columns:
            w.machine.report(
                "tmem-allocation",
                f"no allocation of {columns} columns at {start:#x} "
                f"(allocated: { ({at: n for at, (n, _) in memory.allocations.items()}) })",
                warp=w,
            )
            return None
        _check_idle(w, memory, start, columns)
        del memory.allocations[start]
        memory.owned[start : start + columns] = False
        cells = memory.cells
        state = cells.state.reshape(ROWS, COLUMNS)
        state[:, start : start + columns] = POISON
        cells.values.reshape(ROWS, COLUMNS)[:, start : start + columns] = 0xFFFFFFFF
        return None

    return run


def _check_idle(w: Warp, memory: TensorMemory, start: int, columns: int) -> None:
    """Every access to these columns must be over and known to be over."""
    cells = memory.cells
    clock = w.joined(w.bits)[GENERIC]
    grid = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    for record in cells.records(grid[:, start : start + columns].reshape(-1)):
        actor, tick = actor_of(int(record)), tick_of(int(record))
        if clock[actor] < tick and w.tensor[actor] < tick:
            other = w.machine.kernel.instructions[instruction_of(int(record))]
            w.machine.report(
                "race",
                "tensor memory is freed with no order after an access to it",
                warp=w,
                other=other,
                other_thread=w.machine.actor_thread(int(record)),
            )
    for operation in list(w.machine.pending):
        touched = getattr(operation, "cells", None)
        if touched is not None and operation.cta is w.cta:
            used = touched % COLUMNS
            if ((used >= start) & (used < start + columns)).any():
                w.machine.report(
                    "race",
                    f"tensor memory is freed while a {operation.what} still uses it",
                    warp=w,
                    other=operation.instruction,
                    other_thread=operation.thread(),
                )


def relinquish(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins, skip=2)
    _group(mods)
    sync_aligned(mods)
    mods.done()

    def run(w: Warp) -> Outcome:
        if (wait := aligned(w)) is not None:
            return wait
        w.cta.tensor_memory.relinquished = w.instruction
        return None

    return run
