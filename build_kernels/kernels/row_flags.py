"""The row flags of a token: its ticket, and whether it is an image row or padding, in one word."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32

from build_kernels.kernels.candidates import (
    candidates_of,
    draw_ticket,
    load_neighbours,
    neighbours_of,
    trap_if,
)
from build_kernels.kernels.masks import is_padding, read_mask
from build_kernels.kernels.partial_sums import owned_token
from build_kernels.kernels.score import choose
from build_kernels.kernels.shapes import EXPERT_TILE, MAX_EXPERTS

MAX_TILES = MAX_EXPERTS // EXPERT_TILE
# The ticket in the low bits, then two flags.
MAX_TICKET = MAX_TILES - 1
IS_IMAGE = MAX_TILES
IS_PADDING = 2 * MAX_TILES


def row_flags(storage, max_owned: int) -> cute.Tensor:
    """Return (epilogue warp,) int32: the ticket and the flags of each owned token."""
    return cute.make_tensor(storage.row_flags.data_ptr(), cute.make_layout(max_owned))


@cute.jit
def publish_row_flags(
    storage,
    max_owned: cutlass.Constexpr[int],
    args,
    split: Int32,
    tile: Int32,
    num_tiles: Int32,
):
    """Draw a ticket and read the masks for each of the CTA's tokens, by one warp.

    `row_flags_full` of the storage takes 32 arrivals. The masks and the workspace may be in use
    until the grid before has ended.
    """
    lane = cute.arch.lane_idx()
    token = owned_token(split, lane)
    ticket = Int32(0)
    neighbours = neighbours_of(tile, num_tiles)
    # Always true: makes the wait depend on the division, which the compiler would do after it.
    if neighbours >= 0:
        cute.arch.griddepcontrol_wait()
    # Read before the tickets are drawn, so before any merge: a word that no owner published cannot
    # pass for a candidate.
    left_over = []
    for warp in cutlass.range_constexpr(max_owned):
        owned = owned_token(split, warp)
        left_over += load_neighbours(
            candidates_of(args.workspace, owned, num_tiles) + neighbours,
            num_tiles > 1 and owned < args.num_tokens,
        )
    if lane < max_owned and token < args.num_tokens:
        ticket = draw_ticket(args.workspace, token, num_tiles)
        is_image = read_mask(args.image_mask, token, args.num_tokens)
        padding = is_padding(args, token)
        flags = row_flags(storage, max_owned)
        flags[lane] = ticket | flag(is_image, IS_IMAGE) | flag(padding, IS_PADDING)
    cute.arch.mbarrier_arrive(storage.row_flags_full.data_ptr())
    # After the arrival, which the epilogue waits for. With a ticket out of range perhaps no warp
    # merges. One test outside the branch: ptxas compiled what follows a trap in it twice.
    is_damaged = Uint32(ticket) >= Uint32(num_tiles)
    for word in left_over:
        is_damaged = is_damaged | (word != 0)
    trap_if(cute.arch.vote_ballot_sync(is_damaged) != 0)


def flag(value: Int32, bit: int) -> Int32:
    """Return `bit` if the value is nonzero, else 0."""
    return choose(value != 0, Int32(bit), Int32(0))
