"""A layer's plan made launchable: kernels loaded, W_gate's tensor maps encoded, tables copied.

A binding holds addresses. It keeps its own copies alive (of a hash table and, if one is needed, of
W_gate, in memory of the driver's), not the caller's tensors: `Router` does that. A captured graph
keeps alive the tensors that are pinned when it is captured.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .artifacts.dispatch import LayerPlan, LayerProblem, kernels_on, plan_layer
from .artifacts.folder import ArtifactSet
from .artifacts.kernel import Kernel, TensorMapRecipe, wrong_parameter
from .artifacts.limits import MAX_TOKENS
from .call import Call, CallOptions
from .checks import shape_of, wrong
from .device import driver
from .device.launch_site import LayerLaunchSite, NoRoomError
from .device.load import LoadedKernel, load_once
from .device.memory import DeviceMemory, relaxed
from .device.occupancy import ask_room, note_fallback
from .device.streams import (
    current_stream,
    is_capturing,
    is_lasting,
    refuse_under_capture,
    stream_id,
    wait_for_current_stream,
)
from .device.tensor_map import TensorMap, encode_tensor_map, weight_arguments
from .device.workspace import Slot, workspace_for
from .errors import INTERRUPTED_CALL, ArtifactError, NoKernelError, RouterError
from .layer import OPTIONS_OFF, Layer, LayerOptions
from .log import info_once, warn_once
from .parameters import BOUND, DTYPES, INT64_TABLES, OPTIONS, SIZES, LaunchParameter
from .tables import check_physical_map, copied_hash_table

# Launch sites of one binding, before those on slots that were taken over are dropped.
MAX_SITES = 256


def require_gpu(device: torch.device) -> None:
    """Raise ValueError unless `device` is a CUDA device; RouterError without a usable driver."""
    if device.type != "cuda":
        raise ValueError(f"W_gate: expected a CUDA device (got device {device})")
    driver.bindings()


def multiply(hidden_states: torch.Tensor, W_gate: torch.Tensor, logits: torch.Tensor) -> None:
    """Compute logits = hidden_states @ W_gate: BF16 operands, FP32 sums and result, by cuBLAS."""
    # A caller's logits may be an inference tensor, which torch writes in that mode only.
    with torch.inference_mode() if logits.is_inference() else torch.no_grad():
        torch.mm(hidden_states, W_gate, out_dtype=torch.float32, out=logits)


@dataclass(frozen=True, kw_only=True)
class _BoundStep:
    """One step of the plan with its kernel loaded; the last step takes MAX_TOKENS."""

    max_tokens: int
    loaded: LoadedKernel


class Binding:
    """The launchable form of (W_gate, e_bias, top_k, scale, options) on one GPU.

    Threads may call one binding at once: launch sites are shared per stream, and a lock is held
    while one is written and launched.
    """

    def __init__(
        self,
        W_gate: torch.Tensor,
        e_bias: torch.Tensor | None,
        layer: Layer,
        options: LayerOptions = OPTIONS_OFF,
        *,
        artifacts: ArtifactSet,
        share_captured_scratch: bool = False,
    ) -> None:
        self.layer = layer
        self._shares = share_captured_scratch
        self._index = layer.device.index
        self._lock = threading.RLock()
        self._sites: dict[tuple[int, int, bool], LayerLaunchSite] = {}
        self._many_devices = torch.cuda.device_count() > 1
        # The driver's memory of a private copy and the copy, by the name of the argument.
        self._copies: dict[str, tuple[DeviceMemory, torch.Tensor]] = {}
        self.table_copy: torch.Tensor | None = None
        self.w_copy: torch.Tensor | None = None
        with self._gpu():
            arch = driver.arch_of_device(self._index)
            self.plan = plan_layer(artifacts.manifest, _layer_problem(layer), arch)
            for kernel in self.plan.kernels:
                check_parameter_names(artifacts, kernel)
            # The plan's steps, then those of calls that need the whole gate.
            self._steps = _load_steps(self.plan, artifacts, self._index)
            self._ends = tuple(step.max_tokens for step in self._steps)
            self._first_gate_step = len(self.plan.steps) if self.plan.gate_steps else 0
            _log_plan(self.plan, artifacts, arch, self._index)
            self._workspace = workspace_for(layer.device, kernels_on(artifacts.manifest, arch))
        self.bind(W_gate, e_bias, options)

    @contextlib.contextmanager
    def _gpu(self) -> Iterator[None]:
        """Make the layer's GPU torch's current one; nothing within breaks a capture."""
        try:
            with driver.context_kept(), torch.cuda.device(self._index), relaxed():
                driver.refuse_foreign_context(self._index)
                yield
        # torch's own driver calls report an earlier kernel's failure too.
        except torch.AcceleratorError as error:
            raise driver.torch_error(error) from error

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
        with self._lock:
            self._values = _layer_values(W_bound, e_bias, self.layer, options, self.table_copy)
            self._w_maps = _encode_w_maps(self.kernels, W_bound)
            for site in list(self._sites.values()):
                self._write_layer(site)
        self.pin()

    def copy(self, W_gate: torch.Tensor, options: LayerOptions) -> None:
        """Take the private copies, into the memory of those before; complete on return."""
        with self._gpu():
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
            copy = memory.tensor(tensor.dtype, tuple(tensor.shape), tensor.device)
            self._copies[name] = memory, copy
        _, copy = self._copies[name]
        if copy.shape != tensor.shape:
            raise wrong(name, f"{shape_of(copy)}, as it was bound", shape_of(tensor))
        with torch.no_grad(), torch.inference_mode(False):
            copy.copy_(tensor.detach())
        wait_for_current_stream(tensor.device)
        return copy

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels of the plan, each once."""
        return self.plan.kernels

    def run(
        self,
        call: Call,
        options: CallOptions,
        hidden_states: torch.Tensor,
        W_gate: torch.Tensor,
        pdl: bool,
        out_logits: torch.Tensor | None = None,
    ) -> None:
        """Launch `call` with `options`, both checked, on the current stream; it has tokens.

        Only a step with a matrix product takes the three tensors; other kernels have the addresses.
        """
        if driver.forked:
            driver.refuse_forked_child()
        if self._many_devices and torch.cuda.current_device() != self._index:
            with driver.context_kept(), torch.cuda.device(self._index):
                self.run(call, options, hidden_states, W_gate, pdl, out_logits)
            return
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise RouterError(INTERRUPTED_CALL)
        num_tokens = call[0]
        index = self._first_gate_step
        # Not 0 in a hash layer with bias_vl.
        if index and not (options.image_mask or out_logits is not None or self.layer.has_image_ids):
            index = 0
        ends = self._ends
        while num_tokens > ends[index]:
            index += 1
        stream = current_stream(self._index)
        while True:
            try:
                site = None
                if is_capturing():
                    site = self._captured_site(index, stream, pdl, num_tokens)
                # The null stream is that of the current context, which may be a green one.
                elif stream or driver.is_primary_current(self._index):
                    site = self._sites.get((index, stream, pdl))
                if site is None:
                    with self._leased_site(index, stream, pdl) as site:
                        self._launch(site, call, options, hidden_states, W_gate, out_logits)
                elif site.reads_logits:
                    # The driver refuses our own launch in another context, but nothing refuses
                    # torch's.
                    if stream:
                        driver.refuse_foreign_context(self._index)
                    self._launch(site, call, options, hidden_states, W_gate, out_logits)
                else:
                    # Not through _launch, which would add 0.1 us to every decode call.
                    with self._lock:
                        site.write_call(call, options)
                        site.launch()
                return
            except NoRoomError as error:
                index = self._step_after(index, error.loaded, str(error))
            except torch.AcceleratorError as error:
                raise driver.torch_error(error) from error

    def _launch(
        self,
        site: LayerLaunchSite,
        call: Call,
        options: CallOptions,
        hidden_states: torch.Tensor,
        W_gate: torch.Tensor,
        out_logits: torch.Tensor | None,
    ) -> None:
        # The locks in this order everywhere; a slot's is shared by every layer on the stream.
        with site.slot.routing(), self._lock:
            if site.reads_logits:
                W_bound = W_gate if self.w_copy is None else self.w_copy
                stride = num_experts = self.layer.num_experts
                if out_logits is None:
                    logits = self._workspace.logits(site.slot, call[0], num_experts)
                else:
                    logits = out_logits[: call[0], :num_experts]
                    stride = options.rare.out_logits_stride
                multiply(hidden_states, W_bound, logits)
                at, stride_at = site.logits_cells
                at.value = logits.data_ptr()
                stride_at.value = stride
            site.write_call(call, options)
            site.launch()

    @contextlib.contextmanager
    def _leased_site(self, index: int, stream: int, pdl: bool) -> Iterator[LayerLaunchSite]:
        """Yield a step's launch site on a foreign stream, or on a stream that has none yet.

        A foreign stream is not found by its handle, which may have had another owner. So is the
        null stream of a green context, whose handle every context has.
        """
        driver.refuse_foreign_context(self._index)
        identity = stream_id(self._index, stream)
        if ~identity in self._workspace.slots or not is_lasting(self._index, stream):
            with self._workspace.leased_slot(stream, identity) as slot:
                yield self._site(index, ~identity, stream, pdl, slot)
        else:
            yield self._site(index, stream, stream, pdl, self._workspace.stream_slot(stream))

    def _site(self, index: int, key: int, stream: int, pdl: bool, slot: Slot) -> LayerLaunchSite:
        """Return a step's launch site on a stream and its slot, made once for each slot."""
        site = self._sites.get((index, key, pdl))
        # Another stream may have taken over the slot since.
        if site is None or site.slot is not slot:
            if len(self._sites) >= MAX_SITES:
                # A copy: another thread may add its site meanwhile.
                sites = list(self._sites.items())
                kept = {at: each for at, each in sites if not each.slot.is_evicted}
                self._sites = kept
            step = self._step_with_room(index, stream)
            site = self._sites[index, key, pdl] = self._make_site(*step, stream, pdl, slot)
        return site

    def _captured_site(
        self, index: int, stream: int, pdl: bool, num_tokens: int
    ) -> LayerLaunchSite:
        """Return a launch site for one launch that is captured."""
        loaded, exclusive_clusters = self._step_with_room(index, stream)
        slot = self._workspace.captured_slot(
            stream, loaded.kernel, (num_tokens, self.layer.num_experts), self._pins, self._shares
        )
        return self._make_site(loaded, exclusive_clusters, stream, pdl, slot)

    def _step_with_room(self, index: int, stream: int) -> tuple[LoadedKernel, int]:
        """Return the kernel of the first step from `index` on that fits the stream's context.

        The number is `exclusive_clusters` of its room.
        """
        while True:
            loaded = self._steps[index].loaded
            room = ask_room(loaded, stream)
            if room.reason is None:
                return loaded, room.exclusive_clusters
            index = self._step_after(index, loaded, room.reason)

    def _make_site(
        self, loaded: LoadedKernel, exclusive_clusters: int, stream: int, pdl: bool, slot: Slot
    ) -> LayerLaunchSite:
        site = LayerLaunchSite(
            loaded,
            num_experts=self.layer.num_experts,
            k=self.layer.k,
            stream=stream,
            slot=slot,
            pdl=pdl,
            exclusive_clusters=exclusive_clusters,
        )
        self._write_layer(site)
        return site

    def _step_after(self, index: int, loaded: LoadedKernel, reason: str) -> int:
        """Return the step to take instead of the first from `index` on whose kernel is `loaded`."""
        while self._steps[index].loaded is not loaded:
            index += 1
        if self._steps[index].max_tokens == MAX_TOKENS:
            raise NoKernelError(f"{loaded.kernel.key}, the last step of this layer: {reason}")
        note_fallback(loaded, reason, self._steps[index + 1].loaded.kernel.key)
        return index + 1

    def _write_layer(self, site: LayerLaunchSite) -> None:
        blocks = self.layer.k // site.block.kernel.problem.k_multiple
        values = {**self._values, "num_k_blocks": blocks, **site.slot.addresses}
        site.write_layer(values, self._w_maps)


def check_parameter_names(artifacts: ArtifactSet, kernel: Kernel) -> None:
    """Raise ArtifactError unless the kernel takes all parameters of its role and no others.

    A manifest that was parsed has passed this; one that was made in code may not.
    """
    wrong = wrong_parameter(kernel.role, kernel.parameters)
    if wrong is not None:
        place, problem = wrong
        file = str(artifacts.folder / kernel.file)
        raise ArtifactError(file=file, problem=f"{place}: {problem}")


def _layer_problem(layer: Layer) -> LayerProblem:
    return LayerProblem(
        layout=layer.layout,
        tma_loadable=layer.tma_loadable,
        hashed=layer.hashed,
        has_bias_vl=layer.has_bias_vl,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        k=layer.k,
        dtypes=DTYPES,
    )


def _load_steps(plan: LayerPlan, artifacts: ArtifactSet, device: int) -> tuple[_BoundStep, ...]:
    return tuple(
        _BoundStep(
            max_tokens=MAX_TOKENS if step.max_tokens is None else step.max_tokens,
            loaded=load_once(artifacts, step.kernel, device),
        )
        for step in (*plan.steps, *plan.gate_steps)
    )


def _log_plan(plan: LayerPlan, artifacts: ArtifactSet, arch: str, device: int) -> None:
    """Log the artifacts and kernels of the first layer on a GPU, and the first copy of weights."""
    keys = ", ".join(kernel.key for kernel in plan.kernels)
    info_once(f"gpu {device}", f"GPU {device} is {arch}; from {artifacts.folder}: {keys}")
    if plan.copy_reason is not None:
        warn_once("weights copied", f"W_gate is bound as a copy, since {plan.copy_reason}")


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


def _encode_w_maps(
    kernels: tuple[Kernel, ...], W_gate: torch.Tensor
) -> dict[TensorMapRecipe, TensorMap]:
    """Encode W_gate's tensor map for each recipe of `kernels`."""
    k, num_experts = W_gate.shape
    recipes = {parameter.tensor_map for kernel in kernels for parameter in kernel.parameters}
    return {
        recipe: encode_tensor_map(
            weight_arguments(
                recipe,
                address=W_gate.data_ptr(),
                k=k,
                num_experts=num_experts,
                strides=W_gate.stride(),
            )
        )
        for recipe in recipes
        if recipe is not None and recipe.tensor == "W_gate"
    }
