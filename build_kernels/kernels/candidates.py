"""The candidates of a token from all expert tiles, in the global workspace, and their merge.

See decode.py for which CTA writes, which one merges, and why that ends.

workspace
    candidates   [token, MAX_EXPERTS] uint64, key << 32 | score bits, in the order of the merge
    tickets      [token] int32
Both are zero between launches.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, Uint64

from build_kernels.kernels.partial_sums import lane_expert
from build_kernels.kernels.score import bits_of, float_of
from build_kernels.kernels.shapes import (
    CANDIDATE_BYTES,
    EXPERT_TILE,
    MAX_DECODE_TOKENS,
    MAX_EXPERTS,
)
from build_kernels.kernels.top_k import NOT_A_CANDIDATE, take_top_k


@cute.jit
def draw_ticket(workspace: cute.Pointer, token: Int32, num_tiles: Int32) -> Int32:
    """Return how many of the token's owner CTAs have drawn before this one."""
    ticket = Int32(0)
    if num_tiles > 1:
        # inc wraps to 0 at num_tiles - 1: the last draw leaves a zero for the next launch.
        ticket = cute.arch.inline_ptx(
            "atom.relaxed.gpu.global.inc.u32 {$w0}, [{$r0}], {$r1};",
            write_only_types=[Int32],
            read_only_args=[ticket_of(workspace, token), num_tiles - 1],
        )
    return ticket


@cute.jit
def publish(pointer: cute.Pointer, key: Uint32, score: Float32):
    """Write one candidate. The word is never zero, so one relaxed store needs no fence or flag."""
    word = (Uint64(key) << 32) | Uint64(bits_of(score))
    cute.arch.store(pointer, word, sem="relaxed", scope="gpu")


@cute.jit
def merge(
    max_tiles: cutlass.Constexpr[int],
    workspace: cute.Pointer,
    token: Int32,
    num_tiles: Int32,
    top_k: Int32,
    otherwise: Int32,
):
    """Wait for all of a token's candidates, clear them and take the top_k, by one warp.

    A lane takes 2 * num_tiles consecutive experts. `max_tiles` is the number of tiles that there
    are registers for, and the width of the tree of each round.
    """
    lane = cute.arch.lane_idx()
    # (2 * max_tiles,): candidates that do not exist stay out of the selection
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
                    read_only_args=[candidate_of(workspace, token, lane, i)],
                )
                if words[i] == 0 or words[i + 1] == 0:
                    missing = Int32(1)
        waiting = Int32(cute.arch.vote_ballot_sync(missing != 0))

    keys = cute.make_rmem_tensor((2 * max_tiles,), Uint32)
    scores = cute.make_rmem_tensor((2 * max_tiles,), Float32)
    for i in cutlass.range_constexpr(2 * max_tiles):
        keys[i] = Uint32(words[i] >> 32)
        scores[i] = float_of(Uint32(words[i] & 0xFFFFFFFF))
    # Zero again before the next launch, which draws its tickets after this one has ended.
    for i in cutlass.range_constexpr(0, 2 * max_tiles, 2):
        if i < 2 * num_tiles:
            cute.arch.inline_ptx(
                "st.relaxed.gpu.global.v2.b64 [{$r0}], {{$r1}, {$r1}};",
                read_only_args=[candidate_of(workspace, token, lane, i), Uint64(0)],
            )
    return take_top_k(keys, scores, 2 * num_tiles * lane, top_k, otherwise)


@cute.jit
def candidate_of(workspace: cute.Pointer, token: Int32, lane: Int32, register: Int32):
    """Return a pointer to the candidate that `lane` merges in `register`.

    Pairs of registers are 64 candidates apart, so that a warp's 16-byte loads coalesce.
    """
    return cute.recast_ptr(workspace, dtype=Uint64) + (
        token * MAX_EXPERTS + (register // 2) * 64 + lane * 2 + register % 2
    )


@cute.jit
def own_candidates(workspace: cute.Pointer, token: Int32, tile: Int32, num_tiles: Int32):
    """Return pointers to the candidates of a lane's two experts, as the merge addresses them.

    The division is why a kernel computes them before it multiplies.
    """
    pointers = []
    for half in cutlass.range_constexpr(2):
        expert = EXPERT_TILE * tile + lane_expert(half)
        # Experts per lane of the merging warp.
        run = 2 * num_tiles
        pointers.append(candidate_of(workspace, token, expert // run, expert % run))
    return pointers


@cute.jit
def ticket_of(workspace: cute.Pointer, token: Int32):
    """Return a pointer to a token's ticket counter, behind all candidates."""
    counters = cute.recast_ptr(workspace, dtype=Int32)
    return counters + MAX_DECODE_TOKENS * MAX_EXPERTS * CANDIDATE_BYTES // 4 + token
