"""Split-K partial sums: the order in which they are added, and router_decode's exchange of them."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from build_kernels.kernels.gemm import TileGemm
from build_kernels.kernels.score import bits_of
from build_kernels.kernels.shapes import EXPERT_TILE, NUM_SPLITS


def add_splits(partial_sums: cute.Tensor) -> Float32:
    """Add the NUM_SPLITS partial sums of one logit in split order: ((p0 + p1) + p2) + ...

    The kernels' statement of that order; exact.py gives it as a contract. Each partial sum is taken
    in K order (see TileGemm), so the order of a logit's whole sum depends on K alone: its bits
    depend neither on N nor on the row.
    """
    total = partial_sums[0]
    for split in range(1, NUM_SPLITS):
        total = total + partial_sums[split]
    return total


class PairExchange:
    """Send the partial sums of token pairs to the CTAs of the cluster that own them.

    Pair p of tokens belongs to the CTA of rank p % NUM_SPLITS. A pair, because the accumulator
    fragments of wgmma and of tcgen05.ld 16x256b give a thread experts r and r + 8 of two
    neighbouring tokens: these four travel as one 16-byte store.
    """

    def __init__(self, gemm: TileGemm):
        self.gemm = gemm
        # Maximum token pairs owned by one CTA.
        self.max_pairs = max(1, gemm.token_tile // (2 * NUM_SPLITS))
        # FP32 of one M tile from every source.
        self.pair_bytes = NUM_SPLITS * 2 * EXPERT_TILE * 4
        self.sums_bytes = gemm.m_tiles * self.max_pairs * self.pair_bytes

    def sums(self, storage, m_tile) -> cute.Tensor:
        """Return (expert, column, source, pair) FP32: partial sums as a sender holds them.

        The experts' mode is ((lane % 8, half, lane / 8)): also how the owner's lanes read them.
        """
        first = storage.sums.data_ptr()
        if cutlass.const_expr(self.gemm.m_tiles > 1):
            first = first + m_tile * (self.max_pairs * self.pair_bytes // 4)
        return cute.make_tensor(
            first,
            cute.make_layout(
                ((8, 2, 4), 2, NUM_SPLITS, self.max_pairs),
                stride=((4, 1, 32), 2, 2 * EXPERT_TILE, 2 * EXPERT_TILE * NUM_SPLITS),
            ),
        )

    @cute.jit
    def send(self, storage, num_blocks: Int32, num_tokens: Int32, m_tile=0):
        """Send every partial sum of an M tile of this CTA to the owner of its token.

        num_tokens: those of the token tile.
        """
        source = cute.arch.block_idx_in_cluster()
        # (MMA, MMA_M, MMA_N): four neighbours are experts r, r, r + 8, r + 8 of tokens t, t + 1
        accumulators, coordinates = self.gemm.accumulators(storage, num_blocks)
        sums = self.sums(storage, m_tile)
        for i in cutlass.range_constexpr(0, cute.size(accumulators), 4):
            expert, token = coordinates[i]
            pair = token // 2
            if token < num_tokens:
                # st.async completes its bytes on the owner's barrier:
                # https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-st-async
                cute.arch.store_async_dsmem(
                    cute.domain_offset(
                        (expert, 0, source, pair // NUM_SPLITS), sums
                    ).iterator.align(16),
                    tuple(Int32(bits_of(accumulators[i + j])) for j in (0, 2, 1, 3)),
                    storage.sums_full.data_ptr(),
                    pair % NUM_SPLITS,
                )

    @cute.jit
    def read(self, storage, pair: Int32, column: Int32, m_tile=0) -> cute.Tensor:
        """Read (half, source) FP32 registers: the partial sums of a lane's two experts of a token.

        column: which token of the pair.
        """
        lane = cute.arch.lane_idx()
        sums = self.sums(storage, m_tile)
        parts = cute.make_rmem_tensor((2, NUM_SPLITS), Float32)
        for source in cutlass.range_constexpr(NUM_SPLITS):
            # (half,) of one source
            halves = sums[((lane % 8, None, lane // 8), column, source, pair)]
            cute.autovec_copy(halves, parts[(None, source)])
        return parts


@cute.jit
def lane_expert(half: cutlass.Constexpr[int]) -> Int32:
    """Return a lane's lower (half 0) or upper (half 1) expert of the tile, 8 apart as in `sums`."""
    lane = cute.arch.lane_idx()
    return lane // 8 * 16 + lane % 8 + 8 * half


def owned_token(split: Int32, warp: Int32) -> Int32:
    """Return the token of the tile that epilogue warp `warp` of the cluster's CTA `split` sums.

    Warp w sums token w % 2 of the CTA's pair w / 2.
    """
    return 2 * (warp // 2 * NUM_SPLITS + split) + warp % 2
