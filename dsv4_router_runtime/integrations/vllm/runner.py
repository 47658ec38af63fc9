"""vLLM's runner of a MoE layer, which chooses the router once."""

from __future__ import annotations

import threading
from typing import Any

import torch
import vllm.envs as envs
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
    FusedTopKBiasRouter,
)
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from dsv4_router_runtime.errors import RouterError
from dsv4_router_runtime.integrations.engine import report_layer
from dsv4_router_runtime.log import warn_once

from .eligibility import LayerFacts, reasons_against
from .gate import ServedGateLinear
from .router import ServedRouter

SERVED = "dsv4_router"

_deciding = threading.Lock()


class ServedMoERunner(MoERunner):
    """vLLM's runner, which decides at its first forward whether the layer is served.

    The first forward is that of the profile run, after all weights were loaded and before any graph
    is captured. verdict: `SERVED`, or why vLLM's router runs; None before.
    """

    router: Any
    gate: Any
    verdict: str | None = None

    def _forward_impl(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        shared_experts_input: torch.Tensor | None,
        input_ids: torch.Tensor | None = None,
    ) -> Any:
        if self.verdict is None:
            self._decide(hidden_states)
        return super()._forward_impl(hidden_states, router_logits, shared_experts_input, input_ids)

    def _decide(self, hidden_states: torch.Tensor) -> None:
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            name = self.layer_name
            warn_once(
                f"vllm: capture of {name}",
                f"vllm: {name}: a graph is captured before the first forward, with vLLM's router",
            )
            return
        with _deciding:
            # DBO runs two threads through one layer.
            if self.verdict is not None:
                return
            try:
                reason = "; ".join(reasons_against(facts_of(self)))
                if not reason:
                    router = ServedRouter(
                        self.router, self.gate, same_bits=bool(envs.VLLM_BATCH_INVARIANT)
                    )
            except (AttributeError, RouterError, TypeError, ValueError) as error:
                reason = str(error)
            if not reason:
                self.router = self.gate.served_by = router
            report_layer("vllm", self.layer_name, reason or None)
            self.verdict = reason or SERVED


def facts_of(runner: MoERunner) -> LayerFacts:
    """Read the facts that decide about a layer from its runner."""
    router, gate, config = runner.router, runner.gate, runner.moe_config
    if type(router) is not FusedTopKBiasRouter:
        return LayerFacts(router=type(router).__name__)
    # As packages do that patch routers which vLLM has made.
    if patched := {"select_experts", "_select_experts", "_compute_routing"} & vars(router).keys():
        return LayerFacts(router=f"router with a {' and '.join(sorted(patched))} of its own")
    if type(gate) is not ServedGateLinear:
        return LayerFacts(gate="elsewhere" if gate is None else f"a {type(gate).__name__}")
    if not gate.is_unquantized:
        return LayerFacts(quantized=True)
    num_experts, hidden_size = gate.weight.shape
    return LayerFacts(
        scoring_func=router.scoring_func,
        device=gate.weight.device.type,
        biased=gate.bias is not None,
        hooked=gate.hooked,
        offloaded=gate.offloaded,
        fused_shared_gate=runner._fse_fuse_gate,
        monolithic=runner.is_monolithic,
        naive_dispatch=runner.do_naive_dispatch_combine,
        gathered_over_pcp=(
            config.pcp_size > 1 and not config.moe_parallel_config.use_all2all_kernels
        ),
        padded_hidden_states=config.hidden_dim != hidden_size,
        num_experts=num_experts,
        shared_experts=router.num_fused_shared_experts,
        first_shared_id=router.global_num_experts,
    )
