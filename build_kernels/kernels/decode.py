"""router_decode: hidden_states and W_gate to weights and ids for N <= 64 tokens, in one launch.

Decomposition, the same on every architecture
    Experts are the M of the MMA tiler, in tiles of 64; tokens are its N. Grid (S, T): S =
    NUM_SLICES slices of K by T = ceil(E / 64) expert tiles. The S CTAs of one expert tile form a
    cluster. CTA (s, t) multiplies its slice of W_gate by its slice of hidden_states. It sends each
    token's 64 partial sums to the CTA of its cluster that owns the token; pairs of tokens go round
    the S ranks. The owner adds the S partial sums (see add_terms) and computes the scores. One of a
    token's T owners merges the tiles and selects. The order of every sum depends on K alone: a
    token's bits depend neither on N nor on its row.

Exchanges
    partial sums   st.async into the owner's shared memory, completing on its `sums_full` mbarrier
    candidates     (key, score) of every expert, through the global `workspace`, which is zero
                   between launches. Each of a token's T owners draws a ticket while it multiplies
                   and publishes, whatever it reads in the masks; the last one to draw merges. The
                   other owners have started by then and wait only within their own cluster, so the
                   merging warp's wait ends in any schedule and on any number of streams. A
                   candidate is one 8-byte relaxed store and never zero: a nonzero word is complete,
                   without a fence or a flag. The merging warp stores the zeros back; a dependent
                   launch draws its tickets after that.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass.cute.nvgpu import cpasync

from build_kernels.kernels.arguments import arguments_of
from build_kernels.kernels.candidates import (
    merge,
    own_candidates,
    own_places,
    publish,
    select_alone,
)
from build_kernels.kernels.gemm import TileGemm, k_slices
from build_kernels.kernels.hash_table import read_ranks
from build_kernels.kernels.outputs import OutputColumn, output_column, store, store_logits
from build_kernels.kernels.partial_sums import PairExchange, add_terms, lane_expert, owned_token
from build_kernels.kernels.physical_ids import read_counts, read_physical_ids
from build_kernels.kernels.row_flags import (
    HAS_LOGITS,
    HAS_RARE_OUTPUTS,
    IS_FORCED,
    IS_IMAGE,
    IS_PADDING,
    IS_RANKED,
    MAX_TICKET,
    MAX_TILES,
    publish_row_flags,
    rank_forced,
    row_flags,
)
from build_kernels.kernels.score import choose, reciprocal, router_score, tempered
from build_kernels.kernels.shapes import (
    EXPERT_TILE,
    K_BLOCK,
    MAX_EXPERTS,
    MAX_TOP_K,
    NUM_SLICES,
)
from build_kernels.kernels.top_k import (
    NOT_A_CANDIDATE,
    PADDING_KEY,
    ranked_key,
    selection_key,
)

# The launch parameters after the tensor maps, as dsv4_router_runtime/parameters.py orders them.
Arguments = arguments_of("decode")


class RouterDecode:
    """Compute the whole gate: the score of every expert, and each token's top_k.

    Warp roles (see TileGemm)
        0-3                   epilogue: read the accumulators, send, sum, select, store
        mma_warp              issues the MMAs on sm_100, where one thread does that
        producer_warp         loads W_gate and hidden_states by TMA
        row_flags_warp        draws the tickets, reads the masks and the forced ids
        physical_ids_warp     reads the physical ids of all experts, if there is a physical map

    Pipelines (producer -> consumer: arrivals to fill / to empty)
        full, empty           producer -> MMA: 1 and the bytes of a chunk, one TMA per block of
                              W_gate and one for hidden_states, so that few reads follow the wait
                              for the grid before / mma_arrivals
        sums_full             cluster's epilogue -> owner's: 1 + 512 B per source and token pair;
                              used once
        accumulator_full      see TileGemm
        row_flags_full        row-flags warp -> epilogue: 32 lanes; used once
        physical_ids_full     physical-ids warp -> epilogue: 32 lanes; used once
    Warps off the epilogue's path read the flags and the map. In the epilogue, which multiplies on
    sm_90, a mask cost 0.4 us at N = 64, and a map 0.4 us without PDL.

    Shared memory: 84, 108 and 152 KB for tiles of 8, 32 and 64 tokens. 8 KB of it per owned token
    pair are for partial sums, 2 KB per owned token for physical ids.
    TMEM, on sm_100: see TileGemmSm100.

    Timeline
        init barriers | fill the ring with W_gate, cluster sync, wait for the grid before
        | load hidden_states | multiply | st.async to the owners | sum, score, publish
        | merge, select, store
    """

    def __init__(self, gemm: TileGemm):
        self.gemm = gemm
        self.exchange = PairExchange(gemm)
        # One token per epilogue warp.
        self.max_owned = self.exchange.max_owned
        self.row_flags_warp = gemm.producer_warp + 1
        self.physical_ids_warp = gemm.producer_warp + 2
        self.num_threads = 32 * (self.physical_ids_warp + 1)

    def shared_storage(self) -> type:
        """Return the members of shared memory; see TileGemm for the ones that it uses."""
        gemm, num_sums = self.gemm, self.exchange.sums_bytes // 4

        class SharedStorage:
            w: gemm.w_ring
            x: gemm.x_ring
            # (expert, column, source, pair): see PairExchange.sums
            sums: cute.struct.Align[cute.struct.MemRange[Float32, num_sums], 1024]
            # (expert, epilogue warp)
            physical_ids: cute.struct.MemRange[Int32, MAX_EXPERTS * self.max_owned]
            # (epilogue warp,)
            row_flags: cute.struct.MemRange[Int32, self.max_owned]
            # (slot, epilogue warp)
            forced: cute.struct.MemRange[Int32, MAX_TOP_K * self.max_owned]
            full: gemm.ring_barriers
            empty: gemm.ring_barriers
            sums_full: gemm.barrier
            accumulator_full: gemm.accumulator_barriers
            row_flags_full: gemm.barrier
            physical_ids_full: gemm.barrier
            tmem_address: gemm.tmem_address

        return SharedStorage

    @cute.jit
    def __call__(self, w_gate: cute.Pointer, hidden_states: cute.Pointer, args: Arguments):
        tma_atom_w, mW = self.gemm.w_tma(w_gate)
        tma_atom_x, mX = self.gemm.x_tma(hidden_states)
        self.kernel(tma_atom_w, mW, tma_atom_x, mX, args).launch(
            grid=(NUM_SLICES, (args.num_experts + EXPERT_TILE - 1) // EXPERT_TILE, 1),
            block=(self.num_threads, 1, 1),
            cluster=(NUM_SLICES, 1, 1),
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
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        split, tile, _ = cute.arch.block_idx()
        _, num_tiles, _ = cute.arch.grid_dim()
        storage = cutlass.utils.SmemAllocator().allocate(cute.struct(self.shared_storage()))

        first_block, num_blocks = k_slices(split, 1, args.num_k_blocks)
        # Token pairs split, split + S, ... are this CTA's to sum.
        num_pairs = ((args.num_tokens + 1) // 2 - split + NUM_SLICES - 1) // NUM_SLICES

        if warp == self.gemm.producer_warp:
            cpasync.prefetch_descriptor(tma_atom_w)
            cpasync.prefetch_descriptor(tma_atom_x)
        self.gemm.prepare(
            storage,
            warp,
            1,
            num_pairs * self.exchange.pair_bytes,
            ("row_flags_full", "physical_ids_full"),
        )
        # Dependents may start now; they wait before they touch memory that this grid writes:
        # https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
        cute.arch.griddepcontrol_launch_dependents()
        if warp != self.gemm.producer_warp:
            cute.arch.cluster_wait()

        # ---------------------------------------------------------------- load and multiply
        if warp == self.gemm.producer_warp:
            self.load(storage, tma_atom_w, mW, tma_atom_x, mX, tile, 0, first_block, num_blocks)
        if warp == self.row_flags_warp:
            publish_row_flags(storage, self.max_owned, NUM_SLICES, args, split, tile, num_tiles)
        if warp == self.physical_ids_warp and args.to_physical.toint() != 0:
            self.publish_physical_ids(storage, args, split)
        self.gemm.issue_mma(storage, warp, split, args.num_k_blocks)

        # ---------------------------------------------------------------- reduce and select
        if warp < self.gemm.epilogue_warps:
            token = owned_token(self.gemm.splits, split, warp)
            # All that needs no sum is computed before the multiply, off the path that others wait
            # for.
            candidates = own_candidates(args, token, own_places(tile, num_tiles), num_tiles)
            experts = tuple(EXPERT_TILE * tile + lane_expert(half) for half in (0, 1))
            output = output_column(args, token)
            biases = self.read_biases(args, experts)
            inverse_temp = reciprocal(args.gate_temp)
            ranks, unknown = read_ranks(args, token, experts)
            self.exchange.multiply_and_send(storage, split, args.num_k_blocks, args.num_tokens)
            self.gemm.free_accumulator(storage, warp)
            if token < args.num_tokens:
                # Outputs and workspace may be in use until the grid before has ended.
                cute.arch.griddepcontrol_wait()
                cute.arch.mbarrier_wait(storage.row_flags_full.data_ptr(), 0)
                flags = row_flags(storage, self.max_owned)[warp]
                is_image = flags & IS_IMAGE
                if flags & IS_FORCED != 0:
                    rank_forced(storage, self.max_owned, warp, experts, ranks)
                    unknown = Int32(0)
                # Padding waits too: a peer may not send to a CTA that has ended.
                cute.arch.mbarrier_wait(storage.sums_full.data_ptr(), 0)
                keys, scores, logits = self.score(
                    *(storage, args, warp, experts, biases),
                    *(flags, ranks, inverse_temp),
                )
                # No row of the table: padding, unless the row is an image row or forced.
                is_unknown = choose(is_image != 0, Int32(0), unknown)
                is_padded = ((flags & IS_PADDING) | is_unknown) != 0
                for i in cutlass.range_constexpr(2):
                    keys[i] = choose(is_padded, Uint32(PADDING_KEY), keys[i])
                if num_tiles == 1:
                    best = select_alone(keys, scores, args.top_k, output.shared_id, is_padded)
                    self.store(storage, args, token, warp, flags, output, (*best, is_padded))
                    store_logits(args, token, flags & HAS_LOGITS != 0, experts, logits)
                else:
                    for i in cutlass.range_constexpr(2):
                        publish(candidates[i], keys[i], scores[i])
                    store_logits(args, token, flags & HAS_LOGITS != 0, experts, logits)
                    if flags & MAX_TICKET == num_tiles - 1:
                        # E up to 256, 384 and 512: as few registers as hold the candidates.
                        merged = (args.workspace, token, num_tiles, args.top_k)
                        if num_tiles <= 4:
                            best = merge(4, *merged, output.shared_id)
                            self.store(storage, args, token, warp, flags, output, best)
                        elif num_tiles <= 6:
                            best = merge(6, *merged, output.shared_id)
                            self.store(storage, args, token, warp, flags, output, best)
                        else:
                            best = merge(MAX_TILES, *merged, output.shared_id)
                            self.store(storage, args, token, warp, flags, output, best)

    @cute.jit
    def load(
        self,
        storage,
        tma_atom_w: cute.CopyAtom,
        mW: cute.Tensor,
        tma_atom_x: cute.CopyAtom,
        mX: cute.Tensor,
        first_box: Int32,
        token_tile,
        first_block: Int32,
        num_blocks: Int32,
    ):
        """Fill the ring with W_gate, wait for the grid before, then load the rest.

        first_box: the first of the CTA's boxes of W_gate, w_box_rows experts each.
        """
        rows = self.gemm.w_box_rows
        w_layout = self.gemm.w_smem_layout(rows)
        # (rows, K_BLOCK, w_boxes * ring_blocks)
        sW = storage.w.get_tensor(w_layout.outer, swizzle=w_layout.inner)
        # Of each box: ((TMA box), w_boxes * ring_blocks), ((TMA box), K blocks)
        tWsW, tWgW = [], []
        for i in cutlass.range_constexpr(self.gemm.w_boxes):
            # (rows, K_BLOCK, K blocks)
            gW = cute.local_tile(mW, (rows, K_BLOCK), (first_box + i, None))
            shared, loaded = cpasync.tma_partition(
                tma_atom_w,
                0,
                cute.make_layout(1),
                cute.group_modes(sW, 0, 2),
                cute.group_modes(gW, 0, 2),
            )
            tWsW.append(shared)
            tWgW.append(loaded)
        # ((TMA box), stages), ((TMA box), num_chunks)
        tXsX, tXgX = self.gemm.partition_x(storage, tma_atom_x, mX, token_tile, first_block)
        num_chunks = (num_blocks + self.gemm.chunk - 1) // self.gemm.chunk
        num_prefetched = cutlass.min(num_chunks, self.gemm.stages)

        for chunk in cutlass.range(num_prefetched, unroll=1):
            self.load_w(storage, tma_atom_w, tWgW, tWsW, first_block, num_blocks, chunk)
        cute.arch.cluster_wait()
        cute.arch.griddepcontrol_wait()
        for chunk in cutlass.range(num_chunks, unroll=1):
            stage = chunk % self.gemm.stages
            if chunk >= self.gemm.stages:
                self.gemm.wait_until_empty(storage, chunk)
                self.load_w(storage, tma_atom_w, tWgW, tWsW, first_block, num_blocks, chunk)
            cute.copy(
                tma_atom_x,
                tXgX[(None, chunk)],
                tXsX[(None, stage)],
                tma_bar_ptr=storage.full.data_ptr() + stage,
            )

    @cute.jit
    def load_w(
        self,
        storage,
        tma_atom_w: cute.CopyAtom,
        tWgW: list,
        tWsW: list,
        first_block: Int32,
        num_blocks: Int32,
        chunk: Int32,
    ):
        """Announce the bytes of a chunk, with those of hidden_states, and load its W_gate."""
        stage = chunk % self.gemm.stages
        blocks = cutlass.min(num_blocks - chunk * self.gemm.chunk, self.gemm.chunk)
        full = storage.full.data_ptr() + stage
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(
                full, blocks * self.gemm.w_block_bytes + self.gemm.x_chunk_bytes
            )
        for block in cutlass.range(blocks, unroll=1):
            for i in cutlass.range_constexpr(self.gemm.w_boxes):
                cute.copy(
                    tma_atom_w,
                    tWgW[i][(None, first_block + chunk * self.gemm.chunk + block)],
                    tWsW[i][(None, self.gemm.w_boxes * (stage * self.gemm.chunk + block) + i)],
                    tma_bar_ptr=full,
                )

    def physical_ids(self, storage) -> cute.Tensor:
        """Return (expert, epilogue warp) int32: the physical ids for each owned token."""
        return cute.make_tensor(
            storage.physical_ids.data_ptr(), cute.make_layout((MAX_EXPERTS, self.max_owned))
        )

    @cute.jit
    def publish_physical_ids(self, storage, args: Arguments, split: Int32):
        """Read the physical ids of every expert for the CTA's tokens.

        A physical id takes two dependent reads of HBM, which this warp overlaps with the multiply.
        """
        if owned_token(self.gemm.splits, split, 0) < args.num_tokens:
            # (MAX_EXPERTS / 32,): experts lane, lane + 32, ...
            experts = cute.make_rmem_tensor((MAX_EXPERTS // 32,), Int32)
            for i in cutlass.range_constexpr(MAX_EXPERTS // 32):
                experts[i] = 32 * i + cute.arch.lane_idx()
            counts = read_counts(args, experts)
            physical_ids = self.physical_ids(storage)
            for warp in cutlass.range_constexpr(self.max_owned):
                token = owned_token(self.gemm.splits, split, warp)
                row = read_physical_ids(args, experts, counts, token)
                for i in cutlass.range_constexpr(MAX_EXPERTS // 32):
                    physical_ids[experts[i], warp] = row[i]
            cute.arch.mbarrier_arrive(storage.physical_ids_full.data_ptr())

    @cute.jit
    def read_biases(self, args: Arguments, experts: tuple):
        """Read (half, text or image) FP32 registers: both biases of a lane's two experts."""
        biases = cute.make_rmem_tensor((2, 2), Float32)
        biases.fill(0.0)
        # [num_experts]
        text = cute.make_tensor(args.e_bias, cute.make_layout(MAX_EXPERTS))
        image = cute.make_tensor(args.bias_vl, cute.make_layout(MAX_EXPERTS))
        for i in cutlass.range_constexpr(2):
            expert = experts[i]
            if expert < args.num_experts and args.e_bias.toint() != 0:
                biases[i, 0] = text[expert]
            if expert < args.num_experts and args.bias_vl.toint() != 0:
                biases[i, 1] = image[expert]
        return biases

    @cute.jit
    def score(
        self,
        storage,
        args: Arguments,
        warp: Int32,
        experts: tuple,
        biases: cute.Tensor,
        flags: Int32,
        ranks: cute.Tensor,
        inverse_temp: Float32,
        m_tile=0,
    ):
        """Return (half,) keys (uint32), scores and logits (FP32) of a lane's two experts.

        The loop has no branch, so that the two experts' arithmetic overlaps.
        """
        # (half, source)
        parts = self.exchange.read(storage, warp // 2, warp % 2, m_tile)
        keys = cute.make_rmem_tensor((2,), Uint32)
        scores = cute.make_rmem_tensor((2,), Float32)
        logits = cute.make_rmem_tensor((2,), Float32)
        for i in cutlass.range_constexpr(2):
            logits[i] = add_terms(parts[(i, None)])
            score = router_score(tempered(logits[i], args.gate_temp, inverse_temp))
            bias = choose(flags & IS_IMAGE != 0, biases[i, 1], biases[i, 0])
            keys[i] = selection_key(score, bias)
            # A NaN counts as 0 in the sum of the weights.
            scores[i] = choose(score != score, Float32(0.0), score)
        if flags & IS_RANKED != 0:
            for i in cutlass.range_constexpr(2):
                keys[i] = ranked_key(ranks[i])
        for i in cutlass.range_constexpr(2):
            is_beyond = experts[i] >= args.num_experts
            keys[i] = choose(is_beyond, Uint32(NOT_A_CANDIDATE), keys[i])
        return keys, scores, logits

    @cute.jit
    def store(
        self,
        storage,
        args: Arguments,
        token: Int32,
        warp: Int32,
        flags: Int32,
        output: OutputColumn,
        best: tuple,
    ):
        """Store the token's row of (expert, score, total, is_padding), by physical id if mapped."""
        logical_id, score, total, is_padding = best
        expert = logical_id
        if args.to_physical.toint() != 0:
            cute.arch.mbarrier_wait(storage.physical_ids_full.data_ptr(), 0)
            if cute.arch.lane_idx() < args.top_k:
                expert = self.physical_ids(storage)[expert, warp]
        is_rare = flags & HAS_RARE_OUTPUTS != 0
        store(args, token, output, logical_id, expert, score, total, is_padding, is_rare)
