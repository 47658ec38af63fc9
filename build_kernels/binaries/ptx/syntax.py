"""The objects of parsed PTX: operands, instructions, variables, a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

TYPE_BITS = {
    "pred": 1,
    **{f"{k}{n}": n for k in "bsu" for n in (8, 16, 32, 64)},
    "f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32": 32, "f64": 64,
    "f32x2": 64, "b128": 128,
}  # fmt: skip


class UnsupportedPtx(ValueError):
    """PTX text that cannot be read or decoded; the message names the line."""


@dataclass(frozen=True)
class Register:
    """A virtual register: its index in the warp's register file and its declared type."""

    index: int
    type: str
    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal; `bits` is the bit pattern of a 0f or 0d literal."""

    value: int | float
    bits: int | None = None


@dataclass(frozen=True)
class Special:
    """A special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The name of a variable, a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Sink:
    """`_`: a destination that drops the result."""


@dataclass(frozen=True)
class Negated:
    """`!%p` as a source operand."""

    register: Register


@dataclass(frozen=True)
class Pair:
    """`d|p`: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`, or `[base, {coordinates}]` for a tensor map."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] | None = None


Operand = Register | Immediate | Special | Symbol | Sink | Negated | Pair | Vector | Address


@dataclass(frozen=True)
class Instruction:
    """One instruction; `target` is the index that a branch goes to, `guard` (register, negated).

    span: where it begins and ends in the module's text, with its guard and its semicolon.
    """

    index: int
    line: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None = None
    target: int | None = None
    span: tuple[int, int] = (0, 0)

    @cached_property
    def words(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    def error(self, why: str) -> UnsupportedPtx:
        return UnsupportedPtx(f"PTX line {self.line}: {why}: `{self.text}`")


@dataclass(frozen=True)
class EntryParameter:
    """A parameter of an .entry: `offset`, `size` in bytes; `type` is b8 for an array of bytes."""

    name: str
    type: str
    offset: int
    size: int
    align: int


@dataclass(frozen=True)
class Variable:
    """A module or kernel variable; `size` is None for extern shared memory."""

    name: str
    space: str
    size: int | None
    align: int
    initial: bytes | None
    line: int


@dataclass(eq=False)
class Kernel:
    """One .entry of a module; complete once it is parsed.

    target: the module's .target. directives: numbers of the performance directives, by name.
    instructions: in the order of the text.
    """

    name: str
    target: str
    line: int
    parameters: list[EntryParameter] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def moved_accumulators(self) -> frozenset[int]:
        """Return the registers that only wgmma, and moves of such registers or constants, write."""
        moves: dict[int, list[Operand]] = {}
        others: set[int] = set()
        for instruction in self.instructions:
            if instruction.words[0] == "wgmma" or not instruction.operands:
                continue
            target = instruction.operands[0]
            if instruction.words[0] == "mov" and isinstance(target, Register):
                moves.setdefault(target.index, []).append(instruction.operands[1])
                continue
            parts = target.items if isinstance(target, Vector) else (target,)
            others |= {part.index for part in parts if isinstance(part, Register)}
        kept = {register.index for register in self.registers} - others
        while True:
            bad = {
                index
                for index in kept & moves.keys()
                for origin in moves[index]
                if not isinstance(origin, Immediate)
                and not (isinstance(origin, Register) and origin.index in kept)
            }
            if not bad:
                return frozenset(kept)
            kept -= bad

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)
