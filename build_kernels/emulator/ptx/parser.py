"""PTX text -> a kernel: parameters, variables, registers and a flat list of instructions.

The grammar is the PTX ISA's, chapters "Syntax" and "State Spaces, Types, and Variables",
as far as CuTeDSL and NVRTC emit it. Whatever is not understood raises PtxError with its line.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from build_kernels.emulator.findings import PtxError
from build_kernels.emulator.ptx.syntax import (
    TYPE_BITS,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Negated,
    Operand,
    Pair,
    Parameter,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+) | (?P<newline>\n) | (?P<comment>//[^\n]*|/\*.*?\*/)
    | (?P<number>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|0[xX][0-9a-fA-F]+U?
                |\d+\.\d*(?:[eE][+-]?\d+)?|\d+U?)
    | (?P<string>"[^"\n]*")
    | (?P<name>[%$A-Za-z_.][\w$%.]*(?:::[\w.]+)*)
    | (?P<punct>[-+{}\[\](),;:|!@=<>*])""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    kind: str
    line: int


def _tokenise(text: str) -> list[_Token]:
    tokens, line, at = [], 1, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise PtxError(f"PTX line {line}: unreadable text {text[at : at + 20]!r}")
        kind = match.lastgroup or ""
        if kind not in ("space", "newline", "comment"):
            tokens.append(_Token(match.group(), kind, line))
        line += match.group().count("\n")
        at = match.end()
    return tokens


def parse(text: str, kernel: str | None = None) -> Kernel:
    """Parse the module and return its kernel.

    kernel: the entry's name; may be None when the module has exactly one entry.
    Raises PtxError for text that is not understood, or when the entry cannot be chosen.
    """
    entries = _Parser(text).module()
    names = [entry.name for entry in entries]
    if kernel is None:
        if len(entries) != 1:
            raise PtxError(f"the module must hold one .entry (got {names}); name the kernel")
        return entries[0]
    for entry in entries:
        if entry.name == kernel:
            return entry
    raise PtxError(f"no .entry {kernel!r} in the module (it holds {names})")


class _Scope:
    """Names of one { } block: registers, labels, variables (PTX ISA, "Identifiers")."""

    def __init__(self, outer: _Scope | None) -> None:
        self.outer = outer
        self.registers: dict[str, Register] = {}
        self.labels: dict[str, int] = {}

    def register(self, name: str) -> Register | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.registers:
                return scope.registers[name]
            scope = scope.outer
        return None

    def label(self, name: str) -> int | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.outer
        return None


class _Parser:
    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.tokens = _tokenise(text)
        self.at = 0
        self.target = ""
        self.module_variables: list[Variable] = []

    # ---- tokens ----

    def peek(self, ahead: int = 0) -> str:
        index = self.at + ahead
        return self.tokens[index].text if index < len(self.tokens) else ""

    @property
    def line(self) -> int:
        return self.tokens[min(self.at, len(self.tokens) - 1)].line if self.tokens else 1

    def next(self) -> str:
        if self.at >= len(self.tokens):
            raise PtxError(f"PTX line {self.line}: the text ends inside a statement")
        self.at += 1
        return self.tokens[self.at - 1].text

    def expect(self, text: str) -> None:
        line = self.line
        if (got := self.next()) != text:
            raise PtxError(f"PTX line {line}: expected {text!r} (got {got!r})")

    def accept(self, text: str) -> bool:
        if self.peek() == text:
            self.at += 1
            return True
        return False

    def integer(self) -> int:
        negative = self.accept("-")
        line, word = self.line, self.next()
        try:
            value = int(word.rstrip("U"), 0)
        except ValueError:
            raise PtxError(f"PTX line {line}: expected an integer (got {word!r})") from None
        return -value if negative else value

    # ---- module ----

    def module(self) -> list[Kernel]:
        kernels = []
        linkage = {".visible", ".weak", ".extern", ".common"}
        while self.at < len(self.tokens):
            line, word = self.line, self.next()
            if word == ".version" or word == ".address_size":
                self.next()
            elif word == ".target":
                self.target = self.next()
                while self.accept(","):
                    self.next()
            elif word in linkage or word == ";":
                continue
            elif word == ".entry":
                kernels.append(self.entry(line))
            elif word in (".shared", ".global", ".const"):
                self.module_variables.append(self.variable(word[1:], line))
            elif word in (".file", ".section"):
                raise PtxError(f"PTX line {line}: debug directive {word} is not supported")
            else:
                raise PtxError(f"PTX line {line}: unknown module directive {word!r}")
        for kernel in kernels:
            kernel.variables = self.module_variables + kernel.variables
        return kernels

    def variable(self, space: str, line: int) -> Variable:
        align, kind = 1, ""
        while self.peek().startswith("."):
            word = self.next()
            if word == ".align":
                align = self.integer()
            elif word[1:] in TYPE_BITS:
                kind = word[1:]
            elif word not in (".attribute", ".ptr"):
                raise PtxError(f"PTX line {line}: unknown variable attribute {word!r}")
        name = self.next()
        unit = TYPE_BITS[kind] // 8
        size: int | None = unit
        while self.accept("["):
            if self.accept("]"):
                size = None
            else:
                size = (size or 1) * self.integer()
                self.expect("]")
        initial = self.initialiser(kind, size, line) if self.accept("=") else None
        self.expect(";")
        return Variable(name, space, size, max(align, unit), initial, line)

    def initialiser(self, kind: str, size: int | None, line: int) -> bytes:
        values: list[bytes] = []
        unit = TYPE_BITS[kind] // 8
        depth = 0
        while True:
            if self.accept("{"):
                depth += 1
            elif self.accept("}"):
                depth -= 1
            elif not self.accept(","):
                literal = self.literal()
                pattern = literal.bits
                if pattern is None:
                    if isinstance(literal.value, float):
                        raise PtxError(f"PTX line {line}: decimal initialiser not supported")
                    pattern = literal.value & ((1 << 8 * unit) - 1)
                values.append(pattern.to_bytes(unit, "little"))
            if depth == 0:
                break
        return b"".join(values).ljust(size or 0, b"\0")

    def entry(self, line: int) -> Kernel:
        kernel = Kernel(self.next(), self.target, line)
        if self.accept("("):
            offset = 0
            while not self.accept(")"):
                offset = self.parameter(kernel, offset)
                self.accept(",")
        while self.peek() != "{":
            word = self.next()
            if word not in (
                ".reqntid", ".maxntid", ".minnctapersm", ".maxnreg", ".reqnctapercluster",
                ".explicitcluster", ".maxclusterrank", ".blocksareclusters",
            ):  # fmt: skip
                raise PtxError(f"PTX line {self.line}: unknown kernel directive {word!r}")
            numbers = []
            while self.tokens[self.at].kind == "number":
                numbers.append(self.integer())
                self.accept(",")
            kernel.directives[word[1:]] = tuple(numbers)
        _Body(self, kernel).parse()
        return kernel

    def parameter(self, kernel: Kernel, offset: int) -> int:
        line = self.line
        self.expect(".param")
        align, kind = 1, ""
        while self.peek().startswith("."):
            word = self.next()
            if word == ".align":
                align = self.integer()
            elif word[1:] in TYPE_BITS:
                kind = word[1:]
            elif word == ".ptr":
                while self.peek() in (".global", ".shared", ".const", ".local", ".align"):
                    if self.next() == ".align":
                        self.integer()
            else:
                raise PtxError(f"PTX line {line}: unknown parameter attribute {word!r}")
        name = self.next()
        size = TYPE_BITS[kind] // 8
        align = max(align, size)
        if self.accept("["):
            size *= self.integer()
            self.expect("]")
        offset = -(-offset // align) * align
        kernel.parameters.append(Parameter(name, kind, offset, size, align))
        return offset + size

    def literal(self) -> Immediate:
        negative = self.accept("-")
        line, word = self.line, self.next()
        head = word[:2].lower()
        if head == "0f" and len(word) == 10:
            bits = int(word[2:], 16)
            return Immediate(struct.unpack("<f", struct.pack("<I", bits))[0], bits)
        if head == "0d" and len(word) == 18:
            bits = int(word[2:], 16)
            return Immediate(struct.unpack("<d", struct.pack("<Q", bits))[0], bits)
        try:
            value = float(word) if "." in word else int(word.rstrip("U"), 0)
        except ValueError:
            raise PtxError(f"PTX line {line}: expected a literal (got {word!r})") from None
        return Immediate(-value if negative else value)


class _Body:
    """The braces of one entry."""

    def __init__(self, parser: _Parser, kernel: Kernel) -> None:
        self.parser = parser
        self.kernel = kernel
        self.pending: list[tuple[int, str, _Scope, int]] = []

    def parse(self) -> None:
        self.block(_Scope(None))
        for index, label, scope, line in self.pending:
            target = scope.label(label)
            if target is None:
                raise PtxError(f"PTX line {line}: no label {label!r}")
            old = self.kernel.instructions[index]
            self.kernel.instructions[index] = Instruction(
                old.index, old.line, old.text, old.opcode, old.operands, old.guard, target
            )

    def block(self, scope: _Scope) -> None:
        parser = self.parser
        parser.expect("{")
        while not parser.accept("}"):
            word = parser.peek()
            if word == "{":
                self.block(_Scope(scope))
            elif word == ";":
                parser.next()
            elif word == ".reg":
                self.declare(scope)
            elif word in (".shared", ".local"):
                line = parser.line
                parser.next()
                self.kernel.variables.append(parser.variable(word[1:], line))
            elif word in (".pragma", ".loc"):
                while parser.peek() not in (";",) and word == ".pragma":
                    parser.next()
                if word == ".loc":
                    raise PtxError(f"PTX line {parser.line}: .loc is not supported")
            elif parser.peek(1) == ":":
                scope.labels[parser.next()] = len(self.kernel.instructions)
                parser.next()
            else:
                self.instruction(scope)

    def declare(self, scope: _Scope) -> None:
        parser = self.parser
        line = parser.line
        parser.expect(".reg")
        kind = parser.next()[1:]
        if kind not in TYPE_BITS:
            raise PtxError(f"PTX line {line}: unknown register type .{kind}")
        while True:
            name = parser.next()
            if parser.accept("<"):
                names = [f"{name}{i}" for i in range(parser.integer())]
                parser.expect(">")
            else:
                names = [name]
            for each in names:
                register = Register(len(self.kernel.registers), kind, each)
                self.kernel.registers.append(register)
                scope.registers[each] = register
            if not parser.accept(","):
                break
        parser.expect(";")

    def instruction(self, scope: _Scope) -> None:
        parser = self.parser
        start, line = parser.at, parser.line
        guard = None
        if parser.accept("@"):
            negated = parser.accept("!")
            register = scope.register(parser.next())
            if register is None or register.type != "pred":
                raise PtxError(f"PTX line {line}: the guard is not a predicate register")
            guard = (register, negated)
        opcode = parser.next()
        operands: list[Operand] = []
        while not parser.accept(";"):
            operands.append(self.operand(scope))
            if not parser.accept(","):
                parser.expect(";")
                break
        index = len(self.kernel.instructions)
        if opcode.split(".")[0] == "bra":
            if len(operands) != 1 or not isinstance(operands[0], Symbol):
                raise PtxError(f"PTX line {line}: a branch takes one label")
            self.pending.append((index, operands[0].name, scope, line))
        self.kernel.instructions.append(
            Instruction(index, line, self.text(start), opcode, tuple(operands), guard)
        )

    def text(self, start: int) -> str:
        first = self.parser.tokens[start].line
        last = self.parser.tokens[self.parser.at - 1].line
        text = " ".join(line.strip() for line in self.parser.lines[first - 1 : last])
        return " ".join(text.split())

    def operand(self, scope: _Scope) -> Operand:
        first = self.simple(scope)
        if self.parser.accept("|"):
            return Pair(first, self.simple(scope))
        return first

    def simple(self, scope: _Scope) -> Operand:
        parser = self.parser
        line, word = parser.line, parser.peek()
        if word == "{":
            parser.next()
            items = []
            while not parser.accept("}"):
                items.append(self.simple(scope))
                parser.accept(",")
            return Vector(tuple(items))
        if word == "[":
            return self.address(scope)
        if word == "!":
            parser.next()
            register = scope.register(parser.next())
            if register is None:
                raise PtxError(f"PTX line {line}: `!` takes a predicate register")
            return Negated(register)
        if word == "-" or parser.tokens[parser.at].kind == "number":
            return parser.literal()
        parser.next()
        if word == "_":
            return Sink()
        register = scope.register(word)
        if register is not None:
            return register
        if word.startswith("%"):
            return Special(word)
        return Symbol(word)

    def address(self, scope: _Scope) -> Address:
        parser = self.parser
        parser.expect("[")
        base = self.simple(scope)
        offset = 0
        if parser.accept("+"):
            offset = parser.integer()
        elif parser.peek() == "-":
            offset = parser.integer()
        coordinates = None
        if parser.accept(","):
            vector = self.simple(scope)
            if not isinstance(vector, Vector):
                raise PtxError(f"PTX line {parser.line}: tensor coordinates take braces")
            coordinates = vector.items
        parser.expect("]")
        return Address(base, offset, coordinates)
