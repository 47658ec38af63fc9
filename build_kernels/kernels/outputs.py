"""A token's row of each output: weights, ids, shared experts' columns, logical ids, logits."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64

from build_kernels.kernels.score import choose, fused, quotient, reciprocal

# Added to the sum of the scores; below FP32 resolution unless all scores are 0.
EPSILON = 1e-20


class OutputColumn(NamedTuple):
    """Where and how one lane stores its output column.

    Built before the wait on the partial sums, so disabled options add no latency after it. The
    weight is score / (norm * total + otherwise) * scale + added.
    """

    weight: cute.Pointer  # if weights are FP32
    id: cute.Pointer  # of the low word if ids are int64
    is_wide: Int32
    is_stored: cutlass.Boolean
    shared_id: Int32  # meaningful in a lane of a shared expert
    norm: Float32
    otherwise: Float32
    scale: Float32
    added: Float32


@cute.jit
def output_column(args, token: Int32) -> OutputColumn:
    """Return the lane's column of a token's row.

    Lane r < top_k has rank r, the next num_shared_slots lanes the shared experts, the rest nothing.
    """
    lane = cute.arch.lane_idx()
    words = choose(args.ids_are_int64 != 0, Int32(2), Int32(1))
    norms = args.norm_topk_prob != 0
    return OutputColumn(
        weight=args.out_weights + (Int64(token) * args.out_weights_stride + lane),
        id=args.out_ids + (Int64(token) * args.out_ids_stride + lane) * words,
        is_wide=args.ids_are_int64,
        is_stored=lane < args.top_k + args.num_shared_slots,
        shared_id=args.num_experts + lane - args.top_k,
        norm=choose(norms, Float32(1.0), Float32(0.0)),
        otherwise=choose(norms, Float32(EPSILON), Float32(1.0)),
        scale=args.routed_scaling_factor,
        # A shared expert has score 0, so this is its weight.
        added=choose(lane < args.top_k, Float32(0.0), args.shared_weight),
    )


@cute.jit
def has_rare_outputs(args) -> cutlass.Boolean:
    """Return whether `store` has more to do than to store FP32 weights and ids."""
    return args.weights_are_bfloat16 != 0 or args.out_logical_ids.toint() != 0


@cute.jit
def store(
    args,
    token: Int32,
    column: OutputColumn,
    expert: Int32,
    expert_id: Int32,
    score: Float32,
    total: Float32,
    is_padding: cutlass.Boolean,
    is_rare,
):
    """Compute the weight of the lane's expert and store its column; id -1, weight 0 for padding.

    A lane of a shared expert passes `shared_id` and score 0. is_rare: see `has_rare_outputs`; one
    test of a register instead of some of parameters, which cost 0.05 us at the end of a launch.
    """
    divisor = fused(total, column.norm, column.otherwise)
    weight = fused(quotient(score, divisor, reciprocal(divisor)), column.scale, column.added)
    weight = choose(is_padding, Float32(0.0), weight)
    expert_id = choose(is_padding, Int32(-1), expert_id)
    if column.is_stored:
        if is_rare:
            store_rarely(args, token, column, choose(is_padding, Int32(-1), expert), weight)
        else:
            cute.make_tensor(column.weight, cute.make_layout(1))[0] = weight
        # (low word, high word) of an int64, or one int32
        ids = cute.make_tensor(column.id, cute.make_layout(2))
        ids[0] = expert_id
        if column.is_wide != 0:
            # The sign's extension: -1 for padding.
            ids[1] = expert_id >> 31


@cute.jit
def store_rarely(args, token: Int32, column: OutputColumn, logical_id: Int32, weight: Float32):
    """Store a weight in either dtype, and the logical id of a lane's rank if the call asks."""
    lane = cute.arch.lane_idx()
    if args.weights_are_bfloat16 != 0:
        halves = cute.recast_ptr(args.out_weights, dtype=BFloat16)
        at = halves + (Int64(token) * args.out_weights_stride + lane)
        cute.make_tensor(at, cute.make_layout(1))[0] = BFloat16(weight)
    else:
        cute.make_tensor(column.weight, cute.make_layout(1))[0] = weight
    if args.out_logical_ids.toint() != 0 and lane < args.top_k:
        row = args.out_logical_ids + (Int64(token) * args.out_logical_ids_stride + lane)
        cute.make_tensor(row, cute.make_layout(1))[0] = logical_id


@cute.jit
def store_logits(args, token: Int32, is_asked, experts: tuple, logits: cute.Tensor):
    """Store the logits of a lane's experts in the row of out_logits, if the call asks for them."""
    if is_asked:
        for i in cutlass.range_constexpr(len(experts)):
            if experts[i] < args.num_experts:
                at = args.out_logits + (Int64(token) * args.out_logits_stride + experts[i])
                cute.make_tensor(at, cute.make_layout(1))[0] = logits[i]
