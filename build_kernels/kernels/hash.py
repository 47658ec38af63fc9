"""router_hash: the weights of a hash layer's experts for a few tokens, in one launch.

A hash layer looks its experts up: ids = tid2eid[input_ids]. Only their scores are needed, so only
their rows of W_gate are read. An expert has to be one row: W_gate with unit stride along K.

Decomposition
    The rows of the MMA tile are (token, slot): 8 tokens by 8 slots, and top_k slots are used. Grid
    (S, ceil(N / 8)): a cluster of S = NUM_SLICES CTAs per 8 tokens, with K split over it as in
    router_decode. Of the 64 x 8 sums of a CTA, the 64 whose row and column are the same token are
    needed. Those of token i go to CTA i of the cluster, which adds the S partial sums
    as router_decode does: a weight has the bits that the whole gate would give it.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync

from build_kernels.kernels.arguments import arguments_of
from build_kernels.kernels.gemm import W_BLOCK_BYTES, TileGemm, k_slices
from build_kernels.kernels.hash_table import lookup
from build_kernels.kernels.masks import forced_expert, is_forced, is_padding, or_repeated
from build_kernels.kernels.outputs import has_rare_outputs, output_column, store
from build_kernels.kernels.partial_sums import add_terms
from build_kernels.kernels.physical_ids import read_counts, read_physical_ids
from build_kernels.kernels.score import bits_of, choose, reciprocal, router_score, tempered
from build_kernels.kernels.shapes import HASH_TOKEN_TILE, K_BLOCK, MAX_TOP_K, NUM_SLICES, TILE_M

SLOTS = MAX_TOP_K
LOAD_WARPS = 8
# Shared memory for one token's partial sums: FP32 of each slot from every source.
SUMS_BYTES = NUM_SLICES * SLOTS * 4
VECTOR = 8  # BF16 elements in 16 bytes
VECTORS = K_BLOCK // VECTOR
ROWS_AT_ONCE = 32 * LOAD_WARPS // VECTORS

# The launch parameters after the tensor map, as dsv4_router_runtime/parameters.py orders them.
Arguments = arguments_of("hash")


class RouterHash:
    """Compute the gate of a hash layer, for 8 tokens per cluster.

    Warp roles (see TileGemm)
        0-3             epilogue: read the accumulators, send; warp 0 sums, scores and stores
        mma_warp        issues the MMAs on sm_100, where one thread does that
        producer_warp   loads hidden_states by TMA
        the next 8      look the experts up and copy their rows of W_gate to shared memory

    Pipelines (producer -> consumer: arrivals to fill / to empty)
        full, empty        producer and loading warps -> MMA: 1 and the bytes of a chunk of
                           hidden_states (one TMA), 1 per loading warp / mma_arrivals
        sums_full          cluster's epilogue -> owner's: 1 + 32 B per source; used once
        accumulator_full   see TileGemm

    Shared memory: 73 KB with a ring of one chunk of 8 K blocks, which holds all of K up to 8192.
    TMEM, on sm_100: see TileGemmSm100.

    Timeline
        init barriers | look up, read rows of W_gate, cluster sync | wait for the grid before
        | load hidden_states | multiply | st.async to the owners | sum, score, store

    W_gate, tid2eid, input_ids and the physical map are read before the wait, unless a call brings
    forced ids.
    """

    def __init__(self, gemm: TileGemm):
        self.gemm = gemm
        self.first_load_warp = gemm.producer_warp + 1
        self.num_threads = 32 * (self.first_load_warp + LOAD_WARPS)

    def shared_storage(self) -> type:
        """Return the members of shared memory; see TileGemm for the ones that it uses."""
        gemm = self.gemm

        class SharedStorage:
            w: gemm.w_ring
            x: gemm.x_ring
            # (slot, source)
            sums: cute.struct.Align[cute.struct.MemRange[Float32, SUMS_BYTES // 4], 1024]
            full: gemm.ring_barriers
            empty: gemm.ring_barriers
            sums_full: gemm.barrier
            accumulator_full: gemm.accumulator_barriers
            tmem_address: gemm.tmem_address

        return SharedStorage

    @cute.jit
    def __call__(self, hidden_states: cute.Pointer, args: Arguments):
        tma_atom_x, mX = self.gemm.x_tma(hidden_states)
        self.kernel(tma_atom_x, mX, args).launch(
            grid=(NUM_SLICES, (args.num_tokens + HASH_TOKEN_TILE - 1) // HASH_TOKEN_TILE, 1),
            block=(self.num_threads, 1, 1),
            cluster=(NUM_SLICES, 1, 1),
        )

    @cute.kernel
    def kernel(self, tma_atom_x: cute.CopyAtom, mX: cute.Tensor, args: Arguments):
        # ---------------------------------------------------------------- prepare
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        split, tile, _ = cute.arch.block_idx()
        storage = cutlass.utils.SmemAllocator().allocate(cute.struct(self.shared_storage()))

        first_block, num_blocks = k_slices(split, 1, args.num_k_blocks)
        first_token = tile * HASH_TOKEN_TILE
        # CTA i < HASH_TOKEN_TILE of the cluster owns token i of the tile.
        token = first_token + split
        is_owner = split < HASH_TOKEN_TILE and token < args.num_tokens

        if warp == self.gemm.producer_warp:
            cpasync.prefetch_descriptor(tma_atom_x)
        self.gemm.prepare(
            storage,
            warp,
            1 + LOAD_WARPS,
            choose(is_owner, Int32(SUMS_BYTES), Int32(0)),
            (),
        )
        # https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
        cute.arch.griddepcontrol_launch_dependents()
        if warp < self.first_load_warp:
            cute.arch.cluster_wait()

        # ---------------------------------------------------------------- load and multiply
        if warp == self.gemm.producer_warp:
            self.load_x(storage, tma_atom_x, mX, tile, first_block, num_blocks)
        if warp >= self.first_load_warp:
            self.load_w(storage, args, first_token, first_block, num_blocks)
            cute.arch.cluster_wait()
        self.gemm.issue_mma(storage, warp, split, args.num_k_blocks)

        # ---------------------------------------------------------------- reduce and store
        if warp < self.gemm.epilogue_warps:
            # Lane r < top_k has slot r of the CTA's token.
            lane = cute.arch.lane_idx()
            inverse_temp = reciprocal(args.gate_temp)
            logical = self.chosen(args, token, lane)
            # The experts of an unknown token are -1.
            is_unknown = logical < 0
            if args.forced_ids.toint() != 0:
                is_unknown = or_repeated(is_unknown, logical, 0, lane)
            unknown = cute.arch.vote_ballot_sync(lane < args.top_k and is_unknown)
            ids = cute.make_rmem_tensor((1,), Int32)
            ids[0] = choose(lane < args.top_k, cutlass.max(logical, 0), Int32(0))
            if args.to_physical.toint() != 0:
                row_index = choose(is_owner, token, Int32(0))
                ids[0] = read_physical_ids(args, ids, read_counts(args, ids), row_index)[0]
            output = output_column(args, token)
            # Outputs may be in use, and masks in the making, until the grid before has ended.
            cute.arch.griddepcontrol_wait()
            padding = is_padding(args, token)
            self.send(storage, num_blocks, args.num_tokens - first_token)
            self.gemm.free_accumulator(storage, warp)
            if warp == 0 and is_owner:
                # Padding waits too: a peer may not send to a CTA that has ended.
                cute.arch.mbarrier_wait(storage.sums_full.data_ptr(), 0)
                score, total = self.score(storage, args, inverse_temp)
                expert = choose(lane < args.top_k, ids[0], output.shared_id)
                is_padded = padding != 0 or unknown != 0
                store(
                    *(args, token, output, logical, expert),
                    *(score, total, is_padded, has_rare_outputs(args)),
                )

    @cute.jit
    def chosen(self, args: Arguments, token: Int32, slot: Int32) -> Int32:
        """Return the expert in a slot of a token: the table's, or the caller's; -1 for none."""
        expert = lookup(args, token, slot)
        if args.forced_ids.toint() != 0:
            # They may be in the making until the grid before has ended.
            cute.arch.griddepcontrol_wait()
            if is_forced(args, token) != 0:
                expert = forced_expert(args, token, slot)
        return expert

    @cute.jit
    def load_x(
        self,
        storage,
        tma_atom_x: cute.CopyAtom,
        mX: cute.Tensor,
        tile: Int32,
        first_block: Int32,
        num_blocks: Int32,
    ):
        """Load hidden_states by the producer warp, when the grid before has ended."""
        # ((TMA box), stages), ((TMA box), num_chunks)
        tXsX, tXgX = self.gemm.partition_x(storage, tma_atom_x, mX, tile, first_block)
        num_chunks = (num_blocks + self.gemm.chunk - 1) // self.gemm.chunk
        cute.arch.griddepcontrol_wait()
        for chunk in cutlass.range(num_chunks, unroll=1):
            stage = chunk % self.gemm.stages
            full = storage.full.data_ptr() + stage
            self.gemm.wait_until_empty(storage, chunk)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, self.gemm.x_chunk_bytes)
            cute.copy(tma_atom_x, tXgX[(None, chunk)], tXsX[(None, stage)], tma_bar_ptr=full)

    @cute.jit
    def load_w(
        self,
        storage,
        args: Arguments,
        first_token: Int32,
        first_block: Int32,
        num_blocks: Int32,
    ):
        """Copy one row of W_gate per (token, slot) by the loading warps; zeros if there is none.

        A thread copies the same 16 bytes of each K block in every 32nd row. A chunk is read whole
        before any of it is stored, so that the reads overlap.
        """
        thread, _, _ = cute.arch.thread_idx()
        thread = thread - 32 * self.first_load_warp
        vector = thread % VECTORS
        num_rows = TILE_M // ROWS_AT_ONCE
        rows, sources = [], []
        for i in cutlass.range_constexpr(num_rows):
            row = thread // VECTORS + i * ROWS_AT_ONCE
            rows.append(row)
            sources.append(self.chosen(args, first_token + row // SLOTS, row % SLOTS))
        num_chunks = (num_blocks + self.gemm.chunk - 1) // self.gemm.chunk
        for chunk in cutlass.range(num_chunks, unroll=1):
            stage = chunk % self.gemm.stages
            blocks = cutlass.min(num_blocks - chunk * self.gemm.chunk, self.gemm.chunk)
            # (words of 16 bytes, block, row)
            words = cute.make_rmem_tensor((4, self.gemm.chunk, num_rows), Int32)
            words.fill(0)
            for i in cutlass.range_constexpr(num_rows):
                if sources[i] >= 0:
                    first = Int64(sources[i]) * args.w_stride + (
                        (first_block + chunk * self.gemm.chunk) * K_BLOCK + vector * VECTOR
                    )
                    for block in cutlass.range_constexpr(self.gemm.chunk):
                        if block < blocks:
                            source = cute.recast_ptr(args.w_gate + first, dtype=Int32)
                            source = (source + block * (K_BLOCK // 2)).align(16)
                            cute.autovec_copy(
                                cute.make_tensor(source, cute.make_layout(4)),
                                words[(None, block, i)],
                            )
            self.gemm.wait_until_empty(storage, chunk)
            for i in cutlass.range_constexpr(num_rows):
                for block in cutlass.range_constexpr(self.gemm.chunk):
                    if block < blocks:
                        # The 128-byte swizzle permutes a row's 16-byte vectors by its index:
                        # https://docs.nvidia.com/cuda/parallel-thread-execution/#tensor-swizzling-modes
                        offset = (
                            (stage * self.gemm.chunk + block) * (W_BLOCK_BYTES // 4)
                            + rows[i] * (K_BLOCK // 2)
                            + (vector ^ rows[i] % VECTORS) * 4
                        )
                        ring = cute.recast_ptr(storage.w.data_ptr(), dtype=Int32)
                        cute.autovec_copy(
                            words[(None, block, i)],
                            cute.make_tensor((ring + offset).align(16), cute.make_layout(4)),
                        )
            # The MMA reads shared memory through the async proxy.
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(storage.full.data_ptr() + stage)

    @cute.jit
    def send(self, storage, num_blocks: Int32, num_tokens: Int32):
        """Send the partial sums of each token's slots to the CTA that owns the token."""
        source = cute.arch.block_idx_in_cluster()
        # (MMA, MMA_M, MMA_N)
        accumulators, coordinates = self.gemm.accumulators(storage, Int32(0), num_blocks)
        for i in cutlass.range_constexpr(cute.size(accumulators)):
            row, token = coordinates[i]
            if row // SLOTS == token and token < num_tokens:
                cute.arch.store_async_dsmem(
                    storage.sums.data_ptr() + source * SLOTS + row % SLOTS,
                    Int32(bits_of(accumulators[i])),
                    storage.sums_full.data_ptr(),
                    token,
                )

    @cute.jit
    def score(self, storage, args: Arguments, inverse_temp: Float32):
        """Return (score, total): slot r's score to lane r < top_k, 0 to others; their sum."""
        slot = cute.arch.lane_idx() % SLOTS
        # (slot, source) FP32
        sums = cute.make_tensor(
            storage.sums.data_ptr(), cute.make_layout((SLOTS, NUM_SLICES), stride=(1, SLOTS))
        )
        logit = add_terms(sums[(slot, None)])
        score = router_score(tempered(logit, args.gate_temp, inverse_temp))
        if score != score or cute.arch.lane_idx() >= args.top_k:
            score = Float32(0.0)
        # In rank order, as take_top_k sums.
        total = Float32(0.0)
        for rank in cutlass.range_constexpr(SLOTS):
            total = total + cute.arch.shuffle_sync(score, rank)
        return score, total
