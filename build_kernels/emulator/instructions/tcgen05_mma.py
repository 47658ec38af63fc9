"""tcgen05.mma (PTX ISA, "TensorCore 5th Generation"). See tensor_core for the sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from build_kernels.binaries.ptx.syntax import Address, Vector
from build_kernels.emulator.access.tensor_access import TensorAccess, TensorOperation
from build_kernels.emulator.execution.cta import Cta
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions import matrix
from build_kernels.emulator.instructions.decoding import (
    Decoder,
    Decoding,
    Source,
    items,
    registers_of,
)
from build_kernels.emulator.instructions.tcgen05_commit_fence import ctas_of
from build_kernels.emulator.lanes import Array, numbers_of
from build_kernels.emulator.memory.memory import POISON, VALID
from build_kernels.emulator.memory.tensor_memory import COLUMNS, ROWS
from build_kernels.emulator.numerics import tensor_core


class TensorMma(TensorOperation):
    """tcgen05.mma of kind::f16 with A and B in shared memory.

    where: the accumulator's address. disabled: [CTAs, 128] lanes of D to leave alone.
    """

    what = "tcgen05.mma"

    def __init__(
        self,
        warp: Warp,
        lane: int,
        shape: matrix.InstructionDescriptor,
        a: matrix.SharedDescriptor,
        b: matrix.SharedDescriptor,
        ctas: Sequence[Cta],
        where: int,
        accumulate: bool,
        disabled: Array | None,
    ) -> None:
        cells = matrix.accumulator_cells(shape.m, shape.n, len(ctas), where >> 16, where & 0xFFFF)
        super().__init__(warp, lane, cells, pipe=0)
        self.shape = shape
        self.a, self.b = a, b
        self.ctas = ctas
        self.accumulate = accumulate
        self.disabled = disabled
        for cta in ctas:
            self.touches(cta)

    def perform(self) -> None:
        """Multiply A of each CTA by B, which the CTAs share."""
        shape, share = self.shape, len(self.ctas)
        b_layout = matrix.layout_of(self.b, shape.n // share, shape.b_mn_major)
        parts = [matrix.read(self, cta, b_layout, shape.b_bf16) for cta in self.ctas]
        b = np.concatenate([values for values, _ in parts])  # [n, K]
        b_poison = np.concatenate([poison for _, poison in parts])
        if shape.a_negated != shape.b_negated:
            b = -b
        a_layout = matrix.layout_of(self.a, shape.m // share, shape.a_mn_major)
        for number, cta in enumerate(self.ctas):
            a, a_poison = matrix.read(self, cta, a_layout, shape.a_bf16)  # [m / CTAs, K]
            poison = np.logical_or.outer(matrix.rows_of(a_poison), matrix.rows_of(b_poison))
            self._accumulate(cta, number, a, b, poison)

    def _accumulate(self, cta: Cta, number: int, a: Array, b: Array, poison: Array) -> None:
        """Write a [m / CTAs, K] times b [n, K] to the CTA's tensor memory, or add it to that."""
        memory = cta.tensor_memory
        keep: Array | slice = slice(None)
        if self.disabled is not None:
            keep = ~self.disabled[number][self.cells // COLUMNS]
        flat = self.cells[keep].reshape(-1)
        memory.check_allocated(flat, self.what, self)
        bad = poison[keep].reshape(-1)
        before = np.zeros(self.cells.shape, np.float32)
        if self.accumulate:
            before = memory.cells.values[self.cells].view(np.float32)
            bad = bad | (memory.cells.state[flat] == POISON)
        memory.cells.note_write(flat, TensorAccess(self))
        kinds = (self.shape.a_bf16, self.shape.b_bf16)
        after = tensor_core.multiply_add(a, b, before, kinds)
        memory.cells.values[flat] = after[keep].reshape(-1).view(np.uint32)
        memory.cells.state[flat] = np.where(bad, POISON, VALID)


def mma(d: Decoding) -> Run:
    group = d.cta_group()
    d.need("kind::f16")
    d.take("collector::a::discard")
    operands = list(d.operands)
    if isinstance(operands[1], Address):
        raise d.error("A in tensor memory is not supported")
    target = d.address(operands[0])
    a, b = (d.source(each, "b64") for each in operands[1:3])
    descriptor = d.source(operands[3], "b32")
    rest = operands[4:]
    mask: list[Source] = []
    if rest and isinstance(rest[0], Vector):
        mask = [d.source(each, "b32") for each in items(rest.pop(0))]
        if len(mask) != 4 * group:
            raise d.error(f"needs {4 * group} registers of disabled lanes (got {len(mask)})")
    if len(rest) != 1:
        raise d.error("a scale of the accumulator is not supported")
    enable = d.source(rest[0], "pred")
    used = registers_of((target, a, b, descriptor, enable, *mask))

    def run(w: Warp) -> None:
        w.poisoned("an operand of tcgen05.mma", used)
        ctas = ctas_of(w, group)
        for lane in numbers_of(w.bits):
            where = int(target.get(w)[lane])
            shape = matrix.decode_instruction(d, int(descriptor.get(w)[lane]), group)
            if not _fits(w, lane, shape, group, where):
                continue
            operation = TensorMma(
                w, lane, shape,
                matrix.decode_shared(d, int(a.get(w)[lane]), True),
                matrix.decode_shared(d, int(b.get(w)[lane]), True),
                ctas, where, bool(enable.get(w)[lane]), _disabled(w, lane, mask),
            )  # fmt: skip
            w.grid.issue(operation)

    return run


def _fits(w: Warp, lane: int, shape: matrix.InstructionDescriptor, group: int, where: int) -> bool:
    """Report an accumulator that does not fit at its address; False for one."""
    base, column = where >> 16 & 0xFFFF, where & 0xFFFF
    width = shape.n // 2 if (group, shape.m) == (2, 128) else shape.n
    allowed = (0, 16) if (group, shape.m) == (1, 64) else (0,)
    fits = base in allowed and column + width <= COLUMNS
    if not fits:
        why = f"an accumulator of M={shape.m}, N={shape.n} does not fit here"
        w.report("out-of-bounds", why, lane=lane, address=f"tensor memory {where:#010x}")
    return fits


def _disabled(w: Warp, lane: int, mask: Sequence[Source]) -> Array | None:
    """Return [CTAs, 128] lanes of D that a mask disables; None if it disables none."""
    words = np.array([m.get(w)[lane] for m in mask], dtype=np.uint32)
    if not words.any():
        return None
    return np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool).reshape(-1, ROWS)


INSTRUCTIONS: dict[str, Decoder] = {"tcgen05.mma": mma}
