"""A layer's tensors bound to its steps: addresses, private copies, torch's streams and product.

A binding holds addresses. It keeps its own copies alive (of a hash table and, if one is needed, of
W_gate, in memory of the driver's), not the caller's tensors: `Router` does that. A captured graph
keeps alive the tensors that are pinned when it is captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from typing import Any

import torch

from .artifacts.dispatch import LayerProblem
from .artifacts.folder import ArtifactSet
from .checks import check_memory, shape_of, wrong
from .device import driver
from .device.arguments import Call, CallOptions
from .device.capture import refuse_under_capture
from .device.memory import DeviceMemory, relaxed, relaxed_on
from .device.streams import current_stream, is_capturing, is_lasting, wait_for_current_stream
from .device.workspace import Slot
from .layer import OPTIONS_OFF, Layer, LayerOptions
from .parameters import BOUND, DTYPES, INT64_TABLES, OPTIONS, SIZES, LaunchParameter
from .product import transposed_rows
from .steps import LayerSteps, Streams
from .tables import check_physical_map, copied_hash_table


def require_gpu(device: torch.device) -> None:
    """Raise ValueError unless `device` is a CUDA device; RouterError without a usable driver."""
    if device.type != "cuda":
        raise ValueError(f"W_gate: expected a CUDA device (got device {device})")
    driver.bindings()


def multiply(
    hidden_states: torch.Tensor, W_gate: torch.Tensor, logits: torch.Tensor, transposed: Any = None
) -> None:
    """Compute logits = hidden_states @ W_gate: BF16 operands, FP32 sums and result, by cuBLAS.

    transposed: room for the first rows, [E, rows] FP32, or None.
    """
    # A caller's logits may be an inference tensor, which torch writes in that mode only.
    with torch.inference_mode() if logits.is_inference() else torch.no_grad():
        if transposed is not None:
            rows = transposed.shape[1]
            torch.mm(W_gate.t(), hidden_states[:rows].t(), out_dtype=torch.float32, out=transposed)
            logits[:rows].copy_(transposed.t())
            hidden_states, logits = hidden_states[rows:], logits[rows:]
        if len(logits):
            torch.mm(hidden_states, W_gate, out_dtype=torch.float32, out=logits)


class Binding(LayerSteps):
    """The launchable form of (W_gate, e_bias, top_k, scale, options) on one GPU."""

    _errors_of_torch = (torch.AcceleratorError,)

    def __init__(
        self,
        W_gate: torch.Tensor,
        e_bias: torch.Tensor | None,
        layer: Layer,
        options: LayerOptions = OPTIONS_OFF,
        *,
        artifacts: ArtifactSet,
        share_captured_scratch: bool = False,
        same_bits: bool = False,
    ) -> None:
        self.layer = layer
        # The driver's memory of a private copy and the copy, by the name of the argument.
        self._copies: dict[str, tuple[DeviceMemory, torch.Tensor]] = {}
        self.table_copy: torch.Tensor | None = None
        self.w_copy: torch.Tensor | None = None
        index = layer.device.index
        with _on_gpu(index):
            super().__init__(
                *(artifacts, _layer_problem(layer, same_bits), index),
                Streams(current_stream, is_capturing, is_lasting),
                has_image_ids=layer.has_image_ids,
                share_captured_scratch=share_captured_scratch,
            )
        if torch.cuda.device_count() > 1:
            self._current_device = torch.cuda.current_device
        self.bind(W_gate, e_bias, options)
        self.pin()

    def bind(
        self, W_gate: torch.Tensor, e_bias: torch.Tensor | None, options: LayerOptions
    ) -> None:
        """Take the copies, into the memory of those before if there are any, and all addresses.

        The tensors are those of `layer`, checked. No call may run meanwhile.
        """
        # Frees the memory of graphs that are gone, before a new model takes its own.
        self._workspace.release_ended()
        self.copy(W_gate, options)
        W_bound = W_gate if self.w_copy is None else self.w_copy
        values = _layer_values(W_bound, e_bias, self.layer, options, self.table_copy)
        self.write_layer(values, W_bound.data_ptr(), W_bound.stride())

    def copy(self, W_gate: torch.Tensor, options: LayerOptions) -> None:
        """Take the private copies, into the memory of those before; complete on return."""
        with _on_gpu(self._index):
            table = _checked_table(options, self.layer)
            if table is not None:
                self.table_copy = self._copied("tid2eid", table)
            if self.plan.copy_reason is not None:
                refuse_under_capture("W_gate would have to be copied")
                self.w_copy = self._copied("W_gate", W_gate.t()).t()

    def pin(self, *tensors: torch.Tensor) -> None:
        """Let every graph captured from now on keep `tensors` alive, beside the private copies."""
        self._pins = (*(memory for memory, _ in self._copies.values()), *tensors)

    def _copied(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copy `tensor` to where it was copied before, or to new memory; complete on return."""
        if name not in self._copies:
            memory = DeviceMemory(self._index, prod(tensor.shape) * tensor.itemsize)
            copy = _tensor_in(memory, tensor.dtype, tuple(tensor.shape), tensor.device)
            self._copies[name] = memory, copy
        _, copy = self._copies[name]
        if copy.shape != tensor.shape:
            raise wrong(name, f"{shape_of(copy)}, as it was bound", shape_of(tensor))
        with torch.no_grad(), torch.inference_mode(False):
            copy.copy_(tensor.detach())
        wait_for_current_stream(tensor.device)
        return copy

    def _logits(
        self,
        slot: Slot,
        call: Call,
        options: CallOptions,
        hidden_states: Any,
        W_gate: Any,
        out_logits: Any,
    ) -> tuple[int, int]:
        num_tokens, layer = call[0], self.layer
        stride = num_experts = layer.num_experts
        size, rows = num_tokens * num_experts, transposed_rows(num_tokens, num_experts)
        kept = 0 if out_logits is not None else size
        room = _room_for_logits(slot, kept + rows * num_experts, layer.device)
        if out_logits is None:
            # One view, for half the time of a slice and its view.
            logits = room.as_strided((num_tokens, num_experts), (num_experts, 1))
        else:
            logits = out_logits[:num_tokens, :num_experts]
            stride = options.rare.out_logits_stride
        transposed = room.as_strided((num_experts, rows), (rows, 1), kept) if rows else None
        W_bound = W_gate if self.w_copy is None else self.w_copy
        multiply(hidden_states, W_bound, logits, transposed)
        return logits.data_ptr(), stride

    @contextlib.contextmanager
    def _on_own_gpu(self) -> Iterator[None]:
        with driver.context_kept(), torch.cuda.device(self._index):
            yield


@contextlib.contextmanager
def _on_gpu(index: int) -> Iterator[None]:
    """Make a GPU torch's current one; nothing within breaks a capture."""
    try:
        with driver.context_kept(), torch.cuda.device(index), relaxed():
            driver.refuse_foreign_context(index)
            yield
    # torch's own driver calls report an earlier kernel's failure too.
    except torch.AcceleratorError as error:
        raise driver.torch_error(error) from error


def _tensor_in(
    memory: DeviceMemory, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Return a contiguous tensor that lies in `memory`; it does not keep the memory alive."""
    # torch.as_tensor would need NumPy to read __cuda_array_interface__.
    storage = torch._C._construct_storage_from_data_pointer(memory.address, device, memory.size)
    # An inference tensor could not be written outside of that mode.
    with torch.inference_mode(False):
        return torch.empty(0, dtype=dtype, device=device).set_(storage).view(shape)


def _room_for_logits(slot: Slot, size: int, device: torch.device) -> Any:
    """Return `size` FP32 or more, uninitialised; call it under `slot.lock`. None for no room."""
    if size and (slot.logits is None or slot.logits.numel() < size):
        # torch gives free memory out by the stream's handle. Threads' own streams share one, and
        # the null streams of all contexts; that of a destroyed stream comes again. So a foreign one
        # gives its old logits back when they are not in use, and takes none of another stream's.
        if slot.is_leased and slot.logits is not None:
            with relaxed():
                wait_for_current_stream(device)
        where = on_memory_stream(device) if slot.is_leased else contextlib.nullcontext()
        # An inference tensor could not be written by a later call that is not in that mode.
        with where, torch.inference_mode(False):
            room = torch.empty(size, dtype=torch.float32, device=device)
        # A mode that traces makes one without: the stream's later calls could not use it.
        check_memory("logits", room)
        # Not before the stream waits for them: after an interrupt the next call would not.
        slot.logits = room
    return slot.logits


@contextlib.contextmanager
def on_memory_stream(device: torch.device) -> Iterator[None]:
    """Allocate as on a stream that no kernel of a router is ever on; the current one waits for it.

    torch's allocator gives out again what was freed on a stream of the same handle, at once. The
    wait: with `use_deterministic_algorithms` torch fills new memory with NaN on the stream that
    allocates, and with cudaMallocAsync that stream waits for one that gives the memory back.
    """
    memory_stream = _memory_stream(device)
    # Its context is the primary one, and an event has to be of it too; the caller's may be green.
    with relaxed_on(device.index):
        with torch.cuda.stream(memory_stream):
            yield
        ready = memory_stream.record_event()
    torch.cuda.current_stream(device).wait_event(ready)


@cache
def _memory_stream(device: torch.device) -> torch.cuda.Stream:
    with relaxed_on(device.index) as cuda:
        made = cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
    return torch.cuda.ExternalStream(int(driver.checked("making a stream", made)), device)


def _layer_problem(layer: Layer, same_bits: bool) -> LayerProblem:
    return LayerProblem(
        layout=layer.layout,
        tma_loadable=layer.tma_loadable,
        hashed=layer.hashed,
        has_bias_vl=layer.has_bias_vl,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        k=layer.k,
        same_bits=same_bits,
        dtypes=DTYPES,
    )


def _layer_values(
    W_bound: torch.Tensor,
    e_bias: torch.Tensor | None,
    layer: Layer,
    options: LayerOptions,
    table: torch.Tensor | None,
) -> dict[str, int | float]:
    """Return the parameters that a layer binds, by name."""
    values = {
        "w_gate": W_bound.data_ptr(),
        "w_stride": W_bound.stride(1) if layer.hashed and layer.num_experts > 1 else layer.k,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "routed_scaling_factor": layer.scale,
        "e_bias": _address(e_bias),
    }
    bound = {**options, "tid2eid": table}
    return values | {item.name: _option(item, bound) for item in OPTIONS if item.given == BOUND}


def _option(item: LaunchParameter, bound: Mapping[str, Any]) -> int | float:
    """Return an option's number; of a tensor its address, a size, or whether it is int64, or 0."""
    if item.tensor is not None:
        return _address(bound[item.tensor])
    if item.name in bound:
        return bound[item.name]
    if item.name in SIZES:
        name, axis = SIZES[item.name]
        return 0 if bound[name] is None else bound[name].shape[axis]
    tensor = bound[INT64_TABLES[item.name]]
    return tensor is not None and tensor.dtype is torch.int64


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _checked_table(options: LayerOptions, layer: Layer) -> torch.Tensor | None:
    """Check the values of every table; return the hash table as kernels read it, if any."""
    to_physical, logical_count = options["to_physical"], options["logical_count"]
    if to_physical is not None and logical_count is not None:
        refuse_under_capture("to_physical and logical_count would have to be read")
        check_physical_map(to_physical, logical_count)
    tid2eid = options["tid2eid"]
    if tid2eid is None:
        return None
    refuse_under_capture("tid2eid would have to be read and copied")
    return copied_hash_table(tid2eid, layer.num_experts)
