"""Time the floors of a router call without overlap: one launch, and one read of W_gate.

Triton's kernels if Triton can launch them on the inputs' device. If it cannot, torch's nearest
operation, whose name in the report gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .inputs import Inputs
from .report import in_a_line

# Elements (of 4 bytes) per block, and warps: which is fastest depends on the GPU and the size.
READ_BLOCKS = (2048, 4096, 8192, 16384)
READ_WARPS = (4, 8)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a floor. `call` takes the layer's number."""

    how: str
    call: Callable[[int], Any]


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def why_no_triton(device: torch.device) -> str | None:
    """Return why Triton cannot launch a kernel on tensors of `device`; None if it can."""
    if device.type != "cuda":
        return f"Triton takes CUDA tensors, these are on {device}"
    try:
        from triton.runtime import driver
    except ImportError as error:
        return f"no Triton: {error}"
    try:
        driver.active.get_current_target()
    # Besides RuntimeError without a GPU: a compiler that Triton's driver needs may be missing.
    except Exception as error:
        return f"Triton has no active driver: {in_a_line(error)}"
    return None


def empty_candidates(inputs: Inputs) -> Iterator[Candidate]:
    """Yield the ways to launch a kernel that does nothing."""
    sink = torch.ones(1, dtype=torch.int32, device=inputs.bias.device)
    if reason := why_no_triton(sink.device):
        how = f"torch zero_ of one element ({reason})"
        yield Candidate(how=how, call=lambda _layer: sink.zero_())
        return
    from .triton_kernels import empty_kernel

    yield Candidate(how="Triton, empty", call=lambda _layer: empty_kernel[(1,)](sink))


def read_candidates(inputs: Inputs) -> Iterator[Candidate]:
    """Yield the ways to stream a layer's weights; the fastest one is the floor."""
    flat = [weights.view(torch.int32).view(-1) for weights in inputs.weights]
    sink = torch.ones(1, dtype=torch.int32, device=inputs.bias.device)
    if reason := why_no_triton(sink.device):
        how = f"torch sum of int32 ({reason})"
        yield Candidate(how=how, call=lambda layer: flat[layer].sum())
        return
    for block in READ_BLOCKS:
        for warps in READ_WARPS:
            yield Candidate(
                how=f"Triton, blocks of {block * 4 // 1024} KB, {warps} warps",
                call=_reader(flat, sink, block, warps),
            )


def _reader(
    flat: list[torch.Tensor], sink: torch.Tensor, block: int, warps: int
) -> Callable[[int], Any]:
    from .triton_kernels import read_kernel

    size = flat[0].numel()
    grid = (-(-size // block),)
    return lambda layer: read_kernel[grid](flat[layer], sink, size, BLOCK=block, num_warps=warps)
