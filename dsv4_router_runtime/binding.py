"""A layer's plan made launchable: kernels loaded, W_gate's tensor maps encoded, tables copied.

A binding holds addresses. It keeps alive what it made itself (private copies of a hash table and,
if one is needed, of W_gate), not the caller's tensors: `Router` does that.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from .artifacts.dispatch import LayerPlan, LayerProblem, plan_layer
from .artifacts.folder import ArtifactSet
from .artifacts.kernel import Kernel, TensorMapRecipe, wrong_parameter
from .artifacts.limits import MAX_TOKENS
from .call import Call, CallOptions
from .device import driver
from .device.launch_site import LayerLaunchSite, NoRoomError
from .device.load import LoadedKernel, load_once
from .device.occupancy import ask_room, note_fallback
from .device.streams import (
    PER_THREAD_STREAM,
    current_stream,
    is_capturing,
    refuse_under_capture,
    stream_identity,
    wait_for_current_stream,
)
from .device.tensor_map import TensorMap, encode_tensor_map, weight_arguments
from .device.workspace import Slot, workspace_for
from .errors import ArtifactError, NoKernelError
from .layer import OPTIONS_OFF, Layer, LayerOptions
from .log import info_once, warn_once
from .parameters import DTYPES
from .tables import check_physical_map, copied_hash_table


def require_gpu(device: torch.device) -> None:
    """Raise ValueError unless `device` is a CUDA device; RouterError without a usable driver."""
    if device.type != "cuda":
        raise ValueError(f"W_gate: expected a CUDA device (got device {device})")
    driver.bindings()


def multiply(hidden_states: torch.Tensor, W_gate: torch.Tensor, logits: torch.Tensor) -> None:
    """Compute logits = hidden_states @ W_gate: BF16 operands, FP32 sums and result, by cuBLAS."""
    with torch.no_grad():
        torch.mm(hidden_states, W_gate, out_dtype=torch.float32, out=logits)


@dataclass(frozen=True, kw_only=True)
class _BoundStep:
    """One step of the plan with its kernel loaded; the last step takes every number of tokens."""

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
    ) -> None:
        self.layer = layer
        self._index = layer.device.index
        self._lock = threading.Lock()
        self._sites: dict[tuple[int, int, bool], LayerLaunchSite] = {}
        self._many_devices = torch.cuda.device_count() > 1
        with driver.context_kept(), torch.cuda.device(self._index):
            driver.refuse_foreign_context(self._index)
            arch = driver.arch_of_device(self._index)
            self.plan = plan_layer(artifacts.manifest, _layer_problem(layer), arch)
            for step in self.plan.steps:
                check_parameter_names(artifacts, step.kernel)
            self._steps = _load_steps(self.plan, artifacts, self._index)
            _log_plan(self.plan, artifacts, arch, self._index)
            self.table_copy = _bind_tables(options, layer)
            copied = self.plan.copy_reason is not None
            self.w_copy = _copy_k_contiguous(W_gate) if copied else None
            self._workspace = workspace_for(layer.device, artifacts.manifest.for_arch(arch))
            if not is_capturing():
                self._workspace.refill()
        W_bound = W_gate if self.w_copy is None else self.w_copy
        self._values = _layer_values(W_bound, e_bias, layer, options, self.table_copy)
        self._w_maps = _encode_w_maps(self.kernels, W_bound)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels of the plan's steps, by ascending number of tokens."""
        return tuple(step.kernel for step in self.plan.steps)

    def run(
        self,
        call: Call,
        options: CallOptions,
        hidden_states: torch.Tensor,
        W_gate: torch.Tensor,
        pdl: bool,
    ) -> None:
        """Launch `call` with `options`, both checked, on the current stream; it has tokens.

        Only a step with a matrix product reads the two tensors; the other kernels have W_gate.
        """
        if driver.forked:
            driver.bindings()  # which says so
        if self._many_devices and torch.cuda.current_device() != self._index:
            with driver.context_kept(), torch.cuda.device(self._index):
                self.run(call, options, hidden_states, W_gate, pdl)
            return
        num_tokens = call[0]
        index = 0
        while num_tokens > self._steps[index].max_tokens:
            index += 1
        stream = current_stream(self._index)
        while True:
            try:
                site = self._site(index, stream, pdl)
                if site.reads_logits:
                    self._multiply_and_select(site, call, options, hidden_states, W_gate)
                    return
                with self._lock:
                    site.write_call(call, options)
                    site.launch()
                return
            except NoRoomError as error:
                index = self._step_after(error.loaded, str(error))
            # torch's own driver calls meet what an earlier kernel did too.
            except torch.AcceleratorError as error:
                raise driver.torch_error(error) from error

    def _multiply_and_select(
        self,
        site: LayerLaunchSite,
        call: Call,
        options: CallOptions,
        hidden_states: torch.Tensor,
        W_gate: torch.Tensor,
    ) -> None:
        # The driver refuses our own launch in another context, but nothing refuses torch's.
        driver.refuse_foreign_context(self._index)
        W_bound = W_gate if self.w_copy is None else self.w_copy
        # The locks in this order everywhere; a slot's is shared by every layer on the stream.
        with site.slot.lock, self._lock:
            logits = self._workspace.logits(site.slot, call[0], self.layer.num_experts)
            multiply(hidden_states, W_bound, logits)
            site.block.cells["logits"].value = logits.data_ptr()
            site.write_call(call, options)
            site.launch()

    def _site(self, index: int, stream: int, pdl: bool) -> LayerLaunchSite:
        """Return a step's launch site on a stream; under capture each launch has its own."""
        if is_capturing():
            return self._make_site(index, stream, pdl, self._workspace.captured_slot(stream))
        key = (index, stream_identity(stream), pdl)
        site = self._sites.get(key)
        if site is None:
            site = self._make_site(index, stream, pdl, self._workspace.eager_slot(stream))
            # A null stream is that of whichever context is current: only the primary one's is kept.
            if driver.is_primary_current(self._index) or stream > PER_THREAD_STREAM:
                self._sites[key] = site
        return site

    def _make_site(self, index: int, stream: int, pdl: bool, slot: Slot) -> LayerLaunchSite:
        """Make the site of the first step from `index` on that fits the stream's context."""
        loaded = self._steps[index].loaded
        room = ask_room(loaded, stream)
        if room.reason is not None:
            return self._make_site(self._step_after(loaded, room.reason), stream, pdl, slot)
        site = LayerLaunchSite(
            loaded,
            num_experts=self.layer.num_experts,
            k=self.layer.k,
            stream=stream,
            slot=slot,
            pdl=pdl,
            exclusive_clusters=room.exclusive_clusters,
        )
        blocks = self.layer.k // loaded.kernel.problem.k_multiple
        site.write_layer({**self._values, "num_k_blocks": blocks, **slot.addresses}, self._w_maps)
        return site

    def _step_after(self, loaded: LoadedKernel, reason: str) -> int:
        """Return the index of the step that serves a call instead of a kernel that does not fit."""
        index = next(at for at, step in enumerate(self._steps) if step.loaded is loaded) + 1
        if index == len(self._steps):
            raise NoKernelError(f"{loaded.kernel.key}, the last step of this layer: {reason}")
        note_fallback(loaded, reason, self._steps[index].loaded.kernel.key)
        return index


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
        for step in plan.steps
    )


def _log_plan(plan: LayerPlan, artifacts: ArtifactSet, arch: str, device: int) -> None:
    """Log the artifacts and kernels of the first layer on a GPU, and the first copy of weights."""
    keys = ", ".join(step.kernel.key for step in plan.steps)
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
    """Return the parameters that a layer binds, by name; 0 is off for a pointer."""
    to_physical = options["to_physical"]
    return {
        "w_gate": W_bound.data_ptr(),
        "w_stride": W_bound.stride(1) if layer.hashed and layer.num_experts > 1 else layer.k,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "routed_scaling_factor": layer.scale,
        "logits_stride": layer.num_experts,
        "e_bias": _address(e_bias),
        "bias_vl": _address(options["bias_vl"]),
        "gate_temp": options["gate_temp"],
        "norm_topk_prob": options["norm_topk_prob"],
        "num_shared_slots": options["num_shared_slots"],
        "tid2eid": _address(table),
        "vocab_size": 0 if table is None else table.shape[0],
        "to_physical": _address(to_physical),
        "logical_count": _address(options["logical_count"]),
        "max_replicas": 0 if to_physical is None else to_physical.shape[1],
    }


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bind_tables(options: LayerOptions, layer: Layer) -> torch.Tensor | None:
    """Check the values of every table; return the hash table's private copy, if there is one."""
    to_physical, logical_count = options["to_physical"], options["logical_count"]
    if to_physical is not None and logical_count is not None:
        refuse_under_capture("to_physical and logical_count would have to be read")
        check_physical_map(to_physical, logical_count)
    tid2eid = options["tid2eid"]
    if tid2eid is None:
        return None
    refuse_under_capture("tid2eid would have to be read and copied")
    table = copied_hash_table(tid2eid, layer.num_experts)
    wait_for_current_stream(layer.device)
    return table


def _copy_k_contiguous(W_gate: torch.Tensor) -> torch.Tensor:
    """Copy W_gate [K, E] to strides (1, K); the copy is complete on return."""
    refuse_under_capture("W_gate would have to be copied")
    with torch.no_grad(), torch.inference_mode(False):
        copy = torch.empty_strided(
            W_gate.shape, (1, W_gate.shape[0]), dtype=W_gate.dtype, device=W_gate.device
        ).copy_(W_gate.detach())
    wait_for_current_stream(W_gate.device)
    return copy


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
