"""Where module and kernel variables live."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from build_kernels.emulator.findings import LaunchError
from build_kernels.emulator.launch.launch import Launch
from build_kernels.emulator.memory.memory import SHARED_CAPACITY, SHARED_RESERVED, Memory
from build_kernels.emulator.ptx.syntax import Kernel

if TYPE_CHECKING:
    from build_kernels.emulator.execution.machine import Machine


def place_variables(machine: Machine, kernel: Kernel, launch: Launch) -> dict[str, dict[str, int]]:
    """Lay out shared, local and global variables.

    Returns {"shared": offsets, "address": addresses}; LaunchError when shared memory is short.
    """
    shared: dict[str, int] = {}
    addresses: dict[str, int] = {}
    end = SHARED_RESERVED
    for variable in kernel.variables:
        if variable.space == "shared" and variable.size is not None:
            end = -(-end // variable.align) * variable.align
            shared[variable.name] = end
            end += variable.size
        elif variable.space == "local":
            at = -(-machine.local_bytes // variable.align) * variable.align
            addresses[variable.name] = at
            machine.local_bytes = at + (variable.size or 0)
        elif variable.space in ("global", "const"):
            size = variable.size or 0
            initial = np.frombuffer((variable.initial or b"").ljust(size, b"\0"), dtype=np.uint8)
            memory = Memory(
                variable.name, size, initial=initial, read_only=variable.space == "const"
            )
            machine.memory.place(memory, variable.align)
            addresses[variable.name] = memory.base
    dynamic = [v for v in kernel.variables if v.space == "shared" and v.size is None]
    if dynamic:
        align = max(v.align for v in dynamic)
        end = -(-end // align) * align
        for variable in dynamic:
            shared[variable.name] = end
    end += launch.dynamic_shared_bytes
    if end > SHARED_CAPACITY:
        raise LaunchError(
            f"the kernel needs {end - SHARED_RESERVED} bytes of shared memory, an SM has "
            f"{SHARED_CAPACITY - SHARED_RESERVED} for a CTA"
        )
    machine.shared_end = end
    return {"shared": shared, "address": addresses}
