"""The router of one layer in vLLM's place, bound to its gate's tensors."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
    FusedTopKBiasRouter,
    _get_padding_mask,
)
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear

from dsv4_router_runtime.integrations.bound_layers import bind_router

# Image tokens have this many ids, from image_sentinel_lo on.
IMAGE_IDS = 5
# Off: whether every kernel of vLLM between two routers waits for the one before it is not known
# (see "Programmatic dependent launch" in PRODUCTION.md).
PDL = False


class ServedRouter(BaseRouter):
    """The router of one layer: logits, scores and top-k in one call.

    It keeps vLLM's router, `stock`, which routes whenever the logits have values: then the gate did
    not leave them out. The steps after the choice of experts (recording, EPLB) are BaseRouter's.
    """

    # V4.1's specialized decode reads it, and runs its own top-k on the gate's logits if there is
    # one. It calls select_experts if there is none.
    e_score_correction_bias = None

    def __init__(
        self, stock: FusedTopKBiasRouter, gate: GateLinear, *, same_bits: bool = False
    ) -> None:
        super().__init__(stock.top_k, stock.global_num_experts, stock.eplb_state)
        self.stock = stock
        self.gate = gate
        self.capture_fn = stock.capture_fn
        self._routing_replay_out = stock._routing_replay_out
        table = stock._hash_indices_table
        bias = stock.e_score_correction_bias if table is None else None
        bias_vl = stock.bias_vl if stock.image_sentinel_lo > 0 else None
        self._takes_token_ids = table is not None or bias_vl is not None
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
        self.weight_at = gate.weight.data_ptr()
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
            first_image_id=0 if bias_vl is None else stock.image_sentinel_lo,
            num_image_ids=0 if bias_vl is None else IMAGE_IDS,
            num_shared_slots=stock.num_fused_shared_experts,
            shared_weight=stock.shared_expert_weight,
            # vLLM captures all graphs of layers into one memory pool, and replays one at a time.
            share_captured_scratch=True,
            same_bits=same_bits,
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
        """Return weights FP32 and ids [N, top_k + shared], int32 unless indices_type is int64."""
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
            padding_mask=_get_padding_mask(num_tokens),
            input_ids=input_ids if self._takes_token_ids else None,
            pdl=PDL,
        )
        return weights, ids

    def take_weights(self) -> None:
        """Route by the weights that the gate has now; so do graphs that were captured before.

        vLLM calls this when new weights are loaded, but before it copies them over the old ones,
        which captured graphs read. So the copy is made here.
        """
        with torch.inference_mode():
            for name, old in self._bound_tensors.items():
                new = getattr(self.gate, name, old)
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)
        self._router.refresh()
