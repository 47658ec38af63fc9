"""Look ahead of a load whose memory changes: can the launch depend on what it reads?

It cannot if the values of a run that reads the old contents, and of one that reads the new, differ
in registers alone that only elementwise instructions of the warp read, until none of them is live.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from build_kernels.binaries.ptx.syntax import (
    Address,
    Instruction,
    Negated,
    Operand,
    Pair,
    Register,
    Vector,
)
from build_kernels.emulator.execution.registers import Pending
from build_kernels.emulator.execution.warp import DecodedInstruction, Warp
from build_kernels.emulator.instructions.decoding import Destination
from build_kernels.emulator.instructions.elementwise import Elementwise
from build_kernels.emulator.instructions.ld_st import Load
from build_kernels.emulator.lanes import ALL, Array, bits_of, lanes_of

MOST_STEPS = 1000

Code = Sequence[DecodedInstruction]


class Both(NamedTuple):
    """A register in the run with the old contents and in that with the new.

    known: the lanes whose values are known here; in the others they are equal.
    """

    old: Array
    new: Array
    known: int

    @property
    def differing(self) -> int:
        """Return the lanes that differ."""
        return bits_of(self.old != self.new) & self.known


def mentioned(operands: Sequence[Operand]) -> Iterator[int]:
    """Yield the registers of operands."""
    for operand in operands:
        if isinstance(operand, Register):
            yield operand.index
        elif isinstance(operand, Negated):
            yield operand.register.index
        elif isinstance(operand, Pair):
            yield from mentioned((operand.first, operand.second))
        elif isinstance(operand, Vector):
            yield from mentioned(operand.items)
        elif isinstance(operand, Address):
            yield from mentioned((operand.base, *(operand.coordinates or ())))


def ends(instruction: Instruction) -> bool:
    return instruction.words[0] in ("ret", "exit", "trap")


def live_registers(code: Code) -> list[int]:
    """Return, per instruction, the bits of the registers that a thread may read from it on."""
    reads, writes = [], []
    for step in code:
        run, guard = step.run, (step.guard,) if step.guard >= 0 else ()
        targets: Sequence[int] = ()
        read: Sequence[int] = tuple(mentioned(step.instruction.operands))
        if isinstance(run, Elementwise):
            read, targets = run.registers, [t.register for t in run.targets if t.register >= 0]
        reads.append(sum(1 << register for register in {*read, *guard}))
        writes.append(0 if guard else sum(1 << register for register in set(targets)))
    live = [0] * (len(code) + 1)
    before: list[int] = []
    while before != live:
        before = list(live)
        for pc in range(len(code) - 1, -1, -1):
            step = code[pc]
            goes_on = step.guard >= 0 or (step.target < 0 and not ends(step.instruction))
            after = live[pc + 1] if goes_on else 0
            after |= live[step.target] if step.target >= 0 else 0
            live[pc] = reads[pc] | (after & ~writes[pc])
    return live


class Lookahead:
    """The instructions of a warp that follow a load, as both runs execute them.

    live: the registers that may be read, by instruction.
    """

    def __init__(self, w: Warp, code: Code, live: Sequence[int]) -> None:
        self._w = w
        self._code = code
        self._live = live
        self._bits = w.bits
        self._others = {other.pc: other for other in w.fragments if other is not w.fragment}
        self._written: dict[int, Both] = {}  # since the load
        self._differing: set[int] = set()

    def depends(self, load: Load, old: Array, new: Array) -> bool:
        """Return False if it is shown that nothing depends on it; old, new: [32, bytes]."""
        w, pc = self._w, self._w.fragment.pc
        if len(self._others) != len(w.fragments) - 1 or w.bits != w.fragment.mask:
            return True
        for target, *pair in zip(load.targets, load.values(old), load.values(new), strict=True):
            self._write(target, self._bits, pair)
        pc += 1
        for _ in range(MOST_STEPS):
            if not any([self._live[pc] >> register & 1 for register in self._differing]):
                return False
            if not self._joined_at(pc):
                return True
            step = self._code[pc]
            if step.guard >= 0 and self._tells_apart(step.guard):
                return True
            lanes = self._bits if step.guard < 0 else self._guarded(step)
            if step.target >= 0 and lanes in (0, self._bits):
                pc = step.target if lanes else pc + 1
                continue
            if step.target >= 0 or (ends(step.instruction) and lanes != 0):
                return True
            if lanes != 0 and not self._follow(step, lanes):
                return True
            pc += 1
        return True

    def _joined_at(self, pc: int) -> bool:
        """Join the lanes that wait here; False if others run before these do."""
        other = self._others.pop(pc, None)
        if other is not None:
            if other.token is not None or not (other.wait is None or other.wait.convergence):
                return False
            self._bits |= other.mask
        return all(pc < place for place in self._others)

    def _tells_apart(self, guard: int) -> bool:
        return bool(self._read(guard).differing & self._bits)

    def _guarded(self, step: DecodedInstruction) -> int | None:
        """Return the lanes that execute an instruction; None if that is not known."""
        both = self._read(step.guard)
        if self._bits & ~both.known:
            return None
        return (bits_of(both.old) ^ (ALL * step.negated)) & self._bits

    def _read(self, register: int) -> Both:
        found = self._written.get(register)
        if found is None:
            value, taint = self._w.r[register], self._w.t[register]
            known = ALL if taint is None else 0 if isinstance(taint, Pending) else bits_of(~taint)
            found = Both(value, value, known)
        return found

    def _write(self, target: Destination, lanes: int, pair: Sequence[Array] | None) -> None:
        """Write lanes of a register in both runs; None for equal values that are not known."""
        register = target.register
        if register < 0:
            return
        before = self._read(register)
        if pair is None:
            both = before._replace(known=before.known & ~lanes)
        else:
            active = lanes_of(lanes)
            old, new = (target.converted(value) for value in pair)
            old, new = np.where(active, old, before.old), np.where(active, new, before.new)
            both = Both(old, new, before.known | lanes)
        self._written[register] = both
        self._differing.discard(register)
        if both.differing:
            self._differing.add(register)

    def _follow(self, step: DecodedInstruction, lanes: int | None) -> bool:
        """Follow an instruction; False if it may tell the runs apart.

        Of what is not elementwise, the results are the same in both runs, but not known."""
        run = step.run
        if isinstance(run, Elementwise) and lanes is not None:
            if not run.collective or lanes == ALL:
                return self._compute(run, lanes)
        if isinstance(run, Elementwise | Load):
            targets, read = run.targets, set(run.registers)
        else:
            read = set(mentioned(step.instruction.operands))
            targets = [Destination(register) for register in read]
        if lanes is None:
            # They may keep what they hold.
            read |= {target.register for target in targets}
            lanes = self._bits
        if self._differing & read:
            return False
        for target in targets:
            self._write(target, lanes, None)
        return True

    def _compute(self, run: Elementwise, lanes: int) -> bool:
        operands: list[tuple[Array, Array]] = []
        known = lanes
        for source in run.sources:
            if source.registers:
                old, new, of_register = self._read(source.registers[0])
                known &= of_register
                if source.convert is not None:
                    old, new = source.convert(old), source.convert(new)
            elif source.steady:
                old = new = source.get(self._w)
            else:
                known = 0
                break
            operands.append((old, new))
        if known != lanes:
            alike = self._differing.isdisjoint(run.registers)
            for target in run.targets:
                self._write(target, lanes, None)
            return alike
        results = [run.results([pair[i] for pair in operands]) for i in (0, 1)]
        for target, *pair in zip(run.targets, *results, strict=True):
            self._write(target, lanes, pair)
        return True
