"""The top-k of a token and its tie rule, by one warp.

Candidates are ordered by an unsigned key; of equal keys the lower expert wins. Lanes hold
consecutive runs of experts, lane 0 the lowest, so the lower lane and then the lower register wins.
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


# Pairs to exchange: four candidates into order, and four that first fall and then rise or reverse.
SORT_FOUR = ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2))
MERGE_FOUR = ((0, 2), (1, 3), (0, 1), (2, 3))


def best_four(keys: cute.Tensor, scores: cute.Tensor) -> list:
    """Return a lane's four best candidates, best first, as (key, score, register).

    Equal keys come in any order. There are 2 registers or a multiple of 4; of 2 the last two
    candidates are TAKEN.
    """
    candidates = [(keys[i], scores[i], Int32(i)) for i in range(cute.size(keys))]
    if len(candidates) == 2:
        candidates += [(Uint32(TAKEN), Float32(0.0), Int32(0))] * 2
    best = exchanged(candidates[:4], SORT_FOUR)
    for first in range(4, len(candidates), 4):
        four = exchanged(candidates[first : first + 4], SORT_FOUR)
        # Of the i-th best of one and the (3 - i)-th of the other the better is in the four best.
        best = [in_order(best[i], four[3 - i])[0] for i in range(4)]
        best = exchanged(best, MERGE_FOUR)
    return best


def exchanged(candidates: list, pairs: tuple) -> list:
    """Return the candidates with each pair of places put in order, one pair after the other."""
    candidates = list(candidates)
    for low, high in pairs:
        candidates[low], candidates[high] = in_order(candidates[low], candidates[high])
    return candidates


def in_order(a: tuple, b: tuple) -> tuple:
    """Return two candidates, that of the larger key first."""
    is_larger = b[0] > a[0]
    larger = [choose(is_larger, b[i], a[i]) for i in (1, 2)]
    smaller = [choose(is_larger, a[i], b[i]) for i in (1, 2)]
    return (cutlass.max(a[0], b[0]), *larger), (cutlass.min(a[0], b[0]), *smaller)


@cute.jit
def take_top_k(
    keys: cute.Tensor,
    scores: cute.Tensor,
    first_expert: Int32,
    top_k: Int32,
    otherwise: Int32,
    is_padding,
):
    """Take the warp's top_k best candidates: return (expert, score, total) of rank r to lane r.

    keys    (length,) uint32 registers, overwritten; register i is expert first_expert + i
    scores  (length,) FP32 registers
    first_expert ascends with the lane. Lanes from top_k on get (otherwise, 0, total). The total of
    the taken scores is summed in rank order, so its bits do not depend on the lanes.

    Each lane sorts its four best first, so that a round waits for one reduction and no tree. What
    that cannot decide is left to `take_one_by_one`: equal keys, and a lane that gave all four. Of a
    padding row, whose keys are all equal, the values have no meaning.
    """
    lane = cute.arch.lane_idx()
    my_expert = otherwise
    my_score = Float32(0.0)
    total = Float32(0.0)
    best_keys = cute.make_rmem_tensor((4,), Uint32)
    best_scores = cute.make_rmem_tensor((4,), Float32)
    experts = cute.make_rmem_tensor((4,), Int32)
    best = best_four(keys, scores)
    for i in cutlass.range_constexpr(4):
        best_keys[i], best_scores[i], register = best[i]
        experts[i] = first_expert + register
    # The lane's best key that stands twice.
    repeated = Uint32(TAKEN)
    for i in cutlass.range_constexpr(3, 0, -1):
        repeated = choose(best_keys[i] == best_keys[i - 1], best_keys[i], repeated)

    best_key, wins = take_best_key(best_keys)
    heads = Uint32(cute.arch.vote_ballot_sync(wins))
    ties = heads & (heads - 1)
    # Of the rank before. A round's reduction, the shuffles of the rank before it and the sum of the
    # rank before that do not wait for each other.
    expert, score = my_expert, my_score
    for rank in cutlass.range(1, top_k, unroll=1):
        total = total + score
        my_expert = choose(lane == rank - 2, expert, my_expert)
        my_score = choose(lane == rank - 2, score, my_score)
        expert, score = take_candidate(experts, best_scores, wins, heads)
        best_key, wins = take_best_key(best_keys)
        heads = Uint32(cute.arch.vote_ballot_sync(wins))
        ties = ties | (heads & (heads - 1))
    for last in cutlass.range_constexpr(2):
        total = total + score
        my_expert = choose(lane == top_k - 2 + last, expert, my_expert)
        my_score = choose(lane == top_k - 2 + last, score, my_score)
        if cutlass.const_expr(last == 0):
            expert, score = take_candidate(experts, best_scores, wins, heads)

    is_undecided = repeated >= best_key
    if cutlass.const_expr(cute.size(keys) > 4):
        is_undecided = is_undecided or best_keys[0] == TAKEN
    ties = ties | Uint32(cute.arch.vote_ballot_sync(is_undecided))
    if ties != 0 and not is_padding:
        my_expert, my_score, total = take_one_by_one(keys, scores, first_expert, top_k, otherwise)
    return my_expert, my_score, total


@cute.jit
def take_best_key(keys: cute.Tensor) -> tuple:
    """Take the warp's best key from the lanes' sorted keys; return it and if the lane had it."""
    best_key = cute.arch.warp_redux_sync(keys[0], "max")
    wins = keys[0] == best_key
    for i in cutlass.range_constexpr(3):
        keys[i] = choose(wins, keys[i + 1], keys[i])
    keys[3] = choose(wins, Uint32(TAKEN), keys[3])
    return best_key, wins


@cute.jit
def take_candidate(experts: cute.Tensor, scores: cute.Tensor, wins, heads: Uint32) -> tuple:
    """Take the first (expert, score) of the lanes that win; return the lowest head's."""
    winner = cute.arch.popc((heads & -heads) - 1)
    expert = cute.arch.shuffle_sync(experts[0], winner)
    score = cute.arch.shuffle_sync(scores[0], winner)
    for i in cutlass.range_constexpr(3):
        experts[i] = choose(wins, experts[i + 1], experts[i])
        scores[i] = choose(wins, scores[i + 1], scores[i])
    return expert, score


@cute.jit
def take_one_by_one(
    keys: cute.Tensor, scores: cute.Tensor, first_expert: Int32, top_k: Int32, otherwise: Int32
):
    """Return `take_top_k`'s values, for any keys; nothing here branches on data."""
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
