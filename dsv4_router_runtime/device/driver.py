"""The thin shell over the CUDA driver: every call of `cuda.bindings.driver` is in this file.

The bindings are imported at the first call, not at import. Every result code is checked; an error
says what was being done and the driver's name for what went wrong.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from dsv4_router_runtime.artifacts.dispatch import device_arch, runs_on
from dsv4_router_runtime.artifacts.folder import ArtifactSet
from dsv4_router_runtime.artifacts.kernel import Kernel
from dsv4_router_runtime.errors import (
    BUILD_COMMAND,
    ArtifactError,
    DriverError,
    DriverMissingError,
    NoKernelError,
)

from .launch import ParameterBlock
from .tensor_map import EncodeArguments

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64


@cache
def bindings() -> Any:
    """`cuda.bindings.driver`, initialised; DriverMissingError where it or the driver is missing."""
    try:
        from cuda.bindings import driver  # type: ignore[import-untyped]
    except ImportError as error:
        raise DriverMissingError(
            f"the package cuda.bindings cannot be imported ({error}); install cuda-bindings"
        ) from error
    try:
        (result,) = driver.cuInit(0)
    except (RuntimeError, OSError) as error:
        raise DriverMissingError(
            f"no CUDA driver on this machine ({error}); kernels need an NVIDIA GPU and its driver"
        ) from error
    if result != driver.CUresult.CUDA_SUCCESS:
        raise DriverMissingError(
            f"the CUDA driver does not start: {result.name}; kernels need an NVIDIA GPU"
        )
    return driver


def checked(doing: str, results: tuple[Any, ...]) -> Any:
    """The value (or tuple of values) behind a successful result; DriverError names what failed."""
    code, *values = results
    if int(code) != 0:
        raise DriverError(f"{doing}: the CUDA driver answered {_error_text(code)}")
    return values[0] if len(values) == 1 else tuple(values)


def _error_text(code: Any) -> str:
    failed, text = bindings().cuGetErrorString(code)
    name = getattr(code, "name", str(code))
    return f"{name} ({text.decode()})" if int(failed) == 0 and text else name


def arch_of_device(index: int) -> str:
    """The architecture of GPU `index`, such as sm_90a."""
    major = _device_attribute(index, "COMPUTE_CAPABILITY_MAJOR")
    return device_arch(major, _device_attribute(index, "COMPUTE_CAPABILITY_MINOR"))


def _device_attribute(index: int, name: str) -> int:
    driver = bindings()
    device = checked(f"opening GPU {index}", driver.cuDeviceGet(index))
    which = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(
        checked(f"reading {name} of GPU {index}", driver.cuDeviceGetAttribute(which, device))
    )


def make_context_current(index: int) -> None:
    """Make GPU `index`'s primary context, the one torch uses, current in the calling thread."""
    driver = bindings()
    context = _primary_context(index)
    current = checked("reading the current context", driver.cuCtxGetCurrent())
    if int(current) != int(context):
        checked("making the GPU's context current", driver.cuCtxSetCurrent(context))


@cache
def _primary_context(index: int) -> Any:
    driver = bindings()
    device = checked(f"opening GPU {index}", driver.cuDeviceGet(index))
    return checked(f"retaining GPU {index}'s context", driver.cuDevicePrimaryCtxRetain(device))


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
    make_context_current(device)
    driver = bindings()
    library = checked(
        f"loading {kernel.file}", driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0)
    )
    handle = checked(
        f"finding {kernel.symbol} in {kernel.file}",
        driver.cuLibraryGetKernel(library, kernel.symbol.encode()),
    )
    _check_parameters(kernel, handle, file=str(artifacts.folder / kernel.file))
    function = checked(f"loading {key} onto the GPU", driver.cuKernelGetFunction(handle))
    attribute = driver.CUfunction_attribute
    shared_bytes = _exclusive_shared_bytes(kernel, device)
    checked(
        f"giving {key} {shared_bytes} bytes of dynamic shared memory",
        driver.cuFuncSetAttribute(
            function, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
        ),
    )
    if kernel.launch.nonportable_cluster:
        checked(
            f"allowing {key} clusters of {kernel.launch.cluster}",
            driver.cuFuncSetAttribute(
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


def _has_clusters(kernel: Kernel) -> bool:
    return kernel.launch.cluster != (1, 1, 1)


def _exclusive_shared_bytes(kernel: Kernel, device: int) -> int:
    """Shared memory for a CTA of a kernel with clusters such that no two share an SM."""
    if not _has_clusters(kernel):
        return kernel.launch.dynamic_shared_bytes
    of_an_sm = _device_attribute(device, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR")
    # Half of it and not a byte less: the driver adds 1 KB of its own to each CTA.
    return max(of_an_sm // 2, kernel.launch.dynamic_shared_bytes)


def _clusters_at_once(kernel: Kernel, function: Any, shared_bytes: int) -> int:
    if not _has_clusters(kernel):
        return 0
    config = _launch_config(
        kernel, grid=kernel.launch.cluster, shared_bytes=shared_bytes, stream=0, pdl=False
    )
    return int(
        checked(
            f"asking how many clusters of {kernel.key} the GPU holds",
            bindings().cuOccupancyMaxActiveClusters(function, config),
        )
    )


def _check_runs_here(kernel: Kernel, device: int) -> None:
    arch = arch_of_device(device)
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
    driver = bindings()
    first = None
    for index, parameter in enumerate(kernel.parameters):
        code, offset, size = driver.cuKernelGetParamInfo(handle, index)
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
    if int(driver.cuKernelGetParamInfo(handle, len(kernel.parameters))[0]) == 0:
        problem = f"has more than the {len(kernel.parameters)} parameters that the manifest lists"
        raise ArtifactError(file=file, problem=problem)


class TensorMap:
    """128 encoded bytes at an aligned `address`, alive as long as this object is."""

    __slots__ = ("_storage", "address")

    def __init__(self) -> None:
        self._storage = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
        start = ctypes.addressof(self._storage)
        self.address = -(-start // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT


def encode_tensor_map(arguments: EncodeArguments) -> TensorMap:
    """Encode a tensor map on the host.

    The entry point comes from the bindings but is called through ctypes: the driver asks for
    64-byte alignment, and the bindings' own CUtensorMap lies wherever Python's allocator put it
    (seen at 48 modulo 64 with cuda-bindings 13.4; NVIDIA/cuda-python#1692).
    """
    tensor_map = TensorMap()
    rank = len(arguments.dims)
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    code = _encode_entry()(
        tensor_map.address,
        _enum("CUtensorMapDataType", "DATA_TYPE", arguments.element_type),
        rank,
        arguments.address,
        (u64 * rank)(*arguments.dims),
        (u64 * (rank - 1))(*arguments.strides),
        (u32 * rank)(*arguments.box),
        (u32 * rank)(*arguments.element_strides),
        _enum("CUtensorMapInterleave", "INTERLEAVE", arguments.interleave),
        _enum("CUtensorMapSwizzle", "SWIZZLE", arguments.swizzle),
        _enum("CUtensorMapL2promotion", "L2_PROMOTION", arguments.l2_promotion),
        _enum("CUtensorMapFloatOOBfill", "FLOAT_OOB_FILL", arguments.oob_fill),
    )
    checked(f"encoding the tensor map {arguments}", (bindings().CUresult(code),))
    return tensor_map


@cache
def _encode_entry() -> Any:
    driver = bindings()
    found = driver.cuGetProcAddress(b"cuTensorMapEncodeTiled", 12000, 0)
    address, _ = checked("finding cuTensorMapEncodeTiled, which CUDA 12.0 brought", found)
    pointer, integer = ctypes.c_void_p, ctypes.c_uint32
    return ctypes.CFUNCTYPE(
        ctypes.c_int, pointer, integer, integer, *[pointer] * 5, *[integer] * 4
    )(int(address))


# How the driver's enumerations spell the manifest's words.
_ENUM_WORDS = {
    "zeros": "NONE",
    "nan_request_zero_fma": "NAN_REQUEST_ZERO_FMA",
    "64B_l2": "L2_64B",
    "128B_l2": "L2_128B",
    "256B_l2": "L2_256B",
}


@cache
def _enum(type_name: str, stem: str, word: str) -> int:
    spelling = _ENUM_WORDS.get(f"{word}_l2" if stem == "L2_PROMOTION" else word, word.upper())
    return int(getattr(getattr(bindings(), type_name), f"CU_TENSOR_MAP_{stem}_{spelling}"))


class LaunchSite:
    """A loaded kernel on one stream: launch configuration and parameter storage, made once.

    A launch writes only what changed: cells of `block`, and the grid where it depends on the number
    of tokens. One caller at a time.
    """

    __slots__ = ("_config", "_loaded", "_what", "block")

    def __init__(
        self,
        loaded: LoadedKernel,
        *,
        stream: int,
        grid: tuple[int, int, int],
        pdl: bool,
    ) -> None:
        self.block = ParameterBlock(loaded.kernel)
        self._loaded = loaded
        self._what = f"launching {loaded.kernel.key}"
        self._config = _launch_config(
            loaded.kernel,
            grid=grid,
            shared_bytes=loaded.shared_bytes(grid),
            stream=stream,
            pdl=pdl,
        )

    def set_grid(self, grid: tuple[int, int, int]) -> None:
        self._config.gridDimX, self._config.gridDimY, self._config.gridDimZ = grid
        self._config.sharedMemBytes = self._loaded.shared_bytes(grid)

    def launch(self) -> None:
        """Launch with what `block` holds now; the driver has copied it when this returns."""
        (code,) = _launch_kernel(self._config, self._loaded.function, self.block.address)
        if code != 0:
            self._launch_in_new_thread(code)

    def _launch_in_new_thread(self, code: Any) -> None:
        """A thread that never used CUDA has no context yet: give it one, and launch again."""
        if code == bindings().CUresult.CUDA_ERROR_INVALID_CONTEXT:
            make_context_current(self._loaded.device)
            (code,) = _launch_kernel(self._config, self._loaded.function, self.block.address)
        checked(self._what, (code,))


def _launch_kernel(config: Any, function: Any, parameters: int) -> tuple[Any]:
    """The one place that enters the driver to launch."""
    return bindings().cuLaunchKernelEx(config, function, parameters, 0)


def _launch_config(
    kernel: Kernel, *, grid: tuple[int, int, int], shared_bytes: int, stream: int, pdl: bool
) -> Any:
    driver = bindings()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = kernel.launch.block
    config.sharedMemBytes = shared_bytes
    config.hStream = driver.CUstream(stream)
    attributes = _launch_attributes(kernel, pdl=pdl)
    config.numAttrs = len(attributes)
    config.attrs = attributes
    return config


def _launch_attributes(kernel: Kernel, *, pdl: bool) -> list[Any]:
    driver = bindings()
    identifier = driver.CUlaunchAttributeID
    attributes = []
    if _has_clusters(kernel):
        cluster = driver.CUlaunchAttribute()
        cluster.id = identifier.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimension = cluster.value.clusterDim
        dimension.x, dimension.y, dimension.z = kernel.launch.cluster
        attributes.append(cluster)
    if pdl and kernel.launch.pdl:
        dependent = driver.CUlaunchAttribute()
        dependent.id = identifier.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        dependent.value.programmaticStreamSerializationAllowed = 1
        attributes.append(dependent)
    return attributes


def capture_id(stream: int) -> int:
    """The id of the capture that `stream` takes part in, unique in the process; 0 if none."""
    driver = bindings()
    # Bindings of CUDA 12 keep the form that knows programmatic edges under a name of its own; the
    # plain one fails (LOSSY_QUERY) after a launch with pdl.
    ask = getattr(driver, "cuStreamGetCaptureInfo_v3", None) or driver.cuStreamGetCaptureInfo
    status, identifier, *_ = checked("asking for the stream's capture", ask(stream))
    active = driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
    return int(identifier) if status == active else 0
