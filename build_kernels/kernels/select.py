"""Scores, keys and the top-k of one token: what every decode kernel does after its GEMM.

One warp holds all scores of a token in registers. Lane `l` owns experts `64 t + 2 l` and `64 t + 2 l + 1`
of every expert tile `t`: loads are coalesced and a lane's register order is its expert order. Nothing
here branches on data; ties go to the lower expert index by construction.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

FLOAT32_MAX = 3.4028234663852886e38
# Below this logit softplus(x) = exp(x) (1 - exp(x) / 2 + ...), whose FP32 value turns denormal at -87
# and whose square root does not: there the score is computed as exp(x / 2) (1 - exp(x) / 4). The first
# neglected term, 5/96 exp(2 x), is 5e-15 at the switch.
EXPONENTIAL_BELOW = -15.0
# Keys order as floats do, as unsigned integers. No number maps to 0 or 1 (-inf maps to 0x007fffff).
NOT_A_CANDIDATE = 0
NAN_KEY = 1


@cute.jit
def log1p_of_unit(e: Float32) -> Float32:
    """log(1 + e) for e in [0, 1] as 2 atanh(s), s = e / (2 + e): the odd series to s^15.

    s^2 <= 1/9, so the first neglected term is 1e-9 of the sum. libdevice's log1p has a data-dependent
    branch for inputs that cannot occur here.
    """
    s = e / (2.0 + e)
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


@cute.jit
def bits_of(value: Float32) -> Uint32:
    """The IEEE bits of a float."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[value]
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
def best_of(keys: cute.Tensor, scores: cute.Tensor, experts: cute.Tensor):
    """The largest key of a lane's registers with its score and expert, as a tree; ties keep the earlier."""
    entries = [(keys[i], scores[i], experts[i]) for i in range(cute.size(keys))]
    while cutlass.const_expr(len(entries) > 1):
        winners = []
        for i in cutlass.range_constexpr(0, len(entries), 2):
            key, score, expert = entries[i]
            other_key, other_score, other_expert = entries[i + 1]
            if other_key > key:
                key, score, expert = other_key, other_score, other_expert
            winners.append((key, score, expert))
        entries = winners
    return entries[0]


@cute.jit
def select_top_k(
    scores: cute.Tensor,
    biases: cute.Tensor,
    num_experts: Int32,
    top_k: Int32,
    scale: Float32,
    out_weights: cute.Pointer,
    out_ids: cute.Pointer,
):
    """Pick a token's experts and write its weights and ids. Called by one whole warp.

    scores, biases: (2 * max_tiles,) FP32 registers of a lane; register i is expert
    64 (i / 2) + 2 lane + i % 2, and experts from num_experts on are no candidates.
    out_weights, out_ids: the token's first output element, FP32 and int32; [0, top_k) is written.

    Each round takes the warp's best key, the lowest expert among equal keys, and strikes it out.
    top_k <= num_experts, so every round has a candidate. Rank r's weight is kept by lane r and the sum
    is taken in rank order, so it does not depend on where the experts lie.
    """
    lane = cute.arch.lane_idx()
    count = cutlass.const_expr(cute.size(scores))
    keys = cute.make_rmem_tensor((count,), Uint32)
    experts = cute.make_rmem_tensor((count,), Uint32)
    for i in cutlass.range_constexpr(count):
        expert = 64 * (i // 2) + 2 * lane + i % 2
        experts[i] = Uint32(expert)
        key = selection_key(scores[i], biases[i])
        if expert >= num_experts:
            key = Uint32(NOT_A_CANDIDATE)
        keys[i] = key

    total = Float32(0.0)
    my_score = Float32(0.0)
    my_id = Int32(0)
    for rank in cutlass.range(top_k, unroll=1):
        lane_key, lane_score, lane_expert = best_of(keys, scores, experts)
        best_key = cute.arch.warp_redux_sync(lane_key, "max")
        if lane_key != best_key:
            lane_expert = Uint32(0xFFFFFFFF)
        best_expert = cute.arch.warp_redux_sync(lane_expert, "min")
        best_score = cute.arch.shuffle_sync(lane_score, Int32((best_expert >> 1) & 31))
        if best_score != best_score:
            best_score = Float32(0.0)
        total = total + best_score
        if lane == rank:
            my_score = best_score
            my_id = Int32(best_expert)
        for i in cutlass.range_constexpr(count):
            if experts[i] == best_expert:
                keys[i] = Uint32(NOT_A_CANDIDATE)

    if lane < top_k:
        weights = cute.make_tensor(out_weights, cute.make_layout(8))
        ids = cute.make_tensor(out_ids, cute.make_layout(8))
        weights[lane] = my_score / (total + 1e-20) * scale
        ids[lane] = my_id
