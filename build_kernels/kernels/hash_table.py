"""The table of a hash layer: which experts a token id has."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, Int64

from build_kernels.kernels.select import MAX_TOP_K


class HashTable(NamedTuple):
    """tid2eid [vocab_size, top_k] int32 and input_ids [num_tokens] int32 or int64, in a kernel."""

    tid2eid: cute.Pointer
    input_ids: cute.Pointer
    input_ids_are_int64: Int32
    vocab_size: Int32
    num_tokens: Int32
    top_k: Int32


@cute.jit
def lookup(table: HashTable, token: Int32, slot: Int32) -> Int32:
    """The expert in a token's slot; -1 for no such token or slot, or an id not in the table."""
    expert = Int32(-1)
    if token < table.num_tokens and slot < table.top_k:
        layout = cute.make_layout(table.num_tokens)
        word = Int64(0)
        if table.input_ids_are_int64 != 0:
            wide = cute.recast_ptr(table.input_ids.align(8), dtype=Int64)
            word = cute.make_tensor(wide, layout)[token]
        else:
            word = Int64(cute.make_tensor(table.input_ids, layout)[token])
        if word >= 0 and word < table.vocab_size:
            row = cute.make_tensor(table.tid2eid + word * table.top_k, cute.make_layout(MAX_TOP_K))
            expert = row[slot]
    return expert
