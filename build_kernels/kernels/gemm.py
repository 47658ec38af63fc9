"""The GEMM of every decode kernel: 64 rows of W_gate by a few tokens, over one slice of K.

A kernel holds a `TileGemm` of its architecture and says what the rows are. The sums of a slice are
taken in the order of K, whatever the rows are and however many tokens there are: two kernels that
split K alike get the same bits for the same row and token.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warpgroup

from build_kernels.kernels.shapes import K_BLOCK, MAX_DECODE_TOKENS, NUM_SPLITS, TILE_M

EPILOGUE_WARPS = 4
# Bounds of coordinates only: the real extents are in the tensor maps.
MAX_K = 1 << 20
W_BLOCK_BYTES = TILE_M * K_BLOCK * 2


def k_slice(split: Int32, num_k_blocks: Int32) -> tuple:
    """(first block, number of blocks) of a CTA's slice of K; no two CTAs' numbers differ by more
    than one."""
    first = split * num_k_blocks // NUM_SPLITS
    return first, (split + 1) * num_k_blocks // NUM_SPLITS - first


class TileGemm:
    """Shared memory, barriers and the loading of hidden_states; a subclass multiplies.

    Warp roles
        0-3             epilogue: take the accumulators; on sm_90 they are the warpgroup that
                        multiplies
        mma_warp        issues the MMAs where one thread does that (sm_100)
        producer_warp   loads hidden_states by TMA; warps from here on are the kernel's

    Pipelines (producer -> consumer: arrivals that fill / that empty)
        full, empty   loads -> MMA, a ring of `stages` chunks of `chunk` K blocks: the kernel's
                      arrivals and bytes / mma_arrivals
        sums_full     cluster's epilogue warps -> owner's: 1 + the bytes the kernel announces; once
        facts_full, names_full   the kernel's, if it uses them: the 32 lanes of a warp; once

    Shared memory: stages * chunk * (8 KB + 128 B token_tile) + sums_bytes + the kernel's own words
    (num_facts, num_names) + barriers.

    A subclass supplies the constants below and
        allocate_accumulator, free_accumulator   before the cluster sync, after the last read
        issue_mma                                the MMA warp's loop
        accumulators                             the epilogue warps' sums: FP32 registers and the
                                                 (row, token) of each, as an identity tensor
    """

    mma_warp = None
    producer_warp = 4
    mma_arrivals = 1

    def __init__(
        self,
        *,
        layout: str,
        token_tile: int,
        chunk: int,
        stages: int,
        sums_bytes: int,
        num_facts: int = 0,
        num_names: int = 0,
    ):
        self.layout = layout
        self.token_tile = token_tile
        self.chunk = chunk
        self.stages = stages
        self.sums_bytes = sums_bytes
        self.num_facts = num_facts
        self.num_names = num_names
        self.ring_blocks = chunk * stages
        self.x_chunk_bytes = self.chunk * token_tile * K_BLOCK * 2

    def w_smem_layout(self) -> cute.ComposedLayout:
        """(64 rows, 64 k, ring_blocks) BF16, 128-byte swizzle, contiguous as W_gate is."""
        kmajor = self.layout == "kmajor"
        kind = warpgroup.SmemLayoutAtomKind
        atom = warpgroup.make_smem_layout_atom(kind.K_SW128 if kmajor else kind.MN_SW128, BFloat16)
        shape = (TILE_M, K_BLOCK, self.ring_blocks)
        return cute.tile_to_shape(atom, shape, order=(0, 1, 2) if kmajor else (1, 0, 2))

    def x_smem_layout(self, *ring: int) -> cute.ComposedLayout:
        """(token_tile, 64 k, *ring) BF16, 128-byte swizzle, K contiguous.

        `ring` is (ring_blocks,) as the MMA reads it or (chunk, stages) as TMA writes it.
        """
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        shape = (self.token_tile, K_BLOCK, *ring)
        return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))

    def shared_storage(self):
        """The shared-memory struct; rings on 1024 bytes, where the 128-byte swizzle repeats."""

        @cute.struct
        class SharedStorage:
            w: cute.struct.Align[
                cute.struct.MemRange[BFloat16, self.ring_blocks * W_BLOCK_BYTES // 2], 1024
            ]
            x: cute.struct.Align[
                cute.struct.MemRange[BFloat16, self.stages * self.x_chunk_bytes // 2], 1024
            ]
            sums: cute.struct.Align[cute.struct.MemRange[Float32, self.sums_bytes // 4], 1024]
            names: cute.struct.MemRange[Int32, self.num_names]
            facts: cute.struct.MemRange[Int32, self.num_facts]
            full: cute.struct.MemRange[Int64, self.stages]
            empty: cute.struct.MemRange[Int64, self.stages]
            sums_full: cute.struct.MemRange[Int64, 1]
            accumulator_full: cute.struct.MemRange[Int64, 1]
            facts_full: cute.struct.MemRange[Int64, 1]
            names_full: cute.struct.MemRange[Int64, 1]
            tmem_address: cute.struct.MemRange[Int32, 1]

        return SharedStorage

    @property
    def shared_bytes(self) -> int:
        """Bytes up to the end of shared_storage's last member, in whole words of 8 (its own size is
        padded to 1024)."""
        rings = self.ring_blocks * W_BLOCK_BYTES + self.stages * self.x_chunk_bytes
        num_barriers = 2 * self.stages + 4
        words = self.num_names + self.num_facts + 1
        return rings + self.sums_bytes + 4 * words + 8 * num_barriers + 4

    def x_atom(self, hidden_states: cute.Pointer):
        """The TMA of a chunk of hidden_states: its atom, and the tensor of its coordinates."""
        layout = cute.make_layout(
            (MAX_DECODE_TOKENS, K_BLOCK, MAX_K // K_BLOCK), stride=(MAX_K, 1, K_BLOCK)
        )
        return cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            cute.make_tensor(hidden_states, layout),
            cute.select(self.x_smem_layout(self.chunk, self.stages), mode=[0, 1, 2]),
            (self.token_tile, K_BLOCK, self.chunk),
        )

    @cute.jit
    def prepare(
        self, storage, warp: Int32, full_arrivals: cutlass.Constexpr[int], sums_bytes: Int32
    ):
        """Make the barriers and the accumulator. The caller waits for the cluster before anything
        is sent: a peer's barrier has to exist.

        sums_bytes: what this CTA's `sums_full` waits for. The relaxed arrival publishes the
        barriers only (by their fence); sync_threads is for the TMEM address, and for those who
        load before the cluster is there.
        """
        if warp == self.producer_warp:
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(storage.full.data_ptr() + stage, full_arrivals)
                    cute.arch.mbarrier_init(storage.empty.data_ptr() + stage, self.mma_arrivals)
                cute.arch.mbarrier_init(storage.sums_full.data_ptr(), 1)
                cute.arch.mbarrier_init(storage.accumulator_full.data_ptr(), 1)
                cute.arch.mbarrier_init(storage.facts_full.data_ptr(), 32)
                cute.arch.mbarrier_init(storage.names_full.data_ptr(), 32)
                cute.arch.mbarrier_init_fence()
                cute.arch.mbarrier_arrive_and_expect_tx(storage.sums_full.data_ptr(), sums_bytes)
        self.allocate_accumulator(storage, warp)
        cute.arch.sync_threads()
        cute.arch.cluster_arrive_relaxed()

    @cute.jit
    def wait_until_empty(self, storage, chunk: Int32):
        """Wait for the ring's place for `chunk`, from the ring's second turn on.

        Phase p of `empty` ends when the chunk that used the stage p + 1 turns ago is multiplied.
        """
        if chunk >= self.stages:
            cute.arch.mbarrier_wait(
                storage.empty.data_ptr() + chunk % self.stages, (chunk // self.stages + 1) & 1
            )

    def partition_x(self, storage, x_atom: cute.CopyAtom, mX: cute.Tensor, tokens, first_block):
        """The TMA's two sides for a CTA's slice: ((box), stage) and ((box), chunk).

        tokens: which tile of token_tile tokens.
        """
        layout = self.x_smem_layout(self.chunk, self.stages)
        sX = storage.x.get_tensor(layout.outer, swizzle=layout.inner)
        # (token_tile, 64, k_block), then (token_tile, 64, chunk, chunks)
        gX = cute.domain_offset((0, 0, first_block), mX)
        gX = cute.local_tile(gX, (self.token_tile, K_BLOCK, self.chunk), (tokens, 0, None))
        return cpasync.tma_partition(
            x_atom, 0, cute.make_layout(1), cute.group_modes(sX, 0, 3), cute.group_modes(gX, 0, 3)
        )
