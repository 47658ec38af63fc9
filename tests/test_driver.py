"""The driver shell, as far as it goes without a GPU: its absence, and what it would be told."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace

import pytest
from conftest import decode_kernel, topk_kernel

pytest.importorskip("torch", reason="torch is the caller's and is not installed here")

from dsv4_router_runtime.artifacts.folder import open_artifacts
from dsv4_router_runtime.device import driver, load, tensor_map
from dsv4_router_runtime.device.launch_site import LaunchSite
from dsv4_router_runtime.errors import (
    ArtifactError,
    DriverError,
    DriverMissingError,
    DriverTooOldError,
    NoKernelError,
)

bindings = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")


@pytest.fixture
def fresh(monkeypatch):
    """Forget the bindings that an earlier test may have initialised, and forget them again."""
    driver.bindings.cache_clear()
    yield monkeypatch
    driver.bindings.cache_clear()


def test_no_driver_is_said_plainly(fresh):
    def missing(_):
        raise RuntimeError("libcuda.so.1: cannot open shared object file")

    fresh.setattr(bindings, "cuInit", missing)
    with pytest.raises(DriverMissingError, match=r"no CUDA driver on this machine \(libcuda.so.1"):
        driver.arch_of_device(0)


def test_driver_without_a_gpu(fresh):
    code = bindings.CUresult.CUDA_ERROR_NO_DEVICE
    fresh.setattr(bindings, "cuInit", lambda _: (code,))
    with pytest.raises(DriverMissingError, match="does not start: CUDA_ERROR_NO_DEVICE"):
        driver.bindings()


def test_no_bindings(fresh):
    fresh.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DriverMissingError, match=r"cuda\.bindings cannot be imported"):
        driver.bindings()


@pytest.fixture
def uninitialised(monkeypatch):
    """The bindings without cuInit: enough for building structures, on any machine."""
    monkeypatch.setattr(driver, "bindings", lambda: bindings)
    tensor_map._enum.cache_clear()
    yield bindings
    tensor_map._enum.cache_clear()


def test_failures_name_the_purpose_and_the_code(uninitialised, monkeypatch):
    success = bindings.CUresult.CUDA_SUCCESS
    monkeypatch.setattr(uninitialised, "cuGetErrorString", lambda _: (success, b"out of memory"))
    code = bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DriverError) as caught:
        driver.checked("loading x.cubin", (code, None))
    assert str(caught.value) == (
        "loading x.cubin: the CUDA driver answered CUDA_ERROR_OUT_OF_MEMORY (out of memory)"
    )
    assert driver.checked("reading", (success, 7)) == 7
    assert driver.checked("reading", (success, 7, 8)) == (7, 8)


@pytest.mark.parametrize(
    ("type_name", "stem", "word", "value"),
    [
        ("CUtensorMapDataType", "DATA_TYPE", "bfloat16", 9),
        ("CUtensorMapInterleave", "INTERLEAVE", "none", 0),
        ("CUtensorMapInterleave", "INTERLEAVE", "32B", 2),
        ("CUtensorMapSwizzle", "SWIZZLE", "none", 0),
        ("CUtensorMapSwizzle", "SWIZZLE", "128B", 3),
        ("CUtensorMapL2promotion", "L2_PROMOTION", "none", 0),
        ("CUtensorMapL2promotion", "L2_PROMOTION", "256B", 3),
        ("CUtensorMapFloatOOBfill", "FLOAT_OOB_FILL", "zeros", 0),
        ("CUtensorMapFloatOOBfill", "FLOAT_OOB_FILL", "nan_request_zero_fma", 1),
    ],
)
def test_words_of_the_manifest_in_the_driver(uninitialised, type_name, stem, word, value):
    assert tensor_map._enum(type_name, stem, word) == value


def test_tensor_maps_are_aligned():
    assert all(tensor_map.TensorMap().address % 64 == 0 for _ in range(32))


def site(kernel, pdl=False, grid=(16, 6, 1), exclusive_clusters=0):
    loaded = load.LoadedKernel(
        kernel=kernel,
        device=0,
        library=None,
        handle=0x5678,
        function=bindings.CUfunction(0x1234),
        exclusive_shared_bytes=116_736,
    )
    return LaunchSite(
        loaded, stream=0x55, grid=grid, pdl=pdl, exclusive_clusters=exclusive_clusters
    )


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig as cuda.h lays it out."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("attrs", ctypes.c_uint64),
        ("num_attrs", ctypes.c_uint),
    )


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute as cuda.h lays it out: an id and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


@pytest.fixture
def launched(uninitialised, monkeypatch):
    """What cuLaunchKernelEx was given: the structures in memory, read while the call is made."""
    seen = []

    def launch(config, function, parameters, extra):
        raw = LaunchConfig.from_address(config.getPtr())
        attributes = (LaunchAttribute * raw.num_attrs).from_address(raw.attrs or 1)
        seen.append(
            {
                "grid": tuple(raw.grid),
                "block": tuple(raw.block),
                "shared": raw.shared,
                "stream": raw.stream,
                "attributes": [(item.id, tuple(item.value[:3])) for item in attributes],
                "function": int(function),
                "parameters": parameters,
                "extra": extra,
            }
        )
        return (bindings.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(uninitialised, "cuLaunchKernelEx", launch)
    return seen


CLUSTER, PROGRAMMATIC = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, ..._STREAM_SERIALIZATION


def test_what_a_decode_launch_is_given(launched):
    launch_site = site(decode_kernel())
    launch_site.launch()
    assert launched == [
        {
            "grid": (16, 6, 1),
            "block": (128, 1, 1),
            "shared": 100_000,
            "stream": 0x55,
            "attributes": [(CLUSTER, (16, 1, 1))],
            "function": 0x1234,
            "parameters": launch_site.block.address,
            "extra": 0,
        }
    ]


def test_pdl_is_asked_for_where_the_kernel_supports_it(launched):
    site(decode_kernel(), pdl=True).launch()
    site(topk_kernel(), pdl=True, grid=(1, 1, 1)).launch()
    site(topk_kernel(), pdl=False, grid=(1, 1, 1)).launch()
    assert [[a[0] for a in item["attributes"]] for item in launched] == [
        [CLUSTER, PROGRAMMATIC],
        [PROGRAMMATIC],
        [],
    ]
    assert launched[0]["attributes"][1][1][0] == 1


def test_grid_can_follow_the_tokens(launched):
    launch_site = site(topk_kernel(), grid=(1, 1, 1))
    launch_site.set_grid((2048, 1, 1))
    launch_site.launch()
    assert launched[0]["grid"] == (2048, 1, 1)


def test_ctas_get_an_sm_each_if_a_cluster_more_would_have_room(launched):
    launch_site = site(decode_kernel(), grid=(16, 6, 1), exclusive_clusters=7)
    launch_site.launch()
    launch_site.set_grid((16, 7, 1))
    launch_site.launch()
    launch_site.set_grid((16, 1, 1))
    launch_site.launch()
    assert [item["shared"] for item in launched] == [116_736, 100_000, 116_736]


def test_failed_launch(uninitialised, monkeypatch):
    code = bindings.CUresult.CUDA_ERROR_INVALID_VALUE
    monkeypatch.setattr(uninitialised, "cuLaunchKernelEx", lambda *_: (code,))
    success = bindings.CUresult.CUDA_SUCCESS
    monkeypatch.setattr(uninitialised, "cuGetErrorString", lambda _: (success, b"invalid argument"))
    with pytest.raises(DriverError, match=r"launching router_topk.sm_90a: .*ERROR_INVALID_VALUE"):
        site(topk_kernel()).launch()


def test_thread_without_a_context_gets_one(uninitialised, monkeypatch):
    """It has it for that launch alone."""
    success = bindings.CUresult.CUDA_SUCCESS
    codes = [bindings.CUresult.CUDA_ERROR_INVALID_CONTEXT, success]
    stack = []
    for name, answer in {
        "cuLaunchKernelEx": lambda *_: (codes.pop(0),),
        "cuCtxGetCurrent": lambda: (success, bindings.CUcontext(stack[-1] if stack else 0)),
        "cuCtxPushCurrent": lambda context: (stack.append(int(context)) or success,),
        "cuCtxPopCurrent": lambda: (success, bindings.CUcontext(stack.pop())),
    }.items():
        monkeypatch.setattr(uninitialised, name, answer)
    monkeypatch.setattr(driver, "_primary_context", lambda index: 7)
    site(topk_kernel()).launch()
    assert (codes, stack) == ([], [])


class LoadingDriver:
    """Stands in for what loading calls: notes each call, and answers for one device and cubin."""

    CUresult = bindings.CUresult
    CUdevice_attribute = bindings.CUdevice_attribute
    CUfunction_attribute = bindings.CUfunction_attribute

    CUlaunchConfig = bindings.CUlaunchConfig
    CUlaunchAttribute = bindings.CUlaunchAttribute
    CUlaunchAttributeID = bindings.CUlaunchAttributeID
    CUstream = bindings.CUstream
    CUfunction = bindings.CUfunction
    version = 12040

    def __init__(self, capability, parameters, shared_of_an_sm=233_472):
        self.capability = capability
        self.parameters = parameters
        self.shared_of_an_sm = shared_of_an_sm
        self.calls = []

    def note(self, *call):
        self.calls.append(call)
        return self.CUresult.CUDA_SUCCESS

    def cuDeviceGet(self, index):
        return self.CUresult.CUDA_SUCCESS, index

    def cuDeviceGetAttribute(self, which, device):
        attribute = self.CUdevice_attribute
        values = {
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self.capability[0],
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self.capability[1],
            attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: (
                self.shared_of_an_sm
            ),
        }
        return self.CUresult.CUDA_SUCCESS, values[which]

    def cuDriverGetVersion(self):
        return self.CUresult.CUDA_SUCCESS, self.version

    def cuDevicePrimaryCtxRetain(self, device):
        return self.CUresult.CUDA_SUCCESS, bindings.CUcontext(7)

    def cuCtxPushCurrent(self, context):
        return (self.note("push", int(context)),)

    def cuCtxPopCurrent(self):
        return self.note("pop"), bindings.CUcontext(7)

    def cuLibraryLoadData(self, code, *options):
        return self.note("load", code), "library"

    def cuLibraryUnload(self, library):
        return (self.note("unload", library),)

    def cuLibraryGetKernel(self, library, symbol):
        return self.note("find", library, symbol), "kernel"

    def cuKernelGetParamInfo(self, kernel, index):
        if index >= len(self.parameters):
            return self.CUresult.CUDA_ERROR_INVALID_VALUE, 0, 0
        # The driver counts from the start of the constant bank.
        parameter = self.parameters[index]
        return self.CUresult.CUDA_SUCCESS, 0x210 + parameter.offset, parameter.size

    def cuKernelGetFunction(self, kernel):
        return self.note("function", kernel), "function"

    def cuFuncSetAttribute(self, function, which, value):
        return (self.note(which.name, value),)

    def cuKernelSetAttribute(self, which, value, kernel, device):
        return (self.note(which.name, value, kernel, device),)


@pytest.fixture
def loading(monkeypatch, manifest, write_artifacts):
    """Artifacts on disk, and a driver for a GPU of `capability` that notes what loading asks."""
    artifacts = open_artifacts(write_artifacts(manifest))

    def of(name, arch, capability, **more):
        [kernel] = [k for k in artifacts.manifest.kernels if (k.name, k.arch) == (name, arch)]
        fake = LoadingDriver(capability, kernel.parameters)
        monkeypatch.setattr(driver, "bindings", lambda: fake)
        driver.driver_version.cache_clear()
        driver._primary_context.cache_clear()
        return fake, lambda: load.load_kernel(artifacts, replace(kernel, **more), 0)

    of.folder = artifacts.folder
    yield of
    driver.driver_version.cache_clear()
    driver._primary_context.cache_clear()


@pytest.mark.parametrize(
    ("arch", "capability", "device"),
    [
        ("sm_100a", (9, 0), "sm_90a"),
        ("sm_90a", (10, 0), "sm_100a"),
        ("sm_100a", (10, 3), "sm_103a"),
    ],
)
def test_kernel_of_another_architecture_never_reaches_the_driver(loading, arch, capability, device):
    """The manifest, the hash and the ELF header all agree; only the GPU is another one."""
    fake, load = loading("router_topk", arch, capability)
    with pytest.raises(NoKernelError) as caught:
        load()
    assert str(caught.value) == (
        f"router_topk.{arch}: built for {arch}, GPU 0 is {device}; load a kernel built for "
        f"{device}, or build this one with "
        f"`build-kernels build --kernel router_topk --arch {device}`"
    )
    assert fake.calls == []


def test_what_loading_a_kernel_asks_of_the_driver(loading):
    fake, load = loading("router_decode_emajor_n32", "sm_90a", (9, 0))
    loaded = load()
    cubin = (loading.folder / "router_decode_emajor_n32.sm_90a.cubin").read_bytes()
    assert loaded.function == "function"
    # Half of an SM's, so that two CTAs and the driver's 1 KB for each do not fit.
    assert loaded.exclusive_shared_bytes == 116_736
    shared = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
    nonportable = "CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED"
    assert fake.calls == [
        ("push", 7),
        ("load", cubin),
        ("find", "library", b"router_decode_emajor_n32"),
        ("function", "kernel"),
        (shared, 116_736),
        (shared, 116_736, "kernel", 0),
        (nonportable, 1),
        (nonportable, 1, "kernel", 0),
        ("pop",),
    ]


def test_a_driver_below_the_floor_gets_no_byte(loading):
    fake, load = loading("router_topk", "sm_90a", (9, 0))
    fake.version = 12030
    with pytest.raises(DriverTooOldError) as caught:
        load()
    assert str(caught.value) == (
        "router_topk.sm_90a needs an NVIDIA driver of CUDA 12.4 or later, this one is of CUDA "
        "12.3; update the driver"
    )
    assert fake.calls == []


def test_a_kernel_that_fails_half_way_is_unloaded(loading, monkeypatch):
    fake, load = loading("router_topk", "sm_90a", (9, 0))
    code = bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    monkeypatch.setattr(fake, "cuKernelGetFunction", lambda kernel: (code, None), raising=False)
    monkeypatch.setattr(fake, "cuGetErrorString", lambda code: (code, None), raising=False)
    with pytest.raises(DriverError, match=r"onto the GPU: .*OUT_OF_MEMORY"):
        load()
    assert fake.calls[-2:] == [("unload", "library"), ("pop",)]


def test_a_kernel_without_clusters_gets_what_it_asks_for(loading):
    fake, load = loading("router_topk", "sm_90a", (9, 0))
    loaded = load()
    asked = loaded.kernel.launch.dynamic_shared_bytes
    assert ("CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", asked) in fake.calls
    assert loaded.shared_bytes((2048, 1, 1), 0) == asked


def test_altered_bytes_never_reach_the_driver(loading):
    fake, load = loading("router_topk", "sm_90a", (9, 0))
    (loading.folder / "router_topk.sm_90a.cubin").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="altered or truncated"):
        load()
    assert fake.calls == []


def test_parameters_that_differ_from_the_cubin_name_the_file(loading):
    parameters = topk_kernel().parameters[:-1]
    _, load = loading("router_topk", "sm_90a", (9, 0), parameters=parameters)
    with pytest.raises(
        ArtifactError, match=f"more than the {len(parameters)} parameters"
    ) as caught:
        load()
    assert caught.value.file == str(loading.folder / "router_topk.sm_90a.cubin")
