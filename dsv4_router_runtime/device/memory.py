"""Device memory from the driver: allocated, zeroed, read and freed without breaking any capture.

A server may unmap memory of torch's allocator (vLLM's sleep mode, SGLang's memory saver), and map
other pages in its place later. Memory whose content has to last is therefore the driver's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

from . import driver
from .capture import under_capture


@contextlib.contextmanager
def relaxed() -> Iterator[Any]:
    """Yield the driver's bindings; no call of this thread breaks a capture meanwhile.

    In a thread's usual mode an allocation invalidates a capture of this thread, and one of any
    other thread if that was begun in global mode.
    """
    cuda = driver.bindings()
    mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    exchange = cuda.cuThreadExchangeStreamCaptureMode
    before = driver.checked("relaxing the thread's capture mode", exchange(mode))
    try:
        yield cuda
    finally:
        restored = exchange(before)
    driver.checked("restoring the thread's capture mode", restored)


@contextlib.contextmanager
def relaxed_on(index: int) -> Iterator[Any]:
    """Yield the driver's bindings as `relaxed` does, with GPU `index`'s primary context current."""
    with driver.primary_context(index), relaxed() as cuda:
        yield cuda


class DeviceMemory:
    """`size` bytes on GPU `index` at `address`, freed with the last reference to this object.

    The memory is not freed while the current stream is captured (the next allocation does it then),
    by a forked child, or at the process's end.
    """

    def __init__(self, index: int, size: int) -> None:
        if not under_capture():
            _free_all()
        with relaxed_on(index) as cuda:
            doing = f"allocating {size} bytes on GPU {index}"
            self.address = int(driver.checked(doing, cuda.cuMemAlloc(size)))
        self.index = index
        self.size = size
        weakref.finalize(self, _release, index, self.address, os.getpid()).atexit = False
        _live[index, self.address] = size


# The bytes at each address of a GPU. Without a lock: a signal handler may ask within an allocation.
_live: dict[tuple[int, int], int] = {}
_to_free: deque[tuple[int, int]] = deque()


def allocated_bytes(index: int) -> int:
    """Return the bytes that this package holds on GPU `index`, beside torch's."""
    # A copy: to list the items allocates, so a collection may begin there, and may free memory.
    return sum(size for (on, _), size in _live.copy().items() if on == index)


def _release(index: int, address: int, process: int) -> None:
    """Free memory, now or later. Runs wherever Python drops the last reference: never raises."""
    if os.getpid() != process:
        return
    _live.pop((index, address), None)
    _to_free.append((index, address))
    # After a sticky error the driver frees nothing, and the process has to end.
    with contextlib.suppress(RuntimeError):
        if not under_capture():
            _free_all()


def _free_all() -> None:
    # Another thread may take the last one.
    with contextlib.suppress(IndexError):
        while True:
            index, address = _to_free.popleft()
            with relaxed_on(index) as cuda:
                cuda.cuMemFree(address)


def zero(index: int, *ranges: tuple[int, int]) -> None:
    """Zero ranges (address, bytes) of GPU `index`, and wait for that alone."""
    with _own_stream(index) as (cuda, stream):
        for address, size in ranges:
            doing = f"zeroing {size} bytes on GPU {index}"
            driver.checked(doing, cuda.cuMemsetD8Async(address, 0, size, stream))


def read(index: int, address: int, size: int) -> bytes:
    """Read `size` bytes at `address` of GPU `index`; the caller has waited for their writers."""
    content = ctypes.create_string_buffer(size)
    with _own_stream(index) as (cuda, stream):
        doing = f"reading {size} bytes of GPU {index}"
        copy = cuda.cuMemcpyDtoHAsync(ctypes.addressof(content), address, size, stream)
        driver.checked(doing, copy)
    return content.raw


def write(index: int, address: int, content: bytes) -> None:
    """Write bytes at `address` of GPU `index`, complete on return."""
    size = len(content)
    source = ctypes.create_string_buffer(content, size)
    with _own_stream(index) as (cuda, stream):
        doing = f"writing {size} bytes of GPU {index}"
        copy = cuda.cuMemcpyHtoDAsync(address, ctypes.addressof(source), size, stream)
        driver.checked(doing, copy)


@contextlib.contextmanager
def _own_stream(index: int) -> Iterator[tuple[Any, Any]]:
    """Yield the bindings and a stream that no capture joins; wait for it at the end."""
    with relaxed_on(index) as cuda:
        flag = cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = driver.checked("making a stream", cuda.cuStreamCreate(flag))
        try:
            yield cuda, stream
            driver.checked("waiting for a stream", cuda.cuStreamSynchronize(stream))
        finally:
            destroyed = cuda.cuStreamDestroy(stream)
        driver.checked("destroying a stream", destroyed)


def wait_for_device(index: int) -> None:
    """Wait for all work on GPU `index`. The driver refuses it, and ends captures under way."""
    with relaxed_on(index) as cuda:
        driver.checked(f"waiting for GPU {index}", cuda.cuCtxSynchronize())
