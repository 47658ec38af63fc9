"""Logic, shifts and bit fields (PTX ISA, "Logic and Shift Instructions")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from build_kernels.emulator.execution.warp import LANES, Array, Run
from build_kernels.emulator.instructions.elementwise import build, runner
from build_kernels.emulator.instructions.operands import (
    DTYPE,
    Context,
    Modifiers,
    destination,
    source,
)
from build_kernels.emulator.ptx.syntax import TYPE_BITS, Instruction


def logic(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    mods.done()
    name = ins.words[0]
    if name == "not":
        return build(ins, context, kind, [kind], np.invert)
    if name == "cnot":
        return build(ins, context, kind, [kind], lambda a: (a == 0).astype(a.dtype))
    table: dict[str, Callable[..., Array]] = {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    return build(ins, context, kind, [kind, kind], table[name])


def shift(ins: Instruction, context: Context) -> Run:
    """shl and shr: amounts of the width or more give zero, or the sign (PTX ISA, "shl", "shr")."""
    mods = Modifiers(ins)
    kind = mods.type()
    mods.done()
    bits = TYPE_BITS[kind]
    last = np.uint32(bits - 1)
    left = ins.words[0] == "shl"

    def compute(a: Array, amount: Array) -> Array:
        far = amount > last
        by = np.minimum(amount, last).astype(a.dtype)
        result = a << by if left else a >> by
        if far.any():
            full = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" and not left else 0
            result = np.where(far, full, result).astype(a.dtype)
        return result

    return build(ins, context, kind, [kind, "u32"], compute)


def funnel(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    way, mode = mods.need("l", "r"), mods.need("wrap", "clamp")
    kind = mods.type()
    mods.done()

    def compute(low: Array, high: Array, amount: Array) -> Array:
        wide = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        by = np.minimum(amount, 32) if mode == "clamp" else amount & np.uint32(31)
        if way == "l":
            return (wide << by.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)
        return (wide >> by.astype(np.uint64)).astype(np.uint32)

    return build(ins, context, kind, ["u32", "u32", "u32"], compute)


def lop3(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    mods.done()
    if len(ins.operands) != 5:
        raise ins.error("takes 5 operands")
    table = source(ins, ins.operands[4], "u32", context).constant
    if not isinstance(table, int):
        raise ins.error("needs a literal lookup table")
    sources = [source(ins, operand, kind, context) for operand in ins.operands[1:4]]
    terms = [i for i in range(8) if table >> i & 1]

    def compute(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros_like(a)
        for i in terms:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return runner(sources, destination(ins, ins.operands[0], kind), compute)


def extract(ins: Instruction, context: Context) -> Run:
    """bfe (PTX ISA, "bfe"): past the top, .s replicates the sign bit."""
    mods = Modifiers(ins)
    kind = mods.type()
    mods.done()
    bits = TYPE_BITS[kind]

    def one(value: int, start: int, length: int) -> int:
        field = (value & ((1 << bits) - 1)) >> start & ((1 << length) - 1)
        if kind[0] == "s" and length:
            top = min(start + length - 1, bits - 1)
            if value >> top & 1:
                field |= -1 << min(length, max(bits - start, 0))
        return field & ((1 << bits) - 1)

    def compute(a: Array, start: Array, length: Array) -> Array:
        found = [
            one(int(v), int(s) & 255, int(n) & 255)
            for v, s, n in zip(a, start, length, strict=True)
        ]
        return np.array(found, dtype=np.uint64).astype(f"u{bits // 8}").view(a.dtype)

    return build(ins, context, kind, [kind, "u32", "u32"], compute)


def insert(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    mods.done()
    bits = TYPE_BITS[kind]
    whole = (1 << bits) - 1

    def one(field: int, base: int, start: int, length: int) -> int:
        mask = (((1 << length) - 1) << start) & whole
        return (base & ~mask) | (field << start & mask)

    def compute(a: Array, b: Array, start: Array, length: Array) -> Array:
        found = [
            one(int(f), int(v), int(s) & 255, int(n) & 255)
            for f, v, s, n in zip(a, b, start, length, strict=True)
        ]
        return np.array(found, dtype=np.uint64).astype(a.dtype)

    return build(ins, context, kind, [kind, kind, "u32", "u32"], compute)


def permute(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    mods.need("b32")
    mods.done()

    def compute(a: Array, b: Array, select: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        result = np.zeros(LANES, dtype=np.uint32)
        for i in range(4):
            nibble = (select >> np.uint32(4 * i)) & np.uint32(15)
            byte = both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))
            byte = (byte & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return result

    return build(ins, context, "b32", ["b32", "b32", "b32"], compute)


def count(ins: Instruction, context: Context) -> Run:
    """popc, clz, brev, bfind."""
    name = ins.words[0]
    mods = Modifiers(ins)
    kind = mods.type()
    shift_amount = name == "bfind" and mods.take("shiftamt")
    mods.done()
    bits = TYPE_BITS[kind]
    whole = (1 << bits) - 1

    def one(value: int) -> int:
        if name == "brev":
            return int(f"{value & whole:0{bits}b}"[::-1], 2)
        if name == "bfind" and kind[0] == "s" and value < 0:
            value = ~value
        value &= whole
        if name == "popc":
            return value.bit_count()
        if name == "clz":
            return bits - value.bit_length()
        if value == 0:
            return 0xFFFFFFFF
        top = value.bit_length() - 1
        return bits - 1 - top if shift_amount else top

    result = kind if name == "brev" else "u32"

    def compute(a: Array) -> Array:
        return np.array([one(int(v)) for v in a], dtype=np.uint64).astype(DTYPE[result])

    return build(ins, context, result, [kind], compute)


def predicate_logic(ins: Instruction, context: Context) -> Run:
    """and, or, xor, not of predicates."""
    name = ins.words[0]
    table: dict[str, Callable[..., Array]] = {
        "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
        "not": np.logical_not, "mov": lambda a: a,
    }  # fmt: skip
    arity = 1 if name in ("not", "mov") else 2
    return build(ins, context, "pred", ["pred"] * arity, table[name])


def logic_or_predicates(ins: Instruction, context: Context) -> Run:
    return predicate_logic(ins, context) if ins.words[-1] == "pred" else logic(ins, context)
