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
from .launch import has_clusters, launch_config
from .streams import refuse_under_capture

_loaded: dict[tuple[str, str, int], LoadedKernel] = {}
_load_lock = threading.Lock()


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

    exclusive_clusters: how many of its clusters the GPU holds at once if each CTA is given
    exclusive_shared_bytes of shared memory, so much that no two share an SM; 0 without clusters.
    """

    kernel: Kernel
    device: int
    library: Any
    function: Any
    exclusive_shared_bytes: int = 0
    exclusive_clusters: int = 0

    def shared_bytes(self, grid: tuple[int, int, int]) -> int:
        """Dynamic shared memory for a launch: an SM to each CTA, if the GPU has room for more
        clusters than these.

        Two CTAs of a decode kernel on one SM slow each other down, unless the launch after finds
        no room to prefetch. Measured on one H200, which holds 7 such clusters, with PDL, us at 7168
        x E: E = 384, 6 clusters, N = 32: two a SM 5.03, one (and another loop) 4.32. E = 448, 7
        clusters, the same cubin, N = 1 and 16: two 3.65 and 3.89, one 4.36 and 4.87.
        """
        launch = self.kernel.launch
        clusters = math.prod(grid) // math.prod(launch.cluster)
        if clusters < self.exclusive_clusters:
            return self.exclusive_shared_bytes
        return launch.dynamic_shared_bytes


def load_kernel(artifacts: ArtifactSet, kernel: Kernel, device: int) -> LoadedKernel:
    """Load a verified cubin onto GPU `device`; its parameters must be the manifest's.

    NoKernelError for a kernel of another architecture: the driver would take the bytes and fail
    late, so it never sees them. Loading is eager: the function is looked up and its attributes are
    set here, so that nothing is left to load under stream capture.
    """
    key = kernel.key
    _check_runs_here(kernel, device)
    cubin = artifacts.read(kernel)
    driver.make_context_current(device)
    cuda = driver.bindings()
    library = driver.checked(
        f"loading {kernel.file}", cuda.cuLibraryLoadData(cubin, [], [], 0, [], [], 0)
    )
    handle = driver.checked(
        f"finding {kernel.symbol} in {kernel.file}",
        cuda.cuLibraryGetKernel(library, kernel.symbol.encode()),
    )
    _check_parameters(kernel, handle, file=str(artifacts.folder / kernel.file))
    function = driver.checked(f"loading {key} onto the GPU", cuda.cuKernelGetFunction(handle))
    attribute = cuda.CUfunction_attribute
    shared_bytes = _exclusive_shared_bytes(kernel, device)
    driver.checked(
        f"giving {key} {shared_bytes} bytes of dynamic shared memory",
        cuda.cuFuncSetAttribute(
            function, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
        ),
    )
    if kernel.launch.nonportable_cluster:
        driver.checked(
            f"allowing {key} clusters of {kernel.launch.cluster}",
            cuda.cuFuncSetAttribute(
                function, attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1
            ),
        )
    return LoadedKernel(
        kernel=kernel,
        device=device,
        library=library,
        function=function,
        exclusive_shared_bytes=shared_bytes,
        exclusive_clusters=_clusters_at_once(kernel, function, shared_bytes),
    )


def _exclusive_shared_bytes(kernel: Kernel, device: int) -> int:
    """Shared memory for a CTA of a kernel with clusters such that no two share an SM."""
    if not has_clusters(kernel.launch):
        return kernel.launch.dynamic_shared_bytes
    of_an_sm = driver.device_attribute(device, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR")
    # Half of it and not a byte less: the driver adds 1 KB of its own to each CTA.
    return max(of_an_sm // 2, kernel.launch.dynamic_shared_bytes)


def _clusters_at_once(kernel: Kernel, function: Any, shared_bytes: int) -> int:
    if not has_clusters(kernel.launch):
        return 0
    config = launch_config(
        kernel, grid=kernel.launch.cluster, shared_bytes=shared_bytes, stream=0, pdl=False
    )
    return int(
        driver.checked(
            f"asking how many clusters of {kernel.key} the GPU holds",
            driver.bindings().cuOccupancyMaxActiveClusters(function, config),
        )
    )


def _check_runs_here(kernel: Kernel, device: int) -> None:
    arch = driver.arch_of_device(device)
    if not runs_on(kernel.arch, arch):
        raise NoKernelError(
            f"{kernel.key}: built for {kernel.arch}, GPU {device} is {arch}; load a kernel built "
            f"for {arch}, or build this one with "
            f"`{BUILD_COMMAND} --kernel {kernel.name} --arch {arch}`"
        )


def _check_parameters(kernel: Kernel, handle: Any, *, file: str) -> None:
    """ArtifactError unless the driver sees the parameters that the manifest lists.

    The driver counts offsets inside its constant bank, the manifest from the first parameter, so
    sizes and differences are compared. One past the last parameter must not exist.
    """
    cuda = driver.bindings()
    first = None
    for index, parameter in enumerate(kernel.parameters):
        code, offset, size = cuda.cuKernelGetParamInfo(handle, index)
        if int(code) != 0:
            problem = f"has {index} parameters, the manifest lists {len(kernel.parameters)}"
            raise ArtifactError(file=file, problem=problem)
        first = offset if first is None else first
        if (offset - first, size) != (parameter.offset, parameter.size):
            raise ArtifactError(
                file=file,
                problem=f"parameters[{index}] ({parameter.name}): the manifest says offset "
                f"{parameter.offset} and size {parameter.size}, the cubin {offset - first} "
                f"and {size}",
            )
    if int(cuda.cuKernelGetParamInfo(handle, len(kernel.parameters))[0]) == 0:
        problem = f"has more than the {len(kernel.parameters)} parameters that the manifest lists"
        raise ArtifactError(file=file, problem=problem)
