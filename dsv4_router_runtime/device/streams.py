"""CUDA streams as torch hands them out: which one is current, captured, or waited for."""

from __future__ import annotations

import threading

import torch

from dsv4_router_runtime.errors import RouterError

from . import driver

# CU_STREAM_PER_THREAD: one handle that is a different stream in each thread.
PER_THREAD_STREAM = 2

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(index: int) -> int:
    """Return the handle of torch's current stream on GPU `index`."""
    # The public way builds a Stream object, about 1 us of an 8 us budget.
    if _raw_stream is not None:
        return int(_raw_stream(index))
    return int(torch.cuda.current_stream(index).cuda_stream)


def is_capturing() -> bool:
    """Return whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


def refuse_under_capture(what: str) -> None:
    """Raise RouterError if the current stream is being captured; `what` is what would be done."""
    if is_capturing():
        raise RouterError(
            f"the current stream is being captured and {what}; make the Router, or call "
            "dense_router_dispatch once with these weights, before the capture begins"
        )


def capture_id(stream: int) -> int:
    """Return the id of the capture that `stream` takes part in, unique per process; 0 if none."""
    cuda = driver.bindings()
    # Bindings of CUDA 12 keep the form that returns programmatic edges under a name of its own; the
    # plain one fails (LOSSY_QUERY) after a launch with pdl.
    ask = getattr(cuda, "cuStreamGetCaptureInfo_v3", None) or cuda.cuStreamGetCaptureInfo
    status, identifier, *_ = driver.checked("asking for the stream's capture", ask(stream))
    active = cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
    return int(identifier) if status == active else 0


def stream_identity(stream: int) -> int:
    """Return a key that no two streams share: the handle, or one per thread if it is per-thread."""
    return stream if stream != PER_THREAD_STREAM else -threading.get_ident()


def wait_for_current_stream(device: torch.device) -> None:
    """Wait until the current stream's work is done, so that other streams may use its results."""
    torch.cuda.current_stream(device).synchronize()
