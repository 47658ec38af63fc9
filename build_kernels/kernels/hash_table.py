"""The table of a hash layer: which experts a token id has."""

import cutlass.cute as cute
from cutlass import Int32, Int64

from build_kernels.kernels.shapes import MAX_TOP_K


@cute.jit
def lookup(args, token: Int32, slot: Int32) -> Int32:
    """The expert in a token's slot; -1 for no such token or slot, or an id not in the args."""
    expert = Int32(-1)
    if token < args.num_tokens and slot < args.top_k:
        layout = cute.make_layout(args.num_tokens)
        word = Int64(0)
        if args.input_ids_are_int64 != 0:
            wide = cute.recast_ptr(args.input_ids.align(8), dtype=Int64)
            word = cute.make_tensor(wide, layout)[token]
        else:
            word = Int64(cute.make_tensor(args.input_ids, layout)[token])
        if word >= 0 and word < args.vocab_size:
            row = cute.make_tensor(args.tid2eid + word * args.top_k, cute.make_layout(MAX_TOP_K))
            expert = row[slot]
    return expert
