"""One launch as cuLaunchKernelEx takes it: grid, configuration, and parameters by address.

The driver takes an array of pointers, one per parameter, and copies the parameters during the
call. The grid and the parameters are computed without it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from dsv4_router_runtime.artifacts.kernel import Kernel, Launch
from dsv4_router_runtime.artifacts.limits import MAX_GRID

from . import driver

_CELL_TYPES: dict[str, Any] = {
    "pointer": ctypes.c_uint64,
    "int32": ctypes.c_int32,
    "float32": ctypes.c_float,
}


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def grid_of(launch: Launch, *, num_tokens: int, num_experts: int) -> tuple[int, int, int]:
    """The grid in CTAs; ValueError if no multiple of the cluster, or over the driver's limit."""
    terms = {
        "k_splits": launch.k_splits,
        "expert_tiles": ceil_div(num_experts, launch.expert_tile),
        "token_tiles": ceil_div(num_tokens, launch.token_tile),
    }
    x, y, z = (terms[axis] if isinstance(axis, str) else axis for axis in launch.grid)
    grid = (x, y, z)
    for name, size, cluster, limit in zip("xyz", grid, launch.cluster, MAX_GRID, strict=True):
        if size < 1 or size > limit or size % cluster:
            raise ValueError(
                f"grid.{name}: expected a multiple of the cluster's {cluster} from 1 to {limit} "
                f"(got {size} for num_tokens={num_tokens}, num_experts={num_experts})"
            )
    return grid


def grid_depends_on_tokens(launch: Launch) -> bool:
    """Return whether `grid_of` changes with the number of tokens, and is set for each call."""
    return "token_tiles" in launch.grid


def tokens_at_once(num_tokens: int, piece_tokens: int | None) -> int:
    """Return the tokens of a call's largest launch; piece_tokens None: one launch takes all."""
    return num_tokens if piece_tokens is None else min(num_tokens, piece_tokens)


def pieces_of(num_tokens: int, piece_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield the first token and the number of tokens of each launch of a call, in order."""
    for first in range(0, num_tokens, piece_tokens):
        yield first, min(piece_tokens, num_tokens - first)


def has_clusters(launch: Launch) -> bool:
    """Return whether CTAs are launched in clusters of more than one."""
    return launch.cluster != (1, 1, 1)


class ParameterBlock:
    """Storage for one kernel's parameters, written by name and read by the driver.

    `cells` maps each parameter's name to a ctypes cell: assign `.value`. A tensor map is not copied
    here, its cell takes the address of 128 encoded bytes that the caller keeps alive. `address` is
    the array of pointers to hand to the driver. One writer at a time.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.cells: dict[str, Any] = {}
        self._pointers = (ctypes.c_uint64 * len(kernel.parameters))()
        for index, parameter in enumerate(kernel.parameters):
            if parameter.kind == "tensor_map":
                cell = ctypes.c_uint64.from_buffer(self._pointers, 8 * index)
            else:
                cell = _CELL_TYPES[parameter.kind]()
                self._pointers[index] = ctypes.addressof(cell)
            self.cells[parameter.name] = cell
        self.address = ctypes.addressof(self._pointers)

    def set(self, values: Mapping[str, int | float]) -> None:
        """Write parameters by name; a name that the kernel does not have is a KeyError."""
        for name, value in values.items():
            if name not in self.cells:
                raise KeyError(f"{self.kernel.key} has no parameter named {name}")
            self.cells[name].value = value


def launch_config(
    kernel: Kernel, *, grid: tuple[int, int, int], shared_bytes: int, stream: int, pdl: bool
) -> Any:
    """Make the driver's launch configuration; `pdl` adds the attribute if the kernel allows it."""
    cuda = driver.bindings()
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = kernel.launch.block
    config.sharedMemBytes = shared_bytes
    config.hStream = cuda.CUstream(driver.torch_stream(stream))
    attributes = _attributes(kernel, pdl=pdl)
    config.numAttrs = len(attributes)
    config.attrs = attributes
    return config


def _attributes(kernel: Kernel, *, pdl: bool) -> list[Any]:
    cuda = driver.bindings()
    identifier = cuda.CUlaunchAttributeID
    attributes = []
    if has_clusters(kernel.launch):
        cluster = cuda.CUlaunchAttribute()
        cluster.id = identifier.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimension = cluster.value.clusterDim
        dimension.x, dimension.y, dimension.z = kernel.launch.cluster
        attributes.append(cluster)
    if pdl and kernel.launch.pdl:
        dependent = cuda.CUlaunchAttribute()
        dependent.id = identifier.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        dependent.value.programmaticStreamSerializationAllowed = 1
        attributes.append(dependent)
    return attributes


def launcher(config: Any, function: Any, parameters: int) -> Callable[[], tuple[Any]]:
    """Return a function that launches and returns the driver's result, by cuLaunchKernelEx.

    A partial, since a function of Python around the driver's costs 0.2 us per call.
    """
    return partial(driver.bindings().cuLaunchKernelEx, config, function, parameters, 0)
