"""Tears: contents of arrays that change in the middle of a launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from build_kernels.emulator.findings import LaunchError
from build_kernels.emulator.lanes import Ints
from build_kernels.emulator.launch.device_array import DeviceArray
from build_kernels.emulator.memory.memory import Memory

# Array name -> flat index of an element -> its new value.
Tear = Mapping[str, Mapping[int, int | float]]
# Returns False if it is shown that the launch is the same whether this load reads old contents or
# new ones, as long as every other load of a torn element is the same.
Depends = Callable[[Tear], bool]
# Called before each load of an array, with its name, the offsets of the bytes, and a look ahead:
# the tear to make there. A load is one instruction of a warp, or one bulk copy.
OnLoad = Callable[[str, Ints, Depends], Tear]


def tear_arrays(arrays: Mapping[DeviceArray, Memory], tear: Tear) -> None:
    """Give elements new values, by no thread; LaunchError if an array has no room for one."""
    named = {array.name: array for array in arrays}
    for name, changes in tear.items():
        if name not in named:
            raise LaunchError(f"a tear of {name!r}: the arrays are {', '.join(named)}")
        change(name, arrays[named[name]].data.view(named[name].data.dtype), changes)


def change(name: str, elements: NDArray[Any], changes: Mapping[int, int | float]) -> None:
    """Give elements of an array new values; LaunchError if it has no room for one."""
    for index, value in changes.items():
        if not 0 <= index < elements.size:
            raise LaunchError(
                f"a tear of {name!r}: expected an element of 0..{elements.size - 1} (got {index})"
            )
        try:
            elements[index] = value
        except OverflowError:
            raise LaunchError(
                f"a tear of {name!r}: {value} does not fit {elements.dtype}"
            ) from None
