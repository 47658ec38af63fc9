"""A token's experts from all its tiles: entries in the global workspace, and the warp that merges.

See router_decode's module for who writes, who merges and why that ends.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, Uint64

from build_kernels.kernels.select import NOT_A_CANDIDATE, float_of, take_top_k
from build_kernels.kernels.shapes import MAX_DECODE_TOKENS, MAX_EXPERTS


@cute.jit
def draw_ticket(workspace: cute.Pointer, token: Int32, num_tiles: Int32) -> Int32:
    """How many of the token's owner CTAs had drawn before this one."""
    ticket = Int32(0)
    if num_tiles > 1:
        ticket = cute.arch.inline_ptx(
            "atom.relaxed.gpu.global.inc.u32 {$w0}, [{$r0}], {$r1};",
            write_only_types=[Int32],
            read_only_args=[ticket_of(workspace, token), num_tiles - 1],
        )
    return ticket


@cute.jit
def merge(
    max_tiles: cutlass.Constexpr[int],
    workspace: cute.Pointer,
    token: Int32,
    num_tiles: Int32,
    top_k: Int32,
    otherwise: Int32,
):
    """Wait for a token's entries, 2 num_tiles experts to a lane; clear them; take the top_k.

    max_tiles: how many tiles there are registers for; the tree of every round is as wide.
    """
    lane = cute.arch.lane_idx()
    words = cute.make_rmem_tensor((2 * max_tiles,), Uint64)
    words.fill(Uint64(NOT_A_CANDIDATE << 32))
    waiting = Int32(1)
    while waiting != 0:
        missing = Int32(0)
        for i in cutlass.range_constexpr(0, 2 * max_tiles, 2):
            if i < 2 * num_tiles:
                words[i], words[i + 1] = cute.arch.inline_ptx(
                    "ld.relaxed.gpu.global.v2.b64 {{$w0}, {$w1}}, [{$r0}];",
                    write_only_types=[Uint64, Uint64],
                    read_only_args=[entry_of(workspace, token, lane, i)],
                )
                if words[i] == 0 or words[i + 1] == 0:
                    missing = Int32(1)
        waiting = Int32(cute.arch.vote_ballot_sync(missing != 0))

    keys = cute.make_rmem_tensor((2 * max_tiles,), Uint32)
    scores = cute.make_rmem_tensor((2 * max_tiles,), Float32)
    for i in cutlass.range_constexpr(2 * max_tiles):
        keys[i] = Uint32(words[i] >> 32)
        scores[i] = float_of(Uint32(words[i] & 0xFFFFFFFF))
    for i in cutlass.range_constexpr(0, 2 * max_tiles, 2):
        if i < 2 * num_tiles:
            cute.arch.inline_ptx(
                "st.relaxed.gpu.global.v2.b64 [{$r0}], {{$r1}, {$r1}};",
                read_only_args=[entry_of(workspace, token, lane, i), Uint64(0)],
            )
    return take_top_k(keys, scores, 2 * num_tiles * lane, top_k, otherwise)


@cute.jit
def entry_of(workspace: cute.Pointer, token: Int32, lane: Int32, register: Int32):
    """Pointer to the entry that `lane` merges in `register`; a warp's 16-byte loads coalesce."""
    return cute.recast_ptr(workspace, dtype=Uint64) + (
        token * MAX_EXPERTS + (register // 2) * 64 + lane * 2 + register % 2
    )


@cute.jit
def ticket_of(workspace: cute.Pointer, token: Int32):
    """Pointer to a token's ticket counter."""
    return cute.recast_ptr(workspace, dtype=Int32) + 2 * MAX_DECODE_TOKENS * MAX_EXPERTS + token
