"""Which layers of vLLM the router can serve: a pure decision, with its reasons."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """The properties of a MoE layer that decide whether it is served.

    router and gate: the name of a class other than the one that is replaced; None if it is that
    one. shared_experts: fused ones, as columns after top_k with ids from first_shared_id.
    The limits of the kernels (K, number of experts, dtypes) are checked when a Router is bound.
    """

    router: str | None = None
    gate: str | None = None
    scoring_func: str = "sqrtsoftplus"
    device: str = "cuda"
    quantized: bool = False
    biased: bool = False
    hooked: bool = False
    offloaded: bool = False
    fused_shared_gate: bool = False
    monolithic: bool = False
    naive_dispatch: bool = False
    gathered_over_pcp: bool = False
    padded_hidden_states: bool = False
    num_experts: int = 0
    shared_experts: int = 0
    first_shared_id: int = 0


def reasons_against(facts: LayerFacts) -> list[str]:
    """Return why vLLM's own router has to run; nothing if the layer can be served."""
    if facts.router is not None:
        return [f"the router is a {facts.router}, not a FusedTopKBiasRouter"]
    if facts.gate is not None:
        return [f"the gate is {facts.gate}, not a plain GateLinear that the runner owns"]
    f = facts
    rules = (
        (f.scoring_func != "sqrtsoftplus", f"the scores are {f.scoring_func}, not sqrtsoftplus"),
        (f.device not in ("cuda", "cpu"), f"the gate is on {f.device}; a GPU is served"),
        (f.quantized, "the gate is quantized"),
        (f.biased, "the gate has a bias of its own"),
        (f.hooked, "a hook on the gate reads its logits"),
        (f.offloaded, "weights are offloaded, so that their addresses change"),
        (f.fused_shared_gate, "the gate of the shared expert is fused into the gate"),
        (f.monolithic, "the experts route by themselves (monolithic kernel)"),
        (f.naive_dispatch, "logits are gathered across ranks (naive dispatch)"),
        (f.gathered_over_pcp, "logits are gathered across prefill context parallel ranks"),
        (f.padded_hidden_states, "hidden_states are padded beyond the gate's"),
        (
            f.shared_experts > 0 and f.first_shared_id != f.num_experts,
            f"fused shared experts have ids from {f.first_shared_id}; the kernels write ids from "
            f"{f.num_experts}",
        ),
    )
    return [reason for holds, reason in rules if holds]
