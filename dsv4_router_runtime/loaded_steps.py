"""The steps of a layer's plan with their kernels loaded, and the choice among them in a context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .artifacts.dispatch import FUSED_GATE_ROLES, LayerPlan
from .artifacts.folder import ArtifactSet
from .artifacts.limits import MAX_TOKENS
from .device.launch import grid_of, tokens_at_once
from .device.launch_site import NoRoomError
from .device.load import LoadedKernel, load_once
from .device.occupancy import Room, ask_room, note_fallback
from .errors import NoKernelError


@dataclass(frozen=True, kw_only=True)
class LoadedStep:
    """One step of the plan with its kernel loaded; the last step takes MAX_TOKENS.

    piece_tokens: as in `Step`.
    """

    max_tokens: int
    loaded: LoadedKernel
    piece_tokens: int | None

    @property
    def is_fused_gate(self) -> bool:
        """Whether it is one launch that reads all of W_gate."""
        return self.loaded.kernel.role in FUSED_GATE_ROLES

    def clusters(self, num_tokens: int, num_experts: int) -> int:
        """Return the clusters of its largest launch in calls of at most num_tokens."""
        launch = self.loaded.kernel.launch
        most = min(tokens_at_once(num_tokens, self.piece_tokens), self.max_tokens)
        grid = grid_of(launch, num_tokens=most, num_experts=num_experts)
        return math.prod(grid) // math.prod(launch.cluster)


def load_steps(plan: LayerPlan, artifacts: ArtifactSet, device: int) -> tuple[LoadedStep, ...]:
    """Load the plan's steps, then those of calls that need the whole gate."""
    return tuple(
        LoadedStep(
            max_tokens=MAX_TOKENS if step.max_tokens is None else step.max_tokens,
            loaded=load_once(artifacts, step.kernel, device),
            piece_tokens=step.piece_tokens,
        )
        for step in (*plan.steps, *plan.gate_steps)
    )


def step_with_room(
    steps: Sequence[LoadedStep], index: int, stream: int, num_experts: int
) -> tuple[LoadedStep, Room]:
    """Return the step for the calls of step `index` in the stream's context, and its room.

    Of the fused steps from there on that is the first of those with the fewest waves of clusters; a
    matrix product only if no other step has room. NoKernelError if none has.
    """
    if index == len(steps):
        allowed = f"at most {MAX_TOKENS} rows, as an int32 counts them"
        raise ValueError(f"hidden_states: expected {allowed} (got more); make several calls")
    num_tokens = steps[index].max_tokens
    best: tuple[int, LoadedStep, Room] | None = None
    # Each with the reason, and whether there is room for a cluster of it.
    passed: list[tuple[LoadedKernel, str, bool]] = []
    while True:
        step = steps[index]
        clusters = step.clusters(num_tokens, num_experts) if step.is_fused_gate else 1
        room = ask_room(step.loaded, stream, clusters)
        if room.reason is not None:
            passed.append((step.loaded, room.reason, False))
        else:
            waves = room.waves(clusters)
            if best is None or (step.is_fused_gate and waves < best[0]):
                best = waves, step, room
            if waves == 1:
                break
            crowded = f"its launches take {waves} waves of clusters in this context"
            passed.append((step.loaded, crowded, True))
        following = _next_step(steps, index)
        if following is None:
            break
        index = following
    if best is None:
        raise _no_step_left(steps, step.loaded, passed[-1][1])
    _, step, room = best
    # Only now: the step after one that is passed over may be passed over too.
    for loaded, reason, has_room in passed:
        if loaded is step.loaded:
            break
        note_fallback(loaded, reason, step.loaded.kernel.key, has_room=has_room)
    return step, room


def step_after_refusal(
    steps: Sequence[LoadedStep], index: int, refusal: NoRoomError, stream: int, num_experts: int
) -> int:
    """Return the step to take instead of the one that the driver refused to launch."""
    while steps[index].loaded is not refusal.loaded:
        index += 1
    following = _next_step(steps, index)
    if following is None:
        raise _no_step_left(steps, refusal.loaded, str(refusal))
    step, _ = step_with_room(steps, following, stream, num_experts)
    note_fallback(refusal.loaded, str(refusal), step.loaded.kernel.key, has_room=False)
    return following


def _next_step(steps: Sequence[LoadedStep], index: int) -> int | None:
    """Return the first step after `index` with another kernel; None if it is the last one's."""
    loaded = steps[index].loaded
    # The last kernel of a layer with same_bits has two steps.
    while (step := steps[index]).loaded is loaded:
        if step.max_tokens == MAX_TOKENS:
            return None
        index += 1
    return index


def _no_step_left(steps: Sequence[LoadedStep], loaded: LoadedKernel, reason: str) -> NoKernelError:
    instead = ""
    if any(step.piece_tokens is not None for step in steps if step.loaded is loaded):
        instead = "; without same_bits, torch.mm and router_topk take such calls"
    return NoKernelError(f"{loaded.kernel.key}, the last step of this layer: {reason}{instead}")
