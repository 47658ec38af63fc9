"""A token's row of the outputs: whether it has one, what its experts are called, and its stores."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from build_kernels.kernels.select import choose, fused, quotient, reciprocal


@cute.jit
def read_mask(mask: cute.Pointer, token: Int32, num_tokens: Int32) -> Int32:
    """mask[token], of [num_tokens] uint8; 0 where the mask is null."""
    value = Int32(0)
    if mask.toint() != 0 and token < num_tokens:
        value = Int32(cute.make_tensor(mask, cute.make_layout(1 << 20))[token])
    return value


@cute.jit
def is_padded(args, token: Int32) -> Int32:
    """Not 0 for a row that the caller calls padding: padding_mask [num_tokens] uint8 says so, or
    num_valid_tokens, one int32. Of either pointer null says nothing."""
    padded = read_mask(args.padding_mask, token, args.num_tokens)
    if args.num_valid_tokens.toint() != 0:
        if token >= cute.make_tensor(args.num_valid_tokens, cute.make_layout(1))[0]:
            padded = Int32(1)
    return padded


@cute.jit
def read_counts(args, experts: cute.Tensor) -> cute.Tensor:
    """logical_count of a lane's experts, both int32 registers; there is a map.

    An index beyond the experts is taken as the last one. All counts are read before the first is
    used: the reads overlap.
    """
    counts = cute.make_rmem_tensor(experts.shape, Int32)
    table = cute.make_tensor(args.logical_count, cute.make_layout(args.num_experts))
    for i in cutlass.range_constexpr(cute.size(experts)):
        counts[i] = table[cutlass.min(experts[i], args.num_experts - 1)]
    return counts


@cute.jit
def read_names(args, experts: cute.Tensor, counts: cute.Tensor, token: Int32) -> cute.Tensor:
    """Physical ids of a lane's experts for a row, the same for all lanes: replica token mod count
    of each. int32 registers; there is a map; token is below 64.

    An index beyond the experts is taken as the last one, and a count out of 1 .. max_replicas as
    the nearest that is in it: the tables are the caller's, and may be rewritten at any time.
    """
    names = cute.make_rmem_tensor(experts.shape, Int32)
    size = args.num_experts * args.max_replicas
    table = cute.make_tensor(args.to_physical, cute.make_layout(size))
    # A remainder a lane instead of one an expert: lane c - 1 has that of count c. A count from 33
    # on goes into a token at most once.
    remainder = token % (cute.arch.lane_idx() + 1)
    for i in cutlass.range_constexpr(cute.size(experts)):
        count = cutlass.max(cutlass.min(counts[i], args.max_replicas), 1)
        replica = cute.arch.shuffle_sync(remainder, cutlass.min(count, 32) - 1)
        beyond = choose(token >= count, token - count, token)
        replica = choose(count > 32, beyond, replica)
        expert = cutlass.min(experts[i], args.num_experts - 1)
        names[i] = table[expert * args.max_replicas + replica]
    return names


class Row(NamedTuple):
    """A lane's column of a token's row. Made before the token's sums are waited for, and so that an
    option that is off adds no step to the end of the chain.

    The weight is score / (norm * total + otherwise) * scale + added.
    """

    weight: cute.Pointer
    id: cute.Pointer  # of the low half where ids are int64
    is_wide: Int32
    is_stored: cutlass.Boolean
    shared_id: Int32  # of a lane that has a shared expert, or nothing
    norm: Float32
    otherwise: Float32
    scale: Float32
    added: Float32


@cute.jit
def row_of(args, token: Int32) -> Row:
    """Lane r < top_k has rank r, the next lanes the shared experts, the rest nothing."""
    lane = cute.arch.lane_idx()
    words = choose(args.ids_are_int64 != 0, Int32(2), Int32(1))
    norms = args.norm_topk_prob != 0
    return Row(
        weight=args.out_weights + (Int64(token) * args.out_weights_stride + lane),
        id=args.out_ids + (Int64(token) * args.out_ids_stride + lane) * words,
        is_wide=args.ids_are_int64,
        is_stored=lane < args.top_k + args.num_shared_slots,
        shared_id=args.num_experts + lane - args.top_k,
        norm=choose(norms, Float32(1.0), Float32(0.0)),
        otherwise=choose(norms, Float32(1e-20), Float32(1.0)),
        scale=args.routed_scaling_factor,
        added=choose(lane < args.top_k, Float32(0.0), Float32(1.0)),
    )


@cute.jit
def store(row: Row, name: Int32, score: Float32, total: Float32):
    """Weigh and store a token's row: lane r < top_k has rank r, the next shared_id and score 0."""
    divisor = fused(total, row.norm, row.otherwise)
    weight = fused(quotient(score, divisor, reciprocal(divisor)), row.scale, row.added)
    store_column(row, name, weight)


@cute.jit
def store_padding(row: Row):
    """id -1 and weight 0 in every column."""
    store_column(row, Int32(-1), Float32(0.0))


@cute.jit
def store_column(row: Row, name: Int32, weight: Float32):
    """Store a lane's column, if it has one."""
    if row.is_stored:
        cute.make_tensor(row.weight, cute.make_layout(1))[0] = weight
        ids = cute.make_tensor(row.id, cute.make_layout(2))
        ids[0] = name
        if row.is_wide != 0:
            ids[1] = name >> 31
