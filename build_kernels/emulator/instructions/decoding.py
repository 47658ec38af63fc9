"""The decoding of one instruction: its modifiers, and typed access to its operands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from build_kernels.binaries.ptx import syntax
from build_kernels.emulator.access.release import SCOPES
from build_kernels.emulator.access.state_spaces import SPACES
from build_kernels.emulator.execution.special_registers import CLOCKS, SPECIALS, special
from build_kernels.emulator.execution.warp import Run, Warp
from build_kernels.emulator.lanes import LANES, Array, Mask
from build_kernels.emulator.memory.access_records import GPU_SCOPE, WEAK
from build_kernels.emulator.numerics.types import DTYPE, STORAGE

_CACHE_OPERATORS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt")
_ORDERS = ("weak", "relaxed", "acquire", "release", "acq_rel", "volatile")


@dataclass(frozen=True)
class Source:
    """A source operand: `get(warp)` returns 32 values; `registers` are the ones it reads.

    That of one register returns `convert` of its value, if there is one to apply. values: those
    of an operand that is the same for every warp. steady: a warp always reads the same.
    """

    get: Callable[[Warp], Any]
    registers: tuple[int, ...] = ()
    constant: int | float | None = None
    convert: Callable[[Array], Array] | None = None
    values: Array | None = None
    steady: bool = True


@dataclass(frozen=True)
class Destination:
    """A register to write, after `convert` if there is one; -1 drops the value."""

    register: int = -1
    convert: Callable[[Array], Array] | None = None

    def __call__(self, w: Warp, value: Array, taint: Mask | None) -> None:
        """Write 32 values, and their poison."""
        if self.register >= 0:
            w.put(self.register, value if self.convert is None else self.convert(value), taint)

    def converted(self, value: Array) -> Array:
        """Return a value as the register holds it."""
        return value if self.convert is None else self.convert(value)


def of_register(index: int, convert: Callable[[Array], Array] | None) -> Source:
    """Return a register as a source."""
    if convert is None:
        return Source(lambda w: w.r[index], (index,))
    return Source(lambda w: convert(w.r[index]), (index,), None, convert)


@dataclass(frozen=True, kw_only=True)
class Context:
    """Inputs of decoding beside the instruction.

    shared: offsets of shared variables. parameters: offsets in parameter space, of
    parameter_bytes. addresses: of other variables. approximate: functions to use for approximate
    instructions, by opcode.
    """

    arch: str
    shared: Mapping[str, int]
    parameters: Mapping[str, int]
    parameter_bytes: int
    addresses: Mapping[str, int]
    approximate: Mapping[str, Callable[[Array], Array]]


class Decoding:
    """One instruction while it is decoded.

    name: the opcode's prefix that chose the decoder. left: the modifiers that are not taken yet;
    one that stays is an error.
    """

    def __init__(self, instruction: syntax.Instruction, context: Context, prefix: int) -> None:
        self.instruction = instruction
        self.context = context
        self.name = ".".join(instruction.words[:prefix])
        self.left = list(instruction.words[prefix:])
        self.operands = instruction.operands

    def error(self, why: str) -> syntax.UnsupportedPtx:
        return self.instruction.error(why)

    def take(self, *words: str) -> bool:
        """Take the first of these words that is present; False if none is."""
        return self.one_of(*words) is not None

    def one_of(self, *words: str) -> str | None:
        """Take and return the first of these words that is present."""
        for word in self.left:
            if word in words:
                self.left.remove(word)
                return word
        return None

    def need(self, *words: str) -> str:
        """Take and return one of these words; it must be present."""
        word = self.one_of(*words)
        if word is None:
            raise self.error(f"needs one of the modifiers {', '.join(words)}")
        return word

    def type(self) -> str:
        """Take and return the last word, which must be a type."""
        if not self.left or self.left[-1] not in DTYPE:
            raise self.error("ends in no type that the emulator supports")
        return self.left.pop()

    def done(self) -> None:
        """Refuse words that were not taken."""
        if self.left:
            raise self.error(f"unknown modifier .{self.left[0]}")

    def cta_group(self) -> int:
        """Take .cta_group; return the number of CTAs."""
        return int(self.need("cta_group::1", "cta_group::2")[-1])

    def vector(self, *words: str) -> int:
        """Take one of the vector words that is present; return the number of elements."""
        return int((self.one_of(*words) or "v1")[1:])

    def space(self) -> str:
        """Take and return the state space; empty for generic addresses."""
        return self.one_of(*SPACES) or ""

    def cache_hints(self) -> bool:
        """Take words that steer caches only; True if a cache-policy operand follows."""
        self.one_of(*_CACHE_OPERATORS)
        hints = [word for word in self.left if word.startswith(("L1::", "L2::"))]
        self.left = [word for word in self.left if word not in hints]
        return "L2::cache_hint" in hints

    def order(self, default: str) -> tuple[str, int]:
        """Take the memory order and the scope; return both, WEAK for a weak access."""
        order = self.one_of(*_ORDERS) or default
        scope = self.one_of(*SCOPES)
        if order == "volatile":
            return "relaxed", GPU_SCOPE
        if order == "weak":
            return order, WEAK
        return order, SCOPES[scope] if scope else GPU_SCOPE

    def source(self, operand: syntax.Operand, kind: str) -> Source:
        """Return an operand as a source of 32 values of `kind`."""
        dtype = DTYPE[kind]
        if isinstance(operand, syntax.Register):
            return self._register(operand, kind)
        if isinstance(operand, syntax.Immediate):
            values = self._constant(operand, kind)
            return Source(lambda w: values, (), operand.value, values=values)
        if isinstance(operand, syntax.Negated):
            return of_register(operand.register.index, np.logical_not)
        if isinstance(operand, syntax.Special):
            name = operand.name
            if name not in SPECIALS:
                raise self.error(f"unknown special register {name}")
            return Source(lambda w: special(w, name, dtype), steady=name not in CLOCKS)
        if isinstance(operand, syntax.Symbol):
            return self._symbol(operand.name, dtype)
        raise self.error(f"operand {operand} cannot be read as .{kind}")

    def _register(self, register: syntax.Register, kind: str) -> Source:
        dtype, index, width = DTYPE[kind], register.index, syntax.TYPE_BITS[register.type]
        if width < syntax.TYPE_BITS[kind] or (kind == "pred") != (register.type == "pred"):
            raise self.error(f"{register.name} (.{register.type}) is read as .{kind}")
        if STORAGE[width] is dtype:
            return of_register(index, None)
        if width == syntax.TYPE_BITS[kind]:
            return of_register(index, lambda a: a.view(dtype))
        narrow = STORAGE[syntax.TYPE_BITS[kind]]
        return of_register(index, lambda a: a.astype(narrow).view(dtype))

    def _constant(self, literal: syntax.Immediate, kind: str) -> Array:
        dtype, value = np.dtype(DTYPE[kind]), literal.value
        if literal.bits is not None:
            if kind == "f64" and literal.bits < 1 << 32:
                raise self.error("a 0f literal is not a .f64")
            raw = literal.bits.to_bytes(8, "little")[: dtype.itemsize]
            return np.frombuffer(raw * LANES, dtype=dtype)
        if kind == "pred":
            return np.full(LANES, value != 0)
        if dtype.kind == "f":
            return np.full(LANES, value, dtype=dtype)
        if isinstance(value, float):
            raise self.error("a floating-point literal for an integer operand")
        raw = (value & ((1 << 8 * dtype.itemsize) - 1)).to_bytes(dtype.itemsize, "little")
        return np.frombuffer(raw * LANES, dtype=dtype)

    def _symbol(self, name: str, dtype: Any) -> Source:
        context = self.context
        if name in context.shared:
            offset = context.shared[name]
            return Source(lambda w: np.full(LANES, w.cta.shared_base + offset, dtype=dtype))
        if name in context.parameters or name in context.addresses:
            where = context.parameters.get(name, context.addresses.get(name, 0))
            values = np.full(LANES, where, dtype=dtype)
            return Source(lambda w: values, values=values)
        raise self.error(f"unknown symbol {name}")

    def destination(self, operand: syntax.Operand, kind: str) -> Destination:
        """Return the operand as a destination of 32 values of `kind`.

        A register wider than the value is zero-extended, or sign-extended for signed kinds
        (PTX ISA, "Operand Size Exceeding Instruction-Type Size")."""
        if isinstance(operand, syntax.Sink):
            return Destination()
        if not isinstance(operand, syntax.Register):
            raise self.error(f"cannot write to {operand}")
        index, width = operand.index, syntax.TYPE_BITS[operand.type]
        storage = STORAGE[width]
        if width < syntax.TYPE_BITS[kind] or (kind == "pred") != (operand.type == "pred"):
            raise self.error(f"{operand.name} (.{operand.type}) is written as .{kind}")
        if width == syntax.TYPE_BITS[kind]:
            if STORAGE[width] is DTYPE[kind]:
                return Destination(index)
            return Destination(index, lambda a: a.view(storage))
        if DTYPE[kind] is np.float16:
            return Destination(index, lambda a: a.view(np.uint16).astype(storage))
        return Destination(index, lambda a: a.astype(storage))

    def is_wider(self, operand: syntax.Operand, kind: str) -> bool:
        """Return whether an operand is a register that is wider than the type."""
        if not isinstance(operand, syntax.Register):
            return False
        return syntax.TYPE_BITS[operand.type] > syntax.TYPE_BITS[kind]

    def pair(self, first: str, second: str) -> tuple[Destination, Destination]:
        """Return the destinations of d|p; the second writes nothing if there is none."""
        target = self.operands[0]
        if not isinstance(target, syntax.Pair):
            target = syntax.Pair(target, syntax.Sink())
        return self.destination(target.first, first), self.destination(target.second, second)

    def address(self, operand: syntax.Operand) -> Source:
        """Return an address operand as a source of 32 int64 byte addresses.

        Its constant is the offset of a parameter, if it is one."""
        if not isinstance(operand, syntax.Address):
            raise self.error(f"expected an address (got {operand})")
        base, offset = operand.base, operand.offset
        narrow = isinstance(base, syntax.Register) and syntax.TYPE_BITS[base.type] != 64
        inner = self.source(base, "u32" if narrow else "u64")
        known = self.context.parameters.get(base.name) if isinstance(base, syntax.Symbol) else None
        constant = None if known is None else known + offset

        if offset == 0:
            return Source(lambda w: inner.get(w).astype(np.int64), inner.registers, constant)
        return Source(lambda w: inner.get(w).astype(np.int64) + offset, inner.registers, constant)


Decoder = Callable[[Decoding], Run]


def always(run: Run) -> Decoder:
    """Return the decoder of an instruction without modifiers and operands."""
    return lambda d: run


def items(operand: syntax.Operand) -> tuple[syntax.Operand, ...]:
    """Return the parts of a vector operand, or the operand alone."""
    return operand.items if isinstance(operand, syntax.Vector) else (operand,)


def registers_of(sources: Iterable[Source]) -> tuple[int, ...]:
    """Return the registers that these sources read."""
    return tuple(r for s in sources for r in s.registers)
