"""The table of a hash layer: the experts of a token id."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from build_kernels.kernels.masks import read_id
from build_kernels.kernels.score import choose
from build_kernels.kernels.shapes import MAX_TOP_K


@cute.jit
def lookup(args, token: Int32, slot: Int32) -> Int32:
    """Return the expert in a token's slot of tid2eid, or -1.

    -1 if there is no such token or slot, or if the token id is not in the table.
    """
    expert = Int32(-1)
    if token < args.num_tokens and slot < args.top_k:
        token_id = read_id(args.input_ids, Int64(token), args.input_ids_are_int64)
        if token_id >= 0 and token_id < args.vocab_size:
            # [top_k] of tid2eid [vocab_size, top_k]; the layout only bounds the coordinate
            row = cute.make_tensor(
                args.tid2eid + token_id * args.top_k, cute.make_layout(MAX_TOP_K)
            )
            expert = row[slot]
    return expert


@cute.jit
def read_ranks(args, token: Int32, experts: tuple):
    """Return (ranks, unknown): the places of a lane's experts in the token's row of the table.

    MAX_TOP_K for an expert that is not in the row; unknown is 1 if the token has no row. Without a
    table nothing is read.
    """
    ranks = cute.make_rmem_tensor((len(experts),), Int32)
    ranks.fill(MAX_TOP_K)
    unknown = Int32(0)
    if args.tid2eid.toint() != 0:
        chosen = lookup(args, token, cute.arch.lane_idx())
        for i in cutlass.range_constexpr(len(experts)):
            for rank in cutlass.range_constexpr(MAX_TOP_K):
                matches = cute.arch.shuffle_sync(chosen, rank) == experts[i]
                ranks[i] = choose(matches, Int32(rank), ranks[i])
        unknown = choose(cute.arch.shuffle_sync(chosen, 0) < 0, Int32(1), Int32(0))
    return ranks, unknown
