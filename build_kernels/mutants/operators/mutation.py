"""Enumerate the mutants of a kernel's text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from build_kernels.binaries.ptx.parser import parse, parse_module
from build_kernels.binaries.ptx.syntax import (
    Address,
    Instruction,
    Negated,
    Operand,
    Pair,
    Register,
    Symbol,
    UnsupportedPtx,
    Vector,
)
from build_kernels.emulator.instructions.decoding import Context
from build_kernels.emulator.instructions.table import context_of, decode, make_program
from build_kernels.emulator.launch.variables import place_variables

from .edits import OPERATORS
from .statement import Statement, statements_of


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One change of one instruction.

    artifact, line, operator, number: its name; number counts an operator's changes of a line.
    before, after: the statement, without its semicolon. span: its place in the text. index: the
    instruction's number. unread: nothing reads the results of the instruction.
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
    artifact: str, ptx: str, arch: str, dynamic_shared_bytes: int = 0
) -> list[Mutation]:
    """Return the mutants of every instruction, in the order of the text.

    A change that the reader of PTX or the decoder refuses is none, nor is one that leaves the
    words of the statement as they were.
    """
    kernel = parse(ptx)
    layout = place_variables(kernel, dynamic_shared_bytes)
    program = make_program(kernel, layout, arch, {})
    context = context_of(kernel, arch, layout.shared, layout.addresses, {})
    found: list[Mutation] = []
    numbers: dict[tuple[int, str], int] = {}
    for statement in statements_of(program, ptx):
        seen = {_words(statement.text)}
        for operator, text in _texts(statement):
            if _words(text) in seen or not _is_valid(statement, text, context):
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
                    unread=_is_unread(statement),
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


def _is_valid(statement: Statement, text: str, context: Context) -> bool:
    """Return whether the text can be read and decoded with the statement's names."""
    names = dict(_declared(statement.instruction))
    names |= {other: names[name] for name, other in statement.others.items() if name in names}
    body = [f".reg .{kind} {name};" for name, kind in names.items()]
    body += [_closed(text), *(f"{label}:" for label in _labels(statement.instruction))]
    lines = (".version 8.0", f".target {context.arch}", ".entry one() {", *body, "}")
    try:
        (kernel,) = parse_module("\n".join(lines))
        for instruction in kernel.instructions:
            decode(instruction, context)
    except UnsupportedPtx:
        return False
    return True


def _declared(instruction: Instruction) -> Iterator[tuple[str, str]]:
    """Yield the name and type of each register of an instruction."""
    if instruction.guard is not None:
        yield instruction.guard[0].name, instruction.guard[0].type
    todo: list[Operand] = list(instruction.operands)
    while todo:
        operand = todo.pop(0)
        if isinstance(operand, Register):
            yield operand.name, operand.type
        elif isinstance(operand, Negated):
            yield operand.register.name, operand.register.type
        elif isinstance(operand, Pair):
            todo += [operand.first, operand.second]
        elif isinstance(operand, Vector):
            todo += operand.items
        elif isinstance(operand, Address):
            todo += [operand.base, *(operand.coordinates or ())]


def _labels(instruction: Instruction) -> list[str]:
    if instruction.target is None:
        return []
    return [operand.name for operand in instruction.operands if isinstance(operand, Symbol)]


def _is_unread(statement: Statement) -> bool:
    """Return whether an instruction has results in registers and nothing reads one."""
    results = [name for name, _ in _declared(_first_operand(statement.instruction))]
    return bool(results) and not any(name in statement.read_later for name in results)


def _first_operand(instruction: Instruction) -> Instruction:
    return Instruction(0, 0, "", "", instruction.operands[:1])
