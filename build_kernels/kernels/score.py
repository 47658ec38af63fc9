"""The score of a logit, sqrt(softplus(logit / gate_temp)), and the arithmetic that it is made of.

Every step is an IEEE operation, or an approximate seed that fused Newton steps round correctly. So
a score has the same bits in router_decode, router_hash, topk.cu, the emulator, and on every GPU.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Uint32

FLOAT32_MAX = 3.4028234663852886e38
# Minimax polynomials, highest power first: 2^f on [-1/2, 1/2] (relative error 1.6e-8), then
# log1p(u) / u on [0, 1] (8.2e-8). topk.cu has the same steps and constants; a test compares them.
EXP2_TERMS = (
    *(1.53458121e-4, 1.33999314e-3, 9.61848896e-3, 5.55032878e-2),
    *(2.40226469e-1, 6.93147206e-1, 1.0),
)
LOG1P_TERMS = (
    *(5.23269e-3, -2.950524e-2, 7.822597e-2, -1.3663248e-1, 1.9106008e-1),
    *(-2.4842983e-1, 3.3319097e-1, -4.9999493e-1, 9.9999997e-1),
)
LOG2E_QUARTER = float.fromhex("0x1.715476p-2")
# log2(e) / 4 less its FP32 value.
LOG2E_QUARTER_REST = float.fromhex("0x1.4ae0c0p-28")
# 1.5 * 2^23: the low mantissa bits of a sum with it are an integer.
ROUND = 12582912.0


@cute.jit
def fused(a: Float32, b: Float32, c: Float32) -> Float32:
    """Return a * b + c, rounded once."""
    return cute.arch.inline_ptx(
        "fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Float32],
        read_only_args=[a, b, c],
    )


@cute.jit
def polynomial(terms: cutlass.Constexpr[tuple], x: Float32) -> Float32:
    """Evaluate a polynomial by Horner's rule; `terms` are its coefficients, highest power first."""
    value = Float32(terms[0])
    for term in cutlass.range_constexpr(1, len(terms)):
        value = fused(value, x, Float32(terms[term]))
    return value


@cute.jit
def reciprocal(value: Float32) -> Float32:
    """Return 1 / value to one ulp, for values from 2^-126 to 2^126; of 1 exactly 1."""
    guess = cute.arch.inline_ptx(
        "rcp.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value]
    )
    return fused(fused(-value, guess, Float32(1.0)), guess, guess)


@cute.jit
def quotient(dividend: Float32, divisor: Float32, inverse: Float32) -> Float32:
    """Return dividend / divisor correctly rounded, from inverse = reciprocal(divisor).

    One Newton step. An IEEE division would add a branch to a slow path, for operands that do not
    occur here.
    """
    product = dividend * inverse
    return fused(fused(-product, divisor, dividend), inverse, product)


@cute.jit
def tempered(logit: Float32, gate_temp: Float32, inverse: Float32) -> Float32:
    """Return logit / gate_temp, from inverse = reciprocal(gate_temp)."""
    product = logit * inverse
    # If the product is not finite, the Newton step gives NaN, and the product is the quotient.
    is_finite = product >= -FLOAT32_MAX and product <= FLOAT32_MAX
    return choose(is_finite, quotient(logit, gate_temp, inverse), product)


@cute.jit
def router_score(logit: Float32) -> Float32:
    """Return sqrt(softplus(logit)) in FP32. NaN stays NaN; +inf counts as the largest float.

    q = exp(-|x| / 4), h = q^2, u = h^2 = exp(-|x|), softplus(x) = max(x, 0) + log1p(u). For x <= 0
    the root is h * sqrt(log1p(u) / u): softplus itself is denormal from -87 on, its root is not
    before -174. There is no branch.
    """
    magnitude = cute.arch.fmin(choose(logit < 0.0, -logit, logit), Float32(340.0))
    # 2^n * 2^f = exp(-magnitude / 4) with f in [-1/2, 1/2]
    shifted = fused(magnitude, Float32(-LOG2E_QUARTER), Float32(ROUND))
    n = shifted - ROUND
    f = fused(magnitude, Float32(-LOG2E_QUARTER), -n)
    f = fused(magnitude, Float32(-LOG2E_QUARTER_REST), f)
    q = polynomial(EXP2_TERMS, f)
    q = float_of(bits_of(q) + (bits_of(shifted) << 23))
    h = q * q
    u = h * h
    p = polynomial(LOG1P_TERMS, u)
    # min.NaN: +inf becomes the largest finite float, and NaN is kept.
    largest_finite = cute.arch.inline_ptx(
        "min.NaN.f32 {$w0}, {$r0}, 0f7F7FFFFF;", write_only_types=[Float32], read_only_args=[logit]
    )
    # False for NaN, which therefore reaches z.
    is_negative = logit <= 0.0
    z = choose(is_negative, p, fused(u, p, largest_finite))
    # z is in [0.69, FLT_MAX]: the seed needs no care for denormals, and two fused steps round the
    # root correctly.
    seed = cute.arch.inline_ptx(
        "rsqrt.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[z]
    )
    root = z * seed
    root = fused(fused(-root, root, z), 0.5 * seed, root)
    return choose(is_negative, h * root, root)


def choose(condition, value, otherwise):
    """Return `value if condition else otherwise` as one select: a DSL `if` may become a branch."""
    return type(value)(cutlass.select_(condition, value, otherwise))


@cute.jit
def bits_of(value: Float32) -> Uint32:
    """Return the IEEE bits of a float."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[value]
    )


@cute.jit
def float_of(bits: Uint32) -> Float32:
    """Return the float with these IEEE bits."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[bits]
    )
