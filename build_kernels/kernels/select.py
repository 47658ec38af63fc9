"""Scores, keys and the top-k of a token: what every decode kernel does after its GEMM, by one warp.

Lanes hold consecutive runs of experts, lane 0 the lowest. Nothing here branches on data, and ties
go to the lower lane and the lower register, so to the lower expert.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from build_kernels.kernels.shapes import MAX_TOP_K

FLOAT32_MAX = 3.4028234663852886e38
# 2^f on [-1/2, 1/2], minimax: relative error 1.6e-8; then log1p(u) / u on [0, 1]: 8.2e-8. Highest
# power first. The score has the same steps, constants and bits as in topk.cu; a test holds them
# together.
EXP2_TERMS = (
    *(1.53458121e-4, 1.33999314e-3, 9.61848896e-3, 5.55032878e-2),
    *(2.40226469e-1, 6.93147206e-1, 1.0),
)
LOG1P_TERMS = (
    *(5.23269e-3, -2.950524e-2, 7.822597e-2, -1.3663248e-1, 1.9106008e-1),
    *(-2.4842983e-1, 3.3319097e-1, -4.9999493e-1, 9.9999997e-1),
)
LOG2E_QUARTER = float.fromhex("0x1.715476p-2")
LOG2E_QUARTER_REST = float.fromhex("0x1.4ae0c0p-28")  # what log2(e) / 4 has beyond its FP32 value
ROUND = 12582912.0  # 1.5 * 2^23: the low mantissa bits of a sum with it are an integer
# Keys order as floats do, as unsigned integers. No number maps below 0x007fffff (-inf), so small
# keys are free: 0 was taken already (and, in the workspace, was never written), 1 is no expert, 2
# is a NaN.
STRUCK_OUT = 0
NOT_A_CANDIDATE = 1
NAN_KEY = 2


@cute.jit
def fused(a: Float32, b: Float32, c: Float32) -> Float32:
    """a * b + c, rounded once."""
    return cute.arch.inline_ptx(
        "fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Float32],
        read_only_args=[a, b, c],
    )


@cute.jit
def polynomial(terms: cutlass.Constexpr[tuple], x: Float32) -> Float32:
    """The polynomial with these coefficients, the highest power's first."""
    value = Float32(terms[0])
    for term in cutlass.range_constexpr(1, len(terms)):
        value = fused(value, x, Float32(terms[term]))
    return value


@cute.jit
def reciprocal(value: Float32) -> Float32:
    """1 / value to an ulp, for values of 2^-126 to 2^126; of 1 exactly 1."""
    guess = cute.arch.inline_ptx(
        "rcp.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value]
    )
    return fused(fused(-value, guess, Float32(1.0)), guess, guess)


@cute.jit
def quotient(dividend: Float32, divisor: Float32, inverse: Float32) -> Float32:
    """dividend / divisor, from inverse = reciprocal(divisor): rounded correctly by a Newton step.

    An IEEE division has a branch to a slow path for operands that do not occur here.
    """
    product = dividend * inverse
    return fused(fused(-product, divisor, dividend), inverse, product)


@cute.jit
def tempered(logit: Float32, gate_temp: Float32, inverse: Float32) -> Float32:
    """logit / gate_temp, from inverse = reciprocal(gate_temp).

    Where the product is not finite the Newton step gives NaN, and the product is the quotient.
    """
    product = logit * inverse
    is_finite = product >= -FLOAT32_MAX and product <= FLOAT32_MAX
    return choose(is_finite, quotient(logit, gate_temp, inverse), product)


@cute.jit
def router_score(logit: Float32) -> Float32:
    """sqrt(softplus(logit)) in FP32. NaN stays NaN; +inf counts as the largest finite float.

    q = exp(-|x| / 4), h = q^2, u = h^2 = exp(-|x|), softplus(x) = max(x, 0) + log1p(u). Below 0 the
    root is h * sqrt(log1p(u) / u): softplus itself is denormal from -87 on, its root is not before
    -174. Every step is an IEEE operation but the seed of the root, which two fused steps round
    correctly: the bits are the same on every machine, and there is no branch.
    """
    magnitude = cute.arch.fmin(choose(logit < 0.0, -logit, logit), Float32(340.0))
    shifted = fused(magnitude, Float32(-LOG2E_QUARTER), Float32(ROUND))
    n = shifted - ROUND
    f = fused(magnitude, Float32(-LOG2E_QUARTER), -n)
    f = fused(magnitude, Float32(-LOG2E_QUARTER_REST), f)
    q = polynomial(EXP2_TERMS, f)
    q = float_of(bits_of(q) + (bits_of(shifted) << 23))
    h = q * q
    u = h * h
    p = polynomial(LOG1P_TERMS, u)
    largest_finite = cute.arch.inline_ptx(  # min that keeps NaN
        "min.NaN.f32 {$w0}, {$r0}, 0f7F7FFFFF;", write_only_types=[Float32], read_only_args=[logit]
    )
    is_negative = logit <= 0.0
    z = choose(is_negative, p, fused(u, p, largest_finite))
    seed = cute.arch.inline_ptx(
        "rsqrt.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[z]
    )
    root = z * seed
    root = fused(fused(-root, root, z), 0.5 * seed, root)
    return choose(is_negative, h * root, root)


def choose(condition, value, otherwise):
    """`value if condition else otherwise` as one select: a DSL `if` may become a branch."""
    return type(value)(cutlass.select_(condition, value, otherwise))


@cute.jit
def bits_of(value: Float32) -> Uint32:
    """The IEEE bits of a float."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[value]
    )


@cute.jit
def float_of(bits: Uint32) -> Float32:
    """The float with these IEEE bits."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[bits]
    )


@cute.jit
def selection_key(score: Float32, bias: Float32) -> Uint32:
    """An unsigned integer that orders like (score + bias); a NaN orders below every number."""
    biased = score + bias
    bits = bits_of(biased)
    key = bits ^ (Uint32(Int32(bits) >> 31) | Uint32(0x80000000))
    return choose(biased == biased, key, Uint32(NAN_KEY))


@cute.jit
def ranked_key(rank: Int32) -> Uint32:
    """A key by which rank 0 is taken first and MAX_TOP_K never: a hash layer's order."""
    return choose(rank < MAX_TOP_K, Uint32(0xFFFFFFFF) - Uint32(rank), Uint32(NOT_A_CANDIDATE))


@cute.jit
def best_of(keys: cute.Tensor, scores: cute.Tensor):
    """A lane's best entry as (key, score, register), by a tree; equal keys keep the lower
    register."""
    entries = [(keys[i], scores[i], Int32(i)) for i in range(cute.size(keys))]
    while cutlass.const_expr(len(entries) > 1):
        winners = []
        for i in cutlass.range_constexpr(0, len(entries) - 1, 2):
            later_is_better = entries[i + 1][0] > entries[i][0]
            winners.append(
                tuple(choose(later_is_better, entries[i + 1][j], entries[i][j]) for j in range(3))
            )
        entries = winners + entries[2 * len(winners) :]
    return entries[0]


@cute.jit
def take_top_k(
    keys: cute.Tensor, scores: cute.Tensor, first_expert: Int32, top_k: Int32, otherwise: Int32
):
    """The warp's top_k best entries: lane r < top_k gets the r-th; every lane gets the scores' sum.

    keys (uint32, overwritten), scores (FP32): (length,) registers; register i of a lane is expert
    first_expert + i, and first_expert ascends with the lane. Returns (expert, score, total), and
    (otherwise, 0, total) from lane top_k on.
    The sum is taken in rank order, so its bits do not depend on which lane held what. A round gives
    the best key's lowest lane, so its lowest expert, and strikes that entry out.
    """
    lane = cute.arch.lane_idx()
    lower_lanes = cute.arch.lanemask_lt()
    my_expert = otherwise
    my_score = Float32(0.0)
    total = Float32(0.0)
    for rank in cutlass.range(top_k, unroll=1):
        lane_key, lane_score, register = best_of(keys, scores)
        best_key = cute.arch.warp_redux_sync(lane_key, "max")
        heads = Uint32(cute.arch.vote_ballot_sync(lane_key == best_key))
        winner = cute.arch.popc((heads & -heads) - 1)
        expert = cute.arch.shuffle_sync(first_expert + register, winner)
        score = cute.arch.shuffle_sync(lane_score, winner)
        total = total + score
        my_expert = choose(lane == rank, expert, my_expert)
        my_score = choose(lane == rank, score, my_score)
        wins = lane_key == best_key and (heads & lower_lanes) == 0
        struck = choose(wins, register, Int32(-1))
        for i in cutlass.range_constexpr(cute.size(keys)):
            keys[i] = choose(struck == i, Uint32(STRUCK_OUT), keys[i])
    return my_expert, my_score, total
