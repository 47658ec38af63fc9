"""Logic, shifts and bit fields (PTX ISA, "Logic and Shift Instructions")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from build_kernels.binaries.ptx.syntax import TYPE_BITS
from build_kernels.emulator.execution.warp import Run
from build_kernels.emulator.instructions.decoding import Decoder, Decoding
from build_kernels.emulator.instructions.elementwise import Compute, Elementwise, build
from build_kernels.emulator.lanes import LANES, Array, any_of
from build_kernels.emulator.numerics.types import DTYPE

_LOGIC: dict[str, tuple[int, Compute, Compute]] = {
    "and": (2, np.bitwise_and, np.logical_and),
    "or": (2, np.bitwise_or, np.logical_or),
    "xor": (2, np.bitwise_xor, np.logical_xor),
    "not": (1, np.invert, np.logical_not),
}


def logic(d: Decoding) -> Run:
    kind = d.type()
    arity, of_bits, of_predicates = _LOGIC[d.name]
    compute = of_predicates if kind == "pred" else of_bits
    return build(d, kind, [kind] * arity, compute)


def is_zero(d: Decoding) -> Run:
    kind = d.type()
    return build(d, kind, [kind], lambda a: (a == 0).astype(a.dtype))


def shift(d: Decoding) -> Run:
    """Decode shl and shr; an amount of the width or more gives zero, or the sign."""
    kind = d.type()
    bits = TYPE_BITS[kind]
    last = np.uint32(bits - 1)
    left = d.name == "shl"
    known = d.source(d.operands[-1], "u32").constant
    if isinstance(known, int) and 0 <= known < bits and len(d.operands) == 3:
        by = DTYPE[kind](known)
        move = np.left_shift if left else np.right_shift
        source = d.source(d.operands[1], kind)
        return Elementwise([source], [d.destination(d.operands[0], kind)], lambda a: move(a, by))

    def compute(a: Array, amount: Array) -> Array:
        far = amount > last
        by = np.minimum(amount, last).astype(a.dtype)
        result = a << by if left else a >> by
        if any_of(far):
            full = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" and not left else 0
            result = np.where(far, full, result).astype(a.dtype)
        return result

    return build(d, kind, [kind, "u32"], compute)


def funnel(d: Decoding) -> Run:
    way, mode = d.need("l", "r"), d.need("wrap", "clamp")
    kind = d.type()

    def compute(low: Array, high: Array, amount: Array) -> Array:
        wide = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        by = np.minimum(amount, 32) if mode == "clamp" else amount & np.uint32(31)
        if way == "l":
            return (wide << by.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)
        return (wide >> by.astype(np.uint64)).astype(np.uint32)

    return build(d, kind, ["u32", "u32", "u32"], compute)


def lop3(d: Decoding) -> Run:
    kind = d.type()
    if len(d.operands) != 5:
        raise d.error("takes 5 operands")
    table = d.source(d.operands[4], "u32").constant
    if not isinstance(table, int):
        raise d.error("needs a literal lookup table")
    sources = [d.source(operand, kind) for operand in d.operands[1:4]]
    terms = [i for i in range(8) if table >> i & 1]

    def compute(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros_like(a)
        for i in terms:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return Elementwise(sources, [d.destination(d.operands[0], kind)], compute)


def extract(d: Decoding) -> Run:
    """Decode bfe; past the top, .s replicates the sign bit (PTX ISA, "bfe")."""
    kind = d.type()
    bits = TYPE_BITS[kind]

    def one(value: int, start: int, length: int) -> int:
        start, length = start & 255, length & 255
        field = (value & ((1 << bits) - 1)) >> start & ((1 << length) - 1)
        if kind[0] == "s" and length:
            top = min(start + length - 1, bits - 1)
            if value >> top & 1:
                field |= -1 << min(length, max(bits - start, 0))
        return field & ((1 << bits) - 1)

    return build(d, kind, [kind, "u32", "u32"], _each(one, kind))


def insert(d: Decoding) -> Run:
    kind = d.type()
    bits = TYPE_BITS[kind]
    whole = (1 << bits) - 1

    def one(field: int, base: int, start: int, length: int) -> int:
        start, length = start & 255, length & 255
        mask = (((1 << length) - 1) << start) & whole
        return (base & ~mask) | (field << start & mask)

    return build(d, kind, [kind, kind, "u32", "u32"], _each(one, kind))


def permute(d: Decoding) -> Run:
    d.need("b32")

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

    return build(d, "b32", ["b32", "b32", "b32"], compute)


def count(d: Decoding) -> Run:
    name = d.name
    kind = d.type()
    shift_amount = name == "bfind" and d.take("shiftamt")
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
    return build(d, result, [kind], _each(one, result))


def _each(one: Callable[..., int], kind: str) -> Compute:
    """Return a function that computes each lane's unsigned result as `kind` on its own."""
    unsigned, dtype = DTYPE[f"b{TYPE_BITS[kind]}"], DTYPE[kind]

    def compute(*operands: Array) -> Array:
        lanes = zip(*(each.tolist() for each in operands), strict=True)
        return np.array([one(*values) for values in lanes], np.uint64).astype(unsigned).view(dtype)

    return compute


INSTRUCTIONS: dict[str, Decoder] = {
    **dict.fromkeys(_LOGIC, logic),
    "cnot": is_zero,
    **dict.fromkeys(("shl", "shr"), shift),
    "shf": funnel,
    "lop3": lop3,
    "bfe": extract,
    "bfi": insert,
    "prmt": permute,
    **dict.fromkeys(("popc", "clz", "brev", "bfind"), count),
}
