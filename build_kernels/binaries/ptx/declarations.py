"""Declarations of variables and parameters (PTX ISA, "State Spaces, Types, and Variables")."""

from __future__ import annotations

from build_kernels.binaries.ptx.syntax import TYPE_BITS, EntryParameter, Variable
from build_kernels.binaries.ptx.tokens import TokenCursor


def _alignment_and_type(cursor: TokenCursor, what: str, line: int) -> tuple[int, str]:
    """Read the words before a name; the target of a .ptr is passed over."""
    align, kind = 1, ""
    while cursor.peek().startswith("."):
        word = cursor.next()
        if word == ".align":
            align = cursor.integer()
        elif word[1:] in TYPE_BITS:
            kind = word[1:]
        elif word == ".ptr":
            while cursor.peek() in (".global", ".shared", ".const", ".local", ".align"):
                if cursor.next() == ".align":
                    cursor.integer()
        else:
            raise cursor.error(f"unknown {what} attribute {word!r}", line)
    return align, kind


def read_variable(cursor: TokenCursor, space: str, line: int) -> Variable:
    """Read a variable, from behind its state space to its semicolon."""
    align, kind = _alignment_and_type(cursor, "variable", line)
    name = cursor.next()
    unit = TYPE_BITS[kind] // 8
    size: int | None = unit
    while cursor.accept("["):
        if cursor.accept("]"):
            size = None
        else:
            size = (size or 1) * cursor.integer()
            cursor.expect("]")
    initial = _initialiser(cursor, unit, size, line) if cursor.accept("=") else None
    cursor.expect(";")
    return Variable(name, space, size, max(align, unit), initial, line)


def _initialiser(cursor: TokenCursor, unit: int, size: int | None, line: int) -> bytes:
    """Read literals in nested braces; `unit` is the size of each in bytes."""
    values: list[bytes] = []
    depth = 0
    while True:
        if cursor.accept("{"):
            depth += 1
        elif cursor.accept("}"):
            depth -= 1
        elif not cursor.accept(","):
            literal = cursor.literal()
            pattern = literal.bits
            if pattern is None:
                if isinstance(literal.value, float):
                    raise cursor.error("decimal initialiser not supported", line)
                pattern = literal.value & ((1 << 8 * unit) - 1)
            values.append(pattern.to_bytes(unit, "little"))
        if depth == 0:
            return b"".join(values).ljust(size or 0, b"\0")


def read_parameter(cursor: TokenCursor, end: int) -> EntryParameter:
    """Read a parameter of an .entry; `end` is the end of the one before it."""
    line = cursor.line
    cursor.expect(".param")
    align, kind = _alignment_and_type(cursor, "parameter", line)
    name = cursor.next()
    size = TYPE_BITS[kind] // 8
    align = max(align, size)
    if cursor.accept("["):
        size *= cursor.integer()
        cursor.expect("]")
    return EntryParameter(name, kind, -(-end // align) * align, size, align)
