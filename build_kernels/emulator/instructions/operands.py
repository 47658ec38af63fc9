"""Typed access to operands: decode-time closures that read and write a warp's registers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.execution.warp import LANES, STORAGE, Mask, Warp
from build_kernels.emulator.ptx.syntax import (
    TYPE_BITS,
    Address,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)

Array = NDArray[Any]

DTYPE: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A source operand: `get(warp)` gives 32 values; `registers` are those it reads."""

    get: Callable[[Warp], Array]
    registers: tuple[int, ...] = ()
    constant: int | float | None = None


@dataclass(frozen=True, kw_only=True)
class Context:
    """What decoding needs to know beside the instruction.

    shared: offsets of shared variables; parameters: offsets in parameter space; addresses: of
    other variables; approximate: functions to use for approximate instructions, by opcode."""

    arch: str
    shared: Mapping[str, int]
    parameters: Mapping[str, int]
    addresses: Mapping[str, int]
    approximate: Mapping[str, Callable[[Array], Array]] = field(default_factory=dict)


class Modifiers:
    """The words after the opcode; whatever is not taken is an error."""

    def __init__(self, instruction: Instruction, skip: int = 1) -> None:
        self.instruction = instruction
        self.left = list(instruction.words[skip:])

    def take(self, *words: str) -> bool:
        """Remove the first of these words that is present; False when none is."""
        return self.one_of(*words) is not None

    def one_of(self, *words: str) -> str | None:
        for word in self.left:
            if word in words:
                self.left.remove(word)
                return word
        return None

    def need(self, *words: str) -> str:
        word = self.one_of(*words)
        if word is None:
            raise self.instruction.error(f"needs one of the modifiers {', '.join(words)}")
        return word

    def type(self) -> str:
        """Remove and return the last word, which must be a type."""
        if not self.left or self.left[-1] not in DTYPE:
            raise self.instruction.error("ends in no type that the emulator knows")
        return self.left.pop()

    def done(self) -> None:
        if self.left:
            raise self.instruction.error(f"unknown modifier .{self.left[0]}")


def constant(value: int | float, kind: str, bits: int | None, error: Instruction) -> Array:
    """32 copies of a literal as `kind`."""
    dtype = np.dtype(DTYPE[kind])
    if bits is not None:
        if kind == "f64" and bits < 1 << 32:
            raise error.error("a 0f literal is not a .f64")
        raw = bits.to_bytes(8, "little")[: dtype.itemsize]
        return np.frombuffer(raw * LANES, dtype=dtype)
    if kind == "pred":
        return np.full(LANES, value != 0)
    if dtype.kind == "f":
        return np.full(LANES, value, dtype=dtype)
    if isinstance(value, float):
        raise error.error("a floating-point literal for an integer operand")
    raw = (value & ((1 << 8 * dtype.itemsize) - 1)).to_bytes(dtype.itemsize, "little")
    return np.frombuffer(raw * LANES, dtype=dtype)


def source(instruction: Instruction, operand: Operand, kind: str, context: Context) -> Source:
    """The operand as 32 values of `kind`."""
    dtype = DTYPE[kind]
    if isinstance(operand, Register):
        index, width = operand.index, TYPE_BITS[operand.type]
        if width < TYPE_BITS[kind] or (kind == "pred") != (operand.type == "pred"):
            raise instruction.error(f"{operand.name} (.{operand.type}) is read as .{kind}")
        if STORAGE[width] is dtype:
            return Source(lambda w: w.r[index], (index,))
        if width == TYPE_BITS[kind]:
            return Source(lambda w: w.r[index].view(dtype), (index,))
        narrow = STORAGE[TYPE_BITS[kind]]
        return Source(lambda w: w.r[index].astype(narrow).view(dtype), (index,))
    if isinstance(operand, Immediate):
        values = constant(operand.value, kind, operand.bits, instruction)
        return Source(lambda w: values, (), operand.value)
    if isinstance(operand, Negated):
        index = operand.register.index
        return Source(lambda w: ~w.r[index], (index,))
    if isinstance(operand, Special):
        name = operand.name
        if name not in SPECIALS:
            raise instruction.error(f"unknown special register {name}")
        return Source(lambda w: _special(w, name, dtype))
    if isinstance(operand, Symbol):
        return _symbol(instruction, operand.name, dtype, context)
    raise instruction.error(f"operand {operand} cannot be read as .{kind}")


def _symbol(instruction: Instruction, name: str, dtype: Any, context: Context) -> Source:
    if name in context.shared:
        offset = context.shared[name]
        return Source(lambda w: np.full(LANES, w.cta.shared_base + offset, dtype=dtype))
    if name in context.parameters or name in context.addresses:
        where = context.parameters.get(name, context.addresses.get(name, 0))
        values = np.full(LANES, where, dtype=dtype)
        return Source(lambda w: values)
    raise instruction.error(f"unknown symbol {name}")


def destination(
    instruction: Instruction, operand: Operand, kind: str
) -> Callable[[Warp, Array, Mask | None], None]:
    """A function that writes 32 values of `kind` to the operand.

    A register wider than the value is zero-extended, or sign-extended for signed kinds
    (PTX ISA, "Operand Size Exceeding Instruction-Type Size")."""
    if isinstance(operand, Sink):
        return lambda w, value, taint: None
    if not isinstance(operand, Register):
        raise instruction.error(f"cannot write to {operand}")
    index, width = operand.index, TYPE_BITS[operand.type]
    storage = STORAGE[width]
    if width < TYPE_BITS[kind] or (kind == "pred") != (operand.type == "pred"):
        raise instruction.error(f"{operand.name} (.{operand.type}) is written as .{kind}")
    if width == TYPE_BITS[kind]:
        if STORAGE[width] is DTYPE[kind]:
            return lambda w, value, taint: w.put(index, value, taint)
        return lambda w, value, taint: w.put(index, value.view(storage), taint)
    if DTYPE[kind] is np.float16:
        return lambda w, value, taint: w.put(index, value.view(np.uint16).astype(storage), taint)
    return lambda w, value, taint: w.put(index, value.astype(storage), taint)


def items(operand: Operand) -> tuple[Operand, ...]:
    """The parts of a vector operand, or the operand alone."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def address(instruction: Instruction, operand: Operand, context: Context) -> Source:
    """An address operand as 32 int64 byte addresses."""
    if not isinstance(operand, Address):
        raise instruction.error(f"expected an address (got {operand})")
    base, offset = operand.base, operand.offset
    if isinstance(base, Register):
        wide = "u64" if TYPE_BITS[base.type] == 64 else "u32"
        inner = source(instruction, base, wide, context)
    else:
        inner = source(instruction, base, "u64", context)
    if offset == 0:
        return Source(lambda w: inner.get(w).astype(np.int64), inner.registers)
    return Source(lambda w: inner.get(w).astype(np.int64) + offset, inner.registers)


def registers_of(sources: Iterable[Source]) -> tuple[int, ...]:
    return tuple(r for s in sources for r in s.registers)


SPECIALS = frozenset(
    f"%{name}{axis}"
    for name in (
        "tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid", "cluster_ctaid",
        "cluster_nctaid",
    )
    for axis in (".x", ".y", ".z")
) | {
    "%laneid", "%warpid", "%nwarpid", "%cluster_ctarank", "%cluster_nctarank",
    "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge",
    "%is_explicit_cluster", "%clock", "%clock64", "%globaltimer", "%globaltimer_lo", "%smid",
    "%dynamic_smem_size", "%total_smem_size",
}  # fmt: skip


def _special(warp: Warp, name: str, dtype: Any) -> Array:
    if name in ("%clock", "%clock64", "%globaltimer", "%globaltimer_lo"):
        return np.full(LANES, warp.machine.steps, dtype=np.uint64).astype(dtype)
    values = warp.specials.get(name)
    if values is None:
        values = warp.specials[name] = warp.cta.special(warp, name)
    return values.astype(dtype)
