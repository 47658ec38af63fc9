"""Enumerate the mutants of a kernel's text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from build_kernels.binaries.ptx.parser import parse, parse_module
from build_kernels.binaries.ptx.syntax import (
    Instruction,
    Negated,
    Operand,
    Register,
    Symbol,
    UnsupportedPtx,
)
from build_kernels.emulator.instructions.decoding import Context
from build_kernels.emulator.instructions.lookahead import mentioned
from build_kernels.emulator.instructions.table import context_of, decode, make_program
from build_kernels.emulator.launch.variables import place_variables

from .edits import OPERATORS
from .ranges import NOTHING, Facts, Ranges, changes_nothing, rounds_to_the_same
from .statement import Statement, statements_of


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One change of one instruction.

    artifact, line, operator, number: its name; number counts an operator's changes of a line.
    before, after: the statement, without its semicolon. span: its place in the text. index: the
    instruction's number. unread: no result of the instruction is read, or,
    if it still has one, where it decides.
    rounded, same_result: the changed one has its result in every launch, after the next
    instruction rounds it or already. around: see `Statement`.
    """

    artifact: str
    line: int
    operator: str
    number: int
    before: str
    after: str
    span: tuple[int, int]
    index: int
    unread: bool
    rounded: bool
    same_result: bool
    around: str

    @property
    def place(self) -> str:
        """Return the part of the name that tells it from the kernel's others."""
        return f"{self.line} {self.operator} {self.number}"

    @property
    def after_words(self) -> str:
        return _words(self.after)

    @property
    def name(self) -> str:
        return f"{self.artifact}:{self.place}"

    def applied(self, ptx: str) -> str:
        """Return the kernel's text with the change."""
        start, end = self.span
        return ptx[:start] + _closed(self.after) + ptx[end:]


def mutations_of(
    artifact: str, ptx: str, arch: str, facts: Facts = NOTHING, *, dynamic_shared_bytes: int = 0
) -> list[Mutation]:
    """Return the mutants of every instruction, in the order of the text.

    A change that the reader of PTX or the decoder refuses is none, nor is one that leaves the
    words of the statement as they were.
    """
    kernel = parse(ptx)
    layout = place_variables(kernel, dynamic_shared_bytes)
    program = make_program(kernel, layout, arch, {})
    context = context_of(kernel, arch, layout.shared, layout.addresses, {})
    ranges = Ranges(kernel, facts)
    found: list[Mutation] = []
    numbers: dict[tuple[int, str], int] = {}
    for statement in statements_of(program, ptx):
        following = program.code[statement.instruction.index + 1].instruction
        seen = {_words(statement.text)}
        for operator, text in _texts(statement):
            changed = None if _words(text) in seen else _read(statement, text, context)
            if changed is None:
                continue
            seen.add(_words(text))
            line = statement.instruction.line
            numbers[line, operator] = numbers.get((line, operator), 0) + 1
            found.append(
                Mutation(
                    artifact=artifact,
                    line=line,
                    operator=operator,
                    number=numbers[line, operator],
                    before=_words(statement.text),
                    after=text,
                    span=statement.instruction.span,
                    index=statement.instruction.index,
                    unread=_is_unread(statement, None if operator == "dropped" else ranges),
                    rounded=_is_rounded(statement, changed, ranges, following),
                    same_result=_has_same_result(statement, changed, ranges),
                    around=statement.around,
                )
            )
    return found


def sample(mutations: Sequence[Mutation], size: int | None, seed: int) -> list[Mutation]:
    """Return `size` of the mutants at random, in their order; all if it is None."""
    if size is None or size >= len(mutations):
        return list(mutations)
    chosen = random.Random(seed).sample(range(len(mutations)), size)
    return [mutations[at] for at in sorted(chosen)]


def _texts(statement: Statement) -> Iterator[tuple[str, str]]:
    for name, operator in OPERATORS.items():
        for text in operator(statement):
            yield name, text


def _closed(text: str) -> str:
    """Return a statement with its semicolon; ptxas refuses one that stands alone or after `}`."""
    return text if not text or text.startswith("{") else f"{text};"


def _words(text: str) -> str:
    return " ".join(text.split())


def _read(statement: Statement, text: str, context: Context) -> list[Instruction] | None:
    """Return the instructions of a statement's new text; None if it is refused."""
    body = [f".reg .{each.type} {name};" for name, each in statement.registers.items()]
    body += [_closed(text), *(f"{label}:" for label in _labels(statement.instruction))]
    lines = (".version 8.0", f".target {context.arch}", ".entry one() {", *body, "}")
    try:
        (kernel,) = parse_module("\n".join(lines))
        for instruction in kernel.instructions:
            decode(instruction, context)
    except UnsupportedPtx:
        return None
    return kernel.instructions


def _labels(instruction: Instruction) -> list[str]:
    if instruction.target is None:
        return []
    return [operand.name for operand in instruction.operands if isinstance(operand, Symbol)]


def _is_unread(statement: Statement, ranges: Ranges | None) -> bool:
    """Return whether an instruction has results in registers, and none is read and decides.

    ranges: None if a result that is read must be written, whatever decides.
    """
    registers = {register.index: register for register in statement.registers.values()}
    results = [registers[index] for index in mentioned(statement.instruction.operands[:1])]
    unread = [
        each.name not in statement.read_later or (ranges is not None and ranges.is_ignored(each))
        for each in results
    ]
    return bool(unread) and all(unread)


def _has_same_result(statement: Statement, changed: Sequence[Instruction], ranges: Ranges) -> bool:
    before = statement.instruction
    return len(changed) == 1 and changes_nothing(ranges, before, _renamed(statement, changed[0]))


def _is_rounded(
    statement: Statement, changed: Sequence[Instruction], ranges: Ranges, following: Instruction
) -> bool:
    if len(changed) != 1 or len(changed[0].operands) != 3:
        return False
    after = _renamed(statement, changed[0])
    return rounds_to_the_same(ranges, statement.instruction, after, following)


def _renamed(statement: Statement, instruction: Instruction) -> Instruction:
    """Return an instruction that was read alone, with the kernel's registers."""
    known = statement.registers

    def renamed(operand: Operand) -> Operand:
        if isinstance(operand, Register):
            return known[operand.name]
        return Negated(known[operand.register.name]) if isinstance(operand, Negated) else operand

    guard = instruction.guard and (known[instruction.guard[0].name], instruction.guard[1])
    return replace(instruction, operands=tuple(map(renamed, instruction.operands)), guard=guard)
