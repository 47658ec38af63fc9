"""Tears: contents of an array that change in the middle of a launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from build_kernels.emulator.findings import LaunchError
from build_kernels.emulator.launch.device_array import DeviceArray


@dataclass(frozen=True, kw_only=True)
class Tear:
    """Elements of an array that another value replaces from load number `load` on.

    Loads of the array are counted from 0 over the whole launch, in the order of the schedule; an
    instruction of a warp, or a bulk copy, is one load. `Result.loads` says how many there were: the
    loop over `load` in 1 .. loads - 1 lets one CTA read the old value and another the new one, at
    every place where that can happen. changes: flat index of an element -> its new value.
    """

    array: str
    load: int
    changes: Mapping[int, int | float]

    def patches(self, arrays: Mapping[str, DeviceArray]) -> list[tuple[int, bytes]]:
        """Return (byte offset, bytes) of each change; LaunchError if the array has no room."""
        if self.array not in arrays:
            raise LaunchError(f"a tear of {self.array!r}: the arrays are {', '.join(arrays)}")
        if self.load < 0:
            raise LaunchError(f"a tear of {self.array!r}: load must be >= 0 (got {self.load})")
        data = arrays[self.array].data
        patches = []
        for index, value in self.changes.items():
            if not 0 <= index < data.size:
                raise LaunchError(
                    f"a tear of {self.array!r}: expected an element of 0..{data.size - 1} "
                    f"(got {index})"
                )
            try:
                new = np.array([value], data.dtype).tobytes()
            except OverflowError:
                problem = f"{value} does not fit {data.dtype}"
                raise LaunchError(f"a tear of {self.array!r}: {problem}") from None
            patches.append((index * data.itemsize, new))
        return patches
