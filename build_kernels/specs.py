"""Which kernels are built, for which architectures: data.

Importing this module compiles nothing and imports no compiler. The offsets and sizes of parameters,
the registers and the shared memory are not here: they are read out of the cubins.

Adding an architecture of a known generation is one line in `ARCHITECTURES`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_router_runtime.artifacts.manifest import (
    MAX_EXPERTS,
    MAX_TOP_K,
    IntRange,
    ProblemRange,
    Scratch,
    TensorMapRecipe,
)

# router_decode: an MMA tile of 64 experts by `token_tile` tokens, K read in blocks of 64 and split
# over the 16 CTAs of a cluster. router_hash: 8 slots of each of 8 tokens by those tokens, K split
# alike. The kernels' own constants; the build fails where they differ.
EXPERT_TILE = 64
HASH_TOKEN_TILE = 8
K_BLOCK = 64
K_SPLITS = 16
MAX_DECODE_TOKENS = 64
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
# An 8-byte entry for each token and expert, and a 4-byte counter for each token.
WORKSPACE_BYTES = MAX_DECODE_TOKENS * (MAX_EXPERTS * 8 + 4)
# router_topk: a warp a token, 4 warps a block. Also in topk.cu; the build checks the block.
TOPK_WARPS = 4


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
    """A CUDA C++ file beside this module, for NVRTC, and the block it is written for."""

    file: str
    block: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class DslSource:
    """A CuTeDSL module with `compile_kernel` and `launch_facts`, and what they are called with."""

    module: str
    kernel: str
    layout: str
    token_tile: int
    chunk: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """One kernel parameter; see `dsv4_router_runtime.manifest.Parameter` for the fields."""

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
    scratch_bytes: int


def _pointer(name: str, element_type: str, scratch: Scratch | None = None) -> ParameterSpec:
    return ParameterSpec(name=name, kind="pointer", element_type=element_type, scratch=scratch)


def _int32(*names: str) -> tuple[ParameterSpec, ...]:
    return tuple(ParameterSpec(name=name, kind="int32") for name in names)


def _bfloat16_map(
    name: str, tensor: str, dims: tuple[str, ...], box: tuple[int, ...], l2_promotion: str
) -> ParameterSpec:
    recipe = TensorMapRecipe(
        tensor=tensor,
        element_type="bfloat16",
        dims=dims,
        box=box,
        swizzle="128B",
        interleave="none",
        l2_promotion=l2_promotion,
        oob_fill="zeros",
    )
    return ParameterSpec(name=name, kind="tensor_map", tensor_map=recipe)


def _float32(*names: str) -> tuple[ParameterSpec, ...]:
    return tuple(ParameterSpec(name=name, kind="float32") for name in names)


# Every option is a parameter, a pointer that may be null or a number; none is an axis of artifacts.
_BIASES = (
    _pointer("e_bias", "float32"),
    _pointer("bias_vl", "float32"),
    _pointer("image_mask", "uint8"),
)
_PADDING = (_pointer("padding_mask", "uint8"), _pointer("num_valid_tokens", "int32"))
# input_ids holds int64 where input_ids_are_int64.
_TABLE = (_pointer("tid2eid", "int32"), _pointer("input_ids", "int32"))
_TABLE_FACTS = _int32("vocab_size", "input_ids_are_int64")
# out_ids holds int64 where ids_are_int64.
_OUTPUTS = (
    _pointer("to_physical", "int32"),
    _pointer("logical_count", "int32"),
    _pointer("out_weights", "float32"),
    _pointer("out_ids", "int32"),
)
_WEIGHING = (*_float32("routed_scaling_factor", "gate_temp"), *_int32("norm_topk_prob"))
_OUTPUT_FACTS = _int32("max_replicas", "num_shared_slots", "ids_are_int64")
_OUTPUT_STRIDES = _int32("out_weights_stride", "out_ids_stride")

_FLOAT32, _INT32, _BFLOAT16, _MASK = ("float32",), ("int32",), ("bfloat16",), ("bool",)
_IDS = ("int32", "int64")
_BIAS_DTYPES = {"e_bias": _FLOAT32, "bias_vl": _FLOAT32, "image_mask": _MASK}
_TABLE_DTYPES = {"tid2eid": _INT32, "input_ids": _IDS}
_OUTPUT_DTYPES = {
    "padding_mask": _MASK,
    "num_valid_tokens": _INT32,
    "to_physical": _INT32,
    "logical_count": _INT32,
    "out_weights": _FLOAT32,
    "out_ids": _IDS,
}
_GEMM_DTYPES = {"hidden_states": _BFLOAT16, "W_gate": _BFLOAT16}
_ALL_ARCHS = tuple(arch.name for arch in ARCHITECTURES)


def _x_map(token_tile: int, chunk: int) -> ParameterSpec:
    dims = ("K_in_block", "N", "K_block")
    return _bfloat16_map("x_map", "hidden_states", dims, (K_BLOCK, token_tile, chunk), "128B")


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
            kernel="decode",
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
            dtypes=_GEMM_DTYPES | _BIAS_DTYPES | _TABLE_DTYPES | _OUTPUT_DTYPES,
        ),
        parameters=(
            # W_gate is read once, in long runs; hidden_states is small and stays in L2 anyway.
            _bfloat16_map("w_map", "W_gate", w_dims, w_box, "256B"),
            _x_map(token_tile, chunk),
            _pointer("workspace", "uint32", Scratch(elements=WORKSPACE_BYTES // 4, zeroed=True)),
            *_BIASES,
            *_PADDING,
            *_TABLE,
            *_OUTPUTS,
            *_int32("num_tokens", "num_experts", "num_k_blocks", "top_k"),
            *_WEIGHING,
            *_TABLE_FACTS,
            *_OUTPUT_FACTS,
            *_OUTPUT_STRIDES,
        ),
        cluster=(K_SPLITS, 1, 1),
        grid=("k_splits", "expert_tiles", 1),
        k_splits=K_SPLITS,
        expert_tile=EXPERT_TILE,
        token_tile=token_tile,
        pdl=True,
        scratch_bytes=WORKSPACE_BYTES,
    )


_HASH = KernelSpec(
    name="router_hash",
    role="hash",
    archs=_ALL_ARCHS,
    symbol="router_hash_0",
    source=DslSource(
        module="build_kernels.kernels.compile",
        kernel="hash_layer",
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
        dtypes=_GEMM_DTYPES | _TABLE_DTYPES | _OUTPUT_DTYPES,
    ),
    parameters=(
        _x_map(HASH_TOKEN_TILE, HASH_CHUNK),
        _pointer("w_gate", "bfloat16"),
        *_PADDING,
        *_TABLE,
        *_OUTPUTS,
        *_int32("num_tokens", "num_experts", "num_k_blocks", "top_k", "w_stride"),
        *_WEIGHING,
        *_TABLE_FACTS,
        *_OUTPUT_FACTS,
        *_OUTPUT_STRIDES,
    ),
    cluster=(K_SPLITS, 1, 1),
    grid=("k_splits", "token_tiles", 1),
    k_splits=K_SPLITS,
    expert_tile=EXPERT_TILE,
    token_tile=HASH_TOKEN_TILE,
    pdl=True,
    scratch_bytes=0,
)

_TOPK = KernelSpec(
    name="router_topk",
    role="select",
    archs=_ALL_ARCHS,
    symbol="router_topk",
    source=CudaSource(file="kernels/topk.cu", block=(32 * TOPK_WARPS, 1, 1)),
    problem=ProblemRange(
        layout=None,
        num_tokens=IntRange(low=1, high=None),
        num_experts=IntRange(low=1, high=MAX_EXPERTS),
        top_k=IntRange(low=1, high=MAX_TOP_K),
        k_multiple=1,
        dtypes={"logits": _FLOAT32} | _BIAS_DTYPES | _TABLE_DTYPES | _OUTPUT_DTYPES,
    ),
    parameters=(
        _pointer("logits", "float32"),
        *_BIASES,
        *_PADDING,
        *_TABLE,
        *_OUTPUTS,
        *_int32("num_tokens", "num_experts", "top_k"),
        *_WEIGHING,
        *_TABLE_FACTS,
        *_OUTPUT_FACTS,
        *_int32("logits_stride"),
        *_OUTPUT_STRIDES,
    ),
    cluster=(1, 1, 1),
    grid=("token_tiles", 1, 1),
    k_splits=1,
    expert_tile=MAX_EXPERTS,
    token_tile=TOPK_WARPS,
    pdl=True,
    scratch_bytes=0,
)

KERNELS = (
    *(_decode(layout, tile) for layout in ("kmajor", "emajor") for tile in DECODE_TILES),
    _HASH,
    _TOPK,
)
