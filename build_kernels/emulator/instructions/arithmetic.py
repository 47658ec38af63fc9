"""Integer and floating-point arithmetic (PTX ISA, "Integer Arithmetic Instructions" ff.)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from build_kernels.emulator.execution.warp import Array, Run
from build_kernels.emulator.instructions.elementwise import (
    FLOATS,
    HALVES,
    build,
    float_compute,
    on_halves,
)
from build_kernels.emulator.instructions.operands import DTYPE, Context, Modifiers
from build_kernels.emulator.numerics import floats
from build_kernels.emulator.ptx.syntax import TYPE_BITS, Instruction


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
        compute = float_compute(ins, mods, kind, plain)
        mods.done()
        return build(ins, context, kind, [kind, kind], compute)
    if kind in HALVES:
        mods.one_of("rn")
        mods.done()
        half = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
        return on_halves(ins, context, kind, 2, half)
    if name == "mul":
        part = mods.need("lo", "hi", "wide")
        mods.done()
        result, compute = _multiply(ins, kind, part)
        return build(ins, context, result, [kind, kind], compute)
    mods.done()
    return build(ins, context, kind, [kind, kind], np.add if name == "add" else np.subtract)


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
    return build(ins, context, result, [kind, kind, result], lambda a, b, c: product(a, b) + c)


def fma(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    mode = mods.need(*floats.ROUNDINGS)
    if kind in HALVES:
        mods.done()
        return on_halves(ins, context, kind, 3, lambda a, b, c: a * b + c)
    if kind == "f64":
        if mode != "rn":
            raise ins.error("directed rounding of .f64 is not modelled")
        compute = float_compute(ins, mods, kind, floats.fma64)
    else:
        compute = float_compute(ins, mods, kind, lambda a, b, c: floats.fma32(a, b, c, mode))
    mods.done()
    return build(ins, context, kind, [kind] * 3, compute)


def divide(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    if kind in FLOATS:
        mods.need("rn", "full", "approx")
        compute = float_compute(ins, mods, kind, np.divide)
        mods.done()
        return build(ins, context, kind, [kind, kind], compute)
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

    return build(ins, context, kind, [kind, kind], integer)


def negate(ins: Instruction, context: Context) -> Run:
    mods = Modifiers(ins)
    kind = mods.type()
    name = ins.words[0]
    if kind in FLOATS:
        ftz = mods.take("ftz")
        mods.done()
        plain: Callable[..., Array] = np.negative if name == "neg" else np.abs
        return build(ins, context, kind, [kind], lambda a: plain(floats.flush(a) if ftz else a))
    mods.done()
    if kind in HALVES:
        raw = "b32" if kind.endswith("x2") else "b16"
        sign = DTYPE[raw](0x80008000 & ((1 << TYPE_BITS[raw]) - 1))
        if name == "neg":
            return build(ins, context, raw, [raw], lambda a: a ^ sign)
        return build(ins, context, raw, [raw], lambda a: a & ~sign)
    return build(ins, context, kind, [kind], np.negative if name == "neg" else np.abs)


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
            return on_halves(ins, context, kind, arity, pick)
        compute = float_compute(ins, mods, kind, pick)
        mods.done()
        return build(ins, context, kind, [kind] * arity, compute)
    mods.done()
    return build(ins, context, kind, [kind, kind], np.maximum if largest else np.minimum)


def approximate(ins: Instruction, context: Context) -> Run:
    """ex2, lg2, sin, cos, tanh, rsqrt, rcp, sqrt; the caller's function where one is given."""
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
    compute = float_compute(ins, mods, kind, plain)
    mods.done()
    given = context.approximate.get(ins.opcode)
    if given is not None:
        measured = given
        compute = lambda a: np.asarray(measured(a), dtype=DTYPE[kind])  # noqa: E731
    return build(ins, context, kind, [kind], compute)


def copysign(ins: Instruction, context: Context) -> Run:
    """d = b with the sign of a."""
    mods = Modifiers(ins)
    kind = mods.type()
    mods.done()
    return build(ins, context, kind, [kind, kind], lambda a, b: np.copysign(b, a))


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
    return build(ins, context, "pred", [kind], table[what])
