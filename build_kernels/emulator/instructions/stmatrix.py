"""ldmatrix and stmatrix: a warp moves 8 x 8 matrices of 16-bit elements (PTX ISA, "ldmatrix")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from build_kernels.binaries.ptx.syntax import Operand
from build_kernels.emulator.access.staleness import forget
from build_kernels.emulator.access.state_spaces import locate
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.instructions.convergence import aligned
from build_kernels.emulator.instructions.decoding import Decoder, Decoding, items
from build_kernels.emulator.instructions.generic_access import (
    note_read,
    read_states,
    value_bytes,
    value_states,
    write_bytes,
)
from build_kernels.emulator.lanes import ALL, LANES, Array, Ints, Mask
from build_kernels.emulator.memory.memory import POISON_BYTE, VALID

ROW = 16  # bytes; lane 8 i + r gives the address of row r of matrix i


def _places(count: int, transposed: bool) -> Ints:
    """Return [lanes, ROW]: the byte of [lanes, 4 * count] that each byte of a row comes from."""
    lane, byte = np.meshgrid(np.arange(8 * count), np.arange(ROW), indexing="ij")
    matrix, row, column = lane // 8, lane % 8, byte // 2
    if transposed:
        row, column = column, row
    # Lane t holds columns 2 (t mod 4) and the next of row t / 4.
    return (4 * row + column // 2) * 4 * count + 4 * matrix + column % 2 * 2 + byte % 2


def _form(d: Decoding, vector: Operand) -> tuple[Sequence[Operand], Ints, str]:
    """Take the modifiers; return a register per matrix, where their bytes are, the state space."""
    d.need("m8n8")
    count = int(d.need("x1", "x2", "x4")[1:])
    places = _places(count, d.take("trans"))
    space = d.need("shared", "shared::cta")
    d.need("b16")
    registers = items(vector)
    if len(registers) != count:
        raise d.error(f"needs {count} registers (got {len(registers)})")
    return registers, places, space


def load_matrix(d: Decoding) -> Run:
    registers, places, space = _form(d, d.operands[0])
    count = len(registers)
    where = d.address(d.operands[1])
    writes = [d.destination(each, "b32") for each in registers]

    def run(w: Warp) -> None:
        w.poisoned("the address", where.registers)
        data = np.full((LANES, 4 * count), POISON_BYTE, dtype=np.uint8)
        bad = np.ones((LANES, 4 * count), dtype=bool)
        whole = w.bits
        w.activate(whole & ALL >> LANES - 8 * count)
        for place in locate(w, space, where.get(w), ROW):
            offsets = place.bytes(ROW)
            note_read(w, place, offsets, 0)
            poison = read_states(w, place, offsets)
            to = places[place.lanes]
            data.reshape(-1)[to] = place.memory.data[offsets]
            bad.reshape(-1)[to] = False if poison is None else poison
        w.activate(whole)
        values = data.view(np.uint32)
        for i, write in enumerate(writes):
            taint: Mask = np.logical_or.reduce(bad[:, 4 * i : 4 * i + 4], axis=1)
            write(w, np.ascontiguousarray(values[:, i]), taint if taint.any() else None)

    return aligned(d, run)


def store_matrix(d: Decoding) -> Run:
    registers, places, space = _form(d, d.operands[1])
    count = len(registers)
    where = d.address(d.operands[0])
    sources = [d.source(each, "b32") for each in registers]

    def rows(values: Array) -> Array:
        found = np.zeros((LANES, ROW), dtype=np.uint8)
        found[: 8 * count] = values.reshape(-1)[places]
        return found

    def run(w: Warp) -> None:
        w.grid.events += 1
        w.poisoned("the address", where.registers)
        states = value_states(w, sources, 4)  # first: it ends loads that nothing waited for
        data = rows(value_bytes(w, sources, 4))
        of_rows = None if states is None else rows(states)
        whole = w.bits
        w.activate(whole & ALL >> LANES - 8 * count)
        for place in locate(w, space, where.get(w), ROW):
            offsets = place.bytes(ROW)
            forget(place, offsets)
            state = VALID if of_rows is None else of_rows[place.lanes]
            write_bytes(w, place, offsets, data[place.lanes], state, 0)
        w.activate(whole)

    return aligned(d, run)


INSTRUCTIONS: dict[str, Decoder] = {"ldmatrix": load_matrix, "stmatrix": store_matrix}
