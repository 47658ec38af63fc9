"""Gates whose logits are a judge's own numbers, or those of its own FP32 gate, exactly."""

from __future__ import annotations

from typing import Any

import torch

PARTS = 3


def parts_of(numbers: Any) -> list[Any]:
    """Return three BF16 tensors that add up to FP32 numbers, to the last bit."""
    rest, parts = numbers.float(), []
    for _ in range(PARTS):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    return parts


def identity_gate(logits: Any) -> tuple[Any, Any]:
    """Return BF16 hidden states [N, 3 E] and a weight [E, 3 E] that give FP32 logits [N, E].

    The weight is three identities side by side, and the hidden states are three parts of the
    logits.
    """
    # The weight first: with `pdl`, the last kernel before a router must not write it.
    identity = torch.eye(logits.shape[1], dtype=torch.bfloat16, device=logits.device)
    weight, parts = torch.cat((identity,) * PARTS, 1), parts_of(logits)
    assert torch.equal(sum(part.float() for part in reversed(parts)), logits.float())
    return torch.cat(parts, 1), weight


def exact_gate(hidden_states: Any, weight: Any) -> tuple[Any, Any]:
    """Return BF16 hidden states [N, 9 K] and weight [E, 9 K] of the FP32 product [N, E].

    Each of three parts of the one is beside each part of the other.
    """
    left, right = parts_of(hidden_states), parts_of(weight)
    return torch.cat([x for x in left for _ in right], 1), torch.cat(right * PARTS, 1)
