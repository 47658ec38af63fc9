"""Compare a contender's answer with an FP64 evaluation of the same operands.

Two experts whose keys differ by less than the error of FP32 sums may change places, so ids are not
compared one by one. The chosen keys, sorted, must reach the best keys rank by rank, within
KEY_TOLERANCE. If the choice is clear, only the reference's ids pass. The order of the ids is not
compared: the tie rule is this project's own and has its own tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4_router_runtime.reference import router_scores, selection_keys

from .inputs import Inputs, Result

# Keys near 9 in FP32, from logits of size 1 summed in any order: errors stay below 1e-5.
KEY_TOLERANCE = 1e-4
# Relative. Peers take fast logarithms; an error of this size is still no wrong formula.
WEIGHT_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Reference:
    """scores and keys: [N, E] FP64. best_keys: [N, top_k], descending."""

    scores: torch.Tensor
    keys: torch.Tensor
    best_keys: torch.Tensor
    routed_scaling_factor: float


def reference_of(inputs: Inputs, layer: int) -> Reference:
    """Evaluate a layer in FP64 on the operands' device, without any kernel under test."""
    logits = inputs.hidden_states.double() @ inputs.weights[layer].double().t()
    keys = selection_keys(logits, inputs.bias)
    return Reference(
        scores=router_scores(logits),
        keys=keys,
        best_keys=keys.topk(inputs.problem.top_k, dim=1)[0],
        routed_scaling_factor=inputs.problem.routed_scaling_factor,
    )


def complaint(result: Result, reference: Reference, top_k: int) -> str | None:
    """Describe the error of an answer; None if it is right."""
    weights, ids = result
    num_tokens, num_experts = reference.keys.shape
    shape = [num_tokens, top_k]
    if list(weights.shape) != shape or list(ids.shape) != shape:
        got = f"{list(weights.shape)} and {list(ids.shape)}"
        return f"outputs: expected shape {shape} (got {got})"
    chosen = ids.long()
    outside = ((chosen < 0) | (chosen >= num_experts)).any(1)
    if outside.any():
        return f"ids outside [0, {num_experts}) in {_rows(outside)}"
    repeated = (chosen.sort(1)[0].diff(dim=1) == 0).any(1)
    if repeated.any():
        return f"an id twice in {_rows(repeated)}"
    chosen_keys = reference.keys.gather(1, chosen).sort(1, descending=True)[0]
    wrong = (chosen_keys < reference.best_keys - KEY_TOLERANCE).any(1)
    if wrong.any():
        return f"wrong ids in {_rows(wrong)}"
    scores = reference.scores.gather(1, chosen)
    expected = scores / (scores.sum(1, keepdim=True) + 1e-20) * reference.routed_scaling_factor
    return _complaint_about_weights(weights, expected)


def exact_complaint(result: Result, expected: Result) -> str | None:
    """Describe the error of an answer if every id is determined; None if it is right."""
    weights, ids = result
    wrong = (ids != expected[1]).any(1)
    if wrong.any():
        return f"wrong ids in {_rows(wrong)}"
    return _complaint_about_weights(weights, expected[0])


def _complaint_about_weights(weights: torch.Tensor, expected: torch.Tensor) -> str | None:
    error = (weights.double() - expected).abs()
    # A padded row's are 0, and equal.
    relative = (error / expected).where(error != 0, 0).amax(1)
    off = ~(relative <= WEIGHT_TOLERANCE)
    if off.any():
        return f"weights off by up to {100 * relative[off].max().item():.3g} % in {_rows(off)}"
    return None


def _rows(mask: torch.Tensor) -> str:
    return f"{int(mask.sum())} of {mask.numel()} rows"
