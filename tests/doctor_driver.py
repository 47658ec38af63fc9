"""A driver of one H200 whose kernels route, on host memory, as the reference does."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace

import torch
from cuda.bindings import driver as real
from fake_driver import FakeDriver

from dsv4_router_runtime.parameters import PARAMETERS_OFF
from dsv4_router_runtime.reference import router_reference, select_reference

BUS_ID = "00000000:19:00.0"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int32": torch.int32}
_CELLS = {"pointer": ctypes.c_uint64, "int32": ctypes.c_int32, "float32": ctypes.c_float}
# Weights and ids of the calls so far, by reference and arguments.
_ROUTED = {}


class Word(str):
    """A member of an enumeration of the driver's: its name."""

    @property
    def name(self):
        return str(self)


class Words:
    """An enumeration of the driver's: each member is its own name."""

    def __getattr__(self, name):
        return Word(name)


class Codes:
    """The driver's result codes that the runtime tells apart."""

    CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_INVALID_CONTEXT = 1, 201
    CUDA_ERROR_INVALID_HANDLE, CUDA_ERROR_INVALID_CLUSTER_SIZE = 400, 912

    def __new__(cls, code):
        return code


class OutOfMemory(int):
    """The driver's code for too little memory."""

    name = "CUDA_ERROR_OUT_OF_MEMORY"


class Gpu(FakeDriver):
    """What the driver answers is in `facts`; what the class lacks succeeds with 0.

    change: called with the weights and ids of every launch, which it may alter. replays: whether a
    graph does anything. dirt: bytes that every launch leaves in its scratch. launched: every launch
    that was asked for, with its stream and parameters.
    """

    CUresult, CUfunction = Codes, int
    CUdevice_attribute = CUfunction_attribute = Words()

    def __init__(self, kernels):
        super().__init__(SimpleNamespace(capture=0))
        self.facts = {
            "COMPUTE_CAPABILITY_MAJOR": 9,
            "COMPUTE_CAPABILITY_MINOR": 0,
            "MULTIPROCESSOR_COUNT": 132,
            "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232_448,
            "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": 233_472,
            "ECC_ENABLED": 1,
            "MPS_ENABLED": 0,
        }
        self.version, self.count, self.name = 13000, 1, b"NVIDIA H200"
        self.clusters, self.load_code, self.launch_code, self.bus_ids = 7, 0, 0, True
        self.kernels = {kernel.symbol: kernel for kernel in kernels}
        self.parameters = {kernel.symbol: kernel.parameters for kernel in kernels}
        self.launched, self.graphs, self.loads = [], {}, 0
        self.change, self.replays, self.dirt = None, True, 0
        pointer, integer = ctypes.c_void_p, ctypes.c_uint32
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, pointer, integer, integer, *[pointer] * 5, *[integer] * 4
        )
        self._encode = kind(self._encoded)

    def __getattr__(self, name):
        if name.startswith("CU"):
            return getattr(real, name)
        if not name.startswith("cu") or name == "cuStreamGetCaptureInfo_v3":
            raise AttributeError(name)
        return lambda *given: (0, 0)

    # -------------------------------------------------------------- the machine

    def cuDriverGetVersion(self):
        return 0, self.version

    def cuDeviceGetCount(self):
        return 0, self.count

    def cuDeviceGetName(self, most, device):
        return 0, self.name + bytes(most - len(self.name))

    def cuDeviceGetPCIBusId(self, most, device):
        return (0, BUS_ID.encode() + bytes(most - len(BUS_ID))) if self.bus_ids else (1, None)

    def cuDeviceGetAttribute(self, which, device):
        value = self.facts.get(which.removeprefix("CU_DEVICE_ATTRIBUTE_"))
        return (1, 0) if value is None else (0, value)

    # -------------------------------------------------------------- kernels

    def cuLibraryLoadData(self, cubin, *more):
        self.loads += 1
        return self.load_code, None

    def cuLibraryGetKernel(self, library, symbol):
        return 0, list(self.parameters).index(symbol.decode())

    def cuKernelGetFunction(self, handle):
        return 0, handle

    def cuKernelGetParamInfo(self, handle, index):
        known = list(self.parameters.values())[handle]
        if index >= len(known):
            return 1, 0, 0
        return 0, known[index].offset, known[index].size

    def cuOccupancyMaxActiveClusters(self, function, config):
        return 0, self.clusters

    def cuGetProcAddress(self, name, version, flags):
        return 0, ctypes.cast(self._encode, ctypes.c_void_p).value, 0

    def _encoded(self, tensor_map, element_type, rank, address, *more):
        """Write the tensor's address to the map, which is all that `_route` needs."""
        ctypes.c_uint64.from_address(tensor_map).value = address
        return 0

    # -------------------------------------------------------------- launches and graphs

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        assert self._contexts(), "no context is current"
        if self.launch_code:
            return (self.launch_code,)
        kernel = list(self.kernels.values())[function]
        values = _values(kernel, parameters)
        first, n = values.get("first_token", 0), values["num_tokens"]
        tiles = config.gridDimZ if "first_token" in values else n
        end = min(n, first + tiles * kernel.launch.token_tile)
        assert first % kernel.launch.token_tile == 0
        assert first < end
        values["rows"] = slice(first, end)
        stream = int(config.hStream)
        self.launched.append((kernel.name, stream, values))
        if self.gpu.capture:
            self.graphs[self.gpu.capture].append((kernel, values))
        else:
            self._route(kernel, values)
        return (0,)

    def cuStreamBeginCapture(self, stream, mode):
        assert not self.gpu.capture
        self.gpu.capture = next(self._numbers)
        self.graphs[self.gpu.capture] = []
        self.retained.setdefault(self.gpu.capture, [])
        return (0,)

    def cuStreamEndCapture(self, stream):
        graph, self.gpu.capture = self.gpu.capture, 0
        return 0, graph

    def cuGraphInstantiate(self, graph, flags):
        return 0, graph

    def cuGraphLaunch(self, graph, stream):
        for kernel, values in self.graphs[graph] if self.replays else ():
            self._route(kernel, values)
        return (0,)

    def cuGraphExecDestroy(self, graph):
        return (0,)

    def cuGraphDestroy(self, graph):
        self.destroy_graph(graph)
        return (0,)

    def cuMemcpyHtoDAsync(self, address, source, size, stream):
        self._check_inside(address, size)
        ctypes.memmove(address, source, size)
        return (0,)

    def _route(self, kernel, values):
        """Do what a kernel does with its parameters."""
        v = SimpleNamespace(**values)
        n, experts, top_k = v.num_tokens, v.num_experts, v.top_k
        options = {}
        if v.tid2eid:
            options["tid2eid"] = self._array(v.tid2eid, "int32", v.vocab_size, top_k)
            options["input_ids"] = self._array(v.input_ids, torch.int64, n)
        bias = None if v.tid2eid else self._array(v.e_bias, "float32", experts)
        how = bias, v.routed_scaling_factor, top_k
        if kernel.role == "select":
            assert v.logits_stride == experts
            logits = self._array(v.logits, "float32", n, experts)
            weights, ids = _once(select_reference, logits, *how, **options)
        else:
            k = kernel.problem.k_multiple * v.num_k_blocks
            x = self._array(v.x_map, "bfloat16", n, k)
            if kernel.role == "hash":
                assert v.w_stride == k
                W = self._array(v.w_gate, "bfloat16", experts, k).t()
            elif kernel.problem.layout == "kmajor":
                W = self._array(v.w_map, "bfloat16", experts, k).t()
            else:
                W = self._array(v.w_map, "bfloat16", k, experts)
            weights, ids = _once(router_reference, x, W, *how, dtype=torch.float32, **options)
        on = {name for name, off in PARAMETERS_OFF.items() if values.get(name, off) != off}
        on.discard("first_token")
        hashed = {"tid2eid", "vocab_size", "input_ids", "input_ids_are_int64"}
        assert on == (hashed if v.tid2eid else set())
        assert v.out_weights_stride == v.out_ids_stride == top_k
        if self.change:
            self.change(weights, ids)
        with contextlib.suppress(KeyError):
            ctypes.memset(values["counters"], 0xFF, self.dirt)
        self._array(v.out_weights, "float32", n, top_k)[v.rows] = weights[v.rows]
        self._array(v.out_ids, "int32", n, top_k)[v.rows] = ids[v.rows].int()

    def _array(self, address, dtype, *shape):
        """Return the tensor that lies at an address."""
        dtype = _DTYPES.get(dtype, dtype)
        size = torch.Size(shape).numel() * dtype.itemsize
        self._check_inside(address, size)
        return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype).view(
            shape
        )


def _once(reference, *arguments, **options):
    """Call the reference once for the same arguments: the tests of this process route the same."""
    key = tuple(map(_bytes_of, (reference, *arguments, *sorted(options.items()))))
    if key not in _ROUTED:
        _ROUTED[key] = reference(*arguments, **options)
    # A copy, since a fault may change it.
    return [tensor.clone() for tensor in _ROUTED[key]]


def _bytes_of(value):
    """Return a tensor's dtype, shape, strides and bytes, or any other value as it is."""
    if isinstance(value, tuple):
        return tuple(map(_bytes_of, value))
    if not isinstance(value, torch.Tensor):
        return value
    # A transposed one too has no gap.
    content = ctypes.string_at(value.data_ptr(), value.nbytes)
    return value.dtype, value.shape, value.stride(), content


def _values(kernel, parameters):
    """Return a launch's parameters by name; of a tensor map the address that was encoded."""
    places = (ctypes.c_uint64 * len(kernel.parameters)).from_address(parameters)
    return {
        parameter.name: _CELLS.get(parameter.kind, ctypes.c_uint64).from_address(place).value
        for parameter, place in zip(kernel.parameters, places, strict=True)
    }
