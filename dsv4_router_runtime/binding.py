"""One layer's weights made ready to launch on: kernels chosen and loaded, tensor map encoded.

A binding holds addresses. It keeps alive what it made itself (private copies of a hash table and,
where one is needed, of W_gate), not the caller's tensors: `Router` does that.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch

from .arguments import CallFacts, LayerFacts
from .artifacts.dispatch import Problem, decode_ladder, select_kernel
from .artifacts.folder import ArtifactSet
from .artifacts.kernel import (
    CALL_OPTION_PARAMETERS,
    CALL_PARAMETERS,
    Kernel,
    TensorMapRecipe,
    wrong_parameter,
)
from .artifacts.limits import MAX_TOKENS
from .artifacts.manifest import Manifest
from .device import driver
from .device.launch import grid_depends_on_tokens, grid_of
from .device.tensor_map import encode_arguments, hidden_states_arguments
from .device.workspace import Slot, stream_identity, wait_for_current_stream, workspace_for
from .errors import ArtifactError, NoKernelError, RouterError
from .options import NO_OPTIONS, PLAIN_LAYER, CallOptions, LayerOptions
from .tables import check_physical_map, copied_hash_table

_INTEGERS = ("int32", "int64")
# Every dtype that a call or a layer may bring; a kernel has to take them all.
DTYPES = {
    "hidden_states": ("bfloat16",),
    "W_gate": ("bfloat16",),
    "logits": ("float32",),
    "e_bias": ("float32",),
    "bias_vl": ("float32",),
    "image_mask": ("bool",),
    "padding_mask": ("bool",),
    "num_valid_tokens": ("int32",),
    "tid2eid": ("int32",),
    "input_ids": _INTEGERS,
    "to_physical": ("int32",),
    "logical_count": ("int32",),
    "out_weights": ("float32",),
    "out_ids": _INTEGERS,
}
MAX_CACHED_MAPS = 512

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(index: int) -> int:
    """The handle of torch's current stream on GPU `index`."""
    # The public way builds a Stream object, about 1 us of an 8 us budget.
    if _raw_stream is not None:
        return int(_raw_stream(index))
    return int(torch.cuda.current_stream(index).cuda_stream)


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


def require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"W_gate: expected a CUDA device (got device {device})")


def multiply(hidden_states: torch.Tensor, W_gate: torch.Tensor, logits: torch.Tensor) -> None:
    """logits = hidden_states @ W_gate: BF16 operands, FP32 sums and result, through cuBLAS."""
    with torch.no_grad():
        torch.mm(hidden_states, W_gate, out_dtype=torch.float32, out=logits)


class Binding:
    """The launchable form of (W_gate, e_bias, top_k, scale, options) on one GPU.

    Threads may call one binding at once: launch sites are shared per stream, and a lock is held
    while one is written and launched.
    """

    def __init__(
        self,
        W_gate: torch.Tensor,
        e_bias: torch.Tensor | None,
        facts: LayerFacts,
        options: LayerOptions = PLAIN_LAYER,
        *,
        artifacts: ArtifactSet,
    ) -> None:
        self.facts = facts
        self._index = facts.device.index
        self._lock = threading.Lock()
        self._sites: dict[tuple[int, int, bool], _Site] = {}
        self._many_devices = torch.cuda.device_count() > 1
        with torch.cuda.device(self._index):
            arch = driver.arch_of_device(self._index)
            # Bound as a K-contiguous copy: what TMA cannot step through, and a hash layer's W_gate
            # where an expert is no row of it.
            copied = not facts.loadable or (facts.hashed and facts.layout != "kmajor")
            layout = "kmajor" if copied else facts.layout
            problem = Problem(
                layout="kmajor_rows" if facts.hashed else layout,
                num_tokens=1,
                num_experts=facts.num_experts,
                top_k=facts.top_k,
                k=facts.k,
                dtypes=DTYPES,
            )
            manifest = artifacts.manifest
            ladder = decode_ladder(manifest, problem, arch)
            if facts.hashed:
                # From where that is faster, or all there is, a hash layer takes the whole gate.
                gate = _whole_gate(manifest, replace(problem, layout="kmajor"), arch)
                ladder += tuple(rung for rung in gate if rung[0] > ladder[-1][0])
            more_tokens = min(ladder[-1][0] + 1, MAX_TOKENS)
            beyond = replace(problem, layout="logits", num_tokens=more_tokens)
            select = select_kernel(manifest, beyond, arch)
            for kernel in (*(kernel for _, kernel in ladder), select):
                check_parameter_names(artifacts, kernel)
            self._rungs = tuple(
                (most, load_once(artifacts, kernel, self._index)) for most, kernel in ladder
            )
            self._select = load_once(artifacts, select, self._index)
            self.table_copy = _bind_tables(options, facts)
            self.w_copy = _copy_k_contiguous(W_gate) if copied else None
            self._workspace = workspace_for(facts.device, manifest.for_arch(arch))
            if not is_capturing():
                self._workspace.refill()
        W_bound = W_gate if self.w_copy is None else self.w_copy
        self._constants = {
            "w_gate": W_bound.data_ptr(),
            "w_stride": W_bound.stride(1) if facts.hashed and facts.num_experts > 1 else facts.k,
            "num_experts": facts.num_experts,
            "top_k": facts.top_k,
            "routed_scaling_factor": facts.scale,
            "logits_stride": facts.num_experts,
            "e_bias": _address(e_bias),
            "bias_vl": _address(options.bias_vl),
            "gate_temp": options.gate_temp,
            "norm_topk_prob": options.norm_topk_prob,
            "num_shared_slots": options.num_shared_slots,
            "tid2eid": _address(self.table_copy),
            "vocab_size": 0 if self.table_copy is None else self.table_copy.shape[0],
            "to_physical": _address(options.to_physical),
            "logical_count": _address(options.logical_count),
            "max_replicas": 0 if options.to_physical is None else options.to_physical.shape[1],
        }
        recipes = {
            recipe for _, loaded in self._rungs for recipe in _recipes(loaded.kernel, "W_gate")
        }
        self._w_maps = {recipe: _encode_w_map(recipe, W_bound) for recipe in recipes}

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The decode kernels by ascending number of tokens, then the prefill path's."""
        return (*(loaded.kernel for _, loaded in self._rungs), self._select.kernel)

    def run(
        self,
        call: CallFacts,
        options: CallOptions,
        hidden_states: torch.Tensor,
        W_gate: torch.Tensor,
        pdl: bool,
    ) -> None:
        """Launch `call` with `options`, both checked, on the current stream; it has tokens.

        The two tensors are for the prefill's product; the decode kernels know W_gate already.
        """
        if self._many_devices and torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                self.run(call, options, hidden_states, W_gate, pdl)
            return
        num_tokens = call[0]
        for rung, (most, _) in enumerate(self._rungs):
            if num_tokens <= most:
                site = self._site(rung, current_stream(self._index), pdl)
                with self._lock:
                    site.write_call(call, options)
                    site.launch()
                return
        self._prefill(call, options, hidden_states, W_gate, pdl)

    def _prefill(
        self,
        call: CallFacts,
        options: CallOptions,
        hidden_states: torch.Tensor,
        W_gate: torch.Tensor,
        pdl: bool,
    ) -> None:
        site = self._site(len(self._rungs), current_stream(self._index), pdl)
        W_bound = W_gate if self.w_copy is None else self.w_copy
        # The locks in this order everywhere; a slot's is shared by every layer on the stream.
        with site.slot.lock, self._lock:
            logits = self._workspace.logits(site.slot, call[0], self.facts.num_experts)
            multiply(hidden_states, W_bound, logits)
            site.cells["logits"].value = logits.data_ptr()
            site.write_call(call, options)
            site.launch()

    def _site(self, rung: int, stream: int, pdl: bool) -> _Site:
        """The launch site of a kernel on a stream; under capture one of its own for each launch."""
        if is_capturing():
            return self._make_site(rung, stream, pdl, self._workspace.captured_slot(stream))
        key = (rung, stream_identity(stream), pdl)
        site = self._sites.get(key)
        if site is None:
            site = self._make_site(rung, stream, pdl, self._workspace.eager_slot(stream))
            self._sites[key] = site
        return site

    def _make_site(self, rung: int, stream: int, pdl: bool, slot: Slot) -> _Site:
        loaded = (*(kernel for _, kernel in self._rungs), self._select)[rung]
        site = _Site(loaded, self.facts, stream=stream, slot=slot, pdl=pdl)
        blocks = self.facts.k // loaded.kernel.problem.k_multiple
        constants = {**self._constants, "num_k_blocks": blocks, **slot.addresses}
        site.write_constants(constants, self._w_maps)
        return site


class _Site:
    """One kernel on one stream, ready to launch: what a call changes is written through `cells`."""

    def __init__(
        self,
        loaded: driver.LoadedKernel,
        facts: LayerFacts,
        *,
        stream: int,
        slot: Slot,
        pdl: bool,
    ) -> None:
        kernel = loaded.kernel
        self.slot = slot
        self._launch = kernel.launch
        self._num_experts = facts.num_experts
        self._k = facts.k
        grid = grid_of(kernel.launch, num_tokens=1, num_experts=facts.num_experts)
        self._launch_site = driver.LaunchSite(loaded, stream=stream, grid=grid, pdl=pdl)
        self.launch = self._launch_site.launch
        self.cells = self._launch_site.block.cells
        self._grid_follows_tokens = grid_depends_on_tokens(kernel.launch)
        self._grid_tokens = 1
        self._x_map = next(
            (
                (self.cells[parameter.name], map_cache(parameter.tensor_map))
                for parameter in kernel.parameters
                if parameter.tensor_map is not None
                and parameter.tensor_map.tensor == "hidden_states"
            ),
            None,
        )
        self._call_cells = tuple(self.cells[name] for name in CALL_PARAMETERS)
        self._call: CallFacts | None = None
        self._option_cells = tuple(
            (at, self.cells[name])
            for at, name in enumerate(CALL_OPTION_PARAMETERS)
            if name in self.cells
        )
        self._options: CallOptions | None = NO_OPTIONS
        # The maps that the cells point to.
        self._maps: dict[str, driver.TensorMap] = {}

    def write_constants(
        self, values: dict[str, int | float], w_maps: dict[TensorMapRecipe, driver.TensorMap]
    ) -> None:
        block = self._launch_site.block
        block.set({name: value for name, value in values.items() if name in block.cells})
        for parameter in block.kernel.parameters:
            if parameter.tensor_map in w_maps:
                self._maps[parameter.name] = w_maps[parameter.tensor_map]
                block.set({parameter.name: w_maps[parameter.tensor_map].address})

    def write_call(self, call: CallFacts, options: CallOptions) -> None:
        """What changes from call to call; a step's tensors often do not."""
        # What is written is forgotten first: an interrupt in between may not pass for it.
        if call != self._call:
            self._call = None
            self._write_tensors(call)
            self._call = call
        # The same object on every call without options.
        if options is not self._options:
            self._options = None
            for at, cell in self._option_cells:
                cell.value = options[at]
            self._options = options

    def _write_tensors(self, call: CallFacts) -> None:
        """Pointers, strides and N."""
        num_tokens, x_at, x_stride, w_at, w_stride, i_at, i_stride, ids_are_int64 = call
        if self._x_map is not None:
            cell, cache = self._x_map
            x_map = cache.get(x_at, num_tokens, self._k, x_stride)
            self._maps["hidden_states"] = x_map
            cell.value = x_map.address
        tokens, weights, weights_stride, ids, ids_stride, int64 = self._call_cells
        tokens.value = num_tokens
        weights.value = w_at
        weights_stride.value = w_stride
        ids.value = i_at
        ids_stride.value = i_stride
        int64.value = ids_are_int64
        if self._grid_follows_tokens and num_tokens != self._grid_tokens:
            self._launch_site.set_grid(
                grid_of(self._launch, num_tokens=num_tokens, num_experts=self._num_experts)
            )
            self._grid_tokens = num_tokens


class MapCache:
    """Encoded maps of hidden_states for one recipe, by address, shape and row stride.

    Encoding takes 2 us, and serving meets the same few addresses again: torch's allocator returns
    them. The oldest goes when the cache is full.
    """

    def __init__(self, recipe: TensorMapRecipe) -> None:
        self._recipe = recipe
        self._maps: dict[tuple[int, int, int, int], driver.TensorMap] = {}
        self._lock = threading.Lock()

    def get(self, address: int, num_tokens: int, k: int, row_stride: int) -> driver.TensorMap:
        key = (address, num_tokens, k, row_stride)
        found = self._maps.get(key)
        if found is None:
            arguments = hidden_states_arguments(
                self._recipe, address=address, num_tokens=num_tokens, k=k, row_stride=row_stride
            )
            found = driver.encode_tensor_map(arguments)
            with self._lock:
                while len(self._maps) >= MAX_CACHED_MAPS:
                    del self._maps[next(iter(self._maps))]
                self._maps[key] = found
        return found


_map_caches: dict[TensorMapRecipe, MapCache] = {}
_loaded: dict[tuple[str, str, int], driver.LoadedKernel] = {}
_load_lock = threading.Lock()


def map_cache(recipe: TensorMapRecipe) -> MapCache:
    """The cache that all layers share for maps made by `recipe`."""
    return _map_caches.setdefault(recipe, MapCache(recipe))


def load_once(artifacts: ArtifactSet, kernel: Kernel, device: int) -> driver.LoadedKernel:
    """Load a kernel onto GPU `device` unless it is loaded there; never under capture."""
    key = (kernel.cubin_sha256, kernel.symbol, device)
    with _load_lock:
        loaded = _loaded.get(key)
        # The same bytes under changed metadata (grid, ranges) are still to be launched as it says.
        if loaded is None or loaded.kernel != kernel:
            _refuse_under_capture(f"{kernel.key} would have to be loaded")
            loaded = _loaded[key] = driver.load_kernel(artifacts, kernel, device)
    return loaded


def check_parameter_names(artifacts: ArtifactSet, kernel: Kernel) -> None:
    """ArtifactError unless the kernel takes all that its layout's kernels do, and nothing else.

    A manifest that was parsed has passed this; one that was made in code may not.
    """
    wrong = wrong_parameter(kernel.problem.layout, kernel.parameters)
    if wrong is not None:
        place, problem = wrong
        file = str(artifacts.folder / kernel.file)
        raise ArtifactError(file=file, problem=f"{place}: {problem}")


def _whole_gate(manifest: Manifest, problem: Problem, arch: str) -> tuple[tuple[int, Kernel], ...]:
    """The decode kernels that a hash layer goes on with where router_hash ends."""
    try:
        return decode_ladder(manifest, problem, arch)
    except NoKernelError as error:
        raise NoKernelError(
            f"a hash layer takes the whole gate for more tokens than router_hash does: {error}"
        ) from error


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bind_tables(options: LayerOptions, facts: LayerFacts) -> torch.Tensor | None:
    """The hash table's private copy, if there is one; the values of every table checked."""
    if options.to_physical is not None:
        _refuse_under_capture("to_physical and logical_count would have to be read")
        check_physical_map(options.to_physical, options.logical_count)
    if options.tid2eid is None:
        return None
    _refuse_under_capture("tid2eid would have to be read and copied")
    table = copied_hash_table(options.tid2eid, facts.num_experts)
    wait_for_current_stream(facts.device)
    return table


def _copy_k_contiguous(W_gate: torch.Tensor) -> torch.Tensor:
    """W_gate [K, E] in new memory with strides (1, K), complete when this returns."""
    _refuse_under_capture("W_gate would have to be copied")
    with torch.no_grad(), torch.inference_mode(False):
        copy = torch.empty_strided(
            W_gate.shape, (1, W_gate.shape[0]), dtype=W_gate.dtype, device=W_gate.device
        ).copy_(W_gate.detach())
    wait_for_current_stream(W_gate.device)
    return copy


def _refuse_under_capture(what: str) -> None:
    if is_capturing():
        raise RouterError(
            f"the current stream is being captured and {what}; make the Router, or call "
            "dense_router_dispatch once with these weights, before the capture begins"
        )


def _recipes(kernel: Kernel, tensor: str) -> list[TensorMapRecipe]:
    maps: list[Any] = [parameter.tensor_map for parameter in kernel.parameters]
    return [recipe for recipe in maps if recipe is not None and recipe.tensor == tensor]


def _encode_w_map(recipe: TensorMapRecipe, W_gate: torch.Tensor) -> driver.TensorMap:
    k, num_experts = W_gate.shape
    along_k, along_e = W_gate.stride()
    return driver.encode_tensor_map(
        encode_arguments(
            recipe,
            address=W_gate.data_ptr(),
            sizes={"K": k, "E": num_experts},
            strides={"K": along_k, "E": 1 if num_experts == 1 else along_e},
        )
    )
