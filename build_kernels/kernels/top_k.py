"""The top-k of a token and its tie rule, by one warp.

Candidates are ordered by an unsigned key; of equal keys the lower expert wins. Lanes hold
consecutive runs of experts, lane 0 the lowest, so the lower lane and then the lower register wins.
Nothing here branches on data.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from build_kernels.kernels.score import bits_of, choose
from build_kernels.kernels.shapes import MAX_TOP_K

# Keys that no number has: floats from -inf on map to 0x007fffff and above, floats to +inf to
# 0xff800000 and below. 0 also stands for a candidate that was not written to the workspace yet.
# Experts of a token's row of the hash table get FIRST_RANK and below. An expert outside the row may
# only be taken if the row changed while it was read.
TAKEN = 0
NOT_A_CANDIDATE = 1
NOT_IN_ROW = 2
NAN_KEY = 3
FIRST_RANK = 0xFFFFFFFE
# Every candidate of a tile that takes the row for padding: one such tile makes the row padding.
PADDING_KEY = 0xFFFFFFFF


@cute.jit
def selection_key(score: Float32, bias: Float32) -> Uint32:
    """Return an unsigned integer that orders like score + bias; NaN orders below every number."""
    biased = score + bias
    bits = bits_of(biased)
    # Negative floats: all bits flipped; others: the sign bit set.
    key = bits ^ (Uint32(Int32(bits) >> 31) | Uint32(0x80000000))
    return choose(biased == biased, key, Uint32(NAN_KEY))


@cute.jit
def ranked_key(rank: Int32) -> Uint32:
    """Return a key that takes rank 0 first and MAX_TOP_K last: the order of a hash table's row."""
    return choose(rank < MAX_TOP_K, Uint32(FIRST_RANK) - Uint32(rank), Uint32(NOT_IN_ROW))


@cute.jit
def best_of(keys: cute.Tensor, scores: cute.Tensor):
    """Return a lane's best candidate as (key, score, register); ties go to the lower register."""
    # A tree, whose depth is the logarithm of the number of registers.
    candidates = [(keys[i], scores[i], Int32(i)) for i in range(cute.size(keys))]
    while cutlass.const_expr(len(candidates) > 1):
        winners = []
        for i in cutlass.range_constexpr(0, len(candidates) - 1, 2):
            later_is_better = candidates[i + 1][0] > candidates[i][0]
            winners.append(
                tuple(
                    choose(later_is_better, candidates[i + 1][j], candidates[i][j])
                    for j in range(3)
                )
            )
        candidates = winners + candidates[2 * len(winners) :]
    return candidates[0]


@cute.jit
def take_top_k(
    keys: cute.Tensor, scores: cute.Tensor, first_expert: Int32, top_k: Int32, otherwise: Int32
):
    """Take the warp's top_k best candidates: return (expert, score, total) of rank r to lane r.

    keys    (length,) uint32 registers, overwritten; register i is expert first_expert + i
    scores  (length,) FP32 registers
    first_expert ascends with the lane. Lanes from top_k on get (otherwise, 0, total). The total of
    the taken scores is summed in rank order, so its bits do not depend on the lanes.
    """
    lane = cute.arch.lane_idx()
    lower_lanes = cute.arch.lanemask_lt()
    my_expert = otherwise
    my_score = Float32(0.0)
    total = Float32(0.0)
    for rank in cutlass.range(top_k, unroll=1):
        lane_key, lane_score, register = best_of(keys, scores)
        best_key = cute.arch.warp_redux_sync(lane_key, "max")
        # The tie rule: of the lanes that hold the best key the lowest one, so the lowest expert.
        heads = Uint32(cute.arch.vote_ballot_sync(lane_key == best_key))
        winner = cute.arch.popc((heads & -heads) - 1)
        expert = cute.arch.shuffle_sync(first_expert + register, winner)
        score = cute.arch.shuffle_sync(lane_score, winner)
        total = total + score
        my_expert = choose(lane == rank, expert, my_expert)
        my_score = choose(lane == rank, score, my_score)
        wins = lane_key == best_key and (heads & lower_lanes) == 0
        taken = choose(wins, register, Int32(-1))
        for i in cutlass.range_constexpr(cute.size(keys)):
            keys[i] = choose(taken == i, Uint32(TAKEN), keys[i])
    return my_expert, my_score, total
