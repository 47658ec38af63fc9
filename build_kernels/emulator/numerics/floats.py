"""Floating-point arithmetic with PTX's rounding modes, on arrays.

The approximate functions (ex2, lg2, rcp.approx, ...) are correctly rounded here. Hardware may
differ in the last bits, which is not modelled.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from build_kernels.emulator.lanes import Array, any_of

F32_NAN = np.uint32(0x7FFFFFFF)
ROUNDINGS = ("rn", "rz", "rm", "rp")


_TINY = {np.dtype(kind): np.finfo(kind).tiny for kind in (np.float16, np.float32, np.float64)}
_BELOW_F32 = np.uint64((1 << 29) - 1)  # the bits of a float64 that a normal float32 lacks
_HALF = np.uint64(1 << 28)


def flush(values: Array) -> Array:
    """Replace subnormals by zero of the same sign (.ftz)."""
    small = np.abs(values) < _TINY[values.dtype]
    if not any_of(small):
        return values
    return np.where(small, np.copysign(np.zeros_like(values), values), values)


def saturate(values: Array) -> Array:
    """Clamp to [0, 1]; NaN becomes 0 (.sat)."""
    return np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(values.dtype)


def canonical(values: Array) -> Array:
    """Replace float32 NaNs by the one pattern that hardware makes (PTX ISA, "fma")."""
    if values.dtype != np.float32:
        return values
    bad = np.isnan(values)
    if not any_of(bad):
        return values
    bits = values.view(np.uint32).copy()
    bits[bad] = F32_NAN
    return bits.view(np.float32)


def narrow(values: Array, rounding: str) -> Array:
    """Round float64 to float32 in a rounding mode."""
    near = values.astype(np.float32)
    if rounding == "rn":
        return near
    wide = near.astype(np.float64)
    low = np.nextafter(near, np.float32(-np.inf))
    high = np.nextafter(near, np.float32(np.inf))
    if rounding == "rm":
        return np.where(wide > values, low, near)
    if rounding == "rp":
        return np.where(wide < values, high, near)
    outward = np.abs(wide) > np.abs(values)
    return np.where(outward, np.where(values > 0, low, high), near)


def sum_to_odd(left: Array, right: Array) -> Array:
    """Add in float64, and round an inexact sum to odd.

    A second rounding to float32 then equals one rounding of the exact sum, since float64 has more
    than twice the bits and two to spare."""
    total = left + right
    back = total - left
    error = (left - (total - back)) + (right - back)
    odd = (total.view(np.uint64) & np.uint64(1)) == 1
    fix = np.isfinite(total) & (error != 0) & ~odd
    if not fix.any():
        return total
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(fix, np.nextafter(total, toward), total)


def add32(left: Array, right: Array, rounding: str) -> Array:
    if rounding == "rn":
        return left + right
    wide = sum_to_odd(left.astype(np.float64), right.astype(np.float64))
    return narrow(wide, rounding)


def mul32(left: Array, right: Array, rounding: str) -> Array:
    if rounding == "rn":
        return left * right
    return narrow(left.astype(np.float64) * right.astype(np.float64), rounding)


def fma32(a: Array, b: Array, c: Array, rounding: str) -> Array:
    """Compute a * b + c of float32 with one rounding."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    addend = c.astype(np.float64)
    if rounding == "rn":
        # The float64 sum rounds as the exact one unless it lies half way between two float32.
        total = product + addend
        half = (total.view(np.uint64) & _BELOW_F32) == _HALF
        subnormal = (np.abs(total) < _TINY[np.dtype(np.float32)]) & (total != 0)
        if not any_of(half | subnormal):
            return total.astype(np.float32)
    return narrow(sum_to_odd(product, addend), rounding)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Compute a * b + c of float64 with one rounding to nearest."""
    plain = a * b + c
    for lane in np.flatnonzero(np.isfinite(plain) & np.isfinite(a) & np.isfinite(b)):
        exact = Fraction(float(a[lane])) * Fraction(float(b[lane])) + Fraction(float(c[lane]))
        if exact != 0:
            plain[lane] = exact.numerator / exact.denominator
    return plain


def extreme(a: Array, b: Array, *, largest: bool, nan: bool) -> Array:
    """Return the min or max; a NaN loses unless `nan`, and -0 is less than +0 (PTX ISA, "min")."""
    if nan:
        result = (np.maximum if largest else np.minimum)(a, b)
    else:
        result = (np.fmax if largest else np.fmin)(a, b)
    zeros = (a == 0) & (b == 0)
    if any_of(zeros):
        minus = (np.signbit(a) & np.signbit(b)) if largest else (np.signbit(a) | np.signbit(b))
        signed = np.where(minus, -0.0, 0.0).astype(a.dtype)
        result = np.where(zeros, signed, result)
    return result


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: Array, rounding: str = "rn") -> Array:
    """Round to bf16; return uint16 bit patterns."""
    bits = values.astype(np.float32).view(np.uint32)
    if rounding == "rn":
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    else:
        rounded = bits
    out = (rounded >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), out)


def f32_to_f16(values: Array, rounding: str = "rn") -> Array:
    """Round to f16; return uint16 bit patterns."""
    near = values.astype(np.float16)
    if rounding == "rz":
        outward = np.abs(near.astype(np.float64)) > np.abs(values.astype(np.float64))
        near = np.where(outward, np.nextafter(near, np.float16(0)), near)
    bits = near.view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


def unpack_halves(kind: str, bits: Array) -> Array:
    """Return float64 [32] for f16 and bf16; for packed pairs [2, 32], low half first."""
    if kind.endswith("x2"):
        low = (bits & np.uint32(0xFFFF)).astype(np.uint16)
        high = (bits >> np.uint32(16)).astype(np.uint16)
        halves = np.stack([low, high])
    else:
        halves = bits.view(np.uint16)
    if kind.startswith("bf16"):
        return bf16_to_f32(halves).astype(np.float64)
    return halves.view(np.float16).astype(np.float64)


def pack_halves(kind: str, values: Array, rounding: str = "rn") -> Array:
    """Invert unpack_halves, with one rounding of float64."""
    if kind.startswith("bf16"):
        # Rounding to odd in float32 first keeps the second rounding exact.
        near = values.astype(np.float32)
        error = values - near.astype(np.float64)
        even = (near.view(np.uint32) & np.uint32(1)) == 0
        toward = np.where(error > 0, np.inf, -np.inf).astype(np.float32)
        single = np.where((error != 0) & even, np.nextafter(near, toward), near)
        halves = f32_to_bf16(single, rounding)
    else:
        halves = f32_to_f16(values, rounding)
    if kind.endswith("x2"):
        return halves[0].astype(np.uint32) | (halves[1].astype(np.uint32) << np.uint32(16))
    return halves


UNARY: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
}
