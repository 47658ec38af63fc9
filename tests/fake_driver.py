"""A CUDA driver in host memory: what device/memory, graph_life, workspace and streams call of it.

It is strict where a real one is: an allocation in a thread that is not relaxed ends a capture, a
memset has to lie within one allocation, and freed memory is neither written nor freed again.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from functools import partial
from types import SimpleNamespace

GLOBAL, RELAXED = 0, 2
NOT_READY, CAPTURE_UNSUPPORTED, OUT_OF_MEMORY = 600, 900, 2


class FakeDriver:
    CUresult = SimpleNamespace(CUDA_ERROR_INVALID_CONTEXT=201)
    CUstreamCaptureMode = SimpleNamespace(
        CU_STREAM_CAPTURE_MODE_GLOBAL=GLOBAL, CU_STREAM_CAPTURE_MODE_RELAXED=RELAXED
    )
    CUstreamCaptureStatus = SimpleNamespace(CU_STREAM_CAPTURE_STATUS_ACTIVE=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUuserObject_flags = SimpleNamespace(CU_USER_OBJECT_NO_DESTRUCTOR_SYNC=1)
    CUuserObjectRetain_flags = SimpleNamespace(CU_GRAPH_USER_OBJECT_MOVE=1)
    CUhostFn = staticmethod(ctypes.CFUNCTYPE(None, ctypes.c_void_p))

    def __init__(self, gpu) -> None:
        self.gpu = gpu
        self.memory: dict[int, ctypes.Array] = {}
        self.freed: dict[int, ctypes.Array] = {}
        # A thread of someone else's captures in global mode.
        self.captured_elsewhere = False
        self.broken_captures = 0
        self.memsets = 0
        self.waits = 0
        self.full = False
        # Stream handle -> id; `reuse` gives a handle to another stream.
        self.ids: dict[int, int] = {}
        self.busy: set[int] = set()
        # What a stream does once somebody waits for it.
        self.pending: dict[int, list] = {}
        self.events: dict[int, int | None] = {}
        self.objects: dict[int, tuple] = {}
        self.retained: dict[int, list[int]] = {}
        self._numbers = itertools.count(1000)
        self._thread = threading.local()

    # -------------------------------------------------------------- what tests do

    def reuse(self, handle: int) -> None:
        """Destroy the stream of a handle and make another with the same one."""
        self.ids[handle] = next(self._numbers)

    def destroy_graph(self, capture: int) -> None:
        """Destroy the graph of a capture, and call its user objects' destructors."""
        for user_object in self.retained.pop(capture):
            self.cuUserObjectRelease(user_object, 1)

    # -------------------------------------------------------------- the driver

    def cuGetErrorString(self, code):
        return 0, b"said the fake driver"

    def cuCtxPushCurrent(self, context):
        self._contexts().append(context)
        return (0,)

    def cuCtxPopCurrent(self):
        return 0, self._contexts().pop()

    def cuThreadExchangeStreamCaptureMode(self, mode):
        before = getattr(self._thread, "mode", GLOBAL)
        self._thread.mode = mode
        return 0, before

    def cuMemAlloc(self, size):
        if code := self._unsafe():
            return (code, 0)
        if self.full:
            return (OUT_OF_MEMORY, 0)
        buffer = (ctypes.c_uint8 * size)()
        ctypes.memset(buffer, 0x7F, size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cuMemFree(self, address):
        if code := self._unsafe():
            return (code,)
        # What a test before left over is freed by another driver.
        if address in self.memory:
            self.freed[address] = self.memory.pop(address)
        else:
            assert address not in self.freed, "freed twice"
        return (0,)

    def cuStreamCreate(self, flags):
        assert flags == 1
        return self._unsafe(), next(self._numbers)

    def cuStreamSynchronize(self, stream):
        if code := self._unsafe():
            return (code,)
        for work in self.pending.pop(stream, ()):
            work()
        return (0,)

    def cuStreamDestroy(self, stream):
        self.pending.pop(stream, None)
        return (0,)

    def cuMemsetD8Async(self, address, value, size, stream):
        self._check_inside(address, size)
        self._later(stream, ctypes.memset, address, value, size)
        # Only a stream of the driver's own is outside every capture.
        self.memsets += stream < 1000
        return (0,)

    def cuMemcpyDtoHAsync(self, target, address, size, stream):
        self._check_inside(address, size)
        self._later(stream, ctypes.memmove, target, address, size)
        return (0,)

    def cuCtxSynchronize(self):
        self.waits += 1
        self.broken_captures += self.gpu.capture != 0
        return (0,)

    def cuStreamGetId(self, stream):
        # CU_STREAM_PER_THREAD stands for another stream in each thread.
        key = (stream, threading.get_ident() if stream == 2 else 0)
        return 0, self.ids.setdefault(key if stream == 2 else stream, next(self._numbers))

    def cuStreamGetCtx(self, stream):
        return 0, "context"

    def cuStreamGetCaptureInfo(self, stream):
        return 0, int(self.gpu.capture != 0), self.gpu.capture, self.gpu.capture, (), (), 0

    def cuUserObjectCreate(self, pointer, destroy, count, flags):
        number = next(self._numbers)
        self.objects[number] = (pointer, destroy)
        return 0, number

    def cuUserObjectRelease(self, user_object, count):
        pointer, destroy = self.objects.pop(user_object)
        destroy(pointer)
        return (0,)

    def cuGraphRetainUserObject(self, graph, user_object, count, flags):
        self.retained.setdefault(graph, []).append(user_object)
        return (0,)

    def cuEventCreate(self, flags):
        event = next(self._numbers)
        self.events[event] = None
        return 0, event

    def cuEventRecord(self, event, stream):
        self.events[event] = stream
        return (0,)

    def cuEventQuery(self, event):
        return (NOT_READY if self.events[event] in self.busy else 0,)

    def cuEventDestroy(self, event):
        del self.events[event]
        return (0,)

    def _later(self, stream: int, *work) -> None:
        self.pending.setdefault(stream, []).append(partial(*work))

    def _contexts(self) -> list:
        self._thread.__dict__.setdefault("contexts", [])
        return self._thread.contexts

    def _unsafe(self) -> int:
        """Return the code of a call that conflicts with a capture, and needs a context."""
        assert self._contexts(), "no context is current"
        captured = self.gpu.capture or self.captured_elsewhere
        if captured and getattr(self._thread, "mode", GLOBAL) != RELAXED:
            self.broken_captures += 1
            return CAPTURE_UNSUPPORTED
        return 0

    def _check_inside(self, address: int, size: int) -> None:
        assert any(
            start <= address and address + size <= start + len(buffer)
            for start, buffer in self.memory.items()
        ), "outside every allocation"
