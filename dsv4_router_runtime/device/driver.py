"""The CUDA driver: its bindings, result codes, device attributes and contexts.

Only this folder calls `cuda.bindings.driver`. The bindings are imported at the first call, not at
import. Every result code is checked; an error names the purpose of the call and the driver's code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from dsv4_router_runtime.artifacts.dispatch import device_arch
from dsv4_router_runtime.errors import (
    DriverError,
    DriverMissingError,
    DriverTooOldError,
    RouterError,
)

# Whether this process is a forked child of one that used CUDA: `bindings` refuses it.
forked = False

# The driver reports a failed kernel at a later call, and answers nothing else from then on.
_LOST = (
    *("ILLEGAL_ADDRESS", "LAUNCH_TIMEOUT", "ASSERT", "HARDWARE_STACK_ERROR", "ILLEGAL_INSTRUCTION"),
    *("MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE", "INVALID_PC", "LAUNCH_FAILED", "UNKNOWN"),
    *("ECC_UNCORRECTABLE", "NVLINK_UNCORRECTABLE", "CONTAINED", "TENSOR_MEMORY_LEAK"),
    "MPS_CLIENT_TERMINATED",
)
# The error after a kernel's trap, by the architecture and the driver.
_TRAPS = ("LAUNCH_FAILED", "ILLEGAL_INSTRUCTION")
_TRAP_ADVICE = (
    "; a kernel of this router traps so at once if its scratch was not zero (memory that was "
    "unmapped and mapped anew without reset()), or after waiting for other CTAs longer than "
    "launch.wait_limit_ms of its manifest"
)
_LOST_ADVICE = (
    "; an earlier kernel, of any library, may be to blame: the driver reports it at a later call; "
    "the GPU's context is lost: restart the process"
)
# The driver's errors if the context of a kernel or a stream is gone.
_RESET = ("CONTEXT_IS_DESTROYED", "DEINITIALIZED", "INVALID_CONTEXT", "INVALID_HANDLE")


class _MissingFunctionError(DriverTooOldError, AttributeError):
    """The bindings lack a name; hasattr and getattr treat it as an AttributeError."""


class _Bindings:
    """cuda.bindings.driver, whose functions raise DriverTooOldError if the driver lacks them.

    The first call that gets through puts the plain function here, so later ones cost no more.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        try:
            found = getattr(self._module, name)
        except AttributeError as error:
            raise _MissingFunctionError(
                f"the installed cuda-bindings have no {name}; update the package cuda-bindings"
            ) from error
        if name.startswith("cu") and callable(found):
            found = self._guarded(name, found)
        setattr(self, name, found)
        return found

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            try:
                results = function(*given)
            # The bindings' error for a function that the driver does not export.
            except RuntimeError as error:
                raise DriverTooOldError(
                    f"the CUDA driver has no {name} ({error}); update the NVIDIA driver"
                ) from error
            if vars(self).get(name) is call:
                setattr(self, name, function)
            return results

        return call


def refuse_forked_child() -> None:
    """Raise RouterError in a forked child; call it before a lock that may be held for ever there.

    Another thread may have held it at the fork.
    """
    if forked:
        raise RouterError(
            "this process was forked from one that had used CUDA, which CUDA does not support; "
            'start it with the method "spawn" (multiprocessing.set_start_method("spawn"))'
        )


@cache
def bindings() -> Any:
    """Return `cuda.bindings.driver`, initialised.

    DriverMissingError if there is no driver, RouterError in a forked child.
    """
    refuse_forked_child()
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
    if result == driver.CUresult.CUDA_ERROR_NOT_INITIALIZED:
        raise DriverMissingError(
            f"the CUDA driver does not start: {result.name}, as in a child forked from a process "
            'that had used CUDA; start such a process with the method "spawn"',
            code=result.name,
        )
    if result != driver.CUresult.CUDA_SUCCESS:
        raise DriverMissingError(
            f"the CUDA driver does not start: {result.name}; kernels need an NVIDIA GPU",
            code=result.name,
        )
    os.register_at_fork(after_in_child=_refuse_from_now_on)
    return _Bindings(driver)


def _refuse_from_now_on() -> None:
    global forked
    forked = True
    bindings.cache_clear()


def checked(doing: str, results: tuple[Any, ...]) -> Any:
    """Return the value (or tuple of values) of a successful call; DriverError if it failed."""
    code, *values = results
    if int(code) != 0:
        name = getattr(code, "name", str(code))
        answered = f"the CUDA driver answered {name}{_meaning(code)}"
        raise DriverError(f"{doing}: {answered}{_advice(name)}", code=name)
    return values[0] if len(values) == 1 else tuple(values)


def _meaning(code: Any) -> str:
    failed, text = bindings().cuGetErrorString(code)
    return f" ({text.decode()})" if int(failed) == 0 and text else ""


def _advice(name: str) -> str:
    """Return advice for an error that concerns the process, and more than the call that failed."""
    name = name.removeprefix("CUDA_ERROR_")
    if name in _RESET:
        return (
            "; its context is not the one that the kernels were loaded into: after "
            "cudaDeviceReset restart the process, else call on a stream of this GPU's own context"
        )
    if name not in _LOST:
        return ""
    return f"{_TRAP_ADVICE if name in _TRAPS else ''}{_LOST_ADVICE}"


def torch_error(error: Exception) -> DriverError:
    """Return the error of a driver call that torch made, as one of this package."""
    said = str(error).partition("\n")[0]
    known = bindings().CUresult
    # torch gives the runtime's code, which is the driver's for every error of both.
    code = getattr(error, "error_code", known.CUDA_ERROR_UNKNOWN)
    try:
        name = known(code).name
    except ValueError:
        name = str(code)
    return DriverError(f"torch's call of the CUDA driver: {said}{_advice(name)}", code=name)


def torch_stream(stream: int) -> int:
    """Return the handle by which the bindings take the stream that torch has as `stream`.

    With this variable they take 0 as the calling thread's own stream. torch's 0 is the null stream,
    CU_STREAM_LEGACY, which is one stream for all threads, and so has one slot of scratch.
    """
    return stream or int(bool(os.environ.get("CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM")))


@cache
def driver_version() -> int:
    """Return the driver's CUDA version as it counts: 12040 for 12.4."""
    return int(checked("reading the driver's version", bindings().cuDriverGetVersion()))


def check_driver(floor: int, what: str) -> None:
    """Raise DriverTooOldError if the driver's CUDA version is below `floor`, needed for `what`."""
    got = driver_version()
    if got < floor:
        raise DriverTooOldError(
            f"{what} needs an NVIDIA driver of CUDA {version_text(floor)} or later, this one is of "
            f"CUDA {version_text(got)}; update the driver"
        )


def version_text(number: int) -> str:
    """Write a version as the driver counts it: "12.4" for 12040."""
    return f"{number // 1000}.{number % 1000 // 10}"


def arch_of_device(index: int) -> str:
    """Return the architecture of GPU `index`, such as sm_90a."""
    major = device_attribute(index, "COMPUTE_CAPABILITY_MAJOR")
    return device_arch(major, device_attribute(index, "COMPUTE_CAPABILITY_MINOR"))


def device_attribute(index: int, name: str) -> int:
    """Return CU_DEVICE_ATTRIBUTE_<name> of GPU `index`."""
    driver = bindings()
    which = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    got = driver.cuDeviceGetAttribute(which, _device(index))
    return int(checked(f"reading {name} of GPU {index}", got))


def _device(index: int) -> Any:
    return checked(f"opening GPU {index}", bindings().cuDeviceGet(index))


@contextmanager
def primary_context(index: int) -> Iterator[None]:
    """Make GPU `index`'s primary context, the one torch uses, current; then the caller's again."""
    driver = bindings()
    context = _primary_context(index)
    checked("making the GPU's context current", driver.cuCtxPushCurrent(context))
    try:
        yield
    finally:
        popped = driver.cuCtxPopCurrent()
    checked("making the caller's context current again", popped)


@contextmanager
def context_kept() -> Iterator[None]:
    """Make the caller's context current again, which torch replaces with a device's primary one.

    A thread without a context keeps the one that torch made current in it.
    """
    before = current_context()
    try:
        yield
    finally:
        if before and current_context() != before:
            driver = bindings()
            restored = driver.cuCtxSetCurrent(driver.CUcontext(before))
            checked("making the caller's context current again", restored)


def in_a_context(
    index: int, results: tuple[Any, ...], call: Callable[[], tuple[Any, ...]]
) -> tuple[Any, ...]:
    """Return the results of a call; call again if they say that this thread has no context."""
    if results[0] == bindings().CUresult.CUDA_ERROR_INVALID_CONTEXT and not current_context():
        with primary_context(index):
            results = call()
    return results


def current_context() -> int:
    """Return the handle of the context that is current in this thread; 0 if there is none."""
    return int(checked("reading the current context", bindings().cuCtxGetCurrent()))


def is_primary_current(index: int) -> bool:
    """Return whether no other context than GPU `index`'s primary one is current in this thread."""
    # Written out, since every call on the null stream comes here.
    code, current = bindings().cuCtxGetCurrent()
    if code:
        checked("reading the current context", (code, current))
    handle = int(current)
    return handle == _primary_context(index) or handle == 0


def refuse_foreign_context(index: int) -> None:
    """Raise RouterError unless the current context is GPU `index`'s primary one or a green one.

    A thread without a context is not refused. The driver itself refuses a launch of a kernel in a
    context that it was not loaded into, but not torch's matrix product.
    """
    driver = bindings()
    # Written out, since every call with a matrix product comes here.
    code, current = driver.cuCtxGetCurrent()
    if not code and int(current) in (_primary_context(index), 0):
        return
    checked("reading the current context", (code, current))
    # The null stream's green context is that of the current context.
    green = driver.cuStreamGetGreenCtx(driver.CUstream(torch_stream(0)))
    device = checked("reading the current context's GPU", driver.cuCtxGetDevice())
    if int(green[0]) != 0 or not int(green[1]) or int(device) != int(_device(index)):
        raise RouterError(
            f"the context that is current in this thread is not the one of GPU {index} that torch "
            "and this router use (got a context of cuCtxCreate or of another GPU; allowed: the "
            "primary context, or a green context of the GPU); call cuCtxPopCurrent before"
        )


@cache
def _primary_context(index: int) -> int:
    retained = bindings().cuDevicePrimaryCtxRetain(_device(index))
    return int(checked(f"retaining GPU {index}'s context", retained))
