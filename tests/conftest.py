"""Fixtures for the runtime's tests: sample manifests, artifacts on disk, and what marks do."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import struct
import sys
import zlib
from collections import Counter
from dataclasses import replace
from functools import cache, lru_cache
from math import prod
from pathlib import Path

import pytest

from build_kernels.specs import KERNELS, TARGETS, ParameterSpec
from dsv4_router_runtime.artifacts.folder import ArtifactSet, find_artifacts, open_artifacts
from dsv4_router_runtime.artifacts.kernel import (
    KIND_LAYOUT,
    Kernel,
    Launch,
    Parameter,
    Resources,
    Scratch,
    cubin_name,
)
from dsv4_router_runtime.artifacts.limits import MAX_PORTABLE_CLUSTER_CTAS
from dsv4_router_runtime.artifacts.manifest import Manifest, serialise_manifest
from dsv4_router_runtime.errors import RouterError

# Set before torch is imported. On tensors of a few rows a second thread only waits, in a loop: a
# third of the time of the files that call torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# e_flags and ABI version as the toolkits write them; see artifacts.elf_compute_capability.
ELF_FLAGS = {
    "sm_90a": (0x005A0D5A, 7),
    "sm_100a": (0x0600640A, 8),
    "sm_100f": (0x06006402, 8),
    "sm_103a": (0x0600670A, 8),
    "sm_103f": (0x06006702, 8),
}


COMPILING = ("test_module", "test_router", "test_router_arguments", "test_torch_op")
# The parameter sets of each `quick(n)` test that were collected.
SEEN: Counter[object] = Counter()
# The test file and the number of modules at the time of the last `gc.freeze`.
FROZEN: dict[str, object] = {"modules": 0}


def pytest_addoption(parser):
    parser.addoption(
        "--record",
        type=Path,
        metavar="FILE",
        help="add to FILE what the gpu tests launched, for build-kernels verify --record",
    )
    parser.addoption(
        "--bits",
        type=Path,
        metavar="FILE",
        help="a GPU's outputs (.json, .npz), written by test_gpu_recording.py and compared by"
        " test_recorded_bits.py",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU that the artifacts are built for")
    # The fixtures of a file are made, and its imports paid for, by one worker.
    if config.getoption("dist", "no") == "load":
        config.option.dist = "loadfile"
    if path := config.getoption("--record"):
        from hardware_record import HardwareRecord

        config.pluginmanager.register(HardwareRecord(path), "hardware-record")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give a file to one worker, and to one all that need torch's compiler: 2.3 s to import."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "torch.compile" if Path(file).stem in COMPILING else file

    return Scheduler(config, log) if config.option.dist == "loadfile" else None


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


def pytest_itemcollected(item):
    """Mark the parameter sets after the first n of `quick(n)`; a plugin may shuffle them later."""
    if quick := item.get_closest_marker("quick"):
        SEEN[item.function] += 1
        if SEEN[item.function] > quick.args[0]:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect no garbage while tests are collected: all that is made then stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        let_torch_propagate()


def let_torch_propagate():
    """Let records reach pytest's handlers through the root logger.

    torch has 80 loggers that keep theirs, and pytest would add its handlers to each for each phase
    of each test.
    """
    for logger in logging.Logger.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True


# After `-m` took out the others.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"gpu: {reason}"))


def pytest_runtest_setup(item):
    """Take what earlier files and new modules left out of what a collection of garbage looks at.

    torch.compile imports a thousand modules in the middle of a test.
    """
    modules = len(sys.modules)
    if item.path != FROZEN.get("path") or modules > FROZEN["modules"] + 100:
        gc.collect()
        gc.freeze()
        FROZEN.update(path=item.path, modules=modules)


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


@pytest.fixture
def nothing_bound():
    """The operators of torch keep no layer of another test."""
    from dsv4_router_runtime.integrations import torch_op

    torch_op.forget()
    yield
    torch_op.forget()


@pytest.fixture
def compile_once(monkeypatch):
    """Let builds in this process take what a kernel was compiled to before: a second each."""
    import builds

    monkeypatch.setattr(builds.build, "_compile_all", builds.compile_once)
    monkeypatch.setattr(builds.compilers, "toolchain_versions", builds.versions_once)


@pytest.fixture
def disassemble_once(monkeypatch):
    """Let this process take what a cubin was disassembled to before: half a second each."""
    import builds

    from build_kernels.binaries import nvdisasm

    monkeypatch.setattr(nvdisasm, "sass_opcodes", builds.sass_once)
    monkeypatch.setattr(builds.build, "sass_opcodes_of", builds.sass_of_once)


def cubin_bytes(arch: str, payload: bytes = b"") -> bytes:
    """A valid 64-byte ELF header of a cubin for `arch`, and a payload."""
    flags, abi = ELF_FLAGS[arch]
    ident = b"\x7fELF" + bytes([2, 1, 1, 0x41, abi]) + bytes(7)
    fields = struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, 0, flags, 64, 0, 0, 0, 0, 0)
    return ident + fields + payload


RESOURCES = Resources(
    registers=64, spill_bytes=0, stack_bytes=0, static_shared_bytes=0, opcodes={"LDL": 0}
)
# Both kinds of scratch, though the built kernels have a zeroed workspace alone.
SCRATCH = (
    ParameterSpec(
        name="partials",
        kind="pointer",
        element_type="float32",
        scratch=Scratch(elements=64 * 512, zeroed=False),
    ),
    ParameterSpec(
        name="counters",
        kind="pointer",
        element_type="uint32",
        scratch=Scratch(elements=64, zeroed=True),
    ),
)


def _parameters(specs: tuple[ParameterSpec, ...]) -> tuple[Parameter, ...]:
    """Return the parameters of `specs` at packed offsets, the workspace as two kinds of scratch."""
    parts = [part for item in specs for part in (SCRATCH if item.scratch else (item,))]
    parameters, end = [], 0
    for part in parts:
        size, alignment = KIND_LAYOUT[part.kind]
        offset = -(-end // alignment) * alignment
        parameters.append(Parameter(**vars(part), offset=offset, size=size))
        end = offset + size
    return tuple(parameters)


@cache
def sample_kernel(name: str, arch: str = "sm_90a") -> Kernel:
    """Return the manifest's entry of the spec `name`, with a cubin that is a header alone."""
    (spec,) = (spec for spec in KERNELS if spec.name == name)
    payload = f"{name} {arch}".encode()
    return Kernel(
        name=name,
        arch=arch,
        role=spec.role,
        file=cubin_name(name, arch),
        symbol=name,
        cubin_sha256=hashlib.sha256(cubin_bytes(arch, payload)).hexdigest(),
        ptx_sha256="1" * 64,
        source_digest="2" * 64,
        problem=spec.problem,
        launch=Launch(
            block=(128, 1, 1),
            cluster=spec.cluster,
            grid=spec.grid,
            k_splits=spec.k_splits,
            expert_tile=spec.expert_tile,
            token_tile=spec.token_tile,
            dynamic_shared_bytes=100_000 if spec.role in ("decode", "prefill") else 0,
            pdl=spec.pdl,
            nonportable_cluster=prod(spec.cluster) > MAX_PORTABLE_CLUSTER_CTAS,
            wait_limit_ms=spec.wait_limit_ms,
            max_clusters=spec.max_clusters,
        ),
        parameters=_parameters(spec.parameters),
        resources=RESOURCES,
    )


def decode_kernel(arch: str = "sm_90a", layout: str = "kmajor", tile: int = 8) -> Kernel:
    return sample_kernel(f"router_decode_{layout}_n{tile}", arch)


def topk_kernel(arch: str = "sm_90a") -> Kernel:
    return sample_kernel("router_topk", arch)


def hash_kernel(arch: str = "sm_90a") -> Kernel:
    return sample_kernel("router_hash", arch)


@lru_cache
def sample_manifest(archs=("sm_90a", "sm_100a")) -> Manifest:
    kernels = [sample_kernel(spec.name, arch) for arch in archs for spec in KERNELS]
    kernels.sort(key=lambda kernel: (kernel.name, kernel.arch))
    return Manifest(
        toolchain={"nvrtc": "13.0", "ptxas": "12.9"},
        driver={arch: TARGETS[arch].driver for arch in archs},
        kernels=tuple(kernels),
    )


@lru_cache(maxsize=8)
def manifest_text(manifest: Manifest) -> str:
    """Serialise a manifest, equal ones once: the sample's text takes 40 ms, its hash 0.5 ms."""
    return serialise_manifest(manifest)


@pytest.fixture
def manifest() -> Manifest:
    """Every kernel for each of sm_90a and sm_100a, shaped like the real ones."""
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
        (folder / "manifest.json").write_text(manifest_text(manifest))
        return folder

    return write


@pytest.fixture
def gpu(monkeypatch):
    """A recorder in the GPU's place; it needs torch."""
    from gpu_recorder import replace_gpu

    return replace_gpu(monkeypatch)


@pytest.fixture
def artifacts(tmp_path):
    """The sample manifest as a set in an empty folder."""
    return ArtifactSet(folder=tmp_path, manifest=sample_manifest())
