"""What a router call cannot go below without overlap: a launch, and one read of W_gate.

Triton's kernels where Triton is installed; torch's nearest operation, named as such, where not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .inputs import Inputs

# Elements (of 4 bytes) a block, and warps: which is fastest depends on the GPU and the size.
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


def empty_candidates(inputs: Inputs) -> Iterator[Candidate]:
    sink = torch.ones(1, dtype=torch.int32, device=inputs.bias.device)
    if triton_version() is None:
        yield Candidate(how="torch zero_ of one element", call=lambda _layer: sink.zero_())
        return
    from .triton_kernels import empty_kernel

    yield Candidate(how="Triton, empty", call=lambda _layer: empty_kernel[(1,)](sink))


def read_candidates(inputs: Inputs) -> Iterator[Candidate]:
    """Ways to stream a layer's weights; the fastest one is the floor."""
    flat = [weights.view(torch.int32).view(-1) for weights in inputs.weights]
    if triton_version() is None:
        yield Candidate(how="torch sum of int32", call=lambda layer: flat[layer].sum())
        return
    sink = torch.ones(1, dtype=torch.int32, device=inputs.bias.device)
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
