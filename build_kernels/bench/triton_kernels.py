"""Triton kernels of the floors. Importing this needs Triton, so only `floors` does, and late."""

import triton
import triton.language as tl


@triton.jit
def empty_kernel(sink):
    """Do nothing: the time of a launch."""


@triton.jit
def read_kernel(source, sink, size, BLOCK: tl.constexpr):
    """Read `size` int32 elements of `source` once; the store keeps the loads alive."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(source + offsets, mask=offsets < size, other=0), 0)
    if total == 0x5EED5EE:
        tl.store(sink, total)
