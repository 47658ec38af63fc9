"""Addresses of module and kernel variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from build_kernels.binaries.ptx.syntax import Kernel
from build_kernels.emulator.findings import LaunchError
from build_kernels.emulator.memory.memory import GlobalMemory, Memory
from build_kernels.emulator.memory.windows import SHARED_CAPACITY, SHARED_RESERVED


@dataclass(frozen=True, kw_only=True)
class VariableLayout:
    """Offsets of shared variables and addresses of the others, by name.

    shared_end: the end of a CTA's shared memory. local_bytes: per thread. memory: global memory
    with the module's variables placed.
    """

    shared: Mapping[str, int]
    addresses: Mapping[str, int]
    shared_end: int
    local_bytes: int
    memory: GlobalMemory


def place_variables(kernel: Kernel, dynamic_shared_bytes: int) -> VariableLayout:
    """Lay out shared, local and global variables; LaunchError if shared memory is short."""
    shared: dict[str, int] = {}
    addresses: dict[str, int] = {}
    memory = GlobalMemory()
    end, local_bytes = SHARED_RESERVED, 0
    dynamic = [v for v in kernel.variables if v.size is None]
    for variable in kernel.variables:
        name, size = variable.name, variable.size or 0
        if variable.space in ("global", "const"):
            initial = np.frombuffer((variable.initial or b"").ljust(size, b"\0"), dtype=np.uint8)
            placed = Memory(name, size, initial=initial, read_only=variable.space == "const")
            memory.place(placed, variable.align)
            addresses[name] = placed.base
        elif variable.space == "local":
            addresses[name] = _aligned(local_bytes, variable.align)
            local_bytes = addresses[name] + size
        elif variable.size is not None:
            shared[name] = _aligned(end, variable.align)
            end = shared[name] + size
    end = _aligned(end, max((v.align for v in dynamic), default=1))
    shared |= {variable.name: end for variable in dynamic}
    end += dynamic_shared_bytes
    if end > SHARED_CAPACITY:
        raise LaunchError(
            f"the kernel needs {end - SHARED_RESERVED} bytes of shared memory, an SM has "
            f"{SHARED_CAPACITY - SHARED_RESERVED} for a CTA"
        )
    return VariableLayout(
        shared=shared, addresses=addresses, shared_end=end, local_bytes=local_bytes, memory=memory
    )


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
