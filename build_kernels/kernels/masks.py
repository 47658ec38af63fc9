"""The kinds of a call's rows: image rows, padding rows, rows of forced ids."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from build_kernels.kernels.shapes import MAX_TOP_K


@cute.jit
def read_mask(mask: cute.Pointer, token: Int32, num_tokens: Int32) -> Int32:
    """Return mask[token] of a [num_tokens] uint8 mask; 0 if the mask is null."""
    value = Int32(0)
    if mask.toint() != 0 and token < num_tokens:
        # [num_tokens]; the layout only bounds the coordinate
        value = Int32(cute.make_tensor(mask, cute.make_layout(1 << 20))[token])
    return value


@cute.jit
def read_id(ids: cute.Pointer, index: Int64, is_int64: Int32) -> Int64:
    """Return ids[index] of int32 or int64 ids."""
    value = Int64(0)
    # The layouts only bound the coordinate.
    if is_int64 != 0:
        wide = cute.recast_ptr(ids.align(8), dtype=Int64)
        value = cute.make_tensor(wide + index, cute.make_layout(1))[0]
    else:
        value = Int64(cute.make_tensor(ids + index, cute.make_layout(1))[0])
    return value


@cute.jit
def has_image_id(args, token: Int32) -> Int32:
    """Return 1 if the row's token id is an image's: one of num_image_ids from first_image_id on."""
    is_image = Int32(0)
    if args.num_image_ids != 0 and token < args.num_tokens:
        place = read_id(args.input_ids, Int64(token), args.input_ids_are_int64)
        place = place - args.first_image_id
        if place >= 0 and place < args.num_image_ids:
            is_image = Int32(1)
    return is_image


@cute.jit
def is_forced(args, token: Int32) -> Int32:
    """Return nonzero if the row takes the forced ids; all rows do if there is no mask."""
    forced = Int32(0)
    if args.forced_ids.toint() != 0 and token < args.num_tokens:
        forced = Int32(1)
        if args.forced_mask.toint() != 0:
            forced = read_mask(args.forced_mask, token, args.num_tokens)
    return forced


@cute.jit
def forced_expert(args, token: Int32, slot: Int32) -> Int32:
    """Return forced_ids[token, slot] if that is an expert, else -1; there must be forced ids."""
    expert = Int32(-1)
    if token < args.num_tokens and slot < args.top_k:
        index = Int64(token) * args.forced_ids_stride + slot
        forced = read_id(args.forced_ids, index, args.forced_ids_are_int64)
        if forced >= 0 and forced < args.num_experts:
            expert = Int32(forced)
    return expert


@cute.jit
def or_repeated(condition, expert: Int32, first_lane, slot: Int32):
    """Return `condition`, or whether a lane's expert stands in an earlier slot of its row.

    The lanes of a row follow `first_lane` in the order of the slots. All of the warp call it.
    """
    for other in cutlass.range_constexpr(MAX_TOP_K - 1):
        same = cute.arch.shuffle_sync(expert, first_lane + other) == expert
        condition = condition or (other < slot and same)
    return condition


@cute.jit
def is_padding(args, token: Int32) -> Int32:
    """Return nonzero if the row is padding.

    That is, if `padding_mask[token]` is set or `token >= *num_valid_tokens`. A null pointer
    disables its test.
    """
    padding = read_mask(args.padding_mask, token, args.num_tokens)
    if args.num_valid_tokens.toint() != 0:
        if token >= cute.make_tensor(args.num_valid_tokens, cute.make_layout(1))[0]:
            padding = Int32(1)
    return padding
