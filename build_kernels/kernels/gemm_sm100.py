"""The GEMM on Blackwell: one warp issues tcgen05.mma, accumulators in tensor memory (TMEM)."""

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as sm100_utils
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05

from build_kernels.kernels.gemm import WARPS_PER_TILE, TileGemm
from build_kernels.kernels.shapes import K_BLOCK, MMA_K, TILE_M

# tcgen05.alloc takes a power of two from 32 on:
# https://docs.nvidia.com/cuda/parallel-thread-execution/#tcgen05-memory-alloc-manage-instructions
MIN_TMEM_COLUMNS, TMEM_COLUMNS = 32, 512


class TileGemmSm100(TileGemm):
    """Multiply with tcgen05.mma kind::f16, M = 64 and N = token_tile, one CTA. See TileGemm.

    Both operands are in shared memory.

    Warp roles
        epilogue_warps  tcgen05.ld 16x256b, warp w of an M tile rows 16 w .. 16 w + 15;
                        warp 0 allocates and frees the TMEM
        mma_warp        after the epilogue's: four tcgen05.mma per K block and M tile; after each
                        chunk a commit to the stage's `empty`, after each slice a commit to
                        `accumulator_full`
        producer_warp   after mma_warp

    TMEM: token_tile * m_tiles columns for each slice of K, or a ring of accumulators if that is
    more than 512; 32 at least, a power of two; from before the cluster sync to after the last
    tcgen05.ld.
    """

    mma_arrivals = 1  # one tcgen05.commit

    def __init__(self, **config):
        super().__init__(**config)
        self.mma_warp = self.epilogue_warps
        self.producer_warp = self.mma_warp + 1
        # All of a CTA's slices, or as many as TMEM holds.
        columns = self.token_tile * self.m_tiles
        self.accumulator_stages = min(self.slices, TMEM_COLUMNS // columns)

    def make_tiled_mma(self) -> cute.TiledMma:
        """Return the MMA. Made inside the kernel: as a parameter it would be 32 opaque bytes."""
        w_major = OperandMajorMode.K if self.layout == "kmajor" else OperandMajorMode.MN
        # https://docs.nvidia.com/cuda/parallel-thread-execution/#tcgen05-mma-instructions-mma
        return cute.make_tiled_mma(
            tcgen05.MmaF16BF16Op(
                BFloat16,
                Float32,
                (TILE_M, self.token_tile, MMA_K),
                tcgen05.CtaGroup.ONE,
                tcgen05.OperandSource.SMEM,
                w_major,
                OperandMajorMode.K,
            )
        )

    def accumulator(self, storage, tiled_mma: cute.TiledMma, m_tile, stage: int = 0) -> cute.Tensor:
        """Return an M tile's accumulator in TMEM: row 16 w + r in lane 32 w + r, a token a column.

        The M tiles are beside each other, and so are the stages.
        """
        pointer = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tmem_address.data_ptr())
        if cutlass.const_expr(self.m_tiles > 1):
            first = (stage * self.m_tiles + Int32(m_tile)) * self.token_tile
            pointer = pointer + cute.assume(first, divby=self.token_tile)
        shape = tiled_mma.partition_shape_C((TILE_M, self.token_tile))
        # (MMA, MMA_M = 1, MMA_N = 1)
        return cute.make_tensor(pointer, tiled_mma.make_fragment_C(shape).layout)

    @property
    def tmem_columns(self) -> int:
        """Return the number of TMEM columns to allocate, a power of two."""
        columns = self.token_tile * self.m_tiles * self.accumulator_stages
        return max(MIN_TMEM_COLUMNS, 1 << (columns - 1).bit_length())

    @cute.jit
    def allocate_accumulator(self, storage, warp: Int32):
        """Allocate TMEM by warp 0; the sync_threads that follows publishes the address."""
        if warp == 0:
            cute.arch.alloc_tmem(self.tmem_columns, storage.tmem_address.data_ptr())
            cute.arch.relinquish_tmem_alloc_permit()

    @cute.jit
    def free_accumulator(self, storage, warp: Int32):
        """Free TMEM by warp 0, after all epilogue warps have read."""
        if warp < self.epilogue_warps:
            cute.arch.barrier(barrier_id=1, number_of_threads=32 * self.epilogue_warps)
        if warp == 0:
            pointer = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tmem_address.data_ptr())
            cute.arch.dealloc_tmem(pointer, self.tmem_columns)

    @cute.jit
    def issue_mma(self, storage, warp: Int32, split: Int32, num_k_blocks: Int32):
        """Multiply the K blocks of each slice in order into an accumulator, by the MMA warp."""
        if warp == self.mma_warp:
            tiled_mma = self.make_tiled_mma()
            mma_tiler = (TILE_M, self.token_tile, K_BLOCK)
            w_layout = sm100_utils.make_smem_layout_a(
                tiled_mma, mma_tiler, BFloat16, self.m_tiles * self.ring_blocks
            )
            x_layout = sm100_utils.make_smem_layout_b(
                tiled_mma, mma_tiler, BFloat16, self.ring_blocks
            )
            # (MMA, MMA_M, MMA_K, m_tiles * ring_blocks), (MMA, MMA_N, MMA_K, ring_blocks)
            sW = storage.w.get_tensor(w_layout.outer, swizzle=w_layout.inner)
            sX = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
            # (1, MMA_M, MMA_K, m_tiles * ring_blocks), (1, MMA_N, MMA_K, ring_blocks): one
            # descriptor per MMA
            tCrW = tiled_mma.make_fragment_A(sW)
            tCrX = tiled_mma.make_fragment_B(sX)
            for index in cutlass.range_constexpr(self.slices):
                stage, turn = index % self.accumulator_stages, index // self.accumulator_stages
                if cutlass.const_expr(turn > 0):
                    cute.arch.mbarrier_wait(
                        storage.accumulator_empty.data_ptr() + stage, (turn - 1) & 1
                    )
                    cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
                # (MMA, MMA_M = 1, MMA_N = 1) of each M tile
                tCtAcc = [
                    self.accumulator(storage, tiled_mma, tile, stage)
                    for tile in range(self.m_tiles)
                ]
                slice_ = self.slice_of(split, index, num_k_blocks)
                self.multiply_slice(storage, tiled_mma, tCtAcc, tCrW, tCrX, *slice_)
                with cute.arch.elect_one():
                    tcgen05.commit(storage.accumulator_full.data_ptr() + stage)

    @cute.jit
    def multiply_slice(
        self,
        storage,
        tiled_mma: cute.TiledMma,
        tCtAcc: list,
        tCrW: cute.Tensor,
        tCrX: cute.Tensor,
        first: Int32,
        num_blocks: Int32,
    ):
        """Multiply num_blocks of the CTA's K blocks, from `first` on, which starts a chunk."""
        end = first + num_blocks
        first_chunk = first // self.chunk
        num_chunks = (num_blocks + self.chunk - 1) // self.chunk
        for chunk in cutlass.range(first_chunk, first_chunk + num_chunks, unroll=1):
            stage = chunk % self.stages
            cute.arch.mbarrier_wait(storage.full.data_ptr() + stage, (chunk // self.stages) & 1)
            for block in cutlass.range_constexpr(self.chunk):
                if chunk * self.chunk + block < end:
                    for k in cutlass.range_constexpr(K_BLOCK // MMA_K):
                        # The first MMA of a slice overwrites: TMEM is not cleared.
                        tiled_mma.set(
                            tcgen05.Field.ACCUMULATE,
                            chunk > first_chunk if block + k == 0 else True,
                        )
                        for tile in cutlass.range_constexpr(self.m_tiles):
                            cute.gemm(
                                tiled_mma,
                                tCtAcc[tile],
                                tCrW[(None, None, k, self.w_block(stage, block, tile))],
                                tCrX[(None, None, k, stage * self.chunk + block)],
                                tCtAcc[tile],
                            )
            with cute.arch.elect_one():
                tcgen05.commit(storage.empty.data_ptr() + stage)

    @cute.jit
    def accumulators(
        self, storage, first: Int32, num_blocks: Int32, index: cutlass.Constexpr[int] = 0
    ):
        """Read the sums of the CTA's slice `index`; return FP32 registers and their (row, token).

        The slice has num_blocks of the CTA's K blocks, from `first` on.
        """
        stage, turn = index % self.accumulator_stages, index // self.accumulator_stages
        tiled_mma = self.make_tiled_mma()
        thread, _, _ = cute.arch.thread_idx()
        m_tile = 0
        if cutlass.const_expr(self.m_tiles > 1):
            m_tile = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // WARPS_PER_TILE
            thread = thread % (32 * WARPS_PER_TILE)
        tCtAcc = self.accumulator(storage, tiled_mma, m_tile, stage)
        # https://docs.nvidia.com/cuda/parallel-thread-execution/#tcgen05-matrix-fragments-shape-16256b
        tiled_copy = tcgen05.make_tmem_copy(
            cute.make_copy_atom(
                tcgen05.Ld16x256bOp(tcgen05.Repetition(self.token_tile // 8)), Float32
            ),
            tCtAcc[((None, None), 0, 0)],
        )
        thr_copy = tiled_copy.get_slice(thread)
        # (copy atom, MMA_M = 1, MMA_N = 1): this thread's part of TMEM, and each one's (row, token)
        tTR_tAcc = thr_copy.partition_S(tCtAcc[((None, None), 0, 0)])
        coordinates = thr_copy.partition_D(cute.make_identity_tensor((TILE_M, self.token_tile)))
        accumulators = cute.make_rmem_tensor(coordinates.shape, Float32)
        # Zeros for a slice of K that is empty: no MMA has written its TMEM.
        accumulators.fill(0.0)
        cute.arch.mbarrier_wait(storage.accumulator_full.data_ptr() + stage, turn & 1)
        # The commit's arrival alone does not order tcgen05.ld after the MMAs.
        cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
        if num_blocks > 0:
            cute.copy(tiled_copy, tTR_tAcc, accumulators)
            cute.arch.fence_view_async_tmem_load()
        if cutlass.const_expr(index + self.accumulator_stages < self.slices):
            cute.arch.inline_ptx("tcgen05.fence::before_thread_sync;")
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(storage.accumulator_empty.data_ptr() + stage)
        return accumulators, coordinates
