"""What PTX text is parsed into: operands, instructions, a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from build_kernels.emulator.findings import PtxError

TYPE_BITS = {
    "pred": 1,
    **{f"{k}{n}": n for k in "bsu" for n in (8, 16, 32, 64)},
    "f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32": 32, "f64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Register:
    """A virtual register: its index in the warp's register file and its declared type."""

    index: int
    type: str
    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal. `bits` is set for 0f and 0d literals, whose bit pattern is given."""

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
    """`_`: the result is thrown away."""


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
    """One instruction. `target` is the index a branch goes to; `guard` is (register, negated)."""

    index: int
    line: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None = None
    target: int | None = None

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The opcode and its modifiers."""
        return tuple(self.opcode.split("."))

    def error(self, why: str) -> PtxError:
        return PtxError(f"PTX line {self.line}: {why}: `{self.text}`")


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter; `offset` and `size` in bytes, `type` is b8 for an array of bytes."""

    name: str
    type: str
    offset: int
    size: int
    align: int


@dataclass(frozen=True)
class Variable:
    """A module or kernel variable. `size` None: extern shared memory, sized by the launch."""

    name: str
    space: str
    size: int | None
    align: int
    initial: bytes | None
    line: int


@dataclass
class Kernel:
    """One .entry of a module."""

    name: str
    target: str
    line: int
    parameters: list[Parameter] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)
