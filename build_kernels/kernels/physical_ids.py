"""The physical map of expert-parallel load balancing: logical expert to physical id.

Needs `args.to_physical` [num_experts, max_replicas] and `args.logical_count` [num_experts], both
int32 or both int64. The low word of an int64 is read. Both tables are the caller's and may be
rewritten at any time, so every index and count is clamped.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from build_kernels.kernels.score import choose


@cute.jit
def read_counts(args, experts: cute.Tensor) -> cute.Tensor:
    """Return logical_count of a lane's experts, as int32 registers like `experts`.

    An index beyond the experts is taken as the last one.
    """
    counts = cute.make_rmem_tensor(experts.shape, Int32)
    table = _words_of(args.logical_count, args, args.num_experts)
    # All counts are read before the first one is used, so that the reads overlap.
    for i in cutlass.range_constexpr(cute.size(experts)):
        counts[i] = table[cutlass.min(experts[i], args.num_experts - 1)]
    return counts


@cute.jit
def _words_of(table: cute.Pointer, args, size: Int32) -> cute.Tensor:
    """Return the low words [size] of a flat table of int32 or int64."""
    words = choose(args.map_is_int64 != 0, Int32(2), Int32(1))
    return cute.make_tensor(table, cute.make_layout(size, stride=words))


@cute.jit
def read_physical_ids(args, experts: cute.Tensor, counts: cute.Tensor, token: Int32) -> cute.Tensor:
    """Return the physical ids of a lane's experts for one row: replica token % count of each.

    Int32 registers like `experts`. `token` is below 64 and the same in all lanes. An index beyond
    the experts is taken as the last one, a count outside 1..max_replicas as the nearest inside.
    """
    physical_ids = cute.make_rmem_tensor(experts.shape, Int32)
    # [num_experts * max_replicas]
    table = _words_of(args.to_physical, args, args.num_experts * args.max_replicas)
    # One remainder per lane instead of one per expert: lane c - 1 computes that of count c. A count
    # above 32 goes into a token below 64 at most once.
    remainder = token % (cute.arch.lane_idx() + 1)
    for i in cutlass.range_constexpr(cute.size(experts)):
        count = cutlass.max(cutlass.min(counts[i], args.max_replicas), 1)
        replica = cute.arch.shuffle_sync(remainder, cutlass.min(count, 32) - 1)
        beyond = choose(token >= count, token - count, token)
        replica = choose(count > 32, beyond, replica)
        expert = cutlass.min(experts[i], args.num_experts - 1)
        physical_ids[i] = table[expert * args.max_replicas + replica]
    return physical_ids


@cute.jit
def read_physical_id(args, expert: Int32, token: Int32) -> Int32:
    """Return the physical id of one expert for one row, each lane's own: replica token % count.

    Clamps as read_physical_ids does.
    """
    place = cutlass.min(expert, args.num_experts - 1)
    counts = _words_of(args.logical_count, args, args.num_experts)
    count = cutlass.max(cutlass.min(counts[place], args.max_replicas), 1)
    table = _words_of(args.to_physical, args, args.num_experts * args.max_replicas)
    return table[place * args.max_replicas + token % count]
