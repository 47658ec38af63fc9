"""A stream of this process's own: launched on, captured and replayed by the driver alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from . import driver


class OwnStream:
    """A stream of the current context, whether or not torch is in the process.

    handle: the driver's. is_capturing: whether it is being captured into a graph.
    """

    def __init__(self, stream: Any) -> None:
        self.handle = int(stream)
        self.is_capturing = False
        self._stream = stream

    def wait(self) -> None:
        """Wait for all work on the stream."""
        waited = driver.bindings().cuStreamSynchronize(self._stream)
        driver.checked("waiting for a stream", waited)

    def replay(self, calls: Callable[[], None]) -> None:
        """Capture calls into a CUDA graph, replay it once, and wait."""
        cuda = driver.bindings()
        with _destroyed(cuda.cuGraphDestroy, self._capture(calls)) as graph:
            made = driver.checked("making a graph executable", cuda.cuGraphInstantiate(graph, 0))
            with _destroyed(cuda.cuGraphExecDestroy, made) as executable:
                launched = cuda.cuGraphLaunch(executable, self._stream)
                driver.checked("launching a graph", launched)
                self.wait()

    def _capture(self, calls: Callable[[], None]) -> Any:
        cuda = driver.bindings()
        # As torch captures: a call that is unsafe then ends the capture.
        mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        driver.checked("beginning a capture", cuda.cuStreamBeginCapture(self._stream, mode))
        self.is_capturing = True
        try:
            calls()
        finally:
            self.is_capturing = False
            ended = cuda.cuStreamEndCapture(self._stream)
        return driver.checked("ending a capture", ended)


@contextlib.contextmanager
def own_stream(index: int) -> Iterator[OwnStream]:
    """Make GPU `index`'s primary context current, and yield a stream of it that ends with it."""
    with driver.primary_context(index):
        cuda = driver.bindings()
        flag = cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        made = driver.checked("making a stream", cuda.cuStreamCreate(flag))
        with _destroyed(cuda.cuStreamDestroy, made) as stream:
            yield OwnStream(stream)


@contextlib.contextmanager
def _destroyed(destroy: Callable[[Any], tuple[Any, ...]], made: Any) -> Iterator[Any]:
    """Yield an object of the driver's and destroy it; the first error is the one that is raised."""
    try:
        yield made
    finally:
        destroyed = destroy(made)
    driver.checked("destroying what the driver made", destroyed)
