"""The row flags of a token, in one word: its ticket, its kind, and the outputs of the call."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32, Uint64

from build_kernels.kernels.candidates import (
    candidates_of,
    draw_ticket,
    load_neighbours,
    neighbours_of,
    trap_if,
)
from build_kernels.kernels.masks import (
    forced_expert,
    has_image_id,
    is_forced,
    is_padding,
    or_repeated,
    read_mask,
)
from build_kernels.kernels.outputs import has_rare_outputs
from build_kernels.kernels.partial_sums import owned_token
from build_kernels.kernels.score import choose
from build_kernels.kernels.shapes import EXPERT_TILE, MAX_DECODE_TOKENS, MAX_EXPERTS, MAX_TOP_K

MAX_TILES = MAX_EXPERTS // EXPERT_TILE
# Rows of forced ids that a warp reads at once, a slot per lane.
FORCED_ROWS = 32 // MAX_TOP_K
# Rows of left-over candidates that a warp reads at once.
LEFT_OVER_ROWS = 8
# The ticket in the low bits, then the flags. Those of the call spare the epilogue to read the
# parameters: a cold one took 0.05 us of what comes after the sums.
MAX_TICKET = MAX_TILES - 1
IS_IMAGE = MAX_TILES
IS_PADDING = 2 * MAX_TILES
IS_FORCED = 4 * MAX_TILES
# By the order of a table's row or of forced ids.
IS_RANKED = 8 * MAX_TILES
HAS_RARE_OUTPUTS = 16 * MAX_TILES
HAS_LOGITS = 32 * MAX_TILES


def row_flags(storage, max_owned: int) -> cute.Tensor:
    """Return (epilogue warp,) int32: the ticket and the flags of each owned token."""
    return cute.make_tensor(storage.row_flags.data_ptr(), cute.make_layout(max_owned))


@cute.jit
def publish_row_flags(
    storage,
    max_owned: cutlass.Constexpr[int],
    splits: cutlass.Constexpr[int],
    args,
    split: Int32,
    tile: Int32,
    num_tiles: Int32,
    first_token=0,
    m_tiles: cutlass.Constexpr[int] = 1,
    max_tokens: cutlass.Constexpr[int] = MAX_DECODE_TOKENS,
    shares_merges: cutlass.Constexpr[bool] = False,
    first_of_launch=0,
):
    """Draw a ticket and read the masks for each of the CTA's tokens, by one warp.

    first_token: that of the CTA's token tile. first_of_launch: the token that has the first place
    in the workspace. The CTA has m_tiles of a token's num_tiles expert
    tiles, from `tile` on. `row_flags_full` of the storage takes 32 arrivals. The masks, the forced
    ids and the workspace may be in use until the grid before has ended; input_ids may not.

    shares_merges: each owner draws the tickets of an equal share of the tokens late, see
    `publish_tickets`, so that it draws them last, and merges them, unless it started much earlier.
    """
    lane = cute.arch.lane_idx()
    token = first_token + owned_token(splits, split, lane)
    num_owners = num_tiles // m_tiles
    ticket = Int32(0)
    neighbours = tuple(neighbours_of(tile + i, num_tiles) for i in range(m_tiles))
    has_id = has_image_id(args, token)
    # Always true: makes the wait depend on the division, which the compiler would do after it.
    if neighbours[-1] >= 0:
        cute.arch.griddepcontrol_wait()
    # Read before the tickets are drawn, so before any merge: a word that no owner published cannot
    # pass for a candidate.
    left_over = Uint64(0)
    last = max(0, max_owned - LEFT_OVER_ROWS)
    rows = (max_owned, splits, args, first_token, split)
    of_tiles = (neighbours, num_tiles, max_tokens, first_of_launch)
    for first in cutlass.range(0, last, LEFT_OVER_ROWS, unroll=1):
        for word in left_over_words(*rows, first, *of_tiles):
            left_over = left_over | word
    words = left_over_words(*rows, last, *of_tiles)
    unknown = publish_forced(storage, max_owned, splits, args, split, first_token)
    is_late = False
    if cutlass.const_expr(shares_merges):
        is_late = lane % num_owners == tile // m_tiles
    if lane < max_owned and token < args.num_tokens:
        if not is_late:
            ticket = draw_ticket(args.workspace, token - first_of_launch, num_owners)
        is_image = has_id | read_mask(args.image_mask, token, args.num_tokens)
        forced = is_forced(args, token)
        padding = is_padding(args, token) | choose(forced != 0, unknown, Int32(0))
        flags = row_flags(storage, max_owned)
        flags[lane] = (
            # A ticket out of range, which ends in a trap, sets no flag meanwhile.
            (ticket & MAX_TICKET)
            | flag(is_image != 0, IS_IMAGE)
            | flag(padding != 0, IS_PADDING)
            | flag(forced != 0, IS_FORCED)
            | flag(forced != 0 or (is_image == 0 and args.tid2eid.toint() != 0), IS_RANKED)
            | flag(has_rare_outputs(args), HAS_RARE_OUTPUTS)
            | flag(args.out_logits.toint() != 0, HAS_LOGITS)
        )
    cute.arch.mbarrier_arrive(storage.row_flags_full.data_ptr())
    # After the arrival, which the epilogue waits for. With a ticket out of range perhaps no warp
    # merges. One test outside the branch: ptxas compiled what follows a trap in it twice.
    is_damaged = Uint32(ticket) >= Uint32(num_owners)
    for word in words:
        left_over = left_over | word
    is_damaged = is_damaged | (left_over != 0)
    trap_if(cute.arch.vote_ballot_sync(is_damaged) != 0)
    if cutlass.const_expr(shares_merges):
        is_late = is_late and lane < max_owned and token < args.num_tokens
        ticket = publish_tickets(
            storage, max_owned, args, token - first_of_launch, num_owners, ticket, is_late
        )
        trap_if(cute.arch.vote_ballot_sync(Uint32(ticket) >= Uint32(num_owners)) != 0)


def tickets(storage, max_owned: int) -> cute.Tensor:
    """Return (owned token,) int32: the tickets, if the merges are shared."""
    return cute.make_tensor(storage.tickets.data_ptr(), cute.make_layout(max_owned))


@cute.jit
def publish_tickets(
    storage,
    max_owned: cutlass.Constexpr[int],
    args,
    place: Int32,
    num_owners: Int32,
    ticket: Int32,
    is_late,
) -> Int32:
    """Draw the late tickets when the sums are there, while they are scored; publish all tickets.

    place: the token's in the workspace.
    `tickets_full` of the storage takes 32 arrivals. Return a lane's ticket.
    """
    cute.arch.mbarrier_wait(storage.sums_full.data_ptr(), 0)
    lane = cute.arch.lane_idx()
    if is_late:
        ticket = draw_ticket(args.workspace, place, num_owners)
    if lane < max_owned:
        tickets(storage, max_owned)[lane] = ticket
    cute.arch.mbarrier_arrive(storage.tickets_full.data_ptr())
    return ticket


@cute.jit
def left_over_words(
    max_owned: cutlass.Constexpr[int],
    splits: cutlass.Constexpr[int],
    args,
    first_token,
    split: Int32,
    first,
    neighbours: tuple,
    num_tiles: Int32,
    max_tokens: cutlass.Constexpr[int],
    first_of_launch,
):
    """Load a lane's candidates of LEFT_OVER_ROWS owned tokens from number `first` on, at most."""
    words = []
    for i in cutlass.range_constexpr(min(max_owned, LEFT_OVER_ROWS)):
        token = first_token + owned_token(splits, split, first + i)
        for j in cutlass.range_constexpr(len(neighbours)):
            words += load_neighbours(
                candidates_of(args.workspace, token - first_of_launch, num_tiles, max_tokens)
                + neighbours[j],
                num_tiles > 1 and token < args.num_tokens,
            )
    return tuple(words)


def forced_experts(storage, max_owned: int) -> cute.Tensor:
    """Return (slot, epilogue warp) int32: the forced ids of each owned token, -1 for none."""
    return cute.make_tensor(storage.forced.data_ptr(), cute.make_layout((MAX_TOP_K, max_owned)))


@cute.jit
def publish_forced(
    storage,
    max_owned: cutlass.Constexpr[int],
    splits: cutlass.Constexpr[int],
    args,
    split: Int32,
    first_token,
) -> Int32:
    """Read the forced ids of the CTA's tokens, one a lane, if there are any.

    Return, to lane w, nonzero if those of warp w's token are not top_k different experts.
    """
    unknown = Int32(0)
    lane = cute.arch.lane_idx()
    for first in cutlass.range_constexpr(0, max_owned, FORCED_ROWS):
        if args.forced_ids.toint() != 0:
            warp, slot = first + lane // MAX_TOP_K, lane % MAX_TOP_K
            is_slot = warp < max_owned and slot < args.top_k
            expert = Int32(-1)
            if is_slot:
                expert = forced_expert(args, first_token + owned_token(splits, split, warp), slot)
            if warp < max_owned:
                forced_experts(storage, max_owned)[slot, warp] = expert
            is_wrong = or_repeated(expert < 0, expert, lane - slot, slot)
            wrong = Int32(cute.arch.vote_ballot_sync(is_slot and is_wrong))
            wrong = (wrong >> (lane % FORCED_ROWS * MAX_TOP_K)) & ((1 << MAX_TOP_K) - 1)
            # Of the first rows by every FORCED_ROWS-th lane; the next rows' lanes then take theirs.
            unknown = choose(lane >= first, wrong, unknown) if first > 0 else wrong
    return unknown


@cute.jit
def rank_forced(
    storage,
    max_owned: cutlass.Constexpr[int],
    warp: Int32,
    experts: tuple,
    ranks: cute.Tensor,
):
    """Set `ranks` to the places of a lane's experts in the forced ids of a warp's token.

    MAX_TOP_K for an expert that is not among them.
    """
    forced = forced_experts(storage, max_owned)
    ranks.fill(MAX_TOP_K)
    for rank in cutlass.range_constexpr(MAX_TOP_K):
        chosen = forced[rank, warp]
        for i in cutlass.range_constexpr(len(experts)):
            ranks[i] = choose(chosen == experts[i], Int32(rank), ranks[i])


def flag(condition, bit: int) -> Int32:
    """Return `bit` if the condition holds, else 0."""
    return choose(condition, Int32(bit), Int32(0))
