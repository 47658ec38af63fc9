"""CUDA streams as torch hands them out: which one is current, captured, or waited for."""

from __future__ import annotations

from collections.abc import Callable

import torch

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
