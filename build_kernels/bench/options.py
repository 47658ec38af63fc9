"""Time one Router with its options off, with a server's on, and for a hash layer (`--options`).

Logits and biases are exact in FP32, and no two keys nearly equal: each id has one right answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsv4_router_runtime.artifacts.folder import ArtifactSet
from dsv4_router_runtime.reference import router_reference

from .contenders import Entrant, entrant, router_call
from .inputs import Call, Inputs, Result, make_inputs
from .report import OURS, OWN, VARIANT, Problem

VOCAB_SIZE = 129_280
NUM_TABLES = 4
MAX_REPLICAS = 4
# No two scores of logits from -10 to 127 are nearly 1 or 2 of these apart: 6e-5 off, or exactly.
BIAS_STEP = 0.3125
# Hidden states beyond this become 1 or -1, the rest 0: 2 % remain, and logits stay below 100.
RARE = 2.3


@dataclass(frozen=True, kw_only=True)
class OptionInputs(Inputs):
    """Operands with options; W_gate holds 1 and -1.

    biases to logical_count: one per layer. tables: [vocab, top_k] int64, taken in turn. Masks and
    token ids are the same for every layer.
    """

    biases: tuple[torch.Tensor, ...]
    biases_vl: tuple[torch.Tensor, ...]
    to_physical: tuple[torch.Tensor, ...]
    logical_count: tuple[torch.Tensor, ...]
    tables: tuple[torch.Tensor, ...]
    image_mask: torch.Tensor
    padding_mask: torch.Tensor
    input_ids: torch.Tensor

    def with_tokens(self, num_tokens: int, seed: int) -> OptionInputs:
        """Add hidden states and masks: every 2nd row an image from row 0 on, every 8th padding."""
        normal = super().with_tokens(num_tokens, seed).hidden_states
        random = torch.Generator(device=normal.device).manual_seed(seed + num_tokens)
        rows = torch.arange(num_tokens, device=normal.device)
        return replace(
            self,
            hidden_states=normal.sign() * (normal.abs() > RARE),
            image_mask=rows % 2 == 0,
            padding_mask=rows % 8 == 7,
            input_ids=torch.randint(
                VOCAB_SIZE, (num_tokens,), generator=random, device=normal.device
            ),
        )


def make_option_inputs(problem: Problem, layout: str, device: str, seed: int) -> OptionInputs:
    plain = make_inputs(problem, layout, device, seed)
    # A gate may be a view of its weights: twice is as good as once.
    for tensor in (*plain.weights, *plain.gates):
        tensor.copy_(tensor.sign())
    random = torch.Generator(device=device).manual_seed(seed)
    num_experts, layers = problem.num_experts, range(problem.layers)

    def integers(low: int, high: int) -> torch.Tensor:
        """Draw one number per expert."""
        return torch.randint(
            low, high, (num_experts,), generator=random, device=device, dtype=torch.int32
        )

    def physical_ids() -> torch.Tensor:
        ids = torch.randperm(num_experts * MAX_REPLICAS, generator=random, device=device)
        return ids.view(num_experts, MAX_REPLICAS).int()

    def table() -> torch.Tensor:
        keys = torch.rand(VOCAB_SIZE, num_experts, generator=random, device=device)
        return keys.topk(problem.top_k, dim=1)[1]

    none = torch.empty(0, dtype=torch.bool, device=device)
    return OptionInputs(
        **vars(plain),
        biases=tuple(integers(0, 3) * BIAS_STEP for _ in layers),
        biases_vl=tuple(integers(0, 3) * BIAS_STEP for _ in layers),
        to_physical=tuple(physical_ids() for _ in layers),
        logical_count=tuple(integers(1, MAX_REPLICAS + 1) for _ in layers),
        tables=tuple(table() for _ in range(NUM_TABLES)),
        image_mask=none,
        padding_mask=none,
        input_ids=none.long(),
    )


@dataclass(frozen=True, kw_only=True)
class Use:
    """A way to use a Router.

    binds, brings: arguments of a layer and of a call, under the names that Router and the reference
    share.
    """

    name: str
    role: str
    what: str
    binds: Callable[[OptionInputs, int], dict[str, Any]]
    brings: Callable[[OptionInputs], dict[str, Any]]


USES = (
    Use(
        name="ours",
        role=OURS,
        what="Router, options off. Each layer has its own W_gate, bias, map and table, all of them "
        "cold in a cold run; hidden_states, masks and token ids are shared by the layers, and "
        "warm, as is the code",
        binds=lambda inputs, layer: {"e_bias": inputs.biases[layer]},
        brings=lambda inputs: {},
    ),
    Use(
        name="options",
        role=VARIANT,
        what="the same with bias_vl and image_mask (every 2nd row), padding_mask (every 8th row, "
        f"none below 8), to_physical and logical_count (1 to {MAX_REPLICAS} replicas)",
        binds=lambda inputs, layer: {
            "e_bias": inputs.biases[layer],
            "bias_vl": inputs.biases_vl[layer],
            "to_physical": inputs.to_physical[layer],
            "logical_count": inputs.logical_count[layer],
        },
        brings=lambda inputs: {
            "image_mask": inputs.image_mask,
            "padding_mask": inputs.padding_mask,
        },
    ),
    Use(
        name="hash layer",
        role=VARIANT,
        what=f"the same W_gate with tid2eid of {VOCAB_SIZE} rows (a copy for each layer, of "
        f"{NUM_TABLES} tables) and int64 input_ids, no bias",
        binds=lambda inputs, layer: {"tid2eid": inputs.tables[layer % NUM_TABLES]},
        brings=lambda inputs: {"input_ids": inputs.input_ids},
    ),
)


def option_entrants(artifacts: ArtifactSet, *, pdl: bool) -> tuple[Entrant, ...]:
    """Return every use, the plain gate first: with PDL if `pdl`, then without."""
    return tuple(
        option_entrant(use, artifacts, pdl=dependent, named=dependent == pdl)
        for dependent in ((True, False) if pdl else (False,))
        for use in USES
    )


def option_entrant(use: Use, artifacts: ArtifactSet, *, pdl: bool, named: bool) -> Entrant:
    """Make the contender of one use; its name ends in "no PDL" unless `named`."""
    name, role, what = use.name, use.role, use.what
    if not named:
        name, role, what = f"{name}, no PDL", OWN if role == OURS else role, f"{name} without PDL"

    def make(inputs: Any) -> Call:
        return router_call(
            inputs,
            artifacts,
            pdl=pdl,
            layers=[use.binds(inputs, layer) for layer in range(inputs.problem.layers)],
            brings=use.brings(inputs),
        )

    def expected(inputs: Any, layer: int) -> Result:
        return router_reference(
            inputs.hidden_states,
            inputs.gates[layer],
            routed_scaling_factor=inputs.problem.routed_scaling_factor,
            top_k=inputs.problem.top_k,
            **({"e_bias": None} | use.binds(inputs, layer) | use.brings(inputs)),
        )

    return entrant(name, role, what, make, expected)
