"""A layer's steps on one GPU: kernels loaded, a launch site per step and stream, launches.

Tensors are addresses here. `Binding` takes torch's tensors and streams; doctor's layer has its own,
so that its self-test launches as a server does, and imports no torch.
"""

from __future__ import annotations

import contextlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from .artifacts.dispatch import LayerPlan, LayerProblem, kernels_on, plan_layer
from .artifacts.folder import ArtifactSet
from .artifacts.kernel import Kernel, TensorMapRecipe, wrong_parameter
from .device import driver
from .device.arguments import Call, CallOptions
from .device.capture import stream_id
from .device.launch import tokens_at_once
from .device.launch_site import LayerLaunchSite, NoRoomError, PiecewiseLaunchSite
from .device.occupancy import Room
from .device.tensor_map import TensorMap, encode_tensor_map, weight_arguments
from .device.workspace import Slot, workspace_for
from .errors import INTERRUPTED_CALL, ArtifactError, RouterError
from .loaded_steps import LoadedStep, load_steps, step_after_refusal, step_with_room
from .log import info_once, warn_once

# Launch sites of one layer, before those on slots that were taken over are dropped.
MAX_SITES = 256


class Streams(NamedTuple):
    """The streams that calls are made on.

    current_stream: the handle of a GPU's current one. is_capturing: whether that is being captured.
    is_lasting: whether a GPU's current stream, given by its handle, is never destroyed.
    """

    current_stream: Callable[[int], int]
    is_capturing: Callable[[], bool]
    is_lasting: Callable[[int, int], bool]


class LayerSteps(ABC):
    """The steps of a layer of `problem` on GPU `index`, whose calls are made on `streams`.

    Threads may call one layer at once: launch sites are shared per stream, and a lock is held while
    one is written and launched.
    """

    # The errors of torch's calls of the driver.
    _errors_of_torch: tuple[type[Exception], ...] = ()
    # Kept alive by every graph that is captured.
    _pins: tuple[object, ...] = ()

    def __init__(
        self,
        artifacts: ArtifactSet,
        problem: LayerProblem,
        index: int,
        streams: Streams,
        *,
        has_image_ids: bool = False,
        share_captured_scratch: bool = False,
    ) -> None:
        self._problem = problem
        self._index = index
        self._streams = streams
        # Attributes of the instance, since every call asks them: of the class they take longer.
        self._current_stream, self._is_capturing, _ = streams
        # torch's current GPU, if there are several.
        self._current_device: Callable[[], int] | None = None
        self._has_image_ids = has_image_ids
        self._shares = share_captured_scratch
        self._lock = threading.RLock()
        self._sites: dict[tuple[int, int, bool], LayerLaunchSite] = {}
        arch = driver.arch_of_device(index)
        self.plan = plan_layer(artifacts.manifest, problem, arch)
        for kernel in self.plan.kernels:
            check_parameter_names(artifacts, kernel)
        self._steps = load_steps(self.plan, artifacts, index)
        # The last one ends the search of a call of too many tokens: see `step_with_room`.
        self._ends = (*(step.max_tokens for step in self._steps), math.inf)
        self._first_gate_step = len(self.plan.steps) if self.plan.gate_steps else 0
        _log_plan(self.plan, artifacts, arch, index)
        self._workspace = workspace_for(index, kernels_on(artifacts.manifest, arch))

    def write_layer(
        self, values: Mapping[str, int | float], w_address: int, w_strides: tuple[int, ...]
    ) -> None:
        """Write the layer's parameters, by name, and the maps of W_gate [K, E] to each launch site.

        No call may run meanwhile.
        """
        with self._lock:
            self._values = values
            self._w_maps = self._encode_w_maps(w_address, w_strides)
            for site in list(self._sites.values()):
                self._write_layer(site)

    def _encode_w_maps(
        self, address: int, strides: tuple[int, ...]
    ) -> dict[TensorMapRecipe, TensorMap]:
        """Encode W_gate's tensor map for each recipe of the kernels."""
        k, num_experts = self._problem.k, self._problem.num_experts
        recipes = {
            parameter.tensor_map for kernel in self.kernels for parameter in kernel.parameters
        }
        return {
            recipe: encode_tensor_map(
                weight_arguments(
                    recipe, address=address, k=k, num_experts=num_experts, strides=strides
                ),
                self._index,
            )
            for recipe in recipes
            if recipe is not None and recipe.tensor == "W_gate"
        }

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels of the plan, each once."""
        return self.plan.kernels

    @abstractmethod
    def _logits(
        self,
        slot: Slot,
        call: Call,
        options: CallOptions,
        hidden_states: Any,
        W_gate: Any,
        out_logits: Any,
    ) -> tuple[int, int]:
        """Compute the call's logits on the current stream; return their address and row stride."""

    @contextlib.contextmanager
    def _on_own_gpu(self) -> Iterator[None]:
        """Make the layer's GPU torch's current one."""
        yield

    def run(
        self,
        call: Call,
        options: CallOptions,
        hidden_states: Any,
        W_gate: Any,
        pdl: bool,
        out_logits: Any = None,
    ) -> None:
        """Launch `call` with `options`, both checked, on the current stream; it has tokens.

        Only a step with a matrix product takes the three tensors; other kernels have the addresses.
        """
        if driver.forked:
            driver.refuse_forked_child()
        current_device = self._current_device
        if current_device is not None and current_device() != self._index:
            with self._on_own_gpu():
                self.run(call, options, hidden_states, W_gate, pdl, out_logits)
            return
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise RouterError(INTERRUPTED_CALL)
        num_tokens = call[0]
        index = self._first_gate_step
        # Not 0 in a hash layer with bias_vl.
        if index and not (options.image_mask or out_logits is not None or self._has_image_ids):
            index = 0
        ends = self._ends
        while num_tokens > ends[index]:
            index += 1
        # As names first: a call through `self` costs 0.01 us more.
        current_stream, is_capturing = self._current_stream, self._is_capturing
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
                    given = call, options, hidden_states, W_gate, out_logits
                    self._launch_on_new(index, stream, pdl, given)
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
                experts = self._problem.num_experts
                index = step_after_refusal(self._steps, index, error, stream, experts)
            except self._errors_of_torch as error:
                raise driver.torch_error(error) from error

    def _launch(
        self,
        site: LayerLaunchSite,
        call: Call,
        options: CallOptions,
        hidden_states: Any,
        W_gate: Any,
        out_logits: Any,
    ) -> None:
        slot = site.slot
        # The locks in this order everywhere; a slot's is shared by every layer on the stream. No
        # context manager of Python's holds one: the traceback of an interrupt would hold it too.
        with slot.lock:
            if slot.is_routing:
                raise RouterError(INTERRUPTED_CALL)
            try:
                slot.is_routing = True
                with self._lock:
                    if site.reads_logits:
                        at, stride_at = site.logits_cells
                        at.value, stride_at.value = self._logits(
                            slot, call, options, hidden_states, W_gate, out_logits
                        )
                    site.write_call(call, options)
                    site.launch()
            finally:
                slot.is_routing = False

    def _launch_on_new(self, index: int, stream: int, pdl: bool, given: tuple[Any, ...]) -> None:
        """Launch `given` of a step on a foreign stream, or on a stream that has no site yet.

        A foreign stream is not found by its handle, which may have had another owner. So is the
        null stream of a green context, whose handle every context has.
        """
        driver.refuse_foreign_context(self._index)
        identity = stream_id(self._index, stream)
        space = self._workspace
        if ~identity not in space.slots and self._streams.is_lasting(self._index, stream):
            site = self._site(index, stream, stream, pdl, space.stream_slot(stream))
            self._launch(site, *given)
            return
        while True:
            slot = space.foreign_slot(stream, identity)
            with slot.lock:
                # Taken over by another stream before it was locked?
                if slot.is_evicted:
                    continue
                try:
                    slot.is_leased = True
                    self._launch(self._site(index, ~identity, stream, pdl, slot), *given)
                finally:
                    # After an interrupt too: a launch may be under way.
                    slot.end_lease(stream)
                return

    def _site(self, index: int, key: int, stream: int, pdl: bool, slot: Slot) -> LayerLaunchSite:
        """Return a step's launch site on a stream and its slot, made once for each slot."""
        site = self._sites.get((index, key, pdl))
        # Another stream may have taken over the slot since.
        if site is None or site.slot is not slot:
            if len(self._sites) >= MAX_SITES:
                # A copy: another thread may add its site meanwhile.
                sites = self._sites.copy()
                kept = {at: each for at, each in sites.items() if not each.slot.is_evicted}
                self._sites = kept
            experts = self._problem.num_experts
            step, room = step_with_room(self._steps, index, stream, experts)
            site = self._sites[index, key, pdl] = self._make_site(step, room, stream, pdl, slot)
        return site

    def _captured_site(
        self, index: int, stream: int, pdl: bool, num_tokens: int
    ) -> LayerLaunchSite:
        """Return a launch site for one launch that is captured."""
        experts = self._problem.num_experts
        step, room = step_with_room(self._steps, index, stream, experts)
        # Pieces follow each other on the stream, and one's scratch serves all of them.
        problem = tokens_at_once(num_tokens, step.piece_tokens), experts
        slot = self._workspace.captured_slot(
            *(stream, step.loaded.kernel, problem, self._pins),
            shared=self._shares,
            is_lasting=self._streams.is_lasting(self._index, stream),
        )
        return self._make_site(step, room, stream, pdl, slot)

    def _make_site(
        self, step: LoadedStep, room: Room, stream: int, pdl: bool, slot: Slot
    ) -> LayerLaunchSite:
        make: Callable[..., LayerLaunchSite] = LayerLaunchSite
        if step.piece_tokens is not None:
            make = partial(PiecewiseLaunchSite, piece_tokens=step.piece_tokens)
        site = make(
            step.loaded,
            num_experts=self._problem.num_experts,
            k=self._problem.k,
            stream=stream,
            slot=slot,
            pdl=pdl,
            exclusive_clusters=room.exclusive_clusters,
        )
        self._write_layer(site)
        return site

    def _write_layer(self, site: LayerLaunchSite) -> None:
        blocks = self._problem.k // site.block.kernel.problem.k_multiple
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


def _log_plan(plan: LayerPlan, artifacts: ArtifactSet, arch: str, device: int) -> None:
    """Log the artifacts and kernels of the first layer on a GPU, and the first copy of weights."""
    keys = ", ".join(kernel.key for kernel in plan.kernels)
    info_once(f"gpu {device}", f"GPU {device} is {arch}; from {artifacts.folder}: {keys}")
    if plan.copy_reason is not None:
        warn_once("weights copied", f"W_gate is bound as a copy, since {plan.copy_reason}")
