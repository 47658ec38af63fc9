"""The CUDA driver: its bindings, result codes, device attributes and contexts.

Only this folder calls `cuda.bindings.driver`. The bindings are imported at the first call, not at
import. Every result code is checked; an error names the purpose of the call and the driver's code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from dsv4_router_runtime.artifacts.dispatch import device_arch
from dsv4_router_runtime.errors import DriverError, DriverMissingError


@cache
def bindings() -> Any:
    """Return `cuda.bindings.driver`, initialised; DriverMissingError if there is no driver."""
    try:
        from cuda.bindings import driver  # type: ignore[import-untyped]
    except ImportError as error:
        raise DriverMissingError(
            f"the package cuda.bindings cannot be imported ({error}); install cuda-bindings"
        ) from error
    try:
        (result,) = driver.cuInit(0)
    except (RuntimeError, OSError) as error:
        raise DriverMissingError(
            f"no CUDA driver on this machine ({error}); kernels need an NVIDIA GPU and its driver"
        ) from error
    if result != driver.CUresult.CUDA_SUCCESS:
        raise DriverMissingError(
            f"the CUDA driver does not start: {result.name}; kernels need an NVIDIA GPU"
        )
    return driver


def checked(doing: str, results: tuple[Any, ...]) -> Any:
    """Return the value (or tuple of values) of a successful call; DriverError names what failed."""
    code, *values = results
    if int(code) != 0:
        raise DriverError(f"{doing}: the CUDA driver answered {_error_text(code)}")
    return values[0] if len(values) == 1 else tuple(values)


def _error_text(code: Any) -> str:
    failed, text = bindings().cuGetErrorString(code)
    name = getattr(code, "name", str(code))
    return f"{name} ({text.decode()})" if int(failed) == 0 and text else name


def arch_of_device(index: int) -> str:
    """Return the architecture of GPU `index`, such as sm_90a."""
    major = device_attribute(index, "COMPUTE_CAPABILITY_MAJOR")
    return device_arch(major, device_attribute(index, "COMPUTE_CAPABILITY_MINOR"))


def device_attribute(index: int, name: str) -> int:
    """Return CU_DEVICE_ATTRIBUTE_<name> of GPU `index`."""
    driver = bindings()
    device = checked(f"opening GPU {index}", driver.cuDeviceGet(index))
    which = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(
        checked(f"reading {name} of GPU {index}", driver.cuDeviceGetAttribute(which, device))
    )


def make_context_current(index: int) -> None:
    """Make GPU `index`'s primary context, the one torch uses, current in the calling thread."""
    driver = bindings()
    context = primary_context(index)
    current = checked("reading the current context", driver.cuCtxGetCurrent())
    if int(current) != int(context):
        checked("making the GPU's context current", driver.cuCtxSetCurrent(context))


@cache
def primary_context(index: int) -> Any:
    """Return GPU `index`'s primary context, retained for good."""
    driver = bindings()
    device = checked(f"opening GPU {index}", driver.cuDeviceGet(index))
    return checked(f"retaining GPU {index}'s context", driver.cuDevicePrimaryCtxRetain(device))
