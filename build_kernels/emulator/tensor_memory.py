"""Tensor memory (TMEM): allocation, loads and stores by warps, fences (PTX ISA 9.7.16).

128 lanes of 512 columns of 32 bits; an address is lane << 16 | column. Warp w of a CTA reaches
lanes 32 (w mod 4) .. + 31 only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.agents import Operation
from build_kernels.emulator.clocks import (
    GENERIC,
    TENSOR,
    Clock,
    Ints,
    actor_of,
    actors_of,
    instruction_of,
    tick_of,
    ticks_of,
)
from build_kernels.emulator.collectives import aligned
from build_kernels.emulator.findings import Thread
from build_kernels.emulator.memory import POISON, VALID, Memory
from build_kernels.emulator.operands import Context, Modifiers, Source, address, items, source
from build_kernels.emulator.ptx import Instruction, Register, Sink
from build_kernels.emulator.warp import (
    ALL,
    LANES,
    Mask,
    Move,
    Outcome,
    Pending,
    Wait,
    Warp,
    lanes_of,
)

if TYPE_CHECKING:
    from build_kernels.emulator.machine import Cta

Array = NDArray[Any]
Run = Callable[[Warp], Outcome]
ROWS, COLUMNS = 128, 512
SMALLEST = 32


class TensorCells(Memory):
    """State and access records of TMEM cells; `values` holds the 32-bit contents."""

    def __init__(self, name: str) -> None:
        super().__init__(name, ROWS * COLUMNS)
        self.values = np.full(ROWS * COLUMNS, 0xFFFFFFFF, dtype=np.uint32)

    def describe(self, offset: int) -> str:
        return f"{self.name} lane {offset // COLUMNS} column {offset % COLUMNS}"


class TensorMemory:
    """One CTA's tensor memory; the cells come into being with the first allocation."""

    def __init__(self, cta: Cta) -> None:
        self.cta = cta
        self.allocations: dict[int, tuple[int, Instruction]] = {}
        self.owned = np.zeros(COLUMNS, dtype=bool)
        self.relinquished: Instruction | None = None
        self._cells: TensorCells | None = None

    @property
    def cells(self) -> TensorCells:
        if self._cells is None:
            self._cells = TensorCells(f"tensor memory of cta {self.cta.index}")
        return self._cells

    def free_start(self, columns: int, anywhere: bool) -> int | None:
        """A start for an allocation; `anywhere`: a random one of those that are free."""
        starts = [
            at
            for at in range(0, COLUMNS - columns + 1, SMALLEST)
            if not self.owned[at : at + columns].any()
        ]
        if not starts:
            return None
        return self.cta.machine.random.choice(starts) if anywhere else starts[0]

    def check_exit(self, thread: Thread) -> None:
        for start, (columns, instruction) in self.allocations.items():
            self.cta.machine.report(
                "tmem-leak",
                f"{columns} columns at {start} are still allocated at exit",
                instruction=instruction,
                thread=thread,
            )

    def inside(self, operation: Operation, cells: Ints) -> bool:
        """Are all cells in allocated columns? Reported when not."""
        columns = cells % COLUMNS
        bad = ~self.owned[columns]
        if not bad.any():
            return True
        at = int(cells[np.flatnonzero(bad)[0]])
        operation.machine.report(
            "tmem-unallocated",
            f"{operation.what} touches a column that is not allocated",
            operation=operation,
            address=self.cells.describe(at),
        )
        return False


class TensorAccess:
    """An operation's access to TMEM cells.

    tcgen05 operations are ordered across threads by tcgen05.fence::before_thread_sync, a
    synchronisation, and tcgen05.fence::after_thread_sync; within a thread by waits alone
    (PTX ISA 9.7.16.6, "Memory Consistency Model of tcgen05")."""

    def __init__(self, operation: Operation, tensor: Array) -> None:
        self.operation = operation
        self.tensor = tensor
        self.reader_slot = operation.reader_slot

    def records(self, count: int) -> Ints:
        return self.operation.records(count)

    def unordered(self, records: Ints, written: bool) -> Ints | None:
        if not records.any():
            return None
        operation = self.operation
        actors, ticks = actors_of(records), ticks_of(records)
        known = self.tensor[actors] >= ticks
        known |= (actors == operation.slot.actor) & (ticks == operation.tick)
        if known.all():
            return None
        verdicts: dict[int, bool] = {}
        bad = []
        for i in np.flatnonzero(~known):
            one = int(records[i])
            if one not in verdicts:
                verdicts[one] = self._ordered(one)
            if not verdicts[one]:
                bad.append(int(i))
        return np.array(bad, dtype=np.int64) if bad else None

    def _ordered(self, one: int) -> bool:
        operation = self.operation
        if operation.harmless(one):
            return True
        issue = operation.machine.clocks.issue(one)
        if issue is None or issue.warp is not operation.warp:
            return False
        actor, tick = actor_of(one), tick_of(one)
        return bool(operation.clock[GENERIC, actor] >= tick)

    def conflict(self, memory: Memory, offset: int, other: int, what: str) -> None:
        operation = self.operation
        machine = operation.machine
        actor, tick = actor_of(other), tick_of(other)
        kind, why = "race", f"{what} conflict with no order between the two"
        if operation.clock[GENERIC, actor] >= tick:
            kind = "missing-tcgen05-fence"
            why = (
                "ordered by a synchronisation, but without tcgen05.fence::before_thread_sync "
                "and ::after_thread_sync around it"
            )
        machine.report(
            kind,
            why,
            operation=operation,
            address=memory.describe(offset),
            other=machine.kernel.instructions[instruction_of(other)],
            other_thread=machine.actor_thread(other),
        )


# ---- allocation ----


def _group(mods: Modifiers) -> int:
    return int(mods.need("cta_group::1", "cta_group::2")[-1])


def _sync_aligned(mods: Modifiers) -> None:
    mods.need("sync")
    mods.need("aligned")


def allocate(ins: Instruction, context: Context) -> Run:
    """tcgen05.alloc: the whole warp; the address goes to shared memory."""
    from build_kernels.emulator.transfers import locate, write_bytes

    mods = Modifiers(ins, skip=2)
    group = _group(mods)
    _sync_aligned(mods)
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
            return Wait(f"{columns} free columns of tensor memory")
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
    _sync_aligned(mods)
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
                f"(allocated: {({at: n for at, (n, _) in memory.allocations.items()})})",
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
    _sync_aligned(mods)
    mods.done()

    def run(w: Warp) -> Outcome:
        if (wait := aligned(w)) is not None:
            return wait
        w.cta.tensor_memory.relinquished = w.instruction
        return None

    return run


# ---- loads and stores ----


def shape_cells(shape: str, registers: int, split: int) -> tuple[Ints, Ints]:
    """Relative (lane, column) of register j of thread t, each [registers, 32].

    PTX ISA 9.7.16.8, "Tensor Memory and Register Load/Store Instructions"."""
    j, t = np.meshgrid(np.arange(registers), np.arange(LANES), indexing="ij")
    if shape == "32x32b":
        return t, j
    if shape == "16x64b":
        return t // 4 + 8 * (t % 2), 2 * j + t // 2 % 2
    if shape == "16x128b":
        return t // 4 + 8 * (j % 2), 4 * (j // 2) + t % 4
    if shape == "16x256b":
        return t // 4 + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * (t % 4) + j % 2
    return t % 16, j + split * (t // 16)


SHAPES = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}


class TensorMemoryLoad(Operation):
    """tcgen05.ld of one warp."""

    what = "tcgen05.ld"
    proxied = False

    def __init__(self, warp: Warp, cells: Ints, targets: list[int]) -> None:
        super().__init__(warp, warp.first_lane())
        self.cells = cells
        self.tensor = warp.tensor
        self.lanes = warp.bits
        self.moves: list[Move] = []
        self.targets: list[tuple[int, Pending, Mask | None]] = []
        for register in targets:
            pending = Pending("tcgen05.wait::ld", self)
            before = warp.t[register]
            if isinstance(before, Pending):
                before = warp.unwaited(register, before)
            if warp.bits == ALL:
                self.targets.append((register, pending, None))
            else:
                self.targets.append((register, pending, before))
            warp.t[register] = pending

    def perform(self) -> None:
        memory = self.cta.tensor_memory
        access = TensorAccess(self, self.tensor)
        flat = self.cells.reshape(-1)
        memory.inside(self, flat)
        memory.cells.note_read(flat, access)
        active = lanes_of(self.lanes)
        for row, (register, pending, before) in zip(self.cells, self.targets, strict=True):
            values = memory.cells.values[row]
            poison = memory.cells.state[row] == POISON
            if self.lanes != ALL:
                values = np.where(active, values, self.warp.r[register])
                poison = np.where(active, poison, False if before is None else before)
            pending.taint = poison if poison.any() else None
            if self.warp.t[register] is pending:
                self.warp.r[register] = values

    def waited(self) -> None:
        for register, pending, _ in self.targets:
            if self.warp.t[register] is pending:
                self.warp.t[register] = pending.taint
        self.warp.make_up(self.moves)

    def settle(self) -> None:
        """Go on as if it had been waited for, after a finding that it was not."""
        self.finish()
        self.waited()
        _know(self.warp, [self], self.lanes)


class TensorMemoryStore(Operation):
    """tcgen05.st of one warp."""

    what = "tcgen05.st"
    proxied = False

    def __init__(self, warp: Warp, cells: Ints, values: Array, poison: Array) -> None:
        super().__init__(warp, warp.first_lane())
        active = lanes_of(warp.bits)
        self.cells = cells[:, active]
        self.values = values[:, active]
        self.poison = poison[:, active]
        self.tensor = warp.tensor

    def perform(self) -> None:
        memory = self.cta.tensor_memory
        flat = self.cells.reshape(-1)
        memory.inside(self, flat)
        memory.cells.note_write(flat, TensorAccess(self, self.tensor))
        memory.cells.values[flat] = self.values.reshape(-1)
        memory.cells.state[flat] = np.where(self.poison.reshape(-1), POISON, VALID)

    def waited(self) -> None:
        """Nothing is left to hand over."""


def transfer(ins: Instruction, context: Context) -> Run:
    """tcgen05.ld and tcgen05.st."""
    load = ins.words[1] == "ld"
    mods = Modifiers(ins, skip=2)
    _sync_aligned(mods)
    shape = mods.need(*SHAPES)
    repeat = int(mods.need(*(f"x{1 << i}" for i in range(8)))[1:])
    mods.need("b32")
    mods.done()
    count = SHAPES[shape] * repeat
    operands = list(ins.operands)
    vector = items(operands.pop(0 if load else -1))
    where = address(ins, operands.pop(0), context)
    split = 0
    if operands:
        constant = source(ins, operands.pop(0), "u32", context).constant
        if shape != "16x32bx2" or not isinstance(constant, int):
            raise ins.error("only 16x32bx2 takes a literal split offset")
        split = constant
    if len(vector) != count or count > 128 or operands:
        raise ins.error(f"needs {count} registers (got {len(vector)})")
    lanes, columns = shape_cells(shape, count, split)
    width = int(columns.max()) + 1
    targets: list[int] = []
    sources: list[Source] = []
    if load:
        for each in vector:
            if isinstance(each, Sink):
                raise ins.error("`_` is no destination here")
            if not isinstance(each, Register) or each.type not in ("b32", "u32", "s32", "f32"):
                raise ins.error("loads into 32-bit registers")
            targets.append(each.index)
    else:
        sources = [source(ins, each, "b32", context) for each in vector]

    def run(w: Warp) -> Outcome:
        if (wait := aligned(w)) is not None:
            return wait
        w.poisoned("the tensor memory address", where.registers)
        found = int(where.get(w)[w.first_lane()])
        base, column = found >> 16 & 0xFFFF, found & 0xFFFF
        own = 32 * (w.index % 4)
        allowed = (own,) if shape == "32x32b" else (own, own + 16)
        if base not in allowed:
            w.machine.report(
                "tmem-lane",
                f"warp {w.index} reaches lanes {own}..{own + 31}; .{shape} starts at "
                f"{' or '.join(map(str, allowed))} (got {base})",
                warp=w,
                address=f"tensor memory {found:#010x}",
            )
        if column + width > COLUMNS or base + int(lanes.max()) >= ROWS:
            w.machine.report(
                "out-of-bounds",
                f"{width} columns from {column} do not fit tensor memory",
                warp=w,
                address=f"tensor memory {found:#010x}",
            )
            return None
        cells = (lanes + base) * COLUMNS + columns + column
        operation: TensorMemoryLoad | TensorMemoryStore
        if load:
            operation = TensorMemoryLoad(w, cells, targets)
        else:
            taints = [w.taint(s.registers) for s in sources]
            poison = np.stack([np.zeros(LANES, bool) if t is None else t for t in taints])
            operation = TensorMemoryStore(w, cells, np.stack([s.get(w) for s in sources]), poison)
        w.groups.setdefault(ins.words[1], []).append(operation)
        w.machine.issue(operation)
        return None

    return run


def await_transfers(ins: Instruction, context: Context) -> Run:
    """tcgen05.wait::ld and ::st: earlier ones of the thread are complete."""
    kind = ins.words[1][-2:]
    mods = Modifiers(ins, skip=2)
    _sync_aligned(mods)
    mods.done()

    def run(w: Warp) -> Outcome:
        if (wait := aligned(w)) is not None:
            return wait
        operations = w.groups.get(kind, [])
        left = [operation for operation in operations if not operation.done]
        if left:
            return Wait(f"{len(left)} tcgen05.{kind}", (left[0].signal,))
        for operation in operations:
            operation.waited()
        if operations:
            _know(w, operations, w.bits)
            w.groups[kind] = []
        return None

    return run


def _know(w: Warp, operations: Sequence[Operation], lanes: int) -> None:
    """These transfers are complete for the lanes that issued them."""
    tensor = w.tensor.copy()
    for operation in operations:
        tensor[operation.slot.actor] = operation.tick
        w.learn(lanes, operation.slot.actor, operation.tick)
    w.tensor = tensor


def thread_fence(ins: Instruction, context: Context) -> Run:
    """tcgen05.fence::before_thread_sync and ::after_thread_sync."""
    Modifiers(ins, skip=2).done()
    before = ins.words[1] == "fence::before_thread_sync"

    def hand_over(w: Warp) -> None:
        def change(clock: Clock) -> None:
            np.maximum(clock[TENSOR], w.tensor, out=clock[TENSOR])

        w.replace_clocks(w.bits, change)

    def take(w: Warp) -> None:
        w.tensor = np.maximum(w.tensor, w.joined(w.bits)[TENSOR])

    return hand_over if before else take


INSTRUCTIONS: dict[str, Callable[[Instruction, Context], Run]] = {
    "alloc": allocate,
    "dealloc": deallocate,
    "relinquish_alloc_permit": relinquish,
    "ld": transfer,
    "st": transfer,
    "wait::ld": await_transfers,
    "wait::st": await_transfers,
    "fence::before_thread_sync": thread_fence,
    "fence::after_thread_sync": thread_fence,
}
