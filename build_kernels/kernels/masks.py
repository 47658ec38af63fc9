"""The masks of a call: image rows and padding rows."""

import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def read_mask(mask: cute.Pointer, token: Int32, num_tokens: Int32) -> Int32:
    """Return mask[token] of a [num_tokens] uint8 mask; 0 if the mask is null."""
    value = Int32(0)
    if mask.toint() != 0 and token < num_tokens:
        # [num_tokens]; the layout only bounds the coordinate
        value = Int32(cute.make_tensor(mask, cute.make_layout(1 << 20))[token])
    return value


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
