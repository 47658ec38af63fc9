"""Captures of streams: whether one is under way, and which one. No torch is imported for it."""

from __future__ import annotations

import itertools
import sys
import threading
from functools import partial
from typing import Any

from dsv4_router_runtime.errors import RouterError

from . import driver

CALL_OUTSIDE = "call it before the capture begins, or after its end"
BIND_BEFORE = (
    "make the Router, or call dense_router_dispatch once with these weights, before the capture "
    "begins"
)


def under_capture() -> bool:
    """Return whether torch's current stream is being captured: never, before torch uses a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    from . import streams

    return streams.is_capturing()


def refuse_under_capture(what: str, next_step: str = BIND_BEFORE) -> None:
    """Raise RouterError if torch's current stream is being captured; `what`: why that matters."""
    if under_capture():
        raise RouterError(f"the current stream is being captured and {what}; {next_step}")


def capture_of(stream: int) -> tuple[int, Any]:
    """Return the capture that `stream` takes part in: its id, unique per process, and its graph."""
    cuda = driver.bindings()
    # Bindings of CUDA 12 keep the form that returns programmatic edges under a name of its own; the
    # plain one fails (LOSSY_QUERY) after a launch with pdl.
    ask = getattr(cuda, "cuStreamGetCaptureInfo_v3", None) or cuda.cuStreamGetCaptureInfo
    status, identifier, graph, *_ = driver.checked("asking for the stream's capture", ask(stream))
    if status != cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE:
        raise RouterError(
            f"the current stream's capture has been invalidated (status {status}) by an earlier "
            "call; end it and capture again"
        )
    return int(identifier), graph


class _Thread(threading.local):
    """A number of the thread; its identifier is given out again once it has ended."""

    def __init__(self) -> None:
        self.number = next(_thread_numbers)


_thread_numbers = itertools.count()
this_thread = _Thread()


def stream_id(index: int, stream: int) -> int:
    """Return the id of a living stream of GPU `index`, unique per process.

    A handle is used again once free. Those of the null stream and of the per-thread stream stand
    for another stream in each context, and in each thread.
    """
    ask = partial(driver.bindings().cuStreamGetId, driver.torch_stream(stream))
    return int(driver.checked("asking for the stream's id", driver.in_a_context(index, ask(), ask)))
