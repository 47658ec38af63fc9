"""List the kernels to build, their problem ranges and launches, and the architectures. Pure data.

Importing this module imports no compiler. Offsets and sizes of parameters, registers and shared
memory are read out of the cubins instead. The parameters are dsv4_router_runtime/parameters.py's,
the sizes that the kernels share kernels/shapes.py's.

A new architecture of a known generation is one line in `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsv4_router_runtime.artifacts.kernel import IntRange, ProblemRange, Scratch, TensorMapRecipe
from dsv4_router_runtime.parameters import ABI, WORKSPACE, tensor_dtypes

from .kernels.shapes import (
    EXPERT_TILE,
    HASH_TOKEN_TILE,
    K_BLOCK,
    MAX_DECODE_TOKENS,
    MAX_EXPERTS,
    MAX_PREFILL_TOKENS,
    MAX_TOP_K,
    MERGE_WAIT_LIMIT_MS,
    NUM_SLICES,
    TOPK_DEFINES,
    TOPK_WARPS,
    workspace_bytes,
)

# router_decode: token tile -> (K blocks per chunk, stages of the shared-memory ring). A ring of 8
# blocks holds a CTA's slice of K up to 8192. us on one H200, 7168x384, PDL, weights cold:
#     N    token tile   chunks of 1 / 2 / 4
#     1    8: 3.30, 16: 3.37
#     16   32: 3.96, 16: 3.71 (six more artifacts)
#     32                4.40 / 4.18 / 4.32
#     64                5.05 / 5.26 / 5.43
DECODE_TILES = {8: (4, 2), 32: (2, 4), 64: (1, 8)}
# router_prefill: (experts, tokens, CTAs of a cluster) -> (K blocks per chunk, stages of the ring),
# and the clusters of a launch, all that an H200 holds at once: a launch of more takes up to twice
# as long. us on one H200, PDL, weights cold:
#                        7168x384                                   4096x256
#     N                  128   192   256   320   512   640   1024   128   256   384   512   960
#     128 x 64, 16       7.4                                        5.2
#     128 x 128, 16      8.8   9.3   9.6                                  7.4   8.1
#     128 x 64, 8        7.9   8.8   9.6   10.4                     6.5   6.9   7.9
#     128 x 64, 4        11.3  11.3  10.9  10.9  13.5  14.6         9.0   8.9   9.1   9.3   10.8
#     128 x 128, 8                   13.0        13.8  14.4               11.2  11.3  11.4
#     128 x 128, 4       20    20    20    20    20    18.0  19.3   15    15    15    15    15.9
#     (product)          9.7   11.4  10.5  13.6  14.2  13.7  18.7   9.7   9.9   10.9  10.6  13.4
# Of 128 x 128 by clusters of 8 at N = 512, products and loads take 8.3 us, the exchange of the sums
# 3, the scores 1.6, the merges 1: an SM gets 17 B a cycle from the shared memory of others.
PREFILL_TILES = {
    (128, 64, 16): ((2, 4), 7),
    (128, 64, 8): ((1, 7), 15),
    (128, 64, 4): ((1, 8), 30),
    (128, 128, 4): ((1, 5), 30),
}
# Above the tokens of the others the product is faster.
SAME_BITS_ONLY = ((128, 128, 4),)
# router_hash: all of K up to 8192 is one chunk. An H200 holds 7 of its clusters, so 56 tokens. us
# on one H200 at N = 64:
#                         7168x384, PDL   4096x256, PDL   7168x384   4096x256
#     router_hash         5.09            4.42            7.91       6.87
#     the whole gate      5.17            3.88            7.02       5.77
HASH_CHUNK = 8
MAX_HASH_TOKENS = 56


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture, and the GPUs that can load its cubins; the evidence lists where they ran.

    driver: the oldest CUDA driver that loads and launches them, as cuDriverGetVersion counts.
    """

    name: str
    loads_on: str
    driver: int


# A cubin needs a driver that knows its GPU, whatever toolkit of the same major version made it
# (CUDA Compatibility, "Minor Version Compatibility"; toolkit 13's cubins need driver 13.0). PTX is
# not loaded, so its ISA version sets no floor. The GPUs came with CUDA 11.8 (9.0), 12.8 (10.0) and
# 12.9 (10.3): release notes of nvcc and ptxas. The runtime's newest driver function is
# cuKernelGetParamInfo, of CUDA 12.4 (driver API reference, "Library Management").
ARCHITECTURES = (
    Architecture(name="sm_90a", loads_on="H100, H200, H20, GH200", driver=12040),
    Architecture(name="sm_100a", loads_on="B200, GB200", driver=12080),
    Architecture(name="sm_103a", loads_on="B300, GB300", driver=12090),
)
# Targets of a whole family, of CUDA 12.9. A set has them if they are asked for (`build --arch`).
# They load on later GPUs of the family too; their code was seen to be that of the `a` targets.
FAMILIES = (
    Architecture(name="sm_100f", loads_on="B200, B300, later 10.x", driver=12090),
    Architecture(name="sm_103f", loads_on="B300, later 10.x", driver=12090),
)
TARGETS = {arch.name: arch for arch in (*ARCHITECTURES, *FAMILIES)}


@dataclass(frozen=True, kw_only=True)
class CudaSource:
    """A CUDA C++ file beside this module, for NVRTC, with its block and its macros."""

    file: str
    block: tuple[int, int, int]
    defines: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class DslSource:
    """A CuTeDSL module with `compile_kernel` and `launch_properties`, and their arguments."""

    module: str
    layout: str
    token_tile: int
    chunk: int
    stages: int
    m_tiles: int = 1
    splits: int = NUM_SLICES


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """One parameter of a kernel, with the fields of the manifest's `Parameter`."""

    name: str
    kind: str
    element_type: str | None = None
    scratch: Scratch | None = None
    tensor_map: TensorMapRecipe | None = None


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel, built once per architecture. `grid` is as in the manifest's `Launch`."""

    name: str
    role: str
    archs: tuple[str, ...]
    symbol: str
    source: CudaSource | DslSource
    problem: ProblemRange
    parameters: tuple[ParameterSpec, ...]
    cluster: tuple[int, int, int]
    grid: tuple[int | str, int | str, int | str]
    k_splits: int
    expert_tile: int
    token_tile: int
    pdl: bool
    wait_limit_ms: int
    max_clusters: int | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """Every architecture that it can be built for; a set has those of `archs` by default."""
        return (*self.archs, *(family.name for family in FAMILIES))


def _parameters(
    role: str, maps: Mapping[str, TensorMapRecipe] | None = None, scratch_bytes: int = 0
) -> tuple[ParameterSpec, ...]:
    """Return a role's parameters in ABI order, with the recipes of its tensor maps, by name."""
    scratch = Scratch(elements=scratch_bytes // 4, zeroed=True) if scratch_bytes else None
    return tuple(
        ParameterSpec(
            name=item.name,
            kind=item.kind,
            element_type=item.element_type,
            scratch=scratch if item is WORKSPACE else None,
            tensor_map=(maps or {})[item.name] if item.kind == "tensor_map" else None,
        )
        for item in ABI[role]
    )


def _bfloat16_map(
    tensor: str, dims: tuple[str, ...], box: tuple[int, ...], l2_promotion: str
) -> TensorMapRecipe:
    return TensorMapRecipe(
        tensor=tensor,
        element_type="bfloat16",
        dims=dims,
        box=box,
        swizzle="128B",
        interleave="none",
        l2_promotion=l2_promotion,
        oob_fill="zeros",
    )


_ALL_ARCHS = tuple(arch.name for arch in ARCHITECTURES)


def _x_map(token_tile: int, chunk: int) -> TensorMapRecipe:
    dims = ("K_in_block", "N", "K_block")
    return _bfloat16_map("hidden_states", dims, (K_BLOCK, token_tile, chunk), "128B")


def _gate(
    role: str,
    layout: str,
    *,
    suffix: str,
    tile: tuple[int, int],
    ring: tuple[int, int],
    splits: int = NUM_SLICES,
    most: int | None = None,
    same_bits_only: bool | None = None,
) -> KernelSpec:
    """Return a kernel that computes the whole gate in tiles of experts by tokens.

    ring: K blocks per chunk, stages. splits: CTAs that share K. most: the clusters of a launch, of
    which each has a tile; without it a launch has one tile of tokens.
    """
    name, (chunk, stages), (experts, tokens) = f"router_{role}_{layout}_{suffix}", ring, tile
    most_tokens = tokens if most is None else min(most * tokens, MAX_PREFILL_TOKENS)
    w_dims = ("K", "E") if layout == "kmajor" else ("E", "K")
    # By its swizzle a box is 128 bytes wide: 64 experts if they are contiguous.
    w_box = (K_BLOCK, experts) if layout == "kmajor" else (EXPERT_TILE, K_BLOCK)
    return KernelSpec(
        name=name,
        role=role,
        archs=_ALL_ARCHS,
        symbol=f"{name}_0",  # the DSL appends a counter
        source=DslSource(
            module="build_kernels.kernels.compile",
            layout=layout,
            token_tile=tokens,
            chunk=chunk,
            stages=stages,
            m_tiles=experts // EXPERT_TILE,
            splits=splits,
        ),
        problem=ProblemRange(
            layout=layout,
            num_tokens=IntRange(low=1, high=most_tokens),
            num_experts=IntRange(low=1, high=MAX_EXPERTS),
            top_k=IntRange(low=1, high=MAX_TOP_K),
            k_multiple=K_BLOCK,
            dtypes=tensor_dtypes(role),
            same_bits_only=same_bits_only,
        ),
        parameters=_parameters(
            role,
            {
                # W_gate is read once, in long runs; hidden_states is small and stays in L2 anyway.
                "w_map": _bfloat16_map("W_gate", w_dims, w_box, "256B"),
                "x_map": _x_map(tokens, chunk),
            },
            workspace_bytes(_MOST_TOKENS[role]),
        ),
        cluster=(splits, 1, 1),
        grid=("k_splits", "expert_tiles", 1 if most is None else "token_tiles"),
        k_splits=splits,
        expert_tile=experts,
        token_tile=tokens,
        pdl=True,
        wait_limit_ms=MERGE_WAIT_LIMIT_MS,
        max_clusters=most,
    )


_MOST_TOKENS = {"decode": MAX_DECODE_TOKENS, "prefill": MAX_PREFILL_TOKENS}


def _decode(layout: str, tokens: int) -> KernelSpec:
    tile = (EXPERT_TILE, tokens)
    return _gate("decode", layout, suffix=f"n{tokens}", tile=tile, ring=DECODE_TILES[tokens])


def _prefill(layout: str, shape: tuple[int, int, int]) -> KernelSpec:
    ring, most = PREFILL_TILES[shape]
    experts, tokens, splits = shape
    suffix = f"n{tokens}" if splits == NUM_SLICES else f"n{tokens}_k{splits}"
    tile = (experts, tokens)
    return _gate(
        *("prefill", layout),
        suffix=suffix,
        tile=tile,
        ring=ring,
        splits=splits,
        most=most,
        same_bits_only=True if shape in SAME_BITS_ONLY else None,
    )


_HASH = KernelSpec(
    name="router_hash",
    role="hash",
    archs=_ALL_ARCHS,
    symbol="router_hash_0",
    source=DslSource(
        module="build_kernels.kernels.compile",
        layout="kmajor",
        token_tile=HASH_TOKEN_TILE,
        chunk=HASH_CHUNK,
        stages=1,
    ),
    problem=ProblemRange(
        layout="kmajor",
        num_tokens=IntRange(low=1, high=MAX_HASH_TOKENS),
        num_experts=IntRange(low=1, high=MAX_EXPERTS),
        top_k=IntRange(low=1, high=MAX_TOP_K),
        k_multiple=K_BLOCK,
        dtypes=tensor_dtypes("hash"),
    ),
    parameters=_parameters("hash", {"x_map": _x_map(HASH_TOKEN_TILE, HASH_CHUNK)}),
    cluster=(NUM_SLICES, 1, 1),
    grid=("k_splits", "token_tiles", 1),
    k_splits=NUM_SLICES,
    expert_tile=EXPERT_TILE,
    token_tile=HASH_TOKEN_TILE,
    pdl=True,
    wait_limit_ms=0,
)

_TOPK = KernelSpec(
    name="router_topk",
    role="select",
    archs=_ALL_ARCHS,
    symbol="router_topk",
    source=CudaSource(file="kernels/topk.cu", block=(32 * TOPK_WARPS, 1, 1), defines=TOPK_DEFINES),
    problem=ProblemRange(
        layout=None,
        num_tokens=IntRange(low=1, high=None),
        num_experts=IntRange(low=1, high=MAX_EXPERTS),
        top_k=IntRange(low=1, high=MAX_TOP_K),
        k_multiple=1,
        dtypes=tensor_dtypes("select"),
    ),
    parameters=_parameters("select"),
    cluster=(1, 1, 1),
    grid=("token_tiles", 1, 1),
    k_splits=1,
    expert_tile=MAX_EXPERTS,
    token_tile=TOPK_WARPS,
    pdl=True,
    wait_limit_ms=0,
)

KERNELS = (
    *(_decode(layout, tile) for layout in ("kmajor", "emajor") for tile in DECODE_TILES),
    *(_prefill(layout, shape) for layout in ("kmajor", "emajor") for shape in PREFILL_TILES),
    _HASH,
    _TOPK,
)
