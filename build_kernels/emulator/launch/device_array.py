"""Arrays in global memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.findings import LaunchError


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceArray:
    """A global-memory allocation, passed by pointer or under a tensor map.

    data: contents before the launch (copied; bfloat16 as uint16). read_only: a store is a
    finding. initialised: False makes every byte poison. dependent: the grid before this one
    writes it, so the kernel must griddepcontrol.wait before it touches the array.
    minimum_bytes: the least size that the kernel accepts; a smaller array is refused.
    """

    name: str
    data: NDArray[Any]
    read_only: bool = False
    initialised: bool = True
    dependent: bool = False
    minimum_bytes: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.data, np.ndarray) or self.data.nbytes == 0:
            raise LaunchError(f"array {self.name!r}: data must be a NumPy array that is not empty")
        if not self.data.flags.c_contiguous:
            raise LaunchError(f"array {self.name!r}: data must be contiguous; copy it first")
        if self.data.nbytes < self.minimum_bytes:
            raise LaunchError(
                f"array {self.name!r}: the kernel needs {self.minimum_bytes} bytes "
                f"(got {self.data.nbytes})"
            )
