"""What the caller gives: a launch, arguments, a schedule; and the checks before anything runs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_kernels.emulator.findings import LaunchError
from build_kernels.emulator.launch.tensor_map import TensorMap
from build_kernels.emulator.memory.memory import SHARED_CAPACITY, SHARED_RESERVED
from build_kernels.emulator.ptx.syntax import TYPE_BITS, Kernel, Parameter

POLICIES = ("earliest", "latest", "random")
MAX_THREADS = 1024
MAX_CLUSTER = 16
MAX_DYNAMIC_SHARED = SHARED_CAPACITY - SHARED_RESERVED


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the kernel is started.

    grid: CTAs; block: threads of a CTA; cluster: CTAs of a cluster, dividing the grid;
    dynamic_shared_bytes: extern shared memory; arch: e.g. "sm_100a", the PTX's target;
    kernel: the .entry, when the module has several.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    dynamic_shared_bytes: int = 0
    arch: str
    kernel: str | None = None

    def __post_init__(self) -> None:
        for name in ("grid", "block", "cluster"):
            value = getattr(self, name)
            if len(value) != 3 or any(not isinstance(n, int) or n < 1 for n in value):
                raise LaunchError(f"launch.{name}: expected 3 ints >= 1 (got {value})")
        if np.prod(self.block) > MAX_THREADS:
            raise LaunchError(f"launch.block: at most {MAX_THREADS} threads (got {self.block})")
        if np.prod(self.cluster) > MAX_CLUSTER:
            raise LaunchError(f"launch.cluster: at most {MAX_CLUSTER} CTAs (got {self.cluster})")
        if any(g % c for g, c in zip(self.grid, self.cluster, strict=True)):
            raise LaunchError(
                f"launch.grid: must be a multiple of the cluster (got {self.grid} for clusters "
                f"of {self.cluster}); count CTAs, not clusters"
            )
        if not 0 <= self.dynamic_shared_bytes <= MAX_DYNAMIC_SHARED:
            raise LaunchError(
                f"launch.dynamic_shared_bytes: expected 0..{MAX_DYNAMIC_SHARED} "
                f"(got {self.dynamic_shared_bytes})"
            )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When asynchronous operations finish and which warp runs.

    policy: "earliest" (an operation finishes as it is issued), "latest" (only when every warp
    is blocked), "random" (any legal moment, drawn from `seed`). The same schedule gives the
    same run. resident_ctas: how many CTAs are on the machine at once, at least one cluster.
    """

    seed: int = 0
    policy: str = "random"
    resident_ctas: int = 64

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise LaunchError(f"schedule.policy: expected one of {POLICIES} (got {self.policy!r})")
        if self.resident_ctas < 1:
            raise LaunchError(f"schedule.resident_ctas: must be >= 1 (got {self.resident_ctas})")


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceArray:
    """A global-memory allocation passed by pointer, or under a tensor map.

    data: contents before the launch (copied; bfloat16 as uint16). read_only: a store is a
    finding. initialised: False makes every byte poison. dependent: a grid before this one
    writes it, so a kernel launched with PDL must griddepcontrol.wait before touching it.
    minimum_bytes: what the kernel needs; a smaller array is refused.
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


Argument = int | float | bytes | np.generic | DeviceArray | TensorMap | tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class PackedParameters:
    """The parameter space: its bytes with zeros for pointers, which are listed by offset."""

    data: bytes
    pointers: dict[int, DeviceArray] = field(default_factory=dict)
    tensor_maps: dict[int, TensorMap] = field(default_factory=dict)


def check_launch(kernel: Kernel, launch: Launch) -> None:
    """Raise LaunchError when the kernel cannot be launched so."""
    if kernel.target != launch.arch:
        raise LaunchError(
            f"the PTX is for .target {kernel.target}, the launch for {launch.arch}; "
            "emulate it for the architecture it was compiled for"
        )
    required = kernel.directives.get("reqntid")
    if required and _filled(required) != launch.block:
        raise LaunchError(
            f"launch.block: the kernel has .reqntid {_filled(required)} (got {launch.block})"
        )
    limit = kernel.directives.get("maxntid")
    if limit and np.prod(launch.block) > np.prod(limit):
        raise LaunchError(f"launch.block: the kernel has .maxntid {limit} (got {launch.block})")
    cluster = kernel.directives.get("reqnctapercluster")
    if cluster and _filled(cluster) != launch.cluster:
        raise LaunchError(
            f"launch.cluster: the kernel has .reqnctapercluster {_filled(cluster)} "
            f"(got {launch.cluster})"
        )
    most = kernel.directives.get("maxclusterrank")
    if most and np.prod(launch.cluster) > most[0]:
        raise LaunchError(
            f"launch.cluster: the kernel has .maxclusterrank {most[0]} (got {launch.cluster})"
        )


def _filled(numbers: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*numbers, 1, 1, 1)[:3]
    return x, y, z


def pack(kernel: Kernel, arguments: Sequence[Argument]) -> PackedParameters:
    """Lay the arguments out in parameter space; LaunchError when they do not fit."""
    if len(arguments) != len(kernel.parameters):
        raise LaunchError(
            f"the kernel takes {len(kernel.parameters)} arguments (got {len(arguments)})"
        )
    data = bytearray(kernel.parameter_bytes)
    packed = PackedParameters(data=b"")
    for number, (parameter, argument) in enumerate(zip(kernel.parameters, arguments, strict=True)):
        where = f"arguments[{number}]"
        size = _place(data, packed, parameter, parameter.offset, argument, where)
        if size != parameter.size:
            raise LaunchError(f"{where}: the parameter has {parameter.size} bytes (got {size})")
    return PackedParameters(
        data=bytes(data), pointers=packed.pointers, tensor_maps=packed.tensor_maps
    )


def _place(
    data: bytearray,
    packed: PackedParameters,
    parameter: Parameter,
    offset: int,
    argument: Argument,
    where: str,
) -> int:
    """Write one argument at `offset`; returns its size."""
    if isinstance(argument, tuple):
        start = offset
        for i, part in enumerate(argument):
            align = 8 if isinstance(part, DeviceArray) else getattr(part, "itemsize", 1)
            offset = -(-offset // align) * align
            offset += _place(data, packed, parameter, offset, part, f"{where}[{i}]")
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
    data[offset : offset + len(raw)] = raw
    return len(raw)


def _scalar(value: int | float, parameter: Parameter, where: str) -> bytes:
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
