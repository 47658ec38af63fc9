"""Integer, floating-point, logic, comparison and conversion instructions (PTX ISA 9.7.1-9.7.9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator import floats
from build_kernels.emulator.operands import (
    DTYPE,
    Context,
    Modifiers,
    Source,
    destination,
    registers_of,
    source,
)
from build_kernels.emulator.ptx import TYPE_BITS, Instruction, Operand, Pair, Register, Vector
from build_kernels.emulator.warp import LANES, Outcome, Pending, Warp

Array = NDArray[Any]
Run = Callable[[Warp], Outcome]
FLOATS = ("f32", "f64")
HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def _build(
    ins: Instruction,
    context: Context,
    result: str,
    operands: Sequence[str],
    compute: Callable[..., Array],
) -> Run:
    """d = compute(a, ...): operand types, and the type of what compute returns."""
    if len(ins.operands) != len(operands) + 1:
        raise ins.error(f"takes {len(operands) + 1} operands (got {len(ins.operands)})")
    sources = [
        source(ins, operand, kind, context)
        for operand, kind in zip(ins.operands[1:], operands, strict=True)
    ]
    write = destination(ins, ins.operands[0], result)
    return _runner(sources, write, compute)


def _runner(
    sources: Sequence[Source], write: Callable[..., None], compute: Callable[..., Array]
) -> Run:
    registers = registers_of(sources)
    gets = [s.get for s in sources]

    def run(w: Warp) -> None:
        taints = w.t
        taint = None
        for register in registers:
            if taints[register] is not None:
                taint = w.taint(registers)
                break
        write(w, compute(*[get(w) for get in gets]), taint)

    return run


def _float_compute(
    ins: Instruction, mods: Modifiers, kind: str, compute: Callable[..., Array]
) -> Callable[..., Array]:
    """Wrap a float function with .ftz, .sat and canonical NaNs."""
    ftz, sat = mods.take("ftz"), mods.take("sat")
    if kind == "f64" and (ftz or sat):
        raise ins.error(".ftz and .sat do not apply to .f64")

    def run(*values: Array) -> Array:
        if ftz:
            values = tuple(floats.flush(v) for v in values)
        result = compute(*values)
        if ftz:
            result = floats.flush(result)
        return floats.canonical(floats.saturate(result) if sat else result)

    return run


def _halves(
    ins: Instruction, context: Context, kind: str, arity: int, compute: Callable[..., Array]
) -> Run:
    raw = "b32" if kind.endswith("x2") else "b16"

    def run(*bits: Array) -> Array:
        return floats.pack_halves(kind, compute(*(floats.unpack_halves(kind, b) for b in bits)))

    return _build(ins, context, raw, [raw] * arity, run)


def add_sub_mul(ins: Instruction, context: Context) -> Run:
    """add, sub, mul of floats; add, sub of integers; mul.lo, .hi, .wide."""
    name = ins.words[0]
    mods = Modifiers(ins)
    kind = mods.type()
    if kind in FLOATS:
        mode = mods.one_of(*floats.ROUNDINGS) or "rn"
        if kind == "f64":
            if mode != "rn":
                raise ins.error("directed rounding of .f64 is not modelled")
            plain: Callable[..., Array] = {
                "add": np.add, "sub": np.subtract, "mul": np.multiply,
            }[name]  # fmt: skip
        elif name == "mul":
            plain = lambda a, b: floats.mul32(a, b, mode)  # noqa: E731
        elif name == "add":
            plain = lambda a, b: floats.add32(a, b, mode)  # noqa: E731
        else:
            plain = lambda a, b: floats.add32(a, -b, mode)  # noqa: E731
        compute = _float_compute(ins, mods, kind, plain)
        mods.done()
        return _build(ins, context, kind, [kind, kind], compute)
    if kind in HALVES:
        mods.one_of("rn")
        mods.done()
        half = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
        return _halves(ins, context, kind, 2, half)
    if name == "mul":
        part = mods.need("lo", "hi", "wide")
        mods.done()
        result, compute = _multiply(ins, kind, part)
        return _build(ins, context, result, [kind, kind], compute)
    mods.done()
    return _build(ins, context, kind, [kind, kind], np.add if name == "add" else np.subtract)


def _multiply(ins: Instruction, kind: str, part: str) -> tuple[str, Callable[..., Array]]:
    bits = TYPE_BITS[kind]
    if part == "lo":
        return kind, np.multiply
    if bits == 64:
        if part == "wide":
            raise ins.error(".wide does not apply to 64-bit types")

        def high(a: Array, b: Array) -> Array:
            products = [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]
            mask = (1 << 64) - 1
            return np.array([p & mask for p in products], dtype=np.uint64).view(a.dtype)

        return kind, high
    wide = f"{kind[0]}{2 * bits}"
    dtype = DTYPE[wide]
    if part == "wide":
        return wide, lambda a, b: a.astype(dtype) * b.astype(dtype)
    shift = dtype(bits)
    return kind, lambda a, b: ((a.astype(dtype) * b.astype(dtype)) >> shift).astype(a.dtype)


def mad(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    if kind in FLOATS:
        return fma(ins, context)
    part = mods.need("lo", "hi", "wide")
    mods.done()
    result, product = _multiply(ins, kind, part)
    return _build(ins, context, result, [kind, kind, result], lambda a, b, c: product(a, b) + c)


def fma(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    mode = mods.need(*floats.ROUNDINGS)
    if kind in HALVES:
        mods.done()
        return _halves(ins, context, kind, 3, lambda a, b, c: a * b + c)
    if kind == "f64":
        if mode != "rn":
            raise ins.error("directed rounding of .f64 is not modelled")
        compute = _float_compute(ins, mods, kind, floats.fma64)
    else:
        compute = _float_compute(ins, mods, kind, lambda a, b, c: floats.fma32(a, b, c, mode))
    mods.done()
    return _build(ins, context, kind, [kind] * 3, compute)


def divide(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    if kind in FLOATS:
        mods.need("rn", "full", "approx")
        compute = _float_compute(ins, mods, kind, np.divide)
        mods.done()
        return _build(ins, context, kind, [kind, kind], compute)
    mods.done()
    remainder = ins.words[0] == "rem"
    ones = np.array(-1).astype(DTYPE[kind])

    def integer(a: Array, b: Array) -> Array:
        # Truncation toward zero; a zero divisor is unspecified, hardware gives ones.
        safe = np.where(b == 0, np.ones_like(b), b)
        quotient = np.floor_divide(a, safe)
        if a.dtype.kind == "i":
            quotient = quotient + ((quotient < 0) & (quotient * safe != a))
        if remainder:
            return np.where(b == 0, a, a - quotient * safe)
        return np.where(b == 0, ones, quotient).astype(a.dtype)

    return _build(ins, context, kind, [kind, kind], integer)


def negate(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    name = ins.words[0]
    if kind in FLOATS:
        ftz = mods.take("ftz")
        mods.done()
        plain: Callable[..., Array] = np.negative if name == "neg" else np.abs
        return _build(
            ins, context, kind, [kind], lambda a: plain(floats.flush(a) if ftz else a)
        )
    mods.done()
    if kind in HALVES:
        raw = "b32" if kind.endswith("x2") else "b16"
        sign = DTYPE[raw](0x80008000 & ((1 << TYPE_BITS[raw]) - 1))
        if name == "neg":
            return _build(ins, context, raw, [raw], lambda a: a ^ sign)
        return _build(ins, context, raw, [raw], lambda a: a & ~sign)
    return _build(ins, context, kind, [kind], np.negative if name == "neg" else np.abs)


def extreme(ins: Instruction, context: Context) -> Run:
    """min and max, of two operands, or of three floats (sm_100)."""
    largest = ins.words[0] == "max"
    mods = Modifiers(ins)
    kind = mods.type()
    arity = len(ins.operands) - 1
    if kind in FLOATS or kind in HALVES:
        nan = mods.take("NaN")

        def pick(*values: Array) -> Array:
            result = values[0]
            for value in values[1:]:
                result = floats.extreme(result, value, largest=largest, nan=nan)
            return result

        if kind in HALVES:
            mods.done()
            return _halves(ins, context, kind, arity, pick)
        compute = _float_compute(ins, mods, kind, pick)
        mods.done()
        return _build(ins, context, kind, [kind] * arity, compute)
    mods.done()
    return _build(ins, context, kind, [kind, kind], np.maximum if largest else np.minimum)


def approximate(ins: Instruction, context: Context) -> Run:
    """ex2, lg2, sin, cos, tanh, rsqrt, rcp, sqrt."""
    name = ins.words[0]
    mods = Modifiers(ins)
    kind = mods.type()
    if kind not in FLOATS:
        raise ins.error(f"type .{kind} is not supported for {name}")
    mode = mods.need("approx", *(floats.ROUNDINGS if name in ("rcp", "sqrt") else ()))
    if mode in ("rz", "rm", "rp"):
        raise ins.error(f"rounding .{mode} of {name} is not modelled")
    if name == "sqrt":
        plain: Callable[..., Array] = np.sqrt
    elif name == "rcp":
        plain = np.reciprocal
    else:
        function = floats.UNARY[name]
        dtype = DTYPE[kind]
        plain = lambda a: function(a.astype(np.float64)).astype(dtype)  # noqa: E731
    compute = _float_compute(ins, mods, kind, plain)
    mods.done()
    return _build(ins, context, kind, [kind], compute)


def logic(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    mods.done()
    name = ins.words[0]
    if name == "not":
        return _build(ins, context, kind, [kind], np.invert)
    if name == "cnot":
        return _build(ins, context, kind, [kind], lambda a: (a == 0).astype(a.dtype))
    table: dict[str, Callable[..., Array]] = {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    return _build(ins, context, kind, [kind, kind], table[name])


def shift(ins: Instruction, context: Context) -> Run:
    """shl and shr: amounts of the width or more give zero, or the sign (PTX ISA 9.7.7)."""
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

    return _build(ins, context, kind, [kind, "u32"], compute)


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

    return _build(ins, context, kind, ["u32", "u32", "u32"], compute)


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

    return _runner(sources, destination(ins, ins.operands[0], kind), compute)


def extract(ins: Instruction, context: Context) -> Run:
    """bfe (PTX ISA 9.7.1, "bfe"): past the top, .s replicates the sign bit."""
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

    return _build(ins, context, kind, [kind, "u32", "u32"], compute)


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

    return _build(ins, context, kind, [kind, kind, "u32", "u32"], compute)


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

    return _build(ins, context, "b32", ["b32", "b32", "b32"], compute)


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

    return _build(ins, context, result, [kind], compute)


_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip


def _comparison(ins: Instruction, mods: Modifiers, kind: str) -> Callable[[Array, Array], Array]:
    word = mods.need(*_COMPARE, *_UNORDERED, "num", "nan")
    floating = kind in FLOATS or kind in HALVES
    if word in _COMPARE:
        plain = _COMPARE[word]
        if not floating or word != "ne":
            return plain
        # Ordered "ne" is false for NaN; NumPy's is true.
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    if not floating:
        raise ins.error(f"comparison .{word} is for floats")
    if word == "num":
        return lambda a, b: ~np.isnan(a) & ~np.isnan(b)
    if word == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    inner = _COMPARE[_UNORDERED[word]]
    return lambda a, b: inner(a, b) | np.isnan(a) | np.isnan(b)


def set_predicate(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    compare = _comparison(ins, mods, kind)
    combine = mods.one_of(*_COMBINE)
    ftz = mods.take("ftz")
    mods.done()
    if kind in ("f16x2", "bf16x2"):
        raise ins.error(f"comparison of .{kind} is not supported")
    count_ = 4 if combine else 3
    if len(ins.operands) != count_:
        raise ins.error(f"takes {count_} operands (got {len(ins.operands)})")
    sources = [source(ins, operand, kind, context) for operand in ins.operands[1:3]]
    if combine:
        sources.append(source(ins, ins.operands[3], "pred", context))
    target = ins.operands[0]
    firsts = (target.first, target.second) if isinstance(target, Pair) else (target,)
    writes = [destination(ins, operand, "pred") for operand in firsts]
    registers = registers_of(sources)

    def run(w: Warp) -> None:
        taint = w.taint(registers)
        a, b = sources[0].get(w), sources[1].get(w)
        if kind == "bf16":
            a, b = floats.bf16_to_f32(a), floats.bf16_to_f32(b)
        if ftz:
            a, b = floats.flush(a), floats.flush(b)
        holds = compare(a, b)
        for value, write in zip((holds, ~holds), writes, strict=False):
            if combine:
                value = _COMBINE[combine](value, sources[2].get(w))
            write(w, value, taint)

    return run


def select(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    mods.done()
    raw = f"b{TYPE_BITS[kind]}" if kind != "pred" else kind
    yes, no = (source(ins, operand, raw, context) for operand in ins.operands[1:3])
    if kind in FLOATS:
        yes, no = (source(ins, operand, kind, context) for operand in ins.operands[1:3])
        raw = kind
    which = source(ins, ins.operands[3], "pred", context)
    write = destination(ins, ins.operands[0], raw)

    def run(w: Warp) -> None:
        chosen = which.get(w)
        taint = w.taint(which.registers)
        of_yes, of_no = w.taint(yes.registers), w.taint(no.registers)
        if of_yes is not None or of_no is not None:
            # Poison in the side that was not chosen does no harm.
            side = np.where(
                chosen, False if of_yes is None else of_yes, False if of_no is None else of_no
            )
            taint = side if taint is None else taint | side
            if not taint.any():
                taint = None
        write(w, np.where(chosen, yes.get(w), no.get(w)), taint)

    return run


def predicate_logic(ins: Instruction, context: Context) -> Run:
    """and, or, xor, not of predicates."""
    name = ins.words[0]
    table: dict[str, Callable[..., Array]] = {
        "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
        "not": np.logical_not, "mov": lambda a: a,
    }  # fmt: skip
    arity = 1 if name in ("not", "mov") else 2
    return _build(ins, context, "pred", ["pred"] * arity, table[name])


def move(ins: Instruction, context: Context) -> Run:
    """mov, of a register, literal, address, special register, or to and from { }."""
    mods = Modifiers(ins)
    kind = mods.type()
    mods.done()
    if len(ins.operands) != 2:
        raise ins.error("takes 2 operands")
    target, origin = ins.operands
    if kind == "pred":
        return predicate_logic(ins, context)
    bits = TYPE_BITS[kind]
    if isinstance(origin, Vector):
        part = f"b{bits // len(origin.items)}"
        sources = [source(ins, operand, part, context) for operand in origin.items]
        unsigned = DTYPE[f"b{bits}"]

        def pack(*values: Array) -> Array:
            stacked = np.stack(values, axis=1)
            return np.ascontiguousarray(stacked).view(unsigned).reshape(LANES)

        run = _runner(sources, destination(ins, target, f"b{bits}"), pack)
        return _movable(run, registers_of(sources), (target,))
    if isinstance(target, Vector):
        part = f"b{bits // len(target.items)}"
        whole = source(ins, origin, f"b{bits}", context)
        writes = [destination(ins, operand, part) for operand in target.items]
        piece = DTYPE[part]

        def unpack(w: Warp) -> None:
            taint = w.taint(whole.registers)
            parts = np.ascontiguousarray(whole.get(w)).view(piece).reshape(LANES, -1)
            for i, write in enumerate(writes):
                write(w, np.ascontiguousarray(parts[:, i]), taint)

        return _movable(unpack, whole.registers, target.items)
    run = _build(ins, context, kind, [kind], lambda a: a)
    return _movable(run, source(ins, origin, kind, context).registers, (target,))


def _movable(run: Run, sources: Sequence[int], targets: Sequence[Operand]) -> Run:
    """A mov of registers that are pending is no use of them: it happens after the wait."""
    written = [each.index for each in targets if isinstance(each, Register)]

    def guarded(w: Warp) -> Outcome:
        for register in sources:
            if type(w.t[register]) is Pending and w.postpone(sources, written, run):
                return None
        return run(w)

    return guarded if sources else run


def convert(ins: Instruction, context: Context) -> Run:
    """cvt between integer and float types (PTX ISA 9.7.9, "cvt")."""
    mods = Modifiers(ins)
    origin = mods.type()
    target = mods.type()
    mode = mods.one_of("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi")
    sat, ftz = mods.take("sat"), mods.take("ftz")
    mods.done()
    if target in ("f16x2", "bf16x2"):
        if origin != "f32" or mode not in ("rn", "rz") or sat:
            raise ins.error("only .rn and .rz from .f32 are supported")
        rounding = mode

        def pack(high: Array, low: Array) -> Array:
            # The first source becomes the upper half.
            return floats.pack_halves(
                target, np.stack([low, high]).astype(np.float64), rounding
            )

        return _build(ins, context, "b32", ["f32", "f32"], pack)

    def run(values: Array) -> Array:
        if origin == "bf16":
            values = floats.bf16_to_f32(values)
        if ftz and values.dtype == np.float32:
            values = floats.flush(values)
        result = _convert(ins, values, origin, target, mode, sat)
        if ftz and result.dtype == np.float32 and target == "f32":
            result = floats.flush(result)
        return result

    raw = "b16" if target in ("f16", "bf16") else target
    _convert(ins, np.zeros(LANES, dtype=DTYPE[origin]), origin, target, mode, sat)
    return _build(ins, context, raw, [origin], run)


_INTEGER_ROUND: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip


def _convert(
    ins: Instruction, values: Array, origin: str, target: str, mode: str | None, sat: bool
) -> Array:
    from_float = origin[0] in "fb" and origin not in ("b8", "b16", "b32", "b64")
    to_float = target in ("f16", "bf16", "f32", "f64")
    if not from_float and not to_float:
        if sat:
            low, high = _integer_range(target)
            values = np.array([min(max(int(v), low), high) for v in values], dtype=object)
        return values.astype(DTYPE[target])
    if from_float and not to_float:
        if mode not in _INTEGER_ROUND:
            raise ins.error("a conversion from float to integer needs .rni, .rzi, .rmi or .rpi")
        rounded = _INTEGER_ROUND[mode](values.astype(np.float64))
        low, high = _integer_range(target)
        clamped = [0 if np.isnan(v) else int(min(max(v, low), high)) for v in rounded]
        return np.array([min(max(v, low), high) for v in clamped], dtype=DTYPE[target])
    if from_float and mode in _INTEGER_ROUND:
        values = _INTEGER_ROUND[mode](values)
        mode = None
    if sat:
        values = floats.saturate(values)
    if target == "f64":
        return values.astype(np.float64)
    rounding = mode or "rn"
    if target == "f32":
        if TYPE_BITS[origin] == 64 and not from_float:
            if rounding != "rn":
                raise ins.error("directed rounding of 64-bit integers is not modelled")
            return values.astype(np.float32)
        return floats.narrow(values.astype(np.float64), rounding)
    if rounding not in ("rn", "rz"):
        raise ins.error(f"rounding .{rounding} to .{target} is not modelled")
    return floats.pack_halves(target, values.astype(np.float64), rounding)


def _integer_range(kind: str) -> tuple[int, int]:
    bits = TYPE_BITS[kind]
    if kind[0] == "s":
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1


def copysign(ins: Instruction, context: Context) -> Run:
    """d = b with the sign of a."""
    mods = Modifiers(ins)
    kind = mods.type()
    mods.done()
    return _build(ins, context, kind, [kind, kind], lambda a, b: np.copysign(b, a))


def test_property(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    what = mods.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    mods.done()
    tiny = np.finfo(DTYPE[kind]).tiny
    table: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }
    return _build(ins, context, "pred", [kind], table[what])


def _logic_or_predicates(ins: Instruction, context: Context) -> Run:
    return predicate_logic(ins, context) if ins.words[-1] == "pred" else logic(ins, context)


DECODERS: dict[str, Callable[[Instruction, Context], Run]] = {
    **dict.fromkeys(("add", "sub", "mul"), add_sub_mul),
    "mad": mad,
    "fma": fma,
    **dict.fromkeys(("div", "rem"), divide),
    **dict.fromkeys(("neg", "abs"), negate),
    **dict.fromkeys(("min", "max"), extreme),
    **dict.fromkeys(("ex2", "lg2", "sin", "cos", "tanh", "rsqrt", "rcp", "sqrt"), approximate),
    **dict.fromkeys(("and", "or", "xor", "not"), _logic_or_predicates),
    "cnot": logic,
    **dict.fromkeys(("shl", "shr"), shift),
    "shf": funnel,
    "lop3": lop3,
    "bfe": extract,
    "bfi": insert,
    "prmt": permute,
    **dict.fromkeys(("popc", "clz", "brev", "bfind"), count),
    "setp": set_predicate,
    "selp": select,
    "mov": move,
    "cvt": convert,
    "copysign": copysign,
    "testp": test_property,
}
