"""A kernel's arguments, laid out in parameter space."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from build_kernels.binaries.ptx.syntax import TYPE_BITS, EntryParameter, Kernel
from build_kernels.emulator.findings import LaunchError
from build_kernels.emulator.launch.device_array import DeviceArray
from build_kernels.emulator.launch.tensor_map import TensorMap

Argument = int | float | bytes | np.generic | DeviceArray | TensorMap | tuple[Any, ...]


@dataclass(frozen=True)
class PackedArguments:
    """The bytes of parameter space; pointers and tensor maps are zeros, listed by offset."""

    data: bytearray
    pointers: dict[int, DeviceArray] = field(default_factory=dict)
    tensor_maps: dict[int, TensorMap] = field(default_factory=dict)


def pack(kernel: Kernel, arguments: Sequence[Argument]) -> PackedArguments:
    """Lay the arguments out in parameter space; LaunchError if they do not fit."""
    if len(arguments) != len(kernel.parameters):
        raise LaunchError(
            f"the kernel takes {len(kernel.parameters)} arguments (got {len(arguments)})"
        )
    packed = PackedArguments(bytearray(kernel.parameter_bytes))
    for number, (parameter, argument) in enumerate(zip(kernel.parameters, arguments, strict=True)):
        where = f"arguments[{number}]"
        size = _place(packed, parameter, parameter.offset, argument, where)
        if size != parameter.size:
            raise LaunchError(f"{where}: the parameter has {parameter.size} bytes (got {size})")
    return packed


def _place(
    packed: PackedArguments, parameter: EntryParameter, offset: int, argument: Argument, where: str
) -> int:
    """Write one argument at `offset`; return its size."""
    if isinstance(argument, tuple):
        start = offset
        for i, part in enumerate(argument):
            align = 8 if isinstance(part, DeviceArray) else getattr(part, "itemsize", 1)
            offset = -(-offset // align) * align
            offset += _place(packed, parameter, offset, part, f"{where}[{i}]")
        return offset - start
    room = parameter.offset + parameter.size - offset
    if isinstance(argument, DeviceArray):
        packed.pointers[offset] = argument
        raw = bytes(8)
    elif isinstance(argument, TensorMap):
        if offset % 64:
            raise LaunchError(f"{where}: a tensor map needs 64-byte alignment")
        argument.check(where)
        packed.tensor_maps[offset] = argument
        raw = bytes(128)
    elif isinstance(argument, bytes):
        raw = argument
    elif isinstance(argument, np.generic):
        raw = argument.tobytes()
    else:
        raw = _scalar(argument, parameter, where)
    if len(raw) > room:
        raise LaunchError(f"{where}: {len(raw)} bytes do not fit a parameter of {room} bytes")
    packed.data[offset : offset + len(raw)] = raw
    return len(raw)


def _scalar(value: int | float, parameter: EntryParameter, where: str) -> bytes:
    if isinstance(value, float):
        formats = {4: "<f", 8: "<d"}
        if parameter.size not in formats or parameter.type[0] in "us":
            raise LaunchError(f"{where}: a float for a .{parameter.type} parameter")
        return struct.pack(formats[parameter.size], value)
    if not isinstance(value, int):
        raise LaunchError(
            f"{where}: expected an int, float, bytes, NumPy scalar, DeviceArray, TensorMap or a "
            f"tuple of these (got {type(value).__name__})"
        )
    if parameter.type in ("f32", "f64"):
        raise LaunchError(f"{where}: an int for a .{parameter.type} parameter; pass a float")
    bits = parameter.size * 8
    if parameter.size not in (1, 2, 4, 8) or TYPE_BITS.get(parameter.type, 8) > bits:
        raise LaunchError(f"{where}: an int for a parameter of {parameter.size} bytes")
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise LaunchError(f"{where}: {value} does not fit {bits} bits")
    return (value & ((1 << bits) - 1)).to_bytes(parameter.size, "little")
