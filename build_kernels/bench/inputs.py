"""Make the operands of one shape, the same values for every contender, never zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .report import Problem

# One call of a contender: the layer's number to (weights, ids), each [N, top_k].
Result = tuple[torch.Tensor, torch.Tensor]
Call = Callable[[int], Result]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Operands of one shape.

    weights: [E, K] BF16, K contiguous, as in a checkpoint. gates: the same values as W_gate [K, E]
    in the layout under test. bias: [E] FP32. hidden_states: [N, K] BF16.
    """

    problem: Problem
    weights: tuple[torch.Tensor, ...]
    gates: tuple[torch.Tensor, ...]
    bias: torch.Tensor
    hidden_states: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.hidden_states.shape[0]

    def new_outputs(self) -> Result:
        """Allocate out_weights FP32 and out_ids int32, poisoned."""
        shape = (self.num_tokens, self.problem.top_k)
        device = self.hidden_states.device
        weights = torch.empty(shape, device=device)
        ids = torch.empty(shape, dtype=torch.int32, device=device)
        poison((weights, ids))
        return weights, ids

    def with_tokens(self, num_tokens: int, seed: int) -> Inputs:
        """Return the same layers with new hidden states."""
        device = self.bias.device
        random = torch.Generator(device=device).manual_seed(seed + num_tokens)
        shape = (num_tokens, self.problem.k)
        hidden_states = torch.randn(shape, generator=random, device=device).bfloat16()
        return replace(self, hidden_states=hidden_states)


def make_inputs(problem: Problem, layout: str, device: str, seed: int) -> Inputs:
    """Make logits of standard deviation 1 and biases from 8 to 8.2, as in V4's checkpoints."""
    random = torch.Generator(device=device).manual_seed(seed)
    shape = (problem.num_experts, problem.k)
    weights = tuple(
        (torch.randn(shape, generator=random, device=device) / problem.k**0.5).bfloat16()
        for _ in range(problem.layers)
    )
    gates = tuple(w.t() if layout == "kmajor" else w.t().contiguous() for w in weights)
    bias = 8 + 0.2 * torch.rand(problem.num_experts, generator=random, device=device)
    hidden_states = torch.empty((0, problem.k), dtype=torch.bfloat16, device=device)
    return Inputs(
        problem=problem, weights=weights, gates=gates, bias=bias, hidden_states=hidden_states
    )


def poison(result: Result) -> None:
    """Overwrite a result with values that no right answer holds."""
    weights, ids = result
    weights.fill_(torch.nan)
    ids.fill_(-1)
