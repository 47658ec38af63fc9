"""Which kernels are built, for which architectures: data.

Importing this module compiles nothing and imports no compiler. The offsets and sizes of parameters,
the registers and the shared memory are not here: they are read out of the cubins.

Adding an architecture of a known generation is one line in `ARCHITECTURES`.
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
    MAX_EXPERTS,
    MAX_TOP_K,
    NUM_SPLITS,
    TOPK_DEFINES,
    TOPK_WARPS,
    WORKSPACE_BYTES,
)

# Tuning of the decode kernels by tokens a tile: K blocks a chunk, chunks in the shared-memory ring.
# A ring of 8 blocks holds a CTA's slice of K up to 8192. Measured on one H200 at 7168x384 with PDL,
# weights cold, us: N = 1, tiles of 8 3.30, of 16 3.37; N = 16, tiles of 32 3.96 (of 16 3.71, for
# six artifacts more); N = 32, chunks of 2 4.18, of 4 4.32, of 1 4.40; N = 64, chunks of 1 5.05, of
# 2 5.26, of 4 5.43.
DECODE_TILES = {8: (4, 2), 32: (2, 4), 64: (1, 8)}
# router_hash: all of K up to 8192 in one chunk. An H200 holds 7 of its clusters, so 56 tokens; at
# 64 it took 5.09 and 4.42 us (7168x384, 4096x256) with PDL, 7.91 and 6.87 without; the whole gate
# took 5.17, 3.88, 7.02 and 5.77.
HASH_CHUNK = 8
MAX_HASH_TOKENS = 56


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """`loads_on` is where a cubin can run at all; where it was run is in the evidence, not here."""

    name: str
    loads_on: str


ARCHITECTURES = (
    Architecture(name="sm_90a", loads_on="H100, H200, GH200"),
    Architecture(name="sm_100a", loads_on="B200, GB200"),
    Architecture(name="sm_103a", loads_on="B300, GB300"),
)


@dataclass(frozen=True, kw_only=True)
class CudaSource:
    """A CUDA C++ file beside this module, for NVRTC: the block it is written for, its macros."""

    file: str
    block: tuple[int, int, int]
    defines: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class DslSource:
    """A CuTeDSL module with `compile_kernel` and `launch_facts`, and what they are called with."""

    module: str
    layout: str
    token_tile: int
    chunk: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """One kernel parameter; see `dsv4_router_runtime.artifacts.kernel.Parameter` for the fields."""

    name: str
    kind: str
    element_type: str | None = None
    scratch: Scratch | None = None
    tensor_map: TensorMapRecipe | None = None


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel, built once for each of `archs`. `grid` is as in the manifest's `Launch`."""

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


def _decode(layout: str, token_tile: int) -> KernelSpec:
    name = f"router_decode_{layout}_n{token_tile}"
    chunk, stages = DECODE_TILES[token_tile]
    w_dims = ("K", "E") if layout == "kmajor" else ("E", "K")
    w_box = (K_BLOCK, EXPERT_TILE) if layout == "kmajor" else (EXPERT_TILE, K_BLOCK)
    return KernelSpec(
        name=name,
        role="decode",
        archs=_ALL_ARCHS,
        symbol=f"{name}_0",  # the DSL appends a counter
        source=DslSource(
            module="build_kernels.kernels.compile",
            layout=layout,
            token_tile=token_tile,
            chunk=chunk,
            stages=stages,
        ),
        problem=ProblemRange(
            layout=layout,
            num_tokens=IntRange(low=1, high=token_tile),
            num_experts=IntRange(low=1, high=MAX_EXPERTS),
            top_k=IntRange(low=1, high=MAX_TOP_K),
            k_multiple=K_BLOCK,
            dtypes=tensor_dtypes("decode"),
        ),
        parameters=_parameters(
            "decode",
            {
                # W_gate is read once, in long runs; hidden_states is small and stays in L2 anyway.
                "w_map": _bfloat16_map("W_gate", w_dims, w_box, "256B"),
                "x_map": _x_map(token_tile, chunk),
            },
            WORKSPACE_BYTES,
        ),
        cluster=(NUM_SPLITS, 1, 1),
        grid=("k_splits", "expert_tiles", 1),
        k_splits=NUM_SPLITS,
        expert_tile=EXPERT_TILE,
        token_tile=token_tile,
        pdl=True,
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
    cluster=(NUM_SPLITS, 1, 1),
    grid=("k_splits", "token_tiles", 1),
    k_splits=NUM_SPLITS,
    expert_tile=EXPERT_TILE,
    token_tile=HASH_TOKEN_TILE,
    pdl=True,
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
)

KERNELS = (
    *(_decode(layout, tile) for layout in ("kmajor", "emajor") for tile in DECODE_TILES),
    _HASH,
    _TOPK,
)
