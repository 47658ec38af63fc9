"""The driver shell, as far as it goes without a GPU: its absence, and what it would be told."""

from __future__ import annotations

import ctypes
import sys

import pytest
from conftest import decode_kernel, topk_kernel

from dsv4_router_runtime import driver
from dsv4_router_runtime.errors import DriverError, DriverMissingError

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
    driver._enum.cache_clear()
    yield bindings
    driver._enum.cache_clear()


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
    assert driver._enum(type_name, stem, word) == value


def test_tensor_maps_are_aligned():
    assert all(driver.TensorMap().address % 64 == 0 for _ in range(32))


def site(kernel, pdl=False, grid=(16, 6, 1)):
    loaded = driver.LoadedKernel(
        kernel=kernel, device=0, library=None, function=bindings.CUfunction(0x1234)
    )
    return driver.LaunchSite(loaded, stream=0x55, grid=grid, pdl=pdl)


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
            "block": (192, 1, 1),
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


def test_failed_launch(uninitialised, monkeypatch):
    code = bindings.CUresult.CUDA_ERROR_INVALID_VALUE
    monkeypatch.setattr(uninitialised, "cuLaunchKernelEx", lambda *_: (code,))
    success = bindings.CUresult.CUDA_SUCCESS
    monkeypatch.setattr(uninitialised, "cuGetErrorString", lambda _: (success, b"invalid argument"))
    with pytest.raises(DriverError, match=r"launching router_topk.sm_90a: .*ERROR_INVALID_VALUE"):
        site(topk_kernel()).launch()


def test_thread_without_a_context_gets_one(uninitialised, monkeypatch):
    codes = [bindings.CUresult.CUDA_ERROR_INVALID_CONTEXT, bindings.CUresult.CUDA_SUCCESS]
    made_current = []
    monkeypatch.setattr(uninitialised, "cuLaunchKernelEx", lambda *_: (codes.pop(0),))
    monkeypatch.setattr(driver, "make_context_current", made_current.append)
    site(topk_kernel()).launch()
    assert made_current == [0]
    assert codes == []
