"""Load cubins onto a GPU: the bytes checked, the parameters compared, the attributes set.

Nothing is left to load under stream capture.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

from dsv4_router_runtime.artifacts.dispatch import runs_on
from dsv4_router_runtime.artifacts.folder import ArtifactSet
from dsv4_router_runtime.artifacts.kernel import Kernel
from dsv4_router_runtime.errors import BUILD_COMMAND, ArtifactError, NoKernelError

from . import driver
from .capture import refuse_under_capture
from .launch import has_clusters

_loaded: dict[tuple[str, str, int], LoadedKernel] = {}
_load_lock = threading.RLock()


def load_once(artifacts: ArtifactSet, kernel: Kernel, device: int) -> LoadedKernel:
    """Load a kernel onto GPU `device` unless it is loaded there; RouterError under capture."""
    key = (kernel.cubin_sha256, kernel.symbol, device)
    with _load_lock:
        loaded = _loaded.get(key)
        # The same bytes under changed metadata (grid, ranges) are still to be launched by it.
        if loaded is None or loaded.kernel != kernel:
            refuse_under_capture(f"{kernel.key} would have to be loaded")
            loaded = _loaded[key] = load_kernel(artifacts, kernel, device)
    return loaded


@dataclass(frozen=True, kw_only=True)
class LoadedKernel:
    """A kernel in the primary context of GPU `device`; it stays loaded.

    handle: the kernel in all contexts. function: the kernel in the primary context.
    exclusive_shared_bytes: so much shared memory for a CTA that no two share an SM.
    """

    kernel: Kernel
    device: int
    library: Any
    handle: Any
    function: Any
    exclusive_shared_bytes: int = 0

    def shared_bytes(self, grid: tuple[int, int, int], exclusive_clusters: int) -> int:
        """Return the dynamic shared memory for a launch: an SM to each CTA, if a context that holds
        `exclusive_clusters` so has room for more clusters than these.

        Two CTAs of a decode kernel on one SM slow each other down, unless the launch after finds
        no room to prefetch. Measured on one H200, which holds 7 such clusters, with PDL, us at 7168
        x E: E = 384, 6 clusters, N = 32: two a SM 5.03, one (and another loop) 4.32. E = 448, 7
        clusters, the same cubin, N = 1 and 16: two 3.65 and 3.89, one 4.36 and 4.87.
        """
        launch = self.kernel.launch
        clusters = math.prod(grid) // math.prod(launch.cluster)
        if clusters < exclusive_clusters:
            return self.exclusive_shared_bytes
        return launch.dynamic_shared_bytes


def load_kernel(artifacts: ArtifactSet, kernel: Kernel, device: int) -> LoadedKernel:
    """Load a verified cubin onto GPU `device`; its parameters must be the manifest's.

    NoKernelError for a kernel of another architecture: the driver would take the bytes and fail
    late, so it never sees them. DriverTooOldError for a driver below the manifest's floor. Loading
    is eager: the function is looked up and its attributes are set here, so that nothing is left to
    load under stream capture. A kernel that fails half-way is unloaded.
    """
    _check_runs_here(kernel, device)
    driver.check_driver(artifacts.manifest.driver[kernel.arch], kernel.key)
    cubin = artifacts.read(kernel)
    cuda = driver.bindings()
    with driver.primary_context(device):
        library = driver.checked(
            f"loading {kernel.file}", cuda.cuLibraryLoadData(cubin, [], [], 0, [], [], 0)
        )
        try:
            return _loaded_kernel(kernel, library, device, file=str(artifacts.folder / kernel.file))
        except BaseException:
            cuda.cuLibraryUnload(library)
            raise


def _loaded_kernel(kernel: Kernel, library: Any, device: int, *, file: str) -> LoadedKernel:
    """Find the kernel in its library, compare its parameters and set its attributes."""
    cuda = driver.bindings()
    handle = driver.checked(
        f"finding {kernel.symbol} in {kernel.file}",
        cuda.cuLibraryGetKernel(library, kernel.symbol.encode()),
    )
    _check_parameters(kernel, handle, file=file)
    function = driver.checked(
        f"loading {kernel.key} onto the GPU", cuda.cuKernelGetFunction(handle)
    )
    shared_bytes = _exclusive_shared_bytes(kernel, device)
    attribute = cuda.CUfunction_attribute
    attributes = {attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: shared_bytes}
    if kernel.launch.nonportable_cluster:
        attributes[attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
    # Of the function, which is launched, and of the kernel, whose occupancy is asked.
    opened = driver.checked(f"opening GPU {device}", cuda.cuDeviceGet(device))
    for which, value in attributes.items():
        doing = f"setting {which.name} of {kernel.key} to {value}"
        driver.checked(doing, cuda.cuFuncSetAttribute(function, which, value))
        driver.checked(doing, cuda.cuKernelSetAttribute(which, value, handle, opened))
    return LoadedKernel(
        kernel=kernel,
        device=device,
        library=library,
        handle=handle,
        function=function,
        exclusive_shared_bytes=shared_bytes,
    )


def _exclusive_shared_bytes(kernel: Kernel, device: int) -> int:
    """Return the shared memory of a CTA; with clusters, so much that no two CTAs share an SM."""
    if not has_clusters(kernel.launch):
        return kernel.launch.dynamic_shared_bytes
    of_an_sm = driver.device_attribute(device, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR")
    # Half of it and not a byte less: the driver adds 1 KB of its own to each CTA.
    return max(of_an_sm // 2, kernel.launch.dynamic_shared_bytes)


def _check_runs_here(kernel: Kernel, device: int) -> None:
    arch = driver.arch_of_device(device)
    if not runs_on(kernel.arch, arch):
        raise NoKernelError(
            f"{kernel.key}: built for {kernel.arch}, GPU {device} is {arch}; load a kernel built "
            f"for {arch}, or build this one with "
            f"`{BUILD_COMMAND} --kernel {kernel.name} --arch {arch}`"
        )


def _check_parameters(kernel: Kernel, handle: Any, *, file: str) -> None:
    """Raise ArtifactError unless the driver sees the parameters that the manifest lists.

    The driver counts offsets inside its constant bank, the manifest from the first parameter, so
    sizes and differences are compared. One past the last parameter must not exist.
    """
    first = None
    for index, parameter in enumerate(kernel.parameters):
        found = _parameter_place(kernel, handle, index)
        if found is None:
            problem = f"has {index} parameters, the manifest lists {len(kernel.parameters)}"
            raise ArtifactError(file=file, problem=problem)
        offset, size = found
        first = offset if first is None else first
        if (offset - first, size) != (parameter.offset, parameter.size):
            raise ArtifactError(
                file=file,
                problem=f"parameters[{index}] ({parameter.name}): the manifest says offset "
                f"{parameter.offset} and size {parameter.size}, the cubin {offset - first} "
                f"and {size}",
            )
    if _parameter_place(kernel, handle, len(kernel.parameters)) is not None:
        problem = f"has more than the {len(kernel.parameters)} parameters that the manifest lists"
        raise ArtifactError(file=file, problem=problem)


def _parameter_place(kernel: Kernel, handle: Any, index: int) -> tuple[int, int] | None:
    """Return the offset and the size of a parameter; None if the kernel has no such parameter."""
    cuda = driver.bindings()
    results = cuda.cuKernelGetParamInfo(handle, index)
    if results[0] == cuda.CUresult.CUDA_ERROR_INVALID_VALUE:
        return None
    offset, size = driver.checked(f"reading parameter {index} of {kernel.key}", results)
    return offset, size
