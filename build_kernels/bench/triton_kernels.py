"""Triton kernels of floors and chains. Importing this needs Triton, so it is imported late."""

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


@triton.jit
def rms_norm_kernel(residual, weight, out, k, epsilon, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Norm a row per CTA. PDL: dependents start under the loads and the sum, not before the wait.

    A trigger before the wait would let a router start under the router of the layer before.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * k
    scale = tl.load(weight + at, mask=at < k, other=0).to(tl.float32)
    values = tl.load(residual + row + at, mask=at < k, other=0).to(tl.float32)
    rms = tl.sqrt(tl.sum(values * values, 0) / k + epsilon)
    tl.store(out + row + at, (values / rms * scale).to(out.dtype.element_ty), mask=at < k)


@triton.jit
def take_ids_kernel(ids, taken, size, BLOCK: tl.constexpr):
    """Move `size` ids once the grid before has ended; -1 stays, so that no id is taken twice."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(taken + at, tl.load(ids + at, mask=at < size), mask=at < size)
    tl.store(ids + at, -1, mask=at < size)
