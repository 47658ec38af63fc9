"""vLLM's runner of a MoE layer, which decides once who routes, and the router that it then has."""

from __future__ import annotations

import threading
from typing import Any

import torch
import vllm.envs as envs
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
    FusedTopKBiasRouter,
    _get_padding_mask,
)
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from dsv4_router_runtime.errors import RouterError
from dsv4_router_runtime.integrations.engine import bind_router, report_layer
from dsv4_router_runtime.log import warn_once

from .eligibility import LayerFacts, reasons_against
from .gate import ServedGateLinear

SERVED = "dsv4_router"
# Image tokens have this many ids, from image_sentinel_lo on.
IMAGE_IDS = 5
# Off: whether every kernel of vLLM between two routers waits for the one before it is not known
# (see "Programmatic dependent launch" in PRODUCTION.md).
PDL = False

_deciding = threading.Lock()


class ServedRouter(BaseRouter):
    """The router of one layer: logits, scores and top-k in one call.

    It keeps vLLM's router, `stock`, which routes whenever the logits have values: then the gate did
    not leave them out. What follows the choice of experts (recording, EPLB) is BaseRouter's.
    """

    # V4.1's specialized decode reads it, and runs its own top-k on the gate's logits if there is
    # one. It calls select_experts if there is none.
    e_score_correction_bias = None

    def __init__(self, stock: FusedTopKBiasRouter, gate: ServedGateLinear) -> None:
        super().__init__(stock.top_k, stock.global_num_experts, stock.eplb_state)
        self.stock = stock
        self.gate = gate
        self.capture_fn = stock.capture_fn
        self._routing_replay_out = stock._routing_replay_out
        table = stock._hash_indices_table
        bias = stock.e_score_correction_bias if table is None else None
        bias_vl = stock.bias_vl if stock.image_sentinel_lo > 0 else None
        self._first_image_id = None if bias_vl is None else stock.image_sentinel_lo
        self._hashed = table is not None
        # The tensors that the layer is bound to, by their names in the gate.
        bound = {
            "weight": gate.weight,
            "e_score_correction_bias": bias,
            "bias_vl": bias_vl,
            "tid2eid": table,
        }
        self._bound_tensors = {
            name: tensor.data for name, tensor in bound.items() if tensor is not None
        }
        self._columns = stock.top_k + stock.num_fused_shared_experts
        tensors = self._bound_tensors
        self._router = bind_router(
            tensors["weight"],
            tensors.get("e_score_correction_bias"),
            top_k=stock.top_k,
            routed_scaling_factor=stock.routed_scaling_factor,
            norm_topk_prob=stock.renormalize,
            bias_vl=tensors.get("bias_vl"),
            tid2eid=tensors.get("tid2eid"),
            num_shared_slots=stock.num_fused_shared_experts,
        )

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return self.stock.routing_method_type

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights FP32 and ids [N, top_k + shared], int32 unless int64 is asked for."""
        if not router_logits.is_meta:
            return self.stock._compute_routing(
                hidden_states, router_logits, indices_type, input_ids=input_ids
            )
        num_tokens = hidden_states.shape[0]
        shape = (num_tokens, self._columns)
        weights = hidden_states.new_empty(shape, dtype=torch.float32)
        ids_dtype = torch.int64 if indices_type is torch.int64 else torch.int32
        ids = hidden_states.new_empty(shape, dtype=ids_dtype)
        self._router(
            hidden_states,
            weights,
            ids,
            image_mask=self._images(input_ids),
            padding_mask=_get_padding_mask(num_tokens),
            input_ids=input_ids if self._hashed else None,
            pdl=PDL,
        )
        return weights, ids

    def _images(self, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Return the mask of image rows, by two kernels; None if the layer has no bias_vl."""
        first = self._first_image_id
        if first is None:
            return None
        if input_ids is None:
            raise ValueError(
                "input_ids: expected a torch.Tensor of the rows' token ids, by which image rows "
                "are found (got None)"
            )
        return input_ids.clamp(first, first + IMAGE_IDS - 1) == input_ids

    def take_weights(self) -> None:
        """Route by the weights that the gate has now; so do graphs that were captured before.

        vLLM calls this when new weights have been loaded, but before it copies them to where the
        old ones lie, which is where captured graphs read them. So the copy is made here.
        """
        with torch.inference_mode():
            for name, old in self._bound_tensors.items():
                new = getattr(self.gate, name, old)
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)
        self._router.refresh()


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
                    router = ServedRouter(self.router, self.gate)
            except (AttributeError, RouterError, TypeError, ValueError) as error:
                reason = str(error)
            if not reason:
                self.router = self.gate.served_by = router
            report_layer("vllm", self.layer_name, reason or None)
            self.verdict = reason or SERVED


def facts_of(runner: MoERunner) -> LayerFacts:
    """Read what decides about a layer from its runner."""
    router, gate, config = runner.router, runner.gate, runner.moe_config
    if type(router) is not FusedTopKBiasRouter:
        return LayerFacts(router=type(router).__name__)
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
        batch_invariant=envs.VLLM_BATCH_INVARIANT,
        max_num_tokens=config.max_num_tokens,
        num_experts=num_experts,
        shared_experts=router.num_fused_shared_experts,
        first_shared_id=router.global_num_experts,
        shared_weight=router.shared_expert_weight,
    )
