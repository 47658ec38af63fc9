"""Every artifact of this GPU's architecture loads, and is what the manifest says."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

from dsv4_router_runtime.artifacts.folder import ArtifactSet, open_artifacts
from dsv4_router_runtime.artifacts.kernel import Parameter
from dsv4_router_runtime.device import driver
from dsv4_router_runtime.device.load import load_kernel
from dsv4_router_runtime.errors import ArtifactError, DriverError, NoKernelError, RouterError

pytestmark = pytest.mark.gpu


def built_kernels():
    """Keys of the kernels in the artifacts, to name the tests by; none where nothing is built."""
    try:
        return [kernel.key for kernel in open_artifacts().manifest.kernels]
    except RouterError:
        return []


@pytest.fixture(scope="module")
def here():
    """The artifacts, and this GPU's architecture with its context made."""
    import torch

    torch.zeros(1, device="cuda")
    return SimpleNamespace(artifacts=open_artifacts(), arch=driver.arch_of_device(0))


def kernel_of(here, key: str):
    [kernel] = [kernel for kernel in here.artifacts.manifest.kernels if kernel.key == key]
    return kernel


@pytest.mark.parametrize("key", built_kernels())
def test_loads_and_agrees_with_the_manifest(here, key):
    kernel = kernel_of(here, key)
    if kernel.arch != here.arch:
        pytest.skip(f"gpu: built for {kernel.arch}, this GPU is {here.arch}")
    loaded = load_kernel(here.artifacts, kernel, 0)
    function = loaded.function
    cuda = driver.bindings()
    attribute = cuda.CUfunction_attribute

    def read(name):
        which = getattr(attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        return driver.checked(name, cuda.cuFuncGetAttribute(which, function))

    assert read("NUM_REGS") == kernel.resources.registers
    assert read("LOCAL_SIZE_BYTES") == kernel.resources.stack_bytes == 0
    assert kernel.resources.spill_bytes == 0
    # The driver counts the shared memory that it keeps for itself (1 KB on sm_90) as static.
    assert read("SHARED_SIZE_BYTES") - kernel.resources.static_shared_bytes in (0, 1024)
    assert read("MAX_DYNAMIC_SHARED_SIZE_BYTES") == loaded.exclusive_shared_bytes
    assert read("MAX_THREADS_PER_BLOCK") >= kernel.launch.block[0]


@pytest.mark.parametrize("key", built_kernels())
def test_other_architectures_do_not_reach_the_gpu(here, key, monkeypatch):
    """The driver itself takes such a cubin and fails late, so it is refused before."""
    kernel = kernel_of(here, key)
    if kernel.arch == here.arch:
        pytest.skip(f"gpu: {kernel.arch} is this GPU's own architecture")
    handed = []
    monkeypatch.setattr(driver.bindings(), "cuLibraryLoadData", lambda *given: handed.append(given))
    with pytest.raises(NoKernelError) as caught:
        load_kernel(here.artifacts, kernel, 0)
    assert f"{key}: built for {kernel.arch}, GPU 0 is {here.arch}; " in str(caught.value)
    assert f"`build-kernels build --kernel {kernel.name} --arch {here.arch}`" in str(caught.value)
    assert handed == []


def test_all_of_one_architecture_load_within_10_ms(here):
    kernels = here.artifacts.manifest.for_arch(here.arch)

    def load_all() -> float:
        start = time.perf_counter()
        for kernel in kernels:
            load_kernel(here.artifacts, kernel, 0)
        return (time.perf_counter() - start) * 1e3

    assert min(load_all() for _ in range(3)) <= 10


def moved(parameters):
    return (*parameters[:-1], replace(parameters[-1], offset=parameters[-1].offset + 4))


def shorter(parameters):
    return parameters[:-1]


def longer(parameters):
    end = parameters[-1].offset + parameters[-1].size
    return (*parameters, Parameter(name="more", kind="int32", offset=end, size=4))


def widened(parameters):
    last = parameters[-1]
    return (*parameters[:-1], replace(last, size=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moved, "the manifest says offset"),
        (shorter, "has more than the"),
        (longer, "the manifest lists"),
        (widened, "and size 8, the cubin"),
    ],
)
def test_parameters_that_differ_from_the_cubin_are_refused(here, change, message):
    kernel = here.artifacts.manifest.for_arch(here.arch)[0]
    with pytest.raises(ArtifactError) as caught:
        load_kernel(here.artifacts, replace(kernel, parameters=change(kernel.parameters)), 0)
    assert message in str(caught.value)
    assert kernel.file in str(caught.value)


def test_a_symbol_that_is_not_there(here):
    kernel = replace(here.artifacts.manifest.for_arch(here.arch)[0], symbol="elsewhere")
    with pytest.raises(DriverError, match=rf"finding elsewhere in {kernel.file}: .*NOT_FOUND"):
        load_kernel(here.artifacts, kernel, 0)


def test_no_artifact_for_this_gpu_lists_every_candidate(here):
    import torch

    from dsv4_router_runtime import Router

    foreign = tuple(k for k in here.artifacts.manifest.kernels if k.arch != here.arch)
    artifacts = ArtifactSet(
        folder=here.artifacts.folder, manifest=replace(here.artifacts.manifest, kernels=foreign)
    )
    W = torch.zeros(384, 4096, dtype=torch.bfloat16, device="cuda").t()
    bias = torch.zeros(384, device="cuda")
    with pytest.raises(NoKernelError) as caught:
        Router(W, bias, top_k=6, routed_scaling_factor=1.0, artifacts=artifacts)
    for kernel in foreign:
        assert f"{kernel.key}: built for {kernel.arch}, this GPU is {here.arch}" in str(
            caught.value
        )
