"""tcgen05.ld, .st and .wait: between tensor memory and registers (PTX ISA, "tcgen05.ld")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from build_kernels.binaries.ptx.syntax import Operand, Register, Sink
from build_kernels.emulator.access.tensor_access import TensorAccess, TensorOperation
from build_kernels.emulator.execution.interruption import Interruption, Wait
from build_kernels.emulator.execution.registers import Move, Pending
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.convergence import aligned
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, Source, items
from build_kernels.emulator.lanes import ALL, LANES, Array, Ints, Mask, lanes_of
from build_kernels.emulator.memory.memory import POISON, VALID
from build_kernels.emulator.memory.tensor_memory import COLUMNS, ROWS


class TensorMemoryLoad(TensorOperation):
    """tcgen05.ld of one warp; cells: [registers, 32]."""

    what = "tcgen05.ld"
    proxied = False
    guarded = True

    def __init__(self, warp: Warp, cells: Ints, targets: Sequence[int]) -> None:
        super().__init__(warp, warp.first_lane(), cells)
        self.lanes = warp.bits
        self.moves: list[Move] = []
        self.targets: list[tuple[int, Pending, Mask | None]] = []
        for register in targets:
            pending = Pending("tcgen05.wait::ld", self)
            before = warp.t[register]
            if isinstance(before, Pending):
                before = warp.unwaited(register, before)
            self.targets.append((register, pending, None if warp.bits == ALL else before))
            warp.t[register] = pending

    def perform(self) -> None:
        memory = self.cta.tensor_memory
        flat = self.cells.reshape(-1)
        memory.check_allocated(flat, self.what, self)
        memory.cells.note_read(flat, TensorAccess(self))
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
        self.warp.hand_over(self.targets)
        self.warp.make_up(self.moves)

    def settle(self) -> None:
        """Finish as if it had been waited for, to go on after the finding that it was not."""
        self.grid.perform(self)
        self.waited()
        _order_after(self.warp, [self], self.lanes)


class TensorMemoryStore(TensorOperation):
    """tcgen05.st of one warp; cells, values, poison: [registers, lanes]."""

    what = "tcgen05.st"
    proxied = False

    def __init__(self, warp: Warp, cells: Ints, values: Array, poison: Array) -> None:
        active = lanes_of(warp.bits)
        super().__init__(warp, warp.first_lane(), cells[:, active])
        self.values = values[:, active]
        self.poison = poison[:, active]

    def perform(self) -> None:
        memory = self.cta.tensor_memory
        flat = self.cells.reshape(-1)
        memory.check_allocated(flat, self.what, self)
        memory.cells.note_write(flat, TensorAccess(self))
        memory.cells.values[flat] = self.values.reshape(-1)
        memory.cells.state[flat] = np.where(self.poison.reshape(-1), POISON, VALID)

    def waited(self) -> None:
        """Do nothing: a store has no registers to hand over."""


# Registers per repetition of each shape.
_SHAPES = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}


def _shape_cells(shape: str, registers: int, split: int) -> tuple[Ints, Ints]:
    """Return the relative lane and column of register j of thread t, each [registers, 32].

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


@dataclass(frozen=True)
class CellShape:
    """The cells of a transfer, relative to its address; lanes, columns: [registers, 32]."""

    name: str
    lanes: Ints
    columns: Ints

    def at(self, w: Warp, where: int) -> Ints | None:
        """Return the cells at an address; None, reported, if they do not fit."""
        base, column = where >> 16 & 0xFFFF, where & 0xFFFF
        text = f"tensor memory {where:#010x}"
        own = LANES * (w.index % 4)
        allowed = (own,) if self.name == "32x32b" else (own, own + 16)
        if base not in allowed:
            w.report(
                "tmem-lane",
                f"warp {w.index} reaches lanes {own}..{own + 31}; .{self.name} starts at "
                f"{' or '.join(map(str, allowed))} (got {base})",
                address=text,
            )
        width = int(self.columns.max()) + 1
        if column + width > COLUMNS or base + int(self.lanes.max()) >= ROWS:
            why = f"{width} columns from {column} do not fit tensor memory"
            w.report("out-of-bounds", why, address=text)
            return None
        return (self.lanes + base) * COLUMNS + self.columns + column


def transfer(d: Decoding) -> Run:
    kind = d.name[-2:]
    load = kind == "ld"
    shape = d.need(*_SHAPES)
    repeat = int(d.need(*(f"x{1 << i}" for i in range(8)))[1:])
    d.need("b32")
    count = _SHAPES[shape] * repeat
    operands = list(d.operands)
    vector = items(operands.pop(0 if load else -1))
    where = d.address(operands.pop(0))
    split = _split(d, shape, operands)
    if len(vector) != count or count > 128:
        raise d.error(f"needs {count} registers (got {len(vector)})")
    cells_of = CellShape(shape, *_shape_cells(shape, count, split))
    targets = _targets(d, vector) if load else []
    sources = [] if load else [d.source(each, "b32") for each in vector]

    def run(w: Warp) -> None:
        w.poisoned("the tensor memory address", where.registers)
        cells = cells_of.at(w, int(where.get(w)[w.first_lane()]))
        if cells is None:
            return
        operation = TensorMemoryLoad(w, cells, targets) if load else _store(w, cells, sources)
        w.groups.setdefault(kind, []).append(operation)
        w.grid.issue(operation)

    return aligned(d, run)


def _split(d: Decoding, shape: str, operands: list[Operand]) -> int:
    if not operands:
        return 0
    constant = d.source(operands.pop(0), "u32").constant
    if shape != "16x32bx2" or not isinstance(constant, int) or operands:
        raise d.error("only 16x32bx2 takes a literal split offset")
    return constant


def _targets(d: Decoding, vector: Sequence[Operand]) -> list[int]:
    targets = []
    for each in vector:
        if isinstance(each, Sink):
            raise d.error("`_` is no destination here")
        if not isinstance(each, Register) or each.type not in ("b32", "u32", "s32", "f32"):
            raise d.error("loads into 32-bit registers")
        targets.append(each.index)
    return targets


def _store(w: Warp, cells: Ints, sources: Sequence[Source]) -> TensorMemoryStore:
    taints = [w.taint(s.registers) for s in sources]
    poison = np.stack([np.zeros(LANES, bool) if t is None else t for t in taints])
    return TensorMemoryStore(w, cells, np.stack([s.get(w) for s in sources]), poison)


def wait(d: Decoding) -> Run:
    """Decode tcgen05.wait::ld and ::st: earlier transfers of the thread are complete."""
    kind = d.name[-2:]

    def run(w: Warp) -> Interruption:
        operations = w.groups.get(kind, [])
        left = [operation for operation in operations if not operation.done]
        if left:
            return Wait(lambda: f"{len(left)} tcgen05.{kind}", (left[0].signal,))
        for operation in operations:
            operation.waited()
        if operations:
            _order_after(w, operations, w.bits)
            w.groups[kind] = []
        return None

    return aligned(d, run)


def _order_after(w: Warp, operations: Sequence[TensorOperation], lanes: int) -> None:
    tensor = w.tensor
    for operation in operations:
        tensor = tensor.with_tick(operation.slot.actor, operation.tick)
        w.order_after(lanes, operation.slot.actor, operation.tick)
    w.tensor = tensor


INSTRUCTIONS: dict[str, Decoder] = {
    **dict.fromkeys(("tcgen05.ld", "tcgen05.st"), transfer),
    **dict.fromkeys(("tcgen05.wait::ld", "tcgen05.wait::st"), wait),
}
