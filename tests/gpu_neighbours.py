"""Kernels beside the router's: one that rewrites its inputs, one that occupies SMs.

Each ends when it is told to, and after a bound of its own, so that no test leaves a GPU busy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from cuda.bindings import driver as cuda

from dsv4_router_runtime.device import workspace

# A spinner takes a whole SM: no second CTA of it, and none of the router's, fits beside it.
SPINNER_SHARED_BYTES = 200 * 1024
BOUND_SECONDS = 120

# A word is 4 bytes of a mask, the count, or a token id; `values` are stored to each in turn.
SOURCE = r"""
__device__ unsigned long long now() {
    unsigned long long ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
}

extern "C" __global__ void rewrite(volatile unsigned* words, int num_words,
                                   const unsigned* values, int num_values,
                                   volatile int* stop, int bound_seconds) {
    unsigned long long end = now() + bound_seconds * 1000000000ull;
    for (unsigned turn = 0; !*stop && now() < end; ++turn)
        for (int i = 0; i < 64; ++i)
            for (int word = threadIdx.x; word < num_words; word += blockDim.x)
                words[word] = values[(turn * 64 + i) % num_values];
}

extern "C" __global__ void spin(volatile int* stop, int bound_seconds) {
    unsigned long long end = now() + bound_seconds * 1000000000ull;
    while (!*stop && now() < end) __nanosleep(1000);
}

// Never waits for the grid before it, and lets the next one start at once.
extern "C" __global__ void never_waits(unsigned* out, int microseconds) {
    asm volatile("griddepcontrol.launch_dependents;");
    unsigned long long end = now() + microseconds * 1000ull;
    while (now() < end) {}
    if (threadIdx.x == 0) *out += 1;
}
"""


def compiled(name: str):
    """Return one kernel of SOURCE, compiled and loaded for the current device."""
    return _compiled(name, torch.cuda.current_device())


@cache
def _compiled(name: str, device: int):
    return torch.cuda._compile_kernel(SOURCE, name)


def stop_flag() -> torch.Tensor:
    """Return a word of pinned host memory, which a kernel reads while the host writes it."""
    return torch.zeros(1, dtype=torch.int32).pin_memory()


@contextmanager
def rewriting(tensor: torch.Tensor, values: Sequence[int]) -> Iterator[None]:
    """Store `values` to every 4-byte word of `tensor` in turn, by a kernel on another stream."""
    words = tensor.view(torch.int32)
    stop, stream = stop_flag(), torch.cuda.Stream()
    bits = torch.tensor(values, dtype=torch.int64).to(torch.int32).cuda()
    torch.cuda.synchronize()
    compiled("rewrite")(
        (1, 1, 1),
        (32, 1, 1),
        [words, words.numel(), bits, len(values), stop, BOUND_SECONDS],
        stream=stream,
    )
    try:
        yield
        assert not stream.query(), f"the kernel that rewrites ended after {BOUND_SECONDS} s"
    finally:
        stop[0] = 1
        stream.synchronize()


@contextmanager
def spinning(num_sms: int) -> Iterator[torch.Tensor]:
    """Occupy SMs by a kernel on another stream; yields the word that ends it when it is set."""
    stop, stream = stop_flag(), torch.cuda.Stream()
    kernel = compiled("spin")
    kernel.set_shared_memory_config(SPINNER_SHARED_BYTES)
    if num_sms:
        kernel(
            (num_sms, 1, 1),
            (32, 1, 1),
            [stop, BOUND_SECONDS],
            shared_mem=SPINNER_SHARED_BYTES,
            stream=stream,
        )
    try:
        yield stop
    finally:
        stop[0] = 1
        stream.synchronize()


def launch_that_never_waits(out: torch.Tensor, microseconds: int) -> None:
    """Launch `never_waits` as a programmatic dependent of the kernel before, on this stream."""
    attribute = cuda.CUlaunchAttribute()
    attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = cuda.CUlaunchConfig()
    config.gridDimX = config.gridDimY = config.gridDimZ = 1
    config.blockDimX, config.blockDimY, config.blockDimZ = 32, 1, 1
    config.hStream = cuda.CUstream(torch.cuda.current_stream().cuda_stream)
    config.attrs, config.numAttrs = [attribute], 1
    function = cuda.CUfunction(compiled("never_waits").func.value)
    values = ((out.data_ptr(), microseconds), (ctypes.c_void_p, ctypes.c_int))
    (code,) = cuda.cuLaunchKernelEx(config, function, values, 0)
    assert code == cuda.CUresult.CUDA_SUCCESS, code


def poison(byte: int) -> None:
    """Write a byte to all zeroed scratch of the current GPU, as remapped memory may hold it."""
    torch.cuda.synchronize()
    for space in workspace.workspaces_on(torch.cuda.current_device()):
        for chunk in space.pools[True].chunks:
            (code,) = cuda.cuMemsetD8(chunk.address, byte, chunk.size)
            assert code == cuda.CUresult.CUDA_SUCCESS, code
    torch.cuda.synchronize()
