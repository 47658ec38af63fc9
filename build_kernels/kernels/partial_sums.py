"""Split-K partial sums: the order in which they are added, and router_decode's exchange of them."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from build_kernels.kernels.gemm import TileGemm
from build_kernels.kernels.score import bits_of, choose
from build_kernels.kernels.shapes import EXPERT_TILE, GROUP_SLICES, NUM_SLICES

NUM_GROUPS = NUM_SLICES // GROUP_SLICES


def add_terms(terms: cute.Tensor) -> Float32:
    """Add the terms of one logit: each group's in order, then the groups' sums in order.

    The kernels' statement of the order; exact.py gives it as a contract. Slices of K are summed in
    K order (see TileGemm), GROUP_SLICES of them make a group, and the terms of a group are its
    slices or sums of its first ones. So the order of a logit's whole sum depends on K alone: its
    bits depend neither on N, nor on the row, nor on how many CTAs share K.
    """
    per_group = cute.size(terms) // NUM_GROUPS
    sums = []
    for group in range(NUM_GROUPS):
        total = terms[group * per_group]
        for i in range(1, per_group):
            total = total + terms[group * per_group + i]
        sums.append(total)
    total = sums[0]
    for group in range(1, NUM_GROUPS):
        total = total + sums[group]
    return total


class PairExchange:
    """Send the terms of token pairs to the CTAs of the cluster that own them.

    Pair p of tokens belongs to the CTA of rank p % splits. A pair, because the accumulator
    fragments of wgmma and of tcgen05.ld 16x256b give a thread experts r and r + 8 of two
    neighbouring tokens: these four travel as one 16-byte store.

    A term is a sum that a CTA sends. Of 16 CTAs each has a slice of K and sends it. Of 8 each has
    two, half a group: the first half is one term, the second half's slices are two, since they are
    added one by one. Of 4 each has a group and sends its sum.
    """

    def __init__(self, gemm: TileGemm):
        self.gemm = gemm
        self.splits = gemm.splits
        self.num_terms = {16: NUM_SLICES, 8: 3 * NUM_GROUPS, 4: NUM_GROUPS}[gemm.splits]
        # Maximum token pairs and tokens owned by one CTA.
        self.max_pairs = max(1, gemm.token_tile // (2 * gemm.splits))
        self.max_owned = 2 * self.max_pairs
        # FP32 of all terms of one M tile.
        self.pair_bytes = self.num_terms * 2 * EXPERT_TILE * 4
        self.sums_bytes = gemm.m_tiles * self.max_pairs * self.pair_bytes

    def sums(self, storage, m_tile) -> cute.Tensor:
        """Return (expert, column, term, pair) FP32: the terms as a sender holds them.

        The experts' mode is ((lane % 8, half, lane / 8)): also how the owner's lanes read them.
        """
        first = storage.sums.data_ptr()
        if cutlass.const_expr(self.gemm.m_tiles > 1):
            first = first + m_tile * (self.max_pairs * self.pair_bytes // 4)
        return cute.make_tensor(
            first,
            cute.make_layout(
                ((8, 2, 4), 2, self.num_terms, self.max_pairs),
                stride=((4, 1, 32), 2, 2 * EXPERT_TILE, 2 * EXPERT_TILE * self.num_terms),
            ),
        )

    @cute.jit
    def multiply_and_send(
        self, storage, split: Int32, num_k_blocks: Int32, num_tokens: Int32, m_tile=0
    ):
        """Multiply this CTA's slices of K and send an M tile's terms to the owners of the tokens.

        num_tokens: those of the token tile.
        """
        first, coordinates = self.slice_sums(storage, split, num_k_blocks, 0)
        if cutlass.const_expr(self.gemm.slices == 2):
            term, is_first = split // 2 * 3, split % 2 == 0
            # Sent while the second slice is multiplied.
            if not is_first:
                self.send(storage, first, coordinates, term + 1, num_tokens, m_tile)
            second, _ = self.slice_sums(storage, split, num_k_blocks, 1)
            if is_first:
                add_to(second, first)
            term = term + choose(is_first, Int32(0), Int32(2))
            self.send(storage, second, coordinates, term, num_tokens, m_tile)
        else:
            for index in cutlass.range_constexpr(1, self.gemm.slices):
                add_to(first, self.slice_sums(storage, split, num_k_blocks, index)[0])
            self.send(storage, first, coordinates, split, num_tokens, m_tile)

    def slice_sums(self, storage, split: Int32, num_k_blocks: Int32, index: int) -> tuple:
        """Multiply slice `index` of a CTA; return its sums and their (row, token)."""
        return self.gemm.accumulators(
            storage, *self.gemm.slice_of(split, index, num_k_blocks), index
        )

    @cute.jit
    def send(self, storage, sums_of_tile, coordinates, term: Int32, num_tokens: Int32, m_tile):
        """Send a term of every (row, token) of an M tile to the owner of its token."""
        sums = self.sums(storage, m_tile)
        # (MMA, MMA_M, MMA_N): four neighbours are experts r, r, r + 8, r + 8 of tokens t, t + 1
        for i in cutlass.range_constexpr(0, cute.size(sums_of_tile), 4):
            expert, token = coordinates[i]
            pair = token // 2
            if token < num_tokens:
                # st.async completes its bytes on the owner's barrier:
                # https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-st-async
                cute.arch.store_async_dsmem(
                    cute.domain_offset((expert, 0, term, pair // self.splits), sums).iterator.align(
                        16
                    ),
                    tuple(Int32(bits_of(sums_of_tile[i + j])) for j in (0, 2, 1, 3)),
                    storage.sums_full.data_ptr(),
                    pair % self.splits,
                )

    @cute.jit
    def read(self, storage, pair: Int32, column: Int32, m_tile=0) -> cute.Tensor:
        """Read (half, term) FP32 registers: the terms of a lane's two experts of a token.

        column: which token of the pair.
        """
        lane = cute.arch.lane_idx()
        sums = self.sums(storage, m_tile)
        parts = cute.make_rmem_tensor((2, self.num_terms), Float32)
        for term in cutlass.range_constexpr(self.num_terms):
            # (half,) of one term
            halves = sums[((lane % 8, None, lane // 8), column, term, pair)]
            cute.autovec_copy(halves, parts[(None, term)])
        return parts


@cute.jit
def add_to(total: cute.Tensor, addend: cute.Tensor):
    """Add registers to those of `total`, one by one. The sum of two FP32 has no order."""
    for i in cutlass.range_constexpr(cute.size(total)):
        total[i] = total[i] + addend[i]


@cute.jit
def lane_expert(half: cutlass.Constexpr[int]) -> Int32:
    """Return a lane's lower (half 0) or upper (half 1) expert of the tile, 8 apart as in `sums`."""
    lane = cute.arch.lane_idx()
    return lane // 8 * 16 + lane % 8 + 8 * half


def owned_token(splits: int, split: Int32, own: Int32) -> Int32:
    """Return the token of the tile that is number `own` of those of the cluster's CTA `split`.

    Number i is token i % 2 of the CTA's pair i / 2.
    """
    return 2 * (own // 2 * splits + split) + own % 2
