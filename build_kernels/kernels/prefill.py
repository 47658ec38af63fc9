"""router_prefill: hidden_states and W_gate to weights and ids for N > 64 tokens, in one launch.

router_decode with larger tiles and several token tiles. Grid (S, T, Z): S = 16, 8 or 4 CTAs that
share K by T = ceil(E / (64 m_tiles)) expert tiles by Z token tiles. A CTA multiplies m_tiles tiles
of 64 experts, a group of four warps each. The slices of K and the order in which they are added are
router_decode's, so a token has the same bits in both. Of 8 CTAs each has two slices, of 4 a group
of four; see PairExchange for what they send.

A launch routes the call's tokens from `first_token` on, as many as its grid has tiles for: a call
of more tokens than fit the workspace is several launches.

See decode.py for the exchanges. What differs: a CTA owns up to 32 tokens, so an epilogue warp sums
its token of each `round`, and publishes all of them before it merges one. A token has one ticket
per CTA that owns it. In the CTA that draws the last one, its warps of the m_tiles take turns to
merge. If a CTA owns many tokens, each owner draws the tickets of its share late: see row_flags.py.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass.cute.nvgpu import cpasync

from build_kernels.kernels.arguments import arguments_of
from build_kernels.kernels.candidates import merge, own_candidates, places_of, publish
from build_kernels.kernels.decode import RouterDecode
from build_kernels.kernels.gemm import WARPS_PER_TILE, TileGemm, k_slices
from build_kernels.kernels.hash_table import read_ranks
from build_kernels.kernels.outputs import output_column, store, store_logits
from build_kernels.kernels.partial_sums import lane_expert, owned_token
from build_kernels.kernels.physical_ids import read_physical_id
from build_kernels.kernels.row_flags import (
    HAS_LOGITS,
    HAS_RARE_OUTPUTS,
    IS_FORCED,
    IS_IMAGE,
    IS_PADDING,
    MAX_TICKET,
    MAX_TILES,
    publish_row_flags,
    rank_forced,
    row_flags,
    tickets,
)
from build_kernels.kernels.score import choose, reciprocal
from build_kernels.kernels.shapes import (
    EXPERT_TILE,
    MAX_PREFILL_TOKENS,
    MAX_TOP_K,
    NUM_SLICES,
)
from build_kernels.kernels.top_k import PADDING_KEY

Arguments = arguments_of("prefill")
# Tokens of an epilogue warp whose scores are computed at once.
BATCH = 2


class RouterPrefill(RouterDecode):
    """Compute the whole gate for token tiles of 64 or 128.

    Warp roles (see TileGemm)
        epilogue_warps        from 0 on, four per M tile: read the accumulators, send, sum, select,
                              store
        mma_warp              issues the MMAs on sm_100, where one thread does that
        producer_warp         loads W_gate and hidden_states by TMA
        row_flags_warp        draws the tickets, reads the masks and the forced ids

    Pipelines (producer -> consumer: arrivals to fill / to empty)
        full, empty           producer -> MMA: 1 and the bytes of a chunk, w_boxes TMAs per block of
                              W_gate and one for hidden_states / mma_arrivals
        sums_full             cluster's epilogue -> owner's: 1 + 512 B per source, token pair and M
                              tile; used once
        accumulator_full      see TileGemm
        row_flags_full,       row-flags warp -> epilogue: 32 lanes; used once
        tickets_full

    Shared memory, of which the terms take 512 B each per owned token pair and M tile:
        experts x tokens, S   ring        terms   CTA
        128 x 64, 16          8 x 24 KB   32 KB   225 KB
        128 x 128, 16         4 x 32 KB   64 KB   192 KB
        128 x 64, 8           7 x 24 KB   48 KB   217 KB
        128 x 64, 4           8 x 24 KB   32 KB   226 KB
        128 x 128, 4          5 x 32 KB   64 KB   226 KB
    TMEM, on sm_100: see TileGemmSm100.

    Timeline: router_decode's.
    """

    def __init__(self, gemm: TileGemm):
        super().__init__(gemm)
        # Tokens per epilogue warp.
        self.rounds = self.max_owned // WARPS_PER_TILE
        # Of up to 8 tokens a cluster of 16 merges them sooner than it can draw late tickets: 0.3 to
        # 0.6 us.
        self.shares_merges = gemm.splits < NUM_SLICES
        self.num_threads = 32 * (self.row_flags_warp + 1)

    def shared_storage(self) -> type:
        """Return the members of shared memory; see TileGemm for the ones that it uses."""
        gemm = self.gemm

        class SharedStorage:
            w: gemm.w_ring
            x: gemm.x_ring
            # (expert, column, source, pair, M tile): see PairExchange.sums
            sums: cute.struct.Align[
                cute.struct.MemRange[Float32, self.exchange.sums_bytes // 4], 1024
            ]
            # (owned token,)
            row_flags: cute.struct.MemRange[Int32, self.max_owned]
            # (owned token,)
            tickets: cute.struct.MemRange[Int32, self.max_owned]
            # (slot, owned token)
            forced: cute.struct.MemRange[Int32, MAX_TOP_K * self.max_owned]
            full: gemm.ring_barriers
            empty: gemm.ring_barriers
            sums_full: gemm.barrier
            accumulator_full: gemm.accumulator_barriers
            accumulator_empty: gemm.accumulator_barriers
            row_flags_full: gemm.barrier
            tickets_full: gemm.barrier
            tmem_address: gemm.tmem_address

        return SharedStorage

    @cute.jit
    def __call__(self, w_gate: cute.Pointer, hidden_states: cute.Pointer, args: Arguments):
        tma_atom_w, mW = self.gemm.w_tma(w_gate)
        tma_atom_x, mX = self.gemm.x_tma(hidden_states)
        experts = EXPERT_TILE * self.gemm.m_tiles
        tokens = self.gemm.token_tile
        self.kernel(tma_atom_w, mW, tma_atom_x, mX, args).launch(
            grid=(
                (args.num_experts + experts - 1) // experts,
                (args.num_tokens + tokens - 1) // tokens,
            ),
            block=(self.num_threads, 1, 1),
            cluster=(self.gemm.splits, 1, 1),
            # Or ptxas keeps to 80 registers for sm_100, and spills.
            min_blocks_per_mp=1 if self.shares_merges else 0,
        )

    @cute.kernel
    def kernel(
        self,
        tma_atom_w: cute.CopyAtom,
        mW: cute.Tensor,
        tma_atom_x: cute.CopyAtom,
        mX: cute.Tensor,
        args: Arguments,
    ):
        # ---------------------------------------------------------------- prepare
        m_tiles = self.gemm.m_tiles
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        split, cta_tile, token_tile = cute.arch.block_idx()
        # Of the call's, in which a launch starts at first_token.
        token_tile = token_tile + args.first_token // self.gemm.token_tile
        _, num_owners, _ = cute.arch.grid_dim()
        storage = cutlass.utils.SmemAllocator().allocate(cute.struct(self.shared_storage()))

        # The CTA's expert tiles are tile, tile + 1, ...; those beyond the experts hold none.
        tile, num_tiles = cta_tile * m_tiles, num_owners * m_tiles
        num_shared = self.shared_rows(tile, args.num_experts)
        slices, splits = self.gemm.slices, self.gemm.splits
        first_block, num_blocks = k_slices(slices * split, slices, args.num_k_blocks)
        first_token = token_tile * self.gemm.token_tile
        num_tokens = cutlass.min(args.num_tokens - first_token, self.gemm.token_tile)
        # Token pairs split, split + S, ... of the tile are this CTA's to sum.
        num_pairs = ((num_tokens + 1) // 2 - split + splits - 1) // splits

        if warp == self.gemm.producer_warp:
            cpasync.prefetch_descriptor(tma_atom_w)
            cpasync.prefetch_descriptor(tma_atom_x)
        self.gemm.prepare(
            storage,
            warp,
            1,
            num_pairs * (m_tiles * self.exchange.pair_bytes),
            ("row_flags_full", "tickets_full"),
        )
        # Dependents may start now; they wait before they touch memory that this grid writes:
        # https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
        cute.arch.griddepcontrol_launch_dependents()
        if warp != self.gemm.producer_warp:
            cute.arch.cluster_wait()

        # ---------------------------------------------------------------- load and multiply
        if warp == self.gemm.producer_warp:
            self.load(
                *(storage, tma_atom_w, cute.domain_offset((-num_shared, 0), mW)),
                *(tma_atom_x, mX, cta_tile * self.gemm.w_boxes, token_tile),
                *(first_block, num_blocks),
            )
        if warp == self.row_flags_warp:
            publish_row_flags(
                *(storage, self.max_owned, splits, args, split, tile, num_tiles),
                *(first_token, m_tiles, MAX_PREFILL_TOKENS),
                *(self.shares_merges, args.first_token),
            )
        self.gemm.issue_mma(storage, warp, split, args.num_k_blocks)

        # ---------------------------------------------------------------- reduce and select
        if warp < self.gemm.epilogue_warps:
            m_tile, first_owned = warp // WARPS_PER_TILE, warp % WARPS_PER_TILE
            experts = self.lane_experts(tile, m_tile, num_shared)
            biases = self.read_biases(args, experts)
            inverse_temp = reciprocal(args.gate_temp)
            places = places_of(experts, 2 * num_tiles)
            rows = (args, first_token, split)
            ahead = ()
            if cutlass.const_expr(self.rounds <= BATCH):
                ahead = self.read_ahead(*rows, first_owned, experts, places, num_tiles)
            self.exchange.multiply_and_send(storage, split, args.num_k_blocks, num_tokens, m_tile)
            self.gemm.free_accumulator(storage, warp)
            if first_token + owned_token(self.gemm.splits, split, first_owned) < args.num_tokens:
                # Outputs and workspace may be in use until the grid before has ended.
                cute.arch.griddepcontrol_wait()
                cute.arch.mbarrier_wait(storage.row_flags_full.data_ptr(), 0)
                # Padding waits too: a peer may not send to a CTA that has ended.
                cute.arch.mbarrier_wait(storage.sums_full.data_ptr(), 0)
                of_tile = (m_tile, experts, biases, inverse_temp)
                if cutlass.const_expr(self.rounds <= BATCH):
                    self.publish_batch(storage, args, ahead, *of_tile)
                else:
                    for first in cutlass.range(
                        first_owned, self.max_owned, BATCH * WARPS_PER_TILE, unroll=1
                    ):
                        batch = self.read_ahead(*rows, first, experts, places, num_tiles)
                        self.publish_batch(storage, args, batch, *of_tile)
                if cutlass.const_expr(self.shares_merges):
                    cute.arch.mbarrier_wait(storage.tickets_full.data_ptr(), 0)
                # The M tiles take turns.
                turn = (m_tile + first_owned) % m_tiles
                for i in cutlass.range(turn, self.rounds, m_tiles, unroll=1):
                    owned = first_owned + WARPS_PER_TILE * i
                    token = first_token + owned_token(self.gemm.splits, split, owned)
                    if token < args.num_tokens:
                        flags = row_flags(storage, self.max_owned)[owned]
                        ticket = flags & MAX_TICKET
                        if cutlass.const_expr(self.shares_merges):
                            ticket = tickets(storage, self.max_owned)[owned]
                        if ticket == num_owners - 1:
                            self.merge_and_store(args, token, flags, num_tiles)

    def shared_rows(self, tile: Int32, num_experts: Int32) -> Int32:
        """Return how many rows of W_gate a CTA loads that belong to the CTA before it.

        The last CTA's box ends with the last expert, unless it would begin before the first. TMA
        fills a row that is not there slower than it loads one: 7168x132 at N = 512 took 15.8 us
        on one H200 with such rows, 12.6 with rows of other experts in their place.
        """
        experts = EXPERT_TILE * self.gemm.m_tiles
        beyond = cutlass.max(EXPERT_TILE * tile + experts - num_experts, Int32(0))
        return choose(num_experts >= experts, beyond, Int32(0))

    def lane_experts(self, tile: Int32, m_tile: Int32, num_shared: Int32) -> tuple:
        """Return a lane's two experts of an M tile of the CTA.

        A shared row stands for an expert beyond the last, of which the merge expects a candidate.
        """
        experts = EXPERT_TILE * self.gemm.m_tiles
        rows = (EXPERT_TILE * m_tile + lane_expert(half) for half in (0, 1))
        return tuple(EXPERT_TILE * tile + ((row - num_shared) & (experts - 1)) for row in rows)

    def read_ahead(
        self,
        args: Arguments,
        first_token: Int32,
        split: Int32,
        first_owned: Int32,
        experts: tuple,
        places: tuple,
        num_tiles: Int32,
    ) -> tuple:
        """Read what needs no sum for a batch of an epilogue warp's tokens, from `first_owned` on.

        Return (owned, token, candidates, (ranks, unknown)) of each.
        """
        batch = []
        for i in range(min(self.rounds, BATCH)):
            owned = first_owned + WARPS_PER_TILE * i
            token = first_token + owned_token(self.gemm.splits, split, owned)
            candidates = own_candidates(
                args, token, places, num_tiles, args.first_token, MAX_PREFILL_TOKENS
            )
            batch.append((owned, token, candidates, read_ranks(args, token, experts)))
        return tuple(batch)

    @cute.jit
    def publish_batch(
        self,
        storage,
        args: Arguments,
        batch: tuple,
        m_tile: Int32,
        experts: tuple,
        biases: cute.Tensor,
        inverse_temp: Float32,
    ):
        """Publish the candidates of a batch of tokens; see `read_ahead`."""
        for i in cutlass.range_constexpr(len(batch)):
            owned, token, candidates, table = batch[i]
            if token < args.num_tokens:
                self.publish(
                    *(storage, args, token, owned, candidates, m_tile),
                    *(experts, biases, *table, inverse_temp),
                )

    @cute.jit
    def publish(
        self,
        storage,
        args: Arguments,
        token: Int32,
        owned: Int32,
        candidates: tuple,
        m_tile: Int32,
        experts: tuple,
        biases: cute.Tensor,
        ranks: cute.Tensor,
        unknown: Int32,
        inverse_temp: Float32,
    ):
        """Publish the candidates of an owned token of one expert tile, and its logits if asked."""
        flags = row_flags(storage, self.max_owned)[owned]
        if flags & IS_FORCED != 0:
            rank_forced(storage, self.max_owned, owned, experts, ranks)
            unknown = Int32(0)
        keys, scores, logits = self.score(
            *(storage, args, owned, experts, biases),
            *(flags, ranks, inverse_temp, m_tile),
        )
        # No row of the table: padding, unless the row is an image row or forced.
        is_unknown = choose(flags & IS_IMAGE != 0, Int32(0), unknown)
        is_padded = ((flags & IS_PADDING) | is_unknown) != 0
        for i in cutlass.range_constexpr(2):
            publish(candidates[i], choose(is_padded, Uint32(PADDING_KEY), keys[i]), scores[i])
        store_logits(args, token, flags & HAS_LOGITS != 0, experts, logits)

    @cute.jit
    def merge_and_store(self, args: Arguments, token: Int32, flags: Int32, num_tiles: Int32):
        """Merge a token's candidates and store its row, by physical id if mapped."""
        output = output_column(args, token)
        merged = (args.workspace, token - args.first_token, num_tiles, args.top_k)
        # E up to 256, 384 and 512: as few registers as hold the candidates.
        if num_tiles <= 4:
            best = merge(4, *merged, output.shared_id, MAX_PREFILL_TOKENS)
            self.store_row(args, token, flags, output, best)
        elif num_tiles <= 6:
            best = merge(6, *merged, output.shared_id, MAX_PREFILL_TOKENS)
            self.store_row(args, token, flags, output, best)
        else:
            best = merge(MAX_TILES, *merged, output.shared_id, MAX_PREFILL_TOKENS)
            self.store_row(args, token, flags, output, best)

    @cute.jit
    def store_row(self, args: Arguments, token: Int32, flags: Int32, output, best: tuple):
        """Store the token's row of (expert, score, total, is_padding)."""
        logical_id, score, total, is_padding = best
        expert = logical_id
        if args.to_physical.toint() != 0 and cute.arch.lane_idx() < args.top_k:
            expert = read_physical_id(args, logical_id, token)
        is_rare = flags & HAS_RARE_OUTPUTS != 0
        store(args, token, output, logical_id, expert, score, total, is_padding, is_rare)
