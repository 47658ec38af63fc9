"""Fixtures for the runtime's tests: sample manifests, artifacts on disk, and the gpu marker."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4_router_runtime.artifacts.folder import find_artifacts, open_artifacts
from dsv4_router_runtime.artifacts.manifest import (
    IntRange,
    Kernel,
    Launch,
    Manifest,
    Parameter,
    ProblemRange,
    Resources,
    Scratch,
    TensorMapRecipe,
    cubin_name,
    serialise_manifest,
)
from dsv4_router_runtime.errors import RouterError

# e_flags and ABI version as the toolkits write them; see artifacts.elf_compute_capability.
ELF_FLAGS = {
    "sm_90a": (0x005A0D5A, 7),
    "sm_100a": (0x0600640A, 8),
    "sm_103a": (0x0600670A, 8),
}


def pytest_addoption(parser):
    parser.addoption(
        "--record",
        type=Path,
        metavar="FILE",
        help="add to FILE what the gpu tests launched, for build-kernels verify --record",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU that the artifacts are built for")
    if path := config.getoption("--record"):
        from hardware_record import HardwareRecord

        config.pluginmanager.register(HardwareRecord(path), "hardware-record")


def why_no_gpu() -> str | None:
    """Why tests marked gpu cannot run here, or None if they can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA GPU"
    try:
        from dsv4_router_runtime.device.driver import arch_of_device

        arch = arch_of_device(0)
        kernels = open_artifacts(find_artifacts()).manifest.for_arch(arch)
    except RouterError as error:
        return str(error)
    return None if kernels else f"the artifacts hold no kernel for this GPU's {arch}"


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"gpu: {reason}"))


@pytest.fixture(scope="session")
def record_cases(request):
    """For a gpu test of several cases: call it with their number, after their launches.

    It counts for the artifacts launched since the last call. A test that never calls it is one
    case of each artifact that it launched.
    """
    record = request.config.pluginmanager.get_plugin("hardware-record")
    return record.tally.count if record else lambda number=1: None


@pytest.fixture
def seed(request) -> int:
    """A seed of the test's own: the same on every run, another for every test and parameter."""
    return zlib.crc32(request.node.nodeid.encode())


def cubin_bytes(arch: str, payload: bytes = b"") -> bytes:
    """A valid 64-byte ELF header of a cubin for `arch`, and a payload."""
    flags, abi = ELF_FLAGS[arch]
    ident = b"\x7fELF" + bytes([2, 1, 1, 0x41, abi]) + bytes(7)
    fields = struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, 0, flags, 64, 0, 0, 0, 0, 0)
    return ident + fields + payload


def _parameters(kinds: list[tuple]) -> tuple[Parameter, ...]:
    """Parameters with packed offsets, from (name, kind, keyword arguments)."""
    layout = {"tensor_map": (128, 64), "pointer": (8, 8), "int32": (4, 4), "float32": (4, 4)}
    parameters, end = [], 0
    for name, kind, more in kinds:
        size, alignment = layout[kind]
        offset = -(-end // alignment) * alignment
        parameters.append(Parameter(name=name, kind=kind, offset=offset, size=size, **more))
        end = offset + size
    return tuple(parameters)


def _pointer(name: str, element_type: str, scratch: Scratch | None = None) -> tuple:
    return (name, "pointer", {"element_type": element_type, "scratch": scratch})


def _map(tensor: str, dims: tuple[str, ...], box: tuple[int, ...], promotion: str) -> dict:
    recipe = TensorMapRecipe(
        tensor=tensor,
        element_type="bfloat16",
        dims=dims,
        box=box,
        swizzle="128B",
        interleave="none",
        l2_promotion=promotion,
        oob_fill="zeros",
    )
    return {"tensor_map": recipe}


LAYOUTS = ("emajor", "kmajor")
TILES = (8, 32, 64)
BLOCKS = ("K_in_block", "N", "K_block")
BIAS = [
    _pointer("e_bias", "float32"),
    _pointer("bias_vl", "float32"),
    _pointer("image_mask", "uint8"),
]
PADDING = [_pointer("padding_mask", "uint8"), _pointer("num_valid_tokens", "int32")]
TABLE = [_pointer("tid2eid", "int32"), _pointer("input_ids", "int32")]
PHYSICAL = [_pointer("to_physical", "int32"), _pointer("logical_count", "int32")]
OUTPUTS = [_pointer("out_weights", "float32"), _pointer("out_ids", "int32")]


def _int32(*names: str) -> list[tuple]:
    return [(name, "int32", {}) for name in names]


SCALE = [("routed_scaling_factor", "float32", {}), ("gate_temp", "float32", {})]
TOKEN_IDS = _int32("vocab_size", "input_ids_are_int64")
IDS = _int32("max_replicas", "num_shared_slots", "ids_are_int64")
STRIDES = _int32("out_weights_stride", "out_ids_stride")
FLOAT32, INT32, BFLOAT16, MASK = ("float32",), ("int32",), ("bfloat16",), ("bool",)
IDS_DTYPES = ("int32", "int64")
BIAS_DTYPES = {"e_bias": FLOAT32, "bias_vl": FLOAT32, "image_mask": MASK}
TABLE_DTYPES = {"tid2eid": INT32, "input_ids": IDS_DTYPES}
GEMM_DTYPES = {"hidden_states": BFLOAT16, "W_gate": BFLOAT16}
OUTPUT_DTYPES = {
    "padding_mask": MASK,
    "num_valid_tokens": INT32,
    "to_physical": INT32,
    "logical_count": INT32,
    "out_weights": FLOAT32,
    "out_ids": IDS_DTYPES,
}
RESOURCES = Resources(
    registers=64, spill_bytes=0, stack_bytes=0, static_shared_bytes=0, opcodes={"LDL": 0}
)


def _kernel(name: str, arch: str, **more) -> Kernel:
    payload = f"{name} {arch}".encode()
    digest = hashlib.sha256(cubin_bytes(arch, payload)).hexdigest()
    return Kernel(
        name=name,
        arch=arch,
        file=cubin_name(name, arch),
        symbol=name,
        cubin_sha256=digest,
        ptx_sha256="1" * 64,
        source_digest="2" * 64,
        resources=RESOURCES,
        **more,
    )


def decode_kernel(arch: str = "sm_90a", layout: str = "kmajor", tile: int = 8) -> Kernel:
    w_dims = ("K", "E") if layout == "kmajor" else ("E", "K")
    return _kernel(
        f"router_decode_{layout}_n{tile}",
        arch,
        problem=ProblemRange(
            layout=layout,
            num_tokens=IntRange(low=1, high=tile),
            num_experts=IntRange(low=1, high=512),
            top_k=IntRange(low=1, high=8),
            k_multiple=64,
            dtypes=GEMM_DTYPES | BIAS_DTYPES | TABLE_DTYPES | OUTPUT_DTYPES,
        ),
        launch=Launch(
            block=(192, 1, 1),
            cluster=(16, 1, 1),
            grid=("k_splits", "expert_tiles", 1),
            k_splits=16,
            expert_tile=64,
            token_tile=tile,
            dynamic_shared_bytes=100_000,
            pdl=True,
            nonportable_cluster=True,
        ),
        parameters=_parameters(
            [
                ("w_map", "tensor_map", _map("W_gate", w_dims, (64, 64), "256B")),
                ("x_map", "tensor_map", _map("hidden_states", BLOCKS, (64, tile, 4), "128B")),
                # Both kinds of scratch, where the real ones have a zeroed workspace alone.
                _pointer("partials", "float32", Scratch(elements=64 * 512, zeroed=False)),
                _pointer("counters", "uint32", Scratch(elements=64, zeroed=True)),
                *BIAS,
                *PADDING,
                *TABLE,
                *PHYSICAL,
                *OUTPUTS,
                *_int32("num_tokens", "num_experts", "num_k_blocks", "top_k"),
                *SCALE,
                *_int32("norm_topk_prob"),
                *TOKEN_IDS,
                *IDS,
                *STRIDES,
            ]
        ),
    )


def topk_kernel(arch: str = "sm_90a") -> Kernel:
    return _kernel(
        "router_topk",
        arch,
        problem=ProblemRange(
            layout="logits",
            num_tokens=IntRange(low=1, high=None),
            num_experts=IntRange(low=1, high=512),
            top_k=IntRange(low=1, high=8),
            k_multiple=1,
            dtypes={"logits": FLOAT32} | BIAS_DTYPES | TABLE_DTYPES | OUTPUT_DTYPES,
        ),
        launch=Launch(
            block=(128, 1, 1),
            cluster=(1, 1, 1),
            grid=("token_tiles", 1, 1),
            k_splits=1,
            expert_tile=512,
            token_tile=4,
            dynamic_shared_bytes=0,
            pdl=True,
            nonportable_cluster=False,
        ),
        parameters=_parameters(
            [
                _pointer("logits", "float32"),
                *BIAS,
                *PADDING,
                *TABLE,
                *PHYSICAL,
                *OUTPUTS,
                *_int32("num_tokens", "num_experts", "top_k"),
                *SCALE,
                *_int32("norm_topk_prob"),
                *TOKEN_IDS,
                *IDS,
                *_int32("logits_stride"),
                *STRIDES,
            ]
        ),
    )


def hash_kernel(arch: str = "sm_90a") -> Kernel:
    return _kernel(
        "router_hash",
        arch,
        problem=ProblemRange(
            layout="kmajor_rows",
            num_tokens=IntRange(low=1, high=56),
            num_experts=IntRange(low=1, high=512),
            top_k=IntRange(low=1, high=8),
            k_multiple=64,
            dtypes=GEMM_DTYPES | TABLE_DTYPES | OUTPUT_DTYPES,
        ),
        launch=Launch(
            block=(416, 1, 1),
            cluster=(16, 1, 1),
            grid=("k_splits", "token_tiles", 1),
            k_splits=16,
            expert_tile=64,
            token_tile=8,
            dynamic_shared_bytes=20_000,
            pdl=True,
            nonportable_cluster=True,
        ),
        parameters=_parameters(
            [
                ("x_map", "tensor_map", _map("hidden_states", BLOCKS, (64, 8, 4), "128B")),
                _pointer("w_gate", "bfloat16"),
                *PADDING,
                *TABLE,
                *PHYSICAL,
                *OUTPUTS,
                *_int32("num_tokens", "num_experts", "num_k_blocks", "top_k", "w_stride"),
                *SCALE,
                *_int32("norm_topk_prob"),
                *TOKEN_IDS,
                *IDS,
                *STRIDES,
            ]
        ),
    )


def sample_manifest(archs=("sm_90a", "sm_100a")) -> Manifest:
    kernels = [
        kernel
        for arch in archs
        for kernel in (
            *(decode_kernel(arch, layout, tile) for layout in LAYOUTS for tile in TILES),
            hash_kernel(arch),
            topk_kernel(arch),
        )
    ]
    kernels.sort(key=lambda kernel: (kernel.name, kernel.arch))
    return Manifest(toolchain={"nvrtc": "13.0", "ptxas": "12.9"}, kernels=tuple(kernels))


@pytest.fixture
def manifest() -> Manifest:
    """Eight kernels for each of sm_90a and sm_100a, shaped like the real ones."""
    return sample_manifest()


@pytest.fixture
def change():
    """dataclasses.replace on the kernel at an index of a manifest."""

    def changed(manifest: Manifest, index: int, **more) -> Manifest:
        kernels = list(manifest.kernels)
        kernels[index] = replace(kernels[index], **more)
        return replace(manifest, kernels=tuple(kernels))

    return changed


@pytest.fixture
def write_artifacts(tmp_path):
    """Write a manifest and its cubins into a folder, and return the folder."""

    def write(manifest: Manifest) -> Path:
        folder = tmp_path / "artifacts"
        folder.mkdir()
        for kernel in manifest.kernels:
            payload = kernel.key.replace(".", " ").encode()
            (folder / kernel.file).write_bytes(cubin_bytes(kernel.arch, payload))
        (folder / "manifest.json").write_text(serialise_manifest(manifest))
        return folder

    return write
