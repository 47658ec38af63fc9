"""A CUDA driver that fails where a test says so, below everything that a Router does."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

from cuda.bindings import driver as real
from gpu_recorder import replace_gpu

from dsv4_router_runtime import binding, loaded_steps, log, steps
from dsv4_router_runtime.device import driver, launch_site, load, occupancy, tensor_map, workspace
from dsv4_router_runtime.device.launch_site import LaunchSite

PRIMARY, FOREIGN, GREEN = 7, 8, 9
# What `replace_gpu` replaces above the driver, and this module puts back.
_ABOVE = [
    (driver, "_primary_context"),
    (driver, "arch_of_device"),
    (driver, "context_kept"),
    (driver, "refuse_foreign_context"),
    (driver, "is_primary_current"),
    (load, "load_kernel"),
    (tensor_map, "encode_tensor_map"),
    (steps, "encode_tensor_map"),
    (loaded_steps, "ask_room"),
    (binding, "is_lasting"),
    (launch_site, "launch_config"),
    (LaunchSite, "launch"),
]
_REAL = [(owner, name, getattr(owner, name)) for owner, name in _ABOVE]
_CACHED = (driver.driver_version, driver._primary_context, tensor_map._encode_function)


class FakeDriver:
    """Answers as the driver of one H200 does; `calls` has the name of every call.

    fail: the index of the call that fails, and its code. lacks, unbound: functions that the driver
    and the bindings do not have. stack: the calling thread's contexts. room: clusters that fit.
    """

    def __init__(self, kernels: Any) -> None:
        self.kernels = {kernel.key: kernel for kernel in kernels}
        self.calls: list[str] = []
        self.fail: tuple[int, int] | None = None
        self.lacks: set[str] = set()
        self.unbound: set[str] = set()
        self.stack = [PRIMARY]
        self.room = 7
        self.launch_code = 0
        self.launched: list[int] = []
        self.gpu: Any = None
        self.handles: dict[int, Any] = {}
        integer, pointer = ctypes.c_uint32, ctypes.c_void_p
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, pointer, integer, integer, *[pointer] * 5, *[integer] * 4
        )
        # It wants a context, as the driver does.
        self._encode = kind(
            lambda *given: int(self._code("cuTensorMapEncodeTiled")) or 201 * (not self.stack)
        )

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(real, name)
        if name in self.unbound:
            raise AttributeError(name)
        return lambda *given: self._answer(name, *given)

    def _code(self, name: str) -> Any:
        self.calls.append(name)
        at, code = self.fail or (-1, 0)
        return real.CUresult(code if len(self.calls) - 1 == at else 0)

    def _answer(self, name: str, *given: Any) -> tuple[Any, ...]:
        if name in self.lacks:
            raise RuntimeError(f'Function "{name}" not found')
        code = self._code(name)
        values = getattr(self, f"_{name}", lambda *given: (1,))
        if int(code):
            # The bindings give a None for each value.
            return (code, *[None] * self._number_of_values(name))
        answered = values(*given)
        if answered and isinstance(answered[0], real.CUresult):
            return answered
        return (code, *answered)

    def _number_of_values(self, name: str) -> int:
        without = (
            *("cuCtxPush", "cuCtxSet", "cuFuncSet", "cuKernelSet", "cuLaunch", "cuLibraryUnl"),
            *("cuMemsetD8Async", "cuStreamSynchronize", "cuStreamDestroy"),
        )
        return 0 if name.startswith(without) else {"cuKernelGetParamInfo": 2}.get(name, 1)

    def _cuGetErrorString(self, code):
        return (b"in words",)

    def _cuDriverGetVersion(self):
        return (13000,)

    def _cuDeviceGet(self, index):
        return (0,)

    def _cuDeviceGetAttribute(self, which, device):
        values = {"MAJOR": 9, "MINOR": 0}
        return (values.get(which.name.split("_")[-1], 233_472),)

    def _cuDevicePrimaryCtxRetain(self, device):
        return (real.CUcontext(PRIMARY),)

    def _cuCtxGetCurrent(self):
        return (real.CUcontext(self.stack[-1] if self.stack else 0),)

    def _cuCtxGetDevice(self):
        return (0,)

    def _cuStreamGetGreenCtx(self, stream):
        return (real.CUgreenCtx(GREEN if self.stack[-1] == GREEN else 0),)

    def _cuCtxPushCurrent(self, context):
        self.stack.append(int(context))
        return ()

    def _cuCtxPopCurrent(self):
        return (real.CUcontext(self.stack.pop()),)

    def _cuCtxSetCurrent(self, context):
        self.stack[-1:] = [int(context)]
        return ()

    def _cuMemAlloc(self, size):
        return (len(self.calls) << 24,)

    def _cuThreadExchangeStreamCaptureMode(self, mode):
        return (real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL,)

    def _cuStreamGetId(self, stream):
        # Each context has a null stream of its own.
        return (self.stack[-1] if self.stack else 0,)

    def _cuStreamGetCaptureInfo(self, stream):
        active = real.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
        return active, self.gpu.capture, self.gpu.capture, (), (), 0

    _cuStreamGetCaptureInfo_v3 = _cuStreamGetCaptureInfo

    def _cuLibraryLoadData(self, code, *options):
        (kernel,) = (kernel for key, kernel in self.kernels.items() if _payload(key) in code)
        return (kernel,)

    def _cuLibraryUnload(self, library):
        return ()

    def _cuLibraryGetKernel(self, library, symbol):
        handle = len(self.handles) + 1
        self.handles[handle] = library
        return (handle,)

    def _cuKernelGetFunction(self, handle):
        return (handle,)

    def _cuKernelGetParamInfo(self, handle, index):
        parameters = self.handles[handle].parameters
        if index >= len(parameters):
            return real.CUresult.CUDA_ERROR_INVALID_VALUE, None, None
        return parameters[index].offset, parameters[index].size

    def _cuFuncSetAttribute(self, function, which, value):
        return ()

    def _cuKernelSetAttribute(self, which, value, handle, device):
        return ()

    def _cuOccupancyMaxActiveClusters(self, function, config):
        if not self.stack:
            return real.CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        return (self.room,)

    def _cuGetProcAddress(self, name, version, flags):
        return ctypes.cast(self._encode, ctypes.c_void_p).value, 0

    def _cuLaunchKernelEx(self, config, function, parameters, extra):
        if not self.stack:
            return (real.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        if self.stack[-1] == FOREIGN:
            return (real.CUresult.CUDA_ERROR_INVALID_HANDLE,)
        if self.launch_code and config.numAttrs:
            return (real.CUresult(self.launch_code),)
        self.launched.append(function)
        return ()


def _payload(key: str) -> bytes:
    return key.replace(".", " ").encode()


def replace_driver(monkeypatch, kernels) -> FakeDriver:
    """Put a fake driver below a Router whose tensors lie in host memory."""
    # Memory that tests before left over is not freed by this driver.
    gc.collect()
    gpu = replace_gpu(monkeypatch)
    for owner, name, value in _REAL:
        monkeypatch.setattr(owner, name, value)
    fake = plug_in(monkeypatch, FakeDriver(kernels))
    fake.gpu = gpu
    return fake


def plug_in(monkeypatch, fake: FakeDriver) -> FakeDriver:
    """Forget what a process remembers of its driver, and go on with `fake`."""
    for cached in _CACHED:
        cached.cache_clear()
    wrapped = driver._Bindings(fake)
    monkeypatch.setattr(driver, "bindings", lambda: wrapped)
    monkeypatch.setattr(load, "_loaded", {})
    monkeypatch.setattr(workspace, "_workspaces", {})
    monkeypatch.setattr(tensor_map, "_map_caches", {})
    monkeypatch.setattr(occupancy, "_fallbacks", {})
    monkeypatch.setattr(log, "_logged", set())
    return fake
