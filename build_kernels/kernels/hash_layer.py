"""router_hash: the weights of a hash layer's experts for a few tokens, in one launch.

A hash layer looks its experts up: ids = tid2eid[input_ids]. Only their scores are needed, so only
their rows of W_gate are read, which takes W_gate with unit stride along K.

Decomposition
    The rows of the GEMM are (token, slot): 8 tokens by 8 slots, of which top_k are used. Grid
    (S, ceil(N / 8)), a cluster of S = NUM_SPLITS CTAs for 8 tokens, K split over it as in
    router_decode. Of the 64 x 8 sums a CTA makes it wants the 64 in which row and column are the
    same token. It sends those of token i to CTA i of the cluster, which adds the S partials in rank
    order, as router_decode does: a weight has the bits that the whole gate would give it.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync

from build_kernels.kernels.arguments import arguments_of
from build_kernels.kernels.gemm import (
    EPILOGUE_WARPS,
    W_BLOCK_BYTES,
    TileGemm,
    k_slice,
)
from build_kernels.kernels.hash_table import lookup
from build_kernels.kernels.outputs import (
    is_padded,
    read_counts,
    read_names,
    row_of,
    store,
    store_padding,
)
from build_kernels.kernels.select import (
    bits_of,
    choose,
    reciprocal,
    router_score,
    tempered,
)
from build_kernels.kernels.shapes import HASH_TOKEN_TILE, K_BLOCK, MAX_TOP_K, NUM_SPLITS, TILE_M

SLOTS = MAX_TOP_K
LOAD_WARPS = 8
# Shared memory for one token's partial sums: FP32 of each slot from every source.
SUMS_BYTES = NUM_SPLITS * SLOTS * 4
VECTOR = 8  # BF16 elements in 16 bytes
VECTORS = K_BLOCK // VECTOR
ROWS_AT_ONCE = 32 * LOAD_WARPS // VECTORS


Arguments = arguments_of("hash")


class RouterHash:
    """The gate of a hash layer, for 8 tokens a cluster.

    Warp roles (see TileGemm)
        0-3             epilogue: read the accumulators, send; warp 0 sums, scores, stores
        mma_warp        issues the MMAs where one thread does that (sm_100)
        producer_warp   loads hidden_states by TMA
        the next 8      look the experts up and copy their rows of W_gate to shared memory

    Pipelines (see TileGemm)
        full, empty   1 arrival with the chunk's bytes of hidden_states (one TMA) and one from each
                      loading warp / mma_arrivals
        sums_full     1 + 32 B a source; once

    Shared memory: 73 KB with a ring of one chunk of 8 K blocks: K up to 8192 is in flight at once.

    Timeline
        barriers | look up, read rows of W_gate, cluster sync | wait for the grid before
        | load hidden_states | multiply | st.async to the owners | sum, score, store

    What is read before the wait: W_gate, tid2eid, input_ids and the physical map.
    """

    def __init__(self, gemm: TileGemm):
        self.gemm = gemm
        self.first_load_warp = self.gemm.producer_warp + 1
        self.num_threads = 32 * (self.first_load_warp + LOAD_WARPS)

    @cute.jit
    def __call__(
        self,
        hidden_states: cute.Pointer,
        args: Arguments,
    ):
        x_atom, x_tensor = self.gemm.x_atom(hidden_states)
        self.kernel(
            x_atom,
            x_tensor,
            args,
        ).launch(
            grid=(NUM_SPLITS, (args.num_tokens + HASH_TOKEN_TILE - 1) // HASH_TOKEN_TILE, 1),
            block=(self.num_threads, 1, 1),
            cluster=(NUM_SPLITS, 1, 1),
        )

    @cute.kernel
    def kernel(
        self,
        x_atom: cute.CopyAtom,
        mX: cute.Tensor,
        args: Arguments,
    ):
        # ---------------------------------------------------------------- prepare
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        split, tile, _ = cute.arch.block_idx()
        storage = cutlass.utils.SmemAllocator().allocate(self.gemm.shared_storage())

        first_block, num_blocks = k_slice(split, args.num_k_blocks)
        first_token = tile * HASH_TOKEN_TILE
        # CTA i < HASH_TOKEN_TILE of the cluster owns token i of the tile.
        token = first_token + split
        is_owner = split < HASH_TOKEN_TILE and token < args.num_tokens

        if warp == self.gemm.producer_warp:
            cpasync.prefetch_descriptor(x_atom)
        self.gemm.prepare(
            storage, warp, 1 + LOAD_WARPS, choose(is_owner, Int32(SUMS_BYTES), Int32(0))
        )
        cute.arch.griddepcontrol_launch_dependents()
        if warp < self.first_load_warp:
            cute.arch.cluster_wait()

        # ---------------------------------------------------------------- load and multiply
        if warp == self.gemm.producer_warp:
            self.load_x(storage, x_atom, mX, tile, first_block, num_blocks)
        if warp >= self.first_load_warp:
            self.load_w(storage, args, first_token, first_block, num_blocks)
            cute.arch.cluster_wait()
        self.gemm.issue_mma(storage, warp, num_blocks)

        # ---------------------------------------------------------------- reduce and store
        if warp < EPILOGUE_WARPS:
            lane = cute.arch.lane_idx()
            inverse_temp = reciprocal(args.gate_temp)
            expert = lookup(args, token, lane)
            # An unknown token's experts are -1.
            unknown = cute.arch.vote_ballot_sync(lane < args.top_k and expert < 0)
            ids = cute.make_rmem_tensor((1,), Int32)
            ids[0] = choose(lane < args.top_k, cutlass.max(expert, 0), Int32(0))
            if args.to_physical.toint() != 0:
                row_index = choose(is_owner, token, Int32(0))
                ids[0] = read_names(args, ids, read_counts(args, ids), row_index)[0]
            row = row_of(args, token)
            # Outputs may be in use, and masks in the making, until the grid before has ended.
            cute.arch.griddepcontrol_wait()
            padded = is_padded(args, token)
            self.send(storage, num_blocks, args.num_tokens - first_token)
            self.gemm.free_accumulator(storage, warp)
            if warp == 0 and is_owner:
                # Of padding too: a peer may not send to a CTA that has ended.
                cute.arch.mbarrier_wait(storage.sums_full.data_ptr(), 0)
                if padded == 0 and unknown == 0:
                    score, total = self.score(storage, args, inverse_temp)
                    store(row, choose(lane < args.top_k, ids[0], row.shared_id), score, total)
                else:
                    store_padding(row)

    @cute.jit
    def load_x(
        self,
        storage,
        x_atom: cute.CopyAtom,
        mX: cute.Tensor,
        tile: Int32,
        first_block: Int32,
        num_blocks: Int32,
    ):
        """The producer warp: hidden_states, once the grid before has ended."""
        tXsX, tXgX = self.gemm.partition_x(storage, x_atom, mX, tile, first_block)
        num_chunks = (num_blocks + self.gemm.chunk - 1) // self.gemm.chunk
        cute.arch.griddepcontrol_wait()
        for chunk in cutlass.range(num_chunks, unroll=1):
            stage = chunk % self.gemm.stages
            full = storage.full.data_ptr() + stage
            self.gemm.wait_until_empty(storage, chunk)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, self.gemm.x_chunk_bytes)
            cute.copy(x_atom, tXgX[(None, chunk)], tXsX[(None, stage)], tma_bar_ptr=full)

    @cute.jit
    def load_w(
        self,
        storage,
        args: Arguments,
        first_token: Int32,
        first_block: Int32,
        num_blocks: Int32,
    ):
        """The loading warps: a row of W_gate for each (token, slot), zeros where there is none.

        A thread copies the same 16 bytes of a K block in every block and in every 32nd row. All of
        a chunk is read before any of it is stored, so that the reads overlap.
        """
        thread, _, _ = cute.arch.thread_idx()
        thread = thread - 32 * self.first_load_warp
        vector = thread % VECTORS
        num_rows = TILE_M // ROWS_AT_ONCE
        rows, sources = [], []
        for i in cutlass.range_constexpr(num_rows):
            row = thread // VECTORS + i * ROWS_AT_ONCE
            rows.append(row)
            sources.append(lookup(args, first_token + row // SLOTS, row % SLOTS))
        num_chunks = (num_blocks + self.gemm.chunk - 1) // self.gemm.chunk
        for chunk in cutlass.range(num_chunks, unroll=1):
            stage = chunk % self.gemm.stages
            blocks = cutlass.min(num_blocks - chunk * self.gemm.chunk, self.gemm.chunk)
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
                        # The 128-byte swizzle: a row's 16-byte vectors are permuted by its index.
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
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(storage.full.data_ptr() + stage)

    @cute.jit
    def send(self, storage, num_blocks: Int32, num_tokens: Int32):
        """Send each of the tile's num_tokens its slots' partial sums."""
        source = cute.arch.block_idx_in_cluster()
        accumulators, coordinates = self.gemm.accumulators(storage, num_blocks)
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
        """(score, total): of lane r < top_k slot r's score, 0 of others; the sum in rank order."""
        slot = cute.arch.lane_idx() % SLOTS
        sums = cute.make_tensor(storage.sums.data_ptr(), cute.make_layout(NUM_SPLITS * SLOTS))
        logit = sums[slot]
        for source in cutlass.range_constexpr(1, NUM_SPLITS):
            logit = logit + sums[source * SLOTS + slot]
        score = router_score(tempered(logit, args.gate_temp, inverse_temp))
        if score != score or cute.arch.lane_idx() >= args.top_k:
            score = Float32(0.0)
        total = Float32(0.0)
        for rank in cutlass.range_constexpr(SLOTS):
            total = total + cute.arch.shuffle_sync(score, rank)
        return score, total
