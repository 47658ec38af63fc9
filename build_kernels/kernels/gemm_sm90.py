"""The GEMM on Hopper: the epilogue warpgroups multiply with wgmma, into registers."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from build_kernels.kernels.gemm import WARPS_PER_TILE, TileGemm
from build_kernels.kernels.shapes import K_BLOCK, MMA_K, TILE_M


class TileGemmSm90(TileGemm):
    """Multiply with wgmma m64 n`token_tile` k16, both operands in shared memory. See TileGemm.

    The epilogue warps of an M tile are a warpgroup. Its timeline: for each chunk of the ring wait
    for both operands, issue four wgmmas per K block, commit. When all have retired, release the
    ring if it has another turn.

    Registers: token_tile / 2 accumulators per thread.
    """

    mma_warp = None

    def __init__(self, **config):
        super().__init__(**config)
        self.producer_warp = self.epilogue_warps
        self.mma_arrivals = self.epilogue_warps  # one lane of each multiplying warp

    @cute.jit
    def allocate_accumulator(self, storage, warp: Int32):
        """Do nothing: the accumulators are registers."""

    @cute.jit
    def issue_mma(self, storage, warp: Int32, split: Int32, num_k_blocks: Int32):
        """Do nothing: the epilogue warps multiply in `accumulators`."""

    @cute.jit
    def free_accumulator(self, storage, warp: Int32):
        """Do nothing: the accumulators are registers."""

    @cute.jit
    def accumulators(
        self, storage, first: Int32, num_blocks: Int32, index: cutlass.Constexpr[int] = 0
    ):
        """Multiply a slice of K; return FP32 registers and their (row, token).

        The slice is number `index` of the CTA and has num_blocks of its K blocks, from `first` on.
        """
        w_major = OperandMajorMode.K if self.layout == "kmajor" else OperandMajorMode.MN
        # https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
        tiled_mma = cute.make_tiled_mma(
            warpgroup.MmaF16BF16Op(
                BFloat16,
                Float32,
                (TILE_M, self.token_tile, MMA_K),
                warpgroup.OperandSource.SMEM,
                w_major,
                OperandMajorMode.K,
            )
        )
        w_layout, x_layout = self.w_smem_layout(), self.x_smem_layout(self.ring_blocks)
        # (TILE_M, K_BLOCK, m_tiles * ring_blocks), (token_tile, K_BLOCK, ring_blocks)
        sW = storage.w.get_tensor(w_layout.outer, swizzle=w_layout.inner)
        sX = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
        thread, _, _ = cute.arch.thread_idx()
        m_tile = 0
        if cutlass.const_expr(self.m_tiles > 1):
            m_tile = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // WARPS_PER_TILE
            thread = thread % (32 * WARPS_PER_TILE)
        thr_mma = tiled_mma.get_slice(thread)
        # (1, MMA_M, MMA_K, m_tiles * ring_blocks), (1, MMA_N, MMA_K, ring_blocks): one descriptor
        # per MMA
        tCrW = tiled_mma.make_fragment_A(thr_mma.partition_A(sW))
        tCrX = tiled_mma.make_fragment_B(thr_mma.partition_B(sX))
        # (MMA, MMA_M = 1, MMA_N = 1): the (row, token) of each accumulator, and the accumulators
        coordinates = thr_mma.partition_C(cute.make_identity_tensor((TILE_M, self.token_tile)))
        accumulators = cute.make_rmem_tensor(coordinates.shape, Float32)
        # Zeros also for a slice of K that is empty.
        accumulators.fill(0.0)

        tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        operands = (tiled_mma, accumulators, tCrW, tCrX, m_tile, num_blocks)
        if cutlass.const_expr(self.releases_chunks):
            self.multiply_by_chunks(storage, *operands, first)
        else:
            self.multiply_by_turns(storage, *operands)
        return accumulators, coordinates

    @cute.jit
    def multiply_by_turns(
        self,
        storage,
        tiled_mma: cute.TiledMma,
        accumulators: cute.Tensor,
        tCrW: cute.Tensor,
        tCrX: cute.Tensor,
        m_tile,
        num_blocks: Int32,
    ):
        """Multiply a slice of K, releasing the ring after each turn: it mostly holds the slice."""
        num_turns = (num_blocks + self.ring_blocks - 1) // self.ring_blocks
        for turn in cutlass.range(num_turns, unroll=1):
            blocks = num_blocks - turn * self.ring_blocks
            for stage in cutlass.range_constexpr(self.stages):
                if stage * self.chunk < blocks:
                    cute.arch.mbarrier_wait(storage.full.data_ptr() + stage, turn & 1)
                    warpgroup.fence()
                    for i in cutlass.range_constexpr(self.chunk):
                        if stage * self.chunk + i < blocks:
                            self.multiply_block(
                                tiled_mma, accumulators, tCrW, tCrX, stage, i, m_tile
                            )
                    warpgroup.commit_group()
            # One wait per turn: the ring usually holds the whole slice, so there is one turn.
            warpgroup.wait_group(0)
            if blocks > self.ring_blocks:
                with cute.arch.elect_one():
                    for stage in cutlass.range_constexpr(self.stages):
                        cute.arch.mbarrier_arrive(storage.empty.data_ptr() + stage)

    @cute.jit
    def multiply_by_chunks(
        self,
        storage,
        tiled_mma: cute.TiledMma,
        accumulators: cute.Tensor,
        tCrW: cute.Tensor,
        tCrX: cute.Tensor,
        m_tile,
        num_blocks: Int32,
        first,
    ):
        """Multiply a slice of K in chunks of one block, releasing the one before each time."""
        for block in cutlass.range(first, first + num_blocks, unroll=1):
            stage = block % self.stages
            cute.arch.mbarrier_wait(storage.full.data_ptr() + stage, (block // self.stages) & 1)
            warpgroup.fence()
            self.multiply_block(tiled_mma, accumulators, tCrW, tCrX, stage, 0, m_tile)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if block > first:
                self.release(storage, block - 1)
        warpgroup.wait_group(0)
        # The next slice may need its place. After a CTA's only slice no load waits for it.
        if cutlass.const_expr(self.slices > 1):
            if num_blocks > 0:
                self.release(storage, first + num_blocks - 1)

    @cute.jit
    def release(self, storage, block: Int32):
        """Let the producer overwrite a block's place in the ring."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(storage.empty.data_ptr() + block % self.stages)

    @cute.jit
    def multiply_block(
        self,
        tiled_mma: cute.TiledMma,
        accumulators: cute.Tensor,
        tCrW: cute.Tensor,
        tCrX: cute.Tensor,
        stage,
        block: cutlass.Constexpr[int],
        m_tile,
    ):
        """Issue the wgmmas of one K block of a stage, in K order."""
        for k in cutlass.range_constexpr(K_BLOCK // MMA_K):
            cute.gemm(
                tiled_mma,
                accumulators,
                tCrW[(None, None, k, self.w_block(stage, block, m_tile))],
                tCrX[(None, None, k, stage * self.chunk + block)],
                accumulators,
            )
