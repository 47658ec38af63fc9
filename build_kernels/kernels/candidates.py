"""The candidates of a token from all expert tiles, in the global workspace, and their merge.

See decode.py for which CTA writes, which one merges, and why that ends.

workspace
    tickets      [max_tokens] int32, of the kernel
    candidates   [token, EXPERT_TILE * num_tiles] uint64, key << 32 | score bits, in the order of
                 the merge
Both are zero between launches. Every owner publishes whatever it reads in the masks, and the merger
clears whatever it merges: no input, whenever it changes, stops a launch or leaves a word behind. A
word that something else left there ends the launch by a trap.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, Uint64

from build_kernels.kernels.partial_sums import lane_expert
from build_kernels.kernels.score import bits_of, choose, float_of
from build_kernels.kernels.shapes import EXPERT_TILE, MAX_DECODE_TOKENS, MERGE_WAIT_LIMIT_MS
from build_kernels.kernels.top_k import NOT_A_CANDIDATE, PADDING_KEY, take_top_k

# Two neighbouring candidates in one load.
LOAD_TWO = "ld.relaxed.gpu.global.v2.b64 {{$w0}, {$w1}}"
# Polls between two looks at the clock: about a millisecond.
POLLS_PER_LOOK = 1024


@cute.jit
def trap_if(condition):
    """End the launch by a trap if the condition holds. A predicate, not a branch."""
    cute.arch.inline_ptx(
        "{ .reg .pred fault; setp.ne.s32 fault, {$r0}, 0; @fault trap; }",
        read_only_args=[choose(condition, Int32(1), Int32(0))],
    )


@cute.jit
def neighbours_of(tile: Int32, num_tiles: Int32) -> Int32:
    """Return the index, within a token, of the candidates of experts 2 l and 2 l + 1 of a tile.

    They are neighbours, aligned to 16 bytes. In assembly, which hides that it is not negative.
    """
    expert = EXPERT_TILE * tile + 2 * cute.arch.lane_idx()
    run = 2 * num_tiles
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};",
        write_only_types=[Int32],
        read_only_args=[place_of(expert // run, expert % run)],
    )


@cute.jit
def high_word(word: Uint64) -> Uint32:
    """Return the high half of a word. In assembly: LLVM would compare whole words instead."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 low; mov.b64 {low, {$w0}}, {$r0}; }",
        write_only_types=[Uint32],
        read_only_args=[word],
    )


@cute.jit
def load_neighbours(candidates: cute.Pointer, is_there) -> tuple:
    """Load two candidates, or zeros if they are not there.

    A predicate: at the end of a branch the warp would wait for the words.
    """
    return cute.arch.inline_ptx(
        "{ .reg .pred is_there; setp.ne.s32 is_there, {$r0}, 0; "
        "mov.b64 {$w0}, 0; mov.b64 {$w1}, 0; "
        f"@is_there {LOAD_TWO}, [{{$r1}}]; }}",
        write_only_types=[Uint64, Uint64],
        read_only_args=[choose(is_there, Int32(1), Int32(0)), candidates],
    )


@cute.jit
def draw_ticket(workspace: cute.Pointer, token: Int32, num_owners: Int32) -> Int32:
    """Return how many of the token's owner CTAs have drawn before this one."""
    ticket = Int32(0)
    if num_owners > 1:
        # inc wraps to 0 at num_owners - 1: the last draw leaves a zero for the next launch.
        ticket = cute.arch.inline_ptx(
            "atom.relaxed.gpu.global.inc.u32 {$w0}, [{$r0}], {$r1};",
            write_only_types=[Int32],
            read_only_args=[ticket_of(workspace, token), num_owners - 1],
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
    max_tokens: cutlass.Constexpr[int] = MAX_DECODE_TOKENS,
):
    """Wait for all of a token's candidates, clear them and take the top_k, by one warp.

    Return take_top_k's values, and whether a tile takes the row for padding. A lane takes
    2 * num_tiles consecutive experts. `max_tiles` is the number of tiles that there are registers
    for, and the width of the tree of each round. A wait of MERGE_WAIT_LIMIT_MS ends by a trap.
    """
    lane = cute.arch.lane_idx()
    candidates = candidates_of(workspace, token, num_tiles, max_tokens)
    # (2 * max_tiles,): candidates that do not exist stay out of the selection
    words = cute.make_rmem_tensor((2 * max_tiles,), Uint64)
    words.fill(Uint64(NOT_A_CANDIDATE << 32))
    waiting = Int32(1)
    started = Uint64(0)
    while waiting != 0:
        polls = Int32(POLLS_PER_LOOK)
        while waiting != 0 and polls != 0:
            for i in cutlass.range_constexpr(0, 2 * max_tiles, 2):
                if i < 2 * num_tiles:
                    words[i], words[i + 1] = cute.arch.inline_ptx(
                        f"{LOAD_TWO}, [{{$r0}}];",
                        write_only_types=[Uint64, Uint64],
                        read_only_args=[candidates + place_of(lane, i)],
                    )
            # A published key is not 0: one tree of minima instead of a test of each word.
            least = [high_word(words[i]) for i in range(2 * max_tiles)]
            while cutlass.const_expr(len(least) > 1):
                least = [
                    cutlass.min(*least[i : i + 2]) if i + 1 < len(least) else least[i]
                    for i in range(0, len(least), 2)
                ]
            waiting = Int32(cute.arch.vote_ballot_sync(least[0] == 0))
            polls -= 1
        if waiting != 0:
            now = Uint64(cute.arch.globaltimer())
            started = choose(started == 0, now, started)
            trap_if(now - started > MERGE_WAIT_LIMIT_MS * 1_000_000)

    keys = cute.make_rmem_tensor((2 * max_tiles,), Uint32)
    scores = cute.make_rmem_tensor((2 * max_tiles,), Float32)
    for i in cutlass.range_constexpr(2 * max_tiles):
        keys[i] = high_word(words[i])
        scores[i] = float_of(Uint32(words[i] & 0xFFFFFFFF))
    # Zero again before the next launch, which draws its tickets after this one has ended.
    for i in cutlass.range_constexpr(0, 2 * max_tiles, 2):
        if i < 2 * num_tiles:
            cute.arch.inline_ptx(
                "st.relaxed.gpu.global.v2.b64 [{$r0}], {{$r1}, {$r1}};",
                read_only_args=[candidates + place_of(lane, i), Uint64(0)],
            )
    # Some lane's first candidate is of each tile, and all candidates of a tile say the same.
    is_padding = cute.arch.vote_ballot_sync(keys[0] == PADDING_KEY) != 0
    first_expert = 2 * num_tiles * lane
    best = take_top_k(keys, scores, first_expert, top_k, otherwise, is_padding)
    return *best, is_padding


@cute.jit
def select_alone(
    keys: cute.Tensor, scores: cute.Tensor, top_k: Int32, otherwise: Int32, is_padding
):
    """Take the top_k of the only tile: give lane l experts 2 l and 2 l + 1, then take.

    take_top_k needs runs of consecutive experts, while `lane_expert` leaves 8 between two.
    """
    expert = 2 * cute.arch.lane_idx()
    source = expert // 16 * 8 + expert % 8
    is_upper = expert % 16 >= 8
    # (2,): experts 2 l and 2 l + 1
    ordered_keys = cute.make_rmem_tensor((2,), Uint32)
    ordered_scores = cute.make_rmem_tensor((2,), Float32)
    for i in cutlass.range_constexpr(2):
        ordered_keys[i] = choose(
            is_upper,
            cute.arch.shuffle_sync(keys[1], source + i),
            cute.arch.shuffle_sync(keys[0], source + i),
        )
        ordered_scores[i] = choose(
            is_upper,
            cute.arch.shuffle_sync(scores[1], source + i),
            cute.arch.shuffle_sync(scores[0], source + i),
        )
    return take_top_k(ordered_keys, ordered_scores, expert, top_k, otherwise, is_padding)


@cute.jit
def candidates_of(
    workspace: cute.Pointer,
    token: Int32,
    num_tiles: Int32,
    max_tokens: cutlass.Constexpr[int] = MAX_DECODE_TOKENS,
) -> cute.Pointer:
    """Return a pointer to a token's candidates, behind the tickets of max_tokens."""
    return cute.recast_ptr(workspace, dtype=Uint64) + (
        max_tokens // 2 + token * num_tiles * EXPERT_TILE
    )


def place_of(lane: Int32, register: Int32) -> Int32:
    """Return the index, within a token, of the candidate that `lane` merges in `register`.

    Pairs of registers are 64 candidates apart, so that a warp's 16-byte loads coalesce.
    """
    return register // 2 * EXPERT_TILE + lane * 2 + register % 2


@cute.jit
def own_places(tile: Int32, num_tiles: Int32) -> tuple:
    """Return the indices, within a token, of the candidates of a lane's two experts of a tile."""
    # Experts per lane of the merging warp.
    run = 2 * num_tiles
    return places_of([EXPERT_TILE * tile + lane_expert(half) for half in (0, 1)], run)


def places_of(experts, run: Int32) -> tuple:
    """Return the indices, within a token, of experts' candidates; the merger's lanes take `run`."""
    return tuple(place_of(expert // run, expert % run) for expert in experts)


@cute.jit
def own_candidates(
    args,
    token: Int32,
    places: tuple,
    num_tiles: Int32,
    first_token=0,
    max_tokens: cutlass.Constexpr[int] = MAX_DECODE_TOKENS,
) -> tuple:
    """Return pointers to the candidates of a lane's two experts, as the merge addresses them.

    first_token: the launch's, which has the first place in the workspace. The candidates are
    prefetched: without a use before the sums ptxas does the division after them, which took 0.1 us
    of a launch.
    """
    is_published = choose(token < args.num_tokens and num_tiles > 1, Int32(1), Int32(0))
    pointers = []
    for half in cutlass.range_constexpr(2):
        pointer = places[half] + candidates_of(
            args.workspace, token - first_token, num_tiles, max_tokens
        )
        cute.arch.inline_ptx(
            "{ .reg .pred is_published; setp.ne.s32 is_published, {$r0}, 0; "
            "@is_published prefetch.global.L2 [{$r1}]; }",
            read_only_args=[is_published, pointer],
        )
        pointers.append(pointer)
    return tuple(pointers)


@cute.jit
def ticket_of(workspace: cute.Pointer, token: Int32):
    """Return a pointer to a token's ticket counter, before all candidates."""
    return cute.recast_ptr(workspace, dtype=Int32) + token
