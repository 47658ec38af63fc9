"""Tears: contents of arrays that change in the middle of a launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from build_kernels.emulator.findings import LaunchError
from build_kernels.emulator.lanes import Ints
from build_kernels.emulator.launch.device_array import DeviceArray
from build_kernels.emulator.memory.memory import Memory

# Array name -> flat index of an element -> its new value.
Tear = Mapping[str, Mapping[int, int | float]]
# Called before each load of an array, with its name and the offsets of the bytes: the tear to make
# there. A load is one instruction of a warp, or one bulk copy.
OnLoad = Callable[[str, Ints], Tear]


def tear_arrays(arrays: Mapping[DeviceArray, Memory], tear: Tear) -> None:
    """Give elements new values, by no thread; LaunchError if an array has no room for one."""
    named = {array.name: array for array in arrays}
    for name, changes in tear.items():
        if name not in named:
            raise LaunchError(f"a tear of {name!r}: the arrays are {', '.join(named)}")
        dtype = named[name].data.dtype
        elements = arrays[named[name]].data.view(dtype)
        for index, value in changes.items():
            if not 0 <= index < elements.size:
                raise LaunchError(
                    f"a tear of {name!r}: expected an element of 0..{elements.size - 1} "
                    f"(got {index})"
                )
            try:
                elements[index] = value
            except OverflowError:
                raise LaunchError(f"a tear of {name!r}: {value} does not fit {dtype}") from None
