"""CUDA streams as torch hands them out: which one is current, captured, or waited for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dsv4_router_runtime.errors import RouterError

from . import driver


def _current_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# Every call asks both, so without a layer of Python around each: a Stream object takes 1 us.
# The handle of torch's current stream on a GPU.
current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", _current_stream
)
# Whether the current stream is being captured into a CUDA graph.
is_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)


CALL_OUTSIDE = "call it before the capture begins, or after its end"
BIND_BEFORE = (
    "make the Router, or call dense_router_dispatch once with these weights, before the capture "
    "begins"
)


def refuse_under_capture(what: str, next_step: str = BIND_BEFORE) -> None:
    """Raise RouterError if the current stream is being captured; `what`: why that matters."""
    if is_capturing():
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


def stream_id(index: int, stream: int) -> int:
    """Return the id of a living stream of GPU `index`, unique per process.

    A handle is used again once free. Those of the null stream and of the per-thread stream stand
    for another stream in each context, and in each thread.
    """
    ask = partial(driver.bindings().cuStreamGetId, stream)
    return int(driver.checked("asking for the stream's id", driver.in_a_context(index, ask(), ask)))


def is_lasting(index: int, stream: int) -> bool:
    """Return whether the current stream of GPU `index`, `stream`, is one of torch's own.

    torch destroys none of these, so a handle stands for one of them for good. A foreign stream has
    its handle as its id in torch (torch.cuda.ExternalStream); the per-thread stream is foreign too,
    and so is the null stream of another context than the GPU's primary one.
    """
    if stream == 0:
        return driver.is_primary_current(index)
    return torch.cuda.current_stream(index).stream_id != stream


def wait_for_current_stream(device: torch.device) -> None:
    """Wait until the current stream's work is done, so that other streams may use its results."""
    torch.cuda.current_stream(device).synchronize()
