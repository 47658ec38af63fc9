"""The GEMM: tiles of 64 rows of W_gate by one tile of tokens, over one slice of K.

A kernel holds the `TileGemm` of its architecture and decides the meaning of a row: an expert, or a
slot of a token. The sum over a slice is taken in K order for every row and every number of tokens,
so two kernels that split K alike compute the same bits for the same row and token.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warpgroup

from build_kernels.kernels.shapes import K_BLOCK, MAX_EXPERTS, NUM_SLICES, TILE_M

# The accumulators of an M = 64 tile: one wgmma warpgroup, or the four warps that can read TMEM.
WARPS_PER_TILE = 4
# Bounds for coordinates only: the real extents are in the tensor maps.
MAX_K = MAX_TOKENS = 1 << 20
W_BLOCK_BYTES = TILE_M * K_BLOCK * 2
# The 128-byte swizzle repeats every 8 rows of 128 bytes.
# https://docs.nvidia.com/cuda/parallel-thread-execution/#tensor-swizzling-modes
SWIZZLE_REPEAT_BYTES = 1024


def k_slices(first: Int32, count: int, num_k_blocks: Int32) -> tuple:
    """Return (first block, number of blocks) of `count` slices of K from slice `first` on.

    The lengths of slices differ by at most 1.
    """
    first_block = first * num_k_blocks // NUM_SLICES
    return first_block, (first + count) * num_k_blocks // NUM_SLICES - first_block


def shared_bytes(storage: type) -> int:
    """Return the bytes of a kernel's shared memory up to its last member, in words of 8.

    The struct's own size is padded to its alignment of 1024. Members leave no gaps.
    """
    members = storage.__annotations__.values()
    size = sum(getattr(member, "dtype", member).size_in_bytes for member in members)
    return (size + 7) // 8 * 8


class TileGemm:
    """Load hidden_states and keep the ring's barriers; a subclass multiplies.

    A CTA has `m_tiles` tiles of TILE_M rows, and four epilogue warps for each.

    Warp roles
        epilogue_warps  from 0 on: take the accumulators; on sm_90 these warps also multiply
        mma_warp        issues the MMAs on sm_100, where one thread does that
        producer_warp   loads hidden_states by TMA; the warps after it belong to the kernel

    Pipelines (producer -> consumer: arrivals to fill / to empty)
        full, empty        loads -> MMA, a ring of `stages` chunks of `chunk` K blocks:
                           the kernel's arrivals and bytes / mma_arrivals
        sums_full          epilogue warps of the cluster -> owner's epilogue: 1 + the bytes that the
                           kernel announces / used once
        accumulator_full,  MMA -> epilogue on sm_100, an accumulator per slice or a ring of them:
        accumulator_empty  1 commit / 1 per epilogue warp

    Shared memory: the kernel defines it. These members are required:
        w                  w_ring: stages * chunk * m_tiles * 8 KB
        x                  x_ring: stages * chunk * 128 B per token of the tile
        full, empty        ring_barriers
        sums_full          barrier
        accumulator_full   accumulator_barriers
        accumulator_empty  accumulator_barriers, if a CTA has more slices than accumulators
        tmem_address       tmem_address, used on sm_100

    A subclass supplies the constants below and
        allocate_accumulator, free_accumulator   before the cluster sync, after the last read
        issue_mma                                the MMA warp's loop
        accumulators                             FP32 registers, and the (row, token) of each one
    """

    mma_warp: int | None
    producer_warp: int
    mma_arrivals: int

    barrier = cute.struct.MemRange[Int64, 1]
    tmem_address = cute.struct.MemRange[Int32, 1]

    def __init__(
        self,
        *,
        layout: str,
        token_tile: int,
        chunk: int,
        stages: int,
        m_tiles: int = 1,
        splits: int = NUM_SLICES,
    ):
        self.layout = layout
        self.token_tile = token_tile
        self.chunk = chunk
        self.stages = stages
        self.m_tiles = m_tiles
        # CTAs of a cluster, and slices of K of each.
        self.splits = splits
        self.slices = NUM_SLICES // splits
        # Accumulators that the MMA may fill before the epilogue takes one.
        self.accumulator_stages = 1
        # A ring that does not hold a CTA's slice of K is released as it is multiplied.
        self.releases_chunks = m_tiles > 1 and chunk == 1
        self.epilogue_warps = WARPS_PER_TILE * m_tiles
        self.ring_blocks = chunk * stages
        self.w_block_bytes = m_tiles * W_BLOCK_BYTES
        # TMA boxes per K block of W_gate. L2 gave 5.5 TB/s in copies of 8 KB and 8.9 in those of 16
        # on one H200; a box of an E-contiguous W_gate is 64 experts wide, by its swizzle.
        self.w_boxes = 1 if layout == "kmajor" else m_tiles
        self.w_box_rows = TILE_M * m_tiles // self.w_boxes
        self.x_chunk_bytes = chunk * token_tile * K_BLOCK * 2
        self.w_ring = _ring(self.ring_blocks * self.w_block_bytes)
        self.x_ring = _ring(stages * self.x_chunk_bytes)
        self.ring_barriers = cute.struct.MemRange[Int64, stages]

    @property
    def refills_accumulators(self) -> bool:
        """Whether an accumulator takes more than one slice of K, which is so on sm_100 only."""
        return self.mma_warp is not None and self.slices > self.accumulator_stages

    @property
    def accumulator_barriers(self) -> type:
        """Return the type of `accumulator_full` and of `accumulator_empty`."""
        return cute.struct.MemRange[Int64, self.accumulator_stages]

    def slice_of(self, split: Int32, index: int, num_k_blocks: Int32) -> tuple:
        """Return (first, number) of the K blocks of slice `index` of a CTA, in its own blocks."""
        cta_first, _ = k_slices(self.slices * split, self.slices, num_k_blocks)
        first, num_blocks = k_slices(self.slices * split + index, 1, num_k_blocks)
        return first - cta_first, num_blocks

    def w_smem_layout(self, rows: int = TILE_M) -> cute.ComposedLayout:
        """Return (rows, K_BLOCK, m_tiles * ring_blocks * TILE_M / rows) BF16, a layout of `w`.

        It is major as W_gate is. The M tiles of a K block are neighbours. `rows` are TILE_M as the
        MMA reads it, or w_box_rows as TMA writes it.
        """
        kmajor = self.layout == "kmajor"
        kind = warpgroup.SmemLayoutAtomKind
        atom = warpgroup.make_smem_layout_atom(kind.K_SW128 if kmajor else kind.MN_SW128, BFloat16)
        shape = (rows, K_BLOCK, self.m_tiles * self.ring_blocks * TILE_M // rows)
        return cute.tile_to_shape(atom, shape, order=(0, 1, 2) if kmajor else (1, 0, 2))

    def w_block(self, stage, block: int, m_tile):
        """Return the place in `w` of an M tile of a stage's K block."""
        return self.m_tiles * (stage * self.chunk + block) + m_tile

    def x_smem_layout(self, *ring: int) -> cute.ComposedLayout:
        """Return (token_tile, K_BLOCK, *ring) BF16, a layout of `x`: K contiguous.

        `ring` is (ring_blocks,) as the MMA reads it, or (chunk, stages) as TMA writes it.
        """
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        shape = (self.token_tile, K_BLOCK, *ring)
        return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))

    def w_tma(self, w_gate: cute.Pointer) -> tuple:
        """Make (atom, coordinate tensor) of the TMA that loads w_box_rows of one K block."""
        # [experts, K] with the contiguous mode of W_gate; the strides only bound coordinates
        if self.layout == "kmajor":
            layout = cute.make_layout((MAX_EXPERTS, MAX_K), stride=(MAX_K, 1))
        else:
            layout = cute.make_layout((MAX_EXPERTS, MAX_K), stride=(1, MAX_EXPERTS))
        return cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            cute.make_tensor(w_gate, layout),
            cute.select(self.w_smem_layout(self.w_box_rows), mode=[0, 1]),
            (self.w_box_rows, K_BLOCK),
        )

    def x_tma(self, hidden_states: cute.Pointer) -> tuple:
        """Make (atom, coordinate tensor) of the TMA that loads one chunk of hidden_states."""
        # [tokens, K_BLOCK, K blocks]: K as blocks, so that one box holds a chunk of them.
        layout = cute.make_layout(
            (MAX_TOKENS, K_BLOCK, MAX_K // K_BLOCK), stride=(MAX_K, 1, K_BLOCK)
        )
        return cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            cute.make_tensor(hidden_states, layout),
            cute.select(self.x_smem_layout(self.chunk, self.stages), mode=[0, 1, 2]),
            (self.token_tile, K_BLOCK, self.chunk),
        )

    @cute.jit
    def prepare(
        self,
        storage,
        warp: Int32,
        full_arrivals: cutlass.Constexpr[int],
        sums_bytes: Int32,
        barriers: cutlass.Constexpr[tuple[str, ...]],
    ):
        """Initialise the barriers and the accumulator.

        sums_bytes: the bytes that this CTA's `sums_full` waits for. barriers: names of the kernel's
        own, of 32 arrivals each. The caller waits for the cluster before it sends: a peer's barrier
        has to exist. The relaxed arrival publishes the barriers, by their fence, and nothing else.
        sync_threads publishes the TMEM address, and the barriers to warps that load before the
        cluster has met.
        """
        if warp == self.producer_warp:
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(storage.full.data_ptr() + stage, full_arrivals)
                    cute.arch.mbarrier_init(storage.empty.data_ptr() + stage, self.mma_arrivals)
                cute.arch.mbarrier_init(storage.sums_full.data_ptr(), 1)
                for stage in cutlass.range_constexpr(self.accumulator_stages):
                    cute.arch.mbarrier_init(storage.accumulator_full.data_ptr() + stage, 1)
                    if cutlass.const_expr(self.refills_accumulators):
                        cute.arch.mbarrier_init(
                            storage.accumulator_empty.data_ptr() + stage, self.epilogue_warps
                        )
                for barrier in barriers:
                    cute.arch.mbarrier_init(getattr(storage, barrier).data_ptr(), 32)
                cute.arch.mbarrier_init_fence()
        self.allocate_accumulator(storage, warp)
        cute.arch.sync_threads()
        # After the barrier that publishes the initialisation, before any peer may send.
        if warp == self.producer_warp:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(storage.sums_full.data_ptr(), sums_bytes)
        cute.arch.cluster_arrive_relaxed()

    @cute.jit
    def wait_until_empty(self, storage, chunk: Int32):
        """Wait for the stage of `chunk`, from the ring's second turn on.

        Phase p of `empty` ends when the chunk that used the stage p + 1 turns ago is multiplied.
        """
        if chunk >= self.stages:
            cute.arch.mbarrier_wait(
                storage.empty.data_ptr() + chunk % self.stages, (chunk // self.stages + 1) & 1
            )

    def partition_x(self, storage, tma_atom_x: cute.CopyAtom, mX: cute.Tensor, tile, first_block):
        """Partition a token tile of hidden_states, over one slice of K, and the ring for TMA."""
        layout = self.x_smem_layout(self.chunk, self.stages)
        # (token_tile, K_BLOCK, chunk, stages)
        sX = storage.x.get_tensor(layout.outer, swizzle=layout.inner)
        # (tokens, K_BLOCK, K blocks from the slice's first on)
        gX = cute.domain_offset((0, 0, first_block), mX)
        # (token_tile, K_BLOCK, chunk, num_chunks)
        gX = cute.local_tile(gX, (self.token_tile, K_BLOCK, self.chunk), (tile, 0, None))
        # ((TMA box), stages), ((TMA box), num_chunks)
        return cpasync.tma_partition(
            tma_atom_x,
            0,
            cute.make_layout(1),
            cute.group_modes(sX, 0, 3),
            cute.group_modes(gX, 0, 3),
        )


def _ring(size: int) -> type:
    """Return the type of a ring of BF16 operands, aligned to the swizzle's repeat."""
    return cute.struct.Align[cute.struct.MemRange[BFloat16, size // 2], SWIZZLE_REPEAT_BYTES]
