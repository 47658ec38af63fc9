"""A launch site: one loaded kernel on one stream, ready to launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

from dsv4_router_runtime.artifacts.kernel import TensorMapRecipe
from dsv4_router_runtime.errors import DriverError
from dsv4_router_runtime.parameters import FIRST_TOKEN, LOGITS, LOGITS_STRIDE, NUM_TOKENS

from . import driver
from .arguments import NO_OPTIONS, NO_RARE, Call, CallOptions, RareOptions
from .launch import (
    ParameterBlock,
    grid_depends_on_tokens,
    grid_of,
    launch_config,
    launcher,
    pieces_of,
)
from .load import LoadedKernel
from .occupancy import no_room
from .tensor_map import TensorMap, map_cache
from .workspace import Slot


class NoRoomError(DriverError):
    """The driver refused a launch because not one cluster fits the call's context."""

    def __init__(self, loaded: LoadedKernel) -> None:
        self.loaded = loaded
        super().__init__(no_room(loaded))


# The parameters that a call writes by name: its tensors but for hidden_states, read through a map.
_CALL_PARAMETERS = tuple(
    name for name in Call._fields if name not in ("hidden_states", "hidden_states_stride")
)


class LaunchSite:
    """The launch configuration and the parameters of one kernel on one stream, made once.

    A launch writes only changed values: cells of `block`, and the grid if it depends on the number
    of tokens. exclusive_clusters: as in `Room`, of the stream's context. One caller at a time.
    """

    def __init__(
        self,
        loaded: LoadedKernel,
        *,
        stream: int,
        grid: tuple[int, int, int],
        pdl: bool,
        exclusive_clusters: int = 0,
    ) -> None:
        self.block = ParameterBlock(loaded.kernel)
        self.loaded = loaded
        self._exclusive_clusters = exclusive_clusters
        self._config = launch_config(
            loaded.kernel,
            grid=grid,
            shared_bytes=loaded.shared_bytes(grid, exclusive_clusters),
            stream=stream,
            pdl=pdl,
        )
        self._launch: Callable[[], tuple[Any]] | None = None

    def set_grid(self, grid: tuple[int, int, int]) -> None:
        """Launch with another grid from now on."""
        self._config.gridDimX, self._config.gridDimY, self._config.gridDimZ = grid
        self._config.sharedMemBytes = self.loaded.shared_bytes(grid, self._exclusive_clusters)

    def launch(self) -> None:
        """Launch with the present values of `block`; the driver has copied them on return."""
        if self._launch is None:
            self._launch = launcher(self._config, self.loaded.function, self.block.address)
        (code,) = self._launch()
        if code != 0:
            self._handle_refusal(code, self._launch)

    def _handle_refusal(self, code: Any, again: Callable[[], tuple[Any]]) -> None:
        """Launch again in a thread that had no context, or raise the error of a failed launch."""
        refused = driver.bindings().CUresult
        (code,) = driver.in_a_context(self.loaded.device, (code,), again)
        if code == refused.CUDA_ERROR_INVALID_CLUSTER_SIZE:
            raise NoRoomError(self.loaded)
        if code in (refused.CUDA_ERROR_INVALID_CONTEXT, refused.CUDA_ERROR_INVALID_HANDLE):
            driver.refuse_foreign_context(self.loaded.device)
        driver.checked(f"launching {self.loaded.kernel.key}", (code,))


class LayerLaunchSite(LaunchSite):
    """The launch site of a layer's step: the layer's parameters are written once, a call's by call.

    slot: the scratch memory that belongs to the stream or the capture.
    """

    def __init__(
        self,
        loaded: LoadedKernel,
        *,
        num_experts: int,
        k: int,
        stream: int,
        slot: Slot,
        pdl: bool,
        exclusive_clusters: int,
    ) -> None:
        kernel = loaded.kernel
        self._kernel_launch = kernel.launch
        self._num_experts = num_experts
        self._k = k
        grid = grid_of(kernel.launch, num_tokens=1, num_experts=num_experts)
        super().__init__(
            loaded, stream=stream, grid=grid, pdl=pdl, exclusive_clusters=exclusive_clusters
        )
        self.slot = slot
        self.reads_logits = kernel.role == "select"
        self._grid_follows_tokens = grid_depends_on_tokens(kernel.launch)
        self._grid_tokens = 1
        cells = self.block.cells
        # The cells of a launch's logits and of their stride, if the kernel reads logits.
        of_logits: tuple[Any, Any] = cells.get(LOGITS.name), cells.get(LOGITS_STRIDE.name)
        self.logits_cells = of_logits
        self._x_map = next(
            (
                (cells[parameter.name], map_cache(parameter.tensor_map))
                for parameter in kernel.parameters
                if parameter.tensor_map is not None
                and parameter.tensor_map.tensor == "hidden_states"
            ),
            None,
        )
        self._call_cells = tuple(cells[name] for name in _CALL_PARAMETERS)
        self._call: Call | None = None
        # An option that the kernel does not take is written beside its parameters.
        self._option_cells, self._rare_cells = (
            tuple(cells.get(name, ctypes.c_uint64()) for name in names)
            for names in (CallOptions._fields[:-1], RareOptions._fields)
        )
        self._options: CallOptions | None = NO_OPTIONS
        self._rare: RareOptions | None = NO_RARE
        # Keeps alive the maps that the cells point to.
        self._maps: dict[str, TensorMap] = {}

    def write_layer(
        self, values: Mapping[str, int | float], w_maps: Mapping[TensorMapRecipe, TensorMap]
    ) -> None:
        """Write the parameters that no call changes; values of other kernels are left out."""
        block = self.block
        block.set({name: value for name, value in values.items() if name in block.cells})
        for parameter in block.kernel.parameters:
            if parameter.tensor_map is not None and parameter.tensor_map in w_maps:
                self._maps[parameter.name] = w_maps[parameter.tensor_map]
                block.set({parameter.name: w_maps[parameter.tensor_map].address})

    def write_call(self, call: Call, options: CallOptions) -> None:
        """Write the parameters that changed since the last call; a step's tensors often did not."""
        # Forgotten before it is written: an interrupt in between may not pass for a whole write.
        before = self._call
        if call != before:
            self._call = None
            self._write_tensors(call, before)
            self._call = call
        # The same object on every call without options.
        if options is not self._options:
            self._options = None
            images, padding, valid, token_ids, int64 = self._option_cells
            images.value, padding.value, valid.value, token_ids.value, int64.value, rare = options
            if rare is not self._rare:
                self._rare = None
                for cell, value in zip(self._rare_cells, rare, strict=True):
                    cell.value = value
                self._rare = rare
            self._options = options

    def _write_tensors(self, call: Call, before: Call | None) -> None:
        num_tokens, x_at, x_stride, w_at, w_stride, i_at, i_stride, in_bfloat16, in_int64 = call
        if self._x_map is not None:
            cell, cache = self._x_map
            # First without a call of `get`, which costs 0.05 us.
            x_map = cache.maps.get((x_at, num_tokens, self._k, x_stride))
            if x_map is None:
                x_map = cache.get(x_at, num_tokens, self._k, x_stride, self.loaded.device)
            self._maps["hidden_states"] = x_map
            cell.value = x_map.address
        tokens, weights, weights_stride, ids, ids_stride, bfloat16, int64 = self._call_cells
        tokens.value = num_tokens
        weights.value = w_at
        weights_stride.value = w_stride
        ids.value = i_at
        ids_stride.value = i_stride
        # Two dtypes that hardly ever change.
        if before is None or in_bfloat16 != before[7] or in_int64 != before[8]:
            bfloat16.value = in_bfloat16
            int64.value = in_int64
        if self._grid_follows_tokens and num_tokens != self._grid_tokens:
            self._fit_grid(num_tokens)

    def _fit_grid(self, num_tokens: int) -> None:
        # Forgotten first, as in write_call.
        self._grid_tokens = 0
        self.set_grid(
            grid_of(self._kernel_launch, num_tokens=num_tokens, num_experts=self._num_experts)
        )
        self._grid_tokens = num_tokens


class PiecewiseLaunchSite(LayerLaunchSite):
    """The launch site of a step in pieces: a call is one launch per piece_tokens of its tokens.

    The launches follow each other on the stream and use the same scratch.
    """

    def __init__(self, loaded: LoadedKernel, *, piece_tokens: int, **more: Any) -> None:
        super().__init__(loaded, **more)
        self._piece_tokens = piece_tokens
        self._first_token = self.block.cells[FIRST_TOKEN.name]
        # A launch's grid is its piece's, not the call's.
        self._grid_follows_tokens = False

    def launch(self) -> None:
        """Launch every piece with the present values of `block`."""
        num_tokens = self.block.cells[NUM_TOKENS.name].value
        for first, count in pieces_of(num_tokens, self._piece_tokens):
            self._first_token.value = first
            if count != self._grid_tokens:
                self._fit_grid(count)
            super().launch()
