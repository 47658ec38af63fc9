"""router_decode: hidden_states and W_gate to weights and ids for N <= 64 tokens, in one launch.

Decomposition, the same on every architecture
    The experts are the MMA's M side in tiles of 64, the tokens its N side. Grid (S, T): S = NUM_SPLITS
    K-splits by T = ceil(E / 64) expert tiles; the S CTAs of one tile form a cluster. CTA (s, t)
    multiplies its slice of W_gate by its slice of hidden_states and sends each token's 64 partial sums
    to the CTA of the cluster that owns the token (rank n mod S). The owner adds the S partials in rank
    order, applies the activation and publishes 64 scores. The last of a token's T owners to arrive
    selects its experts. The order of every sum depends on K alone: a token's bits do not depend on N
    or on its row.

Exchanges
    partial sums   st.async into the owner's shared memory, completing on its `sums_full` mbarrier
    scores         global scratch `partials` and one atomic per (token, tile) on `counters`; the last
                   arriver leaves its counter at zero for the next launch
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_ptr

from build_kernels.kernels.select import bits_of, router_score, select_top_k

EXPERT_TILE = 64
K_BLOCK = 64
MAX_EXPERTS = 512
MAX_TILES = MAX_EXPERTS // EXPERT_TILE
MAX_TOKENS = 64
MAX_K = 1 << 20  # bounds coordinates only: the real extents are in the tensor maps
NUM_SPLITS = 16
EPILOGUE_WARPS = 4
W_BLOCK_BYTES = EXPERT_TILE * K_BLOCK * 2


class RouterDecode:
    """Shared memory, loading, reducing and selecting; a subclass says how an architecture multiplies.

    Warp roles
        0-3             epilogue: read the accumulators, send, sum, select, store
        mma_warp        issues the MMAs where one thread does that (sm_100); on sm_90 the epilogue
                        warps are the warpgroup that multiplies
        producer_warp   loads W_gate and hidden_states by TMA

    Pipelines (producer -> consumer: arrivals that fill / that empty)
        w_full, w_empty   TMA -> MMA: 1 + 8192 B / mma_arrivals; a ring of w_stages blocks of W_gate
        x_full, x_empty   TMA -> MMA: 1 + 128 B a token / mma_arrivals; a ring of x_stages blocks
        sums_full         the cluster's epilogue warps -> the owner's: 1 + 256 B a source and token; once

    Shared memory: 8 KB w_stages + 128 B token_tile x_stages + 256 B token_tile of partial sums + barriers:
    at most 113 KB, so that two CTAs share an SM and a dependent launch reads its weights under this one.

    Timeline
        barriers, cluster sync | fill the W ring, then wait for the grid before | load hidden_states
        | multiply | st.async to the owners | sum, score, publish | the last arriver selects
    """

    mma_warp = None
    producer_warp = 4
    mma_arrivals = 1

    def __init__(self, *, layout: str, token_tile: int):
        self.layout = layout
        self.token_tile = token_tile
        self.x_block_bytes = token_tile * K_BLOCK * 2
        self.w_stages = 8
        self.x_stages = 8 if token_tile <= 32 else 4
        self.num_threads = 32 * (self.producer_warp + 1)

    def w_smem_layout(self) -> cute.ComposedLayout:
        """(64 experts, 64 k, w_stages) BF16, 128-byte swizzle, contiguous as W_gate is."""
        kmajor = self.layout == "kmajor"
        kind = warpgroup.SmemLayoutAtomKind
        atom = warpgroup.make_smem_layout_atom(kind.K_SW128 if kmajor else kind.MN_SW128, BFloat16)
        shape = (EXPERT_TILE, K_BLOCK, self.w_stages)
        return cute.tile_to_shape(atom, shape, order=(0, 1, 2) if kmajor else (1, 0, 2))

    def x_smem_layout(self) -> cute.ComposedLayout:
        """(token_tile, 64 k, x_stages) BF16, 128-byte swizzle, K contiguous."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        return cute.tile_to_shape(atom, (self.token_tile, K_BLOCK, self.x_stages), order=(0, 1, 2))

    def shared_storage(self):
        """The shared-memory struct: swizzled rings first, on the 1024 bytes that the swizzle repeats in."""

        @cute.struct
        class SharedStorage:
            w: cute.struct.Align[
                cute.struct.MemRange[BFloat16, self.w_stages * W_BLOCK_BYTES // 2], 1024
            ]
            x: cute.struct.Align[
                cute.struct.MemRange[BFloat16, self.x_stages * self.x_block_bytes // 2], 1024
            ]
            sums: cute.struct.Align[
                cute.struct.MemRange[Float32, self.token_tile * EXPERT_TILE], 1024
            ]
            w_full: cute.struct.MemRange[Int64, self.w_stages]
            w_empty: cute.struct.MemRange[Int64, self.w_stages]
            x_full: cute.struct.MemRange[Int64, self.x_stages]
            x_empty: cute.struct.MemRange[Int64, self.x_stages]
            sums_full: cute.struct.MemRange[Int64, 1]
            accumulator_full: cute.struct.MemRange[Int64, 1]
            tmem_address: cute.struct.MemRange[Int32, 1]

        return SharedStorage

    @property
    def shared_bytes(self) -> int:
        """Bytes up to the end of shared_storage's last member (its own size is padded to 1024)."""
        rings = self.w_stages * W_BLOCK_BYTES + self.x_stages * self.x_block_bytes
        sums = self.token_tile * EXPERT_TILE * 4
        num_barriers = 2 * self.w_stages + 2 * self.x_stages + 2
        return rings + sums + 8 * num_barriers + 8

    @cute.jit
    def __call__(
        self,
        w_gate: cute.Pointer,
        hidden_states: cute.Pointer,
        partials: cute.Pointer,
        counters: cute.Pointer,
        e_bias: cute.Pointer,
        out_weights: cute.Pointer,
        out_ids: cute.Pointer,
        num_tokens: Int32,
        num_experts: Int32,
        num_k_blocks: Int32,
        top_k: Int32,
        routed_scaling_factor: Float32,
        out_weights_stride: Int32,
        out_ids_stride: Int32,
    ):
        if cutlass.const_expr(self.layout == "kmajor"):
            w_layout = cute.make_layout((MAX_EXPERTS, MAX_K), stride=(MAX_K, 1))
        else:
            w_layout = cute.make_layout((MAX_EXPERTS, MAX_K), stride=(1, MAX_EXPERTS))
        x_layout = cute.make_layout((self.token_tile, MAX_K), stride=(MAX_K, 1))
        w_atom, w_tensor = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            cute.make_tensor(w_gate, w_layout),
            cute.select(self.w_smem_layout(), mode=[0, 1]),
            (EXPERT_TILE, K_BLOCK),
        )
        x_atom, x_tensor = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            cute.make_tensor(hidden_states, x_layout),
            cute.select(self.x_smem_layout(), mode=[0, 1]),
            (self.token_tile, K_BLOCK),
        )
        self.kernel(
            w_atom,
            w_tensor,
            x_atom,
            x_tensor,
            partials,
            counters,
            e_bias,
            out_weights,
            out_ids,
            num_tokens,
            num_experts,
            num_k_blocks,
            top_k,
            routed_scaling_factor,
            out_weights_stride,
            out_ids_stride,
        ).launch(
            grid=(NUM_SPLITS, (num_experts + EXPERT_TILE - 1) // EXPERT_TILE, 1),
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
        partials: cute.Pointer,
        counters: cute.Pointer,
        e_bias: cute.Pointer,
        out_weights: cute.Pointer,
        out_ids: cute.Pointer,
        num_tokens: Int32,
        num_experts: Int32,
        num_k_blocks: Int32,
        top_k: Int32,
        routed_scaling_factor: Float32,
        out_weights_stride: Int32,
        out_ids_stride: Int32,
    ):
        # ---------------------------------------------------------------- prepare
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        split, tile, _ = cute.arch.block_idx()
        _, num_tiles, _ = cute.arch.grid_dim()
        storage = cutlass.utils.SmemAllocator().allocate(self.shared_storage())
        sums_full = storage.sums_full.data_ptr()

        first_block = split * num_k_blocks // NUM_SPLITS
        num_blocks = (split + 1) * num_k_blocks // NUM_SPLITS - first_block
        # tokens split, split + S, ... are this CTA's to sum and select
        num_owned = (num_tokens - split + NUM_SPLITS - 1) // NUM_SPLITS

        if warp == self.producer_warp:
            cpasync.prefetch_descriptor(w_atom)
            cpasync.prefetch_descriptor(x_atom)
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(self.w_stages):
                    cute.arch.mbarrier_init(storage.w_full.data_ptr() + stage, 1)
                    cute.arch.mbarrier_init(storage.w_empty.data_ptr() + stage, self.mma_arrivals)
                for stage in cutlass.range_constexpr(self.x_stages):
                    cute.arch.mbarrier_init(storage.x_full.data_ptr() + stage, 1)
                    cute.arch.mbarrier_init(storage.x_empty.data_ptr() + stage, self.mma_arrivals)
                cute.arch.mbarrier_init(sums_full, 1)
                cute.arch.mbarrier_init(storage.accumulator_full.data_ptr(), 1)
                cute.arch.mbarrier_init_fence()
                cute.arch.mbarrier_arrive_and_expect_tx(
                    sums_full, num_owned * (NUM_SPLITS * EXPERT_TILE * 4)
                )
        self.allocate_accumulator(storage, warp)
        # A peer may not send before this CTA's barrier exists.
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        cute.arch.griddepcontrol_launch_dependents()

        # ---------------------------------------------------------------- load and multiply
        if warp == self.producer_warp:
            self.load(storage, w_atom, mW, x_atom, mX, tile, first_block, num_blocks)
        self.issue_mma(storage, warp, num_blocks)

        # ---------------------------------------------------------------- reduce and select
        if warp < EPILOGUE_WARPS:
            self.send(storage, num_blocks, num_tokens)
            # Outputs and scratch may still be in use by the grid before.
            cute.arch.griddepcontrol_wait()
            if num_owned > 0:
                cute.arch.mbarrier_wait(sums_full, 0)
            for slot in cutlass.range(warp, num_owned, EPILOGUE_WARPS, unroll=1):
                token = slot * NUM_SPLITS + split
                is_last = self.publish(storage, partials, counters, slot, token, tile, num_tiles)
                if is_last:
                    scores, biases = self.gather(
                        partials, e_bias, token, num_tiles, num_experts
                    )
                    select_top_k(
                        scores,
                        biases,
                        num_experts,
                        top_k,
                        routed_scaling_factor,
                        out_weights + Int64(token) * out_weights_stride,
                        out_ids + Int64(token) * out_ids_stride,
                    )
        self.free_accumulator(storage, warp)

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
        """The producer warp: W_gate as far as the ring holds, then the grid dependency, then the rest."""
        w_layout, x_layout = self.w_smem_layout(), self.x_smem_layout()
        sW = storage.w.get_tensor(w_layout.outer, swizzle=w_layout.inner)
        sX = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
        # (64, 64, k_blocks) and (token_tile, 64, k_blocks)
        gW = cute.local_tile(mW, (EXPERT_TILE, K_BLOCK), (tile, None))
        gX = cute.local_tile(mX, (self.token_tile, K_BLOCK), (0, None))
        # ((box), stage), ((box), k_blocks)
        tWsW, tWgW = cpasync.tma_partition(
            w_atom, 0, cute.make_layout(1), cute.group_modes(sW, 0, 2), cute.group_modes(gW, 0, 2)
        )
        tXsX, tXgX = cpasync.tma_partition(
            x_atom, 0, cute.make_layout(1), cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2)
        )

        for block in cutlass.range(cutlass.min(num_blocks, self.w_stages), unroll=1):
            full = storage.w_full.data_ptr() + block
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, W_BLOCK_BYTES)
            cute.copy(
                w_atom, tWgW[(None, first_block + block)], tWsW[(None, block)], tma_bar_ptr=full
            )
        cute.arch.griddepcontrol_wait()
        for block in cutlass.range(num_blocks, unroll=1):
            stage = block % self.x_stages
            if block >= self.x_stages:
                # The empty barrier's phase p ends when the block p + 1 turns ago has been multiplied.
                cute.arch.mbarrier_wait(
                    storage.x_empty.data_ptr() + stage, (block // self.x_stages + 1) & 1
                )
            full = storage.x_full.data_ptr() + stage
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, self.x_block_bytes)
            cute.copy(
                x_atom, tXgX[(None, first_block + block)], tXsX[(None, stage)], tma_bar_ptr=full
            )
            if block >= self.w_stages:
                w_stage = block % self.w_stages
                cute.arch.mbarrier_wait(
                    storage.w_empty.data_ptr() + w_stage, (block // self.w_stages + 1) & 1
                )
                w_full = storage.w_full.data_ptr() + w_stage
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(w_full, W_BLOCK_BYTES)
                cute.copy(
                    w_atom,
                    tWgW[(None, first_block + block)],
                    tWsW[(None, w_stage)],
                    tma_bar_ptr=w_full,
                )

    @cute.jit
    def send(self, storage, num_blocks: Int32, num_tokens: Int32):
        """Send every partial sum to the CTA that owns its token: sums[slot][source][expert]."""
        source = cute.arch.block_idx_in_cluster()
        accumulators, coordinates = self.accumulators(storage, num_blocks)
        sums = cute.make_tensor(
            storage.sums.data_ptr(),
            cute.make_layout(
                (EXPERT_TILE, NUM_SPLITS, self.token_tile // NUM_SPLITS),
                stride=(1, EXPERT_TILE, EXPERT_TILE * NUM_SPLITS),
            ),
        )
        for i in cutlass.range_constexpr(cute.size(accumulators)):
            expert, token = coordinates[i]
            if token < num_tokens:
                cute.arch.store_async_dsmem(
                    cute.domain_offset((expert, source, token // NUM_SPLITS), sums).iterator,
                    Int32(bits_of(accumulators[i])),
                    storage.sums_full.data_ptr(),
                    token % NUM_SPLITS,
                )

    @cute.jit
    def publish(
        self,
        storage,
        partials: cute.Pointer,
        counters: cute.Pointer,
        slot: Int32,
        token: Int32,
        tile: Int32,
        num_tiles: Int32,
    ):
        """Sum a token's partials in rank order, publish this tile's 64 scores; is this the last tile?"""
        lane = cute.arch.lane_idx()
        sums = cute.make_tensor(
            storage.sums.data_ptr(),
            cute.make_layout(
                (2, 32, NUM_SPLITS, self.token_tile // NUM_SPLITS),
                stride=(1, 2, EXPERT_TILE, EXPERT_TILE * NUM_SPLITS),
            ),
        )
        total = cute.make_rmem_tensor((2,), Float32)
        part = cute.make_rmem_tensor((2, NUM_SPLITS), Float32)
        for source in cutlass.range_constexpr(NUM_SPLITS):
            cute.autovec_copy(sums[(None, lane, source, slot)], part[(None, source)])
        total.fill(0.0)
        for source in cutlass.range_constexpr(NUM_SPLITS):
            total[0] = total[0] + part[0, source]
            total[1] = total[1] + part[1, source]
        total[0] = router_score(total[0])
        total[1] = router_score(total[1])
        scores = score_scratch(partials)
        cute.autovec_copy(total, scores[(None, lane, tile, token)])

        # Release: the warp's stores, then its one arrival. Acquire: the arrival, then the warp's loads.
        cute.arch.sync_warp()
        arrived_before = Int32(0)
        if lane == 0:
            arrived_before = cute.arch.atomic_add(
                counters + token, Int32(1), sem="acq_rel", scope="gpu"
            )
        cute.arch.sync_warp()
        is_last = cute.arch.shuffle_sync(arrived_before, 0) == num_tiles - 1
        if is_last and lane == 0:
            counter = cute.make_tensor(counters + token, cute.make_layout(1))
            counter[0] = Int32(0)
        return is_last

    @cute.jit
    def gather(
        self,
        partials: cute.Pointer,
        e_bias: cute.Pointer,
        token: Int32,
        num_tiles: Int32,
        num_experts: Int32,
    ):
        """A lane's scores and biases of one token, (2 * MAX_TILES,) FP32 registers each."""
        lane = cute.arch.lane_idx()
        scratch = score_scratch(partials)
        bias = cute.make_tensor(e_bias, cute.make_layout(MAX_EXPERTS))
        scores = cute.make_rmem_tensor((2, MAX_TILES), Float32)
        biases = cute.make_rmem_tensor((2 * MAX_TILES,), Float32)
        scores.fill(0.0)
        biases.fill(0.0)
        for t in cutlass.range_constexpr(MAX_TILES):
            if t < num_tiles:
                cute.autovec_copy(scratch[(None, lane, t, token)], scores[(None, t)])
        for i in cutlass.range_constexpr(2 * MAX_TILES):
            expert = EXPERT_TILE * (i // 2) + 2 * lane + i % 2
            if expert < num_experts:
                biases[i] = bias[expert]
        return cute.make_tensor(scores.iterator, cute.make_layout(2 * MAX_TILES)), biases


def score_scratch(partials: cute.Pointer) -> cute.Tensor:
    """The global scratch as (2, lane, tile, token): the lane's pair of scores in each tile."""
    return cute.make_tensor(
        partials,
        cute.make_layout((2, 32, MAX_TILES, MAX_TOKENS), stride=(1, 2, EXPERT_TILE, MAX_EXPERTS)),
    )


def decode_kernel(*, arch: str, layout: str, token_tile: int) -> RouterDecode:
    """The decode kernel of an architecture: sm_90* or sm_100*, sm_103*."""
    from build_kernels.kernels.decode_sm90 import RouterDecodeSm90
    from build_kernels.kernels.decode_sm100 import RouterDecodeSm100

    kind = RouterDecodeSm90 if arch.startswith("sm_90") else RouterDecodeSm100
    return kind(layout=layout, token_tile=token_tile)


def launch_facts(*, arch: str, layout: str, token_tile: int) -> dict:
    """What a launch needs besides its arguments: block, cluster, dynamic shared bytes, expert tile."""
    kernel = decode_kernel(arch=arch, layout=layout, token_tile=token_tile)
    return {
        "block": [kernel.num_threads, 1, 1],
        "cluster": [NUM_SPLITS, 1, 1],
        "dynamic_shared_bytes": kernel.shared_bytes,
        "expert_tile": EXPERT_TILE,
    }


def compile_kernel(
    *, symbol: str, arch: str, layout: str, token_tile: int, dump_dir: str
) -> tuple[bytes, str]:
    """Compile one decode kernel for `arch`, with no GPU: (cubin, ptx). Its entry is `<symbol>_0`."""
    kernel = decode_kernel(arch=arch, layout=layout, token_tile=token_tile)
    type(kernel).kernel.set_name_prefix(
        symbol, remove_cutlass_symbol=True, keep_mangled_name=False
    )

    def pointer(dtype, align):
        return make_ptr(dtype, align, cute.AddressSpace.gmem, assumed_align=align)

    compiled = cute.compile(
        kernel,
        pointer(BFloat16, 16),
        pointer(BFloat16, 16),
        pointer(Float32, 16),
        pointer(Int32, 4),
        pointer(Float32, 4),
        pointer(Float32, 4),
        pointer(Int32, 4),
        *[Int32(1)] * 4,
        Float32(1.0),
        *[Int32(1)] * 2,
        options=f"--gpu-arch {arch} --keep-cubin --keep-ptx --dump-dir {dump_dir}",
    )
    ptx = compiled.__ptx__
    return compiled.__cubin__, ptx if isinstance(ptx, str) else ptx.decode()
