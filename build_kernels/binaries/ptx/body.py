"""The body of an .entry: registers, labels, variables and instructions (PTX ISA, "Syntax")."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import replace
from typing import NamedTuple

from build_kernels.binaries.ptx import syntax
from build_kernels.binaries.ptx.declarations import read_variable
from build_kernels.binaries.ptx.tokens import TokenCursor


class _Scope(NamedTuple):
    """Registers and labels of one { } block and those around it (PTX ISA, "Identifiers")."""

    registers: ChainMap[str, syntax.Register]
    labels: ChainMap[str, int]


class BodyReader:
    """Read the braces of one .entry into its kernel."""

    def __init__(self, cursor: TokenCursor, kernel: syntax.Kernel) -> None:
        self._cursor = cursor
        self._kernel = kernel
        self._branches: list[tuple[int, str, _Scope, int]] = []

    def read(self) -> None:
        """Read all blocks, and give every branch its target."""
        kernel = self._kernel
        self._block(_Scope(ChainMap(), ChainMap()))
        for index, label, scope, line in self._branches:
            target = scope.labels.get(label)
            if target is None:
                raise self._cursor.error(f"no label {label!r}", line)
            kernel.instructions[index] = replace(kernel.instructions[index], target=target)

    def _block(self, scope: _Scope) -> None:
        cursor = self._cursor
        cursor.expect("{")
        while not cursor.accept("}"):
            word, line = cursor.peek(), cursor.line
            if word == "{":
                self._block(_Scope(scope.registers.new_child(), scope.labels.new_child()))
            elif word == ";":
                cursor.next()
            elif word == ".reg":
                self._declare(scope)
            elif word in (".shared", ".local"):
                cursor.next()
                self._kernel.variables.append(read_variable(cursor, word[1:], line))
            elif word == ".pragma":
                while cursor.peek() != ";":
                    cursor.next()
            elif word == ".loc":
                raise cursor.error(".loc is not supported")
            elif cursor.peek(1) == ":":
                scope.labels[cursor.next()] = len(self._kernel.instructions)
                cursor.next()
            else:
                self._instruction(scope)

    def _declare(self, scope: _Scope) -> None:
        cursor, registers = self._cursor, self._kernel.registers
        line = cursor.line
        cursor.expect(".reg")
        kind = cursor.next()[1:]
        if kind not in syntax.TYPE_BITS:
            raise cursor.error(f"unknown register type .{kind}", line)
        while True:
            name = cursor.next()
            names = [name]
            if cursor.accept("<"):
                names = [f"{name}{i}" for i in range(cursor.integer())]
                cursor.expect(">")
            for each in names:
                scope.registers[each] = syntax.Register(len(registers), kind, each)
                registers.append(scope.registers[each])
            if not cursor.accept(","):
                break
        cursor.expect(";")

    def _instruction(self, scope: _Scope) -> None:
        cursor, instructions = self._cursor, self._kernel.instructions
        start, line = cursor.at, cursor.line
        guard = None
        if cursor.accept("@"):
            negated = cursor.accept("!")
            register = scope.registers.get(cursor.next())
            if register is None or register.type != "pred":
                raise cursor.error("the guard is not a predicate register", line)
            guard = (register, negated)
        opcode = cursor.next()
        operands: list[syntax.Operand] = []
        while not cursor.accept(";"):
            operands.append(self._operand(scope))
            if not cursor.accept(","):
                cursor.expect(";")
                break
        index = len(instructions)
        if opcode.split(".")[0] == "bra":
            if len(operands) != 1 or not isinstance(operands[0], syntax.Symbol):
                raise cursor.error("a branch takes one label", line)
            self._branches.append((index, operands[0].name, scope, line))
        text, span = cursor.source(start), cursor.span(start)
        instructions.append(
            syntax.Instruction(index, line, text, opcode, tuple(operands), guard, span=span)
        )

    def _operand(self, scope: _Scope) -> syntax.Operand:
        first = self._simple(scope)
        if self._cursor.accept("|"):
            return syntax.Pair(first, self._simple(scope))
        return first

    def _simple(self, scope: _Scope) -> syntax.Operand:
        cursor = self._cursor
        line, word = cursor.line, cursor.peek()
        if word == "[":
            return self._address(scope)
        if word == "-" or cursor.at_number():
            return cursor.literal()
        cursor.next()
        if word == "{":
            items = []
            while not cursor.accept("}"):
                items.append(self._simple(scope))
                cursor.accept(",")
            return syntax.Vector(tuple(items))
        if word == "!":
            register = scope.registers.get(cursor.next())
            if register is None:
                raise cursor.error("`!` takes a predicate register", line)
            return syntax.Negated(register)
        if word == "_":
            return syntax.Sink()
        register = scope.registers.get(word)
        if register is not None:
            return register
        return syntax.Special(word) if word.startswith("%") else syntax.Symbol(word)

    def _address(self, scope: _Scope) -> syntax.Address:
        cursor = self._cursor
        cursor.expect("[")
        base = self._simple(scope)
        offset = cursor.integer() if cursor.accept("+") or cursor.peek() == "-" else 0
        coordinates = None
        if cursor.accept(","):
            vector = self._simple(scope)
            if not isinstance(vector, syntax.Vector):
                raise cursor.error("tensor coordinates take braces")
            coordinates = vector.items
        cursor.expect("]")
        return syntax.Address(base, offset, coordinates)
