"""Arithmetic (PTX ISA, "Integer Arithmetic Instructions", "Floating Point Instructions")."""

from __future__ import annotations

from functools import partial

import numpy as np

from build_kernels.binaries.ptx.syntax import TYPE_BITS
from build_kernels.emulator.execution.warp import Run
from build_kernels.emulator.instructions.decoding import Decoder, Decoding
from build_kernels.emulator.instructions.elementwise import (
    Compute,
    build,
    float_compute,
    on_halves,
)
from build_kernels.emulator.lanes import Array
from build_kernels.emulator.numerics import floats
from build_kernels.emulator.numerics.types import DTYPE, FLOATS, HALVES

_SUMS: dict[str, tuple[Compute, Compute]] = {
    "add": (np.add, floats.add32),
    "sub": (np.subtract, lambda a, b, rounding: floats.add32(a, -b, rounding)),
    "mul": (np.multiply, floats.mul32),
}


def add_sub_mul(d: Decoding) -> Run:
    kind = d.type()
    exact, rounded = _SUMS[d.name]
    if kind == "f32x2":
        return _on_pairs(d, 2, partial(rounded, rounding=d.one_of(*floats.ROUNDINGS) or "rn"))
    if kind in FLOATS:
        mode = d.one_of(*floats.ROUNDINGS) or "rn"
        if kind == "f32":
            exact = partial(rounded, rounding=mode)
        elif mode != "rn":
            raise d.error("directed rounding of .f64 is not modelled")
        return build(d, kind, [kind, kind], float_compute(d, kind, exact))
    if kind in HALVES:
        d.one_of("rn")
        return on_halves(d, kind, 2, exact)
    if d.name == "mul":
        part = d.need("lo", "hi", "wide")
        result, product = _multiply(d, kind, part)
        return build(d, result, [kind, kind], product, signless=part == "lo")
    return build(d, kind, [kind, kind], exact, signless=True)


def _on_pairs(d: Decoding, arity: int, compute: Compute) -> Run:
    """Decode a function of two .f32 in 64 bits (sm_100)."""
    if d.context.arch.startswith("sm_90"):
        raise d.error("f32x2 exists on sm_100 and above")
    function = float_compute(d, "f32", compute)

    def run(*pairs: Array) -> Array:
        return function(*(pair.view(np.float32) for pair in pairs)).view(np.uint64)

    return build(d, "b64", ["b64"] * arity, run)


def _multiply(d: Decoding, kind: str, part: str) -> tuple[str, Compute]:
    bits = TYPE_BITS[kind]
    if part == "lo":
        return kind, np.multiply
    if bits == 64:
        if part == "wide":
            raise d.error(".wide does not apply to 64-bit types")

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


def mad(d: Decoding) -> Run:
    kind = d.type()
    if kind in FLOATS or kind == "f32x2":
        return fma(d)
    part = d.need("lo", "hi", "wide")
    result, product = _multiply(d, kind, part)
    kinds = [kind, kind, result]
    return build(d, result, kinds, lambda a, b, c: product(a, b) + c, signless=part == "lo")


def fma(d: Decoding) -> Run:
    kind = d.type()
    mode = d.need(*floats.ROUNDINGS)
    if kind == "f32x2":
        return _on_pairs(d, 3, partial(floats.fma32, rounding=mode))
    if kind in HALVES:
        return on_halves(d, kind, 3, lambda a, b, c: a * b + c)
    plain: Compute = floats.fma64 if kind == "f64" else partial(floats.fma32, rounding=mode)
    if kind == "f64" and mode != "rn":
        raise d.error("directed rounding of .f64 is not modelled")
    return build(d, kind, [kind] * 3, float_compute(d, kind, plain))


def divide(d: Decoding) -> Run:
    kind = d.type()
    if kind in FLOATS:
        d.need("rn", "full", "approx")
        return build(d, kind, [kind, kind], float_compute(d, kind, np.divide))
    remainder = d.name == "rem"
    ones = np.array(-1).astype(DTYPE[kind])

    def integer(a: Array, b: Array) -> Array:
        # Truncation toward zero. A zero divisor is unspecified; hardware returns ones.
        safe = np.where(b == 0, np.ones_like(b), b)
        quotient = np.floor_divide(a, safe)
        if a.dtype.kind == "i":
            quotient = quotient + ((quotient < 0) & (quotient * safe != a))
        if remainder:
            return np.where(b == 0, a, a - quotient * safe)
        return np.where(b == 0, ones, quotient).astype(a.dtype)

    return build(d, kind, [kind, kind], integer)


def negate(d: Decoding) -> Run:
    kind = d.type()
    name = d.name
    if kind in FLOATS:
        ftz = d.take("ftz")
        plain: Compute = np.negative if name == "neg" else np.abs
        return build(d, kind, [kind], lambda a: plain(floats.flush(a) if ftz else a))
    if kind in HALVES:
        raw = "b32" if kind.endswith("x2") else "b16"
        sign = DTYPE[raw](0x80008000 & ((1 << TYPE_BITS[raw]) - 1))
        if name == "neg":
            return build(d, raw, [raw], lambda a: a ^ sign)
        return build(d, raw, [raw], lambda a: a & ~sign)
    return build(d, kind, [kind], np.negative if name == "neg" else np.abs)


def extreme(d: Decoding) -> Run:
    """Decode min and max of two operands, or of three floats (sm_100)."""
    largest = d.name == "max"
    kind = d.type()
    arity = len(d.operands) - 1
    if kind in FLOATS or kind in HALVES:
        nan = d.take("NaN")

        def pick(*values: Array) -> Array:
            result = values[0]
            for value in values[1:]:
                result = floats.extreme(result, value, largest=largest, nan=nan)
            return result

        if kind in HALVES:
            return on_halves(d, kind, arity, pick)
        return build(d, kind, [kind] * arity, float_compute(d, kind, pick))
    return build(d, kind, [kind, kind], np.maximum if largest else np.minimum)


def function_of_one(d: Decoding) -> Run:
    """Decode ex2, lg2, sin, cos, tanh, rsqrt, rcp, sqrt; the caller may give the function."""
    name = d.name
    kind = d.type()
    if kind not in FLOATS:
        raise d.error(f"type .{kind} is not supported for {name}")
    mode = d.need("approx", *(floats.ROUNDINGS if name in ("rcp", "sqrt") else ()))
    if mode in ("rz", "rm", "rp"):
        raise d.error(f"rounding .{mode} of {name} is not modelled")
    if name == "sqrt":
        plain: Compute = np.sqrt
    elif name == "rcp":
        plain = np.reciprocal
    else:
        function = floats.UNARY[name]
        dtype = DTYPE[kind]
        plain = lambda a: function(a.astype(np.float64)).astype(dtype)  # noqa: E731
    compute = float_compute(d, kind, plain)
    given = d.context.approximate.get(d.instruction.opcode)
    if given is not None:
        measured = given
        compute = lambda a: np.asarray(measured(a), dtype=DTYPE[kind])  # noqa: E731
    return build(d, kind, [kind], compute)


def copysign(d: Decoding) -> Run:
    kind = d.type()
    return build(d, kind, [kind, kind], lambda a, b: np.copysign(b, a))


def test_property(d: Decoding) -> Run:
    kind = d.type()
    name = d.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    tiny = np.finfo(DTYPE[kind]).tiny
    table: dict[str, Compute] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }
    return build(d, "pred", [kind], table[name])


INSTRUCTIONS: dict[str, Decoder] = {
    **dict.fromkeys(("add", "sub", "mul"), add_sub_mul),
    "mad": mad,
    "fma": fma,
    **dict.fromkeys(("div", "rem"), divide),
    **dict.fromkeys(("neg", "abs"), negate),
    **dict.fromkeys(("min", "max"), extreme),
    **dict.fromkeys(("ex2", "lg2", "sin", "cos", "tanh", "rsqrt", "rcp", "sqrt"), function_of_one),
    "copysign": copysign,
    "testp": test_property,
}
