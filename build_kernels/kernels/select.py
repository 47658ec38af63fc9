"""Scores, keys and the top-k of a token: what every decode kernel does after its GEMM, by one warp.

Lanes hold consecutive runs of experts, lane 0 the lowest. Nothing here branches on data, and ties
go to the lower lane and the lower register, so to the lower expert.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

MAX_TOP_K = 8
FLOAT32_MAX = 3.4028234663852886e38
# Below this logit softplus(x) = exp(x) (1 - exp(x) / 2 + ...), whose FP32 value turns denormal at
# -87 and whose square root does not: there the score is computed as exp(x / 2) (1 - exp(x) / 4).
# The first neglected term, 5/96 exp(2 x), is 5e-15 at the switch.
EXPONENTIAL_BELOW = -15.0
# Keys order as floats do, as unsigned integers. No number maps below 0x007fffff (-inf), so small
# keys are free: 0 was taken already (and, in the workspace, was never written), 1 is no expert, 2
# is a NaN.
STRUCK_OUT = 0
NOT_A_CANDIDATE = 1
NAN_KEY = 2


@cute.jit
def log1p_of_unit(e: Float32) -> Float32:
    """log(1 + e) for e in [0, 1] as 2 atanh(s), s = e / (2 + e): the odd series to s^15.

    s^2 <= 1/9, so the first neglected term is 1e-9 of the sum. libdevice's log1p has a
    data-dependent branch for inputs that cannot occur here.
    """
    s = e * cute.arch.rcp_approx(2.0 + e)
    square = s * s
    series = Float32(1.0 / 15.0)
    for divisor in cutlass.range_constexpr(13, 0, -2):
        series = series * square + (1.0 / divisor)
    return 2.0 * s * series


@cute.jit
def router_score(logit: Float32) -> Float32:
    """sqrt(softplus(logit)) in FP32. NaN stays NaN; +inf counts as the largest finite float."""
    x = logit
    if x > FLOAT32_MAX:
        x = Float32(FLOAT32_MAX)
    positive = x
    magnitude = x
    if x < 0.0:
        positive = Float32(0.0)
        magnitude = -x
    e = cute.math.exp(-magnitude)
    score = cute.math.sqrt(positive + log1p_of_unit(e))
    if x < EXPONENTIAL_BELOW:
        score = cute.math.exp(x * 0.5) * (1.0 - 0.25 * e)
    return score


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
    key = bits ^ Uint32(0x80000000)
    if bits >= Uint32(0x80000000):
        key = bits ^ Uint32(0xFFFFFFFF)
    if biased != biased:
        key = Uint32(NAN_KEY)
    return key


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
def take_top_k(keys: cute.Tensor, scores: cute.Tensor, first_expert: Int32, top_k: Int32):
    """The warp's top_k best entries: lane r < top_k gets the r-th; every lane gets the scores' sum.

    keys (uint32, overwritten), scores (FP32): (length,) registers; register i of a lane is expert
    first_expert + i, and first_expert ascends with the lane. Returns (expert, score, total).
    The sum is taken in rank order, so its bits do not depend on which lane held what. A round gives
    the best key's lowest lane, so its lowest expert, and strikes that entry out.
    """
    lane = cute.arch.lane_idx()
    lower_lanes = cute.arch.lanemask_lt()
    my_expert = Int32(0)
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
