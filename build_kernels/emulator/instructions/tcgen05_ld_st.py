"""tcgen05.ld and .st between tensor memory and registers, their waits, and tcgen05.fence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import (
    ALL,
    LANES,
    Array,
    Mask,
    Move,
    Outcome,
    Pending,
    Run,
    Wait,
    Warp,
    lanes_of,
)
from build_kernels.emulator.instructions.collectives import aligned
from build_kernels.emulator.instructions.operands import (
    Context,
    Modifiers,
    Source,
    address,
    items,
    source,
)
from build_kernels.emulator.instructions.tcgen05_alloc import (
    allocate,
    deallocate,
    relinquish,
    sync_aligned,
)
from build_kernels.emulator.memory.memory import POISON, VALID
from build_kernels.emulator.memory.tensor_memory import COLUMNS, ROWS, TensorAccess
from build_kernels.emulator.ordering.clocks import TENSOR, Clock, Ints
from build_kernels.emulator.ptx.syntax import Instruction, Register, Sink


def shape_cells(shape: str, registers: int, split: int) -> tuple[Ints, Ints]:
    """Relative (lane, column) of register j of thread t, each [registers, 32].

    PTX ISA, "Tensor Memory and Register Load/Store Instructions"."""
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
    sync_aligned(mods)
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
    sync_aligned(mods)
    mods.done()

    def run(w: Warp) -> Outcome:
        if (wait := aligned(w)) is not None:
            return wait
        operations = w.groups.get(kind, [])
        left = [operation for operation in operations if not operation.done]
        if left:
            return Wait(lambda: f"{len(left)} tcgen05.{kind}", (left[0].signal,))
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
