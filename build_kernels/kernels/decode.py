"""router_decode: hidden_states and W_gate to weights and ids for N <= 64 tokens, in one launch.

Decomposition, the same on every architecture
    The experts are the MMA's M side in tiles of 64, the tokens its N side. Grid (S, T): S =
    NUM_SPLITS K-splits by T = ceil(E / 64) expert tiles; the S CTAs of one tile form a cluster. CTA
    (s, t) multiplies its slice of W_gate by its slice of hidden_states and sends each token's 64
    partial sums to the CTA of the cluster that owns the token (pairs of tokens go round the S
    ranks). The owner adds the S partials in rank order and applies the activation. One of a token's
    T owners merges the tiles and selects. The order of every sum depends on K alone: a token's bits
    do not depend on N or on its row.

Exchanges
    partial sums   st.async into the owner's shared memory, completing on its `sums_full` mbarrier
    entries        (key, score) of every expert through the global `workspace`, all zero between
                   launches. Each of a token's T owners draws a ticket while it multiplies; the
                   last to draw merges. The others have started by then and wait for nobody
                   outside their cluster, so the merger's wait ends in any schedule and on any
                   number of streams. An entry is one 8-byte relaxed store, never of zero: a word
                   that is not zero is complete, without fence or flag. The merger puts the zeros
                   back; a dependent launch draws after it has ended.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, Uint64
from cutlass.cute.nvgpu import cpasync

from build_kernels.kernels.arguments import arguments_of
from build_kernels.kernels.entries import draw_ticket, entry_of, merge
from build_kernels.kernels.gemm import (
    EPILOGUE_WARPS,
    MAX_K,
    W_BLOCK_BYTES,
    TileGemm,
    k_slice,
)
from build_kernels.kernels.hash_table import lookup
from build_kernels.kernels.outputs import (
    Row,
    is_padded,
    read_counts,
    read_mask,
    read_names,
    row_of,
    store,
    store_padding,
)
from build_kernels.kernels.select import (
    NOT_A_CANDIDATE,
    bits_of,
    choose,
    ranked_key,
    reciprocal,
    router_score,
    selection_key,
    take_top_k,
    tempered,
)
from build_kernels.kernels.shapes import (
    EXPERT_TILE,
    K_BLOCK,
    MAX_EXPERTS,
    MAX_TOP_K,
    NUM_SPLITS,
)

MAX_TILES = MAX_EXPERTS // EXPERT_TILE
# A token's facts in one word: its ticket, then flags.
MAX_TICKET = MAX_TILES - 1
IS_IMAGE = MAX_TILES
IS_PADDED = 2 * MAX_TILES


def max_pairs(token_tile: int) -> int:
    """How many pairs of tokens one CTA of a cluster sums at most."""
    return max(1, token_tile // (2 * NUM_SPLITS))


def sums_bytes(token_tile: int) -> int:
    """Shared memory for the partial sums of those pairs: FP32 from every source."""
    return max_pairs(token_tile) * NUM_SPLITS * 2 * EXPERT_TILE * 4


def max_owned(token_tile: int) -> int:
    """How many tokens one CTA of a cluster sums at most, one an epilogue warp."""
    return 2 * max_pairs(token_tile)


Arguments = arguments_of("decode")


class RouterDecode:
    """The whole gate: every expert's score, and of each token the top_k.

    Warp roles (see TileGemm)
        0-3             epilogue: read the accumulators, send, sum, select, store
        mma_warp        issues the MMAs where one thread does that (sm_100)
        producer_warp   loads W_gate and hidden_states by TMA, then gathers the tokens' facts
        names_warp      reads what the experts are called, where there is a physical map

    Pipelines (see TileGemm)
        full, empty   1 arrival and the chunk's bytes of W_gate (a TMA each block) and of
                      hidden_states (one TMA: few reads wait for the grid before) / mma_arrivals
        sums_full     1 + 512 B a source and token pair; once
        facts_full    producer -> epilogue: 32 lanes; once. A token's ticket and masks.
        names_full    names warp -> epilogue: 32 lanes; once. The names of a token's experts.
    Masks and names are read by warps that have nothing else to wait for: in the epilogue, which
    multiplies on sm_90, one mask cost 0.4 us at N = 64 and a map 0.4 us without PDL.

    Shared memory: 84, 108 and 152 KB for tiles of 8, 32 and 64 tokens; 8 KB of it a token pair
    owned for sums, and 2 KB a token for names.

    Timeline
        barriers | fill the ring with W_gate, cluster sync, wait for the grid before
        | load hidden_states | multiply | st.async to the owners | sum, score, publish
        | merge, select, store
    """

    def __init__(self, gemm: TileGemm):
        self.gemm = gemm
        self.layout = self.gemm.layout
        self.token_tile = self.gemm.token_tile
        self.max_pairs = max_pairs(self.gemm.token_tile)
        self.max_owned = max_owned(self.gemm.token_tile)
        self.names_warp = self.gemm.producer_warp + 1
        self.num_threads = 32 * (self.names_warp + 1)

    @cute.jit
    def __call__(
        self,
        w_gate: cute.Pointer,
        hidden_states: cute.Pointer,
        args: Arguments,
    ):
        if cutlass.const_expr(self.layout == "kmajor"):
            w_layout = cute.make_layout((MAX_EXPERTS, MAX_K), stride=(MAX_K, 1))
        else:
            w_layout = cute.make_layout((MAX_EXPERTS, MAX_K), stride=(1, MAX_EXPERTS))
        w_atom, w_tensor = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            cute.make_tensor(w_gate, w_layout),
            cute.select(self.gemm.w_smem_layout(), mode=[0, 1]),
            (EXPERT_TILE, K_BLOCK),
        )
        x_atom, x_tensor = self.gemm.x_atom(hidden_states)
        self.kernel(
            w_atom,
            w_tensor,
            x_atom,
            x_tensor,
            args,
        ).launch(
            grid=(NUM_SPLITS, (args.num_experts + EXPERT_TILE - 1) // EXPERT_TILE, 1),
            block=(self.num_threads, 1, 1),
            cluster=(NUM_SPLITS, 1, 1),
        )

    @cute.kernel
    def kernel(
        self,
        w_atom: cute.CopyAtom,
        mW: cute.Tensor,
        x_atom: cute.CopyAtom,
        mX: cute.Tensor,
        args: Arguments,
    ):
        # ---------------------------------------------------------------- prepare
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        split, tile, _ = cute.arch.block_idx()
        _, num_tiles, _ = cute.arch.grid_dim()
        storage = cutlass.utils.SmemAllocator().allocate(self.gemm.shared_storage())

        first_block, num_blocks = k_slice(split, args.num_k_blocks)
        # token pairs split, split + S, ... are this CTA's to sum
        num_pairs = ((args.num_tokens + 1) // 2 - split + NUM_SPLITS - 1) // NUM_SPLITS

        if warp == self.gemm.producer_warp:
            cpasync.prefetch_descriptor(w_atom)
            cpasync.prefetch_descriptor(x_atom)
        self.gemm.prepare(storage, warp, 1, num_pairs * (NUM_SPLITS * EXPERT_TILE * 2 * 4))
        cute.arch.griddepcontrol_launch_dependents()
        if warp != self.gemm.producer_warp:
            cute.arch.cluster_wait()

        # ---------------------------------------------------------------- load and multiply
        if warp == self.gemm.producer_warp:
            self.load(storage, w_atom, mW, x_atom, mX, tile, first_block, num_blocks)
            self.publish_facts(storage, args, split, num_tiles)
        if warp == self.names_warp and args.to_physical.toint() != 0:
            self.publish_names(storage, args, split)
        self.gemm.issue_mma(storage, warp, num_blocks)

        # ---------------------------------------------------------------- reduce and select
        if warp < EPILOGUE_WARPS:
            # Warp w sums token w mod 2 of the CTA's pair w / 2.
            pair, column = warp // 2, warp % 2
            token = owned_token(split, warp)
            entries = self.own_entries(args.workspace, token, tile, num_tiles)
            row = row_of(args, token)
            biases = self.read_biases(args, tile)
            inverse_temp = reciprocal(args.gate_temp)
            ranks, unknown = self.read_ranks(args, token, tile)
            self.send(storage, num_blocks, args.num_tokens)
            self.gemm.free_accumulator(storage, warp)
            if token < args.num_tokens:
                # Outputs and workspace may be in use until the grid before has ended.
                cute.arch.griddepcontrol_wait()
                cute.arch.mbarrier_wait(storage.facts_full.data_ptr(), 0)
                facts = self.facts(storage)[warp]
                is_image = facts & IS_IMAGE
                # Of padding too: a peer may not send to a CTA that has ended.
                cute.arch.mbarrier_wait(storage.sums_full.data_ptr(), 0)
                if unknown == 0 and facts & IS_PADDED == 0:
                    keys, scores = self.score(
                        *(storage, args, pair, column, tile),
                        *(biases, is_image, ranks, inverse_temp),
                    )
                    if num_tiles == 1:
                        entry = self.select_alone(keys, scores, args.top_k, row.shared_id)
                        self.store(storage, args, row, warp, entry)
                    else:
                        for i in cutlass.range_constexpr(2):
                            word = (Uint64(keys[i]) << 32) | Uint64(bits_of(scores[i]))
                            cute.arch.store(entries[i], word, sem="relaxed", scope="gpu")
                        if facts & MAX_TICKET == num_tiles - 1:
                            # E up to 256, to 384 and to 512: as few registers as hold them.
                            merged = (args.workspace, token, num_tiles, args.top_k, row.shared_id)
                            if num_tiles <= 4:
                                self.store(storage, args, row, warp, merge(4, *merged))
                            elif num_tiles <= 6:
                                self.store(storage, args, row, warp, merge(6, *merged))
                            else:
                                entry = merge(MAX_TILES, *merged)
                                self.store(storage, args, row, warp, entry)
                elif tile == 0:
                    store_padding(row)

    @cute.jit
    def load(
        self,
        storage,
        w_atom: cute.CopyAtom,
        mW: cute.Tensor,
        x_atom: cute.CopyAtom,
        mX: cute.Tensor,
        tile: Int32,
        first_block: Int32,
        num_blocks: Int32,
    ):
        """The producer warp: W_gate up to the ring's depth, the grid dependency, then the rest."""
        w_layout = self.gemm.w_smem_layout()
        sW = storage.w.get_tensor(w_layout.outer, swizzle=w_layout.inner)
        # (64, 64, k_block)
        gW = cute.local_tile(mW, (EXPERT_TILE, K_BLOCK), (tile, None))
        # ((box), ring block), ((box), k_block)
        tWsW, tWgW = cpasync.tma_partition(
            w_atom, 0, cute.make_layout(1), cute.group_modes(sW, 0, 2), cute.group_modes(gW, 0, 2)
        )
        tXsX, tXgX = self.gemm.partition_x(storage, x_atom, mX, 0, first_block)
        num_chunks = (num_blocks + self.gemm.chunk - 1) // self.gemm.chunk
        num_prefetched = cutlass.min(num_chunks, self.gemm.stages)

        for chunk in cutlass.range(num_prefetched, unroll=1):
            self.load_w(storage, w_atom, tWgW, tWsW, first_block, num_blocks, chunk)
        cute.arch.cluster_wait()
        cute.arch.griddepcontrol_wait()
        for chunk in cutlass.range(num_chunks, unroll=1):
            stage = chunk % self.gemm.stages
            if chunk >= self.gemm.stages:
                self.gemm.wait_until_empty(storage, chunk)
                self.load_w(storage, w_atom, tWgW, tWsW, first_block, num_blocks, chunk)
            cute.copy(
                x_atom,
                tXgX[(None, chunk)],
                tXsX[(None, stage)],
                tma_bar_ptr=storage.full.data_ptr() + stage,
            )

    @cute.jit
    def load_w(
        self,
        storage,
        w_atom: cute.CopyAtom,
        tWgW: cute.Tensor,
        tWsW: cute.Tensor,
        first_block: Int32,
        num_blocks: Int32,
        chunk: Int32,
    ):
        """Announce a chunk's bytes, hidden_states' too, and read its blocks of W_gate."""
        stage = chunk % self.gemm.stages
        blocks = cutlass.min(num_blocks - chunk * self.gemm.chunk, self.gemm.chunk)
        full = storage.full.data_ptr() + stage
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(
                full, blocks * W_BLOCK_BYTES + self.gemm.x_chunk_bytes
            )
        for block in cutlass.range(blocks, unroll=1):
            cute.copy(
                w_atom,
                tWgW[(None, first_block + chunk * self.gemm.chunk + block)],
                tWsW[(None, stage * self.gemm.chunk + block)],
                tma_bar_ptr=full,
            )

    def facts(self, storage) -> cute.Tensor:
        """(epilogue warp,) int32: its token's ticket and flags."""
        return cute.make_tensor(storage.facts.data_ptr(), cute.make_layout(self.max_owned))

    def names(self, storage) -> cute.Tensor:
        """(expert, epilogue warp) int32: what each of its token's experts is called."""
        return cute.make_tensor(
            storage.names.data_ptr(), cute.make_layout((MAX_EXPERTS, self.max_owned))
        )

    @cute.jit
    def publish_facts(
        self,
        storage,
        args: Arguments,
        split: Int32,
        num_tiles: Int32,
    ):
        """The producer warp, when all is loaded: for each of the CTA's tokens draw a ticket and
        read the masks, which are in the making until the grid before has ended."""
        lane = cute.arch.lane_idx()
        token = owned_token(split, lane)
        if lane < self.max_owned and token < args.num_tokens:
            ticket = draw_ticket(args.workspace, token, num_tiles)
            is_image = read_mask(args.image_mask, token, args.num_tokens)
            padded = is_padded(args, token)
            facts = self.facts(storage)
            facts[lane] = ticket | flag(is_image, IS_IMAGE) | flag(padded, IS_PADDED)
        cute.arch.mbarrier_arrive(storage.facts_full.data_ptr())

    @cute.jit
    def publish_names(self, storage, args: Arguments, split: Int32):
        """The names warp: physical ids of every expert for the CTA's tokens.

        A name takes two reads of HBM in a row: here they are on nobody's path.
        """
        if owned_token(split, 0) < args.num_tokens:
            experts = cute.make_rmem_tensor((MAX_EXPERTS // 32,), Int32)
            for i in cutlass.range_constexpr(MAX_EXPERTS // 32):
                experts[i] = 32 * i + cute.arch.lane_idx()
            counts = read_counts(args, experts)
            names = self.names(storage)
            for warp in cutlass.range_constexpr(self.max_owned):
                token = owned_token(split, warp)
                row = read_names(args, experts, counts, token)
                for i in cutlass.range_constexpr(MAX_EXPERTS // 32):
                    names[experts[i], warp] = row[i]
            cute.arch.mbarrier_arrive(storage.names_full.data_ptr())

    def sums(self, storage) -> cute.Tensor:
        """(expert, column, source, pair) FP32: partial sums as a sender holds them.

        The accumulator fragment of wgmma and of tcgen05.ld 16x256b gives a thread experts r and r +
        8 of two neighbouring tokens: these four are neighbours here, so they travel as one 16-byte
        store. As ((lane mod 8, half, lane / 8), ...) the first mode is also how the owner's lanes
        read them.
        """
        return cute.make_tensor(
            storage.sums.data_ptr(),
            cute.make_layout(
                ((8, 2, 4), 2, NUM_SPLITS, self.max_pairs),
                stride=((4, 1, 32), 2, 2 * EXPERT_TILE, 2 * EXPERT_TILE * NUM_SPLITS),
            ),
        )

    @cute.jit
    def lane_expert(self, half: cutlass.Constexpr[int]) -> Int32:
        """A lane's lower (half 0) or upper (half 1) expert of the tile: 8 apart, as in `sums`."""
        lane = cute.arch.lane_idx()
        return lane // 8 * 16 + lane % 8 + 8 * half

    @cute.jit
    def send(self, storage, num_blocks: Int32, num_tokens: Int32):
        """Send every partial sum to the CTA that owns its token."""
        source = cute.arch.block_idx_in_cluster()
        accumulators, coordinates = self.gemm.accumulators(storage, num_blocks)
        sums = self.sums(storage)
        for i in cutlass.range_constexpr(0, cute.size(accumulators), 4):
            expert, token = coordinates[i]
            pair = token // 2
            if token < num_tokens:
                cute.arch.store_async_dsmem(
                    cute.domain_offset(
                        (expert, 0, source, pair // NUM_SPLITS), sums
                    ).iterator.align(16),
                    tuple(Int32(bits_of(accumulators[i + j])) for j in (0, 2, 1, 3)),
                    storage.sums_full.data_ptr(),
                    pair % NUM_SPLITS,
                )

    @cute.jit
    def read_biases(self, args: Arguments, tile: Int32):
        """(2, 2) FP32: for a lane's two experts of the tile, the bias of text and of images."""
        biases = cute.make_rmem_tensor((2, 2), Float32)
        biases.fill(0.0)
        text = cute.make_tensor(args.e_bias, cute.make_layout(MAX_EXPERTS))
        image = cute.make_tensor(args.bias_vl, cute.make_layout(MAX_EXPERTS))
        for i in cutlass.range_constexpr(2):
            expert = EXPERT_TILE * tile + self.lane_expert(i)
            if expert < args.num_experts and args.e_bias.toint() != 0:
                biases[i, 0] = text[expert]
            if expert < args.num_experts and args.bias_vl.toint() != 0:
                biases[i, 1] = image[expert]
        return biases

    @cute.jit
    def read_ranks(self, args: Arguments, token: Int32, tile: Int32):
        """(ranks, unknown): of a lane's two experts of the tile the place in the token's row of the
        table, MAX_TOP_K for none; whether the token has no row. Without a table nothing is read."""
        ranks = cute.make_rmem_tensor((2,), Int32)
        ranks.fill(MAX_TOP_K)
        unknown = Int32(0)
        if args.tid2eid.toint() != 0:
            chosen = lookup(args, token, cute.arch.lane_idx())
            for i in cutlass.range_constexpr(2):
                for rank in cutlass.range_constexpr(MAX_TOP_K):
                    matches = cute.arch.shuffle_sync(
                        chosen, rank
                    ) == EXPERT_TILE * tile + self.lane_expert(i)
                    ranks[i] = choose(matches, Int32(rank), ranks[i])
            unknown = choose(cute.arch.shuffle_sync(chosen, 0) < 0, Int32(1), Int32(0))
        return ranks, unknown

    @cute.jit
    def store(self, storage, args: Arguments, row: Row, warp: Int32, entry: tuple):
        """Name the chosen experts and store the token's row."""
        expert, score, total = entry
        if args.to_physical.toint() != 0:
            cute.arch.mbarrier_wait(storage.names_full.data_ptr(), 0)
            if cute.arch.lane_idx() < args.top_k:
                expert = self.names(storage)[expert, warp]
        store(row, expert, score, total)

    @cute.jit
    def score(
        self,
        storage,
        args: Arguments,
        pair: Int32,
        column: Int32,
        tile: Int32,
        biases: cute.Tensor,
        is_image: Int32,
        ranks: cute.Tensor,
        inverse_temp: Float32,
    ):
        """Keys (uint32) and scores (FP32) of a lane's two experts, the sums in source order."""
        lane = cute.arch.lane_idx()
        sums = self.sums(storage)
        parts = cute.make_rmem_tensor((2, NUM_SPLITS), Float32)
        for source in cutlass.range_constexpr(NUM_SPLITS):
            pair_of_experts = sums[((lane % 8, None, lane // 8), column, source, pair)]
            cute.autovec_copy(pair_of_experts, parts[(None, source)])
        keys = cute.make_rmem_tensor((2,), Uint32)
        scores = cute.make_rmem_tensor((2,), Float32)
        for i in cutlass.range_constexpr(2):
            logit = parts[i, 0]
            for source in cutlass.range_constexpr(1, NUM_SPLITS):
                logit = logit + parts[i, source]
            score = router_score(tempered(logit, args.gate_temp, inverse_temp))
            key = selection_key(score, choose(is_image != 0, biases[i, 1], biases[i, 0]))
            if args.tid2eid.toint() != 0:
                key = ranked_key(ranks[i])
            if EXPERT_TILE * tile + self.lane_expert(i) >= args.num_experts:
                key = Uint32(NOT_A_CANDIDATE)
            if score != score:
                score = Float32(0.0)
            keys[i], scores[i] = key, score
        return keys, scores

    @cute.jit
    def select_alone(self, keys: cute.Tensor, scores: cute.Tensor, top_k: Int32, otherwise: Int32):
        """The top_k of the only tile: give lane l experts 2 l and 2 l + 1, then take."""
        expert = 2 * cute.arch.lane_idx()
        source = expert // 16 * 8 + expert % 8
        is_upper = expert % 16 >= 8
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
        return take_top_k(ordered_keys, ordered_scores, expert, top_k, otherwise)

    @cute.jit
    def own_entries(self, workspace: cute.Pointer, token: Int32, tile: Int32, num_tiles: Int32):
        """Pointers to a lane's two entries, where the merging lane will look for them.

        The division is why they are made before the multiply, off the path that others wait for.
        """
        pointers = []
        for half in cutlass.range_constexpr(2):
            expert = EXPERT_TILE * tile + self.lane_expert(half)
            run = 2 * num_tiles
            pointers.append(entry_of(workspace, token, expert // run, expert % run))
        return pointers


def owned_token(split: Int32, warp: Int32) -> Int32:
    """The token that an epilogue warp of a cluster's CTA `split` sums and selects for."""
    return 2 * (warp // 2 * NUM_SPLITS + split) + warp % 2


def flag(value: Int32, bit: int) -> Int32:
    """`bit` where value is not 0."""
    return choose(value != 0, Int32(bit), Int32(0))
