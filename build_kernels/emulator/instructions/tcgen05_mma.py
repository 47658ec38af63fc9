"""tcgen05.mma and tcgen05.commit (PTX ISA, "TensorCore 5th Generation").

Products of 16-bit floats are summed in float64 and rounded to float32 once for each instruction:
exact for integers in any order of summation; hardware's rounding order is not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from build_kernels.emulator.execution.operation import Operation
from build_kernels.emulator.execution.warp import Warp, indices_of
from build_kernels.emulator.instructions.async_writes import target_barrier
from build_kernels.emulator.instructions.operands import (
    Context,
    Modifiers,
    Source,
    address,
    items,
    registers_of,
    source,
)
from build_kernels.emulator.instructions.tcgen05_ld_st import INSTRUCTIONS
from build_kernels.emulator.memory.memory import POISON, SHARED_RANK_SHIFT, VALID
from build_kernels.emulator.memory.tensor_memory import COLUMNS, TensorAccess
from build_kernels.emulator.ordering.clocks import TENSOR, Clock
from build_kernels.emulator.ptx.syntax import Address, Instruction, Vector

if TYPE_CHECKING:
    from build_kernels.emulator.execution.cta import Cta
    from build_kernels.emulator.ordering.barriers import Mbarrier
from build_kernels.emulator.execution.warp import Array, Run
from build_kernels.emulator.instructions.matrices import (
    InstructionDescriptor,
    SharedDescriptor,
    accumulator_cells,
    decode_instruction,
    decode_shared,
    matrix_offsets,
    read_matrix,
    rows_of,
)


class TensorMma(Operation):
    """tcgen05.mma of kind::f16 with A and B in shared memory."""

    what = "tcgen05.mma"

    def __init__(
        self,
        warp: Warp,
        lane: int,
        shape: InstructionDescriptor,
        a: SharedDescriptor,
        b: SharedDescriptor,
        ctas: Sequence[Cta],
        where: int,
        accumulate: bool,
        disabled: Array | None,
    ) -> None:
        super().__init__(warp, lane, pipe=0)
        self.shape = shape
        self.a, self.b = a, b
        self.ctas = ctas
        self.accumulate = accumulate
        self.disabled = disabled
        self.tensor = warp.tensor
        self.cells = accumulator_cells(shape.m, shape.n, len(ctas), where >> 16, where & 0xFFFF)
        for cta in ctas:
            self.touches(cta)

    def perform(self) -> None:
        shape, share = self.shape, len(self.ctas)
        b_offsets = matrix_offsets(self.b, shape.n // share, shape.b_mn_major)
        halves = [read_matrix(self, cta, b_offsets, shape.b_bf16) for cta in self.ctas]
        b = np.concatenate([values for values, _ in halves])
        b_poison = np.concatenate([poison for _, poison in halves])
        if shape.a_negated != shape.b_negated:
            b = -b
        a_offsets = matrix_offsets(self.a, shape.m // share, shape.a_mn_major)
        for number, cta in enumerate(self.ctas):
            a, a_poison = read_matrix(self, cta, a_offsets, shape.a_bf16)
            product = a @ b.T
            poison = np.logical_or.outer(rows_of(a_poison), rows_of(b_poison))
            self._accumulate(cta, number, product, poison)

    def _accumulate(self, cta: Cta, number: int, product: Array, poison: Array) -> None:
        memory = cta.tensor_memory
        cells = self.cells
        keep = np.ones(cells.shape, dtype=bool)
        if self.disabled is not None:
            keep = ~self.disabled[number][cells // COLUMNS]
        flat = cells[keep]
        memory.inside(self, flat)
        access = TensorAccess(self, self.tensor)
        if self.accumulate:
            before = memory.cells.values[flat].view(np.float32).astype(np.float64)
            total = product[keep] + before
            bad = poison[keep] | (memory.cells.state[flat] == POISON)
        else:
            total, bad = product[keep], poison[keep]
        memory.cells.note_write(flat, access)
        memory.cells.values[flat] = total.astype(np.float32).view(np.uint32)
        memory.cells.state[flat] = np.where(bad, POISON, VALID)


def mma(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins, skip=2)
    group = int(mods.need("cta_group::1", "cta_group::2")[-1])
    mods.need("kind::f16")
    mods.take("collector::a::discard")
    mods.done()
    operands = list(ins.operands)
    if isinstance(operands[1], Address):
        raise ins.error("A in tensor memory is not supported")
    target = address(ins, operands[0], context)
    a, b = (source(ins, each, "b64", context) for each in operands[1:3])
    descriptor = source(ins, operands[3], "b32", context)
    rest = operands[4:]
    mask: list[Source] = []
    if rest and isinstance(rest[0], Vector):
        mask = [source(ins, each, "b32", context) for each in items(rest.pop(0))]
        if len(mask) != 4 * group:
            raise ins.error(f"needs {4 * group} registers of disabled lanes (got {len(mask)})")
    if len(rest) != 1:
        raise ins.error("a scale of the accumulator is not supported")
    enable = source(ins, rest[0], "pred", context)
    used = registers_of((target, a, b, descriptor, enable, *mask))

    def run(w: Warp) -> None:
        w.poisoned("an operand of tcgen05.mma", used)
        ctas = _pair(w, group)
        for lane in (int(lane) for lane in indices_of(w.bits)):
            where = int(target.get(w)[lane])
            shape = decode_instruction(ins, int(descriptor.get(w)[lane]), group)
            base, column = where >> 16 & 0xFFFF, where & 0xFFFF
            width = shape.n // 2 if (group, shape.m) == (2, 128) else shape.n
            allowed = (0, 16) if (group, shape.m) == (1, 64) else (0,)
            if base not in allowed or column + width > COLUMNS:
                w.machine.report(
                    "out-of-bounds",
                    f"an accumulator of M={shape.m}, N={shape.n} does not fit here",
                    warp=w,
                    lane=lane,
                    address=f"tensor memory {where:#010x}",
                )
                continue
            disabled = None
            if mask:
                words = np.array([m.get(w)[lane] for m in mask], dtype=np.uint32)
                if words.any():
                    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
                    disabled = bits.astype(bool).reshape(group, 128)
            operation = TensorMma(
                w, lane, shape,
                decode_shared(ins, int(a.get(w)[lane]), True),
                decode_shared(ins, int(b.get(w)[lane]), True),
                ctas, where, bool(enable.get(w)[lane]), disabled,
            )  # fmt: skip
            w.machine.issue(operation)

    return run


def _pair(w: Warp, group: int) -> list[Cta]:
    """The CTAs of an operation: this one, or the pair (PTX ISA, "CTA pair")."""
    if group == 1:
        return [w.cta]
    peers = w.cta.cluster.ctas
    even = w.cta.rank & ~1
    if even + 1 >= len(peers):
        w.machine.report("out-of-bounds", "cta_group::2 needs a pair of CTAs", warp=w)
        return [w.cta]
    return [peers[even], peers[even + 1]]


class TensorCommit(Operation):
    """tcgen05.commit: arrives when all earlier tcgen05 operations of the thread are complete.

    It implies tcgen05.fence::before_thread_sync (PTX ISA, "tcgen05.commit")."""

    what = "tcgen05.commit"

    def __init__(self, warp: Warp, lane: int, barriers: Sequence[Mbarrier]) -> None:
        super().__init__(warp, lane, pipe=0)
        self.barriers = barriers

    def completion(self) -> Clock:
        clock = super().completion()
        clock[TENSOR, self.slot.actor] = self.tick
        return clock

    def perform(self) -> None:
        clock = self.completion()
        for barrier in self.barriers:
            if barrier.cta is not self.cta:
                barrier.foreign_touches.append((self.slot.actor, self.tick, self.instruction))
            if barrier.cta.exited:
                self.machine.report(
                    "exited-peer",
                    "tcgen05.commit arrives on an mbarrier of a CTA that has exited",
                    operation=self,
                    address=barrier.describe(),
                )
            barrier.arrive(1, clock, operation=self)


def commit(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins, skip=2)
    group = int(mods.need("cta_group::1", "cta_group::2")[-1])
    mods.need("mbarrier::arrive::one")
    mods.one_of("shared::cluster")
    multicast = mods.take("multicast::cluster")
    mods.need("b64")
    mods.done()
    where = address(ins, ins.operands[0], context)
    mask = source(ins, ins.operands[1], "u16", context) if multicast else None
    if len(ins.operands) != 1 + multicast:
        raise ins.error("has the wrong number of operands")

    def run(w: Warp) -> None:
        w.poisoned("an operand of tcgen05.commit", where.registers)
        _pair(w, group)
        for lane in (int(lane) for lane in indices_of(w.bits)):
            at = int(where.get(w)[lane]) & 0xFFFFFFFF
            places = [at]
            if mask is not None:
                low = at & ((1 << SHARED_RANK_SHIFT) - 1)
                ranks = int(mask.get(w)[lane])
                places = [r << SHARED_RANK_SHIFT | low for r in range(16) if ranks >> r & 1]
            found = [target_barrier(w, lane, place, proxied=True) for place in places]
            barriers = [barrier for barrier in found if barrier is not None]
            w.machine.issue(TensorCommit(w, lane, barriers))

    return run


def tcgen05(ins: Instruction, context: Context) -> Run:
    """Everything that starts with tcgen05."""
    name = ins.words[1] if len(ins.words) > 1 else ""
    table = {**INSTRUCTIONS, "mma": mma, "commit": commit}
    if name not in table:
        raise ins.error(f"tcgen05.{name} is not supported")
    if not context.arch.startswith("sm_10"):
        raise ins.error(f"tcgen05 does not exist on {context.arch}")
    return table[name](ins, context)
